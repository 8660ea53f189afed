"""Not a test: breaks the project on purpose, to see whether the tests notice.

    python tests/breakages.py               # all breakages: about five minutes
    python tests/breakages.py cluster pool  # those whose description contains one of the words

Each breakage is a mistake in one line that anyone could make. The program makes it in a temporary
copy of the project and runs a few tests, which must fail; without it, they must pass. It exits with
code 1 if a breakage was not noticed.

The table covers each promise of docs/guarantees.md, each group of flags, each layer, the update,
the towers, the cluster and the constants. `tests/test_structure.py` checks that it fits the code.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Breakage(NamedTuple):
    """A mistake in one line."""

    what: str  # what goes wrong
    file: str  # the path of the file to break
    text: str  # a part of one line, which occurs exactly once in the file
    replacement: str
    tests: str  # the paths of the test files that should notice, relative to `tests/`
    names: str  # the tests to run, as for `pytest -k`; each word is part of a test's name


# fmt: off
BREAKAGES = [Breakage(*entry) for entry in [
    # The promises, in the order of docs/guarantees.md.
    ("an old version of Python is not refused", "support/__init__.py",
     "sys.version_info < (3, 11)", "sys.version_info < (3, 9)",
     "test_support.py", "an_unsupported_system"),
    ("a signal interrupts the step", "support/run/training_run.py",
     "signals = stack.enter_context(DeferredSignals())", "signals = DeferredSignals()",
     "test_faults.py", "a_signal_lets_the_step_finish"),
    ("a restart does not restore the checkpoint", "support/run/training_run.py",
     "checkpoint_filename_with_path=newest and newest.path",
     "checkpoint_filename_with_path=None",
     "test_faults.py", "a_restart_restores"),
    ("a full disk leaves unfinished files", "support/run/checkpoints.py",
     "if not _exists(path):", "if False:",
     "run/test_checkpoints.py test_faults.py", "a_failed_save_leaves or a_full_disk_ends_training"),
    ("a terminal that closes kills the script", "support/base/signals.py",
     "_NOTICES = (signal.SIGHUP, ", "_NOTICES = (",
     "test_faults.py", "a_terminal_that_goes_away"),
    ("the loss of stdout ends the work", "support/base/streams.py",
     "if self._is_needed:", "if not self._is_needed:",
     "test_cifar10_eval.py", "results_are_written_when"),
    ("TensorBoard shows nodes without their inputs", "support/ops/summaries.py",
     "if not name.removeprefix", "if name or not name.removeprefix",
     "ops/test_summaries.py", "the_graph_in_tensorboard"),
    ("a wrong SHA-256 is accepted", "support/data/download.py",
     "    if digest != sha256:", "    if digest is None:",
     "data/test_download.py", "a_download_with_another_sha256"),
    ("links in the archive are extracted", "support/data/download.py",
     "if member.name not in names or not member.isfile():", "if member.name not in names:",
     "data/test_download.py", "a_link_device_or_folder"),
    ("a label one too large is accepted", "support/data/records.py",
     "labels >= num_classes", "labels > num_classes",
     "data/test_dataset.py", "a_label_without_a_class"),
    ("training watches the test file for changes", "support/run/training_run.py",
     "(data_folder, eval_data=False)", "(data_folder, eval_data=True)",
     "test_faults.py", "a_record_file_that_changes"),
    ("--images: each class gets the images of all", "support/data/conversion.py",
     "read_images([folder])", "read_images(self._folders)",
     "test_cifar10_convert.py", "images_become_the_records"),
    ("a new folder ignores the umask", "support/base/files.py",
     "os.mkdir(staging)", "os.mkdir(staging, 0o700)",
     "base/test_files.py data/test_download.py", "umask"),
    ("an infinite loss does not stop training", "support/run/hooks.py",
     "if not math.isfinite(value):  # NanTensorHook", "if math.isnan(value):  #",
     "run/test_training_run.py", "a_loss_that_is_not_finite"),
    ("an input that ends is not an error", "support/run/training_run.py",
     "if number is None and has_left_loop:", "if number is None:",
     "run/test_training_run.py", "an_input_that_ends_early"),
    ("two processes train in one folder", "support/run/training_run.py",
     "stack.enter_context(files.lock(os.path.join(train_dir, LOCK_FILE)))", "pass",
     "run/test_training_run.py", "a_second_trainer"),
    ("a trainer listens on a port", "support/run/training_run.py",
     "master=self._worker.target", "master=tf.train.Server.create_local_server().target",
     "test_faults.py", "listens_on_no_port"),
    ("--max_checkpoints_to_keep deletes those of other runs", "support/run/checkpoints.py",
     "state.all_model_checkpoint_paths if state is not None else []",
     "reversed(_list_checkpoints(folder))",
     "run/test_checkpoints.py", "saving_deletes_no_checkpoint"),
    ("training starts again on top of damaged checkpoints", "support/run/checkpoints.py",
     "if _list_checkpoints(train_dir):", "if _find_readable(train_dir):",
     "run/test_checkpoints.py", "a_folder_with_only_damaged_checkpoints"),
    ("a checkpoint of another crop size is accepted", "support/data/settings.py",
     '("top_layers", "crop_size")', '("top_layers",)',
     "test_cifar10_predict.py", "a_checkpoint_of_another_crop_size"),
    ("a run that resumes saves its step again", "support/run/hooks.py",
     "self._saved_step = resumed and resumed.step", "self._saved_step = None",
     "run/test_training_run.py", "a_resumed_run_without_a_finished_step"),
    ("an evaluation returns to an earlier step", "support/run/evaluation.py",
     "if checkpoint.step < used_step:", "if checkpoint.step < 0:",
     "run/test_evaluation.py", "checkpoints_of_earlier_steps"),
    ("the chief does not notice the loss of a worker", "support/cluster/training.py",
     "for peer in self._task.workers[1:] if self.is_chief else", "for peer in",
     "cluster/test_training.py", "the_chief_reports_a_lost_worker"),
    ("a worker with fewer images per step is accepted", "support/cluster/launch.py",
     "counts[0] != counts[1]", "counts[0] < counts[1]",
     "cluster/test_launch.py", "a_worker_with_other_images"),
    ("the loss of the chief ends no other task", "support/cluster/launch.py",
     "{READY: _explain_loss(task, lost), FAILED", "{FAILED",
     "cluster/test_launch.py", "a_task_is_lost_after"),
    ("a chief that is restarted alone is not refused", "support/cluster/launch.py",
     "if any(status.read(STATE) for status in statuses):", "if statuses[0].read(STATE):",
     "cluster/test_launch.py", "a_chief_is_refused"),

    # The flags: one of each script and of each group in support/base/options.py. The groups run and
    # conversion are above (--max_checkpoints_to_keep, --images), model is below (local3).
    ("--min_contrast_factor does not follow its constant", "support/base/options.py",
     'Constant("MIN_CONTRAST_FACTOR")', "0.2",
     "test_contract.py", "an_edited_constant_takes_effect"),
    ("--shard_data does not reach the workers of a cluster", "cifar10_train.py",
     "train, settings, timeout, FLAGS.shard_data)", "train, settings, timeout)",
     "cluster/test_launch.py", "shard"),
    ("--use_moving_averages=false uses the averages", "cifar10_predict.py",
     "find_variables(FLAGS.use_moving_averages)", "find_variables(True)",
     "test_cifar10_predict.py", "the_three_most_likely"),
    ("--batch_size has no effect on training", "cifar10.py",
     "batch_size = batch_size or FLAGS.batch_size", "batch_size = batch_size or 128",
     "test_cifar10.py", "functions_without_arguments"),
    ("--num_gpus has no effect", "cifar10_multi_gpu_train.py",
     "build_training(num_gpus, FLAGS.batch_size)", "build_training(1, FLAGS.batch_size)",
     "test_cifar10_train.py", "the_schedule_counts_the_images_of_all"),
    ("--eval_interval_secs: time evaluating does not count", "support/run/evaluation.py",
     "time.sleep(max(0.0, start + interval_secs - time.monotonic()))", "time.sleep(interval_secs)",
     "run/test_evaluation.py", "the_interval_separates"),

    # The layers.
    ("conv1 has other initial biases", "cifar10.py",
     '"conv1", channels=64, bias=0.0', '"conv1", channels=64, bias=0.1',
     "test_cifar10.py", "variables_have_the_initial_values"),
    ("the normalization does not divide alpha", "cifar10.py",
     "alpha=0.001 / 9.0", "alpha=0.001",
     "test_cifar10.py", "the_logits_are_those_of_numpy"),
    ("conv2 has fewer channels", "cifar10.py",
     '"conv2", channels=64', '"conv2", channels=32',
     "test_cifar10.py", "1068298_parameters"),
    ("pool2 skips norm2", "cifar10.py",
     '_max_pool(norm2, "pool2")', '_max_pool(conv2, "pool2")',
     "test_cifar10.py", "the_logits_are_those_of_numpy"),
    ("local3 ignores --weight_decay", "cifar10.py",
     '384, stddev=0.04, wd=wd', '384, stddev=0.04, wd=WEIGHT_DECAY',
     "test_contract.py", "an_edited_constant_takes_effect"),
    ("local4 starts with large weights", "cifar10.py",
     '"local4", 192, stddev=0.04', '"local4", 192, stddev=0.4',
     "test_cifar10.py", "variables_have_the_initial_values"),
    ("softmax_linear has a ReLU", "cifar10.py",
     "softmax_wd, relu=False", "softmax_wd",
     "test_cifar10.py", "the_logits_are_those_of_numpy"),

    # The update, the towers, the cluster, the constants and the GPUs.
    ("the update does not apply the gradients", "cifar10.py",
     "optimizer.apply_gradients(applied_gradients)", "tf.no_op()",
     "test_cifar10.py", "an_update_changes_a_variable"),
    ("the moving averages start slowly", "cifar10.py",
     "FLAGS.moving_average_decay, global_step", "FLAGS.moving_average_decay",
     "test_cifar10.py", "an_update_changes_a_variable"),
    ("the gradients of the towers are summed", "cifar10_multi_gpu_train.py",
     "tf.add_n(grads) / len(grads)", "tf.add_n(grads)",
     "test_cifar10_multi_gpu_train.py", "gradients_are_averaged"),
    ("each tower has variables of its own", "cifar10_multi_gpu_train.py",
     "tf.variable_scope(tf.get_variable_scope(), reuse=i > 0)", 'tf.variable_scope(f"tower_{i}")',
     "test_cifar10_multi_gpu_train.py", "a_step_of_several_towers"),
    ("the cluster does not wait for all gradients", "support/cluster/synchronization.py",
     "(collector, num_workers, num_workers)", "(collector, 1, num_workers)",
     "cluster/test_synchronization.py", "a_step_applies_the_mean or each_worker_waits"),
    ("a GPU of AMD is not looked for", "support/ops/tensorflow_v1.py",
     '"dev/dxg", "dev/kfd")', '"dev/dxg")',
     "ops/test_tensorflow_v1.py", "the_device_of_a_driver"),
]]
# fmt: on


def find_stale():
    """Returns the breakages whose text does not occur exactly once, or whose tests do not exist."""
    return [each for each in BREAKAGES if not _fits_the_code(each)]


def _fits_the_code(breakage):
    if (ROOT / breakage.file).read_text().count(breakage.text) != 1:
        return False
    tests = "".join((ROOT / "tests" / path).read_text() for path in breakage.tests.split())
    return all(name in tests for name in breakage.names.split(" or "))


def run_tests(breakage):
    """Runs the tests of a breakage in a broken copy of the project; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        project = pathlib.Path(folder, "project")
        shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        path = project / breakage.file
        path.write_text(path.read_text().replace(breakage.text, breakage.replacement))
        tests = [f"tests/{path}" for path in breakage.tests.split()]
        # `-m ""` includes the slow tests.
        options = ["-x", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", "", "-k", breakage.names]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=project,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode


def main(words):
    """Breaks what is described by one of the words; returns whether the tests noticed it all."""
    unnoticed = 0
    for breakage in BREAKAGES:
        if words and not any(word in breakage.what for word in words):
            continue
        start = time.monotonic()
        # Any other code than 1 means that no test has failed: pytest found none, for example.
        is_noticed = run_tests(breakage) == 1
        unnoticed += not is_noticed
        outcome = "noticed" if is_noticed else "NOT NOTICED"
        print(f"{outcome} ({time.monotonic() - start:.0f} s): {breakage.what}", flush=True)
    return not unnoticed


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
