"""The single trainer in this process; test_end_to_end.py runs it as its user does."""

import json
import os
import platform
import re
import subprocess
import time

import pytest
from conftest import ROOT, write_data_set

import cifar10
import cifar10_data
import cifar10_multi_gpu_train
import cifar10_session
import cifar10_settings
import cifar10_train
from cifar10_runtime import UserError, session_config, tf

FLAGS = cifar10_train.FLAGS


def test_train_trains_as_the_flags_say_and_then_has_nothing_to_do(tmp_path, capsys):
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.train_dir = str(tmp_path / "train")
    FLAGS.batch_size = 4
    FLAGS.max_steps = 5
    FLAGS.log_frequency = 2
    FLAGS.min_fraction_of_examples_in_queue = 0.001
    cifar10_train.train()
    output = capsys.readouterr()
    assert re.findall(r"step (\d+), loss = \d+\.\d\d ", output.out) == ["0", "2", "4"]
    assert tf.train.latest_checkpoint(FLAGS.train_dir).endswith("model.ckpt-5")
    cifar10_train.train()
    output = capsys.readouterr()
    assert output.out == ""
    assert "nothing to do" in output.err


@pytest.mark.parametrize(
    ("trainer", "batch", "examples_per_step"),
    [(cifar10_train, 4, 4), (cifar10_multi_gpu_train, 4, 12)],
    ids=["single", "multi"],
)
def test_the_flags_reach_the_training_loop(
    tmp_path, monkeypatch, trainer, batch, examples_per_step
):
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.train_dir = str(tmp_path / "train")
    FLAGS.batch_size = batch
    FLAGS.num_gpus = 3
    FLAGS.max_steps = 17
    FLAGS.log_frequency = 3
    FLAGS.save_checkpoint_secs = 5
    FLAGS.save_checkpoint_steps = 6
    FLAGS.max_checkpoints_to_keep = 7
    FLAGS.save_summaries_steps = 8
    FLAGS.log_device_placement = True
    FLAGS.use_fp16 = True
    calls = []
    monkeypatch.setattr(
        cifar10_session,
        "run_training",
        lambda train_op, loss, examples, **named: calls.append((examples, named)),
    )
    trainer.train()
    ((examples, named),) = calls
    assert examples == examples_per_step
    named.pop("check_input")()
    assert named.pop("config") == session_config(use_fp16=True, log_device_placement=True)
    assert named == {
        "train_dir": str(tmp_path / "train"),
        "max_steps": 17,
        "log_frequency": 3,
        "save_checkpoint_secs": 5,
        "save_checkpoint_steps": 6,
        "max_checkpoints_to_keep": 7,
        "save_summaries_steps": 8,
        "member": None,
    }


@pytest.mark.parametrize("use_fp16", [False, True])
def test_use_fp16_computes_in_16_bits_with_variables_in_32(use_fp16):
    with tf.Graph().as_default(), tf.Session(config=session_config(use_fp16)) as session:
        images = tf.random.stateless_normal([4, 24, 24, 3], seed=[1, 2])
        total_loss = cifar10.loss(cifar10.inference(images), tf.range(4))
        train_op = cifar10.train(total_loss, tf.train.get_or_create_global_step())
        session.run(tf.global_variables_initializer())
        metadata = tf.RunMetadata()
        options = tf.RunOptions(output_partition_graphs=True)
        session.run(train_op, options=options, run_metadata=metadata)
        convolutions = [
            tf.as_dtype(node.attr["T"].type)
            for graph in metadata.partition_graphs
            for node in graph.node
            if "Conv2D" in node.op
        ]
        assert len(convolutions) >= 5  # two forwards, two for the filters, one for the images
        narrow = {tf.bfloat16, tf.float16}
        assert all((dtype in narrow) == use_fp16 for dtype in convolutions)
        assert {variable.dtype for variable in tf.trainable_variables()} == {tf.float32}


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that are logged, as they come."""
    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    return warnings


@pytest.fixture
def small_run(tmp_path):
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER, train_counts=[40] * 5)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.batch_size = 4
    FLAGS.max_steps = 6
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


def test_a_seed_decides_every_loss_where_one_thread_reads(small_run):
    first, again, other, drawn = (
        [line["loss"] for line in small_run(name, seed)]
        for name, seed in (("first", 5), ("again", 5), ("other", 6), ("drawn", None))
    )
    assert len(first) == 6
    assert first == again
    assert not set(first) & set(other)
    assert not set(first) & set(drawn)


def test_each_logged_step_is_a_line_of_json(small_run, capsys):
    lines = small_run("run", 1)
    printed = re.findall(
        r"step (\d+), loss = (\S+) \((\S+) examples/sec; (\S+) sec/batch", capsys.readouterr().out
    )
    assert [
        (
            str(line["step"]),
            f"{line['loss']:.2f}",
            f"{line['examples_per_sec']:.1f}",
            f"{line['sec_per_batch']:.3f}",
        )
        for line in lines
    ] == printed
    assert [line["step"] for line in lines] == list(range(6))
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.1] * 6)
    assert all(abs(line["time"] - time.time()) < 60 for line in lines)
    assert [line["step"] for line in small_run("run", 1, max_steps=8)] == list(range(8))


def test_each_start_is_noted_beside_the_earlier_ones(small_run, tmp_path):
    small_run("run", 7)
    small_run("run", None, max_steps=8)
    first, second = json.loads((tmp_path / "run" / "run.json").read_text())
    assert first["seed"] == first["flags"]["seed"] == 7
    assert second["flags"]["seed"] is None
    assert 0 <= second["seed"] < 2**31
    assert first["flags"]["batch_size"] == 4
    assert second["flags"]["max_steps"] == 8
    assert {"data_dir", "use_fp16", "train_dir", "num_preprocess_threads"} < first["flags"].keys()
    assert {"weight_decay", "max_brightness_delta", "log_frequency"} < first["flags"].keys()
    assert "verbosity" not in first["flags"]  # of a library
    assert first["tensorflow"] == "2.21.0"
    assert first["python"] == platform.python_version()
    assert first["gpus"] == []
    assert first["processors"] == os.cpu_count()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert (first["commit"] or "").removesuffix("-dirty") == commit


def test_training_does_not_go_on_with_other_classes(small_run, tmp_path):
    small_run("run", 1)
    folder = tmp_path / cifar10_data.EXTRACTED_FOLDER
    for names in ([f"own{number}" for number in range(10)], [f"c{number}" for number in range(99)]):
        cifar10_data.write_class_names(folder, names)
        message = (
            rf"with 10 classes \(airplane, .*, not with {len(names)} classes \({names[0]}, "
            ".*train_dir$"
        )
        with pytest.raises(UserError, match=message):
            small_run("run", 1, max_steps=8)
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())) == 1


def test_training_does_not_go_on_with_another_model(small_run, tmp_path, capsys):
    models = {"run": {"crop_size": 24, "top_layers": "full"}}
    models["other"] = {"crop_size": 22, "top_layers": "local"}
    for name, other in (("run", "other"), ("other", "run")):
        for flag, value in models[name].items():
            FLAGS[flag].value = value
        small_run(name, 1)
        capsys.readouterr()
        for flag, value in models[name].items():
            asked = models[other][flag]
            FLAGS[flag].value = asked
            message = f"with --{flag}={value}, not with --{flag}={asked}; give --{flag}={value}, "
            with pytest.raises(UserError, match=f"{message}.*--train_dir$"):
                small_run(name, 1, max_steps=8)
            FLAGS[flag].value = value
        assert capsys.readouterr().out == ""  # it has not begun


def test_each_checkpoint_tells_what_it_was_trained_for(small_run, tmp_path):
    folder = tmp_path / cifar10_data.EXTRACTED_FOLDER
    names = [f"class {number}" for number in range(12)]
    cifar10_data.write_class_names(folder, names)
    FLAGS.crop_size = 30
    FLAGS.top_layers = "local"
    FLAGS.random_flip = False
    small_run("run", 1)
    newest = tf.train.latest_checkpoint(str(tmp_path / "run"))
    shapes = dict(tf.train.list_variables(newest))
    assert shapes["softmax_linear/biases"] == [12]
    assert shapes["local3/weights"] == [8, 8, 3, 3, 64, 32]  # a crop of 30, halved twice
    examples = cifar10_data.count_records(folder, eval_data=False)
    assert cifar10_settings.read_settings(newest) == (tuple(names), examples, 30, "local", False)
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (start["class_names"], start["examples_per_epoch"]) == (names, examples)


def test_training_that_goes_on_with_other_examples_or_flips_says_so(small_run, tmp_path, warnings):
    small_run("run", 1)
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER, train_counts=[9] * 5)
    FLAGS.random_flip = False
    small_run("run", 1, max_steps=8)
    first, second = warnings
    assert re.fullmatch(
        r"Going on from \S+ckpt-6: an epoch has 45 images now, and had \d+\.", first
    )
    assert second.endswith("ckpt-6: --random_flip is false now, and was true.")


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


@pytest.mark.parametrize("num_gpus", [None, 1, 2])
def test_tensorboard_gets_these_tags_and_no_others(small_run, tmp_path, num_gpus):
    FLAGS.save_summaries_steps = 1
    trainer = cifar10_train
    if num_gpus:
        trainer = cifar10_multi_gpu_train
        FLAGS.num_gpus = num_gpus
    small_run("run", seed=1, max_steps=3, trainer=trainer)
    found = {"simple_value": set(), "histo": set(), "tensor": set()}
    for path in (tmp_path / "run").glob("events.out.tfevents.*"):
        for event in tf.train.summary_iterator(str(path)):
            if event.HasField("graph_def"):
                graph = tf.GraphDef.FromString(event.graph_def)
                scopes = {node.name.split("/")[0] for node in graph.node}
            for value in event.summary.value:
                found[value.WhichOneof("value")].add(value.tag)
    assert found == {"simple_value": SCALARS, "histo": HISTOGRAMS, "tensor": {"input"}}
    # The picture of the graph: the layers, and a few scopes for all the rest.
    assert {"distorted_inputs", *LAYERS} <= scopes
    if not num_gpus:
        assert {"pool1", "norm1", "norm2", "pool2", "total_loss"} <= scopes
        assert len(scopes) < 60  # each operation by itself would be hundreds


@pytest.mark.parametrize("content", ["{}", "[{", ""])
def test_a_list_of_starts_that_cannot_be_read_is_not_written_over(small_run, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(UserError, match="run.json does not hold the list .*; move it away"):
        small_run("run", 1)
    assert (tmp_path / "run" / "run.json").read_text() == content
