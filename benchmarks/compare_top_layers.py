"""Compares the time of a training step with --top_layers=local and with --top_layers=full.

    python benchmarks/compare_top_layers.py

Both train on a resident batch and take turns. The figure is the median, over the turns, of the
ratio within one turn.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import compare
import turns
from absl import flags

from support.base import command_line

FLAGS = flags.FLAGS


def main(argv=None):
    print(f"{compare.describe_machine()}, {FLAGS.turns} turns\n")
    seconds = compare.time_steps(
        {
            kind: turns.Contender(
                compare.CONTENDER, "resident", "--synthetic_data", f"--top_layers={kind}"
            )
            for kind in ("full", "local")
        }
    )
    print("| | median | range | at most |\n| --- | --- | --- | --- |")
    compare.print_row(
        "time of a step, local layers (full = 1)",
        turns.ratios(seconds["local"], seconds["full"]),
        1.5,
    )


if __name__ == "__main__":
    command_line.run(main)
