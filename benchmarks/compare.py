"""Compares the speed of this project with a baseline, and prints a table.

    python benchmarks/compare.py
    python benchmarks/compare.py --turns=2 --steps=2               # a quick look
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/compare.py           # as without AVX512
    TF_ENABLE_ONEDNN_OPTS=0 python benchmarks/compare.py           # without oneDNN

The baseline is the graph that the tutorial describes: the scripts with --fast_ops=false, in
float32, with the same kernels. The benchmark takes two to five minutes on two cores and generates
its own dataset.

The speed of a shared machine drifts, so the contenders take turns. Each figure is the median, over
the turns, of the ratio within one turn.
"""

import contextlib
import functools
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

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from absl.testing import flagsaver  # noqa: E402

import cifar10  # noqa: E402
import cifar10_input  # noqa: E402
from support import command_line, dataset, fast_input, synthetic  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.tensorflow_v1 import (  # noqa: E402
    find_processor_name,
    has_fast_bfloat16,
    session_config,
    tf,
)

FLAGS = flags.FLAGS

command_line.forget_flags_of(__file__)
flags.DEFINE_integer("turns", 8, "Number of turns of each contender.", lower_bound=1)
flags.DEFINE_integer(
    "process_turns",
    4,
    "Number of turns of the comparisons that start a process per measurement. 0 skips them.",
    lower_bound=0,
)
flags.DEFINE_integer("steps", 8, "Number of training steps to time in a turn.", lower_bound=1)

BATCH_SIZE = 128
RECORDS_PER_FILE = 10_000  # as in CIFAR-10
MFLOP_PER_IMAGE = 105  # multiplications and additions of the forward and the backward pass
MATRIX_SIZE = 2048
# Untimed steps at the start of a turn. During the other contenders' turns, the queue fills to three
# batches beyond its minimum, and each of its threads prepares another block of images.
WARM_UP_STEPS = 4 + cifar10_input.NUM_PREPROCESS_THREADS * fast_input.RECORDS_PER_READ // BATCH_SIZE


class Contender:
    """A graph with its own session and running queues.

    Args:
      build: function that builds the graph and returns the tensors that each step fetches.
      **flag_values: flags to build it with, such as fast_ops=False.
    """

    def __init__(self, build, **flag_values):
        with tf.Graph().as_default() as self.graph, flagsaver.flagsaver(**flag_values):
            with contextlib.redirect_stdout(io.StringIO()):  # hides the line about the queue
                self._fetches = build()
            self._session = tf.Session(config=session_config(FLAGS.use_fp16))
            self._session.run(tf.global_variables_initializer())
            self._coordinator = tf.train.Coordinator()
            for runner in tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS):
                runner.create_threads(self._session, self._coordinator, daemon=True, start=True)
        self._run(1)

    def _run(self, steps):
        for _ in range(steps):
            self._session.run(self._fetches)

    def seconds_per_step(self, steps):
        self._run(min(2 * steps, WARM_UP_STEPS))
        start = time.perf_counter()
        self._run(steps)
        return (time.perf_counter() - start) / steps

    def cpu_seconds_per_step(self, steps):
        # With full queues before and after, each image that a step took was replaced.
        _wait_until_idle()
        start = time.process_time()
        self._run(steps)
        _wait_until_idle()
        return (time.process_time() - start) / steps

    def close(self):
        self._coordinator.request_stop()
        self._coordinator.join()
        self._session.close()


def _wait_until_idle():
    """Waits until no thread of this process uses the CPU, because all queues are full."""
    used = None
    while used is None or time.process_time() - used > 0.002:
        used = time.process_time()
        time.sleep(0.1)


def _build_training(images, labels):
    with tf.device("/cpu:0"):
        global_step = tf.train.get_or_create_global_step()
    loss = cifar10.loss(cifar10.inference(images), labels)
    return cifar10.train(loss, global_step), loss  # the scripts fetch the loss of each step, too


def build_training():
    """Builds training from the queues."""
    return _build_training(*cifar10.distorted_inputs(BATCH_SIZE))


def build_resident_training():
    """Builds training on a resident batch: it is already in memory, so there is no input."""
    generator = np.random.default_rng(0)
    shape = [BATCH_SIZE, cifar10.crop_size(), cifar10.crop_size(), 3]
    images = tf.get_variable(
        "resident", initializer=generator.normal(size=shape).astype(np.float32), trainable=False
    )
    return _build_training(images.read_value(), tf.range(BATCH_SIZE) % cifar10.NUM_CLASSES)


def build_input():
    """Builds only the training input; fetching the operation does not copy the batch."""
    images, _ = cifar10.distorted_inputs(BATCH_SIZE)
    return images.op


def build_matrix_product():
    """Builds the product of two large matrices, the fastest arithmetic on this machine."""
    matrix = tf.get_variable("matrix", [MATRIX_SIZE, MATRIX_SIZE])
    return tf.matmul(matrix, matrix).op


def take_turns(turns, measurements):
    """Calls all functions of a dict once per turn; returns a dict of lists of their results."""
    figures = {name: [] for name in measurements}
    for _ in range(turns):
        for name, measure in measurements.items():
            figures[name].append(measure())
    return figures


def time_steps(contenders):
    """Returns the seconds per step of each contender (dict by name) in each turn; closes them."""
    figures = take_turns(
        FLAGS.turns,
        {
            name: functools.partial(contender.seconds_per_step, FLAGS.steps)
            for name, contender in contenders.items()
        },
    )
    for contender in contenders.values():
        contender.close()
    return figures


def ratios(figures, numerator, denominator):
    """Returns the ratio of two figures in each turn."""
    return [a / b for a, b in zip(figures[numerator], figures[denominator], strict=True)]


def print_row(name, ratios, *more_columns):
    columns = [name, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
    print(f"| {' | '.join([*columns, *map(str, more_columns)])} |", flush=True)


def prepare_dataset(data_dir):
    """Generates the synthetic dataset, and sets the flags to use it.

    Each training file is repeated until it is as large as CIFAR-10's.

    Returns:
      The path of the folder with the record files.
    """
    folder = synthetic.maybe_generate(data_dir)
    for path in map(pathlib.Path, dataset.record_files(folder, eval_data=False)):
        path.write_bytes(path.read_bytes() * (RECORDS_PER_FILE // synthetic.RECORDS_PER_FILE))
    FLAGS.data_dir, FLAGS.synthetic_data = data_dir, True
    return folder


def compare_training():
    contenders = {
        "baseline": Contender(build_training, fast_ops=False),
        "fast": Contender(build_training),
        "resident": Contender(build_resident_training),
        "matrix product": Contender(build_matrix_product),
    }
    # Where oneDNN is limited to older instructions, operations in bfloat16 end the process.
    includes_fp16 = "ONEDNN_MAX_CPU_ISA" not in os.environ
    if includes_fp16:
        contenders["fast fp16"] = Contender(build_training, use_fp16=True)
        contenders["resident fp16"] = Contender(build_resident_training, use_fp16=True)
    figures = time_steps(contenders)
    print_row("training, float32 (baseline = 1)", ratios(figures, "baseline", "fast"), 1.5, 2)
    if includes_fp16:
        shares = ratios(figures, "baseline", "fast fp16")
        print_row("training, `--use_fp16` (baseline = 1)", shares, 2.2, 3)
    print_row("float32 (resident batch = 1)", ratios(figures, "resident", "fast"), 0.9, 0.97)
    if includes_fp16:
        shares = ratios(figures, "resident fp16", "fast fp16")
        print_row("`--use_fp16` (resident batch = 1)", shares, 0.75, 0.9)
    arithmetic = BATCH_SIZE * MFLOP_PER_IMAGE * 1e6 / (2 * MATRIX_SIZE**3)  # in matrix products
    print_row(
        "resident batch, float32 (arithmetic alone = 1)",
        [arithmetic * ratio for ratio in ratios(figures, "matrix product", "resident")],
        0.55,
        0.75,
    )
    del figures["matrix product"]
    return {name: BATCH_SIZE / statistics.median(seconds) for name, seconds in figures.items()}


def compare_input():
    inputs = {
        "baseline": Contender(build_input, fast_ops=False),
        "fast": Contender(build_input),
    }
    figures = take_turns(
        FLAGS.turns,
        {
            name: functools.partial(contender.cpu_seconds_per_step, 4 * FLAGS.steps)
            for name, contender in inputs.items()
        },
    )
    for contender in inputs.values():
        contender.close()
    print_row(
        "images distorted per CPU second (baseline = 1)", ratios(figures, "baseline", "fast"), 4, 8
    )


def seconds_until(text, script, *arguments):
    """Runs a script and returns the seconds from its start until it prints a line with `text`."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        times = [time.perf_counter() - start for line in process.stdout if text in line]
        errors = process.stderr.read()
    if process.returncode:
        raise UserError(f"{script} failed: {errors}")
    return times[0]


def compare_processes(folder):
    names = ("data_dir", "synthetic_data", "min_fraction_of_examples_in_queue")
    shared = [*(f"--{name}={FLAGS[name].value}" for name in names), f"--batch_size={BATCH_SIZE}"]
    numbers = itertools.count()

    def start(fast_ops):
        return seconds_until(
            ": step 0,",
            "cifar10_train.py",
            *shared,
            f"--fast_ops={fast_ops}",
            f"--train_dir={folder}/train_{next(numbers)}",
            "--max_steps=1",
        )

    def evaluate(fast_ops):
        return seconds_until(
            "precision @ 1",
            "cifar10_eval.py",
            *shared,
            f"--fast_ops={fast_ops}",
            f"--checkpoint_dir={folder}/train_0",
            f"--eval_dir={folder}/eval",
            "--eval_data=train_eval",
            "--num_examples=10000",
            "--run_once",
        )

    figures = take_turns(
        FLAGS.process_turns,
        {
            "start": lambda: start(True),
            "start, baseline": lambda: start(False),
            "evaluation": lambda: evaluate(True),
            "evaluation, baseline": lambda: evaluate(False),
        },
    )
    print_row(
        "time to step 0 (baseline = 1)", ratios(figures, "start", "start, baseline"), 0.9, 0.7
    )
    print_row(
        "time to evaluate 10,000 images (baseline = 1)",
        ratios(figures, "evaluation", "evaluation, baseline"),
        0.8,
        0.5,
    )


def describe_machine():
    """Returns the hardware and the versions in one line."""
    return (
        f"{os.cpu_count()} x {find_processor_name()}, "
        f"{'with' if has_fast_bfloat16() else 'without'} bfloat16; "
        f"Python {platform.python_version()}, TensorFlow {tf.version.VERSION}, batch {BATCH_SIZE}"
    )


def main(argv=None):
    turns = f"median of {FLAGS.turns} turns ({FLAGS.process_turns} for times)"
    print(f"{describe_machine()}, {turns}\n")
    print("| | median | range | required | target |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        prepare_dataset(folder)
        throughput = compare_training()
        compare_input()
        if FLAGS.process_turns:
            compare_processes(folder)
    listed = ", ".join(f"{name} {speed:.0f}" for name, speed in throughput.items())
    print(f"\nThroughput in images per second: {listed}.")


if __name__ == "__main__":
    command_line.run(main)
