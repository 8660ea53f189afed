"""Compares the time of a training step with --top_layers=local and with --top_layers=full.

    python benchmarks/compare_top_layers.py

Both train on a resident batch and take turns. The figure is the median, over the turns, of the
ratio within one turn.
"""

import math

import compare
from absl import flags

from support import command_line
from support.tensorflow_v1 import tf

FLAGS = flags.FLAGS


def main(argv=None):
    print(f"{compare.describe_machine()}, {FLAGS.turns} turns\n")
    contenders = {}
    for kind in ("full", "local"):
        contenders[kind] = compare.Contender(compare.build_resident_training, top_layers=kind)
        with contenders[kind].graph.as_default():
            parameters = sum(math.prod(v.shape.as_list()) for v in tf.trainable_variables())
        print(f"--top_layers={kind}: {parameters:,} parameters")
    figures = compare.time_steps(contenders)
    print("\n| | median | range | at most |\n| --- | --- | --- | --- |")
    compare.print_row(
        "time of a step, local layers (full = 1)", compare.ratios(figures, "local", "full"), 1.5
    )


if __name__ == "__main__":
    command_line.run(main)
