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


def test_no_tf_config_means_no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert find_task() is None


SINGLE = {"chief": ["a:1"]}
CLOUD = {"environment": "cloud", "job": '{"region": "x"}'}  # as on AI Platform and Vertex AI


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "{}",
        CLOUD,
        {"cluster": {}},
        {"cluster": None, "task": None},
        {"cluster": {"chief": [], "worker": [], "ps": None}, "task": {}},
        {**CLOUD, "cluster": {}, "task": {"type": "master", "index": 0, "trial": "1"}},
        {**CLOUD, **config({}, "worker", "0")},
        {**CLOUD, **config({}, "")},
        config(SINGLE, "chief"),
        config({**SINGLE, "ps": [], "evaluator": ["e:1"]}, "chief"),
        config({"worker": ["a:1"]}),
        config({"master": ["a:1"]}, "master"),
        config({"worker": {"0": "a:1"}}),
        {"cluster": SINGLE},
        {"cluster": SINGLE, "task": {"type": "chief"}},
    ],
)
def test_an_empty_cluster_or_a_single_worker_means_a_single_process(set_tf_config, value):
    set_tf_config(value)
    assert find_task() is None


@pytest.mark.parametrize("type_", ["chief", "master"])
@pytest.mark.parametrize("job", ["chief", "master"])
def test_master_is_another_name_of_the_chief(set_tf_config, job, type_):
    cluster = {"ps": ["a:1"], job: ["b:1"], "worker": ["c:1"]}
    set_tf_config(config(cluster, type_))
    task = find_task()
    assert task.is_chief
    assert task.type == "chief"
    assert task.cluster == {"ps": ["a:1"], "chief": ["b:1"], "worker": ["c:1"]}
    set_tf_config(config(cluster, "worker"))
    assert find_task().workers == [("chief", 0), ("worker", 0)]


def test_a_job_may_map_all_indices_to_addresses(set_tf_config):  # as Kubeflow writes some
    set_tf_config(config({**CLUSTER, "worker": {"1": "d:1", "0": "c:1"}}, index=1))
    assert find_task().cluster == CLUSTER


def test_the_only_task_of_a_job_needs_no_index(set_tf_config):
    set_tf_config({"cluster": CLUSTER, "task": {"type": "ps"}})
    assert find_task().index == 0


@pytest.mark.parametrize("index", [1, "1"])  # some tools write the index as a string
def test_a_task_lists_all_tasks_of_its_cluster(set_tf_config, index):
    set_tf_config(config(index=index))
    task = find_task()
    assert (task.type, task.index, task.cluster) == ("worker", 1, CLUSTER)
    assert task.workers == [("chief", 0), ("worker", 0), ("worker", 1)]
    assert task.parameter_servers == [("ps", 0)]
    assert task.device == "/job:worker/task:1"
    assert task.address_of(("chief", 0)) == "b:1"
    assert task.describe(("worker", 1)) == "worker 1 (d:1)"


WITHOUT_CHIEF = {"ps": ["a:1"], "worker": ["c:1", "d:1"]}  # worker 0 is the chief


@pytest.mark.parametrize(
    ("cluster", "type_", "index", "is_chief"),
    [
        (CLUSTER, "chief", 0, True),
        (CLUSTER, "worker", 0, False),
        (WITHOUT_CHIEF, "worker", 0, True),
        (WITHOUT_CHIEF, "worker", 1, False),
    ],
)
def test_the_task_chief_or_worker_0_is_the_chief(set_tf_config, cluster, type_, index, is_chief):
    set_tf_config(config(cluster, type_, index))
    assert find_task().is_chief is is_chief


@pytest.mark.parametrize(
    "cluster", [CLUSTER, {**CLUSTER, "evaluator": ["e:1"]}, {"chief": ["b:1"]}, {}]
)
def test_an_evaluator_need_not_be_listed_in_the_cluster(set_tf_config, cluster):
    set_tf_config(config(cluster, "evaluator"))
    task = find_task()
    assert task.type == "evaluator"
    assert "evaluator" not in task.cluster


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "cannot be read .Expecting property name"),
        ("[]", "is malformed: it is not a JSON object"),
        ("null", "is malformed: it is not a JSON object"),
        ({"cluster": []}, "is malformed: `cluster` is not a JSON object"),
        ({"cluster": CLUSTER, "task": "ps"}, "is malformed: `task` is not a JSON object"),
        ({"cluster": CLUSTER}, "does not say which task this is: `type` is missing in `task`"),
        (config({**CLUSTER, "ps": "a:1"}), "is malformed: the job `ps` is not a list"),
        (config({**CLUSTER, "ps": ["nowhere"]}), "is malformed: 'nowhere' is not an address"),
        (config({**CLUSTER, "ps": ["a:0"]}), "is malformed: 'a:0' is not an address"),
        (config({**CLUSTER, "ps": ["a:70000"]}), "is malformed: 'a:70000' is not an address"),
        (config({**CLUSTER, "ps": [None]}), "is malformed: None is not an address"),
        (config({**CLUSTER, "ps": {"1": "a:1"}}), "lists only some tasks of the job `ps`"),
        (config({**CLUSTER, "worker": {"x": "a:1"}}), "lists only some tasks of the job `worker`"),
        (config({**CLUSTER, "master": ["e:1"]}), "has a job `chief` and a job `master`"),
        (config(index="first"), "is malformed: the `index` of the task is 'first'"),
        (config(index=0.5), "is malformed: the `index` of the task is 0.5"),
        (config({}, "ps"), "this is ps 0, but the job `ps` has 0 tasks"),
        (config({}, index=1), "this is worker 1, but the job `worker` has 0 tasks"),
        (config({}, "driver"), "task type to 'driver'; it must be one of ps, chief"),
        (config(type_="driver"), "task type to 'driver'; it must be one of ps, chief"),
        (config({**CLUSTER, "driver": ["e:1"]}), "a job 'driver'; a job must be one of ps, chief"),
        (config(index=2), "this is worker 2, but the job `worker` has 2 tasks"),
        (config(index=-1), "this is worker -1, but the job `worker` has 2 tasks"),
        (config({"worker": ["a:1"]}, index=3), "this is worker 3, but the job `worker` has 1"),
        (config({"worker": ["a:1"]}, "ps"), "this is ps 0, but the job `ps` has 0 tasks"),
        ({"cluster": CLUSTER, "task": {"type": "worker"}}, "which worker .*`index` is missing"),
        (config({"chief": ["b:1"], "worker": ["c:1"]}), "needs a parameter server .* a job `ps`"),
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


MALFORMED = ["host", "host:", ":2222", "host:port", "host:-1", "host:²", "a..b:1", "grpc://a:1"]


@pytest.mark.parametrize("address", [*MALFORMED, "a b:1", 7])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(ValueError, match="is not an address of the form host:port"):
        split_address(address)
