"""Tests of the download of CIFAR-10 from a server on loopback, with real faults."""

import contextlib
import hashlib
import http.server
import io
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time

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
    monkeypatch.setattr(download, "MIN_PROGRESS", 1000)


def make_archive(path, special=()):
    """Writes a .tar.gz like CIFAR-10's; returns its SHA-256.

    `special` are `tarfile.TarInfo`s of other members. They replace files of the same name.
    """
    contents = {name: make_records(20, seed).tobytes() for seed, name in enumerate(FILES)}
    contents["batches.meta.txt"] = "\n".join(dataset.CLASS_NAMES).encode()
    contents["readme.html"] = b"<html>"
    with tarfile.open(path, "w:gz") as archive:
        for member in special:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size, member.mode = len(content), 0o600
            if member.name not in [each.name for each in special]:
                archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path):
    """The content of an archive outside of the data_dir, and its SHA-256."""
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    return (tmp_path / "mirror.tar.gz").read_bytes(), sha256


class Server:
    """A server on loopback that serves `body`, with pauses after every 1,000 bytes, and faults.

    Each of the `faults` concerns one request: the number of bytes after which to cut the
    connection; "busy" to answer with an error; or "stalled" to stop after 1,000 bytes. `requests`
    are the requests' `Range` headers; None for a request without one.
    """

    def __init__(self, body, pause=0.0, supports_ranges=True, sends_length=True, faults=()):
        self.body, self.pause = body, pause
        self.supports_ranges, self.sends_length = supports_ranges, sends_length
        self.faults, self.requests = [*faults], []

    def answer(self, handler):
        requested = handler.headers["Range"]
        self.requests.append(requested)
        fault = self.faults.pop(0) if self.faults else None
        start = 0
        if requested and self.supports_ranges:
            start = int(requested.split("=")[1].rstrip("-"))
        status, body = (206 if start else 200), self.body[start:]
        if fault == "busy":
            status, body, fault = 503, b"<html>an error</html>", None
        elif start and not body:
            status = 416
        handler.send_response(status)
        if self.sends_length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        body = body[: 1000 if fault == "stalled" else fault]
        with contextlib.suppress(OSError):  # the client may be killed
            for start in range(0, len(body), 1000):
                handler.wfile.write(body[start : start + 1000])
                time.sleep(self.pause)
        if fault == "stalled":
            time.sleep(600)

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


def fetch(data_dir, server, sha256):
    """Downloads from the server and checks the result."""
    folder = download.maybe_download_and_extract(data_dir, server.url, sha256)
    dataset.check_dataset(folder)
    assert sorted(os.listdir(data_dir)) == ["cifar-10-batches-bin", ARCHIVE]


def check_failure(data_dir, url, pattern, remaining=()):
    """Expects a download to fail with a message that gives advice, and to leave `remaining`."""
    with pytest.raises(DataError, match=pattern) as error:
        download.maybe_download_and_extract(data_dir, url)
    advice = "run the same command again, .* --data_url .* --synthetic_data$"
    assert re.search(advice, str(error.value))
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
    assert download.maybe_download_and_extract(tmp_path, UNREACHABLE) == str(folder)
    assert download.maybe_download_and_extract(folder, UNREACHABLE) == str(folder)


@pytest.mark.parametrize("version", formats.VERSIONS)
def test_other_versions_of_cifar_are_not_downloaded_again(tmp_path, version):
    folder = tmp_path / "my data" / version.folder
    folder.mkdir(parents=True)
    for name in (version.train_files[0], version.test_file):
        (folder / name).touch()
    (tmp_path / version.archive).touch()
    for url in (str(tmp_path / version.archive), f"{UNREACHABLE}{version.archive}"):
        message = (
            rf"{version.archive} is {version.title}, .* --{version.flag}=\S*{version.archive} "
        )
        with pytest.raises(DataError, match=message):
            download.maybe_download_and_extract(tmp_path / "data", url)
    assert not (tmp_path / "data").exists()
    with pytest.raises(DataError, match="which the scripts cannot read") as error:
        download.maybe_download_and_extract(tmp_path / "my data", UNREACHABLE)
    assert os.listdir(tmp_path / "my data") == [version.folder]
    command = re.search("convert it with (.*), then run this script again$", str(error.value))[1]
    labels = ["--cifar100_labels=fine"] if version.flag == "cifar100" else []
    output = f"--output={tmp_path}/my data/cifar-10-batches-bin"
    expected = ["python", "cifar10_convert.py", f"--{version.flag}={folder}", *labels, output]
    assert shlex.split(command) == expected


def test_an_existing_archive_is_verified_and_takes_precedence_over_other_versions(tmp_path):
    for name in ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz"):
        (tmp_path / name).write_bytes(b"1")
    sha256 = make_archive(tmp_path / ARCHIVE)
    message = f"the SHA-256 of .*/{ARCHIVE} is not .*; delete the file and run the same command"
    with pytest.raises(DataError, match=message):
        download.maybe_download_and_extract(tmp_path, UNREACHABLE)
    dataset.check_dataset(download.maybe_download_and_extract(tmp_path, UNREACHABLE, sha256))


def test_a_copy_that_keras_has_is_mentioned_before_a_download(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".keras" / "datasets" / "cifar-10-batches-py-target_archive"
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(DataError, match="cannot download"):
        download.maybe_download_and_extract(tmp_path / "data", UNREACHABLE)
    command = (
        f"cifar10_convert.py --cifar10_python={path} --output={tmp_path}/data/cifar-10-batches"
    )
    assert command in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["http", "file", "home"])
def test_the_archive_is_downloaded_verified_and_extracted_with_the_umask(
    tmp_path, monkeypatch, archive, kind
):
    monkeypatch.setenv("HOME", str(tmp_path))
    body, sha256 = archive
    path = tmp_path / "mirror.tar.gz"
    data_dir = tmp_path / "new" / "data"
    with Server(body) as server:
        url = {"http": server.url, "file": path.as_uri(), "home": "~/mirror.tar.gz"}[kind]
        folder = download.maybe_download_and_extract(data_dir, url, sha256)
    assert len(server.requests) == (kind == "http")
    assert sorted(os.listdir(folder)) == sorted([*FILES, "batches.meta.txt", "readme.html"])
    dataset.check_dataset(folder)
    assert sorted(os.listdir(data_dir)) == ["cifar-10-batches-bin", ARCHIVE]
    modes = {found.stat().st_mode for found in (path, data_dir / ARCHIVE, *data_dir.glob("*/*"))}
    assert len(modes) == 1  # not those in the archive


def test_a_download_with_another_sha256_is_refused_and_deleted(tmp_path):
    with Server(b"<!DOCTYPE html><title>Log in</title>") as server:
        check_failure(tmp_path, server.url, "is not the expected archive .it may be a web page.")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "num_retries"), [(UNREACHABLE, 3), ("http://[x", 3), ("no/such/file", 0)]
)
def test_an_unreachable_source_is_reported_with_advice(tmp_path, capsys, url, num_retries):
    check_failure(tmp_path, url, "cannot download [^;<]*; run the same command again")
    assert capsys.readouterr().err.count("; retrying in 0 s\n") == num_retries


@pytest.mark.parametrize(
    ("faults", "supports_ranges", "num_requests"),
    [([1000] * 9, False, 4), ([10] * 50, True, 4)],
)
def test_retries_with_little_or_no_progress_end_and_keep_the_partial_file(
    tmp_path, faults, supports_ranges, num_requests
):
    data_dir = tmp_path / "data"
    with Server(b"x" * 5000, supports_ranges=supports_ranges, faults=faults) as server:
        check_failure(data_dir, server.url, r"ended after \d+ of \d+ bytes", remaining=[PART])
    assert len(server.requests) == num_requests


@pytest.mark.parametrize(
    ("options", "requests"),
    [
        ({"faults": [1000] * 15}, [None, *(f"bytes={n}000-" for n in range(1, 16))]),
        ({"faults": ["stalled"]}, [None, "bytes=1000-"]),
        ({"faults": ["busy"] * 2}, [None] * 3),
        ({"faults": [1000], "supports_ranges": False}, [None, "bytes=1000-"]),
        ({"sends_length": False}, [None]),
    ],
    ids=["progress", "stalled", "busy", "without ranges", "without length"],
)
def test_a_lost_connection_resumes_where_it_stopped(
    tmp_path, archive, monkeypatch, options, requests
):
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT", 0.2)
    body, sha256 = archive
    with Server(body, **options) as server:
        fetch(tmp_path / "data", server, sha256)
    assert server.requests == requests


def test_a_complete_partial_file_is_kept_and_one_of_another_archive_deleted(tmp_path, archive):
    body, sha256 = archive
    with Server(body) as server:
        for number, content in enumerate([body, b"y" * 2000, b"y" * 1_000_000]):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / PART).write_bytes(content)
            if content != body:
                with pytest.raises(DataError, match="is not the expected archive"):
                    download.maybe_download_and_extract(folder, server.url, sha256)
            fetch(folder, server, sha256)
    complete = f"bytes={len(body)}-"
    assert server.requests == [complete, "bytes=2000-", None, "bytes=1000000-", None]


def wait_for_file(path, process, min_size=0):
    while not (path.exists() and path.stat().st_size >= min_size):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_resumed_by_the_next_process(tmp_path, archive, stop):
    body, sha256 = archive
    data_dir = tmp_path / "data"
    with Server(body, pause=0.004) as server:
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


def test_only_one_of_two_simultaneous_processes_downloads(tmp_path, archive):
    body, sha256 = archive
    with Server(body, pause=0.004) as server:
        processes = [start_fetch(tmp_path / "data", server, sha256) for _ in range(2)]
        errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert server.requests == [None]
    assert sum("Waiting for process " in error for error in errors) == 1
    fetch(tmp_path / "data", server, sha256)


def test_a_killed_extraction_is_repeated_by_the_next_process(tmp_path, archive):
    body, sha256 = archive
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


def test_a_full_disk_is_reported_and_the_next_process_resumes(tmp_path, archive):
    body, sha256 = archive
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


def make_member(name, kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, str(target)
    member.size = 1 if kind == tarfile.REGTYPE else 0
    return member


def test_only_the_known_regular_files_are_extracted(tmp_path):
    (tmp_path / "data").mkdir()
    special = [
        make_member("cifar-10-batches-bin/../../escaped.bin"),
        make_member(str(tmp_path / "absolute.bin")),
        make_member("cifar-10-batches-bin/unknown.bin"),
        make_member("cifar-10-batches-bin/batches.meta.txt", tarfile.SYMTYPE, "/etc/hosts"),
        make_member("cifar-10-batches-bin/readme.html", tarfile.CHRTYPE),
    ]
    sha256 = make_archive(tmp_path / "data" / ARCHIVE, special=special)
    folder = download.maybe_download_and_extract(tmp_path / "data", sha256=sha256)
    assert sorted(os.listdir(folder)) == sorted(FILES)
    assert os.listdir(tmp_path) == ["data"]
    assert sorted(os.listdir(tmp_path / "data")) == ["cifar-10-batches-bin", ARCHIVE]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_a_link_device_or_folder_in_place_of_records_is_not_extracted(tmp_path, kind):
    (tmp_path / "data").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    special = [make_member("cifar-10-batches-bin/data_batch_2.bin", kind, victim)]
    sha256 = make_archive(tmp_path / "data" / ARCHIVE, special=special)
    with pytest.raises(DataError, match=f"{ARCHIVE} has no file data_batch_2.bin"):
        download.maybe_download_and_extract(tmp_path / "data", sha256=sha256)
    assert os.listdir(tmp_path / "data") == [ARCHIVE]
    assert victim.read_text() == "mine"


# --- Hostile servers.


@contextlib.contextmanager
def raw_server(pieces):
    """Yields the URL of a server that answers with `pieces`, and repeats the last one forever."""

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(10_000)
            for piece in itertools.chain(pieces[:-1], itertools.repeat(pieces[-1])):
                connection.sendall(piece)
                time.sleep(0.01)

    def serve():
        with contextlib.suppress(OSError):  # until the socket is closed
            while True:
                threading.Thread(target=answer, args=[server.accept()[0]], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/a?sig=secret"


OK = b"HTTP/1.1 200 OK\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
RANGE = b"HTTP/1.1 206 Partial Content\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"HTTP/1.1 100 Continue\r\n\r\n"], "no answer within 0.5 s"),
        ([b"HTTP/1.1 200 OK\r\nA: ", b"a"], "no answer within 0.5 s"),
        ([CHUNKED, b"0"], "no answer within 0.5 s"),
        ([RANGE, b"a"], "slower than 1000 bytes per second"),
        ([b"HTTP/1.1 404 \x1b[31mred\rgreen\r\n\r\n", b""], r"\\x1b\[31mred"),
    ],
)
def test_a_hostile_server_ends_the_download_and_no_secret_is_printed(
    tmp_path, monkeypatch, capsys, pieces, message
):
    for name in ("HEAD_TIMEOUT", "DOWNLOAD_TIMEOUT", "RATE_PERIOD"):
        monkeypatch.setattr(download, name, 0.5)
    with raw_server(pieces) as url:
        with pytest.raises(DataError, match=message) as error:
            download.maybe_download_and_extract(tmp_path, url)
        printed = f"{error.value}\n{capsys.readouterr().err}"
    assert all(line.isprintable() for line in printed.splitlines())
    assert "secret" not in printed
    assert "/a?***" in printed


@pytest.mark.parametrize(
    "url",
    [
        "http://ann:pa55word@localhost/a",
        "http://localhost/a?sig=my pa55word",
        "http://a:1/b#pa55word",
    ],
)
def test_a_secret_in_a_malformed_url_is_not_printed(tmp_path, capsys, url):
    with pytest.raises(DataError) as error:
        download.maybe_download_and_extract(tmp_path, url)
    assert "pa55" not in f"{error.value}{capsys.readouterr().err}"


def test_an_endless_file_ends_the_download_and_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_ARCHIVE_BYTES", 5_000)
    with raw_server([OK, b"a" * 1000]) as url, pytest.raises(DataError, match="more than 5,000"):
        download.maybe_download_and_extract(tmp_path, url)
    assert os.listdir(tmp_path) == []


def test_a_partial_download_that_is_a_link_is_refused(tmp_path, archive):
    content, sha256 = archive
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / PART).symlink_to(victim)
    with Server(content) as server, pytest.raises(DataError, match="it is a link"):
        download.maybe_download_and_extract(tmp_path / "data", server.url, sha256)
    assert victim.read_bytes() == b"mine"
