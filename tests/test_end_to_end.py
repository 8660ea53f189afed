"""The scripts as processes: what they print, the files that they write, and their exit codes."""

import os
import re
import shutil

import numpy as np
import pytest
from conftest import (
    ROOT,
    make_records,
    messages,
    run_script,
    write_dataset,
)
from PIL import Image

from support.data import dataset

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}"
STEP_LINE = re.compile(
    TIME + r": step (\d+), loss = \d+\.\d\d \(\d+\.\d examples/sec; \d+\.\d{3} sec/batch\)"
)
# Printed every 10 seconds where stderr is not a terminal, and thus only on a slow machine.
PROGRESS_LINE = re.compile(r"(Converting|Filling queue|Evaluating): \d+ of \d+ \(.*\)")


def check_training_output(process, steps):
    first, *lines = process.stdout.splitlines()
    assert first == (
        "Filling queue with 100 CIFAR images before starting to train. "
        "This will take a few minutes."
    )
    matches = [STEP_LINE.fullmatch(line) for line in lines]
    assert all(matches), process.stdout
    assert [int(match[1]) for match in matches] == steps


def messages_except_progress(process):
    return [line for line in messages(process.stderr) if not PROGRESS_LINE.fullmatch(line)]


@pytest.fixture
def data(synthetic_data_dir):
    """The flags for the synthetic dataset."""
    return "--synthetic_data", f"--data_dir={synthetic_data_dir}"


@pytest.fixture
def train_flags(tmp_path, data):
    """The flags of a trainer with a small queue."""
    return *data, f"--train_dir={tmp_path / 'train'}", "--min_fraction_of_examples_in_queue=0.01"


@pytest.fixture
def eval_flags(tmp_path, data):
    """The flags of an evaluation of the newest checkpoint of that trainer."""
    return (
        *data,
        f"--checkpoint_dir={tmp_path / 'train'}",
        f"--eval_dir={tmp_path / 'eval'}",
        "--run_once",
    )


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_each_script_resumes_and_evaluates_checkpoints_of_the_other(
    tmp_path, train_flags, eval_flags
):
    train_dir = tmp_path / "train"
    train_dir.mkdir()
    (train_dir / "notes.txt").write_text("unrelated")
    training = (*train_flags, "--batch_size=16", "--log_frequency=5")

    train = run_script("cifar10_train.py", *training, "--max_steps=11")
    check_training_output(train, [0, 5, 10])
    assert messages_except_progress(train) == []
    assert 4.6 < float(re.search(r"step 0, loss = (\S+)", train.stdout)[1]) < 4.75

    towers = run_script("cifar10_multi_gpu_train.py", *training, "--max_steps=21", "--num_gpus=2")
    check_training_output(towers, [11, 15, 20])
    assert messages_except_progress(towers) == [
        "WARNING:tensorflow:--num_gpus=2, but TensorFlow finds 0 GPU(s): the towers share the CPU."
    ]

    # Checkpoints do not depend on --fast_ops.
    resumed = run_script("cifar10_train.py", *training, "--max_steps=31", "--fast_ops=false")
    check_training_output(resumed, [21, 25, 30])
    finished = run_script("cifar10_train.py", *training, "--max_steps=31")
    assert finished.stdout == ""
    assert "nothing to do" in finished.stderr

    for choice in ("--nouse_moving_averages", "--fast_ops=false"):
        evaluated = run_script("cifar10_eval.py", *eval_flags, "--num_examples=500", choice)
        assert re.fullmatch(TIME + r": precision @ 1 = \d\.\d{3}\n", evaluated.stdout)
        assert messages_except_progress(evaluated) == []

    names = os.listdir(train_dir)
    assert (train_dir / "notes.txt").read_text() == "unrelated"
    assert {f"model.ckpt-{step}.index" for step in (0, 11, 21, 31)} <= set(names)
    assert {name.split(".")[0] for name in os.listdir(tmp_path / "eval")} == {"events", "results"}


def test_the_end_of_a_run_prints_no_warnings_of_canceled_queues(train_flags, eval_flags):
    trained = run_script("cifar10_train.py", *train_flags, "--batch_size=16", "--max_steps=2")
    check_training_output(trained, [0])
    # Ends while the queue still holds images.
    evaluated = run_script("cifar10_eval.py", *eval_flags, "--batch_size=16", "--num_examples=40")
    for process in (trained, evaluated):
        assert "Local rendezvous is aborting" not in process.stderr
        assert messages_except_progress(process) == []


DIFFERENTIATE = """
import sys
import tensorflow as tf

def differentiate(graph, y, *xs):
    for op in graph.get_operations():
        assert "PyFunc" not in op.type and "_gradient_op_type" not in op.node_def.attr, op.name
    crops = graph.get_tensor_by_name("conv1/Conv2D:0").op.inputs[0]
    with graph.as_default():
        assert all(g is not None for g in tf.gradients(graph.get_tensor_by_name(y), [crops, *xs]))

with tf.Graph().as_default() as graph:
    tf.compat.v1.train.import_meta_graph(sys.argv[1] + "/train/model.ckpt-1.meta")
    variables = tf.compat.v1.trainable_variables()
    assert len(variables) == 10
    differentiate(graph, "total_loss:0", *variables)
differentiate(tf.saved_model.load(sys.argv[1] + "/export").graph, "probabilities:0")
"""


@pytest.mark.slow
def test_stored_graphs_can_be_differentiated_without_this_project(tmp_path, train_flags):
    """That the gradients are right is tested in `tests/ops/`."""
    run_script("cifar10_train.py", *train_flags, "--batch_size=4", "--max_steps=1")
    folders = (f"--checkpoint_dir={tmp_path / 'train'}", f"--export_dir={tmp_path / 'export'}")
    run_script("cifar10_predict.py", *folders)
    run_script("-c", DIFFERENTIATE, tmp_path, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_model_learns_the_synthetic_classes(tmp_path, data, eval_flags):
    train_dir = f"--train_dir={tmp_path / 'train'}"
    run_script("cifar10_train.py", *data, train_dir, "--max_steps=400", timeout=400)
    evaluated = run_script("cifar10_eval.py", *eval_flags)
    # Three runs gave 0.933 to 0.940. Chance is 0.1.
    assert 0.9 < float(evaluated.stdout.split("=")[1]) < 1.0


@pytest.mark.parametrize("script", ["cifar10_train.py", "cifar10_eval.py"])
def test_invalid_records_are_a_one_line_error(tmp_path, script):
    folder = tmp_path / dataset.EXTRACTED_FOLDER
    write_dataset(folder)
    records = make_records(4)
    records[2, 0] = 10
    records.tofile(folder / "data_batch_2.bin")
    out = f"--{'eval' if script == 'cifar10_eval.py' else 'train'}_dir={tmp_path / 'out'}"
    process = run_script(script, f"--data_dir={tmp_path}", out, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    (line,) = messages(process.stderr)
    assert re.match(rf"{script}: error: .*data_batch_2\.bin has label 10 in record 2 ", line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("constant", "value"), [("DEPTH", 1), ("HEIGHT", 64)], ids=["grayscale", "64 x 64"]
)
@pytest.mark.slow
def test_an_edited_record_layout_takes_effect_in_every_script(tmp_path, constant, value):
    for path in ROOT.glob("cifar10*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "support", tmp_path / "support")
    path = tmp_path / "support" / "data" / "records.py"
    text = path.read_text()
    names = ("HEIGHT", "WIDTH") if constant == "HEIGHT" else (constant,)
    for name in names:
        text, count = re.subn(rf"^{name} = \d+", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    path.write_text(text)

    draw = np.random.default_rng(0).integers
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for number in range(5):
            image = Image.fromarray(draw(0, 256, [70, 64, 3]).astype(np.uint8))
            image.save(tmp_path / "images" / folder / f"{number}.png")

    def run(script, *flags):
        return run_script(tmp_path / script, *flags)

    run("cifar10_convert.py", f"--images={tmp_path}/images", f"--output={tmp_path}/converted")
    converted = f"--data_dir={tmp_path}/converted"
    small = ("--max_steps=2", "--batch_size=4", "--min_fraction_of_examples_in_queue=0.001")
    synthetic = ("--synthetic_data", f"--data_dir={tmp_path}/data")
    for number, flags in enumerate([(*synthetic, "--fast_ops=false"), (*synthetic,), (converted,)]):
        train_dir = f"{tmp_path}/train_{number}"
        run("cifar10_train.py", f"--train_dir={train_dir}", *small, *flags)
    run(
        "cifar10_eval.py",
        "--run_once",
        "--num_examples=40",
        f"--checkpoint_dir={train_dir}",
        f"--eval_dir={tmp_path}/eval",
        converted,
    )
    process = run("cifar10_predict.py", f"--checkpoint_dir={train_dir}", f"{tmp_path}/images/test")
    assert len(process.stdout.splitlines()) == 10
