"""Signals that stop a script: from Ctrl-C, from schedulers, and from a terminal that closes."""

import contextlib
import gc
import os
import signal
import socket
import sys
import threading

from support.base.errors import Interrupted

_REQUESTS = (signal.SIGINT, signal.SIGTERM)
# SIGHUP: the terminal has closed, for example with its ssh connection. SIGUSR1 and SIGUSR2: Slurm
# and other schedulers send one shortly before a job's time limit. SIGXCPU: the limit of CPU time.
_NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
_STOP_SIGNALS = (*_REQUESTS, *_NOTICES)

_current = None  # the innermost context
_runs_script = False  # whether the process does nothing but run a script, so that it may be ended
_is_stopping = False  # whether a signal has stopped the script, which is about to exit


@contextlib.contextmanager
def running_script():
    """Lets signals end the process in the context, unless a notebook or a prompt called `run`."""
    global _runs_script, _is_stopping
    before = _runs_script
    _runs_script = not hasattr(sys, "ps1")  # the prompt of Python, IPython and Jupyter
    if _runs_script:
        # The objects that imports have created stay alive. The garbage collector need not traverse
        # them again and again: that would take half a second of every script.
        gc.freeze()
    try:
        yield
    finally:
        _runs_script, _is_stopping = before, False


class StopSignals:
    """A context in which the first of the stop signals listed above raises `Interrupted`.

    A second SIGINT or SIGTERM ends a script at once. Other signals do not count for this, because
    shells, schedulers and the system may send several. In a process that does more than run a
    script, for example a notebook, SIGINT or SIGTERM after any stop signal raises KeyboardInterrupt
    instead.

    Python runs signal handlers only in the main thread and only between two of its instructions,
    but a call into TensorFlow can take minutes. So a thread is notified of the signals as well.

    A signal that is ignored, as in `nohup` or a shell's background job, stays ignored. A handler
    that a C library installed before Python started stays, because Python could not restore it.
    Outside the main thread, where Python allows no signal handlers, the context has no effect.

    Attributes:
      signal_number: int; the number of the first signal, or None.
    """

    _interrupts = True

    def __init__(self):
        self.signal_number = None
        self._is_first = True

    def __enter__(self):
        self._previous = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        global _current
        if _current is not None:  # code in C++ may have discarded `Interrupted`
            self.signal_number = _current.signal_number
        self._outer, _current = _current, self
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not from Python
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        if threading.current_thread() is not threading.main_thread():
            return
        global _current, _is_stopping
        _current = self._outer
        _is_stopping = _runs_script and (_is_stopping or self.signal_number is not None)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        self._sender.close()  # ends the thread
        self._thread.join()
        self._receiver.close()

    def _handle(self, number, frame):
        if self._is_first and not _is_stopping:
            self._is_first = False
            self.signal_number = self.signal_number or number
            if self._interrupts:
                raise Interrupted(number)
        elif number in _REQUESTS and not _runs_script:
            raise KeyboardInterrupt

    def _receive(self):
        requests = 0
        while received := self._receiver.recv(1):
            number = received[0]
            if number in _STOP_SIGNALS:
                requests += number in _REQUESTS
                if requests > 1 and _runs_script:
                    os._exit(128 + number)
                self.signal_number = self.signal_number or number


class DeferredSignals(StopSignals):
    """A context in which the first signal interrupts nothing: the program polls `signal_number`."""

    _interrupts = False
