"""Tests of the errors that end a script with one line."""

import pytest

from support.base.errors import UserError, first_line


def test_the_message_of_a_user_error_is_one_line():
    error = UserError("cannot read x:\n\n  line one\n\tline two\n")
    assert str(error) == "cannot read x: line one line two"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Graph execution error:\n\nDetected at ...\nNode: 'a/b'\nno such file\n\t [[a/b]]",
            "no such file",
        ),
        ("one line\nand another", "one line"),
        ("", "ValueError('')"),
    ],
)
def test_the_reason_of_an_error_is_one_line_of_its_text(text, reason):
    assert first_line(ValueError(text)) == reason
