"""Tests of training on one device in this process. test_end_to_end.py runs the scripts."""

import json
import os
import platform

import pytest
from conftest import read_events, write_dataset, written_scopes

import cifar10
import cifar10_multi_gpu_train
import cifar10_train
from support.base.worker import ALONE
from support.data import dataset
from support.ops import tensorflow_v1
from support.ops.tensorflow_v1 import (
    computes_in_16_bits,
    find_bfloat16_support,
    session_config,
    tf,
)
from support.run import checkpoints, training_run

FLAGS = cifar10_train.FLAGS


@pytest.fixture
def small_run(tmp_path):
    """A function that trains a few steps on a small dataset and returns the lines of metrics."""
    FLAGS.data_dir = str(tmp_path / "data[1] ?*猫")
    write_dataset(tmp_path / FLAGS.data_dir / dataset.EXTRACTED_FOLDER, train_counts=[40] * 5)
    FLAGS.batch_size = 4
    FLAGS.log_frequency = 1
    FLAGS.min_fraction_of_examples_in_queue = 0.001
    FLAGS.num_preprocess_threads = 1

    def train(name, seed, max_steps=6, trainer=cifar10_train):
        FLAGS.train_dir = str(tmp_path / name)
        FLAGS.seed = seed
        FLAGS.max_steps = max_steps
        trainer.train()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return train


# Flags.


@pytest.fixture
def stopped_run(tmp_path, monkeypatch):
    """Flags for a run on a small dataset that is interrupted before the graph; its arguments."""
    write_dataset(tmp_path)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.train_dir = str(tmp_path / "train")
    FLAGS.num_gpus = 3
    arguments = []

    class Run(training_run.TrainingRun):
        def __init__(self, *given):
            arguments.extend(given)
            super().__init__(*given)

        def graph(self, seed):
            arguments.append(seed)
            raise KeyboardInterrupt

    for trainer in (cifar10_train, cifar10_multi_gpu_train):
        monkeypatch.setattr(trainer, "TrainingRun", Run)
    return arguments


@pytest.mark.parametrize(
    ("trainer", "examples_per_step", "worker"),
    [(cifar10_train, 4, [ALONE]), (cifar10_multi_gpu_train, 12, [])],
    ids=["single", "multi"],
)
def test_the_training_session_gets_the_flags(stopped_run, trainer, examples_per_step, worker):
    FLAGS.batch_size = 4
    FLAGS.use_fp16 = True
    values = {
        "max_steps": 17,
        "log_frequency": 3,
        "save_checkpoint_secs": 5,
        "save_checkpoint_steps": 6,
        "max_checkpoints_to_keep": 7,
        "save_summaries_steps": 8,
        "save_histograms_steps": 9,
    }
    for name, value in {**values, "seed": 99, "log_device_placement": True}.items():
        setattr(FLAGS, name, value)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    options, settings, *rest = stopped_run
    assert rest == [*worker, 99]
    assert options._replace(check_input=None, flags=None) == training_run.Options(
        FLAGS.train_dir,
        **values,
        config=session_config(use_fp16=True, log_device_placement=True),
        check_input=None,
    )
    options.check_input()
    assert options.flags["max_steps"] == 17
    assert settings == cifar10.training_settings(examples_per_step=examples_per_step)


@pytest.mark.parametrize(
    ("trainer", "num_found", "beginning"),
    [
        (cifar10_train, 4, "1 of 4 GPUs is used; "),
        (cifar10_multi_gpu_train, 4, "3 of 4 GPUs are used; "),
        (cifar10_multi_gpu_train, 2, "--num_gpus=3, but TensorFlow finds 2 GPU(s): "),
    ],
)
def test_gpus_that_stay_unused_or_are_shared_are_reported(
    stopped_run, monkeypatch, warnings, trainer, num_found, beginning
):
    monkeypatch.setattr(tensorflow_v1, "GPUS", ["a GPU"] * num_found)
    with pytest.raises(KeyboardInterrupt):
        trainer.main()
    (warning,) = warnings
    assert warning.startswith(beginning)


# Training.


@pytest.mark.parametrize("fast_ops", [True, False])
def test_the_seed_determines_every_loss_if_one_thread_reads(small_run, fast_ops):
    FLAGS.fast_ops = fast_ops
    first, again = ([line["loss"] for line in small_run(n, 5)] for n in ("first", "again"))
    assert len(first) == 6
    assert first == again


@pytest.fixture
def seen_images(monkeypatch):
    """Replaces the model by a single layer; the images of each step, as a list that grows."""
    seen = []

    def inference(images):
        def record(batch):
            seen.append({hash(image.tobytes()) for image in batch})
            return batch

        batch = tf.ensure_shape(tf.py_func(record, [images], tf.float32), images.shape)
        features = tf.stop_gradient(tf.reshape(batch, [-1, 24 * 24 * 3]))
        weights = tf.get_variable("weights", [24 * 24 * 3, 10], initializer=tf.zeros_initializer())
        return tf.matmul(features, weights)

    monkeypatch.setattr(cifar10, "inference", inference)
    return seen


@pytest.mark.parametrize("fast_ops", [True, False])
def test_a_resumed_run_with_a_seed_sees_new_images(small_run, seen_images, fast_ops):
    FLAGS.fast_ops = fast_ops
    small_run("run", 1, max_steps=5)
    small_run("run", 1, max_steps=10)
    interrupted = list(seen_images)
    assert len(interrupted) == 10
    assert set.union(*interrupted[:5]).isdisjoint(set.union(*interrupted[5:]))

    seen_images.clear()
    small_run("again", 1, max_steps=5)
    small_run("again", 1, max_steps=10)
    assert seen_images == interrupted

    seen_images.clear()
    small_run("uninterrupted", 1, max_steps=10)
    assert seen_images[:5] == interrupted[:5]
    assert seen_images[5:] != interrupted[5:]


def test_the_schedule_counts_the_images_of_all_batch_sizes_and_towers(small_run, seen_images):
    FLAGS.num_epochs_per_decay = 0.1  # 20 of 200 images
    FLAGS.learning_rate_decay_factor = 0.5
    small_run("run", 1, max_steps=6)
    FLAGS.num_gpus = 2
    small_run("run", 1, max_steps=9, trainer=cifar10_multi_gpu_train)
    FLAGS.batch_size = 2
    lines = small_run("run", 1, max_steps=25)
    images_per_step = [4] * 6 + [8] * 3 + [2] * 16
    images_seen = [sum(images_per_step[:step]) for step in range(25)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [0.1 * 0.5 ** (seen // 20) for seen in images_seen]
    )
    newest = tf.train.latest_checkpoint(FLAGS.train_dir)
    assert checkpoints.read(newest).settings.images_seen(25) == sum(images_per_step) == 80


def train_one_step(use_fp16):
    """Trains one step; returns the loss and the types of the convolutions that ran."""
    FLAGS.use_fp16 = use_fp16
    with tf.Graph().as_default(), tf.Session(config=session_config(use_fp16)) as sess:
        images = tf.random.stateless_normal([4, 24, 24, 3], seed=[1, 2])
        tf.set_random_seed(1)
        total_loss = cifar10.loss(cifar10.inference(images), tf.range(4))
        train_op = cifar10.train(total_loss, tf.train.get_or_create_global_step())
        assert {variable.dtype for variable in tf.global_variables()} <= {tf.float32, tf.int64}
        sess.run(tf.global_variables_initializer())
        metadata = tf.RunMetadata()
        options = tf.RunOptions(output_partition_graphs=True)
        loss, _ = sess.run([total_loss, train_op], options=options, run_metadata=metadata)
        assert all(value.dtype == "float32" for value in sess.run(tf.trainable_variables()))
    dtypes = [
        tf.as_dtype(node.attr["T"].type)
        for graph in metadata.partition_graphs
        for node in graph.node
        if "Conv2D" in node.op
    ]
    # In 16 bits, two forward, two for the filters, one for the images; otherwise at least conv1's.
    assert len(dtypes) >= (5 if computes_in_16_bits(use_fp16) else 2)
    return loss, set(dtypes)


# TensorFlow computes in bfloat16 on some processors only.
rewrites_to_bfloat16 = (
    platform.system() == "Linux"
    and platform.machine() == "x86_64"
    and find_bfloat16_support() == "native"
    and os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1"
    and "ONEDNN_MAX_CPU_ISA" not in os.environ
)


def test_use_fp16_computes_in_16_bits_and_changes_the_loss_no_more_than_rounding():
    expected_loss, dtypes = train_one_step(use_fp16=False)
    assert dtypes == {tf.float32}
    loss, dtypes = train_one_step(use_fp16=True)
    assert loss == pytest.approx(expected_loss, rel=0.01)
    assert dtypes <= {tf.float32, tf.bfloat16, tf.float16}
    if rewrites_to_bfloat16:
        assert tf.bfloat16 in dtypes


# Summaries.

LAYERS = ("conv1", "conv2", "local3", "local4", "softmax_linear")
LOSSES = ("total_loss", "cross_entropy", "weight_decay/local3", "weight_decay/local4")
SCALARS = {
    *LOSSES,
    *(f"{loss}_raw" for loss in LOSSES),
    *(f"sparsity/{layer}" for layer in LAYERS),
    "learning_rate",
    "examples_per_sec",
    "queue/fraction_full",
}
HISTOGRAMS = {
    f"{kind}/{layer}{rest}"
    for layer in LAYERS
    for kind, rest in (
        ("activations", ""),
        ("weights", ""),
        ("biases", ""),
        ("gradients", "/weights"),
        ("gradients", "/biases"),
    )
}


@pytest.mark.parametrize("fast_ops", [True, False])
@pytest.mark.parametrize("num_gpus", [None, 2])
def test_tensorboard_gets_exactly_these_tags(small_run, tmp_path, num_gpus, fast_ops):
    FLAGS.save_summaries_steps = 1
    FLAGS.fast_ops = fast_ops
    trainer = cifar10_train
    if num_gpus:
        trainer = cifar10_multi_gpu_train
        FLAGS.num_gpus = num_gpus
    small_run("run", seed=1, max_steps=3, trainer=trainer)
    found = {"simple_value": set(), "histo": set(), "tensor": set()}
    for event in read_events(tmp_path / "run"):
        for value in event.summary.value:
            found[value.WhichOneof("value")].add(value.tag)
    of_queues = {tag for tag in found["simple_value"] if tag.startswith("distorted_inputs/")}
    assert len(of_queues) == 2  # TensorFlow adds one for each queue
    found["simple_value"] -= of_queues
    assert found == {"simple_value": SCALARS, "histo": HISTOGRAMS, "tensor": {"input"}}
    # TensorBoard's picture of the graph shows the layers, and few other scopes.
    scopes = written_scopes(tmp_path / "run")
    of_script = {"tower_0", "tower_1"} if num_gpus else {"pool1", "norm1", "norm2", "pool2"}
    assert {"distorted_inputs", "total_loss", "update", *LAYERS, *of_script} <= scopes
    if not num_gpus:
        assert len(scopes) < 30  # the session's operations would add dozens
        assert not [scope for scope in scopes if scope.startswith("Reshape")]
    # Functions would make TensorFlow look for GPUs, which prints an error where there is none.
    meta_graph = tf.MetaGraphDef.FromString((tmp_path / "run" / "model.ckpt-0.meta").read_bytes())
    functions = meta_graph.graph_def.library.function
    assert [function.signature.name for function in functions] == []
