"""What each task of a cluster does during synchronous training on several machines.

Parameter servers ("ps") hold the variables. Each worker, including the chief, computes the
gradients of its own batches. Once a step, the average of all gradients updates the variables. N
workers therefore train like N towers. The chief also restores and saves checkpoints.

The tasks communicate only through TensorFlow's servers; see synchronization.py.
"""

import contextlib
import os
import sys
import threading
import time

from support.base.errors import Interrupted, UserError
from support.cluster.server import (
    NOTICE_DELAY,
    POLL_INTERVAL,
    is_reachable,
    start_server,
    wait_for_peers,
)
from support.cluster.synchronization import ChiefStatus, SynchronizationHook, SynchronizedStep
from support.data.settings import find_mismatch, format_settings, parse_settings
from support.ops.tensorflow_v1 import tf

CHIEF_HAS_FAILED = "the chief has failed; see its output for the reason"
LOST_AFTER = 3  # failed checks in a row, a second apart, before a parameter server counts as lost
MAX_WAIT_FOR_WORKERS = 20.0  # seconds that a parameter server keeps running after training


class Worker:
    """The worker that this process runs. One of the workers in a cluster is the chief.

    Args:
      task: the `Task`.
      target: string; the target of this process's server.
      status: the `ChiefStatus` on the first parameter server.
      timeout: seconds that another worker may be missing.
      shard_data: bool; whether each worker reads its own part of the records.

    Attributes:
      target: string; what sessions connect to.
      is_chief: bool; whether this process restores and saves checkpoints.
      device_filters: list of strings for the `tf.ConfigProto` of sessions. They exclude the other
        workers, which may stop and restart at any time.
      index: int; the number of this worker, 0 to count - 1. The chief is 0.
      count: int; the number of workers, including the chief.
      shard: (index, count) of the part of the records to read; None to read all of them.
    """

    def __init__(self, task, target, status, timeout, shard_data=False):
        self.target = target
        self.is_chief = task.is_chief
        self.device_filters = ["/job:ps", task.device]
        self.index = task.worker_index
        self.count = len(task.workers)
        self.shard = (self.index, self.count) if shard_data else None
        self._task = task
        self._status = status
        self._timeout = timeout
        self._step = None
        self._missing_since = {}

    @property
    def is_over(self):
        """Whether the chief has finished training."""
        return self._status.has(ChiefStatus.DONE)

    def device_setter(self):
        """Returns a device function for this worker's graph, to pass to `tf.device`.

        It places variables on the parameter servers in turn, and everything else on this worker.
        """
        return tf.train.replica_device_setter(
            cluster=self._task.cluster, worker_device=self._task.device
        )

    def read_global_step(self):
        """Returns the global step, an int. The chief must have initialized the variables."""
        with tf.Graph().as_default() as graph, tf.device(self.device_setter()), tf.device("/cpu:0"):
            global_step = tf.train.get_or_create_global_step()
        config = tf.ConfigProto(device_filters=self.device_filters)
        with tf.Session(self.target, graph, config) as session:
            return int(session.run(global_step))

    def synchronize(self, gradients, global_step, apply_gradients):
        """Builds the synchronized step of this worker. Call it once, before `make_hook`.

        Args:
          gradients: list of (gradient, variable) of this worker's batch.
          global_step: int64 [] variable.
          apply_gradients: function from a list of (average gradient, variable) to the operation
            that applies them, counts the step and updates the moving averages. The chief runs that
            operation.

        Returns:
          The operation that adds the gradients to those of the other workers and waits for the
          update.
        """
        self._step = SynchronizedStep(gradients, global_step, apply_gradients, self.count)
        return self._step.train_op

    def make_hook(self):
        """Returns the `SynchronizationHook` that the session needs to run the step."""
        return SynchronizationHook(self._step, self._status, self.is_chief)

    def release(self, session):
        """Ends a step that waits for other workers.

        On the chief, the step ends normally, so that the session can save a checkpoint. On another
        worker, this closes the session.
        """
        if self.is_chief:
            session.run(self._step.add_tokens_op)
        else:
            session.close()

    def check_peers(self):
        """Reports on stderr which workers have been lost and which are back.

        The chief checks all workers; the others check the chief. Call it about once a second.

        Raises:
          UserError: one of them has been missing for longer than the timeout.
        """
        for peer in self._task.workers if self.is_chief else self._task.workers[:1]:
            if peer == (self._task.type, self._task.index):
                continue
            name = self._task.describe(peer)
            now = time.monotonic()
            if is_reachable(self._task.address_of(peer)):
                if (since := self._missing_since.pop(peer, None)) is not None:
                    _print_notice(f"{name} is back after {now - since:.1f} s")
                continue
            if peer not in self._missing_since:
                self._missing_since[peer] = now
                _print_notice(f"{name} does not respond: waiting until it is restarted")
            if now - self._missing_since[peer] >= self._timeout:
                raise UserError(_explain_timeout(name, self._timeout))

    def explain_end(self):
        """Returns why training has ended before its last step, for an error message."""
        if self._status.has(ChiefStatus.FAILED):
            return CHIEF_HAS_FAILED
        return "the chief has stopped training"

    def explain_loss(self):
        """Returns why the connection to the parameter servers is lost, for an error message."""
        return _explain_loss(self._task, _find_lost_servers(self._task))


def run_worker(task, server, train, settings, timeout, shard_data=False):
    """Trains as the chief or as a worker.

    Args:
      task: the `Task`.
      server: the `tf.train.Server` from `start_server`.
      train: function of a `Worker` that trains up to the last step. On the chief it also restores
        and saves, and returns at once if there is nothing left to train.
      settings: the `TrainingSettings`. They must be those of the chief.
      timeout: seconds that another task may be missing.
      shard_data: bool; whether each worker reads its own part of the records.

    Raises:
      UserError: a task is missing for too long, the chief has failed, or it trains with different
        settings. Also whatever `train` raises.
    """
    # Other workers do not wait for the chief here: it may have finished, and its status says so.
    wait_for_peers(task, task.parameter_servers + (task.workers if task.is_chief else []), timeout)
    threading.Thread(target=_end_when_server_is_lost, args=(task,), daemon=True).start()
    statuses = [ChiefStatus(task, server.target, index) for _, index in task.parameter_servers]
    worker = Worker(task, server.target, statuses[0], timeout, shard_data)
    try:
        if task.is_chief:
            statuses[0].write_settings(format_settings(settings))
            _train_as_chief(worker, train, statuses)
        elif _wait_for_chief(task, statuses[0], timeout):
            _check_settings(task, statuses[0], settings)
            train(worker)
    except (tf.errors.UnavailableError, tf.errors.AbortedError):
        # A clean exit would close sessions, which can wait forever for the lost server.
        end_at_once(worker.explain_loss())


def _train_as_chief(worker, train, statuses):
    """Trains, and reports to the other tasks how training has ended."""
    try:
        train(worker)
    except Interrupted:
        raise  # no report: the other tasks wait, because the chief may be restarted
    except BaseException:
        _report(statuses, ChiefStatus.FAILED)
        raise
    _report(statuses, ChiefStatus.DONE)


def _report(statuses, state):
    for status in statuses:
        with contextlib.suppress(tf.errors.OpError):  # that parameter server is lost
            status.set(state)
            status.end_steps()


def _wait_for_chief(task, status, timeout):
    """Waits until the chief has initialized the variables; returns False if training is over."""
    check_chief = make_chief_check(task, timeout)
    while True:
        if status.has(ChiefStatus.DONE):
            return False
        if status.has(ChiefStatus.FAILED):
            raise UserError(CHIEF_HAS_FAILED)
        if status.has(ChiefStatus.READY):
            return True
        check_chief()
        time.sleep(POLL_INTERVAL)


def _check_settings(task, status, settings):
    """Raises UserError unless the chief trains the same model on the same classes and batches."""
    chief_settings = parse_settings(status.read_settings())
    mismatch = find_mismatch(chief_settings, settings)
    counts = [each.examples_per_step for each in (chief_settings, settings)]
    if mismatch is None and counts[0] != counts[1]:  # the schedule counts the chief's
        mismatch = f"{counts[0]} images per step", str(counts[1])
    if mismatch is not None:
        raise UserError(
            f"{task.describe(task.workers[0])} trains with {mismatch[0]}, but this task with "
            f"{mismatch[1]}; use the same flags and the same dataset for all tasks"
        )


def make_chief_check(task, timeout):
    """Returns a function to call repeatedly while this task waits for the chief.

    The function reports on stderr that the chief is missing. It does nothing in a cluster without
    parameter servers, whose only worker has no server that could respond.

    Args:
      task: the `Task`.
      timeout: seconds. The function raises UserError once the chief has been missing for longer.
    """
    if not task.parameter_servers:
        return lambda: None
    chief = task.workers[0]
    last_response, is_announced = time.monotonic(), False

    def check_chief():
        nonlocal last_response, is_announced
        now = time.monotonic()
        if is_reachable(task.address_of(chief)):
            last_response, is_announced = now, False
        elif now - last_response >= timeout:
            raise UserError(_explain_timeout(task.describe(chief), timeout))
        elif now - last_response >= NOTICE_DELAY and not is_announced:
            _print_notice(f"Waiting for {task.describe(chief)}")
            is_announced = True

    return check_chief


def serve_parameters(task, config, timeout):
    """Holds variables as a parameter server until the chief has finished training.

    Args:
      task: the `Task`.
      config: the `tf.ConfigProto` from `session_config`.
      timeout: seconds to wait for a missing chief, or for the host name of this task to be known.

    Raises:
      UserError: the server cannot start, the chief has failed or is missing for too long, or
        another parameter server is lost.
    """
    server = start_server(task, config, timeout)
    status = ChiefStatus(task, server.target, task.index)
    check_chief, failed_checks = make_chief_check(task, timeout), 0
    while not status.has(ChiefStatus.DONE):
        if status.has(ChiefStatus.FAILED):
            _wait_for_workers_to_end(task)
            raise UserError(CHIEF_HAS_FAILED)
        check_chief()
        # If another parameter server is lost, training ends. This one keeps running until the
        # workers have found out which one is lost.
        lost = _find_lost_servers(task) if status.has(ChiefStatus.STARTED) else []
        failed_checks = failed_checks + 1 if lost else 0
        if failed_checks >= LOST_AFTER:
            _wait_for_workers_to_end(task)
            raise UserError(_explain_loss(task, lost))
        time.sleep(1.0)
    _wait_for_workers_to_end(task)


def _wait_for_workers_to_end(task):
    """Waits until the workers have ended, because they read variables until then."""
    end = time.monotonic() + MAX_WAIT_FOR_WORKERS
    while time.monotonic() < end and any(
        is_reachable(task.address_of(worker)) for worker in task.workers
    ):
        time.sleep(POLL_INTERVAL)


def _end_when_server_is_lost(task):
    """Ends this process once a parameter server is lost; runs in a thread of its own.

    A step fails by itself when that happens. But TensorFlow may then wait forever for the lost
    server, for example to close the session.
    """
    lost_servers = []
    while len(lost_servers) < LOST_AFTER:
        time.sleep(1.0)
        lost = _find_lost_servers(task)
        lost_servers = [*lost_servers, lost] if lost else []
    # The first check names the cause: other parameter servers end because that one is lost.
    end_at_once(_explain_loss(task, lost_servers[0]))


def _find_lost_servers(task):
    """Returns the other parameter servers that do not respond, as a list of (type, index)."""
    return [
        peer
        for peer in task.parameter_servers
        if peer != (task.type, task.index) and not is_reachable(task.address_of(peer))
    ]


def _explain_loss(task, lost):
    names = ", ".join(task.describe(peer) for peer in lost or task.parameter_servers)
    return (
        f"lost the connection to {names}, which held variables; restart all tasks to resume from "
        "the newest checkpoint"
    )


def _explain_timeout(name, timeout):
    return (
        f"no response from {name} for {timeout} s (--cluster_timeout_secs); check whether it is "
        "running"
    )


def _print_notice(message):
    print(message, file=sys.stderr, flush=True)


def end_at_once(message):
    """Prints an error and ends the process with exit code 1, without cleanup, from any thread."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
