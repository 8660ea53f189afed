"""Evaluation: waiting for checkpoints, counting predictions, and writing results."""

import contextlib
import math
import os
import time

import numpy as np

from support.base import files, progress
from support.base.errors import CheckpointError, UserError, first_line
from support.base.messages import report
from support.ops.tensorflow_v1 import is_nonfinite_histogram, out_of_memory_explained, tf
from support.run import charts, checkpoints

RESULTS_FILE = "results.jsonl"
MAX_MISTAKES = 36  # images on the sheet of mistakes


# --- Which checkpoints and images to evaluate.


def use_new_checkpoints(folder, use, interval_secs, last_step=None, check_trainer=lambda: None):
    """Calls a function with each new checkpoint, and reports the checkpoints that are refused.

    Args:
      folder: path of the folder with the checkpoints.
      use: function of a `checkpoints.Checkpoint`; raises CheckpointError to refuse the checkpoint.
        It is never called for an earlier step than the last one that it accepted.
      interval_secs: int; the minimum number of seconds between the starts of two calls.
      last_step: int; return after a checkpoint of this step or a later one. Never if None.
      check_trainer: called while waiting; raises UserError if there will be no new checkpoint.
    """
    path, used_step = None, -1
    while True:
        path = _wait_for_checkpoint(folder, path, check_trainer)
        start = time.monotonic()
        try:
            checkpoints.check_in_other_process(path)  # a damaged one could end this process
            checkpoint = checkpoints.read(path)
            if checkpoint.step < used_step:
                raise CheckpointError(
                    f"skipping {path}: its step {checkpoint.step} comes before step {used_step}, "
                    "which has already been evaluated"
                )
            use(checkpoint)
        except CheckpointError as error:  # a trainer may have deleted it; then there is a newer one
            tf.logging.warning("%s", error)
            continue
        used_step = checkpoint.step
        if last_step is not None and used_step >= last_step:
            return
        time.sleep(max(0.0, start + interval_secs - time.monotonic()))


def _wait_for_checkpoint(folder, previous, check_trainer):
    """Waits for a checkpoint other than the `previous` one, and returns its path."""
    check, is_reported = checkpoints.check_in_other_process, previous is not None
    while (newest := checkpoints.find_latest_checkpoint(folder, check)) in (None, previous):
        if not is_reported:
            report(f"Waiting for a checkpoint in {folder}")
            is_reported = True
        check_trainer()
        time.sleep(1)
    return newest


def check_eval_dir(eval_dir, checkpoint_dir):
    """Raises UserError if the results would be written beside the checkpoints.

    `checkpoint_dir` may also be a checkpoint.
    """
    if (single := checkpoints.find_single_checkpoint(checkpoint_dir)) is not None:
        checkpoint_dir = os.path.dirname(single)
    if os.path.realpath(eval_dir) == os.path.realpath(checkpoint_dir):
        raise UserError(
            f"--eval_dir and --checkpoint_dir are both {eval_dir}; choose a separate folder for "
            "the evaluation summaries"
        )
    files.refuse_folder_of_others("--eval_dir", eval_dir)


def limit_examples(available, limit, is_default):
    """Returns how many of the available images to evaluate; `limit` is --num_examples.

    Reports on stderr if images are missing, or left out by a limit that is only the default.
    """
    if available < limit:
        report(
            f"--num_examples={limit}, but there are only {available} images: evaluating all of them"
        )
    elif available > limit and is_default:
        report(
            f"There are {available} images: evaluating the first {limit} of them (--num_examples)"
        )
    return min(available, limit)


# --- Counting.


def make_outputs(images, labels, logits):
    """Returns a dict of the tensors from which `Counts` derives its detailed results.

    Args:
      images: float32 [batch, 24, 24, 3].
      labels: int32 [batch].
      logits: float32 [batch, classes].

    Returns:
      `images`; `labels`; `predictions`, int32 [batch]; and `cross_entropy`, float32 [batch].
    """
    return {
        "images": images,
        "labels": labels,
        "predictions": tf.argmax(logits, axis=1, output_type=labels.dtype),
        "cross_entropy": tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=labels, logits=logits
        ),
    }


@contextlib.contextmanager
def running_input(session, checkpoint):
    """Runs the input's threads in the context. The end of the input leaves it without an error.

    Raises:
      UserError: a batch does not fit into memory.
      CheckpointError: the `checkpoints.Checkpoint` produces values that are not finite.
    """
    # With `num_epochs`, the input counts the epochs in a local variable.
    session.run([variable.initializer for variable in tf.local_variables()])
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    try:
        with out_of_memory_explained():
            yield
    except tf.errors.OutOfRangeError:
        pass  # the end of the epoch; if a thread failed instead, join raises its error
    except tf.errors.InvalidArgumentError as error:
        if is_nonfinite_histogram(error):
            raise CheckpointError(
                f"{checkpoint.path} produces non-finite values: {first_line(error)}"
            ) from error
        raise
    finally:
        coordinator.request_stop()
        coordinator.join(threads, ignore_live_threads=False)


class Counts:
    """The counts of one evaluation.

    Args:
      class_names: list of strings.
      limit: int; the number of images to count. Further ones are ignored.

    Attributes:
      correct, total: int; images.
    """

    def __init__(self, class_names, limit):
        self.correct = self.total = 0
        self._class_names = list(class_names)
        self._limit = limit
        self._summary = tf.Summary()
        self._cross_entropy = 0.0  # the sum over the images, in nats
        # Images by true class (row) and predicted class (column).
        self._confusion = np.zeros([len(class_names)] * 2, int)
        self._mistakes = []  # (image, true class, predicted class)
        self._bar = None

    @property
    def are_complete(self):
        """Whether enough images have been counted."""
        return self.total >= self._limit

    @property
    def precision(self):
        """Precision @ 1: the fraction of the images that are classified correctly."""
        return self.correct / self.total

    @contextlib.contextmanager
    def show_progress(self):
        """Shows a progress bar of the counted images. Call `add` only in this context."""
        with progress.show_progress("Evaluating", self._limit, " images") as self._bar:
            yield

    def add(self, is_correct, outputs, summary=()):
        """Adds a batch.

        Args:
          is_correct: bool [batch].
          outputs: the values of `make_outputs`, or an empty dict.
          summary: bytes; serialized summaries to write, or empty.
        """
        self._summary.MergeFromString(bytes(summary))
        is_correct = is_correct[: self._limit - self.total]
        self.correct += np.count_nonzero(is_correct)
        self.total += len(is_correct)
        self._bar.update(len(is_correct))
        if not outputs:
            return
        outputs = {name: values[: len(is_correct)] for name, values in outputs.items()}
        labels, predictions = outputs["labels"], outputs["predictions"]
        self._cross_entropy += float(outputs["cross_entropy"].sum(dtype=np.float64))
        np.add.at(self._confusion, (labels, predictions), 1)
        for i in np.flatnonzero(labels != predictions)[: MAX_MISTAKES - len(self._mistakes)]:
            self._mistakes.append((outputs["images"][i], labels[i], predictions[i]))

    def check(self, checkpoint, num_examples=None):
        """Raises UserError if images are missing, or CheckpointError if a result is not finite.

        Args:
          checkpoint: the `checkpoints.Checkpoint` that was evaluated.
          num_examples: int; the number of images expected. None for at least one.
        """
        if self.total < (num_examples or 1):
            expected = "" if num_examples is None else f" of {num_examples}"
            raise UserError(f"the input ended after {self.total}{expected} images")
        if not math.isfinite(self._cross_entropy):
            raise CheckpointError(
                f"{checkpoint.path} produces a cross-entropy of {self._cross_entropy}"
            )

    def report(self, summary_writer, checkpoint, details=None):
        """Writes the results as summaries and, with details, a line to RESULTS_FILE.

        Args:
          summary_writer: `summaries.Writer` or `tf.summary.FileWriter`.
          checkpoint: the `checkpoints.Checkpoint` that was evaluated.
          details: dict; further entries of the line. If None, only precision @ 1 is written.
        """
        self._summary.value.add(tag="precision @ 1", simple_value=self.precision)
        if details is not None:
            results = self._find_results()
            self._summarize(results)
            files.append_json_line(
                os.path.join(summary_writer.get_logdir(), RESULTS_FILE),
                {"step": checkpoint.step, "checkpoint": checkpoint.path, **details, **results},
            )
        summary_writer.add_summary(self._summary, checkpoint.step)
        summary_writer.flush()

    def _find_results(self):
        """Returns the results as a dict that JSON can represent."""
        correct = self._confusion.diagonal()
        return {
            "count": self.total,
            "precision": self.precision,
            "cross_entropy": self._cross_entropy / self.total,
            "recall_of_class": self._divide(correct, self._confusion.sum(axis=1)),
            "precision_of_class": self._divide(correct, self._confusion.sum(axis=0)),
            "class_names": self._class_names,
            "confusion_matrix": self._confusion.tolist(),
        }

    def _summarize(self, results):
        """Adds the results and their charts to the summaries."""
        add = self._summary.value.add
        add(tag="cross_entropy", simple_value=results["cross_entropy"])
        for kind in ("recall", "precision"):
            for name, share in results[f"{kind}_of_class"].items():
                if share is not None:
                    add(tag=f"{kind}/{name}", simple_value=share)
        for tag, png in (
            ("confusion_matrix", charts.draw_confusion_matrix(self._confusion, self._class_names)),
            ("mistakes", charts.draw_mistakes(self._mistakes, self._class_names)),
        ):
            add(tag=tag, image=tf.Summary.Image(encoded_image_string=png))

    def _divide(self, counts, totals):
        """Returns count / total by class: dict of floats, or None where the total is 0."""
        return {
            name: int(count) / int(total) if total else None
            for name, count, total in zip(self._class_names, counts, totals, strict=True)
        }
