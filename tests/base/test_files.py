"""Tests of locks between processes and of files and folders that appear only when complete."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import resource
import select
import subprocess
import sys
import threading
import time

import filelock
import pytest
from conftest import ROOT

from support.base import files
from support.base.errors import DataError, UserError

HOLD = """
import sys, time
from support.base import files
with files.lock(sys.argv[1], on_wait=lambda _: print("waits", flush=True)):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(path):
    """Yields a process that locks `path`, and kills it at the end."""
    command = [sys.executable, "-c", HOLD, path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def find_ready(processes, timeout):
    """Returns the processes that have written a line, as soon as there is one."""
    ready, _, _ = select.select([process.stdout for process in processes], [], [], timeout)
    return [process for process in processes if process.stdout in ready]


def lock_and_release(path):
    with files.lock(path):
        pass


def test_a_second_process_fails_at_once_and_names_the_holder_in_one_line(tmp_path):
    path = tmp_path / "a.lock"
    with holder(path) as process:
        assert process.stdout.readline() == "held\n"
        start = time.monotonic()
        with pytest.raises(files.LockedError, match=rf"^process {process.pid} on .* since 20.*\)$"):
            lock_and_release(path)
        assert time.monotonic() - start < 1
        path.write_bytes(b"\xff\x1b[31m\nforged" + b"x" * 10_000)
        os.truncate(path, 3 << 30)  # not read as a whole
        with pytest.raises(files.LockedError) as error:
            lock_and_release(path)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1100


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "a.lock"
    with holder(path) as process:
        assert process.stdout.readline() == "held\n"
        process.kill()
        process.wait()
        assert path.read_text().startswith(f"process {process.pid} on ")
        with files.lock(path):
            assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_waiting_processes_get_the_lock_one_after_the_other(tmp_path):
    path = tmp_path / "a.lock"
    with contextlib.ExitStack() as stack:
        with files.lock(path):
            processes = [stack.enter_context(holder(path)) for _ in range(2)]
            for process in processes:
                assert process.stdout.readline() == "waits\n"
        # The file that both have waited for is gone. Either may be the first to lock a new one.
        while processes:
            (first,) = find_ready(processes, timeout=30)
            assert first.stdout.readline() == "held\n"
            with pytest.raises(files.LockedError, match=f"process {first.pid} "):
                lock_and_release(path)
            processes.remove(first)
            assert find_ready(processes, timeout=0.2) == []
            first.kill()


@pytest.mark.parametrize(
    ("target", "name"), [(filelock.FileLock, "acquire"), (files, "_write_holder")]
)
def test_an_interruption_of_a_process_that_has_just_locked_releases_the_lock(
    tmp_path, monkeypatch, target, name
):
    function = getattr(target, name)

    def interrupt(*arguments, **options):
        function(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, name, interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            lock_and_release(tmp_path / "a.lock")
    assert os.listdir(tmp_path) == []
    lock_and_release(tmp_path / "a.lock")
    assert caught.traceback  # the objects in it, which refer to the lock, are still alive


def fail_to_lock(monkeypatch, number):
    """Makes flock fail with the given error number."""

    def fail(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, capsys, monkeypatch, number):
    fail_to_lock(monkeypatch, number)
    with files.lock(tmp_path / "a.lock"), files.lock(tmp_path / "b.lock", on_wait=print):
        pass
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(
        rf"Warning: the file system of {tmp_path} does not support locks \(.+\); make sure that no "
        r"two processes write to the same folder\n",
        output.err,
    )
    assert os.listdir(tmp_path) == []


def test_another_error_of_the_lock_is_raised(tmp_path, monkeypatch):
    fail_to_lock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        lock_and_release(tmp_path / "a.lock")


def test_files_and_folders_get_the_permissions_of_the_umask(tmp_path):
    folder = tmp_path / "parent" / "folder"
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o027))
        stack.enter_context(files.exclusive_creation(folder))
        with files.atomic_folder(folder) as staging:
            files.write_json_atomically(os.path.join(staging, "a.json"), 1)
            files.append_json_line(os.path.join(staging, "b.json"), {})
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    of_files = dict.fromkeys((".folder.lock", "a.json", "b.json"), 0o640)
    assert modes == {"parent": 0o750, "folder": 0o750, **of_files}


def test_one_process_creates_a_folder_and_another_says_that_it_waits(tmp_path, capsys):
    with holder(tmp_path / ".folder.lock") as process:
        assert process.stdout.readline() == "held\n"
        killer = threading.Timer(0.3, process.kill)
        killer.start()
        with files.exclusive_creation(tmp_path / "folder"):
            killer.join()
    error = capsys.readouterr().err
    assert error.startswith(f"Waiting for process {process.pid} on ")
    assert error.endswith(f" to finish preparing {tmp_path}/folder\n")


@pytest.mark.parametrize("name", ["file/folder", "/proc/self/x"])
def test_a_folder_that_cannot_be_written_is_reported_at_once_with_its_flag(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    message = f"^cannot write {tmp_path / name}: .*; choose another folder with --output$"
    with (
        pytest.raises(DataError, match=message),
        files.exclusive_creation(tmp_path / name, "--output"),
    ):
        pass


NEW_FILES = ["batches.meta.txt", "data_batch_1.bin"]


@contextlib.contextmanager
def creating(folder):
    with files.new_folder("--output", folder) as staging:
        for name in NEW_FILES:
            pathlib.Path(staging, name).write_text("whole")
        yield


def is_visible(path):
    return not path.name.startswith((".", "lost+found"))


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "link", "busy", "mount point", "in a read-only parent"]
)
def test_a_new_folder_may_be_missing_or_empty(tmp_path, monkeypatch, kind):
    folder = given = tmp_path / "folder"
    if kind != "missing":
        folder.mkdir()
    if kind == "link":
        given = tmp_path / "link"
        given.symlink_to("folder")
    if kind == "mount point":
        (folder / "lost+found").mkdir()
    if kind == "in a read-only parent":
        monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))
    is_fixed = kind in ("mount point", "in a read-only parent")
    if kind != "in a read-only parent":  # the staging folder that a killed process left behind
        (folder if is_fixed else tmp_path).joinpath(".folder.part", "stale").mkdir(parents=True)
    rename, renamed = os.rename, []

    def rename_if_possible(source, target):
        if (is_fixed or kind == "busy") and os.path.exists(target):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)
        renamed.append(os.path.basename(target))

    monkeypatch.setattr(os, "rename", rename_if_possible)
    with creating(given):
        assert not any(map(is_visible, folder.glob("*")))
        assert not is_fixed or not list(tmp_path.glob(".*"))
    assert sorted(path.name for path in folder.glob("*") if is_visible(path)) == NEW_FILES
    assert renamed == (NEW_FILES[::-1] if is_fixed or kind == "busy" else ["folder"])
    assert not list(tmp_path.rglob(".*"))
    with pytest.raises(UserError, match="already exists"), creating(given):
        pass


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_folder_whose_creation_fails_stays_empty_or_missing(tmp_path, name):
    with pytest.raises(ZeroDivisionError), creating(os.path.join(tmp_path, name)):
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == []


def test_an_interrupted_move_leaves_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    rename = os.rename

    def rename_one(source, target):
        if os.path.basename(target) == NEW_FILES[0]:  # the last one
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_one)
    with pytest.raises(KeyboardInterrupt), creating(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["lost+found"]


def test_a_file_that_appears_in_an_empty_folder_is_not_overwritten(tmp_path):
    message = f"^cannot write {tmp_path}: .*not empty"
    with pytest.raises(DataError, match=message), creating(tmp_path):
        (tmp_path / NEW_FILES[0]).write_text("mine")
    assert os.listdir(tmp_path) == NEW_FILES[:1]
    assert (tmp_path / NEW_FILES[0]).read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "folder", "broken link"])
def test_an_existing_file_or_folder_is_not_a_new_folder(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("mine")
    (tmp_path / "broken link").symlink_to("missing")
    message = f"^--output={tmp_path}/{name} already exists; choose a new folder$"
    with pytest.raises(UserError, match=message), files.new_folder("--output", tmp_path / name):
        pass
    assert len(os.listdir(tmp_path)) == 3


def append(path):
    files.append_json_line(path, {"step": 1})


def test_json_lines_are_appended_with_the_time_also_after_an_incomplete_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\n{"ste')
    start = time.time()
    append(path)
    append(path)
    before, incomplete, *lines = path.read_text().splitlines()
    assert (before, incomplete) == ('{"step": 0}', '{"ste')
    lines = [json.loads(line) for line in lines]
    assert [line["step"] for line in lines] == [1, 1]
    assert start <= lines[0]["time"] <= lines[1]["time"] <= time.time()


def test_a_disk_that_is_full_leaves_the_previous_json(tmp_path):
    path = tmp_path / "a.json"
    files.write_json_atomically(path, {"sizes": {1}})  # what JSON lacks is written as text
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))  # bytes in a file
    try:
        with pytest.raises(UserError, match=r"a\.json: File too large$"):
            files.write_json_atomically(path, [2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads(path.read_bytes()) == {"sizes": "{1}"}
    assert os.listdir(tmp_path) == ["a.json"]


# --- Files that somebody else has prepared.


def test_nothing_is_written_through_a_link(tmp_path):
    path, victim = tmp_path / "a", tmp_path / "victim"
    victim.write_text("mine")
    path.symlink_to(victim)
    with pytest.raises(UserError, match="/a: it is a link$"):
        append(path)
    with pytest.raises(OSError, match="it is a link"):
        lock_and_release(path)
    (tmp_path / "a.part").symlink_to(victim)
    files.write_json_atomically(path, [])
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["a", "a/", "own/link"])
@pytest.mark.parametrize(
    ("mode", "owner", "is_refused"),
    [
        (0o1777, 1234, True),
        (0o755, 1234, False),
        (0o777, 1234, False),
        (0o1777, os.geteuid(), False),
    ],
)
def test_a_folder_of_another_user_is_refused_where_everybody_can_write(
    tmp_path, monkeypatch, mode, owner, is_refused, name
):
    folder = tmp_path / "a"
    folder.mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "link").symlink_to(folder)
    tmp_path.chmod(mode)
    given = f"{tmp_path}/{name}"
    real = os.stat

    def stat(path, *arguments, **named):
        found = real(path, *arguments, **named)
        return (
            os.stat_result((*found[:4], owner, *found[5:10]))
            if os.fspath(path) == str(folder)
            else found
        )

    monkeypatch.setattr(os, "stat", stat)
    message = f"^--train_dir={given} belongs to another "
    with pytest.raises(UserError, match=message) if is_refused else contextlib.nullcontext():
        files.refuse_folder_of_others("--train_dir", given)


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(OSError, match="No such device"):
        files.open_without_links(tmp_path / "a", os.O_WRONLY)
    with pytest.raises(OSError, match="not a regular file"):
        files.read_regular(tmp_path / "a", 10)
    with pytest.raises(OSError, match="not a regular file"):
        files.hash_file(tmp_path / "a")
    with pytest.raises(UserError, match=r"^cannot write .*/a: .*not seekable"):
        append(tmp_path / "a")


def test_a_file_is_read_up_to_a_size(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.read_regular(tmp_path / "a", 3) == b"abc"
    with pytest.raises(ValueError, match="it has more than 2 bytes"):
        files.read_regular(tmp_path / "a", 2)
