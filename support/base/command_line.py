"""Runs the main function of a script: help, errors in one line, signals and exit codes."""

import ast
import contextlib
import faulthandler
import inspect
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
from support.base.signals import StopSignals, running_script

FLAGS = flags.FLAGS

_HELP_WIDTH = 100  # columns


def run(main, takes_arguments=False):
    """Runs a script's `main(argv)` and exits.

    An error that the user can fix (`UserError`) is printed on one line, with exit code 1. Unknown
    flags, invalid values and stray arguments print a usage message, with exit code 1. Ctrl-C
    (SIGINT), SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU end the script with exit code 128 plus
    the signal's number, after a line that says how to resume. A second SIGINT or SIGTERM ends it at
    once, but not in a notebook.

    If stdout can no longer be written, the script ends, except within
    `streams.tolerate_lost_output`. It ends silently if the reader of stdout, for example `head`,
    has exited.

    The flags of a command line have no effect on later runs in the same process: at the end of a
    run, all flags have the values that they had before.

    Args:
      main: function of the list of arguments that are not flags; the script's name comes first.
      takes_arguments: bool; whether arguments other than flags are allowed.
    """

    def guarded_main(argv):
        script = os.path.basename(argv[0])
        try:
            if len(argv) > 1 and not takes_arguments:
                raise app.UsageError(f"this argument is not a flag: {argv[1]!r}")
            with _configured_logging(), StopSignals(_interrupt):
                main(argv)
            sys.stdout.flush()
        except UserError as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            return 1
        except app.UsageError as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            print(f"Run {script} --help to list its flags.", file=sys.stderr)
            return 1
        except Interrupted as interruption:
            name = signal.Signals(interruption.signal_number).name
            print(f"{script}: stopped by {name}: {interruption.message}", file=sys.stderr)
            return 128 + interruption.signal_number
        except OSError as error:
            if error is not stdout.error:
                raise
            _explain_lost_stdout(script, error)
            return 1
        return 0

    app.define_help_flags()
    with streams.guarded() as stdout, flagsaver.flagsaver(), running_script():
        if not {"--help", "-help", "--helpshort", "-h"}.isdisjoint(sys.argv[1:]):
            try:
                _print_help()
            except BrokenPipeError:
                pass  # for example of `head`, which has read enough
            except OSError as error:
                _explain_lost_stdout(os.path.basename(sys.argv[0]), error)
                raise SystemExit(1) from None
            raise SystemExit(0)
        try:
            # Not `app.run`, which would make TensorFlow look for GPUs.
            argv = app.parse_flags_with_usage(sys.argv)
            if FLAGS.only_check_args:
                sys.exit(0)
            with contextlib.suppress(io.UnsupportedOperation):  # a notebook's stderr
                faulthandler.enable()
            sys.exit(guarded_main(argv))
        except SystemExit:
            if "--helpfull" in sys.argv[1:]:  # absl exits with 1 although it printed the help
                raise SystemExit(0) from None
            raise


def _explain_lost_stdout(script, error):
    if not isinstance(error, BrokenPipeError):  # silent if, for example, `head` has exited
        reason = f"cannot write to standard output: {error.strerror}"
        print(f"{script}: error: {reason}", file=sys.stderr)


@contextlib.contextmanager
def _configured_logging():
    """Makes TensorFlow log each message once: from WARNING on, or from --verbosity if given."""
    logger = logging.getLogger("tensorflow")
    before = logger.level, logger.propagate
    logger.propagate = False  # it has a handler of its own; absl's would print the message again
    is_given = FLAGS["verbosity"].present
    logger.setLevel(converter.absl_to_standard(FLAGS.verbosity) if is_given else logging.WARNING)
    try:
        yield
    finally:
        level, logger.propagate = before
        logger.setLevel(level)


def _interrupt(number):
    raise Interrupted(number)


def _print_help():
    """Prints what the script does, and its flags in the order in which they are defined."""
    script = sys.modules["__main__"]
    text = script.__doc__
    if sys.flags.optimize > 1:  # `python -OO` has removed it
        text = ast.get_docstring(ast.parse(inspect.getsource(script)), clean=False)
    print(text or "")
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
