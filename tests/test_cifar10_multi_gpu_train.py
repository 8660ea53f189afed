"""Tests of the towers: their devices, their shared variables and one synchronous step."""

import re

import numpy as np
import pytest
from conftest import TF_CONFIGS, write_dataset

import cifar10
import cifar10_multi_gpu_train
from support.base.errors import UserError
from support.data import dataset
from support.data.settings import TrainingSettings
from support.ops.tensorflow_v1 import session_config, tf
from support.run import training_run

pytestmark = pytest.mark.usefixtures("graph")

FLAGS = cifar10_multi_gpu_train.FLAGS


@pytest.fixture
def small_dataset(tmp_path):
    """A small dataset that the flags name."""
    write_dataset(tmp_path / dataset.EXTRACTED_FOLDER)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.min_fraction_of_examples_in_queue = 0.002


@pytest.fixture
def fixed_batch(monkeypatch):
    """Four fixed images instead of the training input."""
    images = np.random.default_rng(5).normal(0, 1, [4, 24, 24, 3]).astype(np.float32)
    labels = np.array([3, 1, 4, 1], np.int32)

    def distorted_inputs(batch_size):
        assert batch_size == 4
        return tf.constant(images), tf.constant(labels)

    monkeypatch.setattr(cifar10, "distorted_inputs", distorted_inputs)
    return images, labels


def test_gradients_are_averaged_over_the_towers():
    first, second = tf.get_variable("first", [2]), tf.get_variable("second", [])
    averages = cifar10_multi_gpu_train.average_gradients(
        [
            [(tf.constant([1.0, 2.0]), first), (tf.constant(-3.0), second)],
            [(tf.constant([5.0, 0.0]), first), (tf.constant(0.0), second)],
            [(tf.constant([0.0, 1.0]), first), (tf.constant(9.0), second)],
        ]
    )
    assert [variable for _, variable in averages] == [first, second]
    with tf.Session(config=session_config()) as sess:
        values = sess.run([gradient for gradient, _ in averages])
    np.testing.assert_allclose(values[0], [2.0, 1.0])
    np.testing.assert_allclose(values[1], 2.0)


def test_towers_that_do_not_train_a_variable_agree_that_it_has_no_gradient():
    first, second = tf.get_variable("first", [2]), tf.get_variable("second", [])
    tower = [(tf.constant([1.0, 2.0]), first), (None, second)]
    (_, trained), unused = cifar10_multi_gpu_train.average_gradients([tower, tower])
    assert trained is first
    assert unused == (None, second)


@pytest.mark.parametrize("fast_ops", [True, False])
def test_each_tower_is_on_its_gpu_and_the_rest_on_the_cpu(small_dataset, fast_ops):
    FLAGS.fast_ops = fast_ops
    cifar10_multi_gpu_train.build_training(2, 4)
    operations = tf.get_default_graph().get_operations()
    layer = re.compile(r"tower_(\d)/(conv\d/(Conv2D|BiasAdd)|local\d/MatMul|norm\d)$")
    matches = [(layer.match(operation.name), operation.device) for operation in operations]
    found = [(f"/device:GPU:{match[1]}", device) for match, device in matches if match]
    assert len(found) == 2 * 8
    assert all(expected == device for expected, device in found)
    for operation in operations:
        handles_variable = operation.type in ("VarHandleOp", "ResourceApplyGradientDescent")
        if handles_variable or operation.name.startswith("distorted_inputs"):
            assert operation.device == "/device:CPU:0", operation.name
    names = {operation.name for operation in operations}
    assert names >= {"tower_0/conv1/Conv2D", "tower_1/conv1/Conv2D", "tower_1/norm2"}
    assert not any(name.startswith("tower_2") for name in names)


def test_a_step_of_several_towers_is_the_step_of_one_on_all_their_batches(fixed_batch):
    images, labels = fixed_batch

    def run_step(build):
        with tf.Graph().as_default(), tf.Session(config=session_config()) as sess:
            train_op, loss = build()
            sess.run(tf.global_variables_initializer())
            generator = np.random.default_rng(6)
            for variable in tf.trainable_variables():
                start = generator.normal(0, 0.05, variable.shape.as_list())
                variable.load(start.astype(np.float32), sess)
            value, _ = sess.run([loss, train_op])
            names = {variable.op.name for variable in tf.global_variables()}
            return value, sess.run(tf.trainable_variables()), names

    def build_single():
        global_step = tf.train.get_or_create_global_step()
        loss = cifar10.loss(cifar10.inference(tf.constant(images)), tf.constant(labels))
        return cifar10.train(loss, global_step), loss

    expected_loss, expected, expected_names = run_step(build_single)
    for num_gpus, batch_size in ((1, 4), (2, 2), (4, 1)):
        loss, found, names = run_step(
            lambda: cifar10_multi_gpu_train.build_training(num_gpus, batch_size)  # noqa: B023
        )
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert names == expected_names  # so checkpoints do not depend on the number of towers
        for variable, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(variable, reference, atol=1e-6)


@tf.custom_gradient
def with_nan_gradient(values):
    """Returns the values unchanged; their gradient is NaN."""
    return tf.identity(values), lambda upstream: upstream * np.nan


@pytest.mark.parametrize("bad_tower", [0, 1])
@pytest.mark.parametrize(
    ("corrupt", "name"),
    [
        (lambda logits: logits * np.nan, "tower_{}/total_loss"),
        (with_nan_gradient, "gradients/conv1/weights"),
    ],
    ids=["loss", "gradient"],
)
def test_a_nan_in_any_tower_stops_training(
    tmp_path, monkeypatch, fixed_batch, corrupt, name, bad_tower
):
    inference = cifar10.inference

    def corrupt_inference(images):
        logits = inference(images)
        is_bad = logits.op.name.startswith(f"tower_{bad_tower}/")
        return corrupt(logits) if is_bad else logits

    monkeypatch.setattr(cifar10, "inference", corrupt_inference)
    train_op, loss = cifar10_multi_gpu_train.build_training(2, 2)
    tf.get_collection_ref(tf.GraphKeys.SUMMARIES).clear()  # a histogram would find the NaN as well
    options = training_run.Options(train_dir=str(tmp_path / "train"), max_steps=5)
    settings = TrainingSettings(dataset.CLASS_NAMES, 50000, examples_per_step=4)
    message = f"^{name.format(bad_tower)} is nan at step 0, where the learning rate is 0.1;"
    with (
        pytest.raises(UserError, match=message),
        training_run.TrainingRun(options, settings) as run,
        run.session(loss) as sess,
    ):
        sess.run(train_op)
    assert tf.train.latest_checkpoint(options.train_dir).endswith("model.ckpt-0")


def test_a_task_of_a_cluster_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", TF_CONFIGS[1])
    FLAGS.data_dir = str(tmp_path / "data")
    FLAGS.train_dir = str(tmp_path / "train")
    FLAGS.synthetic_data = True
    with pytest.raises(UserError, match="^TF_CONFIG describes a cluster, .* cifar10_train.py"):
        cifar10_multi_gpu_train.main()
    assert list(tmp_path.iterdir()) == []


def test_losses_are_averaged_over_the_towers_and_over_the_steps(fixed_batch):
    extra = tf.constant(7.0, name="extra")  # in no tower, so it is not part of the objective
    tf.add_to_collection("losses", extra)
    train_op, loss = cifar10_multi_gpu_train.build_training(2, 2)
    graph = tf.get_default_graph()
    of_towers = [graph.get_tensor_by_name(f"tower_{i}/cross_entropy:0") for i in range(2)]
    (average,) = [v for v in tf.global_variables() if v.op.name.endswith("cross_entropy/avg")]
    with tf.Session(config=session_config()) as sess:
        sess.run(tf.global_variables_initializer())
        fetches = [tf.summary.merge_all(), of_towers, loss]
        summary, cross_entropies, total_loss = sess.run(fetches)
        values = {v.tag: v.simple_value for v in tf.Summary.FromString(summary).value}
        before = sess.run(average)
        sess.run(train_op)
        assert sess.run(average) != before
    assert cross_entropies[0] != cross_entropies[1]
    assert values["cross_entropy_raw"] == pytest.approx(np.mean(cross_entropies))
    assert values["total_loss_raw"] == pytest.approx(total_loss)
    assert "extra_raw" not in values
