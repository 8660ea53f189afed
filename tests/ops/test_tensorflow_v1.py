"""Tests of graph mode, of the session configuration and of what TensorFlow logs."""

import platform
import re
import sys

import pytest
from conftest import run_script, script_environment

from support.base.errors import UserError
from support.ops import tensorflow_v1
from support.ops.tensorflow_v1 import session_config, tf


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is turned on for x86 only")
@pytest.mark.parametrize(
    ("before", "given", "expected", "count"),
    [
        ("", {}, "2 1 True", 0),
        (
            "import tensorflow",
            {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_ENABLE_ONEDNN_OPTS": "0"},
            "0 0 False",
            1,
        ),
    ],
)
def test_importing_keeps_what_the_user_has_set_and_says_that_eager_mode_ends(
    before, given, expected, count
):
    code = f"""
import os
{before}
from support.ops.tensorflow_v1 import USES_ONEDNN, tf
assert not tf.executing_eagerly()
print(os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TF_ENABLE_ONEDNN_OPTS"], USES_ONEDNN)
"""
    environment = script_environment()
    environment.pop("TF_ENABLE_ONEDNN_OPTS", None)
    process = run_script("-c", code, env={**environment, **given})
    assert process.stdout == f"{expected}\n"
    warnings = re.findall("^WARNING:tensorflow:Eager execution is now off", process.stderr, re.M)
    assert len(warnings) == count


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root folder of Linux without plug-ins, with devices that are not GPUs."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(tf.sysconfig, "get_lib", lambda: str(tmp_path / "tensorflow"))
    monkeypatch.delenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", raising=False)
    for name in ("null", "nvme0", "nvram", "kvm"):
        (tmp_path / "dev" / name).mkdir(parents=True)
    assert not tensorflow_v1.can_have_gpus(tmp_path)
    return tmp_path


# A driver that is loaded may create the device of its GPU later.
@pytest.mark.parametrize(
    "path",
    [
        *("dev/nvidiactl", "dev/nvhost-gpu", "dev/nvgpu", "dev/dxg", "dev/kfd"),
        *("sys/module/nvidia", "tensorflow-plugins"),
    ],
)
def test_the_device_of_a_driver_or_a_plug_in_may_belong_to_a_gpu(root, path):
    (root / path).mkdir(parents=True)
    assert tensorflow_v1.can_have_gpus(root)


def test_a_plug_in_of_the_user_or_another_system_may_have_devices_of_its_own(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "/opt/plugin.so")
        assert tensorflow_v1.can_have_gpus(root)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tensorflow_v1.can_have_gpus(root)


def test_conditionals_need_no_functions_within_the_context(graph):
    x = tf.placeholder_with_default(-3.0, [])
    assert tf.control_flow_v2_enabled()
    with tensorflow_v1.conditionals_without_functions():
        y = tf.cond(x > 0, lambda: x, lambda: -x)
    assert tf.control_flow_v2_enabled()
    assert not graph.as_graph_def().library.function
    with tf.Session(config=session_config()) as session:
        assert session.run(y) == 3.0


def test_sessions_share_gpus_fall_back_to_other_devices_and_look_for_gpus_only_if_useful(
    monkeypatch,
):
    for can_have_gpus, device_count in ((True, {}), (False, {"GPU": 0})):
        monkeypatch.setattr(tensorflow_v1, "_CAN_HAVE_GPUS", can_have_gpus)
        config = session_config()
        assert config.gpu_options.allow_growth
        assert config.allow_soft_placement
        assert not config.log_device_placement
        assert config.device_count == device_count


@pytest.mark.parametrize(
    ("use_fp16", "gpus", "rewritten"),
    [
        (True, ["GPU"], "auto_mixed_precision"),
        (True, [], "auto_mixed_precision_onednn_bfloat16"),
        (False, ["GPU"], None),
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
    ("machine", "uses_onednn", "flags", "support"),
    [
        ("x86_64", True, "flags\t\t: fpu avx512f amx_bf16 amx_tile", "native"),
        ("x86_64", True, "flags\t\t: fpu avx2 avx_ne_convert", "native"),
        ("aarch64", False, "Features\t: fp asimd bf16", "native"),
        ("x86_64", True, "flags\t\t: fpu avx512f avx512_vnni", "emulated"),
        ("x86_64", True, "flags\t\t: fpu avx avx2", "none"),
        ("x86_64", False, "flags\t\t: fpu avx512f amx_bf16 amx_tile", "none"),
        ("aarch64", False, None, "native"),  # not Linux: unknown
    ],
)
def test_the_processor_determines_how_bfloat16_is_computed(
    tmp_path, monkeypatch, machine, uses_onednn, flags, support
):
    monkeypatch.setattr(tensorflow_v1.platform, "machine", lambda: machine)
    monkeypatch.setattr(tensorflow_v1, "USES_ONEDNN", uses_onednn)
    if flags:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert tensorflow_v1.find_bfloat16_support(tmp_path / "cpuinfo") == support


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
        (True, ["GPU"], None, 0),
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
    ("found", "expected"),
    [
        (0, ["--num_gpus=2, but TensorFlow finds 0 GPU(s): the towers share the CPU."]),
        (1, ["--num_gpus=2, but TensorFlow finds 1 GPU(s): the towers share them."]),
        (2, []),
        (3, ["2 of 3 GPUs are used; to use all, run cifar10_multi_gpu_train.py --num_gpus=3"]),
    ],
)
def test_fewer_or_more_gpus_than_towers_are_reported(monkeypatch, warnings, found, expected):
    monkeypatch.setattr(tensorflow_v1, "GPUS", ["a GPU"] * found)
    tensorflow_v1.warn_of_shared_devices(2)
    tensorflow_v1.warn_of_unused_gpus(2)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_the_error_of_a_histogram_that_is_not_finite_is_recognized(graph, value):
    histogram = tf.summary.histogram("h", tf.fill([2], value))
    with tf.Session() as session, pytest.raises(tf.errors.InvalidArgumentError) as caught:
        session.run(histogram)
    assert tensorflow_v1.is_nonfinite_histogram(caught.value)
    other = tf.errors.InvalidArgumentError(None, None, "assertion failed")
    assert not tensorflow_v1.is_nonfinite_histogram(other)
