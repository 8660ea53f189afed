"""What is written with a checkpoint, and what is said where it does not fit."""

import json

import pytest

import cifar10_settings
from cifar10_runtime import UserError, tf
from cifar10_settings import Settings

OWN = Settings(("cat", "hot dog"), 123, 32, "local", False)


def save(folder, *notes):
    """Saves a checkpoint with strings in the collection; returns its path."""
    with tf.Graph().as_default(), tf.Session() as session:
        for note in notes:
            tf.add_to_collection(cifar10_settings.COLLECTION, note)
        variable = tf.get_variable("x", initializer=1.0)
        session.run(variable.initializer)
        return tf.train.Saver().save(session, str(folder / "model.ckpt"), 3)


def test_settings_are_read_as_they_were_noted(tmp_path):
    with tf.Graph().as_default():
        cifar10_settings.note_settings(OWN)
        notes = tf.get_collection(cifar10_settings.COLLECTION)
    assert cifar10_settings.read_settings(save(tmp_path, *notes)) == OWN


def test_a_checkpoint_that_does_not_tell_is_taken_for_the_tutorials(tmp_path):
    assert cifar10_settings.read_settings(save(tmp_path)) == (None, None, 24, "full", True)


def test_without_its_meta_file_nothing_is_known_of_a_checkpoint_which_is_told(
    tmp_path, monkeypatch
):
    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    path = save(tmp_path)
    (tmp_path / "model.ckpt-3.meta").unlink()
    for _ in range(2):
        assert cifar10_settings.read_settings(path) is None
    assert warnings == [
        f"{path}.meta is missing: what this checkpoint was trained for is not known, and not "
        "checked."
    ]
    assert cifar10_settings.read_settings(path.replace("-3", "-4")) is None  # all of it is gone
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "note",
    [
        "{",
        "[]",
        json.dumps({"class_names": None}),
        json.dumps({"class_names": "cat"}),
        json.dumps({"class_names": []}),
        json.dumps({"class_names": [1, 2]}),
        json.dumps(OWN._asdict() | {"crop_size": "24"}),
        json.dumps(OWN._asdict() | {"top_layers": 5}),
        json.dumps(OWN._asdict() | {"random_flip": 1}),
        json.dumps(OWN._asdict() | {"examples_per_epoch": None}),
        json.dumps(OWN._asdict() | {"another": 1}),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, note):
    path = save(tmp_path, note)
    with pytest.raises(UserError, match="ckpt-3.meta cannot be read .*: to do without, move it"):
        cifar10_settings.read_settings(path)


def test_a_damaged_meta_file_is_refused(tmp_path):
    path = save(tmp_path)
    for content in (b"", b"\xff" * 99, (tmp_path / "model.ckpt-3.meta").read_bytes()[:-7]):
        (tmp_path / "model.ckpt-3.meta").write_bytes(content)
        with pytest.raises(UserError, match="ckpt-3.meta cannot be read"):
            cifar10_settings.read_settings(path)


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
def test_a_misfit_is_told_with_both_values(trained, expected):
    assert cifar10_settings.find_misfit(trained, OWN) == expected


def test_the_explanation_of_a_misfit_names_the_checkpoint_and_the_cure():
    def explain(trained):
        return cifar10_settings.explain_misfit("model.ckpt-3", trained, OWN, "--train_dir")

    assert explain(OWN) == explain(None) == ""
    assert explain(OWN._replace(crop_size=24)) == (
        "model.ckpt-3 has been trained with --crop_size=24, not with --crop_size=32; give "
        "--crop_size=24, or another folder with --train_dir"
    )
    assert explain(OWN._replace(class_names=("dog", "cat", "cow"))) == (
        "model.ckpt-3 has been trained with 3 classes (dog, cat, cow), not with 2 classes (cat, "
        "hot dog); name the data set that belongs to it, or another folder with --train_dir"
    )


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (None, []),
        (OWN, []),
        (OWN._replace(examples_per_epoch=None), []),
        (OWN._replace(examples_per_epoch=7), ["an epoch has 123 images now, and had 7"]),
        (OWN._replace(random_flip=True), ["--random_flip is false now, and was true"]),
    ],
)
def test_what_may_change_is_told(trained, expected):
    assert cifar10_settings.find_changes(trained, OWN) == expected
