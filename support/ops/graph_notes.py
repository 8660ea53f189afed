"""Graph collections that pass values to the training session and the learning rate schedule.

The model and the input record the learning rate, the tensors that must be finite, and the fill
level of the training queue. A resumed run records an offset of the images seen, so that the
schedule continues correctly if the number of images per step has changed.
"""

from support.ops.tensorflow_v1 import tf

MUST_BE_FINITE = "must_be_finite"
LEARNING_RATE = "learning_rate"
QUEUE_LEVEL = "queue_level"
FINITE_SCOPE = "must_be_finite/"
_IMAGES_OFFSET = "images_offset"


def record_images_offset(offset):
    """Records `images_seen - step * examples_per_step`, an int, at the start of a run."""
    tf.add_to_collection(_IMAGES_OFFSET, offset)


def images_offset():
    """Returns the recorded offset, an int; 0 if none is recorded."""
    return sum(tf.get_collection(_IMAGES_OFFSET))


def check_finite(tensor, name=None):
    """Makes the session check after every step that all values of a float32 tensor are finite.

    Error messages call the tensor `name`, by default the name of its operation.
    """
    name = name or tensor.op.name
    with tf.name_scope(FINITE_SCOPE):  # a sum is finite only if all of its terms are
        total = tf.reduce_sum(tensor, name=name)
    tf.add_to_collection(MUST_BE_FINITE, total)


def record_learning_rate(learning_rate):
    """Makes the session report the learning rate, float32 [], in messages and metrics."""
    tf.add_to_collection(LEARNING_RATE, learning_rate)


def watch_queue(size, min_size):
    """Makes the session show how the queue's `size`, int32 [], grows to `min_size`, an int."""
    tf.add_to_collection(QUEUE_LEVEL, size)
    tf.add_to_collection(QUEUE_LEVEL, tf.constant(min_size))
