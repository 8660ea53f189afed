"""The TensorFlow server of this task, and connections to the servers of other tasks."""

import errno
import ipaddress
import os
import socket
import time

from support.base.errors import UserError, first_line
from support.base.messages import report
from support.cluster.task import split_address
from support.ops.tensorflow_v1 import tf

POLL_INTERVAL = 0.3  # seconds between two attempts to reach the other tasks
NOTICE_DELAY = 5.0  # seconds to wait for other tasks before a message names them


class Wait:
    """A wait for something that is missing: one notice after a delay, an error after a timeout."""

    def __init__(self, timeout, notice_delay=NOTICE_DELAY):
        self._timeout, self._notice_delay = timeout, notice_delay
        self._start, self._is_announced = time.monotonic(), False

    @property
    def seconds(self):
        """How long the wait has lasted so far."""
        return time.monotonic() - self._start

    def check(self, notice, error):
        """Prints the notice on stderr or raises UserError when due. Call it repeatedly."""
        if self.seconds >= self._timeout:
            raise UserError(error)
        if self.seconds >= self._notice_delay and not self._is_announced:
            report(notice)
            self._is_announced = True


def start_server(task, config, timeout=0):
    """Starts the server of this task, once its host name can be resolved.

    TensorFlow's server listens on all addresses of the machine, not only on the one in TF_CONFIG.
    It neither encrypts nor authenticates: use it on a private network.

    Args:
      task: the `Task`. A "ps" task uses no GPU.
      config: the `tf.ConfigProto` from `session_config`, for all sessions that use this server.
      timeout: seconds that the host name of this task may be unknown.

    Raises:
      UserError: the host name is unknown for too long, the server cannot start at this address, or
        a worker is configured for float16.
    """
    rewrites = config.graph_options.rewrite_options
    if task.type == "ps":
        config = tf.ConfigProto.FromString(config.SerializeToString())
        config.device_count["GPU"] = 0
    elif rewrites.auto_mixed_precision == rewrites.ON:
        raise UserError(
            "--use_fp16 does not work with TF_CONFIG on GPUs, where it needs loss scaling, which "
            "the workers cannot share; remove the flag"
        )
    address = task.address_of((task.type, task.index))
    found = _resolve(address, timeout)
    _check_own_address(address, found)
    if any(ipaddress.ip_address(each[4][0].partition("%")[0]).is_private for each in found):
        report(
            f"Warning: {address} is a private address, but TensorFlow's server accepts connections "
            "at all addresses of this machine, without authentication; protect its port with a "
            "firewall"
        )
    cluster = tf.train.ClusterSpec(task.cluster)
    try:
        return tf.train.Server(cluster, task.type, task.index, config=config)
    except tf.errors.OpError as error:
        raise UserError(f"cannot start a server at {address}: {first_line(error)}") from error


def _resolve(address, timeout):
    """Returns what `getaddrinfo` finds. For a new pod, DNS may not know the host name yet."""
    wait = Wait(timeout)
    while True:
        try:
            return socket.getaddrinfo(*split_address(address), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: no valid host name
            wait.check(
                f"Waiting until the host name of {address} can be resolved",
                f"cannot resolve {address} from TF_CONFIG: {error}; correct the address, or wait "
                "longer with --cluster_timeout_secs",
            )
        time.sleep(POLL_INTERVAL)


def _check_own_address(address, found):
    """Raises UserError unless a server can listen at one of the found addresses."""
    # TensorFlow would accept an address of another machine, and would print several lines about a
    # port in use. A name can have addresses of an IP version that this machine does not use.
    for family, _, _, _, socket_address in found:
        try:
            return socket.create_server(socket_address, family=family).close()
        except OSError as error:
            reason = os.strerror(error.errno)
            if error.errno == errno.EADDRINUSE:
                break
    raise UserError(
        f"cannot start a server at {address}: {reason}; TF_CONFIG must give this task the address "
        "of this machine and a free port"
    )


def is_reachable(address):
    """Returns whether a server accepts connections at `host:port`."""
    try:
        socket.create_connection(split_address(address), timeout=2.0).close()
    except (OSError, UnicodeError):
        return False
    return True


def find_missing(task, peers):
    """Returns the `peers`, a list of (type, index), that do not respond."""
    return [peer for peer in peers if not is_reachable(task.address_of(peer))]


def _make_check(task, peers, timeout):
    """Returns a function that returns whether all `peers` respond, and reports missing ones."""
    wait = Wait(timeout)

    def check():
        nonlocal wait
        if missing := find_missing(task, peers):
            names = task.describe(*missing)
            wait.check(f"Waiting for {names}", explain_timeout(names, timeout))
        else:
            wait = Wait(timeout)
        return not missing

    return check


def make_chief_check(task, timeout):
    """Returns a function to call repeatedly while this task waits for the chief.

    It reports a chief that does not respond, and raises UserError after `timeout` seconds.
    Without parameter servers, it does nothing: the only worker has no server.
    """
    return _make_check(task, task.workers[:1] if task.parameter_servers else [], timeout)


def wait_for_peers(task, peers, timeout):
    """Waits until `peers`, a list of (type, index), respond. Raises UserError after the timeout."""
    check = _make_check(task, peers, timeout)
    while not check():
        time.sleep(POLL_INTERVAL)


def explain_timeout(names, timeout):
    """Returns the error message for tasks that have been missing for too long."""
    return (
        f"no response from {names} for {timeout} s (--cluster_timeout_secs); start the missing "
        "tasks, or correct their addresses in TF_CONFIG"
    )
