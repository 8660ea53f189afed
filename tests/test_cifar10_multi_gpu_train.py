"""Towers: their devices, their shared variables, and the arithmetic of one synchronous step."""

import re

import numpy as np
import pytest
from conftest import write_data_set

import cifar10
import cifar10_data
import cifar10_multi_gpu_train
import cifar10_session
import cifar10_train
from cifar10_runtime import UserError, session_config, tf

pytestmark = pytest.mark.usefixtures("graph")


@pytest.fixture
def data(tmp_path):
    """A small data set that the flags name."""
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER)
    cifar10.FLAGS.data_dir = str(tmp_path)
    cifar10.FLAGS.min_fraction_of_examples_in_queue = 0.002
    return tmp_path


@pytest.fixture
def resident_batch(monkeypatch):
    """Four fixed images in place of the queues."""
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
    with tf.Session(config=session_config()) as session:
        values = session.run([gradient for gradient, _ in averages])
    np.testing.assert_allclose(values[0], [2.0, 1.0])
    np.testing.assert_allclose(values[1], 2.0)


def variables_of(num_gpus):
    with tf.Graph().as_default():
        cifar10_multi_gpu_train.build_training(num_gpus, 4)
        return {v.op.name: (v.shape.as_list(), v.dtype, v.device) for v in tf.global_variables()}


def test_variables_are_the_same_for_any_number_of_towers_and_for_the_single_trainer(data):
    with tf.Graph().as_default():
        with tf.device("/cpu:0"):
            global_step = tf.train.get_or_create_global_step()
        images, labels = cifar10.distorted_inputs()
        cifar10.train(cifar10.loss(cifar10.inference(images), labels), global_step)
        single = {v.op.name: (v.shape.as_list(), v.dtype) for v in tf.global_variables()}
    one, two, three = (variables_of(number) for number in (1, 2, 3))
    assert one == two == three
    assert {name: spec[:2] for name, spec in one.items()} == single
    assert {device for _, _, device in one.values()} == {"/device:CPU:0"}


def test_each_tower_is_on_its_gpu_and_the_rest_on_the_cpu(data):
    cifar10_multi_gpu_train.build_training(2, 4)
    operations = tf.get_default_graph().get_operations()
    computing = re.compile(r"tower_(\d)/(conv\d/(Conv2D|BiasAdd)|local\d/MatMul|norm\d)$")
    towers = [(computing.match(op.name), op.device) for op in operations]
    found = [(f"/device:GPU:{match[1]}", device) for match, device in towers if match]
    assert len(found) == 2 * 8
    assert all(expected == device for expected, device in found)
    for operation in operations:
        handles_variable = operation.type in ("VarHandleOp", "ResourceApplyGradientDescent")
        if handles_variable or operation.name.startswith("distorted_inputs"):
            assert operation.device == "/device:CPU:0", operation.name
    names = {operation.name for operation in operations}
    assert names >= {"tower_0/conv1/Conv2D", "tower_1/conv1/Conv2D", "tower_1/norm2"}
    assert not any(name.startswith("tower_2") for name in names)


def test_a_step_of_two_towers_is_the_step_of_one_on_both_batches(resident_batch):
    images, labels = resident_batch

    def one_step(build):
        with (
            tf.Graph().as_default(),
            tf.Session(config=session_config()) as session,
        ):
            train_op, loss = build()
            session.run(tf.global_variables_initializer())
            generator = np.random.default_rng(6)
            for variable in tf.trainable_variables():
                start = generator.normal(0, 0.05, variable.shape.as_list())
                variable.load(start.astype(np.float32), session)
            value, _ = session.run([loss, train_op])
            return value, session.run(tf.trainable_variables())

    def build_single():
        global_step = tf.train.get_or_create_global_step()
        loss = cifar10.loss(cifar10.inference(tf.constant(images)), tf.constant(labels))
        return cifar10.train(loss, global_step), loss

    expected_loss, expected = one_step(build_single)
    for num_gpus, batch_size in ((1, 4), (2, 2), (4, 1)):
        loss, found = one_step(
            lambda: cifar10_multi_gpu_train.build_training(num_gpus, batch_size)  # noqa: B023
        )
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for variable, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(variable, reference, atol=1e-6)


def test_each_tower_has_a_batch_of_its_own(resident_batch):
    images, _ = resident_batch
    cifar10_multi_gpu_train.build_training(2, 2)
    graph = tf.get_default_graph()
    with tf.Session(config=session_config()) as session:
        seen = [
            session.run(graph.get_operation_by_name(f"tower_{i}/conv1/Conv2D").inputs[0])
            for i in range(2)
        ]
    np.testing.assert_array_equal(np.concatenate(seen), images)


@pytest.mark.parametrize("bad_tower", [0, 1])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_in_any_tower_ends_training(data, tmp_path, monkeypatch, bad_tower, bad):
    images = np.random.default_rng(0).normal(size=[8, 24, 24, 3]).astype(np.float32)
    images[4 * bad_tower] = np.nan
    inference = cifar10.inference
    # On its way to the loss a NaN gets lost, as the larger of NaN and 0 may be taken to be 0.
    factor = 0.0 if bad == "loss" else None

    def infer(images):
        logits = inference(images)
        return logits if factor is None else logits + factor * tf.reduce_sum(images)

    monkeypatch.setattr(cifar10, "inference", infer)
    monkeypatch.setattr(
        cifar10, "distorted_inputs", lambda count: (tf.constant(images), tf.range(8) % 10)
    )
    name = {"loss": f"tower_{bad_tower}/total_loss", "gradient": "gradients/conv1/weights"}[bad]
    with tf.Graph().as_default():
        train_op, loss = cifar10_multi_gpu_train.build_training(2, 4)
        tf.get_collection_ref(tf.GraphKeys.SUMMARIES).clear()  # a histogram would notice as well
        with pytest.raises(UserError, match=f"{name} is nan at step 0, where the learning rate"):
            cifar10_session.run_training(
                train_op, loss, 8, str(tmp_path / "train"), 5, 10, session_config()
            )
    newest = tf.train.latest_checkpoint(str(tmp_path / "train"))
    assert newest.endswith("model.ckpt-0")


def learning_rate_decay_steps(num_gpus):
    with tf.Graph().as_default():
        cifar10_multi_gpu_train.build_training(num_gpus, 128)
        global_step = tf.train.get_global_step()
        (rate,) = tf.get_collection(cifar10.LEARNING_RATE)
        with tf.Session(config=session_config()) as session:
            session.run(global_step.initializer)
            rates = []
            for step in (136718 // num_gpus - 1, 136718 // num_gpus):
                global_step.load(step, session)
                rates.append(session.run(rate))
            return rates


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_n_towers_decay_the_learning_rate_n_times_sooner(data, monkeypatch, num_gpus):
    monkeypatch.setattr(cifar10, "count_examples_per_epoch", lambda: 50000)
    assert learning_rate_decay_steps(num_gpus) == pytest.approx([0.1, 0.01])


def summary_tags():
    summaries = tf.get_collection(tf.GraphKeys.SUMMARIES)
    tags = [tf.get_static_value(summary.op.inputs[0]).item() for summary in summaries]
    return sorted(tag.decode() for tag in tags)


def test_summaries_have_the_same_tags_for_any_number_of_towers(data):
    found = []
    for num_gpus in (1, 2, 3):
        with tf.Graph().as_default():
            cifar10_multi_gpu_train.build_training(num_gpus, 4)
            found.append(summary_tags())
    assert found[0] == found[1] == found[2]
    assert {"total_loss_raw", "activations/conv1", "queue/fraction_full"} <= set(found[0])
    assert not any("distorted_inputs" in tag for tag in found[0])


def test_both_trainers_can_be_imported_together_and_have_the_tutorials_defaults():
    flags = cifar10_multi_gpu_train.FLAGS
    assert flags is cifar10_train.FLAGS
    assert flags.train_dir == "/tmp/cifar10_train"
    assert flags.max_steps == 1000000
    assert flags.log_frequency == 10
    assert flags.log_device_placement is False
    assert flags.num_gpus == 1
