"""The interface of a run's worker, and `ALONE`, the worker of a run without a cluster."""


class Worker:
    """A worker that trains alone. A worker of a cluster overrides what differs.

    If it is not the chief, it must also have `read_global_step()` and `explain_end()`.

    Attributes:
      index: int; the number of the worker among all that train. The chief is 0.
      count: int; the number of workers, including the chief.
      is_chief: bool; whether this process restores and saves checkpoints.
      shard: (index, count) of the part of the records to read; (0, 1) for all of them.
      target: string; what sessions connect to.
      device_filters: list of strings for the `tf.ConfigProto` of sessions; the devices that a
        session connects to. Empty for all devices.
      is_over: bool; whether the chief has finished training, so that this worker may end early.
    """

    index = 0
    count = 1
    is_chief = True
    shard = (0, 1)
    target = ""
    device_filters = ()
    is_over = False

    def device_setter(self):
        """Returns what to pass to `tf.device` for the graph of this worker."""
        return

    def average_gradients(self, gradients, global_step):
        """Returns the average gradients of all workers. Call it once.

        The result and `gradients`, those of this worker's batch, are lists of (gradient, variable).
        `global_step` is an int64 [] variable.
        """
        return gradients

    def synchronize(self, update_op):
        """Returns the operation to run in each step. It ends when the update is complete.

        Call it once, after `average_gradients` and before `hooks`. `update_op` applies the average
        gradients, counts the step and updates the moving averages.
        """
        return update_op

    def hooks(self):
        """Returns a list of the hooks that the session needs to run the update."""
        return []

    def check_peers(self):
        """Raises UserError if training must end; called once a second."""

    def release(self, session):
        """Ends a step that waits for other workers."""


ALONE = Worker()
