"""Tests of graph mode, of the session configuration and of what TensorFlow logs."""

import logging
import os
import platform
import re
import subprocess
import sys

import pytest
from conftest import ROOT, messages, run_script, running_queues, script_environment

from support.base.errors import UserError
from support.ops import tensorflow_v1
from support.ops.tensorflow_v1 import session_config, tf


def test_importing_switches_to_graph_mode():
    assert not tf.executing_eagerly()


@pytest.mark.parametrize(
    ("before", "count"),
    [
        ("import tensorflow", 1),
        ("import tensorflow as tf; tf.constant(1).numpy()", 1),
        ("import tensorflow.compat.v1 as tf; tf.disable_eager_execution()", 0),
        ("import tensorflow.compat.v1 as tf; tf.disable_v2_behavior()", 0),
        ("import sys", 0),
    ],
)
def test_one_warning_says_that_eager_mode_ends_if_it_was_on_before(before, count):
    code = f"""
{before}
import cifar10
from support.ops.tensorflow_v1 import tf
assert not tf.executing_eagerly()
"""
    warnings = re.findall(".*eager.*", run_script("-c", code).stderr, re.IGNORECASE)
    assert len(warnings) == count
    for line in warnings:
        assert line.startswith("WARNING:tensorflow:")
        for text in ("in this process", ".numpy()", "Keras 3's predict", "--export_dir"):
            assert text in line


@pytest.mark.parametrize(("given", "expected"), [({}, "2"), ({"TF_CPP_MIN_LOG_LEVEL": "0"}, "0")])
def test_tensorflow_logs_errors_only_unless_another_log_level_is_set(given, expected):
    code = "import os, support.ops.tensorflow_v1; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    output = subprocess.check_output(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**script_environment(), **given},
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert output == f"{expected}\n"


def test_importing_does_not_turn_garbage_collection_on():
    code = """
import gc
gc.disable()
import support.ops.tensorflow_v1
assert not gc.isenabled()
"""
    run_script("-c", code)


DRIVERS = {
    "NVIDIA": ("nvidiactl", "nvidia0", "nvidia-uvm"),
    "NVIDIA Jetson": ("nvhost-gpu",),
    "WSL": ("dxg",),
    "ROCm": ("kfd",),
}


@pytest.fixture
def devices(tmp_path, monkeypatch):
    """A folder in place of /dev on Linux, without plug-ins, with devices that are not GPUs."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(tf.sysconfig, "get_lib", lambda: str(tmp_path / "tensorflow"))
    monkeypatch.delenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(
        tensorflow_v1.can_have_gpus, "__defaults__", ("/dev", str(tmp_path / "modules"))
    )
    folder = tmp_path / "dev"
    folder.mkdir()
    for name in ("null", "nvme0", "nvram", "kvm"):
        (folder / name).touch()
    return folder


def test_without_the_device_of_a_driver_there_can_be_no_gpu(devices):
    assert not tensorflow_v1.can_have_gpus(devices)


def test_where_devices_cannot_be_listed_there_may_be_a_gpu(devices):
    assert tensorflow_v1.can_have_gpus(devices / "missing")


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_device_of_a_driver_may_belong_to_a_gpu(devices, driver):
    for name in DRIVERS[driver]:
        (devices / name).touch()
        assert tensorflow_v1.can_have_gpus(devices)
        (devices / name).unlink()


def test_a_loaded_driver_may_create_the_device_of_its_gpu_later(devices):
    (devices.parent / "modules" / "nvidia").mkdir(parents=True)
    assert tensorflow_v1.can_have_gpus(devices)


def test_a_plug_in_or_another_system_may_have_devices_of_its_own(devices, monkeypatch):
    (devices.parent / "tensorflow-plugins").mkdir()
    assert tensorflow_v1.can_have_gpus(devices)
    (devices.parent / "tensorflow-plugins").rmdir()
    monkeypatch.setenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "/opt/plugin.so")
    assert tensorflow_v1.can_have_gpus(devices)
    monkeypatch.delenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tensorflow_v1.can_have_gpus(devices)


@pytest.mark.parametrize("can_have_gpus", [True, False])
def test_a_session_looks_for_gpus_only_where_there_can_be_one(monkeypatch, can_have_gpus):
    monkeypatch.setattr(tensorflow_v1, "_CAN_HAVE_GPUS", can_have_gpus)
    assert dict(session_config().device_count) == ({} if can_have_gpus else {"GPU": 0})


def test_conditionals_need_no_functions_within_the_context(graph):
    x = tf.placeholder_with_default(-3.0, [])
    assert tf.control_flow_v2_enabled()
    with tensorflow_v1.conditionals_without_functions():
        y = tf.cond(x > 0, lambda: x, lambda: -x)
    assert tf.control_flow_v2_enabled()
    assert not graph.as_graph_def().library.function
    with tf.Session(config=session_config()) as session:
        assert session.run(y) == 3.0
    tf.disable_control_flow_v2()
    try:
        with tensorflow_v1.conditionals_without_functions():
            pass
        assert not tf.control_flow_v2_enabled()  # as a fork has decided
    finally:
        tf.enable_control_flow_v2()


def test_stopping_queue_threads_prints_nothing():
    code = """
from support.ops.tensorflow_v1 import session_config, tf
with tf.Session(config=session_config()) as session:
    queue = tf.FIFOQueue(2, tf.float32, [])
    tf.train.add_queue_runner(tf.train.QueueRunner(queue, [queue.enqueue(1.0)] * 16))
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    while session.run(queue.size()) < 2:  # then the threads wait for space
        pass
    coordinator.request_stop()
    coordinator.join(threads)
"""
    process = run_script("-c", code)
    assert (process.stdout, messages(process.stderr)) == ("", [])


class LogRecorder(logging.Handler):
    """Collects the messages that reach the handlers of a logger."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (logging.WARNING, ["a real warning"]),
        (logging.INFO, ["queues is deprecated and will be removed", "a real warning"]),
    ],
)
def test_advice_to_replace_queues_is_logged_only_with_info_messages(level, expected):
    logger, recorder = tf.get_logger(), LogRecorder()
    previous = logger.level
    logger.addHandler(recorder)
    logger.setLevel(level)
    try:
        logger.warning("%s is deprecated and will be removed", "queues")
        logger.warning("a real warning")
    finally:
        logger.setLevel(previous)
        logger.removeHandler(recorder)
    assert recorder.messages == expected


def test_sessions_allocate_gpu_memory_on_demand_and_fall_back_to_other_devices():
    config = session_config()
    assert config.gpu_options.allow_growth
    assert config.allow_soft_placement
    assert not config.log_device_placement
    assert session_config(log_device_placement=True).log_device_placement


def test_an_operation_for_a_missing_gpu_runs_on_the_cpu(graph):
    with tf.device("/device:GPU:7"):
        two = tf.add(1.0, 1.0)
    with running_queues() as session:
        assert session.run(two) == 2.0


@pytest.mark.parametrize(("gpus", "is_float16"), [(["GPU"], True), ([], False)])
def test_use_fp16_rewrites_to_float16_on_gpus_and_to_bfloat16_on_cpus(
    monkeypatch, gpus, is_float16
):
    monkeypatch.setattr(tensorflow_v1, "GPUS", gpus)
    on = tf.ConfigProto().graph_options.rewrite_options.ON
    rewrites = session_config(use_fp16=True).graph_options.rewrite_options
    assert (rewrites.auto_mixed_precision == on) is is_float16
    assert (rewrites.auto_mixed_precision_onednn_bfloat16 == on) is not is_float16


@pytest.mark.parametrize("gpus", [["GPU"], []])
def test_no_precision_is_rewritten_by_default(monkeypatch, gpus):
    monkeypatch.setattr(tensorflow_v1, "GPUS", gpus)
    on = tf.ConfigProto().graph_options.rewrite_options.ON
    rewrites = session_config().graph_options.rewrite_options
    assert rewrites.auto_mixed_precision != on
    assert rewrites.auto_mixed_precision_onednn_bfloat16 != on


@pytest.mark.parametrize(
    ("flags", "support"),
    [
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile", "native"),
        ("flags\t\t: fpu avx512f avx512_bf16", "native"),
        ("flags\t\t: fpu avx2 avx_ne_convert", "native"),
        ("Features\t: fp asimd bf16", "native"),
        ("flags\t\t: fpu avx512f avx512_vnni", "emulated"),
        ("flags\t\t: fpu avx avx2", "none"),
        ("Features\t: fp asimd", "none"),
    ],
)
def test_the_processor_determines_how_bfloat16_is_computed(tmp_path, monkeypatch, flags, support):
    monkeypatch.setattr(tensorflow_v1, "USES_ONEDNN", True)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert tensorflow_v1.find_bfloat16_support(tmp_path / "cpuinfo") == support


def test_bfloat16_is_not_computed_without_onednn_on_x86(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorflow_v1, "USES_ONEDNN", False)
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx512f avx512_bf16 bf16\n")
    for machine, support in (("x86_64", "none"), ("aarch64", "native")):
        monkeypatch.setattr(tensorflow_v1.platform, "machine", lambda machine=machine: machine)
        assert tensorflow_v1.find_bfloat16_support(tmp_path / "cpuinfo") == support


def test_bfloat16_counts_as_native_where_the_processor_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorflow_v1, "USES_ONEDNN", True)
    assert tensorflow_v1.find_bfloat16_support(tmp_path / "missing") == "native"


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that TensorFlow's logger receives."""
    warnings = []
    monkeypatch.setattr(tf.logging, "warning", lambda text, *values: warnings.append(text % values))
    return warnings


@pytest.mark.parametrize(
    ("support", "gpus", "expected"),
    [
        ("native", [], []),
        ("emulated", [], ["emulated"]),
        ("none", [], ["--use_fp16 has no effect"]),
        ("none", ["GPU"], []),
    ],
)
def test_one_warning_says_what_use_fp16_does_on_a_slow_processor(
    monkeypatch, warnings, support, gpus, expected
):
    monkeypatch.setattr(tensorflow_v1, "GPUS", gpus)
    monkeypatch.setattr(tensorflow_v1, "find_bfloat16_support", lambda: support)
    tensorflow_v1._warn_of_slow_bfloat16.cache_clear()
    session_config(use_fp16=False)
    assert warnings == []
    session_config(use_fp16=True)
    session_config(use_fp16=True)
    assert len(warnings) == len(expected)
    for line, text in zip(warnings, expected, strict=True):
        assert text in line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("has_device", "gpus", "visible", "count"),
    [
        (True, [], None, 1),
        (True, [], "0", 1),
        (True, ["GPU"], None, 0),
        (True, [], "", 0),
        (True, [], "-1", 0),
        (False, [], None, 0),
    ],
)
def test_a_gpu_that_tensorflow_cannot_use_causes_a_warning_unless_it_is_hidden(
    tmp_path, monkeypatch, warnings, has_device, gpus, visible, count
):
    device = tmp_path / "nvidia0"
    if has_device:
        device.touch()
    monkeypatch.setattr(tensorflow_v1, "GPUS", gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    tensorflow_v1.warn_of_unusable_gpus(device)
    assert len(warnings) == count
    assert all("TF_CPP_MIN_LOG_LEVEL=0" in line and "\n" not in line for line in warnings)


@pytest.mark.parametrize(
    ("used", "found", "expected"),
    [
        (1, 2, ["1 of 2 GPUs is used; to use all, run cifar10_multi_gpu_train.py --num_gpus=2"]),
        (2, 3, ["2 of 3 GPUs are used; to use all, run cifar10_multi_gpu_train.py --num_gpus=3"]),
        (1, 1, []),
        (1, 0, []),
        (3, 2, []),
    ],
)
def test_unused_gpus_are_reported(monkeypatch, warnings, used, found, expected):
    monkeypatch.setattr(tensorflow_v1, "GPUS", ["a GPU"] * found)
    tensorflow_v1.warn_of_unused_gpus(used)
    assert warnings == expected


def test_only_the_error_for_exhausted_memory_is_explained():
    with (
        pytest.raises(UserError, match=r"^out of memory \(OOM when allocating\); use a smaller"),
        tensorflow_v1.out_of_memory_explained(),
    ):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating\nHint")
    text = "failed call to cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    with pytest.raises(UserError, match="^out of memory"), tensorflow_v1.out_of_memory_explained():
        raise tf.errors.InternalError(None, None, text)
    with pytest.raises(tf.errors.NotFoundError), tensorflow_v1.out_of_memory_explained():
        raise tf.errors.NotFoundError(None, None, "gone")


def test_the_processor_has_the_name_that_linux_gives_it(tmp_path):
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: Some Processor @ 2.00GHz\nprocessor\t: 1\n"
        "model name\t: Some Processor @ 2.00GHz\n"
    )
    name = tensorflow_v1.find_processor_name(tmp_path / "cpuinfo")
    assert name == "Some Processor @ 2.00GHz"


def test_without_cpuinfo_the_processor_has_the_name_that_python_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorflow_v1.platform, "processor", lambda: "arm")
    assert tensorflow_v1.find_processor_name(tmp_path / "missing") == "arm"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_error_of_a_histogram_that_is_not_finite_is_recognized(graph, value):
    histogram = tf.summary.histogram("h", tf.fill([2], value))
    with tf.Session() as session, pytest.raises(tf.errors.InvalidArgumentError) as caught:
        session.run(histogram)
    assert tensorflow_v1.is_nonfinite_histogram(caught.value)


def test_other_errors_are_not_taken_for_that_of_a_histogram(graph):
    failure = tf.debugging.assert_equal(1, tf.placeholder_with_default(2, []))
    with tf.Session() as session, pytest.raises(tf.errors.InvalidArgumentError) as caught:
        session.run(failure)
    assert not tensorflow_v1.is_nonfinite_histogram(caught.value)
    assert not tensorflow_v1.is_nonfinite_histogram(ValueError("Nan in histogram for: x"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is turned on for x86 only")
@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_onednn_is_on_unless_the_user_has_decided(given, expected):
    environment = {name: os.environ[name] for name in os.environ if "ONEDNN" not in name}
    if given is not None:
        environment["TF_ENABLE_ONEDNN_OPTS"] = given
    code = """
import os
from support.ops import tensorflow_v1
print(os.environ["TF_ENABLE_ONEDNN_OPTS"], tensorflow_v1.USES_ONEDNN)
"""
    output = subprocess.check_output(
        [sys.executable, "-c", code], text=True, cwd=ROOT, env=environment
    )
    assert output == f"{expected} {expected == '1'}\n"
