"""Tests of the download of CIFAR-10 from a server on loopback, with real faults."""

import contextlib
import hashlib
import http
import http.client
import http.server
import io
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, make_records, write_dataset

from support.base.errors import DataError
from support.data import dataset, download, formats, records

FILES = [*records.TRAIN_FILES, *records.TEST_FILES]
ARCHIVE = "cifar-10-binary.tar.gz"
PART = "cifar-10-binary.tar.gz.part"
STAGING = ".cifar-10-batches-bin.part"
UNREACHABLE = "http://127.0.0.1:1/"


@pytest.fixture(autouse=True)
def retries_are_immediate(monkeypatch):
    monkeypatch.setattr(download, "RETRY_DELAYS", (0.0, 0.0, 0.0))


def make_archive(path, members=None, special=()):
    """Writes a .tar.gz like CIFAR-10's; returns its SHA-256.

    Args:
      path: path.
      members: dict of the contents of files by name; those of a small dataset if None.
      special: `tarfile.TarInfo`s of other members. They replace files of the same name.
    """
    if members is None:
        members = {name: make_records(2).tobytes() for name in FILES}
        members["batches.meta.txt"] = "\n".join(dataset.CLASS_NAMES).encode()
        members["readme.html"] = b"<html>"
    with tarfile.open(path, "w:gz") as archive:
        for member in special:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            if member.name not in [each.name for each in special]:
                archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path):
    """The content of an archive outside of the data_dir, and its SHA-256."""
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    return (tmp_path / "mirror.tar.gz").read_bytes(), sha256


@pytest.fixture
def large_archive(tmp_path):
    members = {name: make_records(20, seed=i).tobytes() for i, name in enumerate(FILES)}
    sha256 = make_archive(tmp_path / "mirror.tar.gz", members)
    return (tmp_path / "mirror.tar.gz").read_bytes(), sha256


class Server:
    """A server on loopback that serves `body`, with faults.

    Args:
      body: bytes.
      supports_ranges: bool; or "wrongly" to answer each range request with the wrong range.
      faults: see below.
      length: string; replaces the header `Content-Length`. Empty: no such header.

    Attributes:
      url: string.
      requests: list of the requests' `Range` headers; None for a request without one.
      faults: list; the faults of the next requests, one each: an `http.HTTPStatus` to answer with,
        or the number of bytes after which to cut the connection.
    """

    def __init__(self, body, supports_ranges=True, faults=(), length=None):
        self.body, self.supports_ranges, self.length = body, supports_ranges, length
        self.faults, self.requests = [*faults], []

    def answer(self, handler):
        requested = handler.headers["Range"]
        self.requests.append(requested)
        fault = self.faults.pop(0) if self.faults else None
        start = 0
        if requested and self.supports_ranges:
            start = int(requested.split("=")[1].rstrip("-"))
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
            if self.supports_ranges == "wrongly":
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
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01])
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class SlowServer(Server):
    """Serves about 1,000 bytes every 4 ms."""

    def answer(self, handler):
        write = handler.wfile.write

        def write_slowly(data):
            for start in range(0, len(data), 1000):
                write(data[start : start + 1000])
                time.sleep(0.004)

        handler.wfile.write = write_slowly
        with contextlib.suppress(OSError):  # the client may be killed
            super().answer(handler)


def fetch(data_dir, server, sha256):
    """Downloads from the server and checks the result."""
    folder = download.maybe_download_and_extract(data_dir, server.url, sha256)
    dataset.check_dataset(folder)
    assert sorted(os.listdir(data_dir)) == ["cifar-10-batches-bin", ARCHIVE]


def check_failure(data_dir, url, pattern, remaining=()):
    """Expects a download to fail with a message that gives advice, and to leave `remaining`."""
    with pytest.raises(DataError, match=pattern) as error:
        download.maybe_download_and_extract(data_dir, url)
    message = str(error.value)
    assert "run the same command again" in message
    assert "--data_url" in message
    assert "--synthetic_data" in message
    assert "\n" not in message
    assert os.listdir(data_dir) == [*remaining]


FETCH = """
import sys
from support.data import dataset, download
download.CHUNK_BYTES = 1000
dataset.check_dataset(download.maybe_download_and_extract(*sys.argv[1:]))
"""


def start_fetch(data_dir, server, sha256, before=""):
    """Starts a process that runs the code `before`, then downloads from the server."""
    return subprocess.Popen(
        [sys.executable, "-c", before + FETCH, data_dir, server.url, sha256],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_existing_dataset_is_used_without_a_download(tmp_path):
    folder = tmp_path / dataset.EXTRACTED_FOLDER
    write_dataset(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert download.maybe_download_and_extract(tmp_path, UNREACHABLE) == str(folder)
    assert download.maybe_download_and_extract(folder, UNREACHABLE) == str(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("version", formats.VERSIONS)
def test_other_versions_of_cifar_are_not_downloaded_again(tmp_path, version):
    folder = tmp_path / "my data" / version.folder
    folder.mkdir(parents=True)
    for name in (version.train_files[0], version.test_file):
        (folder / name).touch()
    with Server(b"") as server, pytest.raises(DataError) as error:
        download.maybe_download_and_extract(tmp_path / "my data", server.url)
    assert server.requests == []
    assert os.listdir(tmp_path / "my data") == [version.folder]
    command = re.search("convert it with (.*), then run this script again$", str(error.value))[1]
    labels = ["--cifar100_labels=fine"] if version.flag == "cifar100" else []
    output = f"--output={tmp_path}/my data/cifar-10-batches-bin"
    expected = ["python", "cifar10_convert.py", f"--{version.flag}={folder}", *labels, output]
    assert shlex.split(command) == expected


@pytest.mark.parametrize("version", formats.VERSIONS)
def test_another_version_as_the_source_is_refused_at_once(tmp_path, version):
    path = tmp_path / version.archive
    path.write_bytes(b"1")
    with Server(b"") as server:
        for url in (str(path), path.as_uri(), server.url.replace("cifar.tar.gz", version.archive)):
            message = rf"{version.archive} is {version.title}, .* --{version.flag}=\S*{path.name} "
            with pytest.raises(DataError, match=message):
                download.maybe_download_and_extract(tmp_path / "data", url)
    assert server.requests == []
    assert not (tmp_path / "data").exists()


def test_the_binary_version_takes_precedence_over_others(tmp_path):
    for name in ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz"):
        (tmp_path / name).write_bytes(b"1")
    sha256 = make_archive(tmp_path / ARCHIVE)
    folder = download.maybe_download_and_extract(tmp_path, UNREACHABLE, sha256)
    assert download.maybe_download_and_extract(tmp_path, UNREACHABLE, sha256) == folder
    dataset.check_dataset(folder)


def test_a_copy_that_keras_has_is_mentioned_before_a_download(
    tmp_path, archive, capsys, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".keras" / "datasets" / "cifar-10-batches-py-target_archive"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"1")
    _, sha256 = archive
    download.maybe_download_and_extract(tmp_path / "data", str(tmp_path / "mirror.tar.gz"), sha256)
    command = (
        f"cifar10_convert.py --cifar10_python={path} --output={tmp_path}/data/cifar-10-batches"
    )
    assert command in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["http", "file", "path", "home"])
def test_the_archive_is_downloaded_verified_and_extracted(tmp_path, monkeypatch, archive, kind):
    monkeypatch.setenv("HOME", str(tmp_path))
    body, sha256 = archive
    path = tmp_path / "mirror.tar.gz"
    data_dir = tmp_path / "new" / "data"
    with Server(body) as server:
        url = {
            "http": server.url,
            "file": path.as_uri(),
            "path": str(path),
            "home": "~/mirror.tar.gz",
        }[kind]
        folder = download.maybe_download_and_extract(data_dir, url, sha256)
    assert len(server.requests) == (kind == "http")
    assert sorted(os.listdir(folder)) == sorted([*FILES, "batches.meta.txt", "readme.html"])
    dataset.check_dataset(folder)
    assert sorted(os.listdir(data_dir)) == ["cifar-10-batches-bin", ARCHIVE]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_progress_bar_is_shown_on_a_terminal_only(
    tmp_path, archive, capsys, monkeypatch, is_terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    _, sha256 = archive
    download.maybe_download_and_extract(tmp_path / "data", str(tmp_path / "mirror.tar.gz"), sha256)
    output = capsys.readouterr()
    bar = re.search(r"Downloading cifar-10-binary.tar.gz:.* 0.00/\d+\.\d*k \[", output.err)
    assert bool(bar) == ("\r" in output.err) == is_terminal
    assert output.out == ""


def test_files_get_the_permissions_of_the_umask(tmp_path, archive):
    body, sha256 = archive
    before = os.umask(0o027)
    try:
        with Server(body) as server:
            fetch(tmp_path / "data", server, sha256)
    finally:
        os.umask(before)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]
    }
    folders = {"data", "cifar-10-batches-bin"}
    assert modes == {name: "0o750" if name in folders else "0o640" for name in modes}


def test_an_existing_archive_with_another_sha256_is_refused(tmp_path):
    make_archive(tmp_path / ARCHIVE)
    message = f"the SHA-256 of .*/{ARCHIVE} is not .*; delete the file and run the same command"
    with pytest.raises(DataError, match=message):
        download.maybe_download_and_extract(tmp_path, UNREACHABLE)


def test_a_download_with_another_sha256_is_refused_and_deleted(tmp_path, archive):
    body, _ = archive
    with (
        Server(body) as server,
        pytest.raises(DataError, match="is not the expected archive: the SHA-256 of its"),
    ):
        download.maybe_download_and_extract(tmp_path / "data", server.url, "0" * 64)
    assert len(server.requests) == 1
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("page", [b"\n<!DOCTYPE html><title>Log in", b"<HTML><body>Not found"])
def test_a_web_page_in_place_of_the_archive_is_recognized(tmp_path, page):
    with Server(page) as server:
        check_failure(tmp_path, server.url, "is a web page, not an archive")


def test_a_download_that_is_too_short_or_too_long_is_refused(tmp_path, monkeypatch):
    with Server(b"x" * 5000) as server:
        check_failure(tmp_path, server.url, "is incomplete: 5000 of 170052171 bytes")
        monkeypatch.setattr(download, "ARCHIVE_BYTES", 4000)
        with pytest.raises(DataError, match="is larger than the archive's 4000 bytes"):
            download.maybe_download_and_extract(tmp_path, server.url)
    assert (tmp_path / PART).stat().st_size <= 4000


@pytest.mark.parametrize(
    ("url", "num_retries"),
    [
        (f"{UNREACHABLE}x", 3),
        ("file:///no/such/file", 0),
        ("no/such/file", 0),
        ("strange://x", 0),
        ("http://[x", 0),
        ("http:///cifar.tar.gz", 0),
    ],
)
def test_an_unreachable_source_is_reported_with_advice(tmp_path, capsys, url, num_retries):
    check_failure(tmp_path, url, "cannot download")
    assert capsys.readouterr().err.count("; retrying in 0 s\n") == num_retries


def test_a_certificate_that_cannot_be_verified_is_reported_without_retries(
    tmp_path, capsys, monkeypatch
):
    def fail(*_, **__):
        error = ssl.SSLCertVerificationError()
        error.verify_message = "self-signed"
        raise urllib.error.URLError(error)

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    message = (
        r"its certificate cannot be verified \(self-signed\); check this computer's clock and CA "
        "certificates, or download the archive elsewhere and give its path with --data_url=FILE$"
    )
    with pytest.raises(DataError, match=message):
        download.maybe_download_and_extract(tmp_path, UNREACHABLE)
    assert "retrying" not in capsys.readouterr().err


def test_a_server_that_sends_nothing_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        check_failure(tmp_path, url, "cannot download .*timed out")


@pytest.mark.parametrize(
    ("status", "attempts"), [(404, 1), (403, 1), (416, 1), (408, 4), (429, 4), (500, 4), (503, 4)]
)
def test_only_statuses_that_may_change_are_retried(tmp_path, status, attempts):
    with Server(b"", faults=[http.HTTPStatus(status)] * 9) as server:
        check_failure(tmp_path, server.url, f"HTTP Error {status}")
    assert len(server.requests) == attempts


def test_a_lost_connection_resumes_where_it_stopped_as_long_as_there_is_progress(tmp_path, archive):
    body, sha256 = archive
    part = len(body) // 20
    with Server(body, faults=[part] * 15) as server:
        fetch(tmp_path / "data", server, sha256)
    assert server.requests == [None, *(f"bytes={n * part}-" for n in range(1, 16))]


def test_a_connection_that_is_reset_resumes_where_it_stopped(tmp_path, archive, monkeypatch):
    body, sha256 = archive
    read1 = http.client.HTTPResponse.read1
    sizes = []

    def reset_once(response, size):
        if len(sizes) == 1:
            sizes.append(0)
            raise ConnectionResetError("Connection reset by peer")
        chunk = read1(response, min(size, 1000))
        sizes.append(len(chunk))
        return chunk

    monkeypatch.setattr(http.client.HTTPResponse, "read1", reset_once)
    with Server(body) as server:
        fetch(tmp_path / "data", server, sha256)
    assert server.requests == [None, f"bytes={sizes[0]}-"]


@pytest.mark.parametrize("faults", [[1000] * 9, [3000, 2000] * 20])
def test_retries_without_progress_end_and_keep_the_partial_file(tmp_path, faults):
    with Server(b"x" * 5000, supports_ranges=False, faults=faults) as server:
        check_failure(tmp_path, server.url, "ended after .000 of 5000 bytes", remaining=[PART])
    assert len(server.requests) == 4


@pytest.mark.parametrize("supports_ranges", [False, "wrongly"])
def test_a_server_without_correct_ranges_sends_the_whole_file_again(
    tmp_path, archive, supports_ranges
):
    body, sha256 = archive
    with Server(body, supports_ranges, faults=[1000]) as server:
        fetch(tmp_path / "data", server, sha256)
    assert server.requests == [None, "bytes=1000-"]


@pytest.mark.parametrize("length", ["", "abc", "100, 100"])
def test_a_missing_or_malformed_content_length_is_ignored(tmp_path, archive, length):
    body, sha256 = archive
    with Server(body, length=length) as server:
        fetch(tmp_path / "data", server, sha256)


def test_a_lost_connection_is_detected_by_the_expected_size(tmp_path, archive, monkeypatch):
    body, sha256 = archive
    monkeypatch.setattr(download, "ARCHIVE_SHA256", sha256)
    monkeypatch.setattr(download, "ARCHIVE_BYTES", len(body))
    with Server(body, length="", faults=[1000]) as server:
        fetch(tmp_path / "data", server, sha256)
    assert server.requests == [None, "bytes=1000-"]


@pytest.mark.parametrize("content", ["a start", "all", "too much", "another file"])
def test_a_partial_file_is_resumed_or_replaced_if_it_is_wrong(tmp_path, archive, content):
    body, sha256 = archive
    part = {
        "a start": body[:2000],
        "all": body,
        "too much": body + b"x",
        "another file": b"y" * 2000,
    }[content]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / PART).write_bytes(part)
    with Server(body) as server:
        fetch(tmp_path / "data", server, sha256)
    is_correct = content in ("a start", "all")
    assert server.requests == [f"bytes={len(part)}-"] + [None] * (not is_correct)


def wait_for_file(path, process, min_size=0):
    while not (path.exists() and path.stat().st_size >= min_size):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_resumed_by_the_next_process(tmp_path, large_archive, stop):
    body, sha256 = large_archive
    data_dir = tmp_path / "data"
    with SlowServer(body) as server:
        with start_fetch(data_dir, server, sha256) as process:
            wait_for_file(data_dir / PART, process, min_size=50000)
            process.send_signal(stop)
            error = process.communicate(timeout=60)[1]
        kept = (data_dir / PART).stat().st_size
        assert 50000 <= kept < len(body)
        advice = f"Kept {kept} bytes in {data_dir / PART}; run the same command again to resume"
        assert (advice in error) == (stop == signal.SIGINT)
        assert not (data_dir / ARCHIVE).exists()
        with start_fetch(data_dir, server, sha256) as process:
            assert process.wait(timeout=60) == 0, process.stderr.read()
    assert server.requests == [None, f"bytes={kept}-"]
    fetch(data_dir, server, sha256)


def test_only_one_of_two_simultaneous_processes_downloads(tmp_path, large_archive):
    body, sha256 = large_archive
    with SlowServer(body) as server:
        processes = [start_fetch(tmp_path / "data", server, sha256) for _ in range(2)]
        errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert server.requests == [None]
    assert sum("Waiting for process " in error for error in errors) == 1
    fetch(tmp_path / "data", server, sha256)


def test_a_killed_extraction_is_repeated_by_the_next_process(tmp_path, large_archive):
    body, sha256 = large_archive
    data_dir = tmp_path / "data"
    slow_copies = """
import shutil, time
copy = shutil.copyfileobj
def copy_slowly(source, output):
    copy(source, output)
    output.flush()
    time.sleep(0.2)
shutil.copyfileobj = copy_slowly
"""
    with Server(body) as server:
        with start_fetch(data_dir, server, sha256, before=slow_copies) as process:
            wait_for_file(data_dir / STAGING / FILES[2], process)
            process.kill()
        assert not (data_dir / "cifar-10-batches-bin").exists()
        assert (data_dir / STAGING).exists()
        fetch(data_dir, server, sha256)
    assert len(server.requests) == 1


def test_a_full_disk_is_reported_and_the_next_process_resumes(tmp_path, large_archive):
    body, sha256 = large_archive
    data_dir = tmp_path / "data"
    small_disk = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
"""
    with Server(body) as server:
        with start_fetch(data_dir, server, sha256, before=small_disk) as process:
            error = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert "DataError: cannot write " in error
        assert "File too large" in error
        fetch(data_dir, server, sha256)
    assert server.requests == [None, "bytes=100000-"]


def test_an_archive_that_is_not_a_tar_file_is_refused(tmp_path):
    (tmp_path / ARCHIVE).write_bytes(b"hello")
    sha256 = hashlib.sha256(b"hello").hexdigest()
    message = "cannot be extracted .* delete it and run the same command again"
    with pytest.raises(DataError, match=message):
        download.maybe_download_and_extract(tmp_path, sha256=sha256)
    assert os.listdir(tmp_path) == [ARCHIVE]


def make_member(name, kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, str(target)
    member.size = 1 if kind == tarfile.REGTYPE else 0
    return member


def test_only_the_known_regular_files_are_extracted(tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    special = [
        make_member("cifar-10-batches-bin/../../escaped.bin"),
        make_member("../escaped.bin"),
        make_member(str(tmp_path / "absolute.bin")),
        make_member("cifar-10-batches-bin/unknown.bin"),
        make_member("cifar-10-batches-bin/batches.meta.txt", tarfile.SYMTYPE, "/etc/hosts"),
        make_member("cifar-10-batches-bin/readme.html", tarfile.CHRTYPE),
    ]
    sha256 = make_archive(data_dir / ARCHIVE, special=special)
    folder = download.maybe_download_and_extract(data_dir, sha256=sha256)
    assert sorted(os.listdir(folder)) == sorted(FILES)
    assert os.listdir(tmp_path) == ["data"]
    assert sorted(os.listdir(data_dir)) == ["cifar-10-batches-bin", ARCHIVE]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_a_link_device_or_folder_in_place_of_records_is_not_extracted(tmp_path, kind):
    (tmp_path / "data").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    special = [make_member("cifar-10-batches-bin/data_batch_2.bin", kind, victim)]
    sha256 = make_archive(tmp_path / "data" / ARCHIVE, special=special)
    message = r"cannot be extracted \(data_batch_2.bin is missing\); delete it and run the same"
    with pytest.raises(DataError, match=message):
        download.maybe_download_and_extract(tmp_path / "data", sha256=sha256)
    assert os.listdir(tmp_path / "data") == [ARCHIVE]
    assert victim.read_text() == "mine"
