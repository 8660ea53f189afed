"""Mutations of everything that the scripts read from elsewhere: a result, or an error of one line.

Each test makes some hundred mutations of an intact original, with a seed. The slow ones make many
more.
"""

import io
import json
import pickle
import random
import shutil
import socket
import tarfile
import threading
import time

import numpy as np
import pytest
import scipy.io
from conftest import make_records
from PIL import Image

from support.base.errors import UserError
from support.cluster.task import find_task
from support.data import conversion, dataset, download, formats, image_files, records
from support.data.settings import TrainingSettings, format_settings
from support.ops.tensorflow_v1 import tf
from support.run import checkpoints, training_run

SECONDS = 10  # for one test with a few mutations
PIECES = (
    b"", b"\0", b"\n", b"\xff", b"\x1b[31m", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"-1",
    b"null", b'"', b"\\ud800", "\u202e".encode(), b"a" * 100_000,
)  # fmt: skip


def mutate(content, generator):
    """Returns a content with some bytes changed, removed, repeated or inserted, or cut off."""
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
    """Returns the tests of a function, with few and with many mutations."""
    name = name or read.__name__
    return [
        pytest.param(original, read, few, id=name),
        pytest.param(original, read, many, id=f"{name}-many", marks=pytest.mark.slow),
    ]


# --- What is read: functions of a new file's path, which raise `UserError` or `ImageError`.


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


def read_image(path):
    with pytest.MonkeyPatch.context() as context:
        context.setattr(image_files, "_report_scaling", lambda: None)
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


def encode(image, name, **options):
    """Returns the content of an image file."""
    output = io.BytesIO()
    image.save(output, name, **options)
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
        *(
            each
            for number, image in enumerate(images())
            for each in check(image, read_image, 100, 10_000, f"image-{number}")
        ),
        *check(RESPONSE, read_http_response, 200, 2000),
        *check(MATLAB.getvalue(), read_matlab, 4, 200),
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
    assert time.monotonic() - start < SECONDS * max(1, count / 100)
