"""Evaluates the CIFAR-10 model: precision @ 1, the fraction of images classified correctly.

    python cifar10_eval.py                # every new checkpoint, while training runs
    python cifar10_eval.py --run_once     # the newest checkpoint

Each test image counts exactly once. By default, the script evaluates the moving averages of the
variables. Each evaluation appends a line to EVAL_DIR/results.jsonl and writes summaries for
TensorBoard.
"""

from absl import flags

import cifar10
from support.base import command_line, options, progress, streams
from support.data import records
from support.ops import summaries
from support.ops.tensorflow_v1 import session_config, tf, warn_of_unusable_gpus
from support.run import checkpoints, evaluation

FLAGS = flags.FLAGS

options.DEFINE_path(
    "eval_dir", "/tmp/cifar10_eval", "Folder for summaries and results.", options.checkpoint_path
)
options.DEFINE_boolean("run_once", False, "Evaluate the newest checkpoint, then exit.")
NUM_EXAMPLES = options.Constant("NUM_EXAMPLES_PER_EPOCH_FOR_EVAL")
options.DEFINE_integer("num_examples", NUM_EXAMPLES, "Maximum number of images to evaluate.", 1)
options.DEFINE_enum(
    "eval_data", "test", ["test", "train_eval"], "Evaluate the test file or the training files."
)
options.DEFINE_integer(
    "eval_interval_secs", 300, "Minimum number of seconds between the starts of evaluations.", 0
)
options.define("checkpoint")


@streams.tolerate_lost_output()
def eval_once(
    saver, summary_writer, top_k_op, summary_op, checkpoint=None, num_examples=None, outputs=None
):
    """Evaluates one checkpoint, prints precision @ 1 and writes it as a summary.

    Args:
      saver: `tf.train.Saver` of the variables.
      summary_writer: `tf.summary.FileWriter` or `summaries.Writer`.
      top_k_op: bool [batch]; whether each prediction is correct. Its input should end after one
        epoch, so that each image counts once.
      summary_op: string []; the serialized summaries to write for the first batch, or None.
      checkpoint: `checkpoints.Checkpoint`; the newest one in --checkpoint_dir if None.
      num_examples: int; evaluate exactly this many images; if None, at most --num_examples.
      outputs: dict of tensors from `evaluation.make_outputs`, for more results; or None.

    Returns:
      float; precision @ 1, from 0 to 1.

    Raises:
      UserError: there is no usable checkpoint, or there are too few images or too little memory.
    """
    checkpoint = checkpoint or checkpoints.use_newest(FLAGS.checkpoint_dir)
    class_names = cifar10.find_dataset().class_names
    counts = evaluation.Counts(class_names, num_examples or FLAGS.num_examples)
    with tf.Session(config=session_config(FLAGS.use_fp16)) as sess:
        checkpoints.restore(sess, saver, checkpoint)
        with evaluation.running_input(sess, checkpoint), counts.show_progress():
            while not counts.are_complete:  # or until the input ends
                is_first_batch = counts.total == 0 and summary_op is not None
                fetches = [top_k_op, outputs or {}, summary_op if is_first_batch else []]
                counts.add(*sess.run(fetches))
    counts.check(checkpoint, num_examples)
    print(f"{progress.timestamp()}: precision @ 1 = {counts.precision:.3f}", flush=True)

    details = {"eval_data": FLAGS.eval_data, "use_moving_averages": FLAGS.use_moving_averages}
    counts.report(summary_writer, checkpoint, None if outputs is None else details)
    return counts.precision


def evaluate(last_step=None, check_trainer=lambda: None):
    """Evaluates the newest checkpoint, or each new one forever, depending on --run_once.

    If --checkpoint_dir is a checkpoint instead of a folder, only that one is evaluated.

    Args:
      last_step: int; stop after evaluating a checkpoint of this step or later. Never if None.
      check_trainer: called once a second while waiting for a checkpoint; may raise UserError.
    """
    options.values()  # checks them: a constant may have been edited
    checkpoint_dir, eval_test = FLAGS.checkpoint_dir, FLAGS.eval_data == "test"
    evaluation.check_eval_dir(FLAGS.eval_dir, checkpoint_dir)
    settings = cifar10.training_settings()
    run_once = FLAGS.run_once or checkpoints.find_single_checkpoint(checkpoint_dir) is not None
    if run_once:  # before spending time on the graph
        checkpoints.use_newest(checkpoint_dir, lambda newest: newest.check_settings(settings))
    folder = cifar10.find_dataset().folder
    detector = records.ChangeDetector(folder, eval_test)
    available = records.count_records(folder, eval_test)
    is_default = FLAGS["num_examples"].using_default_value
    num_examples = evaluation.limit_examples(available, FLAGS.num_examples, is_default)
    with tf.Graph().as_default() as graph, summaries.Writer(FLAGS.eval_dir, "--eval_dir") as writer:
        images, labels = cifar10.inputs(eval_test, num_epochs=1)
        logits = cifar10.inference(images)
        outputs = evaluation.make_outputs(images, labels, logits)
        top_k_op = tf.equal(outputs["predictions"], labels)
        # Without the sparsity of the layers, which training already shows.
        _, summary_op = summaries.merge_collected()
        writer.add_graph(graph)
        variables = checkpoints.find_variables(FLAGS.use_moving_averages)
        saver = tf.train.Saver(variables)

        def evaluate_one(checkpoint):
            detector.check()
            checkpoint.check_settings(settings)
            checkpoint.check_variables(variables)
            eval_once(saver, writer, top_k_op, summary_op, checkpoint, num_examples, outputs)

        with detector.explain_errors():
            if run_once:
                checkpoints.use_newest(checkpoint_dir, evaluate_one)
            else:
                evaluation.use_new_checkpoints(
                    checkpoint_dir, evaluate_one, FLAGS.eval_interval_secs, last_step, check_trainer
                )


def main(argv=None):
    warn_of_unusable_gpus()
    cifar10.maybe_download_and_extract()
    evaluate()


if __name__ == "__main__":
    command_line.run(main)
