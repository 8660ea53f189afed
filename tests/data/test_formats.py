"""Tests of CIFAR-10 for Python and of CIFAR-100: found, converted, and refused if they are unsafe.

The original files are pickles that Python 2 wrote. `pickle_like_python_2` writes the same opcodes.
"""

import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from conftest import make_records

from support.base.errors import DataError
from support.data import dataset, formats, records

FINE_NAMES = [f"fine {label}" for label in range(100)]
COARSE_NAMES = [f"coarse {label}" for label in range(20)]
COUNTS = (11, 12, 13, 14, 15)  # images of each training file
FILES = [*records.TRAIN_FILES, *records.TEST_FILES]


def pickle_like_python_2(value):
    """Returns a pickle as cPickle of Python 2 writes it, with protocol 2 and without the memo."""

    def write(value):
        if isinstance(value, str):
            text = value.encode()
            return b"U" + bytes([len(text)]) + text
        if isinstance(value, bytes):
            return b"T" + struct.pack("<I", len(value)) + value
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(write(x) for item in value.items() for x in item) + b"u"
        assert value.dtype == np.uint8
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        data_type = (
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + 2 * write(-1) + b"K\x00tb"
        )
        shape = b"(" + b"".join(map(write, value.shape)) + b"t"
        return array + b"(K\x01" + shape + data_type + b"\x89" + write(value.tobytes()) + b"tb"

    return b"\x80\x02" + write(value) + b"."


def make_python_10(pickler=pickle_like_python_2):
    """Returns the files of CIFAR-10 for Python by name, and their images as records by name."""
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    records = {
        name: make_records(count, seed)
        for seed, (name, count) in enumerate(zip(names, (*COUNTS, 21), strict=True))
    }
    content = {
        name: pickler(
            {
                "batch_label": f"the file {name}",
                "labels": array[:, 0].tolist(),
                "data": array[:, 1:],
                "filenames": [f"{number}.png" for number in range(len(array))],
            }
        )
        for name, array in records.items()
    }
    names = {"label_names": list(dataset.CLASS_NAMES), "num_vis": 3072}
    return {**content, "batches.meta": pickler(names)}, records


def make_100(kind="binary"):
    """Returns the files of CIFAR-100 by name, and [coarse, fine, pixels] of both splits."""
    content, splits = {}, {}
    for split, count in (("train", 203), ("test", 101)):
        records = make_records(count, num_classes=100, seed=count)
        coarse = records[:, :1] // 5
        splits[split] = np.column_stack([coarse, records])
        if kind == "binary":
            content[f"{split}.bin"] = splits[split].tobytes()
        else:
            labels = {"fine_labels": records[:, 0].tolist(), "coarse_labels": coarse[:, 0].tolist()}
            content[split] = pickle_like_python_2({**labels, "data": records[:, 1:]})
    names = {"fine_label_names": FINE_NAMES, "coarse_label_names": COARSE_NAMES}
    if kind == "binary":
        texts = {f"{key}.txt": "\n".join([*value, ""]) for key, value in names.items()}
        content.update({name: text.encode() for name, text in texts.items()})
    else:
        content["meta"] = pickle_like_python_2(names)
    return content, splits


def write_folder(folder, content):
    folder.mkdir(parents=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def write_archive(path, folder, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def convert(path, output, flag="cifar10_python", label_kind=""):
    return formats.convert(str(path), flag, str(output), label_kind)


@pytest.mark.parametrize(
    ("place", "pickler"),
    [
        ("", pickle_like_python_2),  # the folder itself
        ("cifar-10-batches-py", pickle.dumps),  # torchvision and Keras 2
        ("cifar-10-batches-py-target/cifar-10-batches-py", pickle_like_python_2),  # Keras 3
        ("cifar-10-python.tar.gz", pickle_like_python_2),
        ("cifar-10-batches-py.tar.gz", pickle.dumps),  # Keras 2
        ("cifar-10-batches-py-target_archive", pickle_like_python_2),  # Keras 3
    ],
)
def test_cifar_10_for_python_is_found_where_others_keep_it_and_becomes_the_binary_version(
    tmp_path, capsys, place, pickler
):
    content, records = make_python_10(pickler)
    path = tmp_path / "data" / place
    if place.endswith((".tar.gz", "_archive")):
        write_archive(path, "./some/folder", content)
    else:
        write_folder(path, content)
    for given in (tmp_path / "data", path):
        version, found = formats.find_version(str(given))
        assert (version.flag, found) == ("cifar10_python", str(path))
    output = tmp_path / "out"
    assert convert(tmp_path / "data", output) == (sum(COUNTS), 21, dataset.CLASS_NAMES)
    for name, array in records.items():  # the same records in the same order
        assert (output / f"{name}.bin").read_bytes() == array.tobytes()
    assert sorted(os.listdir(output)) == sorted([*FILES, "batches.meta.txt"])
    assert dataset.read_class_names(output) == dataset.CLASS_NAMES
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("place", ["folder", "archive"])
@pytest.mark.parametrize(
    ("label_kind", "column", "names"), [("fine", 1, FINE_NAMES), ("coarse", 0, COARSE_NAMES)]
)
def test_cifar_100_is_converted_with_either_kind_of_labels(
    tmp_path, kind, place, label_kind, column, names
):
    content, splits = make_100(kind)
    path = tmp_path / "data" / f"cifar-100-{kind}"
    if place == "folder":
        write_folder(path, content)
    else:
        path = write_archive(tmp_path / "data" / "copy.tar.gz", f"cifar-100-{kind}", content)
    result = convert(path, tmp_path / "out", "cifar100", label_kind)
    assert result == (203, 101, tuple(names))
    assert dataset.read_class_names(tmp_path / "out") == tuple(names)
    train = b"".join((tmp_path / "out" / name).read_bytes() for name in records.TRAIN_FILES)
    sizes = [(tmp_path / "out" / name).stat().st_size // 3073 for name in records.TRAIN_FILES]
    assert sizes == [41, 41, 41, 40, 40]
    for data, split in ((train, "train"), ((tmp_path / "out/test_batch.bin").read_bytes(), "test")):
        expected = np.column_stack([splits[split][:, column], splits[split][:, 2:]])
        assert data == expected.tobytes()


def test_missing_names_are_replaced_and_records_of_another_size_refused(tmp_path):
    content, _ = make_100()
    del content["coarse_label_names.txt"]
    folder = write_folder(tmp_path / "a", content)
    names = convert(folder, tmp_path / "out", "cifar100", "coarse")[2]
    assert names == tuple(f"class {label}" for label in range(20))
    (folder / "train.bin").write_bytes(content["train.bin"] + b"x")
    with pytest.raises(DataError, match="train.bin does not consist of records of 3074 bytes"):
        convert(folder, tmp_path / "out2", "cifar100", "coarse")


class Malicious:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize(
    "make_pickle",
    [
        lambda path: pickle.dumps({"data": Malicious(path)}),
        # An operation of another protocol, which calls a function.
        lambda path: b"\x80\x02(S'touch " + str(path).encode() + b"'\nios\nsystem\n.",
    ],
)
def test_a_pickle_that_could_run_code_is_refused(tmp_path, make_pickle):
    content, _ = make_python_10()
    content["batches.meta"] = make_pickle(tmp_path / "proof")
    folder = write_folder(tmp_path / "cifar", content)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError, match=r"cifar: batches.meta cannot be read \(it (calls|uses) "):
        convert(folder, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


# Lists that contain each other: as text, they would have 9 ** 60 brackets.
NESTED_LISTS = b"".join(
    [
        b"\x80\x04]\x94",
        *(b"](" + b"h%c" % n * 9 + b"e\x94" for n in range(60)),
        b"}\x8c\x06labelsh\x3cs.",
    ]
)


def set_batch(**changes):
    """Returns a function that changes the dict in a file of CIFAR-10 for Python."""

    def change(content, records):
        array = records["data_batch_2"]
        batch = {"labels": array[:, 0].tolist(), "data": array[:, 1:], **changes}
        content["data_batch_2"] = pickle.dumps({k: v for k, v in batch.items() if v is not None})

    return change


def set_content(**changes):
    return lambda content, records: content.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_batch(labels=None), "data_batch_2 has no valid labels"),
        (set_batch(labels=[300] * 12), "data_batch_2 has no valid labels"),
        (set_batch(labels=np.zeros([10**12, 0], np.uint8)), "data_batch_2 has no valid labels"),
        (set_batch(labels=[10] * 12), "data_batch_2 has label 10, but there are only 10 classes"),
        (set_batch(labels=[0] * 11), r"data_batch_2 has no array of data, uint8 \[11, 3072\]"),
        (set_batch(data=None), "data_batch_2 has no array of data"),
        (set_batch(data=np.zeros([12, 3072], int)), "data_batch_2 has no array of data, uint8"),
        (set_batch(data=np.zeros([0, 3072], np.uint8), labels=[]), "data_batch_2 has no images"),
        (
            set_content(data_batch_2=pickle.dumps([1, 2])),
            "data_batch_2 cannot be read .it is not a pickled dict",
        ),
        (set_content(data_batch_2=b"\x80\x02}(U\x04data"), "data_batch_2 cannot be read"),
        (lambda content, records: content.pop("data_batch_2"), "has no file data_batch_2"),
        (set_content(data_batch_2=NESTED_LISTS), "data_batch_2 has no valid labels"),
        (set_content(**{"batches.meta": pickle.dumps({})}), "batches.meta has no list label_names"),
        (
            set_content(**{"batches.meta": pickle.dumps({"label_names": []})}),
            "data_batch_1 has label 9, but there are only 0 classes",
        ),
    ],
)
def test_damaged_and_other_files_are_refused_without_output(tmp_path, change, message):
    content, records = make_python_10()
    change(content, records)
    folder = write_folder(tmp_path / "cifar", content)
    with pytest.raises(DataError, match=message) as error:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["cifar"]


@pytest.mark.parametrize("flag", ["cifar10_python", "cifar100"])
def test_a_path_without_the_version_is_refused(tmp_path, flag):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar.gz").write_text("not an archive")
    write_archive(tmp_path / "other.tar.gz", "other", {"a": b"1"})
    for name, message in (
        ("gone", "is not, and does not contain, cifar-10"),
        ("empty", "is not, and does not contain, cifar-10"),
        ("other.tar.gz", "is not, and does not contain, cifar-10"),
        ("text.tar.gz", "text.tar.gz cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            convert(tmp_path / name, tmp_path / "out", flag, "fine")


def test_other_folders_are_not_mistaken_for_cifar(tmp_path):
    for name in ("train", "test", "cifar-10-batches-py", "cifar-10-python.tar.gz"):
        (tmp_path / name).mkdir()  # photos in folders, for example
    assert formats.find_version(tmp_path) is None
    assert formats.find_version(tmp_path / "gone") is None
