"""The model against the table of its layers, against NumPy, and against arithmetic by hand."""

import math
import os
import re

import numpy as np
import numpy_model
import pytest
from absl import flags
from conftest import write_data_set

import cifar10
import cifar10_data
import cifar10_input
import cifar10_session  # noqa: F401, its flags
from cifar10_runtime import tf

pytestmark = pytest.mark.usefixtures("graph")


def started_session():
    session = tf.Session()
    session.run(tf.global_variables_initializer())
    return session


def test_the_public_constants_are_the_tutorials():
    assert cifar10.MOVING_AVERAGE_DECAY == 0.9999
    assert cifar10.NUM_EPOCHS_PER_DECAY == 350.0
    assert cifar10.LEARNING_RATE_DECAY_FACTOR == 0.1
    assert cifar10.INITIAL_LEARNING_RATE == 0.1
    assert cifar10.TOWER_NAME == "tower"
    assert cifar10.DATA_URL.endswith("/cifar-10-binary.tar.gz")
    for name in (
        "IMAGE_SIZE",
        "NUM_CLASSES",
        "NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN",
        "NUM_EXAMPLES_PER_EPOCH_FOR_EVAL",
    ):
        assert getattr(cifar10, name) == getattr(cifar10_input, name)


def test_flags_have_the_tutorials_defaults_without_a_command_line_being_parsed():
    assert cifar10.FLAGS.batch_size == 128
    assert cifar10.FLAGS["data_dir"].default == "/tmp/cifar10_data"
    assert cifar10.FLAGS.use_fp16 is False
    assert cifar10.FLAGS.synthetic_data is False
    assert cifar10.FLAGS.data_url == cifar10.DATA_URL
    assert cifar10.FLAGS.min_fraction_of_examples_in_queue == 0.4


def test_the_model_has_1068298_parameters_of_the_tables_shapes_on_the_cpu():
    with tf.device("/device:GPU:0"):
        cifar10.inference(tf.zeros([2, 24, 24, 3]))
    shapes = {variable.op.name: tuple(variable.shape) for variable in tf.trainable_variables()}
    expected = {}
    for name, shape, _, _, _ in numpy_model.LAYERS:
        expected[f"{name}/weights"] = shape
        expected[f"{name}/biases"] = shape[-1:]
    assert shapes == expected
    assert sum(math.prod(shape) for shape in shapes.values()) == 1068298
    assert {variable.device for variable in tf.global_variables()} == {"/device:CPU:0"}
    assert {variable.dtype for variable in tf.global_variables()} == {tf.float32}


@pytest.mark.parametrize("layer", numpy_model.LAYERS, ids=lambda layer: layer[0])
def test_variables_start_as_the_table_says(layer):
    name, shape, stddev, bias, _ = layer
    cifar10.inference(tf.zeros([2, 24, 24, 3]))
    variables = {variable.op.name: variable for variable in tf.trainable_variables()}
    with started_session() as session:
        weights = session.run(variables[f"{name}/weights"])
        biases = session.run(variables[f"{name}/biases"])
    np.testing.assert_array_equal(biases, np.full(shape[-1], bias, np.float32))
    # A normal distribution cut off at 2 standard deviations has 0.8796 of the spread.
    assert np.abs(weights).max() <= 2 * stddev * 1.0001
    tolerance = 5 / math.sqrt(2 * weights.size)
    assert weights.std() == pytest.approx(0.8796 * stddev, rel=tolerance)
    assert abs(weights.mean()) < 5 * stddev / math.sqrt(weights.size)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_inference_agrees_with_numpy_for_any_batch_size_known_or_not(batch_size):
    images = tf.placeholder(tf.float32, [batch_size, 24, 24, 3])
    logits = cifar10.inference(images)
    assert logits.shape.as_list() == [batch_size, 10]
    values = numpy_model.random_variables(seed=1)
    batch = np.random.default_rng(2).normal(0, 3, [batch_size or 2, 24, 24, 3]).astype(np.float32)
    with tf.Session() as session:
        for variable in tf.trainable_variables():
            variable.load(values[variable.op.name], session)
        result = session.run(logits, {images: batch})
    np.testing.assert_allclose(result, numpy_model.inference(batch, values), atol=2e-4)


@pytest.mark.parametrize(("size", "features"), [(24, 2304), (32, 4096), (8, 256), (29, 4096)])
@pytest.mark.parametrize("num_classes", [2, 10, 256])
def test_the_layers_follow_the_crop_and_the_number_of_classes(size, features, num_classes):
    logits = cifar10.inference(tf.zeros([3, size, size, 3]), num_classes)
    assert logits.shape == [3, num_classes]
    shapes = {variable.op.name: tuple(variable.shape) for variable in tf.trainable_variables()}
    assert shapes["local3/weights"] == (features, 384)
    assert shapes["softmax_linear/weights"] == (192, num_classes)
    with started_session() as session:
        assert np.isfinite(session.run(logits)).all()


def test_the_last_layer_is_for_as_many_classes_as_the_data_set_has(tmp_path):
    cifar10.FLAGS.data_dir = str(tmp_path)
    write_data_set(tmp_path, class_names=["cat", "dog", "hot dog"])
    assert cifar10.find_class_names() == ("cat", "dog", "hot dog")
    assert cifar10.inference(tf.zeros([2, 24, 24, 3])).shape == [2, 3]


@pytest.mark.parametrize("shape", [[3, 6, 6, 64], [2, 4, 5, 3], [1, 1, 1, 7], [4, 2, 3, 1]])
def test_locally_connected_layers_and_their_gradients_are_a_numpy_loops(shape):
    generator = np.random.default_rng(5)
    images = generator.normal(0, 1, shape)
    given = tf.placeholder(tf.float32, [None, *shape[1:]])
    result = cifar10._locally_connected(given, "local3", 4, 0.1, 0.0, None)
    assert result.shape.as_list() == [None, *shape[1:3], 4]
    variables = {variable.op.name: variable for variable in tf.trainable_variables()}
    weights = generator.normal(0, 1, variables["local3/weights"].shape)
    biases = generator.normal(0, 1, variables["local3/biases"].shape)
    assert weights.shape == (*shape[1:3], 3, 3, shape[3], 4)
    assert biases.shape == (*shape[1:3], 4)
    sums = numpy_model.locally_connected(images, weights, biases)
    upstream = generator.normal(0, 1, sums.shape)
    gradients = tf.gradients(
        result,
        [given, variables["local3/weights"], variables["local3/biases"]],
        tf.constant(upstream, tf.float32),
    )
    with tf.Session() as session:
        variables["local3/weights"].load(weights, session)
        variables["local3/biases"].load(biases, session)
        result, gradients = session.run([result, gradients], {given: images})
    np.testing.assert_allclose(result, np.maximum(sums, 0), atol=1e-3)
    # Where a sum is nearly 0, rounding decides whether the ReLU lets it through.
    assert np.abs(sums).min() > 1e-4
    expected = numpy_model.locally_connected_gradients(images, weights, upstream * (sums > 0))
    for found, values in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, values, atol=1e-3)


def test_the_local_model_agrees_with_numpy_and_has_1116490_parameters():
    cifar10.FLAGS.top_layers = "local"
    images = tf.placeholder(tf.float32, [3, 24, 24, 3])
    logits = cifar10.inference(images)
    assert logits.shape == [3, 10]
    shapes = {variable.op.name: tuple(variable.shape) for variable in tf.trainable_variables()}
    expected = {}
    for name, shape, _, _, _ in numpy_model.LAYERS[:2]:
        expected |= {f"{name}/weights": shape, f"{name}/biases": shape[-1:]}
    expected |= {
        "local3/weights": (6, 6, 3, 3, 64, 32),
        "local3/biases": (6, 6, 32),
        "local4/weights": (6, 6, 3, 3, 32, 32),
        "local4/biases": (6, 6, 32),
        "softmax_linear/weights": (6 * 6 * 32, 10),
        "softmax_linear/biases": (10,),
    }
    assert shapes == expected
    assert sum(math.prod(shape) for shape in shapes.values()) == 1116490
    generator = np.random.default_rng(6)
    batch = generator.normal(0, 1, [3, 24, 24, 3])
    values = {name: generator.normal(0, 0.05, shape) for name, shape in shapes.items()}
    with tf.Session() as session:
        for variable in tf.trainable_variables():
            variable.load(values[variable.op.name], session)
        result = session.run(logits, {images: batch})
    np.testing.assert_allclose(result, numpy_model.local_inference(batch, values), atol=2e-4)


def test_the_local_layers_start_as_cuda_convnets_and_all_top_layers_decay():
    cifar10.FLAGS.top_layers = "local"
    cifar10.loss(cifar10.inference(tf.zeros([2, 24, 24, 3])), tf.constant([0, 1]))
    variables = {variable.op.name: variable for variable in tf.trainable_variables()}
    with started_session() as session:
        values, terms = session.run([variables, tf.get_collection("losses")])
    for name, stddev in (("local3", 0.04), ("local4", 0.04), ("softmax_linear", 1 / 1152)):
        # A normal distribution cut off at 2 standard deviations has 0.8796 of the spread.
        assert values[f"{name}/weights"].std() == pytest.approx(0.8796 * stddev, rel=0.03)
        np.testing.assert_array_equal(values[f"{name}/biases"], 0)
    decays = [
        0.004 * (values[f"{name}/weights"].astype(np.float64) ** 2).sum() / 2
        for name in ("local3", "local4", "softmax_linear")
    ]
    np.testing.assert_allclose(terms[:3], decays, rtol=1e-5)
    assert terms[3:] == [pytest.approx(math.log(10), rel=0.01)]  # the cross-entropy


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e8])
@pytest.mark.parametrize("shape", [[128, 12, 12, 64], [3, 5, 7, 64], [1, 1, 1, 64], [2, 3, 3, 10]])
def test_normalization_and_its_gradient_are_the_stock_ops(shape, scale):
    generator = np.random.default_rng(7)
    images = tf.constant(generator.normal(0, scale, shape).astype(np.float32))
    upstream = tf.constant(generator.normal(0, 1, shape).astype(np.float32))
    own = cifar10.local_response_normalization(images, "norm1")
    stock = tf.nn.lrn(images, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75)
    assert own.op.name == "norm1"
    gradients = [tf.gradients(result, images, upstream)[0] for result in (own, stock)]
    with tf.Session() as session:
        (own, stock), gradients = session.run([(own, stock), gradients])
    for found, expected in ((own, stock), gradients):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_normalization_accepts_a_batch_of_unknown_size():
    images = tf.placeholder(tf.float32, [None, 4, 4, 64])
    result = cifar10.local_response_normalization(images, "norm1")
    assert result.shape.as_list() == [None, 4, 4, 64]


def test_operations_have_the_tutorials_names():
    cifar10.inference(tf.zeros([2, 24, 24, 3]))
    names = {operation.name for operation in tf.get_default_graph().get_operations()}
    assert names >= {
        "conv1/Conv2D",
        "conv1/conv1",
        "pool1",
        "norm1",
        "conv2/Conv2D",
        "conv2/conv2",
        "norm2",
        "pool2",
        "local3/local3",
        "local4/local4",
        "softmax_linear/softmax_linear",
    }


def test_the_loss_is_cross_entropy_plus_the_decay_of_the_two_local_layers():
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 5, [6, 10]).astype(np.float32)
    labels = np.array([0, 9, 3, 3, 5, 1], np.int32)
    cifar10.inference(tf.zeros([2, 24, 24, 3]))
    total_loss = cifar10.loss(tf.constant(logits), tf.constant(labels))
    values = numpy_model.random_variables(seed=4)
    with tf.Session() as session:
        for variable in tf.trainable_variables():
            variable.load(values[variable.op.name], session)
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


def test_the_loss_starts_between_4_6_and_4_75():
    images = np.random.default_rng(0).normal(0, 1, [64, 24, 24, 3]).astype(np.float32)
    total_loss = cifar10.loss(cifar10.inference(tf.constant(images)), tf.range(64) % 10)
    with started_session() as session:
        assert 4.6 < session.run(total_loss) < 4.75


@pytest.mark.parametrize(
    ("towers", "step", "expected"),
    [
        # 50,000 / 128 steps an epoch, times 350, rounded down: 136,718.
        (1, 0, 0.1),
        (1, 136717, 0.1),
        (1, 136718, 0.01),
        (1, 2 * 136718 - 1, 0.01),
        (1, 2 * 136718, 0.001),
        (1, 3 * 136718, 0.0001),
        # Two towers consume an epoch in half the steps: 68,359.
        (2, 0, 0.1),
        (2, 68358, 0.1),
        (2, 68359, 0.01),
        (2, 2 * 68359 - 1, 0.01),
        (2, 2 * 68359, 0.001),
    ],
)
def test_the_learning_rate_falls_to_a_tenth_every_350_epochs(towers, step, expected):
    rate = cifar10.decayed_learning_rate(tf.constant(step, tf.int64), 128 * towers)
    with tf.Session() as session:
        assert session.run(rate) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 2.0), (9, 2.0), (10, 1.0), (19, 1.0), (20, 0.5)]
)
def test_the_learning_rate_falls_as_the_flags_say(step, expected):
    cifar10.FLAGS.initial_learning_rate = 2.0
    cifar10.FLAGS.num_epochs_per_decay = 0.1
    cifar10.FLAGS.learning_rate_decay_factor = 0.5
    rate = cifar10.decayed_learning_rate(tf.constant(step), examples_per_step=500)
    with tf.Session() as session:
        assert session.run(rate) == pytest.approx(expected)


def test_an_epoch_is_what_the_training_files_hold(tmp_path):
    cifar10.FLAGS.data_dir = str(tmp_path)
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER)  # 25 to train on
    cifar10.FLAGS.num_epochs_per_decay = 2.0
    step = tf.placeholder(tf.int64, [])
    rate = cifar10.decayed_learning_rate(step, examples_per_step=5)
    given = cifar10.decayed_learning_rate(step, examples_per_step=5, examples_per_epoch=30)
    with tf.Session() as session:
        rates = [session.run([rate, given], {step: number}) for number in (9, 10, 11, 12)]
    assert np.array(rates) == pytest.approx(
        np.array([[0.1, 0.1], [0.01, 0.1], [0.01, 0.1], [0.01, 0.01]])
    )


def test_a_learning_rate_that_decays_within_a_step_does_so_at_each():
    cifar10.FLAGS.num_epochs_per_decay = 1e-6
    rate = cifar10.decayed_learning_rate(tf.constant(3), examples_per_step=128)
    with tf.Session() as session:
        assert session.run(rate) == pytest.approx(0.1**4)


def test_the_moving_average_keeps_as_much_as_the_flag_says():
    cifar10.FLAGS.moving_average_decay = 0.01
    variable = tf.get_variable("x", initializer=1.0)
    global_step = tf.train.get_or_create_global_step()
    update = cifar10.update_variables(
        cifar10.make_optimizer(1.0), [(tf.constant(-1.0), variable)], global_step
    )
    (average,) = [v for v in tf.global_variables() if v.op.name == "x/ExponentialMovingAverage"]
    with started_session() as session:
        session.run(update)
        assert session.run(average) == pytest.approx(0.01 * 1.0 + 0.99 * 2.0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_weights_decay_as_much_as_the_flag_says(weight_decay):
    cifar10.FLAGS.weight_decay = weight_decay
    logits = cifar10.inference(tf.zeros([2, 24, 24, 3]))
    total_loss = cifar10.loss(logits, tf.constant([0, 1]))
    weights = [v for v in tf.trainable_variables() if re.match("local[34]/weights", v.op.name)]
    with started_session() as session:
        session.run([variable.assign(tf.zeros_like(variable)) for variable in weights])
        without = session.run(total_loss)
        session.run([v.assign(tf.fill(v.shape, 2.0)) for v in weights])
        logits_and_loss = session.run(["cross_entropy:0", total_loss])
    decay = weight_decay * (2304 * 384 + 384 * 192) * 2.0**2 / 2
    assert without == pytest.approx(np.log(10), abs=0.01)
    assert logits_and_loss[1] - logits_and_loss[0] == pytest.approx(decay, rel=1e-5)


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
        ("batch_size", [0, 99999999999]),
        ("log_frequency", [0, 2**31]),
        ("save_checkpoint_secs", [0, 2**31]),
        ("save_checkpoint_steps", [0, 10**23]),
        ("max_checkpoints_to_keep", [0, 10**20]),
        ("save_summaries_steps", [-1, 2**31]),
        ("max_steps", [0, 2**31]),
        ("seed", [-1, 2**31]),
    ],
)
def test_values_that_make_no_sense_are_refused(name, values):
    for value in values:
        with pytest.raises(flags.IllegalFlagValueError):
            setattr(cifar10.FLAGS, name, value)


def test_training_without_any_contrast_is_refused():
    cifar10.FLAGS.min_contrast_factor = 0.0
    with pytest.raises(flags.IllegalFlagValueError):
        cifar10.FLAGS.max_contrast_factor = 0.0


def test_an_update_moves_a_variable_against_its_gradient_and_then_its_average():
    # Loss 3 * w, w from 1, rate 0.1: w is 0.7, then 0.4. The average's decay after update n is
    # (1 + n) / (10 + n) while that is under 0.9999: 2 / 11 * 1 + 9 / 11 * 0.7, and so on.
    weight = tf.get_variable("w", initializer=1.0)
    global_step = tf.train.get_or_create_global_step()
    optimizer = tf.train.GradientDescentOptimizer(0.1)
    update = cifar10.update_variables(
        optimizer, optimizer.compute_gradients(3 * weight), global_step
    )
    (average,) = (v for v in tf.global_variables() if v.op.name == "w/ExponentialMovingAverage")
    with started_session() as session:
        assert session.run(average) == 1.0
        session.run(update)
        first = 2 / 11 * 1 + 9 / 11 * 0.7
        assert session.run([weight, average, global_step]) == pytest.approx([0.7, first, 1])
        session.run(update)
        second = 3 / 12 * first + 9 / 12 * 0.4
        assert session.run([weight, average, global_step]) == pytest.approx([0.4, second, 2])


def test_averages_are_never_taken_before_the_update_they_belong_to():
    # With rate 1 and a large variable, an average that ran beside the update would show.
    weight = tf.get_variable("w", initializer=tf.zeros([300000]))
    global_step = tf.train.get_or_create_global_step()
    optimizer = tf.train.GradientDescentOptimizer(1.0)
    gradients = [(-tf.ones([300000]), weight)]
    update = cifar10.update_variables(optimizer, gradients, global_step)
    (average,) = (v for v in tf.global_variables() if v.op.name == "w/ExponentialMovingAverage")
    expected = 0.0
    with started_session() as session:
        for step in range(1, 40):
            session.run(update)
            decay = (1 + step) / (10 + step)
            expected = decay * expected + (1 - decay) * step
            found = session.run(average)
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_moving_averages_decay_is_0_9999_in_the_long_run():
    weight = tf.get_variable("w", initializer=1.0)
    global_step = tf.train.get_or_create_global_step()
    optimizer = tf.train.GradientDescentOptimizer(1.0)
    update = cifar10.update_variables(optimizer, [(tf.constant(-100.0), weight)], global_step)
    (average,) = (v for v in tf.global_variables() if v.op.name == "w/ExponentialMovingAverage")
    with started_session() as session:
        global_step.load(10**6, session)
        session.run(update)
        assert session.run(average) == pytest.approx(0.9999 * 1 + 0.0001 * 101, rel=1e-5)


def test_the_single_trainers_epochs_count_the_flags_batch_size():
    cifar10.FLAGS.batch_size = 100
    global_step = tf.train.get_or_create_global_step()
    weight = tf.get_variable("w", initializer=1.0)
    tf.add_to_collection("losses", weight)
    train_op = cifar10.train(1.0 * weight, global_step)
    with started_session() as session:
        # 50,000 / 100 * 350 = 175,000 steps at 0.1, then 0.01.
        for step, rate in ((174999, 0.1), (175000, 0.01)):
            global_step.load(step, session)
            before = session.run(weight)
            session.run(train_op)
            assert before - session.run(weight) == pytest.approx(rate, rel=1e-4)


def test_float16_scales_the_loss_and_skips_steps_that_overflow(monkeypatch):
    monkeypatch.setattr(cifar10, "GPUS", ["a GPU"])
    cifar10.FLAGS.use_fp16 = True
    weight = tf.get_variable("weight", initializer=[1.0])
    factor = tf.placeholder(tf.float32, [])
    global_step = tf.train.get_or_create_global_step()
    optimizer = cifar10.make_optimizer(0.1)
    gradients = optimizer.compute_gradients(factor * weight[0])
    update = cifar10.update_variables(optimizer, gradients, global_step)
    summaries = tf.summary.merge_all()
    (scale,) = [v for v in tf.local_variables() if "loss_scale" in v.op.name]
    # The checkpoint is the same as without.
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
        # 1e35 * 2^15 overflows even a float32, as 2 would a float16.
        session.run([update, summaries], {factor: 1e35})
        assert session.run([weight, global_step, scale]) == [pytest.approx([0.7]), 2, 2**14]
        session.run(update, {factor: 3.0})
        assert session.run([weight, global_step, scale]) == [pytest.approx([0.4]), 3, 2**14]


@pytest.mark.parametrize(("use_fp16", "gpus"), [(False, ["a GPU"]), (True, [])])
def test_without_float16_the_loss_is_not_scaled(monkeypatch, use_fp16, gpus):
    monkeypatch.setattr(cifar10, "GPUS", gpus)
    cifar10.FLAGS.use_fp16 = use_fp16
    assert isinstance(cifar10.make_optimizer(0.1), tf.train.GradientDescentOptimizer)
    assert tf.local_variables() == []


def build_training(batch_size):
    images = tf.random.stateless_normal([batch_size, 24, 24, 3], seed=[1, 2])
    global_step = tf.train.get_or_create_global_step()
    total_loss = cifar10.loss(cifar10.inference(images), tf.range(batch_size) % 10)
    return cifar10.train(total_loss, global_step), total_loss, global_step


def test_a_training_step_moves_every_variable_by_the_rate_times_its_gradient():
    train_op, total_loss, global_step = build_training(4)
    variables = tf.trainable_variables()
    gradients = tf.gradients(total_loss, variables)
    with started_session() as session:
        before, steps = session.run([variables, gradients])
        session.run(train_op)
        after = session.run(variables)
        assert session.run(global_step) == 1
    for start, gradient, end in zip(before, steps, after, strict=True):
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(end, start - 0.1 * gradient, atol=1e-6)


def test_the_loss_of_a_batch_falls_when_the_model_trains_on_it():
    train_op, total_loss, _ = build_training(4)
    averages = [v for v in tf.global_variables() if v.op.name.endswith("total_loss/avg")]
    with started_session() as session:
        first = session.run(total_loss)
        for _ in range(100):
            session.run(train_op)
        last = session.run(total_loss)
        assert last < first - 1
        # The train op keeps the losses' averages too.
        assert session.run(averages) == pytest.approx([last], abs=0.5)


def test_a_checkpoint_has_the_variables_that_the_tutorials_evaluation_restores():
    build_training(4)
    names = {variable.op.name for variable in tf.global_variables()}
    learned = {variable.op.name for variable in tf.trainable_variables()}
    assert len(learned) == 10
    assert names >= learned | {f"{name}/ExponentialMovingAverage" for name in learned}
    assert "global_step" in names


def test_the_moving_average_of_a_loss_follows_the_losses():
    loss = tf.placeholder(tf.float32, [], name="cross_entropy")
    average_op = cifar10.average_losses([[loss]])
    summaries = tf.summary.merge_all()
    with started_session() as session:
        biased, weight = 0.0, 0.0
        for value in (5.0, 1.0, 3.0):
            # Both at once, as a step does it: the average that is shown is the one with this loss.
            _, summary = session.run([average_op, summaries], {loss: value})
            # Decay 0.9, corrected for the start from nothing.
            biased, weight = 0.9 * biased + 0.1 * value, 0.9 * weight + 0.1
            summary = tf.Summary.FromString(summary)
            found = {entry.tag: entry.simple_value for entry in summary.value}
            assert found == pytest.approx(
                {"cross_entropy": biased / weight, "cross_entropy_raw": value}, rel=1e-5
            )


def summary_tags():
    with started_session() as session:
        summary = tf.Summary.FromString(session.run(tf.summary.merge_all()))
    return sorted(value.tag for value in summary.value)


def test_summaries_show_layers_losses_variables_gradients_and_the_rate():
    build_training(4)
    layers = [layer[0] for layer in numpy_model.LAYERS]
    losses = ["cross_entropy", "total_loss", "weight_decay/local3", "weight_decay/local4"]
    expected = ["learning_rate", *losses, *(f"{loss}_raw" for loss in losses)]
    for layer in layers:
        expected += [f"activations/{layer}", f"sparsity/{layer}"]
        for kind in ("weights", "biases"):
            expected += [f"{kind}/{layer}", f"gradients/{layer}/{kind}"]
    assert summary_tags() == sorted(expected)


def test_the_functions_without_arguments_read_the_flags(tmp_path, capsys):
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER)
    cifar10.FLAGS.data_dir = str(tmp_path)
    cifar10.FLAGS.batch_size = 6
    cifar10.FLAGS.min_fraction_of_examples_in_queue = 0.8
    images, labels = cifar10.distorted_inputs()
    assert (images.shape, labels.shape) == ([6, 24, 24, 3], [6])
    assert "Filling queue with 20 CIFAR images" in capsys.readouterr().out
    images, labels = cifar10.inputs(eval_data=True)
    assert (images.shape, labels.shape) == ([6, 24, 24, 3], [6])
    cifar10.FLAGS.crop_size = 30
    assert cifar10.distorted_inputs()[0].shape == [6, 30, 30, 3]
    assert cifar10.inputs(eval_data=True)[0].shape == [6, 30, 30, 3]


def test_the_distortions_are_as_far_as_the_flags_say(monkeypatch):
    calls = []
    monkeypatch.setattr(
        cifar10_input, "distorted_inputs", lambda *arguments: calls.append(arguments)
    )
    cifar10.FLAGS.num_preprocess_threads = 3
    cifar10.FLAGS.max_brightness_delta = 1.5
    cifar10.FLAGS.min_contrast_factor = 0.7
    cifar10.FLAGS.max_contrast_factor = 0.9
    cifar10.FLAGS.random_flip = False
    cifar10.FLAGS.crop_size = 9
    cifar10.distorted_inputs(2)
    ((_, batch_size, fraction, threads, distortion, _, crop_size),) = calls
    assert (batch_size, fraction, threads, crop_size) == (2, 0.4, 3, 9)
    assert distortion == (1.5, 0.7, 0.9, False)


def test_real_or_synthetic_data_is_as_the_flag_says_and_is_checked(tmp_path):
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER)
    cifar10.FLAGS.data_dir = str(tmp_path)
    assert cifar10.maybe_download_and_extract() == cifar10.find_data_folder()
    assert cifar10.find_data_folder() == str(tmp_path / "cifar-10-batches-bin")
    cifar10.FLAGS.synthetic_data = True
    assert cifar10.maybe_download_and_extract() == cifar10.find_data_folder()
    assert cifar10.find_data_folder() == str(tmp_path / "cifar-10-synthetic-bin")
    write_data_set(tmp_path / "own")
    cifar10.FLAGS.data_dir = str(tmp_path / "own")
    with pytest.raises(cifar10_data.DataError, match="own holds records, which --synthetic_data w"):
        cifar10.maybe_download_and_extract()
    assert "cifar-10-synthetic-bin" not in os.listdir(tmp_path / "own")
    cifar10.FLAGS.data_dir = str(tmp_path)
    (tmp_path / "cifar-10-synthetic-bin" / "test_batch.bin").write_bytes(b"")
    with pytest.raises(cifar10_data.DataError, match="is empty"):
        cifar10.maybe_download_and_extract()
