"""What synchronization costs: workers of a cluster on this machine against as many towers.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --workers=2 --cluster_turns=1      # a quick look

Takes about six minutes on two cores. Each cluster is a parameter server and N workers on loopback,
each a process; against it, one process with N towers. All work on 128 images a step. They take
turns; the first WARM_UP_STEPS do not count. The bytes are those that the loopback interface carries
meanwhile, so nothing else should use it. (Linux only.)
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

BENCHMARKS = pathlib.Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS.parent))

import compare  # noqa: E402
from absl import flags  # noqa: E402

import cifar10_data  # noqa: E402
from cifar10_runtime import UserError, run  # noqa: E402

FLAGS = flags.FLAGS

flags.DEFINE_list("workers", ["1", "2", "4"], "Numbers of workers, and of towers.")
flags.DEFINE_integer("cluster_turns", 3, "Turns that each takes.", lower_bound=1)
flags.DEFINE_integer("cluster_steps", 80, "Steps of a turn.", lower_bound=40)

WARM_UP_STEPS = 20
PARAMETER_BYTES = 4 * 1_068_298  # the variables, or their gradients


def find_free_addresses(count):
    """Returns addresses on loopback whose ports are free."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def read_loopback_bytes():
    """Returns how many bytes the loopback interface has carried."""
    with open("/sys/class/net/lo/statistics/rx_bytes") as file:
        return int(file.read())


def measure(commands, train_dir, batch_size):
    """Runs a training of one or more processes.

    Args:
      commands: list of (arguments, environment variables); the first is the one that logs.
      train_dir: where it logs.
      batch_size: int; images per step, over all processes.

    Returns:
      Images per second, and bytes on the loopback interface per step.
    """
    metrics = train_dir / "metrics.jsonl"
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=BENCHMARKS.parent,
            env={**os.environ, **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments, variables in commands
    ]
    try:
        return _sample(processes, metrics, batch_size)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _sample(processes, metrics, batch_size):
    samples = {}  # of each step that has been logged: when, and the bytes until then
    while processes[0].poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and lines[-1].endswith("}"):
            last = json.loads(lines[-1])
            samples.setdefault(last["step"], (last["time"], read_loopback_bytes()))
        time.sleep(0.02)
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            raise UserError(f"a process has failed: {errors.strip().splitlines()[-1]}")
    first = min(step for step in samples if step >= WARM_UP_STEPS)
    last = max(samples)
    (start, bytes_before), (end, bytes_after) = samples[first], samples[last]
    return (
        (last - first) * batch_size / (end - start),
        (bytes_after - bytes_before) / (last - first),
    )


def run_cluster(count, shared, train_dir):
    """Measures a cluster of `count` workers; see `measure`."""
    addresses = find_free_addresses(1 + count)
    cluster = {"ps": addresses[:1], "worker": addresses[1:]}
    tasks = [("worker", index) for index in range(count)] + [("ps", 0)]
    arguments = [
        "cifar10_train.py",
        *shared,
        f"--batch_size={compare.BATCH_SIZE // count}",
        f"--train_dir={train_dir}",
    ]
    commands = []
    for type_, index in tasks:
        task = {"cluster": cluster, "task": {"type": type_, "index": index}}
        commands.append((arguments, {"TF_CONFIG": json.dumps(task)}))
    return measure(commands, train_dir, compare.BATCH_SIZE)


def run_towers(count, shared, train_dir):
    """Measures one process with `count` towers; see `measure`."""
    arguments = [
        "cifar10_multi_gpu_train.py",
        *shared,
        f"--num_gpus={count}",
        f"--batch_size={compare.BATCH_SIZE // count}",
        f"--train_dir={train_dir}",
    ]
    return measure([(arguments, {})], train_dir, compare.BATCH_SIZE)


def main():
    counts = [int(count) for count in FLAGS.workers]
    print(f"{compare.describe_machine()} a step, median of {FLAGS.cluster_turns} turns\n")
    with tempfile.TemporaryDirectory() as folder:
        cifar10_data.maybe_generate_synthetic(folder)
        shared = [
            "--synthetic_data",
            f"--data_dir={folder}",
            f"--max_steps={FLAGS.cluster_steps}",
            "--log_frequency=5",
            "--save_summaries_steps=0",
            "--min_fraction_of_examples_in_queue=0.05",
        ]
        figures = {}
        for turn in range(FLAGS.cluster_turns):
            for count in counts:
                for name, measure_one in (("workers", run_cluster), ("towers", run_towers)):
                    train_dir = pathlib.Path(folder) / f"{name}_{count}_{turn}"
                    figures.setdefault((name, count), []).append(
                        measure_one(count, shared, train_dir)
                    )
    print("| | towers, images/s | workers, images/s | ratio | MB per step | needed |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in counts:
        workers, towers = figures["workers", count], figures["towers", count]
        ratios = [own[0] / other[0] for own, other in zip(workers, towers, strict=True)]
        print(
            f"| {count} | {statistics.median(speed for speed, _ in towers):.0f} "
            f"| {statistics.median(speed for speed, _ in workers):.0f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {statistics.median(size for _, size in workers) / 1e6:.2f} "
            # Each worker sends its gradients, and fetches the variables.
            f"| {count * 2 * PARAMETER_BYTES / 1e6:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
