"""What is recorded in a graph for the session and the learning rate schedule."""

from support.ops import graph_notes
from support.ops.tensorflow_v1 import tf


def test_the_offset_of_the_images_is_recorded_and_can_be_exported(graph, warnings, tmp_path):
    assert graph_notes.images_offset() == 0
    graph_notes.record_images_offset(2**60)
    assert graph_notes.images_offset() == 2**60
    tf.train.export_meta_graph(str(tmp_path / "graph.meta"))
    assert warnings == []
