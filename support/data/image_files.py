"""Reads image files of common formats and sizes as 32 x 32 pixels; checks arrays of images.

This module needs NumPy and Pillow, but not TensorFlow.
"""

import contextlib
import os
import pathlib
import re
import warnings

import numpy as np
from PIL import Image, ImageOps

from support.base.errors import UserError
from support.base.messages import printable, report, report_once
from support.data import records

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
FORMATS_TEXT = "PNG, JPEG, GIF, BMP or WebP"
SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp")
MAX_PIXELS = 250_000_000  # they take up to 3 GB of memory
_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")  # the head of a scan of JPEG
MAX_SCANS = 10  # of a JPEG image with MAX_PIXELS, the usual number; smaller images may have more
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it, and refuses above twice as many
# Folders that other programs create; those whose names start with a period are hidden anyway.
FOREIGN_FOLDERS = {"@eaDir", "__MACOSX", "lost+found"}


class ImageError(Exception):
    """An image file cannot be read. The message is one line that starts with the path."""

    def __init__(self, path, reason):
        super().__init__(printable(f"{os.fspath(path)}: {' '.join(str(reason).split())}"))


def sort_visible(names):
    """Sorts the names in a folder, without hidden ones and those of other programs."""
    return sorted(n for n in names if not n.startswith(".") and n not in FOREIGN_FOLDERS)


def find_files(folder):
    """Yields the paths of the files in a folder in alphabetical order, then those in subfolders.

    Files and folders that `sort_visible` leaves out are skipped. Links to folders are followed
    unless they form a cycle. At the end, the paths of folders that cannot be read are yielded;
    `read_image` raises the error for them.
    """
    errors = []
    for parent, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        path = pathlib.Path(os.path.abspath(parent))
        ancestors = {each.resolve() for each in (path, *path.parents)}
        visible = sort_visible(folders)
        folders[:] = [name for name in visible if (path / name).resolve() not in ancestors]
        for name in sort_visible(names):
            yield os.path.join(parent, name)
    for error in errors:
        yield error.filename


def read_images(paths):
    """Reads image files, and those in folders and their subfolders; `paths` may name both.

    Yields:
      (path, image), where image is uint8 [32, 32, 3]; the `ImageError` that `read_image` raised, or
      that says that a folder has no images; or None if a file in a folder cannot be read as an
      image and has none of the `SUFFIXES`.
    """
    for path in paths:
        is_folder = os.path.isdir(path)
        is_empty = is_folder
        for file in find_files(path) if is_folder else [path]:
            try:
                image = read_image(file)
            except ImageError as error:
                is_other_file = is_folder and not file.lower().endswith(SUFFIXES)
                image = None if is_other_file and not os.path.isdir(file) else error
            is_empty = is_empty and image is None
            yield file, image
        if is_empty:
            yield path, ImageError(path, f"this folder has no images ({FORMATS_TEXT})")


def report_skipped_files(count):
    """Prints the number of files for which `read_images` yielded None, unless it is 0."""
    if count:
        report(f"Skipped files that are not readable {FORMATS_TEXT} images: {count}")


def read_image(path):
    """Reads an image file, scales it to cover 32 x 32 pixels and crops it centrally.

    The image is turned upright according to its EXIF data. Transparent areas become white. Only the
    first frame of an animation is read. An image of 32 x 32 pixels keeps its pixel values. Those of
    16-bit grayscale are scaled so that the largest becomes 255.

    Returns:
      uint8 [32, 32, 3].

    Raises:
      ImageError: the file is missing, damaged, in another format, or larger than MAX_PIXELS.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe could block forever
        raise ImageError(path, "it is neither a regular file nor a readable folder")
    try:
        # Pillow warns of very large images and of damaged metadata. Both are harmless here.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            _check_scans(image)
            return _scale_and_crop(_convert_to_interpolable(image))
    except Image.UnidentifiedImageError as error:
        raise ImageError(path, f"it is not a {FORMATS_TEXT} image") from error
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"it has more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's decoders raise errors of any type on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(path, f"it cannot be read ({reason})") from error


def _check_scans(image):
    """Raises ValueError if a JPEG image has so many scans that decoding it could take minutes."""
    if image.format in ("JPEG", "MPO"):  # MPO: several JPEG images in a file
        position = image.fp.tell()
        image.fp.seek(0)
        scans, last = 0, b""
        while piece := image.fp.read(1 << 20):
            scans += len(_SCAN.findall(last + piece))
            last = piece[-4:]
        image.fp.seek(position)
        if scans * image.width * image.height > MAX_SCANS * MAX_PIXELS:
            raise ValueError(f"it has {scans} scans, which would take minutes to decode")


def stack_images(images):
    """Returns an array or a list of images as one array, uint8 [n, 32, 32, 3].

    TensorFlow and NumPy convert other types to uint8 without an error: values from 0 to 1 would
    become black images.

    Raises:
      UserError: the images have another type or shape.
      ValueError: the shapes of the images in the list differ.
    """
    stacked = np.asarray(images)
    if stacked.dtype != np.uint8 or list(stacked.shape[1:]) != records.image_shape():
        raise UserError(
            f"images must be uint8 [n, {str(records.image_shape())[1:]} with values from 0 to 255, "
            f"not {stacked.dtype} {list(stacked.shape)}"
        )
    return stacked


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


def _convert_to_interpolable(image):
    """Converts an image to a mode whose pixel values can be averaged: L, LA, RGB or RGBA."""
    if image.mode.startswith("I;16"):
        return _convert_to_8_bits(image)
    if image.mode in ("LA", "RGBA"):
        return image
    if image.format == "PNG" and image.tile[0].args == "RGB;16B" and "transparency" in image.info:
        # Pillow keeps the upper 8 bits of the colors, but all 16 of the transparent one.
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _convert_to_8_bits(image):
    """Converts 16-bit grayscale to L: its largest value and transparent values become white."""
    report_once("Scaling 16-bit grayscale images: the largest value of each becomes white")
    values = np.asarray(image)
    scaled = np.multiply(values, 255, dtype=np.uint32)
    scaled //= max(1, values.max())  # in place, because it takes a gigabyte for 250 megapixels
    if (transparent := image.info.pop("transparency", None)) is not None:
        scaled[values == transparent] = 255
    converted = Image.fromarray(scaled.astype(np.uint8))
    converted.info = image.info  # with the EXIF data
    return converted
