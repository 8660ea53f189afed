"""Processes that are killed, stopped, starved or started twice: nothing lost, nothing silent."""

import contextlib
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, make_records, run_script, write_data_set

import cifar10_data
import cifar10_eval
from cifar10_runtime import tf

pytestmark = pytest.mark.slow

FLAGS = cifar10_eval.FLAGS


@pytest.fixture
def data_dir(tmp_path):
    """A small data set of its own, so that it can be spoilt."""
    write_data_set(tmp_path / "data" / "cifar-10-batches-bin", train_counts=[40] * 5)
    return tmp_path / "data"


@contextlib.contextmanager
def training(data_dir, train_dir, *flags, script="cifar10_train.py", **options):
    """Gives a running trainer; it is killed in the end, if it still runs."""
    with subprocess.Popen(
        [
            sys.executable,
            script,
            f"--data_dir={data_dir}",
            f"--train_dir={train_dir}",
            "--batch_size=4",
            "--log_frequency=1",
            "--min_fraction_of_examples_in_queue=0.001",
            *flags,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_step(process, step=0):
    """Reads what a trainer prints until it has trained `step` or more."""
    for line in process.stdout:
        match = re.search(r": step (\d+), loss = ", line)
        if match and int(match[1]) >= step:
            return int(match[1])
    raise AssertionError(process.stderr.read())


def saved_step(train_dir):
    newest = tf.train.latest_checkpoint(str(train_dir))
    return newest and tf.train.load_checkpoint(newest).get_tensor("global_step")


def end(process, timeout=30):
    """Returns the exit code, and what is left of stdout and stderr."""
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def test_twenty_kills_lose_no_finished_checkpoint(tmp_path, data_dir):
    train_dir = tmp_path / "train"
    train_dir.mkdir()
    (train_dir / "notes.txt").write_text("mine")
    generator = random.Random(1)
    resumed = 0
    for _ in range(20):
        before = saved_step(train_dir) or 0
        # Saving takes longer than a step here, so many of the kills hit a save.
        with training(data_dir, train_dir, "--save_checkpoint_steps=1") as process:
            if generator.random() < 0.7:
                first = wait_for_step(process)
                assert first == before
                resumed += first > 0
                time.sleep(generator.uniform(0, 0.5))
            else:
                time.sleep(generator.uniform(2, 4))  # about when it restores and saves at first
        assert (saved_step(train_dir) or 0) >= before
    assert resumed >= 5
    last = saved_step(train_dir) + 3
    with training(data_dir, train_dir, f"--max_steps={last}") as process:
        code, _, errors = end(process, timeout=120)
    assert (code, errors) == (0, "")
    assert saved_step(train_dir) == last
    assert (train_dir / "notes.txt").read_text() == "mine"


def test_a_restart_has_the_same_variables_and_moving_averages(tmp_path, data_dir):
    def values():
        newest = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(tmp_path / "train")))
        return {name: newest.get_tensor(name) for name in newest.get_variable_to_shape_map()}

    with training(data_dir, tmp_path / "train", "--max_steps=5") as process:
        assert end(process, timeout=120)[0] == 0
    before = values()
    assert "local3/weights/ExponentialMovingAverage" in before
    # It saves at its start what it has restored; then it is stopped in its wait for a first batch.
    index = tmp_path / "train" / "model.ckpt-5.index"
    saved_at = index.stat().st_mtime_ns
    with training(data_dir, tmp_path / "train", "--batch_size=100000") as process:
        while index.stat().st_mtime_ns == saved_at:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert end(process)[0] == 143
    after = values()
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(
    ("number", "code", "flags"),
    [
        (signal.SIGINT, 130, ["--save_checkpoint_secs=600"]),
        (signal.SIGTERM, 143, ["--save_checkpoint_steps=1"]),  # mostly in the middle of a save
    ],
)
@pytest.mark.parametrize("script", ["cifar10_train.py", "cifar10_multi_gpu_train.py"])
def test_a_signal_finishes_the_step_and_saves_it(tmp_path, data_dir, script, number, code, flags):
    train_dir = tmp_path / "train"
    with training(data_dir, train_dir, *flags, script=script) as process:
        wait_for_step(process, 3)
        process.send_signal(number)
        found, output, errors = end(process)
    assert found == code
    last = [int(step) for step in re.findall(r": step (\d+), ", output)][-1:] or [3]
    assert saved_step(train_dir) == last[0] + 1
    assert errors.splitlines()[-1] == (
        f"{script}: ended by {number.name}: {train_dir}/model.ckpt-{last[0] + 1} holds step "
        f"{last[0] + 1}; the same command goes on from there"
    )
    assert "Traceback" not in errors
    with training(data_dir, train_dir, f"--max_steps={last[0] + 2}", script=script) as process:
        assert wait_for_step(process) == last[0] + 1


def test_a_signal_ends_the_filling_of_the_queue(tmp_path, data_dir):
    flags = ("--min_fraction_of_examples_in_queue=1", "--batch_size=50000")
    with training(data_dir, tmp_path / "train", *flags) as process:
        assert process.stdout.readline().startswith("Filling queue with 200 ")
        while not (tmp_path / "train" / "model.ckpt-0.index").exists():  # it fills from here on
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        code, output, errors = end(process)
    assert (code, output) == (130, "")
    (line,) = errors.splitlines()  # and no line for each thread that is ended
    assert line.endswith("model.ckpt-0 holds step 0; the same command goes on from there")


def test_a_signal_while_the_script_gets_ready_ends_it(tmp_path, data_dir):
    with training(data_dir, tmp_path / "train") as process:
        assert process.stdout.readline().startswith("Filling queue")  # the graph comes next
        process.send_signal(signal.SIGTERM)
        code, _, errors = end(process)
    assert code == 143
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("cifar10_train.py: ended by SIGTERM: ")


def test_a_second_signal_ends_at_once(tmp_path, data_dir):
    # A step of 20,000 images takes many seconds.
    with training(data_dir, tmp_path / "train", "--batch_size=20000") as process:
        while not (tmp_path / "train" / "model.ckpt-0.index").exists():
            time.sleep(0.01)
        time.sleep(4)  # the queue is full, the step has begun
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert time.monotonic() - start < 2


def test_a_signal_keeps_what_has_been_downloaded(tmp_path):
    code = """
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"x" * 5000)
        time.sleep(60)
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
    part = tmp_path / "data" / "cifar-10-binary.tar.gz.part"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        url = f"--data_url=http://127.0.0.1:{server.stdout.readline().strip()}/"
        with training(tmp_path / "data", tmp_path / "train", url) as process:
            while not (part.exists() and part.stat().st_size == 5000):
                time.sleep(0.05)
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            code, output, errors = end(process)
        server.kill()
    assert (code, output) == (143, "")
    assert f"5000 bytes are kept in {part}; the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert part.stat().st_size == 5000


def test_an_evaluation_that_is_interrupted_is_not_done(tmp_path, data_dir):
    with training(data_dir, tmp_path / "train", "--max_steps=1") as process:
        assert end(process, timeout=120)[0] == 0
    make_records(20000).tofile(data_dir / "cifar-10-batches-bin" / "test_batch.bin")
    with subprocess.Popen(
        [
            sys.executable,
            "cifar10_eval.py",
            "--run_once",
            "--num_examples=20000",
            "--batch_size=1",  # which takes its time
            f"--data_dir={data_dir}",
            f"--checkpoint_dir={tmp_path / 'train'}",
            f"--eval_dir={tmp_path / 'eval'}",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not list((tmp_path / "eval").glob("events*")):
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        code, output, errors = end(process)
    assert (code, output) == (130, "")
    assert errors.startswith("cifar10_eval.py: ended by SIGINT: ")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (os.remove, "data_batch_3.bin cannot be read any more .No such file"),
        (lambda path: os.truncate(path, 0), "data_batch_3.bin has 0 bytes now; it had 122920 when"),
        (lambda path: os.truncate(path, 5000), "data_batch_3.bin has 5000 bytes now"),
        (
            lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
            "data_batch_3.bin has been written to since the script started",
        ),
    ],
)
def test_data_that_goes_while_it_is_trained_on_ends_training(tmp_path, data_dir, spoil, message):
    with training(data_dir, tmp_path / "train") as process:
        wait_for_step(process, 2)
        spoil(data_dir / "cifar-10-batches-bin" / "data_batch_3.bin")
        code, _, errors = end(process)
    assert code == 1
    assert re.search(f"cifar10_train.py: error: .*{message}", errors)
    assert "Traceback" not in errors


def test_all_data_emptied_while_the_queue_fills_does_not_hang(tmp_path, data_dir):
    flags = ("--min_fraction_of_examples_in_queue=1", "--batch_size=50000")
    with training(data_dir, tmp_path / "train", *flags) as process:
        while not (tmp_path / "train" / "model.ckpt-0.index").exists():
            time.sleep(0.01)
        for path in cifar10_data.record_files(data_dir / "cifar-10-batches-bin", eval_data=False):
            os.truncate(path, 0)
        code, _, errors = end(process)
    assert code == 1
    assert re.search(r"error: .*data_batch_1.bin has 0 bytes now", errors)


def test_a_second_trainer_is_refused_and_the_first_goes_on(tmp_path, data_dir):
    with training(data_dir, tmp_path / "train") as first:
        step = wait_for_step(first)
        for script in ("cifar10_train.py", "cifar10_multi_gpu_train.py"):
            with training(data_dir, tmp_path / "train", script=script) as second:
                code, output, errors = end(second, timeout=60)
            assert (code, output) == (1, "")
            assert f"another trainer is at work in --train_dir={tmp_path / 'train'}" in errors
            assert f"process {first.pid} on " in errors
        assert wait_for_step(first, step + 1) > step


def test_a_trainer_listens_on_no_port(tmp_path, data_dir):
    with training(data_dir, tmp_path / "train") as process:
        wait_for_step(process)
        # Stopped, as its threads open and close record files, and a list of what is open would
        # be wrong before it is read.
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        proc = pathlib.Path(f"/proc/{process.pid}")
        sockets = {
            match[1]
            for path in (proc / "fd").iterdir()
            if (match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(path)))
        }
        assert sockets  # the pair that signals come through
        for table in ("tcp", "tcp6", "udp", "udp6"):
            _, *rows = (proc / "net" / table).read_text().splitlines()
            assert not {row.split()[9] for row in rows} & sockets


def test_a_stdout_that_is_full_is_told_in_one_line(tmp_path, data_dir):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [
                sys.executable,
                "cifar10_train.py",
                f"--data_dir={data_dir}",
                f"--train_dir={tmp_path}",
            ],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert process.returncode != 0
    assert "cifar10_train.py: error: [Errno 28] No space left on device\n" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_full_disk_ends_training_and_spares_the_last_checkpoint(tmp_path, data_dir):
    with training(data_dir, tmp_path / "train", "--max_steps=3") as process:
        assert end(process, timeout=120)[0] == 0

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))  # half a checkpoint

    with training(data_dir, tmp_path / "train", "--max_steps=9", preexec_fn=limit) as process:
        code, _, errors = end(process, timeout=120)
    assert code == 1
    assert not list((tmp_path / "train").glob("*.tempstate*"))
    assert "error: cannot save a checkpoint in " in errors
    assert "Traceback" not in errors
    with training(data_dir, tmp_path / "train", "--max_steps=9") as process:
        assert wait_for_step(process) == 3
        assert end(process, timeout=60)[0] == 0
    assert saved_step(tmp_path / "train") == 9


def test_fifty_evaluations_beside_a_trainer_that_keeps_one_checkpoint(tmp_path, data_dir, capsys):
    FLAGS.data_dir = str(data_dir)
    FLAGS.checkpoint_dir = str(tmp_path / "train")
    FLAGS.eval_dir = str(tmp_path / "eval")
    FLAGS.num_examples = 11
    FLAGS.run_once = True
    flags = ("--save_checkpoint_steps=2", "--max_checkpoints_to_keep=1")
    with training(data_dir, tmp_path / "train", *flags, "--log_frequency=1000000") as process:
        wait_for_step(process)
        for _ in range(50):
            cifar10_eval.evaluate()
        assert process.poll() is None
    assert capsys.readouterr().out.count("precision @ 1 = ") == 50
    steps = []
    for path in sorted(pathlib.Path(FLAGS.eval_dir).glob("events*"), key=os.path.getmtime):
        for event in tf.train.summary_iterator(str(path)):
            steps += [event.step for value in event.summary.value if value.tag == "precision @ 1"]
    assert len(steps) == 50
    assert len(set(steps)) > 10  # the trainer did move on
    assert steps == sorted(steps)


def test_an_unreadable_state_file_stops_training_with_advice(tmp_path, data_dir):
    with training(data_dir, tmp_path / "train", "--max_steps=2") as process:
        assert end(process, timeout=120)[0] == 0
    (tmp_path / "train" / "checkpoint").write_bytes(b"\0\0\0")
    process = run_script(
        "cifar10_train.py",
        f"--data_dir={data_dir}",
        f"--train_dir={tmp_path / 'train'}",
        check=False,
    )
    assert process.returncode == 1
    assert "the file `checkpoint` in " in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert (tmp_path / "train" / "model.ckpt-2.index").exists()
