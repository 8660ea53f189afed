"""Checks and histograms of gradients, and the operations that update batch statistics."""

import re

from support.ops import graph_notes, summaries
from support.ops.tensorflow_v1 import tf


def drop_missing(gradients):
    """Returns the (gradient, variable) pairs with a gradient, and warns about the others."""
    if missing := [variable.op.name for gradient, variable in gradients if gradient is None]:
        tf.logging.warning(
            "Training does not change these variables, because no gradient reaches them: %s",
            ", ".join(missing),
        )
    return [pair for pair in gradients if pair[0] is not None]


def summarize_gradients(optimizer, gradients):
    """Shows gradients in TensorBoard, and makes the session check that they are finite."""
    scales_loss = isinstance(optimizer, tf.mixed_precision.MixedPrecisionLossScaleOptimizer)
    for gradient, variable in gradients:
        tag = f"gradients/{variable.op.name}"
        if scales_loss:  # overflows are expected here, but a histogram refuses them
            gradient = tf.where_v2(tf.is_finite(gradient), gradient, 0.0)
        else:
            graph_notes.check_finite(gradient, tag)
        summaries.histogram(tag, gradient)


def collect_updates(tower_name):
    """Returns the operations in `tf.GraphKeys.UPDATE_OPS`, except those of towers 1, 2 and so on.

    Batch normalization adds such operations. The towers share the variables, so one tower suffices.
    The operations of tower N are named `{tower_name}_N/...`.
    """
    found = [getattr(update, "op", update) for update in tf.get_collection(tf.GraphKeys.UPDATE_OPS)]
    return [op for op in found if not re.match(f"{tower_name}_[1-9]", op.name)]
