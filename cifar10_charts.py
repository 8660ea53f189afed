"""What a model got wrong, drawn as PNG: a confusion matrix, a sheet of images.

NumPy and Pillow only; TensorFlow is not needed here.
"""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 44  # pixels; a side of the confusion matrix's cells; smaller where there are many classes
MAX_SIDE = 1320  # pixels, of all cells together: 30 classes in cells of full size
LINE = 14  # pixels, of a line of text
FONT_SIZES = (13, 11, 9)  # of numbers; the largest with which all fit into their cells
MARGIN = 96  # pixels; for the names beside it
ZOOM = 3  # pixels that a pixel of a mistake is shown as, each way
CAPTION = 34  # pixels; two lines under a mistake
COLUMNS = 6  # mistakes side by side
INK = (20, 20, 20)
PAPER = (255, 255, 255)


def _to_png(picture):
    output = io.BytesIO()
    picture.save(output, "PNG")
    return output.getvalue()


def _shorten(name, width, font):
    """Returns a name, or as much of it as is `width` pixels wide."""
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(f"{name}...") > width:
        name = name[:-1]
    return f"{name}..."


def _find_font(text, width):
    """Returns the largest font with which a text fits; None where there is none."""
    for size in FONT_SIZES:
        font = ImageFont.load_default(size=size)
        if font.getlength(text) < width:
            return font
    return None


def draw_confusion_matrix(matrix, names):
    """Draws how often each class was taken for which.

    Args:
      matrix: int [classes, classes]; row: the true class, column: the predicted one.
      names: the classes' names.

    Returns:
      bytes; a PNG. A cell is the darker, the larger its share of the row. With many classes the
      cells are small: they have no numbers where those do not fit, and not every row has its name.
    """
    count = len(names)
    cell = min(CELL, MAX_SIDE // count)
    side = MARGIN + count * cell
    font = ImageFont.load_default(size=13)
    caption = "row: true class; column: predicted class"
    width = max(side, MARGIN + round(font.getlength(caption))) + 10
    picture = Image.new("RGB", (width, side + 24), PAPER)
    draw = ImageDraw.Draw(picture)
    for label in range(0, count, -(-LINE // cell)):
        name = _shorten(names[label], MARGIN - 10, font)
        middle = MARGIN + label * cell + cell // 2
        draw.text((MARGIN - 8, middle), name, INK, font, anchor="rm")
        # Upright: drawn on a strip of its own, which is then turned.
        strip = Image.new("RGB", (MARGIN - 8, LINE + 4), PAPER)
        ImageDraw.Draw(strip).text((0, LINE // 2 + 2), name, INK, font, anchor="lm")
        picture.paste(strip.rotate(90, expand=True), (middle - LINE // 2 - 2, 4))
    of_numbers = _find_font(str(np.max(matrix)), cell)
    for row in range(count):
        top = MARGIN + row * cell
        of_row = max(1, int(np.sum(matrix[row])))
        for column in range(count):
            share = matrix[row][column] / of_row
            left = MARGIN + column * cell
            shade = tuple(round(255 - share * (255 - dark)) for dark in (8, 48, 107))
            edge = (200, 200, 200) if cell >= LINE else None
            draw.rectangle([left, top, left + cell, top + cell], shade, outline=edge)
            if of_numbers is not None:
                number = str(matrix[row][column])
                ink = PAPER if share > 0.5 else INK
                middle = (left + cell // 2, top + cell // 2)
                draw.text(middle, number, ink, of_numbers, anchor="mm")
    draw.text((MARGIN, side + 6), caption, INK, font)
    return _to_png(picture)


def draw_mistakes(images, labels, predictions, names):
    """Draws a sheet of images with the class that each has, and the one it was taken for.

    Args:
      images: float [n, height, width, 3]; any range, each is scaled to its own.
      labels: int [n]; true classes.
      predictions: int [n]; predicted classes.
      names: the classes' names.

    Returns:
      bytes; a PNG. With no images it says so.
    """
    font = ImageFont.load_default(size=12)
    if not len(images):
        picture = Image.new("RGB", (200, 40), PAPER)
        ImageDraw.Draw(picture).text((100, 20), "no mistakes", INK, font, anchor="mm")
        return _to_png(picture)
    height, width = images.shape[1] * ZOOM, images.shape[2] * ZOOM
    cell_width, cell_height = max(width, 96) + 8, height + CAPTION + 8
    rows = -(-len(images) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * cell_width, rows * cell_height), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (image, label, prediction) in enumerate(
        zip(images, labels, predictions, strict=True)
    ):
        row, column = divmod(number, COLUMNS)
        left, top = column * cell_width + 4, row * cell_height + 4
        low, high = image.min(), image.max()
        scaled = (image - low) / max(high - low, 1e-6) * 255
        shown = Image.fromarray(scaled.astype(np.uint8)).resize((width, height), Image.NEAREST)
        picture.paste(shown, (left, top))
        for line, text, ink in (
            (2, names[label], INK),
            (17, f"not {names[prediction]}", (180, 30, 30)),
        ):
            draw.text((left, top + height + line), _shorten(text, cell_width, font), ink, font)
    return _to_png(picture)
