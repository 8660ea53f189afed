"""The distortions of blocks of images against tf.image: in numbers, and in distribution."""

from typing import NamedTuple

import numpy as np
import pytest
from conftest import make_records, pixels, running_queues, write_dataset

import cifar10_input
from support.ops import fast_image
from support.ops.tensorflow_v1 import tf

pytestmark = pytest.mark.usefixtures("graph")

FLAGS = cifar10_input.FLAGS


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


def make_block(images):
    """Returns the block of images, uint8 [n, 32, 32, 3]."""
    return fast_image.Block(tf.constant(make_planes(images)))


def distort(images, draws, size=24):
    """Distorts images, uint8 [n, 32, 32, 3], with `Draws`."""
    top, left, flip = (tf.expand_dims(each, 1) for each in draws[:3])
    brightness, contrast = (tf.reshape(each, [-1, 1, 1, 1]) for each in draws[3:])
    block = make_block(images).replace(
        shape=tf.TensorShape([size, size, 3]),
        corner=(top, left),
        is_mirrored=flip,
        changes=((False, brightness), (True, contrast)),
        is_standardized=True,
    )
    return fast_image.finish(block)


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


def distort_exactly(image, top, left, flip, brightness, contrast, size):
    """Distorts one image, uint8 [32, 32, 3], in float64; returns it and its standardization."""
    image = image[top : top + size, left : left + size].astype(np.float64)
    if flip:
        image = image[:, ::-1]
    image = image + brightness
    mean = image.mean(axis=(0, 1))
    image = mean + contrast * (image - mean)
    return image, (image - image.mean()) / max(image.std(), 1 / np.sqrt(image.size))


def make_flat_images():
    """Returns bright images that hardly vary, or vary only between channels: [5, 32, 32, 3]."""
    images = np.full([5, 32, 32, 3], 250, np.uint8)
    images[0, 16, 16, 1] = 251  # standard deviation below the minimum of 1 / sqrt(24 * 24 * 3)
    images[1, 10:20, 10:20, 2] = 251
    images[2] = [7, 8, 9]
    images[3] = [254, 255, 255]
    images[4, :, ::2] = 255
    return images


@pytest.mark.parametrize(
    ("images", "size"),
    [(pixels(make_records(30)), 24), (pixels(make_records(30)), 32), (make_flat_images(), 24)],
    ids=["crops", "whole", "flat"],
)
def test_distorted_images_are_as_exact_as_float32_allows(images, size):
    draws = make_draws(len(images), size)
    distorted = distort(images, draws, size)
    assert (distorted.dtype, distorted.shape[1:]) == (tf.float32, [size, size, 3])
    for found, *each in zip(evaluate(distorted), images, *draws, strict=True):
        image, exact = distort_exactly(*each, size)
        # float32 rounds values from 256 to 511 to multiples of 2**-15, and standardization divides
        # the error by the standard deviation.
        deviation = max(image.std(), 1 / np.sqrt(image.size))
        np.testing.assert_allclose(found, exact, rtol=0, atol=max(1e-5, 2**-15 / deviation))


def test_an_image_of_one_color_becomes_zeros():
    distorted = evaluate(distort(np.full([2, 32, 32, 3], 200, np.uint8), make_draws(2, 24)))
    assert not distorted.any()


def test_the_draws_of_an_image_are_independent_of_each_other_and_of_the_next_image():
    block = cifar10_input.distort(make_block(np.zeros([10000, 32, 32, 3], np.uint8)), fast_image)
    amounts = [amount for _, amount in block.changes]
    draws = evaluate([*block.corner, block.is_mirrored, *amounts])
    draws = np.array([np.ravel(each) for each in draws], np.float64)
    pairs = np.concatenate([draws[:, :-1], draws[:, 1:]])  # [10, 9999]
    correlations = np.corrcoef(pairs)
    # A value has a correlation of 1 with itself. For the others, the limit is 6 standard
    # deviations of 1 / sqrt(10000).
    correlations[np.eye(10, dtype=bool)] = 0
    assert np.abs(correlations).max() < 0.06


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


def training_images(folder, count):
    """Returns `count` images of a training input: float32 [count, 24, 24, 3]."""
    FLAGS.min_fraction_of_examples_in_queue = 0.01
    FLAGS.num_preprocess_threads = 1
    with tf.Graph().as_default():
        tf.set_random_seed(11)
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


def test_crops_flips_and_contrasts_of_the_training_input_are_uniform(tmp_path, image):
    count = 3240
    crops, flips, contrasts = decode(training_images(tmp_path, count), image)
    drawn = np.bincount(crops + 81 * flips, minlength=162)
    # Chi-squared over 162 cells: mean 161, standard deviation sqrt(2 * 161) = 18.
    expected = count / 162
    assert ((drawn - expected) ** 2 / expected).sum() < 161 + 6 * 18
    assert abs(flips.mean() - 0.5) < 6 * 0.5 / np.sqrt(count)
    assert_uniform(contrasts, 0.2, 1.8)


def test_the_limits_of_the_contrast_may_be_equal(tmp_path, image, fast_ops):
    FLAGS.min_contrast_factor = FLAGS.max_contrast_factor = 0.5
    check_contrasts(0.5, 0.5)(training_images(tmp_path, 100), image)


# --- Edits of `cifar10_input.distort`.


def contrast_before_brightness(image, image_ops):
    image = image_ops.random_flip_left_right(image_ops.random_crop(image, [24, 24, 3]))
    image = image_ops.random_contrast(image, lower=0.2, upper=1.8)
    image = image_ops.random_brightness(image, max_delta=63)
    return image_ops.per_image_standardization(image)


def tensorflows_names(image, image_ops):
    image = image_ops.random_crop(value=image, size=[24, 24, 3])
    image = image_ops.adjust_contrast(images=image, contrast_factor=0.5)
    return image_ops.per_image_standardization(image_ops.random_flip_left_right(image=image))


def check_contrasts(low, high):
    def check(images, image):
        _, flips, contrasts = decode(images, image)
        assert 0.4 < flips.mean() < 0.6
        if low == high:
            np.testing.assert_allclose(contrasts, low, atol=1e-4)
        else:
            assert_uniform(contrasts, low, high)

    return check


def check_noise(images, image):
    noise = images.astype(np.float64) - image
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    first, second = noise[:-1].ravel(), noise[1:].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01


def check_brightness(images, image):
    deltas = images.astype(np.float64) - image
    assert np.ptp(deltas, axis=(1, 2, 3)).max() < 1e-3
    assert_uniform(deltas.mean(axis=(1, 2, 3)), -63, 63)


@pytest.mark.parametrize(
    ("distort", "is_supported", "check"),
    [
        (contrast_before_brightness, True, check_contrasts(0.2, 1.8)),
        (lambda image, ops: ops.random_brightness(image, 63), True, check_brightness),
        (tensorflows_names, True, check_contrasts(0.5, 0.5)),
        (lambda image, ops: tf.random.normal(image.shape) + image, False, check_noise),
    ],
)
def test_an_edited_distortion_has_the_same_effect_with_both_backends(
    tmp_path, image, monkeypatch, warnings, distort, is_supported, check, fast_ops
):
    monkeypatch.setattr(cifar10_input, "distort", distort)
    images = training_images(tmp_path, 600)
    check(images, image)
    assert len(warnings) == (fast_ops and not is_supported)


def test_a_distortion_may_use_the_graph_of_training_and_an_attempt_leaves_nothing_in_it(
    tmp_path, image, monkeypatch
):
    def with_variables(image, image_ops):
        image = image_ops.random_crop(image, [24, 24, 3])
        scale = tf.get_variable("scale", [], initializer=tf.ones_initializer())
        return image * scale + tf.cast(tf.train.get_global_step(), tf.float32)

    monkeypatch.setattr(cifar10_input, "distort", with_variables)
    operations = []
    for fast_ops in (True, False):
        FLAGS.fast_ops = fast_ops
        with tf.Graph().as_default() as graph:
            tf.train.get_or_create_global_step()
            cifar10_input.distorted_inputs(str(tmp_path), 8)
            operations.append([node.name for node in graph.as_graph_def().node])
    assert operations[0] == operations[1]


def standardize_after(operation, image, ops):
    with tf.control_dependencies([operation]):  # such as tf.print
        return ops.per_image_standardization(image)


@pytest.mark.parametrize(
    "distort",
    [
        lambda image, ops: ops.random_hue(image, 0.1),
        lambda image, ops: tf.image.resize(image, [24, 24]),
        lambda image, ops: image - tf.reduce_mean(image),
        lambda image, ops: image[::-1],
        lambda image, ops: ops.adjust_contrast(image, 1 + (image == 0)),
        lambda image, ops: ops.adjust_contrast(image, tf.constant(0.5)),
        lambda image, ops: ops.random_contrast(image, 0.2, tf.constant(0.5)),
        lambda image, ops: ops.random_brightness(image, 63, seed=5),
        lambda image, ops: ops.random_crop(ops.random_crop(image, [28, 28, 3]), [24, 24, 3]),
        lambda image, ops: ops.random_crop(ops.random_contrast(image, 0.2, 1.8), [24, 24, 3]),
        lambda image, ops: ops.random_brightness(ops.per_image_standardization(image), 1),
        lambda image, ops: tf.zeros([5, 24, 24, 3]),
        lambda image, ops: standardize_after(tf.no_op(), image, ops),
        # `tf.image` refuses these, too.
        lambda image, ops: ops.random_brightness(image, -1),
        lambda image, ops: ops.random_contrast(image, 1.0, 1.0),
        lambda image, ops: ops.random_crop(image, [33, 8, 3]),
        lambda image, ops: ops.random_crop(image, [8, 8, 1]),
    ],
)
def test_blocks_do_not_support_what_would_have_another_effect_on_single_images(warnings, distort):
    assert not fast_image.supports(distort)
    (line,) = warnings
    assert line.startswith("Distorting one image at a time, which takes about five times as long")
    assert "\n" not in line
