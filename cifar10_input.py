"""The input pipeline of the CIFAR-10 tutorial: the reader, the distortions and the queues.

    string_input_producer -> FixedLengthRecordReader -> decode -> distort -> shuffle_batch

The input runs on the CPU. By default, each thread works on a block of records at a time
(`support.ops.fast_image`); with `--fast_ops=false`, on one record.
"""

import os

from absl import flags

from support.base import options
from support.base.errors import UserError
from support.data import records
from support.data.dataset import read_dataset
from support.ops import fast_image, graph_notes, summaries
from support.ops.tensorflow_v1 import conditionals_without_functions, tf

FLAGS = flags.FLAGS

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
RECORDS_PER_BLOCK = 128  # records that a thread processes at a time with --fast_ops

MAX_BRIGHTNESS_DELTA = 63.0  # pixel values range from 0 to 255
MIN_CONTRAST_FACTOR = 0.2
MAX_CONTRAST_FACTOR = 1.8

# Some of these constants are the defaults of flags.
options.register_constants(globals())
options.define("input")
# The smallest crop has 8 pixels, because it is pooled twice.
FLAGS["crop_size"].parser = flags.IntegerParser(8, min(records.HEIGHT, records.WIDTH))


class CIFAR10Record:
    """One record, or a block of n records, in which each shape begins with n.

    Attributes:
      height, width, depth: int; 32, 32 and 3.
      key: string []; the file and the number of the record among those read, as `file:record`.
      label: int32 [1]; 0 to the number of classes - 1.
      depth_major: uint8 [depth, height, width]; the image as it is stored.
    """

    height = records.HEIGHT
    width = records.WIDTH
    depth = records.DEPTH

    @property
    def uint8image(self):
        """The image, uint8 [height, width, depth]."""
        with tf.device("/cpu:0"):  # not a transpose: for uint8, oneDNN may log an error
            return tf.stack(tf.unstack(self.depth_major, axis=-3), axis=-1)


def read_cifar10(filename_queue, block_size=None, shard=(0, 1)):
    """Reads one record, or a block of records: `block_size`, or fewer at the end of a file.

    All threads that run the operations share one reader. Each call creates a new reader. If you
    edit this function, count axes from the end: `[..., ::-1, :, :]`, not `[::-1]`.

    Args:
      filename_queue: a queue of file names, for example from `tf.train.string_input_producer`.
      block_size: int; None for one record.
      shard: (index, count); read every `count`-th record of each file, from record `index` on.

    Returns:
      A `CIFAR10Record`.
    """
    result = CIFAR10Record()
    skipped_bytes, hop_bytes = (number * records.RECORD_BYTES for number in shard)
    with tf.device("/cpu:0"):
        reader = tf.FixedLengthRecordReader(
            record_bytes=records.RECORD_BYTES, header_bytes=skipped_bytes, hop_bytes=hop_bytes
        )
        if block_size is None:
            result.key, value = reader.read(filename_queue)
        else:
            result.key, value = reader.read_up_to(filename_queue, block_size)
        leading = [-1] * value.shape.ndims  # the axis of the block, if any
        record_bytes = tf.reshape(tf.decode_raw(value, tf.uint8), [*leading, records.RECORD_BYTES])
        result.label = tf.cast(record_bytes[..., : records.LABEL_BYTES], tf.int32)
        result.depth_major = tf.reshape(
            record_bytes[..., records.LABEL_BYTES :],
            [*leading, result.depth, result.height, result.width],
        )
    return result


def distort(image, image_ops):
    """Distorts a training image. To try a distortion of your own, edit this function.

    Args:
      image: float32 [32, 32, 3]; or a block of images, `fast_image.Block`.
      image_ops: `tf.image`; or `fast_image`, whose operations have the same effect on each image of
        a block. If a block does not support what you add, images are distorted one at a time.

    Returns:
      float32 [24, 24, 3], where 24 is --crop_size, with mean 0 and variance 1; or a block.
    """
    size, low, high = FLAGS.crop_size, FLAGS.min_contrast_factor, FLAGS.max_contrast_factor
    image = image_ops.random_crop(image, [size, size, records.DEPTH])
    if FLAGS.random_flip:
        image = image_ops.random_flip_left_right(image)
    # This has no effect before standardization, which subtracts the mean.
    image = image_ops.random_brightness(image, max_delta=FLAGS.max_brightness_delta)
    if low < high:
        image = image_ops.random_contrast(image, low, high)
    else:  # random_contrast requires low < high
        image = image_ops.adjust_contrast(image, high)
    return image_ops.per_image_standardization(image)


def _read_and_distort(filename_queue, shard):
    """Returns an image and its label, or blocks of them if `distort` can process blocks."""
    if FLAGS.fast_ops and fast_image.supports(distort):  # calls `distort` to find out
        record = read_cifar10(filename_queue, RECORDS_PER_BLOCK, shard)
        image = fast_image.finish(distort(fast_image.Block(record.depth_major), fast_image))
    else:
        record = read_cifar10(filename_queue, shard=shard)
        with conditionals_without_functions():
            image = distort(tf.cast(record.uint8image, tf.float32), tf.image)
    return image, record.label


def central_crops(images):
    """Crops images centrally to --crop_size and standardizes them, as evaluation does.

    If you edit this function, count axes from the end: `[..., ::-1, :]`, not `[:, ::-1]`.

    Args:
      images: uint8 [32, 32, 3] or [n, 32, 32, 3]; values from 0 to 255.

    Returns:
      float32 [24, 24, 3] or [n, 24, 24, 3], where 24 is --crop_size; each image has mean 0 and
      variance 1.

    Raises:
      ValueError: the images have another shape.
    """
    images = tf.cast(images, tf.float32)
    images.shape[-3:].assert_is_compatible_with(records.image_shape())  # else padded or cropped
    size = FLAGS.crop_size
    cropped = tf.image.resize_with_crop_or_pad(images, size, size)
    return tf.image.per_image_standardization(cropped)


def _generate_image_and_label_batch(
    image, label, min_queue_examples, batch_size, shuffle, **arguments
):
    """Collects examples in a queue and dequeues them in batches.

    Args:
      image: float32 [height, width, 3]; with `enqueue_many`, [n, height, width, 3].
      label: int32 [1]; with `enqueue_many`, [n, 1].
      min_queue_examples: int; with `shuffle`, the minimum that each batch leaves in the queue.
      batch_size: int.
      shuffle: bool; draw the examples of a batch from the queue at random.
      **arguments: passed to `tf.train.shuffle_batch` or `tf.train.batch`.

    Returns:
      Images, float32 [batch_size, height, width, 3], and labels, int32 [batch_size].
    """
    num_threads = arguments.setdefault("num_threads", FLAGS.num_preprocess_threads)
    if shuffle:
        # The queue draws from the examples that it holds at the moment. With one thread and room
        # for a single example beyond the minimum, it always holds the same number, which makes
        # runs reproducible.
        spare = 3 * batch_size if num_threads > 1 else 1
        images, labels = tf.train.shuffle_batch(
            [image, label],
            batch_size,
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
            [image, label], batch_size, capacity=min_queue_examples + 3 * batch_size, **arguments
        )
    summaries.image_sheet("input", images)
    return images, tf.reshape(labels, [-1])


def _filename_queue(filenames, num_epochs=None, shuffle=True):
    for filename in filenames:
        if not tf.gfile.Exists(filename):
            raise ValueError(f"Failed to find file: {filename}")
    return tf.train.string_input_producer(filenames, num_epochs=num_epochs, shuffle=shuffle)


def find_dataset(data_dir, class_names=None):
    """Returns the `Dataset` in a folder. Edited constants take precedence; see `read_dataset`."""
    return read_dataset(
        data_dir,
        options.constant("NUM_CLASSES"),
        options.constant("NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN"),
        options.constant("NUM_EXAMPLES_PER_EPOCH_FOR_EVAL"),
        class_names,
    )


def distorted_inputs(data_dir, batch_size, shard=(0, 1)):
    """Creates the training input: shuffled and distorted examples, repeated forever.

    The queue yields its first batch when it holds --min_fraction_of_examples_in_queue of an epoch,
    and never holds fewer examples from then on. Every batch is therefore drawn from at least that
    many examples. With --num_preprocess_threads=1, the graph's seed determines the batches.

    Args:
      data_dir: the folder with the record files `data_batch_1.bin` to `data_batch_5.bin`.
      batch_size: int; examples per batch.
      shard: see `read_cifar10`.

    Returns:
      images: float32 [batch_size, 24, 24, 3], where 24 is --crop_size; standardized.
      labels: int32 [batch_size]; 0 to the number of classes - 1.

    Raises:
      ValueError: a file is missing.
      UserError: a file has fewer records than there are shards.
    """
    options.values()  # checks the flags again: a constant may have been edited
    with tf.device("/cpu:0"), tf.name_scope("distorted_inputs"):
        filenames = records.record_files(data_dir, eval_data=False)
        filename_queue = _filename_queue(filenames)
        size = min(map(os.path.getsize, filenames)) // records.RECORD_BYTES
        if size < shard[1]:
            raise UserError(f"--shard_data: {shard[1]} workers, but a file has {size} records")
        image, label = _read_and_distort(filename_queue, shard)
        min_fraction_of_examples_in_queue = FLAGS.min_fraction_of_examples_in_queue
        examples_per_epoch = find_dataset(data_dir).num_examples_per_epoch_for_train
        min_queue_examples = int(examples_per_epoch * min_fraction_of_examples_in_queue)
        print(
            f"Filling queue with {min_queue_examples} CIFAR images before starting to train. "
            "This will take a few minutes.",
            flush=True,
        )
        is_block = image.shape.ndims == 4
        return _generate_image_and_label_batch(
            image, label, min_queue_examples, batch_size, shuffle=True, enqueue_many=is_block
        )


def inputs(eval_data, data_dir, batch_size, num_epochs=None):
    """Creates the evaluation input: centrally cropped examples in the order of the files.

    Args:
      eval_data: bool; True for the test file, False for the training files.
      data_dir: the folder with the record files.
      batch_size: int; examples per batch.
      num_epochs: int; the number of times to read each record, or None to repeat forever. A finite
        input counts epochs in a local variable, so run `tf.local_variables_initializer()`. After
        the last batch, which may be smaller, the queue raises `tf.errors.OutOfRangeError`.

    Returns:
      Images and labels as from `distorted_inputs`; with `num_epochs`, the batch size is unknown.
    """
    options.values()  # checks the flags again: a constant may have been edited
    with tf.device("/cpu:0"), tf.name_scope("inputs"):
        filenames = records.record_files(data_dir, eval_data)
        filename_queue = _filename_queue(filenames, num_epochs, shuffle=False)
        record = read_cifar10(filename_queue, RECORDS_PER_BLOCK if FLAGS.fast_ops else None)
        return _generate_image_and_label_batch(
            central_crops(record.uint8image),
            record.label,
            min_queue_examples=batch_size + 4 * RECORDS_PER_BLOCK,
            batch_size=batch_size,
            shuffle=False,
            num_threads=1,  # more threads would not keep the order
            enqueue_many=FLAGS.fast_ops,
            allow_smaller_final_batch=num_epochs is not None,
        )
