"""Reads image files of common formats and any size as 32 x 32 pixels.

This module needs NumPy and Pillow, but not TensorFlow.
"""

import contextlib
import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps

from support import dataset

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")


class ImageError(Exception):
    """An image file cannot be read. The message is one line that starts with the path."""

    def __init__(self, path, reason):
        super().__init__(f"{make_printable(path)}: {' '.join(str(reason).split())}")


def make_printable(path):
    """Returns a path as one printable line, with all other characters and bytes escaped."""
    text = os.fspath(path)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) or repr(text)


def find_images(paths):
    """Finds image files in folders and their subfolders.

    Args:
      paths: iterable of paths of files and folders.

    Yields:
      Paths of files. Files in `paths` are yielded whatever their names. From folders, only files
      with one of the `SUFFIXES` are yielded, in alphabetical order, without hidden files. A folder
      that has no images or cannot be read is itself yielded; `read_image` raises the error for it.
    """
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        is_empty = True
        errors = []
        for folder, folders, names in os.walk(path, onerror=errors.append):
            folders.sort()  # os.walk visits them in this order
            for name in sorted(names):
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    is_empty = False
                    yield os.path.join(folder, name)
        yield from (error.filename for error in errors)
        if is_empty and not errors:
            yield path


def read_image(path):
    """Reads an image file, scales it to cover 32 x 32 pixels and crops it centrally.

    The image is turned upright according to its EXIF data. Transparent areas become white. Only the
    first frame of an animation is read. An image of 32 x 32 pixels keeps its pixel values.

    Args:
      path: path of a PNG, JPEG, GIF, BMP or WebP file.

    Returns:
      uint8 [32, 32, 3].

    Raises:
      ImageError: the file is missing, damaged or in another format.
    """
    _check_is_file(path)
    try:
        # Pillow warns of very large images and of damaged metadata. Both are harmless here.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            return _scale_and_crop(image)
    except Image.UnidentifiedImageError as error:
        raise ImageError(path, "it is not a PNG, JPEG, GIF, BMP or WebP image") from error
    except Exception as error:  # Pillow's decoders raise errors of any type on damaged files
        reason = str(error) or type(error).__name__
        raise ImageError(path, f"it cannot be read ({reason})") from error


def _check_is_file(path):
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise ImageError(path, "there is no such file") from error
    except OSError as error:
        raise ImageError(path, error.strerror) from error
    if stat.S_ISDIR(mode):
        if os.access(path, os.R_OK | os.X_OK):
            raise ImageError(path, f"this folder has no images ({', '.join(SUFFIXES)})")
        raise ImageError(path, "this folder cannot be read")
    if not stat.S_ISREG(mode):  # reading from a pipe could block forever
        raise ImageError(path, "it is not a regular file")


def _scale_and_crop(image):
    """Returns the pixels of an open image: uint8 [32, 32, 3]."""
    image = _convert_to_interpolable(image)
    # When Pillow reduces an image, its bicubic filter covers all source pixels, so that fine
    # patterns do not alias. Colors are weighted by opacity.
    size = (dataset.WIDTH, dataset.HEIGHT)
    image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    # Turning the image is cheap now that it is small. Damaged EXIF data can raise errors of any
    # type. With `in_place`, Pillow turns the image before rewriting the EXIF data, which can fail.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _convert_to_interpolable(image):
    """Converts an image to a mode whose pixel values can be averaged: L, LA, RGB or RGBA."""
    if image.mode.startswith("I"):
        return _convert_16_bit_grayscale(image)
    if image.mode in ("LA", "RGBA"):
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _convert_16_bit_grayscale(image):
    """Converts to L or LA. `Image.convert` would clip all values above 255 to white."""
    values = np.asarray(image)
    converted = Image.fromarray((values >> 8).astype(np.uint8))
    converted.info = dict(image.info)  # holds the EXIF data
    transparent = converted.info.pop("transparency", None)
    if transparent is not None:
        opacity = np.where(values == transparent, 0, 255)
        converted.putalpha(Image.fromarray(opacity.astype(np.uint8)))
    return converted
