"""Reads and distorts blocks of records: the same examples as the reference in cifar10_input.py.

An operation costs about as much for one small image as for dozens, so the operations here work on
blocks of records. The images stay depth-major, as in the records, until they are finished:
operations on a whole channel then access adjacent memory, which is several times faster.
"""

import math
from typing import NamedTuple

from support.data import records
from support.ops.tensorflow_v1 import tf

RECORDS_PER_READ = 128  # per thread and call


class Draws(NamedTuple):
    """The random numbers that distort n images.

    Attributes:
      top, left: int32 [n]; the upper left corner of the crop, in pixels.
      flip: bool [n]; whether the image is mirrored.
      brightness: float32 [n]; added to every pixel.
      contrast: float32 [n]; multiplies each pixel's distance from the mean of its channel.
    """

    top: tf.Tensor
    left: tf.Tensor
    flip: tf.Tensor
    brightness: tf.Tensor
    contrast: tf.Tensor


def read_records(filename_queue, count=RECORDS_PER_READ):
    """Reads n records: `count`, or fewer at the end of a file.

    Args:
      filename_queue: a queue of file names, for example from `tf.train.string_input_producer`.
      count: int.

    Returns:
      keys: string [n]; `file:record` each.
      labels: int32 [n, 1].
      planes: uint8 [n, 3, 32, 32].
    """
    reader = tf.FixedLengthRecordReader(record_bytes=records.RECORD_BYTES)
    keys, values = reader.read_up_to(filename_queue, count)
    rows = tf.reshape(tf.decode_raw(values, tf.uint8), [-1, records.RECORD_BYTES])
    labels = tf.cast(rows[:, : records.LABEL_BYTES], tf.int32)
    shape = [-1, records.DEPTH, records.HEIGHT, records.WIDTH]
    return keys, labels, tf.reshape(rows[:, records.LABEL_BYTES :], shape)


def distorted_examples(filename_queue, size, distortion):
    """Reads a block of records and distorts the images.

    Args:
      filename_queue: see `read_records`.
      size: int; the side of the images, in pixels.
      distortion: `cifar10_input.Distortion`.

    Returns:
      keys: string [n]; `file:record` each.
      labels: int32 [n, 1].
      images: float32 [n, size, size, 3]; each with mean 0 and variance 1.
    """
    keys, labels, planes = read_records(filename_queue)
    draws = draw(tf.shape(planes)[0], size, distortion)
    return keys, labels, distort(planes, draws, size)


def cropped_examples(filename_queue, size):
    """Like `distorted_examples`, but crops the images centrally and does not distort them."""
    keys, labels, planes = read_records(filename_queue)
    return keys, labels, crop(planes, size)


def draw(count, size, distortion):
    """Draws the random numbers for `count` images; see `distorted_examples`. Returns `Draws`."""
    max_delta = distortion.max_brightness_delta
    low, high = distortion.min_contrast_factor, distortion.max_contrast_factor
    return Draws(
        top=tf.random.uniform([count], 0, records.HEIGHT - size + 1, tf.int32),
        left=tf.random.uniform([count], 0, records.WIDTH - size + 1, tf.int32),
        flip=tf.random.uniform([count]) < (0.5 if distortion.random_flip else 0.0),
        brightness=tf.random.uniform([count], -max_delta, max_delta),
        contrast=tf.random.uniform([count], low, high),
    )


def distort(planes, draws, size):
    """Crops, mirrors, changes brightness and contrast, and standardizes.

    Args:
      planes: uint8 [n, 3, 32, 32].
      draws: `Draws` of n images.
      size: int; the side of the result, in pixels.

    Returns:
      float32 [n, size, size, 3]; each image with mean 0 and variance 1.
    """
    cropped = _crop_and_flip(planes, draws, size)
    # A pixel is the mean of its channel plus its deviation. Brightness changes the mean, and
    # contrast multiplies the deviation: a few numbers per image, instead of a pass over its pixels.
    mean = tf.reduce_mean(cropped, [2, 3], keepdims=True)
    brightness = tf.reshape(draws.brightness, [-1, 1, 1, 1])
    contrast = tf.reshape(draws.contrast, [-1, 1, 1, 1])
    return _standardize(mean + brightness, contrast, cropped - mean)


def crop(planes, size):
    """Crops centrally and standardizes: uint8 [n, 3, 32, 32] to float32 [n, size, size, 3]."""
    height, width = planes.shape.as_list()[2:]
    top, left = (height - size) // 2, (width - size) // 2
    cropped = tf.cast(planes[:, :, top : top + size, left : left + size], tf.float32)
    mean = tf.reduce_mean(cropped, [2, 3], keepdims=True)
    return _standardize(mean, tf.ones([tf.shape(planes)[0], 1, 1, 1]), cropped - mean)


def _crop_and_flip(planes, draws, size):
    """Returns float32 [n, 3, size, size].

    The rows are gathered. The columns are selected with a matrix product: column i of the result is
    the product with a vector that has a single one. The result is exact even in 16 bits, because
    pixels are integers below 256. The product also performs the flip, and it is faster than
    gathering single values.
    """
    count = tf.shape(planes)[0]
    depth, height, width = planes.shape.as_list()[1:]
    offsets = tf.range(size)
    first_rows = tf.reshape(tf.range(count * depth) * height, [-1, depth, 1])
    rows = first_rows + (draws.top[:, tf.newaxis] + offsets)[:, tf.newaxis, :]  # [n, 3, size]
    # [n, 3, size, 32]
    selected = tf.cast(tf.gather(tf.reshape(planes, [-1, width]), rows), tf.float32)
    order = tf.where_v2(draws.flip[:, tf.newaxis], size - 1 - offsets, offsets)  # [n, size]
    selection = tf.one_hot(draws.left[:, tf.newaxis] + order, width, axis=1)  # [n, 32, size]
    cropped = tf.matmul(tf.reshape(selected, [-1, depth * size, width]), selection)
    return tf.reshape(cropped, [-1, depth, size, size])


def _standardize(mean, contrast, deviation):
    """Scales each image `mean + contrast * deviation` to mean 0 and variance 1.

    Like `tf.image.per_image_standardization`, it assumes a standard deviation of at least
    1 / sqrt(number of values), so an image of a single color becomes all zeros.

    Args:
      mean: float32 [n, 3, 1, 1]; of each channel.
      contrast: float32 [n, 1, 1, 1].
      deviation: float32 [n, 3, size, size]; from the mean of the channel.

    Returns:
      float32 [n, size, size, 3].
    """
    depth, height, width = deviation.shape.as_list()[1:]
    image_mean = tf.reduce_mean(mean, 1, keepdims=True)  # [n, 1, 1, 1]
    between_channels = tf.reduce_mean(tf.square(mean - image_mean), 1, keepdims=True)
    within_channels = tf.reduce_mean(tf.square(deviation), [1, 2, 3], keepdims=True)
    variance = between_channels + tf.square(contrast) * within_channels
    scale = tf.minimum(tf.rsqrt(variance), math.sqrt(depth * height * width))
    standardized = (mean - image_mean) * scale + contrast * scale * deviation
    images = tf.transpose(standardized, [0, 2, 3, 1])
    return tf.ensure_shape(images, [None, height, width, depth])
