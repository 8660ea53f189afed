"""A worker of a cluster: its number, what crosses the network, and the loss of workers."""

import types

import numpy as np
import pytest
from conftest import free_addresses, listen

import cifar10
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


def test_a_worker_knows_its_number_among_all_that_train():
    chief = make_worker(Task(CLUSTER, "chief", 0))
    assert (chief.index, chief.count, chief.is_chief) == (0, 3, True)
    worker = make_worker(Task(CLUSTER, "worker", 1))
    assert (worker.index, worker.count, worker.is_chief) == (2, 3, False)


def test_sessions_connect_to_the_parameter_servers_and_not_to_other_workers():
    worker = make_worker(Task(CLUSTER, "worker", 1))
    assert worker.device_filters == ["/job:ps", "/job:worker/task:1"]


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
    # The update reads and writes variables where they are.
    for transfers in find_transfers(graph, worker._step._update_op):
        assert [shape for shape in transfers if shape] == []


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
    trainer = make_worker(task, timeout=60)
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


def test_only_the_chief_checks_the_workers(capsys):
    task = Task(
        {"ps": ["a:1"], "chief": free_addresses(1), "worker": free_addresses(2)}, "worker", 0
    )
    make_worker(task).check_peers()
    assert capsys.readouterr().err == ""


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
