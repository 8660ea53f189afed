"""The CIFAR-10 data set on disk: download, verify, extract, check, and a synthetic stand-in.

Bytes and files only; TensorFlow is not needed here. Reference for the binary format and for the
archive: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import colorsys
import contextlib
import fcntl
import gzip
import hashlib
import http.client
import os
import pathlib
import shutil
import socket
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib

import numpy as np

from cifar10_progress import show_progress

# The record layout, stated here once: a label byte, then the pixels, depth-major (all of red, row
# by row, then all of green, then all of blue).
LABEL_BYTES = 1
HEIGHT = 32  # pixels
WIDTH = 32  # pixels
DEPTH = 3  # colour channels
IMAGE_BYTES = DEPTH * HEIGHT * WIDTH
RECORD_BYTES = LABEL_BYTES + IMAGE_BYTES

CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
NUM_CLASSES = len(CLASS_NAMES)
# What other data sets may have: a label is one byte.
MIN_CLASSES, MAX_CLASSES = 2, 256
LISTED_NAMES = 12  # classes that a message tells the names of, at most

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)
CLASS_NAMES_FILE = "batches.meta.txt"

DATA_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_NAME = "cifar-10-binary.tar.gz"
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
ARCHIVE_BYTES = 170_052_171
EXTRACTED_FOLDER = "cifar-10-batches-bin"  # also the folder's name inside the archive
ARCHIVE_FILES = (*TRAIN_FILES, *TEST_FILES, CLASS_NAMES_FILE, "readme.html")

DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte before a connection counts as dead
# Seconds to wait before each new try. The tries count from the last one that brought any bytes.
RETRY_DELAYS = (1.0, 3.0, 10.0)
CHUNK_BYTES = 1 << 20
# A file of the archive has 30.73 MB; anything much larger is not CIFAR-10 but fills the disk.
MAX_FILE_BYTES = 1 << 26
WAYS_ON = (
    "start again to retry, name another source with --data_url, or use a generated stand-in with "
    "--synthetic_data"
)

SYNTHETIC_FOLDER = "cifar-10-synthetic-bin"
SYNTHETIC_RECORDS_PER_FILE = 2000
COLOUR_SPREAD = 0.1  # standard deviation of a shape's hue around its class's, in turns
NOISE = 20.0  # standard deviation of the noise on each colour value, of 255


def _in_square(u, v, half_side=1.0):
    return np.maximum(abs(u), abs(v)) < half_side


# What the classes of the stand-in show: whether a point is inside the shape, which reaches from
# about -1 to 1 in both coordinates. Each is its own mirror image, as training mirrors images.
_SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) < 1,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.775) < 0.225,
    "square": lambda u, v: _in_square(u, v, 0.9),
    "triangle": lambda u, v: (abs(v) < 0.95) & (abs(u) < (v + 1) / 2),
    "plus": lambda u, v: _in_square(u, v) & (np.minimum(abs(u), abs(v)) < 0.3),
    "cross": lambda u, v: _in_square(u, v) & (abs(abs(u) - abs(v)) < 0.4),
    "rows": lambda u, v: _in_square(u, v) & (np.cos(2.5 * np.pi * v) > 0),
    "columns": lambda u, v: _in_square(u, v) & (np.cos(2.5 * np.pi * u) > 0),
    "checkers": lambda u, v: _in_square(u, v) & (np.cos(2 * np.pi * u) * np.cos(2 * np.pi * v) > 0),
    "pair": lambda u, v: np.hypot(abs(u) - 0.6, v) < 0.45,
}


class DataError(RuntimeError):
    """The data set cannot be used. The message is one line: what is wrong, where, and the cure."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # what it quotes may have several lines


def record_files(folder, eval_data):
    """Returns the paths of the test file (`eval_data` true) or of the five training files."""
    return [os.path.join(folder, name) for name in (TEST_FILES if eval_data else TRAIN_FILES)]


def count_records(folder, eval_data):
    """Returns how many records those files hold together. Raises OSError if one is missing."""
    return sum(os.path.getsize(path) for path in record_files(folder, eval_data)) // RECORD_BYTES


def find_folder(data_dir):
    """Returns the folder of `data_dir` that holds, or is to hold, record files.

    That is `cifar-10-batches-bin` in it; or `data_dir` itself, where there are records only there.
    """
    folder = os.path.join(data_dir, EXTRACTED_FOLDER)
    files = (os.path.join(data_dir, name) for name in (*TRAIN_FILES, *TEST_FILES))
    if not os.path.isdir(folder) and any(map(os.path.exists, files)):
        return os.fspath(data_dir)
    return folder


def read_class_names(folder):
    """Returns the names of the classes, label 0's first: a tuple of strings.

    They are the lines of `batches.meta.txt` in the folder, or CIFAR-10's where there is no such
    file.

    Raises:
      DataError: they are not 2 to 256 different names.
    """
    path = os.path.join(folder, CLASS_NAMES_FILE)
    cure = "write one name a line, or remove the file to have CIFAR-10's ten classes"
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = tuple(filter(None, map(str.strip, file)))
    except (FileNotFoundError, NotADirectoryError):
        return CLASS_NAMES
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {cure}") from error
    if not MIN_CLASSES <= len(names) <= MAX_CLASSES:
        raise DataError(
            f"{path} names {len(names)} classes, not {MIN_CLASSES} to {MAX_CLASSES}; {cure}"
        )
    for number, name in enumerate(names):
        if name in names[:number]:
            raise DataError(f"{path} names {name!r} twice; {cure}")
    return names


def describe_classes(names):
    """Returns how many classes there are, and their names, as far as a line holds them."""
    listed = [*names[:LISTED_NAMES], "..."] if len(names) > LISTED_NAMES else names
    return f"{len(names)} classes ({', '.join(listed)})"


def write_class_names(folder, names):
    """Writes `batches.meta.txt`, for `read_class_names`."""
    with open(os.path.join(folder, CLASS_NAMES_FILE), "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)


def check_records(folder):
    """Checks all six record files: there, whole records, at least one, every label a class.

    How many classes there are is told by `read_class_names`.

    TensorFlow's reader drops a partial last record without a word, and a label out of range turns
    into a loss of NaN on a GPU; so both are found here, in well under a second, before training.

    Raises:
      DataError: names the file, the record (counted from 0) and the cure.
    """
    num_classes = len(read_class_names(folder))
    for path in record_files(folder, eval_data=False) + record_files(folder, eval_data=True):
        _check_file(path, num_classes)


def _check_file(path, num_classes):
    folder = os.path.dirname(path)
    cure = "put a good one in its place"
    sources = {EXTRACTED_FOLDER: "CIFAR-10 downloaded", SYNTHETIC_FOLDER: "the stand-in drawn"}
    if source := sources.get(os.path.basename(folder)):
        cure += f", or move the folder {folder} away and start again to have {source} anew"
    if not os.path.exists(path):
        raise DataError(f"{path} is missing; {cure}")
    if not os.path.isfile(path):
        raise DataError(f"{path} is not a file; {cure}")
    try:
        size = os.path.getsize(path)
        if size == 0:
            raise DataError(f"{path} is empty, it has no record 0; {cure}")
        records, rest = divmod(size, RECORD_BYTES)
        if rest:
            raise DataError(
                f"{path}: record {records} (from 0) is cut short, it has {rest} of {RECORD_BYTES} "
                f"bytes; {cure}"
            )
        labels = np.memmap(path, np.uint8, mode="r").reshape(records, RECORD_BYTES)[:, 0]
        wrong = np.flatnonzero(labels >= num_classes)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {cure}") from error
    if wrong.size:
        raise DataError(
            f"{path}: record {wrong[0]} (from 0) has label {labels[wrong[0]]}, but labels are 0 to "
            f"{num_classes - 1}; {cure}"
        )


class ChangeCheck:
    """Notices that record files change while they are read.

    What a file held when this was made has been checked, and the reader counts on it: one that is
    cut later only seems to end earlier, and wrong labels are learned without a word.

    Args:
      folder: the folder with the record files.
      eval_data: bool; the test file, or the training files.
    """

    def __init__(self, folder, eval_data):
        self._before = {path: os.stat(path) for path in record_files(folder, eval_data)}

    def __call__(self):
        """Raises DataError if a file has been written to, or cannot be read any more."""
        for path, before in self._before.items():
            try:
                now = os.stat(path)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read any more ({error.strerror}): it was there when the "
                    "script started"
                ) from error
            if now.st_size != before.st_size:
                raise DataError(
                    f"{path} has {now.st_size} bytes now; it had {before.st_size} when the script "
                    "started"
                )
            if now.st_mtime_ns != before.st_mtime_ns:
                raise DataError(f"{path} has been written to since the script started")


class LockedError(RuntimeError):
    """Another process holds the lock; the message says which."""


@contextlib.contextmanager
def lock(path, on_wait=None):
    """Holds the lock that a file stands for; it ends with its process, however that ends.

    Args:
      path: the file; it is made, says who holds the lock, and is removed at the end. One that a
        killed process has left behind locks nothing.
      on_wait: called with the holder's description before waiting for it.

    Raises:
      LockedError: another holds it, and `on_wait` is None.
      OSError: the file cannot be made or locked.
    """
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a+"))
            _acquire(file, on_wait)
            # Who held it before may have removed the file that was waited for: then it is no
            # longer what the next process will look at.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    break
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} "
            f"({os.path.basename(sys.argv[0])}, since {time.strftime('%Y-%m-%d %H:%M:%S')})\n"
        )
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):  # the user has removed it
                os.remove(path)


def _acquire(file, on_wait):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        if on_wait is None:
            raise LockedError(holder) from None
        on_wait(holder)
        fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def preparing(folder, flag="--data_dir"):
    """Makes the folder that `folder` is in, and waits until no other process prepares `folder`.

    Raises:
      DataError: nothing can be written there; the message tells to change `flag`.
    """

    def tell(holder):
        print(f"Waiting for {holder}, which prepares {folder}", file=sys.stderr, flush=True)

    parent, name = os.path.split(folder)
    try:
        os.makedirs(parent or ".", exist_ok=True)
        with lock(os.path.join(parent, f".{name}.lock"), on_wait=tell):
            yield
    except OSError as error:
        raise DataError(
            f"cannot write the data set to {parent or '.'}: {error}; name another folder with "
            f"{flag}"
        ) from error


def maybe_download_and_extract(data_dir, url=DATA_URL, sha256=ARCHIVE_SHA256, size=None):
    """Makes sure that `data_dir` holds CIFAR-10, and fetches it if it does not.

    What is in the folder `cifar-10-batches-bin` already, or where that is missing, in `data_dir`
    itself, is used as it is. So is an archive `cifar-10-binary.tar.gz` in `data_dir`, once its
    checksum holds. A download that was interrupted goes on where it stopped. Processes that start
    at the same time wait for the first.

    Args:
      data_dir: the folder that the data set goes into; made if need be.
      url: where the archive comes from: http(s)://, file://, or a path.
      sha256: the archive's SHA-256, in hexadecimal digits.
      size: int; the archive's bytes. Where None, those of CIFAR-10's if the checksum is its, and
        else unknown.

    Returns:
      The path of the folder with the record files. `check_records` checks what is in it.

    Raises:
      DataError: the archive cannot be had, or is not the one that was asked for.
    """
    folder = find_folder(data_dir)
    if os.path.isdir(folder):
        return folder
    archive = os.path.join(data_dir, ARCHIVE_NAME)
    with preparing(folder):
        if os.path.isdir(folder):  # another process has made it meanwhile
            return folder
        if not os.path.exists(archive):
            if size is None and sha256 == ARCHIVE_SHA256:
                size = ARCHIVE_BYTES
            _download(url, archive, sha256, size)
        elif _hash(archive) != sha256:
            raise DataError(
                f"{archive} has another SHA-256 than {sha256}; delete it and start again"
            )
        _extract(archive, folder)
    return folder


def _download(url, archive, sha256, size):
    """Fetches `url`; the file gets its final name only when its checksum holds."""
    if "://" not in url:
        url = pathlib.Path(url).absolute().as_uri()
    print(
        f"There is no data set in {os.path.dirname(archive)} (cifar10_convert.py makes one of "
        f"pictures): fetching CIFAR-10, {url}",
        file=sys.stderr,
    )
    part = f"{archive}.part"
    try:
        is_joined = _fetch_all(url, part, size)
        digest = _hash(part)
        if digest != sha256 and is_joined:
            # The pieces may be of different files.
            print("The resumed download is damaged: starting over", file=sys.stderr)
            os.remove(part)
            _fetch_all(url, part, size)
            digest = _hash(part)
    except KeyboardInterrupt:
        if os.path.exists(part):
            print(
                f"{os.path.getsize(part)} bytes are kept in {part}; the same command goes on from "
                "there",
                file=sys.stderr,
            )
        raise
    if digest != sha256:
        message = f"{url} is {_describe_wrong(part, digest, sha256, size)}; {WAYS_ON}"
        os.remove(part)
        raise DataError(message)
    os.replace(part, archive)


def _describe_wrong(path, digest, sha256, size):
    """Says what a file is that is not the archive."""
    found = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(1024).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an archive; the server may ask for a login or report an error"
    if size is not None and found < size:
        return f"shorter than the archive: it has {found} of {size} bytes"
    return f"not the expected archive: the SHA-256 of its {found} bytes is {digest}, not {sha256}"


class _TransientError(Exception):
    """A connection has failed in a way that may pass; the message says how."""


def _fetch_all(url, part, size):
    """Appends to `part` what it lacks of `url`, in as many connections as it takes.

    Returns:
      bool; whether pieces that came at different times were joined.
    """
    delays = list(RETRY_DELAYS)
    is_joined = False
    most = _size_of(part)
    while True:
        offset = _size_of(part)
        try:
            return _fetch(url, part, offset, size) or is_joined
        except _TransientError as error:
            if _size_of(part) > most:
                most = _size_of(part)
                delays = list(RETRY_DELAYS)
            is_joined = is_joined or _size_of(part) > offset > 0
            if not delays:
                raise DataError(f"cannot download {url}: {error}; {WAYS_ON}") from error
            delay = delays.pop(0)
            print(f"{error}; trying again in {delay:g} s", file=sys.stderr, flush=True)
            time.sleep(delay)


def _size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def _fetch(url, part, offset, size):
    """Copies what `url` serves to `part`, from byte `offset` on if the server can do that.

    Returns:
      bool; whether what came was joined to what was there.
    """
    try:
        # Without this header a proxy might count offsets in a compressed stream.
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=DOWNLOAD_TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()  # it is the response as well, and holds the connection
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return True  # there is nothing after `offset`: all is here, or the checksum will tell
        if error.code >= 500 or error.code in (
            http.HTTPStatus.REQUEST_TIMEOUT,
            http.HTTPStatus.TOO_MANY_REQUESTS,
        ):
            raise _TransientError(str(error)) from error
        raise DataError(f"cannot download {url}: {error}; {WAYS_ON}") from error
    except urllib.error.URLError as error:
        if url.startswith("file:"):
            raise DataError(f"cannot download {url}: {error.reason}; {WAYS_ON}") from error
        raise _TransientError(f"no connection: {error.reason}") from error
    except ValueError as error:  # the address makes no sense
        raise DataError(f"cannot download {url}: {error}; {WAYS_ON}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"no answer: {error!r}") from error
    with response:
        continues = (response.headers.get("Content-Range") or "").startswith(f"bytes {offset}-")
        if not (response.status == http.HTTPStatus.PARTIAL_CONTENT and continues):
            offset = 0  # it serves everything from the start
        length = response.headers.get("Content-Length") or ""
        total = offset + int(length) if length.isdecimal() else size
        with open(part, "ab" if offset else "wb") as output:
            _copy(response, output, offset, total, url, size)
    return offset > 0


def _copy(response, output, offset, total, url, size):
    """Copies a response, and shows the progress; `total` and `size` may be None."""
    with show_progress(f"Downloading {ARCHIVE_NAME}", total, "B", offset, unit_scale=True) as bar:
        while True:
            try:
                chunk = response.read1(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _TransientError(
                    f"the connection failed after {bar.n} of {total or 'unknown'} bytes: {error!r}"
                ) from error
            if not chunk:
                break
            if size is not None and bar.n + len(chunk) > size:
                raise DataError(f"{url} is larger than the archive's {size} bytes; {WAYS_ON}")
            output.write(chunk)
            bar.update(len(chunk))
    if total is not None and bar.n < total:
        raise _TransientError(f"the connection ended after {bar.n} of {total} bytes")


def _hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract(archive, folder):
    """Extracts the known files of `archive`; `folder` appears with all of them or not at all."""
    wanted = {f"{EXTRACTED_FOLDER}/{name}": name for name in ARCHIVE_FILES}
    with make_whole(folder) as staging:
        try:
            with tarfile.open(archive, "r:gz") as members:
                for member in members:
                    # Anything else (a path out of the folder, a link, a device) is passed over.
                    name = wanted.get(member.name)
                    if name is None or not member.isfile():
                        continue
                    if member.size > MAX_FILE_BYTES:
                        raise DataError(
                            f"{archive} cannot be extracted: {name} is {member.size} bytes large; "
                            "delete it and start again"
                        )
                    with open(os.path.join(staging, name), "wb") as output:
                        shutil.copyfileobj(members.extractfile(member), output)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{archive} cannot be extracted ({error}); delete it and start again"
            ) from error
        missing = sorted({*TRAIN_FILES, *TEST_FILES} - set(os.listdir(staging)))
        if missing:
            raise DataError(
                f"{archive} does not hold {', '.join(missing)}; delete it and start again"
            )


@contextlib.contextmanager
def make_whole(folder):
    """Gives a new folder to fill; it is renamed to `folder` when, and only when, that succeeds.

    One process at a time: see `preparing`. What an earlier one left half done is thrown away.
    """
    parent, name = os.path.split(folder)
    staging = os.path.join(parent, f".{name}.part")  # hidden: no folder of the user's
    shutil.rmtree(staging, ignore_errors=True)
    os.mkdir(staging)
    try:
        yield staging
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def maybe_generate_synthetic(data_dir, seed=0):
    """Makes sure that `data_dir` holds the synthetic stand-in, and draws it if it does not.

    Ten classes of coloured shapes in CIFAR-10's binary format, 2,000 records a file. Position,
    size, tilt, colours and noise vary from image to image, and a class's colour is only likelier
    in that class, so a model has to learn the shapes. What is there already is used as it is.

    Args:
      data_dir: the folder in which `cifar-10-synthetic-bin` is made.
      seed: int; the same seed gives the same bytes.

    Returns:
      The path of the folder with the record files.

    Raises:
      DataError: the folder cannot be written.
    """
    folder = os.path.join(data_dir, SYNTHETIC_FOLDER)
    if os.path.isdir(folder):
        return folder
    with preparing(folder):
        if os.path.isdir(folder):  # another process has made it meanwhile
            return folder
        with make_whole(folder) as staging:
            for number, path in enumerate(
                record_files(staging, eval_data=False) + record_files(staging, eval_data=True)
            ):
                generator = np.random.default_rng([seed, number])
                _draw_records(SYNTHETIC_RECORDS_PER_FILE, generator).tofile(path)
            write_class_names(staging, _SHAPES)
    return folder


def _draw_records(count, generator):
    """Draws `count` records with labels in random order: uint8 [count, RECORD_BYTES]."""
    labels = generator.permutation(np.arange(count) % NUM_CLASSES)

    def draw(low, high):  # one value per image, ready to broadcast over its pixels
        return generator.uniform(low, high, [count, 1, 1]).astype(np.float32)

    # Coordinates in units of the shape's half size, around its centre, tilted by up to 14 degrees:
    # enough to vary, and far from the 45 degrees that would turn a plus into a cross.
    size, tilt = draw(6.0, 9.0), draw(-0.25, 0.25)
    y = (np.arange(HEIGHT, dtype=np.float32)[:, np.newaxis] - draw(12.5, 18.5)) / size
    x = (np.arange(WIDTH, dtype=np.float32) - draw(12.5, 18.5)) / size
    u = np.cos(tilt) * x + np.sin(tilt) * y
    v = np.cos(tilt) * y - np.sin(tilt) * x
    mask = np.empty(u.shape, bool)
    for label, is_inside in enumerate(_SHAPES.values()):
        chosen = labels == label
        mask[chosen] = is_inside(u[chosen], v[chosen])

    # [count, 3, 1, 1]: depth-major, as in a record.
    hues = labels / NUM_CLASSES + generator.normal(0.0, COLOUR_SPREAD, count)
    shape_colour = _colours(hues, generator)
    ground_colour = _colours(generator.uniform(0.0, 1.0, count), generator)
    images = generator.standard_normal([count, DEPTH, HEIGHT, WIDTH], np.float32)
    images *= NOISE
    images += np.where(mask[:, np.newaxis], shape_colour, ground_colour)

    records = np.empty([count, RECORD_BYTES], np.uint8)
    records[:, 0] = labels
    records[:, LABEL_BYTES:] = images.clip(0, 255, out=images).reshape(count, IMAGE_BYTES)
    return records


def _colours(hues, generator):
    """Gives each hue (in turns) a random saturation and brightness: float32 [count, 3, 1, 1]."""
    saturations = generator.uniform(0.3, 1.0, hues.size)
    values = generator.uniform(80.0, 220.0, hues.size)
    colours = [
        colorsys.hsv_to_rgb(*hsv) for hsv in zip(hues % 1.0, saturations, values, strict=True)
    ]
    return np.array(colours, np.float32)[:, :, np.newaxis, np.newaxis]
