"""Which task a process is according to TF_CONFIG, and which values of TF_CONFIG are refused."""

import json

import pytest

from support.base.errors import UserError
from support.cluster.task import find_task, split_address

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


SINGLE = {"chief": ["a:1"]}
CLOUD = {"environment": "cloud", "job": '{"region": "x"}'}  # as on AI Platform and Vertex AI


@pytest.mark.parametrize(
    "value",
    [
        "",
        CLOUD,
        {"cluster": None, "task": None},
        {"cluster": {"chief": [], "worker": [], "ps": None}, "task": {}},
        {**CLOUD, "cluster": {}, "task": {"type": "master", "index": 0, "trial": "1"}},
        config({**SINGLE, "ps": [], "evaluator": ["e:1"]}, "chief"),
        config({"worker": ["a:1"]}, index="0"),
        {"cluster": SINGLE},
        {"cluster": SINGLE, "task": {"type": "chief"}},
    ],
)
def test_an_empty_cluster_or_a_single_worker_means_a_single_process(set_tf_config, value):
    set_tf_config(value)
    assert find_task() is None


@pytest.mark.parametrize(("job", "type_"), [("chief", "master"), ("master", "master")])
def test_master_is_another_name_of_the_chief(set_tf_config, job, type_):
    cluster = {"ps": ["a:1"], job: ["b:1"], "worker": ["c:1"]}
    set_tf_config(config(cluster, type_))
    task = find_task()
    assert task.is_chief
    assert task.type == "chief"
    assert task.cluster == {"ps": ["a:1"], "chief": ["b:1"], "worker": ["c:1"]}


@pytest.mark.parametrize("index", [1, "1"])  # some tools write the index as a string
def test_a_task_lists_all_tasks_of_its_cluster(set_tf_config, index):
    set_tf_config(config(index=index))
    task = find_task()
    assert (task.type, task.index, task.cluster) == ("worker", 1, CLUSTER)
    assert task.workers == [("chief", 0), ("worker", 0), ("worker", 1)]
    assert task.parameter_servers == [("ps", 0)]
    assert task.device == "/job:worker/task:1"
    assert task.describe(("worker", 1), ("chief", 0)) == "worker 1 (d:1), chief 0 (b:1)"


def test_a_job_may_map_all_indices_to_addresses(set_tf_config):
    set_tf_config(config({**CLUSTER, "worker": {"1": "d:1", "0": "c:1"}}, index=1))
    assert find_task().cluster == CLUSTER


WITHOUT_CHIEF = {"ps": ["a:1"], "worker": ["c:1", "d:1"]}  # worker 0 is the chief


@pytest.mark.parametrize(
    ("cluster", "index", "is_chief"),
    [(CLUSTER, 0, False), (WITHOUT_CHIEF, 0, True), (WITHOUT_CHIEF, 1, False)],
)
def test_without_a_chief_worker_0_is_the_chief(set_tf_config, cluster, index, is_chief):
    set_tf_config(config(cluster, index=index))
    assert find_task().is_chief is is_chief


@pytest.mark.parametrize("cluster", [{**CLUSTER, "evaluator": ["e:1"]}, {"chief": ["b:1"]}, {}])
def test_an_evaluator_need_not_be_listed_in_the_cluster(set_tf_config, cluster):
    set_tf_config(config(cluster, "evaluator"))
    task = find_task()
    assert task.type == "evaluator"
    assert "evaluator" not in task.cluster


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", 'cannot be read .Expecting property name .*; write it like {"cluster": {"ps": '),
        ("null", "cannot be read "),
        ({"cluster": ["a:1"]}, "cannot be read "),
        (config({**CLUSTER, "ps": 1}), "cannot be read "),
        (config({**CLUSTER, "ps": {"1": "a:1"}}), "cannot be read .'0'"),
        (config({**CLUSTER, "ps": ["nowhere"]}), "cannot be read .'nowhere' is not an address"),
        (config({**CLUSTER, "ps": ["b:1"]}), "cannot be read .two tasks have the same address"),
        (config({**CLUSTER, "driver": ["e:1"]}), "cannot be read .'driver' is not one of ps, "),
        (config(type_="driver"), "cannot be read .'driver' is not one of ps, chief"),
        ({"cluster": CLUSTER}, "cannot be read .`type` is missing in `task`"),
        (config(index="first"), "cannot be read .* 'first'"),
        (config({}, "ps"), "this is ps 0, but the job `ps` has 0 tasks"),
        (config({}, index=1), "this is worker 1, but the job `worker` has 0 tasks"),
        (config(index=2), "this is worker 2, but the job `worker` has 2 tasks"),
        (config(index=-1), "this is worker -1, but the job `worker` has 2 tasks"),
        (config({"chief": ["b:1"], "worker": ["c:1"]}), "needs a parameter server .* a job `ps`"),
        (config({"ps": ["a:1"]}, "ps"), "needs exactly one chief"),
        (config({**CLUSTER, "master": ["e:1"]}), "needs exactly one chief"),
    ],
)
def test_an_unusable_tf_config_is_refused_in_one_line(set_tf_config, value, message):
    set_tf_config(value)
    with pytest.raises(UserError, match=f"^TF_CONFIG .*{message}"):
        find_task()


@pytest.mark.parametrize(
    ("address", "parts"), [("[::1]:2222", ("::1", 2222)), ("my-host.a:65535", ("my-host.a", 65535))]
)
def test_an_address_is_split_into_host_and_port(address, parts):
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["host", ":2222", "host:-1", "host:70000", "grpc://a:1", 7])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(ValueError, match="is not an address of the form host:port"):
        split_address(address)
