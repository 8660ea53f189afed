"""Training on a cluster: workers by themselves, then real processes, killed and restarted."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from conftest import ROOT, write_dataset

import cifar10
import cifar10_train
from support.base.errors import UserError
from support.cluster import training
from support.cluster.server import is_reachable, start_server
from support.cluster.task import Task
from support.cluster.training import Worker, make_chief_check
from support.data import dataset
from support.data.settings import TrainingSettings, format_settings
from support.ops.tensorflow_v1 import session_config, tf

FLAGS = cifar10_train.FLAGS
CLUSTER = {"ps": ["a:1", "b:1"], "chief": ["c:1"], "worker": ["d:1", "e:1"]}


def free_addresses(count):
    """Returns loopback addresses whose ports are free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def listen(address):
    """Returns a socket that listens at an address, like the server of a task."""
    host, _, port = address.rpartition(":")
    return socket.create_server((host, int(port)))


# --- A worker by itself.


def make_worker(task, **arguments):
    return Worker(task, target="", status=None, timeout=600, **arguments)


def test_a_worker_knows_its_number_among_all_that_train():
    chief = make_worker(Task(CLUSTER, "chief", 0))
    assert (chief.index, chief.count, chief.is_chief) == (0, 3, True)
    worker = make_worker(Task(CLUSTER, "worker", 1))
    assert (worker.index, worker.count, worker.is_chief) == (2, 3, False)


def test_sessions_connect_to_the_parameter_servers_and_not_to_other_workers():
    worker = make_worker(Task(CLUSTER, "worker", 1))
    assert worker.device_filters == ["/job:ps", "/job:worker/task:1"]


@pytest.mark.parametrize(("shard_data", "shard"), [(True, (1, 3)), (False, None)])
def test_a_worker_has_a_shard_only_if_the_data_is_sharded(shard_data, shard):
    assert make_worker(Task(CLUSTER, "worker", 0), shard_data=shard_data).shard == shard


@pytest.mark.parametrize(("shard_data", "shard"), [(True, (0, 3)), (False, None)])
def test_the_script_passes_on_the_timeout_and_reads_a_shard_if_the_flags_say_so(
    tmp_path, monkeypatch, shard_data, shard
):
    write_dataset(tmp_path / dataset.EXTRACTED_FOLDER)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.train_dir = str(tmp_path / "train")
    FLAGS.shard_data = shard_data
    FLAGS.cluster_timeout_secs = 7
    shards = []

    def run_worker(task, server, train, settings, timeout, shard_data=False):
        assert timeout == 7
        train(make_worker(task, shard_data=shard_data))

    def distorted_inputs(batch_size=None, shard=None):
        shards.append(shard)
        raise InterruptedError  # before it builds the model

    monkeypatch.setattr(cifar10_train.server, "start_server", lambda *arguments: None)
    monkeypatch.setattr(training, "run_worker", run_worker)
    monkeypatch.setattr(cifar10, "distorted_inputs", distorted_inputs)
    with pytest.raises(InterruptedError):
        cifar10_train.train_in_cluster(Task(CLUSTER, "chief", 0))
    assert shards == [shard]


def test_variables_are_placed_on_the_parameter_servers_in_turn(graph):
    with tf.device(make_worker(Task(CLUSTER, "worker", 1)).device_setter()):
        variables = [tf.get_variable(name, [1]) for name in "xyz"]
        total = tf.add_n([variable.read_value() for variable in variables])
    assert [v.device.partition("/device")[0] for v in variables] == [
        "/job:ps/task:0",
        "/job:ps/task:1",
        "/job:ps/task:0",
    ]
    assert total.device == "/job:worker/task:1"


def find_transfers(graph, fetch):
    """Returns the float32 tensors that cross the network when an operation runs once.

    Args:
      graph: the `tf.Graph`.
      fetch: the operation.

    Returns:
      Two lists of the tensors' shapes: from the parameter servers to the worker, and back.
    """

    def is_on_server(operation):
        if operation.type == "ReadVariableOp":  # runs where the variable is
            operation = operation.inputs[0].op
        return "/job:ps" in operation.device

    nodes = tf.graph_util.extract_sub_graph(graph.as_graph_def(), [fetch.name]).node
    to_worker, to_servers = set(), set()
    for operation in (graph.get_operation_by_name(node.name) for node in nodes):
        for tensor in operation.inputs:
            if tensor.dtype == tf.float32 and is_on_server(tensor.op) != is_on_server(operation):
                transfers = to_servers if is_on_server(operation) else to_worker
                transfers.add(tensor.ref())
    return [[ref.deref().shape.as_list() for ref in refs] for refs in (to_worker, to_servers)]


@pytest.mark.parametrize("type_", ["chief", "worker"])
def test_each_variable_and_each_gradient_crosses_the_network_once_a_step(graph, type_):
    worker = make_worker(Task(CLUSTER, type_, 0))
    with tf.device(worker.device_setter()):
        global_step = tf.train.get_or_create_global_step()
        logits = cifar10.inference(tf.zeros([1, 24, 24, 3]))
        loss = cifar10.loss(logits, tf.constant([0]))
        train_op = cifar10.train(loss, global_step, worker=worker)
    shapes = sorted(variable.shape.as_list() for variable in tf.trainable_variables())
    variables, gradients = find_transfers(graph, train_op)
    assert sum(map(np.prod, shapes)) == 1_068_298
    # The chief also sends the losses, which are scalars, to average them over the steps.
    assert sorted(shape for shape in variables if shape) == shapes
    assert sorted(shape for shape in gradients if shape) == shapes


def test_a_worker_reads_the_step_from_the_parameter_server():
    ps, chief = free_addresses(2)
    cluster = {"ps": [ps], "chief": [chief]}
    targets = [
        start_server(Task(cluster, type_, 0), session_config()).target for type_ in ("ps", "chief")
    ]
    worker = Worker(Task(cluster, "chief", 0), targets[1], status=None, timeout=600)
    with tf.Graph().as_default() as graph, tf.device(worker.device_setter()):
        with tf.device("/cpu:0"):
            global_step = tf.train.get_or_create_global_step()
        initialize, assign = global_step.initializer, tf.assign(global_step, 7).op
    with tf.Session(worker.target, graph) as session:
        session.run(initialize)
        session.run(assign)
        assert worker.read_global_step() == 7


@pytest.mark.parametrize(("mine", "is_refused"), [(16, True), (4, True), (8, False)])
def test_a_worker_with_other_images_per_step_than_the_chief_is_refused(mine, is_refused):
    settings = TrainingSettings(("cat", "dog"), 100, examples_per_step=8)
    status = types.SimpleNamespace(read_settings=lambda: format_settings(settings))
    expectation = contextlib.nullcontext()
    if is_refused:
        expectation = pytest.raises(
            UserError,
            match=r"^chief 0 \(c:1\) trains with 8 images per step, but this task with "
            f"{mine}; use the same flags and the same dataset for all tasks$",
        )
    with expectation:
        training._check_settings(
            Task(CLUSTER, "worker", 0), status, settings._replace(examples_per_step=mine)
        )


@pytest.fixture
def set_time(monkeypatch):
    """A function that sets the time, in seconds, for the timeouts in `training`."""
    clock = types.SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(training, "time", clock)

    def set_time(seconds):
        clock.monotonic = lambda: seconds

    return set_time


def test_the_chief_reports_a_lost_worker_its_return_and_the_timeout(capsys, set_time):
    chief, worker = free_addresses(2)
    task = Task({"ps": ["a:1"], "chief": [chief], "worker": [worker]}, "chief", 0)
    trainer = Worker(task, target="", status=None, timeout=60)
    trainer.check_peers()
    set_time(59.5)
    trainer.check_peers()
    with listen(worker):
        trainer.check_peers()
    set_time(100.0)
    trainer.check_peers()
    set_time(160.0)
    with pytest.raises(UserError, match=rf"no response from worker 0 \({worker}\) for 60 s \(--c"):
        trainer.check_peers()
    assert capsys.readouterr().err.splitlines() == [
        f"worker 0 ({worker}) does not respond: waiting until it is restarted",
        f"worker 0 ({worker}) is back after 59.5 s",
        f"worker 0 ({worker}) does not respond: waiting until it is restarted",
    ]


def test_a_worker_checks_the_chief_and_no_other_worker(capsys):
    chief, *workers = free_addresses(3)
    task = Task({"ps": ["a:1"], "chief": [chief], "worker": workers}, "worker", 0)
    with listen(chief):
        make_worker(task).check_peers()
    assert capsys.readouterr().err == ""
    make_worker(task).check_peers()
    assert capsys.readouterr().err.startswith(f"chief 0 ({chief}) does not respond")


def test_the_chief_may_be_missing_until_the_timeout(capsys, set_time):
    (address,) = free_addresses(1)
    check_chief = make_chief_check(Task({"ps": ["a:1"], "chief": [address]}, "ps", 0), timeout=60)
    check_chief()
    set_time(60.0)
    with listen(address):
        check_chief()
    check_chief()
    assert capsys.readouterr().err == ""
    set_time(70.0)
    check_chief()
    check_chief()
    assert capsys.readouterr().err == f"Waiting for chief 0 ({address})\n"
    set_time(120.0)
    with pytest.raises(UserError, match=rf"no response from chief 0 \({address}\) for 60 s \(--cl"):
        check_chief()


def test_a_chief_without_parameter_servers_is_not_checked(capsys, set_time):
    # It trains without a server of its own, so its address never responds.
    for cluster in ({"chief": free_addresses(1)}, {}):
        set_time(0.0)
        check_chief = make_chief_check(Task(cluster, "evaluator", 0), timeout=60)
        set_time(1000.0)
        check_chief()
    assert capsys.readouterr().err == ""


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
        self._processes = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self._processes.values():
            process.kill()
            process.wait()

    def start(self, *types, more_flags=()):
        for type_ in types:
            task = {"cluster": self.cluster, "task": {"type": type_, "index": 0}}
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps(task),
                "CUDA_VISIBLE_DEVICES": "-1",
            }
            environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # the script sets its own default
            with open(self._folder / f"{type_}.log", "a") as log:
                self._processes[type_] = subprocess.Popen(
                    [sys.executable, "cifar10_train.py", *self._flags, *more_flags],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def output(self, type_):
        return (self._folder / f"{type_}.log").read_text()

    def lines(self, type_):
        """Returns the lines that a task has printed, without those from TensorFlow's start."""
        return without_notices(self.output(type_))

    def kill(self, type_, number=signal.SIGKILL):
        """Sends a signal to a task and returns its exit code."""
        self._processes[type_].send_signal(number)
        return self._processes[type_].wait(30)

    def is_running(self, type_):
        return self._processes[type_].poll() is None

    def wait(self, *types, timeout=60):
        """Returns the exit codes of tasks. Fails if one of them does not end in time."""
        end = time.monotonic() + timeout
        codes = []
        for type_ in types:
            try:
                codes.append(self._processes[type_].wait(max(0.1, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                outputs = {name: self.output(name) for name in self._processes}
                pytest.fail(f"{type_} has not ended: {outputs}")
        return codes

    def wait_for_output(self, type_, pattern, timeout=60):
        """Waits until the output of a running task contains a pattern."""
        end = time.monotonic() + timeout
        while not re.search(pattern, self.output(type_)):
            assert time.monotonic() < end, self.output(type_)
            assert self.is_running(type_), self.output(type_)
            time.sleep(0.1)

    def steps(self, type_):
        return [int(step) for step in re.findall(r": step (\d+), loss", self.output(type_))]


def without_notices(output):
    """Returns the lines of an output without those that TensorFlow logs when it is imported."""
    notice = re.compile(r"[IE]0000 |WARNING: All log messages before absl::InitializeLog\(\)")
    return [line for line in output.splitlines() if not notice.match(line)]


def step_of(train_dir):
    """Returns the global step of the newest checkpoint in a folder."""
    newest = tf.train.latest_checkpoint(str(train_dir))
    return tf.train.load_checkpoint(newest).get_tensor("global_step")


@pytest.mark.slow
def test_a_cluster_trains_to_the_last_step_and_all_tasks_end(tmp_path):
    flags = ("--max_steps=12", f"--eval_dir={tmp_path / 'eval'}", "--eval_interval_secs=1")
    with Cluster(tmp_path, *flags) as cluster:
        cluster.start("ps", "chief", "worker", "evaluator")
        assert cluster.wait("chief", "worker", "ps", "evaluator") == [0, 0, 0, 0]
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
        # The throughput counts the images of both workers: 8 a step.
        line = json.loads((cluster.train_dir / "metrics.jsonl").read_text().splitlines()[5])
        assert line["examples_per_sec"] * line["sec_per_batch"] == pytest.approx(8)

        # When the checkpoint is at the last step already, all tasks end at once.
        cluster.start("ps", "chief", "worker")
        assert cluster.wait("chief", "worker", "ps") == [0, 0, 0]
        assert "nothing to do" in cluster.output("chief")
        assert cluster.steps("worker") == list(range(12))


@pytest.mark.slow
def test_a_cluster_saves_the_same_variables_as_a_single_trainer(tmp_path):
    with Cluster(tmp_path, "--max_steps=1") as cluster:
        cluster.start("ps", "chief", "worker")
        assert cluster.wait("chief", "worker", "ps") == [0, 0, 0]
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()
        logits = cifar10.inference(tf.zeros([1, 24, 24, 3]))
        cifar10.train(cifar10.loss(logits, tf.constant([0])), global_step)
        expected = {v.op.name: v.shape.as_list() for v in tf.global_variables()}
    newest = tf.train.latest_checkpoint(str(cluster.train_dir))
    assert dict(tf.train.list_variables(newest)) == expected


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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restarted_chief_resumes_from_its_newest_checkpoint(tmp_path, number):
    flags = ("--max_steps=100", "--save_checkpoint_steps=20")
    with Cluster(tmp_path, *flags) as cluster:
        cluster.start("ps", "chief", "worker")
        cluster.wait_for_output("chief", ": step 30,")
        code = cluster.kill("chief", number)
        saved = step_of(cluster.train_dir)
        assert code == (-9 if number == signal.SIGKILL else 143)
        assert saved >= 20
        if number == signal.SIGTERM:
            assert saved > cluster.steps("chief")[-1]
            assert re.search(rf"SIGTERM.* step {saved}\b", cluster.lines("chief")[-1])
        first_run = len(cluster.steps("chief"))
        cluster.start("chief")
        assert cluster.wait("chief", "worker", "ps", timeout=90) == [0, 0, 0]
        assert cluster.steps("chief")[first_run] == saved
        assert step_of(cluster.train_dir) == 100


@pytest.mark.slow
def test_the_loss_of_a_parameter_server_ends_all_tasks_and_names_it(tmp_path):
    with Cluster(tmp_path, "--max_steps=100000") as cluster:
        cluster.start("ps", "chief", "worker")
        cluster.wait_for_output("worker", ": step 5,")
        cluster.kill("ps")
        assert cluster.wait("chief", "worker", timeout=40) == [1, 1]
        address = cluster.cluster["ps"][0]
        for type_ in ("chief", "worker"):
            assert cluster.lines(type_)[-1] == (
                f"cifar10_train.py: error: lost the connection to ps 0 ({address}), which held "
                "variables; restart all tasks to resume from the newest checkpoint"
            )
            assert "Traceback" not in cluster.output(type_)


@pytest.mark.slow
def test_the_loss_of_a_parameter_server_before_training_ends_tasks_that_wait(tmp_path):
    with Cluster(tmp_path, "--max_steps=5", "--cluster_timeout_secs=15") as cluster:
        with listen(cluster.cluster["chief"][0]):  # a chief that responds and does nothing
            cluster.start("ps", "worker", "evaluator")
            end = time.monotonic() + 30
            addresses = [cluster.cluster[type_][0] for type_ in ("ps", "worker")]
            while not all(map(is_reachable, addresses)):
                assert time.monotonic() < end
                time.sleep(0.1)
            time.sleep(3.0)  # the worker has found the server and waits for the chief to be ready
            cluster.kill("ps")
            assert cluster.wait("worker", timeout=30) == [1]
        (line,) = cluster.lines("worker")
        assert line.startswith("cifar10_train.py: error: lost the connection to ps 0 (127.0.0.1:")
        assert cluster.wait("evaluator", timeout=40) == [1]
        assert re.search(
            "error: no response from chief 0 .* for 15 s", cluster.lines("evaluator")[-1]
        )


@pytest.mark.slow
def test_tasks_end_when_another_one_is_missing_for_too_long(tmp_path):
    with Cluster(tmp_path, "--max_steps=5", "--cluster_timeout_secs=3") as cluster:
        cluster.start("ps", "chief")  # and no worker
        assert cluster.wait("chief", "ps", timeout=40) == [1, 1]
        for type_, missing in (("chief", "worker"), ("ps", "chief")):
            (line,) = [x for x in cluster.lines(type_) if "Waiting for" not in x]
            address = cluster.cluster[missing][0]
            assert line.startswith(
                f"cifar10_train.py: error: no response from {missing} 0 ({address}) for 3 s "
                "(--cluster_timeout_secs); "
            )


@pytest.mark.slow
def test_a_parameter_server_does_not_wait_forever_for_another_one(tmp_path):
    with Cluster(tmp_path, "--cluster_timeout_secs=3") as cluster:
        cluster.cluster["ps"] += free_addresses(1)
        cluster.start("ps")
        assert cluster.wait("ps", timeout=40) == [1]
        assert "error: no response from chief 0 " in cluster.lines("ps")[-1]


@pytest.mark.slow
def test_an_error_of_the_chief_ends_all_tasks(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with Cluster(tmp_path, "--max_steps=5", f"--train_dir={tmp_path / 'file'}") as cluster:
        cluster.start("ps", "chief", "worker")
        assert cluster.wait("chief", "worker", "ps", timeout=40) == [1, 1, 1]
        assert "error: cannot use --train_dir" in cluster.output("chief")
        for type_ in ("worker", "ps"):
            assert cluster.lines(type_) == [
                "cifar10_train.py: error: the chief has failed; see its output for the reason"
            ]


@pytest.mark.slow
def test_a_worker_with_other_settings_than_the_chief_is_refused(tmp_path):
    with Cluster(tmp_path, "--max_steps=100000") as cluster:
        cluster.start("ps", "chief")
        cluster.start("worker", more_flags=["--top_layers=local"])
        assert cluster.wait("worker") == [1]
        (line,) = cluster.lines("worker")
        assert re.fullmatch(
            r"cifar10_train.py: error: chief 0 \(\S+\) trains with --top_layers=full, but this "
            r"task with --top_layers=local; use the same flags and the same dataset for all tasks",
            line,
        )
        cluster.start("worker")  # with the chief's settings, training begins
        cluster.wait_for_output("chief", ": step 3,")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_worker_that_waits_for_the_chief(tmp_path, number):
    with Cluster(tmp_path, "--max_steps=100000") as cluster:
        cluster.start("ps", "chief", "worker")
        cluster.wait_for_output("worker", ": step 5,")
        cluster.kill("chief")
        cluster.wait_for_output("worker", "chief 0 .* does not respond")
        assert cluster.kill("worker", number) == 128 + number
        last = cluster.lines("worker")[-1]
        assert last.startswith("cifar10_train.py: ")
        assert signal.Signals(number).name in last


@pytest.mark.slow
@pytest.mark.parametrize("type_", ["ps", "chief", "evaluator"])
def test_a_signal_ends_a_task_that_waits_for_the_others(tmp_path, type_):
    with Cluster(tmp_path) as cluster:
        cluster.start(type_)
        if type_ == "chief":
            cluster.wait_for_output("chief", "Waiting for ps 0")
        elif type_ == "evaluator":
            cluster.wait_for_output("evaluator", "Waiting for a checkpoint")
        else:
            while not is_reachable(cluster.cluster["ps"][0]):
                assert cluster.is_running("ps")
                time.sleep(0.1)
            time.sleep(1.0)
        assert cluster.kill(type_, signal.SIGTERM) == 143
        assert "SIGTERM" in cluster.lines(type_)[-1]


@pytest.mark.slow
def test_an_unusable_tf_config_ends_the_script_with_one_line():
    task = {"type": "ps", "index": 0}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        used = f"127.0.0.1:{listener.getsockname()[1]}"
        for text, message in (
            ("{", "TF_CONFIG is malformed: "),
            (
                json.dumps({"cluster": CLUSTER, "task": {**task, "type": "driver"}}),
                "TF_CONFIG sets the task type to 'driver'",
            ),
            (
                json.dumps({"cluster": {**CLUSTER, "ps": [used]}, "task": task}),
                f"cannot start a server at {used}: port in use",
            ),
        ):
            process = subprocess.run(
                [sys.executable, "cifar10_train.py"],
                cwd=ROOT,
                env={**os.environ, "TF_CONFIG": text, "CUDA_VISIBLE_DEVICES": "-1"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert (process.returncode, process.stdout) == (1, "")
            (line,) = without_notices(process.stderr)
            assert line.startswith(f"cifar10_train.py: error: {message}")
