"""The synthetic dataset: colored shapes in CIFAR-10's format, generated without network access."""

import colorsys
import os

import numpy as np

from support.base import files
from support.base.errors import DataError
from support.data import dataset, records

RECORDS_PER_FILE = 2000
HUE_STDDEV = 0.1  # of a shape's hue around its class's hue; 1 is the whole color wheel
NOISE_STDDEV = 20.0  # of the noise added to each color value (0 to 255)


def _in_square(u, v, half_side=1.0):
    return np.maximum(abs(u), abs(v)) < half_side


# The shape of each class: whether a point is inside. Shapes extend from about -1 to 1 in both
# coordinates. Each equals its mirror image, because training flips images.
_SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) < 1,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.775) < 0.225,
    "square": lambda u, v: _in_square(u, v, 0.9),
    "triangle": lambda u, v: (abs(v) < 0.95) & (abs(u) < (v + 1) / 2),
    "plus": lambda u, v: _in_square(u, v) & (np.minimum(abs(u), abs(v)) < 0.3),
    "cross": lambda u, v: _in_square(u, v) & (abs(abs(u) - abs(v)) < 0.4),
    "rows": lambda u, v: _in_square(u, v) & (np.cos(2.5 * np.pi * v) > 0),
    "columns": lambda u, v: _in_square(u, v) & (np.cos(2.5 * np.pi * u) > 0),
    "checkers": lambda u, v: _in_square(u, v) & (np.cos(2 * np.pi * u) * np.cos(2 * np.pi * v) > 0),
    "pair": lambda u, v: np.hypot(abs(u) - 0.6, v) < 0.45,
}


def maybe_generate(data_dir):
    """Generates the synthetic dataset unless `data_dir` already holds it.

    The dataset has ten classes of colored shapes and 2,000 records per file. Position, size, tilt,
    colors and noise vary from image to image. Each class has a typical color, but these colors
    overlap, so a model has to learn the shapes. The bytes are always the same.

    Returns:
      The path of the folder with the record files: `cifar-10-synthetic-bin` in `data_dir`.

    Raises:
      DataError: `data_dir` itself holds records, or the folder cannot be written.
    """
    if dataset.find_folder(data_dir) == data_dir:
        raise DataError(
            f"{data_dir} holds records, which --synthetic_data would ignore; remove that flag, or "
            "choose another folder with --data_dir"
        )
    folder = os.path.join(data_dir, dataset.SYNTHETIC_FOLDER)
    if os.path.isdir(folder):
        return folder
    with files.exclusive_creation(folder):
        if os.path.isdir(folder):  # another process has just generated it
            return folder
        with files.atomic_folder(folder) as staging:
            for number, name in enumerate((*records.TRAIN_FILES, *records.TEST_FILES)):
                generator = np.random.default_rng([0, number])
                block = _generate_records(RECORDS_PER_FILE, generator)
                block.tofile(os.path.join(staging, name))
            dataset.write_class_names(staging, _SHAPES)
    return folder


def _generate_records(count, generator):
    """Generates records with labels in random order: uint8 [count, RECORD_BYTES]."""
    labels = generator.permutation(np.arange(count) % len(_SHAPES))

    def uniform(low, high):  # [count, 1, 1]: one value per image
        return generator.uniform(low, high, [count, 1, 1]).astype(np.float32)

    # u and v are coordinates relative to the shape's center, in units of half its size. The tilt of
    # at most 14 degrees is far from 45 degrees, which would turn a plus into a cross.
    half_size, tilt = uniform(6.0, 9.0), uniform(-0.25, 0.25)
    center_y, center_x = uniform(12.5, 18.5), uniform(12.5, 18.5)
    y = (np.arange(records.HEIGHT, dtype=np.float32)[:, np.newaxis] - center_y) / half_size
    x = (np.arange(records.WIDTH, dtype=np.float32) - center_x) / half_size
    u = np.cos(tilt) * x + np.sin(tilt) * y
    v = np.cos(tilt) * y - np.sin(tilt) * x
    mask = np.empty(u.shape, bool)  # [count, height, width]
    for label, is_inside in enumerate(_SHAPES.values()):
        chosen = labels == label
        mask[chosen] = is_inside(u[chosen], v[chosen])

    hues = labels / len(_SHAPES) + generator.normal(0.0, HUE_STDDEV, count)
    shape_colors = _random_colors(hues, generator)
    background_colors = _random_colors(generator.uniform(0.0, 1.0, count), generator)
    images = generator.standard_normal(
        [count, records.DEPTH, records.HEIGHT, records.WIDTH], np.float32
    )
    images *= NOISE_STDDEV
    images += np.where(mask[:, np.newaxis], shape_colors, background_colors)

    block = np.empty([count, records.RECORD_BYTES], np.uint8)
    block[:, 0] = labels
    block[:, records.LABEL_BYTES :] = images.clip(0, 255, out=images).reshape(count, -1)
    return block


def _random_colors(hues, generator):
    """Returns a color, or a shade of gray, per hue: float32 [count, records.DEPTH, 1, 1]."""
    saturations = generator.uniform(0.3, 1.0, hues.size)
    values = generator.uniform(80.0, 220.0, hues.size)
    colors = [
        colorsys.hsv_to_rgb(*hsv) for hsv in zip(hues % 1.0, saturations, values, strict=True)
    ]
    colors = np.array(colors, np.float32)[:, :, np.newaxis, np.newaxis]
    return colors.mean(axis=1, keepdims=True) if records.DEPTH == 1 else colors
