"""Coordinates the tasks of a cluster: the synchronized step and the chief's status."""

import threading
import types

from support.ops.tensorflow_v1 import tf


class ChiefStatus:
    """The status of the chief, stored on a parameter server, where all tasks can read it.

    The states are flags: once set, they stay set for as long as the parameter server runs.

    Args:
      task: the `Task` of this process.
      target: string; the target of this process's server.
      index: int; the index of the parameter server.
    """

    STARTED = 0  # a chief has started training; it may have been killed since
    READY = 1  # the variables have their values, and the settings can be read
    DONE = 2  # training has reached its last step
    FAILED = 3  # an error has ended training
    _SETTINGS = 4  # the key of the settings in the same table

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

    def set(self, state):
        """Sets a state."""
        self._write(state, "set")

    def has(self, state):
        """Returns whether a state is set."""
        return self._read(state) != ""

    def write_settings(self, settings):
        """Stores the chief's settings, a string. The chief does so before it is READY."""
        self._write(self._SETTINGS, settings)

    def read_settings(self):
        """Returns the chief's settings, a string."""
        return self._read(self._SETTINGS)

    def end_steps(self):
        """Ends all current and future steps that wait for an update."""
        self._session.run(self._close_tokens)

    def _write(self, key, value):
        self._session.run(self._insert, {self._key: key, self._value: value})

    def _read(self, key):
        return self._session.run(self._lookup, {self._key: key}).decode()


class SynchronizedStep:
    """The operations of a training step that all workers perform together.

    Each worker adds its gradients to accumulators on the parameter servers, then takes a token from
    a queue. When every worker has added its gradients, the chief applies their average and puts a
    token for each worker into the queue. Gradients of an earlier step are dropped.

    Gradients are numbered by the updates since the parameter servers started, not by the global
    step. A restarted chief sets the global step back to that of a checkpoint, so gradients from
    before the restart would be mistaken for those of a later step.

    Args:
      gradients: list of (gradient, variable) of this worker.
      global_step: int64 [] variable.
      apply_gradients: function from a list of (average gradient, variable) to the operation that
        applies them and counts the step.
      num_workers: int.

    Attributes:
      train_op: adds the gradients of this worker and waits for the update.
      update_op: waits for the gradients of all workers and updates the variables. The chief runs it
        in a loop, in parallel with `train_op`.
      read_step_op: assigns the current step to this worker's next gradients.
      add_tokens_op: adds a token for each worker, which ends steps that wait for an update.
    """

    def __init__(self, gradients, global_step, apply_gradients, num_workers):
        with tf.device(global_step.device):
            self._num_updates = tf.get_variable(  # without collections: checkpoints omit it
                "num_updates", [], tf.int64, tf.zeros_initializer(), trainable=False, collections=[]
            )
        self._count_update_op = self._num_updates.assign_add(1)

        def apply_and_count(averages, _):
            with tf.control_dependencies([apply_gradients(list(averages))]):
                return tf.group(self._num_updates.assign_add(1))

        # The optimizer's own `variable_averages` are updated only after the workers have their
        # tokens: the chief could save averages that lack a step. `apply_gradients` updates them
        # before that.
        updater = types.SimpleNamespace(apply_gradients=apply_and_count)
        synchronizer = tf.train.SyncReplicasOptimizer(updater, num_workers, num_workers)
        self.train_op = synchronizer.apply_gradients(gradients, self._num_updates)
        synchronizer.ready_for_local_init_op.mark_used()  # workers wait for ChiefStatus.READY
        (self.update_op,) = synchronizer.get_chief_queue_runner().enqueue_ops
        self.read_step_op = synchronizer.local_step_init_op
        self.add_tokens_op = synchronizer.get_init_tokens_op(num_workers)
        self._set_step_op = synchronizer.chief_init_op
        self._counts, self._take_ops = [], []
        for accumulator, device in synchronizer._accumulator_list:
            with tf.device(device):
                self._counts.append(accumulator.num_accumulated())
                self._take_ops.append(tf.group(accumulator.take_grad(1)))

    def start(self, session, is_restart):
        """Prepares the parameter servers. The chief calls it once, before any step.

        Args:
          session: the chief's session, whose variables have their values.
          is_restart: bool; whether another chief has used these parameter servers before. Then this
            drops all gradients from before the restart, and ends the steps that wait for an update.
        """
        session.run(self._count_update_op if is_restart else self._num_updates.initializer)
        session.run(self._set_step_op)  # from now on, accumulators accept no earlier gradients
        if is_restart:
            counts = session.run(self._counts)
            session.run([op for op, count in zip(self._take_ops, counts, strict=True) if count])
            session.run(self._set_step_op)  # taking gradients has counted a step
            session.run(self.add_tokens_op)


class SynchronizationHook(tf.train.SessionRunHook):
    """Keeps a worker synchronized with the others, even if tasks are killed and restarted.

    The hook of SyncReplicasOptimizer assumes that no task restarts. After a restart, the queue can
    hold surplus tokens, and workers can wait for an update that will never come:

    - A surplus token lets a worker start a step early. Its gradients then belong to the previous
      step and are dropped. To lose no more than one step, each step reads its number from the
      variable instead of the token, which would stay one step behind.
    - A restarted chief cannot know which workers added their gradients before the first chief was
      killed, and still wait. So it drops these gradients and adds a token for each worker.
    """

    def __init__(self, step, status, is_chief):
        self._step = step
        self._status = status
        self._is_chief = is_chief
        self._thread = None

    def after_create_session(self, session, coord):
        """On the chief, prepares the accumulators and reports to all tasks that it is ready."""
        if not self._is_chief:
            return
        self._step.start(session, is_restart=self._status.has(ChiefStatus.STARTED))
        self._status.set(ChiefStatus.STARTED)
        # A daemon, because only the end of the session interrupts its wait for gradients.
        self._thread = threading.Thread(target=self._update, args=(session, coord), daemon=True)
        self._status.set(ChiefStatus.READY)

    def before_run(self, run_context):
        """Reads the step that this worker's next gradients belong to."""
        run_context.session.run(self._step.read_step_op)
        # Started with the first step, so that the variables do not change while other hooks save
        # them at the start of the session.
        if self._thread is not None and not self._thread.ident:
            self._thread.start()

    def _update(self, session, coord):
        try:
            while not coord.should_stop():
                session.run(self._step.update_op)
        except (tf.errors.UnavailableError, tf.errors.AbortedError):
            pass  # a parameter server is lost: run_worker ends this process
        except (tf.errors.OpError, RuntimeError) as error:
            if not coord.should_stop():  # otherwise the session has ended, as intended
                coord.request_stop(error)
