"""Where a resumed run continues: at which step, and after how many images.

`session.training_graph` records both in the graph. The input of a resumed run then draws different
random numbers than at the start of the run, and the learning rate schedule continues from the
number of images seen so far, even if a step now consumes a different number of images.
"""

import contextlib
import random

from support.errors import UserError
from support.tensorflow_v1 import tf

# A graph collection of integers: the step and, if known, the number of images seen until then.
_RESUMED_RUN = "resumed_run"


def record(step, settings=None):
    """Records where the default graph resumes a run.

    Args:
      step: int; the global step.
      settings: `checkpoints.TrainingSettings` of the checkpoint; None if unknown.
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
