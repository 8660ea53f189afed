"""One training run: the flags, the session and the hooks that both trainers share."""

import math
import sys
import time

from absl import flags

from cifar10_runtime import (
    UserError,
    find_latest_checkpoint,
    find_reason,
    format_now,
    is_histogram_of_nonfinite,
    quiet_cancellation,
    read_global_step,
    tf,
)

flags.DEFINE_string(
    "train_dir",
    "/tmp/cifar10_train",
    "Folder for checkpoints and summaries. What is there is continued, never deleted.",
)
flags.register_validator("train_dir", bool, "it must name a folder")
flags.DEFINE_integer(
    "max_steps", 1000000, "Steps to train, those of earlier runs included.", lower_bound=1
)
flags.DEFINE_integer("log_frequency", 10, "Steps between two lines of progress.", lower_bound=1)
flags.DEFINE_boolean(
    "log_device_placement", False, "Print the device of every operation, hundreds of lines."
)


class _LossHook(tf.train.SessionRunHook):
    """Prints the progress of training, and ends it on a loss that is not finite.

    Args:
      loss: float32 [].
      global_step: int64 [].
      examples_per_step: int; images that one step consumes, over all towers.
      log_frequency: int; steps between two lines. The first step of a run has a line of its own,
        which includes the filling of the queue.
    """

    def __init__(self, loss, global_step, examples_per_step, log_frequency):
        self._loss = loss
        self._global_step = global_step
        self._examples_per_step = examples_per_step
        self._log_frequency = log_frequency

    def after_create_session(self, session, coord):
        # Counted here from then on: a fetch beside the update could see the step before or after.
        self._step = session.run(self._global_step)
        self._first_step_since_line = self._step
        self._start_time = time.monotonic()
        self._line_is_due = True

    def before_run(self, run_context):
        return tf.train.SessionRunArgs(self._loss)

    def after_run(self, run_context, run_values):
        loss = run_values.results
        if not math.isfinite(loss):  # NanTensorHook would let infinity pass
            raise UserError(
                f"the loss at step {self._step} is {loss}; to go on from the checkpoint before it, "
                "start again"
            )
        if self._line_is_due or self._step % self._log_frequency == 0:
            self._print_line(loss)
        self._step += 1

    def _print_line(self, loss):
        now = time.monotonic()
        seconds = now - self._start_time
        steps = self._step + 1 - self._first_step_since_line
        print(
            f"{format_now()}: step {self._step}, "
            f"loss = {loss:.2f} ({steps * self._examples_per_step / seconds:.1f} examples/sec; "
            f"{seconds / steps:.3f} sec/batch)",
            flush=True,
        )
        self._start_time = now
        self._first_step_since_line = self._step + 1
        self._line_is_due = False


def find_checkpoint(train_dir):
    """Returns the newest checkpoint in `train_dir`, or None where there has not been any.

    Raises:
      UserError: there are checkpoints, but which is the newest cannot be told.
    """
    newest = find_latest_checkpoint(train_dir)
    # Without this, training would start over and write over what is there.
    if newest is None and any(
        name.startswith("model.ckpt-") and name.endswith(".index")
        for name in tf.gfile.ListDirectory(train_dir)
    ):
        raise UserError(
            f"{train_dir} holds checkpoints, but its file `checkpoint` is missing, unreadable or "
            "names one that is gone; mend it, or name another folder with --train_dir"
        )
    return newest


def prepare_train_dir(train_dir, max_steps):
    """Makes `train_dir` if need be, and tells whether there is anything left to train.

    Returns:
      bool; False where the newest checkpoint has reached `max_steps`. Says so on stderr.

    Raises:
      UserError: the folder cannot be made, or its checkpoints cannot be read.
    """
    try:
        tf.gfile.MakeDirs(train_dir)
        newest = find_checkpoint(train_dir)
    except tf.errors.OpError as error:
        raise UserError(f"cannot use --train_dir={train_dir}: {find_reason(error)}") from error
    if newest is None:
        return True
    step = read_global_step(newest)
    if step < max_steps:
        return True
    print(
        f"{newest} has reached step {step} of --max_steps={max_steps}: nothing to do",
        file=sys.stderr,
    )
    return False


def run_training(
    train_op,
    loss,
    examples_per_step,
    train_dir,
    max_steps,
    log_frequency,
    config,
):
    """Trains in the default graph until `max_steps`, from the newest checkpoint in `train_dir`.

    Args:
      train_op: the operation that trains one step and counts it in the global step.
      loss: float32 []; the loss of that step.
      examples_per_step: int; images that one step consumes, over all towers.
      train_dir: folder for checkpoints and summaries.
      max_steps: int; the global step to stop at.
      log_frequency: int; steps between two lines of progress.
      config: the session's `tf.ConfigProto`.

    Raises:
      UserError: the folder or its checkpoint cannot be used; or the loss, or what a histogram
        shows, is not finite: that step is not saved.
    """
    try:
        session = tf.train.MonitoredTrainingSession(
            checkpoint_dir=train_dir,
            # With relative paths a folder can be moved, and a copy does not touch the original.
            scaffold=tf.train.Scaffold(saver=tf.train.Saver(save_relative_paths=True)),
            # These run before the hook that saves, those in `hooks` after it.
            chief_only_hooks=[
                _LossHook(loss, tf.train.get_global_step(), examples_per_step, log_frequency)
            ],
            hooks=[tf.train.StopAtStepHook(last_step=max_steps)],
            config=config,
        )
    # ValueError is the Saver's own check that the checkpoint's files exist.
    except (tf.errors.OpError, ValueError) as error:
        raise UserError(
            f"cannot start in --train_dir={train_dir}: {find_reason(error)}; name another folder, "
            "or mend what is there"
        ) from error
    try:
        while not session.should_stop():
            session.run(train_op)
    except BaseException as error:
        # What `with session` would do (it saves nothing), but the exception that ends an
        # exhausted input goes on to the caller.
        with quiet_cancellation():
            session.__exit__(type(error), error, error.__traceback__)
        if is_histogram_of_nonfinite(error):
            raise UserError(
                f"training has left the finite numbers: {find_reason(error)}"
            ) from error
        raise
    with quiet_cancellation():
        session.close()
