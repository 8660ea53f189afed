"""Tests of the errors that end a script with one line."""

import re

import pytest

from support.base.errors import CheckpointError, UserError, first_line, foreign_file


def test_the_message_of_a_user_error_is_one_line():
    error = UserError("cannot read a  b\r\x85\u2028:\n\n  line one\n\tline two\n")
    assert str(error) == r"cannot read a  b\r\x85\u2028: line one line two"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Graph execution error:\n\nDetected at ...\nNode: 'a/b'\nno such file\n\t [[a/b]]",
            "no such file",
        ),
        ("one\rline\nand another", "one\rline"),
        ("", "ValueError('')"),
    ],
)
def test_the_reason_of_an_error_is_one_line_of_its_text(text, reason):
    assert first_line(ValueError(text)) == reason


@pytest.mark.parametrize("error", [RecursionError("too deep"), MemoryError(), EOFError("end")])
def test_any_error_of_a_foreign_file_is_one_line(error):
    reason = str(error) or repr(error)
    with (
        pytest.raises(CheckpointError, match=rf"^a cannot be read \({re.escape(reason)}\); go$"),
        foreign_file("a", CheckpointError, "; go"),
    ):
        raise error
