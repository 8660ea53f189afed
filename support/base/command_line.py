"""Runs the main function of a script: flags, errors in one line, signals and exit codes.

Importing this module marks the flags as parsed, so that they have their defaults wherever no
command line is parsed, as in a notebook. It does not import TensorFlow.
"""

import contextlib
import logging
import os
import pathlib
import re
import signal
import sys
import textwrap

from absl import app, flags
from absl.logging import converter

from support.base import streams
from support.base.errors import Interrupted, UserError
from support.base.signals import StopSignals, running_script

FLAGS = flags.FLAGS
FLAGS.mark_as_parsed()

_HELP_WIDTH = 100  # columns


class PathFlag(flags.Flag):
    """A flag whose value is the path of a local file or folder.

    `~` and `~user` at the beginning are expanded, and other file systems such as `gs://` are
    refused, whether the value comes from the command line or from `FLAGS.name = value`. Pass it to
    `flags.DEFINE_flag`.

    Args:
      name: string.
      default: string or None.
      help_string: string.
      url_schemes: tuple of strings, such as "https"; URLs with these schemes are values as well.
      is_for_tensorflow: bool; refuse a path whose bytes are not its UTF-8, because TensorFlow would
        open another path.
    """

    def __init__(self, name, default, help_string, url_schemes=(), is_for_tensorflow=True):
        self._url_schemes = url_schemes
        self._is_for_tensorflow = is_for_tensorflow
        parser, serializer = flags.ArgumentParser(), flags.ArgumentSerializer()
        super().__init__(parser, serializer, name, default, help_string)

    @property
    def value(self):
        """The path as a string, or None."""
        return self._value

    @value.setter
    def value(self, value):
        self._value = None if value is None else self._expand(os.fsdecode(value))

    def _expand(self, path):
        # At least two letters, because C:/ is a drive of Windows. pathlib removes the second slash.
        scheme = re.match("([a-z][a-z0-9+.-]+):/", path, re.IGNORECASE)
        if scheme and scheme[1].lower() in self._url_schemes:
            return path
        expanded = os.path.expanduser(path)
        problem = ""
        if scheme:
            urls = ", ".join(f"{name}://" for name in self._url_schemes)
            problem = f"only local paths {f'and {urls} URLs ' if urls else ''}are supported"
        elif expanded.startswith("~"):
            problem = f"there is no home folder for {path.partition('/')[0]}"
        elif self._is_for_tensorflow and not _is_utf_8(os.path.abspath(expanded)):
            raise flags.IllegalFlagValueError(
                f"flag --{self.name}={expanded!a}: TensorFlow needs a path in UTF-8, and a locale "
                "that uses UTF-8"
            )
        if problem:
            raise flags.IllegalFlagValueError(
                f"flag --{self.name}={path}: {problem}; write ./{path} if it is a local path"
            )
        return expanded


def _is_utf_8(path):
    try:
        return os.fsencode(path) == path.encode()
    except UnicodeEncodeError:
        return False


def forget_flags_of(path):
    """Removes the flags that a file has defined, so that it can define them again.

    A notebook can run a script twice, or run it and import it. Without this, absl would raise
    DuplicateFlagError. The file is recognized by its name, because absl knows the flags of an
    imported module by the module's name, and those of a script by the path in `sys.argv`.

    Args:
      path: string; the `__file__` of the file that is about to define its flags.
    """
    stem = pathlib.Path(path).stem
    for module, module_flags in FLAGS.flags_by_module_dict().items():
        if os.path.basename(module).removesuffix(".py") == stem:
            for flag in list(module_flags):
                delattr(FLAGS, flag.name)


def check_flags(names, is_valid, rule):
    """Registers the same validator for several flags.

    Args:
      names: list of strings.
      is_valid: function from a flag's value to bool.
      rule: string; the message for an invalid value.
    """
    for name in names:
        flags.register_validator(name, is_valid, rule)


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
    (SIGINT), SIGTERM and SIGHUP end the script with exit codes 130, 143 and 129 after a line that
    says how to resume. A second SIGINT or SIGTERM ends it at once, but not in a notebook.

    If stdout can no longer be written, the script ends, except within `streams.dispensable`. It
    ends silently if the reader of stdout, for example `head`, has exited.

    A run begins with the flags of its own command line, and has no effect on later runs in the same
    process: at its end, all flags have the values that they had before.

    Args:
      main: function of the list of arguments that are not flags; the script's name comes first.
      takes_arguments: bool; whether arguments other than flags are allowed.
      last_flags: (heading, names of flags) to show at the end of the help.
    """

    def guarded_main(argv):
        script = os.path.basename(argv[0])
        try:
            _refuse_flags_of_other_scripts(last_flags)
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

    with streams.guarded() as stdout, _restored_flags(), running_script():
        if not {"--help", "-help", "--helpshort", "-h"}.isdisjoint(sys.argv[1:]):
            try:
                _print_help(last_flags)
            except BrokenPipeError:
                pass  # for example of `head`, which has read enough
            except OSError as error:
                _explain_lost_stdout(os.path.basename(sys.argv[0]), error)
                raise SystemExit(1) from None
            raise SystemExit(0)
        try:
            app.run(guarded_main)
        except SystemExit:
            if "--helpfull" in sys.argv[1:]:  # absl exits with 1 although it printed the help
                raise SystemExit(0) from None
            raise


def _explain_lost_stdout(script, error):
    if not isinstance(error, BrokenPipeError):  # silent if, for example, `head` has exited
        reason = f"cannot write to standard output: {error.strerror}"
        print(f"{script}: error: {reason}", file=sys.stderr)


@contextlib.contextmanager
def _restored_flags():
    """Restores the values of all flags at the end."""
    before = {}
    for name in FLAGS:
        flag = FLAGS[name]
        before[name] = flag.value, flag.using_default_value, flag.present
    try:
        yield
    finally:
        for name in FLAGS:
            flag = FLAGS[name]
            unset = flag.default, True, 0  # for flags that the run has defined
            flag.value, flag.using_default_value, flag.present = before.get(name, unset)


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
        if module not in shown_modules and module in sys.modules and _is_ours(module):
            sections.append((f"Flags of {module}", module_flags))
    heading, last = last_flags
    sections = [
        (title, [flag for flag in section if flag.name not in last]) for title, section in sections
    ]
    return [*sections, (heading, [FLAGS[name] for name in last])]


def _is_ours(module):
    """Returns whether a file is in the project's folder or in the running script's.

    Args:
      module: string; the name of a module, or the path of a script that ran earlier.
    """
    path = getattr(sys.modules.get(module), "__file__", None) or module
    project = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
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
