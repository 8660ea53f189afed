"""Faster equivalents of `tf.nn` operations on CPUs, with the same arguments and results.

    nn = fast_nn if FLAGS.fast_ops else tf.nn
    norm1 = nn.lrn(pool1, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75, name="norm1")

All other names refer to the operations of `tf.nn`. If TensorFlow has a GPU, `conv2d` and `lrn`
call those of `tf.nn` as well. `locally_connected` is an addition that `tf.nn` does not have.
"""

from support.ops import tensorflow_v1, winograd
from support.ops.tensorflow_v1 import tf

# With 16 input and output channels, the transforms take more time than they save. With 32, the
# algorithm is faster on a processor without AVX512; with 64, it is faster with AVX512 as well.
MIN_CHANNELS = 32
# Each block of winograd.BLOCK_SIZE images has operations of its own in the graph.
MAX_BATCH_SIZE = 256


def __getattr__(name):
    return getattr(tf.nn, name)


def conv2d(input, filter, strides, padding, name=None, **others):
    """Convolves like `tf.nn.conv2d`, with Winograd's algorithm where that is faster.

    That is the case for float32 filters of 5 x 5 with at least MIN_CHANNELS input and output
    channels, stride 1, padding SAME and at most MAX_BATCH_SIZE images. Relative to the L2 norm, the
    results have an error of about 3e-6; the error of `tf.nn.conv2d` is 2e-7. Do not use it in 16
    bits, where the error would be too large. For arguments and shapes, see `tf.nn.conv2d`.
    """
    if (
        tensorflow_v1.GPUS
        or not tensorflow_v1.USES_ONEDNN
        or (list(strides), padding, others) != ([1, 1, 1, 1], "SAME", {})
        or not _can_use_winograd(input, filter)
    ):
        return tf.nn.conv2d(input, filter, strides, padding, name=name, **others)
    with tf.name_scope(name or "Conv2D") as scope:
        result = winograd.conv2d(input, filter)
        return tf.ensure_shape(result, [*input.shape[:3], filter.shape[3]], name=scope)


def _can_use_winograd(input, filter):
    """Returns whether the shapes and types are those for which the algorithm is faster."""
    if input.shape.ndims != 4 or not filter.shape.is_fully_defined():
        return False
    *size, depth, channels = filter.shape.as_list()
    batch = input.shape.as_list()[0]
    return (
        input.dtype == filter.dtype == tf.float32
        and input.shape[1:].is_fully_defined()
        and size == [winograd.FILTER_SIZE, winograd.FILTER_SIZE]
        and min(depth, channels) >= MIN_CHANNELS
        and (batch is None or batch <= MAX_BATCH_SIZE)
    )


def lrn(input, depth_radius=5, bias=1.0, alpha=1.0, beta=0.5, name=None):
    """Normalizes each value by the values at the same position in the neighboring channels.

    Returns `input / (bias + alpha * s) ** beta`, where `s` is the sum of the squares over the
    channels within `depth_radius`. The result agrees with `tf.nn.lrn` to a relative error of 1e-6.
    For the tutorial's shapes and a beta of 0.75, it takes a quarter of the time on a CPU.

    Source: section 3.3 of "ImageNet Classification with Deep Convolutional Neural Networks".

    The input and the result are float32 [batch, height, width, channels]. `tf.nn.lrn`, which has
    the same arguments, handles other inputs and a bias of 0.
    """
    input = tf.convert_to_tensor(input)
    is_covered = input.dtype == tf.float32 and input.shape.ndims == 4 and bias > 0.0
    if tensorflow_v1.GPUS or not is_covered or input.shape[3] is None:
        return tf.nn.lrn(input, depth_radius, bias, alpha, beta, name)
    channels = input.shape.as_list()[3]
    with tf.name_scope(name or "lrn") as scope:
        # A matrix product with a band of ones runs at the processor's full speed, which outweighs
        # the additions of zeros. Adding the bias with bias_add fuses it with the product.
        radius = min(depth_radius, channels)  # the limit of band_part
        band = tf.linalg.band_part(tf.ones([channels, channels]), radius, radius)
        squares = tf.reshape(tf.square(input), [-1, channels])
        sums = tf.nn.bias_add(tf.matmul(squares, alpha * band), tf.fill([channels], float(bias)))
        scale = tf.reshape(_negative_power(sums, beta), tf.shape(input))
        result = tf.multiply(input, scale, name=scope)

    def gradient(operation, upstream):
        # dx = dy * scale - 2 * alpha * beta * x * (window sum of dy * y / sums)
        quotients = tf.reshape(upstream * result, [-1, channels]) / sums
        shared = tf.matmul(quotients, 2.0 * alpha * beta * band)
        # None: the gradient of the input already includes the path through the scale.
        return upstream * scale - input * tf.reshape(shared, tf.shape(input)), None

    # The gradient that TensorFlow derives is equal, but makes a training step 5 % slower. Processes
    # that load the stored graph use that one. They could not differentiate tf.custom_gradient: the
    # graph would refer to this function by a name that only this process knows.
    result.op._gradient_function = gradient
    return result


def locally_connected(images, filters):
    """A 3 x 3 convolution with zero padding whose filters differ from position to position.

    Args:
      images: float32 [batch, height, width, m].
      filters: float32 [height, width, 3, 3, m, channels].

    Returns:
      float32 [batch, height, width, channels].
    """
    height, width, _, _, depth, channels = filters.shape.as_list()
    # With the positions first, each has its own matrix product on adjacent memory.
    padded = tf.pad(tf.transpose(images, [1, 2, 0, 3]), [[1, 1], [1, 1], [0, 0], [0, 0]])
    windows = [  # with tf.slice, whose gradient is many times faster than that of padded[...]
        tf.slice(padded, [y, x, 0, 0], [height, width, -1, -1]) for y in range(3) for x in range(3)
    ]
    patches = tf.concat(windows, axis=3)  # [height, width, batch, 3 * 3 * m]
    matrices = tf.reshape(filters, [height, width, 3 * 3 * depth, channels])
    return tf.transpose(tf.matmul(patches, matrices), [2, 0, 1, 3])


def _negative_power(values, exponent):
    """Returns values ** -exponent."""
    if exponent == 0.75:  # without the cost of a general power
        root = tf.rsqrt(values)
        return root * tf.sqrt(root)
    return tf.pow(values, -exponent)
