"""Where a resumed run continues: the random numbers of its input, and the images that it counts."""

import pytest

from support.base.errors import UserError
from support.data.settings import TrainingSettings
from support.ops import graph_notes
from support.ops.tensorflow_v1 import tf

SETTINGS = TrainingSettings(("cat", "dog"), 100)


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that TensorFlow's logger receives."""
    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    return warnings


def draw(seed, step=None):
    """Returns the seeds of three random operations; the second one belongs to the input."""
    with tf.Graph().as_default():
        tf.set_random_seed(seed)
        if step is not None:
            graph_notes.record(step)
        first = tf.random.uniform([])
        with graph_notes.input_seed():
            second = tf.random.uniform([])
        third = tf.random.uniform([])
        return [(x.op.get_attr("seed"), x.op.get_attr("seed2")) for x in (first, second, third)]


def test_a_run_that_starts_at_step_0_draws_from_the_seed_of_the_graph():
    assert draw(5) == draw(5, step=0)
    assert {seed for seed, _ in draw(5)} == {5}


def test_a_resumed_run_draws_other_numbers_for_its_input_and_only_for_it():
    fresh, resumed = draw(5), draw(5, step=10)
    assert resumed == draw(5, step=10)
    assert [resumed[0], resumed[2]] == [fresh[0], fresh[2]]
    seeds = {draw(seed, step)[1][0] for seed in (0, 5, 2**31 - 2) for step in range(50)}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_graph_without_a_seed_keeps_drawing_at_random(graph):
    graph.seed = None
    graph_notes.record(10)
    with graph_notes.input_seed():
        assert graph.seed is None
    assert graph.seed is None


def test_the_seed_of_the_graph_returns_after_an_error(graph):
    graph_notes.record(10)
    with pytest.raises(ZeroDivisionError), graph_notes.input_seed():
        1 / (graph.seed == 1)
    assert graph.seed == 1


@pytest.mark.parametrize(
    ("examples_per_step", "examples_offset", "now", "expected"),
    [
        (64, 0, 64, 0),
        (64, 0, 128, 61 * 64 - 61 * 128),
        (64, 0, 8, 61 * 64 - 61 * 8),
        (64, -100, 64, -100),
        (64, -100, 32, 61 * 32 - 100),
        (None, 0, 128, 0),  # a checkpoint that does not record it
    ],
)
def test_the_offset_keeps_the_number_of_images_at_the_resumed_step(
    graph, examples_per_step, examples_offset, now, expected
):
    settings = SETTINGS._replace(
        examples_per_step=examples_per_step, examples_offset=examples_offset
    )
    graph_notes.record(61, settings)
    assert graph_notes.examples_offset(now) == expected


def test_a_run_that_resumes_nothing_has_no_offset(graph):
    assert graph_notes.examples_offset(128) == 0
    graph_notes.record(61)
    assert graph_notes.examples_offset(128) == 0


def test_what_is_recorded_can_be_exported(graph, warnings, tmp_path):
    graph_notes.record(2**40, SETTINGS._replace(examples_per_step=2**20))
    tf.train.export_meta_graph(str(tmp_path / "graph.meta"))
    assert warnings == []


def test_a_graph_that_resumes_another_step_than_that_of_the_checkpoint_is_refused(graph):
    graph_notes.check_step(pytest.fail)  # nothing is recorded
    graph_notes.record(5)
    graph_notes.check_step(lambda: 5)
    with pytest.raises(UserError, match="^another process has trained from step 5 to step 7 "):
        graph_notes.check_step(lambda: 7)
