"""The operations of `tf.image` that distort training images, for blocks of images.

    image_ops = fast_image if FLAGS.fast_ops else tf.image
    image = image_ops.random_brightness(image, max_delta=63)

An operation costs about as much for one small image as for dozens, so a thread distorts a `Block`
of images at a time. An operation only draws a random number for each image; `finish` then computes
the result in one pass.

A block supports only what has the same effect as distorting each image by itself. It is not a
tensor, so everything else raises an exception: other operations, operators, indices, and tensors as
arguments.
"""

import copy
import math
import sys

from support.base.errors import first_line
from support.data import records
from support.ops.tensorflow_v1 import tf


class Block:
    """n images, uint8 [n, depth, height, width], and the random numbers of their distortions."""

    __eq__ = None  # so that == raises an exception, like other operators

    def __init__(self, planes):
        depth, height, width = planes.shape.as_list()[1:]
        self.shape = tf.TensorShape([height, width, depth])  # of one image
        # Depth-major, as in the records: operations on a whole channel then access adjacent memory,
        # which is several times faster.
        self.planes = planes
        self.count = tf.shape(planes)[0]
        self.corner = None  # (top, left) of the crop in pixels: int32 [n, 1] each
        self.is_mirrored = None  # bool [n, 1]
        self.changes = ()  # (is_contrast, float32 [n, 1, 1, 1]) for each change of the values
        self.is_standardized = False
        self.control_dependencies = _control_dependencies()

    def __array__(self, *arguments, **named):
        """Refuses operations of TensorFlow and NumPy."""
        raise TypeError("conversion to a tensor")

    def replace(self, **attributes):
        """Returns a block with other attributes. Operations do not change their argument."""
        if self.is_standardized:
            raise TypeError("a distortion after per_image_standardization")
        # Some distortions of a block create no operation that could wait for the dependencies.
        if self.control_dependencies != _control_dependencies():
            raise TypeError("tf.control_dependencies")
        block = copy.copy(self)
        vars(block).update(attributes)
        return block


def _control_dependencies():
    """Returns the operations that new operations wait for."""
    return tf.get_default_graph()._current_control_dependencies()


def random_crop(value, size):
    """Crops like `tf.image.random_crop`; `size` is [height, width, depth]."""
    height, width, depth = size
    full_height, full_width, full_depth = value.shape.as_list()
    if height > full_height or width > full_width or depth != full_depth:
        raise ValueError(f"a crop of size {size}")
    # A change of contrast depends on the mean of all pixels that it gets.
    if value.corner or any(is_contrast for is_contrast, _ in value.changes):
        raise TypeError("random_crop after a crop or a change of contrast")
    top = tf.random.uniform([value.count, 1], 0, full_height - height + 1, tf.int32)
    left = tf.random.uniform([value.count, 1], 0, full_width - width + 1, tf.int32)
    return value.replace(corner=(top, left), shape=tf.TensorShape(size))


def random_flip_left_right(image):
    """Flips like `tf.image.random_flip_left_right`; two random flips are equivalent to one."""
    return image.replace(is_mirrored=tf.random.uniform([image.count, 1]) < 0.5)


def random_brightness(image, max_delta):
    """Changes the brightness like `tf.image.random_brightness`."""
    if float(max_delta) < 0:
        raise ValueError(f"a brightness change of up to {max_delta}")
    return _change(image, False, -max_delta, max_delta)


def random_contrast(image, lower, upper):
    """Changes the contrast like `tf.image.random_contrast`."""
    if not 0 <= float(lower) < float(upper):
        raise ValueError(f"a contrast factor from {lower} to {upper}")
    return _change(image, True, lower, upper)


def adjust_contrast(images, contrast_factor):
    """Changes the contrast like `tf.image.adjust_contrast`."""
    return _change(images, True, contrast_factor, contrast_factor)


def per_image_standardization(image):
    """Standardizes like `tf.image.per_image_standardization`; it must come last."""
    return image.replace(is_standardized=True)


def _change(image, is_contrast, low, high):
    """Draws a change of brightness or contrast for each image. `float` refuses tensors."""
    amount = tf.random.uniform([image.count, 1, 1, 1], float(low), float(high))
    return image.replace(changes=(*image.changes, (is_contrast, amount)))


def supports(distort):
    """Returns whether blocks support a distortion; prints a warning if they do not.

    `distort` is a function of an image and a module of operations, as `cifar10_input.distort`.
    """
    with tf.Graph().as_default():  # so that the attempt leaves nothing in the training graph
        shape = [None, records.DEPTH, records.HEIGHT, records.WIDTH]
        try:
            finish(distort(Block(tf.placeholder(tf.uint8, shape)), sys.modules[__name__]))
        except Exception as error:  # real mistakes will occur again with single images
            tf.logging.warning(
                "Distorting one image at a time, which takes about five times as long, because "
                "blocks of images do not support this distortion (%s).",
                first_line(error),
            )
            return False
    return True


def finish(image):
    """Distorts the images of a block. Returns float32 [n, height, width, depth].

    A pixel is the mean of its channel plus its deviation. Brightness changes the mean, and contrast
    multiplies the deviation: a few numbers per image, instead of a pass over its pixels.
    """
    cropped = _crop_and_flip(image)
    mean = tf.reduce_mean(cropped, [2, 3], keepdims=True)  # [n, depth, 1, 1]
    deviation = cropped - mean
    contrast = tf.ones([tf.shape(mean)[0], 1, 1, 1])
    for is_contrast, amount in image.changes:
        if is_contrast:
            contrast *= amount
        else:
            mean += amount
    if image.is_standardized:
        mean, contrast = _standardize(mean, contrast, deviation)
    return tf.transpose(mean + contrast * deviation, [0, 2, 3, 1])


def _crop_and_flip(image):
    """Returns the cropped and flipped images: float32 [n, depth, height, width]."""
    depth, full_height, full_width = image.planes.shape.as_list()[1:]
    height, width, _ = image.shape.as_list()
    top, left = image.corner or [tf.zeros([image.count, 1], tf.int32)] * 2
    first_rows = tf.reshape(tf.range(tf.shape(top)[0] * depth) * full_height, [-1, depth, 1])
    rows = first_rows + (top + tf.range(height))[:, tf.newaxis, :]  # [n, depth, height]
    selected = tf.gather(tf.reshape(image.planes, [-1, full_width]), rows)
    # A product with a matrix that has a single 1 in each column selects and flips the columns. It
    # is faster than gathering single values, and exact even in 16 bits: pixels are integers < 256.
    columns = left + tf.range(width)  # [n, width]
    if image.is_mirrored is not None:
        columns = tf.where_v2(image.is_mirrored, tf.reverse(columns, [1]), columns)
    selection = tf.one_hot(columns, full_width, axis=1)  # [n, full width, width]
    pixels = tf.reshape(tf.cast(selected, tf.float32), [-1, depth * height, full_width])
    return tf.reshape(tf.matmul(pixels, selection), [-1, depth, height, width])


def _standardize(mean, contrast, deviation):
    """Returns the mean and the contrast that give an image mean 0 and variance 1 in `finish`."""
    depth, height, width = deviation.shape.as_list()[1:]
    image_mean = tf.reduce_mean(mean, 1, keepdims=True)  # [n, 1, 1, 1]
    between_channels = tf.reduce_mean(tf.square(mean - image_mean), 1, keepdims=True)
    within_channels = tf.reduce_mean(tf.square(deviation), [1, 2, 3], keepdims=True)
    variance = between_channels + tf.square(contrast) * within_channels
    # Limited as in `tf.image.per_image_standardization`: an image of equal values becomes zeros.
    scale = tf.minimum(tf.rsqrt(variance), math.sqrt(depth * height * width))
    return (mean - image_mean) * scale, contrast * scale
