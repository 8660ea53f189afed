"""What is shown of progress on a terminal, and what goes into a log."""

import re
import sys

import pytest

import cifar10_progress
from cifar10_progress import show_progress


class Clock:
    """Stands in for the module `time`."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cifar10_progress, "time", clock)
    return clock


def test_a_log_gets_a_plain_line_every_ten_seconds_with_rate_and_time_left(clock, capsys):
    with show_progress("Drawing", 1000, " images", initial=100) as progress:
        for _ in range(30):
            clock.now += 1.0
            progress.update(20)
        assert progress.n == 700
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "Drawing: 300 of 1000 (20.00 images/s, 00:35 left)",
        "Drawing: 500 of 1000 (20.00 images/s, 00:25 left)",
        "Drawing: 700 of 1000 (20.00 images/s, 00:15 left)",
    ]


def test_a_log_gets_nothing_of_what_is_soon_done(clock, capsys):
    with show_progress("Drawing", 1000, " images") as progress:
        clock.now += 9.9
        progress.update(1000)
    assert capsys.readouterr() == ("", "")


def test_the_total_may_be_unknown_and_numbers_scaled(clock, capsys):
    with show_progress("Downloading", None, "B", unit_scale=True) as progress:
        clock.now += 10.0
        progress.update(34_000_000)
    assert capsys.readouterr().err == "Downloading: 34.0M (3.40MB/s)\n"


def test_a_terminal_gets_a_bar_with_rate_and_time_left_that_vanishes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show_progress("Drawing", 1000, " images", initial=100) as progress:
        for _ in range(3):
            progress.update(300)
            progress.refresh()
        assert progress.n == 1000
    drawn = capsys.readouterr().err.split("\r")
    assert any(
        re.fullmatch(r"Drawing: +70%\|.*\| 700/1000 \[.*<.*, .* images/s\]", text.strip())
        for text in drawn
    )
    assert drawn[-2].strip() == ""
    assert "\n" not in "".join(drawn)
