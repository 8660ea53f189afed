"""Trains with --fast_ops=false (the baseline) and with --fast_ops=true, and compares the losses.

    python benchmarks/compare_losses.py --synthetic_data
    python benchmarks/compare_losses.py --data_dir=FOLDER --seeds=3

Both train from several seeds. The mean losses should differ by no more than the losses of two
seeds do. The benchmark takes about ten minutes on two cores.
"""

import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from absl import flags
from absl.testing import flagsaver

import cifar10
from support.base import command_line, options
from support.ops.tensorflow_v1 import session_config, tf

FLAGS = flags.FLAGS

options.DEFINE_integer(
    "seeds", 5, "Number of seeds; each is used with and without fast_ops.", lower_bound=2
)
options.DEFINE_integer("steps", 300, "Number of steps in a run.", lower_bound=1)

AVERAGED_STEPS = 20  # at the end of a run, because the loss of a single batch is noisy


def train(seed, fast_ops):
    """Returns the mean loss of the last steps of a run."""
    with tf.Graph().as_default(), flagsaver.flagsaver(fast_ops=fast_ops):
        tf.set_random_seed(seed)
        global_step = tf.train.get_or_create_global_step()
        images, labels = cifar10.distorted_inputs()
        loss = cifar10.loss(cifar10.inference(images), labels)
        train_op = cifar10.train(loss, global_step)
        with tf.train.SingularMonitoredSession(config=session_config(FLAGS.use_fp16)) as session:
            losses = [float(session.run([loss, train_op])[0]) for _ in range(FLAGS.steps)]
    return statistics.mean(losses[-AVERAGED_STEPS:])


def main(argv=None):
    cifar10.maybe_download_and_extract()
    losses = {"baseline": [], "fast": []}
    for seed in range(FLAGS.seeds):
        for name, results in losses.items():
            results.append(train(seed, fast_ops=name == "fast"))
    print("| | mean loss | standard deviation | each seed |\n| --- | --- | --- | --- |")
    for name, results in losses.items():
        mean, deviation = statistics.mean(results), statistics.stdev(results)
        each = ", ".join(f"{loss:.3f}" for loss in results)
        print(f"| {name} | {mean:.3f} | {deviation:.3f} | {each} |")


if __name__ == "__main__":
    command_line.run(main)
