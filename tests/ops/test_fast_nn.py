"""Tests of the faster operations against those of tf.nn and NumPy."""

import numpy as np
import numpy_model
import pytest

from support.ops import fast_nn, tensorflow_v1
from support.ops.tensorflow_v1 import tf

pytestmark = pytest.mark.usefixtures("graph")

TUTORIAL = {"depth_radius": 4, "bias": 1.0, "alpha": 0.001 / 9.0, "beta": 0.75}


def make_input(shape, scale):
    """Returns images and an upstream gradient: float32 of the given shape, each."""
    generator = np.random.default_rng(7)
    images = generator.normal(0, scale, shape).astype(np.float32)
    return images, generator.normal(0, 1, shape).astype(np.float32)


def run(lrn, images, upstream, **parameters):
    """Returns the result of a normalization and the gradient of its input."""
    images = tf.constant(images)
    result = lrn(images, **parameters)
    gradient = tf.gradients(result, images, tf.constant(upstream))[0]
    with tf.Session() as session:
        return session.run([result, gradient])


def compute_exactly(images, upstream, depth_radius, bias, alpha, beta):
    """Returns what `run` returns, computed in float64."""
    images, upstream = images.astype(np.float64), upstream.astype(np.float64)
    channels = np.arange(images.shape[3])
    is_near = np.abs(channels[:, np.newaxis] - channels) <= depth_radius
    sums = bias + alpha * (images**2 @ is_near)
    result = images / sums**beta
    shared = 2 * alpha * beta * images * ((upstream * result / sums) @ is_near)
    return result, upstream / sums**beta - shared


def assert_close(found, expected):
    """Checks a result and a gradient to 1e-6 of the largest value of each."""
    for values, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, reference, rtol=0, atol=1e-6 * np.abs(reference).max())


def operation_types():
    return {operation.type for operation in tf.get_default_graph().get_operations()}


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e8])
def test_the_result_and_its_gradient_equal_a_computation_in_float64(monkeypatch, scale):
    monkeypatch.setattr(tensorflow_v1, "GPUS", [])
    batch = make_input([128, 12, 12, 64], scale)
    assert_close(run(fast_nn.lrn, *batch, **TUTORIAL), compute_exactly(*batch, **TUTORIAL))
    # Not even the gradient that TensorFlow derives, which is slower.
    assert operation_types().isdisjoint({"LRN", "LRNGrad", "RsqrtGrad", "SqrtGrad"})


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"depth_radius": 1, "bias": 2.0, "alpha": 0.02, "beta": 1.3},
        {"depth_radius": 200, "beta": 0.75},
    ],
    ids=str,
)
def test_other_parameters_have_the_effect_that_they_have_in_tf_nn(parameters):
    batch = make_input([3, 5, 7, 64], 3.0)
    found = run(fast_nn.lrn, *batch, **parameters)
    assert_close(found, run(tf.nn.lrn, *batch, **parameters))


@pytest.mark.parametrize(
    ("gpus", "dtype", "shape", "bias"),
    [
        (["a GPU"], tf.float32, [2, 3, 3, 10], 1.0),
        ([], tf.float16, [2, 3, 3, 10], 1.0),
        ([], tf.float32, [2, 3, 3, None], 1.0),
        ([], tf.float32, [2, 3, 3, 10], 0.0),
    ],
    ids=str,
)
def test_tensorflows_operation_is_used_on_gpus_and_for_inputs_that_are_not_covered(
    monkeypatch, gpus, dtype, shape, bias
):
    monkeypatch.setattr(tensorflow_v1, "GPUS", gpus)
    images = tf.placeholder(dtype, shape)
    operation = fast_nn.lrn(images, 3, bias=bias, alpha=0.25, beta=0.75, name="norm").op
    assert (operation.type, operation.name) == ("LRN", "norm")
    assert operation.get_attr("depth_radius") == 3
    assert operation.get_attr("bias") == bias
    assert operation.get_attr("alpha") == 0.25
    assert operation.get_attr("beta") == 0.75


def test_locally_connected_layers_are_those_of_numpy():
    generator = np.random.default_rng(5)
    images, filters = generator.normal(size=[2, 3, 5, 4]), generator.normal(size=[3, 5, 3, 3, 4, 6])
    with tf.Session() as session:
        found = session.run(fast_nn.locally_connected(tf.constant(images), tf.constant(filters)))
    expected = numpy_model.locally_connected(images, filters, np.zeros([3, 5, 6]))
    np.testing.assert_allclose(found, expected)


# --- Convolution; see test_winograd.py for its results.


def conv2d_operations():
    return [op for op in tf.get_default_graph().get_operations() if op.type == "Conv2D"]


def convolve(images_shape=(2, 12, 12, 64), filters_shape=(5, 5, 64, 64), dtype=tf.float32, **given):
    arguments = {"strides": [1, 1, 1, 1], "padding": "SAME", **given}
    images = tf.placeholder(dtype, images_shape)
    return fast_nn.conv2d(images, tf.zeros(filters_shape, dtype), **arguments, name="conv")


def test_conv2d_with_5_x_5_filters_uses_winograds_algorithm(monkeypatch):
    monkeypatch.setattr(tensorflow_v1, "GPUS", [])
    monkeypatch.setattr(tensorflow_v1, "USES_ONEDNN", True)
    result = convolve(images_shape=[None, 12, 12, 64])
    assert result.op.name == "conv"
    assert result.shape.as_list() == [None, 12, 12, 64]
    assert not conv2d_operations()


@pytest.mark.parametrize(
    "arguments",
    [
        {"gpus": ["a GPU"]},
        {"uses_onednn": False},
        {"dtype": tf.float16},
        {"strides": [1, 2, 2, 1]},
        {"padding": "VALID"},
        {"dilations": [1, 2, 2, 1]},
        {"filters_shape": (3, 3, 64, 64)},
        {"images_shape": (2, 24, 24, 3), "filters_shape": (5, 5, 3, 64)},
        {"filters_shape": (5, 5, 64, 31)},
        {"images_shape": (2, None, None, 64)},
        {"images_shape": (257, 12, 12, 64)},
    ],
    ids=str,
)
def test_conv2d_is_that_of_tf_nn_in_all_other_cases(monkeypatch, arguments):
    monkeypatch.setattr(tensorflow_v1, "GPUS", arguments.pop("gpus", []))
    monkeypatch.setattr(tensorflow_v1, "USES_ONEDNN", arguments.pop("uses_onednn", True))
    result = convolve(**arguments)
    assert [op.name for op in conv2d_operations()] == [result.op.name] == ["conv"]
