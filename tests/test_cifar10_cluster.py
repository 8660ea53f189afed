"""Clusters: real processes on loopback, killed and started again; and what TF_CONFIG may say."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from conftest import ROOT, running_queues, write_data_set

import cifar10
import cifar10_cluster
import cifar10_data
import cifar10_input
import cifar10_session
from cifar10_cluster import Task, find_task
from cifar10_runtime import UserError, tf

FLAGS = cifar10_cluster.FLAGS


def free_addresses(count):
    """Returns addresses on loopback whose ports are free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


# --- What TF_CONFIG says.

CLUSTER = {"ps": ["a:1"], "chief": ["b:1"], "worker": ["c:1", "d:1"]}


def config(cluster=CLUSTER, type_="worker", index=0):
    return {"cluster": cluster, "task": {"type": type_, "index": index}}


@pytest.fixture
def tf_config(monkeypatch):
    """A function that sets TF_CONFIG, to a string or to what is written as JSON."""

    def set_it(value):
        text = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv("TF_CONFIG", text)

    return set_it


def test_without_tf_config_or_with_a_single_worker_there_is_no_cluster(tf_config, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert find_task() is None
    for value in ("", config({"chief": ["a:1"]}, "chief"), config({"worker": ["a:1"]})):
        tf_config(value)
        assert find_task() is None


def test_a_task_knows_its_place_and_the_others(tf_config):
    tf_config(config(index="1"))  # some write it as text
    task = find_task()
    assert (task.type, task.index, task.cluster) == ("worker", 1, CLUSTER)
    assert task.workers == [("chief", 0), ("worker", 0), ("worker", 1)]
    assert task.parameter_servers == [("ps", 0)]
    assert not task.is_chief
    assert task.describe(("worker", 1)) == "worker 1 (d:1)"
    tf_config(config(type_="chief"))
    assert find_task().is_chief


def test_without_a_chief_the_first_worker_is_it(tf_config):
    cluster = {"ps": ["a:1"], "worker": ["c:1", "d:1"]}
    for index, is_chief in ((0, True), (1, False)):
        tf_config(config(cluster, index=index))
        assert find_task().is_chief is is_chief


def test_an_evaluator_may_or_may_not_be_in_the_cluster(tf_config):
    for cluster in (CLUSTER, {**CLUSTER, "evaluator": ["e:1"]}, {"chief": ["b:1"]}):
        tf_config(config(cluster, "evaluator"))
        task = find_task()
        assert task.type == "evaluator"
        assert "evaluator" not in task.cluster


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "malformed"),
        ("[]", "task type None"),
        ("{}", "task type None"),
        ({"cluster": CLUSTER}, "task type None"),
        ({"cluster": {"ps": "a:1"}, "task": {"type": "ps", "index": 0}}, "malformed"),
        (config({**CLUSTER, "ps": ["nowhere"]}), "malformed: .*'nowhere' is not an address"),
        (config({**CLUSTER, "ps": ["a:0"]}), "'a:0' is not an address"),
        (config({**CLUSTER, "ps": ["a:70000"]}), "'a:70000' is not an address"),
        (config(type_="driver"), "task type 'driver', which is not in"),
        (config({**CLUSTER, "driver": ["e:1"]}), "job 'driver', which is not in"),
        (config(index=2), "names worker 2, but its cluster has 2"),
        (config(index=-1), "names worker -1, but its cluster has 2"),
        (config(index="first"), "malformed"),
        ({"cluster": CLUSTER, "task": {"type": "worker"}}, "`index` is missing"),
        (config({"chief": ["b:1"], "worker": ["c:1"]}), "needs a parameter server"),
        (config({"ps": ["a:1"]}, "ps"), "needs one chief"),
        (config({"worker": ["a:1"]}, "ps"), "names ps 0, but its cluster has 0"),
        (config({"worker": ["a:1"]}, index=3), "names worker 3, but its cluster has 1"),
        (config({**CLUSTER, "chief": ["b:1", "b:2"]}), "needs one chief"),
        (config({**CLUSTER, "ps": ["b:1"]}), "two tasks the same address"),
    ],
)
def test_a_tf_config_that_cannot_be_meant_is_refused_in_one_line(tf_config, value, message):
    tf_config(value)
    with pytest.raises(UserError, match=f"TF_CONFIG.*{message}") as error:
        find_task()
    assert "\n" not in str(error.value)


# --- Servers and their addresses.


def single(address, type_="ps"):
    """A task by itself at an address."""
    return Task({type_: [address]}, type_, 0)


def connects(host, port):
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def test_a_server_answers_at_its_address_and_at_no_other():
    ports = [int(address.rpartition(":")[2]) for address in free_addresses(2)]
    cifar10_cluster.start_server(single(f"127.0.0.1:{ports[0]}"))
    assert connects("127.0.0.1", ports[0])
    assert not connects("127.0.0.2", ports[0])
    assert not connects("::1", ports[0])
    tf.train.Server(tf.train.ClusterSpec({"ps": [f"127.0.0.1:{ports[1]}"]}), "ps", 0)
    assert connects("127.0.0.2", ports[1])  # what TensorFlow does by itself


def test_a_server_can_have_a_name_or_an_address_of_version_6():
    for host, address in (("localhost", "127.0.0.1"), ("[::1]", "::1")):
        port = int(free_addresses(1)[0].rpartition(":")[2])
        cifar10_cluster.start_server(single(f"{host}:{port}"))
        assert connects(address, port)
        assert not connects("127.0.0.2", port)


def test_where_addresses_cannot_be_kept_a_warning_says_so(monkeypatch):
    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(OSError("not Linux")))
    cifar10_cluster.start_server(single(free_addresses(1)[0]))
    (warning,) = warnings
    assert "listens at all addresses of this machine" in warning


def test_a_port_in_use_or_an_address_of_another_machine_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot start a server at {address}: port in use$"):
            cifar10_cluster.start_server(single(address))
    with pytest.raises(UserError, match=r"198\.51\.100\.1:9999 is not one of this machine's$"):
        cifar10_cluster.start_server(single("198.51.100.1:9999"))
    with pytest.raises(UserError, match=r"0\.0\.0\.0:9999 is none that others could reach"):
        cifar10_cluster.start_server(single("0.0.0.0:9999"))
    with pytest.raises(UserError, match=r"nowhere\.invalid:9999 cannot be found: "):
        cifar10_cluster.start_server(single("nowhere.invalid:9999"))


def test_looking_for_the_listening_socket_leaves_nothing_open():
    cifar10_cluster.start_server(single(address := free_addresses(1)[0]))
    before = len(os.listdir("/proc/self/fd"))
    assert len(list(cifar10_cluster._find_listeners(int(address.rpartition(":")[2])))) == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_peers_that_do_not_come_are_named_after_the_time_out(capsys, monkeypatch):
    monkeypatch.setattr(cifar10_cluster, "QUIET_WAIT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        gone, lost = free_addresses(2)
        task = Task({"ps": [gone], "chief": [here], "worker": [lost]}, "chief", 0)
        cifar10_cluster.wait_for_peers(task, [("chief", 0)], timeout=1)
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            cifar10_cluster.wait_for_peers(task, [("ps", 0), *task.workers], timeout=1)
    assert 1 <= time.monotonic() - start < 5
    assert str(error.value).startswith(
        f"not there after 1 s (--cluster_timeout_secs): ps 0 ({gone}), worker 0 ({lost}); start"
    )
    assert capsys.readouterr().err == f"Waiting for ps 0 ({gone}), worker 0 ({lost})\n"


# --- The arithmetic of a step, between servers in this process.


class LocalNotes:
    """Stands in for the chief's notes on a parameter server."""

    def __init__(self):
        self._written = set()

    def has(self, name):
        return name in self._written

    def write(self, name):
        self._written.add(name)


@pytest.fixture(scope="module")
def servers():
    """The tasks of a cluster in this process, by type, each with its server's target.

    Servers cannot be stopped, and a process can have no more than about a dozen.
    """
    cluster = dict(zip(("ps", "chief", "worker"), ([a] for a in free_addresses(3)), strict=True))
    tasks = [Task(cluster, type_, 0) for type_ in cluster]
    return {task.type: (task, cifar10_cluster.start_server(task).target) for task in tasks}


class Workers:
    """Two workers and a parameter server that train x, from 0, at a rate of 0.1.

    Args:
      servers: the fixture.
      container: string; what is theirs on the parameter server, and no other test's.
      gradients: a float for each worker.
    """

    def __init__(self, servers, container, gradients):
        self.sessions, self.steps, self.hooks, self.variables = [], [], [], []
        self._coordinators = []
        self._container, self._notes = container, LocalNotes()
        for type_, gradient in zip(("chief", "worker"), gradients, strict=True):
            self._add(*servers[type_], gradient, len(gradients))

    def _add(self, task, target, gradient, count):
        with tf.Graph().as_default() as graph, graph.container(self._container):
            place = f"/job:{task.type}/task:0"
            setter = tf.train.replica_device_setter(cluster=task.cluster, worker_device=place)
            with tf.device(setter):
                x = tf.get_variable("x", initializer=0.0)
                global_step = tf.train.get_or_create_global_step()
                step = cifar10_cluster._Step(
                    cifar10.make_optimizer(0.1), [(tf.constant(gradient), x)], global_step, count
                )
                start = tf.group(tf.global_variables_initializer())
                local = tf.local_variables_initializer()
            averages = [v for v in tf.global_variables() if "ExponentialMovingAverage" in v.op.name]
            session = tf.Session(target, graph, tf.ConfigProto(device_filters=["/job:ps", place]))
            if task.is_chief:
                session.run(start)
            session.run(local)
            self.variables.append({"x": x, "average": averages[0], "step": global_step})
        self.sessions.append(session)
        self.steps.append(step)
        self.hooks.append(cifar10_cluster._StepHook(step, self._notes, task.is_chief))

    def close(self):
        """Ends all that still waits."""
        for coordinator in self._coordinators:
            coordinator.request_stop()
        for session in self.sessions:
            session.close()

    def begin(self):
        """Does what the chief's and the workers' sessions begin with; returns their coordinator."""
        coordinator = tf.train.Coordinator()
        self._coordinators.append(coordinator)
        for hook, session in zip(self.hooks, self.sessions, strict=True):
            hook.after_create_session(session, coordinator)
        return coordinator

    def make_step(self, worker):
        """Makes a worker's next step."""
        session = self.sessions[worker]
        self.hooks[worker].before_run(types.SimpleNamespace(session=session))
        session.run(self.steps[worker].take_part)

    def make_steps(self, *workers):
        """Lets workers make a step at once; returns the threads that have not ended in a second."""
        threads = [
            threading.Thread(target=self.make_step, args=(worker,), daemon=True)
            for worker in workers
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 1.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread for thread in threads if thread.is_alive()]

    def read(self):
        """Returns x, its moving average and the global step."""
        values = self.sessions[0].run(self.variables[0])
        return float(values["x"]), float(values["average"]), int(values["step"])


@pytest.fixture
def workers(servers, request):
    workers = Workers(servers, request.node.name.replace("_", "."), [1.0, 3.0])
    yield workers
    workers.close()


def test_a_step_is_one_update_by_the_mean_of_all_workers_gradients(workers):
    workers.begin()
    x = average = 0.0
    for step in range(1, 6):
        assert workers.make_steps(0, 1) == []
        x -= 0.1 * 2.0
        decay = min(0.9999, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * x
        # All of it, moving average too, is there as soon as the workers go on.
        assert workers.read() == pytest.approx((x, average, step), abs=1e-6)


def test_a_worker_waits_for_the_others(workers):
    workers.begin()
    (waiting,) = workers.make_steps(0)
    assert workers.read()[2] == 0
    assert workers.make_steps(1) == []
    waiting.join(5)
    assert not waiting.is_alive()
    assert workers.read() == pytest.approx((-0.2, -0.2 * (1 - 2 / 11), 1), abs=1e-6)


def test_a_token_too_many_delays_nobody_for_ever(workers):
    workers.begin()
    workers.sessions[0].run(workers.steps[0].free_workers)  # two more than there should be
    for _ in range(6):
        assert workers.make_steps(0, 1) == []
    x, _, step = workers.read()
    assert 4 <= step <= 6  # a gradient each may have been left out
    assert -0.3 * step <= x <= -0.1 * step


def test_a_chief_that_starts_again_frees_workers_that_wait_in_vain(workers):
    coordinator = workers.begin()
    (waiting,) = workers.make_steps(1)
    coordinator.request_stop()  # the first chief's part in updates ends
    workers.begin()  # the second one's begins
    waiting.join(5)
    assert not waiting.is_alive()
    for _ in range(4):
        assert workers.make_steps(0, 1) == []
    assert workers.read()[2] >= 3


# --- Which records a worker reads.


def test_shards_have_every_record_once_between_them(tmp_path):

    train, _ = write_data_set(tmp_path, train_counts=(3, 4, 5, 6, 7))
    for number, records in enumerate(np.split(train, np.cumsum((3, 4, 5, 6)))):
        records[:, 1:] = (np.arange(len(records)) + 20 * number)[:, np.newaxis]
        records.tofile(tmp_path / f"data_batch_{number + 1}.bin")
    found = []
    for index in range(3):
        before = len(found)
        with tf.Graph().as_default(), tf.Session() as session:
            files = cifar10_data.record_files(tmp_path, eval_data=False)
            queue = tf.train.string_input_producer(files, num_epochs=1, shuffle=False)
            keys, _, planes = cifar10_input._read_block(queue, 4)
            is_ours = cifar10_input._is_in_shard(keys, index, 3)
            pixels = tf.boolean_mask(planes, is_ours)[:, 0, 0, 0]
            session.run(tf.local_variables_initializer())
            coordinator = tf.train.Coordinator()
            threads = tf.train.start_queue_runners(session, coordinator)
            with contextlib.suppress(tf.errors.OutOfRangeError):
                while True:
                    found += session.run(pixels).tolist()
            coordinator.request_stop()
            coordinator.join(threads)
        assert {value % 20 % 3 for value in found[before:]} == {index}
    expected = [
        n + 20 * number for number, count in enumerate((3, 4, 5, 6, 7)) for n in range(count)
    ]
    assert sorted(found) == expected


def test_a_sharded_training_input_has_the_shards_images_only(tmp_path):

    write_data_set(tmp_path, train_counts=(10, 10, 10, 10, 10))
    labels_of_shard = {1, 4, 7}  # the labels are the records' numbers, one file like the other
    with tf.Graph().as_default():
        _, labels = cifar10_input.distorted_inputs(str(tmp_path), 100, 0.001, shard=(1, 3))
        with running_queues() as session:
            assert set(session.run(labels).tolist()) == labels_of_shard


@pytest.mark.parametrize(("shard_data", "shard"), [(True, (1, 3)), (False, None)])
def test_a_worker_reads_a_shard_where_the_flag_says_so(monkeypatch, shard_data, shard):
    def distorted_inputs(batch_size, shard):
        calls.append((batch_size, shard))
        return tf.zeros([batch_size, 24, 24, 3]), tf.zeros([batch_size], tf.int32)

    calls = []
    monkeypatch.setattr(cifar10, "distorted_inputs", distorted_inputs)
    FLAGS.shard_data = shard_data
    with tf.Graph().as_default():
        cifar10_cluster.build_training(Task(CLUSTER, "worker", 0), 2)
    assert calls == [(2, shard)]


def test_more_workers_than_records_are_refused(tmp_path):
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER, train_counts=(2, 1, 2, 1, 2))
    FLAGS.data_dir = str(tmp_path)
    cifar10_cluster._check_shards(2)
    with pytest.raises(UserError, match="3 workers, but no file has more than 2 records"):
        cifar10_cluster._check_shards(3)


def test_graphs_of_different_streams_draw_different_values():

    FLAGS.seed = 7
    drawn = []
    for stream in (0, 1, 1):
        with cifar10_session.seeded_graph(stream), tf.Session() as session:
            drawn.append(session.run(tf.random.uniform([])))
    assert drawn[0] != drawn[1] == drawn[2]


# --- Whole clusters.


class Cluster:
    """A chief, a worker and a parameter server, each a process.

    Args:
      folder: where their data, outputs and checkpoints are.
      flags: more flags for all of them.
    """

    def __init__(self, folder, *flags):
        write_data_set(folder / "data" / cifar10_data.EXTRACTED_FOLDER, train_counts=[40] * 5)
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
            environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # as users have it, not as tests do
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

    def kill(self, type_, number=signal.SIGKILL):
        self._processes[type_].send_signal(number)
        return self._processes[type_].wait(30)

    def is_running(self, type_):
        return self._processes[type_].poll() is None

    def wait(self, *types, timeout=60):
        """Returns the exit codes; fails where one does not end."""
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
        """Waits until a task has written something; returns the match."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.output(type_))):
            assert time.monotonic() < end, self.output(type_)
            assert self.is_running(type_), self.output(type_)
            time.sleep(0.1)
        return match

    def steps(self, type_):
        return [int(step) for step in re.findall(r": step (\d+), loss", self.output(type_))]


def step_of(train_dir):
    newest = tf.train.latest_checkpoint(str(train_dir))
    return tf.train.load_checkpoint(newest).get_tensor("global_step")


@pytest.mark.slow
def test_a_cluster_trains_to_the_last_step_and_ends_by_itself(tmp_path):
    flags = ("--max_steps=12", f"--eval_dir={tmp_path / 'eval'}", "--eval_interval_secs=1")
    with Cluster(tmp_path, *flags) as cluster:
        cluster.start("ps", "chief", "worker", "evaluator")
        assert cluster.wait("chief", "worker", "ps", "evaluator") == [0, 0, 0, 0]
        for type_ in ("chief", "worker"):
            assert cluster.steps(type_) == list(range(12))
            lines = cluster.output(type_).splitlines()
            assert lines[0].startswith("Filling queue")
            assert len(lines) == 13
        assert cluster.output("ps") == ""
        assert cluster.output("evaluator").count("precision @ 1") >= 1
        assert step_of(cluster.train_dir) == 12
        results = (tmp_path / "eval" / "results.jsonl").read_text().splitlines()
        assert json.loads(results[-1])["step"] == 12
        # Images of both workers count: the rate is 8 images a step.
        line = json.loads((cluster.train_dir / "metrics.jsonl").read_text().splitlines()[5])
        assert line["examples_per_sec"] * line["sec_per_batch"] == pytest.approx(8)
        # Each variable of the checkpoint is one that the other trainers have, and the other way.
        with tf.Graph().as_default():
            global_step = tf.train.get_or_create_global_step()
            logits = cifar10.inference(tf.zeros([1, 24, 24, 3]))
            cifar10.train(cifar10.loss(logits, tf.constant([0])), global_step)
            expected = {v.op.name: v.shape.as_list() for v in tf.global_variables()}
        newest = tf.train.latest_checkpoint(str(cluster.train_dir))
        assert dict(tf.train.list_variables(newest)) == expected
        # Once more: there is nothing to do, for anybody.
        cluster.start("ps", "chief", "worker")
        assert cluster.wait("chief", "worker", "ps") == [0, 0, 0]
        assert "nothing to do" in cluster.output("chief")
        assert cluster.steps("worker") == list(range(12))


@pytest.mark.slow
def test_a_worker_that_is_killed_rejoins_and_the_run_ends_at_the_right_step(tmp_path):
    with Cluster(tmp_path, "--max_steps=150", "--log_frequency=5") as cluster:
        cluster.start("ps", "chief", "worker")
        cluster.wait_for_output("worker", ": step 10,")
        cluster.kill("worker")
        cluster.wait_for_output("chief", r"worker 0 \(127.0.0.1:\d+\) is away: training waits")
        before = cluster.steps("chief")[-1]
        time.sleep(1.0)
        assert cluster.steps("chief")[-1] == before  # it does wait
        cluster.start("worker")
        cluster.wait_for_output("chief", r"worker 0 .* is back after \d+\.\d s")
        assert cluster.wait("chief", "worker", "ps", timeout=90) == [0, 0, 0]
        assert step_of(cluster.train_dir) == 150


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_chief_that_is_killed_continues_from_its_last_checkpoint(tmp_path, number):
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
            assert f"holds step {saved}; the same command goes on" in cluster.output("chief")
        first_run = len(cluster.steps("chief"))
        cluster.start("chief")
        assert cluster.wait("chief", "worker", "ps", timeout=90) == [0, 0, 0]
        assert cluster.steps("chief")[first_run] == saved
        assert step_of(cluster.train_dir) == 100


@pytest.mark.slow
def test_a_parameter_server_that_dies_ends_the_run_and_is_named(tmp_path):
    with Cluster(tmp_path, "--max_steps=100000") as cluster:
        cluster.start("ps", "chief", "worker")
        cluster.wait_for_output("worker", ": step 5,")
        cluster.kill("ps")
        assert cluster.wait("chief", "worker", timeout=40) == [1, 1]
        address = cluster.cluster["ps"][0]
        for type_ in ("chief", "worker"):
            last = cluster.output(type_).splitlines()[-1]
            assert last.startswith(f"cifar10_train.py: error: lost ps 0 ({address}), and the var")
            assert "Traceback" not in cluster.output(type_)


@pytest.mark.slow
def test_tasks_do_not_wait_for_ever_for_one_that_does_not_come(tmp_path):
    with Cluster(tmp_path, "--max_steps=5", "--cluster_timeout_secs=3") as cluster:
        cluster.start("ps", "chief")  # and no worker
        assert cluster.wait("chief", "ps", timeout=40) == [1, 1]
        for type_, missing in (("chief", "worker"), ("ps", "chief")):
            (line,) = [x for x in cluster.output(type_).splitlines() if "Waiting for" not in x]
            address = cluster.cluster[missing][0]
            told = rf"error: .*{missing} 0 \({re.escape(address)}\)"
            assert re.search(told, line)
            assert re.search(r"3 s \(--cluster_timeout_secs\)", line)


@pytest.mark.slow
def test_the_script_tells_a_bad_configuration_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = f"127.0.0.1:{listener.getsockname()[1]}"
        cluster = {**CLUSTER, "ps": [taken]}
        for text, message in (
            ("{", "TF_CONFIG is malformed: "),
            (json.dumps(config(type_="driver")), "TF_CONFIG names the task type 'driver'"),
            (json.dumps(config(cluster, "ps")), f"cannot start a server at {taken}: port in use"),
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
            (line,) = process.stderr.splitlines()
            assert line.startswith(f"cifar10_train.py: error: {message}")


@pytest.mark.slow
def test_a_parameter_server_that_dies_before_training_ends_those_that_wait(tmp_path):
    with Cluster(tmp_path, "--max_steps=5", "--cluster_timeout_secs=15") as cluster:
        chief = cluster.cluster["chief"][0].rpartition(":")[2]
        with socket.create_server(("127.0.0.1", int(chief))):  # it is there, and does nothing
            cluster.start("ps", "worker", "evaluator")
            end = time.monotonic() + 30
            addresses = [cluster.cluster[type_][0] for type_ in ("ps", "worker")]
            while not all(map(cifar10_cluster.is_reachable, addresses)):
                assert time.monotonic() < end
                time.sleep(0.1)
            time.sleep(3.0)  # the worker has found both, and waits for the chief's variables
            cluster.kill("ps")
            assert cluster.wait("worker", timeout=30) == [1]
        (line,) = cluster.output("worker").splitlines()
        assert line.startswith("cifar10_train.py: error: lost ps 0 (127.0.0.1:")
        # The evaluator does not wait for ever either.
        assert cluster.wait("evaluator", timeout=40) == [1]
        assert re.search(
            "error: chief 0 .* has not been there for 15 s", cluster.output("evaluator")
        )


@pytest.mark.slow
def test_a_chief_that_fails_ends_the_others(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with Cluster(tmp_path, "--max_steps=5", f"--train_dir={tmp_path / 'file'}") as cluster:
        cluster.start("ps", "chief", "worker")
        assert cluster.wait("chief", "worker", "ps", timeout=40) == [1, 1, 1]
        assert "error: cannot use --train_dir" in cluster.output("chief")
        for type_ in ("worker", "ps"):
            assert cluster.output(type_) == (
                "cifar10_train.py: error: the chief has failed; what it printed says why\n"
            )


@pytest.mark.slow
def test_a_worker_that_would_train_another_model_is_refused(tmp_path):
    with Cluster(tmp_path, "--max_steps=100000") as cluster:
        cluster.start("ps", "chief")
        cluster.start("worker", more_flags=["--top_layers=local"])
        assert cluster.wait("worker") == [1]
        (line,) = cluster.output("worker").splitlines()
        assert re.fullmatch(
            r"\S+: error: chief 0 \(\S+\) trains with --top_layers=full, and this task "
            r"with --top_layers=local; give all tasks the same flags, and the same data",
            line,
        )
        cluster.start("worker")  # as the chief: training begins
        cluster.wait_for_output("chief", ": step 3,")


@pytest.mark.slow
def test_a_worker_ends_by_a_signal_while_it_waits_for_the_others(tmp_path):
    with Cluster(tmp_path, "--max_steps=100000") as cluster:
        cluster.start("ps", "chief", "worker")
        cluster.wait_for_output("worker", ": step 5,")
        cluster.kill("chief")
        cluster.wait_for_output("worker", "chief 0 .* is away")
        assert cluster.kill("worker", signal.SIGINT) == 130
        last = cluster.output("worker").splitlines()[-1]
        assert last == (
            "cifar10_train.py: ended by SIGINT: the same command joins the others again"
        )
