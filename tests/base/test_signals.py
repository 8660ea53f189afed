"""Tests of the signals that stop a script: recorded, repeated, ignored."""

import os
import signal
import socket
import threading
import time

import pytest
from conftest import run_file, running_file

from support.base.signals import DeferredSignals

NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *NOTICES)


SAVES = """
    import time
    from support.base.command_line import run
    from support.base.errors import Interrupted
    from support.base.signals import DeferredSignals

    def main(argv):
        with DeferredSignals() as signals:
            print("ready", flush=True)
            while signals.signal_number is None:
                time.sleep(0.01)
        try:
            raise Interrupted(signals.signal_number, "step 7 is saved")
        finally:
            print("closing", flush=True)
            time.sleep(1.0)

    run(main)
"""


@pytest.mark.parametrize("then", ["use_signals()", "raise RuntimeError('a step later')"])
def test_a_signal_counts_although_code_that_calls_python_discards_its_exception(write_script, then):
    path = write_script(f"""
        import contextlib, os, signal
        from support.base.command_line import run
        from support.base.errors import Interrupted
        from support.base.signals import DeferredSignals

        def use_signals():
            with DeferredSignals() as signals:
                raise Interrupted(signals.signal_number)

        def main(argv):
            with contextlib.suppress(Interrupted):  # as TensorFlow does while it builds a graph
                os.kill(os.getpid(), signal.SIGUSR1)
            {then}

        run(main)
        """)
    code, _, errors = run_file(path)
    assert (code, errors.count("\n")) == (128 + signal.SIGUSR1, 1)
    assert "stopped by SIGUSR1" in errors


@pytest.mark.parametrize("second", [signal.SIGXCPU, signal.SIGTERM])
def test_a_signal_after_the_last_save_does_not_change_how_the_script_ends(write_script, second):
    with running_file(write_script(SAVES)) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "closing\n"
        process.send_signal(second)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGUSR1
    assert errors.endswith("stopped by SIGUSR1: step 7 is saved\n")


WAITS = """
    import hashlib, threading, time
    from support.base.command_line import run
    from support.base.signals import DeferredSignals

    def report(signals):
        while signals.signal_number is None:
            time.sleep(0.01)
        print("received", signals.signal_number, flush=True)

    def main(argv):
        with DeferredSignals() as signals:
            threading.Thread(target=report, args=[signals], daemon=True).start()
            print("ready", flush=True)
            # An uninterruptible call, which would take an hour.
            hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2**31 - 1)

    run(main)
    """


@pytest.mark.parametrize("first", [signal.SIGINT, *NOTICES])
def test_a_lost_terminal_or_a_scheduler_may_send_several_signals_but_a_second_request_ends_it(
    write_script, first
):
    with running_file(write_script(WAITS)) as process:
        process.send_signal(first)
        assert process.stdout.readline() == f"received {first.value}\n"
        # A shell and the kernel each send SIGHUP, and a session manager sends SIGTERM as well.
        # The kernel repeats SIGXCPU every second.
        for number in (first, signal.SIGTERM, first) if first in NOTICES else ():
            process.send_signal(number)
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 128 + signal.SIGTERM
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("ignored", "other"),
    [
        (signal.SIGHUP, signal.SIGINT),  # with nohup
        (signal.SIGINT, signal.SIGTERM),  # a background job of a shell
    ],
)
def test_ignored_signals_stay_ignored_while_others_are_deferred(write_script, ignored, other):
    path = write_script(f"""
        import os, signal, time
        from support.base.signals import DeferredSignals

        signal.signal({ignored.value}, signal.SIG_IGN)
        with DeferredSignals() as signals:
            for _ in range(3):
                os.kill(os.getpid(), {ignored.value})
                time.sleep(0.1)
            print(signals.signal_number)
            os.kill(os.getpid(), {other.value})
            time.sleep(0.2)
            print(signals.signal_number)
        assert signal.getsignal({ignored.value}) is signal.SIG_IGN
        """)
    assert run_file(path) == (0, f"None\n{other.value}\n", "")


def signal_state():
    """Returns the signal handlers, the wakeup descriptor, the open files and the threads."""
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    return handlers, wakeup_fd, os.listdir("/dev/fd"), threading.active_count()


def test_deferring_signals_restores_handlers_descriptors_and_threads():
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        previous = signal.set_wakeup_fd(sender.fileno())  # as another library does, like asyncio
        before = signal_state()
        with DeferredSignals():
            assert signal_state()[0] != before[0]
            assert signal_state()[1] != before[1]
        assert signal_state() == before
        signal.set_wakeup_fd(previous)


def test_deferring_signals_has_no_effect_outside_the_main_thread():
    results = []

    def defer():
        with DeferredSignals() as signals:
            results.append(signals.signal_number)

    thread = threading.Thread(target=defer)
    thread.start()
    thread.join()
    assert results == [None]
