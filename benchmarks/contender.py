"""Trains with this project: a contender of the other benchmarks.

    python benchmarks/contender.py training --synthetic_data --data_dir=FOLDER --fast_ops=false

See turns.py for what it reads and prints.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
import turns
from absl import flags

import cifar10
import cifar10_input
from support.base import command_line
from support.ops.tensorflow_v1 import session_config, tf

FLAGS = flags.FLAGS

MATRIX_SIZE = 2048


def _build_training(images, labels):
    with tf.device("/cpu:0"):
        global_step = tf.train.get_or_create_global_step()
    loss = cifar10.loss(cifar10.inference(images), labels)
    return cifar10.train(loss, global_step), loss  # the scripts fetch the loss of each step, too


def build_training():
    """Builds training from the queues."""
    return _build_training(*cifar10.distorted_inputs())


def build_resident_training():
    """Builds training on a resident batch: it is already in memory, so there is no input."""
    generator = np.random.default_rng(0)
    shape = [FLAGS.batch_size, FLAGS.crop_size, FLAGS.crop_size, 3]
    images = tf.get_variable(
        "resident", initializer=generator.normal(size=shape).astype(np.float32), trainable=False
    )
    return _build_training(images.read_value(), tf.range(FLAGS.batch_size) % cifar10.NUM_CLASSES)


def build_matrix_product():
    """Builds the product of two large matrices, the fastest arithmetic on this machine."""
    matrix = tf.get_variable("matrix", [MATRIX_SIZE, MATRIX_SIZE])
    return tf.matmul(matrix, matrix).op


KINDS = {
    "training": build_training,
    "resident": build_resident_training,
    "matrix_product": build_matrix_product,
}


def main(argv):
    fetches = KINDS[argv[1]]()
    with tf.train.SingularMonitoredSession(config=session_config(FLAGS.use_fp16)) as session:

        def run(steps):
            for _ in range(steps):
                session.run(fetches)

        run(1)
        # During the turns of the others, the queue fills to three batches beyond its minimum, and
        # each of its threads prepares another block of images. These steps are not timed.
        blocks = cifar10_input.NUM_PREPROCESS_THREADS * cifar10_input.RECORDS_PER_BLOCK
        maximum = 4 + blocks // FLAGS.batch_size
        turns.serve(run, warm_up_steps=lambda steps: min(2 * steps, maximum))


if __name__ == "__main__":
    command_line.run(main, takes_arguments=True)
