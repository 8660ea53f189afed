"""Tests of messages: text from outside stays on its line."""

import logging
import pathlib

import pytest

from support.base import command_line, messages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("käse 猫 a b", "käse 猫 a b"),
        # A mark in Persian words, a wide space and a combined emoji.
        ("\u0645\u06cc\u200c a\u3000b 👩\u200d🔬", "\u0645\u06cc\u200c a\u3000b 👩\u200d🔬"),
        ("red \x1b[31m\rforged\nline\u2028\u202e", r"red \x1b[31m\rforged\nline\u2028\u202e"),
        ("\udcff", r"\udcff"),  # a byte of a file's name that is not UTF-8
        (pathlib.Path("a\tb"), r"a\tb"),
    ],
)
def test_a_report_is_one_printable_line(text, expected, capsys):
    assert messages.printable(text) == expected
    messages.report(f"read {text}")
    assert capsys.readouterr().err == f"read {expected}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://ann:secret@host/a.tar.gz", "https://***@host/a.tar.gz"),
        ("https://token@host:80/a?sig=b&c=d#e", "https://***@host:80/a?***"),
        ("cannot get ftp://a:p@ss@host/x?y: gone", "cannot get ftp://***@host/x?*** gone"),
        ("a https://ann:se/cret@host/a?b c", "a https://***@host/a?*** c"),
        ("https://ann:se#cr?et@host/a", "https://***"),  # the @ may be part of the query
        ("https:/ann:secret@host/a", "https:/***@host/a"),
        ("file:///home/me@here/a?b is /tmp/a?b=c", "file:///home/me@here/a?b is /tmp/a?b=c"),
    ],
)
def test_secrets_in_urls_are_masked(text, expected):
    assert messages.mask_secrets(text) == expected


def test_a_query_is_masked_to_its_end_even_after_a_blank():
    assert messages.mask_url("https://a b@host/c?sig=d e\n") == "https://***@host/c?***"
    assert messages.mask_url(" URL:https://a b@host/c?d e") == " URL:https://***@host/c?***"
    assert messages.mask_url("/tmp/a@b?c") == "/tmp/a@b?c"


def test_the_secrets_of_a_url_are_masked_in_a_message_that_quotes_a_part_of_it():
    url = "https://ann:p%40ss@host/a?sig=abcd"
    message = "nonnumeric port: 'p@ss@host', abcd, or 'xyz@host'"
    assert messages.mask_secrets(message, url) == "nonnumeric port: '***@host', ***, or '***@host'"


def test_a_log_record_keeps_only_its_own_line_breaks():
    record = logging.makeLogRecord({"msg": "a\n%s\n", "args": ("\r\x85\u2028\x1b",)})
    assert command_line._make_printable(record)
    assert record.getMessage() == "a\n\\r\\x85\\u2028\\x1b\n"
