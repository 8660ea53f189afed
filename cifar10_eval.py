"""Evaluates the CIFAR-10 model: the share of images whose likeliest class is the right one.

    python cifar10_eval.py                # every new checkpoint, beside the training
    python cifar10_eval.py --run_once     # the newest one

Each test image counts exactly once. The variables' moving averages stand in for the variables.
"""

import datetime
import sys
import time

import numpy as np
from absl import flags

import cifar10
import cifar10_data
from cifar10_runtime import UserError, quiet_cancellation, reason_of, run, session_config, tf

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(cifar10)

flags.DEFINE_string("eval_dir", "/tmp/cifar10_eval", "Folder for summaries.")
flags.DEFINE_enum(
    "eval_data", "test", ["test", "train_eval"], "Images: the test file's or the training files'."
)
flags.DEFINE_string("checkpoint_dir", "/tmp/cifar10_train", "Folder to read checkpoints from.")
flags.DEFINE_integer(
    "eval_interval_secs", 300, "Seconds between two evaluations, at least.", lower_bound=0
)
flags.DEFINE_integer("num_examples", 10000, "Images to evaluate, at most.", lower_bound=1)
flags.DEFINE_boolean("run_once", False, "Evaluate the newest checkpoint, then exit.")
flags.DEFINE_boolean(
    "use_moving_averages",
    True,
    "Evaluate the variables' moving averages; false: the variables themselves.",
)


def _count_correct(session, top_k_op, summary_op, num_examples):
    """Runs batches until the input ends or `num_examples` are counted.

    Returns:
      correct: int; how many of them the model got right.
      total: int; how many there were.
      summary: the serialized summary of the first batch; None without one.
    """
    correct, total, summary = 0, 0, None
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    try:
        while total < num_examples:
            if total == 0 and summary_op is not None:
                predictions, summary = session.run([top_k_op, summary_op])
            else:
                predictions = session.run(top_k_op)
            predictions = predictions[: num_examples - total]
            correct += np.count_nonzero(predictions)
            total += len(predictions)
    except tf.errors.OutOfRangeError:
        pass  # the epoch is over; if a thread's error was the cause, join raises that
    finally:
        with quiet_cancellation():
            coordinator.request_stop()
            coordinator.join(threads, ignore_live_threads=False)
    return correct, total, summary


class CheckpointError(UserError):
    """A checkpoint cannot be restored: it is damaged, not of this model, or gone."""


def newest_checkpoint(checkpoint_dir):
    """Returns the path of the newest checkpoint. Raises UserError where there is none."""
    checkpoint = tf.train.latest_checkpoint(checkpoint_dir)
    if checkpoint is None:
        raise UserError(
            f"there is no checkpoint in {checkpoint_dir}; train first, or name another folder "
            "with --checkpoint_dir"
        )
    return checkpoint


def _restore(session, saver, checkpoint):
    """Restores the variables, and returns the global step of the checkpoint."""
    try:
        saver.restore(session, checkpoint)
        return tf.train.load_checkpoint(checkpoint).get_tensor(tf.GraphKeys.GLOBAL_STEP)
    # ValueError is the Saver's own check that the files exist.
    except (tf.errors.OpError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} cannot be restored: {reason_of(error)}") from error


def eval_once(saver, summary_writer, top_k_op, summary_op, checkpoint=None, num_examples=None):
    """Evaluates one checkpoint, prints precision @ 1 and writes it as a summary.

    Args:
      saver: the `tf.train.Saver` that restores the variables.
      summary_writer: a `tf.summary.FileWriter`.
      top_k_op: bool [batch]; whether each prediction is right. Its input should end after one
        epoch, so that each image counts once.
      summary_op: string []; serialized summaries, written for the first batch. Or None.
      checkpoint: the checkpoint's path; the newest in --checkpoint_dir where None.
      num_examples: int; images to evaluate at most; --num_examples where None.

    Returns:
      float; the share of the images that were right, 0 to 1.

    Raises:
      UserError: there is no checkpoint, or not one image.
      CheckpointError: the checkpoint cannot be restored.
    """
    if checkpoint is None:
        checkpoint = newest_checkpoint(FLAGS.checkpoint_dir)
    if num_examples is None:
        num_examples = FLAGS.num_examples
    if not tf.get_collection(tf.GraphKeys.LOCAL_INIT_OP):
        # Once per graph, and before a session runs it: the next evaluation uses it again.
        tf.add_to_collection(tf.GraphKeys.LOCAL_INIT_OP, tf.local_variables_initializer())
    with tf.Session(config=session_config(FLAGS.use_fp16)) as session:
        step = _restore(session, saver, checkpoint)
        session.run(tf.get_collection(tf.GraphKeys.LOCAL_INIT_OP))
        correct, total, first_batch = _count_correct(session, top_k_op, summary_op, num_examples)
    if total == 0:
        raise UserError("there was not one image to evaluate")
    precision = correct / total
    now = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S.%f}"
    print(f"{now}: precision @ 1 = {precision:.3f}", flush=True)

    summary = tf.Summary()
    if first_batch is not None:
        summary.ParseFromString(first_batch)
    summary.value.add(tag="precision @ 1", simple_value=precision)
    summary_writer.add_summary(summary, step)
    summary_writer.flush()
    return precision


def _eval_newest(checkpoint_dir, *arguments):
    """Calls `eval_once(*arguments, checkpoint)`; returns the path of the checkpoint it took.

    A checkpoint that the trainer deletes meanwhile is given up for the newest one.
    """
    checkpoint = newest_checkpoint(checkpoint_dir)
    while True:
        try:
            eval_once(*arguments, checkpoint)
            return checkpoint
        except CheckpointError:
            failed, checkpoint = checkpoint, newest_checkpoint(checkpoint_dir)
            if checkpoint == failed:
                raise


def _wait_for_checkpoint(checkpoint_dir, done):
    """Returns when the newest checkpoint in a folder, which may come later, is not `done`."""
    if done is None and tf.train.latest_checkpoint(checkpoint_dir) is None:
        print(f"Waiting for a checkpoint in {checkpoint_dir}", file=sys.stderr, flush=True)
    while tf.train.latest_checkpoint(checkpoint_dir) in (None, done):
        time.sleep(1)


def evaluate():
    """Evaluates as the flags say: the newest checkpoint, or each new one for ever.

    Raises:
      UserError: with --run_once, there is no checkpoint, or it cannot be restored.
    """
    eval_test = FLAGS.eval_data == "test"
    available = cifar10_data.count_records(cifar10.data_folder(), eval_test)
    if available < FLAGS.num_examples:
        print(
            f"--num_examples={FLAGS.num_examples}, but there are {available}: evaluating those",
            file=sys.stderr,
        )
    with tf.Graph().as_default() as graph:
        images, labels = cifar10.inputs(eval_test, num_epochs=1)
        logits = cifar10.inference(images)
        top_k_op = tf.nn.in_top_k(logits, labels, 1)
        if FLAGS.use_moving_averages:
            averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
            saver = tf.train.Saver(averages.variables_to_restore())
        else:
            saver = tf.train.Saver(tf.trainable_variables())
        with tf.summary.FileWriter(FLAGS.eval_dir, graph) as summary_writer:
            arguments = (saver, summary_writer, top_k_op, tf.summary.merge_all())
            if FLAGS.run_once:
                _eval_newest(FLAGS.checkpoint_dir, *arguments)
                return
            done = None
            while True:
                _wait_for_checkpoint(FLAGS.checkpoint_dir, done)
                start = time.monotonic()
                try:
                    done = _eval_newest(FLAGS.checkpoint_dir, *arguments)
                except CheckpointError as error:
                    tf.logging.warning("%s", error)
                    done = tf.train.latest_checkpoint(FLAGS.checkpoint_dir)
                time.sleep(max(0.0, start + FLAGS.eval_interval_secs - time.monotonic()))


def main():
    cifar10.maybe_download_and_extract()
    evaluate()


if __name__ == "__main__":
    run(main)
