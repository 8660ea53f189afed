"""The dataset on disk: the format of its records, its classes, and checks before and during use.

The format is that of CIFAR-10, described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import contextlib
import os
import sys

import numpy as np

from support.base import files
from support.base.errors import DataError

# A record is a label byte and the pixels of one image: all red values, row by row, then all green
# ones, then all blue ones.
LABEL_BYTES = 1
HEIGHT = 32  # pixels
WIDTH = 32  # pixels
DEPTH = 3  # channels: 3 (red, green, blue) or 1 (gray)
IMAGE_BYTES = DEPTH * HEIGHT * WIDTH
RECORD_BYTES = LABEL_BYTES + IMAGE_BYTES

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)
CLASS_NAMES_FILE = "batches.meta.txt"

EXTRACTED_FOLDER = "cifar-10-batches-bin"  # also the name of the folder inside the archive
SYNTHETIC_FOLDER = "cifar-10-synthetic-bin"

CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
NUM_CLASSES = len(CLASS_NAMES)
MIN_CLASSES, MAX_CLASSES = 2, 256  # of any dataset; a label is one byte
MAX_LISTED_CLASSES = 12  # in messages

# The tutorial's constants for CIFAR-10. Those of cifar10_input differ if the user has edited them.
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000
IMAGE_SIZE = 24


def record_files(folder, eval_data):
    """Returns the paths of the test file (`eval_data` true) or of the training files.

    There may be fewer than five training files: the paths end with the last file that exists. If
    none exists, all five paths are returned.
    """
    paths = [os.path.join(folder, name) for name in (TEST_FILES if eval_data else TRAIN_FILES)]
    existing = [number for number, path in enumerate(paths, 1) if os.path.exists(path)]
    return paths[: max(existing, default=len(paths))]


def count_records(folder, eval_data):
    """Returns the number of records in the `record_files`. Raises OSError if a file is missing."""
    return sum(os.path.getsize(path) for path in record_files(folder, eval_data)) // RECORD_BYTES


def find_folder(data_dir):
    """Returns the path of the folder that holds the record files, or will hold them.

    It is `cifar-10-batches-bin` in `data_dir`. If that does not exist, and `data_dir` itself holds
    record files, it is `data_dir`.
    """
    folder = os.path.join(data_dir, EXTRACTED_FOLDER)
    paths = (os.path.join(data_dir, name) for name in (*TRAIN_FILES, *TEST_FILES))
    if not os.path.isdir(folder) and any(map(os.path.exists, paths)):
        return os.fspath(data_dir)
    return folder


def read_class_names(folder, num_classes=None):
    """Returns the class names, in the order of the labels: a tuple of strings.

    They are the lines of `batches.meta.txt`. If that file does not exist, they are CIFAR-10's, or,
    for a `num_classes` other than 10, "class 0", "class 1" and so on.

    Args:
      folder: path; the folder with the record files.
      num_classes: int; the user's edited NUM_CLASSES, or None if it is unedited.

    Raises:
      DataError: the file cannot be read, does not list 2 to 256 distinct names, or does not list
        `num_classes` names.
    """
    path = os.path.join(folder, CLASS_NAMES_FILE)
    cure = "write one name per line, or delete the file to use CIFAR-10's ten classes"
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = tuple(filter(None, map(str.strip, file)))
    except (FileNotFoundError, NotADirectoryError):
        if num_classes in (None, NUM_CLASSES):
            return CLASS_NAMES
        return tuple(f"class {label}" for label in range(num_classes))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {cure}") from error
    if not MIN_CLASSES <= len(names) <= MAX_CLASSES:
        raise DataError(
            f"{path} lists {len(names)} classes instead of {MIN_CLASSES} to {MAX_CLASSES}; {cure}"
        )
    for number, name in enumerate(names):
        if name in names[:number]:
            raise DataError(f"{path} lists {name!r} twice; {cure}")
    if num_classes not in (None, len(names)):
        raise DataError(
            f"{path} lists {len(names)} classes, but NUM_CLASSES is {num_classes}; set "
            f"NUM_CLASSES to {len(names)}, or list {num_classes} names in the file"
        )
    return names


def write_class_names(folder, names):
    """Writes the file that `read_class_names` reads."""
    with open(os.path.join(folder, CLASS_NAMES_FILE), "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)


def describe_classes(names):
    """Returns the number of classes and the first dozen names, such as "2 classes (cat, dog)"."""
    listed = names
    if len(names) > MAX_LISTED_CLASSES:
        listed = [*names[:MAX_LISTED_CLASSES], "..."]
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({', '.join(listed)})"


def check_records(folder, num_classes=None):
    """Checks that the files exist, hold whole records, and have no labels out of range.

    TensorFlow does not report such errors: its reader silently drops an incomplete last record, and
    a label out of range makes the loss NaN on a GPU. Checking CIFAR-10 takes well under a second.

    Missing training files (see `record_files`) and classes without images are allowed. Each is
    reported in one line on stderr, because they may be a mistake.

    Args:
      folder: path; the folder with the record files.
      num_classes: see `read_class_names`.

    Raises:
      DataError: a file fails the check. The message names the record and says how to fix it.
    """
    cure = _suggest_cure(folder)
    if num_classes is not None:
        cure += f", or correct NUM_CLASSES, which is {num_classes}"
    class_names = read_class_names(folder, num_classes)
    train, test = record_files(folder, eval_data=False), record_files(folder, eval_data=True)
    for path in train + test:
        if problem := _find_problem(path, len(class_names)):
            raise DataError(f"{path} {problem}; {cure}")
    if len(train) < len(TRAIN_FILES):
        print(f"Training files in {folder}: {len(train)} of {len(TRAIN_FILES)}", file=sys.stderr)
    absences = [
        f"no {kind} images of {describe_classes(missing)}"
        for kind, paths in (("training", train), ("test", test))
        if (missing := _find_missing_classes(paths, class_names))
    ]
    if absences:
        print(f"The dataset has {' and '.join(absences)}", file=sys.stderr)


def _find_missing_classes(paths, class_names):
    """Returns the names of the classes that have no images in valid record files."""
    counts = sum(np.bincount(_read_labels(path), minlength=len(class_names)) for path in paths)
    return [name for name, count in zip(class_names, counts, strict=True) if not count]


def _read_labels(path):
    """Returns the labels of a file of whole records: uint8 [n]."""
    return np.memmap(path, np.uint8, mode="r").reshape(-1, RECORD_BYTES)[:, 0]


def _find_problem(path, num_classes):
    """Returns what is wrong with a record file, or None."""
    if not os.path.isfile(path):
        return "is not a file" if os.path.exists(path) else "is missing"
    try:
        size = os.path.getsize(path)
        num_records, rest = divmod(size, RECORD_BYTES)
        if rest:
            if size % (RECORD_BYTES + LABEL_BYTES) == 0:
                return (
                    f"has records of {RECORD_BYTES + LABEL_BYTES} bytes, which have two labels; if "
                    "it is CIFAR-100, convert the original files with cifar10_convert.py "
                    "--cifar100=FOLDER --output=NEW_FOLDER"
                )
            return (
                f"ends within record {num_records} (counted from 0), after {rest} of "
                f"{RECORD_BYTES} bytes"
            )
        if num_records == 0:
            return "is empty"
        labels = _read_labels(path)
        invalid = np.flatnonzero(labels >= num_classes)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if invalid.size:
        return (
            f"has label {labels[invalid[0]]} in record {invalid[0]} (counted from 0), but labels "
            f"must be 0 to {num_classes - 1}"
        )
    return None


def _suggest_cure(folder):
    actions = {
        EXTRACTED_FOLDER: "download CIFAR-10",
        SYNTHETIC_FOLDER: "generate the synthetic dataset",
    }
    cure = "replace the file"
    if action := actions.get(os.path.basename(folder)):
        cure += f", or move {folder} away and run the same command again to {action}"
    return cure


@contextlib.contextmanager
def _unreadable_files_explained():
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error


class ChangeDetector:
    """Detects changes to record files while they are being read.

    `check_records` validates the files before they are read. If one is truncated or overwritten
    later, TensorFlow reads fewer records or wrong labels without an error.

    Creating a detector reads the files once; CIFAR-10's training files take a fraction of a second.

    Args:
      folder: path; the folder with the record files.
      eval_data: bool; watch the test file instead of the training files.
    """

    @_unreadable_files_explained()
    def __init__(self, folder, eval_data):
        paths = record_files(folder, eval_data)
        self._before = {path: os.stat(path) for path in paths}
        self._digests = {path: files.hash_file(path) for path in paths}

    def check(self):
        """Raises DataError if the content of a file changed, or if it can no longer be read.

        A file with a new modification time is read again: backups and file servers, for example,
        change the time without changing the content.
        """
        for path, before in self._before.items():
            try:
                now = os.stat(path)
                if now.st_size != before.st_size:
                    raise DataError(
                        f"{path} has {now.st_size} bytes, but had {before.st_size} when the script "
                        "started"
                    )
                if now.st_mtime_ns != before.st_mtime_ns:
                    if files.hash_file(path) != self._digests[path]:
                        raise DataError(f"{path} was modified after the script started")
                    self._before[path] = now
            except OSError as error:
                raise DataError(
                    f"{path} can no longer be read ({error.strerror}); it existed when the script "
                    "started"
                ) from error
