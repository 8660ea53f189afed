"""Graph collections that pass information from the graph to the training session.

The model and the input record the learning rate, the tensors that must be finite, and the fill
level of the training queue. When a run is resumed, its step and the number of images seen so far
are recorded as well. The input uses the step to draw other random numbers than at the start of the
run. The learning rate schedule uses the number of images, so that it continues correctly if the
number of images per step has changed.
"""

import contextlib
import random

from support.base.errors import UserError
from support.ops.tensorflow_v1 import tf

# Graph collections that the functions below fill.
MUST_BE_FINITE = "must_be_finite"
LEARNING_RATE = "learning_rate"
QUEUE_LEVEL = "queue_level"
FINITE_SCOPE = "must_be_finite/"
# A graph collection of integers: the step and, if known, the number of images seen until then.
_RESUMED_RUN = "resumed_run"


def record(step, settings=None):
    """Records where the default graph resumes a run.

    Args:
      step: int; the global step.
      settings: `TrainingSettings` of the checkpoint; None if unknown.
    """
    tf.add_to_collection(_RESUMED_RUN, step)
    if settings is not None and (seen := settings.examples_seen(step)) is not None:
        tf.add_to_collection(_RESUMED_RUN, seen)


def check_step(read_step):
    """Raises UserError if the default graph resumes another step than that of the checkpoint.

    Args:
      read_step: function that returns the step of the checkpoint; called only if the graph records
        which step it resumes.
    """
    recorded = tf.get_collection(_RESUMED_RUN)
    if recorded and recorded[0] != (step := read_step()):
        raise UserError(
            f"another process has trained from step {recorded[0]} to step {step} meanwhile; run "
            "the same command again to resume from there"
        )


@contextlib.contextmanager
def input_seed():
    """Mixes the resumed step into the seed of the random operations that the block creates.

    With the seed alone, a resumed run would see the same images as at its start.
    """
    graph = tf.get_default_graph()
    seed = graph.seed
    step, *_ = tf.get_collection(_RESUMED_RUN) or [0]
    if seed is not None and step > 0:
        tf.set_random_seed(random.Random(f"{seed} {step}").randrange(2**31))
    try:
        yield
    finally:
        graph.seed = seed


def examples_offset(examples_per_step):
    """Returns the images seen so far, minus the number that as many steps would consume now.

    Args:
      examples_per_step: int; images that one step consumes now, over all towers or workers.

    Returns:
      int; 0 if no run is resumed, or if its checkpoint does not record the images.
    """
    step, *seen = tf.get_collection(_RESUMED_RUN) or [0]
    return seen[0] - step * examples_per_step if seen else 0


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
