"""Locks, and files and folders that appear only when they are complete."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import socket
import stat
import sys
import time

import filelock

from support.base.errors import DataError, UserError
from support.base.messages import report, report_once

# How flock fails on file systems that have no locks: NFS without a lock daemon, Lustre mounted
# without `flock`, FUSE and others. 524 is the Linux kernel's own ENOTSUPP, which some pass on.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL, 524}
MAX_HOLDER_BYTES = 1000  # in a lock file


class LockedError(UserError):
    """Another process holds the lock; the message describes that process."""


@contextlib.contextmanager
def lock(path, on_wait=None):
    """Holds a lock that the system releases when the process ends, even if it is killed.

    On a file system without locks, it warns once and holds none.

    Args:
      path: the lock file, which describes the holder. A file left behind by a killed process does
        not lock anything.
      on_wait: function of a description of the holder, called once before waiting for that process.

    Raises:
      LockedError: another process holds the lock, and `on_wait` is None.
      OSError: the file cannot be created or locked.
    """
    # A soft lock would stay locked after a kill.
    file_lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        try:
            _acquire(file_lock, path, on_wait)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            folder = os.path.dirname(path) or "."
            report_once(
                f"Warning: the file system of {folder} does not support locks "
                f"({error.strerror}); make sure that no two processes write to the same folder"
            )
            _remove(path)
        else:
            _write_holder(path)
        yield
    finally:  # a signal may have interrupted the acquisition
        if file_lock.is_locked:
            # This is safe: a waiting process that locks the removed file opens the path again.
            _remove(path)
        file_lock.release()


def open_without_links(path, flags):
    """Opens a file for writing, or raises OSError; pass this to `open` as `opener`.

    A link is refused: in a folder such as `/tmp`, another user may have created one with this name,
    and writing through it would overwrite a file elsewhere.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait forever.
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a link"
        raise


def read_regular(path, max_bytes):
    """Returns the content of a regular file: bytes.

    Raises:
      OSError: the file cannot be read, or is a pipe or a device, for example.
      ValueError: it has more than `max_bytes` bytes.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        content = file.read(min(max_bytes, status.st_size) + 1)  # reserves that much memory
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return content


def refuse_folder_of_others(flag, folder):
    """Raises UserError if `folder` is another user's and is in a shared folder such as `/tmp`.

    That user could read and replace its files. Root's folders and mount points are accepted.
    """
    shared = stat.S_IWOTH | stat.S_ISVTX  # everybody can create files there, and delete only theirs
    with contextlib.suppress(OSError):  # it is missing, or cannot be read: reported later
        for path in (os.path.abspath(folder), os.path.realpath(folder)):
            owners = {os.stat(path).st_uid, os.lstat(path).st_uid}
            is_in_shared = os.stat(os.path.dirname(path)).st_mode & shared == shared
            if is_in_shared and owners - {os.geteuid(), 0} and not os.path.ismount(path):
                raise UserError(
                    f"{flag}={folder} belongs to another user, in a folder that everybody can "
                    "write to; choose another folder"
                )


def _acquire(file_lock, path, on_wait):
    # filelock would wait forever for a file that cannot be created.
    os.close(open_without_links(path, os.O_RDWR | os.O_CREAT))
    try:
        file_lock.acquire(blocking=False)
    except filelock.Timeout:
        holder = _read_holder(path)
        if on_wait is None:
            raise LockedError(holder) from None
        on_wait(holder)
        file_lock.acquire()


def _remove(path):
    with contextlib.suppress(OSError):  # the folder may have become read-only
        pathlib.Path(path).unlink(missing_ok=True)


def _write_holder(path):
    script = os.path.basename(sys.argv[0])
    start = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} on {socket.gethostname()} ({script}, since {start})\n"
    with open(path, "w", encoding="utf-8", opener=open_without_links) as file:
        file.write(holder)


def _read_holder(path):
    holder = ""
    with contextlib.suppress(OSError, ValueError):  # it has been removed, or is no lock file
        holder = read_regular(path, MAX_HOLDER_BYTES).decode(errors="replace").strip()
    return holder or "another process"


@contextlib.contextmanager
def exclusive_creation(folder, flag="--data_dir"):
    """Lets only one process at a time create `folder`, in the `with` block. Others wait.

    The parent of `folder` is created if needed.

    Args:
      folder: path.
      flag: string; the flag with which the user can choose another folder.

    Raises:
      DataError: the folder cannot be created or locked, or the block raises OSError.
    """
    try:
        path = _hidden_path(folder, "lock")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with lock(path, lambda other: report(f"Waiting for {other} to finish preparing {folder}")):
            yield
    except OSError as error:
        message = f"cannot write {folder}: {error}; choose another folder with {flag}"
        raise DataError(message) from error


@contextlib.contextmanager
def atomic_folder(folder):
    """Creates `folder` with all of its files, or not at all.

    Yields the path of a hidden staging folder, which is the same in all processes: use this within
    `exclusive_creation`. At the end, the staging folder is renamed to `folder`, or, if that is
    empty and cannot be replaced, its files are moved there.
    """
    staging = _hidden_path(folder, "part")
    shutil.rmtree(staging, ignore_errors=True)  # left behind by a killed process
    os.mkdir(staging)
    try:
        yield staging
        try:
            os.rename(staging, folder)  # also replaces an empty folder
        except OSError:
            if not os.path.isdir(folder) or _has_files(folder):
                raise
            _move_files(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_files(source, target):
    """Moves all files of a folder; if that fails, removes those that have been moved."""
    moved = []
    try:
        # In this order, batches.meta.txt or saved_model.pb comes last.
        for name in sorted(os.listdir(source), reverse=True):
            moved.append(os.path.join(target, name))
            shutil.move(os.path.join(source, name), moved[-1])
    except BaseException:
        for path in moved:
            shutil.rmtree(path, ignore_errors=True)
            _remove(path)
        raise


@contextlib.contextmanager
def new_folder(flag, folder):
    """Creates `folder`, the value of `flag`, as `atomic_folder` does, in one process at a time.

    Args:
      flag: string.
      folder: path of a folder that is missing or empty, or of a link to an empty folder.

    Raises:
      DataError: from `exclusive_creation`.
      UserError: the folder exists and is not empty, or is not a folder.
    """
    path = os.path.realpath(folder)
    with exclusive_creation(path, flag):
        if os.path.lexists(folder) and (not os.path.isdir(folder) or _has_files(folder)):
            raise UserError(f"{flag}={folder} already exists; choose a new folder")
        with atomic_folder(path) as staging:
            yield staging


def _hidden_path(folder, suffix):
    """Returns the path of the lock file or of the staging folder for the creation of `folder`."""
    parent, name = os.path.split(folder)
    # Mount points, folders with `lost+found` and those in write-protected parents must stay.
    is_fixed = os.path.isdir(folder) and (
        os.path.ismount(folder) or os.listdir(folder) or not os.access(parent or ".", os.W_OK)
    )
    return os.path.join(folder if is_fixed else parent, f".{name}.{suffix}")


def _has_files(folder):
    """Returns whether a folder has files other than those that `_hidden_path` names."""
    name = os.path.basename(os.path.realpath(folder))
    # New file systems have a folder `lost+found`.
    return not {"lost+found", f".{name}.lock", f".{name}.part"}.issuperset(os.listdir(folder))


def hash_file(path):
    """Returns the SHA-256 of a regular file's content in hexadecimal. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait forever
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_json_line(path, value):
    """Appends a dict, plus the `time` in seconds since 1970, as one line to a JSON Lines file.

    If the last line is incomplete, for example because the disk was full, it is ended first.

    Raises:
      UserError: the file cannot be written.
    """
    line = json.dumps({"time": time.time(), **value}) + "\n"
    with _writing(path), open(path, "a+b", opener=open_without_links) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else f"\n{line}"
        file.write(line.encode())


def write_json_atomically(path, value):
    """Writes `value` as JSON. If that fails or is killed, the previous file stays intact.

    Objects that JSON cannot represent, for example enumerations, are written as strings.

    Raises:
      UserError: the file cannot be written.
    """
    text = json.dumps(value, indent=2, default=str) + "\n"
    part = pathlib.Path(f"{path}.part")
    with _writing(path):
        try:
            part.unlink(missing_ok=True)
            with open(part, "x", encoding="utf-8") as file:
                file.write(text)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
