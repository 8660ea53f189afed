"""The training session: restores and saves, prints progress, writes summaries, stops cleanly.

A training loop runs in its context:

    with session.training_session(loss, examples_per_step, options, settings) as sess:
        while not sess.should_stop():
            sess.run(train_op)
"""

import contextlib
import json
import math
import os
import platform
import secrets
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from support import checkpoints, files, resuming, streams, summaries, tensorflow_v1
from support.command_line import DeferredSignals
from support.errors import CheckpointError, Interrupted, UserError, first_line
from support.progress import show_progress, timestamp
from support.tensorflow_v1 import (
    is_nonfinite_histogram,
    out_of_memory_explained,
    session_config,
    tf,
)

LOCK_FILE = ".trainer.lock"
METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"  # in train_dir: one entry for each start of the training

# Graph collections that the functions below fill.
_MUST_BE_FINITE = "must_be_finite"
_LEARNING_RATE = "learning_rate"
_QUEUE_LEVEL = "queue_level"
_FINITE_SCOPE = "must_be_finite/"

# Seconds after a signal before the running step's input is closed, and seconds for the input's
# threads to stop. Including a save, they add up to less than half a minute.
_STEP_GRACE = 12.0
_CLOSING_GRACE = 6.0


class Options(NamedTuple):
    """The options of a run. Each field has the name of its flag.

    Attributes:
      train_dir: folder for checkpoints and summaries.
      max_steps: int; the global step to stop at.
      log_frequency: int; steps between two lines of progress.
      save_checkpoint_secs: int; seconds between two checkpoints.
      save_checkpoint_steps: int; steps between two checkpoints, instead of the seconds; or None.
      max_checkpoints_to_keep: int; older checkpoints of the run are deleted.
      save_summaries_steps: int; steps between two summaries of scalars; 0 for no summaries at all.
      save_histograms_steps: int; steps between two summaries of histograms and images; 0 for none.
    """

    train_dir: str
    max_steps: int
    log_frequency: int = 10
    save_checkpoint_secs: int = 600
    save_checkpoint_steps: int | None = None
    max_checkpoints_to_keep: int = 5
    save_summaries_steps: int = 100
    save_histograms_steps: int = 1000


def check_finite(tensor, name=None):
    """Makes the session check after every step that all values of a tensor are finite.

    Args:
      tensor: float32 of any shape.
      name: string; the tensor's name in the error message. Its own name if None.
    """
    name = name or tensor.op.name
    with tf.name_scope(_FINITE_SCOPE):  # a sum is finite only if all of its terms are
        total = tf.reduce_sum(tensor, name=name)
    tf.add_to_collection(_MUST_BE_FINITE, total)


def record_learning_rate(learning_rate):
    """Makes the session report the learning rate, float32 [], in messages and metrics."""
    tf.add_to_collection(_LEARNING_RATE, learning_rate)


def watch_queue(size, min_size):
    """Makes the session show how the training queue fills.

    Args:
      size: int32 []; the number of examples in the queue.
      min_size: int; the number of examples that it needs before it yields the first batch.
    """
    tf.add_to_collection(_QUEUE_LEVEL, size)
    tf.add_to_collection(_QUEUE_LEVEL, tf.constant(min_size))


@contextlib.contextmanager
def training_graph(seed=None, worker=None, train_dir=None):
    """Yields a new default graph. In its context, work continues if stdout or stderr is lost.

    If it resumes a run, its input draws different random numbers than at the start of that run, and
    its learning rate schedule continues from the number of images seen so far.

    Args:
      seed: int; the seed of all random operations. Drawn at random if None.
      worker: `support.cluster.training.Worker`, or None. Each worker draws different random numbers
        and places the variables on the parameter servers.
      train_dir: folder of the run to resume, if it has a checkpoint; None to resume none. Workers
        other than the chief continue at the step that the parameter servers have reached.
    """
    seed = secrets.randbelow(2**31) if seed is None else seed
    with tf.Graph().as_default() as graph, contextlib.ExitStack() as stack:
        stack.enter_context(streams.dispensable())
        if worker is not None:
            seed = (seed + worker.index) % 2**31
            stack.enter_context(tf.device(worker.device_setter()))
        tf.set_random_seed(seed)
        if train_dir is not None:
            _record_resumed_run(train_dir, worker)
        yield graph


def _record_resumed_run(train_dir, worker):
    if worker is not None and not worker.is_chief:
        resuming.record(worker.read_global_step())
    elif (newest := checkpoints.find_latest_checkpoint(train_dir)) is not None:
        step = checkpoints.read_global_step(newest)
        resuming.record(step, checkpoints.read_settings(newest))
    else:
        resuming.record(0)


def has_steps_left(options, settings, worker=None):
    """Returns whether any steps are left to train. If none are, reports that on stderr.

    Args:
      options: `Options`.
      settings: `checkpoints.TrainingSettings` of the run.
      worker: `support.cluster.training.Worker`, or None.

    Raises:
      UserError: `train_dir` cannot be used, another process is training in it, or its newest
        checkpoint cannot be read or belongs to another model or dataset.
    """
    if worker is not None and not worker.is_chief:
        return True
    # Because of the lock, a second trainer fails here, before it builds its graph.
    with _lock(options.train_dir), _usable(options.train_dir):
        newest = checkpoints.find_checkpoint_to_resume(options.train_dir)
        if newest is None:
            return True
        step = _read_step_or_suggest_another(options.train_dir, newest)
    if step >= options.max_steps:
        print(
            f"{newest} has reached step {step} of --max_steps={options.max_steps}: nothing to do",
            file=sys.stderr,
        )
        return False
    trained = _check_settings(newest, settings)
    for change in checkpoints.find_changes(trained, settings):
        tf.logging.warning("Resuming from %s: %s.", newest, change)
    return True


def _check_settings(newest, settings):
    """Returns the settings of a checkpoint; raises UserError if `settings` cannot resume it."""
    trained = checkpoints.read_settings(newest)
    if reason := checkpoints.explain_mismatch(newest, trained, settings, "--train_dir"):
        raise UserError(reason)
    return trained


def _read_step_or_suggest_another(train_dir, newest):
    try:
        return checkpoints.read_global_step(newest)
    except CheckpointError as error:
        readable = checkpoints.find_readable(train_dir)
        if readable is None:
            raise
        raise UserError(
            f"{error}; remove the file `checkpoint` in that folder to resume from {readable}"
        ) from error


@contextlib.contextmanager
def _usable(train_dir):
    """Creates `train_dir` and turns file system errors into `UserError`."""
    try:
        os.makedirs(train_dir, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot use --train_dir={train_dir}: {first_line(error)}") from error


@contextlib.contextmanager
def training_session(
    loss,
    examples_per_step,
    options,
    settings,
    config=None,
    check_input=lambda: None,
    flags=None,
    worker=None,
):
    """Yields a session on the default graph that trains from the newest checkpoint to `max_steps`.

    SIGINT, SIGTERM and SIGHUP let the running step finish and save it. The loss of stdout or stderr
    does not end training. No other process can train in `train_dir` at the same time. In a cluster,
    the chief restores, saves and writes; the other workers do not touch `train_dir`.

    Args:
      loss: float32 []; the loss of a step.
      examples_per_step: int; images that one step consumes, over all towers or workers.
      options: `Options`.
      settings: `checkpoints.TrainingSettings`; recorded in every checkpoint, with the number of
        images seen.
      config: `tf.ConfigProto`; `session_config()` if None.
      check_input: called once a second from another thread; raises `DataError` when the input
        has become unusable.
      flags: dict; recorded in `run.json`.
      worker: `support.cluster.training.Worker` in a cluster, or None.

    Raises:
      UserError: the folder or its checkpoint cannot be used; the loss, a gradient or a variable is
        not finite (that step is not saved); the input has ended; or a step does not fit into
        memory.
      DataError: from `check_input`.
      Interrupted: a signal has arrived.
    """
    is_chief = worker is None or worker.is_chief
    with contextlib.ExitStack() as stack:
        stack.enter_context(streams.dispensable())
        signals = stack.enter_context(DeferredSignals())
        saver = newest = None
        if is_chief:
            stack.enter_context(_lock(options.train_dir))
            # Another process may have trained here since `has_steps_left` released the lock.
            with _usable(options.train_dir):
                newest = checkpoints.find_checkpoint_to_resume(options.train_dir)
                if newest is not None:
                    _check_settings(newest, settings)
                    resuming.check_step(lambda: checkpoints.read_global_step(newest))
            offset = resuming.examples_offset(examples_per_step)
            checkpoints.record_settings(
                settings._replace(examples_per_step=examples_per_step, examples_offset=offset)
            )
            _record_start(os.path.join(options.train_dir, RUN_FILE), flags or {}, settings)
        progress = _ProgressHook(loss, examples_per_step, options, worker)
        stop = _StopHook(progress, options.max_steps, signals, check_input, worker)
        hooks = [_FillingHook(), progress, stop]
        if worker is not None:
            hooks.insert(0, worker.make_hook())
        if is_chief:
            saver = tf.train.Saver()
            writer = stack.enter_context(summaries.Writer(options.train_dir, "--train_dir"))
            # After the progress hook, which raises before a value that is not finite is saved.
            hooks.append(_CheckpointHook(progress, saver, options, is_resumed=newest is not None))
            hooks.append(_SummaryHook(progress, writer, examples_per_step, options))
        session = _create_session(hooks, saver, newest, options, config, worker)
        with (
            _errors_explained(progress, signals, check_input, worker),
            out_of_memory_explained(),
            session,
        ):
            try:
                yield session
            finally:
                progress.is_in_step = False  # no `after_run` says so if an error has ended the step
        _check_outcome(progress, options, signals, worker)


def _check_outcome(progress, options, signals, worker):
    """Raises an error unless the run has reached its last step."""
    if progress.step >= options.max_steps or (worker is not None and worker.is_over):
        return
    reached = f"at step {progress.step} of --max_steps={options.max_steps}"
    if worker is not None and not worker.is_chief:
        if signals.signal_number is not None:
            raise Interrupted(signals.signal_number, "run the same command again to rejoin")
        raise UserError(f"{worker.explain_end()} {reached}")
    newest = checkpoints.find_latest_checkpoint(options.train_dir)
    if signals.signal_number is not None:
        step = checkpoints.read_global_step(newest)
        raise Interrupted(
            signals.signal_number,
            f"step {step} is saved in {newest}; run the same command again to resume from it",
        )
    raise UserError(f"the input has ended {reached}; {newest} is the newest checkpoint")


@contextlib.contextmanager
def _lock(train_dir):
    """Keeps other trainers out of `train_dir`. The lock ends with the process, if not before."""
    with contextlib.ExitStack() as stack:
        try:
            with _usable(train_dir):
                stack.enter_context(files.lock(os.path.join(train_dir, LOCK_FILE)))
        except files.LockedError as error:
            raise UserError(
                f"another process is training in --train_dir={train_dir}: {error}; wait until it "
                "has finished, or choose another folder"
            ) from error
        yield


def _record_start(path, flags, settings):
    """Appends an entry that describes this run to the JSON list in a file.

    Raises:
      UserError: the file exists, but is not such a list.
    """
    starts = []
    try:
        with open(path) as file:
            starts = json.load(file)
        if not (isinstance(starts, list) and all(isinstance(start, dict) for start in starts)):
            raise ValueError("it is not a list of objects")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a list of earlier runs ({error}); move it away"
        ) from error
    start = {
        "time": time.time(),
        "script": os.path.basename(sys.argv[0]),
        "flags": flags,
        "seed": tf.get_default_graph().seed,
        "class_names": settings.class_names,
        "examples_per_epoch": settings.examples_per_epoch,
        **_describe_software_and_hardware(),
    }
    files.write_json_atomically(path, [*starts, start])


def _describe_software_and_hardware():
    """Returns the versions of Python, TensorFlow and the project, the processor and the GPUs."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=os.path.dirname(os.path.abspath(__file__)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository
        commit = None
    get_details = tf.config.experimental.get_device_details
    return {
        "python": platform.python_version(),
        "tensorflow": tf.version.VERSION,
        "commit": commit,
        "processor": tensorflow_v1.find_processor_name(),
        "processors": os.cpu_count(),
        "gpus": [get_details(gpu).get("device_name") for gpu in tensorflow_v1.GPUS],
    }


def _create_session(hooks, saver, newest, options, config, worker):
    """Returns a session with the variables of the checkpoint `newest`, or with initial values."""
    config = config or session_config()
    if worker is not None:
        config.device_filters.extend(worker.device_filters)
    try:
        with contextlib.ExitStack() as stack:
            path = None
            if saver is None:  # the chief has initialized the variables
                scaffold = tf.train.Scaffold(init_op=tf.no_op())
            else:
                scaffold = tf.train.Scaffold(saver=saver)
            if newest is not None:
                checkpoints.check_variables(
                    newest, {v.op.name: v for v in tf.global_variables()}, "--train_dir"
                )
                path = stack.enter_context(checkpoints.path_for_restore(newest))
            # Unlike MonitoredTrainingSession, it does not retry a lost connection forever, and it
            # runs the hooks in the given order.
            return tf.train.SingularMonitoredSession(
                hooks=hooks,
                scaffold=scaffold,
                master=worker.target if worker else "",
                config=config,
                checkpoint_filename_with_path=path,
                stop_grace_period_secs=_CLOSING_GRACE,
            )
    # The Saver raises ValueError if files of the checkpoint are missing.
    except (tf.errors.OpError, ValueError) as error:
        if newest is None and isinstance(error, ValueError):
            raise
        lost = (tf.errors.UnavailableError, tf.errors.AbortedError)
        if worker is not None and isinstance(error, lost):
            raise  # a parameter server is lost: run_worker ends this process
        raise UserError(
            f"cannot start in --train_dir={options.train_dir}: {first_line(error)}; choose another "
            "folder, or repair this one"
        ) from error


@contextlib.contextmanager
def _errors_explained(progress, signals, check_input, worker):
    """Turns TensorFlow's errors into `UserError` if the user can fix them.

    When the input ends, the loop ends without an error. `_check_outcome` then raises one.
    """
    try:
        yield
    except (tf.errors.OutOfRangeError, tf.errors.CancelledError):
        pass  # the input ended or was closed
    except RuntimeError:  # worker.release() closed the session between two of its calls
        if worker is None or signals.signal_number is None:
            raise
    except tf.errors.OpError as error:
        if is_nonfinite_histogram(error):
            name = first_line(error).rpartition(": ")[2].removeprefix(summaries.SCOPE)
            raise progress.nonfinite_error(name, "is not finite") from error
        check_input()  # a change of the data may be the cause
        raise


class _ProgressHook(tf.train.SessionRunHook):
    """Prints the progress of training, and stops training at a value that is not finite.

    Args:
      loss: float32 [].
      examples_per_step: int; images that one step consumes, over all towers or workers.
      options: `Options`. The first step of a run always has a line, and its speed includes the time
        to fill the queue.
      worker: `support.cluster.training.Worker`, or None.

    Attributes:
      step: int; the step that is being trained.
      is_in_step: bool; whether a step is running.
      has_trained: bool; whether this run has finished a step.
    """

    def __init__(self, loss, examples_per_step, options, worker):
        self._loss = loss
        self._examples_per_step = examples_per_step
        self._log_frequency = options.log_frequency
        self._metrics_path = None
        if worker is None or worker.is_chief:
            self._metrics_path = os.path.join(options.train_dir, METRICS_FILE)
        self._is_alone = worker is None
        self._global_step = tf.train.get_or_create_global_step()
        self._must_be_finite = tf.get_collection(_MUST_BE_FINITE) or [loss]
        self._learning_rate = []
        if worker is None or worker.is_chief:  # the chief's rate applies to all workers
            self._learning_rate = tf.get_collection(_LEARNING_RATE)
        self._last_learning_rate = []

    def after_create_session(self, session, coord):
        # From here on, the hook counts the steps itself: if the global step were fetched together
        # with the update, its value could be the one from before or after the update.
        self.step = int(session.run(self._global_step))
        self._first_step_since_line = self.step
        self._start_time = time.monotonic()
        self._is_line_due = True
        self.has_trained = self.is_in_step = False

    def before_run(self, run_context):
        self.is_in_step = True
        return tf.train.SessionRunArgs([self._loss, self._must_be_finite, self._learning_rate])

    def after_run(self, run_context, run_values):
        loss, must_be_finite, self._last_learning_rate = run_values.results
        self.has_trained, self.is_in_step = True, False
        for tensor, value in zip(self._must_be_finite, must_be_finite, strict=True):
            if not math.isfinite(value):  # NanTensorHook would ignore infinity
                name = tensor.op.name.removeprefix(_FINITE_SCOPE)
                raise self.nonfinite_error(name, f"is {value}")
        if self._is_line_due or self.step % self._log_frequency == 0:
            self._print_line(loss)
        if self._is_alone:
            self.step += 1
        else:  # other workers count in the global step, too
            self.step = int(run_context.session.run(self._global_step))

    def nonfinite_error(self, name, problem, step=None):
        """Returns the UserError for a non-finite tensor at a step, the current one if None."""
        step = self.step if step is None else step
        rates = [f", where the learning rate is {rate:g}" for rate in self._last_learning_rate]
        return UserError(
            f"{name} {problem} at step {step}{''.join(rates)}; the step is not saved: run the same "
            "command again to resume from the checkpoint before it; if it happens again, use a "
            "smaller --initial_learning_rate"
        )

    def _print_line(self, loss):
        now = time.monotonic()
        steps = max(1, self.step + 1 - self._first_step_since_line)
        sec_per_batch = (now - self._start_time) / steps
        examples_per_sec = self._examples_per_step / sec_per_batch
        print(
            f"{timestamp()}: step {self.step}, "
            f"loss = {loss:.2f} ({examples_per_sec:.1f} examples/sec; "
            f"{sec_per_batch:.3f} sec/batch)",
            flush=True,
        )
        metrics = {
            "step": self.step,
            "loss": float(loss),
            "examples_per_sec": examples_per_sec,
            "sec_per_batch": sec_per_batch,
        }
        for rate in self._last_learning_rate:
            metrics["learning_rate"] = float(rate)
        if self._metrics_path is not None:
            files.append_json_line(self._metrics_path, metrics)
        self._start_time = now
        self._first_step_since_line = self.step + 1
        self._is_line_due = False


class _CheckpointHook(tf.train.SessionRunHook):
    """Saves a checkpoint at step 0, at the intervals given by the options, and at the last step.

    The step from which a run is resumed is not saved again: its checkpoint records what it was
    trained with, and the settings may have changed. Variables that are not finite are not saved.

    Args:
      progress: `_ProgressHook`, which must run before this one.
      saver: a `tf.train.Saver` of all variables.
      options: `Options`.
      is_resumed: bool; whether the session restores a checkpoint.
    """

    def __init__(self, progress, saver, options, is_resumed):
        self._progress = progress
        self._saver = saver
        self._options = options
        self._is_resumed = is_resumed
        self._timer = tf.train.SecondOrStepTimer(
            every_secs=None if options.save_checkpoint_steps else options.save_checkpoint_secs,
            every_steps=options.save_checkpoint_steps,
        )
        self._global_step = tf.train.get_or_create_global_step()
        self._variables = [v for v in tf.global_variables() if v.dtype.base_dtype.is_floating]
        with tf.name_scope(_FINITE_SCOPE):
            self._sums = [tf.reduce_sum(variable) for variable in self._variables]

    def after_create_session(self, session, coord):
        self._saved_step = None
        self._timer.update_last_triggered_step(self._progress.step)
        if self._is_resumed:
            self._saved_step = self._progress.step
            self._check_variables(session, self._saved_step)
        else:
            self._save(session)

    def after_run(self, run_context, run_values):
        if self._timer.should_trigger_for_step(self._progress.step):
            self._timer.update_last_triggered_step(self._progress.step)
            self._save(run_context.session)

    def end(self, session):
        self._save(session)

    def _save(self, session):
        step = int(session.run(self._global_step))
        if step != self._saved_step:
            self._check_variables(session, step)
            checkpoints.save(
                session,
                self._saver,
                self._options.train_dir,
                step,
                self._options.max_checkpoints_to_keep,
            )
            self._saved_step = step

    def _check_variables(self, session, step):
        for variable, value in zip(self._variables, session.run(self._sums), strict=True):
            if math.isfinite(value):
                continue
            name = variable.op.name
            if not self._progress.has_trained:
                raise UserError(
                    f"{name} is not finite in the checkpoint of step {step}; choose another folder "
                    "with --train_dir, or move that checkpoint and the file `checkpoint` away to "
                    "resume from an older one"
                )
            raise self._progress.nonfinite_error(name, "is not finite after the update", step - 1)


class _SummaryHook(tf.train.SessionRunHook):
    """Writes the graph, and its summaries and the throughput, for TensorBoard.

    It fetches the summaries in the step that they describe, and records them under its number.
    Histograms and images have an interval of their own, because they are much larger than scalars.

    Args:
      progress: `_ProgressHook`, which must run before this one.
      writer: `summaries.Writer`.
      examples_per_step: int.
      options: `Options`. The first step of a run has all summaries.
    """

    def __init__(self, progress, writer, examples_per_step, options):
        self._progress = progress
        self._writer = writer
        self._examples_per_step = examples_per_step
        self._scalar_steps = options.save_summaries_steps
        self._histogram_steps = options.save_histograms_steps
        self._scalars, self._histograms = summaries.merge_collected()

    def after_create_session(self, session, coord):
        self._writer.add_graph(session.graph)
        self._writer.add_restart(self._progress.step)  # a killed run may have gone further
        self._previous = None

    def before_run(self, run_context):
        self._step = self._progress.step
        self._has_scalars = self._is_due(self._scalar_steps)
        due = [self._scalars] if self._has_scalars else []
        if self._scalar_steps > 0 and self._is_due(self._histogram_steps):
            due.append(self._histograms)
        return tf.train.SessionRunArgs([merged for merged in due if merged is not None])

    def _is_due(self, every_steps):
        return every_steps > 0 and (self._previous is None or self._step % every_steps == 0)

    def after_run(self, run_context, run_values):
        summary = tf.Summary.FromString(b"".join(run_values.results))
        if self._has_scalars:
            now = time.monotonic()
            if self._previous is not None:  # the first step has no throughput yet
                since, since_step = self._previous
                steps_per_sec = (self._step - since_step) / (now - since)
                summary.value.add(
                    tag="examples_per_sec", simple_value=steps_per_sec * self._examples_per_step
                )
            self._previous = now, self._step
        if summary.value:
            self._writer.add_summary(summary, self._step)


class _FillingHook(tf.train.SessionRunHook):
    """Shows how full the training queue is, until the first step has its batch."""

    def __init__(self):
        self._level = tf.get_collection(_QUEUE_LEVEL)[-2:]
        self._has_batch = threading.Event()
        self._thread = None

    def after_create_session(self, session, coord):
        if self._level:
            self._thread = threading.Thread(target=self._show, args=(session, coord), daemon=True)
            coord.register_thread(self._thread)
            self._thread.start()

    def after_run(self, run_context, run_values):
        if self._thread is not None:  # removes the bar before the first line of progress
            self._has_batch.set()
            self._thread.join()
            self._thread = None

    def _show(self, session, coord):
        _, minimum = session.run(self._level)
        with show_progress("Filling queue", int(minimum), " images") as bar:
            while not self._has_batch.wait(0.1) and not coord.should_stop():
                examples, _ = session.run(self._level)
                bar.update(min(examples, minimum) - bar.n)


class _StopHook(tf.train.SessionRunHook):
    """Stops training at its last step, at a signal, or when the input has become unusable.

    A signal lets the running step finish, and `_CheckpointHook` then saves it. But a step can
    wait for images for minutes. A thread therefore closes the input: at once during the first step,
    when there is nothing to save yet, and otherwise after _STEP_GRACE.

    Args:
      progress: `_ProgressHook`.
      max_steps: int.
      signals: `DeferredSignals`.
      check_input: called once a second; raises `UserError` when the input is unusable.
      worker: `support.cluster.training.Worker`, whose peers are checked as well; or None.
    """

    def __init__(self, progress, max_steps, signals, check_input, worker):
        self._progress = progress
        self._max_steps = max_steps
        self._signals = signals
        self._check_input = check_input
        self._worker = worker

    def after_create_session(self, session, coord):
        self._session = session
        thread = threading.Thread(target=self._watch, args=(coord,), daemon=True)
        coord.register_thread(thread)
        thread.start()
        if self._progress.step >= self._max_steps:
            coord.request_stop()

    def after_run(self, run_context, run_values):
        if self._signals.signal_number is not None or self._progress.step >= self._max_steps:
            run_context.request_stop()

    def _watch(self, coord):
        next_check, deadline = 0.0, None
        while not coord.wait_for_stop(0.1):
            now = time.monotonic()
            if self._signals.signal_number is not None:
                if deadline is None:
                    deadline = now + (_STEP_GRACE if self._progress.has_trained else 0.0)
                if now >= deadline:
                    self._stop(coord)
            elif now >= next_check:
                try:
                    self._check_input()
                    if self._worker is not None:
                        self._worker.check_peers()
                except UserError as error:
                    self._stop(coord, error)
                next_check = now + 1.0

        # Something else stopped training, for example an input thread that failed. A step that
        # waits for other workers does not notice.
        deadline = time.monotonic() + 5.0
        while self._worker is not None and self._progress.is_in_step:
            time.sleep(0.1)
            if time.monotonic() >= deadline:
                self._worker.release(self._session)
                return

    def _stop(self, coord, error=None):
        coord.request_stop(error)
        if self._worker is not None:
            self._worker.release(self._session)
