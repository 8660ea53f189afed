"""Tests of the flags: their constants, their checks, their table, and flags for paths."""

import os
import pathlib
import sys
import types

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import run_file

import cifar10_convert  # noqa: F401, for its flags
import cifar10_eval  # noqa: F401
import cifar10_multi_gpu_train  # noqa: F401
import cifar10_predict  # noqa: F401
import cifar10_train  # noqa: F401
from support.base import options
from support.base.errors import UserError
from support.base.options import FLAGS, Constant

# --- Flags that follow constants.


@pytest.fixture
def modules(monkeypatch):
    """Two registered modules; the second one repeats the constant SIZE of the first one."""
    first, second = types.ModuleType("first_module"), types.ModuleType("second_module")
    first.SIZE, first.RATE, second.SIZE = 24, 0.5, 24
    monkeypatch.setattr(options, "_registered", dict(options._registered))
    for module in (first, second):
        options.register_constants(vars(module))
    options.DEFINE_integer("size", Constant("SIZE"), "A size.", 8, 32)
    options.DEFINE_float("rate", Constant("RATE"), "A rate.", "[0, 5]")
    return first, second


@pytest.mark.parametrize("edited", [0, 1])
def test_a_flag_follows_its_constant_in_whichever_module_it_is_edited(modules, edited):
    assert FLAGS.size == 24
    modules[edited].SIZE = 20
    assert FLAGS.size == 20
    modules[edited].SIZE = 24
    assert FLAGS.size == 24


def test_a_module_that_differs_when_it_is_registered_was_edited_in_its_file(modules):
    modules[1].SIZE = 20
    options.register_constants(vars(modules[1]))
    modules[0].SIZE = 16
    assert FLAGS.size == 20


@pytest.mark.parametrize("given", [28, 24])  # 24 is the value of the constant
def test_a_given_flag_wins_over_its_constant(modules, given):
    FLAGS.size = given
    modules[0].SIZE = 20
    assert FLAGS.size == given


def test_a_refused_assignment_leaves_the_flag_with_its_constant_or_its_value(modules):
    with pytest.raises(flags.IllegalFlagValueError, match="--size=33: 33 is not an integer in"):
        FLAGS.size = 33
    assert FLAGS.size == 24
    modules[0].SIZE = 20
    assert FLAGS.size == 20
    FLAGS.size = 28
    with pytest.raises(flags.IllegalFlagValueError):
        FLAGS.size = 33
    assert FLAGS.size == 28
    modules[0].SIZE = 16
    assert FLAGS.size == 28


def test_a_flag_takes_scalars_of_numpy(modules):
    FLAGS.size = np.int64(16)
    assert FLAGS.size == 16
    assert isinstance(FLAGS.size, int)


def test_a_saved_flag_follows_its_constant_again_when_it_is_restored(modules):
    with flagsaver.flagsaver(size=28):
        assert FLAGS.size == 28
        FLAGS.size = 16
    modules[0].SIZE = 20
    assert FLAGS.size == 20
    with flagsaver.flagsaver():
        FLAGS["size"].parse("12")
        assert FLAGS.size == 12
    assert FLAGS.size == 20


def test_a_new_default_replaces_the_constant_but_not_a_given_value(modules):
    with pytest.raises(flags.IllegalFlagValueError):
        FLAGS.set_default("size", 33)
    modules[0].SIZE = 20
    assert FLAGS.size == 20
    FLAGS.set_default("size", 28)
    assert FLAGS.size == 28
    FLAGS.size = 16
    FLAGS.set_default("size", 12)
    assert FLAGS.size == 16


@pytest.mark.parametrize("edited", [33, None, 24.5])
def test_an_edited_constant_is_checked_like_a_given_value(modules, edited):
    modules[1].SIZE = edited
    with pytest.raises(UserError, match="--size=.*: .*; the value comes from the constant SIZE$"):
        options.values()
    FLAGS.size = 28  # a given flag repairs it
    assert options.values()["size"] == 28


FOLLOWS = """
    import sys
    from absl import flags
    from support.base import command_line, options

    RATE = 1.0
    options.register_constants(globals())
    options.DEFINE_float("rate", options.Constant("RATE"), "A rate.", "[0, 5]")

    def main(argv):
        global RATE
        rates = [flags.FLAGS.rate]
        RATE = 2.0
        print([*rates, flags.FLAGS.rate])

    RATE = 1.5  # before flags are parsed
    command_line.run(main)
    """


def test_a_constant_may_be_edited_before_and_after_flags_are_parsed(write_script):
    path = write_script(FOLLOWS)
    assert run_file(path) == (0, "[1.5, 2.0]\n", "")
    assert run_file(path, "--rate=1") == (0, "[1.0, 1.0]\n", "")
    assert "A rate. (default: 1.5)" in run_file(path, "--help")[1]


def test_a_constant_that_is_edited_to_a_bad_value_in_the_file_gives_a_usage_message(write_script):
    code = FOLLOWS.replace("RATE = 1.5 ", "pass  ")
    code, output, errors = run_file(write_script(code.replace("RATE = 1.0", "RATE = 9.0")))
    assert (code, output) == (1, "")
    assert errors.splitlines()[0] == (
        "script.py: error: flag --rate=9.0: it must be in the interval [0, 5]; the value comes "
        "from the constant RATE"
    )


# --- Definitions that meet in one process.


def test_a_flag_that_exists_keeps_its_value_unless_its_default_is_edited():
    options.DEFINE_integer("steps", 5, "Steps.")
    options.DEFINE_integer("steps", 6, "Steps.")
    assert FLAGS.steps == 6
    FLAGS.set_default("steps", 7)  # as a notebook may do
    options.DEFINE_integer("steps", 6, "Steps.")
    assert FLAGS.steps == 7
    FLAGS.steps = 8
    options.DEFINE_integer("steps", 9, "Steps.")
    assert FLAGS.steps == 8


FORK = """
    import tensorflow.compat.v1 as tf

    FLAGS = tf.app.flags.FLAGS
    tf.app.flags.DEFINE_string("train_dir", "/tmp/fork", "A folder of the fork.")
    tf.app.flags.DEFINE_integer("max_steps", 7, "Steps of the fork.")
    tf.app.flags.DEFINE_boolean("log_device_placement", False, "Devices.")
    tf.app.flags.DEFINE_integer("log_frequency", 5, "Lines.")
    import cifar10, cifar10_train  # after these definitions

    def main(argv):
        print(FLAGS.train_dir, FLAGS.max_steps, FLAGS.batch_size, cifar10.NUM_CLASSES)

    if __name__ == "__main__":
        tf.app.run()
    """


def test_a_copy_of_the_originals_trainer_defines_its_own_flags(write_script):
    code, output, errors = run_file(write_script(FORK), "--max_steps=9", "--batch_size=3")
    assert (code, output) == (0, "/tmp/fork 9 3 10\n"), errors


def test_the_model_and_the_input_define_no_flag_of_the_originals_scripts():
    names = {"train_dir", "max_steps", "log_frequency", "log_device_placement", "num_gpus"}
    names |= {"eval_dir", "eval_data", "checkpoint_dir", "eval_interval_secs", "num_examples"}
    definers = {FLAGS.find_module_defining_flag(name) for name in {*names, "run_once"}}
    assert not definers & {None, "cifar10", "cifar10_input"}


# --- Checks.


def test_only_a_flag_without_a_default_can_be_none():
    for name in ("max_steps", "data_dir", "weight_decay"):
        with pytest.raises(flags.IllegalFlagValueError, match="it needs a value"):
            setattr(FLAGS, name, None)
    for name in ("seed", "export_dir"):
        setattr(FLAGS, name, None)
        assert options.values()[name] is None


def test_the_contrast_factors_are_checked_together(monkeypatch):
    cifar10_input = sys.modules["cifar10_input"]
    with pytest.raises(flags.IllegalFlagValueError, match="must not exceed the maximum"):
        FLAGS.min_contrast_factor = 2.0
    monkeypatch.setattr(cifar10_input, "MIN_CONTRAST_FACTOR", 0.5)
    assert FLAGS.min_contrast_factor == 0.5  # the flag still follows its constant
    monkeypatch.setattr(cifar10_input, "MIN_CONTRAST_FACTOR", 2.0)
    with pytest.raises(UserError, match="must not exceed the maximum"):
        options.values()


# --- Paths.


@pytest.fixture
def path_flag(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options.DEFINE_path("some_path", "/tmp/default", "A folder.")


@pytest.mark.usefixtures("path_flag")
@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/data", "/home/me/data"),
        ("~root", "/root"),
        ("/tmp/x[1]*?", "/tmp/x[1]*?"),
        ("run:1/x", "run:1/x"),
        ("./gs://bucket", "./gs://bucket"),
    ],
)
def test_a_home_folder_in_a_path_flag_is_expanded_however_the_flag_is_set(text, path):
    FLAGS.some_path = text
    assert FLAGS.some_path == path
    FLAGS["some_path"].parse(f"{text}/")
    assert FLAGS.some_path == f"{path}/"
    FLAGS["some_path"].unparse()
    FLAGS.set_default("some_path", text)
    assert FLAGS.some_path == path


GS = r"gs:// is not supported; write \./gs:/+bucket/x if it is a local path$"


@pytest.mark.usefixtures("path_flag")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "it must name a file or a folder"),
        ("gs://bucket/x", GS),
        (pathlib.Path("gs://bucket/x"), GS),
        ("file:///tmp/x", "file:// is not supported"),
        ("~nobody_has_this_name/x", "there is no home folder for ~nobody_has_this_name; "),
        (os.fsdecode(b"/tmp/\xff"), "a path in UTF-8"),
    ],
)
def test_a_path_flag_refuses_what_is_not_a_local_path_in_utf_8(path, message):
    with pytest.raises(flags.IllegalFlagValueError, match=f"^flag --some_path=.*{message}"):
        FLAGS.some_path = path
    assert FLAGS.some_path == "/tmp/default"


@pytest.mark.usefixtures("path_flag")
def test_a_path_that_tensorflow_would_take_for_another_one_is_refused(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("latin-1"))
    with pytest.raises(flags.IllegalFlagValueError, match="a locale that uses UTF-8"):
        FLAGS.some_path = "/tmp/k\xe4se"  # TensorFlow would open its UTF-8
    FLAGS.images = "/tmp/k\xe4se"  # not for TensorFlow


def test_the_archive_may_be_a_url_of_some_schemes_or_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for url in ("http://example.org/~me/x", "file:///tmp/~x", "HTTPS://example.org"):
        FLAGS.data_url = url
        assert FLAGS.data_url == url
    FLAGS.data_url = "~/x.tar.gz"
    assert FLAGS.data_url == "/home/me/x.tar.gz"
    with pytest.raises(flags.IllegalFlagValueError, match="gs:// is not supported"):
        FLAGS.data_url = "gs://bucket/x.tar.gz"


@pytest.mark.parametrize("name", ["train_dir", "checkpoint_dir", "eval_dir"])
@pytest.mark.parametrize("path", ["/tmp/run[1]", "run*", "~/a?", "/tmp/a\\b"])
def test_a_folder_that_tensorflow_would_take_for_a_pattern_is_refused(name, path):
    with pytest.raises(flags.IllegalFlagValueError, match="rename the folder; its checkpoints"):
        setattr(FLAGS, name, path)
    FLAGS.data_dir = path  # TensorFlow looks for no checkpoints there


def test_every_flag_for_a_path_expands_home_folders_and_refuses_other_file_systems(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    texts = {
        name
        for name in FLAGS
        if isinstance(FLAGS[name], options.Flag) and FLAGS[name].flag_type() == "string"
    }
    names = texts - {"top_layers", "eval_data", "cifar100_labels"}
    assert names >= {"data_dir", "train_dir", "eval_dir", "checkpoint_dir", "export_dir", "output"}
    for name in names:
        setattr(FLAGS, name, "~/x")
        assert getattr(FLAGS, name) == "/home/me/x"
        with pytest.raises(flags.IllegalFlagValueError, match="gs:// is not supported"):
            setattr(FLAGS, name, "gs://bucket/x")
    for name in names - {"images", "svhn", "cifar10_python", "cifar100", "output"}:
        with pytest.raises(flags.IllegalFlagValueError, match="a path in UTF-8"):
            setattr(FLAGS, name, os.fsdecode(b"/tmp/k\xe4se"))
