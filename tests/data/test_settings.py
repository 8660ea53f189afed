"""Tests of the settings that accompany each checkpoint: their text, and how they are compared."""

import json

import pytest

from support.data.settings import (
    TrainingSettings,
    find_changes,
    find_mismatch,
    format_settings,
    parse_settings,
)

OWN = TrainingSettings(("cat", "hot dog"), 123, 32, "local", False)


def test_class_names_that_differ_in_their_unicode_form_only_are_the_same():
    text = format_settings(OWN._replace(class_names=("Ka\u0308se", "dog")))
    assert parse_settings(text).class_names == ("K\xe4se", "dog")


def test_settings_that_were_saved_before_the_images_were_counted_can_be_read():
    fields = ("class_names", "examples_per_epoch", "crop_size", "top_layers", "random_flip")
    text = json.dumps({name: getattr(OWN, name) for name in fields})
    settings = parse_settings(text)
    assert settings == OWN
    assert settings.images_seen(7) is None


@pytest.mark.parametrize("text", ["{", '{"another": 1}', '{"class_names": null}'])
def test_invalid_settings_are_refused(text):
    with pytest.raises((ValueError, TypeError)):
        parse_settings(text)


@pytest.mark.parametrize("name", ["examples_per_epoch", "crop_size", "examples_per_step"])
@pytest.mark.parametrize("value", [0, 2**31 + 1, 8.0, True])
def test_counts_that_no_training_writes_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        parse_settings(format_settings(OWN._replace(**{name: value})))


@pytest.mark.parametrize("offset", [2**53 + 1, -(2**53) - 1])
def test_an_offset_that_no_training_writes_is_refused(offset):
    with pytest.raises(ValueError, match=f"^examples_offset is {offset}$"):
        parse_settings(format_settings(OWN._replace(examples_offset=offset)))


def test_a_number_of_images_that_no_run_has_seen_is_unknown():
    settings = OWN._replace(examples_per_step=2, examples_offset=-6)
    images = [settings.images_seen(step) for step in (2, 3, 2**52 + 3, 2**52 + 4)]
    assert images == [None, 0, 2**53, None]


def test_the_keys_in_checkpoints_do_not_change():
    settings = OWN._replace(examples_per_step=64, examples_offset=-4)
    text = format_settings(settings)
    assert json.loads(text) == {
        "class_names": ["cat", "hot dog"],
        "examples_per_epoch": 123,
        "crop_size": 32,
        "top_layers": "local",
        "random_flip": False,
        "examples_per_step": 64,
        "examples_offset": -4,
    }
    assert parse_settings(text) == settings
    assert settings.images_seen(61) == 3900


@pytest.mark.parametrize(
    ("changed", "mismatch", "changes"),
    [
        ({}, None, []),
        (None, None, []),  # a checkpoint without settings
        ({"class_names": None, "examples_per_epoch": None}, None, []),
        (
            {"class_names": ("hot dog", "cat")},
            ("2 classes (hot dog, cat)", "2 classes (cat, hot dog)"),
            [],
        ),
        ({"top_layers": "full"}, ("--top_layers=full", "--top_layers=local"), []),
        ({"crop_size": 24}, ("--crop_size=24", "--crop_size=32"), []),
        ({"examples_per_epoch": 7}, None, ["an epoch now has 123 images instead of 7"]),
        ({"random_flip": True}, None, ["--random_flip is now false instead of true"]),
    ],
)
def test_other_settings_are_described_with_both_values(changed, mismatch, changes):
    trained = None if changed is None else OWN._replace(**changed)
    assert find_mismatch(trained, OWN) == mismatch
    assert find_changes(trained, OWN) == changes
