"""Tests of stdout and stderr that are lost: pipes, terminals and disks that cannot be written."""

import errno
import os
import pathlib
import shlex
import sys
import textwrap

import pytest
from conftest import file_environment, lost_stream, run_in_shell

from support.base import streams

REASONS = {"pipe": errno.EPIPE, "terminal": errno.EIO, "disk": errno.ENOSPC}


@pytest.fixture(params=REASONS)
def reason(request):
    """The kind of the stream that is lost."""
    return request.param


def test_work_continues_when_stdout_is_lost_and_one_line_says_so(monkeypatch, capsys, reason):
    done = []
    with lost_stream(reason) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with streams.tolerate_lost_output():
            for number in range(3):
                print("a line", flush=True)
                done.append(number)
    assert done == [0, 1, 2]
    assert capsys.readouterr().err == (
        "Continuing without standard output, which can no longer be written "
        f"({os.strerror(REASONS[reason])})\n"
    )


@pytest.mark.parametrize("context", [streams.tolerate_lost_output, streams.guarded])
def test_work_continues_when_stderr_is_lost(monkeypatch, capsys, reason, context):
    with lost_stream(reason) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        before = sys.stdout, sys.stderr
        with context():
            print("a message", file=sys.stderr, flush=True)
            print("a line")
        assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "a line\n"


def test_what_is_printed_without_a_flush_is_lost_within_the_context(monkeypatch, capsys, reason):
    with lost_stream(reason) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with streams.tolerate_lost_output():
            print("a line")
        assert os.strerror(REASONS[reason]) in capsys.readouterr().err
        stream.flush()  # as Python does when it exits


def test_a_guarded_script_learns_once_that_its_stdout_is_lost(monkeypatch, capsys, reason):
    with lost_stream(reason) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with streams.guarded() as stdout:
            with pytest.raises(OSError, match=os.strerror(REASONS[reason])) as caught:
                print("a line", flush=True)
            assert caught.value is stdout.error
            assert caught.value.errno == REASONS[reason]
            print("another line", flush=True)
    assert capsys.readouterr().err == ""


def run_redirected(code, redirection="", **environment):
    """Runs Python code with streams that a shell has redirected; returns exit code and output."""
    command = shlex.join([sys.executable, "-c", textwrap.dedent(code)])
    environment = {**file_environment(), **environment}
    return run_in_shell(f"exec {command} {redirection}", env=environment, text=False)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("latin-1", b"\\u732b K\xe4se\n"),
        ("ascii:strict", b"\\u732b K\\xe4se\n"),
    ],
)
def test_characters_that_stdout_cannot_encode_are_escaped(encoding, expected):
    code = """
        from support.base import streams

        with streams.guarded():
            print("\\u732b K\\xe4se")
        """
    assert run_redirected(code, PYTHONIOENCODING=encoding) == (0, expected, b"")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_at_the_start_do_not_get_into_files(tmp_path, redirection):
    path = str(tmp_path / "file")
    code = f"""
        import os, sys
        from support.base import streams

        with streams.guarded(), streams.tolerate_lost_output(), open({path!r}, "w") as file:
            print("a line", flush=True)
            print("a message", file=sys.stderr, flush=True)
            for descriptor in (1, 2):  # as the C++ code of TensorFlow writes
                os.write(descriptor, b"noise")
            file.write("contents")
        """
    assert run_redirected(code, redirection)[0] == 0
    assert pathlib.Path(path).read_text() == "contents"
