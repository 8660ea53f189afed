"""Tests of the conversion of images and of SVHN to records, and of the error messages."""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
from absl import app, flags
from conftest import ROOT, lost_stream, make_records, run_script
from PIL import Image

import cifar10_convert
from support.base.errors import DataError, UserError
from support.data import conversion, dataset, records
from support.data.image_files import read_image

FLAGS = cifar10_convert.FLAGS

SIZES = ((32, 32), (40, 90), (200, 33), (8, 8))
SUFFIXES = (".png", ".jpg", ".gif", ".bmp", ".webp")


def draw(folder, counts, seed=0):
    """Writes random images, `counts[name]` of each class; returns their pixels by path."""
    generator = np.random.default_rng(seed)
    images = {}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            size = SIZES[number % len(SIZES)]
            noise = generator.integers(0, 256, [5, 5, 3]).astype(np.uint8)
            path = folder / name / f"{number}{SUFFIXES[number % len(SUFFIXES)]}"
            Image.fromarray(noise).resize(size).save(path)
            images[path] = read_image(path)
    return images


def read_records(folder, eval_data):
    """Returns the records of a dataset as a list of arrays, [n, 3073], one for each file."""
    return [
        np.fromfile(path, np.uint8).reshape(-1, 3073)
        for path in records.record_files(folder, eval_data)
    ]


def make_record(label, pixels):
    return bytes([label]) + pixels.transpose(2, 0, 1).tobytes()


def expected_records(images, names):
    """Returns the sorted records of images that are given by path."""
    return sorted(make_record(names.index(p.parent.name), image) for p, image in images.items())


def sorted_bytes(files):
    return sorted(record.tobytes() for records in files for record in records)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


@pytest.fixture
def images(tmp_path):
    """Draws training and test images and sets the flags; returns the pixels of both by path."""
    FLAGS.images = str(tmp_path / "images")
    FLAGS.output = str(tmp_path / "out")
    train = draw(tmp_path / "images" / "train", {"dog": 9, "a cat": 11, "Ähre": 7})
    test = draw(tmp_path / "images" / "test", {"dog": 2, "a cat": 3, "Ähre": 1}, seed=1)
    return train, test


NAMES = ["a cat", "dog", "Ähre"]


def test_images_become_the_records_that_cifar10_predict_would_read(images, tmp_path, capsys):
    cifar10_convert.main()
    train, test = images
    folder = tmp_path / "out"
    assert dataset.read_class_names(folder) == tuple(NAMES)
    dataset.check_dataset(folder)
    files = read_records(folder, eval_data=False)
    assert sorted_bytes(files) == expected_records(train, NAMES)
    assert sorted(map(len, files)) == [5, 5, 5, 6, 6]  # as equal as possible
    assert sorted_bytes(read_records(folder, eval_data=True)) == expected_records(test, NAMES)
    assert sorted(os.listdir(folder)) == sorted(
        [*records.TRAIN_FILES, *records.TEST_FILES, "batches.meta.txt"]
    )
    output = capsys.readouterr()
    assert output.out == (
        "Wrote 27 training images and 6 test images of 3 classes (a cat, dog, Ähre) to "
        f"{folder}; unreadable files: 0\n"
    )
    assert output.err == ""
    assert sorted(os.listdir(tmp_path)) == ["images", "out"]


def reverse_scandir(monkeypatch):
    """Makes the system list every folder in the opposite order."""
    scandir = os.scandir

    @contextlib.contextmanager
    def scan_backwards(*arguments):
        with scandir(*arguments) as entries:
            yield reversed(list(entries))

    monkeypatch.setattr(os, "scandir", scan_backwards)


def test_the_seed_determines_the_order_and_the_choice_of_test_images(tmp_path, monkeypatch):
    draw(tmp_path / "images", {"a": 40, "b": 25})
    FLAGS.images = str(tmp_path / "images")
    found = []
    for number, seed in enumerate((3, 3, 4)):
        FLAGS.output = str(tmp_path / f"out{number}")
        FLAGS.shuffle_seed = seed
        FLAGS.test_fraction = 0.2
        if number == 1:  # the order in which files are found must not matter
            reverse_scandir(monkeypatch)
        cifar10_convert.main()
        found.append(digests(tmp_path / f"out{number}"))
    assert found[0] == found[1]
    assert all(
        (found[0][name] == found[2][name]) == (name == "batches.meta.txt") for name in found[0]
    )
    tests = [sorted_bytes(read_records(tmp_path / f"out{n}", eval_data=True)) for n in (0, 2)]
    assert tests[0] != tests[1]


class Source:
    """A source with images in memory, whose pixels have the number of the image as their value."""

    def __init__(self, counts):
        self.class_names = tuple(counts)
        self._counts = counts

    def __len__(self):
        return sum(self._counts.values())

    def __iter__(self):
        for label, (name, count) in enumerate(self._counts.items()):
            for number in range(count):
                image = np.full([32, 32, 3], number % 256, np.uint8)
                yield f"{name}/{number}".encode(), label, image


def test_the_records_of_the_classes_are_well_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "BUCKET_BYTES", 20000)  # six records
    source = Source({"a": 600, "b": 600})
    cifar10_convert.convert(source, Source({"a": 5, "b": 5}), str(tmp_path / "out"))
    files = read_records(tmp_path / "out", eval_data=False)
    labels = np.concatenate([part[:, 0] for part in files])
    # The label changes as often as in coin tosses: 600 times in 1200, within 6 standard deviations
    # of 17.
    assert abs((labels[1:] != labels[:-1]).sum() - 600) < 104
    for part in files:
        # Half of 240 records, within 6 standard deviations of 7.7.
        assert abs((part[:, 0] == 1).sum() - 120) < 47


@pytest.mark.parametrize(
    "image", [np.zeros([32, 32, 3]), np.zeros([3, 32, 32], np.uint8), np.zeros([8, 8, 3], np.uint8)]
)
def test_images_of_another_type_or_shape_do_not_become_records(tmp_path, image):
    shuffler = conversion.RecordShuffler(str(tmp_path), capacity=1, seed=0)
    with pytest.raises(UserError, match="^images must be uint8"):
        shuffler.add(b"name", False, 0, image)
    assert list(shuffler.sorted_records()) == []


@pytest.mark.parametrize("bucket_bytes", [100, 10000, 1 << 30])
def test_sorting_in_buckets_bounds_memory_and_does_not_change_the_files(
    tmp_path, monkeypatch, bucket_bytes
):
    source = Source({"a": 50, "b": 60})
    cifar10_convert.convert(source, Source({"a": 9, "b": 9}), str(tmp_path / "default"))
    monkeypatch.setattr(conversion, "BUCKET_BYTES", bucket_bytes)
    largest = 0
    fromfile = np.fromfile

    def measure_fromfile(*arguments):
        nonlocal largest
        bucket = fromfile(*arguments)
        largest = max(largest, bucket.nbytes)
        return bucket

    monkeypatch.setattr(np, "fromfile", measure_fromfile)
    cifar10_convert.convert(source, Source({"a": 9, "b": 9}), str(tmp_path / "buckets"))
    assert digests(tmp_path / "default") == digests(tmp_path / "buckets")
    # The hashes spread the records evenly. No bucket has more than three times the average size,
    # or five records where the average is less than one.
    assert largest <= max(3 * bucket_bytes, 5 * 3081)


@pytest.mark.parametrize(("fraction", "counts"), [(0.2, (8, 1)), (0.01, (1, 1)), (0.5, (20, 2))])
def test_test_fraction_applies_to_each_class(tmp_path, fraction, counts):
    images = draw(tmp_path / "images", {"a": 40, "b": 3})
    FLAGS.images = str(tmp_path / "images")
    FLAGS.output = str(tmp_path / "out")
    FLAGS.test_fraction = fraction
    cifar10_convert.main()
    train, test = (read_records(tmp_path / "out", eval_data) for eval_data in (False, True))
    assert tuple(np.bincount(test[0][:, 0], minlength=2)) == counts
    assert sorted(sorted_bytes(train) + sorted_bytes(test)) == expected_records(images, ["a", "b"])


def test_fewer_than_five_training_images_are_refused(tmp_path):
    draw(tmp_path / "images", {"a": 40, "b": 3})
    FLAGS.images = str(tmp_path / "images")
    FLAGS.output = str(tmp_path / "out")
    FLAGS.test_fraction = 0.99
    with pytest.raises(DataError, match="there are 2 training images; at least 5 are required"):
        cifar10_convert.main()
    assert not (tmp_path / "out").exists()


def test_unreadable_files_are_listed_skipped_and_counted(images, tmp_path, capsys):
    train, test = images
    folder = tmp_path / "images" / "train" / "dog"
    (folder / "notes.txt").write_text("not an image")
    (folder / "cut.jpg").write_bytes((folder / "1.jpg").read_bytes()[:50])
    (tmp_path / "images" / "test" / "dog" / "empty.png").write_bytes(b"")
    (folder / ".hidden").write_text("ignored")
    cifar10_convert.main()
    output = capsys.readouterr()
    assert output.out.endswith("; unreadable files: 3\n")
    assert sorted(re.findall(r"^.*/(\S+): it .*$", output.err, re.MULTILINE)) == [
        "cut.jpg",
        "empty.png",
        "notes.txt",
    ]
    assert sorted_bytes(read_records(tmp_path / "out", eval_data=False)) == expected_records(
        train, NAMES
    )
    assert sorted_bytes(read_records(tmp_path / "out", eval_data=True)) == expected_records(
        test, NAMES
    )


def test_16_bit_images_are_scaled_by_their_largest_value(images, tmp_path):
    values = np.arange(1024).reshape(32, 32)
    for split in ("train", "test"):
        image = Image.fromarray(values.astype(np.uint16))
        image.save(tmp_path / "images" / split / "dog" / "deep.png")
    cifar10_convert.main()
    scaled = (values * 255 // 1023).astype(np.uint8)
    expected = make_record(1, np.repeat(scaled[..., np.newaxis], 3, 2))
    assert expected in sorted_bytes(read_records(tmp_path / "out", eval_data=False))
    assert expected in sorted_bytes(read_records(tmp_path / "out", eval_data=True))


def test_subfolders_of_a_class_belong_to_the_class(images, tmp_path):
    train, _ = images
    folder = tmp_path / "images" / "train" / "dog" / "2019" / "may"
    folder.mkdir(parents=True)
    os.rename(tmp_path / "images" / "train" / "dog" / "0.png", folder / "no suffix")
    cifar10_convert.main()
    assert sorted_bytes(read_records(tmp_path / "out", eval_data=False)) == expected_records(
        train, NAMES
    )


def test_spaces_around_the_name_of_a_class_are_ignored(images, tmp_path):
    train, test = images
    os.rename(tmp_path / "images" / "train" / "dog", tmp_path / "images" / "train" / " dog")
    cifar10_convert.main()
    assert dataset.read_class_names(tmp_path / "out") == tuple(NAMES)
    assert sorted_bytes(read_records(tmp_path / "out", eval_data=False)) == expected_records(
        train, NAMES
    )
    assert sorted_bytes(read_records(tmp_path / "out", eval_data=True)) == expected_records(
        test, NAMES
    )


def test_links_to_folders_are_followed_but_not_in_cycles(images, tmp_path):
    train, _ = images
    folder = tmp_path / "images" / "train"
    os.rename(folder / "dog", tmp_path / "elsewhere")
    (folder / "dog").mkdir()
    os.symlink(tmp_path / "elsewhere", folder / "dog" / "more")
    os.symlink(folder / "a cat", folder / "a cat" / "cycle")
    os.symlink("itself", folder / "a cat" / "itself")  # an unreadable file
    cifar10_convert.main()
    assert sorted_bytes(read_records(tmp_path / "out", eval_data=False)) == expected_records(
        train, NAMES
    )


def test_a_folder_that_cannot_be_read_is_listed_and_counted(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "images" / "test" / "dog" / "locked").mkdir()
    scandir = os.scandir

    def forbid(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    cifar10_convert.main()
    output = capsys.readouterr()
    assert re.fullmatch(r"\S+/test/dog/locked: this folder cannot be read\n", output.err)
    assert output.out.endswith("; unreadable files: 1\n")


def test_files_outside_the_class_folders_are_counted_and_skipped(images, tmp_path, capsys):
    (tmp_path / "images" / "train" / "lost.png").write_text("")
    (tmp_path / "images" / "test" / "lost.png").write_text("")
    (tmp_path / "images" / "test" / ".hidden").write_text("")
    cifar10_convert.main()
    output = capsys.readouterr()
    assert output.err == "Skipping files that are not in a class folder: 2\n"


def test_256_classes_are_converted(tmp_path):
    images = draw(tmp_path / "images", {f"{number:03}": 2 for number in range(256)})
    FLAGS.images = str(tmp_path / "images")
    FLAGS.output = str(tmp_path / "out")
    FLAGS.test_fraction = 0.5
    cifar10_convert.main()
    dataset.check_dataset(tmp_path / "out")
    names = [f"{number:03}" for number in range(256)]
    train, test = (read_records(tmp_path / "out", eval_data) for eval_data in (False, True))
    assert sorted(test[0][:, 0]) == list(range(256))
    assert sorted(sorted_bytes(train) + sorted_bytes(test)) == expected_records(images, names)


def test_a_folder_of_images_with_the_suffix_part_is_not_deleted(tmp_path):
    draw(tmp_path / "pets.part", {"a": 9, "b": 9})
    before = sorted(path.name for path in (tmp_path / "pets.part").rglob("*"))
    FLAGS.images = str(tmp_path / "pets.part")
    FLAGS.output = str(tmp_path / "pets")
    FLAGS.test_fraction = 0.3
    cifar10_convert.main()
    assert sorted(path.name for path in (tmp_path / "pets.part").rglob("*")) == before


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such file names")
def test_a_class_name_that_is_not_valid_text_is_escaped(tmp_path):
    draw(tmp_path / "images", {"a": 9, "b": 9})
    folder = os.fsencode(tmp_path / "images")
    os.rename(folder + b"/b", folder + b"/b\xff\nc")
    FLAGS.images = str(tmp_path / "images")
    FLAGS.output = str(tmp_path / "out")
    FLAGS.test_fraction = 0.3
    cifar10_convert.main()
    assert dataset.read_class_names(tmp_path / "out") == ("a", r"b\udcff\nc")


def add_class_without_files(folder):
    (folder / "train" / "empty").mkdir()
    return r"the class empty is empty: \S+/train/empty has no files"


def add_unreadable_class(folder):
    for split in ("train", "test"):
        (folder / split / "zebra").mkdir()
        (folder / split / "zebra" / "a.png").write_text("not an image")
    return "the class zebra is empty: it has no readable image"


def add_class_without_tests(folder):
    (folder / "train" / "zebra").mkdir()
    (folder / "train" / "zebra" / "a.png").write_text("not an image")
    return r"the class zebra must be in both \S+/train and \S+/test"


def leave_one_class(folder):
    for name in ("dog", "Ähre"):
        os.rename(folder / "train" / name, folder / name)
    return "train must have 2 to 256 folders, one for each class; it has 1$"


def add_classes_up_to_257(folder):
    for number in range(254):
        (folder / "train" / f"c{number}").mkdir()
    return "train must have 2 to 256 folders, one for each class; it has 257$"


def rename_test_folder(folder):
    os.rename(folder / "test", folder / "val")
    return "has no folder test; it must have .* folder with the classes and add --test_fraction"


def add_class_with_the_same_name(folder):
    (folder / "train" / "dog ").mkdir()
    return "two folders in .*train have the same name except for leading or trailing"


def remove_all(folder):
    os.rename(folder, folder.parent / "elsewhere")
    return r"images cannot be read \(No such file or directory\)"


@pytest.mark.parametrize(
    "break_folders",
    [
        add_class_without_files,
        add_unreadable_class,
        add_class_without_tests,
        leave_one_class,
        add_classes_up_to_257,
        rename_test_folder,
        add_class_with_the_same_name,
        remove_all,
    ],
)
def test_unusable_folders_are_refused_and_no_output_remains(images, tmp_path, break_folders):
    message = break_folders(tmp_path / "images")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError, match=message):
        cifar10_convert.main()
    assert sorted(os.listdir(tmp_path)) == before


def test_a_class_name_may_have_another_unicode_form_in_the_other_split_only(images, tmp_path):
    for split, name in (("train", "K\xe4se"), ("test", "Ka\u0308se")):
        shutil.copytree(tmp_path / "images" / split / NAMES[0], tmp_path / "images" / split / name)
    cifar10_convert.main()
    assert "K\xe4se" in dataset.read_class_names(FLAGS.output)
    FLAGS.output += "2"
    split = tmp_path / "images" / "train"
    shutil.copytree(split / NAMES[0], split / "Ka\u0308se")
    with pytest.raises(DataError, match="two folders in .*train have the same name except"):
        cifar10_convert.main()


def test_other_folders_beside_train_and_test_are_skipped(images, tmp_path, capsys):
    (tmp_path / "images" / "val").mkdir()
    cifar10_convert.main()
    assert capsys.readouterr().err == (
        f"Skipping {FLAGS.images}/val, which is neither train nor test\n"
    )


def test_test_fraction_refuses_folders_that_are_named_like_a_split(images, tmp_path):
    FLAGS.test_fraction = 0.2
    with pytest.raises(DataError, match="has a folder t.*, which is not a class; omit --test_frac"):
        cifar10_convert.main()
    shutil.rmtree(tmp_path / "images" / "test")
    os.rename(tmp_path / "images" / "train", tmp_path / "images" / "Train")
    with pytest.raises(DataError, match="has a folder Train, which is not a class; omit --test_f"):
        cifar10_convert.main()


def test_test_fraction_refuses_a_class_with_one_image(tmp_path):
    draw(tmp_path / "images", {"a": 9, "b": 1})
    FLAGS.images = str(tmp_path / "images")
    FLAGS.output = str(tmp_path / "out")
    FLAGS.test_fraction = 0.2
    with pytest.raises(DataError, match="the class b has only one image; --test_fraction requires"):
        cifar10_convert.main()


def test_an_existing_dataset_is_not_overwritten(images, tmp_path):
    (tmp_path / "somewhere").mkdir()  # an empty output folder is accepted
    os.symlink("somewhere", tmp_path / "out")
    cifar10_convert.main()
    assert (tmp_path / "out").is_symlink()
    before = digests(tmp_path / "out")
    with pytest.raises(
        UserError, match=f"--output={tmp_path}/out already exists; choose a new folder"
    ):
        cifar10_convert.main()
    assert digests(tmp_path / "out") == before


def test_an_output_folder_among_the_images_is_refused(images, tmp_path):
    FLAGS.output = str(tmp_path / "images" / "records")
    with pytest.raises(UserError, match="is inside --images=.*; choose another folder"):
        cifar10_convert.main()


def test_the_second_of_two_processes_does_not_replace_the_dataset_of_the_first(tmp_path):
    train, test = Source({"a": 5, "b": 5}), Source({"a": 5, "b": 5})
    output = str(tmp_path / "out")
    cifar10_convert.convert(train, test, output)
    # The second process has waited for the first and finds its dataset.
    with pytest.raises(UserError, match="already exists"):
        cifar10_convert.convert(train, test, output)


def test_leftovers_of_a_killed_conversion_are_deleted(tmp_path):
    train, test = Source({"a": 5, "b": 5}), Source({"a": 5, "b": 5})
    cifar10_convert.convert(train, test, str(tmp_path / "expected"))
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "bucket_0").write_bytes(b"part of a record")
    (tmp_path / ".out.part" / "data_batch_1.bin").write_bytes(b"1")
    (tmp_path / ".out.lock").write_text("process 1")
    cifar10_convert.convert(train, test, str(tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["expected", "out"]


def test_an_output_folder_that_cannot_be_written_is_an_error(images, tmp_path):
    (tmp_path / "file").write_text("")
    FLAGS.output = str(tmp_path / "file" / "out")
    with pytest.raises(DataError, match="cannot write the dataset to .*; choose .* with --output"):
        cifar10_convert.main()


def write_svhn(folder, count, seed, **changes):
    """Writes a file in the format of SVHN and returns its arrays `X` and `y`."""
    name = "train" if seed == 0 else "test"
    generator = np.random.default_rng(seed)
    arrays = {
        "X": generator.integers(0, 256, [32, 32, 3, count]).astype(np.uint8),
        "y": generator.permutation(np.arange(count) % 10 + 1).astype(np.uint8)[:, np.newaxis],
    }
    arrays = {key: value for key, value in (arrays | changes).items() if value is not None}
    scipy.io.savemat(folder / f"{name}_32x32.mat", arrays, do_compression=True)
    return arrays


@pytest.fixture
def svhn(tmp_path):
    FLAGS.svhn = str(tmp_path)
    FLAGS.output = str(tmp_path / "out")
    return [write_svhn(tmp_path, count, seed) for seed, count in enumerate((43, 20))]


def test_svhn_becomes_records_and_its_label_10_becomes_0(svhn, tmp_path, capsys):
    cifar10_convert.main()
    folder = tmp_path / "out"
    assert dataset.read_class_names(folder) == tuple("0123456789")
    for arrays, eval_data in zip(svhn, (False, True), strict=True):
        expected = []
        for number, (digit,) in enumerate(arrays["y"]):
            label = 0 if digit == 10 else digit
            expected.append(make_record(label, arrays["X"][:, :, :, number]))
        assert sorted_bytes(read_records(folder, eval_data)) == sorted(expected)
        order = [
            record.tobytes() for records in read_records(folder, eval_data) for record in records
        ]
        assert order != expected  # shuffled
    assert capsys.readouterr().out.startswith(
        "Wrote 43 training images and 20 test images of 10 classes (0, 1, "
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": None}, "is not an SVHN file: it has no array 'X'"),
        ({"y": None}, "is not an SVHN file: it has no array 'y'"),
        ({"X": np.zeros([32, 32, 3, 42], np.uint8)}, r"X is uint8 \[32, 32, 3, 42\], not uint8"),
        ({"X": np.zeros([32, 32, 3, 43])}, r"X is float64 \[32, 32, 3, 43\], not uint8"),
        ({"y": np.full([43, 1], 11)}, "y contains 11, but labels are 1 to 10"),
        ({"y": np.full([43, 1], 2.5)}, r"y contains 2\.5, but"),
    ],
)
def test_matlab_files_with_other_arrays_are_refused(svhn, tmp_path, changes, message):
    write_svhn(tmp_path, 43, 0, **changes)
    with pytest.raises(DataError, match=f"train_32x32.mat:? {message}"):
        cifar10_convert.main()
    assert not (tmp_path / "out").exists()


def test_floating_point_labels_give_the_same_records(svhn, tmp_path):
    before = write_svhn(tmp_path, 43, 0)
    cifar10_convert.main()
    first = digests(tmp_path / "out")
    write_svhn(tmp_path, 43, 0, y=before["y"].astype(float))
    FLAGS.output = str(tmp_path / "again")
    cifar10_convert.main()
    assert digests(tmp_path / "again") == first


@pytest.mark.parametrize("content", [b"", b"no matrix" * 99, b"\x89HDF\r\n\x1a\n" + bytes(999)])
def test_a_damaged_matlab_file_is_refused(svhn, tmp_path, content):
    (tmp_path / "train_32x32.mat").write_bytes(content)
    with pytest.raises(
        DataError, match="train_32x32.mat is not an SVHN file: it cannot be read .*"
    ):
        cifar10_convert.main()


def test_the_error_for_a_missing_matlab_file_names_the_download_page(svhn, tmp_path):
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(
        DataError, match="test_32x32.mat is missing; download it from http://ufldl.s"
    ):
        cifar10_convert.main()
    FLAGS.svhn = str(tmp_path / "train_32x32.mat")  # instead of its folder
    with pytest.raises(DataError, match="train_32x32.mat/train_32x32.mat is missing; "):
        cifar10_convert.main()


def test_the_error_without_scipy_says_how_to_install_it(svhn, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="needs SciPy .*: pip install -r requirements-svhn.txt"):
        cifar10_convert.main()
    assert (ROOT / "requirements-svhn.txt").read_text().count("scipy==") == 1


def write_pickles(folder, columns):
    """Writes pickles of noise like those of CIFAR-10 and CIFAR-100 for Python.

    Args:
      folder: path of the folder to create.
      columns: dict from names of files to dicts from names of labels to lists of labels.

    Returns:
      dict from names of files to uint8 [n, 3072].
    """
    folder.mkdir()
    images = {}
    for seed, (name, labels) in enumerate(columns.items()):
        count = len(next(iter(labels.values())))
        images[name] = make_records(count, seed)[:, 1:]
        (folder / name).write_bytes(pickle.dumps({"data": images[name], **labels}))
    return images


def test_cifar_10_for_python_is_converted(tmp_path, capsys):
    FLAGS.cifar10_python = str(tmp_path)
    FLAGS.output = str(tmp_path / "out")
    labels = [9, *range(9)]
    names = [name.removesuffix(".bin") for name in (*records.TRAIN_FILES, *records.TEST_FILES)]
    images = write_pickles(tmp_path / "cifar-10-batches-py", {n: {"labels": labels} for n in names})
    cifar10_convert.main()
    for name in names:
        rows = np.fromfile(tmp_path / "out" / f"{name}.bin", np.uint8).reshape(-1, 3073)
        np.testing.assert_array_equal(rows[:, 0], labels)
        np.testing.assert_array_equal(rows[:, 1:], images[name])
    output = capsys.readouterr()
    assert output.out == (
        "Wrote 50 training images and 10 test images of 10 classes "
        f"({', '.join(dataset.CLASS_NAMES)}) to {tmp_path}/out\n"
    )
    assert output.err == ""


@pytest.mark.parametrize(
    ("kind", "labels", "num_classes", "num_missing"),
    [("fine", [99, 98, 97, 96, 95, 3], 100, 94), ("coarse", list(range(20)), 20, 0)],
)
def test_cifar_100_is_converted_with_the_labels_that_the_flag_selects(
    tmp_path, capsys, kind, labels, num_classes, num_missing
):
    FLAGS.cifar100 = str(tmp_path / "cifar")
    FLAGS.cifar100_labels = kind
    FLAGS.output = str(tmp_path / "out")
    other = {"fine": "coarse_labels", "coarse": "fine_labels"}[kind]
    columns = {f"{kind}_labels": labels, other: [1] * len(labels)}
    write_pickles(tmp_path / "cifar", {"train": columns, "test": columns})
    cifar10_convert.main()
    for eval_data in (False, True):
        found = np.concatenate(read_records(tmp_path / "out", eval_data))[:, 0]
        np.testing.assert_array_equal(found, labels)
    output = capsys.readouterr()
    assert f" test images of {num_classes} classes (class 0, class 1, " in output.out
    assert output.err.count(f"no training images of {num_missing} classes (") == bool(num_missing)
    assert output.err.count("\n") == bool(num_missing)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "specify exactly one of --images, --svhn"),
        ({"images": "", "output": "b"}, "specify exactly one of --images, --svhn"),
        (
            {"images": "a", "svhn": "b", "output": "c"},
            "specify exactly one of --images, --svhn",
        ),
        ({"images": "a"}, "specify the folder to create: --output=FOLDER"),
        ({"svhn": "a", "output": "b", "test_fraction": 0.1}, "omit --test_fraction"),
        ({"cifar100": "a", "output": "b", "test_fraction": 0.1}, "omit --test_fraction"),
        ({"cifar100": "a", "cifar10_python": "b", "output": "c"}, "specify exactly one of"),
    ],
)
def test_missing_and_conflicting_flags_are_usage_errors(values, message):
    for name, value in values.items():
        FLAGS[name].value = value
    with pytest.raises(app.UsageError, match=message):
        cifar10_convert.main()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, float("nan")])
def test_test_fraction_must_be_between_0_and_1(value):
    with pytest.raises(flags.IllegalFlagValueError, match="more than 0 and less than 1"):
        FLAGS.test_fraction = value


def test_the_script_prints_its_result_or_an_error_in_one_line(images, tmp_path):
    flags = (f"--images={FLAGS.images}", f"--output={FLAGS.output}")
    process = run_script("cifar10_convert.py", *flags)
    assert process.stdout.startswith("Wrote 27 training images and 6 test images of 3 classes (")
    assert process.stderr == ""
    process = run_script("cifar10_convert.py", *flags, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("cifar10_convert.py: error: --output=")
    assert len(process.stderr.splitlines()) == 1


def test_a_conversion_succeeds_when_its_result_cannot_be_printed(images, monkeypatch):
    with lost_stream() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        cifar10_convert.main()
    assert len(os.listdir(FLAGS.output)) == 7


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # file names are ASCII
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_class_names_are_stored_in_utf_8_whatever_the_locale(
    images, tmp_path, monkeypatch, environment
):
    draw(tmp_path / "images" / "train", {"猫": 2})
    draw(tmp_path / "images" / "test", {"猫": 2})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    flags = (f"--images={FLAGS.images}", f"--output={FLAGS.output}")
    process = run_script("cifar10_convert.py", *flags)
    assert process.stdout.startswith("Wrote 29 training images and 8 test images of 4 classes (")
    assert "\\u732b)" in process.stdout
    assert process.stderr == ""
    assert dataset.read_class_names(FLAGS.output) == (*NAMES, "猫")


def test_the_script_does_not_import_tensorflow():
    run_script("-c", "import sys, cifar10_convert; assert 'tensorflow' not in sys.modules")


MEASURE_MEMORY = """
import resource, sys, tempfile
import numpy as np
import cifar10_convert
from test_cifar10_convert import Source

count = int(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cifar10_convert.convert(Source({"a": count, "b": 9}), Source({"a": 9, "b": 9}), folder + "/out")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images():
    grown = []
    for count in (12000, 60000):  # 37 and 185 MB of records
        process = subprocess.run(
            [sys.executable, "-c", MEASURE_MEMORY, str(count)],
            cwd=ROOT / "tests",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        grown.append(int(process.stdout.splitlines()[-1]) / 1024)  # MiB
    assert grown[1] < grown[0] + 8
    assert grown[1] < 60
