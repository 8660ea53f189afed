"""Helpers shared by the tests: record files, fresh graphs, batches from queues, script runs."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import types

import numpy as np
import numpy_model
import pytest
from absl import flags
from absl.testing import flagsaver

from support.data import dataset, synthetic

ROOT = pathlib.Path(__file__).parent.parent

# Shells start background jobs with SIGINT ignored, and nohup ignores SIGHUP. The scripts that the
# tests start would inherit that and never receive the signals that the tests send. A handler is not
# inherited. This one does nothing, so pytest itself still ignores the signals.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)

# TensorFlow 2.21 prints these lines when it is imported, and no environment variable suppresses
# them.
START_UP_NOTICES = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\) .*|I0000 .*"
)

# For the scripts that a TF_CONFIG in the environment does not concern.
TF_CONFIGS = [
    "{",
    '{"cluster": {"ps": ["a:1"], "chief": ["b:1"]}, "task": {"type": "chief", "index": 0}}',
    '{"cluster": {"ps": ["a:1"], "chief": ["b:1"]}, "task": {"type": "evaluator", "index": 0}}',
]


def make_records(count, seed=0, num_classes=10):
    """Returns records of random pixels, with labels 0, 1, 2 and so on: uint8 [count, 3073]."""
    records = np.random.default_rng(seed).integers(0, 256, [count, 3073]).astype(np.uint8)
    records[:, 0] = np.arange(count) % num_classes
    return records


def draw_patches(records, seed=0):
    """Replaces the pixels with random patches of 8 x 8 pixels.

    Noise averages out in the layers of the model; patches give different predictions.
    """
    patches = np.random.default_rng(seed).integers(0, 256, [len(records), 3, 4, 4])
    records[:, 1:] = patches.repeat(8, axis=2).repeat(8, axis=3).reshape(len(records), -1)


def write_dataset(
    folder, train_counts=(3, 4, 5, 6, 7), test_count=11, class_names=None, patches=False
):
    """Writes six record files of noise, or of patches; returns the training and test records."""
    folder.mkdir(parents=True, exist_ok=True)
    if class_names is not None:
        dataset.write_class_names(folder, class_names)
    parts = []
    for number, count in enumerate([*train_counts, test_count], start=1):
        parts.append(make_records(count, number, len(class_names or dataset.CLASS_NAMES)))
        if patches:
            draw_patches(parts[-1], number)
        is_test = number > len(train_counts)
        parts[-1].tofile(folder / ("test_batch.bin" if is_test else f"data_batch_{number}.bin"))
    return np.concatenate(parts[:-1]), parts[-1]


def pixels(records):
    """Returns the images of records with the channels last: uint8 [n, 32, 32, 3]."""
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def standardized_centers(records, size=24):
    """Returns the evaluation images of records, computed in float64: [n, size, size, 3]."""
    start = (32 - size) // 2
    images = pixels(records)[:, start : start + size, start : start + size].astype(np.float64)
    means = images.mean(axis=(1, 2, 3), keepdims=True)
    least = 1 / np.sqrt(size * size * 3)
    deviations = np.maximum(images.std(axis=(1, 2, 3), keepdims=True), least)
    return (images - means) / deviations


@contextlib.contextmanager
def running_queues():
    """Yields a session on the default graph with its queue threads running."""
    from support.ops.tensorflow_v1 import session_config, tf

    with tf.Session(config=session_config()) as session:
        session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        coordinator = tf.train.Coordinator()
        threads = tf.train.start_queue_runners(session, coordinator)
        try:
            yield session
        finally:
            coordinator.request_stop()
            coordinator.join(threads)


def find_example_queue():
    """Returns the operation of the training queue."""
    from support.ops.tensorflow_v1 import tf

    (queue,) = [
        operation
        for operation in tf.get_default_graph().get_operations()
        if operation.type == "RandomShuffleQueueV2"
        and operation.get_attr("component_types") == [tf.float32, tf.int32]
    ]
    return queue


def all_batches(session, fetches, limit=None):
    """Runs `fetches` until the input ends, at most `limit` times; returns the list of results."""
    from support.ops.tensorflow_v1 import tf

    results = []
    with contextlib.suppress(tf.errors.OutOfRangeError):
        while len(results) != limit:
            results.append(session.run(fetches))
    return results


def read_events(folder):
    """Returns the events of all files in a folder, in the order in which TensorBoard reads them."""
    from support.ops.tensorflow_v1 import tf

    paths = sorted(map(str, pathlib.Path(folder).glob("events.out.tfevents.*")))
    return [event for path in paths for event in tf.train.summary_iterator(path)]


def written_values(folder):
    """Returns (step, tag, number) of each summary in the event files of a folder."""
    return [
        (event.step, value.tag, value.simple_value)
        for event in read_events(folder)
        for value in event.summary.value
    ]


def written_scopes(folder):
    """Returns the outermost scopes of the graph in the event files of a folder."""
    from support.ops.tensorflow_v1 import tf

    (graph,) = [event.graph_def for event in read_events(folder) if event.HasField("graph_def")]
    return {node.name.split("/")[0] for node in tf.GraphDef.FromString(graph).node}


def written_nodes(folder):
    """Returns the default graph's nodes in TensorBoard, by name; checks that all inputs exist."""
    from support.ops import summaries
    from support.ops.tensorflow_v1 import tf

    with summaries.Writer(folder, "--train_dir") as writer:
        writer.add_graph(tf.get_default_graph())
    (path,) = folder.iterdir()
    _, event = tf.train.summary_iterator(str(path))
    graph = tf.GraphDef.FromString(event.graph_def)
    assert not graph.library.function
    nodes = {node.name: node for node in graph.node}
    inputs = {each for node in graph.node for each in node.input}
    assert {each.removeprefix("^").partition(":")[0] for each in inputs} <= nodes.keys()
    return nodes


RAW, AVERAGED = 14, 12  # seeds of the variables and of their moving averages


def save_checkpoint(checkpoint_dir, step, settings=None):
    """Saves a checkpoint whose variables differ from their moving averages; returns its path.

    Without `settings`, a `TrainingSettings`, the checkpoint records none, like those of
    the original tutorial.
    """
    from support.ops.tensorflow_v1 import tf
    from support.run import checkpoints

    checkpoint_dir = pathlib.Path(checkpoint_dir)
    checkpoint_dir.mkdir(exist_ok=True)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.get_variable("global_step", initializer=np.int64(step))
        num_classes = 10
        if settings is not None:
            checkpoints.record_settings(settings)
            num_classes = len(settings.class_names)
        raw = numpy_model.random_variables(RAW, num_classes)
        averaged = numpy_model.random_variables(AVERAGED, num_classes)
        for name in raw:
            tf.get_variable(name, initializer=raw[name])
            tf.get_variable(f"{name}/ExponentialMovingAverage", initializer=averaged[name])
        session.run(tf.global_variables_initializer())
        return tf.train.Saver().save(session, str(checkpoint_dir / "model.ckpt"), step)


def free_addresses(count):
    """Returns loopback addresses whose ports are free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def listen(address):
    """Returns a socket that listens at an address, as the server of a task does."""
    host, _, port = address.rpartition(":")
    return socket.create_server((host, int(port)))


def script_environment():
    """Returns the environment for scripts: no GPU, and nothing that the user or a test has set."""
    settings = ("TF_CONFIG", "TF_CPP_MIN_LOG_LEVEL")  # importing TensorFlow sets the second one
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    return {**kept, "CUDA_VISIBLE_DEVICES": "-1"}


def _process_options(options):
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return {"cwd": ROOT, "env": script_environment(), "text": True, **pipes, **options}


def run_script(*arguments, check=True, timeout=200, **options):
    """Runs a script in a process of its own; returns the completed process with text output.

    `options` are those of `subprocess.run`.
    """
    command = [sys.executable, *map(str, arguments)]
    options = _process_options(options)
    process = subprocess.run(command, timeout=timeout, check=False, **options)
    if check:
        assert process.returncode == 0, process.stdout + process.stderr
    return process


@contextlib.contextmanager
def running_script(*arguments, timeout=200, **options):
    """Starts a script with pipes for its text output, and yields the `subprocess.Popen`.

    The script is killed at the end of the `with` block, or after `timeout` seconds: reading a line
    of its output has no time limit of its own. `options` are those of `subprocess.Popen`.
    """
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, **_process_options(options)) as process:
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


@contextlib.contextmanager
def lost_stream(kind="pipe"):
    """Yields a text stream that cannot be written.

    Args:
      kind: "pipe" (its reader has exited), "terminal" (it is gone) or "disk" (it is full).
    """
    if kind == "disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        other_end, descriptor = os.pipe() if kind == "pipe" else os.openpty()
        os.close(other_end)
    with open(descriptor, "w") as stream:
        yield stream


@pytest.fixture
def write_script(tmp_path):
    """Writes a Python file into a folder of its own, and returns its path."""

    def write(code, name="script.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(code).lstrip())
        return path

    return write


def file_environment():
    """Returns the environment for scripts outside the project's folder, with buffered output."""
    return {**script_environment(), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}


def run_file(path, *arguments, **options):
    """Runs a script; returns its exit code, its stdout and its stderr."""
    options = {"cwd": None, "env": file_environment(), "timeout": 60, **options}
    process = run_script(path, *arguments, check=False, **options)
    return process.returncode, process.stdout, process.stderr


def run_in_shell(command, timeout=60, **options):
    """Runs a command of bash; returns its exit code, its stdout and its stderr."""
    options = _process_options({"env": file_environment(), **options})
    command = ["bash", "-c", command]
    process = subprocess.run(command, timeout=timeout, check=False, **options)
    return process.returncode, process.stdout, process.stderr


@contextlib.contextmanager
def running_file(path, *arguments):
    """Starts a script, waits for its first line, and yields the `subprocess.Popen`."""
    options = {"cwd": None, "env": file_environment(), "timeout": 60}
    with running_script(path, *arguments, **options) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


def messages(stderr):
    """Returns the lines of a script's stderr, without TensorFlow's own start-up notices."""
    return [line for line in stderr.splitlines() if not START_UP_NOTICES.fullmatch(line)]


@pytest.fixture
def set_time(monkeypatch):
    """A function that sets the time in seconds, 0 at first, for the timeouts of a cluster.

    Sleeping advances that time at once.
    """
    from support.cluster import server

    clock = types.SimpleNamespace(now=0.0)

    def set_time(seconds):
        clock.now = seconds

    clock.monotonic = lambda: clock.now
    clock.sleep = lambda seconds: set_time(clock.now + seconds)
    monkeypatch.setattr(server, "time", clock)
    return set_time


@pytest.fixture(autouse=True)
def flags_are_restored(tmp_path):
    with flagsaver.flagsaver():
        if "data_dir" in flags.FLAGS:  # not the user's own dataset
            flags.FLAGS.data_dir = str(tmp_path / "no_data")
        yield


@pytest.fixture(params=[True, False], ids=["fast", "reference"])
def fast_ops(request):
    """Runs a test with the fast operations and with those of the tutorial."""
    flags.FLAGS.fast_ops = request.param
    return request.param


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that TensorFlow's logger receives."""
    from support.ops.tensorflow_v1 import tf

    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    return warnings


@pytest.fixture
def graph():
    """A new default graph with a fixed seed."""
    from support.ops.tensorflow_v1 import tf

    with tf.Graph().as_default() as graph:
        tf.set_random_seed(1)
        yield graph


@pytest.fixture(scope="session")
def synthetic_data_dir(tmp_path_factory):
    """A `--data_dir` that holds the synthetic dataset."""
    data_dir = tmp_path_factory.mktemp("data")
    synthetic.maybe_generate(data_dir)
    return data_dir
