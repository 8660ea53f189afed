"""The scripts as processes: what they print, the files that they write, and their exit codes."""

import ast
import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest
from conftest import (
    ROOT,
    make_records,
    messages,
    run_script,
    running_script,
    save_checkpoint,
    script_environment,
    write_dataset,
)
from PIL import Image

from support.data import dataset

TRAINERS = ("cifar10_train.py", "cifar10_multi_gpu_train.py")
COMMANDS = (*TRAINERS, "cifar10_eval.py", "cifar10_predict.py", "cifar10_convert.py")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (*ROOT.glob("cifar10*.py"), *(ROOT / "support").rglob("*.py"))
    if path.stem != "__init__"
)
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}"
STEP_LINE = re.compile(
    TIME + r": step (\d+), loss = \d+\.\d\d \(\d+\.\d examples/sec; \d+\.\d{3} sec/batch\)"
)
# Printed every 10 seconds where stderr is not a terminal, and thus only on a slow machine.
PROGRESS_LINE = re.compile(r"(Converting|Filling queue|Evaluating): \d+ of \d+ \(.*\)")


def check_training_output(process, steps, queued=100):
    first, *lines = process.stdout.splitlines()
    assert first == (
        f"Filling queue with {queued} CIFAR images before starting to train. "
        "This will take a few minutes."
    )
    matches = [STEP_LINE.fullmatch(line) for line in lines]
    assert all(matches), process.stdout
    assert [int(match[1]) for match in matches] == steps


def messages_except_progress(process):
    return [line for line in messages(process.stderr) if not PROGRESS_LINE.fullmatch(line)]


def check_error(process, pattern):
    assert process.returncode == 1
    assert process.stdout == ""
    assert re.search(pattern, process.stderr), process.stderr
    assert "Traceback" not in process.stderr


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

    for choice in (
        "--use_moving_averages",
        "--nouse_moving_averages",
        "--eval_data=train_eval",
        "--fast_ops=false",
    ):
        evaluated = run_script("cifar10_eval.py", *eval_flags, "--num_examples=500", choice)
        assert re.fullmatch(TIME + r": precision @ 1 = \d\.\d{3}\n", evaluated.stdout)
        assert messages_except_progress(evaluated) == []

    names = os.listdir(train_dir)
    assert (train_dir / "notes.txt").read_text() == "unrelated"
    assert {f"model.ckpt-{step}.index" for step in (0, 11, 21, 31)} <= set(names)
    assert {name.split(".")[0] for name in os.listdir(tmp_path / "eval")} == {"events", "results"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_path_flag_means_itself_whatever_the_name(tmp_path):
    """Beside each folder is one that its name matches as a pattern. That one stays as it is."""
    names = {}
    for number, label in enumerate(("house", "sun")):
        for name in ("images[1] ?*", "images1 xy"):
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (32, 32), (100 * number, 20 * i, 0)).save(folder / f"{i}.png")
    for name in ("data", "train", "eval"):
        matched = tmp_path / f"{name}1\u732b xy"
        matched.mkdir()
        for file in ("checkpoint", "model.ckpt-0.index", "model.ckpt-3.meta", "test_batch.bin"):
            (matched / file).write_text("unrelated")
        # TensorFlow would look for checkpoints in the folders that match a pattern.
        brackets = "[1]\u732b ?*" if name == "data" else "1\u732b {x}"
        names[name] = f"{tmp_path}/{name}{brackets}"
    before = {path: path.read_bytes() for path in tmp_path.glob("*1* xy/*") if path.is_file()}
    assert len(before) == 12
    images = f"{tmp_path}/images[1] ?*"
    run_script(
        "cifar10_convert.py", f"--images={images}", "--test_fraction=0.4",
        f"--output={names['data']}",
    )  # fmt: skip
    for script, max_steps in ((TRAINERS[0], 3), (TRAINERS[1], 6)):
        process = run_script(
            script, f"--data_dir={names['data']}", f"--train_dir={names['train']}",
            f"--max_steps={max_steps}", "--batch_size=4", "--save_checkpoint_steps=1",
            "--max_checkpoints_to_keep=2",
        )  # fmt: skip
        assert f"step {max_steps - 3}, loss = " in process.stdout
    indexes = {name for name in os.listdir(names["train"]) if name.endswith(".index")}
    assert indexes == {"model.ckpt-5.index", "model.ckpt-6.index"}
    process = run_script(
        "cifar10_eval.py", f"--data_dir={names['data']}", f"--checkpoint_dir={names['train']}",
        f"--eval_dir={names['eval']}", "--run_once",
    )  # fmt: skip
    assert ": precision @ 1 = " in process.stdout
    assert "results.jsonl" in os.listdir(names["eval"])
    process = run_script(
        "cifar10_predict.py", f"--checkpoint_dir={names['train']}", f"{images}/sun/0.png"
    )
    assert process.stdout.startswith(f"{images}/sun/0.png: ")
    assert {path: path.read_bytes() for path in before} == before


def test_the_end_of_a_run_prints_no_warnings_of_canceled_queues(train_flags, eval_flags):
    trained = run_script("cifar10_train.py", *train_flags, "--batch_size=16", "--max_steps=2")
    check_training_output(trained, [0])
    # Ends while the queue still holds images.
    evaluated = run_script("cifar10_eval.py", *eval_flags, "--batch_size=16", "--num_examples=40")
    for process in (trained, evaluated):
        assert "Local rendezvous is aborting" not in process.stderr
        assert messages_except_progress(process) == []


# Both print "LENGTH SLOPE": the length of a gradient, and the slope of the function along it.
DIFFERENTIATE_CHECKPOINT = """
import sys
import numpy as np
import tensorflow.compat.v1 as tf

tf.disable_eager_execution()
saver = tf.train.import_meta_graph(sys.argv[1] + ".meta")
operations = tf.get_default_graph().get_operations()
(convolution,) = [op for op in operations if op.type == "Conv2D" and op.name.startswith("conv1/")]
(cross_entropy,) = [op for op in operations if op.type == "SparseSoftmaxCrossEntropyWithLogits"]
(images, _), (logits, labels) = convolution.inputs, cross_entropy.inputs
(total_loss,) = [op.outputs[0] for op in operations if op.name == "total_loss"]
variables = tf.trainable_variables()
(of_images,) = tf.gradients(logits[:, 3], images)
of_variables = tf.gradients(total_loss, variables)
assert not [op.name for op in operations if "PyFunc" in op.type]
assert not [op.name for op in operations if "_gradient_op_type" in op.node_def.attr]
values = np.random.default_rng(0).normal(size=images.shape)
fed = {images: values, labels: np.arange(len(values)) % 10}
config = tf.ConfigProto()
# Constant folding would make the gradients wait for the queue, whose images are fed.
config.graph_options.rewrite_options.disable_meta_optimizer = True
with tf.Session(config=config) as session:
    saver.restore(session, sys.argv[1])
    gradient = session.run(of_images, fed)
    length = np.linalg.norm(gradient)
    move = 0.1 * gradient / length
    ends = [
        session.run(logits, {images: values + sign * move})[:, 3].sum(dtype=np.float64)
        for sign in (1, -1)
    ]
    print(length, (ends[0] - ends[1]) / 0.2)
    gradients = session.run(of_variables, fed)
    length = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    moves = [0.01 * gradient / length for gradient in gradients]
    before = session.run(variables)
    ends = []
    for sign in (1, -1):
        for variable, value, move in zip(variables, before, moves, strict=True):
            variable.load(value + sign * move, session)
        ends.append(float(session.run(total_loss, fed)))
    print(length, (ends[0] - ends[1]) / 0.02)
"""
DIFFERENTIATE_EXPORT = """
import sys
import numpy as np
import tensorflow as tf

model = tf.saved_model.load(sys.argv[1])
(convolution,) = [op for op in model.graph.get_operations() if op.name == "conv1/Conv2D"]
crops_to_probabilities = model.prune(convolution.inputs[0].name, "probabilities:0")
crops = tf.constant(np.random.default_rng(0).normal(size=[3, 24, 24, 3]).astype(np.float32))
with tf.GradientTape() as tape:
    tape.watch(crops)
    total = tf.reduce_sum(crops_to_probabilities(crops)[:, 3])
gradient = tape.gradient(total, crops)
length = tf.norm(gradient)
ends = [
    tf.reduce_sum(crops_to_probabilities(crops + step * gradient / length)[:, 3])
    for step in (0.1, -0.1)
]
print(length.numpy(), ((ends[0] - ends[1]) / 0.2).numpy())
"""


def check_gradients(code, path, tmp_path, count):
    """Runs code that prints lengths and slopes, in a process that imports TensorFlow only."""
    process = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=tmp_path,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = [tuple(map(float, line.split())) for line in process.stdout.splitlines()]
    assert len(lines) == count
    for length, slope in lines:
        assert length > 0
        assert slope == pytest.approx(length, rel=0.02)


def test_a_stored_training_graph_can_be_differentiated(tmp_path, train_flags):
    run_script("cifar10_train.py", *train_flags, "--batch_size=4", "--max_steps=1")
    check_gradients(DIFFERENTIATE_CHECKPOINT, tmp_path / "train" / "model.ckpt-1", tmp_path, 2)


@pytest.mark.slow
def test_an_exported_model_can_be_differentiated(tmp_path):
    save_checkpoint(tmp_path / "train", 7)
    run_script(
        "cifar10_predict.py",
        f"--checkpoint_dir={tmp_path / 'train'}",
        f"--export_dir={tmp_path / 'export'}",
    )
    check_gradients(DIFFERENTIATE_EXPORT, tmp_path / "export", tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_model_learns_the_synthetic_classes(tmp_path, data, eval_flags):
    train_dir = f"--train_dir={tmp_path / 'train'}"
    run_script("cifar10_train.py", *data, train_dir, "--max_steps=400", timeout=400)
    evaluated = run_script("cifar10_eval.py", *eval_flags)
    # Three runs gave 0.933 to 0.940. Chance is 0.1.
    assert 0.9 < float(evaluated.stdout.split("=")[1]) < 1.0


@pytest.mark.slow
def test_a_conversion_shows_its_progress_on_terminals_only_and_can_be_interrupted(tmp_path):
    for seed, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number, record in enumerate(make_records(300, seed)):
            noise = record[1:].reshape(32, 32, 3)
            image = Image.fromarray(noise).resize((500, 400))
            image.save(tmp_path / "images" / name / f"{number}.png", compress_level=1)
    (tmp_path / "images" / "cat" / "notes.png").write_text("not an image")
    command = (
        "cifar10_convert.py",
        f"--images={tmp_path / 'images'}",
        "--test_fraction=0.25",
        f"--output={tmp_path / 'out'}",
    )
    with running_script(*command) as process:
        while not (tmp_path / ".out.part").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1].startswith("cifar10_convert.py: stopped by SIGINT: ")
    assert os.listdir(tmp_path) == ["images"]

    written = run_on_terminal(*command)
    counts = re.findall(r"Converting: .*? (\d+)/601 \[\d+:\d+<\d+:\d+, .*?images/s\]", written)
    check_progress(counts)
    # The error message is on a line of its own.
    assert re.search(r"\r\S+/cat/notes.png: it is not a PNG.*\r\n", written)
    assert written.endswith("; unreadable files: 1\r\n")
    shutil.rmtree(tmp_path / "out")
    process = run_script(*command)
    (line,) = messages_except_progress(process)
    assert re.fullmatch(r"\S+/cat/notes.png: it is not .*", line)
    assert "\r" not in process.stderr
    assert process.stdout.startswith(
        "Wrote 450 training images and 150 test images of 2 classes (cat, dog) to "
    )


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_example_in_the_readme_leads_from_image_files_to_predictions(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```shell\n(python examples/draw_pictures.py .*?)```", readme, re.DOTALL)
    outputs = []
    for line in block.replace("/tmp/pictures", str(tmp_path / "pictures")).splitlines():
        python, *arguments = line.split()
        assert python == "python"
        outputs.append(run_script(*arguments).stdout)
    drawn, converted, trained, evaluated, predicted = outputs
    assert drawn == ""
    assert converted.startswith("Wrote 240 training images and 60 test images of 3 classes (")
    assert re.search(r"step 190, loss = \S+ .*\n$", trained)
    # Chance is 0.333.
    assert float(re.search(r"precision @ 1 = (\S+)\n$", evaluated)[1]) > 0.8
    assert re.fullmatch(r"\S+/test/house/000.png: house \S+, \w+ \S+, \w+ \S+\n", predicted)


@pytest.mark.slow
def test_locally_connected_layers_learn_and_their_checkpoints_need_the_same_flag(
    tmp_path, train_flags, eval_flags
):
    local = ("--top_layers=local", "--crop_size=28")
    size = ("--max_steps=100", "--batch_size=64", "--min_fraction_of_examples_in_queue=0.1")
    run_script("cifar10_multi_gpu_train.py", *train_flags, *local, *size)
    process = run_script("cifar10_eval.py", *eval_flags, *local, "--num_examples=2000")
    # Chance is 0.1.
    assert float(re.search(r"precision @ 1 = (\S+)\n$", process.stdout)[1]) > 0.2
    predict = ("cifar10_predict.py", "missing.png", f"--checkpoint_dir={tmp_path / 'train'}")
    for command in (("cifar10_eval.py", *eval_flags), predict):
        process = run_script(*command, check=False)
        assert process.returncode == 1
        assert re.fullmatch(
            r"\S+: error: \S+ckpt-100 was trained with --top_layers=local, not with "
            r"--top_layers=full; use --top_layers=local, or choose another folder with "
            r"--checkpoint_dir",
            process.stderr.splitlines()[-1],
        )


@pytest.mark.parametrize("script", [*TRAINERS, "cifar10_eval.py"])
def test_invalid_records_are_a_one_line_error(tmp_path, script):
    folder = tmp_path / dataset.EXTRACTED_FOLDER
    write_dataset(folder)
    records = make_records(4)
    records[2, 0] = 10
    records.tofile(folder / "data_batch_2.bin")
    out = f"--{'eval' if script == 'cifar10_eval.py' else 'train'}_dir={tmp_path / 'out'}"
    process = run_script(script, f"--data_dir={tmp_path}", out, check=False)
    check_error(process, rf"{script}: error: .*data_batch_2\.bin has label 10 in record 2 ")
    assert len(messages(process.stderr)) == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_download_is_an_error_that_lists_the_alternatives(tmp_path):
    process = run_script(
        "cifar10_train.py",
        f"--data_dir={tmp_path / 'data'}",
        f"--train_dir={tmp_path / 'train'}",
        f"--data_url={tmp_path / 'missing.tar.gz'}",
        check=False,
    )
    check_error(
        process, "cannot download .*; run the same command again, .*--data_url.*--synthetic_data"
    )
    assert os.listdir(tmp_path / "data") == []
    assert not (tmp_path / "train").exists()


def test_without_run_once_an_evaluation_waits_for_a_checkpoint(eval_flags):
    with running_script("cifar10_eval.py", *eval_flags, "--run_once=false") as process:
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("Waiting for a checkpoint in ") for line in lines)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert messages(process.stderr.read()) == [
            "cifar10_eval.py: stopped by SIGINT: nothing was lost; run the same command again"
        ]


def run_on_terminal(*arguments):
    """Runs a script on a terminal of 100 columns; returns what it writes there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=script_environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        timer = threading.Timer(200, process.kill)  # reading has no time limit of its own
        timer.start()
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # Linux raises it when the script has exited
            while chunk := os.read(ours, 65536):
                written += chunk
        os.close(ours)
        timer.cancel()
        assert process.wait(timeout=60) == 0, written
    return written.decode()


def check_progress(counts):
    """Checks that the numbers of a progress bar, as strings, increase."""
    numbers = list(map(int, counts))
    assert numbers == sorted(numbers)
    assert numbers[-1] > 0


@pytest.mark.slow
def test_training_and_evaluation_show_their_progress_on_terminals_only(
    tmp_path, train_flags, eval_flags
):
    size = ("--batch_size=8", "--max_steps=1", "--min_fraction_of_examples_in_queue=1")
    train = ("cifar10_train.py", *train_flags, *size)
    evaluate = ("cifar10_eval.py", *eval_flags, "--num_examples=1500")
    written = run_on_terminal(*train)
    check_progress(re.findall(r"Filling queue: .*? (\d+)/10000 \[.*?images/s\]", written))
    # The bar is erased before the first line is printed.
    assert re.search(r"\r +\r\d{4}-.*: step 0, loss = .*\r\n$", written)
    written = run_on_terminal(*evaluate)
    check_progress(re.findall(r"Evaluating: .*? (\d+)/1500 \[.*?images/s\]", written))
    assert re.search(r"\r +\r\d{4}-.*: precision @ 1 = 0\.\d{3}\r\n$", written)
    shutil.rmtree(tmp_path / "train")
    for arguments in (train, evaluate):
        process = run_script(*arguments)
        assert messages_except_progress(process) == []
        assert "\r" not in process.stdout + process.stderr


def test_help_begins_with_the_docstring_and_lists_the_flags_by_module():
    text = run_script("cifar10_eval.py", "--help").stdout
    source = (ROOT / "cifar10_eval.py").read_text()
    assert text.startswith(ast.get_docstring(ast.parse(source), clean=False))
    own, model, pipeline = re.split(r"^Flags of \w+:\n", text, flags=re.MULTILINE)
    assert "    --checkpoint_dir\n" in own
    assert "    --weight_decay\n" in model
    assert "    --crop_size\n" in pipeline


@pytest.mark.parametrize("order", [MODULES, MODULES[::-1]], ids=["forward", "backward"])
def test_modules_can_be_imported_in_any_order_and_do_not_read_the_command_line(order):
    code = """
import importlib, sys
_, *names = sys.argv
sys.argv = ["notebook", "--batch_size=3", "--unknown", "argument"]
for name in names:
    importlib.import_module(name)
import cifar10, cifar10_eval
assert cifar10.FLAGS.batch_size == 128
assert cifar10_eval.FLAGS.checkpoint_dir == "/tmp/cifar10_train"
assert cifar10.inference(cifar10.tf.zeros([1, 24, 24, 3])).shape == [1, 10]
"""
    process = run_script("-c", code, *order)
    assert process.stdout == ""
    assert messages(process.stderr) == []


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

    data_flags = ("--synthetic_data", f"--data_dir={tmp_path}/data")
    train_flags = ("--max_steps=2", "--batch_size=4", "--min_fraction_of_examples_in_queue=0.001")
    run("cifar10_convert.py", f"--images={tmp_path}/images", f"--output={tmp_path}/converted")
    for number, flags in enumerate((data_flags, (f"--data_dir={tmp_path}/converted",))):
        for fast_ops in ("true", "false"):
            train_dir = f"{tmp_path}/train_{number}_{fast_ops}"
            flags_of_all = (*flags, f"--fast_ops={fast_ops}")
            run("cifar10_train.py", f"--train_dir={train_dir}", *train_flags, *flags_of_all)
    run(
        "cifar10_eval.py",
        "--run_once",
        "--num_examples=40",
        f"--checkpoint_dir={train_dir}",
        f"--eval_dir={tmp_path}/eval",
        f"--data_dir={tmp_path}/converted",
    )
    process = run("cifar10_predict.py", f"--checkpoint_dir={train_dir}", f"{tmp_path}/images/test")
    assert len(process.stdout.splitlines()) == 10
