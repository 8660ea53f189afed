"""Evaluates the CIFAR-10 model: the share of images whose likeliest class is the right one.

    python cifar10_eval.py                # every new checkpoint, beside the training
    python cifar10_eval.py --run_once     # the newest one

Each test image counts exactly once. The variables' moving averages stand in for the variables.
Every evaluation is a line of EVAL_DIR/results.jsonl, and a step in TensorBoard.
"""

import math
import os
import sys
import time
import uuid

import numpy as np
from absl import flags

import cifar10
import cifar10_charts
import cifar10_data
from cifar10_progress import show_progress
from cifar10_restore import (
    CheckpointError,
    check_fits,
    check_settings,
    read_step,
    require_checkpoint,
    restore,
    variables_to_restore,
)
from cifar10_runtime import (
    STOP_REQUEST,
    UserError,
    append_json_line,
    find_latest_checkpoint,
    find_reason,
    format_now,
    is_histogram_of_nonfinite,
    quiet_cancellation,
    run,
    session_config,
    tf,
)
from cifar10_settings import find_settings

FLAGS = flags.FLAGS

flags.DEFINE_string("eval_dir", "/tmp/cifar10_eval", "Folder for summaries.")
flags.DEFINE_enum(
    "eval_data", "test", ["test", "train_eval"], "Images: the test file's or the training files'."
)
flags.DEFINE_integer(
    "eval_interval_secs",
    300,
    "Seconds between two evaluations, at least.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
flags.register_validator("eval_dir", bool, "it must name a folder")
flags.DEFINE_integer(
    "num_examples", 10000, "Images to evaluate, at most.", lower_bound=1, upper_bound=2**31 - 1
)
flags.DEFINE_boolean("run_once", False, "Evaluate the newest checkpoint, then exit.")

RESULTS_FILE = "results.jsonl"
MAX_MISTAKES = 36  # images on the sheet of mistakes


class _Tally:
    """What the evaluation of one checkpoint has counted.

    Attributes:
      correct: int; images that the model got right.
      total: int; images.
      precision: float; the first as a share of the second.
      summary: serialized summary of the first batch; None without one.
      cross_entropy: float; the sum over the images, in nats.
      confusion: int [classes, classes]; images by true class (row) and predicted class (column).
      mistakes: list of (image, true class, predicted class), the first of them.
    """

    def __init__(self, num_classes):
        self.correct, self.total, self.summary = 0, 0, None
        self.cross_entropy, self.mistakes = 0.0, []
        self.confusion = np.zeros([num_classes, num_classes], int)

    @property
    def precision(self):
        return self.correct / self.total

    def add(self, is_correct, outputs):
        """Adds a batch: bool [batch], and the values of `eval_once`'s `outputs` or None."""
        self.correct += np.count_nonzero(is_correct)
        self.total += len(is_correct)
        if outputs is None:
            return
        outputs = {name: values[: len(is_correct)] for name, values in outputs.items()}
        labels, predictions = outputs["labels"], outputs["predictions"]
        self.cross_entropy += float(outputs["cross_entropy"].sum(dtype=np.float64))
        np.add.at(self.confusion, (labels, predictions), 1)
        for i in np.flatnonzero(labels != predictions)[: MAX_MISTAKES - len(self.mistakes)]:
            self.mistakes.append((outputs["images"][i], labels[i], predictions[i]))


def _count(session, top_k_op, outputs, summary_op, num_examples, num_classes):
    """Runs batches until the input ends or `num_examples` are counted; returns a `_Tally`."""
    tally = _Tally(num_classes)
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    try:
        with show_progress("Evaluating", num_examples, " images") as bar:
            while tally.total < num_examples:
                STOP_REQUEST.raise_if_made()
                fetches = [top_k_op, outputs or {}]
                if tally.total == 0 and summary_op is not None:
                    fetches.append(summary_op)
                is_correct, values, *summaries = session.run(fetches)
                tally.summary = summaries[0] if summaries else tally.summary
                tally.add(is_correct[: num_examples - tally.total], values or None)
                bar.update(tally.total - bar.n)
    except tf.errors.OutOfRangeError:
        pass  # the epoch is over; if a thread's error was the cause, join raises that
    finally:
        with quiet_cancellation():
            coordinator.request_stop()
            coordinator.join(threads, ignore_live_threads=False)
    return tally


def eval_once(
    saver,
    summary_writer,
    top_k_op,
    summary_op,
    checkpoint=None,
    num_examples=None,
    outputs=None,
    class_names=None,
):
    """Evaluates one checkpoint, prints precision @ 1 and writes it as a summary.

    Args:
      saver: the `tf.train.Saver` that restores the variables.
      summary_writer: a `tf.summary.FileWriter`.
      top_k_op: bool [batch]; whether each prediction is right. Its input should end after one
        epoch, so that each image counts once.
      summary_op: string []; serialized summaries, written for the first batch. Or None.
      checkpoint: the checkpoint's path; the newest in --checkpoint_dir where None.
      num_examples: int; images to evaluate, fewer are an error. Where None, --num_examples at
        most.
      outputs: what else to evaluate, or None: a dict of `images`, float32 [batch, 24, 24, 3];
        `labels` and `predictions`, int [batch]; `cross_entropy`, float32 [batch]. Adds
        the precision of each class, the mean cross-entropy, the confusion matrix and a sheet of
        mistakes to the summaries, and a line to the file `results.jsonl` beside them.
      class_names: the names of the classes; the data set's where None.

    Returns:
      float; the share of the images that were right, 0 to 1.

    Raises:
      UserError: there is no checkpoint, or too few images.
      CheckpointError: the checkpoint cannot be restored, or holds values that are not finite.
    """
    if checkpoint is None:
        checkpoint = require_checkpoint(FLAGS.checkpoint_dir)
    if class_names is None:
        class_names = cifar10.find_class_names()
    if not tf.get_collection(tf.GraphKeys.LOCAL_INIT_OP):
        # Once per graph, and before a session runs it: the next evaluation uses it again.
        tf.add_to_collection(tf.GraphKeys.LOCAL_INIT_OP, tf.local_variables_initializer())
    with tf.Session(config=session_config(FLAGS.use_fp16)) as session:
        step = restore(session, saver, checkpoint)
        session.run(tf.get_collection(tf.GraphKeys.LOCAL_INIT_OP))
        try:
            tally = _count(
                session,
                top_k_op,
                outputs,
                summary_op,
                num_examples or FLAGS.num_examples,
                len(class_names),
            )
        except tf.errors.InvalidArgumentError as error:
            if is_histogram_of_nonfinite(error):
                raise CheckpointError(
                    f"{checkpoint} has values that are not finite: {find_reason(error)}"
                ) from error
            raise
    if tally.total < (num_examples or 1):
        raise UserError(
            f"the input has ended after {tally.total} of {num_examples or 'the'} images"
        )
    if not math.isfinite(tally.cross_entropy):
        raise CheckpointError(f"{checkpoint} gives a cross-entropy of {tally.cross_entropy}")
    print(f"{format_now()}: precision @ 1 = {tally.precision:.3f}", flush=True)

    summary = tf.Summary()
    if tally.summary is not None:
        summary.ParseFromString(tally.summary)
    summary.value.add(tag="precision @ 1", simple_value=tally.precision)
    if outputs is not None:
        _report(tally, class_names, summary, summary_writer.get_logdir(), step, checkpoint)
    summary_writer.add_summary(summary, step)
    summary_writer.flush()
    return tally.precision


def _report(tally, names, summary, eval_dir, step, checkpoint):
    """Adds the details of an evaluation to its summary, and a line to the file of results."""
    # Of the images of a class, the share that is right; their mean, weighted, is precision @ 1.
    of_class = {
        name: int(row[label]) / int(row.sum()) if row.any() else None
        for label, (name, row) in enumerate(zip(names, tally.confusion, strict=True))
    }
    cross_entropy = tally.cross_entropy / tally.total
    summary.value.add(tag="cross_entropy", simple_value=cross_entropy)
    for name, share in of_class.items():
        if share is not None:
            summary.value.add(tag=f"precision/{name}", simple_value=share)
    images, labels, predictions = zip(*tally.mistakes, strict=True) if tally.mistakes else [()] * 3
    for tag, png in (
        ("confusion_matrix", cifar10_charts.draw_confusion_matrix(tally.confusion, names)),
        ("mistakes", cifar10_charts.draw_mistakes(np.array(images), labels, predictions, names)),
    ):
        summary.value.add(tag=tag, image=tf.Summary.Image(encoded_image_string=png))
    append_json_line(
        os.path.join(eval_dir, RESULTS_FILE),
        {
            "step": step,
            "checkpoint": checkpoint,
            "eval_data": FLAGS.eval_data,
            "use_moving_averages": FLAGS.use_moving_averages,
            "count": tally.total,
            "precision": tally.precision,
            "cross_entropy": cross_entropy,
            "precision_of_class": of_class,
            "class_names": list(names),
            "confusion_matrix": tally.confusion.tolist(),
        },
    )


def _wait_for_checkpoint(checkpoint_dir, done, check_trainer):
    """Waits until the newest checkpoint in a folder, which may come later, is not `done`."""
    if done is None and find_latest_checkpoint(checkpoint_dir) is None:
        print(f"Waiting for a checkpoint in {checkpoint_dir}", file=sys.stderr, flush=True)
    while (newest := find_latest_checkpoint(checkpoint_dir)) in (None, done):
        STOP_REQUEST.raise_if_made()
        check_trainer()
        time.sleep(1)
    return newest


def _check_folders():
    """Raises UserError where summaries would go among the checkpoints, as a second trainer's."""
    if os.path.realpath(FLAGS.eval_dir) == os.path.realpath(FLAGS.checkpoint_dir):
        raise UserError(
            f"--eval_dir and --checkpoint_dir are both {FLAGS.eval_dir}; summaries of evaluations "
            "need a folder of their own"
        )


def _make_summary_writer(eval_dir, graph):
    try:
        # A name of its own: by itself it would be the second's, and two in one second would clash.
        return tf.summary.FileWriter(eval_dir, graph, filename_suffix=f".{uuid.uuid4().hex}")
    except tf.errors.OpError as error:
        raise UserError(f"cannot write to --eval_dir={eval_dir}: {find_reason(error)}") from error


def evaluate(last_step=None, check_trainer=lambda: None):
    """Evaluates as the flags say: the newest checkpoint, or each new one for ever.

    Args:
      last_step: int; the global step to stop after, once a checkpoint of it has been evaluated.
      check_trainer: called while a new checkpoint is waited for; raises UserError when there will
        be none any more.

    Raises:
      UserError: the folder for summaries cannot be written; with --run_once also, there is no
        checkpoint, or it cannot be evaluated.
    """
    _check_folders()
    settings = find_settings()
    if FLAGS.run_once:  # before anything is made in vain
        check_settings(require_checkpoint(FLAGS.checkpoint_dir), settings)
    eval_test = FLAGS.eval_data == "test"
    available = cifar10_data.count_records(cifar10.find_data_folder(), eval_test)
    check_input = cifar10.make_change_check(eval_test)
    if available < FLAGS.num_examples:
        print(
            f"--num_examples={FLAGS.num_examples}, but there are {available}: evaluating those",
            file=sys.stderr,
        )
    elif available > FLAGS.num_examples == FLAGS["num_examples"].default:
        print(
            f"There are {available} images: evaluating the first {FLAGS.num_examples} of them "
            "(--num_examples)",
            file=sys.stderr,
        )
    with tf.Graph().as_default() as graph:
        images, labels = cifar10.inputs(eval_test, num_epochs=1)
        logits = cifar10.inference(images)
        top_k_op = tf.nn.in_top_k(logits, labels, 1)
        variables = variables_to_restore(FLAGS.use_moving_averages)
        saver = tf.train.Saver(variables)
        # How many zeros a layer puts out is a matter of the training, and shown there.
        summaries = tf.get_collection(tf.GraphKeys.SUMMARIES)
        summary_op = tf.summary.merge([s for s in summaries if s.op.type != "ScalarSummary"])
        outputs = {
            "images": images,
            "labels": labels,
            "predictions": tf.argmax(logits, axis=1),
            "cross_entropy": tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels=labels, logits=logits
            ),
        }
        with _make_summary_writer(FLAGS.eval_dir, graph) as summary_writer:
            done, evaluated_step = None, -1
            while True:
                if FLAGS.run_once:
                    checkpoint = require_checkpoint(FLAGS.checkpoint_dir)
                else:
                    checkpoint = _wait_for_checkpoint(FLAGS.checkpoint_dir, done, check_trainer)
                start = time.monotonic()
                done = checkpoint
                try:
                    step = read_step(checkpoint)
                    check_fits(checkpoint, variables, settings)
                    if step < evaluated_step:
                        raise CheckpointError(
                            f"{checkpoint} is of step {step}, before step {evaluated_step}, which "
                            "has been evaluated: passed over"
                        )
                    eval_once(
                        saver,
                        summary_writer,
                        top_k_op,
                        summary_op,
                        checkpoint,
                        num_examples=min(available, FLAGS.num_examples),
                        outputs=outputs,
                        class_names=settings.class_names,
                    )
                    evaluated_step = step
                except CheckpointError as error:
                    # The trainer may have deleted it: then there is a newer one.
                    if FLAGS.run_once and find_latest_checkpoint(FLAGS.checkpoint_dir) == done:
                        raise
                    tf.logging.warning("%s", error)
                    continue
                except (UserError, tf.errors.OpError):
                    check_input()  # the data may explain it
                    raise
                if FLAGS.run_once or (last_step is not None and step >= last_step):
                    return
                time.sleep(max(0.0, start + FLAGS.eval_interval_secs - time.monotonic()))


def main():
    cifar10.maybe_download_and_extract()
    evaluate()


if __name__ == "__main__":
    run(main)
