"""Tests of the flags: their constants, their checks, their table, and flags for paths."""

import importlib
import json
import os
import pathlib
import re
import sys
import types

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
        monkeypatch.setitem(sys.modules, module.__name__, module)
        options.register_constants(vars(module))
    options.DEFINE_integer("size", Constant("SIZE"), "A size.", 8, 32)
    options.DEFINE_float("rate", Constant("RATE"), "A rate.")
    return first, second


@pytest.mark.parametrize("edited", [0, 1])
def test_a_flag_follows_its_constant_in_whichever_module_it_is_edited(modules, edited):
    assert FLAGS.size == 24
    modules[edited].SIZE = 20
    assert FLAGS.size == 20
    modules[edited].SIZE = 24
    assert FLAGS.size == 24


def test_if_both_modules_are_edited_the_later_one_wins(modules):
    modules[0].SIZE, modules[1].SIZE = 20, 16
    assert FLAGS.size == 16


def test_a_module_that_differs_when_it_is_registered_was_edited_in_its_file(modules):
    modules[1].SIZE = 20
    options.register_constants(vars(modules[1]))
    assert FLAGS.size == 20
    modules[0].SIZE = 16
    assert FLAGS.size == 20


@pytest.mark.parametrize("reloaded", [0, 1])
def test_a_module_that_is_reloaded_is_registered_anew(modules, monkeypatch, reloaded):
    module = types.ModuleType(modules[reloaded].__name__)
    module.SIZE, module.RATE = 20, 0.25
    monkeypatch.setitem(sys.modules, module.__name__, module)
    options.register_constants(vars(module))
    assert FLAGS.size == 20
    module.SIZE = 16
    assert FLAGS.size == 16


@pytest.mark.parametrize("given", [28, 24])  # 24 is the value of the constant
def test_a_given_flag_wins_over_its_constant(modules, given):
    FLAGS.size = given
    modules[0].SIZE = 20
    assert FLAGS.size == given


@pytest.mark.parametrize("value", [7, 33])
def test_a_refused_assignment_leaves_the_flag_with_its_constant_or_its_value(modules, value):
    with pytest.raises(flags.IllegalFlagValueError, match="--size=.* it must be an integer in"):
        FLAGS.size = value
    assert FLAGS.size == 24
    modules[0].SIZE = 20
    assert FLAGS.size == 20
    FLAGS.size = 28
    with pytest.raises(flags.IllegalFlagValueError):
        FLAGS.size = value
    assert FLAGS.size == 28
    modules[0].SIZE = 16
    assert FLAGS.size == 28


def test_a_refused_assignment_of_several_flags_leaves_all_with_their_constants(modules):
    with pytest.raises(flags.IllegalFlagValueError), flagsaver.flagsaver(rate=0.75, size=7):
        pass
    modules[0].SIZE, modules[0].RATE = 20, 0.25
    assert (FLAGS.size, FLAGS.rate) == (20, 0.25)


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


def test_a_flag_that_is_no_longer_given_follows_its_constant(modules):
    FLAGS.size = 28
    FLAGS["size"].unparse()
    FLAGS["size"].unparse()  # as absl does with all flags, given or not
    modules[0].SIZE = 20
    assert FLAGS.size == 20


@pytest.mark.parametrize("edited", [33, None, "x", 24.5, [24]])
def test_an_edited_constant_is_checked_like_a_given_value(modules, edited):
    modules[1].SIZE = edited
    with pytest.raises(UserError, match="--size=.*: .*; the value comes from the constant SIZE$"):
        options.values()
    FLAGS.size = 28  # a given flag repairs it
    assert options.values()["size"] == 28


def test_a_constant_is_converted_to_the_type_of_its_flag(modules):
    modules[0].RATE = 1
    assert type(FLAGS.rate) is float
    assert options.values()["rate"] == 1.0


def test_a_path_constant_that_is_refused_can_be_repaired_with_the_flag(monkeypatch):
    for edited in ("gs://bucket/x", 5):
        monkeypatch.setattr(sys.modules["cifar10"], "DATA_URL", edited)
        with pytest.raises(UserError, match="--data_url=.*from the constant DATA_URL"):
            options.values()
        with flagsaver.flagsaver():
            FLAGS.data_url = "https://example.org/x"
            assert options.values()["data_url"] == "https://example.org/x"


def test_a_flag_of_another_library_is_not_checked():
    flags.DEFINE_string("token", None, "A token of the user's own program.")
    flags.mark_flag_as_required("token")
    assert "token" not in options.values()


def test_a_module_that_is_unloaded_keeps_its_constants(modules, monkeypatch):
    monkeypatch.delitem(sys.modules, "second_module")
    modules[1].SIZE = 20
    assert FLAGS.size == 20
    namespace = {"__name__": "<run_path>", "SIZE": 24}  # as runpy.run_path runs a module
    options.register_constants(namespace)
    assert FLAGS.size == 20


def test_a_constant_that_no_module_has_is_an_error(modules):
    with pytest.raises(KeyError, match="WIDTH"):
        options.constant("WIDTH")


FOLLOWS = """
    import sys
    from absl import flags
    from support.base import command_line, options

    RATE = 1.0
    options.register_constants(globals())
    options.DEFINE_float("rate", options.Constant("RATE"), "A rate.")

    def main(argv):
        global RATE
        rates = [flags.FLAGS.rate]
        RATE = 2.0
        print([*rates, flags.FLAGS.rate])

    RATE = 1.5  # before flags are parsed
    command_line.run(main)
    """


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], [1.5, 2.0]), (["--rate=1"], [1.0, 1.0]), (["--rate=3"], [3, 3])],
)
def test_a_constant_may_be_edited_before_and_after_flags_are_parsed(
    write_script, arguments, expected
):
    code, output, errors = run_file(write_script(FOLLOWS), *arguments)
    assert (code, errors) == (0, "")
    assert json.loads(output) == expected


def test_the_help_shows_the_constant_as_it_is_edited(write_script):
    assert "A rate. (default: 1.5)" in run_file(write_script(FOLLOWS), "--help")[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("float('inf')", "flag --rate=inf: it must be a number in the range [0.0, 5.0]"),
        ("9.0", "flag --rate=9.0: it must be a number in the range [0.0, 5.0]"),
        ("None", "flag --rate=None: Expect argument to be a string, int, or float"),
    ],
)
def test_a_constant_that_is_edited_to_a_bad_value_in_the_file_gives_a_usage_message(
    write_script, value, message
):
    code = FOLLOWS.replace('"A rate.")', '"A rate.", 0.0, 5.0)').replace("RATE = 1.5 ", "pass  ")
    code, output, errors = run_file(write_script(code.replace("RATE = 1.0", f"RATE = {value}")))
    assert (code, output) == (1, "")
    assert message in errors
    assert "; the value comes from the constant RATE" in errors
    assert "Traceback" not in errors


# --- Definitions that meet in one process.


def test_a_flag_of_the_users_own_script_is_kept_and_is_one_of_the_values():
    flags.DEFINE_string("steps", "many", "Steps.")
    options.DEFINE_integer("steps", 5, "Steps.")
    assert FLAGS.steps == "many"
    assert options.values()["steps"] == "many"


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


def test_a_module_of_the_project_can_be_reloaded(monkeypatch):
    cifar10 = sys.modules["cifar10"]
    monkeypatch.setattr(cifar10, "WEIGHT_DECAY", 0.25)
    assert FLAGS.weight_decay == 0.25
    importlib.reload(cifar10)
    assert FLAGS.weight_decay == 0.004
    FLAGS.weight_decay = 0.5
    importlib.reload(cifar10)
    assert FLAGS.weight_decay == 0.5


FORK = """
    import tensorflow.compat.v1 as tf
    {first}

    FLAGS = tf.app.flags.FLAGS
    tf.app.flags.DEFINE_string("train_dir", "/tmp/fork", "A folder of the fork.")
    tf.app.flags.DEFINE_integer("max_steps", 7, "Steps of the fork.")
    tf.app.flags.DEFINE_boolean("log_device_placement", False, "Devices.")
    tf.app.flags.DEFINE_integer("log_frequency", 5, "Lines.")
    {then}

    def main(argv):
        print(FLAGS.train_dir, FLAGS.max_steps, FLAGS.batch_size, cifar10.NUM_CLASSES)

    if __name__ == "__main__":
        tf.app.run()
    """


@pytest.mark.parametrize(
    ("first", "then"),
    [("import cifar10", ""), ("", "import cifar10"), ("", "import cifar10, cifar10_train")],
)
def test_a_copy_of_the_originals_trainer_defines_its_own_flags(write_script, first, then):
    path = write_script(FORK.format(first=first, then=then))
    code, output, errors = run_file(path, "--max_steps=9", "--batch_size=3")
    assert (code, output) == (0, "/tmp/fork 9 3 10\n"), errors


def test_the_model_and_the_input_define_no_flag_of_the_originals_scripts():
    names = {"train_dir", "max_steps", "log_frequency", "log_device_placement", "num_gpus"}
    names |= {"eval_dir", "eval_data", "checkpoint_dir", "eval_interval_secs", "num_examples"}
    definers = {FLAGS.find_module_defining_flag(name) for name in {*names, "run_once"}}
    assert not definers & {None, "cifar10", "cifar10_input"}


# --- Checks.


@pytest.mark.parametrize("name", ["max_steps", "data_dir", "weight_decay", "batch_size"])
def test_a_flag_with_a_default_needs_a_value(name):
    with pytest.raises(flags.IllegalFlagValueError, match="it needs a value"):
        setattr(FLAGS, name, None)


@pytest.mark.parametrize("name", ["seed", "save_checkpoint_steps", "export_dir", "test_fraction"])
def test_a_flag_without_a_default_can_be_none(name):
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


PATHS = {
    "~": "/home/me",
    "~/data": "/home/me/data",
    "~root": "/root",
    "data/~": "data/~",
    "a~b": "a~b",
    "./~": "./~",
    "/tmp/x[1]*?": "/tmp/x[1]*?",
    "run:1/x": "run:1/x",
    "./gs://bucket": "./gs://bucket",
    "": "",
}
NOT_LOCAL = (
    "gs://bucket/x",
    "S3://bucket/x",
    "hdfs:///x",
    "file:///tmp/x",
    "https://example.org/x",
    "ram://x",
    "gs:/bucket/x",  # from pathlib.Path("gs://bucket/x")
)


@pytest.fixture
def path_flag(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options.DEFINE_path("some_path", "/tmp/default", "A folder.", valid=options._ANYTHING)
    options.DEFINE_path(
        "source", None, "A source.", lambda path: options.tensorflow_path(path, ("http", "file"))
    )


@pytest.mark.usefixtures("path_flag")
@pytest.mark.parametrize("text", PATHS)
def test_a_home_folder_in_a_path_flag_is_expanded_however_the_flag_is_set(text):
    FLAGS.some_path = text
    assert FLAGS.some_path == PATHS[text]
    FLAGS["some_path"].parse(f"{text}/" if text else text)
    assert FLAGS.some_path == (f"{PATHS[text]}/" if text else "")
    FLAGS["some_path"].unparse()
    FLAGS.set_default("some_path", text)
    assert FLAGS.some_path == PATHS[text]


@pytest.mark.usefixtures("path_flag")
def test_a_path_flag_accepts_path_objects_and_none():
    FLAGS.some_path = pathlib.Path("/tmp/x")
    assert FLAGS.some_path == "/tmp/x"
    FLAGS.source = None
    assert FLAGS.source is None


@pytest.mark.usefixtures("path_flag")
@pytest.mark.parametrize("text", NOT_LOCAL)
def test_a_path_flag_refuses_what_is_not_a_local_path_however_it_is_set(text):
    message = re.escape(f"flag --some_path={text}: ") + "only local paths .*; write ./"
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        FLAGS.some_path = text
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        FLAGS["some_path"].parse(text)
    assert FLAGS.some_path == "/tmp/default"


@pytest.mark.usefixtures("path_flag")
def test_a_path_flag_refuses_the_home_folder_of_an_unknown_user():
    with pytest.raises(flags.IllegalFlagValueError, match="no home folder for ~nobody_"):
        FLAGS.some_path = "~nobody_has_this_name/x"


@pytest.mark.usefixtures("path_flag")
def test_a_path_flag_refuses_bytes_that_are_not_utf_8():
    with pytest.raises(flags.IllegalFlagValueError, match="a path in UTF-8") as error:
        FLAGS.some_path = os.fsdecode(b"/tmp/\xff")
    str(error.value).encode("ascii")


@pytest.mark.usefixtures("path_flag")
@pytest.mark.parametrize(
    ("encoding", "path"),
    [
        ("latin-1", "/tmp/k\xe4se"),  # TensorFlow would open its UTF-8
        ("ascii", "/tmp/k\udcc3\udca4se"),
        ("ascii", "/tmp/\u732b"),
    ],
)
def test_a_path_that_tensorflow_would_take_for_another_one_is_refused(monkeypatch, encoding, path):
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode(encoding, "surrogateescape"))
    with pytest.raises(flags.IllegalFlagValueError, match="a locale that uses UTF-8"):
        FLAGS.some_path = path
    options.DEFINE_path("images", None, "Not for TensorFlow.", options.local_path)
    FLAGS.images = path
    assert FLAGS.images == path


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such file names")
@pytest.mark.usefixtures("path_flag")
def test_a_relative_path_below_a_folder_that_is_not_in_utf_8_is_refused(tmp_path, monkeypatch):
    folder = os.path.join(os.fsencode(tmp_path), b"\xff")
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    with pytest.raises(flags.IllegalFlagValueError, match="a path in UTF-8"):
        FLAGS.some_path = "train"


@pytest.mark.usefixtures("path_flag")
def test_a_path_flag_can_accept_urls_with_some_schemes():
    for url in ("http://example.org/~me/x", "file:///tmp/~x", "HTTP://example.org"):
        FLAGS.source = url
        assert FLAGS.source == url
    FLAGS.source = "~/x.tar.gz"
    assert FLAGS.source == "/home/me/x.tar.gz"
    with pytest.raises(flags.IllegalFlagValueError, match="only local paths and http://, file://"):
        FLAGS.source = "gs://bucket/x.tar.gz"


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
        with pytest.raises(flags.IllegalFlagValueError, match="only local paths"):
            setattr(FLAGS, name, "gs://bucket/x")
    for name in names - {"images", "svhn", "cifar10_python", "cifar100", "output"}:
        with pytest.raises(flags.IllegalFlagValueError, match="a path in UTF-8"):
            setattr(FLAGS, name, os.fsdecode(b"/tmp/k\xe4se"))
