"""Tests of a dataset: its folder, its class names, its sizes, and the checks of its files."""

import pytest
from conftest import make_records, write_dataset

from support.base.errors import DataError
from support.data import dataset, records

FILES = [*records.TRAIN_FILES, *records.TEST_FILES]


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / dataset.EXTRACTED_FOLDER)
    return tmp_path / dataset.EXTRACTED_FOLDER


def test_a_dataset_is_described(folder):
    dataset.check_dataset(folder)
    found = dataset.read_dataset(folder)
    assert found == dataset.Dataset(str(folder), dataset.CLASS_NAMES, 3 + 4 + 5 + 6 + 7, 11)
    # Edited numbers win over the files.
    class_names = ("class 0", "class 1", "class 2")
    assert dataset.read_dataset(folder, 3, 100, 5)[1:] == (class_names, 100, 5)
    assert dataset.read_dataset(folder, num_train=100)[2:] == (100, 11)
    assert dataset.read_dataset(folder, num_eval=5)[2:] == (25, 5)
    for name in records.TRAIN_FILES:
        (folder / name).unlink()
    assert dataset.read_dataset(folder)[2:] == (50000, 11)
    missing = dataset.read_dataset(folder / "missing")
    assert missing[1:] == (dataset.CLASS_NAMES, 50000, 10000)


def test_a_data_dir_that_holds_records_itself_is_the_folder(folder):
    assert dataset.find_folder(folder) == str(folder)
    # The subfolder takes precedence.
    write_dataset(folder / dataset.EXTRACTED_FOLDER)
    assert dataset.find_folder(folder) == str(folder / dataset.EXTRACTED_FOLDER)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("\n hot dog \n\nno hot dog\nÄpfel", ("hot dog", "no hot dog", "Äpfel")),
        ("\ufeffcat\r\ndog\r\n", ("cat", "dog")),  # as Windows editors write it
        ("Ka\u0308se\ndog", ("K\xe4se", "dog")),  # as macOS writes it
    ],
)
def test_class_names_are_the_nonempty_lines_of_the_file(folder, content, names):
    (folder / "batches.meta.txt").write_bytes(content.encode())
    assert dataset.read_class_names(folder) == names


def test_an_edited_number_of_classes_must_match_the_file(folder):
    dataset.write_class_names(folder, ["cat", "dog", "emu"])
    assert dataset.read_class_names(folder, 3) == ("cat", "dog", "emu")
    message = (
        r"batches.meta.txt lists 3 classes, but NUM_CLASSES is 20; set NUM_CLASSES to 3, or list "
        r"20 names in the file$"
    )
    with pytest.raises(DataError, match=message):
        dataset.read_class_names(folder, 20)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"one\n", "must list 2 to 256 different classes"),
        (b"".join(b"class %d\n" % n for n in range(257)), "must list 2 to 256 different classes"),
        ("K\xe4se\nKa\u0308se\n".encode(), "must list 2 to 256 different classes"),
        ("K\xe4se\ndog\n".encode("latin1"), "cannot be read .*"),
    ],
    ids=["one", "257", "twice", "latin1"],
)
def test_invalid_class_names_are_refused(folder, content, problem):
    (folder / "batches.meta.txt").write_bytes(content)
    message = f"batches.meta.txt {problem}; write one name per line, or "
    with pytest.raises(DataError, match=message):
        dataset.check_dataset(folder)


def test_classes_without_images_are_reported(folder, capsys):
    write_dataset(folder, train_counts=[3] * 5, test_count=1, class_names="abcd")
    dataset.check_dataset(folder)
    output = capsys.readouterr()
    assert output.err == (
        "The dataset has no training images of 1 class (d)\n"
        "The dataset has no test images of 3 classes (b, c, d)\n"
    )
    assert output.out == ""


@pytest.mark.parametrize(("num_names", "label"), [(10, 10), (255, 255)])
def test_a_label_without_a_class_is_refused(folder, num_names, label):
    names = [f"class {number}" for number in range(num_names)]
    write_dataset(folder, class_names=names)
    records = make_records(8, num_classes=num_names)
    records[5, 0] = label
    records.tofile(folder / "data_batch_4.bin")
    message = rf"data_batch_4.bin has label {label} in record 5 \(counted from 0\), but labels must"
    with pytest.raises(DataError, match=f"{message} be 0 to {num_names - 1}; "):
        dataset.check_dataset(folder)


def test_an_edited_number_of_classes_decides_which_labels_are_valid(folder):
    dataset.check_dataset(folder, 11)
    message = (
        r"_2.bin has label 3 in record 3 .* labels must be 0 to 2; .* NUM_CLASSES, which is 3$"
    )
    with pytest.raises(DataError, match=message):
        dataset.check_dataset(folder, 3)


def test_the_last_training_files_may_be_missing(folder, capsys):
    write_dataset(folder, train_counts=[10] * 5)
    for name in records.TRAIN_FILES[2:]:
        (folder / name).unlink()
    dataset.check_dataset(folder)
    assert capsys.readouterr().err == f"Training files in {folder}: 2 of 5\n"
    paths = records.record_files(folder, eval_data=False)
    assert paths == [str(folder / name) for name in records.TRAIN_FILES[:2]]
    assert dataset.read_dataset(folder).num_examples_per_epoch_for_train == 20
    records.ChangeDetector(folder, eval_data=False).check()


@pytest.mark.parametrize(
    ("numbers", "content", "problem"),
    [
        ([1], None, "is missing"),
        ([5], None, "is missing"),
        (range(5), None, "is missing"),
        ([0], b"", "is empty"),
        (
            [5],
            bytes(2 * 3073 + 1),
            r"ends within record 2 \(counted from 0\), after 1 of 3073 bytes",
        ),
    ],
)
def test_an_invalid_file_is_refused(folder, numbers, content, problem):
    for number in numbers:
        (folder / FILES[number]).unlink()
        if content is not None:
            (folder / FILES[number]).write_bytes(content)
    path, problem = f"{folder}/{FILES[numbers[0]]}", f"{problem}; replace the file"
    cure = "or move .*bin away and run the same command again to download CIFAR-10"
    with pytest.raises(DataError, match=f"^{path} {problem}, {cure}$"):
        dataset.check_dataset(folder)
    # No command creates a dataset of your own.
    own = folder.rename(folder.parent / "own")
    with pytest.raises(DataError, match=f"^{own}/{FILES[numbers[0]]} {problem}$"):
        dataset.check_dataset(own)


def test_a_file_that_cannot_be_read_is_refused(folder, monkeypatch):
    def forbid(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(records, "read_labels", forbid)
    with pytest.raises(DataError, match="data_batch_1.bin cannot be read .Permission denied"):
        dataset.check_dataset(folder)


def test_a_description_of_the_classes_lists_at_most_a_dozen():
    listed = "a, b, c, d, e, f, g, h, i, j, k, l"
    assert dataset.describe_classes("abcdefghijkl") == f"12 classes ({listed})"
    assert dataset.describe_classes("abcdefghijklm") == f"13 classes ({listed}, ...)"
