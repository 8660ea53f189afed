"""Tests of how a script runs: flags, help, errors in one line, signals and exit codes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import pytest
from conftest import ROOT, messages, run_script, script_environment

from support.command_line import DeferredSignals

COMMANDS = (
    "cifar10_train.py",
    "cifar10_multi_gpu_train.py",
    "cifar10_eval.py",
    "cifar10_predict.py",
    "cifar10_convert.py",
)


@pytest.fixture
def write_script(tmp_path):
    """Writes a Python file into a folder of its own, and returns its path."""

    def write(code, name="script.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(code).lstrip())
        return path

    return write


def environment():
    """Returns the environment for scripts outside the project's folder, with buffered output."""
    return {**script_environment(), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}


def run(path, *arguments):
    """Runs a script; returns its exit code, its stdout and its stderr."""
    process = subprocess.run(
        [sys.executable, path, *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return process.returncode, process.stdout, process.stderr


@contextlib.contextmanager
def running(path, *arguments):
    """Starts a script, waits for its first line, and yields the `subprocess.Popen`."""
    with subprocess.Popen(
        [sys.executable, path, *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            timer.cancel()
            process.kill()


# --- Signals that are deferred.


WAITS = """
    import hashlib, threading, time
    from support.command_line import DeferredSignals, run

    def report(signals):
        while signals.signal_number is None:
            time.sleep(0.01)
        print("received", signals.signal_number, flush=True)

    def main(argv):
        with DeferredSignals() as signals:
            threading.Thread(target=report, args=[signals], daemon=True).start()
            print("ready", flush=True)
            if argv[1] == "sleep":
                time.sleep(60)
            else:  # an uninterruptible call, which would take an hour
                hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2**31 - 1)

    run(main, takes_arguments=True)
    """


@pytest.mark.parametrize("call", ["sleep", "uninterruptible"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_the_first_signal_is_recorded_and_a_second_one_ends_the_process_during_any_call(
    write_script, call, first, second
):
    with running(write_script(WAITS), call) as process:
        process.send_signal(first)
        assert process.stdout.readline() == f"received {first.value}\n"
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(timeout=5) == 128 + second
        assert process.stderr.read() == ""


def test_signals_can_be_deferred_again_after_a_signal(write_script):
    path = write_script("""
        import os, signal, time
        from support.command_line import DeferredSignals

        for number in (signal.SIGINT, signal.SIGTERM):
            with DeferredSignals() as signals:
                assert signals.signal_number is None
                os.kill(os.getpid(), number)
                while signals.signal_number is None:
                    time.sleep(0.01)
            print(signals.signal_number)
        """)
    assert run(path) == (0, f"{signal.SIGINT.value}\n{signal.SIGTERM.value}\n", "")


def test_other_signals_are_not_recorded(write_script):
    path = write_script("""
        import os, signal, time
        from support.command_line import DeferredSignals

        signal.signal(signal.SIGUSR1, lambda number, frame: print("usr1"))
        with DeferredSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            print(signals.signal_number)
        """)
    assert run(path) == (0, "usr1\nNone\n", "")


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_ignored_signals_stay_ignored_while_others_are_deferred(write_script, ignored):
    other = signal.SIGTERM if ignored == signal.SIGINT else signal.SIGINT
    path = write_script(f"""
        import os, signal, time
        from support.command_line import DeferredSignals

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
    assert run(path) == (0, f"None\n{other.value}\n", "")


def signal_state():
    """Returns the handlers of SIGINT and SIGTERM, the wakeup descriptor and the open files."""
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return handlers, wakeup_fd, os.listdir("/proc/self/fd"), threading.active_count()


@pytest.fixture
def wakeup_fd():
    """The descriptor that another library, such as asyncio, has set for signals."""
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        previous = signal.set_wakeup_fd(sender.fileno())
        yield sender.fileno()
        signal.set_wakeup_fd(previous)


@pytest.mark.parametrize("error", [None, ValueError])
def test_deferring_signals_restores_handlers_descriptors_and_threads(wakeup_fd, error):
    before = signal_state()
    assert before[1] == wakeup_fd
    with contextlib.suppress(ValueError), DeferredSignals():
        assert signal_state()[0] != before[0]
        assert signal_state()[1] != before[1]
        if error is not None:
            raise error
    assert signal_state() == before


def test_deferring_signals_has_no_effect_outside_the_main_thread():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    results = []

    def defer():
        with DeferredSignals() as signals:
            results.append([signal.getsignal(number) for number in numbers])
        results.append(signals.signal_number)

    thread = threading.Thread(target=defer)
    thread.start()
    thread.join()
    assert results == [before, None]


# --- How a script ends.


FAILS = """
    from support import command_line
    from support.errors import CheckpointError, DataError, Interrupted, UserError

    def main(argv):
        {statement}

    if __name__ == "__main__":
        command_line.run(main)
    """


def test_main_gets_the_script_and_its_arguments_without_the_flags(write_script):
    path = write_script("""
        from absl import flags
        from support import command_line

        flags.DEFINE_integer("size", 3, "A size.")

        def main(argv):
            print(argv, flags.FLAGS.size)

        command_line.run(main, takes_arguments=True)
        """)
    code, output, errors = run(path, "a", "--size=4", "b", "--", "--size=5")
    assert (code, errors) == (0, "")
    assert output == f"{[str(path), 'a', 'b', '--size=5']} 4\n"


@pytest.mark.parametrize("kind", ["UserError", "DataError", "CheckpointError", "OSError"])
def test_an_error_that_the_user_can_fix_is_one_line_with_exit_code_1(write_script, kind):
    path = write_script(
        FAILS.format(statement=f"raise {kind}('the disk is full; free some space')")
    )
    assert run(path) == (1, "", "script.py: error: the disk is full; free some space\n")


def test_a_bug_has_a_traceback(write_script):
    code, output, errors = run(write_script(FAILS.format(statement="1 / 0")))
    assert (code, output) == (1, "")
    assert "Traceback" in errors
    assert "ZeroDivisionError" in errors


def test_a_reader_of_stdout_that_exits_early_ends_the_script_silently(write_script):
    path = write_script(FAILS.format(statement="while True: print('line', flush=True)"))
    command = f"{sys.executable} {path} | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(
        ["bash", "-c", command],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (1, "", "")


SLEEPS = """
    import sys, time
    from support import command_line

    def main(argv):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            if argv[1:] == ["cleans up"]:
                print("cleans up", flush=True)
                time.sleep(60)

    command_line.run(main, takes_arguments=True)
    """


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_script_with_its_exit_code_and_one_line(write_script, number, code):
    with running(write_script(SLEEPS)) as process:
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (code, "")
    assert errors == (
        f"script.py: stopped by {number.name}: nothing was lost; run the same command again\n"
    )


def test_the_line_after_a_signal_says_what_was_saved_if_the_script_does(write_script):
    statement = f"raise Interrupted({signal.SIGTERM.value}, 'step 5 is saved')"
    path = write_script(FAILS.format(statement=statement))
    assert run(path) == (143, "", "script.py: stopped by SIGTERM: step 5 is saved\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_script_that_cleans_up(write_script, number):
    with running(write_script(SLEEPS), "cleans up") as process:
        process.send_signal(number)
        assert process.stdout.readline() == "cleans up\n"
        process.send_signal(number)
        assert process.wait(timeout=5) == 128 + number
        assert process.stderr.read() == ""


def test_a_second_signal_ends_a_script_during_an_uninterruptible_call(write_script):
    path = write_script("""
        import hashlib, threading
        from support import command_line

        def main(argv):
            threading.Timer(0.5, print, ["ready"], {"flush": True}).start()
            hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2**31 - 1)  # takes an hour

        command_line.run(main)
        """)
    with running(path) as process:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
        assert process.stderr.read() == ""


def test_a_signal_that_a_script_starts_with_ignored_stays_ignored(write_script):
    path = write_script("""
        import os, signal, time
        from support import command_line

        def main(argv):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            print("still running")

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        command_line.run(main)
        """)
    assert run(path) == (0, "still running\n", "")


def test_a_running_script_does_not_collect_what_its_imports_created(write_script):
    statement = "import gc; print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    assert run(write_script(FAILS.format(statement=statement))) == (0, "True True\n", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["a warning"]),
        (["--verbosity=0"], ["an info", "a warning"]),
        (["--verbosity=-2"], []),
    ],
)
def test_messages_of_tensorflow_are_printed_once_from_the_given_level(
    write_script, arguments, expected
):
    path = write_script("""
        import logging
        from support import command_line

        logger = logging.getLogger("tensorflow")
        logger.addHandler(logging.StreamHandler())

        def main(argv):
            logger.info("an info")
            logger.warning("a warning")

        command_line.run(main)
        """)
    code, output, errors = run(path, *arguments)
    assert (code, output, errors.splitlines()) == (0, "", expected)


# --- Flags.


FLAGS = '''
    """Does something."""

    import json, sys
    from absl import flags
    from support import command_line
    {imports}

    flags.DEFINE_integer("own", 3, "A number of the script.", upper_bound=2**31 - 1)
    flags.DEFINE_integer("timeout", 600, "Seconds to wait.")
    flags.DEFINE_boolean("verbose", False, "Print more.")
    flags.DEFINE_string("name", None, "A name." + " Some text." * 20)
    command_line.check_flags(["own", "common"], lambda value: value != 13, "it must not be 13")
    {more}
    LAST = ("Flags for several machines", ["timeout"])

    def main(argv):
        print(json.dumps(command_line.flag_values(LAST)))

    command_line.run(main, last_flags=LAST)
    '''


@pytest.fixture
def script(write_script):
    """A script that uses two other modules with flags; one of them is a script as well."""
    write_script(
        """
        from absl import flags

        flags.DEFINE_integer("common", 5, "A number that all scripts use.")
        """,
        "common.py",
    )
    write_script(
        """
        from absl import flags
        import common

        flags.DEFINE_integer("shared", 7, "A number of the other script that this one uses.")
        flags.DEFINE_integer("foreign", 9, "A number of the other script only.")
        """,
        "other.py",
    )
    code = FLAGS.format(imports="import other", more='flags.declare_key_flag("shared")')
    return write_script(code)


DEFAULTS = {"own": 3, "verbose": False, "name": None, "shared": 7, "common": 5, "timeout": 600}


def test_help_shows_the_flags_of_the_script_first_and_those_for_clusters_last(script):
    code, output, errors = run(script, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith("Does something.\n")
    assert re.findall(r"^\S.*:$", output, re.MULTILINE) == [
        "Flags:",
        "Flags of common:",
        "Flags for several machines:",
    ]
    names = re.findall(r"^    --(?:\[no\])?(\w+)$", output, re.MULTILINE)
    assert set(names[:4]) == {"own", "verbose", "name", "shared"}
    assert names[4:] == ["common", "timeout"]


def test_help_shows_each_flag_with_its_text_and_default_but_no_bound(script):
    _, output, _ = run(script, "--help")
    assert "    --own\n        A number of the script. (default: 3)\n" in output
    assert "    --[no]verbose\n        Print more. (default: false)\n" in output
    assert re.search(
        r"    --name\n        A name.*\n(        .*\n)*        .*\(default: none\)\n", output
    )
    assert max(map(len, output.splitlines())) <= 100
    assert "2147483647" not in output


@pytest.mark.parametrize("option", ["-h", "-help", "--helpshort"])
def test_every_way_to_ask_for_help_gives_the_same_help(script, option):
    assert run(script, option) == run(script, "--help")


def test_the_full_help_also_lists_the_flags_of_libraries(script):
    assert "verbosity" not in run(script, "--help")[1]
    code, output, errors = run(script, "--helpfull")
    assert (code, errors) == (0, "")
    assert "--verbosity" in output
    assert "--own" in output


@pytest.mark.parametrize("option", ["--help", "--helpfull"])
def test_help_for_a_reader_that_exits_early_is_not_an_error(script, option):
    command = f"{sys.executable} {script} {option} | head -1; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(
        ["bash", "-c", command],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_the_recorded_flags_are_those_of_the_help(script):
    code, output, errors = run(script, "--own=4", "--verbose", "--timeout=5")
    assert (code, errors) == (0, "")
    assert json.loads(output) == DEFAULTS | {"own": 4, "verbose": True, "timeout": 5}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--unknown=1", "Unknown command line flag 'unknown'"),
        ("--foreign=1", "Unknown command line flag 'foreign'"),
        ("--own=none", "--own=none"),
        ("--own=13", "it must not be 13"),
        ("--common=13", "it must not be 13"),
        ("stray", "this argument is not a flag: 'stray'"),
    ],
)
def test_a_mistake_on_the_command_line_gives_a_usage_message(script, argument, message):
    code, output, errors = run(script, argument)
    assert (code, output) == (1, "")
    assert message in errors
    assert "--help" in errors.splitlines()[-1]
    assert "2147483647" not in errors
    assert "Traceback" not in errors


def test_flags_have_their_defaults_where_no_command_line_is_parsed(write_script):
    path = write_script("""
        import sys
        sys.argv = ["notebook", "--batch_size=3", "--unknown", "argument"]
        from absl import flags
        from support import command_line

        flags.DEFINE_integer("batch_size", 128, "Images.")
        print(flags.FLAGS.batch_size)
        """)
    assert run(path) == (0, "128\n", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], [1.0, 2.0]), (["--rate=1"], [1.0, 1.0]), (["--rate=3"], [3, 3])],
)
def test_a_flag_that_is_given_wins_over_a_constant_that_is_edited(
    write_script, arguments, expected
):
    path = write_script("""
        from absl import flags
        from support import command_line

        RATE = 1.0
        flags.DEFINE_float("rate", RATE, "A rate.")

        def main(argv):
            global RATE
            rates = [command_line.flag_or_constant("rate", RATE)]
            RATE = 2.0
            rates.append(command_line.flag_or_constant("rate", RATE))
            print(rates)

        command_line.run(main)
        """)
    code, output, errors = run(path, *arguments)
    assert (code, errors) == (0, "")
    assert json.loads(output) == expected


# --- The project's own scripts.


@pytest.mark.parametrize("script", COMMANDS)
def test_the_help_of_each_command_shows_its_own_flags_first_and_no_bounds(script):
    process = run_script(script, "--help")
    assert messages(process.stderr) == []
    headings = re.findall(r"^Flags.*:$", process.stdout, re.MULTILINE)
    assert headings[0] == "Flags:"
    is_last = headings[-1] == "Flags for several machines (TF_CONFIG):"
    assert is_last is (script == "cifar10_train.py")
    assert not re.search(r"2147483647|in the range|a number >", process.stdout)


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("cifar10_predict.py", "--eval_dir=x"),
        ("cifar10_multi_gpu_train.py", "--shard_data"),
        ("cifar10_convert.py", "--batch_size=3"),
    ],
)
def test_each_command_refuses_flags_of_other_commands(script, flag):
    process = run_script(script, flag, check=False)
    name = flag.partition("=")[0].lstrip("-")
    assert (process.returncode, process.stdout) == (1, "")
    assert f"Unknown command line flag '{name}'" in process.stderr


def test_a_second_interrupt_does_not_end_a_process_that_runs_no_script():
    code = """
import os, signal, time
from support.command_line import DeferredSignals
try:
    with DeferredSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        assert signals.signal_number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "interrupted\n", "")
