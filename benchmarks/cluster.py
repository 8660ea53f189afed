"""Measures the cost of synchronization: N workers of a cluster against N towers of one process.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --workers=2 --cluster_turns=1      # a quick look

A cluster is a parameter server and N workers, each a process on this machine. Both trainers process
128 images a step. They take turns, and the first WARM_UP_STEPS of a turn are not timed. The
benchmark takes about six minutes on two cores.

It also counts the bytes on the loopback interface, which nothing else should use meanwhile. It runs
on Linux only.
"""

import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import compare
from absl import flags

from support.base import command_line, options
from support.base.errors import UserError
from support.data import synthetic

FLAGS = flags.FLAGS

flags.DEFINE_list("workers", ["1", "2", "4"], "Numbers of workers and towers to compare.")
options.DEFINE_integer("cluster_turns", 3, "Number of turns of each trainer.", lower_bound=1)
options.DEFINE_integer("cluster_steps", 80, "Number of steps in a turn.", lower_bound=40)

WARM_UP_STEPS = 20
PARAMETER_BYTES = 4 * 1_068_298  # size of all variables; all gradients have the same size


def find_free_addresses(count):
    """Returns loopback addresses whose ports are free."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def read_loopback_bytes():
    """Returns the number of bytes that the loopback interface has transferred since boot."""
    with open("/sys/class/net/lo/statistics/rx_bytes") as file:
        return int(file.read())


def measure(commands, train_dir):
    """Trains with one or more processes.

    Args:
      commands: list of (arguments, environment variables), one per process. The first process
        writes the metrics.
      train_dir: folder of the metrics.

    Returns:
      (float, float): images per second, and bytes on the loopback interface per step.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=compare.ROOT,
            env={**os.environ, **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments, variables in commands
    ]
    try:
        samples = sample_steps(processes[0], train_dir / "metrics.jsonl")
        for process in processes:
            _, errors = process.communicate()
            if process.returncode:
                raise UserError(f"a trainer failed: {errors.strip().splitlines()[-1]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    first, last = min(step for step in samples if step >= WARM_UP_STEPS), max(samples)
    (start, bytes_before), (end, bytes_after) = samples[first], samples[last]
    steps = last - first
    return steps * compare.BATCH_SIZE / (end - start), (bytes_after - bytes_before) / steps


def sample_steps(process, metrics):
    """Follows the metrics of a process until it ends.

    Returns:
      dict from a step to (float, int): when it ended, in seconds since 1970, and how many bytes the
      loopback interface had transferred by then.
    """
    samples = {}
    while process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and lines[-1].endswith("}"):  # the line is complete
            last = json.loads(lines[-1])
            samples.setdefault(last["step"], (last["time"], read_loopback_bytes()))
        time.sleep(0.02)
    return samples


def make_commands(kind, count, shared_flags):
    """Returns the commands, for `measure`, that train with `count` workers or towers."""
    arguments = [*shared_flags, f"--batch_size={compare.BATCH_SIZE // count}"]
    if kind == "towers":
        return [(["cifar10_multi_gpu_train.py", *arguments, f"--num_gpus={count}"], {})]
    server, *workers = find_free_addresses(1 + count)
    cluster = {"ps": [server], "worker": workers}
    commands = []
    for type_, index in [*(("worker", index) for index in range(count)), ("ps", 0)]:
        task = {"cluster": cluster, "task": {"type": type_, "index": index}}
        commands.append((["cifar10_train.py", *arguments], {"TF_CONFIG": json.dumps(task)}))
    return commands


def print_row(count, workers, towers):
    """Prints a row of the table from the results of `measure`, one per turn."""
    ratios = [worker[0] / tower[0] for worker, tower in zip(workers, towers, strict=True)]
    # Each worker sends its gradients and fetches the variables.
    required_bytes = count * 2 * PARAMETER_BYTES
    print(
        f"| {count} | {statistics.median(throughput for throughput, _ in towers):.0f} "
        f"| {statistics.median(throughput for throughput, _ in workers):.0f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {statistics.median(size for _, size in workers) / 1e6:.2f} "
        f"| {required_bytes / 1e6:.2f} |",
        flush=True,
    )


def main(argv=None):
    counts = [int(count) for count in FLAGS.workers]
    print(f"{compare.describe_machine()} a step, median of {FLAGS.cluster_turns} turns\n")
    results = {(count, kind): [] for count in counts for kind in ("workers", "towers")}
    with tempfile.TemporaryDirectory() as folder:
        synthetic.maybe_generate(folder)
        shared_flags = [
            "--synthetic_data",
            f"--data_dir={folder}",
            f"--max_steps={FLAGS.cluster_steps}",
            "--log_frequency=5",
            "--save_summaries_steps=0",
            "--min_fraction_of_examples_in_queue=0.05",
        ]
        for turn in range(FLAGS.cluster_turns):
            for (count, kind), measurements in results.items():
                train_dir = pathlib.Path(folder) / f"{kind}_{count}_{turn}"
                commands = make_commands(kind, count, [*shared_flags, f"--train_dir={train_dir}"])
                measurements.append(measure(commands, train_dir))
    print("| | towers, images/s | workers, images/s | ratio | MB per step | required |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in counts:
        print_row(count, results[count, "workers"], results[count, "towers"])


if __name__ == "__main__":
    command_line.run(main)
