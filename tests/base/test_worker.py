"""A worker that trains alone."""

from support.base.worker import ALONE


def test_a_worker_that_trains_alone_is_a_chief_that_applies_its_own_gradients():
    gradients = [("gradient", "variable")]
    assert (ALONE.index, ALONE.count, ALONE.is_chief) == (0, 1, True)
    assert ALONE.average_gradients(gradients, None) == gradients
    assert ALONE.synchronize("update") == "update"
    assert ALONE.hooks() == []
