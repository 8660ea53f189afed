"""Everything that the scripts read from outside, mutated: it is read, or there is a one-line error.

Each test makes a few hundred mutations of an intact original, with a seed. The slow tests make many
more.
"""

import io
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import tarfile
import threading
import time

import numpy as np
import pytest
import scipy.io
from conftest import make_records
from PIL import Image

from support.base import options
from support.base.errors import DataError, UserError, foreign_file
from support.cluster.task import find_task
from support.data import conversion, dataset, download, formats, image_files, pickles, records
from support.data.settings import TrainingSettings, format_settings
from support.ops.tensorflow_v1 import session_config, tf
from support.run import checkpoints, training_run

SECONDS = 10  # for each 100 mutations
PIECES = (
    b"", b"\0", b"\n", b"\xff", b"\x1b[31m", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"-1",
    b"null", b'"', b"\\ud800", "\u202e".encode(), b"a" * 100_000,
)  # fmt: skip


def mutate(content, generator):
    """Returns `content` with some bytes changed, removed, repeated or inserted, or cut off."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        start = generator.randrange(len(content) + 1)
        end = min(len(content), start + generator.choice([0, 1, 1, 2, 8, 100]))
        piece = generator.choice(
            [generator.randbytes(end - start), bytes(content[start:end]) * 2, *PIECES]
        )
        content[start:end] = piece
        if generator.random() < 0.1:
            del content[generator.randrange(len(content) + 1) :]
    return bytes(content)


def check(original, read, few, many=20_000, name=None):
    """Returns two cases for a reader: with few mutations and with many."""
    name = name or read.__name__
    return [
        pytest.param(original, read, few, id=name),
        pytest.param(original, read, many, id=f"{name}-many", marks=pytest.mark.slow),
    ]


# --- The readers: functions of the path of a new file, which raise `UserError` or `ImageError`.


def read_records(path):
    return records.find_problem(path, 10)


def read_class_names(path):
    path.rename(path.with_name(dataset.CLASS_NAMES_FILE))
    names = dataset.read_class_names(path.parent)
    assert all(name.isprintable() and len(name) <= dataset.MAX_NAME_LENGTH for name in names)
    dataset.write_class_names(path.parent, names)
    assert dataset.read_class_names(path.parent) == names


def read_run_file(path):
    training_run._read_starts(path)


def read_state_file(path):
    path.rename(path.with_name("checkpoint"))
    (path.parent / "model.ckpt-3.index").touch()
    checkpoints.find_latest_checkpoint(str(path.parent))
    checkpoints.find_checkpoint_to_resume(str(path.parent))


def read_settings(path):
    content = path.read_bytes()
    with tf.Graph().as_default():
        tf.add_to_collection(checkpoints._SETTINGS, content)
        tf.train.export_meta_graph(str(path.parent / "model.ckpt-3.meta"))
    (path.parent / "model.ckpt-3.index").touch()
    read = checkpoints._read_settings(str(path.parent / "model.ckpt-3"))
    assert all(name.isprintable() for name in read.class_names)


def read_tf_config(path):
    content = path.read_bytes().decode(errors="surrogateescape").replace("\0", "")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("TF_CONFIG", content)
        find_task()


def read_archive(path):
    formats.convert(str(path), "cifar10_python", str(path.parent / "out"))


def read_pickle(path):
    with foreign_file("the pickle", DataError):
        loaded = pickles.load_dict(path.read_bytes())
    assert all(isinstance(key, str) for key in loaded)
    arrays = [value for value in loaded.values() if isinstance(value, np.ndarray)]
    assert all(array.dtype.kind in "iu" for array in arrays)
    assert sum(array.nbytes for array in arrays) <= len(arrays) * path.stat().st_size


def read_image(path):
    with pytest.MonkeyPatch.context() as context:
        context.setattr(image_files, "report_once", lambda message: None)
        assert image_files.read_image(path).shape == (32, 32, 3)


def read_matlab(path):
    path.rename(path.with_name("train_32x32.mat"))
    conversion.SVHN(path.parent, "train")


def read_http_response(path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(path.read_bytes())

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a"
        with pytest.MonkeyPatch.context() as context:
            context.setattr(download, "RETRY_DELAYS", ())
            download.maybe_download_and_extract(str(path.parent / "data"), url, "no digest")


# --- The originals.


def encode(image, name, **arguments):
    """Returns the content of an image file."""
    output = io.BytesIO()
    image.save(output, name, **arguments)
    return output.getvalue()


def images():
    """Returns the contents of an image in each format."""
    pixels = np.arange(40 * 36 * 3).astype(np.uint8).reshape(40, 36, 3)
    for name in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        yield encode(Image.fromarray(pixels), name)
    yield encode(Image.fromarray(pixels), "JPEG", progressive=True)
    yield encode(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)), "PNG")


def archive():
    """Returns the content of an archive of CIFAR-10 for Python, without compression."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as members:
        for name in (*formats.VERSIONS[0].train_files, "test_batch", "batches.meta"):
            array = make_records(2)
            batch = {"labels": [0, 1], "data": array[:, 1:], "label_names": ["a", "b"]}
            content = pickle.dumps(batch, 2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            members.addfile(member, io.BytesIO(content))
    return output.getvalue()


BATCH = {"labels": [3, 1], "data": make_records(2)[:, :9], "order": np.arange(3, dtype=">i8")}
SETTINGS = TrainingSettings(("cat", "käse"), 100, examples_per_step=8)
TF_CONFIG = {
    "cluster": {"chief": ["a:1"], "ps": ["b:1"], "worker": {"0": "[::1]:3", "1": "d:4"}},
    "task": {"type": "worker", "index": 1},
}
STATE = 'model_checkpoint_path: "model.ckpt-3"\nall_model_checkpoint_paths: "model.ckpt-0"\n'
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 20\r\n"
    b"Content-Range: bytes 0-19/20\r\n\r\n" + b"x" * 20
)
MATLAB = io.BytesIO()
scipy.io.savemat(MATLAB, {"X": np.zeros([32, 32, 3, 1], np.uint8), "y": np.array([[1]], np.uint8)})


@pytest.mark.parametrize(
    ("original", "read", "count"),
    [
        *check(make_records(3).tobytes(), read_records, 300),
        *check("cat\nkäse\nhot dog\n".encode(), read_class_names, 300),
        *check(json.dumps([{"time": 1.5, "flags": {}}]).encode(), read_run_file, 300),
        *check(STATE.encode(), read_state_file, 150, 1000),
        *check(format_settings(SETTINGS).encode(), read_settings, 150, 1000),
        *check(json.dumps(TF_CONFIG).encode(), read_tf_config, 300),
        *check(archive(), read_archive, 150, 3000),
        *check(pickle.dumps(BATCH, 2), read_pickle, 200, name="pickle-2"),
        *check(pickle.dumps(BATCH, 5), read_pickle, 200, name="pickle-5"),
        *(
            each
            for number, image in enumerate(images())
            for each in check(image, read_image, 100, 10_000, f"image-{number}")
        ),
        *check(RESPONSE, read_http_response, 200, 2000),
        *check(MATLAB.getvalue(), read_matlab, 4, 100),
    ],
)
def test_a_mutated_file_is_read_or_refused_in_one_line(tmp_path, original, read, count):
    start = time.monotonic()
    messages = []
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "file").write_bytes(mutate(original, random.Random(f"{read.__name__} {number}")))
        try:
            messages.append(read(folder / "file"))
        except (UserError, image_files.ImageError) as error:
            messages.append(str(error))
        shutil.rmtree(folder)
    messages = list(filter(None, messages))
    assert messages
    assert all(message.isprintable() and len(message) < 2100 for message in messages)
    is_slow = read is read_matlab  # in a process of its own
    assert time.monotonic() - start < SECONDS * max(1, count / (10 if is_slow else 100))


# --- What mutations rarely find.


@pytest.mark.parametrize(
    "value", [[1, 2], [[1.0]], float("inf"), float("nan"), -5, 1.5, 2.0**70, True, b"seven"]
)
@pytest.mark.parametrize("use", [checkpoints.use_newest, checkpoints.find_checkpoint_to_resume])
def test_a_global_step_is_one_finite_integer(tmp_path, value, use):
    with tf.Graph().as_default(), tf.Session(config=session_config()) as session:
        tf.get_variable("global_step", initializer=value, trainable=False)
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, str(tmp_path / "model.ckpt"), 1)
    with pytest.raises(UserError, match="model.ckpt-1 cannot be read "):
        use(str(tmp_path))
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(UserError, match="there is no checkpoint in|none of the checkpoints in "):
        use(str(tmp_path))


@pytest.mark.parametrize(
    "names", [["a", ""], ["a", "b\nc"], ["a", " b"], ["a", "a"], ["a", "x" * 201], ["a", "\x85b"]]
)
def test_class_names_that_would_be_read_differently_are_not_written(tmp_path, names):
    with pytest.raises(DataError):
        dataset.write_class_names(tmp_path, names)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "cannot be the lines of batches.meta.txt"),  # it would shift the labels after it
        ("\n" * 100_000, "fine_label_names.txt has more than 100,000 bytes"),
    ],
)
def test_names_of_cifar_100_that_would_shift_labels_or_take_long_are_refused(
    tmp_path, line, message
):
    names = [f"fine {label}" for label in range(100)]
    names[50] = line
    (tmp_path / "fine_label_names.txt").write_text("\n".join(names))
    for name in ("train.bin", "test.bin"):
        make_100 = np.column_stack([np.zeros(5, np.uint8), make_records(5)])
        make_100.tofile(tmp_path / name)
    with pytest.raises(DataError, match=message):
        formats.convert(str(tmp_path), "cifar100", str(tmp_path / "out"), "fine")
    assert not (tmp_path / "out").exists()


def check_archive_is_refused(path, message):
    with pytest.raises(DataError, match=message):
        formats.convert(str(path), "cifar10_python", str(path.parent / "out"))


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ("truncate -s 4G test_batch; tar --sparse -cf a.tar test_batch", "sparse"),
        ("truncate -s 4G test_batch; tar --sparse -H posix -cf a.tar test_batch", "sparse"),
        ("mkdir {1..1001}; tar -cf a.tar *", "more than 1,000 files"),
        ("truncate -s 3M test_batch; tar -cf a.tar test_batch", "larger than 2,000,000 bytes"),
        ("truncate -s 1M a b c d; tar -cf a.tar a b c d", "or 3,000,000 bytes"),
    ],
)
def test_an_archive_that_claims_too_much_is_refused_at_once(
    tmp_path, monkeypatch, commands, message
):
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 2_000_000)
    monkeypatch.setattr(formats, "MAX_ARCHIVE_BYTES", 3_000_000)
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True)
    check_archive_is_refused(tmp_path / "a.tar", f"a.tar cannot be read .*{message}")


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        (tarfile.GNUTYPE_LONGNAME, 20_000, "larger than 10,000 bytes"),
        (tarfile.REGTYPE, -512, ""),  # the next file is this one again
    ],
)
def test_an_archive_with_an_invalid_size_in_a_header_is_refused(tmp_path, kind, size, message):
    member = tarfile.TarInfo("././@LongLink")
    header = member.tobuf()
    member.type, member.size = kind, size
    (tmp_path / "a.tar").write_bytes(header + member.tobuf(tarfile.GNU_FORMAT) + bytes(40_000))
    check_archive_is_refused(tmp_path / "a.tar", f"a.tar cannot be read .*{message}")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_damaged_compressed_archive_is_a_one_line_error(tmp_path, mode):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{mode}") as members:
        members.add(__file__, "test_batch")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"x" * 100
    path.write_bytes(content)
    check_archive_is_refused(path, "a.tar cannot be read")


LARGE = Image.new("RGB", (3000, 3000))
SCAN = b"\xff\xda\x00\x0c\x03"  # how a scan begins


@pytest.mark.parametrize("arguments", [{}, {"save_all": True, "append_images": [LARGE]}])
def test_an_image_with_endless_scans_is_refused_at_once(tmp_path, arguments):
    content = encode(LARGE, "MPO" if arguments else "JPEG", progressive=True, **arguments)
    scan = content.index(b"\xff\xda")
    (tmp_path / "a").write_bytes(content[:scan] + SCAN * 20_000 + content[scan:])
    start = time.process_time()
    with pytest.raises(image_files.ImageError, match=r"it has 200\d\d scans, which would take"):
        image_files.read_image(tmp_path / "a")
    assert time.process_time() - start < 5
    # Videos and other data behind the image contain the marker by chance.
    (tmp_path / "b").write_bytes(content + b"\xff\xda" * 20_000)
    image_files.read_image(tmp_path / "b")


def test_a_record_file_that_is_truncated_during_the_check_causes_no_crash(tmp_path, monkeypatch):
    path = tmp_path / "data_batch_1.bin"
    make_records(300).tofile(path)
    size = os.path.getsize(path)
    monkeypatch.setattr(os.path, "getsize", lambda name: size)
    os.truncate(path, 4096)
    records.find_problem(str(path), 10)  # a memory map would end the process
    assert len(records.read_labels(path)) == 2


def test_secrets_in_flags_are_not_recorded(tmp_path):
    flags = {"data_url": "https://ann:secret@host/a?signature=the secret", "batch_size": 8}
    run_options = training_run.Options(str(tmp_path), 0, flags=flags)
    with training_run.TrainingRun(run_options, SETTINGS) as run, run.graph():
        tf.train.get_or_create_global_step()
        with run.session(tf.constant(1.0)):
            pass
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text)[0]["flags"]["data_url"] == "https://***@host/a?***"
    assert "secret" not in text


def test_a_path_of_too_many_folders_is_refused_as_a_flag():
    with pytest.raises(ValueError, match="at most 200 folders"):
        options.tensorflow_path("a/" * 2000)
