"""The data set on disk: faults are caused for real, downloads come from a server on loopback."""

import contextlib
import hashlib
import http
import http.server
import io
import os
import pathlib
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, make_records, write_data_set

import cifar10_data
from cifar10_data import DataError

NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def folder(tmp_path):
    write_data_set(tmp_path / "cifar-10-batches-bin")
    return tmp_path / "cifar-10-batches-bin"


def make_archive(path, members=None):
    """Writes a .tar.gz like CIFAR-10's; returns its SHA-256."""
    if members is None:
        members = {name: make_records(2).tobytes() for name in NAMES}
        members["batches.meta.txt"] = "".join(
            f"{name}\n" for name in cifar10_data.CLASS_NAMES
        ).encode()
        members["readme.html"] = b"<html>"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Server:
    """A server on loopback that serves `body`, and misbehaves as it is told.

    Args:
      body: bytes.
      knows_ranges: bool; or "wrongly", to answer each with another part than was asked for.
      faults: see below.
      length: the header `Content-Length`, in place of the right one; "" for none.

    Attributes:
      url: string.
      requests: list of the `Range` headers that came, None for a request without one.
      faults: list of what is to go wrong with the next requests, one each: a status, or the number
        of bytes after which the connection is cut.
    """

    def __init__(self, body, knows_ranges=True, faults=(), length=None):
        self.body, self.knows_ranges, self.faults, self.requests = body, knows_ranges, [*faults], []
        self.length = length

    def answer(self, handler):
        wanted = handler.headers["Range"]
        self.requests.append(wanted)
        fault = self.faults.pop(0) if self.faults else None
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and self.knows_ranges else 0
        body = self.body[start:]
        if isinstance(fault, http.HTTPStatus):
            handler.send_response(fault)
            body, fault = b"<html>an error</html>", None
        elif start >= len(self.body) > 0:
            handler.send_response(416)
            body = b""
        elif start:
            handler.send_response(206)
            size = len(self.body)
            if self.knows_ranges == "wrongly":
                start = 0
                body = self.body
            handler.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            handler.send_response(200)
        length = str(len(body)) if self.length is None else self.length
        if length:
            handler.send_header("Content-Length", length)
        handler.end_headers()
        handler.wfile.write(body[:fault])

    def __enter__(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/cifar.tar.gz"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(cifar10_data, "RETRY_DELAYS", (0.0, 0.0, 0.0))


def test_importing_the_data_module_does_not_import_tensorflow():
    code = "import sys, cifar10_data; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_record_is_a_label_and_3072_pixels():
    assert cifar10_data.RECORD_BYTES == 1 + 3 * 32 * 32 == 3073


def test_good_records_of_any_number_are_accepted_and_counted(folder):
    cifar10_data.check_records(folder)
    assert cifar10_data.count_records(folder, eval_data=False) == 3 + 4 + 5 + 6 + 7
    assert cifar10_data.count_records(folder, eval_data=True) == 11


def test_class_names_are_those_beside_the_records_or_cifar_10s(folder):
    assert cifar10_data.read_class_names(folder) == cifar10_data.CLASS_NAMES
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert cifar10_data.read_class_names(folder) == tuple("abcdefghij")
    (folder / "batches.meta.txt").write_text("\n hot dog \n\nno hot dog\nÄpfel", "utf-8")
    assert cifar10_data.read_class_names(folder) == ("hot dog", "no hot dog", "Äpfel")
    (folder / "batches.meta.txt").write_text("\ufeffcat\r\ndog\r\n", "utf-8")  # by Windows
    assert cifar10_data.read_class_names(folder) == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names 0 classes, not 2 to 256; write one name a line, or remove"),
        (b"one\n", "names 1 classes"),
        (b"".join(b"class %d\n" % n for n in range(257)), "names 257 classes"),
        (b"a\nb\n a\n", "names 'a' twice"),
        (b"a\n\xff\n", "cannot be read"),
    ],
)
def test_class_names_that_make_no_sense_are_refused(folder, content, message):
    (folder / "batches.meta.txt").write_bytes(content)
    with pytest.raises(DataError, match=f"batches.meta.txt {message}"):
        cifar10_data.check_records(folder)


@pytest.mark.parametrize("count", [2, 256])
def test_labels_are_as_many_as_there_are_names(folder, count):
    names = [f"class {number}" for number in range(count)]
    write_data_set(folder, train_counts=[300] * 5, class_names=names)
    assert cifar10_data.read_class_names(folder) == tuple(names)
    cifar10_data.check_records(folder)
    cifar10_data.write_class_names(folder, names + ["one", "more"] if count == 2 else names[1:])
    if count == 2:
        cifar10_data.check_records(folder)  # a class may have no images
    else:
        message = r"record 255 \(from 0\) has label 255, but labels are 0 to 254"
        with pytest.raises(DataError, match=message):
            cifar10_data.check_records(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing; put a good one in its place, or move"):
        cifar10_data.check_records(folder)


def test_a_folder_in_place_of_a_file_is_refused(folder):
    (folder / NAMES[2]).unlink()
    (folder / NAMES[2]).mkdir()
    with pytest.raises(DataError, match="data_batch_3.bin is not a file"):
        cifar10_data.check_records(folder)


def test_an_empty_file_is_refused(folder):
    (folder / NAMES[0]).write_bytes(b"")
    with pytest.raises(DataError, match="data_batch_1.bin is empty"):
        cifar10_data.check_records(folder)


@pytest.mark.parametrize(("size", "record", "rest"), [(3072, 0, 3072), (2 * 3073 + 1, 2, 1)])
def test_a_partial_last_record_is_refused(folder, size, record, rest):
    (folder / "test_batch.bin").write_bytes(make_records(5).tobytes()[:size])
    with pytest.raises(
        DataError,
        match=f"test_batch.bin: record {record} .from 0. is cut short, it has {rest} of 3073",
    ):
        cifar10_data.check_records(folder)


@pytest.mark.parametrize("label", [10, 255])
def test_a_label_over_9_is_refused(folder, label):
    records = make_records(8)
    records[5, 0] = label
    records.tofile(folder / "data_batch_4.bin")
    with pytest.raises(DataError, match=f"data_batch_4.bin: record 5 .from 0. has label {label}"):
        cifar10_data.check_records(folder)


def test_each_refusal_is_one_line(folder):
    (folder / NAMES[0]).write_bytes(b"x")
    with pytest.raises(DataError) as error:
        cifar10_data.check_records(folder)
    assert "\n" not in str(error.value)


def test_sixty_thousand_records_are_checked_within_a_second(folder):
    for name in NAMES:
        np.zeros([10000, 3073], np.uint8).tofile(folder / name)
    start = time.monotonic()
    cifar10_data.check_records(folder)
    assert time.monotonic() - start < 1


def test_a_folder_that_is_there_is_used_without_a_download(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    data_dir = folder.parent
    assert cifar10_data.maybe_download_and_extract(data_dir, "http://127.0.0.1:1/") == str(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["http", "file", "path"])
def test_the_archive_is_fetched_verified_and_extracted(tmp_path, kind):
    archive = tmp_path / "mirror.tar.gz"
    sha256 = make_archive(archive)
    data_dir = tmp_path / "new" / "data"
    with Server(archive.read_bytes()) as server:
        url = {"http": server.url, "file": archive.as_uri(), "path": str(archive)}[kind]
        folder = cifar10_data.maybe_download_and_extract(data_dir, url, sha256)
    assert len(server.requests) == (kind == "http")
    assert sorted(os.listdir(folder)) == sorted([*NAMES, "batches.meta.txt", "readme.html"])
    cifar10_data.check_records(folder)
    assert sorted(os.listdir(data_dir)) == ["cifar-10-batches-bin", "cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_download_shows_its_progress_on_a_terminal(tmp_path, capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    cifar10_data.maybe_download_and_extract(
        tmp_path / "data", str(tmp_path / "mirror.tar.gz"), sha256
    )
    output = capsys.readouterr()
    shown = re.search(r"Downloading cifar-10-binary.tar.gz:.* 0.00/\d+\.\d*k \[", output.err)
    assert bool(shown) == ("\r" in output.err) == is_terminal
    assert output.out == ""


def test_an_archive_that_is_there_is_extracted_without_a_download(tmp_path):
    sha256 = make_archive(tmp_path / "cifar-10-binary.tar.gz")
    folder = cifar10_data.maybe_download_and_extract(tmp_path, "http://127.0.0.1:1/", sha256)
    cifar10_data.check_records(folder)


def test_an_archive_that_is_there_with_other_content_is_refused(tmp_path):
    make_archive(tmp_path / "cifar-10-binary.tar.gz")
    with pytest.raises(DataError, match="another SHA-256 .* delete it and start again"):
        cifar10_data.maybe_download_and_extract(tmp_path, "http://127.0.0.1:1/")


PART = "cifar-10-binary.tar.gz.part"


def check_failed_download(data_dir, url, pattern, left=()):
    with pytest.raises(DataError, match=pattern) as error:
        cifar10_data.maybe_download_and_extract(data_dir, url)
    message = str(error.value)
    assert "start again" in message
    assert "--data_url" in message
    assert "--synthetic_data" in message
    assert "\n" not in message
    assert os.listdir(data_dir) == [*left]


def test_a_download_with_other_content_is_refused(tmp_path):
    archive = tmp_path / "other.tar.gz"
    make_archive(archive)
    with (
        Server(archive.read_bytes()) as server,
        pytest.raises(DataError, match="is not the expected archive: the SHA-256 of its"),
    ):
        cifar10_data.maybe_download_and_extract(tmp_path / "data", server.url, "0" * 64)
    assert len(server.requests) == 1
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("page", [b"\n<!DOCTYPE html><title>Log in", b"<HTML><body>Not found"])
def test_a_web_page_in_place_of_the_archive_is_told(tmp_path, page):
    with Server(page) as server:
        check_failed_download(tmp_path, server.url, "is a web page, not an archive")


def test_a_download_that_always_ends_early_is_given_up_and_kept(tmp_path):
    with Server(b"x" * 5000, knows_ranges=False, faults=[1000] * 9) as server:
        check_failed_download(tmp_path, server.url, "ended after 1000 of 5000 bytes", left=[PART])
    assert len(server.requests) == 4


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (429, 4), (500, 4), (503, 4)])
def test_a_server_that_refuses_is_asked_again_only_where_that_may_help(tmp_path, status, tries):
    with Server(b"", faults=[http.HTTPStatus(status)] * 9) as server:
        check_failed_download(tmp_path, server.url, f"HTTP Error {status}")
    assert len(server.requests) == tries


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x", "file:///no/such/file", "no/such/file", "strange://x"]
)
def test_a_source_that_is_not_there_offers_the_ways_on(tmp_path, url):
    check_failed_download(tmp_path, url, "cannot download")


def fetch(data_dir, server, sha256):
    folder = cifar10_data.maybe_download_and_extract(data_dir, server.url, sha256)
    cifar10_data.check_records(folder)
    assert sorted(os.listdir(data_dir)) == ["cifar-10-batches-bin", "cifar-10-binary.tar.gz"]


def test_a_server_that_is_busy_is_asked_again(tmp_path):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    body = (tmp_path / "mirror.tar.gz").read_bytes()
    with Server(body, faults=[http.HTTPStatus.SERVICE_UNAVAILABLE] * 2) as server:
        fetch(tmp_path / "data", server, sha256)
    assert server.requests == [None] * 3


@pytest.mark.parametrize("seed", range(3))
def test_a_connection_that_is_cut_anywhere_goes_on_where_it_stopped(tmp_path, seed):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    body = (tmp_path / "mirror.tar.gz").read_bytes()
    cut = int(np.random.default_rng(seed).integers(1, len(body)))
    with Server(body, faults=[cut]) as server:
        fetch(tmp_path / "data", server, sha256)
    assert server.requests == [None, f"bytes={cut}-"]


def test_as_many_connections_are_made_as_bring_anything(tmp_path):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    body = (tmp_path / "mirror.tar.gz").read_bytes()
    with Server(body, faults=[len(body) // 20] * 15) as server:
        fetch(tmp_path / "data", server, sha256)
    assert len(server.requests) == 16


def test_a_server_without_ranges_starts_over(tmp_path):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    body = (tmp_path / "mirror.tar.gz").read_bytes()
    with Server(body, knows_ranges=False, faults=[1000]) as server:
        fetch(tmp_path / "data", server, sha256)
    assert server.requests == [None, "bytes=1000-"]


def test_a_server_that_answers_with_another_part_starts_over(tmp_path):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    body = (tmp_path / "mirror.tar.gz").read_bytes()
    with Server(body, knows_ranges="wrongly", faults=[1000]) as server:
        fetch(tmp_path / "data", server, sha256)
    assert server.requests == [None, "bytes=1000-"]


def test_cuts_that_bring_nothing_new_come_to_an_end(tmp_path):
    faults = [3000, 2000] * 20
    with Server(b"x" * 5000, knows_ranges=False, faults=faults) as server:
        check_failed_download(tmp_path, server.url, "ended after", left=[PART])
    assert len(server.requests) == 4


@pytest.mark.parametrize("length", ["", "abc", "100, 100"])
def test_a_length_that_is_missing_or_makes_no_sense_does_not_matter(tmp_path, length):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    with Server((tmp_path / "mirror.tar.gz").read_bytes(), length=length) as server:
        fetch(tmp_path / "data", server, sha256)


def test_a_cut_is_noticed_without_a_length_where_the_size_is_known(tmp_path):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    body = (tmp_path / "mirror.tar.gz").read_bytes()
    with Server(body, length="", faults=[1000]) as server:
        cifar10_data.maybe_download_and_extract(tmp_path / "data", server.url, sha256, len(body))
    assert server.requests == [None, "bytes=1000-"]


def test_content_that_is_whole_but_short_or_too_long_is_told(tmp_path):
    with Server(b"x" * 5000) as server:
        check_failed_download(tmp_path, server.url, "shorter than the archive: it has 5000 of 1700")
        with pytest.raises(DataError, match="is larger than the archive's 4000 bytes"):
            cifar10_data.maybe_download_and_extract(tmp_path, server.url, "0" * 64, 4000)
    assert (tmp_path / PART).stat().st_size <= 4000


def test_what_a_message_quotes_does_not_make_it_two_lines():
    assert str(DataError("a\nb  c")) == "a b c"


@pytest.mark.parametrize("left", ["a start", "all", "too much", "of another file"])
def test_what_an_earlier_process_has_left_is_used_if_it_is_right(tmp_path, left):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    body = (tmp_path / "mirror.tar.gz").read_bytes()
    part = {
        "a start": body[:2000],
        "all": body,
        "too much": body + b"x",
        "of another file": b"y" * 2000,
    }[left]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / PART).write_bytes(part)
    with Server(body) as server:
        fetch(tmp_path / "data", server, sha256)
    is_right = left in ("a start", "all")
    assert server.requests == [f"bytes={len(part)}-"] + [None] * (not is_right)


def test_a_server_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10_data, "DOWNLOAD_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        check_failed_download(tmp_path, url, "cannot download .*timed out")


FETCH = """
import sys, cifar10_data
cifar10_data.CHUNK_BYTES = 1000
cifar10_data.check_records(cifar10_data.maybe_download_and_extract(*sys.argv[1:]))
"""


def start_fetch(data_dir, server, sha256, before=""):
    return subprocess.Popen(
        [sys.executable, "-c", before + FETCH, data_dir, server.url, sha256],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


class SlowServer(Server):
    """Serves 1,000 bytes each 4 ms, or so."""

    def answer(self, handler):
        write = handler.wfile.write

        def write_slowly(data):
            for start in range(0, len(data), 1000):
                write(data[start : start + 1000])
                time.sleep(0.004)

        handler.wfile.write = write_slowly
        with contextlib.suppress(OSError):  # the client may be killed
            super().answer(handler)


@pytest.fixture
def large_archive(tmp_path):
    members = {name: make_records(20, seed=i).tobytes() for i, name in enumerate(NAMES)}
    sha256 = make_archive(tmp_path / "mirror.tar.gz", members)
    return (tmp_path / "mirror.tar.gz").read_bytes(), sha256


def test_a_download_that_is_killed_goes_on_in_the_next_process(tmp_path, large_archive):
    body, sha256 = large_archive
    data_dir = tmp_path / "data"
    with SlowServer(body) as server:
        with start_fetch(data_dir, server, sha256) as process:
            while not ((data_dir / PART).exists() and (data_dir / PART).stat().st_size > 50000):
                time.sleep(0.005)
            process.kill()
        kept = (data_dir / PART).stat().st_size
        assert 0 < kept < len(body)
        assert not (data_dir / "cifar-10-binary.tar.gz").exists()
        with start_fetch(data_dir, server, sha256) as process:
            assert process.wait(timeout=60) == 0, process.stderr.read()
    assert server.requests == [None, f"bytes={kept}-"]
    fetch(data_dir, server, sha256)


def test_two_processes_that_start_at_once_fetch_once(tmp_path, large_archive):
    body, sha256 = large_archive
    with SlowServer(body) as server:
        processes = [start_fetch(tmp_path / "data", server, sha256) for _ in range(2)]
        errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert server.requests == [None]
    assert sum("Waiting for process " in error for error in errors) == 1
    fetch(tmp_path / "data", server, sha256)


def test_an_extraction_that_is_killed_heals_in_the_next_process(tmp_path, large_archive):
    body, sha256 = large_archive
    data_dir = tmp_path / "data"
    slow = """
import shutil, time
copy = shutil.copyfileobj
def copy_slowly(source, output):
    copy(source, output)
    output.flush()
    time.sleep(0.2)
shutil.copyfileobj = copy_slowly
"""
    with Server(body) as server:
        with start_fetch(data_dir, server, sha256, before=slow) as process:
            while not (data_dir / ".cifar-10-batches-bin.part" / NAMES[2]).exists():
                time.sleep(0.005)
            process.kill()
        assert not (data_dir / "cifar-10-batches-bin").exists()
        assert (data_dir / ".cifar-10-batches-bin.part").exists()
        fetch(data_dir, server, sha256)
    assert len(server.requests) == 1


def test_a_full_disk_is_told_and_the_next_process_goes_on(tmp_path, large_archive):
    body, sha256 = large_archive
    data_dir = tmp_path / "data"
    small = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
"""
    with Server(body) as server:
        with start_fetch(data_dir, server, sha256, before=small) as process:
            error = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert "DataError: cannot write the data set to" in error
        assert "File too large" in error
        fetch(data_dir, server, sha256)
    assert server.requests == [None, "bytes=100000-"]


def test_an_archive_that_is_no_tar_file_is_refused(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(b"hello")
    sha256 = hashlib.sha256(b"hello").hexdigest()
    with pytest.raises(DataError, match="cannot be extracted .* delete it and start again"):
        cifar10_data.maybe_download_and_extract(tmp_path, sha256=sha256)
    assert os.listdir(tmp_path) == ["cifar-10-binary.tar.gz"]


def make_hostile_archive(path, hostile):
    """Writes a .tar.gz with the record files and the `TarInfo`s that `hostile` gives by name."""
    with tarfile.open(path, "w:gz") as archive:
        for name in NAMES:
            full_name = f"cifar-10-batches-bin/{name}"
            content = make_records(2).tobytes()
            member = hostile.pop(full_name, None)
            if member is None:
                member = tarfile.TarInfo(full_name)
                member.size = len(content)
            member.name = full_name
            archive.addfile(member, io.BytesIO(content) if member.isfile() else None)
        for name, member in hostile.items():
            member.name = name
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_member(kind=tarfile.REGTYPE, size=1, target=""):
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, str(target)
    member.size = size if kind == tarfile.REGTYPE else 0
    return member


def files_outside(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_only_the_known_files_leave_the_archive(tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    sha256 = make_hostile_archive(
        data_dir / "cifar-10-binary.tar.gz",
        {
            "cifar-10-batches-bin/../../escaped.bin": make_member(),
            "../escaped.bin": make_member(),
            str(tmp_path / "absolute.bin"): make_member(),
            "cifar-10-batches-bin/stranger.bin": make_member(),
            "cifar-10-batches-bin/batches.meta.txt": make_member(
                tarfile.SYMTYPE, target="/etc/hosts"
            ),
            "cifar-10-batches-bin/readme.html": make_member(tarfile.CHRTYPE),
        },
    )
    folder = cifar10_data.maybe_download_and_extract(data_dir, sha256=sha256)
    assert sorted(os.listdir(folder)) == sorted(NAMES)
    assert files_outside(tmp_path) == ["data"]
    assert files_outside(data_dir) == ["cifar-10-batches-bin", "cifar-10-binary.tar.gz"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_a_link_or_a_device_in_place_of_records_is_not_extracted(tmp_path, kind):
    (tmp_path / "data").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    sha256 = make_hostile_archive(
        tmp_path / "data" / "cifar-10-binary.tar.gz",
        {"cifar-10-batches-bin/data_batch_2.bin": make_member(kind, target=victim)},
    )
    with pytest.raises(DataError, match="does not hold data_batch_2.bin; delete it and start"):
        cifar10_data.maybe_download_and_extract(tmp_path / "data", sha256=sha256)
    assert os.listdir(tmp_path / "data") == ["cifar-10-binary.tar.gz"]
    assert victim.read_text() == "mine"


def test_a_file_too_large_to_be_cifar_10_is_not_extracted(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        member = make_member(size=(1 << 40))
        member.name = "cifar-10-batches-bin/data_batch_1.bin"
        archive.addfile(member)  # its header alone: a terabyte of zeros compresses to little
    sha256 = hashlib.sha256((tmp_path / "cifar-10-binary.tar.gz").read_bytes()).hexdigest()
    with pytest.raises(DataError, match="data_batch_1.bin is 1099511627776 bytes large"):
        cifar10_data.maybe_download_and_extract(tmp_path, sha256=sha256)
    assert os.listdir(tmp_path) == ["cifar-10-binary.tar.gz"]


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path):
    code = (
        "import sys, time, cifar10_data\n"
        "with cifar10_data.lock(sys.argv[1]):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "a.lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(cifar10_data.LockedError, match=f"process {process.pid} on .* since 20"),
            cifar10_data.lock(path),
        ):
            pass
        process.kill()
    with cifar10_data.lock(path):  # of the file that the killed process has left
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert not path.exists()


def test_a_lock_that_was_waited_for_is_not_that_of_a_file_removed_meanwhile(tmp_path):
    path = tmp_path / "a.lock"
    code = (
        "import sys, time, cifar10_data\n"
        "with cifar10_data.lock(sys.argv[1], on_wait=lambda _: print('waits', flush=True)):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with contextlib.ExitStack() as stack:
        with cifar10_data.lock(path):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
                )
            )
            stack.callback(process.kill)
            assert process.stdout.readline() == "waits\n"
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(cifar10_data.LockedError, match=f"process {process.pid} "),
            cifar10_data.lock(path),
        ):
            pass


def test_files_are_made_with_the_users_umask(tmp_path):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    before = os.umask(0o027)
    try:
        with Server((tmp_path / "mirror.tar.gz").read_bytes()) as server:
            fetch(tmp_path / "data", server, sha256)
    finally:
        os.umask(before)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]
    }
    folders = {"data", "cifar-10-batches-bin"}
    assert modes == {name: "0o750" if name in folders else "0o640" for name in modes}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_that_may_not_be_read_is_refused():
    with tempfile.TemporaryDirectory() as name:  # where others may look, unlike in tmp_path
        folder = pathlib.Path(name) / "cifar-10-batches-bin"
        write_data_set(folder)
        os.chmod(name, 0o755)
        os.chmod(folder / NAMES[3], 0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(DataError, match="data_batch_4.bin cannot be read .Permission"):
                cifar10_data.check_records(folder)
        finally:
            os.seteuid(0)


def test_records_that_change_while_they_are_read_are_noticed(folder):
    check = cifar10_data.ChangeCheck(folder, eval_data=False)
    check()
    (folder / "test_batch.bin").unlink()  # which is not read
    check()
    os.utime(folder / NAMES[2], (0, 0))
    with pytest.raises(DataError, match="data_batch_3.bin has been written to since the script"):
        check()
    size = (folder / NAMES[1]).stat().st_size
    os.truncate(folder / NAMES[1], size - 3073)
    with pytest.raises(DataError, match=f"data_batch_2.bin has {size - 3073} bytes now; it had"):
        check()
    (folder / NAMES[1]).unlink()
    with pytest.raises(DataError, match="data_batch_2.bin cannot be read any more .No such file"):
        check()


def test_a_folder_that_holds_the_records_itself_is_used_and_nothing_fetched(folder):
    assert cifar10_data.find_folder(folder) == str(folder)
    assert cifar10_data.maybe_download_and_extract(folder, "http://127.0.0.1:1/") == str(folder)
    # One in it comes first, as ever.
    write_data_set(folder / cifar10_data.EXTRACTED_FOLDER)
    assert cifar10_data.find_folder(folder) == str(folder / cifar10_data.EXTRACTED_FOLDER)


def test_the_cure_for_records_in_a_folder_of_ones_own_is_no_download(tmp_path):
    write_data_set(tmp_path / "own")
    (tmp_path / "own" / "data_batch_2.bin").unlink()
    with pytest.raises(
        DataError, match=r"data_batch_2.bin is missing; put a good one in its place$"
    ):
        cifar10_data.check_records(tmp_path / "own")


def test_the_cure_for_synthetic_records_is_to_draw_them_anew(tmp_path):
    folder = tmp_path / cifar10_data.SYNTHETIC_FOLDER
    write_data_set(folder)
    (folder / NAMES[0]).write_bytes(b"")
    with pytest.raises(DataError, match="start again to have the stand-in drawn anew"):
        cifar10_data.check_records(folder)


def test_a_data_dir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="name another folder with --data_dir"):
        cifar10_data.maybe_download_and_extract(tmp_path / "file" / "data")
    with pytest.raises(DataError, match="name another folder with --data_dir"):
        cifar10_data.maybe_generate_synthetic(tmp_path / "file" / "data")


def test_the_synthetic_stand_in_is_made_within_five_seconds_beside_the_real_data(tmp_path):
    write_data_set(tmp_path / "cifar-10-batches-bin")
    start = time.monotonic()
    folder = cifar10_data.maybe_generate_synthetic(tmp_path)
    assert time.monotonic() - start < 5
    cifar10_data.check_records(folder)
    assert sorted(os.listdir(tmp_path)) == ["cifar-10-batches-bin", os.path.basename(folder)]
    assert cifar10_data.count_records(tmp_path / "cifar-10-batches-bin", eval_data=True) == 11


def test_a_synthetic_stand_in_that_is_there_is_used_as_it_is(synthetic_data_dir):
    path = synthetic_data_dir / cifar10_data.SYNTHETIC_FOLDER / "test_batch.bin"
    before = path.stat().st_mtime_ns
    cifar10_data.maybe_generate_synthetic(synthetic_data_dir)
    assert path.stat().st_mtime_ns == before


def read_synthetic(data_dir, name):
    path = data_dir / cifar10_data.SYNTHETIC_FOLDER / name
    return np.fromfile(path, np.uint8).reshape(-1, 3073)


def test_the_synthetic_stand_in_has_each_class_equally_often_and_no_image_twice(synthetic_data_dir):
    records = np.concatenate([read_synthetic(synthetic_data_dir, name) for name in NAMES])
    counts = np.bincount(records[:, 0])
    assert counts.tolist() == [len(records) // 10] * 10
    assert len(np.unique(records[:, 1:], axis=0)) == len(records)


def test_the_synthetic_stand_in_depends_on_its_seed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10_data, "SYNTHETIC_RECORDS_PER_FILE", 50)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cifar10_data.maybe_generate_synthetic(tmp_path / name, seed)
    for name in NAMES:
        a, b, c = (read_synthetic(tmp_path / name_, name) for name_ in "abc")
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


def test_colour_alone_does_not_tell_the_synthetic_classes_apart(synthetic_data_dir):
    # The nearest class by mean colour: better than chance, as colours differ, and far from enough.
    train = read_synthetic(synthetic_data_dir, NAMES[0])
    test = read_synthetic(synthetic_data_dir, NAMES[5])

    def colours(records):
        return records[:, 1:].reshape(-1, 3, 1024).mean(axis=2)

    means = np.stack([colours(train[train[:, 0] == label]).mean(axis=0) for label in range(10)])
    distances = np.linalg.norm(colours(test)[:, np.newaxis] - means, axis=2)
    assert (distances.argmin(axis=1) == test[:, 0]).mean() < 0.4
