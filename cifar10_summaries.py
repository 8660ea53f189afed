"""What TensorBoard gets: scalars, histograms and sheets of images under exactly the tags given.

`tf.summary` makes tags of the names of operations, with `_1` where a name is taken and `/image/0`
behind those of images. These operations all stand in one scope of the graph, so that its picture
shows the model.
"""

from cifar10_runtime import tf

SCOPE = "summaries/"

# Of the picture of a batch.
SHEET_COLUMNS = 16
SHEET_IMAGES = 128


def _add(summary):
    tf.add_to_collection(tf.GraphKeys.SUMMARIES, summary)


def scalar(tag, value):
    """Adds a scalar: a string, and a tensor of shape []."""
    with tf.name_scope(SCOPE):
        _add(tf.raw_ops.ScalarSummary(tags=tag, values=value, name=tag))


def histogram(tag, values):
    """Adds a histogram: a string, and a tensor of any shape; it fails where one is not finite."""
    with tf.name_scope(SCOPE):
        _add(tf.raw_ops.HistogramSummary(tag=tag, values=values, name=tag))


def sparsity(tag, values):
    """Adds the share of a tensor's values that are zero."""
    with tf.name_scope(SCOPE):
        # `tf.nn.zero_fraction` adds a conditional with two functions, which clutter the graph.
        share = tf.reduce_mean(tf.cast(tf.equal(values, 0.0), tf.float32))
    scalar(tag, share)


def images(tag, batch):
    """Adds a batch of images as one sheet, each image scaled to its own range.

    Args:
      tag: string.
      batch: float32 [batch, height, width, 3]; the first SHEET_IMAGES are shown.
    """
    with tf.name_scope(SCOPE), tf.name_scope(f"{tag}_sheet"):
        batch = batch[:SHEET_IMAGES]
        low = tf.reduce_min(batch, [1, 2, 3], keepdims=True)
        high = tf.reduce_max(batch, [1, 2, 3], keepdims=True)
        batch = tf.math.divide_no_nan(batch - low, high - low)
        # White lines between them, and white images up to the end of the last row.
        missing = -tf.shape(batch)[0] % SHEET_COLUMNS
        batch = tf.pad(batch, [[0, missing], [1, 1], [1, 1], [0, 0]], constant_values=1.0)
        height, width, depth = batch.shape.as_list()[1:]
        grid = tf.reshape(batch, [-1, SHEET_COLUMNS, height, width, depth])
        rows = tf.transpose(grid, [0, 2, 1, 3, 4])
        sheet = tf.reshape(rows, [-1, SHEET_COLUMNS * width, depth])
        png = tf.image.encode_png(tf.cast(255.0 * sheet, tf.uint8))
        # TensorBoard's form of pictures in tensors: width, height, then the pictures.
        size = tf.as_string(tf.shape(sheet))
        plugin = tf.SummaryMetadata.PluginData(plugin_name="images")
        metadata = tf.SummaryMetadata(plugin_data=plugin).SerializeToString()
        tensor = tf.stack([size[1], size[0], png])
        _add(
            tf.raw_ops.TensorSummaryV2(tag=tag, tensor=tensor, serialized_summary_metadata=metadata)
        )
