"""Record files: their layout, their checks, and changes to them while they are read.

The format is that of CIFAR-10, described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import contextlib
import os

import numpy as np

from support.base import files
from support.base.errors import DataError, foreign_file

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


def image_shape():
    """Returns the shape of an image: [HEIGHT, WIDTH, DEPTH]."""
    return [HEIGHT, WIDTH, DEPTH]


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


def read_labels(path):
    """Returns the labels of the records in a file: uint8 [n]."""
    # Not a memory map: if another process truncated the file, SIGBUS would end this process.
    with open(path, "rb") as file:
        records = iter(lambda: file.read(RECORD_BYTES), b"")
        return np.array([record[0] for record in records], np.uint8)


def find_problem(path, num_classes):
    """Returns what is wrong with a record file, or None.

    TensorFlow does not report such errors: its reader silently drops an incomplete last record, and
    a label out of range makes the loss NaN on a GPU. Checking CIFAR-10 takes well under a second.
    """
    if not os.path.isfile(path):
        return "is missing"
    try:
        num_records, rest = divmod(os.path.getsize(path), RECORD_BYTES)
        if rest:
            return (
                f"ends within record {num_records} (counted from 0), after {rest} of "
                f"{RECORD_BYTES} bytes"
            )
        if not num_records:
            return "is empty"
        labels = read_labels(path)
        invalid = np.flatnonzero(labels >= num_classes)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if invalid.size:
        return (
            f"has label {labels[invalid[0]]} in record {invalid[0]} (counted from 0), but labels "
            f"must be 0 to {num_classes - 1}"
        )
    return None


class ChangeDetector:
    """Detects changes to the `record_files` while they are being read.

    If one is truncated or overwritten, TensorFlow reads fewer records or wrong labels without an
    error. Creating a detector reads the files once, in a fraction of a second for CIFAR-10.
    """

    def __init__(self, folder, eval_data):
        paths = record_files(folder, eval_data)
        with foreign_file(f"the dataset in {folder}"):
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
                if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                    if files.hash_file(path) != self._digests[path]:
                        raise DataError(f"{path} was modified after the script started")
                    self._before[path] = now
            except OSError as error:
                raise DataError(f"{path} can no longer be read ({error.strerror})") from error

    @contextlib.contextmanager
    def explain_errors(self):
        """Raises DataError instead of an error that a change of the files may have caused."""
        try:
            yield
        except Exception:
            self.check()
            raise
