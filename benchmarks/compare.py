"""Compares this project with other implementations, or with other settings, and prints a table.

    python benchmarks/compare.py
    python benchmarks/compare.py --turns=2 --steps=2               # a quick look
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/compare.py           # as without AVX512
    python benchmarks/compare.py losses --data_dir=FOLDER --seeds=3
    python benchmarks/compare.py top_layers --turns=16

The first argument is what to compare:

    speed       The default: training and evaluation against the baseline and Keras. The baseline is
                the graph that the tutorial describes: the scripts with --fast_ops=false, in
                float32. Keras 3 trains the same network with tf.data. The comparison takes five
                minutes on two cores and generates its own dataset, which has the size of CIFAR-10.
    losses      The losses of training with --fast_ops=false (the baseline) and with
                --fast_ops=true, from several seeds. The means should differ by no more than the
                losses of two seeds do. The comparison takes about ten minutes on two cores.
    top_layers  A training step with --top_layers=local against one with --top_layers=full, both on
                a resident batch.

The speed of a shared machine drifts, so the contenders take turns. Each figure about speed is the
median, over the turns, of the ratio within one turn.
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
from absl import app, flags  # noqa: E402
from absl.testing import flagsaver  # noqa: E402
from contender import MATRIX_SIZE  # noqa: E402

import cifar10  # noqa: E402
from support.base import command_line, options  # noqa: E402
from support.base.errors import UserError  # noqa: E402
from support.data import records, synthetic  # noqa: E402
from support.ops import tensorflow_v1  # noqa: E402
from support.ops.tensorflow_v1 import tf  # noqa: E402

FLAGS = flags.FLAGS

options.DEFINE_integer("turns", 8, "Number of turns of each contender.", lower_bound=1)
options.DEFINE_integer(
    "process_turns",
    4,
    "Number of turns of the comparisons that start a process per measurement. 0 skips them.",
    lower_bound=0,
)
options.DEFINE_integer("steps", 8, "Number of training steps to time in a turn.", lower_bound=1)
options.DEFINE_integer("seeds", 5, "losses: number of seeds for each setting.", lower_bound=2)
options.DEFINE_integer("loss_steps", 300, "losses: number of steps in a run.", lower_bound=1)

CONTENDER = ROOT / "benchmarks" / "contender.py"
KERAS = ROOT / "benchmarks" / "keras_contender.py"
BATCH_SIZE = 128
RECORDS_PER_FILE = 10_000  # as in CIFAR-10
MFLOP_PER_IMAGE = 105  # multiplications and additions of the forward and the backward pass
MEMORY_STEPS = 20  # steps after which the memory of a training process no longer grows
AVERAGED_STEPS = 20  # at the end of a run, because the loss of a single batch is noisy


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


def print_header(*columns):
    print(f"| | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")


def print_row(name, ratios):
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} |", flush=True)


def prepare_dataset(data_dir):
    """Generates the synthetic dataset, and repeats each training file to the size of CIFAR-10's.

    Returns:
      The path of the folder with the record files.
    """
    folder = synthetic.maybe_generate(data_dir)
    for path in map(pathlib.Path, records.record_files(folder, eval_data=False)):
        path.write_bytes(path.read_bytes() * (RECORDS_PER_FILE // synthetic.RECORDS_PER_FILE))
    return folder


def compare_training(folder, shared_flags):
    """Prints the rows about training steps; returns the images per second by contender."""

    def train(*arguments, kind="training", **environment):
        return turns.Contender(CONTENDER, kind, *shared_flags, *arguments, **environment)

    keras_environment = {"KERAS_BACKEND": "tensorflow", "TF_ENABLE_ONEDNN_OPTS": "1"}
    fraction = FLAGS.min_fraction_of_examples_in_queue
    queued = max(1, int(cifar10.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN * fraction))
    contenders = {
        "float32": train(),
        "baseline without oneDNN": train("--fast_ops=false", TF_ENABLE_ONEDNN_OPTS="0"),
        "baseline": train("--fast_ops=false"),
        "Keras": turns.Contender(KERAS, folder, BATCH_SIZE, queued, **keras_environment),
        "resident": train(kind="resident"),
        "matrix product": train(kind="matrix_product"),
    }
    # Where oneDNN is limited to older instructions, operations in bfloat16 end the process.
    if tensorflow_v1.find_bfloat16_support() == "native" and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        contenders["16 bits"] = train("--use_fp16")
    seconds = time_steps(contenders)

    for name, numerator, denominator in (
        ("training (baseline without oneDNN = 1)", "baseline without oneDNN", "float32"),
        ("training (baseline with oneDNN = 1)", "baseline", "float32"),
        ("training (Keras 3 with oneDNN = 1)", "Keras", "float32"),
        ("training, `--use_fp16` (baseline with oneDNN = 1)", "baseline", "16 bits"),
    ):
        if denominator in seconds:
            print_row(name, turns.ratios(seconds[numerator], seconds[denominator]))
    arithmetic = BATCH_SIZE * MFLOP_PER_IMAGE * 1e6 / (2 * MATRIX_SIZE**3)  # in matrix products
    ratios = turns.ratios(seconds.pop("matrix product"), seconds["resident"])
    print_row(
        "step on a resident batch (its direct arithmetic = 1)",
        [arithmetic * ratio for ratio in ratios],
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
    default = {"TF_ENABLE_ONEDNN_OPTS": "1" if onednn_is_default else "0"}
    settings = {"fast": ("--fast_ops=true", {}), "baseline": ("--fast_ops=false", default)}

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

    print_row("time to evaluate 10,000 images (baseline = 1)", ratios(evaluate, 0))
    print_row("time to step 0 (baseline = 1)", ratios(train, 0))
    print_row("peak memory of training (baseline = 1)", ratios(train, 1))


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
        f"{os.cpu_count()} x {tensorflow_v1.find_processor_name()}, "
        f"Python {platform.python_version()}, TensorFlow {tf.version.VERSION}, batch {BATCH_SIZE}"
    )


def compare_speed():
    """Prints the table of this project, the baseline and Keras."""
    instructions = find_onednn_instructions()
    onednn_is_default = "DL Boost" in instructions  # AVX512_VNNI, AVX512_BF16, AMX or AVX_VNNI
    turns_of_processes = f"{FLAGS.process_turns} for whole processes"
    print(f"{describe_machine()}, median of {FLAGS.turns} turns ({turns_of_processes})")
    print(
        f"oneDNN with {instructions}; TensorFlow's default: {'on' if onednn_is_default else 'off'}"
    )
    print("The last three rows use that default for the baseline; smaller is better there.\n")
    print_header("median", "range")
    with tempfile.TemporaryDirectory() as data_dir:
        folder = prepare_dataset(data_dir)
        shared_flags = [
            f"--data_dir={data_dir}",
            "--synthetic_data",
            f"--batch_size={BATCH_SIZE}",
            f"--min_fraction_of_examples_in_queue={FLAGS.min_fraction_of_examples_in_queue}",
        ]
        throughput = compare_training(folder, shared_flags)
        if FLAGS.process_turns:
            compare_processes(data_dir, shared_flags, onednn_is_default)
    listed = ", ".join(f"{name} {speed:.0f}" for name, speed in throughput.items())
    print(f"\nThroughput in images per second: {listed}.")


def find_final_loss(seed, fast_ops):
    """Trains, and returns the mean loss of the last steps."""
    with tf.Graph().as_default(), flagsaver.flagsaver(fast_ops=fast_ops):
        tf.set_random_seed(seed)
        global_step = tf.train.get_or_create_global_step()
        images, labels = cifar10.distorted_inputs()
        loss = cifar10.loss(cifar10.inference(images), labels)
        train_op = cifar10.train(loss, global_step)
        config = tensorflow_v1.session_config(FLAGS.use_fp16)
        with tf.train.SingularMonitoredSession(config=config) as session:
            losses = [float(session.run([loss, train_op])[0]) for _ in range(FLAGS.loss_steps)]
    return statistics.mean(losses[-AVERAGED_STEPS:])


def compare_losses():
    """Prints the table of the losses with and without the faster operations."""
    cifar10.maybe_download_and_extract()
    losses = {"baseline": [], "fast": []}
    for seed in range(FLAGS.seeds):
        for name, results in losses.items():
            results.append(find_final_loss(seed, fast_ops=name == "fast"))
    print_header("mean loss", "standard deviation", "each seed")
    for name, results in losses.items():
        mean, deviation = statistics.mean(results), statistics.stdev(results)
        each = ", ".join(f"{loss:.3f}" for loss in results)
        print(f"| {name} | {mean:.3f} | {deviation:.3f} | {each} |")


def compare_top_layers():
    """Prints the time of a step with locally connected layers."""
    print(f"{describe_machine()}, {FLAGS.turns} turns\n")
    kinds = ("full", "local")
    arguments = (CONTENDER, "resident", "--synthetic_data")
    seconds = time_steps(
        {kind: turns.Contender(*arguments, f"--top_layers={kind}") for kind in kinds}
    )
    print_header("median", "range")
    ratios = turns.ratios(seconds["local"], seconds["full"])
    print_row("time of a step, local layers (full = 1)", ratios)


COMPARISONS = {"speed": compare_speed, "losses": compare_losses, "top_layers": compare_top_layers}


def main(argv):
    name, *others = argv[1:] or ["speed"]
    if others or name not in COMPARISONS:
        raise app.UsageError(f"specify one of {', '.join(COMPARISONS)}, not {' '.join(argv[1:])!r}")
    COMPARISONS[name]()


if __name__ == "__main__":
    command_line.run(main, takes_arguments=True)
