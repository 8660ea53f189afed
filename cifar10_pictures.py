"""Picture files of any size and format, as pixels for the model.

NumPy and Pillow only; TensorFlow is not needed here.
"""

import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base as Exif

import cifar10_data

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")

# What makes a picture upright, by the number that its EXIF data have for how it lies.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(Exception):
    """A file is not a picture that can be read; the message is one line and names it."""

    def __init__(self, path, reason):
        super().__init__(f"{make_printable(path)}: {' '.join(str(reason).split())}")


def make_printable(path):
    """Returns a path in one line that can be printed, whatever characters or bytes are in it."""
    text = os.fspath(path)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) or repr(text)


def find_pictures(paths):
    """Gives the paths of pictures: files as they are named, folders with all that is in them.

    Args:
      paths: iterable of paths. In folders, and the folders within, the files count whose names end
        as those of pictures do; in alphabetical order.

    Returns:
      Iterator of paths; a folder without pictures, or that cannot be read, is given itself.
    """
    for path in paths:
        is_empty = True
        errors = []
        for folder, folders, names in os.walk(path, onerror=errors.append):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    is_empty = False
                    yield os.path.join(folder, name)
        unreadable = [error.filename for error in errors if os.path.isdir(error.filename)]
        yield from unreadable
        if is_empty and not unreadable:
            yield path


def read_picture(path):
    """Reads a picture as a record has it: scaled to cover 32 x 32 pixels, and cropped centrally.

    It is turned upright where its EXIF data say so; of several frames the first is taken; what is
    transparent is shown on white. One of 32 x 32 pixels is taken as it is.

    Args:
      path: a PNG, JPEG, GIF, BMP or WebP file.

    Returns:
      uint8 [32, 32, 3].

    Raises:
      PictureError: it is none of these, damaged, or not a file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise PictureError(path, "there is no such file") from error
    except OSError as error:
        raise PictureError(path, error.strerror) from error
    if stat.S_ISDIR(mode):
        if os.access(path, os.R_OK | os.X_OK):
            raise PictureError(path, f"this folder holds no pictures ({', '.join(SUFFIXES)})")
        raise PictureError(path, "this folder cannot be read")
    if not stat.S_ISREG(mode):  # such as a pipe, which might keep us waiting for ever
        raise PictureError(path, "it is not a file")
    try:
        # A large picture, or a damaged comment in it, is nothing to warn of.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            return _make_record(picture)
    except Image.UnidentifiedImageError as error:
        raise PictureError(path, "it is not a PNG, JPEG, GIF, BMP or WebP picture") from error
    except Exception as error:  # of any kind, as Pillow's decoders raise on damaged files
        reason = str(error) or type(error).__name__
        raise PictureError(path, f"it cannot be read ({reason})") from error


def _make_record(picture):
    turn = _TURNS.get(_find_orientation(picture))
    picture = _make_scalable(picture)
    size = (cifar10_data.WIDTH, cifar10_data.HEIGHT)
    # Bicubic; for making smaller it takes all pixels into account, so nothing is aliased. What is
    # transparent has no part in it.
    picture = ImageOps.fit(picture, size, Image.Resampling.BICUBIC)
    if turn is not None:  # now, that it is small
        picture = picture.transpose(turn)
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"))


def _find_orientation(picture):
    try:
        return picture.getexif().get(Exif.Orientation)
    except Exception:  # of any kind, from damaged data; the picture itself may be good
        return None


def _make_scalable(picture):
    """Returns a picture in a mode in which neighbouring values can be mixed."""
    if picture.mode.startswith("I"):  # grey with 16 bits; Pillow would clip it
        values = np.asarray(picture)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if "transparency" in picture.info:
            opaque = np.where(values == picture.info["transparency"], 0, 255)
            grey.putalpha(Image.fromarray(opaque.astype(np.uint8)))
        return grey
    if picture.mode in ("LA", "RGBA"):
        return picture
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
