"""Which task of a cluster this process is, according to the environment variable TF_CONFIG."""

import os
from typing import NamedTuple

from support.errors import UserError
from support.tensorflow_v1 import tf

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
        return [("ps", index) for index in range(len(self.cluster["ps"]))]

    @property
    def worker_index(self):
        """The number of this task among the tasks that train; the chief is 0."""
        return self.workers.index((self.type, self.index))

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

    def describe(self, peer):
        """Returns the name and the address of a task given as (type, index), for messages."""
        return f"{peer[0]} {peer[1]} ({self.address_of(peer)})"


def find_task():
    """Returns the `Task` of this process.

    Returns:
      A `Task`, or None if TF_CONFIG is unset or describes a single worker without parameter
      servers. The cluster of the task omits evaluators, because no other task contacts them.

    Raises:
      UserError: TF_CONFIG is malformed or describes a cluster that cannot train.
    """
    if not os.environ.get("TF_CONFIG"):
        return None
    task = _parse_task()
    _check_cluster(task)
    if task.type != "evaluator":
        _check_index(task)
        if not task.cluster.get("ps"):
            if len(task.workers) == 1:
                return None
            raise UserError("TF_CONFIG needs a parameter server: add a job `ps` to its cluster")
    jobs = {name: addresses for name, addresses in task.cluster.items() if name != "evaluator"}
    return task._replace(cluster=jobs)


def _parse_task():
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        task = Task(resolver.cluster_spec().as_dict(), resolver.task_type, resolver.task_id)
        endpoints = [split_address(one) for job in task.cluster.values() for one in job]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"TF_CONFIG is malformed: {error}") from error
    if len(set(endpoints)) < len(endpoints):
        raise UserError("TF_CONFIG gives two tasks the same address")
    return task


def _check_cluster(task):
    types = ", ".join(TASK_TYPES)
    if task.type not in TASK_TYPES:
        raise UserError(f"TF_CONFIG sets the task type to {task.type!r}; it must be one of {types}")
    if unknown := sorted(task.cluster.keys() - set(TASK_TYPES)):
        raise UserError(f"TF_CONFIG has a job {unknown[0]!r}; a job must be one of {types}")
    if not task.workers or len(task.cluster.get("chief", [])) > 1:
        raise UserError(
            "TF_CONFIG needs exactly one chief; without a job `chief`, worker 0 is the chief"
        )


def _check_index(task):
    count = len(task.cluster.get(task.type, []))
    if not 0 <= (task.index or 0) < count:
        raise UserError(
            f"TF_CONFIG says that this is {task.type} {task.index}, but the job `{task.type}` has "
            f"{count} tasks; the first one has index 0"
        )
    if task.index is None:
        raise UserError(f"TF_CONFIG does not say which {task.type} this is: `index` is missing")


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
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not an address of the form host:port")
    return host.strip("[]"), int(port)
