"""Pictures and digits become records; what is wrong with them is told."""

import hashlib
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
from absl import app, flags
from conftest import ROOT, run_script
from PIL import Image

import cifar10_convert
import cifar10_data
from cifar10_data import DataError
from cifar10_pictures import read_picture
from cifar10_runtime import UserError

FLAGS = cifar10_convert.FLAGS

SIZES = ((32, 32), (40, 90), (200, 33), (8, 8))
SUFFIXES = (".png", ".jpg", ".gif", ".bmp", ".webp")


def draw(folder, counts, seed=0):
    """Writes random pictures, as many a class as `counts` says; returns their pixels by path."""
    generator = np.random.default_rng(seed)
    pictures = {}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            size = SIZES[number % len(SIZES)]
            noise = generator.integers(0, 256, [5, 5, 3]).astype(np.uint8)
            path = folder / name / f"{number}{SUFFIXES[number % len(SUFFIXES)]}"
            Image.fromarray(noise).resize(size).save(path)
            pictures[path] = read_picture(path)
    return pictures


def read(folder, eval_data):
    """Returns the records of a data set, [n, 3073], file by file."""
    return [
        np.fromfile(path, np.uint8).reshape(-1, 3073)
        for path in cifar10_data.record_files(folder, eval_data)
    ]


def record_of(label, pixels):
    return bytes([label]) + pixels.transpose(2, 0, 1).tobytes()


def expected_records(pictures, names):
    """Returns the records of pictures by path, in no order."""
    return sorted(record_of(names.index(p.parent.name), image) for p, image in pictures.items())


def as_bytes(files):
    return sorted(record.tobytes() for records in files for record in records)


@pytest.fixture
def pictures(tmp_path):
    """Two levels of folders; the flags name them. Returns the pixels of both parts by path."""
    FLAGS.pictures = str(tmp_path / "pictures")
    FLAGS.output = str(tmp_path / "out")
    train = draw(tmp_path / "pictures" / "train", {"dog": 9, "a cat": 11, "Ähre": 7})
    test = draw(tmp_path / "pictures" / "test", {"dog": 2, "a cat": 3, "Ähre": 1}, seed=1)
    return train, test


NAMES = ["a cat", "dog", "Ähre"]


def test_pictures_become_the_records_that_predict_would_read(pictures, tmp_path, capsys):
    cifar10_convert.main()
    train, test = pictures
    folder = tmp_path / "out"
    assert cifar10_data.read_class_names(folder) == tuple(NAMES)
    cifar10_data.check_records(folder)
    files = read(folder, eval_data=False)
    assert as_bytes(files) == expected_records(train, NAMES)
    assert sorted(map(len, files)) == [5, 5, 5, 6, 6]  # as equal as can be
    assert as_bytes(read(folder, eval_data=True)) == expected_records(test, NAMES)
    assert sorted(os.listdir(folder)) == sorted(
        [*cifar10_data.TRAIN_FILES, *cifar10_data.TEST_FILES, "batches.meta.txt"]
    )
    output = capsys.readouterr()
    assert output.out == (
        "27 pictures to train on and 6 to test on, of 3 classes (a cat, dog, Ähre), are in "
        f"{folder}; 0 could not be read\n"
    )
    assert output.err == ""
    assert sorted(os.listdir(tmp_path)) == ["out", "pictures"]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


def test_a_seed_decides_the_order_and_what_is_taken_to_test_on(tmp_path, monkeypatch):
    draw(tmp_path / "pictures", {"a": 40, "b": 25})
    FLAGS.pictures = str(tmp_path / "pictures")
    found = []
    for number, seed in enumerate((3, 3, 4)):
        FLAGS.output = str(tmp_path / f"out{number}")
        FLAGS.shuffle_seed = seed
        FLAGS.test_fraction = 0.2
        if number == 1:  # whatever the order that a folder is listed in
            walk = cifar10_convert._walk
            monkeypatch.setattr(
                cifar10_convert, "_walk", lambda folder, walk=walk: reversed(list(walk(folder)))
            )
        cifar10_convert.main()
        found.append(digests(tmp_path / f"out{number}"))
    assert found[0] == found[1]
    assert all(
        (found[0][name] == found[2][name]) == (name == "batches.meta.txt") for name in found[0]
    )
    tests = [as_bytes(read(tmp_path / f"out{number}", eval_data=True)) for number in (0, 2)]
    assert tests[0] != tests[1]


def test_the_records_are_well_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10_convert, "BUCKET_BYTES", 20000)  # six records
    source = Source({"a": 600, "b": 600})
    cifar10_convert.convert(source, Source({"a": 5, "b": 5}), str(tmp_path / "out"))
    files = read(tmp_path / "out", eval_data=False)
    labels = np.concatenate([records[:, 0] for records in files])
    # Runs of one label: as many as in throws of a coin, 600 of 1200, 6 standard deviations of 17.
    assert abs((labels[1:] != labels[:-1]).sum() - 600) < 104
    for records in files:
        assert abs((records[:, 0] == 1).sum() - 120) < 47  # of 240, 6 standard deviations of 7.7


class Source:
    """Stands in for `Pictures`: images whose pixels tell their number."""

    def __init__(self, counts):
        self.class_names = tuple(counts)
        self.total = sum(counts.values())
        self._counts = counts

    def __iter__(self):
        for label, (name, count) in enumerate(self._counts.items()):
            for number in range(count):
                planes = np.full([3, 32, 32], number % 256, np.uint8)
                yield f"{name}/{number}".encode(), label, planes


@pytest.mark.parametrize("bucket_bytes", [100, 10000, 1 << 30])
def test_memory_is_bounded_by_sorting_in_parts_which_changes_no_byte(
    tmp_path, monkeypatch, bucket_bytes
):
    source = Source({"a": 50, "b": 60})
    cifar10_convert.convert(source, Source({"a": 9, "b": 9}), str(tmp_path / "usual"))
    monkeypatch.setattr(cifar10_convert, "BUCKET_BYTES", bucket_bytes)
    largest = 0
    from_file = np.fromfile

    def read_part(*arguments):
        nonlocal largest
        part = from_file(*arguments)
        largest = max(largest, part.nbytes)
        return part

    monkeypatch.setattr(np, "fromfile", read_part)
    cifar10_convert.convert(source, Source({"a": 9, "b": 9}), str(tmp_path / "parts"))
    assert digests(tmp_path / "usual") == digests(tmp_path / "parts")
    # Hashes spread evenly: 6 records fit on average into the middle value, which no part has twice.
    assert largest <= max(3 * bucket_bytes, 5 * 3081)


@pytest.mark.parametrize(
    ("fraction", "counts"), [(0.2, (8, 1)), (0.01, (1, 1)), (0.99, (39, 2)), (0.5, (20, 2))]
)
def test_a_fraction_of_each_class_is_taken_to_test_on(tmp_path, fraction, counts):
    pictures = draw(tmp_path / "pictures", {"a": 40, "b": 3})
    FLAGS.pictures = str(tmp_path / "pictures")
    FLAGS.output = str(tmp_path / "out")
    FLAGS.test_fraction = fraction
    if fraction == 0.99:
        with pytest.raises(DataError, match="2 pictures to train on; at least 5 are needed"):
            cifar10_convert.main()
        assert not (tmp_path / "out").exists()
        return
    cifar10_convert.main()
    train, test = (read(tmp_path / "out", eval_data) for eval_data in (False, True))
    assert tuple(np.bincount(test[0][:, 0], minlength=2)) == counts
    assert sorted(as_bytes(train) + as_bytes(test)) == expected_records(pictures, ["a", "b"])


def test_unreadable_pictures_are_listed_skipped_and_counted(pictures, tmp_path, capsys):
    train, test = pictures
    folder = tmp_path / "pictures" / "train" / "dog"
    (folder / "notes.txt").write_text("no picture")
    (folder / "cut.jpg").write_bytes((folder / "1.jpg").read_bytes()[:50])
    (tmp_path / "pictures" / "test" / "dog" / "empty.png").write_bytes(b"")
    (folder / ".hidden").write_text("not looked at")
    cifar10_convert.main()
    output = capsys.readouterr()
    assert output.out.endswith("; 3 could not be read\n")
    assert sorted(re.findall(r"^.*/(\S+): it .*$", output.err, re.MULTILINE)) == [
        "cut.jpg",
        "empty.png",
        "notes.txt",
    ]
    assert as_bytes(read(tmp_path / "out", eval_data=False)) == expected_records(train, NAMES)
    assert as_bytes(read(tmp_path / "out", eval_data=True)) == expected_records(test, NAMES)


def test_folders_within_a_class_belong_to_it(pictures, tmp_path):
    train, _ = pictures
    folder = tmp_path / "pictures" / "train" / "dog" / "2019" / "may"
    folder.mkdir(parents=True)
    os.rename(tmp_path / "pictures" / "train" / "dog" / "0.png", folder / "no suffix")
    cifar10_convert.main()
    assert as_bytes(read(tmp_path / "out", eval_data=False)) == expected_records(train, NAMES)


def test_a_class_has_one_label_whatever_spaces_its_folders_have(pictures, tmp_path):
    train, test = pictures
    os.rename(tmp_path / "pictures" / "train" / "dog", tmp_path / "pictures" / "train" / " dog")
    cifar10_convert.main()
    assert cifar10_data.read_class_names(tmp_path / "out") == tuple(NAMES)
    assert as_bytes(read(tmp_path / "out", eval_data=False)) == expected_records(train, NAMES)
    assert as_bytes(read(tmp_path / "out", eval_data=True)) == expected_records(test, NAMES)


def test_links_to_folders_are_followed_but_not_in_circles(pictures, tmp_path):
    train, _ = pictures
    folder = tmp_path / "pictures" / "train"
    os.rename(folder / "dog", tmp_path / "elsewhere")
    (folder / "dog").mkdir()
    os.symlink(tmp_path / "elsewhere", folder / "dog" / "more")
    os.symlink(folder / "a cat", folder / "a cat" / "circle")
    os.symlink("itself", folder / "a cat" / "itself")  # which cannot be read
    cifar10_convert.main()
    assert as_bytes(read(tmp_path / "out", eval_data=False)) == expected_records(train, NAMES)


def test_a_folder_that_cannot_be_read_is_listed_and_counted(
    pictures, tmp_path, monkeypatch, capsys
):
    (tmp_path / "pictures" / "test" / "dog" / "locked").mkdir()
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
    assert output.out.endswith("; 1 could not be read\n")


def test_files_of_no_class_are_told(pictures, tmp_path, capsys):
    (tmp_path / "pictures" / "train" / "lost.png").write_text("")
    (tmp_path / "pictures" / "test" / "lost.png").write_text("")
    (tmp_path / "pictures" / "test" / ".hidden").write_text("")
    cifar10_convert.main()
    assert capsys.readouterr().err == "2 files are in no class's folder: left out\n"


def test_there_may_be_256_classes(tmp_path):
    pictures = draw(tmp_path / "pictures", {f"{number:03}": 2 for number in range(256)})
    FLAGS.pictures = str(tmp_path / "pictures")
    FLAGS.output = str(tmp_path / "out")
    FLAGS.test_fraction = 0.5
    cifar10_convert.main()
    cifar10_data.check_records(tmp_path / "out")
    names = [f"{number:03}" for number in range(256)]
    train, test = (read(tmp_path / "out", eval_data) for eval_data in (False, True))
    assert sorted(test[0][:, 0]) == list(range(256))
    assert sorted(as_bytes(train) + as_bytes(test)) == expected_records(pictures, names)


def test_pictures_that_are_named_like_what_is_not_finished_stay(tmp_path):
    draw(tmp_path / "pets.part", {"a": 9, "b": 9})
    before = sorted(path.name for path in (tmp_path / "pets.part").rglob("*"))
    FLAGS.pictures = str(tmp_path / "pets.part")
    FLAGS.output = str(tmp_path / "pets")
    FLAGS.test_fraction = 0.3
    cifar10_convert.main()
    assert sorted(path.name for path in (tmp_path / "pets.part").rglob("*")) == before


def test_a_class_may_have_a_name_that_is_not_text(tmp_path):
    draw(tmp_path / "pictures", {"a": 9, "b": 9})
    folder = os.fsencode(tmp_path / "pictures")
    os.rename(folder + b"/b", folder + b"/b\xff\nc")
    FLAGS.pictures = str(tmp_path / "pictures")
    FLAGS.output = str(tmp_path / "out")
    FLAGS.test_fraction = 0.3
    cifar10_convert.main()
    assert cifar10_data.read_class_names(tmp_path / "out") == ("a", r"b\udcff\nc")


def make_empty(folder):
    (folder / "train" / "empty").mkdir()
    return r"the class empty is empty: \S+/train/empty holds no files"


def make_unreadable(folder):
    for part in ("train", "test"):
        (folder / part / "zebra").mkdir()
        (folder / part / "zebra" / "a.png").write_text("no picture")
    return "the class zebra is empty: it has no picture that can be read"


def make_untested(folder):
    (folder / "train" / "zebra").mkdir()
    (folder / "train" / "zebra" / "a.png").write_text("no picture")
    return r"the class zebra must be in both \S+/train and \S+/test"


def make_one_class(folder):
    for name in ("dog", "Ähre"):
        os.rename(folder / "train" / name, folder / name)
    return "train has 1 folders; there must be 2 to 256, one for each class"


def make_many_classes(folder):
    for number in range(254):
        (folder / "train" / f"c{number}").mkdir()
    return "train has 257 folders; there must be 2 to 256"


def make_one_level(folder):
    os.rename(folder / "test", folder / "val")
    return "has no folder test; it must have .* folder that has those of the classes, with --test_f"


def make_same_names(folder):
    (folder / "train" / "dog ").mkdir()
    return "two folders in .*train name the same class, but for spaces"


def make_missing(folder):
    os.rename(folder, folder.parent / "elsewhere")
    return r"pictures cannot be read \(No such file or directory\)"


@pytest.mark.parametrize(
    "spoil",
    [
        make_empty,
        make_unreadable,
        make_untested,
        make_one_class,
        make_many_classes,
        make_one_level,
        make_same_names,
        make_missing,
    ],
)
def test_folders_that_make_no_data_set_are_refused_and_leave_nothing(pictures, tmp_path, spoil):
    message = spoil(tmp_path / "pictures")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError, match=message):
        cifar10_convert.main()
    assert sorted(os.listdir(tmp_path)) == before


def test_folders_that_tell_what_to_test_on_are_no_classes(pictures, tmp_path, capsys):
    (tmp_path / "pictures" / "val").mkdir()
    cifar10_convert.main()
    assert capsys.readouterr().err == f"{FLAGS.pictures}/val is neither train nor test: left out\n"
    FLAGS.output = str(tmp_path / "other")
    FLAGS.test_fraction = 0.2
    with pytest.raises(DataError, match="has a folder t.*, which is no class; leave --test_fracti"):
        cifar10_convert.main()
    shutil.rmtree(tmp_path / "pictures" / "test")
    os.rename(tmp_path / "pictures" / "train", tmp_path / "pictures" / "Train")
    with pytest.raises(DataError, match="has a folder Train, which is no class; leave --test_fra"):
        cifar10_convert.main()


def test_a_class_with_one_picture_cannot_be_divided(tmp_path):
    draw(tmp_path / "pictures", {"a": 9, "b": 1})
    FLAGS.pictures = str(tmp_path / "pictures")
    FLAGS.output = str(tmp_path / "out")
    FLAGS.test_fraction = 0.2
    with pytest.raises(DataError, match="the class b has a single picture; --test_fraction needs"):
        cifar10_convert.main()


def test_what_is_there_already_is_not_overwritten(pictures, tmp_path):
    (tmp_path / "somewhere").mkdir()  # empty: it may be
    os.symlink("somewhere", tmp_path / "out")
    cifar10_convert.main()
    assert (tmp_path / "out").is_symlink()
    before = digests(tmp_path / "out")
    with pytest.raises(UserError, match=f"--output={tmp_path}/out is there already; name a new"):
        cifar10_convert.main()
    assert digests(tmp_path / "out") == before
    FLAGS.output = str(tmp_path / "pictures" / "records")
    with pytest.raises(UserError, match="lies in --pictures=.*; name another folder"):
        cifar10_convert.main()


def test_two_that_make_the_same_folder_do_not_mix(tmp_path, monkeypatch):
    train, test = Source({"a": 5, "b": 5}), Source({"a": 5, "b": 5})
    output = str(tmp_path / "out")
    cifar10_convert.convert(train, test, output)
    with pytest.raises(UserError, match="is there already"):  # as the second finds, once it is next
        cifar10_convert.convert(train, test, output)


def test_what_a_killed_conversion_has_left_is_thrown_away(tmp_path):
    train, test = Source({"a": 5, "b": 5}), Source({"a": 5, "b": 5})
    cifar10_convert.convert(train, test, str(tmp_path / "whole"))
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "bucket_0").write_bytes(b"half a record")
    (tmp_path / ".out.part" / "data_batch_1.bin").write_bytes(b"1")
    (tmp_path / ".out.lock").write_text("process 1")
    cifar10_convert.convert(train, test, str(tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_a_folder_that_cannot_be_written_is_told(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    FLAGS.output = str(tmp_path / "file" / "out")
    with pytest.raises(DataError, match="cannot write the data set to .*; name .* with --output"):
        cifar10_convert.main()


def write_svhn(folder, count, seed, **changes):
    """Writes a file as SVHN's are, and returns its arrays X and y."""
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


def test_svhns_digits_become_records_and_ten_is_a_zero(svhn, tmp_path, capsys):
    cifar10_convert.main()
    folder = tmp_path / "out"
    assert cifar10_data.read_class_names(folder) == tuple("0123456789")
    for arrays, eval_data in zip(svhn, (False, True), strict=True):
        expected = []
        for number, (digit,) in enumerate(arrays["y"]):
            label = 0 if digit == 10 else digit
            expected.append(record_of(label, arrays["X"][:, :, :, number]))
        assert as_bytes(read(folder, eval_data)) == sorted(expected)
        order = [record.tobytes() for records in read(folder, eval_data) for record in records]
        assert order != expected  # they are shuffled
    assert "43 pictures to train on and 20 to test on, of 10 classes (0, 1, " in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": None}, "does not hold the array 'X'"),
        ({"y": None}, "does not hold the array 'y'"),
        ({"X": np.zeros([32, 32, 3, 42], np.uint8)}, r"X is uint8 \[32, 32, 3, 42\], not uint8"),
        ({"X": np.zeros([32, 32, 3, 43])}, r"X is float64 \[32, 32, 3, 43\], not uint8"),
        ({"y": np.full([43, 1], 11)}, "y has 11, but labels are 1 to 10"),
        ({"y": np.full([43, 1], 2.5)}, r"y has 2\.5, but"),
    ],
)
def test_what_is_not_svhn_is_refused(svhn, tmp_path, changes, message):
    write_svhn(tmp_path, 43, 0, **changes)
    with pytest.raises(DataError, match=f"train_32x32.mat:? {message}"):
        cifar10_convert.main()
    assert not (tmp_path / "out").exists()


def test_labels_that_are_floats_are_digits_too(svhn, tmp_path):
    before = write_svhn(tmp_path, 43, 0)
    cifar10_convert.main()
    first = digests(tmp_path / "out")
    write_svhn(tmp_path, 43, 0, y=before["y"].astype(float))
    FLAGS.output = str(tmp_path / "again")
    cifar10_convert.main()
    assert digests(tmp_path / "again") == first


@pytest.mark.parametrize("content", [b"", b"no matrix" * 99, b"\x89HDF\r\n\x1a\n" + bytes(999)])
def test_a_damaged_matlab_file_is_told(svhn, tmp_path, content):
    (tmp_path / "train_32x32.mat").write_bytes(content)
    with pytest.raises(DataError, match="train_32x32.mat cannot be read .*; it is not SVHN's"):
        cifar10_convert.main()


def test_a_missing_matlab_file_is_told_with_its_source(svhn, tmp_path):
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match="test_32x32.mat is missing; http://ufldl.stanford.edu/"):
        cifar10_convert.main()
    FLAGS.svhn = str(tmp_path / "train_32x32.mat")  # in place of its folder
    with pytest.raises(DataError, match="train_32x32.mat/train_32x32.mat is missing; "):
        cifar10_convert.main()


def test_without_scipy_its_requirement_is_told(svhn, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="needs SciPy, .*: pip install -r requirements-svhn.txt"):
        cifar10_convert.main()
    assert (ROOT / "requirements-svhn.txt").read_text().count("scipy==") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name either --pictures or --svhn"),
        ({"pictures": "", "output": "b"}, "name either --pictures or --svhn"),
        ({"pictures": "a", "svhn": "b", "output": "c"}, "name either --pictures or --svhn"),
        ({"pictures": "a"}, "name the folder to make with --output"),
        ({"svhn": "a", "output": "b", "test_fraction": 0.1}, "leave --test_fraction away"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(values, message):
    for name, value in values.items():
        FLAGS[name].value = value
    with pytest.raises(app.UsageError, match=message):
        cifar10_convert.main()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(value):
    with pytest.raises(flags.IllegalFlagValueError, match="more than 0 and less than 1"):
        FLAGS.test_fraction = value


def test_the_script_tells_an_error_in_a_line_and_what_it_has_made(pictures, tmp_path):
    flags = (f"--pictures={FLAGS.pictures}", f"--output={FLAGS.output}")
    process = run_script("cifar10_convert.py", *flags)
    assert process.stdout.startswith("27 pictures to train on and 6 to test on, of 3 classes (")
    assert process.stderr == ""
    process = run_script("cifar10_convert.py", *flags, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("cifar10_convert.py: error: --output=")
    assert len(process.stderr.splitlines()) == 1


CODE = """
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
def test_memory_does_not_grow_with_the_number_of_pictures():
    grown = []
    for count in (12000, 60000):  # 37 and 185 MB of records
        process = subprocess.run(
            [sys.executable, "-c", CODE, str(count)],
            cwd=ROOT / "tests",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        grown.append(int(process.stdout.splitlines()[-1]) / 1024)  # MiB
    assert grown[1] < grown[0] + 8
    assert grown[1] < 60
