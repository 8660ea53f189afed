"""Tests of graph mode, of the session configuration and of what TensorFlow logs."""

import logging
import platform
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_script, script_environment

from support.base.errors import UserError
from support.ops import tensorflow_v1
from support.ops.tensorflow_v1 import session_config, tf


@pytest.mark.parametrize(
    ("before", "count"),
    [
        ("import tensorflow", 1),
        ("import tensorflow.compat.v1 as tf; tf.disable_eager_execution()", 0),
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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is turned on for x86 only")
@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [
        ("", {}, "2 1 True True"),
        (
            "gc.disable()",
            {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_ENABLE_ONEDNN_OPTS": "0"},
            "0 0 False False",
        ),
    ],
)
def test_importing_keeps_what_the_user_has_set(before, given, expected):
    code = f"""
import gc, os
{before}
from support.ops.tensorflow_v1 import USES_ONEDNN
variables = os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TF_ENABLE_ONEDNN_OPTS"]
print(*variables, USES_ONEDNN, gc.isenabled())
"""
    environment = script_environment()
    environment.pop("TF_ENABLE_ONEDNN_OPTS", None)
    output = subprocess.check_output(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **given},
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert output == f"{expected}\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root folder of Linux without plug-ins, with devices that are not GPUs."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(tf.sysconfig, "get_lib", lambda: str(tmp_path / "tensorflow"))
    monkeypatch.delenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", raising=False)
    (tmp_path / "dev").mkdir()
    for name in ("null", "nvme0", "nvram", "kvm"):
        (tmp_path / "dev" / name).touch()
    return tmp_path


def test_without_the_device_of_a_driver_there_can_be_no_gpu(root):
    assert not tensorflow_v1.can_have_gpus(root)


@pytest.mark.parametrize("name", ["nvidiactl", "nvhost-gpu", "nvgpu", "dxg", "kfd"])
def test_the_device_of_a_driver_may_belong_to_a_gpu(root, name):
    (root / "dev" / name).touch()
    assert tensorflow_v1.can_have_gpus(root)


def test_where_devices_cannot_be_listed_there_may_be_a_gpu(root):
    assert tensorflow_v1.can_have_gpus(root / "missing")


# A driver that is loaded may create the device of its GPU later.
@pytest.mark.parametrize("folder", ["sys/module/nvidia", "tensorflow-plugins"])
def test_a_loaded_driver_or_a_plug_in_may_have_devices_of_its_own(root, folder):
    (root / folder).mkdir(parents=True)
    assert tensorflow_v1.can_have_gpus(root)


def test_a_plug_in_of_the_user_or_another_system_may_have_devices_of_its_own(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "/opt/plugin.so")
        assert tensorflow_v1.can_have_gpus(root)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tensorflow_v1.can_have_gpus(root)


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


@pytest.mark.parametrize(("level", "is_shown"), [(logging.WARNING, False), (logging.INFO, True)])
def test_advice_to_replace_queues_is_logged_only_with_info_messages(level, is_shown):
    logger = tf.get_logger()
    previous = logger.level
    logger.setLevel(level)
    try:
        advice = {"msg": "%s is deprecated and will be removed", "args": ("queues",)}
        assert bool(logger.filter(logging.makeLogRecord(advice))) is is_shown
        assert logger.filter(logging.makeLogRecord({"msg": "a real warning"}))
    finally:
        logger.setLevel(previous)


def test_sessions_allocate_gpu_memory_on_demand_and_fall_back_to_other_devices():
    config = session_config()
    assert config.gpu_options.allow_growth
    assert config.allow_soft_placement
    assert not config.log_device_placement
    assert session_config(log_device_placement=True).log_device_placement


@pytest.mark.parametrize(
    ("use_fp16", "gpus", "rewritten"),
    [
        (True, ["GPU"], "auto_mixed_precision"),
        (True, [], "auto_mixed_precision_onednn_bfloat16"),
        (False, ["GPU"], None),
        (False, [], None),
    ],
)
def test_use_fp16_rewrites_to_float16_on_gpus_and_to_bfloat16_on_cpus(
    monkeypatch, use_fp16, gpus, rewritten
):
    monkeypatch.setattr(tensorflow_v1, "GPUS", gpus)
    rewrites = session_config(use_fp16).graph_options.rewrite_options
    for name in ("auto_mixed_precision", "auto_mixed_precision_onednn_bfloat16"):
        assert (getattr(rewrites, name) == rewrites.ON) is (name == rewritten)


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
        (3, 2, []),
    ],
)
def test_unused_gpus_are_reported(monkeypatch, warnings, used, found, expected):
    monkeypatch.setattr(tensorflow_v1, "GPUS", ["a GPU"] * found)
    tensorflow_v1.warn_of_unused_gpus(used)
    assert warnings == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (0, ["--num_gpus=2, but TensorFlow finds 0 GPU(s): the towers share the CPU."]),
        (1, ["--num_gpus=2, but TensorFlow finds 1 GPU(s): the towers share them."]),
        (2, []),
    ],
)
def test_more_towers_than_gpus_are_reported(monkeypatch, warnings, found, expected):
    monkeypatch.setattr(tensorflow_v1, "GPUS", ["a GPU"] * found)
    tensorflow_v1.warn_of_shared_devices(2)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
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
