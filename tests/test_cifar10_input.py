"""Bytes in, exact pixels out; and what the random distortions may and may not do."""

import collections
import io
import os

import numpy as np
import pytest
from conftest import (
    all_batches,
    make_records,
    pixels,
    running_queues,
    standardized_centers,
    write_data_set,
)
from PIL import Image

import cifar10_input
from cifar10_runtime import tf

pytestmark = pytest.mark.usefixtures("graph")


def depth_major(images):
    """Turns images as they are seen, [n, height, width, 3], into [n, 3, height, width]."""
    return np.moveaxis(images, 3, 1)


def evaluate(build, images, repeat=1):
    """Returns what `build` makes of a batch; a list of `repeat` drawings if over 1."""
    placeholder = tf.placeholder(images.dtype, [None, *images.shape[1:]])
    result = build(placeholder)
    with tf.Session() as session:
        results = [session.run(result, {placeholder: images}) for _ in range(repeat)]
    return results if repeat > 1 else results[0]


def assert_uniform(values, low, high):
    """Checks the Kolmogorov-Smirnov distance; by chance 1 in a million drawings exceeds it."""
    values = np.sort(values)
    assert values[0] >= low
    assert values[-1] <= high
    expected = (values - low) / (high - low)
    distance = np.abs(expected - (np.arange(values.size) + 0.5) / values.size).max()
    assert distance < 2.7 / np.sqrt(values.size)


def test_the_constants_are_the_tutorials():
    assert cifar10_input.IMAGE_SIZE == 24
    assert cifar10_input.NUM_CLASSES == 10
    assert cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN == 50000
    assert cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL == 10000


def test_a_record_of_known_bytes_becomes_the_image_it_describes(tmp_path):
    # The pixel in row y and column x has the value 7 * y + 3 * x + 50 * channel, modulo 256.
    record = [6]
    for channel in range(3):
        record += [(7 * y + 3 * x + 50 * channel) % 256 for y in range(32) for x in range(32)]
    path = tmp_path / "records.bin"
    path.write_bytes(make_records(1).tobytes() + bytes(record))

    result = cifar10_input.read_cifar10(tf.train.string_input_producer([str(path)], num_epochs=1))
    assert (result.height, result.width, result.depth) == (32, 32, 3)
    assert (result.label.dtype, result.label.shape) == (tf.int32, [1])
    assert (result.uint8image.dtype, result.uint8image.shape) == (tf.uint8, [32, 32, 3])
    assert (result.key.dtype, result.key.shape) == (tf.string, [])
    with running_queues() as session:
        batches = all_batches(session, [result.key, result.label, result.uint8image])
    assert len(batches) == 2
    key, label, image = batches[1]
    assert key.decode() == f"{path}:1"
    assert label.tolist() == [6]
    y, x, channel = np.meshgrid(range(32), range(32), range(3), indexing="ij")
    np.testing.assert_array_equal(image, (7 * y + 3 * x + 50 * channel) % 256)


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_evaluation_gives_each_record_once_in_the_order_of_the_file(tmp_path, batch_size):
    _, test = write_data_set(tmp_path, test_count=131)
    images, labels = cifar10_input.inputs(True, str(tmp_path), batch_size, num_epochs=1)
    with running_queues() as session:
        batches = all_batches(session, [images, labels])
    assert [len(batch_labels) for _, batch_labels in batches] == (
        [batch_size] * (131 // batch_size) + [131 % batch_size] * (131 % batch_size > 0)
    )
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_array_equal(labels, test[:, 0])
    np.testing.assert_allclose(images, standardized_centers(test), atol=1e-4)


def test_evaluation_on_the_training_files_reads_all_five_in_order(tmp_path):
    train, _ = write_data_set(tmp_path)
    images, _ = cifar10_input.inputs(False, str(tmp_path), 4, num_epochs=1)
    with running_queues() as session:
        images = np.concatenate(all_batches(session, images))
    np.testing.assert_allclose(images, standardized_centers(train), atol=1e-4)


def test_evaluation_input_runs_for_ever_by_default_in_full_batches(tmp_path):
    _, test = write_data_set(tmp_path, test_count=5)
    images, labels = cifar10_input.inputs(True, str(tmp_path), 4)
    assert (images.dtype, images.shape) == (tf.float32, [4, 24, 24, 3])
    assert (labels.dtype, labels.shape) == (tf.int32, [4])
    with running_queues() as session:
        found = np.concatenate([session.run(labels) for _ in range(10)])
    np.testing.assert_array_equal(found, np.tile(test[:, 0], 8))


def test_training_input_runs_for_ever_on_the_training_files_in_another_order(tmp_path):
    train, _ = write_data_set(tmp_path)
    train[:, 0] = 7
    train.tofile(tmp_path / "data_batch_1.bin")
    images, labels = cifar10_input.distorted_inputs(str(tmp_path), 8, 0.002)
    assert (images.dtype, images.shape) == (tf.float32, [8, 24, 24, 3])
    assert (labels.dtype, labels.shape) == (tf.int32, [8])
    with running_queues() as session:
        batches = [session.run([images, labels]) for _ in range(40)]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std(axis=(1, 2, 3)), 1, atol=1e-3)
    # 320 images from 47 records: none comes out twice the same, and no class in runs of its file.
    assert len(np.unique(images.reshape(320, -1), axis=0)) == 320
    assert 0.2 < (labels == 7).mean() < 0.9
    assert np.count_nonzero(np.diff(labels == 7)) > 50


def test_training_images_keep_their_labels(tmp_path):
    # Records of label n are darker on the left where n is even and on top where n is odd: no
    # distortion but the mirror changes that, and it leaves a vertical gradient vertical.
    records = make_records(40)
    ramp = np.arange(32) * 7
    for record in records:
        image = np.broadcast_to(ramp if record[0] % 2 == 0 else ramp[:, np.newaxis], [3, 32, 32])
        record[1:] = image.reshape(-1)
    for number in range(1, 6):
        records.tofile(tmp_path / f"data_batch_{number}.bin")
    images, labels = cifar10_input.distorted_inputs(str(tmp_path), 100, 0.01)
    with running_queues() as session:
        images, labels = session.run([images, labels])
    across = np.abs(images[:, :, 0] - images[:, :, -1]).mean(axis=(1, 2))
    down = np.abs(images[:, 0] - images[:, -1]).mean(axis=(1, 2))
    np.testing.assert_array_equal(across > down, labels % 2 == 0)


@pytest.mark.parametrize(
    ("arguments", "minimum"), [((), 200), ((0.02,), 10), ((1.0,), 500), ((0.0,), 0)]
)
def test_the_training_queue_keeps_its_fraction_of_an_epoch(tmp_path, capsys, arguments, minimum):
    write_data_set(tmp_path, train_counts=[80, 120, 90, 110, 100])
    cifar10_input.distorted_inputs(str(tmp_path), 128, *arguments)
    (queue,) = [
        operation
        for operation in tf.get_default_graph().get_operations()
        if operation.type == "RandomShuffleQueueV2"
        and operation.get_attr("component_types") == [tf.float32, tf.int32]
    ]
    assert queue.get_attr("min_after_dequeue") == minimum
    assert queue.get_attr("capacity") >= minimum + 128
    assert capsys.readouterr().out == (
        f"Filling queue with {minimum} CIFAR images before starting to train. "
        "This will take a few minutes.\n"
    )


def test_sixteen_threads_fill_the_training_queue(tmp_path):
    write_data_set(tmp_path)
    cifar10_input.distorted_inputs(str(tmp_path), 128)
    runners = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    assert sorted(len(runner.enqueue_ops) for runner in runners) == [1, 16]


@pytest.mark.parametrize(
    "build",
    [
        lambda folder, queue: cifar10_input.distorted_inputs(folder, 8),
        lambda folder, queue: cifar10_input.inputs(True, folder, 8, num_epochs=1),
        lambda folder, queue: cifar10_input.read_cifar10(queue),
    ],
    ids=["distorted_inputs", "inputs", "read_cifar10"],
)
def test_every_input_operation_is_on_the_cpu(tmp_path, build):
    write_data_set(tmp_path)
    with tf.device("/cpu:0"):
        queue = tf.FIFOQueue(1, tf.string)
    with tf.device("/device:GPU:0"):
        build(str(tmp_path), queue)
    operations = tf.get_default_graph().get_operations()
    assert {operation.device for operation in operations} == {"/device:CPU:0"}


def test_a_missing_file_is_an_error_when_the_input_is_built(tmp_path):
    write_data_set(tmp_path)
    os.remove(tmp_path / "data_batch_5.bin")
    os.remove(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match="Failed to find file: .*data_batch_5.bin"):
        cifar10_input.distorted_inputs(str(tmp_path), 8)
    with pytest.raises(ValueError, match="Failed to find file: .*test_batch.bin"):
        cifar10_input.inputs(True, str(tmp_path), 8)


@pytest.mark.parametrize("batch_size", [8, 16, 37])
@pytest.mark.parametrize("training", [True, False])
def test_an_image_summary_shows_the_batch_as_it_is_fed(tmp_path, training, batch_size):
    write_data_set(tmp_path)
    if training:
        images, _ = cifar10_input.distorted_inputs(str(tmp_path), batch_size, 0.001)
    else:
        images, _ = cifar10_input.inputs(True, str(tmp_path), batch_size)
    with running_queues() as session:
        images, summary = session.run([images, tf.summary.merge_all()])
    (tensor,) = [
        value.tensor.string_val
        for value in tf.Summary.FromString(summary).value
        if value.tag == "input" and value.metadata.plugin_data.plugin_name == "images"
    ]
    width, height, png = tensor
    sheet = np.asarray(Image.open(io.BytesIO(png)), float)
    rows = -(-batch_size // 16)
    assert (int(width), int(height)) == (16 * 26, rows * 26)
    assert sheet.shape == (rows * 26, 16 * 26, 3)
    cells = sheet.reshape(rows, 26, 16, 26, 3).swapaxes(1, 2).reshape(-1, 26, 26, 3)
    low, high = (f(images, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    expected = 255 * (images - low) / (high - low)
    np.testing.assert_allclose(cells[:batch_size, 1:25, 1:25], expected, atol=1.01)
    cells[:batch_size, 1:25, 1:25] = 255
    assert (cells == 255).all()


def draw_crops_and_flips(count, size=24, random_flip=True):
    """Draws for `count` copies of an image whose pixels say where they are; top, left, flipped."""
    y, x = np.meshgrid(range(32), range(32), indexing="ij")
    image = np.stack([y, x, 100 * y + x]).astype(np.float32)
    crops = evaluate(
        lambda planes: cifar10_input._random_crop_and_flip(planes, size, random_flip),
        np.tile(image, [count, 1, 1, 1]),
    )
    assert crops.shape == (count, 3, size, size)
    rows, columns = crops[:, 0].astype(int), crops[:, 1].astype(int)
    np.testing.assert_array_equal(crops[:, 2], 100 * rows + columns)  # the channels go together
    top, left = rows.min(axis=(1, 2)), columns.min(axis=(1, 2))
    flipped = columns[:, 0, 0] > columns[:, 0, -1]
    # Each crop is a whole square of the image, mirrored or not, and nothing else.
    steps = np.arange(size)
    mirrored = size - 1 - steps
    expected_columns = left[:, np.newaxis] + np.where(flipped[:, np.newaxis], mirrored, steps)
    np.testing.assert_array_equal(
        rows, np.broadcast_to((top[:, np.newaxis] + steps)[:, :, np.newaxis], rows.shape)
    )
    np.testing.assert_array_equal(
        columns, np.broadcast_to(expected_columns[:, np.newaxis, :], columns.shape)
    )
    return top, left, flipped


def test_each_crop_and_flip_is_equally_likely_and_drawn_for_each_image():
    count = 16200
    drawn = collections.Counter(zip(*draw_crops_and_flips(count), strict=True))
    assert set(drawn) == {(t, l, f) for t in range(9) for l in range(9) for f in (False, True)}  # noqa: E741
    # Chi-squared over 162 cells: mean 161, standard deviation sqrt(2 * 161) = 18.
    expected = count / 162
    chi_squared = sum((found - expected) ** 2 / expected for found in drawn.values())
    assert chi_squared < 161 + 6 * 18


@pytest.mark.parametrize("size", [8, 31, 32])
def test_crops_of_other_sizes_lie_anywhere_in_the_image(size):
    top, left, flipped = draw_crops_and_flips(4000, size)
    places = set(range(32 - size + 1))
    assert set(top) == set(left) == places
    assert 0.4 < flipped.mean() < 0.6


def test_nothing_is_mirrored_where_that_is_not_asked_for():
    top, left, flipped = draw_crops_and_flips(1000, random_flip=False)
    assert not flipped.any()
    assert len(set(zip(top, left, strict=True))) == 81  # it is cropped as ever


def test_the_training_input_mirrors_and_crops_as_asked(tmp_path):
    records = make_records(500)
    records[:, 1:] = np.tile(np.arange(32), 96)  # brighter and brighter to the right
    for number in range(1, 6):
        records.tofile(tmp_path / f"data_batch_{number}.bin")
    for random_flip in (True, False):
        images, _ = cifar10_input.distorted_inputs(
            str(tmp_path),
            200,
            0.01,
            distortion=cifar10_input.Distortion(random_flip=random_flip),
            crop_size=20,
        )
        with running_queues() as session:
            images = session.run(images)
        assert images.shape == (200, 20, 20, 3)
        is_mirrored = images[:, 0, 0, 0] > images[:, 0, -1, 0]
        assert is_mirrored.any() == random_flip


@pytest.mark.parametrize("size", [8, 27, 32])
def test_evaluation_crops_as_large_a_square_as_asked_in_the_middle(tmp_path, size):
    _, test = write_data_set(tmp_path)
    images, _ = cifar10_input.inputs(True, str(tmp_path), 4, num_epochs=1, crop_size=size)
    with running_queues() as session:
        images = np.concatenate(all_batches(session, images))
    np.testing.assert_allclose(images, standardized_centers(test, size), atol=1e-4)


def test_neighbours_in_a_block_are_cropped_and_flipped_independently():
    for values in draw_crops_and_flips(10000):
        correlation = np.corrcoef(values[:-1], values[1:])[0, 1]
        assert abs(correlation) < 0.06  # 6 standard deviations of 1 / sqrt(10000)


def on_planes(distortion):
    """Turns a distortion of images taken apart into one of depth-major images."""
    return lambda planes: distortion(cifar10_input._Pixels.take_apart(planes)).put_together()


def test_brightness_adds_one_uniform_value_within_63_to_each_image():
    images = np.random.default_rng(0).uniform(0, 255, [4000, 3, 3, 4]).astype(np.float32)
    deltas = evaluate(on_planes(cifar10_input._random_brightness), images) - images
    assert np.ptp(deltas, axis=(1, 2, 3)).max() < 1e-4
    assert_uniform(deltas[:, 0, 0, 0], -63 - 1e-4, 63 + 1e-4)


def test_contrast_scales_each_image_by_one_uniform_factor_around_its_channels_means():
    images = np.random.default_rng(0).uniform(0, 255, [4000, 3, 3, 4]).astype(np.float32)
    results = evaluate(on_planes(cifar10_input._random_contrast), images)
    means = images.mean(axis=(2, 3), keepdims=True)
    factors = (results - means)[:, 0, 0, 0] / (images - means)[:, 0, 0, 0]
    reliable = np.abs((images - means)[:, 0, 0, 0]) > 10  # small distances round off
    assert_uniform(factors[reliable], 0.2 - 1e-4, 1.8 + 1e-4)
    # The formula is the stock op's, which takes one factor a call.
    chosen = np.flatnonzero(reliable)[:5]
    seen = np.moveaxis(images, 1, 3)
    stock = [tf.image.adjust_contrast(seen[i], np.float64(factors[i])) for i in chosen]
    with tf.Session() as session:
        expected = depth_major(np.array(session.run(stock)))
    np.testing.assert_allclose(results[chosen], expected, atol=0.01)


def distort(planes):
    return cifar10_input._distort(planes, cifar10_input.DISTORTION)


@pytest.mark.parametrize(
    ("distortion", "mean_range", "contrast_range"),
    [
        ((0.0, 1.0, 1.0), (0, 0), (1, 1)),
        ((5.0, 1.0, 1.0), (-5, 5), (1, 1)),
        ((0.0, 0.5, 1.0), (0, 0), (0.5, 1)),
        ((0.0, 1.0, 3.0), (0, 0), (1, 3)),
    ],
)
def test_the_training_input_is_distorted_as_far_as_asked(
    tmp_path, monkeypatch, distortion, mean_range, contrast_range
):
    # Without standardization and crops, which would hide it; the image is half 80, half 120.
    monkeypatch.setattr(cifar10_input, "_standardize", lambda pixels: pixels)
    monkeypatch.setattr(
        cifar10_input,
        "_random_crop_and_flip",
        lambda planes, *_: tf.cast(planes[:, :, 4:28, 4:28], tf.float32),
    )
    records = np.full([500, 3073], 80, np.uint8)
    records[:, 1::2] = 120
    records[:, 0] = 0
    write_data_set(tmp_path)
    for number in range(1, 6):
        records.tofile(tmp_path / f"data_batch_{number}.bin")
    images, _ = cifar10_input.distorted_inputs(
        str(tmp_path), 500, 0.01, distortion=cifar10_input.Distortion(*distortion)
    )
    with running_queues() as session:
        images = session.run(images)
    middles = (images.max(axis=(1, 2, 3)) + images.min(axis=(1, 2, 3))) / 2 - 100
    contrasts = np.ptp(images, axis=(1, 2, 3)) / 40
    for values, (low, high) in ((middles, mean_range), (contrasts, contrast_range)):
        if low == high:
            np.testing.assert_allclose(values, low, atol=1e-4)
        else:
            assert_uniform(values, low - 1e-4, high + 1e-4)


@pytest.mark.parametrize(
    "name", ["_random_crop_and_flip", "_random_brightness", "_random_contrast"]
)
def test_each_distortion_has_its_part_in_the_training_images(monkeypatch, name):
    neutral = {
        "_random_crop_and_flip": lambda planes, *_: tf.cast(planes[:, :, 4:28, 4:28], tf.float32),
        "_random_brightness": lambda pixels, *bounds: pixels,
        "_random_contrast": lambda pixels, *bounds: pixels,
        "_standardize": lambda pixels: pixels,
    }
    for other in neutral.keys() - {name}:
        monkeypatch.setattr(cifar10_input, other, neutral[other])
    images = np.tile(pixels(make_records(1)), [8, 1, 1, 1])
    results = evaluate(distort, depth_major(images))
    assert results.dtype == np.float32
    assert (np.abs(results - images[:, 4:28, 4:28]).max(axis=(1, 2, 3)) > 0.01).sum() >= 6


@pytest.mark.parametrize("name", ["_random_brightness", "_random_contrast"])
def test_every_run_draws_anew(name):
    images = np.random.default_rng(0).uniform(0, 255, [2, 3, 3, 4]).astype(np.float32)
    first, second = evaluate(on_planes(getattr(cifar10_input, name)), images, repeat=2)
    assert (np.abs(first - second).max(axis=(1, 2, 3)) > 1e-3).all()


def test_an_image_of_one_colour_is_standardized_to_zeros():
    images = np.full([1, 3, 32, 32], 200, np.uint8)
    np.testing.assert_array_equal(evaluate(cifar10_input._crop, images), np.zeros([1, 24, 24, 3]))
    np.testing.assert_allclose(evaluate(distort, images), 0, atol=1e-2)


def test_standardization_is_the_stock_ops():
    images = pixels(make_records(4)).astype(np.float32)
    images[2] = 7
    images[2, 0, 0, 0] += 0.1  # a deviation less than the least that is taken
    images[3] = [7, 8, 9]  # no deviation within a channel
    with tf.Session() as session:
        expected = session.run(tf.image.per_image_standardization(images))
    own = evaluate(on_planes(cifar10_input._standardize), depth_major(images))
    np.testing.assert_allclose(own, depth_major(expected), atol=1e-4)
    assert own[2].std() < 0.2


def test_contrast_is_standardized_away():
    def distort_and_standardize(pixels):
        return cifar10_input._standardize(cifar10_input._random_contrast(pixels))

    images = np.random.default_rng(0).uniform(0, 255, [50, 3, 24, 24]).astype(np.float32)
    results = evaluate(on_planes(distort_and_standardize), images)
    np.testing.assert_allclose(results.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(results.std(axis=(1, 2, 3)), 1, atol=1e-5)


def test_the_central_crop_leaves_out_four_pixels_on_each_side():
    records = make_records(3)
    np.testing.assert_allclose(
        evaluate(cifar10_input._crop, depth_major(pixels(records))),
        standardized_centers(records),
        atol=1e-4,
    )
