"""One training run: the flags, the session, the hooks and the lock that both trainers share."""

import contextlib
import json
import math
import os
import re
import secrets
import sys
import threading
import time

from absl import flags

import cifar10
import cifar10_data
import cifar10_input
import cifar10_settings
import cifar10_summaries
from cifar10_progress import show_progress
from cifar10_runtime import (
    STOP_REQUEST,
    Interrupted,
    UserError,
    append_json_line,
    describe_software_and_hardware,
    explain_missing_checkpoint,
    find_differences,
    find_latest_checkpoint,
    find_reason,
    format_now,
    is_histogram_of_nonfinite,
    list_modules_with_flags,
    quiet_cancellation,
    read_global_step,
    session_config,
    tf,
)

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "train_dir",
    "/tmp/cifar10_train",
    "Folder for checkpoints and summaries. What is there is continued, never deleted.",
)
flags.register_validator("train_dir", bool, "it must name a folder")
flags.DEFINE_integer(
    "max_steps",
    1000000,
    "Steps to train, those of earlier runs included.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
flags.DEFINE_integer(
    "log_frequency",
    10,
    "Steps between two lines of progress.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
flags.DEFINE_integer(
    "save_checkpoint_secs",
    600,
    "Seconds between two checkpoints.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
flags.DEFINE_integer(
    "save_checkpoint_steps",
    None,
    "Steps between two checkpoints, in place of --save_checkpoint_secs.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
flags.DEFINE_integer(
    "max_checkpoints_to_keep",
    5,
    "Checkpoints of a run that are kept; older ones of that run are removed.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
flags.DEFINE_integer(
    "save_summaries_steps",
    100,
    "Steps between two entries of TensorBoard's; 0: none.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
flags.DEFINE_integer(
    "seed",
    None,
    "Seed of the initial variables and of all draws; a new one for each run by default. With "
    "--num_preprocess_threads=1, on a CPU, it decides every loss.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
flags.DEFINE_boolean(
    "log_device_placement", False, "Print the device of every operation, hundreds of lines."
)


LOCK_FILE = ".trainer.lock"
METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "run.json"  # in train_dir: what each start of training there was
# Seconds that a step may take to end after a signal, before its input is closed; and that the
# input's threads may take to end. Together with a save they stay within half a minute.
STEP_GRACE = 12.0
CLOSING_GRACE = 6.0


class _ProgressHook(tf.train.SessionRunHook):
    """Prints the progress of training, and ends it on a value that is not finite.

    Args:
      loss: float32 [].
      global_step: int64 [].
      examples_per_step: int; images that one step consumes, over all towers.
      log_frequency: int; steps between two lines. The first step of a run has a line of its own,
        which includes the filling of the queue.
      metrics_path: path of a file to which each line is added as a JSON object; None for none.
      counts_alone: bool; whether nothing else counts in the global step.

    Attributes:
      is_in_step: bool; whether a step is running.
      step: int; the step that is being trained.
      has_trained: bool; whether a step of this run has ended.
    """

    def __init__(
        self, loss, global_step, examples_per_step, log_frequency, metrics_path, counts_alone=True
    ):
        self._metrics_path = metrics_path
        self._counts_alone = counts_alone
        self._loss = loss
        self._global_step = global_step
        self._examples_per_step = examples_per_step
        self._log_frequency = log_frequency
        self._must_be_finite = tf.get_collection(cifar10.MUST_BE_FINITE) or [loss]
        self._learning_rate = tf.get_collection(cifar10.LEARNING_RATE)
        self._last_learning_rate = []

    def after_create_session(self, session, coord):
        # Counted here from then on: a fetch beside the update could see the step before or after.
        self.step = int(session.run(self._global_step))
        self._first_step_since_line = self.step
        self._start_time = time.monotonic()
        self._line_is_due = True
        self.has_trained = self.is_in_step = False

    def before_run(self, run_context):
        self.is_in_step = True
        return tf.train.SessionRunArgs([self._loss, self._must_be_finite, self._learning_rate])

    def after_run(self, run_context, run_values):
        loss, must_be_finite, self._last_learning_rate = run_values.results
        self.has_trained, self.is_in_step = True, False
        for tensor, value in zip(self._must_be_finite, must_be_finite, strict=True):
            if not math.isfinite(value):  # NanTensorHook would let infinity pass
                name = tensor.op.name.removeprefix(cifar10.FINITE_SCOPE)
                raise self.error_of(name, f"is {value}")
        if self._line_is_due or self.step % self._log_frequency == 0:
            self._print_line(loss)
        if self._counts_alone:
            self.step += 1
        else:
            self.step = int(run_context.session.run(self._global_step))

    def error_of(self, name, how, step=None):
        """Returns the UserError for a tensor that is not finite at a step; None: this one."""
        step = self.step if step is None else step
        rates = [f", where the learning rate is {rate:g}" for rate in self._last_learning_rate]
        return UserError(
            f"{name} {how} at step {step}{''.join(rates)}; the step is not saved: to go on "
            "from the checkpoint before it, start again; if it comes to the same, with a smaller "
            "--initial_learning_rate"
        )

    def _print_line(self, loss):
        now = time.monotonic()
        steps = max(1, self.step + 1 - self._first_step_since_line)
        sec_per_batch = (now - self._start_time) / steps
        examples_per_sec = self._examples_per_step / sec_per_batch
        print(
            f"{format_now()}: step {self.step}, "
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
            append_json_line(self._metrics_path, metrics)
        self._start_time = now
        self._first_step_since_line = self.step + 1
        self._line_is_due = False


class _SummaryHook(tf.train.SessionRunHook):
    """Writes TensorBoard's entries: the graph's summaries of a step, and the speed until then.

    The summaries are fetched with the step that they are of, and have its number, as the printed
    lines have it.

    Args:
      progress: the `_ProgressHook`, which must come before this one.
      examples_per_step: int.
      every_steps: int; steps between two entries. A run's first step has one too.
      train_dir: folder of the event files.
    """

    def __init__(self, progress, examples_per_step, every_steps, train_dir):
        self._progress = progress
        self._examples_per_step = examples_per_step
        self._every_steps = every_steps
        self._writer = tf.summary.FileWriterCache.get(train_dir)
        self._summary_op = tf.summary.merge_all(name=f"{cifar10_summaries.SCOPE}merged")

    def after_create_session(self, session, coord):
        # Entries of later steps, of a run that was killed, are no longer true.
        start = tf.SessionLog(status=tf.SessionLog.START)
        self._writer.add_session_log(start, self._progress.step)
        self._since = None

    def before_run(self, run_context):
        self._step = self._progress.step
        self._is_due = self._since is None or self._step % self._every_steps == 0
        if self._is_due and self._summary_op is not None:
            return tf.train.SessionRunArgs(self._summary_op)
        return None

    def after_run(self, run_context, run_values):
        if not self._is_due:
            return
        summary = tf.Summary.FromString(run_values.results or b"")
        now = time.monotonic()
        if self._since is not None:  # there is no speed before the first step has ended
            steps_per_sec = (self._step - self._since[1]) / (now - self._since[0])
            summary.value.add(
                tag="examples_per_sec", simple_value=steps_per_sec * self._examples_per_step
            )
        self._writer.add_summary(summary, self._step)
        self._since = now, self._step

    def end(self, session):
        self._writer.flush()


class _FillingHook(tf.train.SessionRunHook):
    """Shows how the training queue fills, until the first step has got its batch."""

    def __init__(self):
        self._level = tf.get_collection(cifar10_input.QUEUE_LEVEL)
        self._has_batch = threading.Event()
        self._thread = None

    def after_create_session(self, session, coord):
        if self._level:
            self._thread = threading.Thread(target=self._show, args=(session, coord), daemon=True)
            coord.register_thread(self._thread)
            self._thread.start()

    def after_run(self, run_context, run_values):
        self.close()

    def close(self):
        """Ends what is shown, before something else is."""
        self._has_batch.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _show(self, session, coord):
        _, minimum = session.run(self._level)
        with show_progress("Filling queue", int(minimum), " images") as bar:
            while not self._has_batch.wait(0.1) and not coord.should_stop():
                examples, _ = session.run(self._level)
                bar.update(min(examples, minimum) - bar.n)


class _FiniteCheck(tf.train.CheckpointSaverListener):
    """Keeps variables that are not finite out of checkpoints."""

    def __init__(self, progress):
        self._progress = progress
        self._variables = [v for v in tf.global_variables() if v.dtype.base_dtype.is_floating]
        with tf.name_scope(cifar10.FINITE_SCOPE):
            self._sums = [tf.reduce_sum(variable) for variable in self._variables]

    def before_save(self, session, global_step_value):
        for variable, value in zip(self._variables, session.run(self._sums), strict=True):
            if math.isfinite(value):
                continue
            name = variable.op.name
            if not self._progress.has_trained:
                raise UserError(
                    f"{name} is not finite in the checkpoint of step {global_step_value}; name "
                    "another folder with --train_dir, or move that checkpoint and the file "
                    "`checkpoint` away to go on from an older one"
                )
            raise self._progress.error_of(
                name, "is not finite after the update", global_step_value - 1
            )


class _WatchHook(tf.train.SessionRunHook):
    """Ends training, from a thread of its own, when a signal comes or the input goes bad.

    A signal lets the running step end, and `CheckpointSaverHook` then saves it. A step that waits
    for images may wait for minutes: its input is closed, at once if it is the first, when there is
    nothing to save yet, and else after a while.

    Args:
      progress: the `_ProgressHook`.
      check_input: called every second; raises `DataError` when the input cannot be used any more.
      filling: the `_FillingHook`.
      release: called with the session to end a step that waits for other tasks; or None.
    """

    def __init__(self, progress, check_input, filling, release=None):
        self._progress = progress
        self._check_input = check_input
        self._filling = filling
        self._release = release

    def after_create_session(self, session, coord):
        self._session = session
        thread = threading.Thread(target=self._watch, args=(coord,), daemon=True)
        coord.register_thread(thread)
        thread.start()

    def after_run(self, run_context, run_values):
        if STOP_REQUEST.signal_number is not None:
            run_context.request_stop()

    def _watch(self, coord):
        next_check, grace_end = 0.0, None
        while not coord.wait_for_stop(0.1):
            now = time.monotonic()
            if STOP_REQUEST.signal_number is not None:
                if grace_end is None:
                    grace_end = now + (STEP_GRACE if self._progress.has_trained else 0.0)
                if now >= grace_end:
                    self._stop(coord)
            elif now >= next_check:
                try:
                    self._check_input()
                except (cifar10_data.DataError, UserError) as error:
                    self._stop(coord, error)
                next_check = now + 1.0

        # Something else has ended training, such as an input thread that failed. The step does not
        # notice if it waits for other tasks.
        end = time.monotonic() + 5.0
        while self._release is not None and self._progress.is_in_step:
            time.sleep(0.1)
            if time.monotonic() >= end:
                self._release(self._session)
                return

    def _stop(self, coord, error=None):
        self._filling.close()
        with quiet_cancellation():
            coord.request_stop(error)
            if self._release is not None:
                self._release(self._session)
            time.sleep(0.5)  # threads of TensorFlow's close the queues meanwhile


def _list_checkpoints(train_dir):
    """Returns the paths of all checkpoints in a folder, whole or not, the newest first."""
    # Listed, not matched with a pattern: the folder's own name may hold characters of patterns.
    names = tf.gfile.ListDirectory(train_dir) if tf.gfile.IsDirectory(train_dir) else []
    steps = [
        int(match[1])
        for name in names
        if (match := re.fullmatch(r"model\.ckpt-([0-9]+)\.index", name))
    ]
    return [os.path.join(train_dir, f"model.ckpt-{step}") for step in sorted(steps, reverse=True)]


def _find_readable(checkpoints):
    """Returns the first of some checkpoints that can be read, or None."""
    for path in checkpoints:
        with contextlib.suppress(UserError):
            read_global_step(path)
            return path
    return None


def find_checkpoint(train_dir):
    """Returns the newest checkpoint in `train_dir`, or None where there has not been any.

    One that no state file names yet is named in one, so that everybody finds it.

    Raises:
      UserError: there are checkpoints, but which is the newest cannot be told.
    """
    newest = find_latest_checkpoint(train_dir)
    if newest is not None:
        return newest
    checkpoints = _list_checkpoints(train_dir)
    if not checkpoints:
        return None
    # From here on, None would mean to start over, and to write over what is there.
    whole = _find_readable(checkpoints)
    if whole is None:
        raise UserError(
            f"none of the checkpoints in {train_dir} can be read; move them away to start over, or "
            "name another folder with --train_dir"
        )
    if reason := explain_missing_checkpoint(train_dir):
        raise UserError(
            f"{reason}; remove that file to go on from {whole}, or name another folder with "
            "--train_dir"
        )
    # A process that is killed in its first save leaves a checkpoint that is not named yet.
    tf.train.update_checkpoint_state(os.path.abspath(train_dir), os.path.basename(whole))
    return whole


@contextlib.contextmanager
def seeded_graph(stream=0):
    """Gives a new default graph, with the seed that the flag tells, or one that is drawn.

    Args:
      stream: int; graphs with the same seed and another `stream` draw other values.
    """
    with tf.Graph().as_default() as graph:
        seed = secrets.randbelow(2**31) if FLAGS.seed is None else FLAGS.seed
        tf.set_random_seed((seed + stream) % 2**31)
        yield graph


def _read_starts(path):
    """Returns the list that a file of starts holds; empty where there is no file.

    Raises:
      UserError: it is there and is not such a list.
    """
    try:
        with open(path) as file:
            starts = json.load(file)
        if not (isinstance(starts, list) and all(isinstance(start, dict) for start in starts)):
            raise ValueError("it is not a list of objects")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} does not hold the list of this folder's starts ({error}); move it away"
        ) from error
    return starts


def _note_start(path, settings):
    """Adds to the JSON list in a file what decides about this run.

    Args:
      path: the file; made if need be.
      settings: the run's `cifar10_settings.Settings`.

    Raises:
      UserError: the file is there and is not such a list.
    """
    starts = _read_starts(path)
    starts.append(
        {
            "time": time.time(),
            "script": os.path.basename(sys.argv[0]),
            "flags": {
                flag.name: flag.value
                for module in list_modules_with_flags()
                for flag in FLAGS.flags_by_module_dict()[module]
            },
            "seed": tf.get_default_graph().seed,
            "class_names": settings.class_names,
            "examples_per_epoch": settings.examples_per_epoch,
            **describe_software_and_hardware(),
        }
    )
    # Under a name of its own until it is whole, as a start may be killed at any time.
    with open(f"{path}.part", "w") as file:
        json.dump(starts, file, indent=2)
        file.write("\n")
    os.replace(f"{path}.part", path)


@contextlib.contextmanager
def prepare_train_dir(train_dir, max_steps):
    """Makes `train_dir` if need be, keeps other trainers out, and tells what there is to do.

    Gives (as a context manager; the lock ends with it, or with the process):
      bool; False where the newest checkpoint has reached `max_steps`. Says so on stderr.

    Raises:
      UserError: the folder cannot be made, another process trains in it, or its checkpoints
        cannot be read, or are of other classes or another model.
    """
    with contextlib.ExitStack() as stack:
        try:
            tf.gfile.MakeDirs(train_dir)
            stack.enter_context(cifar10_data.lock(os.path.join(train_dir, LOCK_FILE)))
            is_needed = _is_needed(train_dir, max_steps)
        except cifar10_data.LockedError as error:
            raise UserError(
                f"another trainer is at work in --train_dir={train_dir}: {error}; wait until it "
                "has ended, or name another folder"
            ) from error
        except (tf.errors.OpError, OSError) as error:
            raise UserError(f"cannot use --train_dir={train_dir}: {find_reason(error)}") from error
        yield is_needed


def _is_needed(train_dir, max_steps):
    newest = find_checkpoint(train_dir)
    if newest is None:
        return True
    step = _read_step(train_dir, newest)
    if step >= max_steps:
        print(
            f"{newest} has reached step {step} of --max_steps={max_steps}: nothing to do",
            file=sys.stderr,
        )
        return False
    _check_settings(newest, cifar10_settings.find_settings())
    return True


def _read_step(train_dir, newest):
    try:
        return read_global_step(newest)
    except UserError as error:
        whole = _find_readable(_list_checkpoints(train_dir))
        if whole is None:
            raise
        raise UserError(
            f"{error}; remove the file `checkpoint` beside it to go on from {whole}"
        ) from error


def _check_settings(checkpoint, settings):
    """Raises UserError where a checkpoint is not of these `Settings`; warns of what has changed."""
    trained = cifar10_settings.read_settings(checkpoint)
    if why := cifar10_settings.explain_misfit(checkpoint, trained, settings, "--train_dir"):
        raise UserError(why)
    for change in cifar10_settings.find_changes(trained, settings):
        tf.logging.warning("Going on from %s: %s.", checkpoint, change)


def _check_fits(checkpoint):
    """Raises UserError where a checkpoint's variables are not those of the default graph."""
    differences = find_differences(checkpoint, {v.op.name: v for v in tf.global_variables()})
    if differences:
        raise UserError(
            f"{checkpoint} is of another model: in it {differences}; name another folder with "
            "--train_dir"
        )


def run_training(
    train_op,
    loss,
    examples_per_step,
    train_dir,
    max_steps,
    log_frequency,
    config,
    check_input=lambda: None,
    save_checkpoint_secs=600,
    save_checkpoint_steps=None,
    max_checkpoints_to_keep=5,
    save_summaries_steps=100,
    member=None,
):
    """Trains in the default graph until `max_steps`, from the newest checkpoint in `train_dir`.

    SIGINT and SIGTERM let the running step end, and save it. In a cluster it is the chief that
    restores, saves and writes; other tasks train with it, and leave `train_dir` alone.

    Args:
      train_op: the operation that trains one step and counts it in the global step.
      loss: float32 []; the loss of that step.
      examples_per_step: int; images that one step consumes, over all towers.
      train_dir: folder for checkpoints and summaries.
      max_steps: int; the global step to stop at.
      log_frequency: int; steps between two lines of progress.
      config: the session's `tf.ConfigProto`.
      check_input: called every second, from another thread; raises `DataError` when the input
        cannot be used any more.
      save_checkpoint_secs: int; seconds between two checkpoints.
      save_checkpoint_steps: int; steps between two checkpoints, in place of the seconds; or None.
      max_checkpoints_to_keep: int; of this run.
      save_summaries_steps: int; steps between two entries of TensorBoard's; 0 for none.
      member: the `cifar10_cluster.Member` that this process is; None for a process by itself.

    Raises:
      UserError: the folder or its checkpoint cannot be used; or the loss, a gradient or a variable
        is not finite: that step is not saved; or the input has ended.
      DataError: from `check_input`.
      Interrupted: a signal has come.
    """
    is_chief = member is None or member.is_chief
    progress = _ProgressHook(
        loss,
        tf.train.get_or_create_global_step(),
        examples_per_step,
        log_frequency,
        os.path.join(train_dir, METRICS_FILE) if is_chief else None,
        counts_alone=member is None,
    )
    filling = _FillingHook()
    watch = _WatchHook(progress, check_input, filling, member and member.release)
    hooks = [filling, progress, watch]
    if member is not None:
        hooks.insert(0, member.make_hook())
    # With relative paths a folder can be moved, and a copy does not touch the original.
    saver = _Saver(save_relative_paths=True, max_to_keep=max_checkpoints_to_keep)
    if is_chief:
        saver_hook = tf.train.CheckpointSaverHook(
            train_dir,
            save_secs=None if save_checkpoint_steps else save_checkpoint_secs,
            save_steps=save_checkpoint_steps,
            saver=saver,
            listeners=[_FiniteCheck(progress)],
        )
        # After the progress: what is not finite is found before it is saved.
        hooks.insert(hooks.index(watch), saver_hook)
        if save_summaries_steps:
            hooks.append(_SummaryHook(progress, examples_per_step, save_summaries_steps, train_dir))
    with STOP_REQUEST.deferred():
        session = _start(
            train_dir,
            saver,
            hooks,
            tf.train.StopAtStepHook(last_step=max_steps),
            config,
            member,
        )
        try:
            _run_to_the_end(session, train_op)
        except (tf.errors.OutOfRangeError, tf.errors.CancelledError):
            pass  # the input has ended, by itself or because it was closed
        except RuntimeError:  # a session that has been closed between two of its calls
            if member is None or STOP_REQUEST.signal_number is None:
                raise
        except tf.errors.OpError as error:
            if is_histogram_of_nonfinite(error):
                name = find_reason(error).rpartition(": ")[2].removeprefix(cifar10_summaries.SCOPE)
                raise progress.error_of(name, "is not finite") from error
            check_input()  # the data may explain it
            raise
    if progress.step >= max_steps or (member is not None and member.is_over):
        return
    if not is_chief:
        if STOP_REQUEST.signal_number is not None:
            raise Interrupted(STOP_REQUEST.signal_number, "the same command joins the others again")
        raise UserError(
            f"{member.explain_end()} at step {progress.step} of --max_steps={max_steps}"
        )
    newest = find_latest_checkpoint(train_dir)
    if STOP_REQUEST.signal_number is not None:
        raise Interrupted(
            STOP_REQUEST.signal_number,
            f"{newest} holds step {read_global_step(newest)}; the same command goes on from there",
        )
    raise UserError(
        f"the input has ended at step {progress.step} of --max_steps={max_steps}; {newest} is the "
        "newest checkpoint"
    )


def run_training_as_flags_say(train_op, loss, examples_per_step, member=None):
    """Calls `run_training` with the arguments that flags hold, and notes the start."""
    config = session_config(FLAGS.use_fp16, FLAGS.log_device_placement)
    check_input = check_data = cifar10.make_change_check(eval_data=False)
    if member is None or member.is_chief:
        settings = cifar10_settings.find_settings()
        cifar10_settings.note_settings(settings)
        _note_start(os.path.join(FLAGS.train_dir, STARTS_FILE), settings)
    if member is not None:
        config.device_filters.extend(member.device_filters)

        def check_input():
            check_data()
            member.check_peers()

    run_training(
        train_op,
        loss,
        examples_per_step,
        train_dir=FLAGS.train_dir,
        max_steps=FLAGS.max_steps,
        log_frequency=FLAGS.log_frequency,
        config=config,
        check_input=check_input,
        save_checkpoint_secs=FLAGS.save_checkpoint_secs,
        save_checkpoint_steps=FLAGS.save_checkpoint_steps,
        max_checkpoints_to_keep=FLAGS.max_checkpoints_to_keep,
        save_summaries_steps=FLAGS.save_summaries_steps,
        member=member,
    )


class _Saver(tf.train.Saver):
    """A `tf.train.Saver` that tells in one line why it cannot save.

    What a checkpoint was trained for is in its `.meta` file: that is written first here, so that no
    checkpoint is ever there without it.
    """

    def save(self, session, path, global_step, **arguments):
        try:
            with session.graph.as_default():
                self.export_meta_graph(f"{path}-{global_step}.meta")
            arguments["write_meta_graph"] = False
            return super().save(session, path, global_step, **arguments)
        except tf.errors.OpError as error:
            # What it had written so far would only fill the disk.
            unfinished = tf.gfile.Glob([f"{path}-*.tempstate*", f"{path}-*.meta.tmp*"])
            if not tf.train.checkpoint_exists(f"{path}-{global_step}"):
                unfinished += tf.gfile.Glob(f"{path}-{global_step}.meta")
            for name in unfinished:
                tf.gfile.Remove(name)
            raise UserError(
                f"cannot save a checkpoint in {os.path.dirname(path)}: {find_reason(error)}; make "
                "room there, and start again to go on from the one before"
            ) from error


class _OnceScaffold(tf.train.Scaffold):
    """A `tf.train.Scaffold` for one session: a lost connection is not tried again for ever.

    Args:
      member: the `cifar10_cluster.Member`, which knows what may have been lost; or None.
      arguments: the `tf.train.Scaffold`'s.
    """

    def __init__(self, member, **arguments):
        super().__init__(**arguments)
        self._member = member
        self._is_used = False

    def finalize(self):
        if self._is_used:
            raise UserError(
                self._member.explain_loss() if self._member else "the session has been lost"
            )
        self._is_used = True
        return super().finalize()


def _start(train_dir, saver, hooks, last_hook, config, member):
    """Returns a session with the newest checkpoint's variables, or initial ones, or the chief's."""
    is_chief = member is None or member.is_chief
    try:
        if is_chief:
            newest = find_checkpoint(train_dir)
            if newest is not None:
                _check_fits(newest)
        return tf.train.MonitoredTrainingSession(
            master=member.target if member else "",
            is_chief=is_chief,
            checkpoint_dir=train_dir if is_chief else None,
            scaffold=_OnceScaffold(member, saver=saver),
            # These run before TensorFlow's own, those in `hooks` after them.
            chief_only_hooks=hooks if is_chief else [],
            hooks=[last_hook] if is_chief else [*hooks, last_hook],
            save_checkpoint_secs=None,  # one of `hooks` does it
            save_checkpoint_steps=None,
            save_summaries_steps=None,  # another does it
            save_summaries_secs=None,
            log_step_count_steps=None,
            config=config,
            stop_grace_period_secs=CLOSING_GRACE,
        )
    # ValueError is the Saver's own check that the checkpoint's files exist.
    except (tf.errors.OpError, ValueError) as error:
        raise UserError(
            f"cannot start in --train_dir={train_dir}: {find_reason(error)}; name another folder, "
            "or mend what is there"
        ) from error


def _run_to_the_end(session, train_op):
    """Runs the one training loop of the project, and closes the session."""
    try:
        while not session.should_stop():
            session.run(train_op)
    except BaseException as error:
        # An input thread that fails closes its queue, and the step fails of that: what the thread
        # met is raised in closing. The end of the input is no failure: that state is saved.
        with quiet_cancellation():
            session.__exit__(type(error), error, error.__traceback__)
        raise
    with quiet_cancellation():
        session.close()
