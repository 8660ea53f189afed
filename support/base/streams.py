"""Handles the loss of standard output and standard error while a script runs.

They are lost when the reader of a pipe exits, when a terminal closes because its ssh connection is
lost, or when the disk that holds the log is full. Training must survive that, because its results
are in files.
"""

import contextlib
import io
import os
import sys


class _Output:
    """A text stream that the null device replaces as soon as it cannot be written.

    The attribute `error` is then the OSError. It is raised if the stream is needed; otherwise the
    notice, unless None, is printed on stderr.
    """

    def __init__(self, stream, is_needed=False, notice=None):
        self.error = None
        self._stream = stream
        self._is_needed = is_needed
        self._notice = notice

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self._stream.flush)

    def _attempt(self, method, *arguments):
        try:
            method(*arguments)
        except OSError as error:
            self.error = error
            # The stream keeps what it could not write, and would fail again when Python exits.
            # A notebook's stream has no descriptor.
            with contextlib.suppress(io.UnsupportedOperation), open(os.devnull, "wb") as device:
                os.dup2(device.fileno(), self._stream.fileno())
            if self._is_needed:
                raise
            if self._notice is not None:
                print(f"{self._notice} ({error.strerror})", file=sys.stderr, flush=True)


@contextlib.contextmanager
def tolerate_lost_output():
    """A context in which work continues when stdout or stderr can no longer be written.

    One line on stderr reports the loss of stdout.
    """
    notice = "Continuing without standard output, which can no longer be written"
    stdout = _Output(sys.stdout, notice=notice)
    with contextlib.redirect_stderr(_Output(sys.stderr)), contextlib.redirect_stdout(stdout):
        try:
            yield
        finally:
            stdout.flush()


@contextlib.contextmanager
def guarded():
    """A context for a whole script, which yields its stdout.

    In the context, the loss of stderr has no effect. The loss of stdout raises an OSError, which is
    also the attribute `error` of the yielded stream, except within `tolerate_lost_output`.
    Characters that cannot be encoded are escaped.
    """
    _open_closed_streams()
    stdout = _Output(sys.stdout, is_needed=True)
    with contextlib.suppress(AttributeError):  # a notebook's stream can encode everything
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stderr(_Output(sys.stderr)), contextlib.redirect_stdout(stdout):
        try:
            yield stdout
        finally:
            with contextlib.suppress(OSError):
                stdout.flush()


def _open_closed_streams():
    """Opens the null device for streams that were closed when the process started."""
    # In this order, they get their descriptors back. Otherwise the next file would get 1 or 2, and
    # messages of TensorFlow's C++ code would be written to that file.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
