"""Checkpoints: finding, reading, checking and restoring them, and what they were trained on.

TensorFlow saves the graph's collections in the `.meta` file of each checkpoint. One collection
holds the training settings, so they accompany the checkpoint and add no variables to it.
"""

import contextlib
import functools
import json
import os
import re
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from support import dataset
from support.errors import CheckpointError, UserError, first_line
from support.tensorflow_v1 import tf

_SETTINGS = "cifar10_settings"  # a graph collection of one string, a JSON object


class TrainingSettings(NamedTuple):
    """What a model was trained on, and what restoring it depends on.

    The defaults describe a checkpoint without settings, as the original tutorial wrote it.

    Attributes:
      class_names: tuple of strings; None if unknown.
      examples_per_epoch: int; None if unknown.
      crop_size: int; pixels.
      top_layers: string; a value of the flag.
      random_flip: bool.
      examples_per_step: int; images that one step consumed, over all towers or workers; None if
        unknown.
      examples_offset: int; images that the run had seen, minus `examples_per_step` for each step.
        Not 0 after a change of the batch size or of the number of towers or workers.
    """

    class_names: tuple | None = None
    examples_per_epoch: int | None = None
    crop_size: int = dataset.IMAGE_SIZE
    top_layers: str = "full"
    random_flip: bool = True
    examples_per_step: int | None = None
    examples_offset: int = 0

    def examples_seen(self, step):
        """Returns the number of images that the run has seen at a step; None if unknown."""
        if self.examples_per_step is None:
            return None
        return step * self.examples_per_step + self.examples_offset


def find_latest_checkpoint(folder):
    """Returns the path of the newest checkpoint in a folder, or None if none is known."""
    missing = None
    while True:
        try:
            state = tf.train.get_checkpoint_state(folder)
        except ValueError:  # the file that names it is not text
            return None
        path = state.model_checkpoint_path if state else None
        if not path or path == missing:
            return None
        if tf.train.checkpoint_exists(path):
            return path
        missing = path  # a trainer may have deleted it since, after writing a newer one


def explain_missing_checkpoint(folder):
    """Returns why the newest checkpoint is unknown, or None if there is no state file at all."""
    if tf.gfile.Exists(os.path.join(folder, "checkpoint")):
        return f"the file `checkpoint` in {folder} is unreadable or names a missing checkpoint"
    return None


def require_checkpoint(folder):
    """Returns the path of the newest checkpoint. Raises UserError if there is none."""
    checkpoint = find_latest_checkpoint(folder)
    if checkpoint is not None:
        return checkpoint
    if reason := explain_missing_checkpoint(folder):
        raise UserError(
            f"{reason}; run cifar10_train.py on this folder; it prints how to repair it"
        )
    raise UserError(
        f"there is no checkpoint in {folder}; train first, or choose another folder with "
        "--checkpoint_dir"
    )


def find_checkpoint_to_resume(train_dir):
    """Returns the newest checkpoint in a training folder, or None if the folder has none.

    If no state file names it yet, the function writes one, so that every script finds it.

    Raises:
      UserError: there are checkpoints, but it is unknown which of them is the newest.
    """
    newest = find_latest_checkpoint(train_dir)
    if newest is not None:
        return newest
    if not _list_checkpoints(train_dir):
        return None
    # From here on, returning None would start training again, on top of existing checkpoints.
    readable = find_readable(train_dir)
    if readable is None:
        raise UserError(
            f"none of the checkpoints in {train_dir} can be read; move them away to start again, "
            "or choose another folder with --train_dir"
        )
    if reason := explain_missing_checkpoint(train_dir):
        raise UserError(
            f"{reason}; remove that file to resume from {readable}, or choose another folder with "
            "--train_dir"
        )
    # A process that was killed during its first save leaves a checkpoint without a state file.
    tf.train.update_checkpoint_state(os.path.abspath(train_dir), os.path.basename(readable))
    return readable


def find_readable(train_dir):
    """Returns the path of the newest readable checkpoint in a folder, or None."""
    for path in _list_checkpoints(train_dir):
        with contextlib.suppress(CheckpointError):
            read_global_step(path)
            return path
    return None


def _list_checkpoints(train_dir):
    """Returns the paths of all checkpoints in a folder, complete or not, newest first."""
    # Listed instead of matched: the name of the folder may contain wildcard characters.
    names = tf.gfile.ListDirectory(train_dir) if tf.gfile.IsDirectory(train_dir) else []
    steps = [
        int(match[1])
        for name in names
        if (match := re.fullmatch(r"model\.ckpt-([0-9]+)\.index", name))
    ]
    return [os.path.join(train_dir, f"model.ckpt-{step}") for step in sorted(steps, reverse=True)]


def read_global_step(checkpoint):
    """Returns the global step of a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        return int(tf.train.load_checkpoint(checkpoint).get_tensor(tf.GraphKeys.GLOBAL_STEP))
    # TensorFlow's reader raises several of Python's own exceptions.
    except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {first_line(error)}") from error


def record_settings(settings):
    """Saves `TrainingSettings` with every checkpoint of the default graph."""
    tf.add_to_collection(_SETTINGS, format_settings(settings))


def read_settings(checkpoint):
    """Returns the `TrainingSettings` saved with a checkpoint; None if its `.meta` file is missing.

    Raises:
      CheckpointError: the file cannot be read, or its settings are invalid.
    """
    path = f"{checkpoint}.meta"
    try:
        with tf.gfile.GFile(path, "rb") as file:
            meta_graph = tf.MetaGraphDef.FromString(file.read())
        if not meta_graph.HasField("graph_def"):
            raise ValueError("it holds no graph")  # an empty file parses without an error
        if _SETTINGS not in meta_graph.collection_def:
            return TrainingSettings()
        (text,) = meta_graph.collection_def[_SETTINGS].bytes_list.value
        return parse_settings(text)
    except tf.errors.NotFoundError:
        if tf.train.checkpoint_exists(checkpoint):  # otherwise a trainer has deleted it
            _warn_of_missing_settings(path)
        return None
    except (tf.errors.OpError, DecodeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); move it away to use the checkpoint without a check "
            "of what it was trained on"
        ) from error


@functools.cache  # warn once
def _warn_of_missing_settings(path):
    tf.logging.warning("%s is missing: what this checkpoint was trained on is not checked.", path)


def format_settings(settings):
    """Returns `TrainingSettings` as a string for `parse_settings`."""
    return json.dumps(settings._asdict())


def parse_settings(text):
    """Returns the `TrainingSettings` in a string. Raises ValueError or TypeError if invalid."""
    settings = TrainingSettings(**json.loads(text))
    kinds = list, int, int, str, bool, int, int
    for (name, value), kind in zip(settings._asdict().items(), kinds, strict=True):
        is_unknown = name == "examples_per_step" and value is None
        if type(value) is not kind and not is_unknown:
            raise ValueError(f"{name} is {value!r}")
    names = settings.class_names
    if not (names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"class_names is {names!r}")
    return settings._replace(class_names=tuple(names))


def find_mismatch(trained, wanted):
    """Finds the first setting that prevents a checkpoint from being used.

    Args:
      trained: `TrainingSettings` of the checkpoint; None if unknown.
      wanted: `TrainingSettings` of the program.

    Returns:
      (string, string): descriptions of the setting in `trained` and in `wanted`; None if they
      match.
    """
    if trained is None:
        return None
    if trained.class_names not in (None, wanted.class_names):
        return tuple(
            dataset.describe_classes(names) for names in (trained.class_names, wanted.class_names)
        )
    for name in ("top_layers", "crop_size"):
        values = getattr(trained, name), getattr(wanted, name)
        if values[0] != values[1]:
            return tuple(f"--{name}={value}" for value in values)
    return None


def explain_mismatch(checkpoint, trained, wanted, folder_flag):
    """Returns a sentence that says why a checkpoint cannot be used; an empty string if it can.

    `folder_flag` is the flag that names the checkpoint's folder. For `trained` and `wanted`, see
    `find_mismatch`.
    """
    mismatch = find_mismatch(trained, wanted)
    if mismatch is None:
        return ""
    has, requested = mismatch
    cure = f"use {has}" if has.startswith("--") else "use the dataset that it was trained on"
    return (
        f"{checkpoint} was trained with {has}, not with {requested}; {cure}, or choose another "
        f"folder with {folder_flag}"
    )


def find_changes(trained, wanted):
    """Returns descriptions of the changed settings with which training can resume: list of strings.

    For `trained` and `wanted`, see `find_mismatch`.
    """
    changes = []
    if trained is None:
        return changes
    if trained.examples_per_epoch not in (None, wanted.examples_per_epoch):
        changes.append(
            f"an epoch now has {wanted.examples_per_epoch} images instead of "
            f"{trained.examples_per_epoch}"
        )
    if trained.random_flip != wanted.random_flip:
        now, before = (str(value).lower() for value in (wanted.random_flip, trained.random_flip))
        changes.append(f"--random_flip is now {now} instead of {before}")
    return changes


def check_settings(checkpoint, wanted):
    """Raises CheckpointError unless a checkpoint matches `TrainingSettings`."""
    trained = read_settings(checkpoint)
    if reason := explain_mismatch(checkpoint, trained, wanted, "--checkpoint_dir"):
        raise CheckpointError(reason)


def check_variables(checkpoint, variables, folder_flag="--checkpoint_dir"):
    """Raises CheckpointError unless a checkpoint has all variables with the same shapes.

    Args:
      checkpoint: path.
      variables: dict of `tf.Variable` by name in the checkpoint.
      folder_flag: string; the flag that names the checkpoint's folder.
    """
    try:
        shapes = dict(tf.train.list_variables(checkpoint))
    except (tf.errors.OpError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {first_line(error)}") from error
    differences = []
    for name, variable in variables.items():
        shape = variable.shape.as_list()
        if name not in shapes:
            differences.append(f"{name} is missing")
        elif shapes[name] != shape:
            differences.append(f"{name} is {shapes[name]}, not {shape}")
    if not differences:
        return
    shown = differences[:5]
    if len(differences) > len(shown):
        shown.append(f"and {len(differences) - len(shown)} more differ")
    raise CheckpointError(
        f"{checkpoint} belongs to another model: in it, {', '.join(shown)}; choose another folder "
        f"with {folder_flag}"
    )


def restore(session, saver, checkpoint):
    """Restores the variables of a `tf.train.Saver` into the default graph.

    Returns:
      int; the checkpoint's global step.

    Raises:
      CheckpointError: the checkpoint cannot be read, or a variable is not finite.
    """
    try:
        saver.restore(session, checkpoint)
    # The Saver raises ValueError if files are missing.
    except (tf.errors.OpError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} cannot be restored: {first_line(error)}") from error
    # Predictions would not reveal every NaN: some implementations of ReLU turn it into 0.
    variables = [v for v in tf.global_variables() if v.dtype.base_dtype.is_floating]
    for variable, value in zip(variables, session.run(variables), strict=True):
        if not np.isfinite(value).all():
            raise CheckpointError(f"{checkpoint} has non-finite values in {variable.op.name}")
    return read_global_step(checkpoint)


def restore_newest(session, saver, variables, folder, wanted):
    """Restores the newest checkpoint in a folder into the default graph.

    Args:
      session: a `tf.Session` on that graph.
      saver: a `tf.train.Saver` of `variables`.
      variables: dict of `tf.Variable` by name in the checkpoint.
      folder: path.
      wanted: `TrainingSettings` of the graph's model.

    Returns:
      (string, int): the checkpoint's path and its global step.

    Raises:
      UserError: there is no checkpoint, or it cannot be used.
    """
    while True:
        checkpoint = require_checkpoint(folder)
        try:
            check_settings(checkpoint, wanted)
            check_variables(checkpoint, variables)
            return checkpoint, restore(session, saver, checkpoint)
        except CheckpointError:
            # A trainer may have deleted it. Then there is a newer one.
            if find_latest_checkpoint(folder) == checkpoint:
                raise


def read_newest_settings(folder):
    """Returns the `TrainingSettings` of the newest checkpoint in a folder; None if unknown.

    Raises:
      UserError: there is no checkpoint, or its settings cannot be read.
    """
    while True:
        checkpoint = require_checkpoint(folder)
        settings = read_settings(checkpoint)
        # If a trainer has deleted the checkpoint, the settings are None, but there is a newer one.
        if settings is not None or find_latest_checkpoint(folder) == checkpoint:
            return settings
