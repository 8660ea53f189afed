"""Times a training step with --top_layers=local against one with full layers.

    python benchmarks/compare_top_layers.py

Both train on a batch that is in memory already, in turns; a figure is the median over the turns of
the ratio within a turn, with its range.
"""

import math

import compare
from absl import flags

from cifar10_runtime import run, tf

FLAGS = flags.FLAGS


def build(kind):
    """Returns a `compare.Training` with top layers of a kind; prints its number of parameters."""
    FLAGS.top_layers = kind
    training = compare.Training(compare.resident_inputs, compare.RESIDENT_WARM_UP_STEPS)
    with training.graph.as_default():
        parameters = sum(math.prod(v.shape.as_list()) for v in tf.trainable_variables())
    print(f"--top_layers={kind}: {parameters:,} parameters")
    return training


def main():
    print(f"{compare.describe_machine()}, {FLAGS.turns} turns\n")
    trainings = {kind: build(kind) for kind in ("full", "local")}
    figures = compare.take_turns(FLAGS.turns, compare.make_timers(trainings))
    for training in trainings.values():
        training.close()
    print("\n| | median | range | at most |\n| --- | --- | --- | --- |")
    compare.print_row(
        "time of a step, local layers (full = 1)", compare.ratios(figures, "local", "full"), 1.5
    )


if __name__ == "__main__":
    run(main)
