"""Draws a small set of images to try the scripts on: houses, suns and trees.

    python examples/draw_pictures.py /tmp/pictures

The images go to /tmp/pictures/train/house, /tmp/pictures/test/house and so on: 100 training images
and 20 test images of each class, in several sizes, shapes and formats. The position, size and
colors of the objects vary.
"""

import argparse
import os

import numpy as np
from PIL import Image, ImageDraw

IMAGES_PER_CLASS = {"train": 100, "test": 20}
SUFFIXES = (".png", ".jpg", ".webp")


def draw_house(draw, x, y, size, color, generator):
    roof = random_color(generator)
    draw.rectangle([x - 0.7 * size, y - 0.1 * size, x + 0.7 * size, y + size], color)
    draw.polygon([(x - size, y - 0.1 * size), (x, y - size), (x + size, y - 0.1 * size)], roof)


def draw_sun(draw, x, y, size, color, generator):
    rotation = generator.uniform(0, np.pi)
    for angle in rotation + np.arange(8) * np.pi / 4:
        end = (x + size * np.cos(angle), y + size * np.sin(angle))
        draw.line([(x, y), end], color, width=max(1, round(0.1 * size)))
    draw.ellipse([x - 0.55 * size, y - 0.55 * size, x + 0.55 * size, y + 0.55 * size], color)


def draw_tree(draw, x, y, size, color, generator):
    trunk = random_color(generator)
    draw.rectangle([x - 0.12 * size, y, x + 0.12 * size, y + size], trunk)
    draw.ellipse([x - 0.6 * size, y - size, x + 0.6 * size, y + 0.3 * size], color)


CLASSES = {"house": draw_house, "sun": draw_sun, "tree": draw_tree}


def random_color(generator):
    return tuple(generator.integers(0, 256, 3).tolist())


def draw_image(name, generator):
    """Returns an image of 60 to 299 pixels a side, with one object on a plain background."""
    width, height = generator.integers(60, 300, 2).tolist()
    background, color = random_color(generator), random_color(generator)
    image = Image.new("RGB", (width, height), background)
    side = min(width, height)  # the object stays within the square that central cropping keeps
    size = generator.uniform(0.25, 0.4) * side
    x = width / 2 + generator.uniform(-0.1, 0.1) * side
    y = height / 2 + generator.uniform(-0.1, 0.1) * side
    CLASSES[name](ImageDraw.Draw(image), x, y, size, color, generator)
    return image


def main(folder):
    generator = np.random.default_rng(0)
    for split, count in IMAGES_PER_CLASS.items():
        for name in CLASSES:
            class_folder = os.path.join(folder, split, name)
            os.makedirs(class_folder, exist_ok=True)
            for number in range(count):
                suffix = SUFFIXES[number % len(SUFFIXES)]
                path = os.path.join(class_folder, f"{number:03}{suffix}")
                draw_image(name, generator).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="where to create the folders of images")
    main(parser.parse_args().folder)
