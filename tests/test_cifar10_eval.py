"""Evaluation: its results match NumPy's, and it handles all kinds of checkpoints."""

import json
import os
import pathlib
import re
import sys
import time
import types

import numpy as np
import numpy_model
import pytest
from conftest import (
    AVERAGED,
    RAW,
    TF_CONFIGS,
    lost_stream,
    save_checkpoint,
    standardized_centers,
    write_dataset,
    written_scopes,
    written_values,
)

import cifar10
import cifar10_eval
from support.base.errors import CheckpointError, DataError
from support.data import dataset
from support.data.settings import TrainingSettings
from support.ops.tensorflow_v1 import tf
from support.run import evaluation

FLAGS = cifar10_eval.FLAGS


@pytest.fixture
def records(tmp_path):
    """A small dataset, and flags that name it and new folders; the training and test records."""
    FLAGS.data_dir = str(tmp_path / "data[1] ?*猫")
    FLAGS.checkpoint_dir = str(tmp_path / "train {x}猫")
    FLAGS.eval_dir = str(tmp_path / "eval {x}猫")
    FLAGS.run_once = True
    folder = tmp_path / FLAGS.data_dir / dataset.EXTRACTED_FOLDER
    return write_dataset(folder, train_counts=(20, 1, 30, 8, 5), test_count=131, patches=True)


@pytest.fixture
def checkpoint(records):
    """The path of a checkpoint of step 7."""
    return save_checkpoint(FLAGS.checkpoint_dir, 7)


def expected_logits(records, seed):
    return numpy_model.inference(standardized_centers(records), numpy_model.random_variables(seed))


def expected_correct(records, seed):
    """Returns for each record whether NumPy's model predicts its label."""
    return expected_logits(records, seed).argmax(axis=1) == records[:, 0]


def printed_precision(capsys):
    return capsys.readouterr().out.partition(": precision @ 1 = ")[2].rstrip()


def written_results():
    """Returns the lines of `results.jsonl` as dicts."""
    lines = (pathlib.Path(FLAGS.eval_dir) / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def written_tags():
    return {tag for _, tag, _ in written_values(FLAGS.eval_dir)}


def evaluated_steps():
    return [step for step, tag, _ in written_values(FLAGS.eval_dir) if tag == "precision @ 1"]


@pytest.mark.parametrize(("use_moving_averages", "seed"), [(True, AVERAGED), (False, RAW)])
def test_the_precision_is_that_of_numpy_whatever_tf_config_says(
    records, checkpoint, capsys, monkeypatch, use_moving_averages, seed
):
    _, test = records
    FLAGS.use_moving_averages = use_moving_averages
    monkeypatch.setenv("TF_CONFIG", TF_CONFIGS[0])
    cifar10_eval.main()
    expected = expected_correct(test, seed).mean()
    assert 0.05 < expected < 0.95
    assert expected_correct(test, AVERAGED).mean() != expected_correct(test, RAW).mean()
    output = capsys.readouterr()
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{6}}: precision @ 1 = {expected:.3f}\n", output.out
    )
    assert "--num_examples=10000, but there are only 131 images" in output.err
    assert (7, "precision @ 1", pytest.approx(expected, rel=1e-6)) in written_values(FLAGS.eval_dir)


def test_results_match_numpy(records, checkpoint):
    _, test = records
    FLAGS.batch_size = 7
    FLAGS.num_examples = 100
    cifar10_eval.evaluate()
    cifar10_eval.evaluate()
    result, _ = written_results()  # one line per evaluation
    labels = test[:100, 0].astype(int)
    logits = expected_logits(test[:100], AVERAGED)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    cross_entropy = -np.log(probabilities[np.arange(100), labels]).mean()
    confusion = np.zeros([10, 10], int)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    correct = confusion.diagonal()
    recall, precision = (
        {
            name: count / total if total else None
            for name, count, total in zip(dataset.CLASS_NAMES, correct, totals, strict=True)
        }
        for totals in (confusion.sum(axis=1), confusion.sum(axis=0))
    )
    assert recall != precision
    assert abs(result.pop("time") - time.time()) < 60
    assert result == {
        "step": 7,
        "checkpoint": checkpoint,
        "eval_data": "test",
        "count": 100,
        "precision": correct.sum() / 100,
        "cross_entropy": pytest.approx(cross_entropy, rel=1e-4),
        "recall_of_class": recall,
        "precision_of_class": precision,
        "use_moving_averages": True,
        "class_names": list(dataset.CLASS_NAMES),
        "confusion_matrix": confusion.tolist(),
    }
    scalars = {tag: value for _, tag, value in written_values(FLAGS.eval_dir)}
    for kind, values in (("recall", recall), ("precision", precision)):
        for name, value in values.items():
            assert scalars.get(f"{kind}/{name}") == pytest.approx(value)


def test_fast_and_reference_operations_give_the_same_results_for_training_images(
    records, checkpoint
):
    train, _ = records
    FLAGS.eval_data = "train_eval"
    for fast_ops in (True, False):
        FLAGS.fast_ops = fast_ops
        cifar10_eval.evaluate()
    fast, reference = written_results()
    assert fast.pop("cross_entropy") == pytest.approx(reference.pop("cross_entropy"), rel=1e-5)
    del fast["time"], reference["time"]
    assert fast == reference
    assert fast["precision"] == expected_correct(train, AVERAGED).mean()


def test_tensorboard_gets_exactly_these_tags_and_the_graph_of_the_model(checkpoint):
    cifar10_eval.evaluate()
    (result,) = written_results()
    predicted = [name for name, value in result["precision_of_class"].items() if value is not None]
    assert predicted
    layers = ("conv1", "conv2", "local3", "local4", "softmax_linear")
    assert written_tags() == {
        "input",
        "precision @ 1",
        "cross_entropy",
        "confusion_matrix",
        "mistakes",
        *(f"recall/{name}" for name in dataset.CLASS_NAMES),
        *(f"precision/{name}" for name in predicted),
        *(f"activations/{layer}" for layer in layers),
    }
    scopes = written_scopes(FLAGS.eval_dir)
    assert {"inputs", "conv1", "softmax_linear"} <= scopes
    assert scopes.isdisjoint({"save", "summaries", "init"})


def test_a_checkpoint_trained_on_other_classes_is_refused_before_anything_starts(checkpoint):
    save_checkpoint(FLAGS.checkpoint_dir, 9, TrainingSettings(("cat", "dog"), 64))
    message = r"ckpt-9 was trained with 2 classes \(cat, dog\), not with 10 .* --checkpoint_dir$"
    with pytest.raises(CheckpointError, match=message):
        cifar10_eval.evaluate()
    assert not os.path.exists(FLAGS.eval_dir)


def test_a_tie_counts_as_the_first_of_the_classes(records, capsys, monkeypatch):
    _, test = records
    variables = numpy_model.random_variables(AVERAGED)
    for kind in ("weights", "biases"):
        variables[f"softmax_linear/{kind}"][...] = 0.0
    monkeypatch.setattr(numpy_model, "random_variables", lambda *_: variables)
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    cifar10_eval.evaluate()
    expected = np.mean(test[:, 0] == 0)
    assert printed_precision(capsys) == f"{expected:.3f}"
    (result,) = written_results()
    confusion = np.array(result["confusion_matrix"])
    assert result["precision"] == pytest.approx(expected)
    assert result["precision"] == np.trace(confusion) / confusion.sum()


def add_offset(monkeypatch, value):
    """Adds a variable that is not trainable to the model: it is added to the logits of class 0."""
    inference = cifar10.inference

    def offset_inference(images):
        offset = tf.get_variable("norm/moving_mean", initializer=value, trainable=False)
        # Some libraries do this. Training averages the trainable variables only.
        tf.add_to_collection(tf.GraphKeys.MOVING_AVERAGE_VARIABLES, offset)
        return inference(images) + offset * tf.one_hot(0, 10)

    monkeypatch.setattr(cifar10, "inference", offset_inference)


def test_variables_that_are_not_trainable_are_restored(records, capsys, monkeypatch):
    _, test = records
    add_offset(monkeypatch, 1e6)
    with tf.Graph().as_default(), tf.Session() as session:
        images, labels = tf.zeros([2, 24, 24, 3]), tf.constant([0, 1])
        total_loss = cifar10.loss(cifar10.inference(images), labels)
        cifar10.train(total_loss, tf.train.get_or_create_global_step())
        session.run(tf.global_variables_initializer())
        pathlib.Path(FLAGS.checkpoint_dir).mkdir()
        tf.train.Saver().save(session, f"{FLAGS.checkpoint_dir}/model.ckpt", 0)
    monkeypatch.undo()
    add_offset(monkeypatch, 0.0)  # the initial value in the graph of the evaluation
    cifar10_eval.evaluate()
    assert printed_precision(capsys) == f"{np.mean(test[:, 0] == 0):.3f}"


class Stop(Exception):  # noqa: N818
    """Ends an evaluation that would otherwise continue forever."""


def evaluate_forever(monkeypatch, on_wait):
    """Evaluates new checkpoints; `on_wait` is called in place of `time.sleep`."""
    clock = types.SimpleNamespace(sleep=on_wait, monotonic=time.monotonic)
    monkeypatch.setattr(evaluation, "time", clock)
    check = "check_in_other_process"  # takes seconds
    monkeypatch.setattr(evaluation.checkpoints, check, lambda path: None)
    FLAGS.run_once = False
    cifar10_eval.evaluate()


def test_a_checkpoint_in_place_of_its_folder_is_evaluated_once(records, monkeypatch):
    def fail(seconds):
        raise AssertionError("it waits for another checkpoint")

    path = save_checkpoint(FLAGS.checkpoint_dir, 7)
    save_checkpoint(FLAGS.checkpoint_dir, 9)
    FLAGS.checkpoint_dir = f"{path}.index"
    evaluate_forever(monkeypatch, fail)
    assert evaluated_steps() == [7]
    assert [result["checkpoint"] for result in written_results()] == [path]


def test_a_checkpoint_of_the_tutorial_of_2015_is_evaluated(records, capsys):
    _, test = records
    with tf.Graph().as_default(), tf.Session() as session:
        tf.Variable(100, trainable=False)
        for name, value in numpy_model.random_variables(AVERAGED).items():
            tf.get_variable(f"{name}/ExponentialMovingAverage", initializer=value)
        session.run(tf.global_variables_initializer())
        os.makedirs(FLAGS.checkpoint_dir)
        saver = tf.train.Saver(write_version=tf.train.SaverDef.V1)
        saver.save(session, f"{FLAGS.checkpoint_dir}/model.ckpt", 100)
    state = pathlib.Path(FLAGS.checkpoint_dir) / "checkpoint"
    state.write_text('model_checkpoint_path: "/home/ann/cifar10_train/model.ckpt-100"\n')
    cifar10_eval.evaluate()
    state.unlink()
    cifar10_eval.evaluate()
    output = capsys.readouterr().out
    assert output.count(f"= {expected_correct(test, AVERAGED).mean():.3f}\n") == 2
    assert [result["step"] for result in written_results()] == [100, 100]


def test_a_checkpoint_without_the_variables_is_an_error_that_names_them(records):
    with tf.Graph().as_default(), tf.Session() as session:
        tf.get_variable("global_step", initializer=np.int64(7))
        session.run(tf.global_variables_initializer())
        pathlib.Path(FLAGS.checkpoint_dir).mkdir()
        tf.train.Saver().save(session, f"{FLAGS.checkpoint_dir}/model.ckpt", 7)
    message = r"another model: in it, (\w+/\w+/ExponentialMovingAverage is missing,? ?){10}; choose"
    with pytest.raises(CheckpointError, match=message):
        cifar10_eval.evaluate()


def test_a_later_checkpoint_of_other_classes_is_refused_and_the_next_one_evaluated(
    checkpoint, monkeypatch, warnings
):
    later = [(8, TrainingSettings(("cat", "dog"), 64)), (9, None)]
    FLAGS.eval_interval_secs = 5000
    waits = []

    def on_wait(seconds):
        waits.append(seconds)
        if not later:
            raise Stop
        save_checkpoint(FLAGS.checkpoint_dir, *later.pop(0))

    with pytest.raises(Stop):
        evaluate_forever(monkeypatch, on_wait)
    assert evaluated_steps() == [7, 9]
    assert [4900 < seconds < 5000 for seconds in waits] == [True, False, True]
    (line,) = warnings
    assert line.startswith(f"{FLAGS.checkpoint_dir}/model.ckpt-8 was trained with 2 classes (cat, ")


def test_test_data_that_changes_between_two_evaluations_is_an_error(checkpoint, monkeypatch):
    def change_and_save(seconds):
        test_file = pathlib.Path(cifar10.find_dataset().folder) / "test_batch.bin"
        os.utime(test_file)
        test_file.write_bytes(test_file.read_bytes()[::-1])  # of the same size
        save_checkpoint(FLAGS.checkpoint_dir, 8)

    with pytest.raises(DataError, match="test_batch.bin was modified after the script started"):
        evaluate_forever(monkeypatch, change_and_save)
    assert evaluated_steps() == [7]


def test_results_are_written_when_stdout_is_lost(checkpoint, monkeypatch, capsys):
    with lost_stream() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        cifar10_eval.evaluate()
    assert len(written_results()) == 1
    assert evaluated_steps() == [7]
    assert "Continuing without standard output" in capsys.readouterr().err
