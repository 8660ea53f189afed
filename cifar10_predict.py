"""Predicts the classes of your images: the most likely ones, with their probabilities.

    python cifar10_predict.py cat.png dog.jpg photos/
    python cifar10_predict.py --json photos/
    python cifar10_predict.py --export_dir=/tmp/cifar10_model/1

Images can be PNG, JPEG, GIF, BMP or WebP files of any shape, up to 250 megapixels. They are
prepared like test images and classified with the newest checkpoint. If an image cannot be read, the
script reports it on stderr, still classifies the others, and exits with code 1. --export_dir writes
the model as a SavedModel.
"""

import contextlib
import itertools
import json
from typing import NamedTuple

import numpy as np
from absl import app, flags

import cifar10
import cifar10_input
from support.base import command_line, files, options
from support.base.errors import CheckpointError, UserError, first_line
from support.base.messages import printable, report
from support.data import image_files, records
from support.ops import tensorflow_v1
from support.ops.tensorflow_v1 import tf
from support.run import checkpoints

FLAGS = flags.FLAGS

options.define("prediction", "checkpoint")


class Model(NamedTuple):
    """A restored model."""

    session: tf.Session
    images: tf.Tensor  # placeholder, uint8 [n, 32, 32, 3]
    probabilities: tf.Tensor  # float32 [n, classes]
    class_names: tuple
    checkpoint: checkpoints.Checkpoint


@contextlib.contextmanager
def open_model():
    """Yields the `Model` of the newest checkpoint in --checkpoint_dir. No dataset is needed.

    Raises:
      UserError: there is no checkpoint, or it cannot be used.
    """
    options.values()  # checks them: a constant may have been edited
    trained = checkpoints.use_newest(FLAGS.checkpoint_dir).settings
    settings = cifar10.training_settings(trained and trained.class_names)
    config = tensorflow_v1.session_config(FLAGS.use_fp16)
    shape = [None, *records.image_shape()]
    with tf.Graph().as_default(), tf.Session(config=config) as session:
        images = tf.placeholder(tf.uint8, shape, name="images")
        # TensorFlow does not compare the images that an exported model gets with the placeholder.
        crops = cifar10_input.central_crops(tf.ensure_shape(images, shape))
        logits = cifar10.inference(crops, len(settings.class_names))
        probabilities = tf.nn.softmax(logits, name="probabilities")
        variables = checkpoints.find_variables(FLAGS.use_moving_averages)
        saver = tf.train.Saver(variables)

        def restore(checkpoint):
            checkpoint.check_settings(settings)
            checkpoint.check_variables(variables)
            checkpoints.restore(session, saver, checkpoint)
            return checkpoint

        restored = checkpoints.use_newest(FLAGS.checkpoint_dir, restore)
        yield Model(session, images, probabilities, settings.class_names, restored)


def predict(model, images):
    """Predicts the classes of images.

    Args:
      model: `Model`.
      images: uint8 [n, 32, 32, 3], or a list of n images; values from 0 to 255.

    Returns:
      For each image, a list of the --top most likely classes (all if 0) as (name, probability),
      the most likely one first.

    Raises:
      CheckpointError: the model produces non-finite probabilities.
      UserError: the images have another type or shape, or do not fit into memory.
    """
    if not len(images):  # some operations refuse empty batches
        return []
    images = image_files.stack_images(images)
    with tensorflow_v1.out_of_memory_explained():
        probabilities = model.session.run(model.probabilities, {model.images: images})
    if not np.isfinite(probabilities).all():
        raise CheckpointError(f"{model.checkpoint.path} produces non-finite probabilities")
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, : FLAGS.top or None]
    return [
        [(model.class_names[i], float(row[i])) for i in indices]
        for row, indices in zip(probabilities, best, strict=True)
    ]


def predict_files(model, paths):
    """Predicts the classes of images in files and folders, and prints a line for each of them.

    Raises:
      UserError: some images could not be read. The lines of the others have been printed.
    """
    read = skipped = unreadable = 0
    found = image_files.read_images(paths)
    while batch := list(itertools.islice(found, FLAGS.batch_size)):
        images = [image for _, image in batch if isinstance(image, np.ndarray)]
        predictions = iter(predict(model, images))
        for path, image in batch:
            if image is None:
                skipped += 1
            elif isinstance(image, np.ndarray):
                read += 1
                _print_predictions(model, path, next(predictions))
            else:
                unreadable += 1
                report(str(image))
                if FLAGS.json:
                    print(json.dumps({"picture": path, "error": str(image)}), flush=True)
    image_files.report_skipped_files(skipped)
    if unreadable:
        raise UserError(f"{unreadable} of {unreadable + read} images could not be read")


def _print_predictions(model, path, predictions):
    if FLAGS.json:
        line = {
            "picture": path,
            "predictions": [{"class": name, "probability": p} for name, p in predictions],
            "checkpoint": model.checkpoint.path,
            "step": model.checkpoint.step,
        }
        print(json.dumps(line), flush=True)
    else:
        classes = ", ".join(f"{name} {p:.3f}" for name, p in predictions)
        print(f"{printable(path)}: {classes}", flush=True)


def export(model, export_dir):
    """Writes a model as a SavedModel with the signature `serving_default`.

    Its input is `images`, uint8 [n, 32, 32, 3]. Its outputs are `probabilities`, float32
    [n, classes]; `classes`, int64 [n], the index of the most likely class; and `class_names`,
    string [n, classes], the names in the order of the probabilities, repeated for each image
    because servers expect a row per image in each output.

    Raises:
      UserError: the folder is neither new nor empty, or cannot be written.
    """
    num_images = tf.shape(model.images)[0]
    signature = tf.saved_model.predict_signature_def(
        {"images": model.images},
        {
            "probabilities": model.probabilities,
            "classes": tf.argmax(model.probabilities, axis=1),
            "class_names": tf.tile(tf.constant([model.class_names]), [num_images, 1]),
        },
    )
    with files.new_folder("--export_dir", export_dir) as staging:
        try:
            builder = tf.saved_model.Builder(staging)
            builder.add_meta_graph_and_variables(
                model.session,
                [tf.saved_model.SERVING],
                {tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: signature},
                clear_devices=True,
                strip_default_attrs=True,
                saver=tf.train.Saver(),  # by default, it would make TensorFlow look for GPUs
            )
            builder.save()
        except (ValueError, tf.errors.OpError) as error:  # the Saver's, if the folder is gone
            raise OSError(first_line(error)) from error


def main(argv):
    paths = argv[1:]
    if not paths and FLAGS.export_dir is None:
        raise app.UsageError("specify images or folders of images, or --export_dir")
    tensorflow_v1.warn_of_unusable_gpus()
    with open_model() as model:
        if FLAGS.export_dir is not None:
            export(model, FLAGS.export_dir)
            path, step = model.checkpoint.path, model.checkpoint.step
            report(f"Exported {path} (step {step}) to {FLAGS.export_dir}")
        predict_files(model, paths)


if __name__ == "__main__":
    command_line.run(main, takes_arguments=True)
