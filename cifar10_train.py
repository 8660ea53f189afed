"""Trains the CIFAR-10 model on a CPU or on one GPU; with TF_CONFIG, on several machines in step.

    python cifar10_train.py
    python cifar10_train.py --synthetic_data --max_steps=400 --train_dir=/tmp/synthetic/train
    tensorboard --logdir /tmp/cifar10_train

Started again with the same --train_dir it goes on from the newest checkpoint there. The model gets
to about 86% precision within a few hours on a GPU (source: the TensorFlow tutorial).
"""

import os

from absl import flags

import cifar10
import cifar10_cluster
import cifar10_session
from cifar10_runtime import run, tf

FLAGS = flags.FLAGS


def train():
    """Trains as the flags say, up to --max_steps."""
    with cifar10_session.prepare_train_dir(FLAGS.train_dir, FLAGS.max_steps) as is_needed:
        if not is_needed:
            return
        with cifar10_session.seeded_graph():
            with tf.device("/cpu:0"):
                global_step = tf.train.get_or_create_global_step()
            images, labels = cifar10.distorted_inputs()
            logits = cifar10.inference(images)
            loss = cifar10.loss(logits, labels)
            train_op = cifar10.train(loss, global_step)
            cifar10_session.run_training_as_flags_say(
                train_op, loss, examples_per_step=FLAGS.batch_size
            )


def main():
    task = cifar10_cluster.find_task()
    if task is None:
        cifar10.maybe_download_and_extract()
        train()
    elif task.type == "ps":
        cifar10_cluster.serve(task)
    elif task.type == "evaluator":
        evaluate_in_cluster(task)
    else:
        cifar10_cluster.train(task)


def evaluate_in_cluster(task):
    """Evaluates the checkpoints of --train_dir, or --checkpoint_dir, until the last of the run."""
    if not FLAGS["checkpoint_dir"].present:
        FLAGS.checkpoint_dir = FLAGS.train_dir
    cifar10.maybe_download_and_extract()
    cifar10_eval.evaluate(FLAGS.max_steps, cifar10_cluster.make_chief_check(task))


if __name__ == "__main__":
    if os.environ.get("TF_CONFIG"):
        # For an evaluator; but its flags are everybody's, as one command serves for all tasks.
        import cifar10_eval
    run(main)
