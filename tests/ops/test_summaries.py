"""Tests of the tags of summaries, of what they contain, and of the files with them."""

import io
import os
import time

import numpy as np
import pytest
from conftest import read_events, written_nodes, written_values
from PIL import Image

from support.base.errors import UserError
from support.ops import graph_notes, summaries
from support.ops.tensorflow_v1 import tf

pytestmark = pytest.mark.usefixtures("graph")


def run_summaries():
    with tf.Session() as session:
        return tf.Summary.FromString(session.run(tf.summary.merge_all())).value


def test_tags_are_exactly_the_given_ones_and_all_operations_are_in_one_scope(graph):
    tf.constant(0.0, name="a")  # a name that is taken does not change the tag
    ones, some, images = tf.ones([3]), tf.constant([0.0, 2.0, 0.0, 0.0]), tf.zeros([2, 4, 4, 3])
    before = set(graph.get_operations())
    with tf.name_scope("tower_7"):
        summaries.scalar("a", 1.5)
        summaries.histogram("b/c", ones)
        summaries.sparsity("b/d", some)
        summaries.image_sheet("e", images)
    added = set(graph.get_operations()) - before
    assert all(operation.name.startswith(summaries.SCOPE) for operation in added)
    values = {value.tag: value for value in run_summaries()}
    assert set(values) == {"a", "b/c", "b/d", "e"}
    assert values["a"].simple_value == 1.5
    assert values["b/c"].histo.num == 3
    assert values["b/d"].simple_value == 0.75


def read_sheet(images):
    """Returns the width, the height and the pixels of an image sheet."""
    summaries.image_sheet("input", tf.constant(images))
    (value,) = run_summaries()
    assert value.tag == "input"
    assert value.metadata.plugin_data.plugin_name == "images"
    width, height, png = value.tensor.string_val
    return int(width), int(height), np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize(("count", "shown", "rows"), [(5, 5, 2), (128, 16, 4)])
def test_a_sheet_shows_up_to_16_images_in_rows_of_4_with_white_borders(count, shown, rows):
    images = np.random.default_rng(0).normal(0, 5, [count, 6, 4, 3]).astype(np.float32)
    images[1] = 7.0  # one color: black
    width, height, sheet = read_sheet(images)
    assert (width, height) == (4 * 6, rows * 8)
    assert sheet.shape == (height, width, 3)
    cells = sheet.reshape(rows, 8, 4, 6, 3).swapaxes(1, 2).reshape(-1, 8, 6, 3).astype(float)
    images = images[:shown]
    low, high = (f(images, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    expected = 255 * (images - low) / np.maximum(high - low, 1e-9)
    np.testing.assert_allclose(cells[:shown, 1:-1, 1:-1], expected, atol=1.01)
    cells[:shown, 1:-1, 1:-1] = 255
    assert (cells == 255).all()


def make_summary(value):
    return tf.Summary(value=[tf.Summary.Value(tag="a", simple_value=value)])


def test_events_are_on_disk_as_soon_as_they_are_added(tmp_path, graph):
    folder = tmp_path / "new" / "folder"
    tf.constant(1.0, name="node")
    with summaries.Writer(str(folder), "--dir") as writer:
        writer.add_graph(graph)
        writer.add_restart(7)
        writer.add_summary(make_summary(2.5), 7)
        version, graph_event, restart, summary = read_events(folder)
        assert writer.get_logdir() == str(folder)
    assert version.file_version == "brain.Event:2"
    assert [n.name for n in tf.GraphDef.FromString(graph_event.graph_def).node] == ["node"]
    assert (restart.step, restart.session_log.status) == (7, tf.SessionLog.START)
    assert (summary.step, summary.summary) == (7, make_summary(2.5))
    assert abs(summary.wall_time - time.time()) < 60


def test_the_graph_in_tensorboard_has_no_summaries_no_checks_and_no_functions(tmp_path, graph):
    with tf.name_scope("tower_0/summaries"):  # not the scope of this module
        value = tf.identity(2.0, name="value")
    value = tf.cond(value > 1.0, lambda: value, lambda: 2.0 * value, name="branch")
    graph_notes.check_finite(value, "value")
    summaries.scalar("a", value)
    merged = tf.summary.merge_all(name="merged")
    with tf.control_dependencies([merged]):
        tf.identity(value, name="last")
    before = graph.as_graph_def()
    assert before.library.function
    nodes = written_nodes(tmp_path / "events")
    assert {"tower_0/summaries/value", "branch", "merged/merged", "last"} <= nodes.keys()
    assert {name.partition("/")[0] for name in nodes}.isdisjoint({"summaries", "must_be_finite"})
    assert list(nodes["last"].input) == [value.op.name, "^merged/merged"]
    assert graph.as_graph_def() == before


def add_file(folder, value):
    with summaries.Writer(folder, "--dir") as writer:
        writer.add_summary(make_summary(value), 1)


def test_a_new_file_is_the_last_one_although_the_clock_was_set_back(tmp_path, monkeypatch):
    add_file(tmp_path, 0)
    now = time.time_ns()
    for number, seconds in enumerate((-3600, -7200, 5), start=1):
        monkeypatch.setattr(time, "time_ns", lambda seconds=seconds: now + seconds * 10**9)
        add_file(tmp_path, number)
    assert [value for _, _, value in written_values(tmp_path)] == [0, 1, 2, 3]
    assert max(os.listdir(tmp_path)).startswith(f"events.out.tfevents.{now // 10**9 + 5}.")


def test_a_folder_that_cannot_be_written_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"^cannot write to --dir={tmp_path}/file: "):
        summaries.Writer(str(tmp_path / "file"), "--dir")


def test_scalars_are_merged_apart_from_histograms_and_images():
    assert summaries.merge_collected() == (None, None)
    for _ in range(2):  # the second summary with a tag is left out
        summaries.scalar("a", 1.0)
        summaries.histogram("b", [1.0, 2.0])
        summaries.image_sheet("c", tf.zeros([2, 4, 4, 3]))
    tf.summary.scalar("d", 4.0)
    tf.summary.image("e", tf.zeros([1, 4, 4, 3]))
    merged = summaries.merge_collected()
    with tf.Session() as session:
        found = [tf.Summary.FromString(each).value for each in session.run(merged)]
    assert [[value.tag for value in values] for values in found] == [
        ["a", "d"],
        ["b", "c", "e/image/0"],
    ]
