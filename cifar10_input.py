"""Records in, batches out: the reader, the distortions and the queues of the CIFAR-10 tutorial.

    string_input_producer -> FixedLengthRecordReader -> decode -> distort -> shuffle_batch

Everything here runs on the CPU. The threads work on blocks of records, because an op costs about
as much for one small image as for dozens; every random value is still drawn for each image. The
images stay depth-major, as the records have them, until they are finished: what is done to a whole
channel then works on neighbouring values, which is several times faster.
"""

import math
from typing import NamedTuple

from absl import flags

import cifar10_data
import cifar10_summaries
from cifar10_runtime import check_flags, tf

IMAGE_SIZE = 24  # pixels; the crop that the model sees, of the 32 in a record
MIN_CROP_SIZE = 8  # pixels; of which the model's two pools leave 2

# CIFAR-10's. What counts is what the record files hold, and `batches.meta.txt` beside them.
NUM_CLASSES = cifar10_data.NUM_CLASSES
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000

# The share of an epoch that waits in the training queue: more mixes better, fewer starts sooner.
MIN_FRACTION_OF_EXAMPLES_IN_QUEUE = 0.4

NUM_PREPROCESS_THREADS = 16
RECORDS_PER_READ = 128  # per thread and call

# A collection of two int32 []: how many images wait in the training queue, and how many have to
# before the first batch leaves it.
QUEUE_LEVEL = "queue_level"

# The bounds of the tutorial's distortions.
MAX_BRIGHTNESS_DELTA = 63.0  # of pixel values 0 to 255
MIN_CONTRAST_FACTOR = 0.2
MAX_CONTRAST_FACTOR = 1.8


flags.DEFINE_float(
    "min_fraction_of_examples_in_queue",
    MIN_FRACTION_OF_EXAMPLES_IN_QUEUE,
    "Share of an epoch, all training images, that training keeps in its shuffling queue. Less "
    "starts sooner and mixes less.",
    lower_bound=0.0,
    upper_bound=1.0,
)
check_flags(["min_fraction_of_examples_in_queue"], math.isfinite, "it must be a number")
flags.DEFINE_integer(
    "num_preprocess_threads",
    NUM_PREPROCESS_THREADS,
    "Threads that read and distort training images.",
    lower_bound=1,
    upper_bound=1024,
)
flags.DEFINE_integer(
    "crop_size",
    IMAGE_SIZE,
    "Pixels; the side of the square that the model sees of an image's 32 x 32. In training it lies "
    "at random, in evaluation in the middle.",
    lower_bound=MIN_CROP_SIZE,
    upper_bound=min(cifar10_data.HEIGHT, cifar10_data.WIDTH),
)
flags.DEFINE_boolean(
    "random_flip",
    True,
    "Mirror every second training image, at random. Not for what means something else in a "
    "mirror, such as digits.",
)
flags.DEFINE_float(
    "max_brightness_delta",
    MAX_BRIGHTNESS_DELTA,
    "The most that is added to, or taken from, all values (0 to 255) of a training image. "
    "Standardization takes it away again.",
    lower_bound=0.0,
    upper_bound=255.0,
)
flags.DEFINE_float(
    "min_contrast_factor",
    MIN_CONTRAST_FACTOR,
    "The least that a training image's contrast is multiplied by.",
    lower_bound=0.0,
    upper_bound=1000.0,
)
flags.DEFINE_float(
    "max_contrast_factor",
    MAX_CONTRAST_FACTOR,
    "The most that a training image's contrast is multiplied by; over 0.",
    lower_bound=0.0,
    upper_bound=1000.0,
)
check_flags(
    ["max_brightness_delta", "min_contrast_factor", "max_contrast_factor"],
    math.isfinite,
    "it must be a number",
)
check_flags(["max_contrast_factor"], bool, "it must be more than 0, or nothing would be seen")
flags.register_multi_flags_validator(
    ["min_contrast_factor", "max_contrast_factor"],
    lambda values: values["min_contrast_factor"] <= values["max_contrast_factor"],
    "the least contrast must not be more than the most",
)


class Distortion(NamedTuple):
    """How far training images are distorted.

    Attributes:
      max_brightness_delta: float; added or taken away at most, of pixel values 0 to 255.
      min_contrast_factor, max_contrast_factor: float; the range of what contrast is multiplied by.
      random_flip: bool; whether each image is mirrored with a probability of one half.
    """

    max_brightness_delta: float = MAX_BRIGHTNESS_DELTA
    min_contrast_factor: float = MIN_CONTRAST_FACTOR
    max_contrast_factor: float = MAX_CONTRAST_FACTOR
    random_flip: bool = True


DISTORTION = Distortion()  # the tutorial's


class CIFAR10Record:
    """One record.

    Attributes:
      height, width, depth: int; 32, 32 and 3.
      key: string []; the file and the record's number in it, as `file:record`.
      label: int32 [1]; 0 to 9, or as many classes as the data set has.
      uint8image: uint8 [height, width, depth].
    """

    height = cifar10_data.HEIGHT
    width = cifar10_data.WIDTH
    depth = cifar10_data.DEPTH

    def __init__(self, key, label, uint8image):
        self.key = key
        self.label = label
        self.uint8image = uint8image


def read_cifar10(filename_queue):
    """Reads one record from the files that a queue names.

    For N-fold parallelism call it N times: each call makes a reader with a place of its own.

    Args:
      filename_queue: a queue of file names, as `tf.train.string_input_producer` gives.

    Returns:
      A `CIFAR10Record`.
    """
    with tf.device("/cpu:0"):
        keys, labels, planes = _read_block(filename_queue, size=1)
        # A transpose in effect; but on uint8 that op makes oneDNN log an error on processors
        # where it has no way of its own to do it.
        image = tf.stack(tf.unstack(planes[0], num=cifar10_data.DEPTH), axis=-1)
        return CIFAR10Record(tf.reshape(keys, []), tf.reshape(labels, [1]), image)


def _read_block(filename_queue, size):
    """Reads up to `size` records at once; n is less than that at the end of a file.

    Returns:
      keys: string [n].
      labels: int32 [n, 1].
      planes: uint8 [n, 3, 32, 32].
    """
    reader = tf.FixedLengthRecordReader(record_bytes=cifar10_data.RECORD_BYTES)
    keys, values = reader.read_up_to(filename_queue, size)
    records = tf.reshape(tf.decode_raw(values, tf.uint8), [-1, cifar10_data.RECORD_BYTES])
    labels = tf.cast(records[:, : cifar10_data.LABEL_BYTES], tf.int32)
    planes = tf.reshape(
        records[:, cifar10_data.LABEL_BYTES :],
        [-1, cifar10_data.DEPTH, cifar10_data.HEIGHT, cifar10_data.WIDTH],
    )
    return keys, labels, planes


def _random_crop_and_flip(planes, size=IMAGE_SIZE, random_flip=True):
    """Cuts a random square from each image, and mirrors it with a probability of one half.

    The rows are gathered. The columns are selected by a matrix product: column i of the result is
    the product with a vector of zeros and a one. That is exact (in 16 bits too, as pixels are whole
    numbers under 256), mirrors along the way, and is faster than gathering values one by one.

    Args:
      planes: uint8 [n, 3, 32, 32].
      size: int; the side of the square, in pixels.
      random_flip: bool; false: none is mirrored.

    Returns:
      float32 [n, 3, size, size].
    """
    count = tf.shape(planes)[0]
    depth, height, width = planes.shape.as_list()[1:]
    steps = tf.range(size)
    top = tf.random.uniform([count, 1], 0, height - size + 1, tf.int32)
    left = tf.random.uniform([count, 1], 0, width - size + 1, tf.int32)
    flip = tf.random.uniform([count, 1]) < (0.5 if random_flip else 0.0)

    plane_starts = tf.reshape(tf.range(count * depth) * height, [-1, depth, 1])
    rows = plane_starts + (top + steps)[:, tf.newaxis, :]  # [n, 3, size]
    # [n, 3, size, 32]
    rows = tf.cast(tf.gather(tf.reshape(planes, [-1, width]), rows), tf.float32)

    columns = left + tf.where_v2(flip, size - 1 - steps, steps)  # [n, size]
    selection = tf.one_hot(columns, width, axis=1)  # [n, 32, size]
    cropped = tf.matmul(tf.reshape(rows, [-1, depth * size, width]), selection)
    return tf.reshape(cropped, [-1, depth, size, size])


class _Pixels(NamedTuple):
    """Images taken apart, so that a pixel's value is `mean + contrast * deviation`.

    Brightness is a change of the first, contrast of the second, standardization of both: a few
    numbers for each image, in place of a pass over all its pixels for each change.

    Attributes:
      mean: float32 [n, 3, 1, 1]; of each channel.
      contrast: float32 [n, 1, 1, 1].
      deviation: float32 [n, 3, height, width]; of each pixel from its channel's mean.
    """

    mean: tf.Tensor
    contrast: tf.Tensor
    deviation: tf.Tensor

    @classmethod
    def take_apart(cls, planes):
        """Takes float32 [n, 3, height, width]."""
        mean = tf.reduce_mean(planes, [2, 3], keepdims=True)
        return cls(mean, tf.ones([tf.shape(planes)[0], 1, 1, 1]), planes - mean)

    def put_together(self):
        """Gives float32 [n, 3, height, width]."""
        return self.mean + self.contrast * self.deviation


def _random_brightness(pixels, max_delta=MAX_BRIGHTNESS_DELTA):
    """Adds to each image a value within +-`max_delta`.

    As the images are standardized afterwards, this cancels out. It is the tutorial's, it costs
    next to nothing, and it starts to count as soon as somebody takes standardization away.
    """
    deltas = tf.random.uniform(tf.shape(pixels.contrast), -max_delta, max_delta)
    return pixels._replace(mean=pixels.mean + deltas)


def _random_contrast(pixels, low=MIN_CONTRAST_FACTOR, high=MAX_CONTRAST_FACTOR):
    """Scales each image's distance from its channels' means by one random factor per image.

    The formula is `tf.image.adjust_contrast`'s, which takes a single factor for all images.
    """
    factors = tf.random.uniform(tf.shape(pixels.contrast), low, high)
    return pixels._replace(contrast=pixels.contrast * factors)


def _standardize(pixels):
    """Gives each image mean 0 and variance 1; one of a single colour becomes all zeros.

    As `tf.image.per_image_standardization`, it takes no standard deviation for less than that of
    one differing value, 1 / sqrt(number of values).
    """
    count = math.prod(pixels.deviation.shape.as_list()[1:])
    mean = tf.reduce_mean(pixels.mean, 1, keepdims=True)  # [n, 1, 1, 1], as all below
    between_channels = tf.reduce_mean(tf.square(pixels.mean - mean), 1, keepdims=True)
    within_channels = tf.reduce_mean(tf.square(pixels.deviation), [1, 2, 3], keepdims=True)
    variance = between_channels + tf.square(pixels.contrast) * within_channels
    scale = tf.minimum(tf.rsqrt(variance), math.sqrt(count))
    return pixels._replace(mean=(pixels.mean - mean) * scale, contrast=pixels.contrast * scale)


def _distort(planes, distortion, size=IMAGE_SIZE):
    """Makes training images: uint8 [n, 3, 32, 32] to float32 [n, size, size, 3]."""
    pixels = _Pixels.take_apart(_random_crop_and_flip(planes, size, distortion.random_flip))
    pixels = _random_brightness(pixels, distortion.max_brightness_delta)
    pixels = _random_contrast(
        pixels, distortion.min_contrast_factor, distortion.max_contrast_factor
    )
    return _finish(pixels)


def _crop(planes, size=IMAGE_SIZE):
    """Makes images to evaluate, cropped in the middle; shapes and dtypes as for `_distort`."""
    height, width = planes.shape.as_list()[2:]
    top, left = (height - size) // 2, (width - size) // 2
    planes = planes[:, :, top : top + size, left : left + size]
    return _finish(_Pixels.take_apart(tf.cast(planes, tf.float32)))


def standardized_crops(pictures, crop_size=IMAGE_SIZE):
    """Makes of pictures what `inputs` makes of the same pixels in records.

    Args:
      pictures: uint8 [n, 32, 32, 3].
      crop_size: int; pixels.

    Returns:
      float32 [n, crop_size, crop_size, 3], each with mean 0 and variance 1.
    """
    # A transpose in effect; see `read_cifar10`. (A cast before it would be moved behind it.)
    return _crop(tf.stack(tf.unstack(pictures, axis=3), axis=1), crop_size)


def _finish(pixels):
    """Standardizes, and puts the channels last: to float32 [n, size, size, 3]."""
    size = pixels.deviation.shape.as_list()[2]
    images = tf.transpose(_standardize(pixels).put_together(), [0, 2, 3, 1])
    return tf.ensure_shape(images, [None, size, size, cifar10_data.DEPTH])


def _filename_queue(filenames, num_epochs, shuffle):
    for filename in filenames:
        if not tf.gfile.Exists(filename):
            raise ValueError(f"Failed to find file: {filename}")
    return tf.train.string_input_producer(filenames, num_epochs=num_epochs, shuffle=shuffle)


def _as_batch(images, labels, scope):
    """Shows the batch in TensorBoard, and gives labels their shape [batch].

    The queues in `scope` have each added a summary of how full they are, with their capacity in
    the tag, so that it changes with the size of a batch. They are left out, and the training
    queue's comes back under a tag that stays.
    """
    summaries = tf.get_collection_ref(tf.GraphKeys.SUMMARIES)
    of_queues = [summary for summary in summaries if summary.op.name.startswith(scope)]
    summaries[:] = [summary for summary in summaries if not summary.op.name.startswith(scope)]
    for summary in of_queues:
        if "shuffle_batch" in summary.op.name:
            cifar10_summaries.scalar("queue/fraction_full", summary.op.inputs[1])
    cifar10_summaries.images("input", images)
    return images, tf.reshape(labels, [-1])


def distorted_inputs(
    data_dir,
    batch_size,
    min_fraction_of_examples_in_queue=MIN_FRACTION_OF_EXAMPLES_IN_QUEUE,
    num_preprocess_threads=NUM_PREPROCESS_THREADS,
    distortion=DISTORTION,
    shard=None,
    crop_size=IMAGE_SIZE,
):
    """Makes the training input: shuffled, distorted images, for ever.

    Args:
      data_dir: the folder with the record files `data_batch_1.bin` to `data_batch_5.bin`.
      batch_size: int; images per batch.
      min_fraction_of_examples_in_queue: float; the share of an epoch, of all records in those
        files, that is in the queue before the first batch leaves it, and stays in it. A batch is
        drawn from at least that many.
      num_preprocess_threads: int; with 1, the graph's seed decides which images come when.
      distortion: a `Distortion`.
      shard: (index, count), to read every `count`-th record of each file, from number `index` on;
        all records where None.
      crop_size: int; the side of the images, in pixels.

    Returns:
      images: float32 [batch_size, crop_size, crop_size, 3], each with mean 0 and variance 1.
      labels: int32 [batch_size], 0 to 9, or as many classes as the data set has.

    Raises:
      ValueError: a file is missing.
    """
    with tf.device("/cpu:0"), tf.name_scope("distorted_inputs") as scope:
        filenames = cifar10_data.record_files(data_dir, eval_data=False)
        filename_queue = _filename_queue(filenames, None, shuffle=True)
        num_examples = cifar10_data.count_records(data_dir, eval_data=False)
        min_queue_examples = int(num_examples * min_fraction_of_examples_in_queue)
        print(
            f"Filling queue with {min_queue_examples} CIFAR images before starting to train. "
            "This will take a few minutes.",
            flush=True,
        )
        keys, labels, planes = _read_block(filename_queue, RECORDS_PER_READ)
        if shard is not None:
            is_ours = _is_in_shard(keys, *shard)
            labels, planes = tf.boolean_mask(labels, is_ours), tf.boolean_mask(planes, is_ours)
        # The queue draws from what it holds at the time. It holds one number of images, whenever
        # that is, if there is room for a single one beyond the minimum.
        spare = 3 * batch_size if num_preprocess_threads > 1 else 1
        images, labels = tf.train.shuffle_batch(
            [_distort(planes, distortion, crop_size), labels],
            batch_size=batch_size,
            num_threads=num_preprocess_threads,
            capacity=min_queue_examples + spare,
            min_after_dequeue=min_queue_examples,
            enqueue_many=True,
        )
        queue = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)[-1].queue
        tf.add_to_collection(QUEUE_LEVEL, queue.size())
        tf.add_to_collection(QUEUE_LEVEL, tf.constant(min_queue_examples))
        return _as_batch(images, labels, scope)


def _is_in_shard(keys, index, count):
    """Tells for each key, `file:record`, whether the record is in a shard: bool [n]."""
    numbers = tf.strings.to_number(tf.strings.regex_replace(keys, "(?s).*:", ""), tf.int64)
    return tf.equal(numbers % count, index)


def inputs(eval_data, data_dir, batch_size, num_epochs=None, crop_size=IMAGE_SIZE):
    """Makes the evaluation input: centrally cropped images, in the order of the files.

    Args:
      eval_data: bool; True for the test file, False for the training files.
      data_dir: the folder with the record files.
      batch_size: int; images per batch.
      num_epochs: how often each record comes; None for ever. A limited input counts in a local
        variable, so run `tf.local_variables_initializer()`; after the last batch, which may be
        smaller, the queue raises `tf.errors.OutOfRangeError`.
      crop_size: int; the side of the images, in pixels.

    Returns:
      images: float32 [batch_size, crop_size, crop_size, 3], each with mean 0 and variance 1; the
        first dimension is unknown where `num_epochs` is given.
      labels: int32 [batch_size], 0 to 9, or as many classes as the data set has.

    Raises:
      ValueError: a file is missing.
    """
    with tf.device("/cpu:0"), tf.name_scope("inputs") as scope:
        filenames = cifar10_data.record_files(data_dir, eval_data)
        filename_queue = _filename_queue(filenames, num_epochs, shuffle=False)
        _, labels, planes = _read_block(filename_queue, RECORDS_PER_READ)
        images, labels = tf.train.batch(
            [_crop(planes, crop_size), labels],
            batch_size=batch_size,
            num_threads=1,  # more would not keep the order
            capacity=4 * (batch_size + RECORDS_PER_READ),
            enqueue_many=True,
            allow_smaller_final_batch=num_epochs is not None,
        )
        return _as_batch(images, labels, scope)
