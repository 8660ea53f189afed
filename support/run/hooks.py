"""The hooks of the training session: progress, checkpoints, summaries, and when to stop."""

import math
import os
import threading
import time

from support.base import files
from support.base.errors import UserError
from support.base.progress import show_progress, timestamp
from support.ops import graph_notes, summaries
from support.ops.tensorflow_v1 import tf
from support.run import checkpoints

METRICS_FILE = "metrics.jsonl"

# Seconds after a signal before the running step's input is closed.
STEP_GRACE = 12.0


class ProgressHook(tf.train.SessionRunHook):
    """Prints the progress of training, and stops training at a value that is not finite.

    The first step of a run always has a line, and its speed includes the time to fill the queue.
    """

    def __init__(self, loss, examples_per_step, options, worker):
        self._loss = loss
        self.examples_per_step = examples_per_step  # images, over all towers or workers
        self._log_frequency = options.log_frequency
        self._global_step = tf.train.get_or_create_global_step()
        self._must_be_finite = tf.get_collection(graph_notes.MUST_BE_FINITE) or [loss]
        self._metrics_path, self._learning_rate = None, []
        if worker.is_chief:  # its learning rate applies to all workers
            self._metrics_path = os.path.join(options.train_dir, METRICS_FILE)
            self._learning_rate = tf.get_collection(graph_notes.LEARNING_RATE)
        self._last_learning_rate = []

    def after_create_session(self, session, coord):
        self.step = int(session.run(self._global_step))  # the one that is being trained
        self._first_step_since_line = self.step
        self._start_time = time.monotonic()
        self.has_trained = self.is_in_step = False  # has_trained: whether this run finished a step

    def before_run(self, run_context):
        self.is_in_step = True
        return tf.train.SessionRunArgs([self._loss, self._must_be_finite, self._learning_rate])

    def after_run(self, run_context, run_values):
        loss, must_be_finite, self._last_learning_rate = run_values.results
        self.is_in_step = False
        for tensor, value in zip(self._must_be_finite, must_be_finite, strict=True):
            if not math.isfinite(value):  # NanTensorHook would ignore infinity
                name = tensor.op.name.removeprefix(graph_notes.FINITE_SCOPE)
                raise self.nonfinite_error(name, f"is {value}", self.step)
        # A step fetched together with the update could be the one from before the update.
        next_step = int(run_context.session.run(self._global_step))
        if next_step > self.step:  # otherwise, no step was completed
            if not self.has_trained or self.step % self._log_frequency == 0:
                self._print_line(loss)
            self.has_trained = True
        self.step = next_step

    def nonfinite_error(self, name, problem, step):
        """Returns the UserError for a non-finite tensor at a step."""
        rates = [f", where the learning rate is {rate:g}" for rate in self._last_learning_rate]
        return UserError(
            f"{name} {problem} at step {step}{''.join(rates)}; the step is not saved: run the same "
            "command again to resume from the checkpoint before it; if it happens again, use a "
            "smaller --initial_learning_rate"
        )

    def _print_line(self, loss):
        now = time.monotonic()
        sec_per_batch = (now - self._start_time) / (self.step + 1 - self._first_step_since_line)
        metrics = {
            "step": self.step,
            "loss": float(loss),
            "examples_per_sec": self.examples_per_step / sec_per_batch,
            "sec_per_batch": sec_per_batch,
        }
        print(
            "{}: step {step}, loss = {loss:.2f} ({examples_per_sec:.1f} examples/sec; "
            "{sec_per_batch:.3f} sec/batch)".format(timestamp(), **metrics),
            flush=True,
        )
        if self._metrics_path is not None:
            for rate in self._last_learning_rate:
                metrics["learning_rate"] = float(rate)
            files.append_json_line(self._metrics_path, metrics)
        self._start_time = now
        self._first_step_since_line = self.step + 1


class CheckpointHook(tf.train.SessionRunHook):
    """Saves a checkpoint at the start, at the intervals in the options, and at the last step.

    The step from which a run is resumed is not saved again: its checkpoint records what it was
    trained with, and the settings may have changed. Variables that are not finite are not saved.
    The `ProgressHook` must run before this hook. `resumed` is the restored `Checkpoint`, or None.
    """

    def __init__(self, progress, options, resumed):
        self._progress = progress
        self._options = options
        self._resumed = resumed
        self._saved_step = resumed and resumed.step
        self._global_step = tf.train.get_or_create_global_step()

    def begin(self):
        # Not in `__init__`, because the hooks before this one may create variables in `begin`.
        self._saver = tf.train.Saver()
        tf.add_to_collection(tf.GraphKeys.SAVERS, self._saver)  # the session restores with it
        if self._resumed is not None:
            variables = checkpoints.find_variables(use_moving_averages=False)
            self._resumed.check_variables(variables, "--train_dir")
        self._variables = [v for v in tf.global_variables() if v.dtype.base_dtype.is_floating]
        with tf.name_scope(graph_notes.FINITE_SCOPE):
            self._sums = [tf.reduce_sum(variable) for variable in self._variables]

    def after_create_session(self, session, coord):
        self._last_due_time, self._last_due_step = time.monotonic(), self._progress.step
        if self._saved_step is None:
            self._save(session)

    def after_run(self, run_context, run_values):
        # Not `SecondOrStepTimer`, which would wait if the system's clock were set back.
        now, step = time.monotonic(), self._progress.step
        if every_steps := self._options.save_checkpoint_steps:
            is_due = step - self._last_due_step >= every_steps
        else:
            is_due = now - self._last_due_time >= self._options.save_checkpoint_secs
        if is_due:
            self._last_due_time, self._last_due_step = now, step
            self._save(run_context.session)

    def end(self, session):
        self._save(session)

    def _save(self, session):
        step = int(session.run(self._global_step))  # a step that failed may have been counted
        if step != self._saved_step:
            self._check_variables(session, step)
            folder, max_to_keep = self._options.train_dir, self._options.max_checkpoints_to_keep
            checkpoints.save(session, self._saver, folder, step, max_to_keep)
            self._saved_step = step

    def _check_variables(self, session, step):
        for variable, value in zip(self._variables, session.run(self._sums), strict=True):
            if not math.isfinite(value):
                name = variable.op.name
                if self._saved_step is None:
                    raise UserError(f"{name} is not finite at the start; check its initial value")
                problem = "is not finite after the update"
                raise self._progress.nonfinite_error(name, problem, step - 1)


class SummaryHook(tf.train.SessionRunHook):
    """Writes the summaries of the graph and the throughput for TensorBoard.

    It fetches the summaries in the step that they describe, and records them for that step.
    Histograms and images have an interval of their own, because they are much larger than scalars.
    The first step of a run has all summaries. The `ProgressHook` must run before this hook.
    """

    def __init__(self, progress, writer, options):
        self._progress = progress
        self._writer = writer
        self._scalar_steps = options.save_summaries_steps
        self._histogram_steps = options.save_histograms_steps
        self._scalars, self._histograms = summaries.merge_collected()

    def after_create_session(self, session, coord):
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
        if self._progress.step == self._step:  # no step was completed
            return
        summary = tf.Summary.FromString(b"".join(run_values.results))
        if self._has_scalars:
            now = time.monotonic()
            if self._previous is not None:  # the first step has no throughput yet
                since, since_step = self._previous
                examples = (self._step - since_step) * self._progress.examples_per_step
                summary.value.add(tag="examples_per_sec", simple_value=examples / (now - since))
            self._previous = now, self._step
        if summary.value:
            self._writer.add_summary(summary, self._step)


class FillingHook(tf.train.SessionRunHook):
    """Shows how full the training queue is, until the first step has its batch."""

    def __init__(self):
        self._level = tf.get_collection(graph_notes.QUEUE_LEVEL)[-2:]
        self._has_batch = threading.Event()
        self._thread = None

    def after_create_session(self, session, coord):
        if self._level:
            self._thread = threading.Thread(target=self._show, args=(session, coord), daemon=True)
            coord.register_thread(self._thread)
            self._thread.start()

    def after_run(self, run_context, run_values):
        self._has_batch.set()
        if self._thread is not None:  # removes the bar before the first line of progress
            self._thread.join()

    def _show(self, session, coord):
        _, minimum = session.run(self._level)
        with show_progress("Filling queue", int(minimum), " images") as bar:
            while not self._has_batch.wait(0.1) and not coord.should_stop():
                examples, _ = session.run(self._level)
                bar.update(min(examples, minimum) - bar.n)


class StopHook(tf.train.SessionRunHook):
    """Stops training at its last step, at a signal, or when the input has become unusable.

    A signal lets the running step finish, and `CheckpointHook` then saves it. But a step can
    wait for images for minutes. A thread therefore closes the input: at once during the first step,
    when there is nothing to save yet, and otherwise after STEP_GRACE. Once a second, that thread
    also calls `check_input` of the options and `check_peers` of the worker.
    """

    def __init__(self, progress, options, signals, worker):
        self._progress = progress
        self._options = options
        self._signals = signals
        self._worker = worker

    def after_create_session(self, session, coord):
        self._session = session
        thread = threading.Thread(target=self._watch, args=(coord,), daemon=True)
        coord.register_thread(thread)
        thread.start()
        if self._progress.step >= self._options.max_steps:
            coord.request_stop()

    def after_run(self, run_context, run_values):
        is_last = self._progress.step >= self._options.max_steps
        if is_last or self._signals.signal_number is not None:
            run_context.request_stop()

    def _watch(self, coord):
        next_check, deadline = 0.0, None
        while not coord.wait_for_stop(0.1):
            now = time.monotonic()
            if self._signals.signal_number is not None:
                if deadline is None:
                    deadline = now + (STEP_GRACE if self._progress.has_trained else 0.0)
                if now >= deadline:
                    self._stop(coord)
            elif now >= next_check:
                try:
                    self._options.check_input()
                    self._worker.check_peers()
                except UserError as error:
                    self._stop(coord, error)
                next_check = now + 1.0

        # Something else stopped training, for example an input thread that failed. A step that
        # waits for other workers does not notice.
        deadline = time.monotonic() + 5.0
        while self._progress.is_in_step:
            time.sleep(0.1)
            if time.monotonic() >= deadline:
                self._worker.release(self._session)
                return

    def _stop(self, coord, error=None):
        coord.request_stop(error)
        self._worker.release(self._session)
