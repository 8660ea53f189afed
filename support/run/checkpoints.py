"""Checkpoints: finding, reading, checking, restoring and saving them.

TensorFlow saves the graph's collections in the `.meta` file of each checkpoint. One collection
holds the training settings, so they accompany the checkpoint and add no variables to it.
"""

import contextlib
import functools
import glob
import os
import re
import signal
import subprocess
import sys
from typing import NamedTuple

import numpy as np

from support.base import files
from support.base.errors import CheckpointError, UserError, first_line, foreign_file
from support.base.messages import printable
from support.data.settings import (
    TrainingSettings,
    find_mismatch,
    format_settings,
    parse_settings,
)
from support.ops.tensorflow_v1 import tf

_STATE_FILE = "checkpoint"  # TensorFlow's record of which checkpoint is the newest
_AVERAGE = "/ExponentialMovingAverage"  # the end of the names of variables' averages
MAX_META_BYTES = 500_000_000
MAX_STATE_BYTES = 10_000_000  # about 200,000 checkpoints
_CRASHES = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
CHECK_TIMEOUT = 600  # seconds
# Reads all variables of a checkpoint.
_READ_ALL = """
import sys, tensorflow
reader = tensorflow.train.load_checkpoint(sys.argv[1])
for name in reader.get_variable_to_shape_map():
    reader.get_tensor(name)
"""
_SETTINGS = "cifar10_settings"  # a graph collection of one string, a JSON object


class Checkpoint(NamedTuple):
    """What is known about a checkpoint; see `read`."""

    path: str  # of its files, without a suffix
    step: int
    settings: TrainingSettings | None  # None if its `.meta` file is missing
    types: dict  # from the names of its variables to types and shapes, such as "float32 [64]"

    def check_settings(self, wanted, folder_flag="--checkpoint_dir"):
        """Raises CheckpointError unless the checkpoint matches `TrainingSettings`.

        `folder_flag` is the flag that names the checkpoint's folder.
        """
        if (mismatch := find_mismatch(self.settings, wanted)) is None:
            return
        has, requested = mismatch
        cure = f"use {has}" if has.startswith("--") else "use the dataset that it was trained on"
        raise CheckpointError(
            f"{self.path} was trained with {has}, not with {requested}; {cure}, or choose another "
            f"folder with {folder_flag}"
        )

    def check_variables(self, variables, folder_flag="--checkpoint_dir"):
        """Raises CheckpointError unless the checkpoint has these variables, and no more layers.

        `variables` is a dict of `tf.Variable` by name in the checkpoint. Their types must be equal.
        """
        differences = []
        for name, variable in variables.items():
            wanted = f"{variable.dtype.base_dtype.name} {variable.shape.as_list()}"
            if name not in self.types:
                differences.append(f"{name} is missing")
            elif self.types[name] != wanted:
                differences.append(f"{name} is {self.types[name]}, not {wanted}")
        # Only trained variables have averages. Other variables that the model lacks are ignored.
        known = {name.removesuffix(_AVERAGE) for name in variables}
        trained = {name.removesuffix(_AVERAGE) for name in self.types if name.endswith(_AVERAGE)}
        differences += [f"{name} is additional" for name in sorted(trained - known)]
        if differences:
            raise CheckpointError(
                f"{self.path} belongs to another model: in it, {', '.join(differences)}; choose "
                f"another folder with {folder_flag}"
            )


# --- Finding.


def find_latest_checkpoint(path, check=lambda path: None):
    """Returns the path of the newest checkpoint, or None if there is none.

    It is the one named in the state file `checkpoint`, which TensorFlow writes. If there is no
    such file, or it is damaged or names a missing checkpoint, the newest checkpoint is the readable
    one with the highest step.

    Args:
      path: a folder; or a checkpoint or one of its files: the checkpoint's path is then returned.
      check: called with a checkpoint's path before it is read; raises CheckpointError to skip it.
    """
    if (single := find_single_checkpoint(path)) is not None:
        return single
    newest, problem = _find_newest(path, check)
    if problem is not None:
        _warn_once(f"{problem}: using {newest}, which has the highest step.")
    return newest


def find_single_checkpoint(path):
    """Returns the checkpoint that a path names by itself or by one of its files, or None."""
    checkpoint = re.sub(r"\.(index|meta|data-[0-9]{5}-of-[0-9]{5})$", "", path)
    return checkpoint if _exists(checkpoint) and not os.path.isdir(path) else None


def use_newest(path, use=lambda checkpoint: checkpoint):
    """Calls `use` with the newest `Checkpoint`, and returns what it returns.

    If `use` raises CheckpointError, but another checkpoint is the newest by then, it is called with
    that one: a trainer may have deleted the first. For `path`, see `find_latest_checkpoint`.

    Raises:
      UserError: there is no checkpoint, or the newest one cannot be read.
    """
    while (newest := find_latest_checkpoint(path)) is not None:
        try:
            return use(read(newest))
        except CheckpointError:
            if find_latest_checkpoint(path) == newest:
                raise
    raise UserError(
        f"there is no checkpoint in {path}; train first, or choose another folder with "
        "--checkpoint_dir"
    )


def find_checkpoint_to_resume(train_dir):
    """Returns the newest `Checkpoint` in a training folder, or None if the folder has none.

    Raises:
      UserError: there are checkpoints, but the newest one is unknown or cannot be read.
    """
    newest, problem = _find_newest(train_dir)
    if problem is not None:
        raise UserError(
            f"{problem}; remove that file to resume from {newest}, or choose another folder with "
            "--train_dir"
        )
    if newest is None:
        if _list_checkpoints(train_dir):  # training would start again on top of them
            raise UserError(
                f"none of the checkpoints in {train_dir} can be read; move them away to start "
                "again, or choose another folder with --train_dir"
            )
        return None
    if _read_state(train_dir) is None:  # left by a kill during the first save
        _write_state(train_dir, [os.path.basename(newest)])  # so that `save` deletes it later
    try:
        return read(newest)
    except CheckpointError as error:
        readable = _find_readable(train_dir)
        if readable in (None, newest):
            raise
        raise UserError(
            f"{error}; remove the file `{_STATE_FILE}` in that folder to resume from {readable}"
        ) from error


def _find_newest(folder, check=lambda path: None):
    """Returns the newest checkpoint's path, and why it may be the wrong one; either may be None."""
    for _ in range(2):  # a trainer may delete the checkpoint after saving a newer one
        if (state := _read_state(folder)) is not None:
            path = state.model_checkpoint_path
            # If the folder was copied, an absolute path still names the original.
            for checkpoint in (os.path.join(folder, os.path.basename(path)), path):
                if _exists(checkpoint):
                    return checkpoint, None
    readable = _find_readable(folder, check)
    if readable is None or not os.path.exists(os.path.join(folder, _STATE_FILE)):
        return readable, None
    return readable, (
        f"the file `{_STATE_FILE}` in {folder} is unreadable or names a missing checkpoint"
    )


def _find_readable(folder, check=lambda path: None):
    """Returns the path of the readable checkpoint with the highest step in a folder, or None."""
    for path in _list_checkpoints(folder):
        with contextlib.suppress(CheckpointError):
            check(path)
            _read_variables(path)
            return path
    return None


def _exists(checkpoint):
    """Returns whether a checkpoint exists, in the current format or that of 2015."""
    # `tf.train.checkpoint_exists` would treat the path as a pattern.
    return os.path.isfile(f"{checkpoint}.index") or os.path.isfile(checkpoint)


def _read_state(folder):
    """Returns what TensorFlow's state file in a folder says; None if it is missing or damaged."""
    try:
        # TensorFlow would wait for a pipe forever, and crash on a huge file.
        files.read_regular(os.path.join(folder, _STATE_FILE), MAX_STATE_BYTES)
        return tf.train.get_checkpoint_state(folder)
    except (OSError, ValueError):  # it is not text, or names no checkpoint
        return None


def _list_checkpoints(folder):
    """Returns the paths of all checkpoints in a folder, complete or not, highest step first."""
    with foreign_file(f"the folder {folder}", UserError):
        names = os.listdir(folder) if os.path.isdir(folder) else []
    paths = {
        os.path.join(folder, name.removesuffix(".index"))
        for name in names
        if re.fullmatch(r".*\.index|model\.ckpt-[0-9]+", name)
    }
    return sorted(paths, key=lambda path: (_step_in_name(path) or 0, path), reverse=True)


def _step_in_name(checkpoint):
    match = re.search(r"-([0-9]+)$", checkpoint)
    return match and int(match[1])


# --- Reading and restoring.


def read(path):
    """Returns the `Checkpoint` at a path.

    The tutorial of 2015 called the global step `Variable`, and forks have other names for it. If
    there is no `global_step`, the step is therefore the number at the end of the path.

    Raises:
      CheckpointError: the checkpoint or its settings cannot be read, or its step is unknown.
    """
    step, types = _read_variables(path)
    return Checkpoint(path, step, _read_settings(path), types)


def check_in_other_process(path):
    """Raises CheckpointError if reading a checkpoint would end the process, or takes too long.

    TensorFlow aborts if an entry of an index file is invalid although its checksum is correct.
    """
    index = f"{path}.index"
    with foreign_file(path, CheckpointError):  # a trainer may have deleted it
        _check_files(path)
        modified = os.path.getmtime(index if os.path.isfile(index) else path)
    code = _read_in_other_process(path, modified)
    if code is None:
        raise CheckpointError(f"{path} cannot be read within {CHECK_TIMEOUT} seconds")
    if -code in _CRASHES:
        name = signal.Signals(-code).name
        raise CheckpointError(f"{path} is damaged: reading it ends TensorFlow with {name}")


@functools.cache  # it takes seconds, and a checkpoint may be looked for every second
def _read_in_other_process(path, _):
    """Returns the exit code of reading a checkpoint, None after a timeout; `_` is for the cache."""
    command = [sys.executable, "-P", "-c", _READ_ALL, path]
    with contextlib.suppress(subprocess.TimeoutExpired):
        process = subprocess.run(command, capture_output=True, check=False, timeout=CHECK_TIMEOUT)
        return process.returncode
    return None


def _check_files(path):
    """Raises OSError if a file of a checkpoint is a pipe or a device: reading it could block."""
    for file in [path, *glob.glob(f"{glob.escape(path)}.*")]:
        if os.path.exists(file) and not (os.path.isfile(file) or os.path.isdir(file)):
            raise OSError(f"{file} is not a regular file")


def _read_variables(path):
    """Returns the global step of a checkpoint, and the types of its variables."""
    step = _step_in_name(path)
    with foreign_file(path, CheckpointError):
        _check_files(path)
        reader = tf.train.load_checkpoint(path)
        if reader.has_tensor(tf.GraphKeys.GLOBAL_STEP):
            value = reader.get_tensor(tf.GraphKeys.GLOBAL_STEP)
            if value.shape or value.dtype.kind not in "iuf" or not 0 <= value < 2**63 or value % 1:
                raise ValueError(f"its global_step is {value}, not a number of steps")
            step = int(value)
        dtypes, shapes = reader.get_variable_to_dtype_map(), reader.get_variable_to_shape_map()
        types = {name: f"{dtypes[name].name} {shapes[name]}" for name in shapes}
    if step is None:
        raise CheckpointError(
            f"the step of {path} is unknown: it has no variable global_step; rename its files so "
            "that its name ends in the step, for example model.ckpt-1000"
        )
    return step, types


def _read_settings(checkpoint):
    """Returns the settings in the `.meta` file of a checkpoint; None if there is no such file."""
    path = f"{checkpoint}.meta"
    if not os.path.exists(path):
        if not _exists(checkpoint):
            raise CheckpointError(f"{checkpoint} has been deleted")
        _warn_once(f"{path} is missing, so the settings of this checkpoint are not checked.")
        return None
    cure = "; move it away to use the checkpoint without a check of what it was trained on"
    with foreign_file(path, CheckpointError, cure):
        meta_graph = tf.MetaGraphDef.FromString(files.read_regular(path, MAX_META_BYTES))
        if not meta_graph.HasField("graph_def"):
            raise ValueError("it holds no graph")  # an empty file parses without an error
        if _SETTINGS not in meta_graph.collection_def:
            return TrainingSettings()
        (text,) = meta_graph.collection_def[_SETTINGS].bytes_list.value
        return parse_settings(text)


@functools.cache
def _warn_once(message):
    tf.logging.warning("%s", printable(message))


def find_variables(use_moving_averages):
    """Returns a dict from names in the checkpoint to the variables of the default graph.

    With `use_moving_averages`, each trainable variable is restored from its moving average. Other
    variables, for example those of batch normalization, have no averages and keep their own names.
    """
    if use_moving_averages:
        averages = tf.train.ExponentialMovingAverage(0.0)  # for the names; the decay has no effect
        # Sorted, because TensorFlow's order depends on the addresses of the variables.
        return dict(sorted(averages.variables_to_restore(tf.trainable_variables()).items()))
    return {variable.op.name: variable for variable in tf.global_variables()}


def restore(session, saver, checkpoint):
    """Restores the variables of a `tf.train.Saver` from a `Checkpoint` into the default graph.

    Raises:
      CheckpointError: the checkpoint cannot be read, or a variable is not finite.
    """
    with foreign_file(checkpoint.path, CheckpointError):
        saver.restore(session, checkpoint.path)
    # Predictions would not reveal every NaN: some implementations of ReLU turn it into 0.
    variables = [v for v in tf.global_variables() if v.dtype.base_dtype.is_floating]
    for variable, value in zip(variables, session.run(variables), strict=True):
        if not np.isfinite(value).all():
            raise CheckpointError(f"{checkpoint.path} has non-finite values in {variable.op.name}")


# --- Saving.


def record_settings(settings):
    """Saves `TrainingSettings` with every checkpoint of the default graph."""
    tf.add_to_collection(_SETTINGS, format_settings(settings))


def save(session, saver, folder, step, max_to_keep):
    """Saves a checkpoint, names it in the state file, and deletes older ones that the file named.

    `tf.train.Saver.save` by itself writes the `.meta` file, which holds the settings, after the
    checkpoint, and deletes it before the checkpoint. Here, a checkpoint always has its settings.

    Raises:
      UserError: the checkpoint cannot be written. Unfinished files are deleted.
    """
    name = f"model.ckpt-{step}"
    path = os.path.join(folder, name)
    others = [old for old in _list_saved(folder) if old != name]
    saved = [*others, name]
    try:
        _remove_unfinished(folder)
        _remove(path)  # left from before training resumed from an earlier step
        with session.graph.as_default():
            saver.export_meta_graph(f"{path}.meta")
        if others:  # listed before it exists: a later save then deletes what a kill leaves
            _write_state(folder, [name, *others])
        saver.save(session, path, write_meta_graph=False, write_state=False)
        _write_state(folder, saved)
        for old in saved[:-max_to_keep]:
            with contextlib.suppress(OSError):  # it stays listed: the next save tries again
                _remove(os.path.join(folder, old))
        _write_state(folder, _list_saved(folder))
    # The Saver raises ValueError if the folder is gone.
    except (tf.errors.OpError, OSError, ValueError) as error:
        with contextlib.suppress(OSError):  # the folder may have become read-only
            _remove_unfinished(folder)
            if not _exists(path):
                _remove(path)
        raise UserError(
            f"cannot save a checkpoint in {folder}: {first_line(error)}; free some space and run "
            "the same command again"
        ) from error


def _list_saved(folder):
    """Returns the names of the existing checkpoints that a state file lists, oldest first."""
    state = _read_state(folder)
    names = map(os.path.basename, state.all_model_checkpoint_paths if state is not None else [])
    return [name for name in names if _exists(os.path.join(folder, name))]


def _write_state(folder, names):
    """Makes the last of `names` the newest checkpoint of a folder, and lists all of them."""
    # Relative paths allow the folder to be moved.
    tf.train.update_checkpoint_state(os.path.abspath(folder), names[-1], names)


def _remove(checkpoint):
    """Deletes the files of a checkpoint. The one by which it is found comes first."""
    folder, name = os.path.split(checkpoint)
    pattern = re.compile(re.escape(name) + r"(\.index|\.meta|\.data-[0-9]{5}-of-[0-9]{5})?")
    found = filter(pattern.fullmatch, os.listdir(folder))
    for file in sorted(found, key=lambda file: file not in (name, f"{name}.index")):
        os.remove(os.path.join(folder, file))


def _remove_unfinished(folder):
    """Deletes the unfinished files of failed or killed saves, which would fill the disk."""
    for name in os.listdir(folder):
        if re.fullmatch(r"model\.ckpt-.*\.(.*tempstate|meta\.tmp).*|checkpoint\.tmp.*", name):
            os.remove(os.path.join(folder, name))
