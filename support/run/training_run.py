"""A training run: its folder, the step from which it resumes, its graph and its session."""

import contextlib
import json
import os
import pathlib
import platform
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from support.base import files, streams
from support.base.errors import Interrupted, UserError, first_line, foreign_file
from support.base.messages import mask_secrets, mask_url, report
from support.base.signals import DeferredSignals
from support.base.worker import ALONE
from support.data import records
from support.data.settings import find_changes
from support.ops import graph_notes, summaries, tensorflow_v1
from support.ops.tensorflow_v1 import (
    is_nonfinite_histogram,
    out_of_memory_explained,
    session_config,
    tf,
)
from support.run import checkpoints
from support.run.hooks import CheckpointHook, FillingHook, ProgressHook, StopHook, SummaryHook

LOCK_FILE = ".trainer.lock"
MAX_RUN_FILE_BYTES = 100_000_000
RUN_FILE = "run.json"  # in train_dir: one entry for each start of the training

# Seconds for the input's threads to stop. With `hooks.STEP_GRACE` and a save, they add up to less
# than half a minute.
_CLOSING_GRACE = 6.0


class Options(NamedTuple):
    """The options of a run. Except for the last three, they are the flags of the same names."""

    train_dir: str
    max_steps: int
    log_frequency: int = 10
    save_checkpoint_secs: int = 600
    save_checkpoint_steps: int | None = None
    max_checkpoints_to_keep: int = 5
    save_summaries_steps: int = 100
    save_histograms_steps: int = 1000
    config: tf.ConfigProto | None = None  # of the session; `session_config()` if None
    # Called once a second from another thread; raises DataError if the input becomes unusable.
    check_input: Callable = lambda: None
    flags: dict | None = None  # recorded in `run.json`

    @classmethod
    def select(cls, flags, data_folder):
        """Returns the `Options` for the flags, given as a dict of values by name.

        `check_input` detects changes to the record files in `data_folder`.
        """
        values = {name: flags[name] for name in cls._fields if name in flags}
        values["config"] = session_config(flags["use_fp16"], flags["log_device_placement"])
        values["check_input"] = records.ChangeDetector(data_folder, eval_data=False).check
        return cls(**values, flags=flags)


class TrainingRun:
    """A run, from the first check of its folder to the last checkpoint; a context manager.

    In its context, no other process can train in `train_dir`, and work continues if stdout or
    stderr is lost. In a cluster, only the chief uses `train_dir`. Each checkpoint records the
    number of images seen and the `TrainingSettings`, which must include `examples_per_step`.

    Raises:
      UserError: on entering the context: `train_dir` cannot be used, another process is training
        in it, or its newest checkpoint is unknown or cannot be read.
    """

    def __init__(self, options, settings, worker=ALONE):
        self._options = options
        self._settings = settings
        self._worker = worker
        self._checkpoint = None  # to resume from
        self._seed = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(streams.tolerate_lost_output())
            if self._worker.is_chief:
                self._open_train_dir(stack)
            self._stack = stack.pop_all()
        return self

    def _open_train_dir(self, stack):
        """Creates the folder, locks it until `stack` is closed, and finds its checkpoint."""
        train_dir = self._options.train_dir
        files.refuse_folder_of_others("--train_dir", train_dir)
        try:
            os.makedirs(train_dir, exist_ok=True)
            # The end of the process releases the lock, too.
            stack.enter_context(files.lock(os.path.join(train_dir, LOCK_FILE)))
            self._checkpoint = checkpoints.find_checkpoint_to_resume(train_dir)
        except files.LockedError as error:
            raise UserError(
                f"another process is training in --train_dir={train_dir}: {error}; wait until it "
                "has finished, or choose another folder"
            ) from error
        except (OSError, tf.errors.OpError) as error:
            raise UserError(f"cannot use --train_dir={train_dir}: {first_line(error)}") from error

    def __exit__(self, *exception):
        return self._stack.__exit__(*exception)

    def has_steps_left(self):
        """Returns whether any steps are left to train. If none are, reports that on stderr.

        Raises:
          CheckpointError: the newest checkpoint belongs to another model or dataset.
        """
        newest, max_steps = self._checkpoint, self._options.max_steps
        if newest is None:
            return True
        if newest.step >= max_steps:
            report(
                f"{newest.path} has reached step {newest.step} of --max_steps={max_steps}: nothing "
                "to do"
            )
            return False
        newest.check_settings(self._settings, "--train_dir")
        for change in find_changes(newest.settings, self._settings):
            tf.logging.warning("Resuming from %s: %s.", newest.path, change)
        return True

    @contextlib.contextmanager
    def graph(self, seed=None):
        """Yields a new default graph.

        In a resumed run, random operations draw different numbers than at the start of the run, and
        the learning rate schedule continues from the number of images seen so far. In a cluster,
        each worker draws different random numbers, and the variables are on the parameter servers.
        `seed` is an int, or None to draw one at random.
        """
        seed = secrets.randbelow(2**31) if seed is None else seed
        self._seed = (seed + self._worker.index) % 2**31
        step, images_offset = self._find_start()
        with tf.Graph().as_default() as graph, tf.device(self._worker.device_setter()):
            mixed = random.Random(f"{self._seed} {step}").randrange(2**31)
            tf.set_random_seed(mixed if step > 0 else self._seed)
            graph_notes.record_images_offset(images_offset)
            yield graph

    def _find_start(self):
        """Returns the step at which the run starts, and the offset for `graph_notes`."""
        if not self._worker.is_chief:  # the schedule of the chief applies to all workers
            return self._worker.read_global_step(), 0
        if self._checkpoint is None:
            return 0, 0
        step, settings = self._checkpoint.step, self._checkpoint.settings
        images_seen = settings and settings.images_seen(step)  # None if unknown
        now = step * self._settings.examples_per_step
        return step, 0 if images_seen is None else images_seen - now

    @contextlib.contextmanager
    def session(self, loss, hooks=()):
        """Yields a session on the default graph that trains up to `max_steps`.

        It restores the newest checkpoint, prints progress, saves checkpoints and writes summaries.
        After SIGINT, SIGTERM or another signal that stops a script, the running step is finished
        and saved. You can leave the loop early: the last step is saved, and the run can be resumed.

        Args:
          loss: float32 []; the loss of a step.
          hooks: list of further `tf.train.SessionRunHook`.

        Raises:
          UserError: the folder or its checkpoint cannot be used; the loss, a gradient or a variable
            is not finite (that step is not saved); the input has ended; or a step does not fit into
            memory.
          DataError: from `check_input`.
          Interrupted: a signal has arrived.
        """
        options, worker = self._options, self._worker
        has_left_loop = False  # without an error
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(DeferredSignals())
            progress = ProgressHook(loss, self._settings.examples_per_step, options, worker)
            stop = StopHook(progress, options, signals, worker)
            saving = self._start_saving(progress, stack) if worker.is_chief else []
            session = self._create_session(
                [FillingHook(), *hooks, *worker.hooks(), progress, stop, *saving]
            )
            with self._errors_explained(progress, signals), out_of_memory_explained(), session:
                try:
                    yield session
                    has_left_loop = True
                    for hook in saving:  # before the `end` of other hooks, which may fail
                        hook.end(session.raw_session())
                except (tf.errors.OutOfRangeError, tf.errors.CancelledError):
                    if has_left_loop:
                        raise
                    # Otherwise, the input has ended or was closed: see `_check_outcome`.
                finally:
                    progress.is_in_step = False  # after an error, `after_run` is not called
            if worker.is_chief:
                self._checkpoint = checkpoints.find_checkpoint_to_resume(options.train_dir)
            self._check_outcome(progress, signals, has_left_loop)

    def _start_saving(self, progress, stack):
        """Records the start of the run, and returns the hooks that write its files."""
        if self._checkpoint is not None:
            variables = checkpoints.find_variables(use_moving_averages=False)
            self._checkpoint.check_variables(variables, "--train_dir")
        offset = graph_notes.images_offset()
        checkpoints.record_settings(self._settings._replace(examples_offset=offset))
        self._record_start()
        writer = stack.enter_context(summaries.Writer(self._options.train_dir, "--train_dir"))
        writer.add_graph(tf.get_default_graph())  # without what the session adds to it
        return [
            # After the progress hook, which raises before a value that is not finite is saved.
            CheckpointHook(progress, self._options, self._checkpoint),
            SummaryHook(progress, writer, self._options),
        ]

    def _create_session(self, hooks):
        """Returns a session with the variables of the checkpoint, or with initial values."""
        config = self._options.config or session_config()
        config.device_filters.extend(self._worker.device_filters)
        newest = self._checkpoint
        try:
            # The chief of a cluster initializes the variables for all workers.
            scaffold = tf.train.Scaffold(init_op=None if self._worker.is_chief else tf.no_op())
            # Unlike MonitoredTrainingSession, this does not retry a lost connection forever, and it
            # runs the hooks in the given order.
            return tf.train.SingularMonitoredSession(
                hooks=hooks,
                scaffold=scaffold,
                master=self._worker.target,
                config=config,
                checkpoint_filename_with_path=newest and newest.path,
                stop_grace_period_secs=_CLOSING_GRACE,
            )
        except (tf.errors.DataLossError, tf.errors.OutOfRangeError) as error:
            raise UserError(
                f"cannot start in --train_dir={self._options.train_dir}: {first_line(error)}; "
                "choose another folder, or move the newest checkpoint and the file `checkpoint` "
                "away to resume from an older one"
            ) from error

    @contextlib.contextmanager
    def _errors_explained(self, progress, signals):
        """Turns TensorFlow's errors into `UserError` if the user can fix them."""
        try:
            yield
        except RuntimeError:  # worker.release() closed the session between two of its calls
            if self._worker.is_chief or signals.signal_number is None:
                raise
        except tf.errors.OpError as error:
            if is_nonfinite_histogram(error):
                name = first_line(error).rpartition(": ")[2].removeprefix(summaries.SCOPE)
                raise progress.nonfinite_error(name, "is not finite", progress.step) from error
            self._options.check_input()  # a change of the data may be the cause
            raise

    def _check_outcome(self, progress, signals, has_left_loop):
        """Raises an error if a signal, the input or the chief ended the run too early."""
        max_steps, newest = self._options.max_steps, self._checkpoint
        if progress.step >= max_steps or self._worker.is_over:
            return
        number = signals.signal_number
        if number is None and has_left_loop:  # by the user's code or a hook
            return
        reached = f"at step {progress.step} of --max_steps={max_steps}"
        if not self._worker.is_chief:
            if number is not None:
                raise Interrupted(number, "run the same command again to rejoin")
            raise UserError(f"training ended {reached}: {self._worker.explain_end()}")
        if number is None:
            raise UserError(
                f"the input has ended {reached}; {newest.path} is the newest checkpoint"
            )
        raise Interrupted(
            number,
            f"step {newest.step} is saved in {newest.path}; run the same command again to resume "
            "from it",
        )

    def _record_start(self):
        """Appends an entry for this run, its software and hardware to the list in RUN_FILE."""
        path = os.path.join(self._options.train_dir, RUN_FILE)
        get_details = tf.config.experimental.get_device_details
        start = {
            "time": time.time(),
            "script": os.path.basename(sys.argv[0]),
            "flags": {
                name: mask_secrets(mask_url(value)) if isinstance(value, str) else value
                for name, value in (self._options.flags or {}).items()
            },
            "seed": self._seed,
            "class_names": self._settings.class_names,
            "examples_per_epoch": self._settings.examples_per_epoch,
            "python": platform.python_version(),
            "tensorflow": tf.version.VERSION,
            "commit": _find_commit(pathlib.Path(__file__).parents[2]),
            "processor": tensorflow_v1.find_processor_name(),
            "processors": os.cpu_count(),
            "gpus": [get_details(gpu).get("device_name") for gpu in tensorflow_v1.GPUS],
        }
        files.write_json_atomically(path, [*_read_starts(path), start])


def _read_starts(path):
    """Returns the JSON list in a file; an empty one if there is no file. Raises UserError."""
    if not os.path.exists(path):
        return []
    with foreign_file(path, UserError, "; move it away"):
        starts = json.loads(files.read_regular(path, MAX_RUN_FILE_BYTES))
        if not isinstance(starts, list):
            raise ValueError("it is not a list of earlier runs")
    return starts


def _find_commit(folder):
    """Returns the commit of a git repository, with "-dirty" after changes; or None."""
    try:
        # Without --git-dir, git would also describe a repository around the folder.
        options = ["--always", "--exclude=*", "--dirty", "--abbrev=40"]
        command = ["git", "--git-dir=.git", "describe", *options]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return process.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository
        return None
