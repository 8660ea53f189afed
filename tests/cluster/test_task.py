"""Which task a process is according to TF_CONFIG, and which values of TF_CONFIG are refused."""

import json
import re

import pytest

from support.base.errors import UserError
from support.cluster import task
from support.cluster.task import find_task

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


@pytest.mark.parametrize("job", ["chief", "master"])
def test_master_is_another_name_of_the_chief(set_tf_config, job):
    set_tf_config(config({"ps": ["a:1"], job: ["b:1"], "worker": ["c:1"]}, "master"))
    found = find_task()
    assert found.is_chief
    assert found.type == "chief"
    assert found.cluster == {"ps": ["a:1"], "chief": ["b:1"], "worker": ["c:1"]}


@pytest.mark.parametrize("index", [1, "1"])  # some tools write the index as a string
def test_a_task_lists_all_tasks_of_its_cluster(set_tf_config, index):
    set_tf_config(config(index=index))
    found = find_task()
    assert (found.type, found.index, found.cluster) == ("worker", 1, CLUSTER)
    assert found.workers == [("chief", 0), ("worker", 0), ("worker", 1)]
    assert found.parameter_servers == [("ps", 0)]
    assert found.device == "/job:worker/task:1"
    assert found.describe(("worker", 1), ("chief", 0)) == "worker 1 (d:1), chief 0 (b:1)"


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
    found = find_task()
    assert found.type == "evaluator"
    assert "evaluator" not in found.cluster


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "Expecting property name .*"),
        ("0", "it is not a JSON object"),
        ({"cluster": ["a:1"]}, "`cluster` is not a JSON object"),
        ({"cluster": CLUSTER, "task": "ps"}, "`task` is not a JSON object"),
        (config({**CLUSTER, "ps": "a:1"}), "the job `ps` does not list the addresses of its tasks"),
        (config({**CLUSTER, "ps": [["a:1"]]}), "the job `ps` does not list the addresses .*"),
        (config({**CLUSTER, "ps": {"0": "a:1"}}), "the job `ps` does not list the addresses .*"),
        (config({**CLUSTER, "ps": ["nowhere"]}), "'nowhere' is not an address of the form .*"),
        (config({**CLUSTER, "ps": ["b:1"]}), "two tasks have the same address"),
        (config({**CLUSTER, "driver": ["e:1"]}), "'driver' is not one of ps, chief, .*"),
        (config(type_="driver"), "'driver' is not one of ps, chief, .*"),
        (config(type_=["worker"]), "`type` is not one of ps, chief, .*"),
        ({"cluster": CLUSTER}, "`type` is missing in `task`"),
        (config(index=[0]), "`index` is not a number, 0 or more"),
        (config(index="9" * 5000), "`index` is not a number, 0 or more"),
        (config(index=-1), "`index` is not a number, 0 or more"),
    ],
)
def test_a_malformed_tf_config_is_refused_with_what_is_wrong(set_tf_config, value, reason):
    set_tf_config(value)
    pattern = rf'TF_CONFIG cannot be read \({reason}\); write it like {{"cluster": .*'
    with pytest.raises(UserError) as caught:
        find_task()
    assert re.fullmatch(pattern, str(caught.value))


def test_a_mistake_in_the_code_is_not_taken_for_a_malformed_tf_config(set_tf_config, monkeypatch):
    set_tf_config(config())
    monkeypatch.setattr(task, "split_address", lambda address: {}[address])
    with pytest.raises(KeyError):
        find_task()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (config({}, "ps"), "this is ps 0, but the job `ps` has 0 tasks"),
        (config(index=2), "this is worker 2, but the job `worker` has 2 tasks"),
        (config({"chief": ["b:1"], "worker": ["c:1"]}), "needs a parameter server .* a job `ps`"),
        (config({"ps": ["a:1"]}, "ps"), "needs exactly one chief"),
        (config({**CLUSTER, "master": ["e:1"]}), "needs exactly one chief"),
    ],
)
def test_a_cluster_that_cannot_train_is_refused(set_tf_config, value, message):
    set_tf_config(value)
    with pytest.raises(UserError, match=f"^TF_CONFIG .*{message}"):
        find_task()


@pytest.mark.parametrize(
    ("address", "parts"), [("[::1]:2222", ("::1", 2222)), ("my-host.a:65535", ("my-host.a", 65535))]
)
def test_an_address_is_split_into_host_and_port(address, parts):
    assert task.split_address(address) == parts


@pytest.mark.parametrize("address", ["host", ":2222", "host:-1", "host:70000", "grpc://a:1"])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(UserError, match="is not an address of the form host:port"):
        task.split_address(address)
