"""Which task of a cluster this process is, according to the environment variable TF_CONFIG."""

import json
import os
import re
from typing import NamedTuple

from support.base.errors import UserError, foreign_file

TASK_TYPES = ("ps", "chief", "worker", "evaluator")
_CURE = (
    '; write it like {"cluster": {"ps": ["host1:2222"], "chief": ["host2:2222"], "worker": '
    '["host3:2222"]}, "task": {"type": "worker", "index": 0}}'
)


class Task(NamedTuple):
    """One task of a cluster."""

    cluster: dict  # from "ps", "chief" and "worker" to lists of addresses, `host:port`
    type: str  # one of TASK_TYPES
    index: int  # the number of the task among those of its type

    @property
    def workers(self):
        """The tasks that train, as a list of (type, index). The first one is the chief."""
        return [
            (name, index)
            for name in ("chief", "worker")
            for index in range(len(self.cluster.get(name, [])))
        ]

    @property
    def parameter_servers(self):
        """The tasks that hold variables, as a list of (type, index)."""
        return [("ps", index) for index in range(len(self.cluster.get("ps", [])))]

    @property
    def is_chief(self):
        """Whether this task restores and saves checkpoints."""
        return (self.type, self.index) == self.workers[0]

    @property
    def device(self):
        """The prefix of this task's device names."""
        return f"/job:{self.type}/task:{self.index}"

    def address_of(self, peer):
        """Returns the address of a task given as (type, index)."""
        return self.cluster[peer[0]][peer[1]]

    def describe(self, *peers):
        """Returns the names and addresses of tasks given as (type, index), for messages."""
        return ", ".join(
            f"{type_} {index} ({self.address_of((type_, index))})" for type_, index in peers
        )


def find_task():
    """Returns the `Task` of this process, or None if it trains alone.

    A process trains alone if TF_CONFIG is unset, has an empty cluster, or describes a single worker
    without parameter servers. The cluster of the task omits evaluators, because no other task
    contacts them. It may be empty for an evaluator.

    Raises:
      UserError: TF_CONFIG is malformed or describes a cluster that cannot train.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    with foreign_file("TF_CONFIG", UserError, _CURE):
        config = json.loads(text)
    cluster = _parse_cluster(_read_object(config, "cluster"))
    task = _parse_task(_read_object(config, "task"), cluster)
    if not cluster and task.index == 0 and task.type in ("chief", "worker"):
        return None
    count = len(cluster.get(task.type, []))
    if task.type != "evaluator" and task.index >= count:
        raise UserError(
            f"TF_CONFIG says that this is {task.type} {task.index}, but the job `{task.type}` has "
            f"{count} tasks; the first one has index 0"
        )
    if (cluster and not task.workers) or len(cluster.get("chief", [])) > 1:
        raise UserError(
            "TF_CONFIG needs exactly one chief; without a job `chief`, worker 0 is the chief"
        )
    if task.type != "evaluator" and not task.parameter_servers:
        if len(task.workers) == 1:
            return None
        raise UserError(
            "TF_CONFIG needs a parameter server to train on several machines: add a job `ps` to "
            "its cluster, or unset TF_CONFIG to train on this machine alone"
        )
    return task


def _malformed(reason):
    """Returns the error for a TF_CONFIG that is JSON, but not of the expected form."""
    return UserError(f"TF_CONFIG cannot be read ({reason}){_CURE}")


def _read_object(config, name):
    """Returns the JSON object with this name in TF_CONFIG: a dict, empty if it is missing."""
    if not isinstance(config, dict):
        raise _malformed("it is not a JSON object")
    if not isinstance(value := config.get(name) or {}, dict):
        raise _malformed(f"`{name}` is not a JSON object")
    return value


def _parse_type(name):
    """Returns one of TASK_TYPES from the name of a job or the type of a task."""
    name = "chief" if name == "master" else name  # as some clouds write it
    if name not in TASK_TYPES:
        shown = repr(name) if isinstance(name, str) else "`type`"
        raise _malformed(f"{shown} is not one of {', '.join(TASK_TYPES)}")
    return name


def _parse_cluster(jobs):
    """Returns the cluster of a `Task`, without evaluators and without jobs that have no tasks."""
    cluster = {}
    for job, addresses in jobs.items():
        addresses = addresses or []
        if not isinstance(addresses, list) or not all(isinstance(a, str) for a in addresses):
            raise _malformed(f"the job `{job}` does not list the addresses of its tasks")
        if addresses and _parse_type(job) != "evaluator":
            cluster.setdefault(_parse_type(job), []).extend(addresses)
    endpoints = [split_address(address) for job in cluster.values() for address in job]
    if len(set(endpoints)) < len(endpoints):
        raise _malformed("two tasks have the same address")
    return cluster


def _parse_task(task, cluster):
    """Returns the `Task` that a JSON object describes. Its index may be out of range."""
    type_, index = task.get("type"), task.get("index") or 0
    if not type_:
        if sum(map(len, cluster.values())) > 1:
            raise _malformed("`type` is missing in `task`")
        type_ = next(iter(cluster), "worker")  # the only one
    if not isinstance(index, int | str) or not re.fullmatch(r"\d{1,9}", str(index)):
        raise _malformed("`index` is not a number, 0 or more")
    return Task(cluster, _parse_type(type_), int(index))


def split_address(address):
    """Returns the host (string) and the port (int) of `host:port` or `[IPv6 address]:port`.

    The host has no brackets. Raises UserError if the string is not such an address.
    """
    match = re.fullmatch(r"\[?([^][\s/]+)\]?:(\d{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise _malformed(f"{address!r} is not an address of the form host:port")
    return match[1], int(match[2])
