"""The training session: restores and saves, prints progress, writes summaries, stops cleanly.

A training loop runs in its context:

    with training_run.training_session(loss, examples_per_step, options, settings) as sess:
        while not sess.should_stop():
            sess.run(train_op)
"""

import contextlib
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from typing import NamedTuple

from support.base import files, streams
from support.base.errors import CheckpointError, Interrupted, UserError, first_line
from support.base.signals import DeferredSignals
from support.data.settings import explain_mismatch, find_changes
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
RUN_FILE = "run.json"  # in train_dir: one entry for each start of the training

# Seconds for the input's threads to stop. With `hooks.STEP_GRACE` and a save, they add up to less
# than half a minute.
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

    @classmethod
    def select(cls, values):
        """Returns the `Options` in a dict of the values of flags by name."""
        return cls(**{name: values[name] for name in cls._fields})


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
        graph_notes.record(worker.read_global_step())
    elif (newest := checkpoints.find_latest_checkpoint(train_dir)) is not None:
        step = checkpoints.read_global_step(newest)
        graph_notes.record(step, checkpoints.read_settings(newest))
    else:
        graph_notes.record(0)


def has_steps_left(options, settings, worker=None):
    """Returns whether any steps are left to train. If none are, reports that on stderr.

    Args:
      options: `Options`.
      settings: `TrainingSettings` of the run.
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
    for change in find_changes(trained, settings):
        tf.logging.warning("Resuming from %s: %s.", newest, change)
    return True


def _check_settings(newest, settings):
    """Returns the settings of a checkpoint; raises UserError if `settings` cannot resume it."""
    trained = checkpoints.read_settings(newest)
    if reason := explain_mismatch(newest, trained, settings, "--train_dir"):
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
      settings: `TrainingSettings`; recorded in every checkpoint, with the number of
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
                    graph_notes.check_step(lambda: checkpoints.read_global_step(newest))
            offset = graph_notes.examples_offset(examples_per_step)
            checkpoints.record_settings(
                settings._replace(examples_per_step=examples_per_step, examples_offset=offset)
            )
            _record_start(os.path.join(options.train_dir, RUN_FILE), flags or {}, settings)
        progress = ProgressHook(loss, examples_per_step, options, worker)
        stop = StopHook(progress, options.max_steps, signals, check_input, worker)
        hooks = [FillingHook(), progress, stop]
        if worker is not None:
            hooks.insert(0, worker.make_hook())
        if is_chief:
            saver = tf.train.Saver()
            writer = stack.enter_context(summaries.Writer(options.train_dir, "--train_dir"))
            # After the progress hook, which raises before a value that is not finite is saved.
            hooks.append(CheckpointHook(progress, saver, options, is_resumed=newest is not None))
            hooks.append(SummaryHook(progress, writer, examples_per_step, options))
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
        if saver is None:  # the chief has initialized the variables
            scaffold = tf.train.Scaffold(init_op=tf.no_op())
        else:
            scaffold = tf.train.Scaffold(saver=saver)
        if newest is not None:
            checkpoints.check_variables(
                newest, {v.op.name: v for v in tf.global_variables()}, "--train_dir"
            )
        # Unlike MonitoredTrainingSession, it does not retry a lost connection forever, and it
        # runs the hooks in the given order.
        return tf.train.SingularMonitoredSession(
            hooks=hooks,
            scaffold=scaffold,
            master=worker.target if worker else "",
            config=config,
            checkpoint_filename_with_path=newest,
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
