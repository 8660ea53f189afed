"""Trains the CIFAR-10 model on several GPUs at once, in step.

    python cifar10_multi_gpu_train.py --num_gpus=2

Each GPU has a tower: a copy of the model that works on a batch of its own. The variables are in the
CPU's memory, shared by all towers. In a step every tower computes its gradients; their average
updates the variables once. So a step consumes --batch_size images per GPU.
"""

from absl import flags

import cifar10
import cifar10_session
from cifar10_runtime import GPUS, run, tf

FLAGS = flags.FLAGS

flags.DEFINE_integer(
    "num_gpus", 1, "Towers to train, one per GPU.", lower_bound=1, upper_bound=1024
)


def tower_loss(scope, images, labels):
    """Builds one tower of the model.

    Args:
      scope: string; the tower's name scope, such as `tower_0/`.
      images: float32 [batch, 24, 24, 3].
      labels: int32 [batch].

    Returns:
      float32 []; the total loss of this tower's batch.
    """
    return cifar10.loss(cifar10.inference(images), labels, scope)


def average_gradients(tower_grads):
    """Averages each variable's gradients over the towers. The towers are synchronized here.

    Args:
      tower_grads: for each tower its list of (gradient, variable), the variables in one order.

    Returns:
      list of (average gradient, variable).
    """
    averages = []
    for grads_and_vars in zip(*tower_grads, strict=True):
        gradients = [gradient for gradient, _ in grads_and_vars]
        variable = grads_and_vars[0][1]  # the towers share it
        averages.append((tf.add_n(gradients) / len(gradients), variable))
    return averages


def build_training(num_gpus, batch_size):
    """Builds the towers, and the update from their averaged gradients, in the default graph.

    Args:
      num_gpus: int; the number of towers.
      batch_size: int; images per tower and step.

    Returns:
      train_op: the operation that trains one step.
      loss: float32 []; the mean of the towers' total losses.
    """
    with tf.device("/cpu:0"):
        global_step = tf.train.get_or_create_global_step()
        images, labels = cifar10.distorted_inputs(batch_size * num_gpus)
        learning_rate = cifar10.decayed_learning_rate(global_step, batch_size * num_gpus)
        optimizer = cifar10.make_optimizer(learning_rate)
        tower_images = tf.split(images, num_gpus)
        tower_labels = tf.split(labels, num_gpus)

    tower_losses = []
    tower_grads = []
    for i in range(num_gpus):
        with (
            tf.variable_scope(tf.get_variable_scope(), reuse=i > 0),
            tf.device(f"/device:GPU:{i}"),
            tf.name_scope(f"{cifar10.TOWER_NAME}_{i}") as scope,
        ):
            loss = tower_loss(scope, tower_images[i], tower_labels[i])
            tower_losses.append([*tf.get_collection("losses", scope), loss])
            tower_grads.append(optimizer.compute_gradients(loss))

    with tf.device("/cpu:0"):
        train_op = tf.group(
            cifar10.average_losses(tower_losses),
            cifar10.update_variables(optimizer, average_gradients(tower_grads), global_step),
            name="train",
        )
        return train_op, tf.add_n([losses[-1] for losses in tower_losses]) / num_gpus


def train():
    """Trains as the flags say, up to --max_steps."""
    with cifar10_session.prepare_train_dir(FLAGS.train_dir, FLAGS.max_steps) as is_needed:
        if not is_needed:
            return
        if FLAGS.num_gpus > len(GPUS):
            tf.logging.warning(
                "--num_gpus=%d, but TensorFlow sees %d: the towers share what there is%s.",
                FLAGS.num_gpus,
                len(GPUS),
                "" if GPUS else ", which is the CPU",
            )
        with cifar10_session.seeded_graph():
            train_op, loss = build_training(FLAGS.num_gpus, FLAGS.batch_size)
            cifar10_session.run_training_as_flags_say(
                train_op, loss, examples_per_step=FLAGS.batch_size * FLAGS.num_gpus
            )


def main():
    cifar10.maybe_download_and_extract()
    train()


if __name__ == "__main__":
    run(main)
