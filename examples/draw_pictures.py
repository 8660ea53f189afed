"""Draws pictures to try the scripts with: houses, suns and trees, for training and for testing.

    python examples/draw_pictures.py /tmp/pictures

Makes /tmp/pictures/train/house, /tmp/pictures/test/house and so on, of 100 and 20 pictures each, in
several sizes, shapes and formats. They differ in place, size and colours.
"""

import os
import sys

import numpy as np
from PIL import Image, ImageDraw

SUFFIXES = (".png", ".jpg", ".webp")


def draw_house(draw, x, y, size, colour, generator):
    roof = tuple(generator.integers(0, 256, 3).tolist())
    draw.rectangle([x - 0.7 * size, y - 0.1 * size, x + 0.7 * size, y + size], colour)
    draw.polygon([(x - size, y - 0.1 * size), (x, y - size), (x + size, y - 0.1 * size)], roof)


def draw_sun(draw, x, y, size, colour, generator):
    turn = generator.uniform(0, np.pi)
    for angle in turn + np.arange(8) * np.pi / 4:
        end = (x + size * np.cos(angle), y + size * np.sin(angle))
        draw.line([(x, y), end], colour, width=max(1, round(0.1 * size)))
    draw.ellipse([x - 0.55 * size, y - 0.55 * size, x + 0.55 * size, y + 0.55 * size], colour)


def draw_tree(draw, x, y, size, colour, generator):
    trunk = tuple(generator.integers(0, 256, 3).tolist())
    draw.rectangle([x - 0.12 * size, y, x + 0.12 * size, y + size], trunk)
    draw.ellipse([x - 0.6 * size, y - size, x + 0.6 * size, y + 0.3 * size], colour)


CLASSES = {"house": draw_house, "sun": draw_sun, "tree": draw_tree}


def draw_picture(name, generator):
    """Returns a picture of 60 to 300 pixels a side, with one object on a plain ground."""
    width, height = generator.integers(60, 300, 2).tolist()
    ground, colour = (tuple(generator.integers(0, 256, 3).tolist()) for _ in range(2))
    picture = Image.new("RGB", (width, height), ground)
    side = min(width, height)  # what is left where the picture is cropped to a square
    size = generator.uniform(0.25, 0.4) * side
    x = width / 2 + generator.uniform(-0.1, 0.1) * side
    y = height / 2 + generator.uniform(-0.1, 0.1) * side
    CLASSES[name](ImageDraw.Draw(picture), x, y, size, colour, generator)
    return picture


def main(folder):
    generator = np.random.default_rng(0)
    for part, count in (("train", 100), ("test", 20)):
        for name in CLASSES:
            of_class = os.path.join(folder, part, name)
            os.makedirs(of_class, exist_ok=True)
            for number in range(count):
                suffix = SUFFIXES[number % len(SUFFIXES)]
                path = os.path.join(of_class, f"{number:03}{suffix}")
                draw_picture(name, generator).save(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
