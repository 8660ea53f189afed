"""Trains the CIFAR-10 model on several GPUs with synchronous updates.

    python cifar10_multi_gpu_train.py --num_gpus=2

Each GPU runs a tower: a copy of the model that processes its own batch of --batch_size images. The
towers share the variables, which are in the CPU's memory. In each step, every tower computes its
gradients; the average of all towers' gradients then updates the variables once.
"""

from absl import flags

import cifar10
from support.base import command_line, options
from support.base.errors import UserError
from support.cluster import task
from support.ops import tensorflow_v1
from support.ops.tensorflow_v1 import tf
from support.run.training_run import Options, TrainingRun

FLAGS = flags.FLAGS

options.DEFINE_integer("num_gpus", 1, "Number of towers, one per GPU.", 1, 1024)
options.define("run")


def tower_loss(scope, images, labels):
    """Builds a tower and returns the total loss of its batch, float32 [].

    Args:
      scope: string; the name scope of the tower, for example `tower_0/`.
      images: float32 [batch, 24, 24, 3].
      labels: int32 [batch].
    """
    return cifar10.loss(cifar10.inference(images), labels, scope)


def average_gradients(tower_grads):
    """Averages the gradients of each variable over the towers, which synchronizes the towers.

    Args:
      tower_grads: a list of (gradient, variable) for each tower, all in the same order.

    Returns:
      list of (average gradient, variable). If a variable has no gradient, its average is None.
    """
    average_grads = []
    # `strict`, because all towers must share the same variables, created by `tf.get_variable`.
    for grads_and_vars in zip(*tower_grads, strict=True):
        grads = [grad for grad, _ in grads_and_vars]
        variable = grads_and_vars[0][1]
        is_unused = all(grad is None for grad in grads)
        average_grads.append((None if is_unused else tf.add_n(grads) / len(grads), variable))
    return average_grads


def build_training(num_gpus, batch_size):
    """Builds the towers; returns the operation that trains one step, and the towers' mean loss."""
    with tf.device("/cpu:0"):
        global_step = tf.train.get_or_create_global_step()
        images, labels = cifar10.distorted_inputs(batch_size * num_gpus)
        learning_rate = cifar10.decayed_learning_rate(global_step, batch_size * num_gpus)
        optimizer = cifar10.make_optimizer(learning_rate)
        tower_images = tf.split(images, num_gpus)
        tower_labels = tf.split(labels, num_gpus)

    tower_losses, total_losses, tower_grads = [], [], []
    for i in range(num_gpus):
        with (
            tf.variable_scope(tf.get_variable_scope(), reuse=i > 0),
            tf.device(f"/device:GPU:{i}"),
            tf.name_scope(f"{cifar10.TOWER_NAME}_{i}") as scope,
        ):
            loss = tower_loss(scope, tower_images[i], tower_labels[i])
            tower_losses.append(tf.get_collection("losses", scope))
            total_losses.append(loss)
            tower_grads.append(optimizer.compute_gradients(loss))

    with tf.device("/cpu:0"):
        loss = tf.divide(tf.add_n(total_losses), num_gpus, name="total_loss")
        train_op = tf.group(
            cifar10.update_variables(optimizer, average_gradients(tower_grads), global_step),
            cifar10._add_loss_summaries(loss, tower_losses),
            name="train",
        )
        return train_op, loss


def train():
    """Trains up to --max_steps, resuming from the newest checkpoint in --train_dir if any."""
    num_gpus = FLAGS.num_gpus
    run_options = Options.select(options.values(), cifar10.find_dataset().folder)
    settings = cifar10.training_settings(examples_per_step=FLAGS.batch_size * num_gpus)
    with TrainingRun(run_options, settings) as run:
        if run.has_steps_left():
            tensorflow_v1.warn_of_shared_devices(num_gpus)
            tensorflow_v1.warn_of_unused_gpus(num_gpus)
            with run.graph(FLAGS.seed):
                train_op, loss = build_training(num_gpus, FLAGS.batch_size)
                with run.session(loss) as sess:
                    while not sess.should_stop():
                        sess.run(train_op)


def main(argv=None):
    if task.find_task() is not None:
        raise UserError(
            "TF_CONFIG describes a cluster, but this script trains on one machine: run "
            "cifar10_train.py on all machines of the cluster, or unset TF_CONFIG"
        )
    tensorflow_v1.warn_of_unusable_gpus()
    cifar10.maybe_download_and_extract()
    train()


if __name__ == "__main__":
    command_line.run(main)
