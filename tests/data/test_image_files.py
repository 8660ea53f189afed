"""Tests that image files are read with the expected pixels and that damaged files are refused."""

import collections
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from support.base.errors import UserError
from support.data import records
from support.data.image_files import (
    ImageError,
    describe_depths,
    find_images,
    read_image,
    stack_images,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)
ORIENTATION, DESCRIPTION, X_RESOLUTION = 0x0112, 0x010E, 0x011A  # EXIF tags


def save_and_read(path, image, **options):
    image.save(path, **options)
    return read_image(path)


def draw_scene(size):
    """Returns pixels with areas and gradients, like a photo; `size` is at most 256."""
    y, x = np.mgrid[:size, :size]
    return np.stack([255 * x // size, 255 * y // size, 255 * (x > y)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("bmp", {}), ("webp", {"lossless": True}), ("gif", {})]
)
def test_an_image_of_32_x_32_keeps_its_pixels(tmp_path, suffix, options):
    pixels = draw_scene(32) & 0xC0  # few enough colors for a GIF
    read = save_and_read(tmp_path / f"image.{suffix}", Image.fromarray(pixels), **options)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, pixels)


def test_a_jpeg_differs_only_by_its_compression_loss(tmp_path):
    pixels = draw_scene(32) // 2 + 64
    read = save_and_read(tmp_path / "image.jpg", Image.fromarray(pixels), quality=95, subsampling=0)
    assert np.abs(read.astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (300, 100), (200, 1000), (12, 4)])
def test_an_image_is_scaled_to_cover_the_pixels_and_cropped_centrally(tmp_path, size):
    # The central square is red on its left and blue on its right. Everything else is white.
    image = Image.new("RGB", size, "white")
    side, left, top = min(size), (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
    image.paste(RED, (left, top, left + side // 2, top + side))
    image.paste(BLUE, (left + side // 2, top, left + side, top + side))
    read = save_and_read(tmp_path / "image.png", image).astype(int)
    # Scaling blurs the edges between the colors, so look away from them.
    assert np.abs(read[:, 4:11] - RED).max() < 30
    assert np.abs(read[:, 21:28] - BLUE).max() < 30
    blurred = 1 if side >= 32 else 4
    assert np.abs(read[:, blurred:-blurred, 1]).max() < 30  # the white is cropped away


def test_scaling_down_a_fine_pattern_gives_its_mean_without_aliasing(tmp_path):
    checkers = 255 * (np.indices((301, 301)).sum(axis=0) % 2).astype(np.uint8)
    read = save_and_read(tmp_path / "image.png", Image.fromarray(checkers)).astype(int)
    np.testing.assert_allclose(read, 127.5, atol=5)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_images_of_every_color_mode_are_read(tmp_path, mode):
    gray = np.where(np.indices((32, 32)).sum(axis=0) < 32, 255, 0).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(gray).convert("RGB" if mode == "CMYK" else mode)
        image = image.convert(mode)
    if mode == "CMYK":
        read = save_and_read(tmp_path / "image.jpg", image, quality=100).astype(int)
    else:
        read = save_and_read(tmp_path / "image.png", image).astype(int)
    # JPEG compression blurs the edge, so look away from it.
    y, x = np.indices((32, 32))
    assert (read[x + y < 20] > 235).all()
    assert (read[x + y > 44] < 20).all()


@pytest.mark.parametrize("value", [0, 0x4321, 0x8000, 0xFFFF])
def test_16_bit_grayscale_keeps_its_brightness(tmp_path, value):
    image = Image.fromarray(np.full([32, 32], value, np.uint16))
    assert (save_and_read(tmp_path / "image.png", image) == value >> 8).all()


def chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def write_16_bit_png(path, values, significant_bits=(), transparent=None):
    """Writes a PNG of 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA) samples of 16 bits per pixel.

    Args:
      path: path.
      values: int [height, width, samples].
      significant_bits: the numbers in the chunk sBIT, one per sample; no such chunk if empty.
      transparent: the gray value or the color that is transparent, as a list; or None.
    """
    height, width, samples = values.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[samples]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    if significant_bits:
        content += chunk(b"sBIT", bytes(significant_bits))
    if transparent:
        content += chunk(b"tRNS", np.array(transparent, ">u2").tobytes())
    content += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def draw_ramp(samples, maximum):
    """Returns different values from 0 to `maximum` in each sample: int [32, 32, samples]."""
    ramp = np.linspace(0, maximum, 1024).astype(int).reshape(32, 32)
    return np.stack([np.roll(ramp, 7 * sample) for sample in range(samples)], axis=2)


def read_and_count(path):
    depths = collections.Counter()
    return read_image(path, depths), depths


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    ("maximum", "bits"),
    [
        (1, 8),
        (255, 8),
        (256, 10),
        (1023, 10),
        (1024, 12),
        (4095, 12),
        (4096, 14),
        (16383, 14),
        (16384, 16),
        (65535, 16),
    ],
)
def test_a_16_bit_image_of_small_values_keeps_its_contrast(tmp_path, samples, maximum, bits):
    values = draw_ramp(samples, maximum)
    write_16_bit_png(tmp_path / "image.png", values)
    read, depths = read_and_count(tmp_path / "image.png")
    np.testing.assert_array_equal(read, np.broadcast_to(values >> (bits - 8), [32, 32, 3]))
    assert depths == ({} if bits == 16 else {bits: 1})


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("maximum", "stated_bits", "bits"),
    [
        (255, 12, 12),  # a dark image
        (255, 16, 16),
        (4095, 12, 12),
        (65535, 12, 16),  # scaled to 16 bits, as the PNG specification requires
        (15, 4, 4),
    ],
)
def test_the_significant_bits_that_a_png_states_determine_its_scale(
    tmp_path, samples, maximum, stated_bits, bits
):
    values = draw_ramp(samples, maximum)
    if samples in (2, 4):
        values[..., -1] = 65535  # opaque
    stated = [stated_bits] * samples
    write_16_bit_png(tmp_path / "image.png", values, stated)
    read, depths = read_and_count(tmp_path / "image.png")
    colors = values[..., : 1 if samples < 3 else 3]
    np.testing.assert_array_equal(read, np.broadcast_to(colors << 8 >> bits, [32, 32, 3]))
    assert depths == ({} if bits == 16 else {bits: 1})


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("opaque", [255, 1023, 65535])
def test_a_16_bit_alpha_channel_is_scaled_by_its_own_range(tmp_path, samples, opaque):
    values = draw_ramp(samples, 1023)
    values[:16, :, -1] = opaque
    values[16:, :, -1] = 0
    write_16_bit_png(tmp_path / "image.png", values)
    read, depths = read_and_count(tmp_path / "image.png")
    colors = np.broadcast_to(values[..., : samples - 1] >> 2, [32, 32, 3])
    np.testing.assert_array_equal(read[:16], colors[:16])
    assert (read[16:] == 255).all()
    assert depths == {10: 1}


def test_a_transparent_color_of_a_16_bit_image_becomes_white(tmp_path):
    values = draw_ramp(3, 1023)
    values[16:] = (1, 2, 3)
    values[:16, :4] = (1, 2, 4)  # another color, although the same in 8 bits
    write_16_bit_png(tmp_path / "image.png", values, transparent=[1, 2, 3])
    read = read_image(tmp_path / "image.png")
    assert (read[:16, :4] == (0, 0, 1)).all()
    assert (read[16:] == 255).all()


@pytest.mark.parametrize("samples", [1, 3])
def test_a_16_bit_image_is_turned_upright_wherever_its_exif_data_is(tmp_path, samples):
    exif = chunk(b"eXIf", exif_with_orientation(6).tobytes().removeprefix(b"Exif\0\0"))
    values = draw_ramp(samples, 1023)
    write_16_bit_png(tmp_path / "image.png", values)
    content = (tmp_path / "image.png").read_bytes()
    for before in (b"IDAT", b"IEND"):
        position = content.index(before) - 4
        (tmp_path / "image.png").write_bytes(content[:position] + exif + content[position:])
        upright = np.rot90(np.broadcast_to(values >> 2, [32, 32, 3]), -1)
        np.testing.assert_array_equal(read_image(tmp_path / "image.png"), upright)


def test_images_of_8_bits_are_not_counted(tmp_path):
    Image.fromarray(draw_scene(32)).save(tmp_path / "image.png")
    assert read_and_count(tmp_path / "image.png")[1] == {}


def test_the_depths_of_16_bit_images_are_described_in_one_line():
    assert describe_depths(collections.Counter()) is None
    assert describe_depths(collections.Counter({12: 30, 8: 1})) == (
        "Scaled 16-bit images that have fewer significant bits: 1 with 8 bits, 30 with 12 bits"
    )


def test_transparent_areas_become_white(tmp_path):
    pixels = np.zeros([32, 32, 4], np.uint8)
    pixels[:16] = (255, 0, 0, 255)
    pixels[16:24] = (255, 0, 0, 128)
    # The remaining rows are black and fully transparent.
    read = save_and_read(tmp_path / "image.png", Image.fromarray(pixels))
    assert (read[:16] == RED).all()
    np.testing.assert_allclose(read[16:24].astype(int), [[(255, 127, 127)] * 32] * 8, atol=1)
    assert (read[24:] == 255).all()


def test_a_transparent_value_of_16_bit_grayscale_becomes_white(tmp_path):
    gray = np.where(np.indices((32, 32))[0] < 16, 0x1234, 0x8000).astype(np.uint16)
    read = save_and_read(tmp_path / "gray.png", Image.fromarray(gray), transparency=0x1234)
    assert (read[:16] == 255).all()
    assert (read[16:] == 0x80).all()


def test_a_transparent_color_of_a_palette_becomes_white(tmp_path):
    palette = Image.fromarray(np.array([[0, 1] * 16] * 32, np.uint8), "P")
    palette.putpalette([*RED, *BLUE])
    read = save_and_read(tmp_path / "palette.png", palette, transparency=1)
    assert (read[:, ::2] == RED).all()
    assert (read[:, 1::2] == 255).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (40, 40), color) for color in (RED, BLUE)]
    options = {"save_all": True, "append_images": frames[1:], "lossless": True}
    read = save_and_read(tmp_path / f"frames.{suffix}", frames[0], **options)
    assert (read == RED).all()


def exif_with_orientation(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_according_to_its_exif_data(tmp_path, orientation):
    path = tmp_path / "photo.png"
    Image.fromarray(draw_scene(32)).save(path, exif=exif_with_orientation(orientation))
    with Image.open(path) as photo:
        upright = np.asarray(ImageOps.exif_transpose(photo))
    np.testing.assert_array_equal(read_image(path), upright)


def test_a_larger_image_is_turned_upright(tmp_path):
    pixels = np.full([64, 64, 3], 255, np.uint8)
    pixels[:, :32] = RED  # on the left in the file, on top after a clockwise turn
    exif = exif_with_orientation(6)
    read = save_and_read(tmp_path / "photo.png", Image.fromarray(pixels), exif=exif)
    assert (read[:14] == RED).all()
    assert (read[18:] == 255).all()


def test_16_bit_grayscale_is_turned_upright(tmp_path):
    values = np.full([32, 32], 0x8000, np.uint16)
    values[:, :16] = 0x1234
    exif = exif_with_orientation(6)
    read = save_and_read(tmp_path / "scan.png", Image.fromarray(values), exif=exif)
    assert (read[:16] == 0x12).all()
    assert (read[16:] == 0x80).all()


def test_an_image_with_unreadable_exif_data_is_read_without_turning_it(tmp_path, monkeypatch):
    def fail(image):
        raise TypeError("damaged")

    Image.new("RGB", (9, 9), RED).save(tmp_path / "image.jpg")
    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert np.abs(read_image(tmp_path / "image.jpg") - np.array(RED)).max() < 5


def test_an_image_is_turned_upright_if_other_exif_data_is_damaged(tmp_path):
    pixels = np.full([32, 32, 3], 255, np.uint8)
    pixels[:, :16] = RED
    exif = exif_with_orientation(6)
    exif[X_RESOLUTION] = 72.0
    # The number becomes the value of DateTime, a text. Pillow reads it but fails to write it.
    damaged = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x32\x00\x05")
    assert damaged != exif.tobytes()
    read = save_and_read(tmp_path / "photo.png", Image.fromarray(pixels), exif=damaged)
    assert (read[:16] == RED).all()
    assert (read[16:] == 255).all()


def test_a_depth_of_1_gives_grayscale_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "DEPTH", 1)
    image = Image.fromarray(draw_scene(32))
    read = save_and_read(tmp_path / "image.png", image)
    assert read.shape == (32, 32, 1)
    np.testing.assert_array_equal(read[..., 0], np.asarray(image.convert("L")))


def test_paths_that_are_not_images_are_reported_with_the_reason(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("This is not an image.")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.tiff")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "two\nlines.png").write_text("This is not an image.")
    reasons = {
        "gone.png": "there is no such file",
        "pipe.png": "it is not a regular file",
        "empty.png": "it is not a PNG, JPEG, .* image",
        "text.png": "it is not a PNG, JPEG, .* image",
        "image.tiff": "it is not a PNG, JPEG, .* image",
        "folder": "this folder has no images",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=f"{name}: {reason}"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"two\\nlines.png: it is not a PNG"):
        read_image(tmp_path / "two\nlines.png")


def test_a_png_that_claims_to_be_huge_is_refused_before_memory_is_allocated(tmp_path):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)  # 10.8 GB of pixels
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"bomb.png: it cannot be read \(Image size"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("error", [OSError, TypeError, MemoryError, RuntimeError])
def test_every_error_of_a_decoder_becomes_an_image_error(tmp_path, monkeypatch, error):
    def fail(image):
        raise error

    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError, match=f"image.png: it cannot be read .{error.__name__}"):
        read_image(tmp_path / "image.png")


def test_a_png_with_damaged_pixel_data_is_refused(tmp_path):
    path = tmp_path / "image.png"
    noise = np.random.default_rng(0).integers(0, 256, [32, 32, 3]).astype(np.uint8)
    Image.fromarray(noise).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ImageError, match="image.png: it cannot be read .*data stream"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
def test_damaged_images_are_read_or_refused_in_one_line(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    exif = exif_with_orientation(6)
    exif[DESCRIPTION], exif[X_RESOLUTION] = "a description", 72.0
    image = Image.fromarray(draw_scene(64))
    image.save(path, **({} if suffix in ("gif", "bmp") else {"exif": exif}))
    intact = path.read_bytes()
    generator = np.random.default_rng(3)
    messages = []
    for trial in range(150):
        damaged = bytearray(intact[: generator.integers(1, len(intact))] if trial % 3 else intact)
        for position in generator.integers(0, len(damaged), trial % 4):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_image(path).shape == (32, 32, 3)
        except ImageError as error:
            messages.append(str(error))
    assert len(messages) > 50  # of the 100 files that are truncated
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert not any("\n" in message for message in messages)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission_is_found_and_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert list(find_images([tmp_path])) == [str(tmp_path / "closed")]
    with pytest.raises(ImageError, match="closed: this folder cannot be read"):
        read_image(tmp_path / "closed")


def test_a_folder_that_cannot_be_listed_is_found_and_refused(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert list(find_images([tmp_path])) == [str(tmp_path / "closed")]
    with pytest.raises(ImageError, match="closed: this folder cannot be read"):
        read_image(tmp_path / "closed")


def test_only_images_are_found_in_folders_and_in_alphabetical_order(tmp_path):
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
    found = [str(path).removeprefix(f"{tmp_path}/") for path in find_images(paths)]
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


def test_a_list_of_images_becomes_one_array():
    images = np.random.default_rng(0).integers(0, 256, [3, 32, 32, 3]).astype(np.uint8)
    for given in (images, list(images), tuple(images)):
        stacked = stack_images(given)
        assert stacked.dtype == np.uint8
        np.testing.assert_array_equal(stacked, images)


@pytest.mark.parametrize("images", [[], (), np.zeros([0, 32, 32, 3], np.uint8)])
def test_no_images_become_an_array_of_no_images(images):
    stacked = stack_images(images)
    assert (stacked.dtype, stacked.shape) == (np.uint8, (0, 32, 32, 3))


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (np.zeros([2, 32, 32, 3]), "float64 [2, 32, 32, 3]"),
        (np.zeros([2, 32, 32, 3], np.float32), "float32 [2, 32, 32, 3]"),
        (np.zeros([2, 32, 32, 3], np.int64), "int64 [2, 32, 32, 3]"),
        (np.zeros([2, 32, 32, 3], bool), "bool [2, 32, 32, 3]"),
        (np.zeros([32, 32, 3], np.uint8), "uint8 [32, 32, 3]"),
        (np.zeros([2, 3, 32, 32], np.uint8), "uint8 [2, 3, 32, 32]"),
        (np.zeros([2, 28, 28, 3], np.uint8), "uint8 [2, 28, 28, 3]"),
        (np.zeros([0, 28, 28, 3], np.uint8), "uint8 [0, 28, 28, 3]"),
        (np.zeros([2, 3072], np.uint8), "uint8 [2, 3072]"),
        ([np.zeros([32, 32, 3], np.uint8), np.zeros([28, 28, 3], np.uint8)], "different shapes"),
        ([np.zeros([32, 32, 3], np.uint8), np.zeros([32, 32, 1], np.uint8)], "different shapes"),
        (None, "object []"),
    ],
)
def test_arrays_that_the_model_would_misread_are_refused(images, found):
    with pytest.raises(UserError) as caught:
        stack_images(images)
    assert str(caught.value) == (
        f"images must be uint8 [n, 32, 32, 3] with values from 0 to 255, not {found}"
    )
