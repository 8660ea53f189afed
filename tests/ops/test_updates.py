"""Checks of gradients, their summaries, and the collected updates of the towers."""

import pytest

from support.ops import graph_notes, updates
from support.ops.tensorflow_v1 import tf, with_loss_scaling

pytestmark = pytest.mark.usefixtures("graph")


def test_variables_without_a_gradient_are_left_out_and_named(warnings):
    x, y, z = (tf.get_variable(name, initializer=1.0) for name in "xyz")
    trained = [(tf.constant(2.0), z)]
    assert updates.drop_missing(trained) == trained
    assert warnings == []
    assert updates.drop_missing([(None, x), (None, y), *trained]) == trained
    assert warnings == [
        "Training does not change these variables, because no gradient reaches them: x, y"
    ]


@pytest.mark.parametrize(
    ("with_scaling", "gradient", "total", "must_be_finite"),
    [
        (False, [1.0, 3.0], 4.0, ["must_be_finite/gradients/x"]),
        (True, [1.0, float("inf")], 1.0, []),  # the update is skipped
    ],
)
def test_a_gradient_is_shown_and_must_be_finite_unless_the_loss_is_scaled(
    with_scaling, gradient, total, must_be_finite
):
    optimizer = tf.train.GradientDescentOptimizer(1.0)
    if with_scaling:
        optimizer = with_loss_scaling(optimizer)
    variable = tf.get_variable("x", initializer=[1.0, 1.0])
    updates.summarize_gradients(optimizer, [(tf.constant(gradient), variable)])
    checked = [each.op.name for each in tf.get_collection(graph_notes.MUST_BE_FINITE)]
    assert checked == must_be_finite
    with tf.Session() as session:
        summary = tf.Summary.FromString(session.run(tf.summary.merge_all()))
    assert [(value.tag, value.histo.sum) for value in summary.value] == [("gradients/x", total)]


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
