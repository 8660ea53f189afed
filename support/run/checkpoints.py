"""Checkpoints: finding, reading, checking and restoring them.

TensorFlow saves the graph's collections in the `.meta` file of each checkpoint. One collection
holds the training settings, so they accompany the checkpoint and add no variables to it.
"""

import contextlib
import functools
import os
import re

import numpy as np
from google.protobuf.message import DecodeError

from support.base.errors import CheckpointError, UserError, first_line
from support.data.settings import (
    TrainingSettings,
    explain_mismatch,
    format_settings,
    parse_settings,
)
from support.ops.tensorflow_v1 import tf

_STATE_FILE = "checkpoint"  # TensorFlow's record of which checkpoint is the newest
_SETTINGS = "cifar10_settings"  # a graph collection of one string, a JSON object


def find_latest_checkpoint(path):
    """Returns the path of the newest checkpoint, or None if there is none.

    It is the one named in the state file `checkpoint`, which TensorFlow writes. If there is no
    such file, or it names a missing checkpoint, it is the readable one with the highest step.

    Args:
      path: a folder; or a checkpoint, which is then returned itself. For a checkpoint, this may
        also be the path of one of its files, for example `model.ckpt-1000.index`.
    """
    if (single := find_single_checkpoint(path)) is not None:
        return single
    named = _find_named(path)
    if named is not None or (_has_state_file(path) and _read_state(path) is None):
        return named
    readable = find_readable(path)
    if readable is not None and (reason := explain_missing_checkpoint(path)):
        _warn_once(f"{reason}: using {readable}, which has the highest step.")
    return readable


def find_single_checkpoint(path):
    """Returns the checkpoint that a path names by itself or by one of its files, or None."""
    checkpoint = re.sub(r"\.(index|meta|data-[0-9]{5}-of-[0-9]{5})$", "", path)
    return checkpoint if exists(checkpoint) and not os.path.isdir(path) else None


def exists(checkpoint):
    """Returns whether a checkpoint exists, in the current format or that of 2015."""
    # `tf.train.checkpoint_exists` would treat the path as a pattern.
    return os.path.isfile(f"{checkpoint}.index") or os.path.isfile(checkpoint)


def _has_state_file(folder):
    return os.path.exists(os.path.join(folder, _STATE_FILE))


def _read_state(folder):
    """Returns what TensorFlow's state file in a folder says; None if it is missing or damaged."""
    try:
        return tf.train.get_checkpoint_state(folder)
    except ValueError:  # it is not text, or names no checkpoint
        return None


def _find_named(folder):
    """Returns the existing checkpoint that the state file of a folder names, or None."""
    missing = None
    while (state := _read_state(folder)) is not None:
        path = state.model_checkpoint_path
        for checkpoint in (_move_to_folder(path, folder), path):
            if exists(checkpoint):
                return checkpoint
        if path == missing:
            break
        missing = path  # a trainer may have deleted it since, after writing a newer one
    return None


def _move_to_folder(path, folder):
    """Returns the path in `folder` with the last component of `path`, a POSIX or Windows path.

    A state file can hold absolute paths. If the folder was copied, perhaps from another machine,
    its checkpoints are next to the file.
    """
    name = os.path.basename(path)
    if not exists(os.path.join(folder, name)):
        name = name.rpartition("\\")[2]
    return os.path.join(folder, name)


def explain_missing_checkpoint(folder):
    """Returns why the newest checkpoint is unknown, or None if there is no state file at all."""
    if _has_state_file(folder):
        return f"the file `{_STATE_FILE}` in {folder} is unreadable or names a missing checkpoint"
    return None


def require_checkpoint(path):
    """Returns the newest checkpoint; see `find_latest_checkpoint`.

    Raises:
      UserError: there is none, or the state file cannot be read.
    """
    checkpoint = find_latest_checkpoint(path)
    if checkpoint is not None:
        return checkpoint
    if reason := explain_missing_checkpoint(path):
        raise UserError(
            f"{reason}; run cifar10_train.py on this folder; it prints how to repair it"
        )
    raise UserError(
        f"there is no checkpoint in {path}; train first, or choose another folder with "
        "--checkpoint_dir"
    )


def find_checkpoint_to_resume(train_dir):
    """Returns the newest checkpoint in a training folder, or None if the folder has none.

    If no state file names it yet, the function writes one, so that every script finds it.

    Raises:
      UserError: there are checkpoints, but it is unknown which of them is the newest.
    """
    newest = _find_named(train_dir)
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
    _write_state(train_dir, [os.path.basename(readable)])
    return readable


def find_readable(folder):
    """Returns the path of the readable checkpoint with the highest step in a folder, or None."""
    for path in _list_checkpoints(folder):
        with contextlib.suppress(CheckpointError):
            read_global_step(path)
            return path
    return None


def _list_checkpoints(folder):
    """Returns the paths of all checkpoints in a folder, complete or not, highest step first."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    found = {
        name.removesuffix(".index")
        for name in names
        if re.fullmatch(r".*\.index|model\.ckpt-[0-9]+", name, re.DOTALL)
    }
    paths = [os.path.join(folder, name) for name in sorted(found)]
    return sorted(paths, key=lambda path: _step_in_name(path) or 0, reverse=True)


def _step_in_name(checkpoint):
    match = re.search(r"-([0-9]+)$", checkpoint)
    return match and int(match[1])


def _files_of(checkpoint):
    """Returns the paths of the files of a checkpoint. The one by which it is found comes first."""
    folder, name = os.path.split(checkpoint)
    names = re.compile(re.escape(name) + r"(\.index|\.meta|\.data-[0-9]{5}-of-[0-9]{5})?")
    found = sorted(filter(names.fullmatch, os.listdir(folder or ".")))
    found.sort(key=lambda file: file not in (name, f"{name}.index"))
    return [os.path.join(folder, file) for file in found]


@contextlib.contextmanager
def _reader(checkpoint):
    """Yields TensorFlow's `CheckpointReader`; raises CheckpointError for its errors."""
    try:
        yield tf.train.load_checkpoint(checkpoint)
    # TensorFlow's reader raises several of Python's own exceptions.
    except (tf.errors.OpError, OSError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {first_line(error)}") from error


def read_global_step(checkpoint):
    """Returns the global step of a checkpoint.

    The tutorial of 2015 called that variable `Variable`, and forks have other names for it. If
    there is no `global_step`, the step is therefore the number at the end of the path.

    Raises:
      CheckpointError: the checkpoint cannot be read, or has neither.
    """
    with _reader(checkpoint) as reader:
        if reader.has_tensor(tf.GraphKeys.GLOBAL_STEP):
            return int(reader.get_tensor(tf.GraphKeys.GLOBAL_STEP))
    step = _step_in_name(checkpoint)
    if step is None:
        raise CheckpointError(
            f"the step of {checkpoint} is unknown: it has no variable global_step; rename its "
            "files so that its name ends in the step, for example model.ckpt-1000"
        )
    return step


def save(session, saver, folder, step, max_to_keep):
    """Saves a checkpoint, names it in the state file, and deletes older ones that the file named.

    `tf.train.Saver.save` would do the same, but it deletes whatever matches the path as a pattern.
    The `.meta` file, which holds the training settings, is written before the checkpoint, so no
    checkpoint ever exists without its settings.

    Args:
      session: a `tf.Session`.
      saver: a `tf.train.Saver` in its graph.
      folder: path of an existing folder.
      step: int; the global step.
      max_to_keep: int; the number of checkpoints to keep.

    Raises:
      UserError: the checkpoint cannot be written. Unfinished files are deleted.
    """
    name = f"model.ckpt-{step}"
    path = os.path.join(folder, name)
    try:
        _remove(path)  # left from before training resumed from an earlier step
        saved = [*_list_saved(folder), name]
        with session.graph.as_default():
            saver.export_meta_graph(f"{path}.meta")
        session.run(saver.saver_def.save_tensor_name, {saver.saver_def.filename_tensor_name: path})
        _write_state(folder, saved[-max_to_keep:])
    except (tf.errors.OpError, OSError) as error:
        with contextlib.suppress(OSError):  # the folder may have become read-only
            _remove_unfinished(folder, path)
        raise UserError(
            f"cannot save a checkpoint in {folder}: {first_line(error)}; free some space and run "
            "the same command again to resume from the previous checkpoint"
        ) from error
    for old in saved[:-max_to_keep]:
        try:
            _remove(os.path.join(folder, old))
        except OSError as error:
            tf.logging.warning("An old checkpoint cannot be deleted: %s", error)


def _list_saved(folder):
    """Returns the names of the existing checkpoints that a state file lists, oldest first."""
    state = _read_state(folder)
    paths = state.all_model_checkpoint_paths if state is not None else []
    paths = [_move_to_folder(path, folder) for path in paths]
    return [os.path.basename(path) for path in paths if exists(path)]


def _write_state(folder, names):
    """Makes the last of `names` the newest checkpoint of a folder, and lists all of them."""
    # Relative paths allow the folder to be moved.
    tf.train.update_checkpoint_state(os.path.abspath(folder), names[-1], names)


def _remove(checkpoint):
    for path in _files_of(checkpoint):
        os.remove(path)


def _remove_unfinished(folder, checkpoint):
    """Deletes what failed saves have left in a folder: it would fill the disk."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if re.fullmatch(r"model\.ckpt-.*\.(.*tempstate|meta\.tmp).*|checkpoint\.tmp.*", name):
            os.remove(os.path.join(folder, name))
    if not exists(checkpoint):
        _remove(checkpoint)


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
        with open(path, "rb") as file:
            meta_graph = tf.MetaGraphDef.FromString(file.read())
        if not meta_graph.HasField("graph_def"):
            raise ValueError("it holds no graph")  # an empty file parses without an error
        if _SETTINGS not in meta_graph.collection_def:
            return TrainingSettings()
        (text,) = meta_graph.collection_def[_SETTINGS].bytes_list.value
        return parse_settings(text)
    except FileNotFoundError:
        if exists(checkpoint):  # otherwise a trainer has deleted it
            _warn_once(f"{path} is missing, so the settings of this checkpoint are not checked.")
        return None
    except (OSError, DecodeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); move it away to use the checkpoint without a check "
            "of what it was trained on"
        ) from error


@functools.cache
def _warn_once(message):
    tf.logging.warning("%s", message)


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
    with _reader(checkpoint) as reader:
        shapes = reader.get_variable_to_shape_map()
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


def find_variables(use_moving_averages):
    """Returns a dict from names in the checkpoint to the variables of the default graph.

    With `use_moving_averages`, each trainable variable is restored from its moving average. Other
    variables, for example those of batch normalization, have no averages and keep their own names.
    """
    if use_moving_averages:
        averages = tf.train.ExponentialMovingAverage(0.0)  # for the names; the decay has no effect
        return averages.variables_to_restore(tf.trainable_variables())
    return {variable.op.name: variable for variable in tf.global_variables()}


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
    except (tf.errors.OpError, OSError, ValueError) as error:
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
      folder: path; or that of a checkpoint, as for `find_latest_checkpoint`.
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
