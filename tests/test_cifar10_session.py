"""The training loop that both trainers share, around the smallest possible train op."""

import math
import os
import pathlib
import re
import shutil
import time

import numpy as np
import pytest

import cifar10
import cifar10_session
import cifar10_summaries
from cifar10_data import DataError
from cifar10_runtime import UserError, session_config, tf

pytestmark = pytest.mark.usefixtures("graph")

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: step (\d+), loss = (\S+) "
    r"\((\d+\.\d) examples/sec; (\d+\.\d{3}) sec/batch\)"
)


def train(train_dir, max_steps, log_frequency=10, losses=None, seconds_per_step=0.0, **more):
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
            **more,
        )


def run(train_op, train_dir, max_steps, **more):
    """Trains in the test's own graph, on a loss of 1."""
    cifar10_session.run_training(
        train_op, tf.constant(1.0), 8, str(train_dir), max_steps, 10, session_config(), **more
    )


def prepare(train_dir, max_steps):
    with cifar10_session.prepare_train_dir(str(train_dir), max_steps) as is_needed:
        return is_needed


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


def test_no_checkpoint_is_there_without_the_file_that_tells_what_it_was_trained_for(
    tmp_path, monkeypatch
):
    save = tf.train.Saver.save
    is_there = []

    def look_first(saver, session, path, step, **arguments):
        is_there.append((tmp_path / f"model.ckpt-{step}.meta").exists())
        return save(saver, session, path, step, **arguments)

    monkeypatch.setattr(tf.train.Saver, "save", look_first)
    train(tmp_path, max_steps=3, save_checkpoint_steps=1)
    assert is_there == [True] * 4
    assert len(list(tmp_path.glob("*.meta"))) == 4


def test_where_that_file_cannot_be_written_nothing_half_done_stays(tmp_path, monkeypatch):
    train(tmp_path, max_steps=3)

    def fail(saver, path, **arguments):
        pathlib.Path(f"{path}.tmp123").write_text("half")
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.train.Saver, "export_meta_graph", fail)
    with pytest.raises(UserError, match="cannot save a checkpoint in .*: No space left on device"):
        train(tmp_path, max_steps=5)
    assert not list(tmp_path.glob("*.tmp*"))
    assert step_of(tmp_path) == 3


def test_a_checkpoint_that_cannot_be_written_leaves_no_file_of_its_own(tmp_path, monkeypatch):
    train(tmp_path, max_steps=3)

    def fail(saver, session, path, step, **arguments):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.train.Saver, "save", fail)
    with pytest.raises(UserError, match="cannot save a checkpoint in .*: No space left on device"):
        train(tmp_path, max_steps=5)
    # What there was stays, such as the file of step 3, which is saved anew when a run begins.
    assert {path.name for path in tmp_path.glob("*.meta")} == {
        "model.ckpt-0.meta",
        "model.ckpt-3.meta",
    }
    with pytest.raises(UserError, match="cannot save"):
        train(tmp_path / "new", max_steps=5)
    assert not list((tmp_path / "new").glob("*.meta"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_training_before_it_is_saved(tmp_path, value):
    with pytest.raises(UserError, match=f"PyFunc is {value} at step 3; the step is not saved"):
        train(tmp_path, max_steps=9, losses={3: value}, save_checkpoint_steps=1)
    assert step_of(tmp_path) == 3  # after the steps 0, 1 and 2


def make_update(gradient_of_step):
    """Makes a train op whose gradient of the variable `layer/weights` is what a function says."""
    global_step = tf.train.get_or_create_global_step()
    weights = tf.get_variable("layer/weights", initializer=[1.0, 2.0])
    gradient = tf.py_func(gradient_of_step, [global_step.read_value()], tf.float32)
    gradient.set_shape([2])
    optimizer = cifar10.make_optimizer(cifar10.decayed_learning_rate(global_step, 8))
    return cifar10.update_variables(optimizer, [(gradient, weights)], global_step)


@pytest.mark.parametrize("bad", [[math.nan, 0], [math.inf, -math.inf], [0, -math.inf]])
def test_a_gradient_that_is_not_finite_ends_training_before_it_is_saved(tmp_path, bad):
    train_op = make_update(lambda step: np.float32(bad if step == 3 else [1, 1]))
    with pytest.raises(
        UserError,
        match="gradients/layer/weights is .* at step 3, where the learning rate is 0.1; the step",
    ):
        run(train_op, tmp_path, max_steps=9, save_checkpoint_steps=1)
    assert step_of(tmp_path) == 3
    newest = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(tmp_path)))
    for name in ("layer/weights", "layer/weights/ExponentialMovingAverage"):
        assert np.isfinite(newest.get_tensor(name)).all()


def test_a_variable_that_is_not_finite_is_not_saved(tmp_path):
    global_step = tf.train.get_or_create_global_step()
    statistics = tf.get_variable("layer/statistics", initializer=[1e38])
    with tf.control_dependencies([tf.assign(statistics, statistics * 2)]):
        train_op = tf.assign_add(global_step, 1)
    with pytest.raises(
        UserError, match="layer/statistics is not finite after the update at step 1;"
    ):
        run(train_op, tmp_path, max_steps=9, save_checkpoint_steps=1)
    assert step_of(tmp_path) == 1  # 2e38 is a float32 still


def test_a_checkpoint_that_is_not_finite_is_not_trained_on(tmp_path):
    global_step = tf.train.get_or_create_global_step()
    statistics = tf.get_variable("layer/statistics", initializer=[math.nan])
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, str(tmp_path / "model.ckpt"), global_step=4)
    del statistics
    with pytest.raises(
        UserError, match="layer/statistics is not finite in the checkpoint of step 0; name another"
    ):
        run(tf.assign_add(global_step, 1), tmp_path, max_steps=9)


def test_a_histogram_of_what_is_not_finite_ends_training_in_one_line(tmp_path):
    global_step = tf.train.get_or_create_global_step()
    cifar10_summaries.histogram("activations/conv1", tf.fill([2], math.nan))
    with pytest.raises(UserError, match="^activations/conv1 is not finite at step 0") as error:
        run(tf.assign_add(global_step, 1), tmp_path, max_steps=5)
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


@pytest.mark.parametrize("content", [b"", b"\xff not a checkpoint", b'model_checkpoint_path: "x"'])
def test_training_does_not_start_over_on_top_of_checkpoints(tmp_path, content):
    train(tmp_path, max_steps=3)
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(
        UserError, match="file `checkpoint` in .* is unreadable or names .*go on from .*ckpt-3,"
    ):
        prepare(tmp_path, 5)


def test_training_goes_on_from_a_first_checkpoint_that_was_not_named_yet(tmp_path, capsys):
    train(tmp_path, max_steps=3)
    capsys.readouterr()
    (tmp_path / "checkpoint").unlink()
    (tmp_path / "model.ckpt-7.index").write_bytes(b"")  # without its data: not whole
    assert prepare(tmp_path, 5)
    train(tmp_path, max_steps=5)
    assert step_of(tmp_path) == 5
    assert printed(capsys)[0][0] == 3


def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path):
    train(tmp_path, max_steps=3)
    (tmp_path / "model.ckpt-3.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(UserError, match="model.ckpt-3 cannot be read: Read less bytes") as error:
        prepare(tmp_path, 5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", [None, b"\0\0"])
def test_training_does_not_start_over_on_top_of_damaged_checkpoints(tmp_path, state):
    train(tmp_path, max_steps=3)
    for path in tmp_path.glob("model.ckpt-*.index"):
        path.write_bytes(b"")
    (tmp_path / "checkpoint").unlink()
    if state is not None:
        (tmp_path / "checkpoint").write_bytes(state)
    with pytest.raises(UserError, match="none of the checkpoints in .* can be read; move them"):
        prepare(tmp_path, 2)


def test_training_does_not_start_over_in_a_folder_whose_name_is_a_pattern(tmp_path):
    train_dir = tmp_path / "run[1]"
    train(train_dir, max_steps=3)
    # TensorFlow takes the path for a pattern as well, and so cannot read what it wrote there.
    with pytest.raises(UserError, match="none of the checkpoints in .* can be read"):
        prepare(train_dir, 5)


def test_an_older_checkpoint_is_offered_where_the_newest_is_damaged(tmp_path, capsys):
    train(tmp_path, max_steps=3, save_checkpoint_steps=1)
    (tmp_path / "model.ckpt-3.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"ckpt-3 cannot be read: .*; remove the file `checkpoint` .*from .*ckpt-2$"
    ):
        prepare(tmp_path, 5)
    (tmp_path / "checkpoint").unlink()
    capsys.readouterr()
    assert prepare(tmp_path, 5)
    train(tmp_path, max_steps=5)
    assert step_of(tmp_path) == 5
    assert printed(capsys)[0][0] == 2


def test_a_checkpoint_of_another_model_is_refused_with_the_names_that_differ(tmp_path):
    global_step = tf.train.get_or_create_global_step()
    tf.get_variable("same", initializer=[1.0])
    tf.get_variable("wider", initializer=[1.0, 2.0])
    run(tf.assign_add(global_step, 1), tmp_path, max_steps=2)
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()
        tf.get_variable("same", initializer=[1.0])
        tf.get_variable("wider", initializer=[1.0, 2.0, 3.0])
        tf.get_variable("another", initializer=1.0)
        with pytest.raises(
            UserError,
            match=r"of another model: in it wider is \[2\], not \[3\], another is missing; name",
        ) as error:
            run(tf.assign_add(global_step, 1), tmp_path, max_steps=4)
    assert "\n" not in str(error.value)
    assert step_of(tmp_path) == 2


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
    with pytest.raises(UserError, match="the input has ended at step 2 of --max_steps=100"):
        run(train_op, tmp_path, max_steps=100)
    assert step_of(tmp_path) == 2


def test_an_input_thread_that_fails_is_the_error_that_is_shown(tmp_path):
    def fail():
        raise ValueError("the reader has failed")

    queue = tf.FIFOQueue(10, tf.float32, shapes=[[]])
    enqueue = queue.enqueue(tf.py_func(fail, [], tf.float32))
    tf.train.add_queue_runner(tf.train.QueueRunner(queue, [enqueue] * 2))
    with tf.control_dependencies([queue.dequeue()]):
        train_op = tf.assign_add(tf.train.get_or_create_global_step(), 1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="the reader has failed"):
        run(train_op, tmp_path, max_steps=100)


def test_an_input_that_goes_bad_ends_training_also_while_it_is_waited_for(tmp_path):
    def check_input():
        raise DataError("the data has gone")

    queue = tf.FIFOQueue(2000, tf.float32, shapes=[[]])
    slow = tf.py_func(lambda: time.sleep(0.1) or np.float32(1), [], tf.float32)
    tf.train.add_queue_runner(tf.train.QueueRunner(queue, [queue.enqueue(slow)]))
    with tf.control_dependencies([queue.dequeue_many(1000)]):
        train_op = tf.assign_add(tf.train.get_or_create_global_step(), 1)
    with pytest.raises(DataError, match="the data has gone"):
        run(train_op, tmp_path, max_steps=100, check_input=check_input)


def test_checkpoints_come_as_often_as_asked_and_as_many_are_kept(tmp_path):
    train(tmp_path, max_steps=9, save_checkpoint_steps=2, max_checkpoints_to_keep=2)
    steps = sorted(path.name for path in tmp_path.glob("model.ckpt-*.index"))
    assert steps == ["model.ckpt-8.index", "model.ckpt-9.index"]


@pytest.mark.parametrize(("seconds", "is_saved_between"), [(1, True), (600, False)])
def test_checkpoints_come_after_as_many_seconds_as_asked(tmp_path, seconds, is_saved_between):
    train(tmp_path, max_steps=8, seconds_per_step=0.3, save_checkpoint_secs=seconds)
    steps = {int(path.stem.split("-")[1]) for path in tmp_path.glob("model.ckpt-*.index")}
    assert {0, 8} <= steps
    assert bool(steps - {0, 8}) is is_saved_between


def test_summaries_are_of_the_batch_that_is_trained_on(tmp_path):
    # As many batches as steps: one more, for a summary, would be the end of the input.
    queue = tf.FIFOQueue(20, tf.float32, [])
    batch = queue.dequeue()
    tf.summary.scalar("batch", batch)
    fill = tf.group(queue.enqueue_many(tf.range(20.0)))
    close = tf.train.QueueRunner(queue, [fill])
    tf.train.add_queue_runner(close)
    global_step = tf.train.get_or_create_global_step()
    with tf.control_dependencies([batch]):
        train_op = tf.assign_add(global_step, 1)
    cifar10_session.run_training(
        train_op,
        batch,
        8,
        str(tmp_path),
        20,
        10,
        session_config(),
        save_summaries_steps=3,
    )
    found = [(step, value) for step, tag, value in recorded(tmp_path) if tag == "batch"]
    assert found == [(step, step) for step in range(0, 20, 3)]


def test_summaries_of_steps_that_are_trained_again_replace_the_first_ones(tmp_path):
    train(tmp_path, max_steps=4)
    train(tmp_path, max_steps=6)
    starts = [
        event.step
        for path in sorted(tmp_path.glob("events.out.tfevents.*"))
        for event in tf.train.summary_iterator(str(path))
        if event.session_log.status == tf.SessionLog.START
    ]
    assert starts == [0, 4]


def recorded(train_dir):
    """Returns (step, tag, value) of each scalar in the event files."""
    return [
        (event.step, value.tag, value.simple_value)
        for path in train_dir.glob("events.out.tfevents.*")
        for event in tf.train.summary_iterator(str(path))
        for value in event.summary.value
    ]


def test_summaries_come_as_often_as_asked_with_the_speed_in_examples(tmp_path):
    global_step = tf.train.get_or_create_global_step()
    tf.summary.scalar("of_the_graph", 7.0)
    slow = tf.py_func(lambda: time.sleep(0.05) or np.float32(0), [], tf.float32)
    with tf.control_dependencies([slow]):
        train_op = tf.assign_add(global_step, 1)
    run(train_op, tmp_path, max_steps=9, save_summaries_steps=4)
    found = recorded(tmp_path)
    assert [step for step, tag, _ in found if tag == "of_the_graph"] == [0, 4, 8]
    speeds = [value for _, tag, value in found if tag == "examples_per_sec"]
    assert len(speeds) == 2
    assert all(0 < speed < 8 / 0.05 for speed in speeds)
    assert {tag for _, tag, _ in found} == {"of_the_graph", "examples_per_sec"}


def test_no_summaries_are_written_where_none_are_wanted(tmp_path):
    global_step = tf.train.get_or_create_global_step()
    tf.summary.scalar("of_the_graph", 7.0)
    run(tf.assign_add(global_step, 1), tmp_path, max_steps=9, save_summaries_steps=0)
    assert recorded(tmp_path) == []


def test_a_second_trainer_is_refused_and_told_who_the_first_is(tmp_path):
    with (
        cifar10_session.prepare_train_dir(str(tmp_path), 5),
        pytest.raises(UserError, match=f"another trainer is at work .*: process {os.getpid()} on"),
    ):
        prepare(tmp_path, 5)
    assert prepare(tmp_path, 5)  # the lock has ended


def test_steps_remain_until_a_checkpoint_has_reached_max_steps(tmp_path, capsys):
    train_dir = tmp_path / "new" / "folder"
    assert prepare(train_dir, 5)
    assert train_dir.is_dir()
    train(train_dir, max_steps=5)
    assert prepare(train_dir, 6)
    assert capsys.readouterr().err == ""
    assert not prepare(train_dir, 5)
    assert "has reached step 5 of --max_steps=5: nothing to do" in capsys.readouterr().err


def test_a_train_dir_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot use --train_dir=") as error:
        prepare(tmp_path / "file", 5)
    assert "\n" not in str(error.value)
