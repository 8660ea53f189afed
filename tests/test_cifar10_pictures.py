"""Files of known pixels are read, and damaged ones refused."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

import cifar10_pictures
from cifar10_pictures import PictureError, find_pictures, read_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(path, image, **options):
    image.save(path, **options)
    return read_picture(path)


def draw_scene(size):
    """A picture with areas and gradients, as photographs have them; sizes up to 256."""
    y, x = np.mgrid[:size, :size]
    return np.stack([255 * x // size, 255 * y // size, 255 * (x > y)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("bmp", {}), ("webp", {"lossless": True}), ("gif", {})]
)
def test_a_picture_of_32_x_32_is_taken_pixel_by_pixel(tmp_path, suffix, options):
    pixels = draw_scene(32) & 0xC0  # few enough colours for a GIF
    read = saved(tmp_path / f"picture.{suffix}", Image.fromarray(pixels), **options)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, pixels)


def test_a_jpeg_is_read_as_well_as_its_format_allows(tmp_path):
    pixels = draw_scene(32) // 2 + 64
    read = saved(tmp_path / "picture.jpg", Image.fromarray(pixels), quality=95, subsampling=0)
    assert np.abs(read.astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (300, 100), (200, 1000), (12, 4)])
def test_a_picture_is_scaled_to_cover_and_cropped_in_the_middle(tmp_path, size):
    # The square in the middle is red at its left and blue at its right, the rest is white.
    picture = Image.new("RGB", size, "white")
    side, left, top = min(size), (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
    picture.paste(RED, (left, top, left + side // 2, top + side))
    picture.paste(BLUE, (left + side // 2, top, left + side, top + side))
    read = saved(tmp_path / "picture.png", picture).astype(int)
    # Away from the borders between the colours, which scaling blurs.
    assert np.abs(read[:, 4:11] - RED).max() < 30
    assert np.abs(read[:, 21:28] - BLUE).max() < 30
    blurred = 1 if side >= 32 else 4
    assert np.abs(read[:, blurred:-blurred, 1]).max() < 30  # nothing of the white is left


def test_fine_patterns_become_their_mean_and_no_coarser_pattern(tmp_path):
    checkers = 255 * (np.indices((301, 301)).sum(axis=0) % 2).astype(np.uint8)
    read = saved(tmp_path / "picture.png", Image.fromarray(checkers)).astype(int)
    np.testing.assert_allclose(read, 127.5, atol=5)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_grey_palettes_and_other_modes_are_read(tmp_path, mode):
    grey = np.where(np.indices((32, 32)).sum(axis=0) < 32, 255, 0).astype(np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert("RGB" if mode == "CMYK" else mode)
        picture = picture.convert(mode)
    if mode == "CMYK":
        read = saved(tmp_path / "picture.jpg", picture, quality=100).astype(int)
    else:
        read = saved(tmp_path / "picture.png", picture).astype(int)
    # Away from the edge, which a JPEG blurs.
    y, x = np.indices((32, 32))
    assert (read[x + y < 20] > 235).all()
    assert (read[x + y > 44] < 20).all()


@pytest.mark.parametrize("value", [0, 0x1234, 0x8000, 0xFFFF])
def test_16_bits_of_grey_keep_their_brightness(tmp_path, value):
    picture = Image.fromarray(np.full([32, 32], value, np.uint16))
    assert (saved(tmp_path / "picture.png", picture) == value >> 8).all()


def test_what_is_transparent_is_shown_on_white(tmp_path):
    pixels = np.zeros([32, 32, 4], np.uint8)
    pixels[:16] = (255, 0, 0, 255)  # the rest is black, and not seen
    pixels[16:24] = (255, 0, 0, 128)
    read = saved(tmp_path / "picture.png", Image.fromarray(pixels))
    assert (read[:16] == RED).all()
    np.testing.assert_allclose(read[16:24].astype(int), [[(255, 127, 127)] * 32] * 8, atol=1)
    assert (read[24:] == 255).all()
    grey = Image.fromarray(np.where(np.indices((32, 32))[0] < 16, 0x1234, 0x8000).astype(np.uint16))
    read = saved(tmp_path / "grey.png", grey, transparency=0x1234)
    assert (read[:16] == 255).all()
    assert (read[16:] == 0x80).all()
    palette = Image.fromarray(np.array([[0, 1] * 16] * 32, np.uint8), "P")
    palette.putpalette([*RED, *BLUE])
    read = saved(tmp_path / "palette.png", palette, transparency=1)
    assert (read[:, ::2] == RED).all()
    assert (read[:, 1::2] == 255).all()


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in (RED, BLUE)]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"frames.{suffix}"
        read = saved(path, frames[0], save_all=True, append_images=frames[1:], lossless=True)
        assert (read == RED).all()


def test_a_photo_is_turned_upright(tmp_path):
    pixels = np.full([64, 64, 3], 255, np.uint8)
    pixels[:, :32] = RED  # at the left in the file; to be turned clockwise: on top
    exif = Image.Exif()
    exif[0x0112] = 6
    read = saved(tmp_path / "photo.png", Image.fromarray(pixels), exif=exif)
    assert (read[:14] == RED).all()
    assert (read[18:] == 255).all()


def test_what_is_not_a_picture_is_named_with_the_reason(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("This is not a picture.")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.tiff")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "two\nlines.png").write_text("This is not a picture.")
    reasons = {
        "gone.png": "there is no such file",
        "pipe.png": "it is not a file",
        "empty.png": "it is not a PNG, JPEG, .* picture",
        "text.png": "it is not a PNG, JPEG, .* picture",
        "image.tiff": "it is not a PNG, JPEG, .* picture",
        "folder": "this folder holds no pictures",
    }
    for name, reason in reasons.items():
        with pytest.raises(PictureError, match=f"{name}: {reason}"):
            read_picture(tmp_path / name)
    with pytest.raises(PictureError, match=r"two\\nlines.png: it is not a PNG"):
        read_picture(tmp_path / "two\nlines.png")


def test_a_picture_too_large_to_be_meant_is_refused_before_it_fills_the_memory(tmp_path):
    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)  # 10.8 GB of pixels
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(PictureError, match=r"bomb.png: it cannot be read \(Image size"):
        read_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize("error", [OSError, TypeError, MemoryError, RuntimeError])
def test_whatever_a_decoder_raises_is_the_pictures_error(tmp_path, monkeypatch, error):
    def fail(picture):
        raise error

    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    monkeypatch.setattr(cifar10_pictures, "_make_record", fail)
    with pytest.raises(PictureError, match=f"picture.png: it cannot be read .{error.__name__}"):
        read_picture(tmp_path / "picture.png")


def test_a_picture_with_damaged_exif_data_is_read_as_it_lies(tmp_path, monkeypatch):
    def fail(picture):
        raise TypeError("damaged")

    Image.new("RGB", (9, 9), RED).save(tmp_path / "picture.jpg")
    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert np.abs(read_picture(tmp_path / "picture.jpg") - np.array(RED)).max() < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_must_not_be_read_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert list(find_pictures([tmp_path])) == [str(tmp_path / "closed")]
    with pytest.raises(PictureError, match="closed: this folder cannot be read"):
        read_picture(tmp_path / "closed")


def test_a_folder_that_cannot_be_listed_is_given_itself(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert list(find_pictures([tmp_path])) == [str(tmp_path / "closed")]
    with pytest.raises(PictureError, match="closed: this folder cannot be read"):
        read_picture(tmp_path / "closed")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright_however_they_lie(tmp_path, orientation):
    pixels = draw_scene(32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as photo:
        upright = np.asarray(ImageOps.exif_transpose(photo))
    np.testing.assert_array_equal(read_picture(tmp_path / "photo.png"), upright)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
def test_damaged_pictures_are_refused_in_one_line_or_read(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a description", 72.0
    picture = Image.fromarray(draw_scene(64))
    picture.save(path, **({} if suffix in ("gif", "bmp") else {"exif": exif}))
    good = path.read_bytes()
    generator = np.random.default_rng(3)
    messages = []
    for turn in range(150):
        damaged = bytearray(good[: generator.integers(1, len(good))] if turn % 3 else good)
        for place in generator.integers(0, len(damaged), turn % 4):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_picture(path).shape == (32, 32, 3)
        except PictureError as error:
            messages.append(str(error))
    assert len(messages) > 50  # of the 100 that are cut
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert not any("\n" in message for message in messages)


def test_folders_give_their_pictures_in_order_and_nothing_else(tmp_path):
    for name in (
        "b.PNG",
        "a.jpg",
        "notes.txt",
        ".hidden.png",
        "sub/d.webp",
        "sub/c.gif",
        "a/e.bmp",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / "notes.txt", tmp_path, tmp_path / "empty", tmp_path / "gone"]
    found = [str(path).removeprefix(f"{tmp_path}/") for path in find_pictures(paths)]
    expected = [
        "notes.txt",
        "a.jpg",
        "b.PNG",
        "a/e.bmp",
        "sub/c.gif",
        "sub/d.webp",
        "empty",
        "gone",
    ]
    assert found == expected
