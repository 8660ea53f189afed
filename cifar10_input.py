"""Records in, batches out: the reader, the distortions and the queues of the CIFAR-10 tutorial.

    string_input_producer -> FixedLengthRecordReader -> decode -> distort -> shuffle_batch

The input runs on the CPU. By default, the threads work on blocks of records
(`support.ops.fast_input`); with `--fast_ops=false` they work on one image at a time, as in the
functions below.
"""

import contextlib
import functools
import math
import os
from typing import NamedTuple

from absl import flags

from support.base import command_line
from support.base.errors import UserError
from support.data import dataset
from support.ops import fast_input, graph_notes, summaries
from support.ops.tensorflow_v1 import tf

# Edit these for your own dataset. Unless you do, the numbers of classes and examples come from
# `batches.meta.txt` and the sizes of the record files.
IMAGE_SIZE = 24  # pixels; the side of the crop that the model sees, out of 32
NUM_CLASSES = 10
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000

# Fraction of an epoch that stays in the training queue. A larger queue shuffles better; a smaller
# one starts sooner.
MIN_FRACTION_OF_EXAMPLES_IN_QUEUE = 0.4
NUM_PREPROCESS_THREADS = 16

MAX_BRIGHTNESS_DELTA = 63.0  # pixel values range from 0 to 255
MIN_CONTRAST_FACTOR = 0.2
MAX_CONTRAST_FACTOR = 1.8

CROP_SIZE_RULE = f"it must be 8 to {min(dataset.HEIGHT, dataset.WIDTH)}"


def is_valid_crop_size(size):
    """Returns whether images of that side, in pixels, can be cropped and pooled twice."""
    return 8 <= size <= min(dataset.HEIGHT, dataset.WIDTH)


command_line.forget_flags_of(__file__)
flags.DEFINE_boolean(
    "fast_ops",
    True,
    "Use faster equivalents of TensorFlow's operations on the CPU. With false, the graph consists "
    "of the operations that the tutorial names. Checkpoints work with both.",
)
flags.DEFINE_integer(
    "crop_size",
    IMAGE_SIZE,
    "Side in pixels (8 to 32) of the square crop of each 32 x 32 image that the model sees. "
    "Training crops at random positions, evaluation at the center.",
)
flags.DEFINE_boolean(
    "random_flip",
    True,
    "Flip half of the training images horizontally, chosen at random. Turn this off if mirroring "
    "changes what an image means, for example with digits.",
)
flags.DEFINE_float(
    "max_brightness_delta",
    MAX_BRIGHTNESS_DELTA,
    "Maximum brightness change, added to or subtracted from every pixel (0 to 255) of a training "
    "image. Standardization cancels this change.",
    lower_bound=0.0,
    upper_bound=255.0,
)
flags.DEFINE_float(
    "min_contrast_factor",
    MIN_CONTRAST_FACTOR,
    "Minimum factor for the contrast of a training image.",
    lower_bound=0.0,
    upper_bound=1000.0,
)
flags.DEFINE_float(
    "max_contrast_factor",
    MAX_CONTRAST_FACTOR,
    "Maximum factor for the contrast of a training image, greater than 0.",
    lower_bound=0.0,
    upper_bound=1000.0,
)
flags.DEFINE_float(
    "min_fraction_of_examples_in_queue",
    MIN_FRACTION_OF_EXAMPLES_IN_QUEUE,
    "Fraction of an epoch (all training images) that stays in the shuffling queue. A larger queue "
    "shuffles better; a smaller one starts sooner.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_integer(
    "num_preprocess_threads",
    NUM_PREPROCESS_THREADS,
    "Number of threads that read and distort training images.",
    lower_bound=1,
    upper_bound=1024,
)
command_line.check_flags(["crop_size"], is_valid_crop_size, CROP_SIZE_RULE)
command_line.check_flags(
    [
        "max_brightness_delta",
        "min_contrast_factor",
        "max_contrast_factor",
        "min_fraction_of_examples_in_queue",
    ],
    math.isfinite,
    "it must be a finite number",
)
command_line.check_flags(
    ["max_contrast_factor"], bool, "it must be greater than 0; otherwise every image would be gray"
)
flags.register_multi_flags_validator(
    ["min_contrast_factor", "max_contrast_factor"],
    lambda values: values["min_contrast_factor"] <= values["max_contrast_factor"],
    "the minimum contrast factor must not exceed the maximum",
)


class Distortion(NamedTuple):
    """Limits of the random distortions of training images.

    Attributes:
      max_brightness_delta: float; the maximum change of the pixel values, which are 0 to 255.
      min_contrast_factor, max_contrast_factor: float.
      random_flip: bool; whether to mirror each image with a probability of one half.
    """

    max_brightness_delta: float
    min_contrast_factor: float
    max_contrast_factor: float
    random_flip: bool = True


class CIFAR10Record:
    """One record.

    Attributes:
      height, width, depth: int; 32, 32 and 3.
      key: string []; the file and the number of the record in it, as `file:record`.
      label: int32 [1]; 0 to the number of classes - 1.
      uint8image: uint8 [height, width, depth].
    """

    height = dataset.HEIGHT
    width = dataset.WIDTH
    depth = dataset.DEPTH


def read_cifar10(filename_queue):
    """Reads one record.

    For N-fold parallelism, call it N times: each call creates a reader with its own position.

    Args:
      filename_queue: a queue of file names, for example from `tf.train.string_input_producer`.

    Returns:
      A `CIFAR10Record`.
    """
    result = CIFAR10Record()
    with tf.device("/cpu:0"):
        reader = tf.FixedLengthRecordReader(record_bytes=dataset.RECORD_BYTES)
        result.key, value = reader.read(filename_queue)
        record = tf.ensure_shape(tf.decode_raw(value, tf.uint8), [dataset.RECORD_BYTES])
        result.label = tf.cast(record[: dataset.LABEL_BYTES], tf.int32)
        # [depth * height * width] to [depth, height, width] to [height, width, depth]. A transpose
        # of uint8 would make oneDNN log an error on some processors.
        shape = [result.depth, result.height, result.width]
        depth_major = tf.reshape(record[dataset.LABEL_BYTES :], shape)
        result.uint8image = tf.stack(tf.unstack(depth_major), axis=-1)
    return result


def _distorted_image(uint8image, size, distortion):
    """Distorts a training image: uint8 [32, 32, 3] to float32 [size, size, 3]."""
    image = tf.cast(uint8image, tf.float32)
    image = tf.image.random_crop(image, [size, size, image.shape[2]])
    if distortion.random_flip:
        image = tf.image.random_flip_left_right(image)
    # Standardization cancels the change in brightness, unless you remove standardization.
    image = tf.image.random_brightness(image, distortion.max_brightness_delta)
    low, high = distortion.min_contrast_factor, distortion.max_contrast_factor
    if low < high:
        image = tf.image.random_contrast(image, low, high)
    else:
        image = tf.image.adjust_contrast(image, high)
    return tf.image.per_image_standardization(image)


def central_crops(images, size=None):
    """Crops images centrally and standardizes them, as evaluation does.

    Args:
      images: uint8 [32, 32, 3] or [n, 32, 32, 3].
      size: int; the side of the crops in pixels, IMAGE_SIZE if None.

    Returns:
      float32 [size, size, 3] or [n, size, size, 3]; each image has mean 0 and variance 1.
    """
    size = size or IMAGE_SIZE
    cropped = tf.image.resize_with_crop_or_pad(tf.cast(images, tf.float32), size, size)
    return tf.image.per_image_standardization(cropped)


def _generate_image_and_label_batch(
    image,
    label,
    min_queue_examples,
    batch_size,
    shuffle,
    num_threads=None,
    keep=None,
    **arguments,
):
    """Collects examples in a queue and dequeues them in batches.

    Args:
      image: float32 [height, width, 3].
      label: int32 [1].
      min_queue_examples: int; with `shuffle`, the minimum number of examples that each batch leaves
        in the queue. Without it, only the capacity depends on this number.
      batch_size: int.
      shuffle: bool; draw the examples of a batch from the queue at random.
      num_threads: int; NUM_PREPROCESS_THREADS if None.
      keep: bool []; whether an example enters the queue. Every example does if None.
      **arguments: passed to `tf.train.shuffle_batch` or `tf.train.batch`. With `enqueue_many`,
        `image`, `label` and `keep` have an additional first dimension.

    Returns:
      images: float32 [batch_size, height, width, 3].
      labels: int32 [batch_size].
    """
    num_threads = num_threads or NUM_PREPROCESS_THREADS
    if shuffle:
        # The queue draws from the examples that it holds at the moment. With one thread and room
        # for a single example beyond the minimum, it always holds the same number, which makes
        # runs reproducible.
        spare = 3 * batch_size if num_threads > 1 else 1
        shuffle_batch = tf.train.shuffle_batch
        if keep is not None:
            shuffle_batch = functools.partial(tf.train.maybe_shuffle_batch, keep_input=keep)
        images, labels = shuffle_batch(
            [image, label],
            batch_size=batch_size,
            num_threads=num_threads,
            capacity=min_queue_examples + spare,
            min_after_dequeue=min_queue_examples,
            **arguments,
        )
        queue = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)[-1].queue
        graph_notes.watch_queue(queue.size(), min_queue_examples)
        fraction = tf.cast(queue.size() - min_queue_examples, tf.float32) / spare
        summaries.scalar("queue/fraction_full", tf.maximum(fraction, 0.0))
    else:
        images, labels = tf.train.batch(
            [image, label],
            batch_size=batch_size,
            num_threads=num_threads,
            capacity=min_queue_examples + 3 * batch_size,
            **arguments,
        )
    summaries.image_sheet("input", images)
    return images, tf.reshape(labels, [-1])


@contextlib.contextmanager
def _input_pipeline(name):
    """A scope on the CPU, with the seed of the input, and without TensorFlow's own summaries.

    The tags of those summaries contain the capacity of the queue and thus depend on the batch size.
    """
    with tf.device("/cpu:0"), tf.name_scope(name) as scope, graph_notes.input_seed():
        yield
    collected = tf.get_collection_ref(tf.GraphKeys.SUMMARIES)
    collected[:] = [summary for summary in collected if not summary.op.name.startswith(scope)]


def _filename_queue(filenames, num_epochs=None, shuffle=True):
    for filename in filenames:
        if not tf.gfile.Exists(filename):
            raise ValueError(f"Failed to find file: {filename}")
    return tf.train.string_input_producer(filenames, num_epochs=num_epochs, shuffle=shuffle)


def num_examples_per_epoch(data_dir, eval_data=False):
    """Returns the number of examples in an epoch.

    This is the number of records in the files. If you have edited NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN
    or ..._FOR_EVAL, or if there are no files, it is that constant instead.

    Args:
      data_dir: the folder with the record files.
      eval_data: bool; True for the test file, False for the training files.
    """
    name = f"NUM_EXAMPLES_PER_EPOCH_FOR_{'EVAL' if eval_data else 'TRAIN'}"
    constant = globals()[name]
    if constant != getattr(dataset, name):
        return constant
    try:
        return dataset.count_records(data_dir, eval_data)
    except OSError:  # prediction needs no dataset; training and evaluation check it before
        return constant


def distorted_inputs(
    data_dir,
    batch_size,
    min_fraction_of_examples_in_queue=None,
    num_preprocess_threads=None,
    distortion=None,
    shard=None,
    crop_size=None,
    fast_ops=True,
    examples_per_epoch=None,
):
    """Creates the training input: shuffled and distorted examples, repeated forever.

    Args:
      data_dir: the folder with the record files `data_batch_1.bin` to `data_batch_5.bin`.
      batch_size: int; examples per batch.
      min_fraction_of_examples_in_queue: float; the fraction of an epoch that the queue needs before
        it yields the first batch, and that stays in it from then on. Every batch is drawn from at
        least that many examples. MIN_FRACTION_OF_EXAMPLES_IN_QUEUE if None.
      num_preprocess_threads: int; with 1, the graph's seed determines the batches.
        NUM_PREPROCESS_THREADS if None.
      distortion: `Distortion`; the limits in the constants above if None.
      shard: (index, count); read only every `count`-th record of each file, starting with number
        `index`. All records if None.
      crop_size: int; the side of the images in pixels, IMAGE_SIZE if None.
      fast_ops: bool; process blocks of records instead of single images.
      examples_per_epoch: int; `num_examples_per_epoch(data_dir)` if None.

    Returns:
      images: float32 [batch_size, crop_size, crop_size, 3]; each with mean 0 and variance 1.
      labels: int32 [batch_size]; 0 to the number of classes - 1.

    Raises:
      ValueError: a file is missing.
      UserError: a shard has no records.
    """
    crop_size = crop_size or IMAGE_SIZE
    distortion = distortion or Distortion(
        MAX_BRIGHTNESS_DELTA, MIN_CONTRAST_FACTOR, MAX_CONTRAST_FACTOR
    )
    if min_fraction_of_examples_in_queue is None:
        min_fraction_of_examples_in_queue = MIN_FRACTION_OF_EXAMPLES_IN_QUEUE
    with _input_pipeline("distorted_inputs"):
        filename_queue = _filename_queue(dataset.record_files(data_dir, eval_data=False))
        if fast_ops:
            key, label, image = fast_input.distorted_examples(filename_queue, crop_size, distortion)
        else:
            record = read_cifar10(filename_queue)
            key, label = record.key, record.label
            image = _distorted_image(record.uint8image, crop_size, distortion)
        examples_per_epoch = examples_per_epoch or num_examples_per_epoch(data_dir)
        min_queue_examples = int(examples_per_epoch * min_fraction_of_examples_in_queue)
        print(
            f"Filling queue with {min_queue_examples} CIFAR images before starting to train. "
            "This will take a few minutes.",
            flush=True,
        )
        return _generate_image_and_label_batch(
            image,
            label,
            min_queue_examples,
            batch_size,
            shuffle=True,
            num_threads=num_preprocess_threads,
            keep=None if shard is None else _is_in_shard(key, data_dir, *shard),
            enqueue_many=fast_ops,
        )


def _is_in_shard(key, data_dir, index, count):
    """Returns whether a record, or each record of a block, is in a shard: bool [] or [n]."""
    files = dataset.record_files(data_dir, eval_data=False)
    size = max(os.path.getsize(file) // dataset.RECORD_BYTES for file in files)
    if size < count:
        raise UserError(f"--shard_data: {count} workers, but the largest file has {size} records")
    number = tf.strings.to_number(tf.strings.regex_replace(key, "(?s).*:", ""), tf.int64)
    return tf.equal(number % count, index)


def inputs(eval_data, data_dir, batch_size, num_epochs=None, crop_size=None, fast_ops=True):
    """Creates the evaluation input: centrally cropped examples in the order of the files.

    Args:
      eval_data: bool; True for the test file, False for the training files.
      data_dir: the folder with the record files.
      batch_size: int; examples per batch.
      num_epochs: int; the number of times to read each record, or None to repeat forever. A finite
        input counts epochs in a local variable, so run `tf.local_variables_initializer()`. After
        the last batch, which may be smaller, the queue raises `tf.errors.OutOfRangeError`.
      crop_size: int; the side of the images in pixels, IMAGE_SIZE if None.
      fast_ops: bool; process blocks of records instead of single images.

    Returns:
      images: float32 [batch_size, crop_size, crop_size, 3]; each with mean 0 and variance 1. With
        `num_epochs`, the batch size is unknown.
      labels: int32 [batch_size]; 0 to the number of classes - 1.

    Raises:
      ValueError: a file is missing.
    """
    crop_size = crop_size or IMAGE_SIZE
    with _input_pipeline("inputs"):
        filenames = dataset.record_files(data_dir, eval_data)
        filename_queue = _filename_queue(filenames, num_epochs, shuffle=False)
        if fast_ops:
            _, label, image = fast_input.cropped_examples(filename_queue, crop_size)
        else:
            record = read_cifar10(filename_queue)
            label, image = record.label, central_crops(record.uint8image, crop_size)
        return _generate_image_and_label_batch(
            image,
            label,
            min_queue_examples=batch_size + 4 * fast_input.RECORDS_PER_READ,
            batch_size=batch_size,
            shuffle=False,
            num_threads=1,  # more threads would not keep the order
            enqueue_many=fast_ops,
            allow_smaller_final_batch=num_epochs is not None,
        )
