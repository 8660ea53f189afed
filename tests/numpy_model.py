"""The model in NumPy, written from the table of its layers, as a reference for tests."""

import numpy as np

# Name, shape of the weights, their initial standard deviation, initial value of the biases, weight
# decay.
LAYERS = (
    ("conv1", (5, 5, 3, 64), 0.05, 0.0, None),
    ("conv2", (5, 5, 64, 64), 0.05, 0.1, None),
    ("local3", (2304, 384), 0.04, 0.1, 0.004),
    ("local4", (384, 192), 0.04, 0.1, 0.004),
    ("softmax_linear", (192, 10), 1 / 192, 0.0, None),
)


def random_variables(seed, num_classes=10):
    """Returns random variables with which predictions vary: dict of arrays by name."""
    generator = np.random.default_rng(seed)
    variables = {}
    for name, shape, _, _, _ in LAYERS:
        if name == "softmax_linear":
            shape = (shape[0], num_classes)
        stddev = np.sqrt(2 / np.prod(shape[:-1]))  # activations keep their scale through the ReLUs
        variables[f"{name}/weights"] = generator.normal(0, stddev, shape).astype(np.float32)
        variables[f"{name}/biases"] = generator.normal(0, 0.1, shape[-1]).astype(np.float32)
    return variables


def _convolution(images, weights, biases):
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    return np.maximum(np.einsum("nyxcij,ijco->nyxo", windows, weights, optimize=True) + biases, 0)


def _pool(images):
    # With SAME and stride 2, TensorFlow adds one row after the last, and for an odd number of rows
    # also one before the first. The same applies to columns.
    before = images.shape[1] % 2
    padding = [(0, 0), (before, 1), (before, 1), (0, 0)]
    padded = np.pad(images, padding, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows[:, ::2, ::2].max(axis=(-2, -1))


def _normalize(images):
    padded = np.pad(images**2, [(0, 0), (0, 0), (0, 0), (4, 4)])
    sums = np.lib.stride_tricks.sliding_window_view(padded, 9, axis=3).sum(axis=-1)
    return images / (1 + 0.001 / 9 * sums) ** 0.75


def locally_connected(images, weights, biases):
    """Returns a locally connected layer before its ReLU: [n, height, width, c].

    Args:
      images: [n, height, width, m].
      weights: [height, width, 3, 3, m, c].
      biases: [height, width, c].
    """
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    result = np.empty([*images.shape[:3], weights.shape[-1]])
    for y in range(images.shape[1]):
        for x in range(images.shape[2]):
            for channel in range(weights.shape[-1]):
                window = padded[:, y : y + 3, x : x + 3]
                products = window * weights[y, x, :, :, :, channel]
                result[:, y, x, channel] = products.sum(axis=(1, 2, 3)) + biases[y, x, channel]
    return result


def inference(images, variables):
    """Returns the logits, [n, classes], of images, [n, height, width, 3]."""
    features = _flatten(_pool2(images, variables))
    local3 = np.maximum(_linear(features, *_of("local3", variables)), 0)
    local4 = np.maximum(_linear(local3, *_of("local4", variables)), 0)
    return _linear(local4, *_of("softmax_linear", variables))


def local_inference(images, variables):
    """Returns the logits like `inference`, but with locally connected layers at the top."""
    pool2 = _pool2(images, variables)
    local3 = np.maximum(locally_connected(pool2, *_of("local3", variables)), 0)
    local4 = np.maximum(locally_connected(local3, *_of("local4", variables)), 0)
    return _linear(_flatten(local4), *_of("softmax_linear", variables))


def _of(layer, variables):
    return variables[f"{layer}/weights"], variables[f"{layer}/biases"]


def _linear(features, weights, biases):
    return features @ weights + biases


def _flatten(images):
    return images.reshape(len(images), -1)


def _pool2(images, variables):
    norm1 = _normalize(_pool(_convolution(images, *_of("conv1", variables))))
    return _pool(_normalize(_convolution(norm1, *_of("conv2", variables))))
