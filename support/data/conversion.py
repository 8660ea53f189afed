"""Converts images in folders and SVHN to the records of a dataset, in a shuffled order."""

import contextlib
import hashlib
import itertools
import math
import os
import sys

import numpy as np

from support.base import files
from support.base.errors import DataError, UserError
from support.base.progress import show_progress
from support.data import dataset, records
from support.data.image_files import ImageError, make_printable, read_image, stack_images

SPLITS = ("train", "test")
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
BUCKET_BYTES = 1 << 23  # average size of a bucket; one bucket at a time is in memory


class RecordShuffler:
    """Shuffles records on disk, so that memory use does not grow with their number.

    This is an external bucket sort. The sort key is a hash of the seed and of the record's name, so
    the order does not depend on the order in which the file system lists the files.

    Args:
      folder: path of an existing folder for the bucket files.
      capacity: int; the expected number of records, which determines the number of buckets.
      seed: int.
    """

    _ENTRY = np.dtype(
        [("key", "<u8"), ("is_test", np.bool_), ("record", np.uint8, records.RECORD_BYTES)]
    )

    def __init__(self, folder, capacity, seed):
        self._folder = folder
        self._seed = seed
        self._num_buckets = max(1, math.ceil(capacity * self._ENTRY.itemsize / BUCKET_BYTES))

    def _bucket_path(self, bucket):
        return os.path.join(self._folder, f"bucket_{bucket}")

    def add(self, name, is_test, label, image):
        """Adds a record.

        Args:
          name: bytes that identify the image within the training or the test images.
          is_test: bool.
          label: int.
          image: uint8 [32, 32, 3].

        Raises:
          UserError: the image has another type or shape.
        """
        (image,) = stack_images([image])
        digest = hashlib.blake2b(b"%d %s" % (self._seed, name), digest_size=8).digest()
        key = int.from_bytes(digest)
        entry = np.zeros([], self._ENTRY)
        entry["key"] = key
        entry["is_test"] = is_test
        entry["record"][0] = label
        entry["record"][records.LABEL_BYTES :] = image.transpose(2, 0, 1).reshape(-1)
        # The most significant bits of the key select the bucket. Its file is not kept open because
        # there can be more buckets than a process may have open files.
        with open(self._bucket_path(key * self._num_buckets >> 64), "ab") as file:
            file.write(entry.tobytes())

    def sorted_records(self):
        """Yields (is_test, record) in the shuffled order: bool, bytes."""
        for bucket in range(self._num_buckets):
            path = self._bucket_path(bucket)
            if os.path.exists(path):
                entries = np.fromfile(path, self._ENTRY)
                os.remove(path)
                for index in np.argsort(entries["key"], kind="stable"):
                    yield bool(entries["is_test"][index]), entries["record"][index].tobytes()
                del entries  # frees the memory before the next bucket is loaded


class ImageFolders:
    """Images in folders, one folder for each class.

    `len()` is the number of files. Iterating yields (name, label, image): bytes, int, and uint8
    [32, 32, 3] or the `ImageError` that reading the file raised.

    Args:
      parent: path of the folder that contains the folders.

    Attributes:
      class_names: tuple of strings; the sorted names of the folders, in printable form.
      num_stray_files: int; files in `parent` itself, which belong to no class.

    Raises:
      DataError: the folder cannot be read, there are fewer than 2 or more than 256 classes, two
        classes have the same name, or a class has no files.
    """

    def __init__(self, parent):
        self._parent = parent
        folders, self.num_stray_files = _list_folders(parent)
        if not dataset.MIN_CLASSES <= len(folders) <= dataset.MAX_CLASSES:
            raise DataError(
                f"{parent} must have {dataset.MIN_CLASSES} to {dataset.MAX_CLASSES} folders, one "
                f"for each class; it has {len(folders)}"
            )
        classes = sorted((_class_name(folder), folder) for folder in folders)
        self.class_names, self._folders = zip(*classes, strict=True)
        if len(set(self.class_names)) < len(folders):
            raise DataError(
                f"two folders in {parent} have the same name except for leading or trailing spaces "
                "or for the Unicode form of their letters"
            )
        self._num_files = 0
        for folder in self._folders:
            path = os.path.join(parent, folder)
            count = sum(1 for _ in _find_files(path))
            if not count:
                raise DataError(f"the class {folder} is empty: {path} has no files")
            self._num_files += count

    def __len__(self):
        return self._num_files

    def __iter__(self):
        for label, folder in enumerate(self._folders):
            for path in _find_files(os.path.join(self._parent, folder)):
                try:
                    image = read_image(path)
                except ImageError as error:
                    image = error
                yield os.fsencode(os.path.relpath(path, self._parent)), label, image


def _class_name(folder):
    """Returns the class name for the name of a folder."""
    # Names are UTF-8, whatever the locale says.
    name = os.fsencode(folder).decode("utf-8", "surrogateescape")
    return make_printable(dataset.normalize_name(name))


def _list_folders(parent):
    """Returns the names of a folder's subfolders, and the number of its files; ignores hidden ones.

    Raises:
      DataError: the folder cannot be read.
    """
    try:
        names = [name for name in os.listdir(parent) if not name.startswith(".")]
    except OSError as error:
        raise DataError(f"{parent} cannot be read ({error.strerror})") from error
    folders = [name for name in names if os.path.isdir(os.path.join(parent, name))]
    return folders, len(names) - len(folders)


def _find_files(folder, ancestors=()):
    """Yields the paths of all files in a folder and its subfolders, except hidden ones.

    Links to folders are followed unless they form a cycle; `ancestors` identifies the folders that
    contain this one. A folder that cannot be read is itself yielded; `read_image` raises the error
    for it.
    """
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            return
        listing = os.scandir(folder)
    except OSError:
        yield folder
        return
    with listing as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):
                yield from _find_files(entry.path, (*ancestors, identity))
            else:
                yield entry.path


class SVHN:
    """The Street View House Numbers, cropped to 32 x 32 pixels.

    `len()` is the number of images. Iterating yields (name, label, image): bytes, int, uint8
    [32, 32, 3].

    Args:
      path: path of a MATLAB 5 file with `X`, uint8 [32, 32, 3, n], and `y`, [n, 1], the digits,
        where 10 stands for 0. The file is loaded into memory.

    Attributes:
      class_names: tuple of strings; the digits.

    Raises:
      DataError: the file is missing, damaged, or has other contents.
      UserError: SciPy is not installed.
    """

    class_names = tuple("0123456789")

    def __init__(self, path):
        images, labels = _load_svhn(path)
        shape = (records.HEIGHT, records.WIDTH, records.DEPTH, labels.size)
        if images.shape != shape or images.dtype != np.uint8:
            raise DataError(
                f"{path}: X is {images.dtype} {list(images.shape)}, not uint8 {list(shape)}, which "
                f"support/data/records.py and the {labels.size} labels in y require"
            )
        invalid = np.setdiff1d(labels, np.arange(1, 11))
        if invalid.size:
            raise DataError(f"{path}: y contains {invalid[0]}, but labels are 1 to 10")
        self._images, self._labels = images, labels

    def __len__(self):
        return self._labels.size

    def __iter__(self):
        for number, label in enumerate(self._labels):
            yield b"%d" % number, int(label) % 10, self._images[..., number]


def _load_svhn(path):
    """Returns the arrays `X` and `y` of a MATLAB file, `y` as [n]."""
    try:
        import scipy.io
    except ImportError as error:
        raise UserError(
            "--svhn needs SciPy to read MATLAB files: pip install -r requirements-svhn.txt"
        ) from error
    try:
        arrays = scipy.io.loadmat(path, variable_names=["X", "y"])
        return arrays["X"], arrays["y"].ravel()
    except KeyError as error:
        raise DataError(f"{path} is not an SVHN file: it has no array {error}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path} is missing; download it from {SVHN_URL}") from error
    except Exception as error:  # SciPy raises errors of many types on damaged files
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} is not an SVHN file: it cannot be read ({reason})") from error


def find_splits(folder, test_fraction=None):
    """Finds the training and test images in a folder.

    Args:
      folder: path. The folder contains `train` and `test`, both with a folder for each class. With
        `test_fraction`, it contains the folders of the classes itself.
      test_fraction: float or None.

    Returns:
      (train, test): `ImageFolders`. `test` is None if `test_fraction` is given.

    Raises:
      DataError: the folder does not have that layout.
    """
    folders, _ = _list_folders(folder)
    if test_fraction is not None:
        # In any capitalization, such as `Train`. As classes, they would give meaningless labels.
        if splits := [name for name in folders if name.lower() in SPLITS]:
            raise DataError(
                f"{folder} has a folder {splits[0]}, which is not a class; omit --test_fraction to "
                "use the folders train and test, or set --images to the folder with the classes"
            )
        return ImageFolders(folder), None
    if missing := [name for name in SPLITS if name not in folders]:
        raise DataError(
            f"{folder} has no folder {missing[0]}; it must have the folders train and test, both "
            "with a folder for each class. If your images are not divided, set --images to the "
            "folder with the classes and add --test_fraction=0.2"
        )
    for name in sorted(set(folders) - set(SPLITS)):
        print(f"Skipping {folder}/{name}, which is neither train nor test", file=sys.stderr)
    train, test = (ImageFolders(os.path.join(folder, name)) for name in SPLITS)
    if unmatched := sorted(set(train.class_names) ^ set(test.class_names)):
        raise DataError(
            f"the class {unmatched[0]} must be in both {folder}/train and {folder}/test"
        )
    return train, test


def count_held_out_images(class_names, counts, test_fraction):
    """Returns how many images of each class to use as test images: int [classes].

    Every class keeps at least one training image and gets at least one test image.

    Args:
      class_names: list of strings.
      counts: int [classes]; the images of each class.
      test_fraction: float, more than 0 and less than 1.

    Raises:
      DataError: a class has only one image.
    """
    for name, count in zip(class_names, counts, strict=True):
        if count < 2:
            raise DataError(
                f"the class {name} has only one image; --test_fraction requires two, one for "
                "training and one for testing"
            )
    return np.clip(np.rint(test_fraction * counts), 1, counts - 1).astype(int)


def read_all_images(sources, shuffler):
    """Adds all images to a shuffler and prints an error message for each unreadable file.

    Args:
      sources: list of `ImageFolders` or `SVHN`; the training images and, if there are any, the
        test images.
      shuffler: `RecordShuffler`.

    Returns:
      int [len(sources), classes]; the number of images read.

    Raises:
      DataError: a class has no readable image.
    """
    class_names = sources[0].class_names
    counts = np.zeros([len(sources), len(class_names)], int)
    with show_progress("Converting", sum(map(len, sources)), " images") as progress:
        for is_test, source in enumerate(sources):
            for name, label, image in source:
                if isinstance(image, ImageError):
                    progress.write_line(str(image))
                else:
                    shuffler.add(name, is_test, label, image)
                    counts[is_test, label] += 1
                progress.update(1)
            for name, count in zip(class_names, counts[is_test], strict=True):
                if not count:
                    raise DataError(f"the class {name} is empty: it has no readable image")
    return counts


def write_records(shuffler, folder, held_out_counts):
    """Writes shuffled records to the record files of a dataset.

    Args:
      shuffler: `RecordShuffler`.
      folder: path.
      held_out_counts: int [classes]; the training records of each class to write to the test file.
    """
    remaining = held_out_counts.copy()
    with contextlib.ExitStack() as stack:
        train_files = _open_record_files(stack, folder, eval_data=False)
        test_files = _open_record_files(stack, folder, eval_data=True)
        for is_test, record in shuffler.sorted_records():
            if remaining[record[0]]:
                remaining[record[0]] -= 1
                is_test = True
            next(test_files if is_test else train_files).write(record)


def _open_record_files(stack, folder, eval_data):
    """Returns an endless iterator that yields the open record files in turn."""
    names = records.TEST_FILES if eval_data else records.TRAIN_FILES
    paths = [os.path.join(folder, name) for name in names]
    return itertools.cycle([stack.enter_context(open(path, "wb")) for path in paths])


def convert(train, test, output, seed=0, test_fraction=None):
    """Writes a dataset in the binary format of CIFAR-10.

    Args:
      train: `ImageFolders` or `SVHN`; the training images.
      test: the test images, of the same classes; None to use `test_fraction` of each class of
        `train`.
      output: path of the folder to create.
      seed: int; determines the order of the records.
      test_fraction: float, more than 0 and less than 1; None if `test` is given.

    Returns:
      (train_count, test_count, unreadable_count): int; the records written and the files skipped.

    Raises:
      DataError: a class is empty, there are too few images, or the folder cannot be written.
      UserError: the folder exists and is not empty.
    """
    sources = [train] if test is None else [train, test]
    total = sum(map(len, sources))
    with files.new_folder("--output", output) as staging:
        shuffler = RecordShuffler(staging, total, seed)
        counts = read_all_images(sources, shuffler)
        if test is None:
            held_out_counts = count_held_out_images(train.class_names, counts[0], test_fraction)
        else:
            held_out_counts = np.zeros_like(counts[0])
        train_count = int(np.sum(counts[0] - held_out_counts))
        if train_count < len(records.TRAIN_FILES):
            raise DataError(
                f"there are {train_count} training images; at least {len(records.TRAIN_FILES)} are "
                "required, one for each training file"
            )
        write_records(shuffler, staging, held_out_counts)
        dataset.write_class_names(staging, train.class_names)
    num_read = int(np.sum(counts))
    return train_count, num_read - train_count, total - num_read


def check_output_is_outside(output, image_folder):
    """Raises UserError if `output` is inside `image_folder`, where the next run would find it."""
    inner, outer = os.path.realpath(output), os.path.realpath(image_folder)
    if os.path.commonpath([inner, outer]) == outer:
        raise UserError(
            f"--output={output} is inside --images={image_folder}; choose another folder"
        )
