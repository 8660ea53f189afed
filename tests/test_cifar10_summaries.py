"""Tags as they are given, and what sheets of images and histograms hold."""

import numpy as np
import pytest

import cifar10_summaries
from cifar10_runtime import tf

pytestmark = pytest.mark.usefixtures("graph")


def written():
    with tf.Session() as session:
        return tf.Summary.FromString(session.run(tf.summary.merge_all())).value


def test_tags_are_exactly_those_that_are_given_wherever_that_is():
    tf.constant(0.0, name="a")
    ones, some, images = tf.ones([3]), tf.constant([0.0, 2.0, 0.0, 0.0]), tf.zeros([2, 4, 4, 3])
    with tf.name_scope("tower_7"):
        cifar10_summaries.scalar("a", 1.5)
        cifar10_summaries.histogram("b/c", ones)
        cifar10_summaries.sparsity("b/d", some)
        cifar10_summaries.images("e", images)
    values = {value.tag: value for value in written()}
    assert set(values) == {"a", "b/c", "b/d", "e"}
    assert values["a"].simple_value == 1.5
    assert values["b/c"].histo.num == 3
    assert values["b/d"].simple_value == 0.75
    names = {op.name.split("/")[0] for op in tf.get_default_graph().get_operations()}
    assert "tower_7" not in names


def test_images_of_one_colour_can_be_shown():
    cifar10_summaries.images("input", tf.ones([3, 24, 24, 3]))
    assert [value.tag for value in written()] == ["input"]


def test_a_histogram_of_what_is_not_finite_names_its_tag():
    cifar10_summaries.histogram("gradients/conv1/weights", tf.constant([np.nan]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="for: summaries/gradients/conv1/w"):
        written()
