"""What is drawn is read back from the PNG, pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

import cifar10_charts
from cifar10_data import CLASS_NAMES as NAMES


def decode(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def cell_colour(picture, row, column):
    """Returns the colour in a corner of a cell, where no digit is."""
    side, margin = cifar10_charts.CELL, cifar10_charts.MARGIN
    return picture[margin + row * side + 4, margin + column * side + 4]


def test_a_cell_is_the_darker_the_larger_its_share_of_its_row():
    matrix = np.zeros([10, 10], int)
    matrix[2, 2], matrix[2, 5], matrix[3, 3] = 30, 10, 7
    picture = decode(cifar10_charts.draw_confusion_matrix(matrix, NAMES))
    brightness = {
        place: cell_colour(picture, *place).sum() for place in ((3, 3), (2, 2), (2, 5), (2, 3))
    }
    assert sorted(brightness, key=brightness.get) == [(3, 3), (2, 2), (2, 5), (2, 3)]
    assert (cell_colour(picture, 2, 3) == 255).all()  # none
    assert (cell_colour(picture, 9, 9) == 255).all()  # a class without images
    assert (cell_colour(picture, 5, 2) == 255).all()  # not the transposed matrix


def test_the_names_stand_beside_the_matrix():
    empty = decode(cifar10_charts.draw_confusion_matrix(np.zeros([10, 10], int), [""] * 10))
    named = decode(cifar10_charts.draw_confusion_matrix(np.zeros([10, 10], int), NAMES))
    margin, side = cifar10_charts.MARGIN, cifar10_charts.CELL
    changed = (empty != named).any(axis=2)
    for i in range(10):
        cells = slice(margin + i * side, margin + (i + 1) * side)
        assert changed[cells, :margin].any()
        assert changed[:margin, cells].any()
    assert not changed[margin:, margin:].any()


@pytest.mark.parametrize("count", [2, 31, 120, 256])
def test_any_number_of_classes_fits_into_a_picture_that_can_be_looked_at(count):
    matrix = np.zeros([count, count], int)
    matrix[np.arange(count), np.arange(count)[::-1]] = 5
    names = [f"class {number}" for number in range(count)]
    picture = decode(cifar10_charts.draw_confusion_matrix(matrix, names))
    height, width, _ = picture.shape
    assert max(height, width) < 1500
    side, margin = min(44, 1320 // count), cifar10_charts.MARGIN
    # A corner of each cell: dark on the other diagonal, and nowhere else.
    corners = margin + np.arange(count) * side + 1
    dark = picture[corners][:, corners].sum(axis=2) < 400
    np.testing.assert_array_equal(dark, matrix > 0)
    for names_beside in (picture[margin:, :margin], picture[:margin, margin:]):
        assert (names_beside.sum(axis=2) < 200).any()


def test_the_numbers_stand_in_the_cells_as_large_as_all_of_them_fit():
    heights = []
    for largest in (7, 123456, 10**9):
        matrix = np.array([[7, 0], [0, largest]])
        picture = decode(cifar10_charts.draw_confusion_matrix(matrix, ["a", "b"]))
        side, margin = cifar10_charts.CELL, cifar10_charts.MARGIN
        white = picture[margin + 1 : margin + side, margin + 1 : margin + side].sum(axis=2) > 600
        heights.append(white.any(axis=1).sum())  # of the 7, which is white on dark
    assert heights[0] > heights[1] > 0
    assert heights[2] == 0  # there is no room


def test_a_long_name_is_cut_short_and_stays_beside_the_matrix():
    zeros = np.zeros([2, 2], int)
    long = decode(cifar10_charts.draw_confusion_matrix(zeros, ["w" * 99, "a"]))
    short = decode(cifar10_charts.draw_confusion_matrix(zeros, ["", "a"]))
    margin = cifar10_charts.MARGIN
    assert (long[margin:, margin:] == short[margin:, margin:]).all()
    assert (long[margin : margin + 44, :2] == 255).all()  # it begins inside the picture
    assert (long[margin : margin + 44, 2:margin] < 200).any()


@pytest.mark.parametrize("label", [0, 3, 9])
def test_each_name_stands_beside_its_own_row_and_column(label):
    zeros = np.zeros([10, 10], int)
    names = [""] * 10
    empty = decode(cifar10_charts.draw_confusion_matrix(zeros, names))
    names[label] = "here"
    changed = (empty != decode(cifar10_charts.draw_confusion_matrix(zeros, names))).any(axis=2)
    margin, side = cifar10_charts.MARGIN, cifar10_charts.CELL
    cells = slice(margin + label * side, margin + (label + 1) * side)
    assert changed[cells, :margin].any()
    assert changed[:margin, cells].any()
    changed[cells, :margin] = changed[:margin, cells] = False
    assert not changed.any()


def test_a_mistakes_caption_has_the_true_class_above_the_predicted_one_in_red():
    images = np.zeros([1, 24, 24, 3], np.float32)

    def caption(true, predicted):
        names = {3: true, 5: predicted}
        return decode(cifar10_charts.draw_mistakes(images, [3], [5], names))[76:110]

    def ink(picture):
        return (picture != 255).any(axis=2)

    both, without_true = caption("trueclass", "guess"), caption("", "guess")
    above = ink(both) & ~ink(without_true)
    assert above[:17].any()
    assert not above[17:].any()
    reddish = (both[..., 0] > both[..., 1] + 50) & ink(both)
    assert reddish[17:].any()
    assert not reddish[:14].any()


@pytest.mark.parametrize("count", [1, 6, 7, 36])
def test_each_mistake_is_shown_at_its_place_scaled_to_its_own_range(count):
    images = np.zeros([count, 24, 24, 3], np.float32)
    images[:, :12] = -2.0  # dark above, bright below
    images[:, 12:] = 3.0
    png = cifar10_charts.draw_mistakes(images, [3] * count, [5] * count, NAMES)
    picture = decode(png)
    width, height = 24 * 3 + 32, 24 * 3 + 34 + 8
    for number in range(count):
        row, column = divmod(number, 6)
        left, top = column * width + 4, row * height + 4
        assert (picture[top : top + 36, left : left + 72] == 0).all()
        assert (picture[top + 36 : top + 72, left : left + 72] == 255).all()
        assert (picture[top + 72 : top + 106, left : left + 72] != 255).any()  # the caption


def test_an_image_of_one_colour_and_no_images_at_all_can_be_drawn():
    grey = np.full([1, 24, 24, 3], 0.5)
    assert decode(cifar10_charts.draw_mistakes(grey, [0], [1], NAMES)).shape[2] == 3
    picture = decode(cifar10_charts.draw_mistakes(np.zeros([0]), [], [], NAMES))
    assert (picture != 255).any()  # it says so
