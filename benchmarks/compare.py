"""Times this project against the stock formulation, and prints a table for this machine.

    python benchmarks/compare.py
    python benchmarks/compare.py --turns=2 --steps=2     # a quick look

Needs nothing but the requirements; takes about five minutes on two cores. What is compared takes
turns, as the speed of a shared machine drifts: a figure is the median over the turns of the ratio
within a turn, with its range. The stock formulation is stock.py.
"""

import contextlib
import io
import itertools
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

BENCHMARKS = pathlib.Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS.parent))

import numpy as np  # noqa: E402
import stock  # noqa: E402
from absl import flags  # noqa: E402

import cifar10  # noqa: E402
import cifar10_data  # noqa: E402
import cifar10_input  # noqa: E402
from cifar10_runtime import (  # noqa: E402
    UserError,
    find_processor_name,
    has_fast_bfloat16,
    quiet_cancellation,
    run,
    session_config,
    tf,
)

FLAGS = flags.FLAGS

flags.DEFINE_integer("turns", 8, "Turns that each configuration takes.", lower_bound=1)
flags.DEFINE_integer(
    "process_turns", 4, "Turns of those that are whole processes; 0: none.", lower_bound=0
)
flags.DEFINE_integer("steps", 8, "Training steps that are timed in a turn.", lower_bound=1)
flags.DEFINE_integer("queued", 20000, "Images that wait in a training queue.", lower_bound=0)

BATCH_SIZE = 128
MFLOP_PER_IMAGE = 105  # forward and backward; the model's multiplications and additions
# Steps at the start of a turn that are not timed: while others had their turn, the queue has been
# filled by three batches, and each of 16 threads holds what it read.
STOCK_WARM_UP_STEPS = 4
OWN_WARM_UP_STEPS = 3 + 16 * cifar10_input.RECORDS_PER_READ // BATCH_SIZE + 1
RESIDENT_WARM_UP_STEPS = 1


class Training:
    """A training `graph` with a session of its own; `seconds_per_step` is one turn of it."""

    def __init__(self, build_inputs, warm_up_steps, use_fp16=False, use_stock=False):
        self._warm_up_steps = warm_up_steps
        with tf.Graph().as_default() as self.graph:
            with tf.device("/cpu:0"):
                global_step = tf.train.get_or_create_global_step()
            with contextlib.redirect_stdout(io.StringIO()):  # it announces its queue
                images, labels = build_inputs()
            if use_stock:
                with stock.stock_normalization():
                    logits = cifar10.inference(images)
                    loss = cifar10.loss(logits, labels)
                    train_op = cifar10.train(loss, global_step)
            else:
                loss = cifar10.loss(cifar10.inference(images), labels)
                train_op = cifar10.train(loss, global_step)
            self._fetches = [train_op, loss]  # the trainer looks at the loss of every step
            self._session = tf.Session(graph=self.graph, config=session_config(use_fp16))
            self._session.run(tf.global_variables_initializer())
            self._coordinator = tf.train.Coordinator()
            self._threads = []
            if tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS):  # a resident batch has none
                self._threads = tf.train.start_queue_runners(self._session, self._coordinator)
            self._session.run(self._fetches)

    def seconds_per_step(self, steps):
        for _ in range(min(2 * steps, self._warm_up_steps)):
            self._session.run(self._fetches)
        start = time.perf_counter()
        for _ in range(steps):
            self._session.run(self._fetches)
        return (time.perf_counter() - start) / steps

    def close(self):
        with quiet_cancellation():
            self._coordinator.request_stop()
            self._coordinator.join(self._threads)
        self._session.close()


def wait_for_rest():
    """Waits until no thread of this process works any more: its queues are full."""
    used = None
    while used is None or time.process_time() - used > 0.002:
        used = time.process_time()
        time.sleep(0.1)


class Distortion:
    """A training input alone; `cpu_seconds_per_image` is one turn of it."""

    def __init__(self, build_inputs):
        with tf.Graph().as_default() as graph:
            with contextlib.redirect_stdout(io.StringIO()):
                self._images, _ = build_inputs()
            self._session = tf.Session(graph=graph, config=session_config())
            self._coordinator = tf.train.Coordinator()
            self._threads = tf.train.start_queue_runners(self._session, self._coordinator)
            self._session.run(self._images.op)

    def cpu_seconds_per_image(self, batches):
        # From rest to rest, so that as many images have been distorted as have been taken.
        wait_for_rest()
        start = time.process_time()
        for _ in range(batches):
            self._session.run(self._images.op)
        wait_for_rest()
        return (time.process_time() - start) / (batches * BATCH_SIZE)

    close = Training.close


def matrix_multiply_rate():
    """Returns how many FLOP a second this machine does in a product of two 2048 x 2048 matrices."""
    size, repeats = 2048, 10
    with tf.Graph().as_default(), tf.Session(config=session_config()) as session:
        matrix = tf.get_variable("matrix", [size, size])
        product = tf.reduce_sum(tf.matmul(matrix, matrix))
        session.run(tf.global_variables_initializer())
        session.run(product)
        start = time.perf_counter()
        for _ in range(repeats):
            session.run(product)
        return repeats * 2 * size**3 / (time.perf_counter() - start)


def resident_inputs():
    """Returns a batch that is in memory, in place of the queues."""
    generator = np.random.default_rng(0)
    shape = [BATCH_SIZE, cifar10.IMAGE_SIZE, cifar10.IMAGE_SIZE, 3]
    images = tf.get_variable(
        "resident", initializer=generator.normal(size=shape).astype(np.float32), trainable=False
    )
    return images.read_value(), tf.range(BATCH_SIZE) % cifar10.NUM_CLASSES


def run_process(*command):
    """Runs a Python script from the project's folder.

    Returns:
      lines: list of (seconds since its start, line that it printed).
      seconds: float; until it has ended.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=BENCHMARKS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
        errors = process.stderr.read()
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise UserError(f"{command} failed: {errors}")
    return lines, seconds


def print_row(name, ratios, *more_columns):
    columns = [name, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
    print(f"| {' | '.join([*columns, *map(str, more_columns)])} |", flush=True)


def ratios(figures, above, below):
    """Divides one configuration's figures by another's, turn by turn."""
    return [a / b for a, b in zip(figures[above], figures[below], strict=True)]


def take_turns(turns, participants):
    """Calls each function of `participants` (by name) once a turn; returns lists by name."""
    figures = {name: [] for name in participants}
    for _ in range(turns):
        for name, participant in participants.items():
            figures[name].append(participant())
    return figures


def make_timers(trainings):
    """Returns for `take_turns` what times the steps of a turn of each training, by its name."""
    return {
        name: lambda training=training: training.seconds_per_step(FLAGS.steps)
        for name, training in trainings.items()
    }


def stock_training(data_dir, fraction):
    def build_inputs():
        return stock.distorted_inputs(data_dir, BATCH_SIZE, fraction)

    return Training(build_inputs, STOCK_WARM_UP_STEPS, use_stock=True)


def own_training(data_dir, fraction, use_fp16=False):
    def build_inputs():
        return cifar10_input.distorted_inputs(data_dir, BATCH_SIZE, fraction)

    return Training(build_inputs, OWN_WARM_UP_STEPS, use_fp16)


def make_records(data_dir):
    """Draws the stand-in, with its training files repeated to the size of CIFAR-10's.

    Returns:
      The path of the folder with the record files.
    """
    folder = cifar10_data.maybe_generate_synthetic(data_dir)
    for path in map(pathlib.Path, cifar10_data.record_files(folder, eval_data=False)):
        path.write_bytes(path.read_bytes() * (10000 // cifar10_data.SYNTHETIC_RECORDS_PER_FILE))
    return folder


def find_queued_fraction(records):
    """Returns the share of the training files' records that is to wait in a queue."""
    return FLAGS.queued / cifar10_data.count_records(records, eval_data=False)


def compare_training(data_dir):
    fraction = find_queued_fraction(data_dir)
    trainings = {
        "stock": stock_training(data_dir, fraction),
        "own": own_training(data_dir, fraction),
        "resident": Training(resident_inputs, RESIDENT_WARM_UP_STEPS),
        "own fp16": own_training(data_dir, fraction, use_fp16=True),
        "resident fp16": Training(resident_inputs, RESIDENT_WARM_UP_STEPS, use_fp16=True),
    }
    figures = take_turns(FLAGS.turns, make_timers(trainings) | {"rate": matrix_multiply_rate})
    for training in trainings.values():
        training.close()

    speeds = {name: BATCH_SIZE / statistics.median(figures[name]) for name in trainings}
    print_row("training, float32 (stock = 1)", ratios(figures, "stock", "own"), "1.5", "2")
    print_row("training, `--use_fp16` (stock = 1)", ratios(figures, "stock", "own fp16"), 2.2, 3)
    print_row(
        "float32, queues against a resident batch",
        ratios(figures, "resident", "own"),
        "0.9",
        "0.97",
    )
    print_row(
        "`--use_fp16`, queues against a resident batch",
        ratios(figures, "resident fp16", "own fp16"),
        "0.75",
        "0.9",
    )
    arithmetic = [
        BATCH_SIZE * MFLOP_PER_IMAGE * 1e6 / rate / seconds
        for rate, seconds in zip(figures["rate"], figures["resident"], strict=True)
    ]
    print_row("float32 step against its arithmetic", arithmetic, "0.55", "0.75")
    return speeds


def compare_distortion(data_dir):
    inputs = {
        "stock": Distortion(lambda: stock.distorted_inputs(data_dir, BATCH_SIZE, 0.02)),
        "own": Distortion(lambda: cifar10_input.distorted_inputs(data_dir, BATCH_SIZE, 0.02)),
    }
    participants = {
        name: lambda pipeline=pipeline: pipeline.cpu_seconds_per_image(4 * FLAGS.steps)
        for name, pipeline in inputs.items()
    }
    figures = take_turns(FLAGS.turns, participants)
    for pipeline in inputs.values():
        pipeline.close()
    print_row("images distorted per CPU second (stock = 1)", ratios(figures, "stock", "own"), 4, 8)


def compare_processes(records, data_dir, folder):
    data = ("--synthetic_data", f"--data_dir={data_dir}", f"--batch_size={BATCH_SIZE}")
    fraction = find_queued_fraction(records)
    numbers = itertools.count()

    def start(*script):
        lines, _ = run_process(
            *script,
            *data,
            f"--train_dir={folder / f'start_{next(numbers)}'}",
            "--max_steps=1",
            f"--min_fraction_of_examples_in_queue={fraction}",
        )
        return next(seconds for seconds, line in lines if ": step 0," in line)

    def evaluate(*script):
        _, seconds = run_process(
            *script,
            *data,
            "--run_once",
            "--eval_data=train_eval",
            "--num_examples=10000",
            f"--checkpoint_dir={folder / 'start_0'}",
            f"--eval_dir={folder / 'eval'}",
        )
        return seconds

    figures = take_turns(
        FLAGS.process_turns,
        {
            "start": lambda: start("cifar10_train.py"),
            "start stock": lambda: start(BENCHMARKS / "stock.py"),
            "eval": lambda: evaluate("cifar10_eval.py"),
            "eval stock": lambda: evaluate(BENCHMARKS / "stock.py", "--evaluate"),
        },
    )
    print_row("time to step 0 (stock = 1)", ratios(figures, "start", "start stock"), "0.9", "0.7")
    print_row(
        "evaluation of 10,000 images (stock = 1)",
        ratios(figures, "eval", "eval stock"),
        "0.8",
        "0.5",
    )


def describe_machine():
    """Returns hardware and versions in one line."""
    return (
        f"{os.cpu_count()} x {find_processor_name()}, "
        f"{'with' if has_fast_bfloat16() else 'without'} bfloat16; "
        f"Python {platform.python_version()}, TensorFlow {tf.version.VERSION}, batch {BATCH_SIZE}"
    )


def main():
    turns = f"median of {FLAGS.turns} turns ({FLAGS.process_turns} of processes)"
    print(f"{describe_machine()}, {turns}\n")
    print("| | median | range | at least | aim |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        records = make_records(folder)
        speeds = compare_training(records)
        compare_distortion(records)
        if FLAGS.process_turns:
            compare_processes(records, folder, pathlib.Path(folder))
    listed = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    print(f"\nImages per second: {listed}.")


if __name__ == "__main__":
    run(main)
