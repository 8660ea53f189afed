"""The synchronized step and the chief's status, between servers in this process."""

import contextlib
import socket
import threading
import types

import pytest

from support.cluster.server import start_server
from support.cluster.synchronization import ChiefStatus, SynchronizationHook, SynchronizedStep
from support.cluster.task import Task
from support.ops.tensorflow_v1 import session_config, tf

LEARNING_RATE = 0.1


@pytest.fixture(scope="module")
def running_servers():
    """For each type of task, the `Task` and the target of its server.

    Servers cannot be stopped, and each starts dozens of threads: all tests share these three.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    types_ = ("ps", "chief", "worker")
    cluster = {type_: [address] for type_, address in zip(types_, addresses, strict=True)}
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


@pytest.fixture
def statuses(servers):
    """For each type of task, its `ChiefStatus`."""
    return {type_: ChiefStatus(task, target, 0) for type_, (task, target) in servers.items()}


def test_all_tasks_see_the_states_that_the_chief_sets(statuses):
    assert not statuses["worker"].has(ChiefStatus.READY)
    statuses["chief"].set(ChiefStatus.READY)
    for status in statuses.values():
        assert status.has(ChiefStatus.READY)
        assert not status.has(ChiefStatus.STARTED)
        assert not status.has(ChiefStatus.DONE)
        assert not status.has(ChiefStatus.FAILED)


def test_states_outlive_the_chief_that_set_them(servers, statuses):
    statuses["chief"].set(ChiefStatus.STARTED)
    del statuses["chief"]
    assert ChiefStatus(*servers["chief"], 0).has(ChiefStatus.STARTED)


def test_workers_read_the_settings_of_the_chief(statuses):
    statuses["chief"].write_settings('{"class_names": ["ä", "日本"]}')
    assert statuses["worker"].read_settings() == '{"class_names": ["ä", "日本"]}'
    statuses["chief"].write_settings("another")
    assert statuses["worker"].read_settings() == "another"


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
        self.sessions, self.steps, self._hooks, self._variables = [], [], [], []
        self._coordinators, self._gradients = [], []
        self._servers = servers
        self._add("chief", gradients[0])
        self._add("worker", gradients[1])

    def _add(self, type_, default_gradient):
        task, target = self._servers[type_]
        setter = tf.train.replica_device_setter(cluster=task.cluster, worker_device=task.device)
        with tf.Graph().as_default() as graph, tf.device(setter):
            x = tf.get_variable("x", initializer=0.0)
            global_step = tf.train.get_or_create_global_step()
            averages = tf.train.ExponentialMovingAverage(0.5)
            gradient = tf.placeholder_with_default(default_gradient, [])

            def apply_gradients(gradients):
                optimizer = tf.train.GradientDescentOptimizer(LEARNING_RATE)
                with tf.control_dependencies([optimizer.apply_gradients(gradients, global_step)]):
                    return averages.apply([x])

            step = SynchronizedStep([(gradient, x)], global_step, apply_gradients, 2)
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
        self._gradients.append(gradient)
        self._hooks.append(SynchronizationHook(step, self.status, task.is_chief))

    def start(self):
        """Does what happens when the sessions start; returns the coordinator of their threads."""
        coordinator = tf.train.Coordinator()
        self._coordinators.append(coordinator)
        for hook, session in zip(self._hooks, self.sessions, strict=True):
            hook.after_create_session(session, coordinator)
        return coordinator

    def restart_chief(self, gradient):
        """Ends the chief and starts another one, with the variables of step 0."""
        self._coordinators[-1].request_stop()
        self.sessions[0].close()
        for parts in (self.sessions, self.steps, self._gradients, self._hooks, self._variables):
            del parts[0]
        self._add("chief", gradient)
        for parts in (self.sessions, self.steps, self._gradients, self._hooks, self._variables):
            parts.insert(0, parts.pop())
        self._coordinators.append(tf.train.Coordinator())
        self._hooks[0].after_create_session(self.sessions[0], self._coordinators[-1])

    def read_step(self, worker):
        """Does what happens before a step."""
        self._hooks[worker].before_run(types.SimpleNamespace(session=self.sessions[worker]))

    def run_step(self, worker, gradient=None):
        self.read_step(worker)
        self.apply_gradient(worker, gradient)

    def apply_gradient(self, worker, gradient=None):
        """Runs the step itself, with another gradient than usual if given."""
        feeds = {} if gradient is None else {self._gradients[worker]: gradient}
        self.sessions[worker].run(self.steps[worker].train_op, feeds)

    def start_step(self, worker, gradient=None):
        """Runs a step in a thread, which it returns."""
        thread = threading.Thread(target=self.run_step, args=(worker, gradient), daemon=True)
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

    def close(self):
        for coordinator in self._coordinators:
            coordinator.request_stop()
        for session in self.sessions:
            session.close()


@pytest.fixture
def workers(servers):
    workers = Workers(servers, [1.0, 3.0])
    yield workers
    workers.close()


def test_a_step_applies_the_mean_of_all_gradients_once(workers):
    workers.start()
    x = average = 0.0
    for step in range(1, 6):
        workers.run_steps(0, 1)
        x -= LEARNING_RATE * 2.0
        average = (average + x) / 2
        # The moving average is already up to date when the workers continue.
        assert workers.read() == pytest.approx((x, average, step), abs=1e-6)


def test_the_chief_is_ready_once_its_session_has_started(workers):
    assert not workers.status.has(ChiefStatus.READY)
    workers.start()
    assert workers.status.has(ChiefStatus.STARTED)
    assert workers.status.has(ChiefStatus.READY)


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


def test_surplus_tokens_cost_one_gradient_each_and_block_nobody(workers):
    workers.start()
    workers.sessions[0].run(workers.steps[0].add_tokens_op)  # two
    for _ in range(6):
        workers.run_steps(0, 1)
    x, _, step = workers.read()
    assert 4 <= step <= 6
    # The mean gradient of a step is between the two workers' gradients.
    assert -0.3 * step <= x <= -0.1 * step


def test_a_restarted_chief_releases_workers_that_wait_for_the_first_one(workers):
    coordinator = workers.start()
    waiting = workers.start_step(1)
    assert waits(waiting)
    coordinator.request_stop()  # the first chief makes no further updates
    workers.start()
    assert ends(waiting)
    for _ in range(4):
        workers.run_steps(0, 1)
    assert workers.read()[2] >= 3


def test_a_restarted_chief_drops_the_gradients_that_the_first_one_has_left(workers):
    workers.start()
    for _ in range(3):
        workers.run_steps(0, 1)
    waiting = workers.start_step(1, gradient=1000.0)
    assert waits(waiting)
    workers.restart_chief(1.0)
    assert ends(waiting)
    for _ in range(4):
        workers.run_steps(0, 1)
    x, _, step = workers.read()
    assert 2 <= step <= 4
    assert -0.3 * step <= x <= -0.1 * step


def test_a_restarted_chief_drops_gradients_that_are_still_being_computed(workers):
    workers.start()
    for _ in range(3):
        workers.run_steps(0, 1)
    workers.read_step(1)  # at step 3, after which a worker computes its gradient
    workers.restart_chief(1.0)
    workers.apply_gradient(1, 1000.0)
    for _ in range(4):
        workers.run_steps(0, 1)
    x, _, step = workers.read()
    assert 2 <= step <= 4
    assert -0.3 * step <= x <= -0.1 * step


def test_the_chief_can_end_steps_that_wait_for_its_updates(workers):
    workers.start()
    errors = []

    def run_step():
        try:
            workers.run_step(1)
        except tf.errors.OutOfRangeError as error:
            errors.append(error)

    waiting = threading.Thread(target=run_step, daemon=True)
    waiting.start()
    assert waits(waiting)
    workers.status.end_steps()
    assert ends(waiting)
    run_step()  # a later step ends as well
    assert len(errors) == 2


def test_a_sparse_gradient_can_be_synchronized(servers):
    task, target = servers["chief"]
    setter = tf.train.replica_device_setter(cluster=task.cluster, worker_device=task.device)
    with tf.Graph().as_default() as graph, tf.device(setter):
        x = tf.get_variable("x", initializer=[1.0, 2.0, 3.0])
        global_step = tf.train.get_or_create_global_step()
        optimizer = tf.train.GradientDescentOptimizer(LEARNING_RATE)
        gradients = optimizer.compute_gradients(tf.gather(x, [1]))
        assert isinstance(gradients[0][0], tf.IndexedSlices)

        def apply_gradients(gradients):
            return optimizer.apply_gradients(gradients, global_step)

        step = SynchronizedStep(gradients, global_step, apply_gradients, 1)
        initialize = [tf.global_variables_initializer(), tf.local_variables_initializer()]
    with tf.Session(target, graph, tf.ConfigProto(device_filters=["/job:ps", task.device])) as sess:
        sess.run(initialize)
        step.start(sess, is_restart=False)
        sess.run(step.add_tokens_op)
        sess.run(step.read_step_op)
        sess.run(step.train_op)
        step.start(sess, is_restart=True)  # drops the gradient
        sess.run(step.read_step_op)
        sess.run([step.train_op, step.update_op])
        assert sess.run(x).tolist() == pytest.approx([1.0, 2.0 - LEARNING_RATE, 3.0])
