"""Runs the main function of a script: help, errors in one line, signals and exit codes."""

import contextlib
import faulthandler
import io
import logging
import os
import signal
import sys
import textwrap

from absl import app, flags
from absl.logging import converter
from absl.testing import flagsaver

from support.base import options, streams
from support.base.errors import Interrupted, UserError
from support.base.messages import printable, report, shorten
from support.base.signals import StopSignals, running_script

FLAGS = flags.FLAGS

_HELP_WIDTH = 100  # columns


def run(main, takes_arguments=False):
    """Runs a script's `main(argv)` and exits.

    The exit code is 1 for an error that the user can fix (`UserError`) and for a mistake on the
    command line, and 128 plus the signal's number for a stop signal; see `StopSignals`. A message
    gives the reason. If stdout can no longer be written, the script ends, except within
    `streams.tolerate_lost_output`; without a message if the reader, such as `head`, has exited.

    At the end, all flags have the values that they had before, so the command line does not affect
    later runs in the same process.

    Args:
      main: function of the list of arguments that are not flags; the script's name comes first.
      takes_arguments: bool; whether arguments other than flags are allowed.
    """
    script = os.path.basename(sys.argv[0])
    asks_for_help = not {"--help", "-help", "--helpshort", "-h"}.isdisjoint(sys.argv[1:])
    code, advice = 1, ""
    app.define_help_flags()
    with streams.guarded() as stdout, flagsaver.flagsaver(), running_script():
        try:
            if asks_for_help:
                _print_help()
            else:
                _run_main(main, takes_arguments)
            sys.exit(0)
        except UserError as error:
            message = f"error: {error}"
        except app.UsageError as error:
            message, advice = f"error: {error}", f"Run {script} --help to list its flags."
        except Interrupted as interruption:
            code = 128 + interruption.signal_number
            name = signal.Signals(interruption.signal_number).name
            message = f"stopped by {name}: {interruption.message}"
        except OSError as error:
            if error is not stdout.error:
                raise
            if isinstance(error, BrokenPipeError):
                sys.exit(0 if asks_for_help else 1)
            message = f"error: cannot write to standard output: {error.strerror}"
        report(f"{script}: {message}")
        if advice:
            report(advice)
        sys.exit(code)


def _run_main(main, takes_arguments):
    """Parses the command line and calls `main`."""
    if "--helpfull" in sys.argv[1:]:
        app.usage(writeto_stdout=True, exitcode=0)  # absl itself would exit with 1
    try:
        argv = FLAGS(sys.argv)  # not `app.run`, which would make TensorFlow look for GPUs
    except flags.Error as error:
        raise app.UsageError(error) from error
    if FLAGS.only_check_args:
        return
    if len(argv) > 1 and not takes_arguments:
        raise app.UsageError(f"this argument is not a flag: {argv[1]!r}")
    with contextlib.suppress(io.UnsupportedOperation):  # a notebook's stderr
        faulthandler.enable()
    _configure_logging()
    with StopSignals() as signals:
        try:
            main(argv)
        except Exception as error:
            if signals.signal_number is None or isinstance(error, UserError):
                raise
            # Code in C++ that calls Python may turn `Interrupted` into other errors.
            raise Interrupted(signals.signal_number) from error
    sys.stdout.flush()


def _configure_logging():
    """Sets the level of TensorFlow's log, WARNING unless --verbosity is given; escapes messages."""
    is_given = FLAGS["verbosity"].present
    level = converter.absl_to_standard(FLAGS.verbosity) if is_given else logging.WARNING
    logger = logging.getLogger("tensorflow")
    logger.setLevel(level)
    logger.addFilter(_make_printable)


def _make_printable(record):
    """Escapes the message of a log record. This is a filter that lets all records pass."""
    lines = record.getMessage().split("\n")
    record.msg, record.args = shorten("\n".join(map(printable, lines))), None
    return True


def _print_help():
    """Prints what the script does, and its flags in the order in which they are defined."""
    print(sys.modules["__main__"].__doc__ or "")
    for heading, section in options.sections():
        if section:
            print(f"{heading}:\n")
            print("\n".join(map(_format_flag, section)), end="\n\n")
    print("--helpfull also lists the flags of libraries.", flush=True)


def _format_flag(flag):
    """Returns a flag's entry in the help: its name, then its wrapped description and value."""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    value = str(flag.value).lower() if flag.boolean or flag.value is None else flag.value
    text = f"{flag.help} (default: {value})"
    indent = " " * 8
    lines = textwrap.wrap(text, _HELP_WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([f"    {name}", *lines])
