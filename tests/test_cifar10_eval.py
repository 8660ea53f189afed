"""Evaluation against a recount in NumPy, and how it deals with checkpoints."""

import itertools
import json
import os
import pathlib
import shutil
import threading
import time
import types

import numpy as np
import numpy_model
import pytest
from conftest import (
    AVERAGED,
    RAW,
    draw_patches,
    save_checkpoint,
    standardized_centers,
    write_data_set,
)

import cifar10
import cifar10_data
import cifar10_eval
from cifar10_data import DataError
from cifar10_restore import CheckpointError
from cifar10_runtime import UserError, session_config, tf
from cifar10_settings import Settings

FLAGS = cifar10_eval.FLAGS


def correct_predictions(records, seed):
    """Returns for each record whether NumPy's model predicts its label."""
    return all_logits(records, seed).argmax(axis=1) == records[:, 0]


@pytest.fixture
def records(tmp_path):
    """A small data set and folders that the flags name; returns its training and test records."""
    FLAGS.data_dir = str(tmp_path)
    FLAGS.checkpoint_dir = str(tmp_path / "train")
    FLAGS.eval_dir = str(tmp_path / "eval")
    FLAGS.run_once = True
    folder = tmp_path / cifar10_data.EXTRACTED_FOLDER
    data_set = write_data_set(folder, train_counts=(20, 1, 30, 8, 5), test_count=131)
    generator = np.random.default_rng(13)
    for records in data_set:
        draw_patches(records, generator)
    train, test = data_set
    starts = (0, 20, 21, 51, 59, 64)
    for number, (start, end) in enumerate(itertools.pairwise(starts), start=1):
        train[start:end].tofile(folder / f"data_batch_{number}.bin")
    test.tofile(folder / "test_batch.bin")
    return data_set


def printed_precision(capsys):
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    now, value = lines[0].split(": precision @ 1 = ")
    assert len(now) == len("2015-11-06 08:30:44.391206")
    return value


def recorded(eval_dir):
    """Returns the (step, precision) pairs in the event files of a folder, and all tags."""
    pairs, tags = [], set()
    for path in sorted(pathlib.Path(eval_dir).glob("events.out.tfevents.*")):
        for event in tf.train.summary_iterator(str(path)):
            for value in event.summary.value:
                tags.add(value.tag)
                if value.tag == "precision @ 1":
                    pairs.append((event.step, value.simple_value))
    return pairs, tags


def test_flags_have_the_tutorials_defaults():
    assert FLAGS.eval_dir == "/tmp/cifar10_eval"
    assert FLAGS.eval_data == "test"
    assert FLAGS.checkpoint_dir == "/tmp/cifar10_train"
    assert FLAGS.eval_interval_secs == 300
    assert FLAGS.num_examples == 10000
    assert FLAGS.run_once is False
    assert FLAGS.use_moving_averages is True


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_precision_is_that_of_a_recount_in_numpy(records, capsys, batch_size):
    _, test = records
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.batch_size = batch_size
    cifar10_eval.evaluate()
    expected = correct_predictions(test, AVERAGED).mean()
    assert 0.05 < expected < 0.95
    assert printed_precision(capsys) == f"{expected:.3f}"
    pairs, tags = recorded(FLAGS.eval_dir)
    assert pairs == [(7, pytest.approx(expected, rel=1e-6))]
    assert "activations/conv1" in tags


def all_logits(records, seed):
    return numpy_model.inference(standardized_centers(records), numpy_model.random_variables(seed))


@pytest.mark.parametrize("batch_size", [7, 128])
def test_results_are_those_of_a_recount_in_numpy(records, batch_size):
    _, test = records
    checkpoint = save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.batch_size = batch_size
    FLAGS.num_examples = 100
    cifar10_eval.evaluate()
    cifar10_eval.evaluate()
    lines = (pathlib.Path(FLAGS.eval_dir) / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2
    result = json.loads(lines[0])
    labels = test[:100, 0].astype(int)
    logits = all_logits(test[:100], AVERAGED)
    predictions = logits.argmax(axis=1)
    confusion = np.zeros([10, 10], int)
    for label, prediction in zip(labels, predictions, strict=True):
        confusion[label, prediction] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert abs(result.pop("time") - time.time()) < 60
    assert result.pop("cross_entropy") == pytest.approx(
        -np.log(probabilities[np.arange(100), labels]).mean(), rel=1e-4
    )
    assert result.pop("precision_of_class") == pytest.approx(
        {
            name: (predictions[labels == label] == label).mean()
            for label, name in enumerate(cifar10_data.CLASS_NAMES)
        }
    )
    assert result == {
        "step": 7,
        "checkpoint": checkpoint,
        "eval_data": "test",
        "count": 100,
        "precision": pytest.approx((predictions == labels).mean()),
        "use_moving_averages": True,
        "class_names": list(cifar10_data.CLASS_NAMES),
        "confusion_matrix": confusion.tolist(),
    }


def test_tensorboard_gets_what_was_counted_and_nothing_else(records):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    cifar10_eval.evaluate()
    _, tags = recorded(FLAGS.eval_dir)
    layers = ("conv1", "conv2", "local3", "local4", "softmax_linear")
    assert tags == {
        "input",
        "precision @ 1",
        "cross_entropy",
        "confusion_matrix",
        "mistakes",
        *(f"precision/{name}" for name in cifar10_data.CLASS_NAMES),
        *(f"activations/{layer}" for layer in layers),
    }


def test_a_data_set_of_other_classes_than_the_checkpoints_is_refused(records):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    save_checkpoint(FLAGS.checkpoint_dir, 8, Settings(tuple(f"own{n}" for n in range(10)), 64))
    message = r"ckpt-8 has been trained with 10 classes \(own0, .* with 10 classes \(airplane, "
    with pytest.raises(CheckpointError, match=message):
        cifar10_eval.evaluate()
    save_checkpoint(FLAGS.checkpoint_dir, 9, Settings(("cat", "dog"), 64))
    message = r"with 2 classes \(cat, dog\), not with 10 classes \(airplane, .*; name the data set"
    with pytest.raises(CheckpointError, match=message):
        cifar10_eval.evaluate()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            Settings(cifar10_data.CLASS_NAMES, 64, crop_size=21),
            "--crop_size=21, not with --crop_size=24",
        ),
        (
            Settings(cifar10_data.CLASS_NAMES, 64, top_layers="local"),
            "--top_layers=local, not with --top_layers=full",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_flag(records, settings, message, capsys):
    save_checkpoint(FLAGS.checkpoint_dir, 8, settings)
    with pytest.raises(CheckpointError, match=f"trained with {message}; .* --checkpoint_dir$"):
        cifar10_eval.evaluate()
    assert capsys.readouterr().err == ""
    assert not os.path.exists(FLAGS.eval_dir)  # it has not begun


def test_names_that_change_while_it_evaluates_are_not_mixed_with_the_models(records, monkeypatch):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    names = cifar10_data.CLASS_NAMES
    check_fits = cifar10_eval.check_fits

    def change(*arguments):
        folder = pathlib.Path(FLAGS.data_dir) / cifar10_data.EXTRACTED_FOLDER
        cifar10_data.write_class_names(folder, [*names, "emu"])
        check_fits(*arguments)

    monkeypatch.setattr(cifar10_eval, "check_fits", change)
    cifar10_eval.evaluate()
    (line,) = (pathlib.Path(FLAGS.eval_dir) / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["class_names"] == list(names)
    assert np.shape(json.loads(line)["confusion_matrix"]) == (10, 10)


def test_more_images_than_are_evaluated_by_default_are_told(records, capsys, monkeypatch):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.num_examples = 100
    monkeypatch.setattr(FLAGS["num_examples"], "default", 100)
    cifar10_eval.evaluate()
    assert capsys.readouterr().err == (
        "There are 131 images: evaluating the first 100 of them (--num_examples)\n"
    )
    FLAGS.num_examples = 99  # it was asked for
    cifar10_eval.evaluate()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [("cat", "dog"), tuple(f"class {n}" for n in range(13))])
def test_other_classes_are_evaluated_and_told_by_their_names(tmp_path, names):
    folder = tmp_path / "own"
    _, test = write_data_set(folder, test_count=40, class_names=names)
    FLAGS.data_dir = str(folder)
    FLAGS.run_once = True
    FLAGS.checkpoint_dir = str(tmp_path / "checkpoints")
    FLAGS.eval_dir = str(tmp_path / "eval")
    save_checkpoint(FLAGS.checkpoint_dir, 7, Settings(names, 25))
    variables = numpy_model.random_variables(AVERAGED, len(names))
    likeliest = numpy_model.inference(standardized_centers(test), variables).argmax(axis=1)
    confusion = np.zeros([len(names)] * 2, int)
    np.add.at(confusion, (test[:, 0], likeliest), 1)
    cifar10_eval.evaluate()
    (line,) = (tmp_path / "eval" / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert result["confusion_matrix"] == confusion.tolist()
    assert result["class_names"] == list(names)
    assert result["precision"] == pytest.approx(np.trace(confusion) / 40)
    _, tags = recorded(FLAGS.eval_dir)
    assert {f"precision/{name}" for name in names} <= tags


def test_a_class_without_images_has_no_precision(records):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.num_examples = 3  # of the classes 0, 1 and 2
    cifar10_eval.evaluate()
    (line,) = (pathlib.Path(FLAGS.eval_dir) / "results.jsonl").read_text().splitlines()
    of_class = json.loads(line)["precision_of_class"]
    assert [name for name, share in of_class.items() if share is None] == list(
        cifar10_data.CLASS_NAMES[3:]
    )


def test_raw_variables_are_evaluated_on_request(records, capsys):
    _, test = records
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.use_moving_averages = False
    cifar10_eval.evaluate()
    expected = correct_predictions(test, RAW).mean()
    assert expected != correct_predictions(test, AVERAGED).mean()
    assert printed_precision(capsys) == f"{expected:.3f}"


def test_the_training_files_are_evaluated_on_request(records, capsys):
    train, _ = records
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.eval_data = "train_eval"
    cifar10_eval.evaluate()
    assert printed_precision(capsys) == f"{correct_predictions(train, AVERAGED).mean():.3f}"


def test_num_examples_limits_the_count_to_the_first_images(records, capsys):
    _, test = records
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.batch_size = 8
    FLAGS.num_examples = 50
    cifar10_eval.evaluate()
    output = capsys.readouterr()
    assert f"= {correct_predictions(test, AVERAGED)[:50].mean():.3f}\n" in output.out
    assert output.err == ""


def test_fewer_images_than_asked_for_are_told(records, capsys):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    cifar10_eval.evaluate()
    assert "--num_examples=10000, but there are 131" in capsys.readouterr().err


def test_without_a_checkpoint_run_once_is_an_error(records):
    with pytest.raises(UserError, match=f"no checkpoint in {FLAGS.checkpoint_dir}"):
        cifar10_eval.evaluate()
    assert not pathlib.Path(FLAGS.eval_dir).exists()


def test_a_damaged_checkpoint_is_an_error_that_names_it(records):
    path = save_checkpoint(FLAGS.checkpoint_dir, 7)
    pathlib.Path(f"{path}.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(
        cifar10_eval.CheckpointError, match="model.ckpt-7 cannot be read: Read less bytes"
    ) as error:
        cifar10_eval.evaluate()
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_values_that_are_not_finite_is_an_error_that_names_it(
    records, monkeypatch
):
    variables = numpy_model.random_variables(AVERAGED)
    variables["softmax_linear/biases"][3] = np.nan
    monkeypatch.setattr(numpy_model, "random_variables", lambda *_: variables)
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    with pytest.raises(cifar10_eval.CheckpointError, match="model.ckpt-7 has values") as error:
        cifar10_eval.evaluate()
    assert "\n" not in str(error.value)


def test_an_eval_dir_that_cannot_be_written_is_told_in_one_line(records, tmp_path):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    (tmp_path / "file").write_text("in the way")
    FLAGS.eval_dir = str(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write to --eval_dir=.*file") as error:
        cifar10_eval.evaluate()
    assert "\n" not in str(error.value)


def test_evaluations_start_at_least_the_interval_apart(records, monkeypatch):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.eval_interval_secs = 5000
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        raise Stop

    clock = types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    monkeypatch.setattr(cifar10_eval, "time", clock)
    FLAGS.run_once = False
    with pytest.raises(Stop):
        cifar10_eval.evaluate()
    assert 4900 < slept[0] < 5000


def test_sessions_are_configured_as_the_flags_say(records, monkeypatch):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.use_fp16 = True
    configs = []
    session = tf.Session
    monkeypatch.setattr(
        tf, "Session", lambda config: (configs.append(config), session(config=config))[1]
    )
    cifar10_eval.evaluate()
    assert configs == [session_config(use_fp16=True)]


def test_a_checkpoint_of_another_model_is_an_error_that_names_what_is_missing(records):
    with tf.Graph().as_default(), tf.Session() as session:
        tf.get_variable("global_step", initializer=np.int64(7))
        session.run(tf.global_variables_initializer())
        pathlib.Path(FLAGS.checkpoint_dir).mkdir()
        tf.train.Saver().save(session, f"{FLAGS.checkpoint_dir}/model.ckpt", 7)
    with pytest.raises(
        cifar10_eval.CheckpointError,
        match=r"model: in it conv\d/\w+/ExponentialMovingAverage is missing, .*, and 5 more differ",
    ):
        cifar10_eval.evaluate()


def test_eval_once_takes_the_tutorials_arguments_and_the_newest_checkpoint(records, capsys):
    _, test = records
    save_checkpoint(FLAGS.checkpoint_dir, 3)
    save_checkpoint(FLAGS.checkpoint_dir, 9)
    with tf.Graph().as_default():
        images, labels = cifar10.inputs(eval_data=True, num_epochs=1)
        top_k_op = tf.nn.in_top_k(cifar10.inference(images), labels, 1)
        averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
        saver = tf.train.Saver(averages.variables_to_restore())
        with tf.summary.FileWriter(FLAGS.eval_dir) as writer:
            for _ in range(2):
                precision = cifar10_eval.eval_once(saver, writer, top_k_op, None)
                assert precision == correct_predictions(test, AVERAGED).mean()
    assert [step for step, _ in recorded(FLAGS.eval_dir)[0]] == [9, 9]


class Stop(Exception):  # noqa: N818
    """Ends an evaluation that would go on for ever."""


def evaluate_for_ever(monkeypatch, before_wait):
    """Runs `evaluate` until `before_wait`, called with the number of the wait, raises `Stop`."""
    waits = iter(range(1000))
    clock = types.SimpleNamespace(
        sleep=lambda _: before_wait(next(waits)), monotonic=time.monotonic
    )
    monkeypatch.setattr(cifar10_eval, "time", clock)
    FLAGS.run_once = False
    with pytest.raises(Stop):
        cifar10_eval.evaluate()


def test_each_new_checkpoint_is_evaluated_once_from_the_first_that_appears(
    records, capsys, monkeypatch
):
    def trainer(wait):
        if wait in (2, 6, 7):
            save_checkpoint(FLAGS.checkpoint_dir, wait * 10)
        if wait == 12:
            raise Stop

    evaluate_for_ever(monkeypatch, trainer)
    assert [step for step, _ in recorded(FLAGS.eval_dir)[0]] == [20, 60, 70]
    assert f"Waiting for a checkpoint in {FLAGS.checkpoint_dir}" in capsys.readouterr().err


def test_a_checkpoint_that_is_deleted_meanwhile_is_given_up_for_the_newest(records, monkeypatch):
    save_checkpoint(FLAGS.checkpoint_dir, 1)
    eval_once = cifar10_eval.eval_once
    taken = []

    def eval_once_after_the_trainer_moved_on(*arguments, **named):
        taken.append(arguments[-1])
        if len(taken) == 1:
            for path in pathlib.Path(FLAGS.checkpoint_dir).glob("model.ckpt-1.*"):
                path.unlink()
            save_checkpoint(FLAGS.checkpoint_dir, 2)
        return eval_once(*arguments, **named)

    monkeypatch.setattr(cifar10_eval, "eval_once", eval_once_after_the_trainer_moved_on)
    cifar10_eval.evaluate()
    assert [path.rsplit("-")[-1] for path in taken] == ["1", "2"]
    assert [step for step, _ in recorded(FLAGS.eval_dir)[0]] == [2]


def test_a_folder_that_loses_its_checkpoints_is_waited_for(records, monkeypatch):
    save_checkpoint(FLAGS.checkpoint_dir, 1)
    eval_once = cifar10_eval.eval_once

    def eval_once_after_a_deletion(*arguments, **named):
        if arguments[-1].endswith("-1"):
            shutil.rmtree(FLAGS.checkpoint_dir)
        return eval_once(*arguments, **named)

    def trainer(wait):
        if wait == 2:
            save_checkpoint(FLAGS.checkpoint_dir, 2)
        if wait == 5:
            raise Stop

    monkeypatch.setattr(cifar10_eval, "eval_once", eval_once_after_a_deletion)
    evaluate_for_ever(monkeypatch, trainer)
    assert [step for step, _ in recorded(FLAGS.eval_dir)[0]] == [2]


def test_a_damaged_checkpoint_does_not_end_the_wait_for_a_better_one(records, monkeypatch, capsys):
    path = save_checkpoint(FLAGS.checkpoint_dir, 1)
    pathlib.Path(f"{path}.data-00000-of-00001").write_bytes(b"")

    def trainer(wait):
        if wait == 3:
            save_checkpoint(FLAGS.checkpoint_dir, 2)
        if wait == 8:
            raise Stop

    evaluate_for_ever(monkeypatch, trainer)
    assert [step for step, _ in recorded(FLAGS.eval_dir)[0]] == [2]


def test_evaluations_never_go_back_to_an_earlier_step(records, monkeypatch):
    def trainer(wait):
        if wait < 6:
            save_checkpoint(FLAGS.checkpoint_dir, (20, 10, 15, 30, 25, 40)[wait])
        if wait == 12:
            raise Stop

    evaluate_for_ever(monkeypatch, trainer)
    assert [step for step, _ in recorded(FLAGS.eval_dir)[0]] == [20, 30, 40]


def test_an_unreadable_state_file_is_not_taken_for_a_lack_of_checkpoints(records):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    (pathlib.Path(FLAGS.checkpoint_dir) / "checkpoint").write_text("garbage")
    with pytest.raises(UserError, match="the file `checkpoint` in .* is unreadable or names"):
        cifar10_eval.evaluate()


def test_summaries_do_not_go_among_the_checkpoints(records):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.eval_dir = FLAGS.checkpoint_dir + "/../" + pathlib.Path(FLAGS.checkpoint_dir).name
    with pytest.raises(UserError, match="--eval_dir and --checkpoint_dir are both"):
        cifar10_eval.evaluate()


def test_test_data_that_is_cut_while_it_is_evaluated_is_told(records, monkeypatch):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    test_file = pathlib.Path(cifar10.find_data_folder()) / "test_batch.bin"
    restore = cifar10_eval.restore

    def restore_then_cut(*arguments):
        os.truncate(test_file, 3073)
        return restore(*arguments)

    monkeypatch.setattr(cifar10_eval, "restore", restore_then_cut)
    with pytest.raises(DataError, match=r"test_batch.bin has 3073 bytes now; it had \d+ when"):
        cifar10_eval.evaluate()
    assert recorded(FLAGS.eval_dir)[0] == []


def test_evaluations_leave_no_threads_behind(records, monkeypatch):
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    FLAGS.num_examples = 10  # the queue still holds images then
    FLAGS.batch_size = 2
    before = threading.active_count()
    for _ in range(3):
        cifar10_eval.evaluate()
    assert threading.active_count() == before
