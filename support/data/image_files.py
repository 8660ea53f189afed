"""Reads image files of common formats and any size as 32 x 32 pixels; checks arrays of images.

This module needs NumPy and Pillow, but not TensorFlow.
"""

import contextlib
import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps

from support.base.errors import UserError
from support.data import records

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


def read_image(path, depths=None):
    """Reads an image file, scales it to cover 32 x 32 pixels and crops it centrally.

    The image is turned upright according to its EXIF data. Transparent areas become white. Only the
    first frame of an animation is read. An image of 32 x 32 pixels keeps its pixel values. Those of
    a 16-bit image are scaled from its significant bits to 8 bits. These are the bits that the file
    states (in the chunk sBIT), or the smallest of 8, 10, 12, 14 and 16 that hold its largest value.

    Args:
      path: path of a PNG, JPEG, GIF, BMP or WebP file.
      depths: `collections.Counter`; counts the image by its significant bits if it is a 16-bit
        image with fewer than 16. Not counted if None.

    Returns:
      uint8 [32, 32, 3].

    Raises:
      ImageError: the file is missing, damaged or in another format.
    """
    _check_is_file(path)
    try:
        # Pillow warns of very large images and of damaged metadata. Both are harmless here.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            return _scale_and_crop(_convert_to_interpolable(image, path, depths))
    except Image.UnidentifiedImageError as error:
        raise ImageError(path, "it is not a PNG, JPEG, GIF, BMP or WebP image") from error
    except Exception as error:  # Pillow's decoders raise errors of any type on damaged files
        reason = str(error) or type(error).__name__
        raise ImageError(path, f"it cannot be read ({reason})") from error


def stack_images(images):
    """Returns images as one array.

    TensorFlow and NumPy convert other types to uint8 without an error: values from 0 to 1 would
    become black images.

    Args:
      images: uint8 [n, 32, 32, 3], or a list of n images, which may be empty.

    Returns:
      uint8 [n, 32, 32, 3].

    Raises:
      UserError: the images have another type or shape.
    """
    shape = [records.HEIGHT, records.WIDTH, records.DEPTH]
    text = ", ".join(map(str, shape))
    rule = f"images must be uint8 [n, {text}] with values from 0 to 255"
    try:
        stacked = np.asarray(images)
    except ValueError as error:
        raise UserError(f"{rule}, not different shapes") from error
    if stacked.shape == (0,):  # an empty list
        return np.zeros([0, *shape], np.uint8)
    if stacked.dtype != np.uint8 or list(stacked.shape[1:]) != shape:
        raise UserError(f"{rule}, not {stacked.dtype} {list(stacked.shape)}")
    return stacked


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


def describe_depths(depths):
    """Returns a line with the number of images of each depth that `read_image` counted, or None."""
    if not depths:
        return None
    counts = ", ".join(f"{count} with {bits} bits" for bits, count in sorted(depths.items()))
    return f"Scaled 16-bit images that have fewer significant bits: {counts}"


def _scale_and_crop(image):
    """Returns the pixels of an image of mode L, LA, RGB or RGBA: uint8 [32, 32, 3]."""
    # When Pillow reduces an image, its bicubic filter covers all source pixels, so that fine
    # patterns do not alias. Colors are weighted by opacity.
    size = (records.WIDTH, records.HEIGHT)
    image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    # Turning the image is cheap now that it is small. Damaged EXIF data can raise errors of any
    # type. With `in_place`, Pillow turns the image before rewriting the EXIF data, which can fail.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    pixels = np.asarray(image.convert("L" if records.DEPTH == 1 else "RGB"))
    return pixels.reshape(records.HEIGHT, records.WIDTH, records.DEPTH)


def _convert_to_interpolable(image, path, depths):
    """Converts an image to a mode whose pixel values can be averaged: L, LA, RGB or RGBA."""
    if image.format == "PNG" and (layout := image.tile[0].args) in _16_BIT_LAYOUTS:
        return _convert_16_bit_png(image, path, layout, depths)
    if image.mode in ("LA", "RGBA"):
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


# Except in grayscale, Pillow keeps only the high bytes of the samples of a 16-bit PNG. With these
# layouts, it keeps the low bytes, because they have the opposite byte order. The four bytes of a
# gray value with opacity are read as an 8-bit RGBA pixel.
_16_BIT_LAYOUTS = {
    "I;16B": None,
    "LA;16B": "RGBA",
    "RGB;16B": "RGB;16L",
    "RGBA;16B": "RGBA;16L",
}


def _convert_16_bit_png(image, path, layout, depths):
    """Converts an open image with 16-bit samples to L, LA, RGB or RGBA; see `read_image`."""
    values = _read_16_bit_samples(image, path, layout)
    has_alpha = layout in ("LA;16B", "RGBA;16B")
    num_colors = values.shape[2] - has_alpha
    stated_bits = _read_significant_bits(path)
    bits = _find_significant_bits(values[..., :num_colors], stated_bits[:num_colors])
    if depths is not None and bits < 16:
        depths[bits] += 1
    channels = [_scale_to_8_bits(values[..., :num_colors], bits)]
    transparent = image.info.get("transparency")
    if has_alpha:
        alpha = values[..., num_colors:]
        alpha_bits = _find_significant_bits(alpha, stated_bits[num_colors:])
        channels.append(_scale_to_8_bits(alpha, alpha_bits))
    elif transparent is not None:
        is_opaque = (values != transparent).any(axis=2, keepdims=True)
        channels.append(255 * is_opaque.astype(np.uint8))
    planes = np.moveaxis(np.concatenate(channels, axis=2), 2, 0)
    mode = ("L", "LA", "RGB", "RGBA")[len(planes) - 1]
    converted = Image.merge(mode, [Image.fromarray(plane) for plane in planes])
    converted.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return converted  # `info` holds the EXIF data


def _read_16_bit_samples(image, path, layout):
    """Returns the samples of an open 16-bit PNG: uint16 [height, width, samples]."""
    high = np.asarray(image)
    if layout == "I;16B":
        return high[..., np.newaxis]
    with Image.open(path, formats=["PNG"]) as other:
        other.tile = [other.tile[0]._replace(args=_16_BIT_LAYOUTS[layout])]
        low = np.asarray(other)
    if layout == "LA;16B":
        high, low = low[..., ::2], low[..., 1::2]
    return high.astype(np.uint16) << 8 | low


def _scale_to_8_bits(values, bits):
    """Scales uint16 samples with that many significant bits: uint8."""
    return (values >> (bits - 8) if bits > 8 else values << (8 - bits)).astype(np.uint8)


def _read_significant_bits(path):
    """Returns the content of a PNG's chunk sBIT, one byte per sample; empty if there is none."""
    with open(path, "rb") as file:
        file.seek(8)  # the signature
        while len(header := file.read(8)) == 8 and header[4:] != b"IDAT":
            length = int.from_bytes(header[:4])
            if header[4:] == b"sBIT":
                return file.read(length)
            file.seek(length + 4, os.SEEK_CUR)  # with the checksum
    return b""


def _find_significant_bits(values, stated_bits):
    """Returns the number of bits of 16-bit samples that hold their values.

    Args:
      values: uint16 array.
      stated_bits: bytes; the numbers that the file states for these samples, or empty.
    """
    largest = int(values.max())
    candidates = [max(stated_bits)] if stated_bits else [8, 10, 12, 14]
    # The PNG specification wants all values scaled to 16 bits whatever the file states, but not all
    # programs comply.
    return next((bits for bits in candidates if bits < 16 and largest < 1 << bits), 16)
