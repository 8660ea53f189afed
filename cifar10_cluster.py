"""Training on several machines in step: the task in TF_CONFIG, its server and its peers.

Parameter servers (ps) hold the variables. Each worker, the chief among them, computes gradients
of batches of its own; the average of all gradients updates the variables once a step. So
N workers do what N towers do. The chief restores and saves.

All that the tasks tell each other goes through TensorFlow's servers: tokens and gradients in
`tf.train.SyncReplicasOptimizer`, and notes that the chief leaves for the others (`_Notes`).
"""

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import sys
import threading
import time
from typing import NamedTuple

from absl import flags

import cifar10
import cifar10_data
import cifar10_session
import cifar10_settings
from cifar10_runtime import (
    GPUS,
    STOP_REQUEST,
    Interrupted,
    UserError,
    end_at_once,
    find_reason,
    session_config,
    tf,
)

FLAGS = flags.FLAGS

flags.DEFINE_integer(
    "cluster_timeout_secs",
    600,
    "With TF_CONFIG: seconds to wait for a task that is not there, yet or any more.",
    lower_bound=1,
)
flags.DEFINE_boolean(
    "shard_data",
    False,
    "With TF_CONFIG: each worker reads a part of the records of its own; false: each reads all, in "
    "another order.",
)

CHIEF_HAS_FAILED = "the chief has failed; what it printed says why"
TASK_TYPES = ("ps", "chief", "worker", "evaluator")
POLL_INTERVAL = 0.3  # seconds between two looks at the other tasks
QUIET_WAIT = 5.0  # seconds to wait for another task before saying so
LOST_AFTER = 3  # looks, a second apart, at which a parameter server is not there
LINGER = 20.0  # seconds that a parameter server stays at most for workers that are leaving


class Task(NamedTuple):
    """What TF_CONFIG says this process is.

    Attributes:
      cluster: dict from "ps", "chief" and "worker" to lists of addresses, `host:port`.
      type: string; one of TASK_TYPES.
      index: int; its number among the tasks of its type.
    """

    cluster: dict
    type: str
    index: int

    @property
    def workers(self):
        """All that train, as (type, index); the chief is the first."""
        return [
            (name, index)
            for name in ("chief", "worker")
            for index in range(len(self.cluster.get(name, [])))
        ]

    @property
    def parameter_servers(self):
        """All that hold variables, as (type, index)."""
        return [("ps", index) for index in range(len(self.cluster["ps"]))]

    @property
    def number(self):
        """Its number among all that train; 0 for the chief."""
        return self.workers.index((self.type, self.index))

    @property
    def is_chief(self):
        """Whether this is the worker that restores and saves."""
        return (self.type, self.index) == self.workers[0]

    @property
    def device(self):
        """How devices name this task."""
        return f"/job:{self.type}/task:{self.index}"

    @property
    def device_filters(self):
        """What its sessions connect to: not the other workers, which may come and go."""
        return ["/job:ps", self.device]

    def address_of(self, peer):
        """Returns the address of a (type, index)."""
        return self.cluster[peer[0]][peer[1]]

    def describe(self, peer):
        """Returns how messages name a (type, index)."""
        return f"{peer[0]} {peer[1]} ({self.address_of(peer)})"


def find_task():
    """Returns the `Task` that TF_CONFIG names; None without it, or where it names one worker only.

    Raises:
      UserError: it is malformed, or does not describe a cluster that can train.
    """
    if not os.environ.get("TF_CONFIG"):
        return None
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        cluster = resolver.cluster_spec().as_dict()
        task = Task(cluster, resolver.task_type, resolver.task_id)
        addresses = [address for name in cluster for address in cluster[name]]
        ports = [split_address(address) for address in addresses]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"TF_CONFIG is malformed: {' '.join(str(error).split())}") from error
    if task.type not in TASK_TYPES:
        raise UserError(
            f"TF_CONFIG names the task type {task.type!r}, which is not in {TASK_TYPES}"
        )
    if unknown := sorted(cluster.keys() - set(TASK_TYPES)):
        raise UserError(f"TF_CONFIG has a job {unknown[0]!r}, which is not in {TASK_TYPES}")
    if not task.workers or len(cluster.get("chief", [])) > 1:
        raise UserError("TF_CONFIG needs one chief, or a worker to be it")
    if len(set(ports)) < len(ports):
        raise UserError("TF_CONFIG gives two tasks the same address")
    count = len(cluster.get(task.type, []))
    if task.type != "evaluator" and not 0 <= (task.index or 0) < count:
        raise UserError(
            f"TF_CONFIG names {task.type} {task.index}, but its cluster has {count} of them"
        )
    if task.type != "evaluator" and task.index is None:
        raise UserError(
            f"TF_CONFIG does not say which {task.type} this task is: `index` is missing"
        )
    if not cluster.get("ps") and task.type != "evaluator":
        if len(task.workers) == 1:
            return None
        raise UserError("TF_CONFIG needs a parameter server: a job `ps` in its cluster")
    return task._replace(cluster={name: cluster[name] for name in cluster if name != "evaluator"})


def split_address(address):
    """Returns the host and the port of `host:port`; raises ValueError where it is not that."""
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not an address, host:port")
    return host.strip("[]"), int(port)


def start_server(task):
    """Starts this task's `tf.train.Server`, which answers at the address in TF_CONFIG and no other.

    Raises:
      UserError: the port is in use, or the address is not this machine's.
    """
    address = task.address_of((task.type, task.index))
    addresses = _find_own_addresses(address)
    cluster = tf.train.ClusterSpec(task.cluster)
    try:
        # It is the server that takes the devices of its sessions: GPU memory as it is needed, and
        # none to hold variables.
        config = session_config(FLAGS.use_fp16)
        if task.type == "ps":
            config.device_count["GPU"] = 0
        server = tf.train.Server(cluster, task.type, task.index, config=config, start=False)
        _listen_only_at(addresses, split_address(address)[1])
        server.start()
    except (tf.errors.OpError, OSError) as error:
        raise UserError(f"cannot start a server at {address}: {find_reason(error)}") from error
    return server


def _find_own_addresses(address):
    """Returns the IP addresses that an address, `host:port`, means on this machine."""
    host, port = split_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"TF_CONFIG's address {address} cannot be found: {error}") from error
    own = []
    for family, kind, _, _, place in found:
        if place[0] in ("0.0.0.0", "::"):
            raise UserError(f"TF_CONFIG's address {address} is none that others could reach")
        try:
            with socket.socket(family, kind) as probe:
                # What is in its last minute after a connection does not count as in use.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except OSError as error:
            # Another machine's, or of an IP version that this one has not.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            reason = "port in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise UserError(f"cannot start a server at {address}: {reason}") from error
        own.append(place[0])
    if not own:
        raise UserError(f"TF_CONFIG's address {address} is not one of this machine's")
    return own


# Linux's socket filters: https://www.kernel.org/doc/html/latest/networking/filter.html
_SO_ATTACH_FILTER = 26
_NETWORK_HEADER = 0xFFF00000  # where loads find the IP header
_LOAD_BYTE, _LOAD_WORD, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x20, 0x54, 0x15, 0x06
_ACCEPT, _DROP = 0xFFFFFFFF, 0


def _make_filter(addresses):
    """Returns a program that drops packets but those to some IP addresses: list of (op, jt, jf, k).

    Args:
      addresses: strings, IPv4 and IPv6.
    """

    def accept(words, offset):
        """Accepts where the destination, at an offset in the header, has these words."""
        program = []
        for number, word in enumerate(words):
            rest = 2 * (len(words) - number - 1) + 1  # what a difference jumps over
            program.append((_LOAD_WORD, 0, 0, _NETWORK_HEADER + offset + 4 * number))
            program.append((_JUMP_IF_EQUAL, 0, rest, word))
        return [*program, (_RETURN, 0, 0, _ACCEPT)]

    version_4, version_6 = [], []
    for address in addresses:
        if ":" in address:
            packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
            version_6 += accept(struct.unpack("!4I", packed), 24)
        else:
            version_4 += accept(struct.unpack("!I", socket.inet_aton(address)), 16)
    version_4.append((_RETURN, 0, 0, _DROP))
    version_6.append((_RETURN, 0, 0, _DROP))
    return [
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_AND, 0, 0, 0xF0),
        (_JUMP_IF_EQUAL, len(version_4), 0, 0x60),
        *version_4,
        *version_6,
    ]


def _listen_only_at(addresses, port):
    """Lets a listening socket of this process hear some addresses only.

    TensorFlow's server listens at all addresses of the machine, whatever it is told. So the kernel
    is told to drop what comes for others: they do not answer.
    """
    program = _make_filter(addresses)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    option = struct.pack("HL", len(program), ctypes.addressof(code))
    count = 0
    reason = "its socket was not found"
    try:
        for listener in _find_listeners(port):
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)
            count += 1
    except OSError as error:  # not Linux
        count, reason = 0, error
    if count == 0:
        tf.logging.warning(
            "the server listens at all addresses of this machine, as it cannot be kept to its own: "
            "%s",
            reason,
        )


def _find_listeners(port):
    """Gives this process's sockets that listen at a port, each open for as long as it is used."""
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:  # closed since
            continue
        if not stat.S_ISSOCK(os.fstat(copy).st_mode):
            os.close(copy)
            continue
        with socket.socket(fileno=copy) as listener:
            is_tcp = listener.family in (socket.AF_INET, socket.AF_INET6)
            if (
                is_tcp
                and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                and listener.getsockname()[1] == port
            ):
                yield listener


def is_reachable(address):
    """Tells whether something listens at `host:port`."""
    try:
        socket.create_connection(split_address(address), timeout=2.0).close()
    except OSError:
        return False
    return True


def wait_for_peers(task, peers, timeout):
    """Waits until other tasks' servers are there.

    Args:
      task: the `Task`.
      peers: list of (type, index).
      timeout: seconds.

    Raises:
      UserError: some are not there in time; their names and addresses.
    """
    start, is_told = time.monotonic(), False
    missing = peers
    while missing := [peer for peer in missing if not is_reachable(task.address_of(peer))]:
        STOP_REQUEST.raise_if_made()
        names = ", ".join(task.describe(peer) for peer in missing)
        waited = time.monotonic() - start
        if waited >= timeout:
            raise UserError(
                f"not there after {timeout} s (--cluster_timeout_secs): {names}; start them, or "
                "mend the addresses in TF_CONFIG"
            )
        if waited >= QUIET_WAIT and not is_told:
            print(f"Waiting for {names}", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(POLL_INTERVAL)


class _Notes:
    """What the chief has written on a parameter server for others to read.

    `started` each time a chief begins, `ready` when it has made or restored the variables, `done`
    when training has reached its end, `failed` when it has ended before; and its settings.

    Args:
      task: the `Task` of this process.
      target: string; of this process's server.
      index: int; which parameter server.
    """

    def __init__(self, task, target, index):
        config = tf.ConfigProto(device_filters=task.device_filters)
        with tf.Graph().as_default() as graph, tf.device(f"/job:ps/task:{index}/cpu:0"):
            self._writes, self._counts = {}, {}
            for name in ("started", "ready", "done", "failed"):
                queue = tf.FIFOQueue(-1, tf.int32, [], shared_name=f"chief_has_{name}")
                self._writes[name], self._counts[name] = queue.enqueue(1), queue.size()
            tokens = tf.FIFOQueue(-1, tf.int64, [], shared_name="sync_token_q")
            self._close_tokens = tokens.close()
            self._settings = tf.get_variable("chief_settings", initializer="")
            self._new_settings = tf.placeholder(tf.string, [])
            self._write_settings = self._settings.assign(self._new_settings)
        self._session = tf.Session(target, graph, config)

    def write(self, name):
        """Writes a note."""
        self._session.run(self._writes[name])

    def has(self, name):
        """Tells whether there is a note."""
        return self._session.run(self._counts[name]) > 0

    def write_settings(self, settings):
        """Writes the chief's `cifar10_settings.Settings`; they must be there before `ready`."""
        text = cifar10_settings.format_settings(settings)
        self._session.run(self._write_settings.op, {self._new_settings: text})

    def read_settings(self):
        """Returns the chief's `cifar10_settings.Settings`."""
        return cifar10_settings.parse_settings(self._session.run(self._settings))

    def release_workers(self):
        """Ends the steps of workers that wait for an update which will not come any more."""
        self._session.run(self._close_tokens)


class _WholeUpdate:
    """Stands in for the optimizer in SyncReplicasOptimizer, which would free the workers too early.

    There, moving averages are updated when the workers may already go on, and the chief may save.
    """

    def __init__(self, optimizer):
        self._optimizer = optimizer

    def apply_gradients(self, gradients, global_step):
        return cifar10.apply_gradients(self._optimizer, list(gradients), global_step)


class _Step:
    """The operations of a step that all workers make together.

    A worker's part adds its gradients to those of the others, and takes a token when the update is
    made. The chief makes the updates, each as soon as there are as many gradients as workers, and
    then puts in a token for each. Gradients that are of an earlier step than the variables are left
    out.

    Args:
      optimizer: from `cifar10.make_optimizer`.
      gradients: list of (gradient, variable), this worker's.
      global_step: int64 [] variable.
      num_workers: int.

    Attributes:
      take_part: what a worker runs.
      update: what the chief runs as well, again and again, beside it.
      note_step: what a worker runs before: its gradients are of the step that is current then.
      begin: what the chief runs first.
      free_workers: adds tokens, for workers that wait for an update which will not come.
    """

    def __init__(self, optimizer, gradients, global_step, num_workers):
        synchronizer = tf.train.SyncReplicasOptimizer(
            _WholeUpdate(optimizer), num_workers, num_workers
        )
        self.take_part = synchronizer.apply_gradients(gradients, global_step)
        synchronizer.ready_for_local_init_op.mark_used()  # the chief's notes serve in its place
        (self.update,) = synchronizer.get_chief_queue_runner().enqueue_ops
        self.note_step = synchronizer.local_step_init_op
        self.begin = synchronizer.chief_init_op
        self.free_workers = synchronizer.get_init_tokens_op(num_workers)


class _StepHook(tf.train.SessionRunHook):
    """Keeps a worker in step with the others.

    SyncReplicasOptimizer's own hook does this for clusters that stay as they began. Here workers
    and the chief may be killed at any moment, after which there can be a token too many, or
    gradients that are waited for in vain; each case is made good by itself:

    - A token too many lets a worker go on one step early, so that one gradient is of an old step
      and left out. But the step of a worker's gradients must then not be that of its last token,
      or all that follow would be left out too: it is read anew before each step.
    - A chief that starts again cannot know which workers wait for an update that its predecessor
      took the gradients for. It puts in a token for each.

    Args:
      step: the `_Step`.
      notes: the `_Notes` on the first parameter server.
      is_chief: bool.
    """

    def __init__(self, step, notes, is_chief):
        self._step = step
        self._notes = notes
        self._is_chief = is_chief
        self._thread = None

    def after_create_session(self, session, coord):
        if not self._is_chief:
            return
        session.run(self._step.begin)
        if self._notes.has("started"):
            session.run(self._step.free_workers)
        self._notes.write("started")
        # It ends when the session is closed: there is nothing else to wake it from its wait.
        self._thread = threading.Thread(target=self._update, args=(session, coord), daemon=True)
        self._notes.write("ready")

    def before_run(self, run_context):
        run_context.session.run(self._step.note_step)
        # Not before: updates would change what other hooks save when the session begins.
        if self._thread is not None and not self._thread.ident:
            self._thread.start()

    def _update(self, session, coord):
        try:
            while not coord.should_stop():
                session.run(self._step.update)
        except (tf.errors.UnavailableError, tf.errors.AbortedError):
            pass  # a lost server, which ends this process; see `_watch_parameter_servers`
        except (tf.errors.OpError, RuntimeError) as error:
            if not coord.should_stop():  # else it is the end of the session
                coord.request_stop(error)


class Member:
    """One of those that train together: what `cifar10_session.run_training` needs of it.

    Args:
      task: the `Task`.
      target: string; of this process's server.
      step: the `_Step`.
      notes: the `_Notes` on the first parameter server.

    Attributes:
      target: see above.
      is_chief: bool.
      device_filters: the task's.
    """

    def __init__(self, task, target, step, notes):
        self.target = target
        self.is_chief = task.is_chief
        self.device_filters = task.device_filters
        self._task = task
        self._step = step
        self._notes = notes
        self._absent_since = {}

    @property
    def is_over(self):
        """Whether the chief has ended training."""
        return self._notes.has("done")

    def make_hook(self):
        """Returns the hook that keeps this process in step with the others."""
        return _StepHook(self._step, self._notes, self.is_chief)

    def release(self, session):
        """Ends a step that waits for others: the chief's as if it had been made, so as to save."""
        if self.is_chief:
            session.run(self._step.free_workers)
        else:
            session.close()

    def check_peers(self):
        """Tells of workers that go away and come back. Raises UserError when it takes too long."""
        for peer in self._task.workers if self.is_chief else self._task.workers[:1]:
            if peer == (self._task.type, self._task.index):
                continue
            name = self._task.describe(peer)
            now = time.monotonic()
            if is_reachable(self._task.address_of(peer)):
                if (since := self._absent_since.pop(peer, None)) is not None:
                    _tell(f"{name} is back after {now - since:.1f} s")
                continue
            if peer not in self._absent_since:
                self._absent_since[peer] = now
                _tell(f"{name} is away: training waits for it")
            if now - self._absent_since[peer] >= FLAGS.cluster_timeout_secs:
                raise UserError(
                    f"{name} has been away for {FLAGS.cluster_timeout_secs} s "
                    "(--cluster_timeout_secs)"
                )

    def explain_end(self):
        """Returns what to tell when a worker's training has ended before its last step."""
        if self._notes.has("failed"):
            return CHIEF_HAS_FAILED
        return "the chief has ended the run"

    def explain_loss(self):
        """Returns what to tell when the connection to the parameter servers is lost."""
        return _explain_loss(self._task, _find_lost(self._task))


def _find_lost(task):
    """Returns the other parameter servers that are not there, as (type, index)."""
    return [
        peer
        for peer in task.parameter_servers
        if peer != (task.type, task.index) and not is_reachable(task.address_of(peer))
    ]


def _explain_loss(task, lost):
    names = ", ".join(task.describe(peer) for peer in lost or task.parameter_servers)
    return (
        f"lost {names}, and the variables with it; start all tasks again to go on from the newest "
        "checkpoint"
    )


def _watch_parameter_servers(task):
    """Ends this process when a parameter server is lost, as long as it lives.

    A step fails of that by itself; but TensorFlow may then wait for ever for the lost server, as
    when it closes the session there.
    """
    end_at_once(_wait_for_loss(task))


def _wait_for_loss(task):
    """Waits until a parameter server is lost, and returns what to tell of it."""
    misses = []
    while len(misses) < LOST_AFTER:
        time.sleep(1.0)
        lost = _find_lost(task)
        misses = [*misses, lost] if lost else []
    # Those that were lost first: others end because of them.
    return _explain_loss(task, misses[0])


def _tell(message):
    print(message, file=sys.stderr, flush=True)


def build_training(task, batch_size):
    """Builds this worker's part of the training in the default graph.

    Args:
      task: the `Task`.
      batch_size: int; images per worker and step.

    Returns:
      train_op: the operation that trains one step.
      loss: float32 []; the total loss of this worker's batch.
      step: the `_Step`.
    """
    num_workers = len(task.workers)
    setter = tf.train.replica_device_setter(cluster=task.cluster, worker_device=task.device)
    with tf.device(setter):
        with tf.device("/cpu:0"):
            global_step = tf.train.get_or_create_global_step()
        shard = (task.number, num_workers) if FLAGS.shard_data else None
        images, labels = cifar10.distorted_inputs(batch_size, shard)
        loss = cifar10.loss(cifar10.inference(images), labels)
        optimizer = cifar10.make_optimizer(
            cifar10.decayed_learning_rate(global_step, batch_size * num_workers)
        )
        gradients = optimizer.compute_gradients(loss)
        cifar10.watch_gradients(optimizer, gradients)
        cifar10.summarize_variables(gradients)
        step = _Step(optimizer, gradients, global_step, num_workers)
        loss_averages_op = cifar10.average_losses([[*tf.get_collection("losses"), loss]])
    # The averages of the losses are variables as well, and the chief's alone to update.
    train_ops = [step.take_part, loss_averages_op] if task.is_chief else [step.take_part]
    return tf.group(*train_ops, name="train"), loss, step


def _train(task, target, notes):
    """Trains as the flags say, up to --max_steps."""
    with cifar10_session.seeded_graph(stream=task.number):
        train_op, loss, step = build_training(task, FLAGS.batch_size)
        cifar10_session.run_training_as_flags_say(
            train_op,
            loss,
            FLAGS.batch_size * len(task.workers),
            Member(task, target, step, notes),
        )


@contextlib.contextmanager
def _telling_the_end(all_notes):
    """Lets the other tasks know how the chief's training has ended, unless a signal ended it.

    Whoever sends a signal may start the chief again: the others wait for it.
    """
    end = "failed"
    try:
        yield
        end = "done"
    except Interrupted:
        end = None
        raise
    finally:
        for notes in all_notes if end else []:
            with contextlib.suppress(tf.errors.OpError):  # it has been lost: nobody to tell
                notes.write(end)
                notes.release_workers()


def _wait_for_the_chief(task, notes):
    """Waits until the chief has made the variables; returns False if training is over instead."""
    check_chief = make_chief_check(task)
    while not notes.has("ready"):
        if notes.has("done"):
            return False
        if notes.has("failed"):
            raise UserError(CHIEF_HAS_FAILED)
        check_chief()
        time.sleep(POLL_INTERVAL)
    return True


def train(task):
    """Trains as a chief or a worker, as the flags say, up to --max_steps.

    Raises:
      UserError: the server cannot start, a task does not come or is lost, or what
        `cifar10_session.run_training` raises.
    """
    if FLAGS.use_fp16 and GPUS:
        raise UserError("--use_fp16 with TF_CONFIG is for processors; the GPUs' loss scale is not")
    server = start_server(task)
    cifar10.maybe_download_and_extract()
    if FLAGS.shard_data:
        _check_shards(len(task.workers))
    needed = task.workers if task.is_chief else task.workers[:1]
    wait_for_peers(task, [*task.parameter_servers, *needed], FLAGS.cluster_timeout_secs)
    threading.Thread(target=_watch_parameter_servers, args=(task,), daemon=True).start()
    all_notes = [_Notes(task, server.target, index) for _, index in task.parameter_servers]
    try:
        if not task.is_chief:
            if _wait_for_the_chief(task, all_notes[0]):
                _check_settings(task, all_notes[0].read_settings())
                _train(task, server.target, all_notes[0])
            return
        with (
            _telling_the_end(all_notes),
            cifar10_session.prepare_train_dir(FLAGS.train_dir, FLAGS.max_steps) as is_needed,
        ):
            if is_needed:
                all_notes[0].write_settings(cifar10_settings.find_settings())
                _train(task, server.target, all_notes[0])
    except (tf.errors.UnavailableError, tf.errors.AbortedError):
        # At once, as ending in order would close sessions, and so wait for the lost server.
        end_at_once(_explain_loss(task, _find_lost(task)))


def _check_settings(task, chiefs):
    """Raises UserError where the chief trains another model than this task, or other classes."""
    misfit = cifar10_settings.find_misfit(chiefs, cifar10_settings.find_settings())
    if misfit is not None:
        raise UserError(
            f"{task.describe(task.workers[0])} trains with {misfit[0]}, and this task with "
            f"{misfit[1]}; give all tasks the same flags, and the same data"
        )


def _check_shards(count):
    """Raises UserError where not every worker would have a record to read."""
    files = cifar10_data.record_files(cifar10.find_data_folder(), eval_data=False)
    most = max(os.path.getsize(path) // cifar10_data.RECORD_BYTES for path in files)
    if most < count:
        raise UserError(f"--shard_data: {count} workers, but no file has more than {most} records")


def make_chief_check(task):
    """Returns a function that raises UserError when the chief has been away for too long."""
    chief = task.workers[0]
    seen = time.monotonic()

    def check():
        nonlocal seen
        now = time.monotonic()
        if is_reachable(task.address_of(chief)):
            seen = now
        elif now - seen >= FLAGS.cluster_timeout_secs:
            raise UserError(
                f"{task.describe(chief)} has not been there for {FLAGS.cluster_timeout_secs} s "
                "(--cluster_timeout_secs)"
            )

    return check


def serve(task):
    """Holds variables until the chief has finished, as a parameter server.

    Raises:
      UserError: the server cannot start, or the chief has failed, or is away for too long.
    """
    server = start_server(task)
    notes = _Notes(task, server.target, task.index)
    check_chief, misses = make_chief_check(task), 0
    while not notes.has("done"):
        if notes.has("failed"):
            _linger(task)
            raise UserError(CHIEF_HAS_FAILED)
        STOP_REQUEST.raise_if_made()
        check_chief()
        # Without the others it is of no use. It stays until the workers have seen which was lost.
        misses = misses + 1 if notes.has("started") and (lost := _find_lost(task)) else 0
        if misses >= LOST_AFTER:
            _linger(task)
            raise UserError(_explain_loss(task, lost))
        time.sleep(1.0)
    _linger(task)


def _linger(task):
    """Waits until the workers have left, as they still look at the variables when they end."""
    end = time.monotonic() + LINGER
    while time.monotonic() < end and any(
        is_reachable(task.address_of(peer)) for peer in task.workers
    ):
        time.sleep(POLL_INTERVAL)
