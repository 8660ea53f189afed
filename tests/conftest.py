"""What several test modules need: record files, fresh graphs, batches from queues."""

import contextlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import numpy_model
import pytest
from absl import flags
from absl.testing import flagsaver

import cifar10_data

ROOT = pathlib.Path(__file__).parent.parent


def make_records(count, seed=0, num_classes=10):
    """Returns `count` records of random pixels with labels in turn: uint8 [count, 3073]."""
    records = np.random.default_rng(seed).integers(0, 256, [count, 3073]).astype(np.uint8)
    records[:, 0] = np.arange(count) % num_classes
    return records


def draw_patches(records, generator):
    """Replaces noise, which averages out in the layers, by patches that tell images apart."""
    patches = generator.integers(0, 256, [len(records), 3, 4, 4])
    records[:, 1:] = patches.repeat(8, axis=2).repeat(8, axis=3).reshape(len(records), -1)


def write_data_set(folder, train_counts=(3, 4, 5, 6, 7), test_count=11, class_names=None):
    """Writes six record files and returns the training and the test records."""
    folder.mkdir(parents=True, exist_ok=True)
    num_classes = 10
    if class_names is not None:
        num_classes = len(class_names)
        cifar10_data.write_class_names(folder, class_names)
    train = []
    for number, count in enumerate(train_counts, start=1):
        train.append(make_records(count, number, num_classes))
        train[-1].tofile(folder / f"data_batch_{number}.bin")
    test = make_records(test_count, 99, num_classes)
    test.tofile(folder / "test_batch.bin")
    return np.concatenate(train), test


def pixels(records):
    """Returns the images of records as they are seen: uint8 [n, 32, 32, 3]."""
    images = np.empty([len(records), 32, 32, 3], np.uint8)
    for channel in range(3):
        start = 1 + channel * 1024
        images[..., channel] = records[:, start : start + 1024].reshape(-1, 32, 32)
    return images


def standardized_centers(records, size=24):
    """Returns the evaluation images of records, by NumPy in float64: [n, size, size, 3]."""
    start = (32 - size) // 2
    images = pixels(records)[:, start : start + size, start : start + size].astype(np.float64)
    means = images.mean(axis=(1, 2, 3), keepdims=True)
    least = 1 / np.sqrt(size * size * 3)
    deviations = np.maximum(images.std(axis=(1, 2, 3), keepdims=True), least)
    return (images - means) / deviations


@contextlib.contextmanager
def running_queues():
    """Gives a session on the default graph with its queue threads running."""
    from cifar10_runtime import quiet_cancellation, session_config, tf

    with tf.Session(config=session_config()) as session:
        session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        coordinator = tf.train.Coordinator()
        threads = tf.train.start_queue_runners(session, coordinator)
        try:
            yield session
        finally:
            with quiet_cancellation():
                coordinator.request_stop()
                coordinator.join(threads)


def all_batches(session, fetches):
    """Runs `fetches` until the input ends; returns the list of results."""
    from cifar10_runtime import tf

    results = []
    with contextlib.suppress(tf.errors.OutOfRangeError):
        while True:
            results.append(session.run(fetches))
    return results


RAW, AVERAGED = 14, 12  # seeds of the variables and of their moving averages


def save_checkpoint(checkpoint_dir, step, settings=None):
    """Saves a checkpoint with different values in the variables and in their averages.

    With the `cifar10_settings.Settings` it has been trained for; without, as the original tutorial.
    """
    import cifar10_settings
    from cifar10_runtime import tf

    checkpoint_dir = pathlib.Path(checkpoint_dir)
    checkpoint_dir.mkdir(exist_ok=True)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.get_variable("global_step", initializer=np.int64(step))
        num_classes = 10
        if settings is not None:
            cifar10_settings.note_settings(settings)
            num_classes = len(settings.class_names)
        raw = numpy_model.random_variables(RAW, num_classes)
        averaged = numpy_model.random_variables(AVERAGED, num_classes)
        for name in raw:
            tf.get_variable(name, initializer=raw[name])
            tf.get_variable(f"{name}/ExponentialMovingAverage", initializer=averaged[name])
        session.run(tf.global_variables_initializer())
        return tf.train.Saver().save(session, str(checkpoint_dir / "model.ckpt"), step)


def run_script(*arguments, check=True, timeout=120):
    """Runs a script as its user does; returns the completed process with its output as text."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert process.returncode == 0, process.stdout + process.stderr
    return process


@pytest.fixture(autouse=True)
def flags_are_restored(tmp_path):
    with flagsaver.flagsaver():
        if "data_dir" in flags.FLAGS:  # or a test would see what its user has there
            flags.FLAGS.data_dir = str(tmp_path / "no_data")
        yield


@pytest.fixture
def graph():
    """A graph of the test's own, as the default one."""
    from cifar10_runtime import tf

    with tf.Graph().as_default() as graph:
        tf.set_random_seed(1)
        yield graph


@pytest.fixture(scope="session")
def synthetic_data_dir(tmp_path_factory):
    """A `--data_dir` that holds the synthetic stand-in."""
    data_dir = tmp_path_factory.mktemp("data")
    cifar10_data.maybe_generate_synthetic(data_dir)
    return data_dir
