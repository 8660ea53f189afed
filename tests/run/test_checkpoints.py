"""Tests of finding, reading, checking, restoring and saving checkpoints."""

import math
import os
import shutil

import pytest

from support.base.errors import CheckpointError, UserError
from support.data.settings import TrainingSettings
from support.ops.tensorflow_v1 import tf
from support.run import checkpoints

OWN = TrainingSettings(("cat", "hot dog"), 123, 32, "local", False)


def save(folder, step=3, settings=None, **values):
    """Saves a checkpoint of trainable variables with the given values; returns its path."""
    with tf.Graph().as_default(), tf.Session() as session:
        if settings is not None:
            checkpoints.record_settings(settings)
        tf.get_variable("global_step", initializer=tf.constant(step, tf.int64), trainable=False)
        for name, value in (values or {"x": 1.0}).items():
            tf.get_variable(name, initializer=value)
        session.run(tf.global_variables_initializer())
        saver = tf.train.Saver(save_relative_paths=True)
        return saver.save(session, str(folder / "model.ckpt"), step)


def remove(checkpoint):
    """Deletes the files of a checkpoint, as a trainer does with its older ones."""
    folder, name = os.path.split(checkpoint)
    for file in os.listdir(folder):
        if file.startswith(f"{name}."):
            os.remove(os.path.join(folder, file))


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


# --- Finding the newest checkpoint.


def test_the_newest_checkpoint_is_the_one_that_the_state_file_names(tmp_path):
    save(tmp_path, 7)
    newest = save(tmp_path, 3)  # by number, step 7 comes later
    assert checkpoints.find_latest_checkpoint(str(tmp_path)) == newest
    assert checkpoints.use_newest(str(tmp_path)).path == newest
    assert checkpoints.find_checkpoint_to_resume(str(tmp_path)).path == newest


def test_the_newest_checkpoint_is_found_while_a_trainer_replaces_it(
    tmp_path, monkeypatch, warnings
):
    first = save(tmp_path, 3)
    read_state = checkpoints._read_state

    def read_before_a_save(folder):
        state = read_state(folder)
        if os.path.exists(f"{first}.index"):
            save(tmp_path, 4)
            remove(first)
        return state

    monkeypatch.setattr(checkpoints, "_read_state", read_before_a_save)
    newest = str(tmp_path / "model.ckpt-4")
    assert checkpoints.find_latest_checkpoint(str(tmp_path)) == newest
    assert warnings == []


@pytest.mark.parametrize("folder", ["", "missing"])
def test_a_folder_without_checkpoints_is_an_error_only_if_one_is_required(tmp_path, folder):
    path = str(tmp_path / folder)
    assert checkpoints.find_latest_checkpoint(path) is None
    assert checkpoints.find_checkpoint_to_resume(path) is None
    message = f"there is no checkpoint in {path}; train first, or .* --checkpoint_dir$"
    with pytest.raises(UserError, match=message):
        checkpoints.use_newest(path)


@pytest.mark.parametrize("state", [None, b"\0\0"])
def test_a_folder_with_only_damaged_checkpoints_cannot_be_resumed(tmp_path, state):
    for step in (3, 5):
        save(tmp_path, step)
        (tmp_path / f"model.ckpt-{step}.index").write_bytes(b"")
    (tmp_path / "checkpoint").unlink()
    if state is not None:
        (tmp_path / "checkpoint").write_bytes(state)
    with pytest.raises(UserError, match="none of the checkpoints in .* can be read; move them"):
        checkpoints.find_checkpoint_to_resume(str(tmp_path))


def test_an_older_checkpoint_is_suggested_if_the_newest_is_damaged(tmp_path):
    for step in (3, 20, 100):
        save(tmp_path, step)
    (tmp_path / "model.ckpt-100.data-00000-of-00001").write_bytes(b"")
    message = (
        r"ckpt-100 cannot be read \(.*\); remove the file `checkpoint` .* resume from .*ckpt-20$"
    )
    with pytest.raises(UserError, match=message):
        checkpoints.find_checkpoint_to_resume(str(tmp_path))
    (tmp_path / "checkpoint").unlink()
    assert checkpoints.find_checkpoint_to_resume(str(tmp_path)).step == 20


def test_a_copied_folder_is_independent_of_the_original(tmp_path):
    (tmp_path / "original").mkdir()
    for step in (3, 4):
        path = save(tmp_path / "original", step)
    paths = [str(tmp_path / "original" / f"model.ckpt-{step}") for step in (3, 4)]
    tf.train.update_checkpoint_state(str(tmp_path / "original"), path, paths)  # absolute paths
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    copied = str(tmp_path / "copy" / "model.ckpt-4")
    assert checkpoints.find_latest_checkpoint(str(tmp_path / "copy")) == copied
    assert checkpoints.find_checkpoint_to_resume(str(tmp_path / "copy")).path == copied
    before = sorted(os.listdir(tmp_path / "original"))
    save_as_trainer(tmp_path / "copy", steps=[5], max_to_keep=1)
    assert sorted(os.listdir(tmp_path / "original")) == before
    assert steps_in(tmp_path / "copy") == [5]


@pytest.mark.parametrize(
    "state", [b"\xff not a checkpoint", b'model_checkpoint_path: "/home/ann/model.ckpt-9"']
)
def test_if_the_state_file_names_no_checkpoint_the_highest_step_is_used_but_not_resumed(
    tmp_path, warnings, state
):
    for step in (7, 100, 20):
        save(tmp_path, step)
    newest = str(tmp_path / "model.ckpt-100")
    (tmp_path / "checkpoint").write_bytes(state)
    for _ in range(2):
        assert checkpoints.find_latest_checkpoint(str(tmp_path)) == newest
    reason = f"the file `checkpoint` in {tmp_path} is unreadable or names a missing checkpoint"
    assert [line for line in warnings if "unreadable" in line] == [
        f"{reason}: using {newest}, which has the highest step."
    ]
    with pytest.raises(UserError, match=f"^{reason}; remove that file to resume from {newest},"):
        checkpoints.find_checkpoint_to_resume(str(tmp_path))
    assert (tmp_path / "checkpoint").read_bytes() == state


@pytest.mark.parametrize("prepare", [lambda path: os.truncate(path, 2**40), replace_by_pipe])
def test_a_state_file_that_is_huge_or_a_pipe_is_treated_like_a_damaged_one(tmp_path, prepare):
    newest = save(tmp_path)
    prepare(tmp_path / "checkpoint")
    assert checkpoints.find_latest_checkpoint(str(tmp_path)) == newest
    with pytest.raises(UserError, match="is unreadable or names a missing checkpoint; remove that"):
        checkpoints.find_checkpoint_to_resume(str(tmp_path))


@pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
def test_a_checkpoint_with_a_named_pipe_is_never_opened(tmp_path, suffix):
    older, newest = save(tmp_path, 3), save(tmp_path, 7)
    replace_by_pipe(tmp_path / f"model.ckpt-7{suffix}")
    for use in (checkpoints.read, checkpoints.check_in_other_process):
        with pytest.raises(CheckpointError, match="ckpt-7 cannot be read .*not a regular file"):
            use(newest)
    with pytest.raises(UserError, match=f"remove .* file .*to resume from {older}"):
        checkpoints.find_checkpoint_to_resume(str(tmp_path))
    (tmp_path / "checkpoint").unlink()
    assert checkpoints.find_checkpoint_to_resume(str(tmp_path)).path == older


def test_the_time_for_reading_in_another_process_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_READ_ALL", "import time; time.sleep(60)")
    monkeypatch.setattr(checkpoints, "CHECK_TIMEOUT", 0.1)
    with pytest.raises(CheckpointError, match="ckpt-3 cannot be read within 0.1 seconds$"):
        checkpoints.check_in_other_process(save(tmp_path))


def test_without_a_state_file_the_readable_checkpoint_of_the_highest_step_is_used(
    tmp_path, warnings
):
    folder = tmp_path / "before"
    folder.mkdir()
    for step in (7, 100, 20):
        save(folder, step)
    (folder / "checkpoint").unlink()
    (folder / "model.ckpt-300.index").write_bytes(b"")  # a save that was killed
    newest = str(folder / "model.ckpt-100")
    assert checkpoints.find_latest_checkpoint(str(folder)) == newest
    assert warnings == []
    assert not (folder / "checkpoint").exists()
    assert checkpoints.find_checkpoint_to_resume(str(folder)).path == newest
    moved = folder.rename(tmp_path / "after")  # the new state file names no folder
    assert tf.train.latest_checkpoint(str(moved)) == str(moved / "model.ckpt-100")


def test_a_folder_that_cannot_be_listed_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", lambda path: open(f"{path}/missing"))  # noqa: SIM115
    with pytest.raises(UserError, match="^the folder .* cannot be read .*No such file"):
        checkpoints.use_newest(str(tmp_path))


@pytest.mark.parametrize("suffix", ["", ".index", ".meta", ".data-00000-of-00001"])
def test_a_path_may_name_one_checkpoint_or_one_of_its_files(tmp_path, monkeypatch, suffix):
    path = save(tmp_path, 3, OWN, x=3.5)
    save(tmp_path, 4, OWN, x=4.5)
    assert checkpoints.find_single_checkpoint(f"{path}{suffix}") == path
    assert checkpoints.find_latest_checkpoint(f"{path}{suffix}") == path
    assert checkpoints.use_newest(f"{path}{suffix}").path == path
    assert restore(f"{path}{suffix}") == (path, 3, 3.5)
    monkeypatch.chdir(tmp_path)
    assert checkpoints.use_newest(f"model.ckpt-3{suffix}").path == "model.ckpt-3"
    assert checkpoints.find_single_checkpoint(str(tmp_path)) is None
    assert checkpoints.find_single_checkpoint(str(tmp_path / f"model.ckpt-5{suffix}")) is None


def test_the_step_is_the_one_that_was_saved_whatever_the_name(tmp_path):
    save(tmp_path, 12)
    for path in tmp_path.glob("model.ckpt-12.*"):
        path.rename(tmp_path / path.name.replace("12", "99"))
    assert checkpoints.read(str(tmp_path / "model.ckpt-99")).step == 12


def test_a_checkpoint_without_any_step_is_a_one_line_error(tmp_path):
    with tf.Graph().as_default(), tf.Session() as session:
        tf.Variable(0, trainable=False)  # the name that the tutorial of 2015 gave it
        session.run(tf.global_variables_initializer())
        path = tf.train.Saver().save(session, str(tmp_path / "model.ckpt"))
    with pytest.raises(CheckpointError, match=f"^the step of {path} is unknown: .*; rename its"):
        checkpoints.read(path)


# --- What a checkpoint was trained on.


def test_settings_are_read_as_they_were_recorded_and_add_no_variables(tmp_path):
    path = save(tmp_path, settings=OWN)
    assert checkpoints.read(path).settings == OWN
    assert dict(tf.train.list_variables(path)) == {"global_step": [], "x": []}


def test_a_checkpoint_without_settings_is_treated_as_one_of_the_original_tutorial(tmp_path):
    assert checkpoints.read(save(tmp_path)).settings == (None, None, 24, "full", True, None, 0)


def test_a_missing_meta_file_causes_one_warning_and_leaves_the_settings_unknown(tmp_path, warnings):
    path = save(tmp_path, settings=OWN)
    (tmp_path / "model.ckpt-3.meta").unlink()
    for _ in range(2):
        assert checkpoints.read(path).settings is None
    assert warnings == [
        f"{path}.meta is missing, so the settings of this checkpoint are not checked."
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda meta: b"",
        lambda meta: meta[:-7],
        lambda meta: meta.replace(b"crop_size", b"crop_area"),
    ],
    ids=["empty", "truncated", "of an unknown version"],
)
def test_a_meta_file_that_cannot_be_understood_is_refused(tmp_path, damage):
    path = save(tmp_path, settings=OWN)
    meta = tmp_path / "model.ckpt-3.meta"
    meta.write_bytes(damage(meta.read_bytes()))
    with pytest.raises(CheckpointError, match="ckpt-3.meta cannot be read .*; move it away to use"):
        checkpoints.read(path)


def test_settings_that_do_not_match_are_an_error_that_names_the_checkpoint_and_the_cure():
    def explain(trained):
        with pytest.raises(CheckpointError) as error:
            checkpoint._replace(settings=trained).check_settings(OWN, "--train_dir")
        return str(error.value)

    checkpoint = checkpoints.Checkpoint("model.ckpt-3", 3, OWN, {})
    checkpoint.check_settings(OWN)
    checkpoint._replace(settings=None).check_settings(OWN)
    assert explain(OWN._replace(crop_size=24)) == (
        "model.ckpt-3 was trained with --crop_size=24, not with --crop_size=32; use "
        "--crop_size=24, or choose another folder with --train_dir"
    )
    assert explain(OWN._replace(class_names=("dog", "cat", "cow"))) == (
        "model.ckpt-3 was trained with 3 classes (dog, cat, cow), not with 2 classes (cat, hot "
        "dog); use the dataset that it was trained on, or choose another folder with --train_dir"
    )


# --- Variables.


def test_variables_that_are_missing_or_differ_in_type_or_shape_are_named(tmp_path, graph):
    path = save(tmp_path, wide=[1.0, 2.0])
    variables = {"wide": tf.get_variable("a", [3]), "deep": tf.get_variable("b", [1])}
    variables["global_step"] = tf.get_variable("c", [], tf.int32)
    with pytest.raises(
        CheckpointError,
        match=rf"^{path} belongs to another model: in it, wide is float32 \[2\], not "
        r"float32 \[3\], deep is missing, global_step is int64 \[\], not int32 \[\]; choose "
        "another folder with --train_dir$",
    ):
        checkpoints.read(path).check_variables(variables, "--train_dir")


def test_a_checkpoint_with_a_layer_that_the_model_lacks_is_refused(tmp_path, graph):
    path = save(tmp_path, **{"a": 1.0, "b": 1.0, "b/ExponentialMovingAverage": 1.0, "b/avg": 1.0})
    read = checkpoints.read(path)
    for names in (["b"], ["b/ExponentialMovingAverage"]):  # without and with averages
        read.check_variables({name: tf.get_variable(name, []) for name in names})
    message = f"^{path} belongs to another model: in it, b is additional; choose another"
    with pytest.raises(CheckpointError, match=message):
        read.check_variables({"a": tf.get_variable("a", [])})


def restore(folder, wanted=OWN):
    """Restores the newest checkpoint into a variable `x`; returns its path, its step and `x`."""
    with tf.Graph().as_default(), tf.Session() as session:
        variable = tf.get_variable("x", [])
        variables = {"x": variable}
        saver = tf.train.Saver(variables)

        def use(checkpoint):
            checkpoint.check_settings(wanted)
            checkpoint.check_variables(variables)
            checkpoints.restore(session, saver, checkpoint)
            return checkpoint

        found = checkpoints.use_newest(str(folder), use)
        return found.path, found.step, session.run(variable)


def test_a_checkpoint_that_is_not_finite_is_not_restored(tmp_path):
    path = save(tmp_path, 3, OWN, x=math.inf)
    with pytest.raises(CheckpointError, match=f"^{path} has non-finite values in x$"):
        restore(tmp_path)


@pytest.mark.parametrize("moment", ["_read_variables", "_read_settings", "restore"])
def test_the_next_checkpoint_is_used_if_a_trainer_deletes_one_meanwhile(
    tmp_path, monkeypatch, warnings, moment
):
    first = save(tmp_path, 3, OWN, x=3.5)
    function = getattr(checkpoints, moment)

    def move_on_first(*arguments):
        if os.path.exists(f"{first}.index"):
            save(tmp_path, 4, OWN, x=4.5)
            remove(first)
        return function(*arguments)

    monkeypatch.setattr(checkpoints, moment, move_on_first)
    assert restore(tmp_path) == (str(tmp_path / "model.ckpt-4"), 4, 4.5)
    assert warnings == []


# --- Saving.


def save_as_trainer(folder, steps, max_to_keep=5, settings=OWN, x=1.0):
    """Saves checkpoints as the training session does."""
    with tf.Graph().as_default(), tf.Session() as session:
        checkpoints.record_settings(settings)
        global_step = tf.train.get_or_create_global_step()
        tf.get_variable("x", initializer=x)
        session.run(tf.global_variables_initializer())
        saver = tf.train.Saver()
        for step in steps:
            session.run(tf.assign(global_step, step))
            checkpoints.save(session, saver, str(folder), step, max_to_keep)


def steps_in(folder):
    names = [name for name in os.listdir(folder) if name.startswith("model.ckpt-")]
    steps = {int(name.split(".")[1].removeprefix("ckpt-")) for name in names}
    assert len(names) == 3 * len(steps)  # no checkpoint is half there
    return sorted(steps)


def test_tensorflow_finds_and_restores_what_is_saved_here_and_counts_it(tmp_path):
    save_as_trainer(tmp_path, steps=[3, 4], x=2.5)
    with tf.Graph().as_default(), tf.Session() as session:
        variable = tf.get_variable("x", [])
        saver = tf.train.Saver(max_to_keep=2)
        state = tf.train.get_checkpoint_state(str(tmp_path))
        saver.restore(session, tf.train.latest_checkpoint(str(tmp_path)))
        saver.recover_last_checkpoints(state.all_model_checkpoint_paths)
        assert session.run(variable) == 2.5
        saver.save(session, str(tmp_path / "model.ckpt"), 5)
    assert steps_in(tmp_path) == [4, 5]
    save_as_trainer(tmp_path, steps=[6], max_to_keep=2)
    assert steps_in(tmp_path) == [5, 6]


@pytest.mark.parametrize("count", [0, 1])
def test_a_kill_before_or_after_a_deletion_leaves_checkpoints_with_their_settings(
    tmp_path, monkeypatch, count
):
    save_as_trainer(tmp_path, steps=[1, 2], max_to_keep=2)
    remove, removed = os.remove, []

    def remove_or_kill(path):
        if len(removed) == count:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    with monkeypatch.context() as context:
        context.setattr(os, "remove", remove_or_kill)
        with pytest.raises(KeyboardInterrupt):
            save_as_trainer(tmp_path, steps=[3], max_to_keep=2)
    assert checkpoints.find_latest_checkpoint(str(tmp_path)).endswith("-3")
    for path in tmp_path.glob("*.index"):
        assert checkpoints.read(str(path.with_suffix(""))).settings == OWN
    save_as_trainer(tmp_path, steps=[4], max_to_keep=2)  # none is kept forever
    assert {path.stem[-1] for path in tmp_path.glob("*.index")} == {"3", "4"}
    state = tf.train.get_checkpoint_state(str(tmp_path))
    assert [path[-1] for path in state.all_model_checkpoint_paths] == ["3", "4"]


def test_a_checkpoint_that_a_killed_save_left_is_deleted_after_later_saves(tmp_path, monkeypatch):
    save_as_trainer(tmp_path, steps=[1, 2], max_to_keep=2)
    write = checkpoints._write_state

    def write_or_kill(folder, names):
        if names[-1].endswith("-3"):
            raise KeyboardInterrupt
        write(folder, names)

    with monkeypatch.context() as context:
        context.setattr(checkpoints, "_write_state", write_or_kill)
        with pytest.raises(KeyboardInterrupt):
            save_as_trainer(tmp_path, steps=[3], max_to_keep=2)
    assert checkpoints.find_latest_checkpoint(str(tmp_path)).endswith("-2")
    save_as_trainer(tmp_path, steps=[4, 5], max_to_keep=2)
    assert {path.stem[-1] for path in tmp_path.glob("*.index")} == {"4", "5"}


def test_an_old_checkpoint_that_cannot_be_deleted_is_deleted_after_a_later_save(
    tmp_path, monkeypatch
):
    save_as_trainer(tmp_path, steps=[1], max_to_keep=1)
    with monkeypatch.context() as context:
        context.setattr(os, "remove", lambda path: open(f"{path}/"))  # noqa: SIM115
        save_as_trainer(tmp_path, steps=[2], max_to_keep=1)
    assert steps_in(tmp_path) == [1, 2]
    save_as_trainer(tmp_path, steps=[3], max_to_keep=1)
    assert steps_in(tmp_path) == [3]


def test_what_a_killed_save_has_left_is_deleted_at_the_next_one(tmp_path):
    for name in ("model.ckpt-5.data-00000-of-00001.tempstate1", "model.ckpt-5.meta.tmp2"):
        (tmp_path / name).write_text("half")
    save_as_trainer(tmp_path, steps=[3])
    assert steps_in(tmp_path) == [3]


def test_saving_deletes_no_checkpoint_that_the_state_file_does_not_list(tmp_path):
    save(tmp_path, 9)
    (tmp_path / "checkpoint").unlink()
    save_as_trainer(tmp_path, steps=[1, 2, 3], max_to_keep=1)
    assert steps_in(tmp_path) == [3, 9]
    (tmp_path / "checkpoint").write_bytes(b"\xff")  # it lists nothing, and is replaced
    save_as_trainer(tmp_path, steps=[4], max_to_keep=1)
    assert steps_in(tmp_path) == [3, 4, 9]
    assert checkpoints.find_latest_checkpoint(str(tmp_path)).endswith("-4")


def test_a_checkpoint_that_replaces_another_one_has_its_own_settings_at_every_moment(
    tmp_path, monkeypatch
):
    save_as_trainer(tmp_path, steps=[3, 4])
    exported = tf.train.Saver.export_meta_graph

    def export(saver, path, **arguments):
        assert not (tmp_path / "model.ckpt-4.index").exists()  # it would get the new settings
        return exported(saver, path, **arguments)

    monkeypatch.setattr(tf.train.Saver, "export_meta_graph", export)
    new = OWN._replace(random_flip=True)
    save_as_trainer(tmp_path, steps=[4], max_to_keep=2, settings=new)
    assert steps_in(tmp_path) == [3, 4]
    assert checkpoints.read(str(tmp_path / "model.ckpt-3")).settings == OWN
    assert checkpoints.read(str(tmp_path / "model.ckpt-4")).settings == new


def test_a_failed_save_leaves_nothing_of_its_own_and_everything_else(tmp_path, monkeypatch):
    save_as_trainer(tmp_path, steps=[3])
    (tmp_path / "my.tempstate").write_text("unrelated")
    before = sorted(os.listdir(tmp_path))

    def fail(saver, path, **arguments):
        for suffix in (".meta", ".meta.tmp1", ".data-00000-of-00001.tempstate2"):
            with open(f"{path.removesuffix('.meta')}{suffix}", "w") as file:
                file.write("half")
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.train.Saver, "export_meta_graph", fail)
    with pytest.raises(UserError, match="cannot save a checkpoint in .*: No space left on device;"):
        save_as_trainer(tmp_path, steps=[4])
    assert sorted(os.listdir(tmp_path)) == before


def test_saving_to_a_folder_that_is_gone_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match="^cannot save a checkpoint in .*gone: .*; free some"):
        save_as_trainer(tmp_path / "gone", steps=[4])
