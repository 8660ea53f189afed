"""What the tasks of a cluster do and how they end: each task alone, then real processes."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import types

import pytest
from conftest import ROOT, free_addresses, messages, script_environment, write_dataset

import cifar10
import cifar10_train
from support.base.errors import Interrupted, UserError
from support.cluster import launch
from support.cluster.server import is_reachable
from support.cluster.synchronization import DONE, FAILED, READY, SETTINGS, STATE
from support.cluster.task import Task
from support.cluster.training import CHIEF_HAS_STOPPED
from support.data import dataset
from support.data.settings import TrainingSettings, format_settings
from support.ops.tensorflow_v1 import tf

FLAGS = cifar10_train.FLAGS
CLUSTER = {"ps": ["a:1", "b:1"], "chief": ["c:1"], "worker": ["d:1", "e:1"]}


# --- A task alone.


def test_the_script_passes_on_the_timeout_and_the_shard(tmp_path, monkeypatch):
    write_dataset(tmp_path / dataset.EXTRACTED_FOLDER)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.train_dir = str(tmp_path / "train")
    FLAGS.shard_data = True
    FLAGS.cluster_timeout_secs = 7

    def run_worker(task, server, train, settings, timeout, shard_data=False):
        assert timeout == 7
        train(launch.Worker(task, "", [], timeout, shard_data))

    def distorted_inputs(batch_size=None, shard=(0, 1)):
        assert shard == (0, 3)
        raise InterruptedError  # before it builds the model

    monkeypatch.setattr(cifar10_train.server, "start_server", lambda *arguments: None)
    monkeypatch.setattr(launch, "run_worker", run_worker)
    monkeypatch.setattr(cifar10, "distorted_inputs", distorted_inputs)
    with pytest.raises(InterruptedError):
        cifar10_train.train_in_cluster(Task(CLUSTER, "chief", 0))


SETTINGS_OF_CHIEF = TrainingSettings(("cat", "dog"), 100, examples_per_step=8)


class Status:
    """A fake `ChiefStatus`: what the chief has stored on a parameter server."""

    def __init__(self, state=""):
        self.stored = {STATE: state, SETTINGS: format_settings(SETTINGS_OF_CHIEF) if state else ""}

    def write(self, key, value):
        self.stored[key] = value

    def read(self, key, timeout=0):
        return self.stored[key]

    def end(self, state):
        self.write(STATE, state)


@pytest.fixture
def run(monkeypatch):
    """A function that runs a worker, which reads the given statuses from the parameter servers."""

    def run(type_, statuses, train, settings=SETTINGS_OF_CHIEF):
        remaining = list(statuses)
        monkeypatch.setattr(launch, "wait_for_peers", lambda *arguments: None)
        monkeypatch.setattr(launch, "_start_watching", lambda *arguments: None)
        monkeypatch.setattr(launch, "ChiefStatus", lambda *arguments: remaining.pop(0))
        server = types.SimpleNamespace(target="")
        launch.run_worker(Task(CLUSTER, type_, 0), server, train, settings, timeout=60)

    return run


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, DONE), (Interrupted(signal.SIGTERM), FAILED), (UserError("x"), FAILED)],
)
def test_the_chief_stores_its_settings_and_how_it_has_ended(run, error, state):
    statuses = [Status(), Status()]

    def train(worker):
        if error:
            raise error

    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        run("chief", statuses, train)
    assert statuses[0].stored == {STATE: state, SETTINGS: format_settings(SETTINGS_OF_CHIEF)}
    assert statuses[1].read(STATE) == state


def test_a_chief_is_refused_if_another_one_has_used_a_parameter_server(run):
    statuses = [Status(), Status(READY)]  # the first one has been restarted
    with pytest.raises(UserError, match="^the parameter servers have been used by an earlier .*;"):
        run("chief", statuses, lambda worker: pytest.fail("the chief has trained"))
    assert [status.read(STATE) for status in statuses] == [FAILED, FAILED]


@pytest.mark.parametrize(
    ("type_", "kind"),
    [("chief", tf.errors.UnavailableError), ("worker", tf.errors.AbortedError)],
)
def test_a_lost_parameter_server_ends_a_step_at_once(run, monkeypatch, type_, kind):
    ended = []
    monkeypatch.setattr(launch, "_end_at_once", ended.append)
    monkeypatch.setattr(launch, "find_missing", lambda task, peers: peers[1:])
    statuses = [Status(READY if type_ == "worker" else "") for _ in range(2)]

    def train(worker):
        raise kind(None, None, "connection reset")

    run(type_, statuses, train)
    assert ended == [
        "lost the connection to ps 1 (b:1); restart all tasks to resume from the newest checkpoint"
    ]
    assert FAILED not in [status.read(STATE) for status in statuses]  # the chief has not failed


def test_a_worker_that_starts_after_the_end_does_not_train(run):
    trained = []
    run("worker", [Status(DONE)] * 2, trained.append)
    with pytest.raises(UserError, match=f"^{CHIEF_HAS_STOPPED}$"):
        run("worker", [Status(FAILED)] * 2, trained.append)
    assert not trained


@pytest.mark.parametrize(
    ("name", "mine", "message"),
    [
        ("examples_per_step", 4, "8 images per step, but this task with 4"),
        ("top_layers", "local", "--top_layers=full, but this task with --top_layers=local"),
    ],
)
def test_a_worker_with_other_images_or_layers_than_the_chief_is_refused(run, name, mine, message):
    trained = []
    run("worker", [Status(READY)] * 2, trained.append)
    assert trained
    message += "; use the same flags and the same dataset for all tasks"
    with pytest.raises(UserError, match=rf"^chief 0 \(c:1\) trains with {message}$"):
        run("worker", [Status(READY)] * 2, None, SETTINGS_OF_CHIEF._replace(**{name: mine}))


@pytest.fixture
def check_losses(monkeypatch):
    """A function that returns what a worker's checks find, given the tasks missing in each."""

    def check_losses(state, *lost):
        lost = list(lost)
        monkeypatch.setattr(launch, "find_missing", lambda task, peers: lost.pop(0))
        task, failed_checks = Task(CLUSTER, "worker", 0), {}
        return [launch._find_loss(task, Status(state), failed_checks) for _ in range(len(lost))]

    return check_losses


CHIEF, PS = ("chief", 0), ("ps", 1)
CHIEF_IS_LOST, PS_IS_LOST = (
    f"lost the connection to {name}; restart all tasks to resume from the newest checkpoint"
    for name in ("chief 0 (c:1)", "ps 1 (b:1)")
)


def test_a_task_is_lost_after_three_checks_in_a_row(check_losses):
    found = check_losses(READY, [PS], [PS], [], [PS, CHIEF], [PS], [PS])
    assert found == [None] * 5 + [PS_IS_LOST]
    assert check_losses(READY, [CHIEF], [CHIEF], [CHIEF]) == [None, None, CHIEF_IS_LOST]
    # If a whole machine is lost, the reason is the parameter server, which the chief needs as well.
    assert check_losses(READY, *[[PS, CHIEF]] * 3)[-1] == PS_IS_LOST


@pytest.mark.parametrize(("state", "loss"), [("", None), (DONE, None), (FAILED, CHIEF_HAS_STOPPED)])
def test_a_chief_that_has_not_started_or_has_ended_is_not_lost(check_losses, state, loss):
    assert check_losses(state, *[[CHIEF]] * 4)[2:] == [loss] * 2
    assert check_losses(state, *[[PS]] * 3)[-1] == PS_IS_LOST


def test_a_parameter_server_that_does_not_answer_does_not_block_the_checks(
    check_losses, monkeypatch
):
    def read(self, key, timeout=0):
        assert timeout > 0
        raise tf.errors.DeadlineExceededError(None, None, "")

    monkeypatch.setattr(Status, "read", read)
    found = check_losses(READY, *[[CHIEF]] * 3, *[[CHIEF, PS]] * 3)
    assert found == [None] * 5 + [PS_IS_LOST]


# --- Whole clusters.


class Cluster:
    """A chief, a worker and a parameter server, each in a process of its own.

    Args:
      folder: where their data, outputs and checkpoints are.
      flags: further flags for all of them.
    """

    def __init__(self, folder, *flags):
        write_dataset(folder / "data" / dataset.EXTRACTED_FOLDER, train_counts=[40] * 5)
        addresses = free_addresses(3)
        self.cluster = dict(zip(("ps", "chief", "worker"), ([a] for a in addresses), strict=True))
        self.train_dir = folder / "train"
        self._folder = folder
        self._flags = [
            f"--data_dir={folder / 'data'}",
            f"--train_dir={self.train_dir}",
            "--batch_size=4",
            "--log_frequency=1",
            "--min_fraction_of_examples_in_queue=0.001",
            *flags,
        ]
        self.processes = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes.values():
            process.kill()
            process.wait()

    def add(self, type_):
        """Adds another task of a type, for example "ps 1" in addition to "ps"."""
        self.cluster[type_] += free_addresses(1)

    def start(self, *names):
        for name in names:
            type_, _, index = name.partition(" ")
            task = {"cluster": self.cluster, "task": {"type": type_, "index": int(index or 0)}}
            with open(self._folder / f"{name}.log", "a") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "cifar10_train.py", *self._flags],
                    cwd=ROOT,
                    env={**script_environment(), "TF_CONFIG": json.dumps(task)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def output(self, name):
        return (self._folder / f"{name}.log").read_text()

    def lines(self, name):
        """Returns the lines that a task has printed, without the warning about its address."""
        lines = [line for line in messages(self.output(name)) if not line.startswith("E0000 ")]
        warnings = [line for line in lines if " is a private address, but " in line]
        assert bool(warnings) == (name != "evaluator")  # which has no server
        return [line for line in lines if line not in warnings]

    def steps(self, name):
        return [int(step) for step in re.findall(r": step (\d+), loss", self.output(name))]

    def kill(self, name, number=signal.SIGKILL):
        """Sends a signal to a task and returns its exit code."""
        self.processes[name].send_signal(number)
        return self.processes[name].wait(30)

    def wait(self, *names, timeout=60):
        """Returns the exit codes of tasks. Fails if one of them does not end in time."""
        end = time.monotonic() + timeout
        codes = []
        for name in names:
            try:
                codes.append(self.processes[name].wait(max(0.1, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                outputs = {each: self.output(each) for each in self.processes}
                pytest.fail(f"{name} has not ended: {outputs}")
        return codes

    def wait_for_output(self, name, pattern):
        """Waits until the output of a running task contains a pattern."""
        self._wait_until(name, lambda: re.search(pattern, self.output(name)))

    def wait_for_server(self, name):
        """Waits until a running task accepts connections."""
        self._wait_until(name, lambda: is_reachable(self.cluster[name][0]))

    def _wait_until(self, name, condition, timeout=60):
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, self.output(name)
            assert self.processes[name].poll() is None, self.output(name)
            time.sleep(0.1)


def step_of(train_dir):
    """Returns the global step of the newest checkpoint in a folder."""
    newest = tf.train.latest_checkpoint(str(train_dir))
    return tf.train.load_checkpoint(newest).get_tensor("global_step")


@pytest.mark.slow
def test_a_cluster_trains_to_the_last_step_and_all_tasks_end(tmp_path):
    flags = ("--max_steps=12", f"--eval_dir={tmp_path / 'eval'}", "--eval_interval_secs=1")
    with Cluster(tmp_path, *flags) as cluster:
        cluster.add("ps")
        tasks = ("ps", "ps 1", "chief", "worker", "evaluator")
        cluster.start(*tasks)
        assert cluster.wait(*tasks) == [0] * 5
        for type_ in ("chief", "worker"):
            assert cluster.steps(type_) == list(range(12))
            lines = cluster.lines(type_)
            assert lines[0].startswith("Filling queue")
            assert len(lines) == 13
        assert cluster.lines("ps") == []
        assert cluster.output("evaluator").count("precision @ 1") >= 1
        assert step_of(cluster.train_dir) == 12
        results = (tmp_path / "eval" / "results.jsonl").read_text().splitlines()
        assert json.loads(results[-1])["step"] == 12
        # The throughput counts the images of both workers: 8 per step.
        line = json.loads((cluster.train_dir / "metrics.jsonl").read_text().splitlines()[5])
        assert line["examples_per_sec"] * line["sec_per_batch"] == pytest.approx(8)

        # If the checkpoint is already at the last step, all tasks end at once.
        cluster.start("ps", "ps 1", "chief", "worker")
        assert cluster.wait("ps", "ps 1", "chief", "worker") == [0] * 4
        assert "nothing to do" in cluster.output("chief")
        assert cluster.steps("worker") == list(range(12))


@pytest.mark.slow
def test_training_waits_for_a_killed_worker_and_ends_at_the_last_step(tmp_path):
    with Cluster(tmp_path, "--max_steps=150", "--log_frequency=5") as cluster:
        cluster.start("ps", "chief", "worker")
        cluster.wait_for_output("worker", ": step 10,")
        cluster.kill("worker")
        cluster.wait_for_output("chief", r"worker 0 \(127.0.0.1:\d+\) does not respond: waiting")
        before = cluster.steps("chief")[-1]
        time.sleep(1.0)
        assert cluster.steps("chief")[-1] == before
        cluster.start("worker")
        cluster.wait_for_output("chief", r"worker 0 .* is back after \d+\.\d s")
        assert cluster.wait("chief", "worker", "ps", timeout=90) == [0, 0, 0]
        assert step_of(cluster.train_dir) == 150


def assert_ended(cluster, task, message):
    """Checks that the last line of a task's output, and no other line, is an error message."""
    *lines, last = cluster.lines(task)
    assert re.fullmatch(f"cifar10_train.py: error: {message}", last)
    assert not re.search("^cifar10_train.py: |^Traceback", "\n".join(lines), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_chief_ends_all_tasks_which_resume_when_all_are_restarted(tmp_path, number):
    flags = ("--max_steps=100", "--save_checkpoint_steps=10")
    with Cluster(tmp_path, *flags) as cluster:
        cluster.add("ps")
        cluster.start("ps", "ps 1", "chief", "worker")
        cluster.wait_for_output("chief", ": step 20,")
        code = cluster.kill("chief", number)
        assert code == (-9 if number == signal.SIGKILL else 143)
        others = ("worker", "ps", "ps 1")
        assert cluster.wait(*others, timeout=20) == [1, 1, 1]
        saved, printed = step_of(cluster.train_dir), len(cluster.steps("chief"))
        assert 20 <= saved < 100
        message = "lost the connection to chief 0 .*; restart all tasks to resume from the .*"
        if number == signal.SIGTERM:
            assert saved > cluster.steps("chief")[-1]
            assert re.search(rf"SIGTERM.* step {saved}\b", cluster.lines("chief")[-1])
            message = f"(training ended at step .*: )?{CHIEF_HAS_STOPPED}"
        for task in others:
            assert_ended(cluster, task, message)
        cluster.start("chief", *others)
        assert cluster.wait("chief", *others) == [0] * 4
        assert cluster.steps("chief")[printed] == saved
        assert step_of(cluster.train_dir) == 100


@pytest.mark.slow
def test_a_chief_that_is_restarted_before_it_is_missed_ends_all_tasks(tmp_path):
    with Cluster(tmp_path, "--max_steps=100000") as cluster:
        cluster.start("ps", "chief", "worker")
        cluster.wait_for_output("worker", ": step 5,")
        others = [cluster.processes[type_] for type_ in ("ps", "worker")]
        for process in others:
            process.send_signal(signal.SIGSTOP)  # starting a script takes seconds
        cluster.kill("chief")
        cluster.start("chief")
        cluster.wait_for_server("chief")
        for process in others:
            process.send_signal(signal.SIGCONT)
        assert cluster.wait("chief", "worker", "ps", timeout=30) == [1, 1, 1]
        assert_ended(cluster, "chief", "the parameter servers have been used .*")
        assert_ended(cluster, "worker", f"(training ended at step .*: )?{CHIEF_HAS_STOPPED}")
        assert_ended(cluster, "ps", CHIEF_HAS_STOPPED)


@pytest.mark.slow
def test_a_lost_parameter_server_ends_all_tasks(tmp_path):
    with Cluster(tmp_path, "--max_steps=100000") as cluster:
        cluster.add("ps")
        cluster.start("ps", "ps 1", "chief", "worker")
        cluster.wait_for_output("worker", ": step 5,")
        cluster.kill("ps 1")
        assert cluster.wait("chief", "worker", "ps", timeout=20) == [1, 1, 1]
        for task in ("chief", "worker", "ps"):
            assert_ended(cluster, task, "lost the connection to ps 1 .*; restart all tasks to .*")


@pytest.mark.slow
def test_tasks_end_when_another_one_is_missing_for_too_long(tmp_path):
    with Cluster(tmp_path, "--max_steps=5", "--cluster_timeout_secs=6") as cluster:
        cluster.start("ps", "chief")  # and no worker
        assert cluster.wait("chief", "ps", timeout=40) == [1, 1]
        cluster.start("evaluator")
        assert_ended(cluster, "chief", "no response from worker 0 .* for 6 s .*")
        assert_ended(cluster, "ps", CHIEF_HAS_STOPPED)
        cluster.add("ps")
        cluster.start("ps 1")
        assert cluster.wait("ps 1", timeout=40) == [1]
        assert_ended(cluster, "ps 1", "no response from ps 0 .* for 6 s .*")
        assert cluster.wait("evaluator", timeout=40) == [1]
        assert_ended(cluster, "evaluator", "no response from chief 0 .* for 6 s .*")
