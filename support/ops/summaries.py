"""Summaries for TensorBoard with exactly the given tags, and the files that they are written to.

`tf.summary` derives tags from the names of operations: it appends `_1` to a name that is taken,
and `/image/0` to images. The operations here share one scope, which keeps the graph readable in
TensorBoard. If the graph already has a summary with the tag, it keeps that one.
"""

import contextlib
import os
import re
import socket
import time

from support.base.errors import UserError, first_line
from support.ops import graph_notes
from support.ops.tensorflow_v1 import tf

SCOPE = "summaries/"

SHEET_COLUMNS = 4
MAX_SHEET_IMAGES = 16  # about 26 KB; a whole batch would be most of what a run writes


def scalar(tag, value):
    """Adds a scalar summary of a tensor of shape []."""
    _add(tag, tf.raw_ops.ScalarSummary, tags=tag, values=value)


def histogram(tag, values):
    """Adds a histogram of a tensor of any shape. Running it fails if a value is not finite."""
    _add(tag, tf.raw_ops.HistogramSummary, tag=tag, values=values)


def sparsity(tag, values):
    """Adds a scalar summary of the fraction of zeros in a tensor of any shape."""
    with tf.name_scope(SCOPE):
        # `tf.nn.zero_fraction` would add a conditional with two functions to the graph.
        fraction = tf.reduce_mean(tf.cast(tf.equal(values, 0.0), tf.float32))
    scalar(tag, fraction)


def image_sheet(tag, images):
    """Adds one image that shows a batch as a grid, each image scaled to its own range.

    `images` are float32 [batch, height, width, 3]; the first MAX_SHEET_IMAGES are shown.
    """
    with tf.name_scope(SCOPE), tf.name_scope(f"{tag}_sheet"):
        images = images[:MAX_SHEET_IMAGES]
        low = tf.reduce_min(images, [1, 2, 3], keepdims=True)
        high = tf.reduce_max(images, [1, 2, 3], keepdims=True)
        images = tf.math.divide_no_nan(images - low, high - low)
        # White lines between the images, and white images that complete the last row.
        missing = -tf.shape(images)[0] % SHEET_COLUMNS
        images = tf.pad(images, [[0, missing], [1, 1], [1, 1], [0, 0]], constant_values=1.0)
        height, width, depth = images.shape.as_list()[1:]
        grid = tf.reshape(images, [-1, SHEET_COLUMNS, height, width, depth])
        rows = tf.transpose(grid, [0, 2, 1, 3, 4])
        sheet = tf.reshape(rows, [-1, SHEET_COLUMNS * width, depth])
        png = tf.image.encode_png(tf.cast(255.0 * sheet, tf.uint8))
        # TensorBoard stores images in tensors as the width, the height and the encoded images.
        size = tf.as_string(tf.shape(sheet))
        plugin = tf.SummaryMetadata.PluginData(plugin_name="images")
        metadata = tf.SummaryMetadata(plugin_data=plugin).SerializeToString()
        tensor = tf.stack([size[1], size[0], png])
    inputs = {"tag": tag, "tensor": tensor, "serialized_summary_metadata": metadata}
    _add(tag, tf.raw_ops.TensorSummaryV2, **inputs)


def merge_collected():
    """Merges the summaries of the default graph, including those from `tf.summary`.

    Returns (scalars, others): the serialized scalars, and the serialized histograms and images,
    which are much larger. Each is a string [], or None if the graph has no such summaries.
    """
    scalars, others = [], []
    for summary in tf.get_collection(tf.GraphKeys.SUMMARIES):
        (scalars if summary.op.type == "ScalarSummary" else others).append(summary)
    with tf.name_scope(SCOPE):
        return tuple(tf.summary.merge(group) if group else None for group in (scalars, others))


def _add(tag, operation, /, **inputs):
    """Adds a summary unless the graph already has one with the tag: two could not be merged."""
    collected = tf.get_collection_ref(tf.GraphKeys.SUMMARIES)
    if all(summary.op.name != f"{SCOPE}{tag}" for summary in collected):
        with tf.name_scope(SCOPE):
            collected.append(operation(name=tag, **inputs))


def _draw(graph_def):
    """Returns the `tf.GraphDef` that TensorBoard shows. It cannot be run."""
    hidden = (SCOPE, graph_notes.FINITE_SCOPE)
    nodes = [node for node in graph_def.node if not node.name.startswith(hidden)]
    for node in nodes:  # the user's own `merge_all()`, for example, has hidden inputs
        node.input[:] = [
            name for name in node.input if not name.removeprefix("^").startswith(hidden)
        ]
    return tf.GraphDef(node=nodes, versions=graph_def.versions)


def _new_file_name(folder):
    """Returns a unique name for an event file that sorts after the event files in the folder."""
    # TensorBoard reads the files in the order of their names, which contain the time. If the clock
    # was set back, the events of a resumed run would be read before those that they replace.
    now = time.time_ns()
    second = now // 10**9
    for name in os.listdir(folder):
        if match := re.match(r"events\.out\.tfevents\.([0-9]{10})\b", name):
            second = max(second, int(match[1]) + 1)
    return f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.{now}"


class Writer(contextlib.AbstractContextManager):
    """Writes an event file for TensorBoard to a folder, created if needed; a context manager.

    A `tf.summary.FileWriter` writes from a thread. If the file cannot be written, the thread prints
    a traceback, and a later call raises RuntimeError. Here, the call that fails raises UserError,
    which names the folder's `flag`, and events are on disk when the call returns.
    """

    def __init__(self, folder, flag):
        self._folder = folder
        self._flag = flag
        with self._explain_errors():
            os.makedirs(folder, exist_ok=True)
            self._file = tf.io.TFRecordWriter(os.path.join(folder, _new_file_name(folder)))
        self._add(file_version="brain.Event:2")

    def get_logdir(self):
        """Returns the folder."""
        return self._folder

    def add_graph(self, graph):
        """Adds a `tf.Graph`, without its summaries, checks and functions."""
        self._add(graph_def=_draw(graph.as_graph_def(add_shapes=True)).SerializeToString())

    def add_restart(self, step):
        """Makes TensorBoard discard what earlier runs have written for this step and later ones."""
        self._add(step=step, session_log=tf.SessionLog(status=tf.SessionLog.START))

    def add_summary(self, summary, step):
        """Adds a `tf.Summary` for a step."""
        self._add(step=step, summary=summary)

    def flush(self):
        """Does nothing: all events are on disk. For the interface of `tf.summary.FileWriter`."""

    def close(self):
        """Closes the file."""
        with self._explain_errors():
            self._file.close()

    def _add(self, **event):
        event = tf.Event(wall_time=time.time(), **event)
        with self._explain_errors():
            self._file.write(event.SerializeToString())
            self._file.flush()

    @contextlib.contextmanager
    def _explain_errors(self):
        try:
            yield
        except (tf.errors.OpError, OSError) as error:
            raise UserError(
                f"cannot write to {self._flag}={self._folder}: {first_line(error)}"
            ) from error

    def __exit__(self, *exception):
        self.close()
