"""Runs the main function of a script: flags, errors in one line, signals and exit codes.

Importing this module marks the flags as parsed, so that they have their defaults wherever no
command line is parsed, as in a notebook. It does not import TensorFlow.
"""

import gc
import logging
import os
import signal
import socket
import sys
import textwrap
import threading

from absl import app, flags
from absl.logging import converter

from support.errors import Interrupted, UserError

FLAGS = flags.FLAGS
FLAGS.mark_as_parsed()

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HELP_WIDTH = 100  # columns

_runs_script = False  # whether `run` has been called, so that the process may be ended


def check_flags(names, is_valid, rule):
    """Registers the same validator for several flags.

    Args:
      names: list of strings.
      is_valid: function from a flag's value to bool.
      rule: string; the message for an invalid value.
    """
    for name in names:
        flags.register_validator(name, is_valid, rule)


def check_path_flags(names):
    """Registers a validator for flags that hold paths: TensorFlow takes only those in UTF-8.

    Python represents other bytes in a path by surrogates, which cannot be encoded.
    """

    def is_unicode(path):
        return not any("\ud800" <= character <= "\udfff" for character in path or "")

    check_flags(names, is_unicode, "TensorFlow needs a path in UTF-8")


def flag_or_constant(name, constant):
    """Returns the value of a flag if one was given, otherwise a constant.

    The default of such a flag is a constant in a script. The constant may change after the flag is
    defined, for example in a notebook; the flag then still has the old default.
    """
    flag = FLAGS[name]
    return constant if flag.using_default_value else flag.value


def flag_values(last_flags=("", ())):
    """Returns the values of all flags that the running script's help shows: dict by name."""
    sections = _help_sections(last_flags)
    return {flag.name: flag.value for _, section in sections for flag in section}


def run(main, takes_arguments=False, last_flags=("", ())):
    """Runs a script's `main(argv)` and exits.

    An error that the user can fix (`UserError`) is printed on one line, with exit code 1. Unknown
    flags, invalid values and stray arguments print a usage message, with exit code 1. Ctrl-C
    (SIGINT) and SIGTERM end the script with exit codes 130 and 143 after a line that says how to
    resume. A second signal ends it at once.

    Args:
      main: function of the list of arguments that are not flags; the script's name comes first.
      takes_arguments: bool; whether arguments other than flags are allowed.
      last_flags: (heading, names of flags) to show at the end of the help.
    """

    def guarded_main(argv):
        global _runs_script
        _runs_script = True
        script = os.path.basename(argv[0])
        try:
            _refuse_flags_of_other_scripts(last_flags)
            if len(argv) > 1 and not takes_arguments:
                raise app.UsageError(f"this argument is not a flag: {argv[1]!r}")
            _configure_logging()
            # The objects that imports have created stay alive. The garbage collector need not
            # traverse them again and again: that would take half a second of every script.
            gc.freeze()
            with _StopSignals(_interrupt):
                main(argv)
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
        except BrokenPipeError:  # the reader of stdout, for example `head`, has exited
            _discard_stdout()
            return 1
        except OSError as error:  # for example a full disk
            print(f"{script}: error: {error}", file=sys.stderr)
            return 1
        return 0

    if not {"--help", "-help", "--helpshort", "-h"}.isdisjoint(sys.argv[1:]):
        try:
            _print_help(last_flags)
        except BrokenPipeError:
            _discard_stdout()
        raise SystemExit(0)
    try:
        app.run(guarded_main)
    except SystemExit:
        if "--helpfull" in sys.argv[1:]:  # absl exits with 1 although it printed the help
            raise SystemExit(0) from None
        raise


def _configure_logging():
    """Makes TensorFlow log each message once: from WARNING on, or from --verbosity if given."""
    logger = logging.getLogger("tensorflow")
    logger.propagate = False  # it has a handler of its own; absl's would print the message again
    is_given = FLAGS["verbosity"].present
    logger.setLevel(converter.absl_to_standard(FLAGS.verbosity) if is_given else logging.WARNING)


def _discard_stdout():
    """Redirects stdout to the null device; Python would fail to flush it to the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _StopSignals:
    """A context in which SIGINT and SIGTERM call a handler; a second one ends a script at once.

    Python runs signal handlers only in the main thread and only between two of its instructions,
    but a call into TensorFlow can take minutes. So a thread is notified of the signals as well.

    A signal that is ignored, as in `nohup` or a shell's background job, stays ignored. Outside the
    main thread, where Python allows no signal handlers, the context has no effect.

    Args:
      handler: function of a signal's number and a stack frame, as for `signal.signal`.

    Attributes:
      signal_number: int; the number of the signal that arrived, or None.
    """

    def __init__(self, handler):
        self.signal_number = None
        self._handler = handler

    def __enter__(self):
        self._previous = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handler)
        return self

    def __exit__(self, *exception):
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        self._sender.close()  # ends the thread
        self._thread.join()
        self._receiver.close()

    def _receive(self):
        while received := self._receiver.recv(1):
            number = received[0]
            if number in _STOP_SIGNALS:
                if self.signal_number is not None and _runs_script:
                    os._exit(128 + number)
                self.signal_number = self.signal_number or number


class DeferredSignals(_StopSignals):
    """A context in which the first SIGINT or SIGTERM interrupts nothing.

    The program polls `signal_number`. A second signal ends a script at once. In a process that does
    more than run a script, for example a notebook's kernel, it raises KeyboardInterrupt.
    """

    def __init__(self):
        super().__init__(self._defer)
        self._count = 0

    def _defer(self, number, frame):
        self._count += 1
        if self._count > 1 and not _runs_script:
            raise KeyboardInterrupt


def _interrupt(number, frame):
    raise Interrupted(number)


def _help_sections(last_flags=("", ())):
    """Returns the flags of the running script as its help shows them: list of (heading, flags).

    First come the script's own flags and those that it declares as its key flags, then the flags of
    the project's other modules, then `last_flags`. If the script declares some of a module's flags
    as key flags, the module's other flags are not shown.
    """
    key_flags = FLAGS.get_key_flags_for_module(sys.argv[0])
    shown_modules = {FLAGS.find_module_defining_flag(flag.name) for flag in key_flags}
    sections = [("Flags", key_flags)]
    # A module is registered after the modules that it imports.
    for module, module_flags in reversed(FLAGS.flags_by_module_dict().items()):
        if module not in shown_modules and _is_ours(module):
            sections.append((f"Flags of {module}", module_flags))
    heading, last = last_flags
    sections = [
        (title, [flag for flag in section if flag.name not in last]) for title, section in sections
    ]
    return [*sections, (heading, [FLAGS[name] for name in last])]


def _is_ours(module):
    """Returns whether a module is in the project's folder or in the running script's."""
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    project = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script_folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    return os.path.dirname(os.path.abspath(path)) in (project, script_folder)


def _print_help(last_flags):
    """Prints what the script does, and its flags in the order in which they are defined."""
    print(sys.modules["__main__"].__doc__)
    for heading, section in _help_sections(last_flags):
        if section:
            print(f"{heading}:\n")
            print("\n".join(map(_format_flag, section)), end="\n\n")
    print("--helpfull also lists the flags of libraries.", flush=True)


def _format_flag(flag):
    """Returns a flag's entry in the help: its name, then its wrapped description and default."""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default = "none" if flag.default is None else flag.default_as_str.strip("'")
    text = f"{flag.help} (default: {default})"
    indent = " " * 8
    lines = textwrap.wrap(text, _HELP_WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([f"    {name}", *lines])


def _refuse_flags_of_other_scripts(last_flags):
    """Raises UsageError if the command line has a flag that the script's help does not show.

    Importing another script defines all of its flags, which would be accepted without any effect.
    """
    shown = {flag.name for _, section in _help_sections(last_flags) for flag in section}
    for module, module_flags in FLAGS.flags_by_module_dict().items():
        for flag in module_flags if _is_ours(module) else []:
            if flag.present and flag.name not in shown:
                raise app.UsageError(f"Unknown command line flag '{flag.name}'")
