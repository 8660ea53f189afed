"""Tests of the conversion of images and of SVHN to records, and of the error messages."""

import hashlib
import os
import pickle
import re
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
from support.data import dataset, records
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


def check_records(images, folder):
    """Checks that a dataset has the records of the training and test images, given by path."""
    for eval_data, each in enumerate(images):
        assert sorted_bytes(read_records(folder, eval_data)) == expected_records(each, NAMES)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


def run_in_shell(folder, commands):
    subprocess.run(["bash", "-ec", commands], cwd=folder, check=True)


NAMES = ["a cat", "dog", "Ähre"]


@pytest.fixture
def images(tmp_path):
    """Draws training and test images and sets the flags; returns the pixels of both by path."""
    FLAGS.images = tmp_path / "images"
    FLAGS.output = tmp_path / "out"
    train = draw(tmp_path / "images" / "train", {"dog": 9, "a cat": 11, "Ähre": 7})
    test = draw(tmp_path / "images" / "test", {"dog": 2, "a cat": 3, "Ähre": 1}, seed=1)
    return train, test


@pytest.fixture
def undivided(tmp_path):
    """A function that draws images of classes, and sets the flags to hold out some of them."""

    def draw_undivided(counts, test_fraction=0.2):
        FLAGS.images = tmp_path / "images"
        FLAGS.output = tmp_path / "out"
        FLAGS.test_fraction = test_fraction
        return draw(tmp_path / "images", counts)

    return draw_undivided


def test_images_become_the_records_that_cifar10_predict_would_read(images, tmp_path, capsys):
    path = tmp_path / "images" / "train" / "dog" / "16_bits.png"
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(path)
    images[0][path] = read_image(path)
    capsys.readouterr()  # the line that says that such images are scaled appears only once
    cifar10_convert.main()
    folder = tmp_path / "out"
    assert dataset.read_class_names(folder) == tuple(NAMES)
    dataset.check_dataset(folder)
    check_records(images, folder)
    counts = map(len, read_records(folder, eval_data=False))
    assert sorted(counts) == [5, 5, 6, 6, 6]  # as equal as possible
    names = {*records.TRAIN_FILES, *records.TEST_FILES, "batches.meta.txt"}
    assert set(os.listdir(folder)) == names
    output = capsys.readouterr()
    assert output.out == (
        "Wrote 28 training images and 6 test images of 3 classes (a cat, dog, Ähre) to "
        f"{folder}; unreadable files: 0\n"
    )
    assert output.err == ""
    assert sorted(os.listdir(tmp_path)) == ["images", "out"]


def test_the_seed_determines_the_order_and_the_choice_of_test_images(tmp_path, undivided):
    undivided({"a": 40, "b": 25})
    found = []
    for number, seed in enumerate((3, 3, 4)):
        FLAGS.output = tmp_path / f"out{number}"
        FLAGS.shuffle_seed = seed
        cifar10_convert.main()
        found.append(digests(tmp_path / f"out{number}"))
    first, again, other = found
    assert first == again
    assert [name for name in first if first[name] == other[name]] == ["batches.meta.txt"]
    tests = [sorted_bytes(read_records(tmp_path / f"out{n}", eval_data=True)) for n in (0, 2)]
    assert tests[0] != tests[1]


@pytest.mark.parametrize(
    ("counts", "fraction", "test_counts"),
    [
        ((40, 3), 0.2, (8, 1)),
        ((40, 2), 0.99, (39, 1)),  # at least one training image
        ((3, 2), 0.01, (1, 1)),  # fewer training images than files
        ((2,) * 256, 0.5, (1,) * 256),
    ],
)
def test_test_fraction_applies_to_each_class(tmp_path, undivided, counts, fraction, test_counts):
    names = [f"{number:03}" for number in range(len(counts))]
    images = undivided(dict(zip(names, counts, strict=True)), fraction)
    cifar10_convert.main()
    dataset.check_dataset(tmp_path / "out")
    train, test = (read_records(tmp_path / "out", eval_data) for eval_data in (False, True))
    assert tuple(np.bincount(test[0][:, 0])) == test_counts
    assert sorted_bytes(train + test) == expected_records(images, names)


def test_unreadable_images_are_listed_and_other_files_are_counted(images, tmp_path, capsys):
    run_in_shell(
        FLAGS.images,
        """
        head -c 50 train/dog/1.jpg > train/dog/cut.jpg
        touch test/dog/empty.png train/lost.png train/dog/{notes.txt,README}
        mkdir train/{.hidden,@eaDir} train/dog/{.hidden,@eaDir}
        touch train/dog/{.hidden,@eaDir}/thumbnail.png
        """,
    )
    cifar10_convert.main()
    output = capsys.readouterr()
    assert output.out.endswith("; unreadable files: 2\n")
    assert re.fullmatch(
        r"Skipping files in \S+/train that are not in a class folder: 1\n"
        r"\S+/train/dog/cut.jpg: it .*\n\S+/test/dog/empty.png: it .*\n"
        r"Skipped files that are not readable PNG, JPEG, GIF, BMP or WebP images: 2\n",
        output.err,
    )
    check_records(images, tmp_path / "out")


def test_subfolders_links_and_other_spellings_do_not_change_the_classes(images, tmp_path):
    run_in_shell(
        FLAGS.images,
        """
        mkdir -p train/dog/2019/may
        mv train/dog/0.png 'train/dog/2019/may/no suffix'
        mv train/dog ../elsewhere
        ln -s ../../elsewhere 'train/ dog'
        mv test/\xc4hre test/A\u0308hre
        """,
    )
    cifar10_convert.main()
    assert dataset.read_class_names(tmp_path / "out") == tuple(NAMES)
    check_records(images, tmp_path / "out")


def test_test_images_that_are_also_training_images_are_counted(images, tmp_path, capsys):
    run_in_shell(
        FLAGS.images, "for c in dog 'a cat'; do cp train/dog/0.png \"test/$c/a.png\"; done"
    )
    cifar10_convert.main()
    output = capsys.readouterr()
    assert output.err == (
        "Test images with the same pixels as a training image: 2; they make the precision look "
        "better than it is\n"
    )
    assert output.out.startswith("Wrote 27 training images and 8 test images ")  # all are kept


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ("touch x; rm test/dog/*; mv x test/dog/a.png", "dog has no readable test image; each"),
        ("mkdir train/zebra; touch train/zebra/a", r"zebra must be in both \S+/train and \S+/test"),
        ("rm -r train/dog train/Ä*", "train must have 2 to 256 folders, .* each class; it has 1$"),
        ("mkdir train/{1..254}", "train must have 2 to 256 folders, one for .* it has 257$"),
        ("mv test other", "one folder test with a .* it has none. .* --test_fraction=0.2"),
        ("rm -r test/*; touch test/1.png", "one folder test with a folder for each class; it has "),
        ("cp -r train Training", "one folder train with a .* it has Training and train"),
        ("cp -r test val; mv test dev", "one folder test with a .* it has dev and val"),
        ("mv train/dog 'train/ '", "consists of spaces"),
        ("mkdir train/A\u0308hre", "two folders in .*train differ only in .* the Unicode form of"),
        ("rm -r ../images", r"images cannot be read \(No such file or directory\)"),
    ],
)
def test_unusable_folders_are_refused_and_no_output_remains(images, tmp_path, commands, message):
    run_in_shell(FLAGS.images, commands)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError, match=message):
        cifar10_convert.main()
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("commands", "used", "skipped"),
    [
        ("mv train Training; mv test TESTING", "Training nor TESTING", []),
        ("mv test Validation", "train nor Validation", []),
        # `test` has no folders of classes.
        ("mv test val; cp -r val/dog test", "train nor val", ["test"]),
        ("cp -r test val; cp -r test dev; mkdir x", "train nor test", ["dev", "val", "x"]),
    ],
)
def test_the_usual_names_of_splits_are_recognized(
    images, tmp_path, capsys, commands, used, skipped
):
    run_in_shell(FLAGS.images, commands)
    cifar10_convert.main()
    check_records(images, tmp_path / "out")
    lines = [f"Skipping {FLAGS.images}/{name}, which is neither {used}" for name in skipped]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(
    ("commands", "name"), [("true", "train"), ("rm -r train; mv test Dev", "Dev")]
)
def test_test_fraction_refuses_folders_that_are_splits(images, commands, name):
    run_in_shell(FLAGS.images, commands)
    FLAGS.test_fraction = 0.2
    with pytest.raises(DataError, match=f"has a folder {name}, which is not a class; omit --test_"):
        cifar10_convert.main()


def test_a_class_may_have_the_name_of_a_split_or_one_that_cannot_be_printed(tmp_path, undivided):
    undivided({"b\nc": 9, "train": 9})
    cifar10_convert.main()
    assert dataset.read_class_names(tmp_path / "out") == (r"b\nc", "train")


def write_svhn(path, count, **changes):
    """Writes a file in the format of SVHN and returns its arrays `X` and `y`."""
    images = make_records(count, seed=count)[:, 1:].reshape(32, 32, 3, count)
    arrays = {"X": images, "y": np.arange(count)[:, np.newaxis] % 10 + 1, **changes}
    scipy.io.savemat(path, arrays, do_compression=True)
    return arrays


@pytest.fixture
def svhn(tmp_path):
    FLAGS.svhn = tmp_path
    FLAGS.output = tmp_path / "out"
    files = {"train_32x32.mat": 43, "test_32x32.mat": 20}
    return [write_svhn(tmp_path / name, count) for name, count in files.items()]


def test_svhn_becomes_records_and_its_label_10_becomes_0(svhn, tmp_path, capsys):
    cifar10_convert.main()
    folder = tmp_path / "out"
    assert dataset.read_class_names(folder) == tuple("0123456789")
    for arrays, eval_data in zip(svhn, (False, True), strict=True):
        expected = [
            make_record(digit % 10, arrays["X"][..., number])
            for number, (digit,) in enumerate(arrays["y"])
        ]
        files = read_records(folder, eval_data)
        assert sorted_bytes(files) == sorted(expected)
        assert [record.tobytes() for file in files for record in file] != expected  # shuffled
    assert capsys.readouterr().out.startswith(
        "Wrote 43 training images and 20 test images of 10 classes (0, 1, "
    )
    FLAGS.output, FLAGS.shuffle_seed = tmp_path / "again", 1
    cifar10_convert.main()
    assert digests(tmp_path / "again")["test_batch.bin"] != digests(folder)["test_batch.bin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"X": np.zeros([32, 32, 3, 42], np.uint8)}, r"X must .*X is uint8 \[32, 32, 3, 42\] and"),
        ({"y": np.full([43, 1], 11)}, r"X must .* y must be 1 to 10, .* and y is \[11\]"),
        ({"y": np.array([["a"], [1.5]], object)}, "is not an SVHN file: it has no array y of "),
        (None, "is missing; download it from http://ufldl.s"),
        ("pipe", "is missing; download it from http://ufldl.s"),
    ],
)
def test_unusable_matlab_files_are_refused(svhn, tmp_path, content, message):
    path = tmp_path / "train_32x32.mat"
    path.unlink()
    if isinstance(content, dict):
        write_svhn(path, 43, **content)
    elif content:
        os.mkfifo(path)
    with pytest.raises(DataError, match=f"train_32x32.mat:? {message}"):
        cifar10_convert.main()
    assert not (tmp_path / "out").exists()


def test_the_error_without_scipy_says_how_to_install_it(svhn, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs SciPy .*: pip install -r requirements-svhn.txt"):
        cifar10_convert.main()
    assert (ROOT / "requirements-svhn.txt").read_text().count("scipy==") == 1


def test_other_versions_of_cifar_are_converted(tmp_path, capsys):
    batch = {"data": make_records(10)[:, 1:], "fine_labels": [2] * 10, "coarse_labels": [3] * 10}
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    FLAGS.cifar100, FLAGS.cifar100_labels = tmp_path, "coarse"
    FLAGS.output = tmp_path / "out"
    cifar10_convert.main()
    (found,) = read_records(tmp_path / "out", eval_data=True)
    assert found[:, 0].tolist() == batch["coarse_labels"]
    output = capsys.readouterr().out
    assert output.startswith("Wrote 10 training images and 10 test images of 20 classes (class 0, ")
    assert output.endswith(f") to {tmp_path}/out\n")
    FLAGS.cifar100, FLAGS.cifar10_python = None, tmp_path
    with pytest.raises(
        DataError, match=f"--cifar10_python={tmp_path} is not, and does not contain"
    ):
        cifar10_convert.main()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": "a", "svhn": "b", "output": "c"}, "specify exactly one of --images, --svhn"),
        ({"images": "a"}, "specify the folder to create: --output=FOLDER"),
        ({"cifar100": "a", "output": "b", "test_fraction": 0.1}, "omit --test_fraction"),
    ],
)
def test_missing_and_conflicting_flags_are_usage_errors(values, message):
    for name, value in values.items():
        FLAGS[name].value = value
    with pytest.raises(app.UsageError, match=message):
        cifar10_convert.main()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, float("nan")])
def test_test_fraction_must_be_between_0_and_1(value):
    with pytest.raises(flags.IllegalFlagValueError, match=r"in the interval \(0, 1\)"):
        FLAGS.test_fraction = value


def test_the_script_prints_its_result_or_an_error_in_one_line(images, tmp_path):
    arguments = (f"--images={FLAGS.images}", f"--output={FLAGS.output}")
    process = run_script("cifar10_convert.py", *arguments)
    assert process.stdout.startswith("Wrote 27 training images and 6 test images of 3 classes (")
    assert process.stderr == ""
    before = digests(tmp_path / "out")
    arguments = (f"--pictures={FLAGS.images}", f"--output={FLAGS.output}")  # the flag's old name
    process = run_script("cifar10_convert.py", *arguments, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    message = r"cifar10_convert.py: error: --output=\S*/out already exists; choose a new folder\n"
    assert re.fullmatch(message, process.stderr)
    assert digests(tmp_path / "out") == before


def test_a_conversion_succeeds_when_its_result_cannot_be_printed(images, monkeypatch):
    with lost_stream() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        cifar10_convert.main()
    assert len(os.listdir(FLAGS.output)) == 7


MEASURE_MEMORY = """
import resource, sys, tempfile
import numpy as np
from support.data import conversion

class Source(list):
    class_names = ("a", "b")

image = np.zeros([32, 32, 3], np.uint8)
few = [(b"1", 0, image), (b"2", 1, image)] * 9
with tempfile.TemporaryDirectory() as folder:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = [(b"3", 0, image)] * int(sys.argv[1])
    conversion.convert(Source(few + many), Source(few), folder + "/out")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_hardly_grows_with_the_number_of_images():
    grown = []
    for count in (12000, 60000):  # 37 and 185 MB of records
        process = run_script("-c", MEASURE_MEMORY, count)
        grown.append(int(process.stdout.splitlines()[-1]) / 1024)  # MiB
    assert grown[1] < grown[0] + 8
    assert grown[1] < 60
