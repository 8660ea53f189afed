"""Converts images in folders and SVHN to the records of a dataset, in a shuffled order."""

import hashlib
import os
import sys
import tempfile

import numpy as np

from support.base import files
from support.base.errors import DataError, UserError
from support.base.progress import show_progress
from support.data import dataset, matlab, records
from support.data.image_files import (
    ImageError,
    find_files,
    list_folder,
    make_printable,
    read_found_image,
    report_skipped_files,
    stack_images,
)

# The names of folders with training images, with test images, and with images that serve as test
# images if there are no others. In any capitalization.
TRAIN_NAMES = {"train", "training"}
TEST_NAMES = {"test", "testing"}
VALIDATION_NAMES = {"val", "valid", "validation", "dev", "eval"}
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"

# What is kept in memory of each image. `key` determines the order: a hash of the seed and of the
# image's name, so that the order in which the file system lists files does not matter. `pixels` is
# a hash of the pixels.
_ENTRY = np.dtype([("key", ">u8"), ("pixels", ">u8"), ("label", np.uint8), ("is_test", np.bool_)])


class ImageFolders:
    """Images in folders, one folder for each class.

    `len()` is the number of files. Iterating yields (name, label, image): bytes, int, and what
    `read_found_image` returns.

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
                f"the names of two folders in {parent} differ only in leading or trailing spaces "
                "or in the Unicode form of their letters"
            )
        self._num_files = 0
        for folder in self._folders:
            path = os.path.join(parent, folder)
            count = sum(1 for _ in find_files(path))
            if not count:
                raise DataError(f"the class {folder} is empty: {path} has no files")
            self._num_files += count

    def __len__(self):
        return self._num_files

    def __iter__(self):
        for label, folder in enumerate(self._folders):
            for path in find_files(os.path.join(self._parent, folder)):
                image = read_found_image(path)
                yield os.fsencode(os.path.relpath(path, self._parent)), label, image


def _class_name(folder):
    """Returns the class name for the name of a folder."""
    # Names are UTF-8, whatever the locale says.
    name = os.fsencode(folder).decode("utf-8", "surrogateescape")
    return make_printable(dataset.normalize_name(name))


def _list_folders(parent):
    """Returns the names of a folder's subfolders, and the number of its files.

    Raises:
      DataError: the folder cannot be read.
    """
    try:
        names = list_folder(parent)
    except OSError as error:
        raise DataError(f"{parent} cannot be read ({error.strerror})") from error
    folders = [name for name in names if os.path.isdir(os.path.join(parent, name))]
    return folders, len(names) - len(folders)


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
    if not os.path.exists(path):
        raise DataError(f"{path} is missing; download it from {SVHN_URL}")
    try:
        images, labels = matlab.load_arrays(path, ["X", "y"])
    except ValueError as error:
        raise DataError(f"{path} is not an SVHN file: {error}") from error
    return images, labels.ravel()


def find_splits(folder, test_fraction=None):
    """Finds the training and test images in a folder.

    Args:
      folder: path. The folder contains `train` and `test`, or other folders with the usual names,
        both with a folder for each class. With `test_fraction`, it contains the folders of the
        classes itself.
      test_fraction: float or None.

    Returns:
      (train, test): `ImageFolders`. `test` is None if `test_fraction` is given.

    Raises:
      DataError: the folder does not have that layout.
    """
    folders, _ = _list_folders(folder)
    if test_fraction is not None:
        # As classes, they would give meaningless labels.
        if splits := _find_named(folder, folders, TRAIN_NAMES | TEST_NAMES | VALIDATION_NAMES):
            raise DataError(
                f"{folder} has a folder {splits[0]}, which is not a class; omit --test_fraction to "
                "use the folders train and test, or set --images to the folder with the classes"
            )
        return ImageFolders(folder), None
    used = _find_split_folders(folder, folders)
    for name in sorted(set(folders) - set(used)):
        print(f"Skipping {folder}/{name}, which is neither {' nor '.join(used)}", file=sys.stderr)
    train, test = (ImageFolders(os.path.join(folder, name)) for name in used)
    if unmatched := sorted(set(train.class_names) ^ set(test.class_names)):
        raise DataError(
            f"the class {unmatched[0]} must be in both {folder}/{used[0]} and {folder}/{used[1]}"
        )
    return train, test


def _find_split_folders(parent, folders):
    """Returns the names of the folders with the training and with the test images."""
    found = {
        "train": _find_named(parent, folders, TRAIN_NAMES),
        "test": _find_named(parent, folders, TEST_NAMES)
        or _find_named(parent, folders, VALIDATION_NAMES),
    }
    for split, names in found.items():
        if not names:
            raise DataError(
                f"{parent} has no folder {split} with a folder for each class; it must have the "
                "folders train and test. If your images are not divided, set --images to the "
                "folder with the classes and add --test_fraction=0.2"
            )
        if len(names) > 1:
            raise DataError(
                f"{parent} has two folders for the {split} images, {names[0]} and {names[1]}; "
                "rename or remove one of them"
            )
    return [names[0] for names in found.values()]


def _find_named(parent, folders, names):
    """Returns those of the folders that have one of the names and contain folders."""
    named = [folder for folder in folders if folder.lower() in names]
    return [folder for folder in named if _list_folders(os.path.join(parent, folder))[0]]


def _write_unsorted(sources, file, seed):
    """Writes the records of all images; returns the `_ENTRY` array and the unreadable count."""
    entries = bytearray()
    unreadable_count = skipped_count = 0
    with show_progress("Converting", sum(map(len, sources)), " images") as progress:
        for is_test, source in enumerate(sources):
            missing = set(range(len(source.class_names)))
            for name, label, image in source:
                if image is None:
                    skipped_count += 1
                elif isinstance(image, ImageError):
                    unreadable_count += 1
                    progress.write_line(str(image))
                else:
                    (image,) = stack_images([image])
                    pixels = image.transpose(2, 0, 1).tobytes()
                    file.write(bytes([label]) + pixels)
                    entries += _hash(b"%d %s" % (seed, name)) + _hash(pixels)
                    entries += bytes([label, is_test])
                    missing.discard(label)
                progress.update(1)
            if missing:
                name = source.class_names[min(missing)]
                raise DataError(f"the class {name} is empty: it has no readable image")
    file.flush()
    report_skipped_files(skipped_count)
    return np.frombuffer(entries, _ENTRY), unreadable_count


def _hash(data):
    return hashlib.blake2b(data, digest_size=8).digest()


def _hold_out(entries, class_names, test_fraction):
    """Makes the first entries of each class test images; keeps at least one training image."""
    for label, name in enumerate(class_names):
        indices = np.flatnonzero(entries["label"] == label)
        if indices.size < 2:
            raise DataError(
                f"the class {name} has only one image; --test_fraction requires two, one for "
                "training and one for testing"
            )
        count = np.clip(np.rint(test_fraction * indices.size), 1, indices.size - 1)
        entries["is_test"][indices[: int(count)]] = True


def _copy_records(file, positions, folder, names):
    """Copies the records at some positions of a file to new files, to each of them in turn."""
    for number, name in enumerate(names):
        with open(os.path.join(folder, name), "wb") as copy:
            for position in positions[number :: len(names)].tolist():
                # The pages of a memory map would count as memory of this process.
                offset = position * records.RECORD_BYTES
                copy.write(os.pread(file.fileno(), records.RECORD_BYTES, offset))


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
      (train_count, test_count, class_names, unreadable_count): the numbers of records written; a
      tuple of strings; the number of images that could not be read.

    Raises:
      DataError: a class is empty, there are too few images, or the folder cannot be written.
      UserError: the folder exists and is not empty.
    """
    with (
        files.new_folder("--output", output) as staging,
        tempfile.TemporaryFile(dir=staging) as file,
    ):
        sources = [train] if test is None else [train, test]
        entries, unreadable_count = _write_unsorted(sources, file, seed)
        order = np.argsort(entries["key"], kind="stable")
        entries = entries[order]
        if test is None:
            _hold_out(entries, train.class_names, test_fraction)
        is_test = entries["is_test"]
        train_order, test_order = order[~is_test], order[is_test]
        if train_order.size < len(records.TRAIN_FILES):
            raise DataError(
                f"there are {train_order.size} training images; at least "
                f"{len(records.TRAIN_FILES)} are required, one for each training file"
            )
        _copy_records(file, train_order, staging, records.TRAIN_FILES)
        _copy_records(file, test_order, staging, records.TEST_FILES)
        dataset.write_class_names(staging, train.class_names)
    _report_repeated_images(entries["pixels"][is_test], entries["pixels"][~is_test])
    return train_order.size, test_order.size, train.class_names, unreadable_count


def _report_repeated_images(test_hashes, train_hashes):
    """Prints how many test images are also training images, if there are any."""
    if count := np.isin(test_hashes, train_hashes).sum():
        print(
            f"Test images with the same pixels as a training image: {count}; they make the "
            "precision look better than it is",
            file=sys.stderr,
        )


def convert_svhn(folder, output, seed):
    """Converts the two files of SVHN in a folder; see `convert`."""
    train, test = (SVHN(os.path.join(folder, f"{name}_32x32.mat")) for name in ("train", "test"))
    return convert(train, test, output, seed)


def convert_folders(folder, output, seed, test_fraction=None):
    """Converts folders of images; see `find_splits` and `convert`."""
    train, test = find_splits(folder, test_fraction)
    if count := train.num_stray_files + (test.num_stray_files if test is not None else 0):
        print(f"Skipping files that are not in a class folder: {count}", file=sys.stderr)
    return convert(train, test, output, seed, test_fraction)


def check_output_is_outside(output, image_folder):
    """Raises UserError if `output` is inside `image_folder`, where the next run would find it."""
    inner, outer = os.path.realpath(output), os.path.realpath(image_folder)
    if os.path.commonpath([inner, outer]) == outer:
        raise UserError(
            f"--output={output} is inside --images={image_folder}; choose another folder"
        )
