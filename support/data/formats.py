"""The versions of CIFAR-10 and CIFAR-100 that the scripts cannot read directly.

These are the Python version of CIFAR-10, which Keras and torchvision download, and the binary and
the Python version of CIFAR-100. See https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import os
import shlex
import tarfile
from typing import NamedTuple

import numpy as np

from support.base import files
from support.base.errors import DataError, foreign_file
from support.data import dataset, pickles, records


class Version(NamedTuple):
    """A version of CIFAR-10 or CIFAR-100."""

    title: str  # for messages
    flag: str  # of cifar10_convert.py
    folder: str  # the name of the folder in the archive
    archive: str  # its name
    train_files: tuple
    test_file: str
    name_files: tuple  # the files with the class names


VERSIONS = (
    Version(
        "the Python version of CIFAR-10",
        "cifar10_python",
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(name.removesuffix(".bin") for name in records.TRAIN_FILES),
        "test_batch",
        ("batches.meta",),
    ),
    Version(
        "the binary version of CIFAR-100",
        "cifar100",
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        ("train.bin",),
        "test.bin",
        ("fine_label_names.txt", "coarse_label_names.txt"),
    ),
    Version(
        "the Python version of CIFAR-100",
        "cifar100",
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        ("train",),
        "test",
        ("meta",),
    ),
)

# By the kind of labels. CIFAR-10 has only one kind.
LABEL_KINDS = {"": "labels", "fine": "fine_labels", "coarse": "coarse_labels"}
NAME_LISTS = {"": "label_names", "fine": "fine_label_names", "coarse": "coarse_label_names"}
DEFAULT_NAMES = {
    "": dataset.CLASS_NAMES,
    "fine": tuple(f"class {label}" for label in range(100)),
    "coarse": tuple(f"class {label}" for label in range(20)),
}
MAX_FILE_BYTES = 200_000_000  # the largest file has 153,700,000
MAX_HEADER_BYTES = 10_000  # of a header in an archive that holds a long file name, for example
MAX_MEMBERS = 1000  # of an archive
MAX_ARCHIVE_BYTES = 500_000_000  # before the last member; CIFAR's have less than 200,000,000
MAX_NAMES_BYTES = 100_000  # of a file with class names
CIFAR_100_LABELS = ("coarse", "fine")  # the first two bytes of a record


def find_version(path, versions=VERSIONS):
    """Finds a version of CIFAR-10 or CIFAR-100.

    `path` names an archive; a folder with the files; or a folder that contains such an archive or
    folder, as with torchvision and Keras (`~/.keras/datasets`).

    Returns:
      (`Version`, path of the folder or archive), or None.
    """
    for version in versions:
        # The original name, and those that Keras gives it.
        folder = version.folder
        archives = (version.archive, f"{folder}.tar.gz", f"{folder}-target_archive")
        if os.path.basename(path) in archives and os.path.isfile(path):
            return version, path
        names = (version.train_files[0], version.test_file)
        for subfolder in ("", folder, f"{folder}-target/{folder}"):
            candidate = os.path.join(path, subfolder) if subfolder else path
            if all(os.path.isfile(os.path.join(candidate, name)) for name in names):
                return version, candidate
        for name in archives:
            if os.path.isfile(candidate := os.path.join(path, name)):
                return version, candidate
    return None


def suggest_conversion(version, path, data_dir):
    """Returns the command that converts a version so that the scripts find it in `data_dir`."""
    labels = " --cifar100_labels=fine" if version.flag == "cifar100" else ""
    output = os.path.join(data_dir, dataset.EXTRACTED_FOLDER)
    return (
        f"python cifar10_convert.py --{version.flag}={shlex.quote(os.fspath(path))}{labels} "
        f"--output={shlex.quote(output)}"
    )


def convert(path, flag, output, label_kind=""):
    """Writes the images of a version as a dataset, in their original order.

    Args:
      path: see `find_version`; an archive may have any name.
      flag: string; the flag of the versions to look for, "cifar10_python" or "cifar100".
      output: path of the folder to create.
      label_kind: string; "fine" or "coarse" for CIFAR-100.

    Returns:
      (train_count, test_count, class_names): int, int, tuple of strings.

    Raises:
      DataError: the files are missing, damaged or unsuitable, or the folder cannot be written.
      UserError: the folder exists and is not empty.
    """
    version, path = _require_version(path, flag)
    class_names = DEFAULT_NAMES[label_kind]
    parsed = {}
    for name, content in _read_files(version, path):
        if name in version.name_files:
            listed = _parse_class_names(content, name, path, label_kind)
            class_names = class_names if listed is None else listed
        else:
            parsed[name] = _parse_records(content, name, path, label_kind)
    for name in (*version.train_files, version.test_file):
        if name not in parsed:
            raise DataError(f"{path} has no file {name}")
        if not len(parsed[name]):
            raise DataError(f"{path}: {name} has no images")
        if (largest := parsed[name][:, 0].max()) >= len(class_names):
            raise DataError(
                f"{path}: {name} has label {largest}, but there are only {len(class_names)} classes"
            )
    train, test = [parsed[name] for name in version.train_files], parsed[version.test_file]
    if len(train) == 1:
        train = np.array_split(train[0], len(records.TRAIN_FILES))
    with files.new_folder("--output", output) as staging:
        names = (*records.TRAIN_FILES, *records.TEST_FILES)
        for name, part in zip(names, [*train, test], strict=True):
            part.tofile(os.path.join(staging, name))
        dataset.write_class_names(staging, class_names)
        dataset.check_dataset(staging)
    return sum(map(len, train)), len(test), class_names


def _require_version(path, flag):
    """Returns the `Version` and the path of its folder or archive, or raises DataError."""
    versions = [version for version in VERSIONS if version.flag == flag]
    if found := find_version(path, versions):
        return found
    if os.path.isfile(path):
        with foreign_file(path), tarfile.open(path, tarinfo=_Member) as archive:
            names = {os.path.basename(name) for name in archive.getnames()}
        for version in versions:
            if version.test_file in names:
                return version, path
    expected = " or ".join(f"{version.folder} or {version.archive}" for version in versions)
    raise DataError(f"--{flag}={path} is not, and does not contain, {expected}")


def _read_files(version, path):
    """Yields (name, content) for each file of a version that exists: string, bytes."""
    names = (*version.name_files, *version.train_files, version.test_file)
    if os.path.isdir(path):
        for name in names:
            file_path = os.path.join(path, name)
            if os.path.isfile(file_path):
                with foreign_file(file_path):
                    yield name, files.read_regular(file_path, MAX_FILE_BYTES)
        return
    with foreign_file(path), tarfile.open(path, tarinfo=_Member) as archive:
        for member in archive:
            name = os.path.basename(member.name)
            if name in names and member.isfile():
                # A second header may have changed the size that `_Member` has checked.
                yield name, archive.extractfile(member).read(MAX_FILE_BYTES)


class _Member(tarfile.TarInfo):
    """A member of an archive; archives with sparse, too large or too many members are refused."""

    def _proc_member(self, archive):
        limit = MAX_FILE_BYTES if self.isfile() else MAX_HEADER_BYTES
        if self.size > limit:
            raise ValueError(f"a file or header in it is larger than {limit:,} bytes")
        if len(archive.members) == MAX_MEMBERS or self.offset > MAX_ARCHIVE_BYTES:
            raise ValueError(
                f"it has more than {MAX_MEMBERS:,} files or {MAX_ARCHIVE_BYTES:,} bytes"
            )
        return super()._proc_member(archive)

    def _proc_sparse(self, *_):
        raise ValueError("a file in it is sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_sparse


def _parse_class_names(content, name, path, label_kind):
    """Returns the class names of one kind that a file lists; None if it lists another kind."""
    if name.endswith(".txt"):
        if name != f"{NAME_LISTS[label_kind]}.txt":
            return None
        if len(content) > MAX_NAMES_BYTES:
            raise DataError(f"{path}: {name} has more than {MAX_NAMES_BYTES:,} bytes")
        listed = content.rstrip().splitlines()
    else:
        listed = _unpickle(content, name, path).get(NAME_LISTS[label_kind])
    if not isinstance(listed, list) or not all(isinstance(each, bytes | str) for each in listed):
        raise DataError(f"{path}: {name} has no list {NAME_LISTS[label_kind]}")
    decoded = (each.decode() if isinstance(each, bytes) else each for each in listed)
    with foreign_file(f"{path}: {name}"):
        return tuple(map(dataset.normalize_name, decoded))


def _parse_records(content, name, path, label_kind):
    """Returns the images of a file as records: uint8 [n, RECORD_BYTES]."""
    if name.endswith(".bin"):
        record_bytes = len(CIFAR_100_LABELS) + records.IMAGE_BYTES
        if len(content) % record_bytes:
            raise DataError(f"{path}: {name} does not consist of records of {record_bytes} bytes")
        rows = np.frombuffer(content, np.uint8).reshape(-1, record_bytes)
        labels = rows[:, CIFAR_100_LABELS.index(label_kind)]
        images = rows[:, len(CIFAR_100_LABELS) :]
        return np.column_stack([labels, images])
    batch = _unpickle(content, name, path)
    images, labels = batch.get("data"), batch.get(LABEL_KINDS[label_kind])
    if isinstance(labels, np.ndarray) and labels.ndim == 1:  # not 10**12 times nothing
        labels = labels.tolist()
    if not isinstance(labels, list) or not all(label in range(256) for label in labels):
        raise DataError(f"{path}: {name} has no valid {LABEL_KINDS[label_kind]}")
    shape = (len(labels), records.IMAGE_BYTES)
    if not isinstance(images, np.ndarray) or (images.dtype, images.shape) != (np.uint8, shape):
        raise DataError(
            f"{path}: {name} has no array of data, uint8 {list(shape)}, for its {len(labels)} "
            f"{LABEL_KINDS[label_kind]}"
        )
    return np.column_stack([np.array(labels, np.uint8), images])


def _unpickle(content, name, path):
    """Returns the dict in a pickle, with strings as keys."""
    with foreign_file(f"{path}: {name}"):
        return pickles.load_dict(content)
