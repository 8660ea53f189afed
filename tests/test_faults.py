"""Kills, signals, damaged files, full disks, concurrent runs: no loss and no silent failure."""

import os
import pathlib
import random
import re
import resource
import shlex
import signal
import sys
import time

import numpy as np
import pytest
from conftest import (
    make_records,
    messages,
    run_in_shell,
    run_script,
    running_script,
    write_dataset,
    written_values,
)

import cifar10_eval
from support.data import dataset, records
from support.ops.tensorflow_v1 import tf
from support.run import checkpoints

pytestmark = pytest.mark.slow

FLAGS = cifar10_eval.FLAGS


@pytest.fixture
def data_dir(tmp_path):
    """A `--data_dir` with a small dataset that the test may damage."""
    write_dataset(tmp_path / "data" / dataset.EXTRACTED_FOLDER, train_counts=[40] * 5)
    return tmp_path / "data"


@pytest.fixture
def train_dir(tmp_path):
    return tmp_path / "train"


def training(data_dir, train_dir, *flags, script="cifar10_train.py", timeout=200):
    """Starts a trainer that prints a line per step; see `running_script`."""
    return running_script(
        script,
        f"--data_dir={data_dir}",
        f"--train_dir={train_dir}",
        "--batch_size=4",
        "--log_frequency=1",
        "--min_fraction_of_examples_in_queue=0.001",
        *flags,
        timeout=timeout,
    )


def train(data_dir, train_dir, max_steps):
    with training(data_dir, train_dir, f"--max_steps={max_steps}") as process:
        assert finish(process)[0] == 0


def wait_for_step(process, step=0):
    """Reads the output of a trainer until it has trained `step` or a later one; returns it."""
    for line in process.stdout:
        match = re.search(r": step (\d+), loss = ", line)
        if match and int(match[1]) >= step:
            return int(match[1])
    raise AssertionError(process.stderr.read())


def wait_until(condition, process):
    """Waits for `condition()` while a process runs."""
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def saved_step(train_dir):
    newest = tf.train.latest_checkpoint(str(train_dir))
    return newest and tf.train.load_checkpoint(newest).get_tensor("global_step")


def finish(process, timeout=120):
    """Returns the exit code, the rest of stdout, and the lines of stderr without notices."""
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, messages(errors)


@pytest.mark.timeout(900)
def test_twenty_kills_lose_no_complete_checkpoint(data_dir, train_dir):
    train_dir.mkdir()
    (train_dir / "notes.txt").write_text("unrelated")
    generator = random.Random(1)
    resumed = 0
    for _ in range(20):
        before = saved_step(train_dir) or 0
        # Here, saving takes longer than a step, so many kills interrupt a save.
        with training(data_dir, train_dir, "--save_checkpoint_steps=1") as process:
            if generator.random() < 0.7:
                first = wait_for_step(process)
                assert first == before
                resumed += first > 0
                time.sleep(generator.uniform(0, 0.5))
            else:
                time.sleep(generator.uniform(2, 4))  # about when it restores and first saves
        assert (saved_step(train_dir) or 0) >= before
        for index in train_dir.glob("model.ckpt-*.index"):
            assert checkpoints.read(str(index.with_suffix(""))).settings.class_names
    assert resumed >= 5
    last = saved_step(train_dir) + 3
    with training(data_dir, train_dir, f"--max_steps={last}") as process:
        code, _, errors = finish(process)
    assert (code, errors) == (0, [])
    assert saved_step(train_dir) == last
    assert 1 <= len(list(train_dir.glob("model.ckpt-*.index"))) <= 5
    assert (train_dir / "notes.txt").read_text() == "unrelated"


def test_a_restart_restores_all_variables_and_moving_averages(data_dir, train_dir):
    def values():
        newest = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(train_dir)))
        return {name: newest.get_tensor(name) for name in newest.get_variable_to_shape_map()}

    train(data_dir, train_dir, max_steps=5)
    before = values()
    assert "local3/weights/ExponentialMovingAverage" in before
    # A step that changes no variable: it only moves the averages towards them, by a share that
    # depends on the step.
    with training(data_dir, train_dir, "--max_steps=6", "--initial_learning_rate=1e-30") as process:
        assert finish(process)[0] == 0
    after = values()
    assert (before.pop("global_step"), after.pop("global_step")) == (5, 6)
    assert before.keys() == after.keys()
    averaged = [name for name in before if f"{name}/ExponentialMovingAverage" in before]
    assert len(averaged) == 10
    for name in averaged:
        np.testing.assert_array_equal(after[name], before[name])
        average = f"{name}/ExponentialMovingAverage"
        expected = before[name] + (1 + 6) / (10 + 6) * (before[average] - before[name])
        assert not np.allclose(before[average], before[name], rtol=1e-4, atol=0)
        np.testing.assert_allclose(after[average], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("script", "number", "flag"),
    [
        ("cifar10_train.py", signal.SIGINT, "--save_checkpoint_secs=600"),
        # Likely during a save.
        ("cifar10_multi_gpu_train.py", signal.SIGTERM, "--save_checkpoint_steps=1"),
    ],
)
def test_a_signal_lets_the_step_finish_and_saves_it(data_dir, train_dir, script, number, flag):
    with training(data_dir, train_dir, flag, script=script) as process:
        wait_for_step(process, 3)
        process.send_signal(number)
        code, output, errors = finish(process)
    assert code == 128 + number
    last = [int(step) for step in re.findall(r": step (\d+), ", output)][-1:] or [3]
    assert saved_step(train_dir) == last[0] + 1
    assert errors[-1] == (
        f"{script}: stopped by {number.name}: step {last[0] + 1} is saved in "
        f"{train_dir}/model.ckpt-{last[0] + 1}; run the same command again to resume from it"
    )
    assert "Traceback" not in "".join(errors)
    with training(data_dir, train_dir, f"--max_steps={last[0] + 2}", script=script) as process:
        assert wait_for_step(process) == last[0] + 1


def test_a_second_signal_ends_the_script_at_once(data_dir, train_dir):
    # A step with 10,000 images takes seconds.
    with training(data_dir, train_dir, "--batch_size=10000") as process:
        wait_for_step(process)
        time.sleep(0.2)  # the second step is running
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert time.monotonic() - start < 2


def test_an_interrupted_evaluation_prints_no_precision(tmp_path, data_dir, train_dir):
    train(data_dir, train_dir, max_steps=1)
    make_records(20000).tofile(data_dir / dataset.EXTRACTED_FOLDER / "test_batch.bin")
    with running_script(
        "cifar10_eval.py",
        "--run_once",
        "--num_examples=20000",
        "--batch_size=1",  # slow
        f"--data_dir={data_dir}",
        f"--checkpoint_dir={train_dir}",
        f"--eval_dir={tmp_path / 'eval'}",
    ) as process:
        wait_until(lambda: list((tmp_path / "eval").glob("events*")), process)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        code, output, errors = finish(process)
    assert (code, output) == (130, "")
    assert errors == [
        "cifar10_eval.py: stopped by SIGINT: nothing was lost; run the same command again"
    ]
    assert not (tmp_path / "eval" / "results.jsonl").exists()


def test_a_record_file_that_changes_during_training_ends_it(data_dir, train_dir):
    with training(data_dir, train_dir) as process:
        wait_for_step(process, 2)
        path = data_dir / dataset.EXTRACTED_FOLDER / "data_batch_3.bin"
        path.write_bytes(b"\xff" * path.stat().st_size)
        code, _, errors = finish(process)
    assert code == 1
    message = "data_batch_3.bin was modified after the script started"
    assert re.match(f"cifar10_train.py: error: .*{message}", errors[-1])
    assert "Traceback" not in "".join(errors)


def test_record_files_emptied_while_the_queue_fills_do_not_block_training(data_dir, train_dir):
    flags = ("--min_fraction_of_examples_in_queue=1", "--batch_size=500000")
    with training(data_dir, train_dir, *flags) as process:
        wait_until((train_dir / "model.ckpt-0.index").exists, process)
        for path in records.record_files(data_dir / dataset.EXTRACTED_FOLDER, eval_data=False):
            os.truncate(path, 0)
        code, _, errors = finish(process)
    assert code == 1
    assert re.search(r"error: .*data_batch_1.bin was modified after", errors[-1])


WITHOUT_LOCKS = """
import errno, fcntl, os, runpy, sys
def fail(descriptor, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = fail
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_training_on_a_file_system_without_locks_warns_of_each_folder(tmp_path, train_dir):
    flags = [
        f"--data_dir={tmp_path / 'data'}",
        "--synthetic_data",
        f"--train_dir={train_dir}",
        "--batch_size=4",
        "--max_steps=2",
        "--min_fraction_of_examples_in_queue=0.001",
    ]
    process = run_script("-c", WITHOUT_LOCKS, "cifar10_train.py", *flags)
    folders = (tmp_path / "data", train_dir)
    for folder, warning in zip(folders, messages(process.stderr), strict=True):
        assert f"of {folder} does not support locks (No locks available)" in warning
    assert saved_step(train_dir) == 2
    assert not list(tmp_path.rglob("*.lock"))


def test_a_trainer_listens_on_no_port(data_dir, train_dir):
    with training(data_dir, train_dir) as process:
        wait_for_step(process)
        # Its threads open and close record files. Stopping it keeps the list of open files valid.
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        proc = pathlib.Path(f"/proc/{process.pid}")
        sockets = {
            match[1]
            for path in (proc / "fd").iterdir()
            if (match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(path)))
        }
        assert sockets  # signals arrive through a pair of sockets
        for table in ("tcp", "tcp6", "udp", "udp6"):
            _, *rows = (proc / "net" / table).read_text().splitlines()
            assert not {row.split()[9] for row in rows} & sockets


def test_training_goes_on_when_the_reader_of_both_streams_exits(data_dir, train_dir):
    arguments = [f"--data_dir={data_dir}", f"--train_dir={train_dir}", "--max_steps=5"]
    command = shlex.join([sys.executable, "cifar10_train.py", *arguments, "--batch_size=4"])
    command += " 2>&1 | true; exit ${PIPESTATUS[0]}"
    assert run_in_shell(command, timeout=120)[0] == 0
    assert saved_step(train_dir) == 5


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_goes_away_loses_no_step(data_dir, train_dir, nohup):
    controller, terminal = os.openpty()
    # Makes the terminal the controlling one of the process.
    code = (
        "import fcntl, os, runpy, signal, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        f"{'signal.signal(signal.SIGHUP, signal.SIG_IGN)' if nohup else ''}\n"
        "sys.argv[:] = sys.argv[1:]\n"
        "sys.path.insert(0, os.getcwd())\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    with running_script(
        *("-c", code, "cifar10_train.py", f"--data_dir={data_dir}", f"--train_dir={train_dir}"),
        *("--batch_size=4", "--log_frequency=1", f"--max_steps={40 if nohup else 1000000}"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    ) as process:
        os.close(terminal)
        shown = b""
        while b"step 3, loss" not in shown:
            shown += os.read(controller, 1 << 16)
        os.close(controller)  # the kernel sends SIGHUP
        code = process.wait()
    assert code == (0 if nohup else 129)
    assert saved_step(train_dir) == 40 if nohup else saved_step(train_dir) >= 4


def test_a_full_disk_ends_training_and_the_last_checkpoint_stays(data_dir, train_dir):
    train(data_dir, train_dir, max_steps=3)
    with training(data_dir, train_dir, "--max_steps=9") as process:
        limit = 4 << 20  # half a checkpoint
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        code, _, errors = finish(process)
    assert code == 1
    assert not list(train_dir.glob("*.tempstate*"))
    assert "error: cannot save a checkpoint in " in errors[-1]
    assert "Traceback" not in "".join(errors)
    with training(data_dir, train_dir, "--max_steps=9") as process:
        assert wait_for_step(process) == 3
        assert finish(process)[0] == 0
    assert saved_step(train_dir) == 9


@pytest.mark.timeout(600)
def test_fifty_evaluations_succeed_alongside_a_trainer_that_keeps_one_checkpoint(
    tmp_path, data_dir, train_dir, capsys
):
    FLAGS.data_dir = str(data_dir)
    FLAGS.checkpoint_dir = str(train_dir)
    FLAGS.eval_dir = str(tmp_path / "eval")
    FLAGS.num_examples = 11
    FLAGS.run_once = True
    flags = ("--save_checkpoint_steps=2", "--max_checkpoints_to_keep=1", "--log_frequency=1000000")
    with training(data_dir, train_dir, *flags, timeout=500) as process:
        wait_for_step(process)
        for _ in range(50):
            cifar10_eval.evaluate()
        assert process.poll() is None
    assert capsys.readouterr().out.count("precision @ 1 = ") == 50
    values = written_values(FLAGS.eval_dir)
    steps = [step for step, tag, _ in values if tag == "precision @ 1"]
    assert len(steps) == 50
    assert len(set(steps)) > 10  # the trainer continued
    assert steps == sorted(steps)
