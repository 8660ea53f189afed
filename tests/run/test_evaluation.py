"""Which checkpoints are evaluated, and what is counted."""

import contextlib
import pathlib
import struct
import types

import numpy as np
import pytest

from support.base.errors import CheckpointError, UserError
from support.ops import summaries
from support.ops.tensorflow_v1 import tf
from support.run import checkpoints, evaluation

# --- Which checkpoints and images to evaluate.


def save(folder, step):
    """Saves a checkpoint; returns its path."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.get_variable("global_step", initializer=tf.constant(step, tf.int64), trainable=False)
        session.run(tf.global_variables_initializer())
        return tf.train.Saver().save(session, str(folder / "model.ckpt"), step)


class Stop(Exception):  # noqa: N818
    """Ends an evaluation that would otherwise continue forever."""


@pytest.fixture
def clock(monkeypatch):
    """The clock of the evaluation: `trainer` is called with the number of each wait."""
    clock = types.SimpleNamespace(now=0.0, waits=[], trainer=lambda wait: None)

    def sleep(seconds):
        clock.waits.append(seconds)
        clock.now += seconds
        clock.trainer(len(clock.waits) - 1)

    clock.sleep, clock.monotonic = sleep, lambda: clock.now
    monkeypatch.setattr(evaluation, "time", clock)
    monkeypatch.setattr(checkpoints, "check_in_other_process", lambda path: None)  # takes seconds
    return clock


def evaluate(folder, clock, steps, wait_to_stop):
    """Returns the steps evaluated before `wait_to_stop`. `steps`: the step to save, by wait."""
    used = []

    def trainer(wait):
        if wait in steps:
            save(folder, steps[wait])
        if wait == wait_to_stop:
            raise Stop

    clock.trainer = trainer
    with pytest.raises(Stop):
        evaluation.use_new_checkpoints(str(folder), used.append, 0)
    return [checkpoint.step for checkpoint in used]


def test_every_new_checkpoint_is_used_once(tmp_path, clock, capsys):
    assert evaluate(tmp_path, clock, {2: 20, 6: 60, 7: 70}, 12) == [20, 60, 70]
    assert capsys.readouterr().err == f"Waiting for a checkpoint in {tmp_path}\n"


def test_checkpoints_of_earlier_steps_are_skipped(tmp_path, clock):
    steps = dict(enumerate((20, 10, 15, 30, 25, 40)))
    assert evaluate(tmp_path, clock, steps, 12) == [20, 30, 40]


def test_after_a_damaged_checkpoint_evaluation_waits_for_the_next_one(tmp_path, clock):
    save(tmp_path, 1)
    (tmp_path / "model.ckpt-1.data-00000-of-00001").write_bytes(b"")
    assert evaluate(tmp_path, clock, {3: 2}, 8) == [2]


@pytest.mark.parametrize("has_state_file", [True, False])
def test_evaluation_survives_a_checkpoint_that_would_end_the_process(
    tmp_path, clock, monkeypatch, has_state_file
):
    monkeypatch.undo()  # the check is real
    monkeypatch.setattr(evaluation, "time", clock)
    save(tmp_path, 1)
    give_invalid_type(save(tmp_path, 2))
    if not has_state_file:
        (tmp_path / "checkpoint").unlink()
    expected = [3] if has_state_file else [1, 3]
    assert evaluate(tmp_path, clock, {3: 3}, 5) == expected


def give_invalid_type(path):
    """Changes the type of the variable in a checkpoint to one that does not exist.

    The first block of an index file is followed by a zero byte and a checksum of both.
    """
    content = bytearray(pathlib.Path(f"{path}.index").read_bytes())
    content[content.index(b"\x08\x09\x12") + 1] = 0x7F  # int64
    for end in range(len(content) - 4):
        (found,) = struct.unpack_from("<I", content, end)
        before = content[:end].replace(b"\x08\x7f\x12", b"\x08\x09\x12")
        if found == masked_checksum(before):
            struct.pack_into("<I", content, end, masked_checksum(content[:end]))
            break
    pathlib.Path(f"{path}.index").write_bytes(content)


def masked_checksum(content):
    """Returns the CRC-32C of a content in the form that LevelDB and TensorFlow write."""
    checksum = 0xFFFFFFFF
    for byte in content:
        checksum ^= byte
        for _ in range(8):
            checksum = (checksum >> 1) ^ (0x82F63B78 if checksum & 1 else 0)
    checksum ^= 0xFFFFFFFF
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_the_interval_separates_the_starts_of_evaluations(tmp_path, clock):
    save(tmp_path, 7)

    def use(checkpoint):
        clock.now += 30.0

    def stop(wait):
        raise Stop

    clock.trainer = stop
    with pytest.raises(Stop):
        evaluation.use_new_checkpoints(str(tmp_path), use, 300)
    assert clock.waits == [270.0]


def test_evaluation_ends_after_the_last_step_and_when_the_trainer_is_lost(tmp_path, clock):
    save(tmp_path, 7)
    used = []
    evaluation.use_new_checkpoints(str(tmp_path), used.append, 0, last_step=7)
    assert [checkpoint.step for checkpoint in used] == [7]

    def check_trainer():
        raise UserError("no response")

    with pytest.raises(UserError, match="^no response$"):
        evaluation.use_new_checkpoints(
            str(tmp_path), used.append, 0, last_step=8, check_trainer=check_trainer
        )
    assert [checkpoint.step for checkpoint in used] == [7, 7]


def test_eval_dir_must_differ_from_the_folder_of_the_checkpoints(tmp_path):
    path = save(tmp_path, 7)
    for checkpoint_dir in (str(tmp_path), path, f"{path}.index"):
        with pytest.raises(UserError, match="--eval_dir and --checkpoint_dir are both"):
            evaluation.check_eval_dir(f"{tmp_path}/../{tmp_path.name}", checkpoint_dir)
        evaluation.check_eval_dir(f"{tmp_path}/eval", checkpoint_dir)


# --- Counting.


CHECKPOINT = checkpoints.Checkpoint("model.ckpt-7", 7, None, {})


@contextlib.contextmanager
def running_session():
    with tf.Session() as session, evaluation.running_input(session, CHECKPOINT):
        yield session


def test_a_histogram_of_values_that_are_not_finite_is_an_error_of_the_checkpoint(graph):
    summaries.histogram("activations", [1.0, np.inf])
    message = "^model.ckpt-7 produces non-finite values: "
    with pytest.raises(CheckpointError, match=message), running_session() as session:
        session.run(tf.get_collection(tf.GraphKeys.SUMMARIES))


def count(limit, *batches, cross_entropy=1.0):
    """Returns `Counts` of batches of (label, prediction) pairs."""
    counts = evaluation.Counts(["cat", "dog"], limit)
    with counts.show_progress():
        for pairs in batches:
            labels, predictions = np.array(pairs).T
            outputs = {
                "images": np.zeros([len(pairs), 8, 8, 3]),
                "labels": labels,
                "predictions": predictions,
                "cross_entropy": np.full(len(pairs), cross_entropy, np.float32),
            }
            counts.add(labels == predictions, outputs)
    return counts


def test_images_beyond_the_limit_are_not_counted():
    counts = count(5, [(0, 0), (1, 0), (1, 0)], [(0, 0), (1, 0), (0, 1)])
    assert (counts.total, counts.correct, counts.precision) == (5, 2, 0.4)
    assert counts.are_complete
    assert counts._bar.n == 5
    results = counts._find_results()
    assert results["confusion_matrix"] == [[2, 0], [3, 0]]
    assert results["recall_of_class"] == {"cat": 1.0, "dog": 0.0}
    assert results["precision_of_class"] == {"cat": 2 / 5, "dog": None}  # no predictions
    assert results["cross_entropy"] == 1.0
    assert count(1, [(0, 0)])._find_results()["recall_of_class"] == {"cat": 1.0, "dog": None}


def test_missing_images_and_results_that_are_not_finite_are_errors():
    count(9, [(0, 0)]).check(CHECKPOINT)
    with pytest.raises(UserError, match="^the input ended after 1 of 9 images$"):
        count(9, [(0, 0)]).check(CHECKPOINT, num_examples=9)
    with pytest.raises(UserError, match="^the input ended after 0 images$"):
        count(9).check(CHECKPOINT)
    with pytest.raises(CheckpointError, match="^model.ckpt-7 produces a cross-entropy of nan$"):
        count(9, [(0, 0)], cross_entropy=np.nan).check(CHECKPOINT)
