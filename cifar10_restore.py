"""A trained model: which checkpoint holds it, and how its variables get into a session."""

import numpy as np
from absl import flags

import cifar10
import cifar10_settings
from cifar10_runtime import (
    UserError,
    explain_missing_checkpoint,
    find_differences,
    find_latest_checkpoint,
    find_reason,
    read_global_step,
    tf,
)

FLAGS = flags.FLAGS

flags.DEFINE_string("checkpoint_dir", "/tmp/cifar10_train", "Folder to read checkpoints from.")
flags.register_validator("checkpoint_dir", bool, "it must name a folder")
flags.DEFINE_boolean(
    "use_moving_averages",
    True,
    "Take the variables' moving averages; false: the variables themselves.",
)


class CheckpointError(UserError):
    """A checkpoint cannot be used: it is damaged, not of this model, not finite, or gone."""


def require_checkpoint(checkpoint_dir):
    """Returns the path of the newest checkpoint. Raises UserError where there is none."""
    checkpoint = find_latest_checkpoint(checkpoint_dir)
    if checkpoint is None and (reason := explain_missing_checkpoint(checkpoint_dir)):
        raise UserError(f"{reason}; go on training there, which says how to mend it")
    if checkpoint is None:
        raise UserError(
            f"there is no checkpoint in {checkpoint_dir}; train first, or name another folder "
            "with --checkpoint_dir"
        )
    return checkpoint


def read_step(checkpoint):
    """Returns the global step of a checkpoint. Raises CheckpointError."""
    try:
        return read_global_step(checkpoint)
    except UserError as error:
        raise CheckpointError(str(error)) from error


def variables_to_restore(use_moving_averages):
    """Returns the default graph's trainable variables by the names that checkpoints have for them.

    Args:
      use_moving_averages: bool; of the averages, or of the variables.
    """
    if use_moving_averages:
        averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
        return averages.variables_to_restore()
    return {variable.op.name: variable for variable in tf.trainable_variables()}


def check_settings(checkpoint, wanted):
    """Raises CheckpointError where a checkpoint was trained for other `Settings` than `wanted`."""
    try:
        trained = cifar10_settings.read_settings(checkpoint)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    if why := cifar10_settings.explain_misfit(checkpoint, trained, wanted, "--checkpoint_dir"):
        raise CheckpointError(why)


def check_fits(checkpoint, variables, wanted):
    """Raises CheckpointError where a checkpoint is not of the model or the data it is to serve.

    Args:
      checkpoint: path.
      variables: what `variables_to_restore` gave.
      wanted: the `cifar10_settings.Settings` of the default graph's model.
    """
    check_settings(checkpoint, wanted)
    try:
        differences = find_differences(checkpoint, variables)
    except (tf.errors.OpError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {find_reason(error)}") from error
    if differences:
        raise CheckpointError(f"{checkpoint} is of another model: in it {differences}")


def restore(session, saver, checkpoint):
    """Restores the variables of a `tf.train.Saver` in the default graph.

    Returns:
      int; the checkpoint's global step.

    Raises:
      CheckpointError: it cannot be read, or a model variable is not finite. (A ReLU can turn NaN
        into 0, so that the predictions would not show it.)
    """
    try:
        saver.restore(session, checkpoint)
    # ValueError is the Saver's own check that the files exist.
    except (tf.errors.OpError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} cannot be restored: {find_reason(error)}") from error
    variables = tf.trainable_variables()
    for variable, value in zip(variables, session.run(variables), strict=True):
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"{checkpoint} has values that are not finite, in {variable.op.name}"
            )
    return read_step(checkpoint)


def restore_newest(session, wanted):
    """Restores what the flags say into the default graph's model.

    Args:
      session: a `tf.Session` on that graph.
      wanted: the `cifar10_settings.Settings` of that model.

    Returns:
      The checkpoint's path, and its global step.

    Raises:
      UserError: there is no checkpoint, or it cannot be used.
    """
    variables = variables_to_restore(FLAGS.use_moving_averages)
    saver = tf.train.Saver(variables)
    while True:
        checkpoint = require_checkpoint(FLAGS.checkpoint_dir)
        try:
            check_fits(checkpoint, variables, wanted)
            return checkpoint, restore(session, saver, checkpoint)
        except CheckpointError:
            # A trainer may have deleted it: then there is a newer one.
            if find_latest_checkpoint(FLAGS.checkpoint_dir) == checkpoint:
                raise


def read_newest_settings():
    """Returns the `cifar10_settings.Settings` of the newest checkpoint; None where not known.

    Raises:
      UserError: there is no checkpoint, or they cannot be read.
    """
    while True:
        checkpoint = require_checkpoint(FLAGS.checkpoint_dir)
        settings = cifar10_settings.read_settings(checkpoint)
        # None also where a trainer has deleted the checkpoint: then there is a newer one.
        if settings is not None or find_latest_checkpoint(FLAGS.checkpoint_dir) == checkpoint:
            return settings
