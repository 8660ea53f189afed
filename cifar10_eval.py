"""Evaluates the CIFAR-10 model: precision @ 1, the fraction of images classified correctly.

    python cifar10_eval.py                # every new checkpoint, while training runs
    python cifar10_eval.py --run_once     # the newest checkpoint

Each test image counts exactly once. By default, the script evaluates the moving averages of the
variables. Each evaluation appends a line to EVAL_DIR/results.jsonl and writes summaries for
TensorBoard.
"""

import math
import os
import sys
import time

import numpy as np
from absl import flags

import cifar10
from support.base import command_line, files, options, progress, streams
from support.base.errors import CheckpointError, UserError, first_line
from support.data import records
from support.ops import summaries
from support.ops.tensorflow_v1 import (
    is_nonfinite_histogram,
    out_of_memory_explained,
    session_config,
    tf,
    warn_of_unusable_gpus,
)
from support.run import charts, checkpoints

FLAGS = flags.FLAGS

options.DEFINE_path(
    "eval_dir",
    "/tmp/cifar10_eval",
    "Folder for summaries and results.",
    options.checkpoint_path,
)
options.DEFINE_boolean("run_once", False, "Evaluate the newest checkpoint, then exit.")
options.DEFINE_integer(
    "num_examples",
    options.Constant("NUM_EXAMPLES_PER_EPOCH_FOR_EVAL"),
    "Maximum number of images to evaluate.",
    1,
    2**31 - 1,
)
options.DEFINE_enum(
    "eval_data",
    "test",
    ["test", "train_eval"],
    "Which images to evaluate: the test file, or the training files (train_eval).",
)
options.DEFINE_integer(
    "eval_interval_secs",
    300,
    "Minimum number of seconds between the starts of two evaluations.",
    0,
    2**31 - 1,
)
options.define("checkpoint")

RESULTS_FILE = "results.jsonl"
MAX_MISTAKES = 36  # images on the sheet of mistakes


class _Counts:
    """Counts of one evaluation.

    Attributes:
      correct, total: int; images.
      cross_entropy: float; the sum over the images, in nats.
      confusion: int [classes, classes]; images by true class (row) and predicted class (column).
      mistakes: list of (image, true class, predicted class), at most MAX_MISTAKES.
      summary: the serialized summaries of the first batch, or None.
    """

    def __init__(self, num_classes):
        self.correct = self.total = 0
        self.cross_entropy = 0.0
        self.confusion = np.zeros([num_classes, num_classes], int)
        self.mistakes = []
        self.summary = None

    @property
    def precision(self):
        return self.correct / self.total

    def add(self, is_correct, outputs):
        """Adds a batch: bool [n], and the values of `eval_once`'s `outputs`, or None."""
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
    """Evaluates batches until the input ends or `num_examples` are counted; returns `_Counts`."""
    counts = _Counts(num_classes)
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    try:
        with progress.show_progress("Evaluating", num_examples, " images") as bar:
            while counts.total < num_examples:
                fetches = [top_k_op, outputs or {}]
                if counts.total == 0 and summary_op is not None:
                    fetches.append(summary_op)
                with out_of_memory_explained():
                    is_correct, values, *summary = session.run(fetches)
                counts.summary = summary[0] if summary else counts.summary
                counts.add(is_correct[: num_examples - counts.total], values or None)
                bar.update(counts.total - bar.n)
    except tf.errors.OutOfRangeError:
        pass  # the end of the epoch; if a thread failed instead, join raises its error
    finally:
        coordinator.request_stop()
        coordinator.join(threads, ignore_live_threads=False)
    return counts


@streams.dispensable()
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
      summary_writer: a `tf.summary.FileWriter` or `summaries.Writer`.
      top_k_op: bool [batch]; whether each prediction is correct. (`tf.nn.in_top_k` counts ties as
        correct, so if all logits are equal, every image counts as correct.) Its input should end
        after one epoch, so that each image counts once.
      summary_op: string []; the serialized summaries to write for the first batch, or None.
      checkpoint: path; the newest checkpoint in --checkpoint_dir if None.
      num_examples: int; the number of images to evaluate; it is an error if there are fewer. If
        None, at most --num_examples images are evaluated.
      outputs: dict of tensors for more results, or None: `images`, float32 [batch, 24, 24, 3];
        `labels` and `predictions`, int [batch]; `cross_entropy`, float32 [batch]. They add the
        recall and the precision of each class, mean cross-entropy, a confusion matrix and a sheet
        of mistakes to the summaries, and a line to `results.jsonl` in the same folder.
      class_names: the names of the classes; those of the dataset if None.

    Returns:
      float; precision @ 1, from 0 to 1.

    Raises:
      UserError: there is no checkpoint, there are too few images, or a batch does not fit into
        memory.
      CheckpointError: the checkpoint cannot be restored, or has or produces non-finite values.
    """
    if checkpoint is None:
        checkpoint = checkpoints.require_checkpoint(FLAGS.checkpoint_dir)
    if class_names is None:
        class_names = cifar10.find_dataset().class_names
    if not tf.get_collection(tf.GraphKeys.LOCAL_INIT_OP):
        # Create it once per graph, before any session runs.
        tf.add_to_collection(tf.GraphKeys.LOCAL_INIT_OP, tf.local_variables_initializer())
    with tf.Session(config=session_config(FLAGS.use_fp16)) as session:
        step = checkpoints.restore(session, saver, checkpoint)
        session.run(tf.get_collection(tf.GraphKeys.LOCAL_INIT_OP))
        try:
            counts = _count(
                session,
                top_k_op,
                outputs,
                summary_op,
                num_examples or FLAGS.num_examples,
                len(class_names),
            )
        except tf.errors.InvalidArgumentError as error:
            if is_nonfinite_histogram(error):
                raise CheckpointError(
                    f"{checkpoint} produces non-finite values: {first_line(error)}"
                ) from error
            raise
    if counts.total < (num_examples or 1):
        expected = "" if num_examples is None else f" of {num_examples}"
        raise UserError(f"the input ended after {counts.total}{expected} images")
    if not math.isfinite(counts.cross_entropy):
        raise CheckpointError(f"{checkpoint} produces a cross-entropy of {counts.cross_entropy}")
    print(f"{progress.timestamp()}: precision @ 1 = {counts.precision:.3f}", flush=True)

    summary = tf.Summary.FromString(counts.summary or b"")
    summary.value.add(tag="precision @ 1", simple_value=counts.precision)
    if outputs is not None:
        _report(counts, class_names, summary, summary_writer.get_logdir(), step, checkpoint)
    summary_writer.add_summary(summary, step)
    summary_writer.flush()
    return counts.precision


def _report(counts, class_names, summary, eval_dir, step, checkpoint):
    """Adds the details of an evaluation to its summary and to the results file."""
    correct = counts.confusion.diagonal()
    of_class, predicted = counts.confusion.sum(axis=1), counts.confusion.sum(axis=0)
    recall_of_class = _divide_by_class(class_names, correct, of_class)
    precision_of_class = _divide_by_class(class_names, correct, predicted)
    cross_entropy = counts.cross_entropy / counts.total
    summary.value.add(tag="cross_entropy", simple_value=cross_entropy)
    for kind, shares in (("recall", recall_of_class), ("precision", precision_of_class)):
        for name, share in shares.items():
            if share is not None:
                summary.value.add(tag=f"{kind}/{name}", simple_value=share)
    images, labels, predictions = (
        zip(*counts.mistakes, strict=True) if counts.mistakes else [()] * 3
    )
    for tag, png in (
        ("confusion_matrix", charts.draw_confusion_matrix(counts.confusion, class_names)),
        ("mistakes", charts.draw_mistakes(np.array(images), labels, predictions, class_names)),
    ):
        summary.value.add(tag=tag, image=tf.Summary.Image(encoded_image_string=png))
    files.append_json_line(
        os.path.join(eval_dir, RESULTS_FILE),
        {
            "step": step,
            "checkpoint": checkpoint,
            "eval_data": FLAGS.eval_data,
            "use_moving_averages": FLAGS.use_moving_averages,
            "count": counts.total,
            "precision": counts.precision,
            "cross_entropy": cross_entropy,
            "recall_of_class": recall_of_class,
            "precision_of_class": precision_of_class,
            "class_names": list(class_names),
            "confusion_matrix": counts.confusion.tolist(),
        },
    )


def _divide_by_class(class_names, counts, totals):
    """Returns count / total by class: dict of floats, or None where the total is 0."""
    return {
        name: int(count) / int(total) if total else None
        for name, count, total in zip(class_names, counts, totals, strict=True)
    }


def _count_examples(eval_test):
    """Returns how many images to evaluate; reports on stderr if some are left out or missing."""
    available = records.count_records(cifar10.find_data_folder(), eval_test)
    limit = FLAGS.num_examples
    if available < limit:
        print(
            f"--num_examples={limit}, but there are only {available} images: evaluating all of "
            "them",
            file=sys.stderr,
        )
    elif available > limit and FLAGS["num_examples"].using_default_value:
        print(
            f"There are {available} images: evaluating the first {limit} of them (--num_examples)",
            file=sys.stderr,
        )
    return min(available, limit)


def _wait_for_checkpoint(checkpoint_dir, evaluated, check_trainer):
    """Waits for a checkpoint other than the `evaluated` one, and returns its path."""
    newest = checkpoints.find_latest_checkpoint(checkpoint_dir)
    if newest is None and evaluated is None:
        print(f"Waiting for a checkpoint in {checkpoint_dir}", file=sys.stderr, flush=True)
    while newest in (None, evaluated):
        check_trainer()
        time.sleep(1)
        newest = checkpoints.find_latest_checkpoint(checkpoint_dir)
    return newest


def evaluate(last_step=None, check_trainer=lambda: None):
    """Evaluates the newest checkpoint, or each new one forever, depending on --run_once.

    If --checkpoint_dir is not a folder but a checkpoint, only that one is evaluated.

    Args:
      last_step: int; stop after evaluating a checkpoint of this step or a later one. Never if None.
      check_trainer: called while waiting for a new checkpoint; raises UserError if there will be
        none.

    Raises:
      UserError: --eval_dir cannot be written, or the dataset has changed. With --run_once also:
        there is no checkpoint, or it cannot be evaluated.
    """
    options.values()  # checks them: a constant may have been edited
    single = checkpoints.find_single_checkpoint(FLAGS.checkpoint_dir)
    run_once = FLAGS.run_once or single is not None
    checkpoint_dir = FLAGS.checkpoint_dir if single is None else os.path.dirname(single)
    if os.path.realpath(FLAGS.eval_dir) == os.path.realpath(checkpoint_dir):
        raise UserError(
            f"--eval_dir and --checkpoint_dir are both {FLAGS.eval_dir}; choose a separate folder "
            "for the evaluation summaries"
        )
    settings = cifar10.training_settings()
    if run_once:  # before spending time on the graph
        newest = checkpoints.require_checkpoint(FLAGS.checkpoint_dir)
        checkpoints.check_settings(newest, settings)
    eval_test = FLAGS.eval_data == "test"
    detector = cifar10.make_change_detector(eval_test)
    num_examples = _count_examples(eval_test)
    with tf.Graph().as_default() as graph:
        images, labels = cifar10.inputs(eval_test, num_epochs=1)
        logits = cifar10.inference(images)
        predictions = tf.argmax(logits, axis=1, output_type=labels.dtype)
        top_k_op = tf.equal(predictions, labels)
        variables = checkpoints.find_variables(FLAGS.use_moving_averages)
        saver = tf.train.Saver(variables)
        # Without the sparsity of the layers, which training already shows.
        _, summary_op = summaries.merge_collected()
        outputs = {
            "images": images,
            "labels": labels,
            "predictions": predictions,
            "cross_entropy": tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels=labels, logits=logits
            ),
        }
        with summaries.Writer(FLAGS.eval_dir, "--eval_dir") as summary_writer:
            summary_writer.add_graph(graph)
            checkpoint, evaluated_step = None, -1
            while True:
                if run_once:
                    checkpoint = checkpoints.require_checkpoint(FLAGS.checkpoint_dir)
                else:
                    checkpoint = _wait_for_checkpoint(
                        FLAGS.checkpoint_dir, checkpoint, check_trainer
                    )
                start = time.monotonic()
                try:
                    step = checkpoints.read_global_step(checkpoint)
                    checkpoints.check_settings(checkpoint, settings)
                    checkpoints.check_variables(checkpoint, variables)
                    if step < evaluated_step:
                        raise CheckpointError(
                            f"skipping {checkpoint}: its step {step} comes before step "
                            f"{evaluated_step}, which has already been evaluated"
                        )
                    eval_once(
                        saver,
                        summary_writer,
                        top_k_op,
                        summary_op,
                        checkpoint,
                        num_examples,
                        outputs,
                        settings.class_names,
                    )
                    evaluated_step = step
                except CheckpointError as error:
                    # The trainer may have deleted it. Then there is a newer one.
                    newest = checkpoints.find_latest_checkpoint(FLAGS.checkpoint_dir)
                    if run_once and newest == checkpoint:
                        raise
                    tf.logging.warning("%s", error)
                    continue
                except (UserError, tf.errors.OpError):
                    detector.check()  # a change of the data may be the cause
                    raise
                if run_once or (last_step is not None and step >= last_step):
                    return
                time.sleep(max(0.0, start + FLAGS.eval_interval_secs - time.monotonic()))


def main(argv=None):
    warn_of_unusable_gpus()
    cifar10.maybe_download_and_extract()
    evaluate()


if __name__ == "__main__":
    command_line.run(main)
