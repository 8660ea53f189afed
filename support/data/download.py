"""Downloads the CIFAR-10 archive, verifies it and extracts it."""

import gzip
import http.client
import os
import pathlib
import shutil
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib

from support.base import files
from support.base.errors import DataError
from support.base.progress import show_progress
from support.data import dataset, formats, records

DATA_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_NAME = "cifar-10-binary.tar.gz"
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
ARCHIVE_BYTES = 170_052_171
RECORD_FILES = (*records.TRAIN_FILES, *records.TEST_FILES)
ARCHIVE_FILES = (*RECORD_FILES, dataset.CLASS_NAMES_FILE, "readme.html")

DOWNLOAD_TIMEOUT = 20.0  # seconds without data before a connection counts as failed
RETRY_DELAYS = (1.0, 3.0, 10.0)  # seconds before each retry; progress restarts the sequence
TRANSIENT_STATUSES = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)  # and 5xx
CHUNK_BYTES = 1 << 20
RETRY_ADVICE = (
    "run the same command again, choose another source with --data_url, or use the synthetic "
    "dataset with --synthetic_data"
)
CERTIFICATE_ADVICE = (
    "check this computer's clock and CA certificates, or download the archive elsewhere and give "
    "its path with --data_url=FILE"
)


def maybe_download_and_extract(data_dir, url=DATA_URL, sha256=ARCHIVE_SHA256):
    """Downloads and extracts CIFAR-10 unless `data_dir` already holds a dataset.

    An existing dataset (see `dataset.find_folder`) is reused without a check; call
    `dataset.check_dataset` for that. An existing archive is verified and extracted. An interrupted
    download resumes where it stopped. If several processes call this function at the same time,
    one downloads and the others wait.

    Args:
      data_dir: path; the folder for the dataset, created if needed.
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
    """Raises DataError if `data_dir` has, or `url` names, CIFAR in a format to be converted."""
    name = url.rpartition("/")[2]
    is_remote = "://" in url and not url.startswith("file:")
    for version in formats.VERSIONS:
        if is_remote and name in formats.archive_names(version):
            raise DataError(
                f"{url} is {version.title}, which the scripts cannot read; download it and convert "
                f"it with python cifar10_convert.py --{version.flag}={name} --output={data_dir}"
            )
    if url.startswith("file:"):
        url = urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
    for path in (data_dir, url):
        if found := formats.find_version(path):
            command = formats.suggest_conversion(*found, data_dir)
            raise DataError(
                f"{found[1]} is {found[0].title}, which the scripts cannot read; convert it with "
                f"{command}, then run this script again"
            )


def _download(url, archive, sha256):
    """Downloads `url` to `archive`, which appears only if its SHA-256 is correct."""
    size = ARCHIVE_BYTES if sha256 == ARCHIVE_SHA256 else None  # unknown
    if "://" not in url:
        url = pathlib.Path(os.path.expanduser(url)).absolute().as_uri()
    data_dir = os.path.dirname(archive)
    print(
        f"No dataset in {data_dir}. Downloading CIFAR-10 from {url} (to use your own images "
        "instead, run cifar10_convert.py)",
        file=sys.stderr,
    )
    versions = [each for each in formats.VERSIONS if each.flag == "cifar10_python"]
    if found := formats.find_version(os.path.expanduser("~/.keras/datasets"), versions):
        command = formats.suggest_conversion(*found, data_dir)
        print(f"To use the copy from Keras, press Ctrl-C and run {command}", file=sys.stderr)
    part = f"{archive}.part"
    try:
        is_resumed = _fetch_with_retries(url, part, size)
        digest = files.hash_file(part)
        if is_resumed and digest != sha256:  # the pieces may come from different archives
            print("The resumed download is damaged; starting over", file=sys.stderr)
            os.remove(part)
            _fetch_with_retries(url, part, size)
            digest = files.hash_file(part)
    except KeyboardInterrupt:
        if os.path.exists(part):
            print(
                f"Kept {os.path.getsize(part)} bytes in {part}; run the same command again to "
                "resume the download",
                file=sys.stderr,
            )
        raise
    if digest != sha256:
        problem = _describe_mismatch(part, digest, sha256, size)
        os.remove(part)
        raise DataError(f"{url} is {problem}; {RETRY_ADVICE}")
    os.replace(part, archive)


def _describe_mismatch(path, digest, sha256, size):
    """Describes a file whose SHA-256 is wrong."""
    found = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(1024).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an archive; the server may require a login or report an error"
    if size is not None and found < size:
        return f"incomplete: {found} of {size} bytes"
    return f"not the expected archive: the SHA-256 of its {found} bytes is {digest}, not {sha256}"


class _DownloadError(Exception):
    """The download failed; the message gives the reason. A transient error is worth a retry."""

    def __init__(self, reason, is_transient=False, advice=RETRY_ADVICE):
        super().__init__(reason)
        self.is_transient, self.advice = is_transient, advice


def _fetch_with_retries(url, part, size):
    """Returns the result of `_fetch`, retrying it; gives up after RETRY_DELAYS without progress."""
    delays = iter(RETRY_DELAYS)
    largest_size = _size_of(part)
    while True:
        try:
            return _fetch(url, part, size)
        except _DownloadError as error:
            if _size_of(part) > largest_size:
                largest_size = _size_of(part)
                delays = iter(RETRY_DELAYS)
            delay = next(delays, None) if error.is_transient else None
            if delay is None:
                raise DataError(f"cannot download {url}: {error}; {error.advice}") from error
            print(
                f"Download failed ({error}); retrying in {delay:g} s", file=sys.stderr, flush=True
            )
            time.sleep(delay)


def _size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def _fetch(url, part, size):
    """Downloads the rest of `url` to `part`; returns whether it kept the bytes already there."""
    offset = _size_of(part)
    response = _open_url(url, offset)
    if response is None:
        return True
    with response:
        content_range = response.headers.get("Content-Range") or ""
        is_partial = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if not (is_partial and content_range.startswith(f"bytes {offset}-")):
            offset = 0  # the server sends the whole file
        length = response.headers.get("Content-Length") or ""
        total = offset + int(length) if length.isdecimal() else size
        with open(part, "ab" if offset else "wb") as output:
            _copy(response, output, offset, total, size)
    return offset > 0


def _open_url(url, offset):
    """Requests `url` from byte `offset` on; returns None if the file has no more bytes."""
    # Without this header, a proxy might compress the response and count compressed bytes.
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()  # it is also the response, and keeps the connection open
        if offset and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        is_transient = error.code >= 500 or error.code in TRANSIENT_STATUSES
        raise _DownloadError(error, is_transient) from error
    except ValueError as error:  # a malformed URL
        raise _DownloadError(error) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # a URLError wraps the cause
        if isinstance(reason, ssl.SSLCertVerificationError):
            text = f"its certificate cannot be verified ({reason.verify_message})"
            raise _DownloadError(text, advice=CERTIFICATE_ADVICE) from error
        # The reason is a string if urllib does not even try, for example for an unknown protocol.
        is_final = isinstance(reason, str) or url.startswith("file:")
        raise _DownloadError(reason, is_transient=not is_final) from error


def _copy(response, output, offset, total, size):
    """Copies the response and shows progress; `total` and `size` may be None (unknown)."""
    with show_progress(f"Downloading {ARCHIVE_NAME}", total, "B", offset, unit_scale=True) as bar:
        while True:
            try:
                chunk = response.read1(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                text = f"the connection failed after {bar.n} of {total or 'unknown'} bytes: {error}"
                raise _DownloadError(text, is_transient=True) from error
            if not chunk:
                break
            if size is not None and bar.n + len(chunk) > size:
                raise _DownloadError(f"it is larger than the archive's {size} bytes")
            output.write(chunk)
            bar.update(len(chunk))
    if total is not None and bar.n < total:
        text = f"the connection ended after {bar.n} of {total} bytes"
        raise _DownloadError(text, is_transient=True)


def _extract(archive, folder):
    """Extracts ARCHIVE_FILES; `folder` appears with all record files or not at all."""
    names = [f"{dataset.EXTRACTED_FOLDER}/{name}" for name in ARCHIVE_FILES]
    with files.atomic_folder(folder) as staging:
        try:
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
                    raise tarfile.TarError(f"{name} is missing")
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{archive} cannot be extracted ({error}); delete it and run the same command again"
            ) from error
