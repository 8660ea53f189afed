"""What a graph records for the session and the schedule: where a resumed run continues."""

import pytest

from support.ops import graph_notes
from support.ops.tensorflow_v1 import tf


@pytest.mark.parametrize(
    ("step", "images_seen", "now", "expected"),
    [
        (61, 61 * 64, 64, 0),
        (61, 61 * 64, 128, 61 * 64 - 61 * 128),
        (61, 61 * 64, 8, 61 * 64 - 61 * 8),
        (61, 61 * 64 - 100, 64, -100),
        (61, None, 128, 0),  # a checkpoint that does not record it
        (0, 0, 128, 0),
    ],
)
def test_the_offset_keeps_the_number_of_images_at_the_start(
    graph, step, images_seen, now, expected
):
    graph_notes.record_start(step, images_seen)
    assert graph_notes.images_offset(now) == expected


def test_a_graph_without_a_run_has_no_offset(graph):
    assert graph_notes.images_offset(128) == 0


def test_what_is_recorded_can_be_exported(graph, monkeypatch, tmp_path):
    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    graph_notes.record_start(2**40, 2**60)
    tf.train.export_meta_graph(str(tmp_path / "graph.meta"))
    assert warnings == []
