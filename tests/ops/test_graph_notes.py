"""What is recorded in a graph for the session and the learning rate schedule."""

from support.ops import graph_notes
from support.ops.tensorflow_v1 import tf


def test_the_offset_of_the_images_is_0_unless_it_is_recorded(graph):
    assert graph_notes.images_offset() == 0
    graph_notes.record_images_offset(-100)
    assert graph_notes.images_offset() == -100


def test_what_is_recorded_can_be_exported(graph, monkeypatch, tmp_path):
    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    graph_notes.record_images_offset(2**60)
    tf.train.export_meta_graph(str(tmp_path / "graph.meta"))
    assert warnings == []
