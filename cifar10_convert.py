"""Makes a data set for the other scripts of your pictures, or of SVHN's digits.

    python cifar10_convert.py --pictures=photos --output=/tmp/photos
    python cifar10_convert.py --pictures=photos --test_fraction=0.2 --output=/tmp/photos
    python cifar10_convert.py --svhn=downloads --output=/tmp/svhn
    python cifar10_train.py --data_dir=/tmp/photos --train_dir=/tmp/photos_train

The pictures of a class are in a folder with its name: photos/train/cat and photos/test/cat, or with
--test_fraction photos/cat. They become 32 x 32 pixels as cifar10_predict.py makes them, and records
in the binary format of CIFAR-10. One that cannot be read is named on stderr and left out.
"""

import contextlib
import hashlib
import math
import os
import sys

import numpy as np
from absl import app, flags

import cifar10_data
from cifar10_data import DataError
from cifar10_pictures import PictureError, make_printable, read_picture
from cifar10_progress import show_progress
from cifar10_runtime import UserError, check_flags, check_new_folder, run

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "pictures",
    None,
    "Folder of pictures: train/CLASS/* and test/CLASS/* in it, or with --test_fraction CLASS/*. "
    "Any size; PNG, JPEG, GIF, BMP and WebP.",
)
flags.DEFINE_string(
    "svhn",
    None,
    "Folder that holds train_32x32.mat and test_32x32.mat, the cropped digits of "
    "http://ufldl.stanford.edu/housenumbers/.",
)
flags.DEFINE_string(
    "output", None, "Folder to make, for --data_dir; it must not hold anything yet."
)
flags.DEFINE_float(
    "test_fraction",
    None,
    "Share of each class's pictures to test on, where no folders train and test tell which.",
)
flags.DEFINE_integer(
    "shuffle_seed",
    0,
    "Decides the order of the records, and which pictures --test_fraction takes. The same pictures "
    "and seed give the same files.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
check_flags(
    ["test_fraction"],
    lambda value: value is None or 0 < value < 1,
    "it must be more than 0 and less than 1",
)

BUCKET_BYTES = 1 << 23  # of keys and records that are sorted in memory at a time, about

PARTS = ("train", "test")  # the folders that tell what to train on, and what to test on

_KEYED_RECORD = np.dtype(
    [("key", "<u8"), ("record", np.uint8, cifar10_data.RECORD_BYTES)]  # sorted by the first
)


class _Shuffler:
    """Puts records in an order that a seed decides, in files, so that memory does not grow.

    A record's place is given by a hash of the seed and of its name. It is kept in one of many
    files, by the first bits of that hash; when all are there, one file after the other is read,
    and sorted.

    Args:
      folder: where those files go.
      most: int; how many records may come.
      seed: int.
    """

    def __init__(self, folder, most, seed):
        self._folder = folder
        self._seed = seed
        self._num_buckets = max(1, math.ceil(most * _KEYED_RECORD.itemsize / BUCKET_BYTES))

    def _path(self, bucket):
        return os.path.join(self._folder, f"bucket_{bucket}")

    def add(self, name, label, planes):
        """Takes a record: a name of its own (bytes), a label, and uint8 [3, 32, 32]."""
        digest = hashlib.blake2b(b"%d %s" % (self._seed, name), digest_size=8).digest()
        keyed = np.zeros([], _KEYED_RECORD)
        keyed["key"] = key = int.from_bytes(digest)
        keyed["record"][0] = label
        keyed["record"][cifar10_data.LABEL_BYTES :] = planes.reshape(-1)
        # Opened for each: there may be more of them than files that a process may have open.
        with open(self._path(key * self._num_buckets >> 64), "ab") as file:
            file.write(keyed.tobytes())

    def records(self):
        """Gives the records in their order, uint8 [RECORD_BYTES] each."""
        for bucket in range(self._num_buckets):
            with contextlib.suppress(FileNotFoundError):  # no record came to lie there
                keyed = np.fromfile(self._path(bucket), _KEYED_RECORD)
                os.remove(self._path(bucket))
                yield from keyed["record"][np.argsort(keyed["key"], kind="stable")]


class _Files:
    """Deals out records to several open files in turn."""

    def __init__(self, files):
        self._files = files
        self.count = 0

    def write(self, record):
        self._files[self.count % len(self._files)].write(record.tobytes())
        self.count += 1


def _walk(folder, ancestors=()):
    """Gives the paths of all files in a folder, and in those within, but hidden ones.

    A folder that cannot be read is given itself. A link to a folder is followed, but not back to
    one that it lies in.
    """
    try:
        status = os.stat(folder)
        entries = os.scandir(folder)
    except OSError:
        yield folder
        return
    here = (status.st_dev, status.st_ino)
    with entries:
        for entry in entries if here not in ancestors else ():
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):
                yield from _walk(entry.path, (*ancestors, here))
            else:
                yield entry.path


def _list_folders(parent):
    """Returns the names of the folders in a folder, and how many files there are; no hidden ones.

    Raises:
      DataError: it cannot be read.
    """
    try:
        names = [name for name in os.listdir(parent) if not name.startswith(".")]
    except OSError as error:
        raise DataError(f"{parent} cannot be read ({error.strerror})") from error
    folders = [name for name in names if os.path.isdir(os.path.join(parent, name))]
    return folders, len(names) - len(folders)


class Pictures:
    """Folders of pictures, one for each class.

    Args:
      parent: the folder that they are in.

    Attributes:
      class_names: the folders' names, so that they can be printed, sorted: tuple of strings.
      total: int; the files in them.
      strays: int; the files beside them, which are of no class.

    Raises:
      DataError: there are not 2 to 256 classes, or one of them has no files.
    """

    def __init__(self, parent):
        self._parent = parent
        names, self.strays = _list_folders(parent)
        low, high = cifar10_data.MIN_CLASSES, cifar10_data.MAX_CLASSES
        if not low <= len(names) <= high:
            raise DataError(
                f"{parent} has {len(names)} folders; there must be {low} to {high}, one for each "
                "class"
            )
        # In the order of the classes' names, as there may be more to the folders'.
        classes = sorted((make_printable(name.strip()), name) for name in names)
        self.class_names, self._folders = zip(*classes, strict=True)
        if len(set(self.class_names)) < len(names):
            raise DataError(f"two folders in {parent} name the same class, but for spaces")
        self.total = 0
        for folder in self._folders:
            count = sum(1 for _ in _walk(os.path.join(parent, folder)))
            if not count:
                raise DataError(f"the class {folder} is empty: {parent}/{folder} holds no files")
            self.total += count

    def __iter__(self):
        """Gives (name, label, uint8 [3, 32, 32] or PictureError) for each file."""
        for label, folder in enumerate(self._folders):
            for path in _walk(os.path.join(self._parent, folder)):
                try:
                    result = read_picture(path).transpose(2, 0, 1)
                except PictureError as error:
                    result = error
                yield os.fsencode(os.path.relpath(path, self._parent)), label, result


class SVHN:
    """The Street View House Numbers, cropped to 32 x 32 pixels.

    A file holds `X`, uint8 [32, 32, 3, n], and `y`, [n, 1], the digits, where 10 is a 0. Source:
    http://ufldl.stanford.edu/housenumbers/.

    Args:
      path: a MATLAB file, of version 5; it is read as a whole.

    Attributes:
      class_names: the digits.
      total: int; images.

    Raises:
      DataError: it cannot be read, or holds something else.
    """

    class_names = tuple("0123456789")

    def __init__(self, path):
        images, labels = _load_svhn(path)
        shape = (cifar10_data.HEIGHT, cifar10_data.WIDTH, cifar10_data.DEPTH, labels.size)
        if images.shape != shape or images.dtype != np.uint8:
            raise DataError(
                f"{path}: X is {images.dtype} {list(images.shape)}, not uint8 {list(shape)} as y "
                f"with its {labels.size} labels has it"
            )
        wrong = np.setdiff1d(labels, np.arange(1, 11))
        if wrong.size:
            raise DataError(f"{path}: y has {wrong[0]}, but labels are 1 to 10")
        self._images, self._labels = images, labels
        self.total = labels.size

    def __iter__(self):
        """Gives (name, label, uint8 [3, 32, 32]) for each image."""
        for number, label in enumerate(self._labels):
            yield b"%d" % number, int(label) % 10, self._images[..., number].transpose(2, 0, 1)


def _load_svhn(path):
    """Returns the arrays X and y, flattened, of a MATLAB file."""
    try:
        import scipy.io
    except ImportError as error:
        raise UserError(
            "--svhn needs SciPy, which reads MATLAB's files: pip install -r requirements-svhn.txt"
        ) from error
    try:
        arrays = scipy.io.loadmat(path, variable_names=["X", "y"])
        return arrays["X"], arrays["y"].ravel()
    except KeyError as error:
        raise DataError(f"{path} does not hold the array {error}; it is not SVHN's") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{path} is missing; http://ufldl.stanford.edu/housenumbers/ has it"
        ) from error
    except Exception as error:  # of any kind, as SciPy raises on damaged files
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); it is not SVHN's") from error


def shuffle(source, folder, seed, progress):
    """Reads all that a source has.

    Args:
      source: `Pictures` or `SVHN`.
      folder: where to put files meanwhile.
      seed: int.
      progress: from `show_progress`; what cannot be read is told there.

    Returns:
      shuffler: a `_Shuffler` with the records.
      counts: list of ints; the records of each class.

    Raises:
      DataError: nothing of a class could be read.
    """
    shuffler = _Shuffler(folder, source.total, seed)
    counts = [0] * len(source.class_names)
    for name, label, planes in source:
        if isinstance(planes, PictureError):
            progress.tell(str(planes))
        else:
            shuffler.add(name, label, planes)
            counts[label] += 1
        progress.update(1)
    for name, count in zip(source.class_names, counts, strict=True):
        if not count:
            raise DataError(f"the class {name} is empty: it has no picture that can be read")
    return shuffler, counts


def _count_tests(names, counts, fraction):
    """Returns how many of each class's records to test on: at least 1, and at least 1 left."""
    for name, count in zip(names, counts, strict=True):
        if count < 2:
            raise DataError(
                f"the class {name} has a single picture; --test_fraction needs one to train on and "
                "one to test on"
            )
    return [min(max(1, round(fraction * count)), count - 1) for count in counts]


def convert(train, test, output, seed=0, test_fraction=None):
    """Writes a data set.

    Args:
      train: `Pictures` or `SVHN`.
      test: as `train`; None to take `test_fraction` of each class of `train`.
      output: the folder to make.
      seed: int; decides the order.
      test_fraction: float; over 0, under 1.

    Returns:
      (int, int, int): the records to train on, those to test on, and what could not be read.

    Raises:
      DataError: a class is empty, there are too few pictures, or the folder cannot be written.
    """
    total = train.total + (test.total if test else 0)
    with (
        cifar10_data.preparing(output, "--output"),
        cifar10_data.make_whole(output) as staging,
        contextlib.ExitStack() as stack,
    ):
        check_new_folder("--output", output)  # another process may have made it meanwhile
        with show_progress("Converting", total, " pictures") as progress:
            shuffled, counts = shuffle(train, staging, seed, progress)
            train_files, test_files = (
                _Files(
                    [
                        stack.enter_context(open(path, "wb"))
                        for path in cifar10_data.record_files(staging, eval_data)
                    ]
                )
                for eval_data in (False, True)
            )
            left = [0] * len(counts)  # of each class, to test on
            if test is None:
                left = _count_tests(train.class_names, counts, test_fraction)
            for record in shuffled.records():
                label = record[0]
                (test_files if left[label] else train_files).write(record)
                left[label] = max(0, left[label] - 1)
            if test is not None:
                shuffled, _ = shuffle(test, staging, seed, progress)
                for record in shuffled.records():
                    test_files.write(record)
        if train_files.count < len(cifar10_data.TRAIN_FILES):
            raise DataError(
                f"there are {train_files.count} pictures to train on; at least "
                f"{len(cifar10_data.TRAIN_FILES)} are needed, one for each file"
            )
        cifar10_data.write_class_names(staging, train.class_names)
    written = train_files.count + test_files.count
    return train_files.count, test_files.count, total - written


def find_pictures(parent, test_fraction):
    """Returns the `Pictures` to train on, and those to test on or None, in a folder.

    Raises:
      DataError: the folders are not as `--pictures` tells.
    """
    folders, _ = _list_folders(parent)
    if test_fraction is not None:
        # Of any spelling: as classes they would make a data set that means nothing.
        if parts := [name for name in folders if name.lower() in PARTS]:
            raise DataError(
                f"{parent} has a folder {parts[0]}, which is no class; leave --test_fraction away, "
                f"and have folders train and test in {parent}; or name the folder with the classes"
            )
        return Pictures(parent), None
    if missing := [name for name in PARTS if name not in folders]:
        raise DataError(
            f"{parent} has no folder {missing[0]}; it must have train and test, with a folder for "
            "each class in both. Or name the folder that has those of the classes, with "
            "--test_fraction=0.2"
        )
    for name in sorted(set(folders) - set(PARTS)):
        print(f"{parent}/{name} is neither train nor test: left out", file=sys.stderr)
    train, test = (Pictures(os.path.join(parent, name)) for name in PARTS)
    if odd := sorted(set(train.class_names) ^ set(test.class_names)):
        raise DataError(f"the class {odd[0]} must be in both {parent}/train and {parent}/test")
    return train, test


def check_output(output, pictures):
    """Raises UserError where `output` would be taken for a class the next time."""
    inside, around = os.path.realpath(output), os.path.realpath(pictures)
    if os.path.commonpath([inside, around]) == around:
        raise UserError(f"--output={output} lies in --pictures={pictures}; name another folder")


def main():
    if bool(FLAGS.pictures) == bool(FLAGS.svhn):
        raise app.UsageError("name either --pictures or --svhn")
    if not FLAGS.output:
        raise app.UsageError("name the folder to make with --output")
    check_new_folder("--output", FLAGS.output)  # before anything is done in vain
    if FLAGS.svhn:
        if FLAGS.test_fraction is not None:
            raise app.UsageError("--svhn has images to test on; leave --test_fraction away")
        train, test = (SVHN(os.path.join(FLAGS.svhn, f"{name}_32x32.mat")) for name in PARTS)
    else:
        check_output(FLAGS.output, FLAGS.pictures)
        train, test = find_pictures(FLAGS.pictures, FLAGS.test_fraction)
        if strays := sum(part.strays for part in (train, test) if part is not None):
            print(f"{strays} files are in no class's folder: left out", file=sys.stderr)
    output = os.path.realpath(FLAGS.output)  # it may be a link to an empty folder
    counts = convert(train, test, output, FLAGS.shuffle_seed, FLAGS.test_fraction)
    print(
        f"{counts[0]} pictures to train on and {counts[1]} to test on, of "
        f"{cifar10_data.describe_classes(train.class_names)}, are in {FLAGS.output}; {counts[2]} "
        "could not be read"
    )


if __name__ == "__main__":
    run(main)
