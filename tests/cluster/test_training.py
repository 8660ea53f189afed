"""A worker of a cluster: its number, the step that it reads, and the loss of workers."""

import types

import pytest
from conftest import free_addresses, listen

from support.base import worker
from support.base.errors import UserError
from support.cluster.server import start_server
from support.cluster.synchronization import DONE, FAILED, READY
from support.cluster.task import Task
from support.cluster.training import CHIEF_HAS_STOPPED, Worker
from support.ops.tensorflow_v1 import session_config, tf

CLUSTER = {"ps": ["a:1", "b:1"], "chief": ["c:1"], "worker": ["d:1", "e:1"]}


def make_worker(task, state="", timeout=600):
    """Returns the worker of a task. It reads `state` as the state of the chief."""
    status = types.SimpleNamespace(read=lambda key: state)
    return Worker(task, target="", statuses=[status], timeout=timeout)


def test_a_worker_knows_its_number_and_connects_to_no_other_worker():
    chief = make_worker(Task(CLUSTER, "chief", 0))
    assert (chief.index, chief.count, chief.is_chief) == (0, 3, True)
    worker = make_worker(Task(CLUSTER, "worker", 1))
    assert (worker.index, worker.count, worker.is_chief) == (2, 3, False)
    assert worker.device_filters == ["/job:ps", "/job:worker/task:1"]


def test_a_worker_reads_the_step_from_the_parameter_server():
    ps, chief = free_addresses(2)
    cluster = {"ps": [ps], "chief": [chief]}
    targets = [
        start_server(Task(cluster, type_, 0), session_config()).target for type_ in ("ps", "chief")
    ]
    worker = Worker(Task(cluster, "chief", 0), targets[1], statuses=[], timeout=600)
    with tf.Graph().as_default() as graph, tf.device(worker.device_setter()):
        with tf.device("/cpu:0"):
            global_step = tf.train.get_or_create_global_step()
        initialize, assign = global_step.initializer, tf.assign(global_step, 7).op
    with tf.Session(worker.target, graph) as session:
        session.run(initialize)
        session.run(assign)
        assert worker.read_global_step() == 7


def test_the_chief_reports_a_lost_worker_its_return_and_the_timeout(capsys, set_time):
    chief, worker = free_addresses(2)
    task = Task({"ps": ["a:1"], "chief": [chief], "worker": [worker]}, "chief", 0)
    make_worker(task._replace(type="worker")).check_peers()  # reports nothing
    trainer = make_worker(task, timeout=60)
    trainer.check_peers()
    set_time(59.5)
    trainer.check_peers()
    with listen(worker):
        trainer.check_peers()
    set_time(100.0)
    trainer.check_peers()
    set_time(160.0)
    with pytest.raises(UserError, match=rf"^no response from worker 0 \({worker}\) for 60 s "):
        trainer.check_peers()
    assert capsys.readouterr().err.splitlines() == [
        f"worker 0 ({worker}) does not respond: waiting until it is restarted",
        f"worker 0 ({worker}) is back after 59.5 s",
        f"worker 0 ({worker}) does not respond: waiting until it is restarted",
    ]


@pytest.mark.parametrize(
    ("state", "is_over", "reason"),
    [
        (READY, False, "the input of this worker has ended"),
        (FAILED, False, CHIEF_HAS_STOPPED),
        (DONE, True, None),
    ],
)
def test_a_worker_knows_from_the_chief_why_training_has_ended(state, is_over, reason):
    ended = make_worker(Task(CLUSTER, "worker", 0), state)
    assert isinstance(ended, worker.Worker)
    assert ended.is_over is is_over
    assert is_over or ended.explain_end() == reason
