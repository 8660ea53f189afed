"""Converts images in folders and SVHN to the records of a dataset, in a shuffled order."""

import hashlib
import os
import tempfile

import numpy as np

from support.base import files
from support.base.errors import DataError, foreign_file
from support.base.messages import report
from support.base.progress import show_progress
from support.data import dataset, matlab, records
from support.data.image_files import (
    ImageError,
    find_files,
    read_images,
    report_skipped_files,
    sort_visible,
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

    `class_names` is a tuple of the sorted, printable names of the folders in `parent`. `len()` is
    the number of files. Iterating yields (name, label, image): bytes, int, and what `read_images`
    yields for the file.

    Raises:
      DataError: the folder cannot be read, there are fewer than 2 or more than 256 classes, or two
        classes have the same name.
    """

    def __init__(self, parent):
        names, num_files = _list_folders(parent)
        if not dataset.MIN_CLASSES <= len(names) <= dataset.MAX_CLASSES:
            raise DataError(
                f"{parent} must have {dataset.MIN_CLASSES} to {dataset.MAX_CLASSES} folders, one "
                f"for each class; it has {len(names)}"
            )
        with foreign_file(parent):  # a name may be too long
            folders = {dataset.normalize_name(name): name for name in names}
        if len(folders) < len(names) or "" in folders:
            raise DataError(
                f"the names of two folders in {parent} differ only in leading or trailing spaces "
                "or in the Unicode form of their letters, or the name of one consists of spaces; "
                "rename or merge them"
            )
        self.class_names = tuple(sorted(folders))
        self._parent = parent
        self._folders = [os.path.join(parent, folders[name]) for name in self.class_names]
        if num_files:
            report(f"Skipping files in {parent} that are not in a class folder: {num_files}")

    def __len__(self):
        return sum(1 for folder in self._folders for _ in find_files(folder))

    def __iter__(self):
        for label, folder in enumerate(self._folders):
            for path, image in read_images([folder]):
                yield os.fsencode(os.path.relpath(path, self._parent)), label, image


def _list_folders(parent):
    """Returns the names of subfolders and the number of files. Raises DataError if unreadable."""
    try:
        names = sort_visible(os.listdir(parent))
    except OSError as error:
        raise DataError(f"{parent} cannot be read ({error.strerror})") from error
    folders = [name for name in names if os.path.isdir(os.path.join(parent, name))]
    return folders, len(names) - len(folders)


class SVHN:
    """The training or test images of the Street View House Numbers, cropped to 32 x 32 pixels.

    `len()` is the number of images. Iterating yields (name, label, image): bytes, int, uint8
    [32, 32, 3]. `split` is "train" or "test". The file `SPLIT_32x32.mat` in `folder` has `X`, uint8
    [32, 32, 3, n], and `y`, [n, 1], the digits, where 10 stands for 0. It is loaded into memory.

    Raises:
      DataError: the file is missing, damaged, or has other contents.
      UserError: SciPy is not installed.
    """

    class_names = tuple("0123456789")

    def __init__(self, folder, split):
        path = os.path.join(folder, f"{split}_32x32.mat")
        if not os.path.isfile(path):
            raise DataError(f"{path} is missing; download it from {SVHN_URL}")
        try:
            self._images, labels = matlab.load_arrays(path, ["X", "y"])
        except ValueError as error:
            raise DataError(
                f"{path} is not an SVHN file: {error}; download it again from {SVHN_URL}"
            ) from error
        self._labels = labels.ravel()
        shape = (*records.image_shape(), self._labels.size)
        is_valid = self._images.dtype == np.uint8 and self._images.shape == shape
        if not is_valid or not np.isin(self._labels, range(1, 11)).all():
            raise DataError(
                f"{path}: X must be uint8 {list(shape)} and y must be 1 to 10, but X is "
                f"{self._images.dtype} {list(self._images.shape)} and y is "
                f"{np.unique(self._labels)}"
            )

    def __len__(self):
        return self._labels.size

    def __iter__(self):
        for number, label in enumerate(self._labels):
            yield b"%d" % number, int(label) % 10, self._images[..., number]


def find_splits(folder, test_fraction=None):
    """Finds the training and test images in a folder.

    The folder contains `train` and `test`, or other folders with the usual names, both with a
    folder for each class. With `test_fraction`, it contains the folders of the classes itself.

    Returns:
      (train, test): `ImageFolders`. `test` is None if `test_fraction` is given.

    Raises:
      DataError: the folder does not have that layout.
    """
    folders, _ = _list_folders(folder)
    train, test, validation = (
        [
            name
            for name in folders
            if name.lower() in names and _list_folders(os.path.join(folder, name))[0]
        ]
        for names in (TRAIN_NAMES, TEST_NAMES, VALIDATION_NAMES)
    )
    if test_fraction is not None:
        if splits := train + test + validation:  # as classes, they would give meaningless labels
            raise DataError(
                f"{folder} has a folder {splits[0]}, which is not a class; omit --test_fraction to "
                "use the folders train and test, or set --images to the folder with the classes"
            )
        return ImageFolders(folder), None
    test = test or validation
    for split, names in (("train", train), ("test", test)):
        if len(names) != 1:
            raise DataError(
                f"{folder} must have one folder {split} with a folder for each class; it has "
                f"{' and '.join(names) or 'none'}. If your images are not divided, set --images to "
                "the folder with the classes and add --test_fraction=0.2"
            )
    used = train + test
    for name in sorted(set(folders) - set(used)):
        report(f"Skipping {folder}/{name}, which is neither {' nor '.join(used)}")
    train, test = (ImageFolders(os.path.join(folder, name)) for name in used)
    if unmatched := sorted(set(train.class_names) ^ set(test.class_names)):
        raise DataError(
            f"the class {unmatched[0]} must be in both {folder}/{used[0]} and {folder}/{used[1]}"
        )
    return train, test


def _write_unsorted(sources, file, seed):
    """Writes the records of all images; returns the `_ENTRY` array and the unreadable count."""
    entries = bytearray()
    unreadable_count = skipped_count = 0
    with show_progress("Converting", sum(map(len, sources)), " images") as progress:
        for is_test, source in enumerate(sources):
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
                progress.update(1)
    file.flush()
    report_skipped_files(skipped_count)
    return np.frombuffer(entries, _ENTRY), unreadable_count


def _hash(data):
    return hashlib.blake2b(data, digest_size=8).digest()


def _hold_out(entries, test_fraction):
    """Makes the first entries of each class test images; keeps at least one training image."""
    for label in np.unique(entries["label"]):
        indices = np.flatnonzero(entries["label"] == label)
        count = np.clip(np.rint(test_fraction * indices.size), 1, indices.size - 1)
        entries["is_test"][indices[: int(count)]] = True


def _check_classes(entries, class_names):
    """Raises DataError if a class has no training or no test images."""
    for is_test, split in enumerate(("training", "test")):
        labels = entries["label"][entries["is_test"] == is_test]
        for label in np.setdiff1d(range(len(class_names)), labels):
            raise DataError(
                f"the class {class_names[label]} has no readable {split} image; each class needs "
                "at least one training image and one test image"
            )


def _copy_records(file, positions, folder, names):
    """Distributes the records at some positions of a file to new files; none of these is empty."""
    for number, name in enumerate(names[: positions.size]):
        with open(os.path.join(folder, name), "wb") as copy:
            for position in positions[number :: len(names)].tolist():
                # The pages of a memory map would count as memory of this process.
                offset = position * records.RECORD_BYTES
                copy.write(os.pread(file.fileno(), records.RECORD_BYTES, offset))


def convert(train, test, output, seed=0, test_fraction=None):
    """Writes a dataset in the binary format of CIFAR-10.

    Args:
      train: `ImageFolders` or `SVHN`; the training images.
      test: the test images, of the same classes; None to hold out a part of `train`.
      output: path of the folder to create.
      seed: int; determines the order of the records.
      test_fraction: float in (0, 1); the part of each class to hold out if `test` is None.

    Returns:
      (train_count, test_count, class_names, unreadable_count): the numbers of records written; a
      tuple of strings; the number of images that could not be read.

    Raises:
      DataError: a class has no training or test images, or the folder cannot be written.
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
            _hold_out(entries, test_fraction)
        _check_classes(entries, train.class_names)
        is_test = entries["is_test"]
        _copy_records(file, order[~is_test], staging, records.TRAIN_FILES)
        _copy_records(file, order[is_test], staging, records.TEST_FILES)
        dataset.write_class_names(staging, train.class_names)
    if count := np.isin(entries["pixels"][is_test], entries["pixels"][~is_test]).sum():
        report(
            f"Test images with the same pixels as a training image: {count}; they make the "
            "precision look better than it is"
        )
    return (~is_test).sum(), is_test.sum(), train.class_names, unreadable_count
