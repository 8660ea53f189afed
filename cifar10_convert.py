"""Converts your own images, SVHN or other versions of CIFAR to a dataset for the other scripts.

Put the images of each class into a folder named after the class:

    photos/train/cat/1.jpg    photos/test/cat/1.png
    photos/train/dog/1.jpg    photos/test/dog/1.png

Then convert them and train on the result:

    python cifar10_convert.py --images=photos --output=/tmp/photos
    python cifar10_train.py --data_dir=/tmp/photos --train_dir=/tmp/photos_train

If your images are not divided into training and test images (photos/cat, photos/dog), use a fifth
of each class as test images:

    python cifar10_convert.py --images=photos --test_fraction=0.2 --output=/tmp/photos

The script scales and crops images to 32 x 32 pixels, exactly as cifar10_predict.py does, and writes
them in the binary format of CIFAR-10. It lists and skips images that cannot be read.

To convert SVHN, download train_32x32.mat and test_32x32.mat from
http://ufldl.stanford.edu/housenumbers/ to a folder:

    python cifar10_convert.py --svhn=downloads --output=/tmp/svhn

The Python version of CIFAR-10 (the one that Keras and torchvision download) and both versions of
CIFAR-100 are converted from the folder or the archive. The records keep their order:

    python cifar10_convert.py --cifar10_python=cifar-10-python.tar.gz --output=/tmp/cifar10
    python cifar10_convert.py --cifar100=cifar-100-binary.tar.gz --output=/tmp/cifar100
"""

from absl import app, flags

from support.base import command_line, options, streams
from support.base.messages import printable
from support.data import conversion, dataset, formats

FLAGS = flags.FLAGS

SOURCE_FLAGS = ("images", "svhn", "cifar10_python", "cifar100")

options.define("conversion")


@streams.tolerate_lost_output()
def main(argv=None):
    given = [name for name in SOURCE_FLAGS if FLAGS[name].value]
    if len(given) != 1:
        raise app.UsageError(f"specify exactly one of --{', --'.join(SOURCE_FLAGS)}")
    if not FLAGS.output:
        raise app.UsageError("specify the folder to create: --output=FOLDER")
    if given != ["images"] and FLAGS.test_fraction is not None:
        raise app.UsageError(f"--{given[0]} has its own test images; omit --test_fraction")
    if FLAGS.cifar10_python:
        result = formats.convert(FLAGS.cifar10_python, "cifar10_python", FLAGS.output)
    elif FLAGS.cifar100:
        result = formats.convert(FLAGS.cifar100, "cifar100", FLAGS.output, FLAGS.cifar100_labels)
    elif FLAGS.svhn:
        train, test = (conversion.SVHN(FLAGS.svhn, name) for name in ("train", "test"))
        result = conversion.convert(train, test, FLAGS.output, FLAGS.shuffle_seed)
    else:
        train, test = conversion.find_splits(FLAGS.images, FLAGS.test_fraction)
        result = conversion.convert(
            train, test, FLAGS.output, FLAGS.shuffle_seed, FLAGS.test_fraction
        )
    train_count, test_count, class_names, *unreadable = result
    print(
        f"Wrote {train_count} training images and {test_count} test images of "
        f"{dataset.describe_classes(class_names)} to {printable(FLAGS.output)}"
        + "".join(f"; unreadable files: {count}" for count in unreadable)
    )


if __name__ == "__main__":
    command_line.run(main)
