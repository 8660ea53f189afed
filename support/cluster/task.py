"""Which task of a cluster this process is, according to the environment variable TF_CONFIG."""

import json
import os
import re
from typing import NamedTuple

from support.base.errors import UserError, foreign_file

TASK_TYPES = ("ps", "chief", "worker", "evaluator")


class Task(NamedTuple):
    """One task of a cluster.

    Attributes:
      cluster: dict from "ps", "chief" and "worker" to lists of addresses, `host:port`.
      type: string; one of TASK_TYPES.
      index: int; the number of the task among those of its type.
    """

    cluster: dict
    type: str
    index: int

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
    """Returns the `Task` of this process.

    The job and the task type `master`, as some clouds write it, are the chief.

    Returns:
      A `Task`, or None if TF_CONFIG is unset, has an empty cluster, or describes a single worker
      without parameter servers. The cluster of the task omits evaluators, because no other task
      contacts them. It may be empty for an evaluator.

    Raises:
      UserError: TF_CONFIG is malformed or describes a cluster that cannot train.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    with foreign_file("TF_CONFIG", UserError):
        config = json.loads(text)
    if not isinstance(config, dict):
        raise _malformed("it is not a JSON object")
    cluster = _parse_cluster(_get_object(config, "cluster"))
    task = _parse_task(_get_object(config, "task"), cluster)
    if not cluster and task.type in ("chief", "worker") and not task.index:
        return None
    if task.type != "evaluator":
        task = _check_index(task)
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
    return UserError(f"TF_CONFIG is malformed: {reason}")


def _get_object(config, key):
    """Returns the JSON object at a key, as a dict; an empty one if it is missing or null."""
    value = config.get(key)
    if not isinstance(value, dict | None):
        raise _malformed(f"`{key}` is not a JSON object")
    return value or {}


def _parse_cluster(jobs):
    """Returns the cluster of a `Task`, without evaluators and without jobs that have no tasks."""
    jobs = {job: tasks for job, tasks in jobs.items() if tasks and job != "evaluator"}
    if "master" in jobs:
        if "chief" in jobs:
            raise UserError(
                "TF_CONFIG has a job `chief` and a job `master`, which mean the same; remove one"
            )
        jobs["chief"] = jobs.pop("master")
    if unknown := sorted(jobs.keys() - set(TASK_TYPES)):
        raise UserError(
            f"TF_CONFIG has a job {unknown[0]!r}; a job must be one of {', '.join(TASK_TYPES)}"
        )
    cluster = {job: _parse_addresses(job, tasks) for job, tasks in jobs.items()}
    endpoints = [split_address(address) for job in cluster.values() for address in job]
    if len(set(endpoints)) < len(endpoints):
        raise UserError("TF_CONFIG gives two tasks the same address")
    return cluster


def _parse_addresses(job, tasks):
    """Returns the addresses of a job: of a list, or of a dict whose keys are all indices."""
    if isinstance(tasks, dict):
        try:
            tasks = [tasks[str(index)] for index in range(len(tasks))]
        except KeyError as error:
            raise UserError(
                f"TF_CONFIG lists only some tasks of the job `{job}`: {error} is missing"
            ) from error
    if not isinstance(tasks, list):
        raise _malformed(f"the job `{job}` is not a list of addresses")
    try:
        for address in tasks:
            split_address(address)
    except ValueError as error:
        raise _malformed(f"{error}, in the job `{job}`") from error
    return tasks


def _parse_task(task, cluster):
    """Returns the `Task` that a JSON object describes. Its index may be missing or out of range."""
    type_, index = task.get("type"), task.get("index")
    if not type_:
        if sum(map(len, cluster.values())) > 1:
            raise UserError(
                "TF_CONFIG does not say which task this is: `type` is missing in `task`"
            )
        type_ = next(iter(cluster), "worker")  # the only one
    type_ = "chief" if type_ == "master" else type_
    if type_ not in TASK_TYPES:
        types = ", ".join(TASK_TYPES)
        raise UserError(f"TF_CONFIG sets the task type to {type_!r}; it must be one of {types}")
    try:
        index = None if index is None else int(str(index))
    except ValueError as error:
        raise _malformed(f"the `index` of the task is {index!r}, not an integer") from error
    return Task(cluster, type_, index)


def _check_index(task):
    """Returns the task with its index, which may be missing if the job has no other task."""
    count = len(task.cluster.get(task.type, []))
    if task.index is None and count > 1:
        raise UserError(f"TF_CONFIG does not say which {task.type} this is: `index` is missing")
    task = task._replace(index=task.index or 0)
    if not 0 <= task.index < count:
        raise UserError(
            f"TF_CONFIG says that this is {task.type} {task.index}, but the job `{task.type}` has "
            f"{count} tasks; the first one has index 0"
        )
    return task


def split_address(address):
    """Returns the host and the port of an address.

    Args:
      address: string, `host:port`. The host can be an IPv6 address in brackets.

    Returns:
      (string, int): the host without brackets, and the port.

    Raises:
      ValueError: the string is not such an address.
    """
    host, _, port = str(address).rpartition(":")
    host = host.strip("[]")
    try:
        host.encode("idna")  # as the system does, to find the host: no label is empty or too long
        is_valid = host and not re.search(r"[\s/]", host) and port.isdecimal()
    except UnicodeError:
        is_valid = False
    if not is_valid or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not an address of the form host:port")
    return host, int(port)
