"""What a graph tells the training session and, if it resumes a run, its own input and schedule.

The model and the input record the learning rate, the tensors that must be finite, and the fill
level of the training queue. A run records at which step it starts and how many images it has seen
by then. The learning rate schedule uses that number, so that it continues correctly if the number
of images per step has changed. Everything is in collections of the graph.
"""

from support.ops.tensorflow_v1 import tf

# Graph collections that the functions below fill.
MUST_BE_FINITE = "must_be_finite"
LEARNING_RATE = "learning_rate"
QUEUE_LEVEL = "queue_level"
FINITE_SCOPE = "must_be_finite/"
_START = "resumed_run"  # the step at which the run starts and, if known, the images seen by then


def record_start(step, images_seen):
    """Records where the run of the default graph starts.

    Args:
      step: int; the global step.
      images_seen: int; the number of images that the run has seen by then. None if unknown.
    """
    for number in (step, images_seen):
        if number is not None:
            tf.add_to_collection(_START, number)


def images_offset(examples_per_step):
    """Returns `images_seen - step * examples_per_step` at the start of the run.

    Args:
      examples_per_step: int; images that one step consumes now, over all towers or workers.

    Returns:
      int; 0 for a new run, and if it is unknown how many images the run has seen.
    """
    step, *images_seen = tf.get_collection(_START) or [0]
    return images_seen[0] - step * examples_per_step if images_seen else 0


def check_finite(tensor, name=None):
    """Makes the session check after every step that all values of a tensor are finite.

    Args:
      tensor: float32 of any shape.
      name: string; the tensor's name in the error message. Its own name if None.
    """
    name = name or tensor.op.name
    with tf.name_scope(FINITE_SCOPE):  # a sum is finite only if all of its terms are
        total = tf.reduce_sum(tensor, name=name)
    tf.add_to_collection(MUST_BE_FINITE, total)


def record_learning_rate(learning_rate):
    """Makes the session report the learning rate, float32 [], in messages and metrics."""
    tf.add_to_collection(LEARNING_RATE, learning_rate)


def watch_queue(size, min_size):
    """Makes the session show how the training queue fills.

    Args:
      size: int32 []; the number of examples in the queue.
      min_size: int; the number of examples that it needs before it yields the first batch.
    """
    tf.add_to_collection(QUEUE_LEVEL, size)
    tf.add_to_collection(QUEUE_LEVEL, tf.constant(min_size))
