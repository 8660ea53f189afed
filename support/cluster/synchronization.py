"""Coordinates the tasks of a cluster: the synchronized step and the chief's status."""

import threading
import types

from support.ops.tensorflow_v1 import tf

STATE, SETTINGS = 0, 1  # the keys of a `ChiefStatus`
READY = "ready"  # a state: the variables have their values, and the settings are stored
DONE = "done"  # training has ended as intended
FAILED = "failed"  # an error or a signal has ended training


class ChiefStatus:
    """The status of the chief, stored on a parameter server, where all tasks can read it.

    `task` is the `Task` of this process, `target` the target of its server, a string, and `index`
    the index of the parameter server.
    """

    def __init__(self, task, target, index):
        server = f"/job:ps/task:{index}"
        with tf.Graph().as_default() as graph, tf.device(f"{server}/cpu:0"):
            # The name identifies the table in the parameter server. A table needs no initializer,
            # so any task may read it first.
            table = tf.lookup.experimental.MutableHashTable(
                tf.int64, tf.string, default_value="", name="chief_status"
            )
            self._key, self._value = tf.placeholder(tf.int64, []), tf.placeholder(tf.string, [])
            self._insert = table.insert(self._key, self._value)
            self._lookup = table.lookup(self._key)
            # tf.train.SyncReplicasOptimizer gives this name to the queue of its tokens.
            tokens = tf.FIFOQueue(-1, tf.int64, [], shared_name="sync_token_q")
            self._close_tokens = tokens.close()
        # Connected to this one parameter server, a session does not wait for others to start.
        config = tf.ConfigProto(device_filters=[server, task.device])
        self._session = tf.Session(target, graph, config)

    def write(self, key, value):
        """Stores a string under STATE or SETTINGS."""
        self._session.run(self._insert, {self._key: key, self._value: value})

    def read(self, key, timeout=0):
        """Returns the string under STATE or SETTINGS; an empty one if none is stored.

        Raises DeadlineExceededError if no answer comes within `timeout` seconds; 0 means no limit.
        """
        options = tf.RunOptions(timeout_in_ms=1000 * timeout)
        return self._session.run(self._lookup, {self._key: key}, options).decode()

    def end(self, state):
        """Stores DONE or FAILED, and ends all current and future steps that wait for an update."""
        self.write(STATE, state)
        self._session.run(self._close_tokens)


class SynchronizedStep(tf.train.SessionRunHook):
    """A training step that all workers perform together, and the hook that its session needs.

    Each worker adds its gradients to accumulators on the parameter servers, then takes a token from
    a queue. When every worker has added its gradients, the chief applies their average and puts a
    token for each worker into the queue. Gradients of an earlier step are dropped.

    The hook of SyncReplicasOptimizer assumes that no worker restarts. A killed worker can leave a
    surplus token, which lets a worker start a step early. The gradients of that worker belong to
    the previous step and are lost. To lose no others, each step reads its number from the global
    step. The number in the token would stay one step behind.

    Args:
      gradients: list of (gradient, variable) of this worker.
      global_step: int64 [] variable.
      num_workers: int.
      on_ready: function that the chief calls when the other workers can start; None elsewhere.
    """

    def __init__(self, gradients, global_step, num_workers, on_ready):
        self.average_gradients = []  # of (average gradient, variable), as in `gradients`
        # SyncReplicasOptimizer would update the moving averages only after the workers have their
        # tokens, so the chief could save averages that lack a step. It therefore only averages the
        # gradients here; `set_update` adds the tokens after the update.
        collector = types.SimpleNamespace(apply_gradients=self._collect)
        self._synchronizer = tf.train.SyncReplicasOptimizer(collector, num_workers, num_workers)
        # Adds the gradients of this worker and waits for the update.
        self.train_op = self._synchronizer.apply_gradients(gradients, global_step)
        self._synchronizer.ready_for_local_init_op.mark_used()  # unused: workers wait for READY
        self._read_step_op = self._synchronizer.local_step_init_op
        self._start_op = self._synchronizer.chief_init_op
        # Adds a token for each worker, which ends steps that wait for an update.
        self.add_tokens_op = self._synchronizer.get_init_tokens_op(num_workers)
        self._num_workers = num_workers
        self._update_op = None
        self._on_ready = on_ready
        self._thread = None

    def _collect(self, gradients, _):
        self.average_gradients.extend(gradients)
        return tf.no_op()

    def set_update(self, update_op):
        """Sets the operation that applies `average_gradients` and counts the step."""
        with tf.control_dependencies([update_op]):  # workers get their tokens after the update
            self._update_op = self._synchronizer.get_init_tokens_op(self._num_workers)

    def after_create_session(self, session, coord):
        """On the chief, prepares the accumulators and reports that it is ready."""
        if self._on_ready is None:
            return
        session.run(self._start_op)
        # A daemon, because only the end of the session interrupts its wait for gradients.
        self._thread = threading.Thread(target=self._update, args=(session, coord), daemon=True)
        self._on_ready()

    def before_run(self, run_context):
        """Reads the step that this worker's next gradients belong to."""
        run_context.session.run(self._read_step_op)
        # Started with the first step, so that the variables do not change while other hooks save
        # them at the start of the session.
        if self._thread is not None and not self._thread.ident:
            self._thread.start()

    def _update(self, session, coord):
        """Updates the variables whenever all workers have added their gradients."""
        try:
            while not coord.should_stop():
                session.run(self._update_op)
        except (tf.errors.UnavailableError, tf.errors.AbortedError):
            pass  # a parameter server is lost: run_worker ends this process
        except (tf.errors.OpError, RuntimeError) as error:
            if not coord.should_stop():  # otherwise the session has ended, as intended
                coord.request_stop(error)
