"""Tests of the public interface of the tutorial, which other people's code depends on.

That interface consists of modules, names, signatures, constants that take effect when they are
edited, and flags. tests/test_cifar10.py tests the variables and the operations of the model.
"""

import inspect
import json
from unittest import mock

import pytest
from conftest import (
    ROOT,
    find_example_queue,
    make_records,
    run_script,
    save_checkpoint,
    write_dataset,
)

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_predict
import cifar10_train
from support.base.errors import DataError, UserError
from support.data import dataset, download
from support.ops import fast_image
from support.ops.tensorflow_v1 import session_config, tf

pytestmark = pytest.mark.usefixtures("graph")

FLAGS = cifar10.FLAGS

# The signatures as the tutorial has them. Ours may have more parameters after these, if those are
# optional.
SIGNATURES = {
    cifar10_input: [
        "read_cifar10(filename_queue)",
        "distorted_inputs(data_dir, batch_size)",
        "inputs(eval_data, data_dir, batch_size)",
        "_generate_image_and_label_batch(image, label, min_queue_examples, batch_size, shuffle)",
    ],
    cifar10: [
        "distorted_inputs()",
        "inputs(eval_data)",
        "inference(images)",
        "loss(logits, labels)",
        "train(total_loss, global_step)",
        "maybe_download_and_extract()",
        "_activation_summary(x)",
        "_variable_on_cpu(name, shape, initializer)",
        "_variable_with_weight_decay(name, shape, stddev, wd)",
        "_add_loss_summaries(total_loss)",
    ],
    cifar10_train: ["train()", "main(argv=None)"],
    cifar10_multi_gpu_train: [
        "tower_loss(scope, images, labels)",
        "average_gradients(tower_grads)",
        "train()",
        "main(argv=None)",
    ],
    cifar10_eval: [
        "eval_once(saver, summary_writer, top_k_op, summary_op)",
        "evaluate()",
        "main(argv=None)",
    ],
}

OF_BOTH = {
    "IMAGE_SIZE": 24,
    "NUM_CLASSES": 10,
    "NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN": 50000,
    "NUM_EXAMPLES_PER_EPOCH_FOR_EVAL": 10000,
}
CONSTANTS = {
    cifar10_input: OF_BOTH,
    cifar10: {
        **OF_BOTH,
        "MOVING_AVERAGE_DECAY": 0.9999,
        "NUM_EPOCHS_PER_DECAY": 350.0,
        "LEARNING_RATE_DECAY_FACTOR": 0.1,
        "INITIAL_LEARNING_RATE": 0.1,
        "TOWER_NAME": "tower",
        "DATA_URL": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    },
}

DEFAULTS = {
    "batch_size": 128,
    "data_dir": "/tmp/cifar10_data",
    "use_fp16": False,
    "min_fraction_of_examples_in_queue": 0.4,
    "train_dir": "/tmp/cifar10_train",
    "max_steps": 1000000,
    "log_frequency": 10,
    "log_device_placement": False,
    "num_gpus": 1,
    "eval_dir": "/tmp/cifar10_eval",
    "eval_data": "test",
    "checkpoint_dir": "/tmp/cifar10_train",
    "eval_interval_secs": 300,
    "num_examples": 10000,
    "run_once": False,
}

OF_TRAINING = ["train_dir", "max_steps", "log_frequency", "log_device_placement"]
OF_EVALUATION = ["eval_dir", "eval_data", "checkpoint_dir", "eval_interval_secs"]
SCRIPTS = {
    cifar10_train: OF_TRAINING,
    cifar10_multi_gpu_train: [*OF_TRAINING, "num_gpus"],
    cifar10_eval: [*OF_EVALUATION, "num_examples", "run_once"],
}


@pytest.mark.parametrize(
    ("module", "expected"),
    [(module, each) for module, signatures in SIGNATURES.items() for each in signatures],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_functions_have_the_signatures_of_the_tutorial(module, expected):
    name, _, parameters = expected.removesuffix(")").partition("(")
    actual = list(inspect.signature(getattr(module, name)).parameters.values())
    expected = parameters.split(", ") if parameters else []
    assert [str(parameter) for parameter in actual[: len(expected)]] == expected
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in actual[len(expected) :]:
        assert parameter.default is not inspect.Parameter.empty or parameter.kind in variadic


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(module, *item) for module, values in CONSTANTS.items() for item in values.items()],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_constants_have_the_values_of_the_tutorial(module, name, value):
    assert getattr(module, name) == value
    assert type(getattr(module, name)) is type(value)


@pytest.mark.parametrize("name", DEFAULTS)
def test_flags_have_the_defaults_of_the_tutorial(name):
    assert FLAGS[name].default == DEFAULTS[name]
    assert type(FLAGS[name].default) is type(DEFAULTS[name])
    assert FLAGS[name].boolean == isinstance(DEFAULTS[name], bool)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_each_script_defines_the_flags_of_the_tutorial(script):
    assert {"test", "train_eval"} <= set(FLAGS["eval_data"].parser.enum_values)
    own = {flag.name for flag in FLAGS.get_key_flags_for_module(script)}
    assert own >= set(SCRIPTS[script])
    of_the_model = {flag.name for flag in FLAGS.get_key_flags_for_module(cifar10)}
    assert of_the_model >= {"batch_size", "data_dir", "use_fp16"}


# Constants that take effect when they are edited.


@pytest.fixture
def data_folder(tmp_path):
    """The folder of a dataset of 25 training and 11 test images that the flags name."""
    folder = tmp_path / dataset.EXTRACTED_FOLDER
    write_dataset(folder)
    FLAGS.data_dir = str(tmp_path)
    return folder


def crop_size():
    images = [cifar10.distorted_inputs()[0], cifar10.inputs(eval_data=True)[0]]
    (size,) = {cifar10.training_settings().crop_size, *(each.shape[1] for each in images)}
    return size


def fraction_in_queue():
    cifar10.distorted_inputs()
    return find_example_queue().get_attr("min_after_dequeue") / 25


def number_of_threads():
    cifar10.distorted_inputs()
    return max(len(r.enqueue_ops) for r in tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS))


def limits_of_the_distortions():
    """Returns the limits of brightness and of contrast."""
    brightness, contrast = (
        mock.patch.object(fast_image, name, wraps=getattr(fast_image, name))
        for name in ("random_brightness", "random_contrast")
    )
    with brightness as random_brightness, contrast as random_contrast:
        cifar10.distorted_inputs()
    return random_brightness.call_args.kwargs["max_delta"], *random_contrast.call_args.args[1:]


def learning_rates():
    """Returns the learning rate of the steps 0 to 399, one step per epoch."""
    step = tf.placeholder(tf.int64, [])
    rate = cifar10.decayed_learning_rate(step, examples_per_step=25)
    with tf.Session() as session:
        return [session.run(rate, {step: number}) for number in range(400)]


def epochs_until_decay():
    rates = learning_rates()
    return rates.count(rates[0])


def moving_average_decay():
    variable = tf.get_variable("x", initializer=0.0)
    global_step = tf.get_variable("step", initializer=10**6, trainable=False)
    optimizer = tf.train.GradientDescentOptimizer(1.0)
    update = cifar10.update_variables(optimizer, [(tf.constant(-1.0), variable)], global_step)
    (average,) = [v for v in tf.global_variables() if v.op.name == "x/ExponentialMovingAverage"]
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        session.run(update)
        return 1 - session.run(average)


def weight_decay():
    cifar10.inference(tf.zeros([1, 24, 24, 3]))
    operation = tf.get_default_graph().get_operation_by_name("local3/weight_decay")
    return tf.get_static_value(operation.inputs[1])


# Modules, constant, an edited value, a value of its flag, and a function that returns the value in
# effect.
LIVE_CONSTANTS = [
    ("both", "IMAGE_SIZE", 20, 28, crop_size),
    ("input", "MIN_FRACTION_OF_EXAMPLES_IN_QUEUE", 0.2, 0.8, fraction_in_queue),
    ("input", "NUM_PREPROCESS_THREADS", 3, 5, number_of_threads),
    ("input", "MAX_BRIGHTNESS_DELTA", 5.0, 7.0, lambda: limits_of_the_distortions()[0]),
    ("input", "MIN_CONTRAST_FACTOR", 0.3, 0.5, lambda: limits_of_the_distortions()[1]),
    ("input", "MAX_CONTRAST_FACTOR", 1.2, 1.4, lambda: limits_of_the_distortions()[2]),
    ("model", "INITIAL_LEARNING_RATE", 0.5, 0.7, lambda: learning_rates()[0]),
    ("model", "NUM_EPOCHS_PER_DECAY", 30.0, 70, epochs_until_decay),
    ("model", "LEARNING_RATE_DECAY_FACTOR", 0.5, 0.7, lambda: min(learning_rates()) / 0.1),
    ("model", "MOVING_AVERAGE_DECAY", 0.25, 0.5, moving_average_decay),
    ("model", "WEIGHT_DECAY", 0.25, 0.5, weight_decay),
]
MODULES = {"input": [cifar10_input], "model": [cifar10], "both": [cifar10_input, cifar10]}


@pytest.mark.parametrize(
    ("module", "name", "edited", "given", "find_value"),
    [(module, *rest) for modules, *rest in LIVE_CONSTANTS for module in MODULES[modules]],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_edited_constant_takes_effect_unless_its_flag_is_given(
    data_folder, monkeypatch, module, name, edited, given, find_value
):
    def find():
        with tf.Graph().as_default():
            return find_value()

    assert find() == pytest.approx(getattr(module, name), rel=1e-3)
    monkeypatch.setattr(module, name, edited)
    assert find() == pytest.approx(edited, rel=1e-5)
    setattr(FLAGS, {"IMAGE_SIZE": "crop_size"}.get(name, name.lower()), given)
    assert find() == pytest.approx(given, rel=1e-5)


def test_the_archive_comes_from_the_edited_constant_unless_the_flag_is_given(
    data_folder, monkeypatch
):
    recorded = mock.Mock(return_value=str(data_folder))
    monkeypatch.setattr(download, "maybe_download_and_extract", recorded)
    cifar10.maybe_download_and_extract()
    monkeypatch.setattr(cifar10, "DATA_URL", "https://example.org/x.tar.gz")
    cifar10.maybe_download_and_extract()
    FLAGS.data_url = "/tmp/x.tar.gz"
    cifar10.maybe_download_and_extract()
    urls = [call.args[1] for call in recorded.call_args_list]
    assert urls == [download.DATA_URL, "https://example.org/x.tar.gz", "/tmp/x.tar.gz"]


both_modules = pytest.mark.parametrize(
    "module", [cifar10_input, cifar10], ids=lambda module: module.__name__
)


def test_the_files_of_a_dataset_replace_constants_that_are_not_edited(data_folder):
    dataset.write_class_names(data_folder, ["cat", "dog", "emu"])
    assert cifar10.find_dataset()[1:] == (("cat", "dog", "emu"), 25, 11)
    assert cifar10.inference(tf.zeros([2, 24, 24, 3])).shape == [2, 3]
    assert cifar10.training_settings().examples_per_epoch == 25
    assert learning_rates()[349:351] == pytest.approx([0.1, 0.01])


@both_modules
def test_an_edited_number_of_training_examples_replaces_the_size_of_the_files(
    data_folder, monkeypatch, module, capsys
):
    monkeypatch.setattr(module, "NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN", 100)
    assert cifar10.find_dataset()[2:] == (100, 11)
    assert cifar10.training_settings().examples_per_epoch == 100
    cifar10.distorted_inputs()
    assert "Filling queue with 40 CIFAR images" in capsys.readouterr().out
    FLAGS.num_epochs_per_decay = 2.0
    assert learning_rates()[7:9] == pytest.approx([0.1, 0.01])  # 100 / 25 steps are an epoch


@pytest.mark.parametrize(
    ("module", "edited", "given", "count"),
    [(cifar10_input, 5, None, 5), (cifar10, 5, 7, 7), (cifar10, 99, None, 11)],
)
def test_an_edited_number_of_test_examples_is_evaluated_unless_the_flag_is_given(
    data_folder, tmp_path, monkeypatch, module, edited, given, count
):
    monkeypatch.setattr(module, "NUM_EXAMPLES_PER_EPOCH_FOR_EVAL", edited)
    assert cifar10.find_dataset()[2:] == (25, edited)
    save_checkpoint(tmp_path / "train", 3)
    FLAGS.checkpoint_dir = str(tmp_path / "train")
    FLAGS.eval_dir = str(tmp_path / "eval")
    FLAGS.run_once = True
    if given is not None:
        FLAGS.num_examples = given
    cifar10_eval.evaluate()
    result = json.loads((tmp_path / "eval" / "results.jsonl").read_text())
    assert result["count"] == count


@both_modules
def test_an_edited_number_of_classes_sets_the_last_layer_and_the_valid_labels(
    data_folder, monkeypatch, module
):
    write_dataset(data_folder, test_count=7)  # labels up to 6
    monkeypatch.setattr(module, "NUM_CLASSES", 7)
    assert cifar10.training_settings().class_names == tuple(f"class {n}" for n in range(7))
    assert cifar10.inference(tf.zeros([2, 24, 24, 3])).shape == [2, 7]
    assert cifar10.maybe_download_and_extract() == str(data_folder)
    make_records(9).tofile(data_folder / "data_batch_2.bin")
    with pytest.raises(DataError, match="has label 7 .*, but labels must be 0 to 6"):
        cifar10.maybe_download_and_extract()


EDITS = {
    "IMAGE_SIZE = 24": "IMAGE_SIZE = 20",
    "NUM_CLASSES = 10": "NUM_CLASSES = 7",
    "NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000": "NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 90",
}


def test_constants_that_are_edited_in_the_source_take_effect(tmp_path):
    write_dataset(tmp_path / "data")
    text = (ROOT / "cifar10_input.py").read_text()
    for line, edited in EDITS.items():
        assert text.count(f"\n{line}") == 1
        text = text.replace(f"\n{line}", f"\n{edited}")
    (tmp_path / "cifar10_input.py").write_text(text)
    for name in ("cifar10.py", "support"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import cifar10; "
        f"cifar10.FLAGS.data_dir = {str(tmp_path / 'data')!r}; "
        "print(cifar10.IMAGE_SIZE, cifar10.NUM_CLASSES, *cifar10.training_settings()[1:3]); "
        "print(cifar10.inference(*cifar10.inputs(True)[:1]).shape)"
    )
    assert run_script("-c", code).stdout == "20 7 90 20\n(128, 7)\n"


# The programs of forks.


def train_as_the_tutorial(train_dir):
    """Trains two steps in the way of the tutorial's `cifar10_train.train`."""
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()
        with tf.device("/cpu:0"):
            images, labels = cifar10.distorted_inputs()
        logits = cifar10.inference(images)
        loss = cifar10.loss(logits, labels)
        train_op = cifar10.train(loss, global_step)

        class LoggerHook(tf.train.SessionRunHook):
            def before_run(self, run_context):
                return tf.train.SessionRunArgs(loss)

        stop = tf.train.StopAtStepHook(last_step=2)
        with tf.train.MonitoredTrainingSession(
            checkpoint_dir=train_dir,
            hooks=[stop, tf.train.NanTensorHook(loss), LoggerHook()],
            config=tf.ConfigProto(log_device_placement=FLAGS.log_device_placement),
        ) as mon_sess:
            while not mon_sess.should_stop():
                mon_sess.run(train_op)


def evaluate_as_the_tutorial(eval_dir):
    """Evaluates the newest checkpoint in the way of the tutorial's `cifar10_eval.evaluate`."""
    with tf.Graph().as_default() as graph:
        images, labels = cifar10.inputs(eval_data=FLAGS.eval_data == "test")
        logits = cifar10.inference(images)
        top_k_op = tf.nn.in_top_k(logits, labels, 1)
        variable_averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
        saver = tf.train.Saver(variable_averages.variables_to_restore())
        summary_op = tf.summary.merge_all()
        graph.finalize()  # an evaluation adds nothing to it
        with tf.summary.FileWriter(eval_dir, graph) as summary_writer:
            cifar10_eval.eval_once(saver, summary_writer, top_k_op, summary_op)


@pytest.mark.parametrize("fast_ops", [True, False])
def test_the_loops_of_the_original_tutorial_train_and_evaluate(
    data_folder, tmp_path, capsys, fast_ops
):
    FLAGS.fast_ops = fast_ops
    FLAGS.batch_size = 4
    FLAGS.num_examples = 11
    FLAGS.checkpoint_dir = str(tmp_path / "train")
    train_as_the_tutorial(FLAGS.checkpoint_dir)
    assert tf.train.latest_checkpoint(FLAGS.checkpoint_dir).endswith("model.ckpt-2")
    capsys.readouterr()
    evaluate_as_the_tutorial(str(tmp_path / "eval"))
    assert ": precision @ 1 = 0." in capsys.readouterr().out


def fork_inference(images):
    """Returns the logits of a smaller model that is built like the tutorial's."""
    with tf.variable_scope("conv1") as scope:
        kernel = cifar10._variable_with_weight_decay(
            "weights", shape=[5, 5, 3, 8], stddev=5e-2, wd=None
        )
        conv = tf.nn.conv2d(images, kernel, [1, 1, 1, 1], padding="SAME")
        biases = cifar10._variable_on_cpu("biases", [8], tf.constant_initializer(0.0))
        conv1 = tf.nn.relu(tf.nn.bias_add(conv, biases), name=scope.name)
        cifar10._activation_summary(conv1)
    with tf.variable_scope("softmax_linear") as scope:
        reshape = tf.reshape(conv1, [images.get_shape().as_list()[0], -1])
        weights = cifar10._variable_with_weight_decay(
            "weights", shape=[24 * 24 * 8, 10], stddev=0.04, wd=0.004
        )
        biases = cifar10._variable_on_cpu("biases", [10], tf.constant_initializer(0.0))
        softmax_linear = tf.add(tf.matmul(reshape, weights), biases, name=scope.name)
        cifar10._activation_summary(softmax_linear)
    return softmax_linear


def test_a_fork_can_build_its_own_model_from_the_helpers():
    images = tf.random.stateless_normal([4, 24, 24, 3], seed=[1, 2])
    total_loss = cifar10.loss(fork_inference(images), tf.range(4))
    assert len(tf.get_collection("losses")) == 2  # the weight decay and the cross-entropy
    global_step = tf.Variable(0, trainable=False)
    train_op = cifar10.train(total_loss, global_step)
    summary_op = tf.summary.merge_all()
    with tf.Session(config=session_config()) as session:
        session.run(tf.global_variables_initializer())
        first = session.run(total_loss)
        for _ in range(30):
            session.run(train_op)
        assert session.run(total_loss) < first
        assert session.run(global_step) == 30
        summary = tf.Summary.FromString(session.run(summary_op))
    names = {variable.op.name for variable in tf.trainable_variables()}
    assert names == {f"{a}/{b}" for a in ("conv1", "softmax_linear") for b in ("weights", "biases")}
    tags = {value.tag for value in summary.value}
    assert tags >= {"activations/conv1", "sparsity/conv1", "activations/softmax_linear"}


def test_tf_app_runs_the_main_function_of_a_script(data_folder, tmp_path, monkeypatch):
    script = tmp_path / "fork.py"
    script.write_text(
        "import tensorflow.compat.v1 as tf, cifar10_train\n"
        'if __name__ == "__main__":\n'
        "    tf.app.run(cifar10_train.main)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folders = (f"--data_dir={tmp_path}", f"--train_dir={tmp_path / 'train'}")
    flags = ("--batch_size=4", "--max_steps=2", "--nofast_ops", "--log_frequency=1")
    process = run_script(script, *folders, *flags)
    for step in range(2):
        assert f": step {step}, loss = " in process.stdout
    assert tf.train.latest_checkpoint(str(tmp_path / "train")).endswith("model.ckpt-2")
    (start,) = json.loads((tmp_path / "train" / "run.json").read_text())
    assert start["flags"]["batch_size"] == 4


def test_a_fork_reads_flags_without_a_command_line_and_disables_the_behavior_of_tensorflow_2():
    code = """
import tensorflow.compat.v1 as tf, cifar10
tf.disable_v2_behavior()
print(tf.app.flags.FLAGS.batch_size)
global_step = tf.train.get_or_create_global_step()
loss = cifar10.loss(cifar10.inference(tf.zeros([2, 24, 24, 3])), tf.constant([0, 1]))
train_op = cifar10.train(loss, global_step)
with tf.train.MonitoredTrainingSession() as session:
    session.run(train_op)
    print(session.run(global_step))
"""
    assert run_script("-c", code, "--no_flag_of_ours").stdout == "128\n1\n"


@pytest.mark.parametrize(
    "function",
    [
        lambda: cifar10.inputs(eval_data=True),
        cifar10_train.train,
        lambda: cifar10_predict.open_model().__enter__(),
    ],
)
def test_an_image_size_that_the_records_or_the_model_do_not_allow_is_refused(
    data_folder, monkeypatch, function
):
    monkeypatch.setattr(cifar10_input, "IMAGE_SIZE", 33)
    message = (
        r"--crop_size=33: .* in the range \[8, 32\]; the value comes from the constant IMAGE_S"
    )
    with pytest.raises(UserError, match=message):
        function()
