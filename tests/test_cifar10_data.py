"""The data set on disk: faults are caused for real, downloads come from a server on loopback."""

import contextlib
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
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
        members["batches.meta.txt"] = b"airplane\n"
        members["readme.html"] = b"<html>"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(body, promised_length=None, status=200):
    """Serves `body` on loopback; gives the address and the list of requested paths."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(promised_length or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/cifar.tar.gz", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_importing_the_data_module_does_not_import_tensorflow():
    code = "import sys, cifar10_data; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_record_is_a_label_and_3072_pixels():
    assert cifar10_data.RECORD_BYTES == 1 + 3 * 32 * 32 == 3073


def test_good_records_of_any_number_are_accepted_and_counted(folder):
    cifar10_data.check_records(folder)
    assert cifar10_data.count_records(folder, eval_data=False) == 3 + 4 + 5 + 6 + 7
    assert cifar10_data.count_records(folder, eval_data=True) == 11


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
    with serving(archive.read_bytes()) as (address, requests):
        url = {"http": address, "file": archive.as_uri(), "path": str(archive)}[kind]
        folder = cifar10_data.maybe_download_and_extract(data_dir, url, sha256)
    assert len(requests) == (kind == "http")
    assert sorted(os.listdir(folder)) == sorted([*NAMES, "batches.meta.txt", "readme.html"])
    cifar10_data.check_records(folder)
    assert sorted(os.listdir(data_dir)) == ["cifar-10-batches-bin", "cifar-10-binary.tar.gz"]


def test_a_download_shows_its_progress(tmp_path, capsys):
    sha256 = make_archive(tmp_path / "mirror.tar.gz")
    cifar10_data.maybe_download_and_extract(
        tmp_path / "data", str(tmp_path / "mirror.tar.gz"), sha256
    )
    output = capsys.readouterr()
    assert "Downloading cifar-10-binary.tar.gz: 100%" in output.err
    assert output.out == ""


def test_an_archive_that_is_there_is_extracted_without_a_download(tmp_path):
    sha256 = make_archive(tmp_path / "cifar-10-binary.tar.gz")
    folder = cifar10_data.maybe_download_and_extract(tmp_path, "http://127.0.0.1:1/", sha256)
    cifar10_data.check_records(folder)


def test_an_archive_that_is_there_with_other_content_is_refused(tmp_path):
    make_archive(tmp_path / "cifar-10-binary.tar.gz")
    with pytest.raises(DataError, match="another SHA-256 .* delete it and start again"):
        cifar10_data.maybe_download_and_extract(tmp_path, "http://127.0.0.1:1/")


def check_failed_download(data_dir, url, pattern):
    with pytest.raises(DataError, match=pattern) as error:
        cifar10_data.maybe_download_and_extract(data_dir, url)
    message = str(error.value)
    assert "start again" in message
    assert "--data_url" in message
    assert "--synthetic_data" in message
    assert "\n" not in message
    assert os.listdir(data_dir) == []


def test_a_download_with_other_content_is_refused(tmp_path):
    archive = tmp_path / "other.tar.gz"
    make_archive(archive)
    with serving(archive.read_bytes()) as (url, _):
        check_failed_download(tmp_path / "data", url, "is not the expected archive: its SHA-256")


def test_a_download_that_ends_early_is_refused(tmp_path):
    with serving(b"x" * 1000, promised_length=5000) as (url, _):
        check_failed_download(tmp_path, url, "ended after 1000 of 5000 bytes")


def test_a_download_that_the_server_refuses_offers_the_ways_on(tmp_path):
    with serving(b"no", status=404) as (url, _):
        check_failed_download(tmp_path, url, "HTTP Error 404")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x", "file:///no/such/file", "no/such/file", "strange://x"]
)
def test_a_source_that_is_not_there_offers_the_ways_on(tmp_path, url):
    check_failed_download(tmp_path, url, "cannot download")


def test_an_archive_that_is_no_tar_file_is_refused(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(b"hello")
    sha256 = hashlib.sha256(b"hello").hexdigest()
    with pytest.raises(DataError, match="cannot be extracted .* delete it and start again"):
        cifar10_data.maybe_download_and_extract(tmp_path, sha256=sha256)
    assert os.listdir(tmp_path) == ["cifar-10-binary.tar.gz"]


def test_only_the_known_files_leave_the_archive(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    members = {name: make_records(2).tobytes() for name in NAMES}
    members["../../escaped.bin"] = b"x"
    members["stranger.bin"] = b"x"
    sha256 = make_archive(archive, members)
    folder = cifar10_data.maybe_download_and_extract(tmp_path, sha256=sha256)
    assert sorted(os.listdir(folder)) == sorted(NAMES)
    assert not (tmp_path.parent / "escaped.bin").exists()


def test_the_folder_of_the_records_in_place_of_its_parent_is_told_and_nothing_fetched(folder):
    with pytest.raises(DataError, match="holds record files itself; .*--data_dir"):
        cifar10_data.maybe_download_and_extract(folder, "http://127.0.0.1:1/")


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
