"""Draws the confusion matrix and the misclassified images of an evaluation as PNG images.

A class is shown by its number if its name is not ASCII, because the font may lack characters, and
by its number and the beginning of its name if that is too long. This module needs no TensorFlow.
"""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# All sizes are in pixels.
CELL_SIZE = 44  # side of a cell of the confusion matrix, unless MAX_MATRIX_SIZE limits it
MAX_MATRIX_SIZE = 1320  # side of all cells together
MARGIN = 96  # width of the class names beside the matrix, and height of those above it
LINE_HEIGHT = 14
ZOOM = 3  # side of the square that shows one pixel of a misclassified image
CAPTION_HEIGHT = 34  # two lines below a misclassified image
COLUMNS = 6  # misclassified images in a row
BLACK = (20, 20, 20)
WHITE = (255, 255, 255)
RED = (180, 30, 30)
GRAY = (200, 200, 200)
DARK_BLUE = (8, 48, 107)


def draw_confusion_matrix(matrix, names):
    """Draws how often the model predicted each class for the images of each true class.

    The larger a cell's share of its row, the darker the cell. With many classes, the cells are
    small: counts that do not fit are left out, and so are some of the names.

    Args:
      matrix: int [classes, classes]; the row is the true class, the column the predicted one.
      names: names of the classes.

    Returns:
      bytes; a PNG image.
    """
    count = len(names)
    cell_size = min(CELL_SIZE, MAX_MATRIX_SIZE // count)
    bottom = MARGIN + count * cell_size
    font = ImageFont.load_default(size=13)
    caption = "row: true class; column: predicted class"
    width = max(bottom, MARGIN + round(font.getlength(caption))) + 10
    image = Image.new("RGB", (width, bottom + 24), WHITE)
    _draw_names(image, names, cell_size, font)
    _draw_cells(ImageDraw.Draw(image), matrix, cell_size, font)
    ImageDraw.Draw(image).text((MARGIN, bottom + 6), caption, BLACK, font)
    return _encode_png(image)


def _draw_names(image, names, cell_size, font):
    """Draws the class names to the left of the matrix and, rotated, above it."""
    rows_per_line = -(-LINE_HEIGHT // cell_size)
    for label in range(0, len(names), rows_per_line):
        name = _fit_name(names, label, MARGIN - 10, font)
        center = MARGIN + label * cell_size + cell_size // 2
        ImageDraw.Draw(image).text((MARGIN - 8, center), name, BLACK, font, anchor="rm")
        strip = Image.new("RGB", (MARGIN - 8, LINE_HEIGHT + 4), WHITE)
        ImageDraw.Draw(strip).text((0, LINE_HEIGHT // 2 + 2), name, BLACK, font, anchor="lm")
        image.paste(strip.rotate(90, expand=True), (center - LINE_HEIGHT // 2 - 2, 4))


def _draw_cells(draw, matrix, cell_size, font):
    has_counts = font.getlength(str(np.max(matrix))) < cell_size
    outline = GRAY if cell_size >= LINE_HEIGHT else None
    for row, counts in enumerate(matrix):
        total = max(1, int(np.sum(counts)))
        for column, count in enumerate(counts):
            left, top = MARGIN + column * cell_size, MARGIN + row * cell_size
            share = count / total
            shade = tuple(round(255 - share * (255 - dark)) for dark in DARK_BLUE)
            draw.rectangle([left, top, left + cell_size, top + cell_size], shade, outline)
            if has_counts:
                center = (left + cell_size // 2, top + cell_size // 2)
                color = WHITE if share > 0.5 else BLACK
                draw.text(center, str(count), color, font, anchor="mm")


def draw_mistakes(mistakes, names):
    """Draws misclassified images, each with its true and its predicted class.

    Args:
      mistakes: list of (image, true class, predicted class). An image is float [height, width, 3]
        and is scaled from its own minimum and maximum.
      names: names of the classes.

    Returns:
      bytes; a PNG image. Without any images it shows the text "no mistakes".
    """
    font = ImageFont.load_default(size=12)
    if not mistakes:
        sheet = Image.new("RGB", (200, 40), WHITE)
        ImageDraw.Draw(sheet).text((100, 20), "no mistakes", BLACK, font, anchor="mm")
        return _encode_png(sheet)
    height, width = (side * ZOOM for side in mistakes[0][0].shape[:2])
    cell_width, cell_height = max(width, 96) + 8, height + CAPTION_HEIGHT + 8
    rows = -(-len(mistakes) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell_width, rows * cell_height), WHITE)
    draw = ImageDraw.Draw(sheet)
    for index, (image, label, prediction) in enumerate(mistakes):
        row, column = divmod(index, COLUMNS)
        left, top = column * cell_width + 4, row * cell_height + 4
        enlarged = _convert_to_8_bits(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        bottom = top + height
        true_name = _fit_name(names, label, cell_width, font)
        predicted_name = _fit_name(names, prediction, cell_width, font, "not ")
        draw.text((left, bottom + 2), true_name, BLACK, font)
        draw.text((left, bottom + 17), predicted_name, RED, font)
    return _encode_png(sheet)


def _convert_to_8_bits(image):
    low, high = image.min(), image.max()
    scaled = (image - low) / max(high - low, 1e-6) * 255
    return Image.fromarray(np.broadcast_to(scaled.astype(np.uint8), (*scaled.shape[:2], 3)))


def _fit_name(names, label, width, font, prefix=""):
    """Returns the name of a class, after `prefix`, as a text of at most `width` pixels."""
    if not names[label].isascii():
        return f"{prefix}{label}"
    if font.getlength(text := f"{prefix}{names[label]}") <= width:
        return text
    text = f"{prefix}{label} {names[label]}"  # the shortened names alone could be the same
    while font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _encode_png(image):
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()
