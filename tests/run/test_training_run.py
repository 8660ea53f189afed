"""Tests of the training session, with small graphs whose losses and gradients are given."""

import contextlib
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, read_events, written_values

from support.base.errors import CheckpointError, DataError, Interrupted, UserError
from support.base.worker import ALONE, Worker
from support.data.settings import TrainingSettings
from support.ops import graph_notes, summaries
from support.ops.tensorflow_v1 import GPUS, tf
from support.run import checkpoints, training_run

pytestmark = pytest.mark.usefixtures("graph")

SETTINGS = TrainingSettings(("cat", "dog"), 100, examples_per_step=8)
LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: step (\d+), loss = (\S+) "
    r"\((\d+\.\d) examples/sec; (\d+\.\d{3}) sec/batch\)"
)


def make_run(train_dir, max_steps, settings=SETTINGS, worker=ALONE, **options):
    """Returns a `TrainingRun`. `options` are fields of `Options`."""
    options = training_run.Options(str(train_dir), max_steps, **options)
    return training_run.TrainingRun(options, settings, worker)


def run(train_op, train_dir, max_steps, loss=None, hooks=(), **arguments):
    """Trains in the default graph, on a loss of 1 by default; returns the number of steps.

    `arguments` are those of `make_run`.
    """
    with make_run(train_dir, max_steps, **arguments) as training:
        return run_loop(training, train_op, loss, hooks)


def run_loop(training, train_op, loss=None, hooks=()):
    """Trains in the default graph with a `TrainingRun`; returns the number of steps."""
    steps = 0
    with training.session(tf.constant(1.0) if loss is None else loss, hooks) as sess:
        while not sess.should_stop():
            sess.run(train_op)
            steps += 1
    return steps


def count_step(*inputs):
    """Returns a train operation that evaluates `inputs` and counts the step."""
    global_step = tf.train.get_or_create_global_step()
    with tf.control_dependencies(inputs):
        return tf.assign_add(global_step, 1)


def train(train_dir, max_steps, losses=None, before_step=lambda step: None, **arguments):
    """Trains in a new graph; returns the number of steps.

    The loss of step n is 100 + n, or what `losses` gives for n. `before_step` is called with n.
    """
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()

        def loss_of_step(step):
            before_step(step)
            return float((losses or {}).get(step, 100 + step))

        loss = tf.py_func(loss_of_step, [global_step.read_value()], tf.double, stateful=True)
        loss.set_shape([])
        return run(count_step(loss), train_dir, max_steps, loss, **arguments)


def has_steps_left(train_dir, max_steps, settings=SETTINGS, **arguments):
    with make_run(train_dir, max_steps, settings, **arguments) as training:
        return training.has_steps_left()


def saved_step(train_dir):
    newest = tf.train.latest_checkpoint(str(train_dir))
    return tf.train.load_checkpoint(newest).get_tensor("global_step")


def saved_steps(train_dir):
    return {int(path.stem.partition("-")[2]) for path in train_dir.glob("model.ckpt-*.index")}


def printed(capsys):
    """Returns (step, loss, examples per second, seconds per batch) of each line of progress."""
    lines = capsys.readouterr().out.splitlines()
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), lines
    return [(int(m[1]), float(m[2]), float(m[3]), float(m[4])) for m in matches]


# --- Lines of progress and metrics.


def test_every_log_frequency_steps_a_line_and_a_json_object_describe_the_step(tmp_path, capsys):
    graph_notes.record_learning_rate(tf.constant(0.125))
    step = tf.train.get_or_create_global_step()
    loss = 100.0 + tf.cast(step.read_value(), tf.float32)
    run(count_step(loss), tmp_path, max_steps=12, loss=loss, log_frequency=5)
    lines = printed(capsys)
    assert [(step, loss) for step, loss, *_ in lines] == [(0, 100), (5, 105), (10, 110)]
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [
        (each["step"], each["loss"], f"{each['examples_per_sec']:.1f}") for each in metrics
    ] == [(step, loss, f"{speed:.1f}") for step, loss, speed, _ in lines]
    assert all(each["learning_rate"] == 0.125 for each in metrics)
    assert all(each["sec_per_batch"] > 0 for each in metrics)
    assert all(abs(each["time"] - time.time()) < 60 for each in metrics)


def test_updates_that_accumulate_gradients_count_as_one_step_with_one_line(tmp_path, capsys):
    counter = tf.get_variable("accumulated", initializer=0, trainable=False)
    global_step = tf.train.get_or_create_global_step()
    with tf.control_dependencies([tf.assign_add(counter, 1)]):
        is_complete = tf.equal(counter.read_value() % 3, 0)
        train_op = tf.assign_add(global_step, tf.cast(is_complete, tf.int64))
    assert run(train_op, tmp_path, max_steps=4, log_frequency=1) == 12
    assert [step for step, *_ in printed(capsys)] == [0, 1, 2, 3]
    assert saved_step(tmp_path) == 4


def test_the_throughput_is_that_of_the_steps_since_the_last_line_or_summary(tmp_path, capsys):
    train(
        tmp_path,
        max_steps=5,
        before_step=lambda step: time.sleep(0.2),
        log_frequency=4,
        save_summaries_steps=2,
    )
    (_, _, first_speed, first_seconds), (_, _, speed, seconds) = printed(capsys)
    assert first_seconds >= 0.2
    assert first_speed == pytest.approx(8 / first_seconds, rel=0.05)
    assert 0.2 <= seconds < 0.8  # not the 0.8 of the four steps together
    assert speed == pytest.approx(8 / seconds, rel=0.05)
    written = written_values(tmp_path)  # none for the first step
    assert [(step, tag) for step, tag, _ in written] == [(n, "examples_per_sec") for n in (2, 4)]
    assert all(0 < value < 8 / 0.2 for _, _, value in written)


# --- Steps, checkpoints and resuming.


def test_a_run_resumes_from_the_newest_checkpoint_and_keeps_all_other_files(tmp_path, capsys):
    train(tmp_path, max_steps=7)
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert train(tmp_path, max_steps=12) == 5
    assert saved_step(tmp_path) == 12
    # The first step of a run has a line, because its time includes filling the queue.
    assert [line[:2] for line in printed(capsys)] == [(7, 107), (10, 110)]
    assert {path.name for path in tmp_path.iterdir()} >= before
    assert foreign.read_text() == "mine"


def test_checkpoints_are_saved_and_kept_as_the_options_say(tmp_path):
    # By itself, TensorFlow keeps 5.
    train(tmp_path, max_steps=16, save_checkpoint_steps=2, max_checkpoints_to_keep=7)
    assert saved_steps(tmp_path) == {4, 6, 8, 10, 12, 14, 16}
    train(tmp_path, max_steps=18, save_checkpoint_steps=1, max_checkpoints_to_keep=2)
    assert saved_steps(tmp_path) == {17, 18}


def test_checkpoints_are_saved_on_time_even_if_the_clock_is_set_back(tmp_path, monkeypatch):
    now = time.time()

    def set_back(step):
        time.sleep(0.3)
        monkeypatch.setattr(time, "time", lambda: now - 3600.0)

    train(tmp_path, max_steps=8, before_step=set_back, save_checkpoint_secs=1)
    assert {0, 8} < saved_steps(tmp_path)


def test_a_step_from_which_training_resumes_is_not_saved_again(tmp_path):
    train(tmp_path, max_steps=3)
    before = checkpoint_files_in(tmp_path)
    changed = SETTINGS._replace(examples_per_epoch=45, random_flip=False)
    train(tmp_path, max_steps=5, settings=changed)
    after = checkpoint_files_in(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"checkpoint"}
    random_flips = [
        checkpoints.read(str(tmp_path / f"model.ckpt-{step}")).settings.random_flip
        for step in (0, 3, 5)
    ]
    assert random_flips == [True, True, False]


def test_a_run_resumes_from_a_checkpoint_without_settings(tmp_path):
    train(tmp_path, max_steps=3)
    (tmp_path / "model.ckpt-3.meta").unlink()
    with make_run(tmp_path, 5) as training, training.graph():
        assert training.has_steps_left()
        assert run_loop(training, count_step()) == 2


@pytest.mark.parametrize("step", [0, 3])
def test_a_resumed_run_without_a_finished_step_saves_nothing(tmp_path, step):
    train(tmp_path, max_steps=3)
    tf.train.update_checkpoint_state(str(tmp_path), f"model.ckpt-{step}")
    before = checkpoint_files_in(tmp_path)
    changed = SETTINGS._replace(random_flip=False)
    assert train(tmp_path, max_steps=step, settings=changed) == 0
    queue = tf.train.string_input_producer(["a"], num_epochs=1)
    two = queue.dequeue_many(2)  # the input ends within the first step
    with pytest.raises(UserError, match=f"^the input has ended at step {step} "):
        run(count_step(two), tmp_path, max_steps=9, settings=changed)
    assert checkpoint_files_in(tmp_path) == before


@pytest.mark.parametrize(("name", "matched"), [("a b", "a"), ("käse猫", "käse"), ("{x},~", "x")])
def test_training_touches_only_its_own_folder_whatever_its_name(tmp_path, name, matched):
    train(tmp_path / matched, max_steps=3, save_checkpoint_steps=1)
    before = checkpoint_files_in(tmp_path / matched)
    for max_steps, steps in ((3, 3), (5, 2)):
        options = {"save_checkpoint_steps": 1, "max_checkpoints_to_keep": 2}
        assert train(tmp_path / name, max_steps, **options) == steps
    assert saved_steps(tmp_path / name) == {4, 5}
    assert list((tmp_path / name).glob("events.out.tfevents.*"))
    assert checkpoint_files_in(tmp_path / matched) == before


def checkpoint_files_in(folder):
    paths = [folder / "checkpoint", *folder.glob("model.ckpt*")]
    return {path.name: path.read_bytes() for path in paths}


def test_a_train_dir_can_be_moved(tmp_path):
    train(tmp_path / "before", max_steps=3)
    (tmp_path / "before").rename(tmp_path / "after")
    assert train(tmp_path / "after", max_steps=5) == 2
    assert saved_step(tmp_path / "after") == 5
    assert not (tmp_path / "before").exists()


# --- Checkpoints that cannot be resumed.


def test_training_never_starts_again_on_top_of_existing_checkpoints(tmp_path):
    train(tmp_path, max_steps=3)
    (tmp_path / "checkpoint").write_bytes(b"\xff not a checkpoint")
    before = checkpoint_files_in(tmp_path)
    for start in (has_steps_left, train):
        with pytest.raises(UserError, match="^the file `checkpoint` in .* is unreadable or names"):
            start(tmp_path, 5)
    assert checkpoint_files_in(tmp_path) == before


def test_a_checkpoint_that_is_damaged_while_the_graph_is_built_is_a_one_line_error(tmp_path):
    train(tmp_path, max_steps=3)
    with make_run(tmp_path, 5) as training:
        (tmp_path / "model.ckpt-3.data-00000-of-00001").write_bytes(b"")
        # A dot matches no newline.
        with pytest.raises(UserError, match="^cannot start in --train_dir=.*: .*; choose .*$"):
            run_loop(training, count_step())


def test_a_checkpoint_of_another_model_is_refused_before_the_start_is_recorded(tmp_path):
    tf.get_variable("layer", initializer=[1.0, 2.0])
    run(count_step(), tmp_path, max_steps=2)
    with tf.Graph().as_default():
        tf.get_variable("layer", initializer=[1.0, 2.0, 3.0])
        message = r"in it, layer is float32 \[2\], not float32 \[3\]; .* with --train_dir$"
        with pytest.raises(UserError, match=message):
            run(count_step(), tmp_path, max_steps=4)
    assert saved_step(tmp_path) == 2
    assert len(json.loads((tmp_path / "run.json").read_text())) == 1
    assert len(list(tmp_path.glob("events*"))) == 1


def test_training_does_not_resume_with_another_model_and_warns_of_other_examples_or_flips(
    tmp_path, warnings
):
    train(tmp_path, max_steps=3)
    other_model = SETTINGS._replace(crop_size=22)
    with pytest.raises(UserError, match="was trained with --crop_size=24, .* --train_dir$"):
        has_steps_left(tmp_path, 5, other_model)
    assert not has_steps_left(tmp_path, 3, other_model)  # then there is nothing to resume
    assert warnings == []
    assert has_steps_left(tmp_path, 5, SETTINGS._replace(examples_per_epoch=45, random_flip=False))
    newest = tmp_path / "model.ckpt-3"
    assert warnings == [
        f"Resuming from {newest}: an epoch now has 45 images instead of 100.",
        f"Resuming from {newest}: --random_flip is now false instead of true.",
    ]


def test_steps_are_left_until_a_checkpoint_has_reached_max_steps(tmp_path, capsys):
    train_dir = tmp_path / "new" / "folder"
    assert has_steps_left(train_dir, 5)
    assert train_dir.is_dir()
    train(train_dir, max_steps=5)
    assert has_steps_left(train_dir, 6)
    assert capsys.readouterr().err == ""
    for max_steps in (5, 4):
        assert not has_steps_left(train_dir, max_steps)
        assert capsys.readouterr().err == (
            f"{train_dir}/model.ckpt-5 has reached step 5 of --max_steps={max_steps}: nothing to "
            "do\n"
        )


def test_an_unusable_train_dir_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="^cannot use --train_dir=.*file: .*$"):
        has_steps_left(tmp_path / "file", 5)


# --- The lock.


def test_a_second_trainer_is_refused_with_a_description_of_the_first(tmp_path):
    with make_run(tmp_path, 1) as training, training.graph():
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(
            UserError,
            match=f"^another process is training in --train_dir={tmp_path}: process {os.getpid()} "
            "on .*; wait until it has finished, or choose another folder$",
        ):
            train(tmp_path, max_steps=9)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert run_loop(training, count_step()) == 1
    assert saved_step(tmp_path) == 1


def test_a_signal_while_the_graph_is_built_releases_the_lock(tmp_path):
    training = make_run(tmp_path, 5)
    with pytest.raises(Interrupted), training, training.graph():
        raise Interrupted(signal.SIGTERM)
    assert os.listdir(tmp_path) == []


# --- The record of each start.


def test_each_start_of_training_is_recorded_after_the_earlier_ones(tmp_path):
    for max_steps, seed in ((2, 7), (3, None), (4, 7)):
        flags = {"batch_size": 4, "seed": seed}
        with make_run(tmp_path, max_steps, flags=flags) as training, training.graph(seed):
            run_loop(training, count_step())
    first, second, third = json.loads((tmp_path / "run.json").read_text())
    assert [start["seed"] for start in (first, third)] == [7, 7]
    assert 0 <= second.pop("seed") < 2**31
    assert abs(second.pop("time") - time.time()) < 60
    assert isinstance(second.pop("processor"), str)
    commit = second.pop("commit") or ""
    assert second == {
        "script": os.path.basename(sys.argv[0]),
        "flags": {"batch_size": 4, "seed": None},
        "class_names": ["cat", "dog"],
        "examples_per_epoch": 100,
        "python": platform.python_version(),
        "tensorflow": tf.version.VERSION,
        "processors": os.cpu_count(),
        "gpus": [None] * len(GPUS),
    }
    process = subprocess.run(
        ["git", "--git-dir=.git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    found = process.stdout.strip() if process.returncode == 0 else ""
    assert commit.removesuffix("-dirty") == found


def test_the_commit_is_not_that_of_a_repository_around_the_project(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "around"], check=True)
    (tmp_path / "project").mkdir()
    assert training_run._find_commit(tmp_path) is not None
    assert training_run._find_commit(tmp_path / "project") is None


@pytest.mark.parametrize("content", ["{}", ""])
def test_a_run_file_that_is_not_a_list_of_starts_is_not_overwritten(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="run.json .*; move it away$"):
        train(tmp_path, max_steps=3)
    assert (tmp_path / "run.json").read_text() == content
    assert not (tmp_path / "checkpoint").exists()


# --- Values that are not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_training_before_it_is_saved(tmp_path, value):
    with pytest.raises(
        UserError,
        match=f"^PyFunc is {value} at step 3; the step is not saved: run the same command again "
        ".*; if it happens again, use a smaller --initial_learning_rate$",
    ):
        train(tmp_path, max_steps=9, losses={3: value}, save_checkpoint_steps=1)
    assert saved_step(tmp_path) == 3  # after the steps 0, 1 and 2


def test_a_variable_that_is_not_finite_is_not_saved(tmp_path):
    statistics = tf.get_variable("layer/statistics", initializer=[1e38])
    train_op = count_step(tf.assign(statistics, statistics * 2))
    with pytest.raises(
        UserError, match="^layer/statistics is not finite after the update at step 1;"
    ):
        run(train_op, tmp_path, max_steps=9, save_checkpoint_steps=1)
    assert saved_step(tmp_path) == 1  # float32 can hold 2e38


def test_an_initial_value_that_is_not_finite_is_not_saved(tmp_path):
    tf.get_variable("layer/statistics", initializer=[math.nan])
    message = "^layer/statistics is not finite at the start; check its initial value$"
    with pytest.raises(UserError, match=message):
        run(count_step(), tmp_path, max_steps=9)
    assert not saved_steps(tmp_path)


def test_a_histogram_of_values_that_are_not_finite_stops_training_with_one_line(tmp_path):
    summaries.histogram("activations/conv1", tf.fill([2], math.nan))
    with pytest.raises(UserError, match="^activations/conv1 is not finite at step 0") as caught:
        run(count_step(), tmp_path, max_steps=5)
    assert "\n" not in str(caught.value)


# --- An early end, and hooks.


def test_leaving_the_loop_early_is_an_ordinary_end_that_saves_the_last_step(tmp_path, capsys):
    with make_run(tmp_path, 100) as training:
        count = count_step()
        with training.session(tf.constant(1.0)) as sess:
            while not sess.should_stop():
                if sess.run(count) == 4:
                    break
    assert saved_step(tmp_path) == 4
    assert [step for step, *_ in printed(capsys)] == [0]
    assert train(tmp_path, max_steps=6) == 2


def test_a_hook_of_the_user_may_change_variables_and_create_ones_that_are_saved(tmp_path):
    class Count(tf.train.SessionRunHook):
        def begin(self):
            self._count = tf.get_variable("count", initializer=0, trainable=False)
            self._add = tf.assign_add(self._count, 1)

        def after_create_session(self, session, coord):
            session.run(self._add)

        def after_run(self, run_context, run_values):
            run_context.session.run(self._add)

    def saved_count(step):
        return tf.train.load_checkpoint(str(tmp_path / f"model.ckpt-{step}")).get_tensor("count")

    for max_steps in (3, 5):
        with tf.Graph().as_default():
            run(count_step(), tmp_path, max_steps, hooks=[Count()])
    assert [saved_count(step) for step in (0, 3, 5)] == [1, 4, 7]


def test_a_hook_that_creates_a_variable_is_refused_if_the_checkpoint_lacks_it(tmp_path):
    class Create(tf.train.SessionRunHook):
        def begin(self):
            tf.get_variable("mine", initializer=0, trainable=False)

    run(count_step(), tmp_path, max_steps=1)
    with tf.Graph().as_default(), pytest.raises(CheckpointError, match="in it, mine is missing"):
        run(count_step(), tmp_path, max_steps=2, hooks=[Create()])


@pytest.mark.parametrize("kind", [ZeroDivisionError, tf.errors.OutOfRangeError])
def test_the_last_step_is_saved_before_a_hook_of_the_user_fails_at_the_end(tmp_path, kind):
    class Fail(tf.train.SessionRunHook):
        def end(self, session):
            raise kind(None, None, "the end") if kind is tf.errors.OutOfRangeError else kind

    with pytest.raises(kind):
        run(count_step(), tmp_path, max_steps=3, hooks=[Fail()])
    assert saved_step(tmp_path) == 3


def test_a_hook_of_the_user_runs_and_may_end_training(tmp_path):
    hooks = [
        tf.train.StopAtStepHook(last_step=4),
        tf.train.CheckpointSaverHook(str(tmp_path / "other"), save_steps=2),
        tf.train.NanTensorHook(tf.constant(1.0)),
    ]
    assert run(count_step(), tmp_path / "train", max_steps=100, hooks=hooks) == 4
    tf.summary.FileWriterCache.clear()
    assert saved_step(tmp_path / "train") == 4
    assert saved_step(tmp_path / "other") == 4


# --- The input.


def test_an_input_that_ends_early_is_an_error(tmp_path):
    files = tf.train.string_input_producer(["a", "b"], num_epochs=1)
    with pytest.raises(
        UserError,
        match="^the input has ended at step 2 of --max_steps=100; .*ckpt-2 is the newest "
        "checkpoint$",
    ):
        run(count_step(files.dequeue()), tmp_path, max_steps=100)
    assert saved_step(tmp_path) == 2


def test_the_error_of_an_input_thread_is_raised(tmp_path):
    def fail():
        raise ValueError("the reader has failed")

    queue = tf.FIFOQueue(10, tf.float32, shapes=[[]])
    enqueue = queue.enqueue(tf.py_func(fail, [], tf.float32))
    tf.train.add_queue_runner(tf.train.QueueRunner(queue, [enqueue] * 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match="the reader has failed"):
        run(count_step(queue.dequeue()), tmp_path, max_steps=100)


def make_slow_queue(min_after_dequeue=0):
    """Returns a queue that receives ten examples per second."""
    queue = tf.RandomShuffleQueue(2000, min_after_dequeue, tf.float32, shapes=[[]])
    slow = tf.py_func(lambda: time.sleep(0.1) or np.float32(1), [], tf.float32)
    tf.train.add_queue_runner(tf.train.QueueRunner(queue, [queue.enqueue(slow)]))
    return queue


@pytest.mark.parametrize("fails", [False, True])
def test_an_input_that_becomes_unusable_ends_a_step_that_waits_and_explains_one_that_fails(
    tmp_path, fails
):
    has_failed = threading.Event()

    def fail():
        has_failed.set()
        raise ValueError("a record makes no sense")

    def check_input():
        if has_failed.is_set() or not fails:
            raise DataError("the records have gone")

    batch = tf.py_func(fail, [], tf.float32) if fails else make_slow_queue().dequeue_many(1000)
    with pytest.raises(DataError, match="^the records have gone$"):
        run(count_step(batch), tmp_path, max_steps=100, check_input=check_input)


def test_running_out_of_memory_is_a_one_line_error(tmp_path):
    def fail():
        raise MemoryError("OOM when allocating tensor with shape[1024]")

    with pytest.raises(UserError, match="^out of memory .*; use a smaller --batch_size") as caught:
        run(count_step(tf.py_func(fail, [], tf.float32)), tmp_path, max_steps=100)
    assert "\n" not in str(caught.value)


def test_the_filling_queue_is_shown_until_the_first_step_has_its_batch(
    tmp_path, capsys, monkeypatch
):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    queue = make_slow_queue(min_after_dequeue=16)
    graph_notes.watch_queue(queue.size(), min_size=17)
    run(count_step(queue.dequeue()), tmp_path, max_steps=1)
    levels = [int(n) for n in re.findall(r"Filling queue: .*? (\d+)/17 ", terminal.getvalue())]
    assert levels == sorted(levels)
    assert 8 < levels[-1] <= 17
    assert re.search(r"\r +\r$", terminal.getvalue())  # the bar is erased
    assert [step for step, *_ in printed(capsys)] == [0]


# --- Summaries.


def test_summaries_describe_the_batch_of_their_step(tmp_path):
    # There are as many batches as steps: another one for the summaries would end the input.
    queue = tf.FIFOQueue(20, tf.float32, [])
    batch = queue.dequeue()
    tf.summary.scalar("batch", batch)
    fill = tf.group(queue.enqueue_many(tf.range(20.0)))
    tf.train.add_queue_runner(tf.train.QueueRunner(queue, [fill]))
    run(count_step(batch), tmp_path, max_steps=20, loss=batch, save_summaries_steps=3)
    found = [(step, value) for step, tag, value in written_values(tmp_path) if tag == "batch"]
    assert found == [(step, step) for step in range(0, 20, 3)]


def test_summaries_of_a_resumed_run_replace_those_of_its_steps(tmp_path):
    for max_steps in (3, 5):
        with tf.Graph().as_default():
            tf.summary.histogram("histogram", [1.0, 2.0])
            run(count_step(), tmp_path, max_steps=max_steps)
    start = tf.SessionLog.START
    starts = [e.step for e in read_events(tmp_path) if e.session_log.status == start]
    assert starts == [0, 3]
    assert [step for step, tag, _ in written_values(tmp_path) if tag == "histogram"] == [0, 3]


@pytest.mark.parametrize(
    ("options", "scalar_steps", "histogram_steps"),
    [
        ({"save_histograms_steps": 0}, range(10), []),
        ({"save_summaries_steps": 3, "save_histograms_steps": 4}, [0, 3, 6, 9], [0, 4, 8]),
        ({"save_summaries_steps": 0, "save_histograms_steps": 4}, [], []),
    ],
)
def test_scalars_have_another_interval_than_histograms_and_images(
    tmp_path, options, scalar_steps, histogram_steps
):
    tf.summary.scalar("scalar", 7.0)
    tf.summary.histogram("histogram", [1.0, 2.0])
    summaries.image_sheet("image", tf.zeros([2, 4, 4, 3]))
    run(count_step(), tmp_path, max_steps=10, **{"save_summaries_steps": 1} | options)
    found = {"scalar": [], "histogram": [], "image": [], "examples_per_sec": []}
    for step, tag, _ in written_values(tmp_path):
        found[tag].append(step)
    assert found["scalar"] == list(scalar_steps)
    assert found["histogram"] == found["image"] == histogram_steps
    assert found["examples_per_sec"] == list(scalar_steps)[1:]


def test_summaries_that_cannot_be_written_end_training_with_one_line(tmp_path, monkeypatch):
    write = tf.io.TFRecordWriter.write
    written = []

    def fail_later(writer, record):
        written.append(record)
        if len(written) > 4:  # the session would take this error for the end of the input
            raise tf.errors.OutOfRangeError(None, None, "events; File too large")
        write(writer, record)

    monkeypatch.setattr(tf.io.TFRecordWriter, "write", fail_later)
    with pytest.raises(UserError, match="^cannot write to --train_dir=.*: events; File too large"):
        train(tmp_path, max_steps=9, save_summaries_steps=1)
    assert len(written) == 5


# --- Signals.


@pytest.fixture
def signals():
    """Sends signals to this process. One that the session does not handle fails the test."""

    def fail(number, frame):
        raise AssertionError(f"signal {number} was not deferred")

    numbers = (signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, fail) for number in numbers}
    yield lambda number: os.kill(os.getpid(), number)
    assert all(signal.getsignal(number) is fail for number in numbers)
    for number, handler in previous.items():
        signal.signal(number, handler)


def send_at_step(signals, step):
    """Returns a function of a step that sends a signal in one step, which then goes on."""

    def send(current):
        if current == step:
            signals(signal.SIGUSR1)
            time.sleep(0.5)

    return send


def test_a_signal_at_the_last_step_does_not_interrupt_the_run(tmp_path, signals):
    assert train(tmp_path, max_steps=5, before_step=send_at_step(signals, 4)) == 5
    assert saved_step(tmp_path) == 5


def test_a_signal_stops_a_first_step_that_waits_for_its_input(tmp_path, signals):
    train_op = count_step(make_slow_queue().dequeue_many(1000))
    timer = threading.Timer(1.0, signals, [signal.SIGINT])
    timer.start()
    start = time.monotonic()
    with pytest.raises(Interrupted, match=r"^step 0 is saved in .*ckpt-0; run the same command"):
        run(train_op, tmp_path, max_steps=100)
    assert time.monotonic() - start < 10
    timer.join()


@pytest.mark.slow
def test_a_signal_stops_a_later_step_that_waits_for_its_input_within_half_a_minute(
    tmp_path, signals
):
    def send_after_the_first_step():
        while not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(1.0)  # until the next step waits
        signals(signal.SIGINT)

    queue = make_slow_queue()
    is_first = tf.equal(tf.train.get_or_create_global_step(), 0)
    batch = tf.cond(is_first, lambda: tf.zeros([1000]), lambda: queue.dequeue_many(1000))
    thread = threading.Thread(target=send_after_the_first_step)
    thread.start()
    start = time.monotonic()
    with pytest.raises(Interrupted, match=r"^step 1 is saved in .*ckpt-1; run the same command"):
        run(count_step(batch), tmp_path, max_steps=100)
    assert 10 < time.monotonic() - start < 30
    thread.join()
    assert saved_step(tmp_path) == 1


# --- Seeds.


def draw(folder, seed=None, worker=ALONE):
    """Returns random numbers from the graph of a run."""
    run = make_run(folder, 5, worker=worker)
    with run, run.graph(seed), tf.Session() as sess:
        return tuple(sess.run([tf.random.uniform([]), tf.random.normal([])]))


def make_worker(index, step=0, **attributes):
    """Returns a worker that is not the chief of its cluster."""
    defaults = {
        "index": index,
        "is_chief": False,
        "read_global_step": lambda: step,
        "release": lambda session: session.close(),
        "explain_end": lambda: "the chief has stopped training",
    }
    worker = Worker()
    for name, value in (defaults | attributes).items():
        setattr(worker, name, value)
    return worker


def test_random_numbers_depend_on_the_seed_the_start_and_the_worker(tmp_path):
    draws = [
        draw(tmp_path, 5),
        draw(tmp_path, 6),
        draw(tmp_path),
        draw(tmp_path),
        draw(tmp_path, 5, make_worker(2)),
        draw(tmp_path, 5, make_worker(1, step=7)),
    ]
    assert draw(tmp_path, 5) == draw(tmp_path, 5, make_worker(0)) == draws[0]
    assert draw(tmp_path, 5, make_worker(1, step=7)) == draws[-1]
    for max_steps in (2, 3):
        train(tmp_path, max_steps)
        draws.append(draw(tmp_path, 5))
        assert draw(tmp_path, 5) == draws[-1]
    assert len({number for numbers in draws for number in numbers}) == 2 * len(draws)


# --- Workers of a cluster.


@pytest.fixture
def server():
    """A server whose variables, here the global step, the chief has initialized to 2."""
    server = tf.train.Server.create_local_server()
    with tf.Graph().as_default(), tf.Session(server.target) as sess:
        step = tf.train.get_or_create_global_step()
        sess.run(step.initializer)
        sess.run(tf.assign(step, 2))
    return server


def test_a_worker_trains_with_the_variables_of_the_chief_and_leaves_train_dir_alone(
    tmp_path, server, capsys
):
    train_dir, config = tmp_path / "train", tf.ConfigProto()
    worker = make_worker(1, target=server.target, device_filters=["/job:ps", "/job:local"])
    assert has_steps_left(train_dir, 5, worker=worker)
    assert train(train_dir, max_steps=5, worker=worker, config=config) == 3
    assert list(config.device_filters) == ["/job:ps", "/job:local"]
    assert [line[:2] for line in printed(capsys)] == [(2, 102)]
    assert not train_dir.exists()


@pytest.mark.parametrize("is_over", [True, False])
def test_a_worker_explains_why_training_ends_unless_the_chief_has_finished(
    tmp_path, server, is_over
):
    files = tf.train.string_input_producer(["a"], num_epochs=1)
    worker = make_worker(1, target=server.target, is_over=is_over)
    with tf.Session(server.target) as sess:
        sess.run(tf.local_variables_initializer())
    message = "^training ended at step 3 of --max_steps=50: the chief has stopped training$"
    end = contextlib.nullcontext() if is_over else pytest.raises(UserError, match=message)
    start = time.monotonic()
    with end:
        assert run(count_step(files.dequeue()), tmp_path, max_steps=50, worker=worker) == 1
    assert time.monotonic() - start < 4  # it does not wait as for a step that does not end


def test_a_signal_tells_a_worker_how_to_rejoin(tmp_path, server, signals):
    worker, send = make_worker(1, target=server.target), send_at_step(signals, 3)
    with pytest.raises(Interrupted, match="^run the same command again to rejoin$"):
        train(tmp_path, max_steps=100, before_step=send, worker=worker)
