"""Convolution with 5 x 5 filters by Winograd's algorithm, in the form of Cook and Toom.

A tile of 4 x 4 outputs depends on 8 x 8 inputs. After a linear transform of the inputs and of the
filter, it takes 64 products instead of 400 for each pair of channels, and a linear transform of
these products gives the outputs. With F(m, r) as in the paper, this is F(4 x 4, 5 x 5).

Source: "Fast Algorithms for Convolutional Neural Networks", https://arxiv.org/abs/1509.09308.

The inputs are in the order [width, height, batch, channels]. Then each one-dimensional transform,
with the tiling and the padding, is one matrix product, and all products of the channels are one
batched matrix product; no data is copied between them. All operations are linear in the inputs and
in the filters, so `tf.gradients` derives the backward pass, also in the transformed domain.
"""

import functools

import numpy as np

from support.ops.tensorflow_v1 import tf

FILTER_SIZE = 5
TILE_SIZE = 4  # outputs per tile and dimension
# The maximum number of images that are transformed together. The gradient of the filters is a sum
# over the images, in which the rounding errors of the transforms grow with the length of the sum.
# A batch of 128 becomes blocks of 25 and 26 images. With blocks of 32, the rows of the matrices
# would be a multiple of 4096 bytes apart and compete for the same cache lines: 10 % slower.
BLOCK_SIZE = 31
NUM_POINTS = TILE_SIZE + FILTER_SIZE - 1  # inputs per tile, products per tile

# The points at which the polynomials are evaluated, and infinity. Small numbers and powers of 2
# have small rounding errors: the relative error of the outputs is 2e-6 to 4e-6.
_POINTS = np.array([0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5])


def conv2d(images, filters):
    """Convolves with stride 1 and zero padding, as `tf.nn.conv2d` with padding SAME.

    Args:
      images: float32 [batch, height, width, m]; only the batch size may be unknown.
      filters: float32 [5, 5, m, channels].

    Returns:
      float32 [batch, height, width, channels].
    """
    batch = images.shape.as_list()[0]
    num_tile_columns = -(-images.shape.as_list()[2] // TILE_SIZE)
    filters = _transform_filters(filters, num_tile_columns)
    if batch is None or batch <= BLOCK_SIZE:
        return _convolve(images, filters)
    num_blocks = -(-batch // BLOCK_SIZE)
    sizes = [batch * (i + 1) // num_blocks - batch * i // num_blocks for i in range(num_blocks)]
    return tf.concat([_convolve(block, filters) for block in tf.split(images, sizes)], axis=0)


def _convolve(images, filters):
    """Convolves with transformed filters, float32 [8 * tile columns * 8, m, channels]."""
    batch = tf.shape(images)[0]
    height, width, depth = images.shape.as_list()[1:]
    channels = filters.shape.as_list()[2]
    rows_in, rows_out = _transforms(height)  # [8 * tiles, height], [height, 8 * tiles]
    columns_in, columns_out = _transforms(width)
    num_rows, num_columns = len(rows_in), len(columns_in)

    data = tf.reshape(tf.transpose(images, [2, 1, 0, 3]), [width, -1])
    data = tf.reshape(columns_in @ data, [num_columns, height, -1])
    # Copies of the constant are faster than broadcasting it.
    data = tf.matmul(np.tile(rows_in, [num_columns, 1, 1]), data)
    # [8 * tile columns * 8, tile rows * batch, m]
    data = tf.reshape(data, [num_columns * NUM_POINTS, num_rows // NUM_POINTS * batch, depth])
    products = tf.reshape(tf.matmul(data, filters), [num_columns, num_rows, -1])
    results = tf.matmul(np.tile(rows_out, [num_columns, 1, 1]), products)
    results = columns_out @ tf.reshape(results, [num_columns, -1])
    results = tf.reshape(results, [width, height, batch, channels])
    return tf.transpose(results, [2, 1, 0, 3])


def _transform_filters(filters, num_tile_columns):
    """Transforms float32 [5, 5, m, c] to [8 * num_tile_columns * 8, m, c], alike in all tiles."""
    depth, channels = filters.shape.as_list()[2:]
    _, of_filter, _ = _matrices()
    # Columns first, as in the transformed data: [8, 8, 5, 5] for (column, row, y, x).
    both = np.einsum("ry,cx->cryx", of_filter, of_filter).reshape(NUM_POINTS**2, FILTER_SIZE**2)
    transformed = both.astype(np.float32) @ tf.reshape(filters, [FILTER_SIZE**2, -1])
    transformed = tf.reshape(transformed, [NUM_POINTS, 1, NUM_POINTS, depth, channels])
    tiled = tf.tile(transformed, [1, num_tile_columns, 1, 1, 1])
    return tf.reshape(tiled, [-1, depth, channels])


@functools.cache
def _transforms(size):
    """Returns the transforms of data and products: float32 [8 * tiles, size], [size, 8 * tiles]."""
    # For a row or column, with the division into tiles and the padding. The order: (point, tile).
    num_tiles = -(-size // TILE_SIZE)
    data_matrix, _, product_matrix = _matrices()
    padded_size = TILE_SIZE * num_tiles + FILTER_SIZE - 1
    of_data = np.zeros([NUM_POINTS, num_tiles, padded_size], np.float32)
    of_products = np.zeros([TILE_SIZE * num_tiles, NUM_POINTS, num_tiles], np.float32)
    for tile in range(num_tiles):
        start = TILE_SIZE * tile
        of_data[:, tile, start : start + NUM_POINTS] = data_matrix
        of_products[start : start + TILE_SIZE, :, tile] = product_matrix
    of_data = of_data[:, :, FILTER_SIZE // 2 :][:, :, :size]
    return of_data.reshape(-1, size), of_products[:size].reshape(size, -1)


@functools.cache
def _matrices():
    """Returns the matrices of F(4, 5) in float64: D [8, 8], F [8, 5] and P [4, 8].

    With data d [8] and a filter g [5], the 4 outputs are `P @ ((F @ g) * (D @ d))`.
    """

    def evaluate(degree):  # a polynomial with that many coefficients at all points: [8, degree]
        at_infinity = np.eye(degree)[-1]
        return np.vstack([np.vander(_POINTS, degree, increasing=True), at_infinity])

    # Multiplying polynomials is evaluating, multiplying values, and interpolating. A convolution is
    # the transpose of that in the data. Row i has the coefficients of the Lagrange polynomial of
    # point i, without its divisor, which goes into the filter matrix. All products here are exact.
    data_matrix = np.zeros([NUM_POINTS, NUM_POINTS])
    divisors = np.ones([NUM_POINTS, 1])
    for i in range(NUM_POINTS):  # the last point is infinity
        others = _POINTS[np.arange(len(_POINTS)) != i]
        data_matrix[i, : len(others) + 1] = np.poly(others)[::-1]
        if i < len(_POINTS):
            divisors[i] = np.prod(_POINTS[i] - others)
    # Rows of at most 1 keep the rounding errors smallest.
    scale = np.abs(data_matrix).max(axis=1, keepdims=True)
    return (
        data_matrix / (np.sign(divisors) * scale) + 0.0,  # no negative zeros
        evaluate(FILTER_SIZE) * scale / np.abs(divisors),
        evaluate(TILE_SIZE).T,
    )
