"""The distortions of blocks of images against tf.image: in numbers, and in distribution."""

import collections
import itertools
import re
from typing import NamedTuple

import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import (
    make_records,
    pixels,
    running_queues,
    write_dataset,
)

import cifar10_input
from support.ops import fast_image
from support.ops.tensorflow_v1 import tf

pytestmark = pytest.mark.usefixtures("graph")

LIMITS = {"max_brightness_delta": 63.0, "min_contrast_factor": 0.2, "max_contrast_factor": 1.8}


class Draws(NamedTuple):
    """The random numbers that distort n images: arrays of n values."""

    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray


def make_planes(images):
    """Returns images, [n, 32, 32, 3], as they are in records: [n, 3, 32, 32]."""
    return np.ascontiguousarray(np.moveaxis(images, 3, 1))


def make_block(images, size=24, **limits):
    """Returns the block that `cifar10_input.distort` returns for images, uint8 [n, 32, 32, 3]."""
    with flagsaver.flagsaver(crop_size=size, **LIMITS | limits):
        block = fast_image.Block(tf.constant(make_planes(images)))
        return cifar10_input.distort(block, fast_image)


def distort(images, draws, size=24):
    """Distorts images, uint8 [n, 32, 32, 3], with `Draws`."""
    top, left, flip, brightness, contrast = (
        tf.expand_dims(tf.convert_to_tensor(each), 1) for each in draws
    )
    amounts = [tf.reshape(each, [-1, 1, 1, 1]) for each in (brightness, contrast)]
    return fast_image._distort(make_block(images, size), top, left, flip, amounts)


def draw(count, size=24, **limits):
    """Returns the `Draws` of a block of `count` images, as tensors."""
    block = make_block(np.zeros([count, 32, 32, 3], np.uint8), size, **limits)
    top, left, flip, amounts = fast_image._draw(block)
    if flip is None:
        flip = tf.zeros([count], tf.bool)
    return Draws(*(tf.reshape(each, [-1]) for each in (top, left, flip, *amounts)))


def make_limits(max_delta, low, high):
    """Returns flags that limit brightness and contrast."""
    return dict(zip(LIMITS, (max_delta, low, high), strict=True))


def make_draws(count, size, seed=0):
    """Returns random `Draws` from NumPy."""
    generator = np.random.default_rng(seed)
    return Draws(
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
    draws = Draws(
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
    distorted = evaluate(distort(images, make_draws(2, 24)))
    np.testing.assert_array_equal(distorted, np.zeros([2, 24, 24, 3]))


def test_each_crop_and_flip_is_equally_likely_for_each_image():
    count = 16200
    draws = evaluate(draw(count, 24))
    drawn = collections.Counter(zip(draws.top, draws.left, draws.flip, strict=True))
    assert set(drawn) == set(itertools.product(range(9), range(9), (False, True)))
    # Chi-squared over 162 cells: mean 161, standard deviation sqrt(2 * 161) = 18.
    expected = count / 162
    chi_squared = sum((found - expected) ** 2 / expected for found in drawn.values())
    assert chi_squared < 161 + 6 * 18


@pytest.mark.parametrize("size", [8, 31, 32])
def test_crops_of_other_sizes_lie_anywhere_in_the_image(size):
    draws = evaluate(draw(4000, size))
    positions = set(range(32 - size + 1))
    assert set(draws.top) == set(draws.left) == positions
    assert 0.4 < draws.flip.mean() < 0.6


def test_no_image_is_flipped_if_the_random_flip_is_off():
    draws = evaluate(draw(1000, random_flip=False))
    assert not draws.flip.any()
    assert len(set(zip(draws.top, draws.left, strict=True))) == 81


@pytest.mark.parametrize(
    ("max_delta", "low", "high"), [(63.0, 0.2, 1.8), (5.0, 0.0, 0.5), (255.0, 1.0, 3.0)]
)
def test_brightness_and_contrast_are_uniform_within_their_limits(max_delta, low, high):
    draws = evaluate(draw(4000, **make_limits(max_delta, low, high)))
    assert_uniform(draws.brightness, -max_delta, max_delta)
    assert_uniform(draws.contrast, low, high)


def test_equal_limits_give_that_value():
    draws = evaluate(draw(100, **make_limits(0.0, 0.7, 0.7)))
    np.testing.assert_array_equal(draws.brightness, 0)
    np.testing.assert_array_equal(draws.contrast, np.float32(0.7))


def test_the_draws_of_an_image_are_independent_of_each_other_and_of_the_next_image():
    draws = np.array(evaluate(draw(10000, 24)), np.float64)
    pairs = np.concatenate([draws[:, :-1], draws[:, 1:]])  # [10, 9999]
    correlations = np.corrcoef(pairs)
    # A value has a correlation of 1 with itself. For the others, the limit is 6 standard
    # deviations of 1 / sqrt(10000).
    correlations[np.eye(10, dtype=bool)] = 0
    assert np.abs(correlations).max() < 0.06


def test_every_run_draws_new_numbers():
    draws = draw(1000, 24)
    with tf.Session() as session:
        first, second = session.run(draws), session.run(draws)
    for name in ("brightness", "contrast"):
        assert not np.intersect1d(getattr(first, name), getattr(second, name)).size, name
    for name in ("top", "left", "flip"):
        assert (getattr(first, name) != getattr(second, name)).mean() > 0.4, name


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


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that TensorFlow's logger receives."""
    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    return warnings


def training_images(folder, fast_ops, count, **limits):
    """Returns `count` images of a training input: float32 [count, 24, 24, 3]."""
    with tf.Graph().as_default():
        tf.set_random_seed(11)
        with flagsaver.flagsaver(
            fast_ops=fast_ops,
            min_fraction_of_examples_in_queue=0.01,
            num_preprocess_threads=1,
            **LIMITS | limits,
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
    limits = make_limits(63.0, low, high)
    _, _, contrasts = decode(training_images(tmp_path, fast_ops, 500, **limits), image)
    if low == high:
        np.testing.assert_allclose(contrasts, low, atol=1e-4)
    else:
        assert_uniform(contrasts, low, high)


@pytest.mark.parametrize("fast_ops", [True, False])
def test_the_training_input_is_not_flipped_if_the_random_flip_is_off(tmp_path, image, fast_ops):
    distorted = training_images(tmp_path, fast_ops, 1000, random_flip=False)
    crops, flips, _ = decode(distorted, image)
    assert not flips.any()
    assert len(set(crops)) == 81


@pytest.mark.parametrize("max_delta", [63.0, 5.0, 0.0])
def test_the_reference_adds_one_uniform_brightness_to_each_image(
    tmp_path, image, monkeypatch, max_delta
):
    monkeypatch.setattr(tf.image, "per_image_standardization", lambda image: image)
    images = training_images(tmp_path, False, 1000, **make_limits(max_delta, 1.0, 1.0))
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


# --- Edits of `cifar10_input.distort`.


def standardized(image):
    return (image - image.mean()) / image.std()


def without_contrast(image, image_ops):
    image = image_ops.random_crop(image, [24, 24, 3])
    image = image_ops.random_flip_left_right(image)
    return image_ops.per_image_standardization(image_ops.random_brightness(image, max_delta=63))


def contrast_before_brightness(image, image_ops):
    image = image_ops.random_flip_left_right(image_ops.random_crop(image, [24, 24, 3]))
    image = image_ops.random_contrast(image, lower=0.2, upper=1.8)
    image = image_ops.random_brightness(image, max_delta=63)
    return image_ops.per_image_standardization(image)


def contrast_before_crop(image, image_ops):
    image = image_ops.random_contrast(image, 0.2, 1.8)
    image = image_ops.random_crop(image, [24, 24, 3])
    return image_ops.per_image_standardization(image_ops.random_flip_left_right(image))


def two_hues(image, image_ops):
    return tf.image.random_hue(image_ops.random_hue(image, 0.1), 0.1)


def mean_subtracted(image, image_ops):
    image = image_ops.random_brightness(image_ops.random_crop(image, [24, 24, 3]), 63)
    return image - tf.reduce_mean(image)


def mean_subtracted_after_standardization(image, image_ops):
    image = image_ops.per_image_standardization(image)
    return image - tf.reduce_max(image)


def noise_added(image, image_ops):
    return tf.random.normal(image.shape) + image


def upside_down(image, image_ops):
    return image_ops.per_image_standardization(image[::-1])


def resized(image, image_ops):
    return image_ops.per_image_standardization(tf.image.resize(image, [24, 24]))


def contrast_as_tensor(image, image_ops):
    image = image_ops.adjust_contrast(image_ops.random_crop(image, [24, 24, 3]), tf.constant(0.5))
    return image_ops.per_image_standardization(image_ops.random_flip_left_right(image))


def seeded_brightness(image, image_ops):
    return image_ops.random_brightness(image, 63, seed=5)


def tensorflows_names(image, image_ops):
    image = image_ops.random_crop(value=image, size=[24, 24, 3])
    image = image_ops.adjust_contrast(images=image, contrast_factor=0.5)
    return image_ops.per_image_standardization(image_ops.random_flip_left_right(image=image))


def resized_by_image_ops(image, image_ops):
    image = image_ops.resize(image, [24, 24], method=image_ops.ResizeMethod.BILINEAR)
    return image_ops.per_image_standardization(image)


def with_a_variable(image, image_ops):
    scale = tf.get_variable("scale", [], initializer=tf.ones_initializer())
    return image_ops.per_image_standardization(image[::-1]) * scale


def with_control_dependencies(image, image_ops):
    with tf.control_dependencies([tf.no_op()]):
        image = image_ops.random_crop(image, [24, 24, 3])
    return image_ops.per_image_standardization(image_ops.random_flip_left_right(image))


def not_standardized(image, image_ops):
    return image_ops.random_brightness(image, 63)


def check_contrasts(low, high):
    def check(images, image):
        _, flips, contrasts = decode(images, image)
        assert 0.4 < flips.mean() < 0.6
        if low == high:
            np.testing.assert_allclose(contrasts, low, atol=1e-4)
        else:
            assert_uniform(contrasts, low, high)

    return check


def check_contrast_before_crop(images, image):
    # The contrast keeps the means of the whole image, so the means of a crop change, too.
    _, flips, contrasts = decode(images, image)
    assert 0.4 < flips.mean() < 0.6
    assert contrasts.std() > 0.1


def check_hues(images, image):
    # The red channel is the smallest one, and its difference from the blue one depends on the hue.
    hues = np.median(images[..., 0] - images[..., 2], axis=(1, 2)).astype(np.float64)
    assert len(np.unique(hues)) > 100
    assert abs(np.corrcoef(hues[:-1], hues[1:])[0, 1]) < 6 / np.sqrt(hues.size)


def check_mean(images, image):
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), 0, atol=1e-3)
    assert len({each.tobytes() for each in images}) > 70  # crops


def check_maximum(images, image):
    expected = standardized(image.astype(np.float64))
    np.testing.assert_allclose(images, [expected - expected.max()] * len(images), atol=1e-4)


def check_noise(images, image):
    noise = images.astype(np.float64) - image
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    first, second = noise[:-1].ravel(), noise[1:].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01


def check_upside_down(images, image):
    expected = standardized(image[::-1].astype(np.float64))
    np.testing.assert_allclose(images, [expected] * len(images), atol=1e-4)


def check_resized(images, image):
    stock = tf.image.resize(image.astype(np.float32), [24, 24])
    expected = evaluate(tf.image.per_image_standardization(stock))
    np.testing.assert_allclose(images, [expected] * len(images), atol=1e-4)


def check_brightness(images, image):
    deltas = images.astype(np.float64) - image
    assert np.ptp(deltas, axis=(1, 2, 3)).max() < 1e-3
    assert_uniform(deltas.mean(axis=(1, 2, 3)), -63, 63)


@pytest.mark.parametrize("fast_ops", [True, False])
@pytest.mark.parametrize(
    ("distort", "refused", "check"),
    [
        (without_contrast, None, check_contrasts(1.0, 1.0)),
        (contrast_before_brightness, None, check_contrasts(0.2, 1.8)),
        (not_standardized, None, check_brightness),
        (contrast_before_crop, "random_crop", check_contrast_before_crop),
        (two_hues, "tf.image.random_hue", check_hues),
        (mean_subtracted, "conversion to a tensor", check_mean),
        (mean_subtracted_after_standardization, "conversion to a tensor", check_maximum),
        (noise_added, "conversion to a tensor", check_noise),
        (upside_down, "the operator __getitem__", check_upside_down),
        (resized, "conversion to a tensor", check_resized),
        (contrast_as_tensor, "adjust_contrast with these arguments", check_contrasts(0.5, 0.5)),
        (seeded_brightness, "random_brightness with these arguments", None),
        (tensorflows_names, None, check_contrasts(0.5, 0.5)),
        (resized_by_image_ops, "tf.image.resize", check_resized),
        (with_control_dependencies, "tf.control_dependencies", check_contrasts(1.0, 1.0)),
        (with_a_variable, "the operator __getitem__", check_upside_down),
    ],
)
def test_an_edited_distortion_has_the_same_effect_with_both_backends(
    tmp_path, image, monkeypatch, warnings, distort, refused, check, fast_ops
):
    monkeypatch.setattr(cifar10_input, "distort", distort)
    images = training_images(tmp_path, fast_ops, 600)
    if check is not None:
        check(images, image)
    if fast_ops and refused is not None:
        (line,) = warnings
        assert line.startswith("Distorting one image at a time, which takes about ")
        assert re.search(refused, line)
    else:
        assert warnings == []


def test_one_seed_gives_the_same_images_twice_with_single_images_too(tmp_path, image, monkeypatch):
    monkeypatch.setattr(cifar10_input, "distort", noise_added)
    images = [training_images(tmp_path, True, 50) for _ in range(2)]
    np.testing.assert_array_equal(images[0], images[1])


@pytest.mark.parametrize("fast_ops", [True, False])
def test_a_distortion_that_needs_the_graph_of_training_distorts_single_images(
    tmp_path, image, monkeypatch, fast_ops
):
    def later(image, image_ops):
        image = image_ops.random_crop(image, [24, 24, 3])
        return image + tf.cast(tf.train.get_global_step(), tf.float32)

    monkeypatch.setattr(cifar10_input, "distort", later)
    with flagsaver.flagsaver(fast_ops=fast_ops):
        tf.train.get_or_create_global_step()
        images, _ = cifar10_input.distorted_inputs(str(tmp_path), 8)
    assert images.shape == [8, 24, 24, 3]


def test_an_input_with_control_dependencies_distorts_blocks(tmp_path, image, warnings):
    with tf.control_dependencies([tf.no_op()]):
        images, _ = cifar10_input.distorted_inputs(str(tmp_path), 8)
    assert images.shape == [8, 24, 24, 3]
    assert warnings == []


def test_an_attempt_that_fails_leaves_nothing_in_the_graph(tmp_path, image, monkeypatch):
    monkeypatch.setattr(cifar10_input, "distort", with_a_variable)
    operations = []
    for fast_ops in (True, False):
        with tf.Graph().as_default() as graph, flagsaver.flagsaver(fast_ops=fast_ops):
            cifar10_input.distorted_inputs(str(tmp_path), 8)
            operations.append([node.name for node in graph.as_graph_def().node])
    assert operations[0] == operations[1]


def test_an_operation_does_not_change_the_block_that_it_gets():
    block = fast_image.Block(tf.zeros([5, 3, 32, 32], tf.uint8))
    before = dict(vars(block))
    fast_image.random_crop(fast_image.random_brightness(block, 5), [8, 9, 3])
    assert vars(block) == before
    assert fast_image.random_crop(block, [8, 9, 3]).shape == [8, 9, 3]


@pytest.mark.parametrize(
    "arguments",
    [
        ("random_brightness", -1),
        ("random_contrast", 1.0, 1.0),
        ("random_contrast", -1, 1),
        ("random_crop", [33, 8, 3]),
        ("random_crop", [8, 8]),
        ("random_crop", 8),
    ],
)
def test_what_tf_image_refuses_is_left_to_it(arguments):
    name, *arguments = arguments
    block = fast_image.Block(tf.zeros([5, 3, 32, 32], tf.uint8))
    with pytest.raises(fast_image.NeedsSingleImages, match=name):
        getattr(fast_image, name)(block, *arguments)
    with pytest.raises(AttributeError):
        fast_image.random_cropp  # noqa: B018
