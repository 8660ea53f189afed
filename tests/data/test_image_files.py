"""Tests that image files are read with the expected pixels and that damaged files are refused."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from support.base.messages import report_once
from support.data.image_files import ImageError, find_files, read_image, read_images

RED, BLUE = (255, 0, 0), (0, 0, 255)
ORIENTATION, X_RESOLUTION = 0x0112, 0x011A  # EXIF tags


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


@pytest.mark.parametrize("size", [(32, 96), (300, 100), (12, 4)])
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


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_images_of_every_color_mode_are_read(tmp_path, mode):
    gray = np.where(np.indices((32, 32)).sum(axis=0) < 32, 255, 0).astype(np.uint8)
    image = Image.fromarray(gray).convert("RGB" if mode == "CMYK" else mode).convert(mode)
    name, options = ("image.jpg", {"quality": 100}) if mode == "CMYK" else ("image.png", {})
    read = save_and_read(tmp_path / name, image, **options).astype(int)
    # JPEG compression blurs the edge, so look away from it.
    y, x = np.indices((32, 32))
    assert (read[x + y < 20] > 235).all()
    assert (read[x + y > 44] < 20).all()


@pytest.mark.parametrize("largest", [0, 1, 255, 4095, 65535])
def test_16_bit_grayscale_is_scaled_by_its_largest_value(tmp_path, largest):
    values = np.linspace(0, largest, 1024).astype(np.uint16).reshape(32, 32)
    read = save_and_read(tmp_path / "image.png", Image.fromarray(values))
    expected = values[..., np.newaxis].astype(int) * 255 // max(1, largest)
    np.testing.assert_array_equal(read, np.broadcast_to(expected, [32, 32, 3]))


def test_the_scaling_of_16_bit_images_is_reported_once(tmp_path, capsys):
    report_once.cache_clear()
    save_and_read(tmp_path / "image.png", Image.fromarray(draw_scene(32)))
    assert capsys.readouterr().err == ""
    for name in ("a.png", "b.png"):
        save_and_read(tmp_path / name, Image.fromarray(np.eye(9, dtype=np.uint16)))
    assert capsys.readouterr().err == (
        "Scaling 16-bit grayscale images: the largest value of each becomes white\n"
    )


def chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def write_rgb_png(path, width, height, bits, rows, transparent=None):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    if transparent is not None:
        header += chunk(b"tRNS", struct.pack(">HHH", *transparent))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


def test_the_upper_8_bits_of_16_bit_colors_are_read_and_the_transparent_one_is_white(tmp_path):
    pixels = draw_scene(32)
    values = (pixels * 256.0 + 255).astype(">u2")
    values[:16] = color = (0x0102, 0x0304, 0x0506)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    write_rgb_png(tmp_path / "image.png", 32, 32, 16, rows, color)
    read = read_image(tmp_path / "image.png")
    assert (read[:16] == 255).all()
    np.testing.assert_array_equal(read[16:], pixels[16:])


def test_transparent_areas_become_white(tmp_path):
    pixels = np.zeros([32, 32, 4], np.uint8)
    pixels[:16] = (255, 0, 0, 255)
    pixels[16:24] = (255, 0, 0, 128)
    # The remaining rows are black and fully transparent.
    read = save_and_read(tmp_path / "image.png", Image.fromarray(pixels))
    assert (read[:16] == RED).all()
    np.testing.assert_allclose(read[16:24].astype(int), [[(255, 127, 127)] * 32] * 8, atol=1)
    assert (read[24:] == 255).all()


@pytest.mark.parametrize("is_palette", [True, False], ids=["palette", "16-bit grayscale"])
def test_a_transparent_value_becomes_white(tmp_path, is_palette):
    values = np.where(np.indices((32, 32))[0] < 16, 1, 2)
    values[-1, -1] = 5
    image = Image.fromarray(values.astype(np.uint8 if is_palette else np.uint16))
    if is_palette:
        image = image.convert("P")
        image.putpalette([0, 0, 0, *RED, 102, 102, 102])
    read = save_and_read(tmp_path / "image.png", image, transparency=1)
    assert (read[:16] == 255).all()
    assert (read[16:31] == 102).all()  # 2 / 5 of 255


def exif_with_orientation(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize("is_16_bit", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_according_to_its_exif_data(tmp_path, orientation, is_16_bit):
    gray = np.zeros([64, 64], np.uint16 if is_16_bit else np.uint8)  # black at the bottom right
    gray[:32] = 255
    gray[:, :32] = 127
    exif = exif_with_orientation(orientation)
    Image.fromarray(gray).save(tmp_path / "photo.png", exif=exif)
    read = read_image(tmp_path / "photo.png")
    upright = Image.fromarray(gray.astype(np.uint8)).resize((32, 32))
    upright.getexif().update(exif)
    expected = np.asarray(ImageOps.exif_transpose(upright))[..., np.newaxis]
    corners = np.ix_([2, 29], [2, 29])
    np.testing.assert_array_equal(read[corners], np.broadcast_to(expected[corners], [2, 2, 3]))


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


def test_paths_that_are_not_images_are_reported_with_the_reason(tmp_path):
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.tiff")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "two\nlines.png").write_text("This is not an image.")
    reasons = {
        "gone.png": "it cannot be read .No such file or directory.",
        "pipe.png": "it is neither a regular file nor a readable folder",
        "empty.png": "it is not a PNG, JPEG, .* image",
        "image.tiff": "it is not a PNG, JPEG, .* image",
        "two\nlines.png": "it is not a PNG, JPEG, .* image",
    }
    for name, reason in reasons.items():
        printed = name.replace("\n", r"\\n")
        with pytest.raises(ImageError, match=f"{printed}: {reason}"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("width", "reason"),
    [
        (25_000, "it cannot be read .image file is truncated"),
        (25_001, "it has more than 250,000,000 pixels$"),
    ],
)
def test_an_image_may_have_250_megapixels(tmp_path, width, reason):
    write_rgb_png(tmp_path / "image.png", width, 10_000, 8, b"")  # without the pixels
    with pytest.raises(ImageError, match=f"image.png: {reason}"):
        read_image(tmp_path / "image.png")


def write_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found_names(folder):
    return [path.removeprefix(f"{folder}/") for path in find_files(folder)]


def test_files_are_found_in_alphabetical_order_without_those_of_other_programs(tmp_path):
    skipped = (".hidden.png", ".thumbnails/1.png", "@eaDir/1.png", "sub/__MACOSX/1.png")
    names = ("b.PNG", "a.jpg", "notes.txt", "sub/d", "sub/c.gif", "a/e.bmp", "lost+found/1.png")
    write_files(tmp_path, *skipped, *names)
    expected = ["a.jpg", "b.PNG", "notes.txt", "a/e.bmp", "sub/c.gif", "sub/d"]
    assert found_names(tmp_path) == expected


def test_links_are_followed_but_not_in_cycles(tmp_path):
    write_files(tmp_path, "elsewhere/1.png", "folder/2.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "folder" / "linked")
    os.symlink("2.png", tmp_path / "folder" / "3.png")
    os.symlink(tmp_path / "folder", tmp_path / "elsewhere" / "cycle")
    os.symlink("itself", tmp_path / "folder" / "itself.png")  # its error is reported
    assert found_names(tmp_path / "folder") == ["2.png", "3.png", "itself.png", "linked/1.png"]


def test_a_folder_that_cannot_be_read_is_found_and_refused(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read every folder
    refusal = "it is neither a regular file nor a readable folder"
    assert read_results([tmp_path]) == {"closed": refusal}


def read_results(paths):
    """Returns what `read_images` yields, by name: "read", "skipped" or the error."""
    results = {}
    for path, image in read_images(paths):
        is_error = isinstance(image, ImageError)
        result = str(image) if is_error else "skipped" if image is None else "read"
        results[os.path.basename(path)] = result.removeprefix(f"{path}: ")
    return results


def test_files_in_folders_are_read_or_refused_if_they_have_the_suffix_of_an_image(tmp_path):
    readable = ("image.png", "a.jfif", "b.JPE", "c.apng", "no_suffix", "d.bak")
    for name in readable:
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    refused = ("bad.jfif", "bad.jpe", "bad.apng", "BAD.JPG")
    write_files(tmp_path, *refused, "notes.txt", "README", "sub/notes")
    (tmp_path / "cut").write_bytes((tmp_path / "image.png").read_bytes()[:40])
    os.mkfifo(tmp_path / "pipe")
    reason = "it is not a PNG, JPEG, GIF, BMP or WebP image"
    assert read_results([tmp_path]) == {
        **dict.fromkeys(readable, "read"),
        **dict.fromkeys(refused, reason),
        **dict.fromkeys(("notes.txt", "README", "notes", "cut", "pipe"), "skipped"),
    }
    # Files that are named are refused whatever their names, and folders if they have no images.
    assert read_results([tmp_path / "README", tmp_path / "sub"]) == {
        "README": reason,
        "notes": "skipped",
        "sub": "this folder has no images (PNG, JPEG, GIF, BMP or WebP)",
    }
