"""What each task of a cluster does, and how its process ends.

Parameter servers ("ps") hold the variables. Each worker, including the chief, computes the
gradients of its own batches. In each step, the average of all gradients updates the variables, so
N workers train like N towers. The chief also restores and saves checkpoints. If a worker is lost,
training waits for its restart. If the chief or a parameter server is lost, all tasks end.
"""

import contextlib
import os
import sys
import threading
import time

from support.base.errors import UserError
from support.base.messages import report
from support.cluster.server import (
    POLL_INTERVAL,
    find_missing,
    make_chief_check,
    start_server,
    wait_for_peers,
)
from support.cluster.synchronization import DONE, FAILED, READY, SETTINGS, STATE, ChiefStatus
from support.cluster.training import CHIEF_HAS_STOPPED, Worker
from support.data.settings import find_mismatch, format_settings, parse_settings
from support.ops.tensorflow_v1 import tf

LOST_AFTER = 3  # failed checks in a row, a second apart, before a task counts as lost
STATUS_TIMEOUT = 5  # seconds to wait for the answer of a parameter server, which may be lost
MAX_WAIT_FOR_WORKERS = 20.0  # seconds that a parameter server keeps running after training

_CURE = "; restart all tasks to resume from the newest checkpoint"

# Raised by a session whose parameter server is lost or has been restarted.
_CONNECTION_ERRORS = (tf.errors.UnavailableError, tf.errors.AbortedError)


def run_worker(task, server, train, settings, timeout, shard_data=False):
    """Trains as the chief or as a worker.

    Args:
      task: the `Task`.
      server: the `tf.train.Server` from `start_server`.
      train: function of a `Worker` that trains up to the last step. On the chief, it also restores
        and saves.
      settings: the `TrainingSettings`. They must be those of the chief.
      timeout: seconds that another task may be missing.
      shard_data: bool; whether each worker reads its own part of the records.

    Raises:
      UserError: a task is missing for too long, an earlier chief has used the parameter servers,
        or the chief has stopped or trains with other settings. Also what `train` raises.
    """
    wait_for_peers(task, task.parameter_servers, timeout)
    statuses = [ChiefStatus(task, server.target, index) for _, index in task.parameter_servers]
    _start_watching(task, statuses[0])
    worker = Worker(task, server.target, statuses, timeout, shard_data)
    try:
        if task.is_chief:
            with _outcome_reported(statuses):
                if any(status.read(STATE) for status in statuses):
                    # They hold the variables and gradients of a chief that has ended.
                    raise UserError(
                        f"the parameter servers have been used by an earlier chief{_CURE}"
                    )
                wait_for_peers(task, task.workers, timeout)
                statuses[0].write(SETTINGS, format_settings(settings))
                train(worker)
        elif _wait_for_chief(task, statuses[0], (READY, DONE), timeout) == READY:
            _check_settings(task, statuses[0], settings)
            train(worker)
    except _CONNECTION_ERRORS:
        # A clean exit would close sessions, which can wait forever for the lost server.
        servers = task.parameter_servers
        _end_at_once(_explain_loss(task, find_missing(task, servers) or servers))


@contextlib.contextmanager
def _outcome_reported(statuses):
    """Reports to the other tasks whether the chief has completed the block."""
    outcome = FAILED
    try:
        yield
        outcome = DONE
    except _CONNECTION_ERRORS:
        outcome = None  # the other tasks notice by themselves which parameter server is lost
        raise
    finally:
        for status in statuses if outcome else []:
            with contextlib.suppress(tf.errors.OpError):  # that parameter server is lost
                status.end(outcome)


def _check_settings(task, status, settings):
    """Raises UserError unless the chief trains the same model on the same classes and batches."""
    chief_settings = parse_settings(status.read(SETTINGS))
    mismatch = find_mismatch(chief_settings, settings)
    counts = [each.examples_per_step for each in (chief_settings, settings)]
    if mismatch is None and counts[0] != counts[1]:  # the schedule counts the chief's
        mismatch = f"{counts[0]} images per step", str(counts[1])
    if mismatch is not None:
        raise UserError(
            f"{task.describe(task.workers[0])} trains with {mismatch[0]}, but this task with "
            f"{mismatch[1]}; use the same flags and the same dataset for all tasks"
        )


def serve_parameters(task, config, timeout):
    """Holds variables as a parameter server until the chief has finished training.

    For the arguments and errors, see `start_server` and `run_worker`.
    """
    server = start_server(task, config, timeout)
    wait_for_peers(task, task.parameter_servers, timeout)
    status = ChiefStatus(task, server.target, task.index)
    _start_watching(task, status)
    _wait_for_chief(task, status, (DONE,), timeout)
    _wait_for_workers_to_end(task)


def _wait_for_chief(task, status, states, timeout):
    """Waits until the chief's state is one of `states`, and returns it."""
    check_chief = make_chief_check(task, timeout)
    while (state := status.read(STATE)) not in states:
        if state == FAILED:
            if task.type == "ps":
                _wait_for_workers_to_end(task)
            raise UserError(CHIEF_HAS_STOPPED)
        if not state:
            check_chief()
        time.sleep(POLL_INTERVAL)
    return state


def _wait_for_workers_to_end(task):
    """Waits for the workers to end, because they read variables until then."""
    end = time.monotonic() + MAX_WAIT_FOR_WORKERS
    while time.monotonic() < end and find_missing(task, task.workers) != task.workers:
        time.sleep(POLL_INTERVAL)


def _start_watching(task, status):
    """Starts a thread that ends this process when the chief or a parameter server is lost."""

    # A step that loses its server fails by itself. But TensorFlow may then wait forever for the
    # lost server, for example to close the session.
    def watch():
        failed_checks = {}
        while (loss := _find_loss(task, status, failed_checks)) is None:
            time.sleep(1.0)
        if task.type == "ps":
            _wait_for_workers_to_end(task)  # they find out by themselves which task is lost
        _end_at_once(loss)

    threading.Thread(target=watch, daemon=True).start()


def _find_loss(task, status, failed_checks):
    """Returns why this task must end, or None. Updates the counts in `failed_checks` by task."""
    peers = task.parameter_servers + task.workers[:1]
    missing = find_missing(task, peers)
    for peer in peers:
        failed_checks[peer] = failed_checks.get(peer, 0) + 1 if peer in missing else 0
    lost = [peer for peer in missing if failed_checks[peer] >= LOST_AFTER]
    if servers := [peer for peer in lost if peer[0] == "ps"]:
        return _explain_loss(task, servers)
    with contextlib.suppress(tf.errors.OpError):  # the next checks will find the server lost
        # A chief without a state is not READY yet, and one that is DONE may have ended.
        state = status.read(STATE, STATUS_TIMEOUT) if lost else None
        return {READY: _explain_loss(task, lost), FAILED: CHIEF_HAS_STOPPED}.get(state)


def _explain_loss(task, lost):
    return f"lost the connection to {task.describe(*lost)}{_CURE}"


def _end_at_once(message):
    """Prints an error and ends the process with exit code 1, without cleanup, from any thread."""
    report(f"{os.path.basename(sys.argv[0])}: error: {message}")
    os._exit(1)
