"""Lets processes take turns, so that changes in a machine's speed affect all of them equally.

A contender is a process that reads numbers of steps from stdin, one per line, and prints the
seconds per step for each. While it waits for a line, it does not use the CPU.
"""

import os
import subprocess
import sys
import time


def serve(run, warm_up_steps):
    """Runs the steps that stdin asks for, in the contender's process.

    Args:
      run: function of a number of steps.
      warm_up_steps: function from the number of timed steps to that of untimed steps before them.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        steps = int(line)
        run(warm_up_steps(steps))
        start = time.perf_counter()
        run(steps)
        print((time.perf_counter() - start) / steps, flush=True)


class Contender:
    """A process that calls `serve`.

    Args:
      *arguments: the arguments of Python.
      **environment: environment variables to set.
    """

    def __init__(self, *arguments, **environment):
        self._process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        )

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            self.close()
            script, code = self._process.args[1], self._process.returncode
            raise SystemExit(f"{script} failed with exit code {code}")
        return line.strip()

    def wait_until_ready(self):
        while self._read() != "ready":  # for example the line about the queue
            pass

    def seconds_per_step(self, steps):
        print(steps, file=self._process.stdin, flush=True)
        return float(self._read())

    def close(self):
        self._process.communicate()


def take_turns(turns, measurements):
    """Calls all functions of a dict once per turn; returns a dict of lists of their results."""
    figures = {name: [] for name in measurements}
    for _ in range(turns):
        for name, measure in measurements.items():
            figures[name].append(measure())
    return figures


def ratios(numerators, denominators):
    """Returns the ratio of two figures in each turn."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]
