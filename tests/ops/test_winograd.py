"""Winograd's convolution, judged by tf.nn.conv2d in float64."""

import numpy as np
import pytest

from support.ops import winograd
from support.ops.tensorflow_v1 import tf

pytestmark = pytest.mark.usefixtures("graph")

SAME = {"strides": [1, 1, 1, 1], "padding": "SAME"}


def run(convolve, images, filters, upstream, dtype):
    """Returns the result of a convolution and both of its gradients."""
    with tf.Session() as session:
        images, filters, upstream = (tf.constant(a, dtype) for a in (images, filters, upstream))
        result = convolve(images, filters)
        return session.run([result, *tf.gradients(result, [images, filters], upstream)])


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(images, filters, upstream):
    found = run(winograd.conv2d, images, filters, upstream, tf.float32)

    def exact_conv2d(images, filters):
        return tf.nn.conv2d(images, filters, **SAME)

    expected = run(exact_conv2d, images, filters, upstream, tf.float64)
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == np.float32
        assert relative_error(value, reference) < 5e-6


def draw(shape, depth=64, channels=64, seed=0):
    generator = np.random.default_rng(seed)
    images = np.maximum(generator.normal(size=[*shape, depth]), 0).astype(np.float32)
    filters = generator.normal(0, 0.05, [5, 5, depth, channels]).astype(np.float32)
    return images, filters, generator.normal(size=[*shape, channels]).astype(np.float32)


@pytest.mark.parametrize("batch", [7, 128])
@pytest.mark.parametrize("size", [4, 5, 12])  # of crops of 8, 10 and 24
def test_results_and_gradients_agree_with_float64(batch, size):
    check(*draw([batch, size, size], seed=size))


@pytest.mark.parametrize(("height", "width", "depth", "channels"), [(1, 17, 32, 16), (8, 3, 5, 1)])
def test_any_height_width_and_number_of_channels_is_possible(height, width, depth, channels):
    check(*draw([3, height, width], depth, channels))
