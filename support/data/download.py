"""Downloads the CIFAR-10 archive, verifies it and extracts it."""

import http
import os
import pathlib
import queue
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request

from support.base import files
from support.base.errors import DataError
from support.base.messages import mask_secrets, mask_url, report
from support.base.progress import show_progress
from support.data import dataset, formats, records

DATA_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_NAME = "cifar-10-binary.tar.gz"
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
RECORD_FILES = (*records.TRAIN_FILES, *records.TEST_FILES)
ARCHIVE_FILES = (*RECORD_FILES, dataset.CLASS_NAMES_FILE, "readme.html")

DOWNLOAD_TIMEOUT = 20.0  # seconds without data before a connection counts as failed
HEAD_TIMEOUT = 60.0  # seconds until the head of the response is complete
MIN_RATE = 1000  # bytes per second, on average over RATE_PERIOD; the server is known to be slow
RATE_PERIOD = 60.0  # seconds
MAX_ARCHIVE_BYTES = 200_000_000  # the archive has 170,052,171
MAX_DIGITS = 16  # of Content-Length
RETRY_DELAYS = (1.0, 3.0, 10.0)  # seconds before each retry; progress restarts the sequence
MIN_PROGRESS = 60_000  # bytes; without this minimum, a slow server could cause endless retries
CHUNK_BYTES = 1 << 20
RETRY_ADVICE = (
    "run the same command again, choose another source with --data_url (a file or a URL), or use "
    "the synthetic dataset with --synthetic_data"
)


def maybe_download_and_extract(data_dir, url=DATA_URL, sha256=ARCHIVE_SHA256):
    """Downloads and extracts CIFAR-10 unless `data_dir` already holds a dataset.

    An existing dataset (see `dataset.find_folder`) is reused without a check; call
    `dataset.check_dataset` for that. An existing archive is verified and extracted. An interrupted
    download resumes where it stopped. If several processes call this function at the same time,
    one downloads and the others wait.

    Args:
      data_dir: path; created if needed.
      url: string; http://, https:// or file:// URL of the archive, or its path.
      sha256: string; the archive's SHA-256 in hexadecimal.

    Returns:
      The path of the folder with the record files.

    Raises:
      DataError: the archive cannot be downloaded or extracted, or its SHA-256 is wrong.
    """
    folder = dataset.find_folder(data_dir)
    if os.path.isdir(folder):
        return folder
    archive = os.path.join(data_dir, ARCHIVE_NAME)
    if not os.path.exists(archive):
        _refuse_other_versions(data_dir, url)
    with files.exclusive_creation(folder):
        if os.path.isdir(folder):  # another process has just extracted it
            return folder
        if not os.path.exists(archive):
            _download(url, archive, sha256)
        elif files.hash_file(archive) != sha256:
            raise DataError(
                f"the SHA-256 of {archive} is not {sha256}; delete the file and run the same "
                "command again"
            )
        _extract(archive, folder)
    return folder


def _refuse_other_versions(data_dir, url):
    """Raises DataError if `data_dir` has, or `url` names, CIFAR in a format to convert."""
    found = formats.find_version(data_dir) or formats.find_version(os.path.expanduser(url))
    action = "convert it"
    for version in formats.VERSIONS:
        if "://" in url and url.endswith(f"/{version.archive}"):
            found, action = (version, version.archive), "download it and convert it"
    if found:
        raise DataError(
            f"{found[1]} is {found[0].title}, which the scripts cannot read; {action} with "
            f"{formats.suggest_conversion(*found, data_dir)}, then run this script again"
        )


def _download(url, archive, sha256):
    """Downloads `url` to `archive`, which appears only if its SHA-256 is correct."""
    if "://" not in url:
        url = pathlib.Path(os.path.expanduser(url)).absolute().as_uri()
    data_dir = os.path.dirname(archive)
    report(
        f"No dataset in {data_dir}. Downloading CIFAR-10 from {mask_url(url)} (to use your own "
        "images instead, run cifar10_convert.py)"
    )
    if found := formats.find_version(os.path.expanduser("~/.keras/datasets"), formats.VERSIONS[:1]):
        command = formats.suggest_conversion(*found, data_dir)
        report(f"To use the copy from Keras, press Ctrl-C and run {command}")
    part = f"{archive}.part"
    try:
        _fetch_with_retries(url, part)
    except KeyboardInterrupt:
        if os.path.exists(part):
            report(
                f"Kept {os.path.getsize(part)} bytes in {part}; run the same command again to "
                "resume the download"
            )
        raise
    digest = files.hash_file(part)
    if digest != sha256:
        size = os.path.getsize(part)
        os.remove(part)
        raise DataError(
            f"{mask_url(url)} is not the expected archive (it may be a web page): the SHA-256 "
            f"of its {size} bytes is {digest}, not {sha256}; {RETRY_ADVICE}"
        )
    os.replace(part, archive)


class _DownloadError(Exception):
    """The connection failed; the message gives the reason."""


def _fetch_with_retries(url, part):
    """Calls `_fetch` until it succeeds; gives up after RETRY_DELAYS without progress."""
    retry_delays = () if url.startswith("file:") else RETRY_DELAYS
    delays, largest_size = iter(retry_delays), _size_of(part)
    while True:
        try:
            return _fetch(url, part)
        except _DownloadError as error:
            reason = mask_secrets(str(error), url)
            if _size_of(part) >= largest_size + MIN_PROGRESS:
                delays, largest_size = iter(retry_delays), _size_of(part)
            if (delay := next(delays, None)) is None:
                message = f"cannot download {mask_url(url)}: {reason}; {RETRY_ADVICE}"
                raise DataError(message) from error
            report(f"Download failed ({reason}); retrying in {delay:g} s")
            time.sleep(delay)


def _size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def _fetch(url, part):
    """Downloads the rest of `url` to `part`, or all of it if the server does not support ranges."""
    offset = _size_of(part)
    if (response := _call(HEAD_TIMEOUT, _open, url, offset)) is None:
        return  # there are no more bytes
    try:
        _store(response, url, part, offset)
    finally:  # in a thread, because closing waits for a read that is still running
        threading.Thread(target=response.close, daemon=True).start()


def _store(response, url, part, offset):
    """Writes the body of a response to `part`."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        offset = 0  # the server sends the whole file
    length = response.headers["Content-Length"] or ""
    is_number = length.isdecimal() and len(length) < MAX_DIGITS
    total = offset + int(length) if is_number else None
    with (
        open(part, "ab" if offset else "wb", opener=files.open_without_links) as output,
        show_progress(f"Downloading {ARCHIVE_NAME}", total, "B", offset, True) as bar,
    ):
        deadline, start = time.monotonic() + RATE_PERIOD, offset
        while chunk := _call(DOWNLOAD_TIMEOUT, response.read1, CHUNK_BYTES):
            output.write(chunk)
            bar.update(len(chunk))
            if bar.n > MAX_ARCHIVE_BYTES:
                os.remove(part)
                raise DataError(
                    f"{mask_url(url)} is not CIFAR-10: it has more than "
                    f"{MAX_ARCHIVE_BYTES:,} bytes; {RETRY_ADVICE}"
                )
            if time.monotonic() > deadline:
                if bar.n - start < MIN_RATE * RATE_PERIOD:
                    raise _DownloadError(f"the server is slower than {MIN_RATE} bytes per second")
                deadline, start = time.monotonic() + RATE_PERIOD, bar.n
    if total and bar.n < total:
        raise _DownloadError(f"the connection ended after {bar.n} of {total} bytes")


def _open(url, offset):
    """Returns the response of a server; None if the file ends at `offset`."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        return urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()  # it is also the response, and keeps the connection open
        if offset and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        raise


def _call(timeout, function, *arguments):
    """Calls a function. Raises _DownloadError if it raises an exception or takes too long."""
    results = queue.SimpleQueue()

    def run():
        try:
            results.put((function(*arguments), None))
        except Exception as error:
            results.put((None, error))

    # In a thread, because no read times out if the server sends a byte from time to time.
    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=timeout)
    except queue.Empty:
        raise _DownloadError(f"no answer within {timeout:g} s") from None
    if error:
        # The reason of an HTTPError lacks the status.
        is_complete = isinstance(error, urllib.error.HTTPError)
        raise _DownloadError(error if is_complete else getattr(error, "reason", error))
    return result


def _extract(archive, folder):
    """Extracts ARCHIVE_FILES; `folder` appears with all record files or not at all."""
    names = [f"{dataset.EXTRACTED_FOLDER}/{name}" for name in ARCHIVE_FILES]
    with files.atomic_folder(folder) as staging:
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                # Skips paths that lead out of the folder, links and devices, among others.
                if member.name not in names or not member.isfile():
                    continue
                # Not `extract`, which would use the archive's permissions instead of the umask.
                path = os.path.join(staging, os.path.basename(member.name))
                with open(path, "wb") as output:
                    shutil.copyfileobj(members.extractfile(member), output)
        for name in RECORD_FILES:
            if not os.path.exists(os.path.join(staging, name)):
                raise DataError(f"{archive} has no file {name}")
