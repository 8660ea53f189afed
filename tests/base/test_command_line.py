"""Tests of how a script runs: flags, help, errors in one line, signals and exit codes."""

import json
import re
import shlex
import signal
import sys

import pytest
from conftest import ROOT, messages, run_file, run_in_shell, running_file

# --- How a script ends.


FAILS = """
    from support.base import command_line
    from support.base.errors import UserError

    def main(argv):
        {statement}

    if __name__ == "__main__":
        command_line.run(main)
    """


def test_an_error_that_the_user_can_fix_is_one_line_with_exit_code_1(write_script):
    path = write_script(FAILS.format(statement="raise UserError('the disk is full')"))
    assert run_file(path) == (1, "", "script.py: error: the disk is full\n")


def test_a_bug_has_a_traceback(write_script):
    statement = "raise BrokenPipeError('a socket')"  # not that of stdout
    code, output, errors = run_file(write_script(FAILS.format(statement=statement)))
    assert (code, output) == (1, "")
    assert "Traceback" in errors
    assert "BrokenPipeError: a socket" in errors


@pytest.mark.parametrize(
    "statement",
    ["while True: print('line', flush=True)", "print('line\\n' * 1_000_000)"],
    ids=["while it runs", "at its end"],
)
def test_a_reader_of_stdout_that_exits_early_ends_the_script_silently(write_script, statement):
    path = write_script(FAILS.format(statement=statement))
    command = f"{shlex.join([sys.executable, str(path)])} | head -1 > /dev/null"
    assert run_in_shell(f"{command}; exit ${{PIPESTATUS[0]}}") == (1, "", "")


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "USR1", "USR2", "XCPU"])
def test_a_signal_ends_a_script_with_its_exit_code_and_one_line(write_script, name):
    number = signal.Signals[f"SIG{name}"]
    statement = "import time; print('ready', flush=True); time.sleep(60)"
    with running_file(write_script(FAILS.format(statement=statement))) as process:
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (128 + number, "")
    assert errors == (
        f"script.py: stopped by {number.name}: nothing was lost; run the same command again\n"
    )


# --- Flags.


USES_FLAGS = '''
    """Does something."""

    import json
    from absl import flags
    from support.base import command_line, options
    import common

    options.DEFINE_integer("own", 3, "A number of the script.", None, 2**31 - 1)
    options.define("cluster")
    flags.DEFINE_boolean("verbose", False, "Print more.")
    flags.DEFINE_string("name", None, "A name." + " Some text." * 20)

    def main(argv):
        print(json.dumps(options.values()))

    command_line.run(main)
    '''


@pytest.fixture
def script(write_script):
    """A script that uses another module with flags."""
    write_script(
        """
        from absl import flags

        flags.DEFINE_integer("common", 5, "A number that all scripts use.")
        """,
        "common.py",
    )
    return write_script(USES_FLAGS)


CLUSTER = {"cluster_timeout_secs": 600, "shard_data": False}
DEFAULTS = {"own": 3, "verbose": False, "name": None, "common": 5, **CLUSTER}


def test_help_shows_the_flags_of_the_script_first_and_those_for_clusters_last(script):
    code, output, errors = run_file(script, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith("Does something.\n")
    assert re.findall(r"^\S.*:$", output, re.MULTILINE) == [
        "Flags:",
        "Flags of common:",
        "Flags for several machines (TF_CONFIG):",
    ]
    names = re.findall(r"^    --(?:\[no\])?(\w+)$", output, re.MULTILINE)
    assert names == ["own", "verbose", "name", "common", *CLUSTER]
    assert "    --own\n        A number of the script. (default: 3)\n" in output
    assert "    --[no]verbose\n        Print more. (default: false)\n" in output
    assert re.search(
        r"    --name\n        A name.*\n(        .*\n)*        .*\(default: none\)\n", output
    )
    assert max(map(len, output.splitlines())) <= 100
    assert "2147483647" not in output  # a bound
    assert run_file(script, "-h") == (code, output, errors)
    code, output, errors = run_file(script, "--helpfull")
    assert (code, errors) == (0, "")
    assert "--verbosity" in output
    assert "--own" in output


@pytest.mark.parametrize("option", ["--help", "--helpfull"])
def test_help_for_a_reader_that_exits_early_is_not_an_error(script, option):
    command = f"{shlex.join([sys.executable, str(script), option])} | head -1"
    code, _, errors = run_in_shell(f"{command}; exit ${{PIPESTATUS[0]}}")
    assert (code, errors) == (0, "")


def test_the_recorded_flags_are_those_of_the_help(script):
    code, output, errors = run_file(script, "--own=4", "--shard_data")
    assert (code, errors) == (0, "")
    assert json.loads(output) == DEFAULTS | {"own": 4, "shard_data": True}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--unknown=1", "Unknown command line flag 'unknown'"),
        ("--own=none", "--own=none"),
        ("stray", "this argument is not a flag: 'stray'"),
    ],
)
def test_a_mistake_on_the_command_line_gives_a_usage_message(script, argument, message):
    code, output, errors = run_file(script, argument)
    assert (code, output) == (1, "")
    first, last = errors.splitlines()
    assert first.startswith("script.py: error: ")
    assert message in first
    assert last == "Run script.py --help to list its flags."


# --- Several runs in one process, as in a notebook.


RUNS = """
    import contextlib, os, runpy, signal, sys

    def run_file(*arguments):
        sys.argv = [str(argument) for argument in arguments]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            print("exit code", end.code, flush=True)

    {statements}
    """


@pytest.fixture
def run_in_a_notebook(write_script):
    """Runs statements that call `run_file`, which does what IPython's `%run` does."""

    def run_statements(*statements):
        return run_file(
            write_script(RUNS.format(statements="\n    ".join(statements)), "notebook.py")
        )

    return run_statements


@pytest.fixture
def rate_script(write_script):
    """A script with two flags, as `rate.py`."""
    return write_script(
        """
        from absl import flags
        from support.base import command_line, options

        options.DEFINE_float("rate", 0.1, "A rate.", "[0, 9]")
        options.DEFINE_boolean("quiet", False, "Whether to be quiet.")

        def main(argv):
            rate = flags.FLAGS["rate"]
            print(rate.value, rate.present, rate.using_default_value, flags.FLAGS.quiet)
            flags.FLAGS.rate = 7.0

        if __name__ == "__main__":
            command_line.run(main)
        """,
        "rate.py",
    )


def test_a_run_has_its_own_command_line_and_keeps_the_values_of_its_caller(
    rate_script, run_in_a_notebook
):
    code, output, errors = run_in_a_notebook(
        "import rate",
        "rate.flags.FLAGS.rate = 3.0",
        "for arguments in (['--rate=0.5', '--quiet'], [], ['--rate=x'], ['--quiet']):",
        "    sys.argv = ['rate.py', *arguments]",
        "    with contextlib.suppress(SystemExit):",
        "        rate.command_line.run(rate.main)",
        "print(rate.flags.FLAGS.rate, rate.flags.FLAGS.quiet)",
    )
    assert (code, output.splitlines()) == (
        0,
        ["0.5 1 False True", "3.0 0 False False", "3.0 0 False True", "3.0 False"],
    )
    assert "rate=x" in errors


def test_a_script_can_be_run_again_imported_and_run_again(rate_script, run_in_a_notebook):
    path = rate_script
    code, output, errors = run_in_a_notebook(
        f"run_file({str(path)!r}, '--rate=0.5')",
        f"os.chdir({str(path.parent)!r})",
        "import importlib, rate",
        "run_file('rate.py', '--rate=0.25')",
        "importlib.reload(rate)",
        f"run_file({str(path)!r})",
    )
    assert (code, errors) == (0, "")
    assert [float(line.split()[0]) for line in output.splitlines()[::2]] == [0.5, 0.25, 0.1]
    assert output.splitlines()[1::2] == ["exit code 0"] * 3


def test_a_run_that_was_interrupted_leaves_nothing_behind(write_script, run_in_a_notebook):
    statement = "import os, time; os.kill(os.getpid(), 2); time.sleep(60)"
    path = write_script(FAILS.format(statement=statement))
    code, output, errors = run_in_a_notebook(
        "import threading",
        "def state():",
        "    handlers = [signal.getsignal(getattr(signal, f'SIG{n}')) for n in ('INT', 'HUP')]",
        "    return *handlers, threading.active_count(), sys.stdout, sys.stderr",
        "before = state()",
        "for _ in range(2):  # the second run does not remember the signal of the first",
        f"    run_file({str(path)!r})",
        "    assert state() == before",
    )
    assert (code, output) == (0, "exit code 130\n" * 2)
    assert errors.count("script.py: stopped by SIGINT: nothing was lost") == 2


@pytest.mark.parametrize("deferred", [True, False])
def test_a_second_interrupt_of_a_run_does_not_end_a_notebook(
    write_script, run_in_a_notebook, deferred
):
    context = "DeferredSignals()" if deferred else "contextlib.nullcontext()"
    path = write_script(
        f"""
        import contextlib, os, signal, time
        from support.base import command_line
        from support.base.signals import DeferredSignals

        def main(argv):
            with {context}:
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.2)
                finally:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.2)

        command_line.run(main)
        """
    )
    code, output, _ = run_in_a_notebook(
        "sys.ps1 = 'In : '  # as IPython and Jupyter set it",
        "try:",
        f"    run_file({str(path)!r})",
        "except KeyboardInterrupt:",
        "    print('interrupted')",
    )
    assert (code, output) == (0, "interrupted\n")


@pytest.mark.slow
def test_every_command_can_be_run_twice_in_one_process(run_in_a_notebook):
    commands = [str(path) for path in ROOT.glob("cifar10_*.py") if path.stem != "cifar10_input"]
    code, output, errors = run_in_a_notebook(
        f"for path in {commands!r} * 2:",
        "    run_file(path, '--help')",
    )
    assert (code, messages(errors)) == (0, [])
    assert output.count("exit code 0\n") == 2 * len(commands)
    assert output.count("    --train_dir\n") == 4  # in the help of both trainers
