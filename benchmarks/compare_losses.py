"""Trains this project's model and the stock formulation from several seeds; compares their losses.

    python benchmarks/compare_losses.py --synthetic_data
    python benchmarks/compare_losses.py --data_dir=FOLDER --seeds=3

They should differ by no more than seeds do. A run's loss is the mean of its last 20 steps: a single
batch's is noisy. Takes about ten minutes on two cores.
"""

import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import stock
from absl import flags

import cifar10
import cifar10_input
from cifar10_runtime import quiet_cancellation, run, session_config, tf

FLAGS = flags.FLAGS

flags.DEFINE_integer("seeds", 5, "Runs of each formulation.", lower_bound=2)
flags.DEFINE_integer("steps", 300, "Steps of a run.", lower_bound=1)

AVERAGED_STEPS = 20  # at the end of a run
QUEUED_FRACTION = 0.4  # of an epoch, as in training


def train(seed, build_inputs, inference):
    """Returns the mean loss of a run's last steps."""
    losses = []
    with tf.Graph().as_default():
        tf.set_random_seed(seed)
        global_step = tf.train.get_or_create_global_step()
        images, labels = build_inputs(cifar10.find_data_folder(), FLAGS.batch_size, QUEUED_FRACTION)
        loss = cifar10.loss(inference(images), labels)
        train_op = cifar10.train(loss, global_step)
        coordinator = tf.train.Coordinator()
        with tf.Session(config=session_config(FLAGS.use_fp16)) as session:
            session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
            threads = tf.train.start_queue_runners(session, coordinator)
            for _ in range(FLAGS.steps):
                losses.append(session.run([loss, train_op])[0])
            with quiet_cancellation():
                coordinator.request_stop()
                coordinator.join(threads)
    return statistics.mean(map(float, losses[-AVERAGED_STEPS:]))


def stock_inference(images):
    with stock.stock_normalization():
        return cifar10.inference(images)


def main():
    cifar10.maybe_download_and_extract()
    formulations = {
        "stock": (stock.distorted_inputs, stock_inference),
        "own": (cifar10_input.distorted_inputs, cifar10.inference),
    }
    losses = {name: [] for name in formulations}
    for seed in range(FLAGS.seeds):
        for name, formulation in formulations.items():
            losses[name].append(train(seed, *formulation))
    print("| | mean loss | standard deviation | each seed |\n| --- | --- | --- | --- |")
    for name, of_seeds in losses.items():
        mean, deviation = statistics.mean(of_seeds), statistics.stdev(of_seeds)
        each = ", ".join(f"{loss:.3f}" for loss in of_seeds)
        print(f"| {name} | {mean:.3f} | {deviation:.3f} | {each} |")


if __name__ == "__main__":
    run(main)
