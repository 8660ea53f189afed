"""Tests of the model against the table of its layers, NumPy and plain arithmetic."""

import math
import os
import types

import numpy as np
import numpy_model
import pytest
from absl import flags
from conftest import write_dataset

import cifar10
from support.base.errors import DataError
from support.data import dataset
from support.data.settings import TrainingSettings
from support.ops import graph_notes, tensorflow_v1
from support.ops.tensorflow_v1 import tf

pytestmark = pytest.mark.usefixtures("graph")

FLAGS = cifar10.FLAGS


def initialized_session():
    session = tf.Session()
    session.run(tf.global_variables_initializer())
    return session


def load_variables(session, values):
    for variable in tf.trainable_variables():
        variable.load(values[variable.op.name], session)


def variable_shapes():
    return {variable.op.name: tuple(variable.shape) for variable in tf.trainable_variables()}


def find_variable(name):
    (variable,) = [v for v in tf.global_variables() if v.op.name == name]
    return variable


def expected_shapes(layers):
    shapes = {}
    for name, shape, _, _, _ in layers:
        shapes |= {f"{name}/weights": shape, f"{name}/biases": shape[-1:]}
    return shapes


# The layers.


def test_the_model_has_the_1068298_parameters_and_the_names_of_the_tutorial(graph, fast_ops):
    with tf.device("/device:GPU:0"):
        cifar10.inference(tf.zeros([2, 24, 24, 3]))
    shapes = variable_shapes()
    assert shapes == expected_shapes(numpy_model.LAYERS)
    assert sum(math.prod(shape) for shape in shapes.values()) == 1068298
    assert {variable.device for variable in tf.global_variables()} == {"/device:CPU:0"}
    assert {variable.dtype for variable in tf.global_variables()} == {tf.float32}
    for name in ("pool1", "norm1", "norm2", "pool2", "conv1/Conv2D", "conv2/Conv2D"):
        graph.get_operation_by_name(name)
    for name, *_ in numpy_model.LAYERS:
        graph.get_operation_by_name(f"{name}/{name}")


@pytest.mark.parametrize("layer", numpy_model.LAYERS, ids=lambda layer: layer[0])
def test_variables_have_the_initial_values_of_the_table(layer):
    name, shape, stddev, bias, _ = layer
    cifar10.inference(tf.zeros([2, 24, 24, 3]))
    variables = [find_variable(f"{name}/weights"), find_variable(f"{name}/biases")]
    with initialized_session() as session:
        weights, biases = session.run(variables)
    np.testing.assert_array_equal(biases, np.full(shape[-1], bias, np.float32))
    # Truncation at two standard deviations leaves 0.8796 of the standard deviation.
    assert np.abs(weights).max() <= 2 * stddev * 1.0001
    tolerance = 5 / math.sqrt(2 * weights.size)
    assert weights.std() == pytest.approx(0.8796 * stddev, rel=tolerance)
    assert abs(weights.mean()) < 5 * stddev / math.sqrt(weights.size)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_logits_are_those_of_numpy_for_any_batch_size(batch_size, fast_ops):
    images = tf.placeholder(tf.float32, [batch_size, 24, 24, 3])
    logits = cifar10.inference(images)
    assert logits.shape.as_list() == [batch_size, 10]
    values = numpy_model.random_variables(seed=1)
    batch = np.random.default_rng(2).normal(0, 3, [batch_size or 2, 24, 24, 3]).astype(np.float32)
    with tf.Session() as session:
        load_variables(session, values)
        result = session.run(logits, {images: batch})
    np.testing.assert_allclose(result, numpy_model.inference(batch, values), atol=2e-4)


@pytest.mark.parametrize(("size", "features", "num_classes"), [(8, 256, 256), (29, 4096, 2)])
def test_the_layers_adapt_to_the_crop_and_the_number_of_classes(size, features, num_classes):
    logits = cifar10.inference(tf.zeros([3, size, size, 3]), num_classes)
    assert logits.shape == [3, num_classes]
    shapes = variable_shapes()
    assert shapes["local3/weights"] == (features, 384)
    assert shapes["softmax_linear/weights"] == (192, num_classes)
    with initialized_session() as session:
        assert np.isfinite(session.run(logits)).all()


# Locally connected layers.


def test_the_local_model_has_1116490_parameters_and_the_logits_of_numpy(fast_ops):
    FLAGS.top_layers = "local"
    images = tf.placeholder(tf.float32, [3, 24, 24, 3])
    logits = cifar10.inference(images)
    assert logits.shape == [3, 10]
    shapes = variable_shapes()
    assert shapes == expected_shapes(numpy_model.LAYERS[:2]) | {
        "local3/weights": (6, 6, 3, 3, 64, 32),
        "local3/biases": (6, 6, 32),
        "local4/weights": (6, 6, 3, 3, 32, 32),
        "local4/biases": (6, 6, 32),
        "softmax_linear/weights": (6 * 6 * 32, 10),
        "softmax_linear/biases": (10,),
    }
    assert sum(math.prod(shape) for shape in shapes.values()) == 1116490
    generator = np.random.default_rng(6)
    batch = generator.normal(0, 1, [3, 24, 24, 3])
    values = {name: generator.normal(0, 0.05, shape) for name, shape in shapes.items()}
    with tf.Session() as session:
        load_variables(session, values)
        result = session.run(logits, {images: batch})
    np.testing.assert_allclose(result, numpy_model.local_inference(batch, values), atol=2e-4)


def test_the_local_model_starts_like_cuda_convnet_and_decays_all_top_layers():
    FLAGS.top_layers = "local"
    cifar10.loss(cifar10.inference(tf.zeros([2, 24, 24, 3])), tf.constant([0, 1]))
    variables = {variable.op.name: variable for variable in tf.trainable_variables()}
    with initialized_session() as session:
        values, terms = session.run([variables, tf.get_collection("losses")])
    for name, stddev in (("local3", 0.04), ("local4", 0.04), ("softmax_linear", 1 / 1152)):
        # Truncation at two standard deviations leaves 0.8796 of the standard deviation.
        assert values[f"{name}/weights"].std() == pytest.approx(0.8796 * stddev, rel=0.03)
        np.testing.assert_array_equal(values[f"{name}/biases"], 0)
    decays = [
        0.004 * (values[f"{name}/weights"].astype(np.float64) ** 2).sum() / 2
        for name in ("local3", "local4", "softmax_linear")
    ]
    np.testing.assert_allclose(terms[:3], decays, rtol=1e-5)
    assert terms[3:] == [pytest.approx(math.log(10), rel=0.01)]  # the cross-entropy


# The fast operations and those of the tutorial.


@pytest.mark.parametrize(
    ("fast_ops", "use_fp16", "bfloat16", "expected"),
    [
        (True, False, "native", {"Conv2D": 1, "LRN": 0}),
        (True, True, "native", {"Conv2D": 2, "LRN": 0}),
        (True, True, "none", {"Conv2D": 1, "LRN": 0}),  # it stays in float32
        (False, False, "native", {"Conv2D": 2, "LRN": 2}),
    ],
)
def test_the_fast_operations_replace_conv2_except_in_16_bits_and_the_normalization(
    graph, monkeypatch, fast_ops, use_fp16, bfloat16, expected
):
    FLAGS.use_fp16, FLAGS.fast_ops = use_fp16, fast_ops
    monkeypatch.setattr(tensorflow_v1, "GPUS", [])
    monkeypatch.setattr(tensorflow_v1, "USES_ONEDNN", True)
    monkeypatch.setattr(tensorflow_v1, "find_bfloat16_support", lambda: bfloat16)
    cifar10.inference(tf.zeros([2, 24, 24, 3]))
    types = [operation.type for operation in graph.get_operations()]
    assert {type_: types.count(type_) for type_ in expected} == expected


# The loss.


def test_the_loss_is_the_cross_entropy_plus_the_weight_decay_of_the_table():
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 5, [6, 10]).astype(np.float32)
    labels = np.array([0, 9, 3, 3, 5, 1], np.int32)
    cifar10.inference(tf.zeros([2, 24, 24, 3]))
    total_loss = cifar10.loss(tf.constant(logits), tf.constant(labels))
    values = numpy_model.random_variables(seed=4)
    with tf.Session() as session:
        load_variables(session, values)
        result, terms = session.run([total_loss, tf.get_collection("losses")])

    exact = logits.astype(np.float64)
    probabilities = np.exp(exact) / np.exp(exact).sum(axis=1, keepdims=True)
    cross_entropy = -np.log(probabilities[np.arange(6), labels]).mean()
    decays = [
        decay * (values[f"{name}/weights"].astype(np.float64) ** 2).sum() / 2
        for name, _, _, _, decay in numpy_model.LAYERS
        if decay is not None
    ]
    np.testing.assert_allclose(sorted(terms), sorted([cross_entropy, *decays]), rtol=1e-5)
    np.testing.assert_allclose(result, cross_entropy + sum(decays), rtol=1e-5)


# The learning rate.


@pytest.mark.parametrize(
    ("epochs", "towers", "step", "expected"),
    [
        # An epoch has 50,000 / 128 steps. Times 350, rounded down: 136,718.
        (350.0, 1, 136717, 0.1),
        (350.0, 1, 136718, 0.01),
        (350.0, 1, 2 * 136718, 0.001),
        # Two towers consume an epoch in half as many steps: 68,359.
        (350.0, 2, 68358, 0.1),
        (350.0, 2, 68359, 0.01),
        # Less than a step.
        (1e-6, 1, 3, 0.1 * 0.1**3),
    ],
)
def test_the_learning_rate_decays_to_a_tenth_after_some_epochs(epochs, towers, step, expected):
    FLAGS.num_epochs_per_decay = epochs
    rate = cifar10.decayed_learning_rate(tf.constant(step, tf.int64), 128 * towers)
    with tf.Session() as session:
        assert session.run(rate) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("examples_per_step", [64, 128, 1])
def test_after_a_change_of_the_images_per_step_the_schedule_counts_the_images_seen(
    examples_per_step,
):
    FLAGS.num_epochs_per_decay = 0.04  # 2,000 of 50,000 images
    seen = 61 * 64
    graph_notes.record_images_offset(seen - 61 * examples_per_step)
    global_step = tf.placeholder(tf.int64, [])
    rate = cifar10.decayed_learning_rate(global_step, examples_per_step)
    with tf.Session() as session:
        for step in (61, 62, 61 + 96 // examples_per_step, 561, 8000):
            decays = (seen + (step - 61) * examples_per_step) // 2000
            if examples_per_step == 64:  # unchanged: 31 steps, as if nothing had been recorded
                decays = step // 31
            found = session.run(rate, {global_step: step})
            assert found == pytest.approx(0.1 * 0.1**decays, rel=1e-4)


# The update.


def test_an_update_changes_a_variable_by_its_gradient_and_then_its_average():
    # The loss is 3 * w, w starts at 1, and the rate is 0.1: w is 0.7, then 0.4. The decay of the
    # average at update n is (1 + n) / (10 + n), as long as that is less than 0.9999.
    weight = tf.get_variable("w", initializer=1.0)
    global_step = tf.train.get_or_create_global_step()
    optimizer = tf.train.GradientDescentOptimizer(0.1)
    update = cifar10.update_variables(
        optimizer, optimizer.compute_gradients(3 * weight), global_step
    )
    average = find_variable("w/ExponentialMovingAverage")
    with initialized_session() as session:
        assert session.run(average) == 1.0
        session.run(update)
        first = 2 / 11 * 1 + 9 / 11 * 0.7
        assert session.run([weight, average, global_step]) == pytest.approx([0.7, first, 1])
        session.run(update)
        second = 3 / 12 * first + 9 / 12 * 0.4
        assert session.run([weight, average, global_step]) == pytest.approx([0.4, second, 2])
        global_step.load(10**6, session)
        session.run(update)
        assert session.run(average) == pytest.approx(0.9999 * second + 0.0001 * 0.1, rel=1e-6)


def test_averages_and_summaries_follow_the_update_of_the_variables():
    # With a rate of 1 and a large variable, reading it too early would be noticed.
    weight = tf.get_variable("w", initializer=tf.zeros([300000]))
    gradients = [(-tf.ones([300000]), weight)]
    update = cifar10.update_variables(
        tf.train.GradientDescentOptimizer(1.0), gradients, tf.train.get_or_create_global_step()
    )
    average = find_variable("w/ExponentialMovingAverage")
    expected = 0.0
    with initialized_session() as session:
        for step in range(1, 40):
            _, summary = session.run([update, tf.summary.merge_all()])
            values = {v.tag: v.histo.min for v in tf.Summary.FromString(summary).value}
            assert values["w"] == step
            decay = (1 + step) / (10 + step)
            expected = decay * expected + (1 - decay) * step
            np.testing.assert_allclose(session.run(average), expected, rtol=1e-5)


def test_float16_scales_the_loss_and_skips_updates_that_overflow(monkeypatch):
    monkeypatch.setattr(tensorflow_v1, "GPUS", ["a GPU"])
    FLAGS.use_fp16 = True
    weight = tf.get_variable("weight", initializer=[1.0])
    factor = tf.placeholder(tf.float32, [])
    global_step = tf.train.get_or_create_global_step()
    optimizer = cifar10.make_optimizer(0.1)
    gradients = optimizer.compute_gradients(factor * weight[0])
    update = cifar10.update_variables(optimizer, gradients, global_step)
    summaries = tf.summary.merge_all()
    (scale,) = [v for v in tf.local_variables() if "loss_scale" in v.op.name]
    # A checkpoint has the same variables as without float16.
    assert {v.op.name for v in tf.global_variables()} == {
        "weight",
        "weight/ExponentialMovingAverage",
        "global_step",
    }
    with tf.Session() as session:
        session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        assert session.run(scale) == 2**15
        session.run([update, summaries], {factor: 3.0})
        assert session.run([weight, global_step, scale]) == [pytest.approx([0.7]), 1, 2**15]
        # 1e35 * 2**15 overflows in float32, like 2 in float16.
        session.run([update, summaries], {factor: 1e35})
        assert session.run([weight, global_step, scale]) == [pytest.approx([0.7]), 2, 2**14]
        session.run(update, {factor: 3.0})
        assert session.run([weight, global_step, scale]) == [pytest.approx([0.4]), 3, 2**14]


@pytest.mark.parametrize(("use_fp16", "gpus"), [(False, ["a GPU"]), (True, [])])
def test_the_loss_is_not_scaled_without_float16(monkeypatch, use_fp16, gpus):
    monkeypatch.setattr(tensorflow_v1, "GPUS", gpus)
    FLAGS.use_fp16 = use_fp16
    assert isinstance(cifar10.make_optimizer(0.1), tf.train.GradientDescentOptimizer)
    assert tf.local_variables() == []


# Variables without a gradient, and statistics of the batches.


def test_a_variable_without_a_gradient_keeps_its_value_and_the_others_are_trained():
    images = tf.random.stateless_normal([4, 24, 24, 3], seed=[1, 2])
    features = tf.stop_gradient(cifar10._convolution(images, "conv1", 8, bias=0.0))
    tf.get_variable("unused", initializer=[5.0])
    logits = cifar10._fully_connected(features, "softmax_linear", 10, 0.05, wd=None, relu=False)
    total_loss = cifar10.loss(logits, tf.range(4))
    train_op = cifar10.train(total_loss, tf.train.get_or_create_global_step())
    variables = {v.op.name: v for v in tf.trainable_variables()}
    averages = {f"{name}/ExponentialMovingAverage" for name in variables}
    assert averages <= {v.op.name for v in tf.global_variables()}  # evaluation restores them
    with initialized_session() as session:
        before = session.run(variables)
        session.run([train_op, tf.summary.merge_all()])
        after = session.run(variables)
    changed = {name for name in variables if not np.array_equal(before[name], after[name])}
    assert changed == {"softmax_linear/weights", "softmax_linear/biases"}


@pytest.mark.parametrize(("is_chief", "update"), [(True, 2.0), (False, 0.0)])
def test_only_the_chief_of_a_cluster_updates_what_the_workers_share_in_each_step(is_chief, update):
    worker = types.SimpleNamespace(
        is_chief=is_chief,
        count=2,
        average_gradients=lambda pairs, step: [(10 * grad, variable) for grad, variable in pairs],
        synchronize=lambda update_op: update_op,
    )
    mean = tf.get_variable("norm/moving_mean", initializer=0.0, trainable=False)
    tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, tf.assign_add(mean, 2.0))
    weight = tf.get_variable("w", initializer=1.0)
    tf.add_to_collection("losses", weight)
    train_op = cifar10.train(1.0 * weight, tf.train.get_or_create_global_step(), worker=worker)
    with initialized_session() as session:
        for number in (1, 2):
            session.run(train_op)
            assert session.run([mean, tf.train.get_global_step()]) == [update * number, number]
        average = find_variable("loss_averages/w/avg")
        assert (session.run(average) != 0) == is_chief
        assert session.run(weight) == pytest.approx(1.0 - 2 * 0.1 * 10.0)


# Training.


def test_a_training_step_moves_every_variable_by_the_rate_times_its_gradient(fast_ops):
    images = tf.random.stateless_normal([4, 24, 24, 3], seed=[1, 2])
    global_step = tf.train.get_or_create_global_step()
    total_loss = cifar10.loss(cifar10.inference(images), tf.range(4))
    train_op = cifar10.train(total_loss, global_step)
    variables = tf.trainable_variables()
    gradients = tf.gradients(total_loss, variables)
    average = find_variable("loss_averages/total_loss/avg")
    with initialized_session() as session:
        before, steps, loss = session.run([variables, gradients, total_loss])
        session.run(train_op)
        after = session.run(variables)
        assert session.run(global_step) == 1
        # The step also updates the averages of the losses.
        assert session.run(average) == pytest.approx(loss, rel=1e-5)
    for start, gradient, end in zip(before, steps, after, strict=True):
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(end, start - 0.1 * gradient, atol=1e-6)


def test_a_loss_is_shown_with_its_moving_average():
    loss = tf.placeholder(tf.float32, [], name="cross_entropy")
    average_op = cifar10._add_loss_summaries(loss)
    summaries = tf.summary.merge_all()
    with initialized_session() as session:
        biased, weight = 0.0, 0.0
        for value in (5.0, 1.0, 3.0):
            # In one run, as in training: the average includes this loss.
            _, summary = session.run([average_op, summaries], {loss: value})
            # The decay is 0.9, and the average is corrected for its initial value of 0.
            biased, weight = 0.9 * biased + 0.1 * value, 0.9 * weight + 0.1
            summary = tf.Summary.FromString(summary)
            found = {entry.tag: entry.simple_value for entry in summary.value}
            assert found == pytest.approx(
                {"cross_entropy": biased / weight, "cross_entropy_raw": value}, rel=1e-5
            )


# Flags.


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("initial_learning_rate", [0.0, -0.1, 1e39, math.inf, math.nan]),
        ("num_epochs_per_decay", [0.0, -1.0, 1e20, math.inf, math.nan]),
        ("learning_rate_decay_factor", [0.0, -0.1, 1.1, math.nan]),
        ("moving_average_decay", [-0.1, 1.0, math.nan]),
        ("weight_decay", [-0.1, 1e39, math.inf, math.nan]),
        ("max_brightness_delta", [-1.0, 256.0, math.inf, math.nan]),
        ("min_contrast_factor", [-1.0, 1.9, math.nan]),
        ("max_contrast_factor", [-1.0, 0.1, math.inf, math.nan]),
        ("min_fraction_of_examples_in_queue", [-0.1, 1.1, math.nan]),
        ("num_preprocess_threads", [0]),
        ("crop_size", [0, 7, 33]),
        ("batch_size", [0]),
        ("data_dir", [""]),
    ],
)
def test_invalid_values_of_flags_are_refused(name, values):
    for value in values:
        with pytest.raises(flags.IllegalFlagValueError):
            setattr(FLAGS, name, value)


def test_functions_without_arguments_read_the_flags(tmp_path, capsys):
    write_dataset(tmp_path / dataset.EXTRACTED_FOLDER)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.batch_size = 6
    FLAGS.min_fraction_of_examples_in_queue = 0.8
    images, labels = cifar10.distorted_inputs()
    assert (images.shape, labels.shape) == ([6, 24, 24, 3], [6])
    assert "Filling queue with 20 CIFAR images" in capsys.readouterr().out
    images, labels = cifar10.inputs(eval_data=True)
    assert (images.shape, labels.shape) == ([6, 24, 24, 3], [6])


def test_the_settings_of_a_run_come_from_the_flags_and_the_dataset(tmp_path):
    write_dataset(tmp_path, class_names=["cat", "dog"])
    FLAGS.data_dir = str(tmp_path)
    assert cifar10.training_settings() == TrainingSettings(("cat", "dog"), 25, 24, "full", True)
    FLAGS.crop_size = 30
    FLAGS.top_layers = "local"
    FLAGS.random_flip = False
    names = ("emu", "fox", "gnu")
    assert cifar10.training_settings(names) == TrainingSettings(names, 25, 30, "local", False)


# The dataset.


def test_the_flags_choose_the_real_or_the_synthetic_dataset_which_is_checked(tmp_path):
    write_dataset(tmp_path / dataset.EXTRACTED_FOLDER)
    FLAGS.data_dir = str(tmp_path)
    assert cifar10.maybe_download_and_extract() == cifar10.find_dataset().folder
    assert cifar10.find_dataset().folder == str(tmp_path / "cifar-10-batches-bin")
    FLAGS.synthetic_data = True
    assert cifar10.maybe_download_and_extract() == cifar10.find_dataset().folder
    assert cifar10.find_dataset().folder == str(tmp_path / "cifar-10-synthetic-bin")
    (tmp_path / "cifar-10-synthetic-bin" / "test_batch.bin").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        cifar10.maybe_download_and_extract()


def test_the_synthetic_dataset_is_refused_in_a_folder_with_records(tmp_path):
    write_dataset(tmp_path / "own")
    FLAGS.data_dir = str(tmp_path / "own")
    FLAGS.synthetic_data = True
    with pytest.raises(DataError, match="own holds records, which --synthetic_data would ignore"):
        cifar10.maybe_download_and_extract()
    assert "cifar-10-synthetic-bin" not in os.listdir(tmp_path / "own")
