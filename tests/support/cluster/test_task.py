"""Which task a process is according to TF_CONFIG, and which values of TF_CONFIG are refused."""

import json

import pytest

from support.cluster.task import find_task, split_address
from support.errors import UserError

CLUSTER = {"ps": ["a:1"], "chief": ["b:1"], "worker": ["c:1", "d:1"]}


def config(cluster=CLUSTER, type_="worker", index=0):
    return {"cluster": cluster, "task": {"type": type_, "index": index}}


@pytest.fixture
def set_tf_config(monkeypatch):
    """A function that sets TF_CONFIG to a string, or to the JSON of another value."""

    def set_tf_config(value):
        text = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv("TF_CONFIG", text)

    return set_tf_config


def test_no_tf_config_means_no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert find_task() is None


@pytest.mark.parametrize(
    "value", ["", config({"chief": ["a:1"]}, "chief"), config({"worker": ["a:1"]})]
)
def test_an_empty_tf_config_or_a_single_worker_means_no_cluster(set_tf_config, value):
    set_tf_config(value)
    assert find_task() is None


@pytest.mark.parametrize("index", [1, "1"])  # some tools write the index as a string
def test_a_task_lists_all_tasks_of_its_cluster(set_tf_config, index):
    set_tf_config(config(index=index))
    task = find_task()
    assert (task.type, task.index, task.cluster) == ("worker", 1, CLUSTER)
    assert task.workers == [("chief", 0), ("worker", 0), ("worker", 1)]
    assert task.parameter_servers == [("ps", 0)]
    assert task.worker_index == 2
    assert task.device == "/job:worker/task:1"
    assert task.address_of(("chief", 0)) == "b:1"
    assert task.describe(("worker", 1)) == "worker 1 (d:1)"


@pytest.mark.parametrize(("type_", "is_chief"), [("chief", True), ("worker", False)])
def test_the_task_chief_is_the_chief(set_tf_config, type_, is_chief):
    set_tf_config(config(type_=type_))
    assert find_task().is_chief is is_chief


@pytest.mark.parametrize(("index", "is_chief"), [(0, True), (1, False)])
def test_worker_0_is_the_chief_of_a_cluster_without_a_chief(set_tf_config, index, is_chief):
    set_tf_config(config({"ps": ["a:1"], "worker": ["c:1", "d:1"]}, index=index))
    assert find_task().is_chief is is_chief


@pytest.mark.parametrize(
    "cluster", [CLUSTER, {**CLUSTER, "evaluator": ["e:1"]}, {"chief": ["b:1"]}]
)
def test_an_evaluator_need_not_be_listed_in_the_cluster(set_tf_config, cluster):
    set_tf_config(config(cluster, "evaluator"))
    task = find_task()
    assert task.type == "evaluator"
    assert "evaluator" not in task.cluster


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "is malformed"),
        ("[]", "task type to None"),
        ("{}", "task type to None"),
        ({"cluster": CLUSTER}, "task type to None"),
        ({"cluster": {"ps": "a:1"}, "task": {"type": "ps", "index": 0}}, "is malformed"),
        (config({**CLUSTER, "ps": ["nowhere"]}), "is malformed: 'nowhere' is not an address"),
        (config({**CLUSTER, "ps": ["a:0"]}), "is malformed: 'a:0' is not an address"),
        (config({**CLUSTER, "ps": ["a:70000"]}), "is malformed: 'a:70000' is not an address"),
        (config(index="first"), "is malformed"),
        (config(type_="driver"), "task type to 'driver'; it must be one of ps, chief"),
        (config({**CLUSTER, "driver": ["e:1"]}), "a job 'driver'; a job must be one of ps, chief"),
        (config(index=2), "this is worker 2, but the job `worker` has 2 tasks"),
        (config(index=-1), "this is worker -1, but the job `worker` has 2 tasks"),
        (config({"worker": ["a:1"]}, index=3), "this is worker 3, but the job `worker` has 1"),
        (config({"worker": ["a:1"]}, "ps"), "this is ps 0, but the job `ps` has 0 tasks"),
        ({"cluster": CLUSTER, "task": {"type": "worker"}}, "which worker .*`index` is missing"),
        (config({"chief": ["b:1"], "worker": ["c:1"]}), "needs a parameter server"),
        (config({"ps": ["a:1"]}, "ps"), "needs exactly one chief"),
        (config({**CLUSTER, "chief": ["b:1", "b:2"]}), "needs exactly one chief"),
        (config({**CLUSTER, "ps": ["b:1"]}), "gives two tasks the same address"),
    ],
)
def test_an_unusable_tf_config_is_refused_in_one_line(set_tf_config, value, message):
    set_tf_config(value)
    with pytest.raises(UserError, match=f"^TF_CONFIG .*{message}") as error:
        find_task()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("10.0.0.1:2222", ("10.0.0.1", 2222)),
        ("[::1]:2222", ("::1", 2222)),
        ("host.example:65535", ("host.example", 65535)),
    ],
)
def test_an_address_is_split_into_host_and_port(address, parts):
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["host", "host:", ":2222", "host:port", "host:-1", "host:²", 7])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(ValueError, match="is not an address of the form host:port"):
        split_address(address)
