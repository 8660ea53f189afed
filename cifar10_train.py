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
from support.base import command_line
from support.cluster import server, task, training
from support.ops.tensorflow_v1 import (
    session_config,
    tf,
    warn_of_unusable_gpus,
    warn_of_unused_gpus,
)
from support.run import training_run

FLAGS = flags.FLAGS
_MAX_INT = 2**31 - 1

command_line.forget_flags_of(__file__)
flags.DEFINE_flag(
    command_line.PathFlag(
        "train_dir",
        "/tmp/cifar10_train",
        "Folder for checkpoints and summaries. A run that is already there is resumed, never "
        "deleted.",
    )
)
flags.DEFINE_integer(
    "max_steps",
    1000000,
    "Total number of steps, including those of earlier runs in train_dir.",
    lower_bound=1,
    upper_bound=_MAX_INT,
)
flags.DEFINE_integer(
    "log_frequency", 10, "Steps between lines of progress.", lower_bound=1, upper_bound=_MAX_INT
)
flags.DEFINE_integer(
    "save_checkpoint_secs",
    600,
    "Seconds between checkpoints.",
    lower_bound=1,
    upper_bound=_MAX_INT,
)
flags.DEFINE_integer(
    "save_checkpoint_steps",
    None,
    "Steps between checkpoints, instead of save_checkpoint_secs.",
    lower_bound=1,
    upper_bound=_MAX_INT,
)
flags.DEFINE_integer(
    "max_checkpoints_to_keep",
    5,
    "Number of checkpoints to keep. Older checkpoints of the same run are deleted.",
    lower_bound=1,
    upper_bound=_MAX_INT,
)
flags.DEFINE_integer(
    "save_summaries_steps",
    100,
    "Steps between scalars for TensorBoard. 0 turns off all summaries.",
    lower_bound=0,
    upper_bound=_MAX_INT,
)
flags.DEFINE_integer(
    "save_histograms_steps",
    1000,
    "Steps between histograms and images for TensorBoard, which take much more space than scalars. "
    "0 turns them off.",
    lower_bound=0,
    upper_bound=_MAX_INT,
)
flags.DEFINE_integer(
    "seed",
    None,
    "Seed for the initial variables and all random operations. By default, each run draws a new "
    "seed. On a CPU with num_preprocess_threads=1, the seed determines every loss.",
    lower_bound=0,
    upper_bound=_MAX_INT,
)
flags.DEFINE_boolean(
    "log_device_placement", False, "Print the device of every operation: hundreds of lines."
)
flags.DEFINE_integer(
    "cluster_timeout_secs", 600, "Seconds to wait for a task that is missing.", lower_bound=1
)
flags.DEFINE_boolean(
    "shard_data",
    False,
    "Have each worker read its own part of the records. By default, each worker reads all records, "
    "in its own random order.",
)
flags.register_validator("train_dir", bool, "it must name a folder")
CLUSTER_FLAGS = ("Flags for several machines (TF_CONFIG)", ["cluster_timeout_secs", "shard_data"])


def training_options():
    """Returns the `training_run.Options` with the values of the flags of the same names."""
    return training_run.Options(
        **{name: FLAGS[name].value for name in training_run.Options._fields}
    )


def train(worker=None):
    """Trains up to --max_steps, resuming from the newest checkpoint in --train_dir if any.

    Args:
      worker: `support.cluster.training.Worker` in a cluster, or None.
    """
    options = training_options()
    settings = cifar10.training_settings()
    if not training_run.has_steps_left(options, settings, worker):
        return
    if worker is None:
        warn_of_unused_gpus(1)
    with training_run.training_graph(FLAGS.seed, worker, options.train_dir):
        with tf.device("/cpu:0"):
            global_step = tf.train.get_or_create_global_step()
        images, labels = cifar10.distorted_inputs(shard=worker and worker.shard)
        logits = cifar10.inference(images)
        loss = cifar10.loss(logits, labels)
        train_op = cifar10.train(loss, global_step, worker=worker)

        with training_run.training_session(
            loss,
            FLAGS.batch_size * (worker.count if worker else 1),
            options,
            settings,
            session_config(FLAGS.use_fp16, FLAGS.log_device_placement),
            check_input=cifar10.make_change_detector(eval_data=False).check,
            flags=cifar10.flags_in_effect(command_line.flag_values(CLUSTER_FLAGS)),
            worker=worker,
        ) as sess:
            while not sess.should_stop():
                sess.run(train_op)


def train_in_cluster(this_task):
    """Runs one task of a cluster: a parameter server, a worker or an evaluator."""
    config = session_config(FLAGS.use_fp16)
    timeout = FLAGS.cluster_timeout_secs
    if this_task.type == "ps":
        training.serve_parameters(this_task, config, timeout)
    elif this_task.type == "evaluator":
        import cifar10_eval

        if not FLAGS["checkpoint_dir"].present:
            FLAGS.checkpoint_dir = FLAGS.train_dir
        cifar10.maybe_download_and_extract()
        cifar10_eval.evaluate(FLAGS.max_steps, training.make_chief_check(this_task, timeout))
    else:
        this_server = server.start_server(this_task, config, timeout)
        cifar10.maybe_download_and_extract()
        settings = cifar10.training_settings()._replace(
            examples_per_step=FLAGS.batch_size * len(this_task.workers)
        )
        training.run_worker(this_task, this_server, train, settings, timeout, FLAGS.shard_data)


def main(argv=None):
    warn_of_unusable_gpus()
    this_task = task.find_task()
    if this_task is None:
        cifar10.maybe_download_and_extract()
        train()
    else:
        train_in_cluster(this_task)


if __name__ == "__main__":
    if os.environ.get("TF_CONFIG"):  # all tasks get the same flags, and one may be an evaluator
        import cifar10_eval  # noqa: F401
    command_line.run(main, last_flags=CLUSTER_FLAGS)
