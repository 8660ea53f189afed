"""The model once more, written in NumPy from the table of its layers, for tests to compare with."""

import numpy as np

# name, shape of the weights, standard deviation at the start, start of the biases, weight decay
LAYERS = (
    ("conv1", (5, 5, 3, 64), 0.05, 0.0, None),
    ("conv2", (5, 5, 64, 64), 0.05, 0.1, None),
    ("local3", (2304, 384), 0.04, 0.1, 0.004),
    ("local4", (384, 192), 0.04, 0.1, 0.004),
    ("softmax_linear", (192, 10), 1 / 192, 0.0, None),
)


def random_variables(seed):
    """Draws variables that are no start of training, so that predictions vary: name to array."""
    generator = np.random.default_rng(seed)
    variables = {}
    for name, shape, _, _, _ in LAYERS:
        spread = np.sqrt(2 / np.prod(shape[:-1]))  # keeps the size of what goes through a ReLU
        variables[f"{name}/weights"] = generator.normal(0, spread, shape).astype(np.float32)
        variables[f"{name}/biases"] = generator.normal(0, 0.1, shape[-1]).astype(np.float32)
    return variables


def _convolution(images, weights, biases):
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    return np.maximum(np.einsum("nyxcij,ijco->nyxo", windows, weights, optimize=True) + biases, 0)


def _pool(images):
    # SAME with an even size and stride 2 pads one row and one column, behind the last.
    padded = np.pad(images, [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows[:, ::2, ::2].max(axis=(-2, -1))


def _normalize(images):
    padded = np.pad(images**2, [(0, 0), (0, 0), (0, 0), (4, 4)])
    sums = np.lib.stride_tricks.sliding_window_view(padded, 9, axis=3).sum(axis=-1)
    return images / (1 + 0.001 / 9 * sums) ** 0.75


def inference(images, variables):
    """Returns the logits, [n, 10], of images, [n, 24, 24, 3]."""

    def of(layer):
        return variables[f"{layer}/weights"], variables[f"{layer}/biases"]

    def linear(features, layer):
        weights, biases = of(layer)
        return features @ weights + biases

    norm1 = _normalize(_pool(_convolution(images, *of("conv1"))))
    pool2 = _pool(_normalize(_convolution(norm1, *of("conv2"))))
    local3 = np.maximum(linear(pool2.reshape(len(images), -1), "local3"), 0)
    local4 = np.maximum(linear(local3, "local4"), 0)
    return linear(local4, "softmax_linear")
