"""Compares the speed of this project with that of other implementations, and prints a table.

    python benchmarks/compare.py
    python benchmarks/compare.py --turns=2 --steps=2               # a quick look
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/compare.py           # as without AVX512

The baseline is the graph that the tutorial describes: the scripts with --fast_ops=false, in
float32. Keras 3 trains the same network with tf.data. The benchmark takes five minutes on two cores
and generates its own dataset, which has the size of CIFAR-10.

The speed of a shared machine drifts, so the contenders take turns. Each figure is the median, over
the turns, of the ratio within one turn.
"""

import itertools
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import turns  # noqa: E402
from absl import flags  # noqa: E402
from contender import MATRIX_SIZE  # noqa: E402

import cifar10_input  # noqa: E402
from support.base import command_line, options  # noqa: E402
from support.base.errors import UserError  # noqa: E402
from support.data import records, synthetic  # noqa: E402
from support.ops.tensorflow_v1 import find_bfloat16_support, find_processor_name, tf  # noqa: E402

FLAGS = flags.FLAGS

options.DEFINE_integer("turns", 8, "Number of turns of each contender.", lower_bound=1)
options.DEFINE_integer(
    "process_turns",
    4,
    "Number of turns of the comparisons that start a process per measurement. 0 skips them.",
    lower_bound=0,
)
options.DEFINE_integer("steps", 8, "Number of training steps to time in a turn.", lower_bound=1)

CONTENDER = pathlib.Path(__file__).parent / "contender.py"
KERAS_CONTENDER = pathlib.Path(__file__).parent / "keras_contender.py"
BATCH_SIZE = 128
RECORDS_PER_FILE = 10_000  # as in CIFAR-10
MFLOP_PER_IMAGE = 105  # multiplications and additions of the forward and the backward pass
MEMORY_STEPS = 20  # steps after which the memory of a training process no longer grows


def time_steps(contenders):
    """Returns the seconds per step of each contender (dict by name) in each turn; closes them."""
    for contender in contenders.values():
        contender.wait_until_ready()
    seconds = turns.take_turns(
        FLAGS.turns,
        {
            name: lambda contender=contender: contender.seconds_per_step(FLAGS.steps)
            for name, contender in contenders.items()
        },
    )
    for contender in contenders.values():
        contender.close()
    return seconds


def print_row(name, ratios, *more_columns):
    columns = [name, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
    print(f"| {' | '.join([*columns, *map(str, more_columns)])} |", flush=True)


def prepare_dataset(data_dir):
    """Generates the synthetic dataset, and repeats each training file to the size of CIFAR-10's.

    Returns:
      The path of the folder with the record files.
    """
    folder = synthetic.maybe_generate(data_dir)
    for path in map(pathlib.Path, records.record_files(folder, eval_data=False)):
        path.write_bytes(path.read_bytes() * (RECORDS_PER_FILE // synthetic.RECORDS_PER_FILE))
    return folder


def compare_training(folder, shared_flags, onednn_is_default):
    """Prints the rows about training steps; returns the images per second by contender."""

    def train(*arguments, kind="training", **environment):
        return turns.Contender(CONTENDER, kind, *shared_flags, *arguments, **environment)

    queued = int(
        FLAGS.min_fraction_of_examples_in_queue
        * cifar10_input.find_dataset(str(folder)).num_examples_per_epoch_for_train
    )
    contenders = {
        "float32": train(),
        "baseline without oneDNN": train("--fast_ops=false", TF_ENABLE_ONEDNN_OPTS="0"),
        "baseline": train("--fast_ops=false"),
        "Keras": turns.Contender(
            KERAS_CONTENDER,
            folder,
            BATCH_SIZE,
            max(1, queued),
            KERAS_BACKEND="tensorflow",
            TF_ENABLE_ONEDNN_OPTS="1",
        ),
        "resident": train(kind="resident"),
        "matrix product": train(kind="matrix_product"),
    }
    # Where oneDNN is limited to older instructions, operations in bfloat16 end the process.
    if find_bfloat16_support() == "native" and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        contenders["16 bits"] = train("--use_fp16")
    seconds = time_steps(contenders)

    goals = ["", ""] if onednn_is_default else [2.3, 3]
    ratios = turns.ratios(seconds["baseline without oneDNN"], seconds["float32"])
    print_row("training (baseline without oneDNN = 1)", ratios, *goals)
    ratios = turns.ratios(seconds["baseline"], seconds["float32"])
    print_row("training (baseline with oneDNN = 1)", ratios, 1.7, 2.2)
    ratios = turns.ratios(seconds["Keras"], seconds["float32"])
    print_row("training (Keras 3 with oneDNN = 1)", ratios, 1.5, 1.8)
    if "16 bits" in seconds:
        ratios = turns.ratios(seconds["baseline"], seconds["16 bits"])
        print_row("training, `--use_fp16` (baseline with oneDNN = 1)", ratios, 2.5, 3.5)
    arithmetic = BATCH_SIZE * MFLOP_PER_IMAGE * 1e6 / (2 * MATRIX_SIZE**3)  # in matrix products
    ratios = turns.ratios(seconds.pop("matrix product"), seconds["resident"])
    print_row(
        "step on a resident batch (its direct arithmetic = 1)",
        [arithmetic * ratio for ratio in ratios],
        0.95,
        1.3,
    )
    return {name: BATCH_SIZE / statistics.median(times) for name, times in seconds.items()}


def run_script(text, script, *arguments, **environment):
    """Runs a script.

    Returns:
      (float, int): the seconds from its start until it prints a line with `text`, and the peak
      memory of the process in the units of the system.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, script, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with process.stdout:
            times = [time.perf_counter() - start for line in process.stdout if text in line]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise UserError(f"{script} failed: {errors.read()}")
    return times[0], usage.ru_maxrss


def compare_processes(folder, shared_flags, onednn_is_default):
    """Prints the rows about whole processes."""
    numbers = itertools.count()
    settings = {
        "fast": ("--fast_ops=true", {}),
        "baseline": (
            "--fast_ops=false",
            {"TF_ENABLE_ONEDNN_OPTS": "1" if onednn_is_default else "0"},
        ),
    }

    def train(fast_ops, environment):
        return run_script(
            ": step 0,",
            "cifar10_train.py",
            *shared_flags,
            fast_ops,
            f"--train_dir={folder}/train_{next(numbers)}",
            f"--max_steps={MEMORY_STEPS}",
            **environment,
        )

    def evaluate(fast_ops, environment):
        return run_script(
            "precision @ 1",
            "cifar10_eval.py",
            *shared_flags,
            fast_ops,
            f"--checkpoint_dir={folder}/train_0",
            f"--eval_dir={folder}/eval",
            "--eval_data=train_eval",
            "--num_examples=10000",
            "--run_once",
            **environment,
        )

    figures = turns.take_turns(
        FLAGS.process_turns,
        {
            (function, name): lambda function=function, name=name: function(*settings[name])
            for function in (train, evaluate)
            for name in settings
        },
    )

    def ratios(function, index):
        fast, baseline = ([turn[index] for turn in figures[function, name]] for name in settings)
        return turns.ratios(fast, baseline)

    print_row("time to evaluate 10,000 images (baseline = 1)", ratios(evaluate, 0), 0.6, 0.4)
    print_row("time to step 0 (baseline = 1)", ratios(train, 0), 0.7, 0.5)
    print_row("peak memory of training (baseline = 1)", ratios(train, 1), 1.2, "1.0")


def find_onednn_instructions():
    """Returns the name of the instruction set that oneDNN uses, according to oneDNN."""
    code = "import tensorflow as tf; tf.matmul(tf.ones([64, 64]), tf.ones([64, 64]))"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_VERBOSE": "1", "TF_ENABLE_ONEDNN_OPTS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return re.search(r"cpu,isa:(.*)", process.stdout)[1]


def describe_machine():
    """Returns the hardware and the versions in one line."""
    return (
        f"{os.cpu_count()} x {find_processor_name()}, Python {platform.python_version()}, "
        f"TensorFlow {tf.version.VERSION}, batch {BATCH_SIZE}"
    )


def main(argv=None):
    instructions = find_onednn_instructions()
    onednn_is_default = "DL Boost" in instructions  # AVX512_VNNI, AVX512_BF16, AMX or AVX_VNNI
    turns_of_processes = f"{FLAGS.process_turns} for whole processes"
    print(f"{describe_machine()}, median of {FLAGS.turns} turns ({turns_of_processes})")
    print(
        f"oneDNN with {instructions}; TensorFlow's default: {'on' if onednn_is_default else 'off'}"
    )
    print("The last three rows use that default for the baseline; smaller is better there.\n")
    print("| | median | range | at least | aim |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as data_dir:
        folder = prepare_dataset(data_dir)
        shared_flags = [
            f"--data_dir={data_dir}",
            "--synthetic_data",
            f"--batch_size={BATCH_SIZE}",
            f"--min_fraction_of_examples_in_queue={FLAGS.min_fraction_of_examples_in_queue}",
        ]
        throughput = compare_training(folder, shared_flags, onednn_is_default)
        if FLAGS.process_turns:
            compare_processes(data_dir, shared_flags, onednn_is_default)
    listed = ", ".join(f"{name} {speed:.0f}" for name, speed in throughput.items())
    print(f"\nThroughput in images per second: {listed}.")


if __name__ == "__main__":
    command_line.run(main)
