"""The training loop that both trainers share, around the smallest possible train op."""

import functools
import math
import re
import shutil
import time

import pytest

import cifar10_session
from cifar10_runtime import UserError, session_config, tf

pytestmark = pytest.mark.usefixtures("graph")

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: step (\d+), loss = (\S+) "
    r"\((\d+\.\d) examples/sec; (\d+\.\d{3}) sec/batch\)"
)


def train(train_dir, max_steps, log_frequency=10, losses=None, seconds_per_step=0.0):
    """Trains in a fresh graph; the loss of step n is 100 + n, or what `losses` has for it."""
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()

        def loss_of_step(step):
            time.sleep(seconds_per_step)
            return float((losses or {}).get(step, 100 + step))

        loss = tf.py_func(loss_of_step, [global_step.read_value()], tf.double, stateful=True)
        loss.set_shape([])
        with tf.control_dependencies([loss]):
            train_op = tf.assign_add(global_step, 1)
        cifar10_session.run_training(
            train_op,
            loss,
            examples_per_step=8,
            train_dir=str(train_dir),
            max_steps=max_steps,
            log_frequency=log_frequency,
            config=session_config(),
        )


def run_five_steps(train_dir, global_step):
    """Trains in the test's own graph, with what it has added, on a loss of 1."""
    train_op = tf.assign_add(global_step, 1)
    cifar10_session.run_training(
        train_op, tf.constant(1.0), 8, str(train_dir), 5, 10, session_config()
    )


def step_of(train_dir):
    newest = tf.train.latest_checkpoint(str(train_dir))
    return tf.train.load_checkpoint(newest).get_tensor("global_step")


def printed(capsys):
    lines = capsys.readouterr().out.splitlines()
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), lines
    return [(int(m[1]), float(m[2]), float(m[3]), float(m[4])) for m in matches]


def test_a_line_comes_every_log_frequency_steps_with_that_steps_loss(tmp_path, capsys):
    train(tmp_path, max_steps=21, log_frequency=5)
    lines = printed(capsys)
    assert [step for step, *_ in lines] == [0, 5, 10, 15, 20]
    assert [loss for _, loss, *_ in lines] == [100, 105, 110, 115, 120]


def test_the_speed_is_that_of_the_steps_since_the_last_line(tmp_path, capsys):
    train(tmp_path, max_steps=5, log_frequency=4, seconds_per_step=0.1)
    (_, _, first_speed, first_seconds), (_, _, speed, seconds) = printed(capsys)
    assert first_seconds >= 0.1
    assert first_speed == pytest.approx(8 / first_seconds, rel=0.05)
    assert 0.1 <= seconds < 0.3  # not the 0.4 of the four steps together
    assert speed == pytest.approx(8 / seconds, rel=0.05)


def test_training_stops_at_max_steps_and_saves_that_step(tmp_path):
    train(tmp_path, max_steps=7)
    assert step_of(tmp_path) == 7


def test_training_goes_on_from_the_newest_checkpoint_with_its_global_step(tmp_path, capsys):
    train(tmp_path, max_steps=7)
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    capsys.readouterr()
    train(tmp_path, max_steps=12)
    assert step_of(tmp_path) == 12
    # The first step of the run has a line of its own, for it includes the filling of the queue.
    assert [line[:2] for line in printed(capsys)] == [(7, 107), (10, 110)]
    assert {path.name for path in tmp_path.iterdir()} >= before
    assert foreign.read_text() == "mine"


@pytest.fixture
def saving_every_step(monkeypatch):
    monkeypatch.setattr(
        tf.train,
        "MonitoredTrainingSession",
        functools.partial(
            tf.train.MonitoredTrainingSession, save_checkpoint_steps=1, save_checkpoint_secs=None
        ),
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_training_before_it_is_saved(
    tmp_path, saving_every_step, value
):
    with pytest.raises(UserError, match=f"the loss at step 3 is {value}"):
        train(tmp_path, max_steps=9, losses={3: value})
    assert step_of(tmp_path) == 3  # after the steps 0, 1 and 2


def test_a_histogram_of_what_is_not_finite_ends_training_in_one_line(tmp_path):
    global_step = tf.train.get_or_create_global_step()
    tf.summary.histogram("gradients/conv1/weights", tf.fill([2], math.nan))
    with pytest.raises(UserError, match="left the finite numbers: N.*gradients/conv1") as error:
        run_five_steps(tmp_path, global_step)
    assert "\n" not in str(error.value)


def checkpoint_files_in(folder):
    # Not the event files: a writer of this process may still have something to flush.
    paths = [folder / "checkpoint", *folder.glob("model.ckpt*")]
    return {path.name: path.read_bytes() for path in paths}


def test_a_train_dir_can_be_moved(tmp_path):
    train(tmp_path / "before", max_steps=3)
    (tmp_path / "before").rename(tmp_path / "after")
    train(tmp_path / "after", max_steps=5)
    assert step_of(tmp_path / "after") == 5
    assert not (tmp_path / "before").exists()


def test_training_in_a_copy_leaves_the_original_alone(tmp_path):
    train(tmp_path / "original", max_steps=3)
    before = checkpoint_files_in(tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    for max_steps in range(4, 11):  # more checkpoints than are kept
        train(tmp_path / "copy", max_steps=max_steps)
    assert checkpoint_files_in(tmp_path / "original") == before


@pytest.mark.parametrize("content", [None, b"", b"\xff not a checkpoint"])
def test_training_does_not_start_over_on_top_of_checkpoints(tmp_path, content):
    train(tmp_path, max_steps=3)
    (tmp_path / "checkpoint").unlink()
    if content is not None:
        (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(UserError, match="holds checkpoints, but its file `checkpoint` is missing"):
        cifar10_session.prepare_train_dir(str(tmp_path), 5)


def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path):
    train(tmp_path, max_steps=3)
    (tmp_path / "model.ckpt-3.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(UserError, match="model.ckpt-3 cannot be read: Read less bytes") as error:
        cifar10_session.prepare_train_dir(str(tmp_path), 5)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_told_in_one_line(tmp_path):
    train(tmp_path, max_steps=3)
    global_step = tf.train.get_or_create_global_step()
    tf.get_variable("another", initializer=1.0)
    with pytest.raises(UserError, match="Key another not found in checkpoint; name") as error:
        run_five_steps(tmp_path, global_step)
    assert "\n" not in str(error.value)


def test_the_last_step_is_saved_also_while_an_exception_is_being_handled(tmp_path):
    try:
        raise KeyError
    except KeyError:
        train(tmp_path, max_steps=4)
    assert step_of(tmp_path) == 4


def test_an_input_that_ends_is_an_error_and_not_the_end_of_training(tmp_path):
    files = tf.train.string_input_producer(["a", "b"], num_epochs=1)
    global_step = tf.train.get_or_create_global_step()
    with tf.control_dependencies([files.dequeue()]):
        train_op = tf.assign_add(global_step, 1)
    with pytest.raises(tf.errors.OutOfRangeError):
        cifar10_session.run_training(
            train_op, tf.constant(1.0), 8, str(tmp_path), 100, 10, session_config()
        )


def test_steps_remain_until_a_checkpoint_has_reached_max_steps(tmp_path, capsys):
    train_dir = tmp_path / "new" / "folder"
    assert cifar10_session.prepare_train_dir(str(train_dir), 5)
    assert train_dir.is_dir()
    train(train_dir, max_steps=5)
    assert cifar10_session.prepare_train_dir(str(train_dir), 6)
    assert capsys.readouterr().err == ""
    assert not cifar10_session.prepare_train_dir(str(train_dir), 5)
    assert "has reached step 5 of --max_steps=5: nothing to do" in capsys.readouterr().err


def test_a_train_dir_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot use --train_dir=") as error:
        cifar10_session.prepare_train_dir(str(tmp_path / "file"), 5)
    assert "\n" not in str(error.value)
