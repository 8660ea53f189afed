"""Progress of what takes a while: a bar on a terminal, a plain line now and then elsewhere.

TensorFlow is not needed here.
"""

import sys
import time

from tqdm import tqdm

LINE_INTERVAL = 10.0  # seconds between two plain lines; what takes less has none


class _Lines:
    """Stands in for a bar where what is written stays, as in a file or a log."""

    def __init__(self, desc, total, initial, unit, unit_scale):
        self.n = initial
        self._description = desc
        self._meter = {
            "total": total,
            "initial": initial,
            "unit": unit,
            "unit_scale": unit_scale,
            "bar_format": "{n_fmt} ({rate_fmt})"
            if total is None
            else "{n_fmt} of {total_fmt} ({rate_fmt}, {remaining} left)",
        }
        self._start = self._last = time.monotonic()

    def update(self, count):
        self.n += count
        now = time.monotonic()
        if now - self._last >= LINE_INTERVAL:
            self._last = now
            meter = tqdm.format_meter(self.n, elapsed=now - self._start, **self._meter)
            print(f"{self._description}: {meter}", file=sys.stderr, flush=True)

    def tell(self, line):
        print(line, file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class _Bar(tqdm):
    """A bar that stays the last line, whatever is told."""

    def tell(self, line):
        self.write(line, file=sys.stderr)


def show_progress(description, total, unit, initial=0, unit_scale=False):
    """Shows on stderr how far something is, with its rate and the time left.

    Args:
      description: string; what is being done.
      total: int; what there is to do, or None where that is not known.
      unit: string; of what is counted.
      initial: int; how much had been done before.
      unit_scale: bool; write thousands as k, millions as M.

    Returns:
      A context manager that gives an object with `update(count)`, to be called when that much more
      is done; `n`, how much that is in all; and `tell(line)`, which prints a line on stderr. A bar
      vanishes at the end.
    """
    arguments = {
        "desc": description,
        "total": total,
        "initial": initial,
        "unit": unit,
        "unit_scale": unit_scale,
    }
    if sys.stderr.isatty():
        return _Bar(**arguments, leave=False, dynamic_ncols=True)
    return _Lines(**arguments)
