"""The stock formulation: the tutorial's graph with TensorFlow's stock ops, to compare speeds with.

    python benchmarks/stock.py                # trains, with the flags of cifar10_train.py
    python benchmarks/stock.py --evaluate     # evaluates, with those of cifar10_eval.py

One image per queue element, `tf.image`'s distortions, `tf.nn.lrn`, float32. What does not matter
for speed is the project's own: the reader, the layers, the update.
"""

import contextlib
import gc
import pathlib
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

if __name__ == "__main__":
    import tensorflow.compat.v1  # noqa: F401  # first, and plainly, as the tutorial's scripts do

import cifar10
import cifar10_data
import cifar10_eval
import cifar10_input
import cifar10_session
from cifar10_runtime import run, session_config, tf

FLAGS = flags.FLAGS


def _normalize(images, name):
    return tf.nn.lrn(images, depth_radius=4, bias=1.0, alpha=0.001 / 9.0, beta=0.75, name=name)


@contextlib.contextmanager
def stock_normalization():
    """Lets `cifar10.inference` build `tf.nn.lrn` meanwhile."""
    own = cifar10.local_response_normalization
    cifar10.local_response_normalization = _normalize
    try:
        yield
    finally:
        cifar10.local_response_normalization = own


def _read(data_dir, eval_data, num_epochs):
    files = cifar10_data.record_files(data_dir, eval_data)
    return cifar10_input.read_cifar10(
        tf.train.string_input_producer(files, num_epochs=num_epochs, shuffle=num_epochs is None)
    )


def distort(image):
    """Distorts one image: uint8 [32, 32, 3] to float32 [24, 24, 3]."""
    image = tf.cast(image, tf.float32)
    image = tf.image.random_crop(image, [cifar10.IMAGE_SIZE, cifar10.IMAGE_SIZE, 3])
    image = tf.image.random_flip_left_right(image)
    image = tf.image.random_brightness(image, max_delta=63)
    image = tf.image.random_contrast(image, lower=0.2, upper=1.8)
    return tf.image.per_image_standardization(image)


def distorted_inputs(data_dir, batch_size, min_fraction_of_examples_in_queue=0.4):
    """Makes the training input; see `cifar10_input.distorted_inputs`."""
    num_examples = cifar10_data.count_records(data_dir, eval_data=False)
    minimum = int(num_examples * min_fraction_of_examples_in_queue)
    with tf.device("/cpu:0"):
        record = _read(data_dir, eval_data=False, num_epochs=None)
        images, labels = tf.train.shuffle_batch(
            [distort(record.uint8image), record.label],
            batch_size=batch_size,
            num_threads=16,
            capacity=minimum + 3 * batch_size,
            min_after_dequeue=minimum,
        )
        return images, tf.reshape(labels, [-1])


def inputs(eval_data, data_dir, batch_size):
    """Makes the input of one evaluation; see `cifar10_input.inputs`."""
    with tf.device("/cpu:0"):
        record = _read(data_dir, eval_data, num_epochs=1)
        image = tf.image.resize_image_with_crop_or_pad(
            tf.cast(record.uint8image, tf.float32), cifar10.IMAGE_SIZE, cifar10.IMAGE_SIZE
        )
        images, labels = tf.train.batch(
            [tf.image.per_image_standardization(image), record.label],
            batch_size=batch_size,
            num_threads=16,
            capacity=4000 + 3 * batch_size,
            allow_smaller_final_batch=True,
        )
        return images, tf.reshape(labels, [-1])


def train():
    """Trains as `cifar10_train.train` does."""
    with tf.Graph().as_default(), stock_normalization():
        with tf.device("/cpu:0"):
            global_step = tf.train.get_or_create_global_step()
        images, labels = distorted_inputs(
            cifar10.find_data_folder(), FLAGS.batch_size, FLAGS.min_fraction_of_examples_in_queue
        )
        loss = cifar10.loss(cifar10.inference(images), labels)
        cifar10_session.run_training(
            cifar10.train(loss, global_step),
            loss,
            examples_per_step=FLAGS.batch_size,
            train_dir=FLAGS.train_dir,
            max_steps=FLAGS.max_steps,
            log_frequency=FLAGS.log_frequency,
            config=session_config(),
        )


def evaluate():
    """Evaluates the newest checkpoint as `cifar10_eval.evaluate` does."""
    with tf.Graph().as_default(), stock_normalization():
        images, labels = inputs(
            FLAGS.eval_data == "test", cifar10.find_data_folder(), FLAGS.batch_size
        )
        top_k_op = tf.nn.in_top_k(cifar10.inference(images), labels, 1)
        averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
        saver = tf.train.Saver(averages.variables_to_restore())
        with tf.summary.FileWriter(FLAGS.eval_dir) as writer:
            cifar10_eval.eval_once(saver, writer, top_k_op, tf.summary.merge_all())


def main():
    cifar10.maybe_download_and_extract()
    if FLAGS.evaluate:
        evaluate()
    else:
        train()


if __name__ == "__main__":
    gc.unfreeze()  # what the project's modules did for a faster start and end
    flags.DEFINE_boolean("evaluate", False, "Evaluate instead of training.")
    run(main)
