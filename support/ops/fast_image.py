"""The operations of `tf.image` that distort training images, for blocks of images.

    image_ops = fast_image if FLAGS.fast_ops else tf.image
    image = image_ops.random_brightness(image, max_delta=63)

An operation costs about as much for one small image as for dozens, so a thread distorts a `Block`
of images at a time. The operations only record what to do; `finish` then draws the random numbers
for all images and computes the result in one pass.

A block supports only what has the same effect as distorting each image by itself. Everything else
raises `NeedsSingleImages`: other operations, operators, indices, tensors as arguments, control
dependencies, and the conversion of a block to a tensor.
"""

import functools
import inspect
import math
import numbers
import sys

from support.base.errors import first_line
from support.data import records
from support.ops.tensorflow_v1 import tf

_OPERATORS = (
    "abs add and array bool contains eq float floordiv ge getitem gt hash int invert iter le len "
    "lt matmul mod mul ne neg or pos pow radd rand rfloordiv rmatmul rmod rmul ror round rpow rsub "
    "rtruediv rxor setitem sub truediv xor"
)


class NeedsSingleImages(Exception):  # noqa: N818
    """A block of images cannot be distorted in this way; the message names the operation."""


class Block:
    """n images, and the distortions that have been recorded for them.

    Args:
      planes: uint8 [n, depth, height, width]; depth-major, as in the records: operations on a
        whole channel then access adjacent memory, which is several times faster.

    Attributes:
      shape: `tf.TensorShape`; that of one image, [height, width, depth].
      dtype: tf.float32.
    """

    dtype = tf.float32

    def __init__(self, planes):
        depth, height, width = planes.shape.as_list()[1:]
        self.shape = tf.TensorShape([height, width, depth])
        self.planes = planes
        self.is_cropped = self.is_flipped = self.is_standardized = False
        self.control_dependencies = _control_dependencies()
        self.changes = ()  # (is_contrast, low, high) for each change of brightness or contrast

    def replace(self, **attributes):
        """Returns a block with other attributes. Operations do not change their argument."""
        block = Block(self.planes)
        vars(block).update(vars(self) | attributes)
        return block

    def get_shape(self):
        """Returns the shape of one image."""
        return self.shape

    def __getattr__(self, name):
        is_special = name.startswith("_")  # TensorFlow and NumPy look for special methods
        raise NeedsSingleImages("conversion to a tensor" if is_special else f"image.{name}")


def _control_dependencies():
    return tf.get_default_graph()._current_control_dependencies()


def _refuse(name):
    def refuse(*arguments, **named):
        raise NeedsSingleImages(name)

    return refuse


for _operator in _OPERATORS.split():
    setattr(Block, f"__{_operator}__", _refuse(f"the operator __{_operator}__"))


def _operation(record):
    """Makes an operation from a function that records it; refuses unsupported calls."""

    @functools.wraps(record)
    def operate(*arguments, **named):
        try:
            image, *values = inspect.signature(record).bind(*arguments, **named).args
            if not all(isinstance(value, numbers.Real) for value in tf.nest.flatten(values)):
                raise TypeError
            if not isinstance(image, Block) or image.is_standardized:
                raise NeedsSingleImages(f"{record.__name__} at this point")
            if image.control_dependencies != _control_dependencies():
                raise NeedsSingleImages("tf.control_dependencies")
            return record(image, *values)
        except (TypeError, ValueError):
            raise NeedsSingleImages(f"{record.__name__} with these arguments") from None

    return operate


@_operation
def random_crop(value, size):
    """Records a random crop like `tf.image.random_crop`; `size` is [height, width, depth]."""
    height, width, depth = size
    if height > value.shape[0] or width > value.shape[1] or depth != value.shape[2]:
        raise ValueError
    # A change of contrast depends on the mean of all pixels that it gets.
    if value.is_cropped or any(is_contrast for is_contrast, _, _ in value.changes):
        raise NeedsSingleImages("random_crop at this point")
    return value.replace(is_cropped=True, shape=tf.TensorShape(size))


@_operation
def random_flip_left_right(image):
    """Records a random flip like `tf.image.random_flip_left_right`; two are equivalent to one."""
    return image.replace(is_flipped=True)


@_operation
def random_brightness(image, max_delta):
    """Records a random change like `tf.image.random_brightness`."""
    if max_delta < 0:
        raise ValueError
    return image.replace(changes=(*image.changes, (False, -max_delta, max_delta)))


@_operation
def random_contrast(image, lower, upper):
    """Records a random change like `tf.image.random_contrast`."""
    if not 0 <= lower < upper:
        raise ValueError
    return image.replace(changes=(*image.changes, (True, lower, upper)))


@_operation
def adjust_contrast(images, contrast_factor):
    """Records a change like `tf.image.adjust_contrast`."""
    return images.replace(changes=(*images.changes, (True, contrast_factor, contrast_factor)))


@_operation
def per_image_standardization(image):
    """Records a standardization like `tf.image.per_image_standardization`; it must come last."""
    return image.replace(is_standardized=True)


def __getattr__(name):
    found = getattr(tf.image, name)  # raises AttributeError if there is none
    return _refuse(f"tf.image.{name}") if inspect.isfunction(found) else found


def finish(image):
    """Draws the random numbers of a block, and distorts its images.

    Returns:
      float32 [n, height, width, depth].

    Raises:
      NeedsSingleImages: `image`, the result of a distortion, is not a `Block`.
    """
    if not isinstance(image, Block):
        raise NeedsSingleImages("a result that is not an image")
    return _distort(image, *_draw(image))


def supports(distort):
    """Returns whether blocks support a distortion; prints a warning if they do not.

    Args:
      distort: function of an image and a module of operations, like `cifar10_input.distort`.
    """
    with tf.Graph().as_default():  # so that the attempt leaves nothing in the training graph
        shape = [None, records.DEPTH, records.HEIGHT, records.WIDTH]
        try:
            finish(distort(Block(tf.placeholder(tf.uint8, shape)), sys.modules[__name__]))
        except Exception as error:  # real mistakes will occur again with single images
            is_known = isinstance(error, NeedsSingleImages)
            tf.logging.warning(
                "Distorting one image at a time, which takes about five times as long, because "
                "blocks of images do not support %s.",
                error if is_known else f"this distortion ({first_line(error)})",
            )
            return False
    return True


def _draw(image):
    """Draws the random numbers of a block.

    Returns:
      top, left: int32 [n, 1]; the upper left corners of the crops, in pixels.
      is_mirrored: bool [n, 1]; or None if no image is flipped.
      amounts: list of float32 [n, 1, 1, 1]; one for each of the changes.
    """
    count = tf.shape(image.planes)[0]
    full_height, full_width = image.planes.shape.as_list()[2:]
    height, width, _ = image.shape.as_list()
    top = tf.random.uniform([count, 1], 0, full_height - height + 1, tf.int32)
    left = tf.random.uniform([count, 1], 0, full_width - width + 1, tf.int32)
    is_mirrored = tf.random.uniform([count, 1]) < 0.5 if image.is_flipped else None
    amounts = [tf.random.uniform([count, 1, 1, 1], low, high) for _, low, high in image.changes]
    return top, left, is_mirrored, amounts


def _distort(image, top, left, is_mirrored, amounts):
    """Distorts a block; for the arguments, see `_draw`. Returns float32 [n, height, width, depth].

    A pixel is the mean of its channel plus its deviation. Brightness changes the mean, and contrast
    multiplies the deviation: a few numbers per image, instead of a pass over its pixels.
    """
    cropped = _crop_and_flip(image, top, left, is_mirrored)
    mean = tf.reduce_mean(cropped, [2, 3], keepdims=True)  # [n, depth, 1, 1]
    deviation = cropped - mean
    contrast = tf.ones([tf.shape(mean)[0], 1, 1, 1])
    for (is_contrast, _, _), amount in zip(image.changes, amounts, strict=True):
        if is_contrast:
            contrast *= amount
        else:
            mean += amount
    if image.is_standardized:
        mean, contrast = _standardize(mean, contrast, deviation)
    return tf.transpose(mean + contrast * deviation, [0, 2, 3, 1])


def _crop_and_flip(image, top, left, is_mirrored):
    """Returns float32 [n, depth, height, width].

    The rows are gathered. The columns are selected with a matrix product: column i of the result is
    the product with a vector that has a single one. The result is exact even in 16 bits, because
    pixels are integers below 256. The product also performs the flip, and it is faster than
    gathering single values.
    """
    depth, full_height, full_width = image.planes.shape.as_list()[1:]
    height, width, _ = image.shape.as_list()
    first_rows = tf.reshape(tf.range(tf.shape(top)[0] * depth) * full_height, [-1, depth, 1])
    rows = first_rows + (top + tf.range(height))[:, tf.newaxis, :]  # [n, depth, height]
    selected = tf.gather(tf.reshape(image.planes, [-1, full_width]), rows)
    columns = left + tf.range(width)  # [n, width]
    if is_mirrored is not None:
        columns = tf.where_v2(is_mirrored, tf.reverse(columns, [1]), columns)
    selection = tf.one_hot(columns, full_width, axis=1)  # [n, full width, width]
    pixels = tf.reshape(tf.cast(selected, tf.float32), [-1, depth * height, full_width])
    return tf.reshape(tf.matmul(pixels, selection), [-1, depth, height, width])


def _standardize(mean, contrast, deviation):
    """Returns the mean and the contrast that give an image mean 0 and variance 1 in `_distort`.

    Like `tf.image.per_image_standardization`, it assumes a standard deviation of at least
    1 / sqrt(number of values), so an image whose values are all equal becomes all zeros.
    """
    depth, height, width = deviation.shape.as_list()[1:]
    image_mean = tf.reduce_mean(mean, 1, keepdims=True)  # [n, 1, 1, 1]
    between_channels = tf.reduce_mean(tf.square(mean - image_mean), 1, keepdims=True)
    within_channels = tf.reduce_mean(tf.square(deviation), [1, 2, 3], keepdims=True)
    variance = between_channels + tf.square(contrast) * within_channels
    scale = tf.minimum(tf.rsqrt(variance), math.sqrt(depth * height * width))
    return (mean - image_mean) * scale, contrast * scale
