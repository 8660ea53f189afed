"""What every script stands on: TensorFlow 1 graph mode, kept quiet, and one way to run a `main`.

The other modules write `from cifar10_runtime import tf`; that `tf` is `tensorflow.compat.v1`.
"""

import contextlib
import datetime
import functools
import gc
import json
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from absl import app, flags
from absl.logging import converter

from cifar10_data import DataError

# TensorFlow's C++ side reads this once, when it is loaded: 1 leaves out what is below a warning.
# Whoever sets it to 0 sees everything: then nothing is held back here either. In a cluster, what is
# below an error is left out, as each step warns of the remote operations that it has cleaned up.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if os.environ.get("TF_CONFIG") else "1")
_QUIET = os.environ["TF_CPP_MIN_LOG_LEVEL"] != "0"

FLAGS = flags.FLAGS


class UserError(RuntimeError):
    """A script cannot go on, and its user can mend it: the message says how, in one line."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM has asked the script to end.

    Attributes:
      signal_number: int.
      message: string; what was saved, and how to go on.
    """

    def __init__(self, signal_number, message="nothing is lost; the same command starts again"):
        super().__init__(message)
        self.signal_number = signal_number
        self.message = message


class _StopRequest:
    """Whether SIGINT or SIGTERM has come, and what to do then.

    Python runs a signal's handler only between two instructions of its own, and a call into
    TensorFlow can take minutes. So a thread listens as well: it knows at once that a signal has
    come, and it ends the process at the second one, whatever the main thread is doing.
    """

    def __init__(self):
        self._signal_number = None
        self._is_deferred = False

    @property
    def signal_number(self):
        """The number of the signal that has come; None if none has."""
        return self._signal_number

    def raise_if_made(self):
        """Raises `Interrupted` if a signal has come, and its handler could not do so."""
        if self._signal_number is not None:
            raise Interrupted(self._signal_number)

    def listen(self):
        """Takes over SIGINT and SIGTERM, for as long as the process lives."""
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        self._sockets = receiver, sender  # they close when they are no longer referred to
        threading.Thread(target=self._receive, args=(receiver,), daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            # What started us may want us to ignore it, as a shell does in `script &`.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _receive(self, receiver):
        count = 0
        while received := receiver.recv(1):
            if received[0] in (signal.SIGINT, signal.SIGTERM):
                self._signal_number = received[0]
                count += 1
                if count == 2:
                    os._exit(128 + received[0])

    def _handle(self, number, frame):
        if not self._is_deferred:
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self):
        """Returns a context in which a signal interrupts nothing; ask for `signal_number`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False


STOP_REQUEST = _StopRequest()


@contextlib.contextmanager
def _stderr_without(is_noise):
    """Holds back what is written to stderr meanwhile, then lets out all lines but the noise.

    The C++ side writes to the file descriptor, so replacing `sys.stderr` would hold back nothing.

    Args:
      is_noise: takes the lines (a list of bytes) and the number of one; tells whether to drop it.
    """
    try:
        stderr = os.dup(2) if _QUIET else None
    except OSError:  # it is closed: nobody can hear the noise
        stderr = None
    if stderr is None:
        yield
        return
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            lines = held.readlines()
            for number, line in enumerate(lines):
                if not is_noise(lines, number):
                    os.write(2, line)


def _is_start_up_notice(lines, number):
    """Knows the notices of TensorFlow 2.21 that no variable turns off, and their preamble."""
    line = lines[number]
    if line.startswith((b"I0000 ", b"WARNING: All log messages before absl::InitializeLog()")):
        return True
    # An error only where there is a driver: without one it is how a CPU machine starts.
    no_driver = any(b"Could not find cuda drivers" in notice for notice in lines)
    return no_driver and b"failed call to cuInit" in line


def _is_cancellation(lines, number):
    """Knows the warning, of two lines, that each blocked queue thread prints when it is ended."""
    cancelled = b"Local rendezvous is aborting with status: CANCELLED"
    return cancelled in lines[number] or (
        number > 0 and cancelled in lines[number - 1] and b"{{node " in lines[number]
    )


class _SharedContext:
    """A context that several threads may be in: it begins with the first and ends with the last."""

    def __init__(self, make_context):
        self._make_context = make_context
        self._lock = threading.Lock()
        self._count = 0

    @contextlib.contextmanager
    def enter(self):
        with self._lock:
            if self._count == 0:
                self._context = self._make_context()
                self._context.__enter__()
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    self._context.__exit__(None, None, None)


_CANCELLATION = _SharedContext(lambda: _stderr_without(_is_cancellation))


def quiet_cancellation():
    """Returns a context in which to stop queue threads: cancelling them prints no warning."""
    return _CANCELLATION.enter()


def _is_wanted(record):
    """Drops the advice to leave queues for tf.data, unless info messages are asked for."""
    is_advice = "is deprecated and will be removed" in str(record.msg)
    return not is_advice or tf.get_logger().isEnabledFor(logging.INFO)


# Importing makes half a million objects that stay. The garbage collector would look through them
# again and again, now, while a graph is built, and at the end: half a second of every script.
gc.disable()
try:
    with _stderr_without(_is_start_up_notice):
        import tensorflow.compat.v1 as tf

        # The first look at the devices is what calls cuInit. It takes no GPU memory.
        GPUS = tf.config.list_physical_devices("GPU")
except KeyboardInterrupt:  # it takes seconds, and nothing has begun that could be told of
    raise SystemExit(128 + signal.SIGINT) from None
gc.freeze()
gc.enable()

tf.get_logger().addFilter(_is_wanted)

# Sessions, queues and readers exist in graph mode only. The rest of TensorFlow 2's behaviour, its
# resource variables among it, stays: their reads and writes happen in the order that control
# dependencies say.
tf.disable_eager_execution()

# Flags hold their defaults until a script parses its command line; without this, reading one
# (from a notebook, a test) would be an error, or parse a command line that is not ours.
FLAGS.mark_as_parsed()


def format_now():
    """Returns the local time as the printed lines begin with it: `2015-11-04 11:45:45.927302`."""
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S.%f}"


def check_flags(names, is_valid, rule):
    """Has the values of flags refused unless `is_valid(value)`; `rule` tells what they must be."""
    for name in names:
        flags.register_validator(name, is_valid, rule)


def check_new_folder(flag, folder):
    """Raises UserError where a folder to make is there, unless it is empty; `flag` named it."""
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UserError(f"{flag}={folder} is there already; name a new folder")


def append_json_line(path, value):
    """Adds a dict and the time (seconds since 1970) to a file with one JSON object a line."""
    with open(path, "a") as file:
        file.write(json.dumps({"time": time.time(), **value}) + "\n")


def describe_software_and_hardware():
    """Returns the versions of Python, TensorFlow and the project, the processor and the GPUs."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        commit = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        commit = None
    return {
        "python": platform.python_version(),
        "tensorflow": tf.version.VERSION,
        "commit": commit,
        "processor": find_processor_name(),
        "processors": os.cpu_count(),
        "gpus": [tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in GPUS],
    }


def find_processor_name(cpuinfo="/proc/cpuinfo"):
    """Returns the processor's name as Linux has it, or what Python can tell elsewhere."""
    try:
        with open(cpuinfo) as file:
            names = re.findall(r"^model name\s*: (.*)", file.read(), re.MULTILINE)
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor()


def find_reason(error):
    """Returns the line of an exception's text that says why; TensorFlow's have dozens of others."""
    match = re.search(r"^Node: .*\n(.+)", str(error), re.MULTILINE)
    return match[1] if match else (str(error).splitlines() or [repr(error)])[0]


def is_histogram_of_nonfinite(error):
    """Tells whether an error is that of a histogram summary that met an infinity or a NaN."""
    met = re.search(r"(Nan|Infinity) in (summary )?histogram for", str(error), re.IGNORECASE)
    return isinstance(error, tf.errors.InvalidArgumentError) and met is not None


def find_latest_checkpoint(folder):
    """Returns the path of the newest checkpoint in a folder; None where that cannot be told."""
    gone = None
    while True:
        try:
            state = tf.train.get_checkpoint_state(folder)
        except ValueError:  # the file that names it is not even text
            return None
        path = state.model_checkpoint_path if state else None
        if not path or path == gone:
            return None
        if tf.train.checkpoint_exists(path):
            return path
        gone = path  # a trainer may have written a newer one, and removed it, since it was named


def explain_missing_checkpoint(folder):
    """Returns why `find_latest_checkpoint` finds none, where there is more to it than that."""
    if tf.gfile.Exists(os.path.join(folder, "checkpoint")):
        return f"the file `checkpoint` in {folder} is unreadable or names a checkpoint that is gone"
    return None


def find_differences(checkpoint, variables):
    """Compares a checkpoint with variables.

    Args:
      checkpoint: path.
      variables: dict of `tf.Variable` by the name that it has in checkpoints.

    Returns:
      string; what differs, the first few with their names; empty where everything fits.

    Raises:
      tf.errors.OpError or ValueError: the checkpoint cannot be read.
    """
    shapes = dict(tf.train.list_variables(checkpoint))
    differences = []
    for name, variable in variables.items():
        shape = variable.shape.as_list()
        if name not in shapes:
            differences.append(f"{name} is missing")
        elif shapes[name] != shape:
            differences.append(f"{name} is {shapes[name]}, not {shape}")
    shown = differences[:5]
    if len(differences) > len(shown):
        shown.append(f"and {len(differences) - len(shown)} more differ")
    return ", ".join(shown)


def read_global_step(checkpoint):
    """Returns the global step of a checkpoint. Raises UserError where it cannot be read."""
    try:
        return int(tf.train.load_checkpoint(checkpoint).get_tensor(tf.GraphKeys.GLOBAL_STEP))
    # TensorFlow's reader turns statuses into exceptions of Python's own, of several kinds.
    except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{checkpoint} cannot be read: {find_reason(error)}") from error


def run(main, takes_arguments=False):
    """Runs a script's `main()`: parses flags strictly, and tells errors in one line.

    With `takes_arguments`, what is not a flag is given to `main` as a list.

    Unknown flags, bad values and stray arguments end the script with a usage message and exit
    code 1; so does an error that the user can mend (`UserError`, `DataError`), without a traceback.
    Ctrl-C (SIGINT) and SIGTERM end it with exit code 130 and 143, and a last line that says how to
    go on; a second one ends it at once.
    """

    def checked_main(arguments):
        if len(arguments) > 1 and not takes_arguments:
            raise app.UsageError(f"this argument is not a flag: {arguments[1]!r}")
        # TensorFlow's messages have a handler of their own; absl's would print them once more.
        tf.get_logger().propagate = False
        given = FLAGS["verbosity"].present
        tf.logging.set_verbosity(
            converter.absl_to_standard(FLAGS.verbosity) if given else tf.logging.WARN
        )
        script = os.path.basename(arguments[0])
        STOP_REQUEST.listen()
        try:
            main(*[arguments[1:]] if takes_arguments else [])
        except (DataError, UserError) as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            return 1
        except Interrupted as interruption:
            name = signal.Signals(interruption.signal_number).name
            print(f"{script}: ended by {name}: {interruption.message}", file=sys.stderr)
            return 128 + interruption.signal_number
        except BrokenPipeError:
            # Whoever read stdout, such as `head`, has left.
            _discard_stdout()
            return 1
        except OSError as error:  # such as a full disk
            print(f"{script}: error: {error}", file=sys.stderr)
            return 1
        return 0

    if not {"--help", "-help", "--helpshort", "-h"}.isdisjoint(sys.argv[1:]):
        try:
            _print_help()
        except BrokenPipeError:  # `head` and `less` may leave early
            _discard_stdout()
        raise SystemExit(0)
    try:
        app.run(checked_main)
    except SystemExit:
        # absl ends with 1 where help was asked for, and given.
        if "--helpfull" in sys.argv[1:]:
            raise SystemExit(0) from None
        raise


def _discard_stdout():
    """Points stdout nowhere: Python would complain of a closed pipe when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def list_modules_with_flags():
    """Returns the names of the project's modules that define flags, the script's first."""
    modules = reversed(FLAGS.flags_by_module_dict())  # a module comes after those that it imports
    return [name for name in modules if _is_ours(name)]


def _is_ours(name):
    if name == sys.argv[0]:  # the script's module has the name that it was called by
        return True
    path = getattr(sys.modules.get(name), "__file__", None) or ""
    here, of_script = os.path.abspath(__file__), os.path.abspath(sys.argv[0])
    return os.path.dirname(os.path.abspath(path)) in map(os.path.dirname, (here, of_script))


def _print_help():
    """Prints what the script does, and its flags under the modules that own them."""
    print(sys.modules["__main__"].__doc__)
    for name in list_modules_with_flags():
        print(FLAGS.module_help(name).strip("\n"), end="\n\n")
    print("Try --helpfull for the flags of libraries too.", flush=True)


def end_at_once(message):
    """Ends the script with an error as `run` tells it, from any thread, without tidying up."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def has_fast_bfloat16(cpuinfo="/proc/cpuinfo"):
    """Tells whether the processor computes in bfloat16 itself; True where that is not known.

    Args:
      cpuinfo: the path of Linux's description of the processor.
    """
    try:
        with open(cpuinfo) as file:
            words = set(file.read().split())
    except OSError:  # not Linux
        return True
    return not words.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})  # x86's names, and Arm's


@functools.cache  # once is enough
def _warn_of_slow_bfloat16():
    if not has_fast_bfloat16():
        tf.logging.warning(
            "--use_fp16: this processor has no instructions for bfloat16; to emulate them takes "
            "longer than float32 does."
        )


def session_config(use_fp16=False, log_device_placement=False):
    """Returns the `tf.ConfigProto` that all sessions of the project use.

    GPU memory is taken as it is needed, so that evaluation runs beside training on one GPU; an op
    whose device does not exist runs on one that does.

    Args:
      use_fp16: bool; 16-bit arithmetic by TensorFlow's graph rewriting, with variables and
        checkpoints in float32. On GPUs the type is float16, on CPUs bfloat16.
      log_device_placement: bool; print the device of every op.
    """
    config = tf.ConfigProto(allow_soft_placement=True, log_device_placement=log_device_placement)
    config.gpu_options.allow_growth = True
    if use_fp16:
        options = config.graph_options.rewrite_options
        if GPUS:
            options.auto_mixed_precision = options.ON
        else:
            options.auto_mixed_precision_onednn_bfloat16 = options.ON
            _warn_of_slow_bfloat16()
    return config
