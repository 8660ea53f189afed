"""Tests of the reader, the queues and the batches, with and without the fast operations.

tests/ops/test_fast_image.py tests the random distortions.
"""

import collections
import os

import numpy as np
import pytest
from conftest import (
    all_batches,
    find_example_queue,
    make_records,
    pixels,
    running_queues,
    standardized_centers,
    write_dataset,
)

import cifar10_input
from support.base.errors import UserError
from support.ops import summaries
from support.ops.tensorflow_v1 import tf

pytestmark = pytest.mark.usefixtures("graph")

FLAGS = cifar10_input.FLAGS


def distorted_inputs(folder, batch_size, fraction=0.4, shard=(0, 1)):
    """Creates a training input whose queue holds a fraction of an epoch."""
    FLAGS.min_fraction_of_examples_in_queue = fraction
    return cifar10_input.distorted_inputs(str(folder), batch_size, shard)


def run_batches(tensors, count=None):
    """Runs an input `count` times, or until it ends; returns each tensor's concatenated values."""
    with running_queues() as session:
        batches = all_batches(session, tensors, count)
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def write_train_files(folder, records):
    """Writes the same records to each of the training files of a dataset."""
    write_dataset(folder)
    for number in range(1, 6):
        records.tofile(folder / f"data_batch_{number}.bin")


# The reader.


def test_a_record_of_known_bytes_is_read_as_the_image_that_it_describes(tmp_path):
    # The pixel in row y and column x has the value 7 * y + 3 * x + 50 * channel, modulo 256.
    record = [206]
    for channel in range(3):
        record += [(7 * y + 3 * x + 50 * channel) % 256 for y in range(32) for x in range(32)]
    path = tmp_path / "records.bin"
    path.write_bytes(make_records(1).tobytes() + bytes(record))

    queue = tf.train.string_input_producer([str(path)], num_epochs=1)
    with tf.device("/device:GPU:0"):
        result = cifar10_input.read_cifar10(queue)
    assert result.key.device == result.label.device == result.uint8image.device == "/device:CPU:0"
    assert (result.height, result.width, result.depth) == (32, 32, 3)
    assert (result.label.dtype, result.label.shape) == (tf.int32, [1])
    assert (result.uint8image.dtype, result.uint8image.shape) == (tf.uint8, [32, 32, 3])
    assert (result.key.dtype, result.key.shape) == (tf.string, [])
    with running_queues() as session:
        batches = all_batches(session, [result.key, result.label, result.uint8image])
    assert len(batches) == 2
    key, label, image = batches[1]
    assert key.decode() == f"{path}:1"
    assert label.tolist() == [206]
    y, x, channel = np.meshgrid(range(32), range(32), range(3), indexing="ij")
    np.testing.assert_array_equal(image, (7 * y + 3 * x + 50 * channel) % 256)


# The evaluation input.


@pytest.mark.parametrize(
    ("eval_data", "batch_size", "num_epochs", "sizes"),
    [(True, 7, 1, [7] * 18 + [5]), (True, 128, 3, [128] * 3 + [9]), (False, 4, 1, [4] * 15)],
)
def test_evaluation_gives_each_record_once_per_epoch_in_the_order_of_the_files(
    tmp_path, eval_data, batch_size, num_epochs, sizes, fast_ops
):
    train, test = write_dataset(tmp_path, train_counts=[40, 20], test_count=131)
    tensors = cifar10_input.inputs(eval_data, str(tmp_path), batch_size, num_epochs)
    with running_queues() as session:
        batches = all_batches(session, tensors)
    assert [len(batch_labels) for _, batch_labels in batches] == sizes
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    expected = np.tile(test if eval_data else train, [num_epochs, 1])
    np.testing.assert_array_equal(labels, expected[:, 0])
    np.testing.assert_allclose(images, standardized_centers(expected), atol=1e-4)


def test_evaluation_repeats_forever_in_full_batches_by_default(tmp_path, fast_ops):
    _, test = write_dataset(tmp_path, test_count=5)
    images, labels = cifar10_input.inputs(True, str(tmp_path), 4)
    assert (images.dtype, images.shape) == (tf.float32, [4, 24, 24, 3])
    assert (labels.dtype, labels.shape) == (tf.int32, [4])
    (labels,) = run_batches([labels], 10)
    np.testing.assert_array_equal(labels, np.tile(test[:, 0], 8))


def test_central_crops_prepare_one_image_or_many():
    records = make_records(3)
    images = pixels(records)
    one = cifar10_input.central_crops(images[0])
    many = cifar10_input.central_crops(tf.placeholder_with_default(images, [None, 32, 32, 3]))
    FLAGS.crop_size = 27
    large = cifar10_input.central_crops(images)
    assert (one.shape, many.shape.as_list()) == ([24, 24, 3], [None, 24, 24, 3])
    with tf.Session() as session:
        one, many, large = session.run([one, many, large])
    np.testing.assert_allclose(one, standardized_centers(records)[0], atol=1e-4)
    np.testing.assert_allclose(many, standardized_centers(records), atol=1e-4)
    np.testing.assert_allclose(large, standardized_centers(records, 27), atol=1e-4)


@pytest.mark.parametrize("shape", [[64, 64, 3], [2, 3, 32, 32]])
def test_central_crops_refuse_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"\[32, 32, 3\] are incompatible"):
        cifar10_input.central_crops(np.zeros(shape, np.uint8))


# The training input.


def test_training_input_repeats_forever_and_shuffles_the_training_files(tmp_path, fast_ops):
    train, _ = write_dataset(tmp_path)
    train[:, 0] = 7
    train.tofile(tmp_path / "data_batch_1.bin")
    images, labels = distorted_inputs(tmp_path, 8, 0.002)
    assert (images.dtype, images.shape) == (tf.float32, [8, 24, 24, 3])
    assert (labels.dtype, labels.shape) == (tf.int32, [8])
    images, labels = run_batches([images, labels], 40)
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std(axis=(1, 2, 3)), 1, atol=1e-3)
    # 320 images from 47 records: no two are the same, and classes do not come in runs.
    assert len(np.unique(images.reshape(320, -1), axis=0)) == 320
    assert 0.2 < (labels == 7).mean() < 0.9
    assert np.count_nonzero(np.diff(labels == 7)) > 50


def test_training_images_keep_their_labels(tmp_path, fast_ops):
    # Images with an even label are darker on the left, those with an odd label are darker at the
    # top. A flip keeps a horizontal gradient horizontal, and no other distortion changes it.
    records = make_records(40)
    ramp = np.arange(32) * 7
    for record in records:
        image = np.broadcast_to(ramp if record[0] % 2 == 0 else ramp[:, np.newaxis], [3, 32, 32])
        record[1:] = image.reshape(-1)
    write_train_files(tmp_path, records)
    images, labels = run_batches(distorted_inputs(tmp_path, 100, 0.01), 1)
    across = np.abs(images[:, :, 0] - images[:, :, -1]).mean(axis=(1, 2))
    down = np.abs(images[:, 0] - images[:, -1]).mean(axis=(1, 2))
    np.testing.assert_array_equal(across > down, labels % 2 == 0)


def test_training_crops_have_the_given_size_and_are_flipped_only_if_asked(tmp_path, fast_ops):
    records = make_records(500)
    records[:, 1:] = np.tile(np.arange(32), 96)  # brighter from left to right
    write_train_files(tmp_path, records)
    FLAGS.crop_size = 20
    for random_flip in (True, False):
        FLAGS.random_flip = random_flip
        images, _ = run_batches(distorted_inputs(tmp_path, 200, 0.01), 1)
        assert images.shape == (200, 20, 20, 3)
        is_flipped = images[:, 0, 0, 0] > images[:, 0, -1, 0]
        assert is_flipped.any() == random_flip
        assert not is_flipped.all()


def test_a_fraction_of_an_epoch_stays_in_the_training_queue(tmp_path, capsys):
    write_dataset(tmp_path, train_counts=[80, 120, 90, 110, 100])
    cifar10_input.distorted_inputs(str(tmp_path), 128)
    assert find_example_queue().get_attr("min_after_dequeue") == 200
    assert capsys.readouterr().out == (
        "Filling queue with 200 CIFAR images before starting to train. "
        "This will take a few minutes.\n"
    )


def test_the_seed_determines_all_batches_if_one_thread_reads(tmp_path, fast_ops):
    write_dataset(tmp_path, train_counts=[40] * 5)
    FLAGS.num_preprocess_threads = 1

    def run(seed):
        with tf.Graph().as_default():
            tf.set_random_seed(seed)
            return run_batches(distorted_inputs(tmp_path, 8, 0.2), 30)

    images, labels = run(5)
    images_again, labels_again = run(5)
    np.testing.assert_array_equal(images, images_again)
    np.testing.assert_array_equal(labels, labels_again)
    other_images, other_labels = run(6)
    assert (labels != other_labels).any()
    assert (images != other_images).any(axis=(1, 2, 3)).all()


OF_THE_TUTORIAL = {"ReaderReadV2", "AdjustContrastv2", "QueueEnqueueV2"}
ON_BLOCKS = {"ReaderReadUpToV2", "BatchMatMulV2"}


def test_training_images_are_distorted_in_blocks_or_one_by_one_as_in_the_tutorial(
    tmp_path, graph, fast_ops
):
    write_dataset(tmp_path)
    distorted_inputs(tmp_path, 8)
    used, unused = (ON_BLOCKS, OF_THE_TUTORIAL) if fast_ops else (OF_THE_TUTORIAL, ON_BLOCKS)
    types = {operation.type for operation in graph.get_operations()}
    assert types >= {"FixedLengthRecordReaderV2", "DecodeRaw", *used}
    assert types.isdisjoint(unused)


# Shards.


def write_numbered_records(folder, counts):
    """Writes training files whose labels number the records through all files."""
    records, _ = write_dataset(folder, counts)
    records[:, 0] = np.arange(len(records))
    for number, part in enumerate(np.split(records, np.cumsum(counts)[:-1]), start=1):
        part.tofile(folder / f"data_batch_{number}.bin")


def test_each_record_belongs_to_exactly_one_shard_and_is_read_without_shards(tmp_path, fast_ops):
    counts = (3, 4, 5, 6, 7)
    folder = tmp_path / "a:7\nb"
    write_numbered_records(folder, counts)
    numbers_in_file = [number for count in counts for number in range(count)]
    for index, count in ((0, 3), (1, 3), (2, 3), (0, 1)):
        with tf.Graph().as_default():
            _, labels = run_batches(distorted_inputs(folder, 100, 0.0, shard=(index, count)), 5)
        of_shard = [label for label, n in enumerate(numbers_in_file) if n % count == index]
        drawn = collections.Counter(labels.tolist())
        assert sorted(drawn) == of_shard
        assert min(drawn.values()) > 0.25 * 500 / len(of_shard)  # about equally often


def test_more_shards_than_records_in_a_file_are_refused(tmp_path):
    write_dataset(tmp_path, train_counts=(2, 1, 2, 1, 2))
    with pytest.raises(UserError, match="3 workers, but a file has 1 records"):
        distorted_inputs(tmp_path, 8, shard=(0, 3))


# Batches, as forks of the tutorial make them.


@pytest.mark.parametrize("shuffle", [True, False])
def test_single_images_are_batched_as_in_the_tutorial(tmp_path, shuffle):
    records = make_records(200)
    records[:, 1:] = records[:, :1]  # every pixel of an image has the value of its label
    records.tofile(tmp_path / "records.bin")
    queue = tf.train.string_input_producer([str(tmp_path / "records.bin")])
    record = cifar10_input.read_cifar10(queue)
    image = tf.cast(record.uint8image, tf.float32)[:20, :28]
    images, labels = cifar10_input._generate_image_and_label_batch(
        image, record.label, 40, 16, shuffle
    )
    assert (images.dtype, images.shape) == (tf.float32, [16, 20, 28, 3])
    assert (labels.dtype, labels.shape) == (tf.int32, [16])
    images, labels = run_batches([images, labels], 20)
    np.testing.assert_array_equal(
        images, np.broadcast_to(labels.reshape(-1, 1, 1, 1), images.shape)
    )
    assert set(labels) == set(range(10))
    (runner,) = [r for r in tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS) if r.queue != queue]
    assert len(runner.enqueue_ops) == 16
    if shuffle:
        assert find_example_queue().get_attr("min_after_dequeue") == 40
        assert find_example_queue().get_attr("capacity") == 40 + 3 * 16


# Both inputs.


def test_every_input_operation_is_on_the_cpu(tmp_path, graph, fast_ops):
    write_dataset(tmp_path)
    with tf.device("/device:GPU:0"):
        distorted_inputs(tmp_path, 8, shard=(0, 2))
        cifar10_input.inputs(True, str(tmp_path), 8, num_epochs=1)
    assert {operation.device for operation in graph.get_operations()} == {"/device:CPU:0"}


def test_a_missing_file_is_an_error_when_the_input_is_built(tmp_path):
    write_dataset(tmp_path)
    os.remove(tmp_path / "data_batch_4.bin")
    os.remove(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match="Failed to find file: .*data_batch_4.bin"):
        distorted_inputs(tmp_path, 8)
    with pytest.raises(ValueError, match="Failed to find file: .*test_batch.bin"):
        cifar10_input.inputs(True, str(tmp_path), 8)


def test_the_image_sheet_shows_the_batch_that_the_model_gets(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    sheets = []
    monkeypatch.setattr(summaries, "image_sheet", lambda *arguments: sheets.append(arguments))
    training_images, _ = distorted_inputs(tmp_path, 6)
    images, _ = cifar10_input.inputs(True, str(tmp_path), 6)
    assert [tag for tag, _ in sheets] == ["input", "input"]
    assert [shown for _, shown in sheets] == [training_images, images]


def test_edits_of_the_reader_and_of_the_central_crops_take_effect_in_both_pipelines(
    tmp_path, monkeypatch, fast_ops
):
    _, test = write_dataset(tmp_path)
    read = cifar10_input.read_cifar10

    def edited_read(*arguments, **named):
        record = read(*arguments, **named)
        record.label += 100
        record.depth_major = 255 - record.depth_major
        return record

    def edited_crops(images):
        return tf.cast(images[..., :24, :24, :], tf.float32)

    monkeypatch.setattr(cifar10_input, "read_cifar10", edited_read)
    monkeypatch.setattr(cifar10_input, "central_crops", edited_crops)
    images, labels = run_batches(cifar10_input.inputs(True, str(tmp_path), 8, num_epochs=1))
    np.testing.assert_array_equal(labels, test[:, 0] + 100)
    np.testing.assert_array_equal(images, 255 - pixels(test)[:, :24, :24])
    _, labels = run_batches(distorted_inputs(tmp_path, 8), 1)
    assert (labels >= 100).all()
