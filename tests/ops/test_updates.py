"""Checks of gradients, their summaries, and the collected updates of the towers."""

import pytest

from support.ops import graph_notes, updates
from support.ops.tensorflow_v1 import tf, with_loss_scaling

pytestmark = pytest.mark.usefixtures("graph")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ([], []),
        (
            ["x", "y"],
            ["Training does not change these variables, because no gradient reaches them: x, y"],
        ),
    ],
)
def test_variables_without_a_gradient_are_left_out_and_named(warnings, missing, message):
    pairs = [
        (None if name in missing else tf.constant(2.0), tf.get_variable(name, initializer=1.0))
        for name in ("x", "y", "z")
    ]
    assert updates.drop_missing(pairs) == pairs[len(missing) :]
    assert warnings == message


def run_summaries(optimizer, gradient):
    """Returns the summary of a gradient, and the names of the sums that must be finite."""
    variable = tf.get_variable("x", initializer=[1.0, 1.0])
    updates.summarize_gradients(optimizer, [(tf.constant(gradient), variable)])
    checked = [total.op.name for total in tf.get_collection(graph_notes.MUST_BE_FINITE)]
    with tf.Session() as session:
        return tf.Summary.FromString(session.run(tf.summary.merge_all())), checked


def test_a_gradient_is_shown_and_must_be_finite():
    summary, checked = run_summaries(tf.train.GradientDescentOptimizer(1.0), [1.0, 3.0])
    assert [(value.tag, value.histo.sum) for value in summary.value] == [("gradients/x", 4.0)]
    assert checked == ["must_be_finite/gradients/x"]


def test_with_loss_scaling_an_overflow_is_shown_as_zero_and_is_no_error():
    optimizer = with_loss_scaling(tf.train.GradientDescentOptimizer(1.0))
    summary, checked = run_summaries(optimizer, [1.0, float("inf")])
    assert [(value.tag, value.histo.sum) for value in summary.value] == [("gradients/x", 1.0)]
    assert checked == []


def test_only_the_updates_of_the_first_tower_are_collected():
    expected = []
    for scope in ("norm", "tower_0/norm", "tower_1/norm", "tower_12/norm", "other_1/norm"):
        with tf.name_scope(f"{scope}/"):
            expected.append(tf.no_op())
    variable = tf.get_variable("mean", initializer=0.0)
    assign = tf.assign_add(variable, 1.0)  # has an operation, but is none
    for update in (*expected, assign):
        tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
    assert updates.collect_updates("tower") == [expected[0], expected[1], expected[4], assign.op]
