"""Tests of the progress bar on a terminal and the progress lines in a log."""

import re
import sys
import types

import pytest

from support.base import progress


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_every_ten_seconds_with_rate_and_remaining_time(clock, capsys):
    with progress.show_progress("Drawing", 1000, " images", initial=100) as bar:
        for _ in range(30):
            clock.now += 1.0
            bar.update(20)
        bar.write_line("house.png cannot be read")
        assert bar.n == 700
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "Drawing: 300 of 1000 (20.00 images/s, 00:35 left)",
        "Drawing: 500 of 1000 (20.00 images/s, 00:25 left)",
        "Drawing: 700 of 1000 (20.00 images/s, 00:15 left)",
        "house.png cannot be read",
    ]


def test_an_unknown_total_is_omitted_and_numbers_are_abbreviated(clock, capsys):
    with progress.show_progress("Downloading", None, "B", unit_scale=True) as bar:
        clock.now += 10.0
        bar.update(34_000_000)
    assert capsys.readouterr().err == "Downloading: 34.0M (3.40MB/s)\n"


def test_a_terminal_gets_a_bar_that_is_erased_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.show_progress("Drawing", 1000, " images", initial=100) as bar:
        for _ in range(3):
            bar.update(300)
            bar.refresh()
        assert bar.n == 1000
    drawn = capsys.readouterr().err.split("\r")
    assert any(
        re.fullmatch(r"Drawing: +70%\|.*\| 700/1000 \[.*<.*, .* images/s\]", text.strip())
        for text in drawn
    )
    assert drawn[-2].strip() == ""
    assert "\n" not in "".join(drawn)
