"""The worker of a cluster that the model and the training session use."""

from support.base import worker
from support.base.messages import report
from support.cluster.server import Wait, explain_timeout, is_reachable
from support.cluster.synchronization import DONE, FAILED, READY, STATE, SynchronizedStep
from support.ops.tensorflow_v1 import tf

CHIEF_HAS_STOPPED = (
    "the chief has stopped before the last step; restart all tasks to resume, and read the chief's "
    "output to see why it stopped"
)


class Worker(worker.Worker):
    """The worker that this process runs. One of the workers in a cluster is the chief.

    Its sessions connect to no other worker, because workers may stop and restart at any time.

    `target` is a string, the target of this process's server. `statuses` is a list with a
    `ChiefStatus` for each parameter server. For the other arguments, see `run_worker`.
    """

    def __init__(self, task, target, statuses, timeout, shard_data=False):
        self.target = target
        self.is_chief = task.is_chief
        self.device_filters = ["/job:ps", task.device]
        self.index = task.workers.index((task.type, task.index))
        self.count = len(task.workers)
        self.shard = (self.index, self.count) if shard_data else (0, 1)
        self._task = task
        self._statuses = statuses
        self._timeout = timeout
        self._step = None
        self._missing = {}  # the `Wait` for each worker that does not respond

    @property
    def is_over(self):
        """Whether the chief has finished training."""
        return self._statuses[0].read(STATE) == DONE

    def device_setter(self):
        """Returns a function that places the variables on the parameter servers in turn."""
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

    def average_gradients(self, gradients, global_step):
        """Returns the averages that the parameter servers compute; see the base class."""
        on_ready = self._report_ready if self.is_chief else None
        self._step = SynchronizedStep(gradients, global_step, self.count, on_ready)
        return self._step.average_gradients

    def synchronize(self, update_op):
        """Returns the operation that adds this worker's gradients and waits for the update."""
        self._step.set_update(update_op)
        return self._step.train_op

    def _report_ready(self):
        for status in self._statuses:
            status.write(STATE, READY)

    def hooks(self):
        """Returns the hook of the synchronized step, in a list."""
        return [self._step]

    def release(self, session):
        """Ends a step that waits for other workers. Closes the session, except on the chief."""
        if self.is_chief:
            session.run(self._step.add_tokens_op)  # the session can then save a checkpoint
        else:
            session.close()

    def check_peers(self):
        """On the chief, reports which workers are lost and which are back. Call it once a second.

        Raises UserError if a worker has been missing for longer than the timeout.
        """
        for peer in self._task.workers[1:] if self.is_chief else []:
            name = self._task.describe(peer)
            if not is_reachable(self._task.address_of(peer)):
                wait = self._missing.setdefault(peer, Wait(self._timeout, notice_delay=0.0))
                wait.check(
                    f"{name} does not respond: waiting until it is restarted",
                    explain_timeout(name, self._timeout),
                )
            elif (wait := self._missing.pop(peer, None)) is not None:
                report(f"{name} is back after {wait.seconds:.1f} s")

    def explain_end(self):
        """Returns why this worker has ended before the last step, for an error message."""
        if self._statuses[0].read(STATE) == FAILED:
            return CHIEF_HAS_STOPPED
        return "the input of this worker has ended"
