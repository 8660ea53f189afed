"""Trains the CIFAR-10 model on a CPU or on one GPU.

    python cifar10_train.py
    python cifar10_train.py --synthetic_data --max_steps=400 --train_dir=/tmp/synthetic/train
    tensorboard --logdir=/tmp/cifar10_train

The same command resumes training from the newest checkpoint in --train_dir. On a GPU, the model
reaches a precision of about 86% within a few hours (source: the TensorFlow tutorial). To train on
several machines, start the script on each of them with the environment variable TF_CONFIG set.
"""

import os

from absl import flags

import cifar10
from support.base import command_line, options
from support.base.worker import ALONE
from support.cluster import launch, server, task
from support.ops import tensorflow_v1
from support.ops.tensorflow_v1 import tf
from support.run.training_run import Options, TrainingRun

FLAGS = flags.FLAGS

options.define("run", "cluster")


def train(worker=ALONE):
    """Trains up to --max_steps, resuming from the newest checkpoint in --train_dir if any.

    `worker` is the `support.base.worker.Worker` that this process runs in a cluster.
    """
    run_options = Options.select(options.values(), cifar10.find_dataset().folder)
    settings = cifar10.training_settings(examples_per_step=FLAGS.batch_size * worker.count)
    with TrainingRun(run_options, settings, worker) as run:
        if run.has_steps_left():
            with run.graph(FLAGS.seed):
                with tf.device("/cpu:0"):
                    global_step = tf.train.get_or_create_global_step()
                images, labels = cifar10.distorted_inputs(shard=worker.shard)
                logits = cifar10.inference(images)
                loss = cifar10.loss(logits, labels)
                train_op = cifar10.train(loss, global_step, worker=worker)

                with run.session(loss) as sess:
                    while not sess.should_stop():
                        sess.run(train_op)


def train_in_cluster(this_task):
    """Runs one task of a cluster: a parameter server, a worker or an evaluator."""
    config = tensorflow_v1.session_config(FLAGS.use_fp16)
    timeout = FLAGS.cluster_timeout_secs
    if this_task.type == "ps":
        launch.serve_parameters(this_task, config, timeout)
    elif this_task.type == "evaluator":
        import cifar10_eval

        if not FLAGS["checkpoint_dir"].present:
            FLAGS.checkpoint_dir = FLAGS.train_dir
        cifar10.maybe_download_and_extract()
        cifar10_eval.evaluate(FLAGS.max_steps, server.make_chief_check(this_task, timeout))
    else:
        this_server = server.start_server(this_task, config, timeout)
        cifar10.maybe_download_and_extract()
        examples_per_step = FLAGS.batch_size * len(this_task.workers)
        settings = cifar10.training_settings(examples_per_step=examples_per_step)
        launch.run_worker(this_task, this_server, train, settings, timeout, FLAGS.shard_data)


def main(argv=None):
    tensorflow_v1.warn_of_unusable_gpus()
    this_task = task.find_task()
    if this_task is None:
        cifar10.maybe_download_and_extract()
        tensorflow_v1.warn_of_unused_gpus(1)
        train()
    else:
        train_in_cluster(this_task)


if __name__ == "__main__":
    if os.environ.get("TF_CONFIG"):  # all tasks get the same flags, and one may be an evaluator
        import cifar10_eval  # noqa: F401
    command_line.run(main)
