"""Tests that decode the drawn PNG images and check their pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from support.data.dataset import CLASS_NAMES
from support.run import charts


def decode(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def cell_color(image, row, column):
    """Returns the color near the corner of a cell, where no digit is drawn."""
    side, margin = charts.CELL_SIZE, charts.MARGIN
    return image[margin + row * side + 4, margin + column * side + 4]


def test_a_cell_is_darker_the_larger_its_share_of_its_row():
    matrix = np.zeros([10, 10], int)
    matrix[2, 2], matrix[2, 5], matrix[3, 3] = 30, 10, 7
    image = decode(charts.draw_confusion_matrix(matrix, CLASS_NAMES))
    brightness = {cell: cell_color(image, *cell).sum() for cell in ((3, 3), (2, 2), (2, 5), (2, 3))}
    assert sorted(brightness, key=brightness.get) == [(3, 3), (2, 2), (2, 5), (2, 3)]
    assert (cell_color(image, 2, 3) == 255).all()  # no images
    assert (cell_color(image, 9, 9) == 255).all()  # a row without images
    assert (cell_color(image, 5, 2) == 255).all()  # the matrix is not transposed


@pytest.mark.parametrize("label", [0, 9])
def test_each_name_is_drawn_at_its_own_row_and_column(label):
    zeros = np.zeros([10, 10], int)
    names = [""] * 10
    empty = decode(charts.draw_confusion_matrix(zeros, names))
    names[label] = "here"
    changed = (empty != decode(charts.draw_confusion_matrix(zeros, names))).any(axis=2)
    margin, side = charts.MARGIN, charts.CELL_SIZE
    cells = slice(margin + label * side, margin + (label + 1) * side)
    assert changed[cells, :margin].any()
    assert changed[:margin, cells].any()
    changed[cells, :margin] = changed[:margin, cells] = False
    assert not changed.any()


def test_long_names_with_the_same_beginning_differ_and_fit_into_the_margin():
    names = [f"a class with a long name: {label}" for label in range(30)]
    zeros = np.zeros([30, 30], int)
    image = decode(charts.draw_confusion_matrix(zeros, names))
    without_names = decode(charts.draw_confusion_matrix(zeros, [""] * 30))
    side, margin = charts.CELL_SIZE, charts.MARGIN
    np.testing.assert_array_equal(image[margin:, margin:], without_names[margin:, margin:])
    beside = image[margin : margin + 30 * side, :margin].reshape(30, side, margin, 3)
    assert len({each.tobytes() for each in beside}) == 30
    assert (beside[:, :, :2] == 255).all()  # their beginnings are not cut off


@pytest.mark.parametrize("count", [2, 31, 256])
def test_the_matrix_of_any_number_of_classes_has_a_viewable_size(count):
    matrix = np.zeros([count, count], int)
    matrix[np.arange(count), np.arange(count)[::-1]] = 5
    names = [f"class {number}" for number in range(count)]
    image = decode(charts.draw_confusion_matrix(matrix, names))
    height, width, _ = image.shape
    assert max(height, width) < 1500
    side, margin = min(44, 1320 // count), charts.MARGIN
    # Near a corner of each cell: dark on the antidiagonal, light elsewhere.
    corners = margin + np.arange(count) * side + 1
    dark = image[corners][:, corners].sum(axis=2) < 400
    np.testing.assert_array_equal(dark, matrix > 0)


def test_counts_are_drawn_if_all_of_them_fit():
    heights = []
    for largest in (7, 10**9):
        matrix = np.array([[7, 0], [0, largest]])
        image = decode(charts.draw_confusion_matrix(matrix, ["a", "b"]))
        side, margin = charts.CELL_SIZE, charts.MARGIN
        white = image[margin + 1 : margin + side, margin + 1 : margin + side].sum(axis=2) > 600
        heights.append(white.any(axis=1).sum())  # of the 7, which is white on a dark cell
    assert heights[0] > heights[1] == 0


def test_the_caption_of_a_mistake_has_the_true_class_above_the_predicted_class_in_red():
    def draw_caption(true, predicted):
        mistakes = [(np.zeros([24, 24, 3]), 3, 5)]
        return decode(charts.draw_mistakes(mistakes, {3: true, 5: predicted}))[76:110]

    both, without_true = draw_caption("trueclass", "guess"), draw_caption("", "guess")
    assert (both != without_true).any(axis=(1, 2))[:17].any()
    np.testing.assert_array_equal(both[17:], without_true[17:])
    assert (both[17:, :, 0] > both[17:, :, 1] + 50).any()


@pytest.mark.parametrize("count", [1, 7])
def test_mistakes_are_drawn_in_rows_and_each_is_scaled_from_its_own_range(count):
    image = np.full([24, 24, 3], 3.0)
    image[:12] = -2.0  # the upper half is dark, the lower half bright
    sheet = decode(charts.draw_mistakes([(image, 3, 5)] * count, CLASS_NAMES))
    width, height = 24 * 3 + 32, 24 * 3 + 34 + 8
    for number in range(count):
        row, column = divmod(number, 6)
        left, top = column * width + 4, row * height + 4
        assert (sheet[top : top + 36, left : left + 72] == 0).all()
        assert (sheet[top + 36 : top + 72, left : left + 72] == 255).all()
        assert (sheet[top + 72 : top + 106, left : left + 72] != 255).any()  # the caption


def test_without_mistakes_a_text_is_drawn():
    sheet = decode(charts.draw_mistakes([], CLASS_NAMES))
    assert (sheet != 255).any()


def test_a_name_that_is_not_ascii_is_replaced_by_its_number():
    matrix = np.eye(2, dtype=int)
    drawn = charts.draw_confusion_matrix(matrix, ["a", "猫"])
    assert drawn == charts.draw_confusion_matrix(matrix, ["a", "1"])
    assert drawn != charts.draw_confusion_matrix(matrix, ["a", "2"])
