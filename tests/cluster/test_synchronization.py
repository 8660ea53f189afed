"""The synchronized step and the chief's status, between servers in this process."""

import threading
import time
import types

import pytest
from conftest import free_addresses

from support.cluster.server import start_server
from support.cluster.synchronization import (
    DONE,
    FAILED,
    READY,
    SETTINGS,
    STATE,
    ChiefStatus,
    SynchronizedStep,
)
from support.cluster.task import Task
from support.ops.tensorflow_v1 import session_config, tf

LEARNING_RATE = 0.1


@pytest.fixture(scope="module")
def running_servers():
    """For each type of task, the `Task` and the target of its server.

    Servers cannot be stopped, and each starts dozens of threads: all tests share these three.
    """
    types_ = ("ps", "chief", "worker")
    cluster = {type_: [address] for type_, address in zip(types_, free_addresses(3), strict=True)}
    tasks = [Task(cluster, type_, 0) for type_ in types_]
    running = [start_server(task, session_config()) for task in tasks]
    return {task.type: (task, server.target) for task, server in zip(tasks, running, strict=True)}


@pytest.fixture
def servers(running_servers):
    """The same, and the parameter server holds nothing yet."""
    _, target = running_servers["ps"]
    tf.Session.reset(target)
    return running_servers


# --- The chief's status.


def test_all_tasks_see_the_state_that_the_chief_sets(servers):
    statuses = {type_: ChiefStatus(task, target, 0) for type_, (task, target) in servers.items()}
    assert [status.read(STATE) for status in statuses.values()] == [""] * 3
    statuses["chief"].write(SETTINGS, '{"class_names": ["ä", "日本"]}')
    statuses["chief"].write(STATE, READY)
    assert statuses["worker"].read(SETTINGS) == '{"class_names": ["ä", "日本"]}'
    assert [status.read(STATE) for status in statuses.values()] == [READY] * 3
    statuses["chief"].end(DONE)
    assert [status.read(STATE, timeout=60) for status in statuses.values()] == [DONE] * 3


# --- The synchronized step.


def ends(thread):
    thread.join(30)
    return not thread.is_alive()


def waits(thread):
    thread.join(1)
    return thread.is_alive()


class Workers:
    """A chief and a worker that train a variable x, which starts at 0.

    Args:
      servers: the fixture.
      gradients: two floats, the gradients of the chief and of the worker.
    """

    def __init__(self, servers, gradients):
        self.status = ChiefStatus(*servers["chief"], 0)
        self.sessions, self.steps, self._variables = [], [], []
        self._coordinator = tf.train.Coordinator()
        for type_, gradient in zip(("chief", "worker"), gradients, strict=True):
            self._add(*servers[type_], gradient)

    def _add(self, task, target, gradient):
        setter = tf.train.replica_device_setter(cluster=task.cluster, worker_device=task.device)
        with tf.Graph().as_default() as graph, tf.device(setter):
            x = tf.get_variable("x", initializer=0.0)
            global_step = tf.train.get_or_create_global_step()
            averages = tf.train.ExponentialMovingAverage(0.5)

            def on_ready():
                self.status.write(STATE, READY)

            gradients = [(tf.constant(gradient), x)]
            chiefs = on_ready if task.is_chief else None
            step = SynchronizedStep(gradients, global_step, 2, chiefs)
            optimizer = tf.train.GradientDescentOptimizer(LEARNING_RATE)
            apply_op = optimizer.apply_gradients(step.average_gradients, global_step)
            with tf.control_dependencies([apply_op]):
                step.set_update(averages.apply([x]))
            self._variables.append([x, averages.average(x), global_step])
            initialize = tf.global_variables_initializer()
            initialize_local = tf.local_variables_initializer()
        config = tf.ConfigProto(device_filters=["/job:ps", task.device])
        session = tf.Session(target, graph, config)
        if task.is_chief:
            session.run(initialize)
        session.run(initialize_local)
        self.sessions.append(session)
        self.steps.append(step)

    def start(self, global_step=0):
        """Does what happens when the sessions start."""
        self._variables[0][-1].load(global_step, self.sessions[0])
        for step, session in zip(self.steps, self.sessions, strict=True):
            step.after_create_session(session, self._coordinator)

    def read_step(self, worker):
        """Does what happens before a step."""
        self.steps[worker].before_run(types.SimpleNamespace(session=self.sessions[worker]))

    def run_step(self, worker):
        self.read_step(worker)
        self.sessions[worker].run(self.steps[worker].train_op)

    def start_step(self, worker):
        """Runs a step in a thread, which it returns."""
        thread = threading.Thread(target=self.run_step, args=(worker,), daemon=True)
        thread.start()
        return thread

    def run_steps(self, *workers):
        """Runs a step of each worker, in parallel, to its end."""
        for thread in [self.start_step(worker) for worker in workers]:
            assert ends(thread)

    def read(self):
        """Returns x, its moving average and the global step."""
        x, average, step = self.sessions[0].run(self._variables[0])
        return float(x), float(average), int(step)

    def wait_for_step(self, step):
        end = time.monotonic() + 30
        while self.read()[2] < step:
            assert time.monotonic() < end
            time.sleep(0.05)

    def close(self):
        self._coordinator.request_stop()
        for session in self.sessions:
            session.close()


@pytest.fixture
def workers(servers):
    workers = Workers(servers, [1.0, 3.0])
    yield workers
    workers.close()


@pytest.mark.parametrize("start", [0, 100])  # a new run, or one that is resumed
def test_a_step_applies_the_mean_of_all_gradients_once(workers, start):
    assert workers.status.read(STATE) == ""
    workers.start(global_step=start)
    assert workers.status.read(STATE) == READY
    x = average = 0.0
    for step in range(start + 1, start + 6):
        workers.run_steps(0, 1)
        x -= LEARNING_RATE * 2.0
        average = (average + x) / 2
        # The moving average is already up to date when the workers continue.
        assert workers.read() == pytest.approx((x, average, step), abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0)])
def test_each_worker_waits_for_the_gradients_of_the_other(workers, first, second):
    workers.start()
    if second == 0:  # the chief makes updates only from its first step on
        workers.run_steps(0, 1)
    x, _, step = workers.read()
    waiting = workers.start_step(first)
    assert waits(waiting)
    assert workers.read()[2] == step
    workers.run_steps(second)
    assert ends(waiting)
    assert workers.read()[0] == pytest.approx(x - LEARNING_RATE * 2.0, abs=1e-6)
    assert workers.read()[2] == step + 1


def test_a_gradient_of_an_earlier_step_is_dropped(workers):
    workers.start(global_step=100)
    # A killed worker can leave surplus tokens. With two, the chief need not wait for the worker.
    workers.sessions[0].run(workers.steps[0].add_tokens_op)
    workers.read_step(1)
    workers.run_step(0)
    workers.run_step(0)
    workers.wait_for_step(101)  # with two gradients of the chief
    workers.sessions[1].run(workers.steps[1].train_op)  # still at step 100
    workers.run_steps(0, 1)
    workers.wait_for_step(102)
    assert workers.read()[0] == pytest.approx(-LEARNING_RATE * (1.0 + 2.0), abs=1e-6)


def test_the_end_of_the_chief_ends_steps_that_wait_for_its_updates(workers):
    workers.start()

    def run_step():
        with pytest.raises(tf.errors.OutOfRangeError):
            workers.run_step(1)

    waiting = threading.Thread(target=run_step, daemon=True)
    waiting.start()
    assert waits(waiting)
    workers.status.end(FAILED)
    assert ends(waiting)
    run_step()  # a later step ends as well
