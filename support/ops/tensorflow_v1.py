"""TensorFlow 1 graph mode on TensorFlow 2: the project's only import of TensorFlow.

The other modules write `from support.ops.tensorflow_v1 import tf`; `tf` is `tensorflow.compat.v1`.

Importing this module has five effects, the first two only if TensorFlow was not imported before:

- TF_CPP_MIN_LOG_LEVEL becomes 2 unless it is set: TensorFlow's C++ code then logs errors only.
  Otherwise, each queue thread would warn that it was canceled whenever a session ends.
- On x86, TF_ENABLE_ONEDNN_OPTS becomes 1 unless it is set: TensorFlow then uses oneDNN's kernels.
  By itself, it does so only on processors with certain AVX512 or AMX instructions.
- Eager execution is turned off, with a warning if TensorFlow was imported before and used it.
- TensorFlow's Python logger has the level WARNING unless it has a level of its own. It no longer
  advises you to replace queues with tf.data.
- TensorFlow looks for GPUs unless the computer cannot have any. It does not allocate their memory.
"""

import contextlib
import functools
import gc
import glob
import logging
import os
import pathlib
import platform
import re
import signal
import sys

from support.base.errors import UserError, first_line

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if platform.machine() == "x86_64":
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

_ends_eager_mode = "tensorflow" in sys.modules and sys.modules["tensorflow"].executing_eagerly()

# The import creates half a million objects that stay alive. The garbage collector would traverse
# them again and again; without it, the import takes 1.4 seconds instead of 1.9.
gc.disable()
try:
    import tensorflow.compat.v1 as tf
except KeyboardInterrupt:  # in the first seconds of a script, when nothing has begun
    raise SystemExit(128 + signal.SIGINT) from None
finally:
    gc.enable()

# Sessions, queues and readers exist in graph mode only. TensorFlow 2's resource variables stay
# enabled: control dependencies determine the order of their reads and writes.
tf.disable_eager_execution()


def can_have_gpus(root="/"):
    """Returns whether this computer may have a GPU. If not, looking for one only prints an error.

    On Linux, there must be a driver's device (NVIDIA, including Jetson; WSL; ROCm), NVIDIA's kernel
    module, which may not create its devices before a program first uses CUDA, or a TensorFlow
    device plug-in. On other systems, the result is always true.
    """
    if sys.platform != "linux" or "TF_PLUGGABLE_DEVICE_LIBRARY_PATH" in os.environ:
        return True
    plug_ins = os.path.join(os.path.dirname(tf.sysconfig.get_lib()), "tensorflow-plugins")
    names = ("sys/module/nvidia", "dev/nvidia*", "dev/nvhost*", "dev/nvgpu*", "dev/dxg", "dev/kfd")
    return os.path.isdir(plug_ins) or any(glob.glob(os.path.join(root, name)) for name in names)


_CAN_HAVE_GPUS = can_have_gpus()
GPUS = tf.config.list_physical_devices("GPU") if _CAN_HAVE_GPUS else []
USES_ONEDNN = os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "1"

# Without a level of its own, the logger would have that of the root logger, which absl sets to INFO
# in `tf.app.run`.
if tf.get_logger().level == logging.NOTSET:
    tf.get_logger().setLevel(logging.WARNING)
tf.get_logger().addFilter(lambda record: "is deprecated and will be removed" not in str(record.msg))

if _ends_eager_mode:  # for example, in a notebook that also runs code for TensorFlow 2
    tf.logging.warning(
        "Eager execution is now off in this process, because this project builds graphs as in "
        "TensorFlow 1: .numpy() and Keras 3's predict no longer work here. Run TensorFlow 2 code "
        "in another process or notebook kernel. cifar10_predict.py --export_dir writes a model "
        "that it can load."
    )


@contextlib.contextmanager
def conditionals_without_functions():
    """Makes `tf.cond` add plain operations to the graph within the context, as in TensorFlow 1.

    TensorFlow 2's functions clutter the graph in TensorBoard and make TensorFlow look for GPUs.
    """
    uses_functions = tf.control_flow_v2_enabled()
    tf.disable_control_flow_v2()
    try:
        yield
    finally:
        if uses_functions:
            tf.enable_control_flow_v2()


def session_config(use_fp16=False, log_device_placement=False):
    """Returns the `tf.ConfigProto` of all sessions in the project.

    GPU memory grows on demand, so evaluation and training can share a GPU. An operation whose
    device does not exist runs on one that does.

    Args:
      use_fp16: bool; let TensorFlow rewrite the graph to compute in float16 on GPUs or in bfloat16
        on CPUs. Variables and checkpoints stay float32.
      log_device_placement: bool; print the device of every operation.
    """
    config = tf.ConfigProto(allow_soft_placement=True, log_device_placement=log_device_placement)
    config.gpu_options.allow_growth = True
    if not _CAN_HAVE_GPUS:
        config.device_count["GPU"] = 0
    if use_fp16:
        options = config.graph_options.rewrite_options
        if GPUS:
            options.auto_mixed_precision = options.ON
        else:
            options.auto_mixed_precision_onednn_bfloat16 = options.ON
            _warn_of_slow_bfloat16()
    return config


@functools.cache  # warn once
def _warn_of_slow_bfloat16():
    messages = {
        "emulated": "--use_fp16: this processor has no bfloat16 instructions, so they are "
        "emulated; training can take three times as long as in float32.",
        "none": "--use_fp16 has no effect: on this processor, TensorFlow computes in float32.",
    }
    if message := messages.get(find_bfloat16_support()):
        tf.logging.warning(message)


def find_bfloat16_support(cpuinfo="/proc/cpuinfo"):
    """Returns how TensorFlow computes in bfloat16 on this processor.

    It is "native" if the processor has bfloat16 instructions or is unknown; "emulated" if it has
    only AVX512; "none" if TensorFlow computes in float32 although 16 bits were requested. Source:
    `IsDataTypeSupportedByOneDNNOnThisCPU` in TensorFlow.
    """
    if platform.machine() == "x86_64" and not USES_ONEDNN:
        return "none"
    words = set(_read(cpuinfo).split())
    # Names on x86 and on Arm. Outside Linux, there is no such file.
    if not words or words & {"amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16"}:
        return "native"
    return "emulated" if "avx512f" in words else "none"


def computes_in_16_bits(use_fp16):
    """Returns whether a session with `session_config(use_fp16)` computes in 16 bits."""
    return use_fp16 and bool(GPUS or find_bfloat16_support() != "none")


def with_loss_scaling(optimizer):
    """Adds dynamic loss scaling to an optimizer: in float16, many gradients would become 0.

    The loss is multiplied by a large factor, and the gradients are divided by it. If a gradient
    overflows, the step only halves the factor; 2,000 steps without an overflow double it.
    """

    def make_local(next_creator, **arguments):
        return next_creator(**{**arguments, "collections": [tf.GraphKeys.LOCAL_VARIABLES]})

    # Local variables are not saved, so checkpoints do not depend on the precision.
    with tf.device("/cpu:0"), tf.variable_creator_scope(make_local):
        scale = tf.mixed_precision.DynamicLossScale()
    return tf.mixed_precision.MixedPrecisionLossScaleOptimizer(optimizer, scale)


def warn_of_unusable_gpus(device="/dev/nvidia0"):
    """Warns if there is an NVIDIA GPU that TensorFlow cannot use.

    TensorFlow's own message about it is only a warning, which TF_CPP_MIN_LOG_LEVEL=2 hides.
    """
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if os.path.exists(device) and not GPUS and not is_hidden:
        tf.logging.warning(
            "This machine has an NVIDIA GPU, but TensorFlow cannot use it. To see why, set "
            "TF_CPP_MIN_LOG_LEVEL=0; the CUDA libraries come with tensorflow[and-cuda]."
        )


def warn_of_shared_devices(num_towers):
    """Warns if TensorFlow finds fewer GPUs than towers."""
    if num_towers > len(GPUS):
        shared = "them" if GPUS else "the CPU"
        tf.logging.warning(
            f"--num_gpus={num_towers}, but TensorFlow finds {len(GPUS)} GPU(s): the towers share "
            f"{shared}."
        )


def warn_of_unused_gpus(num_used):
    """Warns if TensorFlow finds more GPUs than the number that training uses."""
    if num_used < len(GPUS):
        tf.logging.warning(
            f"{num_used} of {len(GPUS)} GPUs {'is' if num_used == 1 else 'are'} used; to use all, "
            f"run cifar10_multi_gpu_train.py --num_gpus={len(GPUS)}"
        )


@contextlib.contextmanager
def out_of_memory_explained():
    """Turns TensorFlow's error for a tensor that does not fit into memory into `UserError`."""
    try:
        yield
    except tf.errors.OpError as error:
        # If CUDA itself has no memory left, the error is an InternalError or an UnknownError.
        is_cuda = re.search("CUDA_ERROR_OUT_OF_MEMORY|failed to allocate memory", str(error))
        if not isinstance(error, tf.errors.ResourceExhaustedError) and not is_cuda:
            raise
        raise UserError(
            f"out of memory ({first_line(error)}); use a smaller --batch_size, or set "
            "CUDA_VISIBLE_DEVICES=-1 to compute on the CPU"
        ) from error


def find_processor_name():
    """Returns the processor's name according to Linux, or what Python knows on other systems."""
    name = re.search(r"^model name\s*: (.*)", _read("/proc/cpuinfo"), re.MULTILINE)
    return name[1] if name else platform.processor()


def _read(cpuinfo):
    """Returns the text of a file, or an empty string if it is missing, as outside Linux."""
    path = pathlib.Path(cpuinfo)
    return path.read_text() if path.exists() else ""


def is_nonfinite_histogram(error):
    """Returns whether an exception comes from a histogram summary of an infinity or a NaN."""
    pattern = "(Nan|Infinity) in (summary )?histogram for"
    return re.search(pattern, str(error), re.IGNORECASE) is not None
