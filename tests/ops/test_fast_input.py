"""Tests of the blocks of records, and of the distortions against tf.image."""

import collections
import itertools

import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import (
    all_batches,
    make_records,
    pixels,
    running_queues,
    standardized_centers,
    write_dataset,
)

import cifar10_input
from support.ops import fast_input
from support.ops.tensorflow_v1 import tf

pytestmark = pytest.mark.usefixtures("graph")

DISTORTION = cifar10_input.Distortion(63.0, 0.2, 1.8)


def make_planes(images):
    """Returns images, [n, 32, 32, 3], as they are in records: [n, 3, 32, 32]."""
    return np.ascontiguousarray(np.moveaxis(images, 3, 1))


def distort(images, draws, size=24):
    """Distorts images, uint8 [n, 32, 32, 3], with `Draws` of arrays."""
    return fast_input.distort(
        tf.constant(make_planes(images)), fast_input.Draws(*map(tf.convert_to_tensor, draws)), size
    )


def make_draws(count, size, seed=0):
    """Returns random `Draws` from NumPy."""
    generator = np.random.default_rng(seed)
    return fast_input.Draws(
        top=generator.integers(0, 32 - size + 1, count).astype(np.int32),
        left=generator.integers(0, 32 - size + 1, count).astype(np.int32),
        flip=generator.random(count) < 0.5,
        brightness=generator.uniform(-63, 63, count).astype(np.float32),
        contrast=generator.uniform(0.2, 1.8, count).astype(np.float32),
    )


def evaluate(tensors):
    with tf.Session() as session:
        return session.run(tensors)


def assert_uniform(values, low, high):
    """Checks the Kolmogorov-Smirnov distance, which exceeds the limit once in a million samples."""
    values = np.sort(np.asarray(values, np.float64))
    assert values[0] >= low - 1e-4
    assert values[-1] <= high + 1e-4
    expected = (values - low) / (high - low)
    distance = np.abs(expected - (np.arange(values.size) + 0.5) / values.size).max()
    assert distance < 2.7 / np.sqrt(values.size)


def distort_with_tf_image(image, top, left, flip, brightness, contrast, size):
    """Distorts one image, uint8 [32, 32, 3], with TensorFlow's operations."""
    image = tf.image.crop_to_bounding_box(tf.cast(image, tf.float32), top, left, size, size)
    if flip:
        image = tf.image.flip_left_right(image)
    image = tf.image.adjust_brightness(image, brightness)
    image = tf.image.adjust_contrast(image, contrast)
    return tf.image.per_image_standardization(image)


def distort_exactly(image, top, left, flip, brightness, contrast, size):
    """Distorts one image, uint8 [32, 32, 3], in float64; returns it and its standardization."""
    image = image[top : top + size, left : left + size].astype(np.float64)
    if flip:
        image = image[:, ::-1]
    image = image + brightness
    mean = image.mean(axis=(0, 1))
    image = mean + contrast * (image - mean)
    return image, (image - image.mean()) / max(image.std(), 1 / np.sqrt(image.size))


@pytest.mark.parametrize("size", [24, 8, 31, 32])
def test_the_same_draws_give_the_images_that_tf_image_gives(size):
    images = pixels(make_records(30))
    draws = make_draws(30, size)
    distorted = distort(images, draws, size)
    assert (distorted.dtype, distorted.shape.as_list()) == (tf.float32, [30, size, size, 3])
    expected = [
        distort_with_tf_image(*arguments, size) for arguments in zip(images, *draws, strict=True)
    ]
    found, expected = evaluate([distorted, expected])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_every_crop_and_flip_gives_the_image_that_tf_image_gives():
    image = pixels(make_records(1))[0]
    positions = list(itertools.product(range(9), range(9)))
    top, left = np.array(positions * 2, np.int32).T
    draws = fast_input.Draws(
        top, left, np.arange(162) >= 81, np.zeros(162, np.float32), np.ones(162, np.float32)
    )
    distorted = distort(np.stack([image] * 162), draws)
    corner = tf.placeholder(tf.int32, [2])
    cropped = tf.image.crop_to_bounding_box(tf.cast(image, tf.float32), *tf.unstack(corner), 24, 24)
    stock = [
        tf.image.per_image_standardization(each)
        for each in (cropped, tf.image.flip_left_right(cropped))
    ]
    with tf.Session() as session:
        found = session.run(distorted)
        for i, position in enumerate(positions):
            expected = session.run(stock, {corner: position})
            np.testing.assert_allclose(found[[i, i + 81]], expected, rtol=0, atol=1e-5)


def make_flat_images():
    """Returns bright images that hardly vary, or vary only between channels: [5, 32, 32, 3]."""
    images = np.full([5, 32, 32, 3], 250, np.uint8)
    images[0, 16, 16, 1] = 251  # standard deviation below the minimum of 1 / sqrt(24 * 24 * 3)
    images[1, 10:20, 10:20, 2] = 251
    images[2] = [7, 8, 9]
    images[3] = [254, 255, 255]
    images[4, :, ::2] = 255
    return images


def assert_as_exact_as_float32_allows(found, exact, images):
    """Checks standardized images: to 1e-5 unless the images hardly vary.

    float32 rounds values from 256 to 511 to multiples of 2**-15, and standardization divides the
    error by the standard deviation.

    Args:
      found: float32 [n, size, size, 3].
      exact: float64 [n, size, size, 3].
      images: float64 [n, size, size, 3]; before standardization.
    """
    for each, reference, image in zip(found, exact, images, strict=True):
        deviation = max(image.std(), 1 / np.sqrt(image.size))
        np.testing.assert_allclose(each, reference, rtol=0, atol=max(1e-5, 2**-15 / deviation))


def test_images_that_hardly_vary_are_as_exact_as_float32_allows():
    images, draws = make_flat_images(), make_draws(5, 24)
    arguments = list(zip(images, *draws, strict=True))
    found, by_tf_image = evaluate(
        [distort(images, draws), [distort_with_tf_image(*each, 24) for each in arguments]]
    )
    unstandardized, exact = zip(*(distort_exactly(*each, 24) for each in arguments), strict=True)
    assert_as_exact_as_float32_allows(found, exact, unstandardized)
    # tf.image distorts every pixel, so its own rounding errors are larger.
    np.testing.assert_allclose(by_tf_image, exact, atol=0.01)


def test_brightness_is_part_of_the_result_although_standardization_cancels_it():
    images = pixels(make_records(4))
    brightness = tf.placeholder(tf.float32, [4])
    draws = make_draws(4, 24)._replace(brightness=brightness)
    distorted = distort(images, draws)
    (gradient,) = tf.gradients(distorted, brightness)
    assert gradient is not None
    with tf.Session() as session:
        dark, bright = (session.run(distorted, {brightness: [b] * 4}) for b in (-63, 63))
    np.testing.assert_allclose(dark, bright, atol=1e-5)


def test_distorted_images_have_mean_0_and_variance_1():
    images = pixels(make_records(50))
    distorted = evaluate(distort(images, make_draws(50, 24)))
    np.testing.assert_allclose(distorted.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(distorted.std(axis=(1, 2, 3)), 1, atol=1e-5)


def test_an_image_of_one_color_becomes_zeros():
    images = np.full([2, 32, 32, 3], 200, np.uint8)
    cropped = fast_input.crop(tf.constant(make_planes(images)), 24)
    distorted = distort(images, make_draws(2, 24))
    for found in evaluate([cropped, distorted]):
        np.testing.assert_array_equal(found, np.zeros([2, 24, 24, 3]))


@pytest.mark.parametrize("size", [24, 8, 27, 32])
def test_central_crops_are_standardized_like_those_of_tf_image(size):
    images = pixels(make_records(6))
    cropped = fast_input.crop(tf.constant(make_planes(images)), size)
    assert (cropped.dtype, cropped.shape.as_list()) == (tf.float32, [6, size, size, 3])
    stock = tf.image.resize_with_crop_or_pad(tf.cast(images, tf.float32), size, size)
    found, stock = evaluate([cropped, tf.image.per_image_standardization(stock)])
    np.testing.assert_allclose(found, stock, rtol=0, atol=1e-5)


def test_the_standard_deviation_has_the_minimum_of_tf_image():
    images = make_flat_images()
    cropped = fast_input.crop(tf.constant(make_planes(images)), 24)
    centers = images[:, 4:28, 4:28].astype(np.float64)
    deviations = np.maximum(centers.std(axis=(1, 2, 3), keepdims=True), 1 / np.sqrt(1728))
    exact = (centers - centers.mean(axis=(1, 2, 3), keepdims=True)) / deviations
    stock = tf.image.per_image_standardization(tf.cast(images[:, 4:28, 4:28], tf.float32))
    found, stock = evaluate([cropped, stock])
    assert_as_exact_as_float32_allows(found, exact, centers)
    assert_as_exact_as_float32_allows(stock, exact, centers)
    assert found[0].std() < 0.9999
    np.testing.assert_allclose(found[1:].std(axis=(1, 2, 3)), 1, atol=1e-3)


def test_each_crop_and_flip_is_equally_likely_for_each_image():
    count = 16200
    draws = evaluate(fast_input.draw(count, 24, DISTORTION))
    drawn = collections.Counter(zip(draws.top, draws.left, draws.flip, strict=True))
    assert set(drawn) == set(itertools.product(range(9), range(9), (False, True)))
    # Chi-squared over 162 cells: mean 161, standard deviation sqrt(2 * 161) = 18.
    expected = count / 162
    chi_squared = sum((found - expected) ** 2 / expected for found in drawn.values())
    assert chi_squared < 161 + 6 * 18


@pytest.mark.parametrize("size", [8, 31, 32])
def test_crops_of_other_sizes_lie_anywhere_in_the_image(size):
    draws = evaluate(fast_input.draw(4000, size, DISTORTION))
    positions = set(range(32 - size + 1))
    assert set(draws.top) == set(draws.left) == positions
    assert 0.4 < draws.flip.mean() < 0.6


def test_no_image_is_flipped_if_the_random_flip_is_off():
    draws = evaluate(fast_input.draw(1000, 24, DISTORTION._replace(random_flip=False)))
    assert not draws.flip.any()
    assert len(set(zip(draws.top, draws.left, strict=True))) == 81


@pytest.mark.parametrize(
    ("max_delta", "low", "high"), [(63.0, 0.2, 1.8), (5.0, 0.0, 0.5), (255.0, 1.0, 3.0)]
)
def test_brightness_and_contrast_are_uniform_within_their_limits(max_delta, low, high):
    draws = evaluate(fast_input.draw(4000, 24, cifar10_input.Distortion(max_delta, low, high)))
    assert_uniform(draws.brightness, -max_delta, max_delta)
    assert_uniform(draws.contrast, low, high)


def test_equal_limits_give_that_value():
    draws = evaluate(fast_input.draw(100, 24, cifar10_input.Distortion(0.0, 0.7, 0.7)))
    np.testing.assert_array_equal(draws.brightness, 0)
    np.testing.assert_array_equal(draws.contrast, np.float32(0.7))


def test_the_draws_of_an_image_are_independent_of_each_other_and_of_the_next_image():
    draws = np.array(evaluate(fast_input.draw(10000, 24, DISTORTION)), np.float64)
    pairs = np.concatenate([draws[:, :-1], draws[:, 1:]])  # [10, 9999]
    correlations = np.corrcoef(pairs)
    # A value has a correlation of 1 with itself. For the others, the limit is 6 standard
    # deviations of 1 / sqrt(10000).
    correlations[np.eye(10, dtype=bool)] = 0
    assert np.abs(correlations).max() < 0.06


def test_every_run_draws_new_numbers():
    draws = fast_input.draw(1000, 24, DISTORTION)
    with tf.Session() as session:
        first, second = session.run(draws), session.run(draws)
    for name in ("brightness", "contrast"):
        assert not np.intersect1d(getattr(first, name), getattr(second, name)).size, name
    for name in ("top", "left", "flip"):
        assert (getattr(first, name) != getattr(second, name)).mean() > 0.4, name


def write_files(folder, counts):
    """Writes record files; returns their paths and all records."""
    paths = [str(folder / f"records_{number}.bin") for number in range(len(counts))]
    records = [make_records(count, number) for number, count in enumerate(counts)]
    for path, each in zip(paths, records, strict=True):
        each.tofile(path)
    return paths, np.concatenate(records)


def filename_queue(paths):
    return tf.train.string_input_producer(paths, num_epochs=1, shuffle=False)


def test_blocks_contain_every_record_once_in_order(tmp_path):
    paths, records = write_files(tmp_path, [5, 4, 9])
    block = fast_input.read_records(filename_queue(paths), count=4)
    with running_queues() as session:
        blocks = all_batches(session, block)
    assert max(len(keys) for keys, _, _ in blocks) == 4
    keys, labels, planes = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    expected = [f"{path}:{i}" for path, n in zip(paths, (5, 4, 9), strict=True) for i in range(n)]
    assert [key.decode() for key in keys] == expected
    assert (labels.dtype, planes.dtype) == (np.int32, np.uint8)
    np.testing.assert_array_equal(labels, records[:, :1])
    np.testing.assert_array_equal(planes.reshape(-1, 3072), records[:, 1:])


def test_a_block_has_128_records_by_default(tmp_path):
    paths, _ = write_files(tmp_path, [200])
    _, labels, _ = fast_input.read_records(filename_queue(paths))
    with running_queues() as session:
        assert [len(batch) for batch in all_batches(session, labels)] == [128, 72]


def test_cropped_examples_keep_their_keys_and_labels(tmp_path):
    paths, records = write_files(tmp_path, [7, 3])
    examples = fast_input.cropped_examples(filename_queue(paths), 20)
    with running_queues() as session:
        blocks = all_batches(session, examples)
    keys, labels, images = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    assert [key.decode().rpartition(":")[2] for key in keys] == list("0123456012")
    np.testing.assert_array_equal(labels, records[:, :1])
    np.testing.assert_allclose(images, standardized_centers(records, 20), atol=1e-5)


def test_distorted_examples_keep_their_keys_and_labels(tmp_path):
    # Record i has a bright pixel in channel i % 3 everywhere: no distortion changes the channel.
    paths, records = write_files(tmp_path, [7, 3])
    start = 0
    for path, count in zip(paths, (7, 3), strict=True):
        planes = np.zeros([count, 3, 1024], np.uint8)
        for i in range(count):
            planes[i, (start + i) % 3] = 200
        records[start : start + count, 1:] = planes.reshape(count, -1)
        records[start : start + count].tofile(path)
        start += count
    examples = fast_input.distorted_examples(filename_queue(paths), 20, DISTORTION)
    with running_queues() as session:
        blocks = all_batches(session, examples)
    keys, labels, images = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    assert images.shape == (10, 20, 20, 3)
    assert [key.decode().rpartition(":")[2] for key in keys] == list("0123456012")
    np.testing.assert_array_equal(labels, records[:, :1])
    np.testing.assert_array_equal(images.mean(axis=(1, 2)).argmax(axis=1), np.arange(10) % 3)


# The tests below compare the two pipelines of cifar10_input.distorted_inputs. With one thread and a
# fixed seed, every run gives the same images, so these tests either always pass or always fail.


@pytest.fixture
def image(tmp_path):
    """The image of all records of the dataset in `tmp_path`: uint8 [32, 32, 3].

    Pixels are random, so no two crops are alike, and the channels have different means, so that
    contrast is visible after standardization.
    """
    generator = np.random.default_rng(3)
    image = generator.integers(0, 128, [32, 32, 3]) + np.array([0, 60, 127])
    image = image.astype(np.uint8)
    write_dataset(tmp_path)
    records = make_records(128)
    records[:, 1:] = make_planes(image[np.newaxis]).reshape(1, -1)
    for number in range(1, 6):
        records.tofile(tmp_path / f"data_batch_{number}.bin")
    return image


def training_images(folder, fast_ops, count, distortion=DISTORTION):
    """Returns `count` images of a training input: float32 [count, 24, 24, 3]."""
    with tf.Graph().as_default():
        tf.set_random_seed(11)
        with flagsaver.flagsaver(
            fast_ops=fast_ops,
            min_fraction_of_examples_in_queue=0.01,
            num_preprocess_threads=1,
            **distortion._asdict(),
        ):
            images, _ = cifar10_input.distorted_inputs(str(folder), count)
        with running_queues() as session:
            return session.run(images)


def decode(distorted, image):
    """Finds out how `image` has been distorted.

    Standardized values still have the pattern of the crop. The contrast changes the differences
    within a channel, but not those between the means of the channels.

    Args:
      distorted: float32 [n, 24, 24, 3]; distorted and standardized.
      image: uint8 [32, 32, 3].

    Returns:
      crops: int [n]; the number of the crop, from 0 to 80.
      flips: bool [n].
      contrasts: float [n].
    """
    windows = np.lib.stride_tricks.sliding_window_view(image, (24, 24), axis=(0, 1))
    windows = np.moveaxis(windows, 2, 4).reshape(81, 24, 24, 3).astype(np.float64)
    candidates = np.concatenate([windows, windows[:, :, ::-1]])  # [162, 24, 24, 3]

    def take_apart(images):
        means = images.mean(axis=(1, 2), keepdims=True)
        return means[:, 0, 0], (images - means).reshape(len(images), -1)

    means, deviations = take_apart(distorted.astype(np.float64))
    candidate_means, patterns = take_apart(candidates)
    patterns /= np.linalg.norm(patterns, axis=1, keepdims=True)
    scores = deviations @ patterns.T / np.linalg.norm(deviations, axis=1, keepdims=True)
    best = scores.argmax(axis=1)
    assert scores.max(axis=1).min() > 0.9999  # each image is a crop, and nothing else
    scales = np.ptp(means, axis=1) / np.ptp(candidate_means[best], axis=1)
    norms = np.linalg.norm(take_apart(candidates[best])[1], axis=1)
    contrasts = np.linalg.norm(deviations, axis=1) / norms / scales
    return best % 81, best >= 81, contrasts


@pytest.mark.parametrize("fast_ops", [True, False])
def test_crops_flips_and_contrasts_of_the_training_input_are_uniform(tmp_path, image, fast_ops):
    count = 3240
    crops, flips, contrasts = decode(training_images(tmp_path, fast_ops, count), image)
    drawn = np.bincount(crops + 81 * flips, minlength=162)
    # Chi-squared over 162 cells: mean 161, standard deviation sqrt(2 * 161) = 18.
    expected = count / 162
    assert ((drawn - expected) ** 2 / expected).sum() < 161 + 6 * 18
    assert abs(flips.mean() - 0.5) < 6 * 0.5 / np.sqrt(count)
    assert_uniform(contrasts, 0.2, 1.8)


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (0.5, 1.0), (1.0, 3.0), (0.05, 0.06)], ids=str
)
@pytest.mark.parametrize("fast_ops", [True, False])
def test_the_contrast_of_the_training_input_has_the_given_limits(
    tmp_path, image, fast_ops, low, high
):
    distortion = cifar10_input.Distortion(63.0, low, high)
    _, _, contrasts = decode(training_images(tmp_path, fast_ops, 500, distortion), image)
    if low == high:
        np.testing.assert_allclose(contrasts, low, atol=1e-4)
    else:
        assert_uniform(contrasts, low, high)


@pytest.mark.parametrize("fast_ops", [True, False])
def test_the_training_input_is_not_flipped_if_the_random_flip_is_off(tmp_path, image, fast_ops):
    distortion = cifar10_input.Distortion(63.0, 0.2, 1.8, random_flip=False)
    crops, flips, _ = decode(training_images(tmp_path, fast_ops, 1000, distortion), image)
    assert not flips.any()
    assert len(set(crops)) == 81


@pytest.mark.parametrize("max_delta", [63.0, 5.0, 0.0])
def test_the_reference_adds_one_uniform_brightness_to_each_image(
    tmp_path, image, monkeypatch, max_delta
):
    monkeypatch.setattr(tf.image, "per_image_standardization", lambda image: image)
    distortion = cifar10_input.Distortion(max_delta, 1.0, 1.0)
    images = training_images(tmp_path, False, 1000, distortion)
    crops, flips, _ = decode(images, image)
    windows = np.lib.stride_tricks.sliding_window_view(image, (24, 24), axis=(0, 1))
    expected = np.moveaxis(windows, 2, 4).reshape(81, 24, 24, 3)[crops].astype(np.float64)
    expected[flips] = expected[flips][:, :, ::-1]
    deltas = images - expected
    assert np.ptp(deltas, axis=(1, 2, 3)).max() < 1e-3
    if max_delta == 0.0:
        np.testing.assert_allclose(deltas, 0, atol=1e-3)
    else:
        assert_uniform(deltas.mean(axis=(1, 2, 3)), -max_delta, max_delta)


def test_both_pipelines_have_the_same_mean_and_variance_at_every_position(tmp_path, image):
    count = 3000
    fast, reference = (
        training_images(tmp_path, fast_ops, count).astype(np.float64) for fast_ops in (True, False)
    )
    assert (fast != reference).any()
    # The largest of 1,728 differences, in standard deviations of a difference of two samples. It
    # exceeds 6 once in 300,000 samples.
    for power in (1, 2):
        first, second = fast**power, reference**power
        deviation = np.sqrt((first.var(axis=0) + second.var(axis=0)) / count)
        assert (np.abs(first.mean(axis=0) - second.mean(axis=0)) / deviation).max() < 6
