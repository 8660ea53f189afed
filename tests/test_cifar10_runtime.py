"""What reaches stderr and what does not; the session's configuration."""

import os
import subprocess
import sys
import threading

import pytest

import cifar10_runtime
from cifar10_runtime import session_config, tf

CANCELLATION = (
    b"W0000 00:00:1.0 1 local_rendezvous.cc:412] Local rendezvous is aborting with status: "
    b"CANCELLED: Enqueue operation was cancelled\n\t [[{{node distorted_inputs/enqueue}}]]\n"
)
REAL = b"W0000 00:00:1.0 1 gpu_device.cc:1] Cannot dlopen some GPU libraries.\n"


def heard(capfd, context, text):
    with context:
        os.write(2, text)
    return capfd.readouterr().err.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CANCELLATION + REAL + CANCELLATION, REAL),
        (REAL, REAL),
        (b"", b""),
        (b"a line without an end", b"a line without an end"),
    ],
)
def test_stopping_queue_threads_is_quiet_but_for_real_messages(capfd, text, expected):
    assert heard(capfd, cifar10_runtime.quiet_cancellation(), text) == expected


def test_threads_may_stop_queues_at_the_same_time(capfd):
    first, second = cifar10_runtime.quiet_cancellation(), cifar10_runtime.quiet_cancellation()
    first.__enter__()
    os.write(2, CANCELLATION)
    second.__enter__()
    os.write(2, REAL)
    first.__exit__(None, None, None)  # before the second, which began later
    os.write(2, CANCELLATION)
    second.__exit__(None, None, None)
    os.write(2, b"after\n")
    assert capfd.readouterr().err.encode() == REAL + b"after\n"


NO_DRIVER = b"I0000 00:00:1.0 1 cudart_stub.cc:31] Could not find cuda drivers on your machine.\n"
NO_CUINIT = b"E0000 00:00:1.0 1 cuda_platform.cc:52] failed call to cuInit: INTERNAL\n"
PREAMBLE = (
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PREAMBLE + NO_DRIVER + NO_CUINIT + REAL, REAL),
        # With a driver, that its initialization fails is an error to be seen.
        (PREAMBLE + NO_CUINIT, NO_CUINIT),
    ],
)
def test_start_up_is_quiet_but_for_real_messages(capfd, text, expected):
    context = cifar10_runtime._stderr_without(cifar10_runtime._is_start_up_notice)
    assert heard(capfd, context, text) == expected


def test_an_exception_passes_and_what_was_held_back_comes_out(capfd):
    def fail():
        with cifar10_runtime.quiet_cancellation():
            os.write(2, REAL)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capfd.readouterr().err.encode() == REAL


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Graph execution error:\n\nDetected at ...\nNode: 'a/b'\nno such file\n\t [[a/b]]",
            "no such file",
        ),
        ("one line\nand another", "one line"),
        ("", "ValueError('')"),
    ],
)
def test_the_reason_of_an_error_is_one_line_of_it(text, reason):
    assert cifar10_runtime.find_reason(ValueError(text)) == reason


def test_sessions_take_gpu_memory_as_needed_and_place_softly():
    config = session_config()
    assert config.gpu_options.allow_growth
    assert config.allow_soft_placement
    assert not config.log_device_placement
    assert session_config(log_device_placement=True).log_device_placement


def test_16_bit_arithmetic_is_a_rewrite_that_is_off_by_default():
    on = tf.ConfigProto().graph_options.rewrite_options.ON

    def rewrites(config):
        options = config.graph_options.rewrite_options
        return options.auto_mixed_precision, options.auto_mixed_precision_onednn_bfloat16

    assert on not in rewrites(session_config())
    assert on in rewrites(session_config(use_fp16=True))


def test_importing_switches_to_graph_mode():
    assert not tf.executing_eagerly()


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile", True),
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx512f avx512_vnni", False),
    ],
)
def test_a_processor_without_bfloat16_is_known(tmp_path, flags, fast):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert cifar10_runtime.has_fast_bfloat16(tmp_path / "cpuinfo") is fast
    assert cifar10_runtime.has_fast_bfloat16(tmp_path / "none") is True


@pytest.mark.parametrize(
    ("fast", "gpus", "warnings"), [(False, [], 1), (True, [], 0), (False, ["GPU"], 0)]
)
def test_slow_16_bits_are_warned_of_once(monkeypatch, fast, gpus, warnings):
    said = []
    monkeypatch.setattr(tf.logging, "warning", said.append)
    monkeypatch.setattr(cifar10_runtime, "GPUS", gpus)
    monkeypatch.setattr(cifar10_runtime, "has_fast_bfloat16", lambda: fast)
    cifar10_runtime._warn_of_slow_bfloat16.cache_clear()
    session_config(use_fp16=False)
    assert said == []
    session_config(use_fp16=True)
    session_config(use_fp16=True)
    assert len(said) == warnings
    assert all("\n" not in line for line in said)


def test_importing_leaves_nothing_of_tensorflow_to_the_garbage_collector():
    code = "import gc, cifar10_runtime; print(gc.isenabled(), gc.get_freeze_count() > 10**5)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True True\n"


def test_the_newest_checkpoint_is_found_at_any_moment_of_a_trainers_saves(tmp_path):
    saver_is_done = threading.Event()

    def save():
        with tf.Graph().as_default(), tf.Session() as session:
            tf.get_variable("a", initializer=1.0)
            session.run(tf.global_variables_initializer())
            saver = tf.train.Saver(max_to_keep=1, save_relative_paths=True)
            for step in range(300):
                saver.save(session, str(tmp_path / "model.ckpt"), step, write_meta_graph=False)
        saver_is_done.set()

    thread = threading.Thread(target=save)
    thread.start()
    while not (tmp_path / "checkpoint").exists():
        pass
    found = set()
    while not saver_is_done.is_set():
        found.add(cifar10_runtime.find_latest_checkpoint(str(tmp_path)))
    thread.join()
    assert None not in found
    assert len(found) > 10


def test_a_signal_that_is_to_be_ignored_stays_ignored():
    code = """
import os, signal, time
from cifar10_runtime import STOP_REQUEST
signal.signal(signal.SIGINT, signal.SIG_IGN)
STOP_REQUEST.listen()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.1)
assert STOP_REQUEST.signal_number is None
os.kill(os.getpid(), signal.SIGTERM)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert b"Interrupted" in process.stderr.splitlines()[-1]
    assert b"AssertionError" not in process.stderr
