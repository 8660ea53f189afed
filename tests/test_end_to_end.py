"""The scripts as their users run them: real processes, real files, all that they print."""

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
import time

import pytest
from conftest import ROOT, make_records, run_script, write_data_set
from PIL import Image

import cifar10_data

SCRIPTS = ("cifar10_train.py", "cifar10_multi_gpu_train.py", "cifar10_eval.py")
MODULES = sorted(path.stem for path in ROOT.glob("cifar10*.py"))
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}"
STEP_LINE = re.compile(
    TIME + r": step (\d+), loss = \d+\.\d\d \(\d+\.\d examples/sec; \d+\.\d{3} sec/batch\)"
)


def check_training_output(process, steps, queued=100):
    first, *lines = process.stdout.splitlines()
    assert first == (
        f"Filling queue with {queued} CIFAR images before starting to train. "
        "This will take a few minutes."
    )
    matches = [STEP_LINE.fullmatch(line) for line in lines]
    assert all(matches), process.stdout
    assert [int(match[1]) for match in matches] == steps


@pytest.mark.slow
def test_the_scripts_train_resume_and_evaluate_each_others_checkpoints(
    tmp_path, synthetic_data_dir
):
    train_dir, eval_dir = tmp_path / "train", tmp_path / "eval"
    train_dir.mkdir()
    (train_dir / "notes.txt").write_text("mine")
    data = ("--synthetic_data", f"--data_dir={synthetic_data_dir}", "--batch_size=16")
    training = (
        *data,
        f"--train_dir={train_dir}",
        "--min_fraction_of_examples_in_queue=0.01",
        "--log_frequency=5",
    )
    evaluation = (
        *data,
        f"--checkpoint_dir={train_dir}",
        f"--eval_dir={eval_dir}",
        "--run_once",
        "--num_examples=500",
    )

    train = run_script("cifar10_train.py", *training, "--max_steps=11")
    check_training_output(train, [0, 5, 10])
    assert train.stderr == ""
    assert 4.6 < float(re.search(r"step 0, loss = (\S+)", train.stdout)[1]) < 4.75

    towers = run_script("cifar10_multi_gpu_train.py", *training, "--max_steps=21", "--num_gpus=2")
    check_training_output(towers, [11, 15, 20])
    assert towers.stderr.splitlines() == [
        "WARNING:tensorflow:--num_gpus=2, but TensorFlow sees 0: the towers share what there is, "
        "which is the CPU."
    ]

    resume = run_script("cifar10_train.py", *training, "--max_steps=31")
    check_training_output(resume, [21, 25, 30])
    finished = run_script("cifar10_train.py", *training, "--max_steps=31")
    assert finished.stdout == ""
    assert "nothing to do" in finished.stderr

    for choice in ("--use_moving_averages", "--nouse_moving_averages", "--eval_data=train_eval"):
        evaluate = run_script("cifar10_eval.py", *evaluation, choice)
        assert re.fullmatch(TIME + r": precision @ 1 = \d\.\d{3}\n", evaluate.stdout)
        assert evaluate.stderr == ""

    names = os.listdir(train_dir)
    assert (train_dir / "notes.txt").read_text() == "mine"
    assert {f"model.ckpt-{step}.index" for step in (0, 11, 21, 31)} <= set(names)
    assert {name.split(".")[0] for name in os.listdir(eval_dir)} == {"events", "results"}


@pytest.mark.slow
def test_the_model_learns_the_synthetic_classes(tmp_path, synthetic_data_dir):
    data = ("--synthetic_data", f"--data_dir={synthetic_data_dir}")
    run_script("cifar10_train.py", *data, f"--train_dir={tmp_path}", "--max_steps=400")
    evaluate = run_script(
        "cifar10_eval.py",
        *data,
        "--run_once",
        f"--checkpoint_dir={tmp_path}",
        f"--eval_dir={tmp_path / 'eval'}",
    )
    # Three runs gave 0.933 to 0.940; chance is 0.1.
    assert 0.9 < float(evaluate.stdout.split("=")[1]) < 1.0


def check_error(process, *patterns):
    assert process.returncode == 1
    assert process.stdout == ""
    for pattern in patterns:
        assert re.search(pattern, process.stderr), process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_a_conversion_shows_its_progress_on_a_terminal_only_and_can_be_interrupted(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(300):
            noise = make_records(1, number)[0, 1:].reshape(32, 32, 3)
            picture = Image.fromarray(noise).resize((500, 400))
            picture.save(tmp_path / "pictures" / name / f"{number}.png", compress_level=1)
    (tmp_path / "pictures" / "cat" / "notes.txt").write_text("no picture")
    command = (
        "cifar10_convert.py",
        f"--pictures={tmp_path / 'pictures'}",
        "--test_fraction=0.25",
        f"--output={tmp_path / 'out'}",
    )
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while not (tmp_path / ".out.part").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, b"")
    assert errors.decode().splitlines()[-1].startswith("cifar10_convert.py: ended by SIGINT: ")
    assert os.listdir(tmp_path) == ["pictures"]

    written = run_on_terminal(*command)
    counts = [
        int(n)
        for n in re.findall(
            r"Converting: .*? (\d+)/601 \[\d+:\d+<\d+:\d+, .*?pictures/s\]", written
        )
    ]
    assert counts == sorted(counts)
    assert counts[-1] > 0
    assert re.search(r"\r\S+/cat/notes.txt: it is not a PNG.*\r\n", written)  # on a line of its own
    assert written.endswith("; 1 could not be read\r\n")
    shutil.rmtree(tmp_path / "out")
    process = run_script(*command)
    assert re.fullmatch(r"\S+/cat/notes.txt: it is not .*\n", process.stderr)
    assert process.stdout.startswith("450 pictures to train on and 150 to test on, of 2 classes (")


@pytest.mark.slow
def test_the_readmes_example_goes_from_nothing_to_predictions(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```shell\n(python examples/draw_pictures.py .*?)```", readme, re.DOTALL)
    outputs = []
    for line in block.replace("/tmp/pictures", str(tmp_path / "pictures")).splitlines():
        python, *arguments = line.split()
        assert python == "python"
        outputs.append(run_script(*arguments).stdout)
    drawn, converted, trained, evaluated, predicted = outputs
    assert drawn == ""
    assert converted.startswith("300 pictures to train on and 60 to test on, of 3 classes (")
    assert re.search(r"step 190, loss = \S+ .*\n$", trained)
    # Guessing has 0.333.
    assert float(re.search(r"precision @ 1 = (\S+)\n$", evaluated)[1]) > 0.8
    lines = re.findall(r"/test/(\w+)/000.png: (\w+) (\S+), \w+ \S+, \w+ \S+\n", predicted)
    assert [name for name, _, _ in lines] == ["house", "sun", "tree"]
    assert sum(name == found for name, found, _ in lines) >= 2


@pytest.mark.slow
def test_local_layers_learn_and_their_checkpoints_are_evaluated_and_predict(
    tmp_path, synthetic_data_dir
):
    data = ("--synthetic_data", f"--data_dir={synthetic_data_dir}")
    local = ("--top_layers=local", "--crop_size=28")
    train_dir, eval_dir = tmp_path / "train", tmp_path / "eval"
    run_script(
        "cifar10_multi_gpu_train.py",
        *data,
        *local,
        f"--train_dir={train_dir}",
        "--max_steps=100",
        "--batch_size=64",
        "--min_fraction_of_examples_in_queue=0.1",
    )
    evaluate = ("cifar10_eval.py", *data, "--run_once", f"--eval_dir={eval_dir}")
    process = run_script(*evaluate, *local, "--num_examples=2000", f"--checkpoint_dir={train_dir}")
    # Guessing has 0.1.
    assert float(re.search(r"precision @ 1 = (\S+)\n$", process.stdout)[1]) > 0.2
    for script in (evaluate, ("cifar10_predict.py", "nothing.png")):
        process = run_script(*script, f"--checkpoint_dir={train_dir}", check=False)
        assert process.returncode == 1
        (line,) = process.stderr.splitlines()[-1:]
        assert re.fullmatch(
            r"\S+: error: \S+ckpt-100 has been trained with --top_layers=local, not with "
            r"--top_layers=full; give --top_layers=local, or another folder with --checkpoint_dir",
            line,
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_records_end_every_script_with_one_line(tmp_path, script):
    folder = tmp_path / cifar10_data.EXTRACTED_FOLDER
    write_data_set(folder)
    records = make_records(4)
    records[2, 0] = 10
    records.tofile(folder / "data_batch_2.bin")
    process = run_script(
        script,
        f"--data_dir={tmp_path}",
        f"--{'eval_dir' if script == 'cifar10_eval.py' else 'train_dir'}={tmp_path / 'out'}",
        check=False,
    )
    check_error(
        process,
        rf"^{script}: error: .*data_batch_2\.bin: record 2 .from 0. has label 10.*put a good one",
    )
    assert len(process.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_download_that_fails_offers_the_ways_on_and_chooses_none(tmp_path):
    process = run_script(
        "cifar10_train.py",
        f"--data_dir={tmp_path / 'data'}",
        f"--train_dir={tmp_path / 'train'}",
        f"--data_url={tmp_path / 'nothing.tar.gz'}",
        check=False,
    )
    check_error(process, "cannot download .*start again .*--data_url.*--synthetic_data")
    assert os.listdir(tmp_path / "data") == []
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["cifar10_train.py", "--unknown=1"], "Unknown command line flag 'unknown'"),
        (["cifar10_train.py", "--min_fraction_of_examples_in_queue=nan"], "must be a number"),
        (["cifar10_train.py", "--train_dir="], "must name a folder"),
        (["cifar10_train.py", "--moving_average_decay=1"], "0 or more, and less than 1"),
        (["cifar10_train.py", "--max_contrast_factor=0.1"], "least contrast must not be more"),
        (["cifar10_multi_gpu_train.py", "--num_gpus=none"], "--num_gpus=none"),
        (["cifar10_eval.py", "--eval_data=validation"], "<test|train_eval>"),
        (["cifar10_eval.py", "--run_once", "false"], "not a flag: 'false'"),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_a_usage_message(arguments, pattern):
    process = run_script(*arguments, check=False)
    check_error(process, pattern.replace("|", r"\|"), "flags")


@pytest.mark.parametrize(("run_once", "ends"), [("--run_once", True), ("--run_once=false", False)])
def test_without_a_checkpoint_evaluation_fails_once_or_waits(
    tmp_path, synthetic_data_dir, run_once, ends
):
    arguments = (
        "cifar10_eval.py",
        run_once,
        "--synthetic_data",
        f"--data_dir={synthetic_data_dir}",
        f"--checkpoint_dir={tmp_path / 'none'}",
        f"--eval_dir={tmp_path / 'eval'}",
    )
    if ends:
        process = run_script(*arguments, check=False)
        check_error(process, "error: there is no checkpoint in .*none; train first")
        return
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("Waiting for a checkpoint in ") for line in lines)
        assert process.poll() is None
        process.send_signal(2)
        assert process.wait(timeout=30) == 130
        assert re.fullmatch(
            "cifar10_eval.py: ended by SIGINT: nothing is lost; .*\n", process.stderr.read()
        )


def run_on_terminal(*arguments):
    """Runs a script on a terminal of 100 columns; returns what it writes there."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdin=its, stdout=its, stderr=its
    ) as process:
        os.close(its)
        written = b""
        with contextlib.suppress(OSError):  # how Linux tells that the other end is closed
            while chunk := os.read(ours, 65536):
                written += chunk
        os.close(ours)
        assert process.wait(timeout=60) == 0, written
    return written.decode()


@pytest.mark.slow
def test_the_filling_queue_and_the_evaluation_show_their_progress_on_a_terminal_only(
    tmp_path, synthetic_data_dir
):
    train = (
        "cifar10_train.py",
        "--synthetic_data",
        f"--data_dir={synthetic_data_dir}",
        "--batch_size=8",
        "--max_steps=1",
        "--min_fraction_of_examples_in_queue=1",
        f"--train_dir={tmp_path / 'train'}",
    )
    evaluate = (
        "cifar10_eval.py",
        "--synthetic_data",
        f"--data_dir={synthetic_data_dir}",
        "--run_once",
        "--num_examples=1500",
        f"--checkpoint_dir={tmp_path / 'train'}",
        f"--eval_dir={tmp_path / 'eval'}",
    )
    written = run_on_terminal(*train)
    levels = [
        int(n) for n in re.findall(r"Filling queue: .*? (\d+)/10000 \[.*?images/s\]", written)
    ]
    assert levels == sorted(levels)
    assert levels[-1] > 0
    # The bar is gone before the first line is written.
    assert re.search(r"\r +\r\d{4}-.*: step 0, loss = .*\r\n$", written)
    written = run_on_terminal(*evaluate)
    counts = [int(n) for n in re.findall(r"Evaluating: .*? (\d+)/1500 \[.*?images/s\]", written)]
    assert counts == sorted(counts)
    assert counts[-1] > 0
    assert re.search(r"\r +\r\d{4}-.*: precision @ 1 = 0\.\d{3}\r\n$", written)
    shutil.rmtree(tmp_path / "train")
    for arguments in (train, evaluate):
        process = run_script(*arguments)
        assert process.stderr == ""
        assert "\r" not in process.stdout


@pytest.mark.parametrize("script", ["cifar10_train.py", "cifar10_eval.py", "cifar10_predict.py"])
def test_help_tells_each_modules_flags_and_is_not_an_error(script):
    process = run_script(script, "--help")
    assert process.stderr == ""
    groups = re.split(r"^(\S+):\n", process.stdout, flags=re.MULTILINE)[1:]
    flags_of = {
        name: re.findall(r"^  --(?:\[no\])?(\w+):", text, re.MULTILINE)
        for name, text in zip(groups[::2], groups[1::2], strict=True)
    }
    assert next(iter(flags_of)) == script or script == "cifar10_train.py"
    assert {"batch_size", "initial_learning_rate", "weight_decay"} < set(flags_of["cifar10"])
    assert set(flags_of["cifar10_input"]) == {
        "crop_size",
        "random_flip",
        "max_brightness_delta",
        "min_contrast_factor",
        "max_contrast_factor",
        "min_fraction_of_examples_in_queue",
        "num_preprocess_threads",
    }
    assert ("cifar10_session" in flags_of) == (script == "cifar10_train.py")
    assert ("cifar10_restore" in flags_of) == (script != "cifar10_train.py")
    assert process.stdout.startswith(("Trains", "Evaluates", "Tells what is on pictures"))


@pytest.mark.parametrize("option", ["--help", "--helpfull"])
def test_help_may_be_left_early(option):
    command = f"{sys.executable} cifar10_train.py {option} | head -1; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_a_reader_that_leaves_ends_training_without_a_traceback(tmp_path, synthetic_data_dir):
    arguments = (
        "cifar10_train.py",
        "--synthetic_data",
        f"--data_dir={synthetic_data_dir}",
        f"--train_dir={tmp_path}",
        "--batch_size=4",
        "--log_frequency=1",
        "--min_fraction_of_examples_in_queue=0.001",
    )
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == ""


def test_a_train_dir_that_cannot_be_used_is_told_in_one_line(tmp_path, synthetic_data_dir):
    (tmp_path / "file").write_text("in the way")
    data = ("--synthetic_data", f"--data_dir={synthetic_data_dir}")
    process = run_script("cifar10_train.py", *data, f"--train_dir={tmp_path / 'file'}", check=False)
    check_error(process, "error: cannot use --train_dir=.*file")
    assert len(process.stderr.splitlines()) == 1


def test_all_modules_import_in_any_order_without_reading_the_command_line():
    code = """
import importlib, sys
sys.argv = ["notebook", "--batch_size=3", "--unknown", "argument"]
for name in sys.stdin.read().split():
    importlib.import_module(name)
import cifar10, cifar10_eval
assert cifar10.FLAGS.batch_size == 128
assert cifar10_eval.FLAGS.checkpoint_dir == "/tmp/cifar10_train"
assert cifar10.inference(cifar10.tf.zeros([1, 24, 24, 3])).shape == [1, 10]
"""
    for order in (MODULES, MODULES[::-1]):
        process = subprocess.run(
            [sys.executable, "-c", code],
            input=" ".join(order),
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
        )
        assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
