"""Tests of finding, reading, checking and restoring checkpoints."""

import json
import math
import os
import threading

import pytest

from support import checkpoints
from support.checkpoints import TrainingSettings
from support.errors import CheckpointError, UserError
from support.tensorflow_v1 import tf

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


def save_with_settings_text(folder, *texts):
    """Saves a checkpoint whose settings are the given strings; returns its path."""
    path = save(folder)
    with tf.Graph().as_default() as graph:
        checkpoints.record_settings(OWN)
        (collection,) = graph.get_all_collection_keys()
        graph.clear_collection(collection)
        for text in texts:
            tf.add_to_collection(collection, text)
        tf.train.export_meta_graph(f"{path}.meta")
    return path


def remove(checkpoint):
    """Deletes the files of a checkpoint, as a trainer does with its older ones."""
    folder, name = os.path.split(checkpoint)
    for file in os.listdir(folder):
        if file.startswith(f"{name}."):
            os.remove(os.path.join(folder, file))


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that TensorFlow's logger receives."""
    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    return warnings


# --- Finding the newest checkpoint.


def test_the_newest_checkpoint_is_the_one_that_the_state_file_names(tmp_path):
    save(tmp_path, 7)
    newest = save(tmp_path, 3)  # by number, step 7 comes later
    assert checkpoints.find_latest_checkpoint(str(tmp_path)) == newest
    assert checkpoints.require_checkpoint(str(tmp_path)) == newest
    assert checkpoints.find_checkpoint_to_resume(str(tmp_path)) == newest


def test_the_newest_checkpoint_is_found_while_a_trainer_saves_and_deletes(tmp_path):
    saver_is_done = threading.Event()

    def save_many():
        with tf.Graph().as_default(), tf.Session() as session:
            tf.get_variable("a", initializer=1.0)
            session.run(tf.global_variables_initializer())
            saver = tf.train.Saver(max_to_keep=1, save_relative_paths=True)
            for step in range(300):
                saver.save(session, str(tmp_path / "model.ckpt"), step, write_meta_graph=False)
        saver_is_done.set()

    thread = threading.Thread(target=save_many)
    thread.start()
    while not (tmp_path / "checkpoint").exists():
        pass
    found = set()
    while not saver_is_done.is_set():
        found.add(checkpoints.find_latest_checkpoint(str(tmp_path)))
    thread.join()
    assert None not in found
    assert len(found) > 10


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_checkpoints_is_an_error_only_if_one_is_required(tmp_path, exists):
    folder = tmp_path / "train"
    if exists:
        folder.mkdir()
    assert checkpoints.find_latest_checkpoint(str(folder)) is None
    assert checkpoints.explain_missing_checkpoint(str(folder)) is None
    assert checkpoints.find_checkpoint_to_resume(str(folder)) is None
    message = f"there is no checkpoint in {folder}; train first, or .* --checkpoint_dir$"
    with pytest.raises(UserError, match=message):
        checkpoints.require_checkpoint(str(folder))
    with pytest.raises(UserError, match=message):
        checkpoints.read_newest_settings(str(folder))


@pytest.mark.parametrize("content", [b"", b"\xff not a checkpoint", b'model_checkpoint_path: "x"'])
def test_an_unusable_state_file_is_not_mistaken_for_a_folder_without_checkpoints(tmp_path, content):
    readable = save(tmp_path)
    (tmp_path / "checkpoint").write_bytes(content)
    assert checkpoints.find_latest_checkpoint(str(tmp_path)) is None
    reason = f"the file `checkpoint` in {tmp_path} is unreadable or names a missing checkpoint"
    with pytest.raises(UserError, match=f"^{reason}; run cifar10_train.py on this folder; it "):
        checkpoints.require_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match=f"^{reason}; remove that file to resume from {readable},"):
        checkpoints.find_checkpoint_to_resume(str(tmp_path))
    assert (tmp_path / "checkpoint").read_bytes() == content


def test_resuming_names_a_first_checkpoint_that_no_state_file_names_yet(tmp_path):
    folder = tmp_path / "before"
    folder.mkdir()
    readable = save(folder)
    (folder / "checkpoint").unlink()
    (folder / "model.ckpt-7.index").write_bytes(b"")  # a save that was killed
    assert checkpoints.find_checkpoint_to_resume(str(folder)) == readable
    assert checkpoints.find_latest_checkpoint(str(folder)) == readable
    moved = folder.rename(tmp_path / "after")
    assert checkpoints.find_latest_checkpoint(str(moved)) == str(moved / "model.ckpt-3")


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


def test_a_folder_whose_name_is_a_pattern_is_not_mistaken_for_one_without_checkpoints(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    save(folder)
    # TensorFlow takes the path for a pattern, so it cannot read what it wrote.
    with pytest.raises(UserError, match="none of the checkpoints in .* can be read"):
        checkpoints.find_checkpoint_to_resume(str(folder))


def test_the_newest_readable_checkpoint_is_found_by_its_step(tmp_path):
    assert checkpoints.find_readable(str(tmp_path)) is None
    for step in (3, 20, 100):
        save(tmp_path, step)
    assert checkpoints.find_readable(str(tmp_path)).endswith("ckpt-100")
    (tmp_path / "model.ckpt-100.data-00000-of-00001").write_bytes(b"")
    assert checkpoints.find_readable(str(tmp_path)).endswith("ckpt-20")


def test_the_global_step_of_a_checkpoint_is_read(tmp_path):
    assert checkpoints.read_global_step(save(tmp_path, 12)) == 12


@pytest.mark.parametrize("name", ["model.ckpt-3.data-00000-of-00001", "model.ckpt-3.index"])
def test_a_damaged_checkpoint_is_a_one_line_error_that_names_it(tmp_path, name):
    path = save(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"^{path} cannot be read: ") as caught:
        checkpoints.read_global_step(path)
    assert "\n" not in str(caught.value)


# --- What a checkpoint was trained on.


def test_settings_are_read_as_they_were_recorded(tmp_path):
    assert checkpoints.read_settings(save(tmp_path, settings=OWN)) == OWN


def test_settings_survive_formatting_and_parsing():
    assert checkpoints.parse_settings(checkpoints.format_settings(OWN)) == OWN


def test_a_checkpoint_without_settings_is_treated_as_one_of_the_original_tutorial(tmp_path):
    assert checkpoints.read_settings(save(tmp_path)) == (None, None, 24, "full", True, None, 0)


def test_settings_that_were_saved_before_the_images_were_counted_can_be_read():
    fields = ("class_names", "examples_per_epoch", "crop_size", "top_layers", "random_flip")
    text = json.dumps({name: getattr(OWN, name) for name in fields})
    settings = checkpoints.parse_settings(text)
    assert settings == OWN
    assert settings.examples_seen(7) is None


def test_settings_give_the_number_of_images_seen_at_a_step():
    assert OWN._replace(examples_per_step=64).examples_seen(61) == 3904
    assert OWN._replace(examples_per_step=64, examples_offset=-4).examples_seen(61) == 3900


def test_recorded_settings_add_no_variables_to_a_checkpoint(tmp_path):
    assert dict(tf.train.list_variables(save(tmp_path, settings=OWN))) == {
        "global_step": [],
        "x": [],
    }


def test_a_missing_meta_file_causes_one_warning_and_leaves_the_settings_unknown(tmp_path, warnings):
    path = save(tmp_path, settings=OWN)
    (tmp_path / "model.ckpt-3.meta").unlink()
    for _ in range(2):
        assert checkpoints.read_settings(path) is None
    assert warnings == [
        f"{path}.meta is missing: what this checkpoint was trained on is not checked."
    ]


def test_a_deleted_checkpoint_has_unknown_settings_without_a_warning(tmp_path, warnings):
    path = save(tmp_path)
    remove(path)
    assert checkpoints.read_settings(path) is None
    assert warnings == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"class_names": None}),
        json.dumps({"class_names": "cat"}),
        json.dumps({"class_names": []}),
        json.dumps({"class_names": [1, 2]}),
        json.dumps(OWN._asdict() | {"class_names": ["cat", 2]}),
        json.dumps(OWN._asdict() | {"class_names": []}),
        json.dumps(OWN._asdict() | {"crop_size": "24"}),
        json.dumps(OWN._asdict() | {"top_layers": 5}),
        json.dumps(OWN._asdict() | {"random_flip": 1}),
        json.dumps(OWN._asdict() | {"examples_per_epoch": None}),
        json.dumps(OWN._asdict() | {"another": 1}),
    ],
)
def test_invalid_settings_are_refused(tmp_path, text):
    path = save_with_settings_text(tmp_path, text)
    with pytest.raises(CheckpointError, match="ckpt-3.meta cannot be read .*; move it away to use"):
        checkpoints.read_settings(path)
    with pytest.raises((ValueError, TypeError)):
        checkpoints.parse_settings(text)


def test_two_sets_of_settings_in_a_checkpoint_are_refused(tmp_path):
    path = save_with_settings_text(tmp_path, *[checkpoints.format_settings(OWN)] * 2)
    with pytest.raises(CheckpointError, match="ckpt-3.meta cannot be read"):
        checkpoints.read_settings(path)


def test_a_damaged_meta_file_is_refused(tmp_path):
    path = save(tmp_path)
    meta = tmp_path / "model.ckpt-3.meta"
    for content in (b"", b"\xff" * 99, meta.read_bytes()[:-7]):
        meta.write_bytes(content)
        with pytest.raises(CheckpointError, match="ckpt-3.meta cannot be read"):
            checkpoints.read_settings(path)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (OWN, None),
        (None, None),
        (OWN._replace(examples_per_epoch=7, random_flip=True), None),
        (OWN._replace(class_names=None), None),
        (
            OWN._replace(class_names=("hot dog", "cat")),
            ("2 classes (hot dog, cat)", "2 classes (cat, hot dog)"),
        ),
        (
            OWN._replace(class_names=tuple("abcdefghijklmnop")),
            ("16 classes (a, b, c, d, e, f, g, h, i, j, k, l, ...)", "2 classes (cat, hot dog)"),
        ),
        (OWN._replace(top_layers="full"), ("--top_layers=full", "--top_layers=local")),
        (OWN._replace(crop_size=24), ("--crop_size=24", "--crop_size=32")),
    ],
)
def test_a_mismatch_is_described_with_both_values(trained, expected):
    assert checkpoints.find_mismatch(trained, OWN) == expected


def test_the_explanation_of_a_mismatch_names_the_checkpoint_and_the_cure():
    def explain(trained):
        return checkpoints.explain_mismatch("model.ckpt-3", trained, OWN, "--train_dir")

    assert explain(OWN) == explain(None) == ""
    assert explain(OWN._replace(crop_size=24)) == (
        "model.ckpt-3 was trained with --crop_size=24, not with --crop_size=32; use "
        "--crop_size=24, or choose another folder with --train_dir"
    )
    assert explain(OWN._replace(class_names=("dog", "cat", "cow"))) == (
        "model.ckpt-3 was trained with 3 classes (dog, cat, cow), not with 2 classes (cat, hot "
        "dog); use the dataset that it was trained on, or choose another folder with --train_dir"
    )


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (None, []),
        (OWN, []),
        (OWN._replace(examples_per_epoch=None), []),
        (OWN._replace(examples_per_epoch=7), ["an epoch now has 123 images instead of 7"]),
        (OWN._replace(random_flip=True), ["--random_flip is now false instead of true"]),
    ],
)
def test_settings_that_may_change_are_listed_with_both_values(trained, expected):
    assert checkpoints.find_changes(trained, OWN) == expected


def test_settings_that_do_not_match_are_a_checkpoint_error(tmp_path):
    path = save(tmp_path, settings=OWN)
    checkpoints.check_settings(path, OWN)
    with pytest.raises(CheckpointError, match="--crop_size=32, not .*=24; .* --checkpoint_dir$"):
        checkpoints.check_settings(path, OWN._replace(crop_size=24))


def test_the_settings_of_the_newest_checkpoint_are_read(tmp_path):
    save(tmp_path, 3, settings=OWN)
    save(tmp_path, 4, settings=OWN._replace(crop_size=24))
    assert checkpoints.read_newest_settings(str(tmp_path)).crop_size == 24
    (tmp_path / "model.ckpt-4.meta").unlink()
    assert checkpoints.read_newest_settings(str(tmp_path)) is None


def test_a_trainer_that_deletes_a_checkpoint_does_not_hide_the_settings_of_the_next(
    tmp_path, monkeypatch
):
    save(tmp_path, 3)
    read_settings = checkpoints.read_settings

    def read_after_the_trainer_moved_on(checkpoint):
        if checkpoint.endswith("-3"):
            save(tmp_path, 4, settings=OWN)
            remove(checkpoint)
        return read_settings(checkpoint)

    monkeypatch.setattr(checkpoints, "read_settings", read_after_the_trainer_moved_on)
    assert checkpoints.read_newest_settings(str(tmp_path)) == OWN


# --- Variables.


def test_a_checkpoint_with_all_variables_matches_whatever_else_it_holds(tmp_path, graph):
    path = save(tmp_path, same=[1.0], another=2.0)
    checkpoints.check_variables(path, {"same": tf.get_variable("mine", [1])})


def test_variables_that_are_missing_or_differ_in_shape_are_named(tmp_path, graph):
    path = save(tmp_path, wide=[1.0, 2.0])
    variables = {"wide": tf.get_variable("a", [3]), "deep": tf.get_variable("b", [1])}
    with pytest.raises(
        CheckpointError,
        match=rf"^{path} belongs to another model: in it, wide is \[2\], not \[3\], deep is "
        "missing; choose another folder with --train_dir$",
    ):
        checkpoints.check_variables(path, variables, "--train_dir")


def test_no_more_than_five_variables_are_named(tmp_path, graph):
    variables = {name: tf.get_variable(name, []) for name in "abcdefg"}
    with pytest.raises(CheckpointError, match="e is missing, and 2 more differ; .*checkpoint_dir$"):
        checkpoints.check_variables(save(tmp_path), variables)


def test_the_variables_of_a_damaged_checkpoint_are_a_one_line_error(tmp_path):
    path = save(tmp_path)
    (tmp_path / "model.ckpt-3.index").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"^{path} cannot be read: ") as caught:
        checkpoints.check_variables(path, {})
    assert "\n" not in str(caught.value)


def restore(folder, wanted=OWN):
    """Restores the newest checkpoint into a variable `x`; returns what it returns, and `x`."""
    with tf.Graph().as_default(), tf.Session() as session:
        variable = tf.get_variable("x", [])
        variables = {"x": variable}
        saver = tf.train.Saver(variables)
        found = checkpoints.restore_newest(session, saver, variables, str(folder), wanted)
        return *found, session.run(variable)


def test_the_newest_checkpoint_is_restored(tmp_path):
    save(tmp_path, 3, OWN, x=3.5)
    newest = save(tmp_path, 4, OWN, x=4.5)
    assert restore(tmp_path) == (newest, 4, 4.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_checkpoint_that_is_not_finite_is_not_restored(tmp_path, value):
    path = save(tmp_path, 3, OWN, x=value)
    with pytest.raises(CheckpointError, match=f"^{path} has non-finite values in x$"):
        restore(tmp_path)


def test_a_checkpoint_without_its_data_is_a_one_line_error(tmp_path):
    path = save(tmp_path, 3, OWN)
    (tmp_path / "model.ckpt-3.data-00000-of-00001").unlink()
    with pytest.raises(CheckpointError, match=f"^{path} cannot be ") as caught:
        restore(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_dataset_or_model_is_not_restored(tmp_path):
    save(tmp_path, 3, OWN)
    with pytest.raises(CheckpointError, match="was trained with --top_layers=local, not with"):
        restore(tmp_path, OWN._replace(top_layers="full"))
    save(tmp_path, 4, OWN, y=1.0)
    with pytest.raises(CheckpointError, match="belongs to another model: in it, x is missing;"):
        restore(tmp_path)


@pytest.mark.parametrize("moment", ["check_settings", "check_variables", "restore"])
def test_the_next_checkpoint_is_restored_if_a_trainer_deletes_one_meanwhile(
    tmp_path, monkeypatch, moment
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
