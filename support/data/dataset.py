"""A dataset on disk: where its record files are, its classes, and how many images an epoch has."""

import contextlib
import os
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from support.base import files
from support.base.errors import DataError
from support.base.messages import printable, report
from support.data import records

CLASS_NAMES_FILE = "batches.meta.txt"

EXTRACTED_FOLDER = "cifar-10-batches-bin"  # also the name of the folder inside the archive
SYNTHETIC_FOLDER = "cifar-10-synthetic-bin"

# What the tutorial says about CIFAR-10. The constants of cifar10_input.py differ if edited.
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
NUM_CLASSES = len(CLASS_NAMES)
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000

MIN_CLASSES, MAX_CLASSES = 2, 256  # of any dataset; a label is one byte
MAX_NAME_LENGTH = 200  # characters
MAX_NAMES_BYTES = 1_000_000
MAX_LISTED_CLASSES = 12  # in messages


class Dataset(NamedTuple):
    """What the scripts know about a dataset; see `read_dataset`."""

    folder: str  # with the record files
    class_names: tuple  # in the order of the labels
    num_examples_per_epoch_for_train: int
    num_examples_per_epoch_for_eval: int


def read_dataset(
    folder,
    num_classes=NUM_CLASSES,
    num_train=NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN,
    num_eval=NUM_EXAMPLES_PER_EPOCH_FOR_EVAL,
    class_names=None,
):
    """Returns the `Dataset` in a folder.

    An argument that differs from CIFAR-10's number is your choice, made by editing a constant. It
    sets the size of an epoch, whatever the files contain; the number of classes must match the
    class names. All other numbers come from the files.

    The folder and its files may be missing, because prediction does not need them.

    Raises:
      DataError: from `read_class_names`.
    """
    with contextlib.suppress(OSError):
        if num_train == NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN:
            num_train = records.count_records(folder, eval_data=False)
    with contextlib.suppress(OSError):
        if num_eval == NUM_EXAMPLES_PER_EPOCH_FOR_EVAL:
            num_eval = records.count_records(folder, eval_data=True)
    class_names = class_names or read_class_names(folder, num_classes)
    return Dataset(os.fspath(folder), class_names, num_train, num_eval)


def find_folder(data_dir, synthetic=False):
    """Returns the path of the folder that holds the record files, or will hold them.

    It is `cifar-10-batches-bin` in `data_dir`. If that does not exist, and `data_dir` itself holds
    record files, it is `data_dir`. The synthetic dataset has a folder of its own.
    """
    if synthetic:
        return os.path.join(data_dir, SYNTHETIC_FOLDER)
    folder = os.path.join(data_dir, EXTRACTED_FOLDER)
    names = (*records.TRAIN_FILES, *records.TEST_FILES)
    paths = (os.path.join(data_dir, name) for name in names)
    if not os.path.isdir(folder) and any(map(os.path.exists, paths)):
        return os.fspath(data_dir)
    return folder


def read_class_names(folder, num_classes=NUM_CLASSES):
    """Returns the class names, in the order of the labels: a tuple of strings.

    They are the lines of `batches.meta.txt`: `num_classes` lines, or any number of them if
    `num_classes` is 10, as in CIFAR-10. Without that file, they are CIFAR-10's, or, for another
    `num_classes`, "class 0", "class 1" and so on.

    Raises:
      DataError: the file cannot be read, does not list 2 to 256 distinct names, or does not list
        `num_classes` names.
    """
    path = os.path.join(folder, CLASS_NAMES_FILE)
    cure = "write one name per line, or delete the file to use CIFAR-10's ten classes"
    try:
        text = files.read_regular(path, MAX_NAMES_BYTES).decode("utf-8-sig")
        lines = re.split("\r\n|\r|\n", text)  # splitlines would also split at other characters
        names = tuple(filter(None, map(normalize_name, lines)))
    except (FileNotFoundError, NotADirectoryError):
        if num_classes == NUM_CLASSES:
            return CLASS_NAMES
        return tuple(f"class {label}" for label in range(num_classes))
    except (OSError, ValueError) as error:  # includes UnicodeDecodeError
        raise DataError(f"{path} cannot be read ({error}); {cure}") from error
    if not MIN_CLASSES <= len(set(names)) == len(names) <= MAX_CLASSES:
        raise DataError(
            f"{path} must list {MIN_CLASSES} to {MAX_CLASSES} different classes; {cure}"
        )
    if num_classes not in (NUM_CLASSES, len(names)):
        raise DataError(
            f"{path} lists {len(names)} classes, but NUM_CLASSES is {num_classes}; set "
            f"NUM_CLASSES to {len(names)}, or list {num_classes} names in the file"
        )
    return names


def normalize_name(name):
    """Returns a class name in the one form that is stored, compared and printed.

    It has no surrounding spaces, its letters are in Unicode's composed form, and all characters
    that are not printable are escaped.

    Raises:
      ValueError: the name has more than MAX_NAME_LENGTH characters.
    """
    name = printable(unicodedata.normalize("NFC", name.strip()))
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"the class name {name[:20]}... has {len(name)} characters, more than {MAX_NAME_LENGTH}"
        )
    return name


def write_class_names(folder, names):
    """Writes the file that `read_class_names` reads.

    Raises:
      DataError: the names would be read as other names, for example because one is empty.
    """
    path = os.path.join(folder, CLASS_NAMES_FILE)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    if read_class_names(folder) != tuple(names):
        raise DataError(
            f"the class names {list(names)} cannot be the lines of {CLASS_NAMES_FILE}: each "
            "name must be unique, printable and not empty"
        )


def describe_classes(names):
    """Returns the number of classes and the first dozen names, such as "2 classes (cat, dog)"."""
    listed = names
    if len(names) > MAX_LISTED_CLASSES:
        listed = [*names[:MAX_LISTED_CLASSES], "..."]
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({', '.join(listed)})"


def check_dataset(folder, num_classes=NUM_CLASSES):
    """Checks that the files exist, hold whole records, and have no labels out of range.

    Missing training files (see `records.record_files`) and classes without images are allowed. Each
    is reported in one line on stderr, because they may be a mistake.

    Raises:
      DataError: a file fails the check. The message names the record and says how to fix it.
    """
    cure = "replace the file"
    remedies = {EXTRACTED_FOLDER: "download CIFAR-10", SYNTHETIC_FOLDER: "generate the dataset"}
    if remedy := remedies.get(os.path.basename(folder)):
        cure += f", or move {folder} away and run the same command again to {remedy}"
    if num_classes != NUM_CLASSES:
        cure += f", or correct NUM_CLASSES, which is {num_classes}"
    class_names = read_class_names(folder, num_classes)
    for kind, eval_data in (("training", False), ("test", True)):
        paths = records.record_files(folder, eval_data)
        for path in paths:
            if problem := records.find_problem(path, len(class_names)):
                raise DataError(f"{path} {problem}; {cure}")
        if not eval_data and len(paths) < len(records.TRAIN_FILES):
            count = f"{len(paths)} of {len(records.TRAIN_FILES)}"
            report(f"Training files in {folder}: {count}")
        labels = np.concatenate([records.read_labels(path) for path in paths])
        missing = np.setdiff1d(range(len(class_names)), labels)
        if missing.size:
            description = describe_classes([class_names[label] for label in missing])
            report(f"The dataset has no {kind} images of {description}")
