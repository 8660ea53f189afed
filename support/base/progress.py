"""Progress of long operations on stderr: a bar on a terminal, an occasional line in a log."""

import contextlib
import datetime
import sys
import time

from tqdm import tqdm

LINE_INTERVAL = 10.0  # seconds between lines in a log; a shorter operation logs nothing


def timestamp():
    """Returns the local time as it begins the printed lines: `2015-11-04 11:45:45.927302`."""
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S.%f}"


def show_progress(description, total, unit, initial=0, unit_scale=False):
    """Shows the progress of an operation on stderr, with its rate and the remaining time.

    Args:
      description: string, such as "Downloading".
      total: int; the number of units, or None if it is unknown.
      unit: string; the name of the unit.
      initial: int; the number of units that were processed earlier.
      unit_scale: bool; abbreviate numbers as 1.50k or 2.00M.

    Returns:
      A context manager that erases the bar at the end. It yields an object with `update(count)`, to
      call after `count` units; `write_line(line)`, for text on stderr; and `n`, the units so far.
    """
    arguments = {
        "desc": description,
        "total": total,
        "initial": initial,
        "unit": unit,
        "unit_scale": unit_scale,
    }
    if sys.stderr.isatty():
        return _ProgressBar(**arguments, leave=False, dynamic_ncols=True)
    return contextlib.nullcontext(_ProgressLog(**arguments))


class _ProgressBar(tqdm):
    def write_line(self, line):
        self.write(line, file=sys.stderr)


class _ProgressLog:
    def __init__(self, desc, initial, **arguments):
        self.n = initial
        self._description = desc
        self._format = {"initial": initial, "bar_format": "{n_fmt} ({rate_fmt})", **arguments}
        if arguments["total"] is not None:
            self._format["bar_format"] = "{n_fmt} of {total_fmt} ({rate_fmt}, {remaining} left)"
        self._start = self._last_line = time.monotonic()

    def update(self, count):
        self.n += count
        now = time.monotonic()
        if now - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            progress = tqdm.format_meter(self.n, elapsed=now - self._start, **self._format)
            self.write_line(f"{self._description}: {progress}")

    def write_line(self, line):
        print(line, file=sys.stderr, flush=True)
