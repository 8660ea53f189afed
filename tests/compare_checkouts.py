"""Compares the behavior of two checkouts as users see it, to check a refactoring.

    python tests/compare_checkouts.py OLD_FOLDER [NEW_FOLDER] [--turns=12]

It runs the same commands in both, prints the differences, and exits with code 1 if there are any.
NEW_FOLDER defaults to this checkout. --turns=0 skips memory and speed. Other processes on the
machine affect these measurements: if one of them differs, run the comparison again.
"""

import argparse
import concurrent.futures
import difflib
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import signal
import statistics
import sys
import tempfile
import threading
from subprocess import DEVNULL, PIPE, Popen

ROOT = pathlib.Path(__file__).parent.parent

# Both checkouts read $SHARED; $WORK is a folder of each.
DATA = "--synthetic_data --data_dir=$SHARED/data"
RECIPE = (
    f"{DATA} --batch_size=32 --min_fraction_of_examples_in_queue=0.01 --num_preprocess_threads=1 "
    "--seed=1 --log_frequency=1 --save_summaries_steps=10 --save_histograms_steps=20"
)
TRAIN = f"cifar10_train.py {RECIPE}"
TRAIN_TOWERS = f"cifar10_multi_gpu_train.py {RECIPE}"
EVAL = f"cifar10_eval.py {DATA} --num_examples=500 --run_once --checkpoint_dir=$WORK/train"
PREDICT = "cifar10_predict.py --checkpoint_dir=$WORK/train"
CONVERT = "cifar10_convert.py --pictures=$SHARED"
SCENARIOS = {
    **{
        f"help of cifar10_{name}.py": f"cifar10_{name}.py --help"
        for name in ("train", "multi_gpu_train", "eval", "predict", "convert")
    },
    "training": f"{TRAIN} --train_dir=$WORK/train --max_steps=20",
    "nothing to do": f"{TRAIN} --train_dir=$WORK/train --max_steps=20",
    "resuming": f"{TRAIN} --train_dir=$WORK/train --max_steps=25",
    "slow operations": f"{TRAIN} --train_dir=$WORK/slow --max_steps=20 --fast_ops=false",
    "local layers": f"{TRAIN} --train_dir=$WORK/local --max_steps=2 --top_layers=local",
    "towers": f"{TRAIN_TOWERS} --train_dir=$WORK/towers --max_steps=5 --num_gpus=2",
    "evaluation": f"{EVAL} --eval_dir=$WORK/eval",
    "prediction": f"{PREDICT} $SHARED/split/test/cat/0.png",
    "prediction as JSON": f"{PREDICT} --json $SHARED/split/test/cat/0.png",
    "export": f"{PREDICT} --export_dir=$WORK/export",
    "conversion": f"{CONVERT}/split --output=$WORK/records/split",
    "folder linked twice": f"{CONVERT}/linked --test_fraction=0.2 --output=$WORK/records/linked",
    "test fraction": f"{CONVERT}/classes --test_fraction=0.3 --output=$WORK/records/classes",
    "unknown flag": f"{TRAIN} --no_such_flag=1",
    "integer out of range": f"{TRAIN} --batch_size=0",
    "float out of range": f"{TRAIN} --moving_average_decay=1.5",
    "invalid choice": f"{TRAIN} --top_layers=none",
    "path that is not local": f"{TRAIN} --train_dir=gs://bucket/train",
    "stray argument": f"{TRAIN} stray",
    "missing checkpoint": f"{EVAL} --checkpoint_dir=$WORK/none --data_dir=$WORK/records",
    "missing --output": f"{CONVERT}/split",
    "eval_dir is checkpoint_dir": f"{EVAL} --eval_dir=$WORK/train",
    "another crop_size": f"{EVAL} --eval_dir=$WORK/eval --crop_size=28",
    "malformed TF_CONFIG": f"{TRAIN} --train_dir=$WORK/cluster",
    "Ctrl-C": f"{TRAIN} --train_dir=$WORK/stopped/train --log_frequency=20 --max_steps=200",
}
ENVIRONMENTS = {"malformed TF_CONFIG": {"TF_CONFIG": "{"}}
STOP_AFTER = {"Ctrl-C": ": step 20,"}  # send SIGINT after a line with this text
LAYERS = "conv1|pool1|norm1|conv2|norm2|pool2|local3|local4|softmax_linear"

# As in conftest.py, which this script cannot import without modules of the project.
START_UP_NOTICES = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\) .*"
    r"|I0000 .*"
    r"|E0000 .* failed call to cuInit: .*"
)
VARYING = {
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}": "TIME",
    r"\d+\.\d examples/sec; \d+\.\d{3} sec/batch": "SPEED",
    r"\d\d:\d\d:\d{10}\.\d{6} +\d+ ": "TIME PROCESS ",
    r"tfevents\.\d{10}\..+\.\d+\.\d{19}$": "tfevents.TIME.HOST.PROCESS.TIME",
    r"step \d+ is saved in (\S+)-\d+": r"step N is saved in \1-N",
    r"(stopped/train/model\.ckpt)-[1-9]\d*": r"\1-N",
}

TIMEOUT_SECS = 300  # for a script
TIMED_STEPS = 16  # in a turn
MAX_SLOWDOWN = 1.03
MEMORY_TURNS = 3
MAX_MEMORY_CHANGE = 0.05


class Checkout:
    """A checkout, the folder that its scripts write to, and observations by name, `KIND: ITEM`."""

    def __init__(self, root, folder, name):
        self.root, folder = pathlib.Path(root).resolve(), pathlib.Path(folder).resolve()
        self.shared, self.work = folder / "shared", folder / name
        self.work.mkdir()
        self.observed = {}

    def normalize(self, text):
        """Replaces what varies between runs and between checkouts."""
        for path, name in ((self.work, "$WORK"), (self.shared, "$SHARED"), (self.root, "$ROOT")):
            text = text.replace(str(path), name)
        for pattern, replacement in VARYING.items():
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        return text

    def run(self, command, stop_after=None, **environment):
        """Runs a script, and sends SIGINT if it prints a line with the text `stop_after`.

        Returns the exit code, the lines of stdout and of stderr, and the peak memory.
        """
        words = [sys.executable, *command.split()]
        for path, name in ((self.work, "$WORK"), (self.shared, "$SHARED")):
            words = [word.replace(name, str(path)) for word in words]
        environment = {**os.environ, **environment}
        with tempfile.TemporaryFile("w+") as stderr:
            streams = {"stdin": DEVNULL, "stdout": PIPE, "stderr": stderr}
            process = Popen(words, cwd=self.root, env=environment, text=True, **streams)
            timer = threading.Timer(TIMEOUT_SECS, process.kill)
            timer.start()
            stdout = ""
            with process.stdout:
                for line in process.stdout:
                    stdout += line
                    if stop_after is not None and stop_after in line:
                        process.send_signal(signal.SIGINT)
            _, status, usage = os.wait4(process.pid, 0)
            timer.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            stderr.seek(0)
            lines = [self.normalize(text).splitlines() for text in (stdout, stderr.read())]
        return process.returncode, *lines, usage.ru_maxrss


def observe_scenario(checkout, name, command):
    """Observes what a script prints, and its exit code; of a help, each flag by itself."""
    environment = ENVIRONMENTS.get(name, {})
    code, stdout, stderr, _ = checkout.run(command, STOP_AFTER.get(name), **environment)
    observed = checkout.observed
    notices = list(filter(START_UP_NOTICES.fullmatch, stderr))
    observed[f"start-up notices: {name}"] = notices
    observed[f"{name}: stderr"] = [line for line in stderr if line not in notices]
    observed[f"{name}: exit code"] = code
    text = "".join(f"{line}\n" for line in stdout)
    if command.endswith(" --help"):
        description = re.compile(r"^    (--\S+)\n((?: {8}.*\n)+)", re.MULTILINE)
        for flag, lines in description.findall(text):
            meaning, _, default = " ".join(lines.split()).rpartition(" (default: ")
            observed[f"{name}: {flag}: text"] = meaning
            observed[f"{name}: {flag}: default"] = default.removesuffix(")")
        text = description.sub(r"    \1\n", text)  # headings and the order of the flags
    observed[f"{name}: stdout"] = text.splitlines()


def observe_files(checkout):
    """Observes the names of files, the keys of JSON files, flags, losses, and hashes of records."""
    observed = checkout.observed
    paths = sorted(path for path in checkout.work.rglob("*") if path.is_file())
    names = [checkout.normalize(str(path.relative_to(checkout.work))) for path in paths]
    observed["files: names"] = sorted(names)
    for path, name in zip(paths, names, strict=True):
        if name.startswith("records/"):
            observed[f"SHA-256: {name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "run.json":
            starts = json.loads(path.read_text())
            observed[f"files: keys of {name}"] = [", ".join(start) for start in starts]
            for flag, value in starts[-1].get("flags", {}).items():
                observed[f"flags in {name}: {flag}"] = checkout.normalize(json.dumps(value))
        elif path.suffix == ".jsonl":
            lines = list(map(json.loads, path.read_text().splitlines()))
            observed[f"files: keys of {name}"] = [", ".join(line) for line in lines]
            for line in lines:
                if "loss" in line:
                    observed[f"losses in {name}: step {line.get('step')}"] = line["loss"]


def call_in_child(function, *arguments):
    """Calls a function that imports large modules.

    They stay out of this process, because the system counts the memory of the process that starts
    a script towards the peak memory of the script.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def read_with_tensorflow(work):
    """Returns observations of graphs, checkpoints and event files."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # for the start-up notices
    import tensorflow.compat.v1 as tf

    observed = {}
    for path in sorted(work.glob("*/model.ckpt-0.meta")):
        run = path.parent.name
        for node in tf.MetaGraphDef.FromString(path.read_bytes()).graph_def.node:
            if re.match(rf"(tower_\d+/)?({LAYERS})(/|$)", node.name):
                observed[f"graph of {run}: {node.name}"] = node.op
        reader = tf.train.load_checkpoint(str(path.with_suffix("")))
        types = reader.get_variable_to_dtype_map()
        for name, shape in reader.get_variable_to_shape_map().items():
            observed[f"variables of {run}: {name}"] = f"{types[name].name} {shape}"
    for path in sorted(work.glob("*/events.out.tfevents.*")):
        kind = f"TensorBoard tags of {path.parent.name}"
        for event in tf.train.summary_iterator(str(path)):
            observed.setdefault(f"{kind}: (events)", []).append(event.WhichOneof("what"))
            for value in event.summary.value:
                value_kind = value.metadata.plugin_data.plugin_name or value.WhichOneof("value")
                shown = f"{value_kind} at step {event.step}"
                observed.setdefault(f"{kind}: {value.tag}", []).append(shown)
    return observed


def observe(checkout):
    """Collects the observations of a checkout."""
    for name, command in SCENARIOS.items():
        observe_scenario(checkout, name, command)
    observe_files(checkout)
    checkout.observed |= call_in_child(read_with_tensorflow, checkout.work)


def write_pictures(folder, count):
    """Writes images of random sizes and modes into a folder for each of two classes."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(count)
    for path in [folder / name / f"{n}.png" for name in ("cat", "dog") for n in range(count)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, [*generator.integers(24, 64, 2), 3], np.uint8)
        Image.fromarray(pixels).convert(generator.choice(["RGB", "L", "RGBA"])).save(path)


def prepare_shared_folder(old):
    """Generates the dataset with the old checkout, and writes images to convert."""
    for name, count in {"split/train": 9, "split/test": 4, "classes": 20, "linked/one": 8}.items():
        call_in_child(write_pictures, old.shared / name, count)
    (old.shared / "classes" / "dog" / "notes.txt").write_text("not an image")
    (old.shared / "linked" / "two").mkdir()
    for name in ("a", "b"):
        (old.shared / "linked" / "two" / name).symlink_to("../one/cat")
    code, _, stderr, _ = old.run(f"{TRAIN} --train_dir=$SHARED/first --max_steps=1")
    if code:
        raise SystemExit("\n".join([f"{old.root} cannot train:", *stderr]))


def find_differences(old, new):
    """Returns a text for each difference between two observations, ordered by kind."""
    differences = []
    for name in sorted({**old, **new}, key=lambda name: name.partition(":")[0]):
        before, after = old.get(name, "(absent)"), new.get(name, "(absent)")
        change = f"{name} {before} -> {after}"
        if isinstance(before, list) and isinstance(after, list):
            lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
            change = "\n    ".join([name, *(line for line in lines if line[0] != "@")])
        if before != after:
            differences.append(change)
    return differences


def compare_memory(old, new, turns):
    """Prints the peak memory of a training run and of a conversion; returns large differences."""
    call_in_child(write_pictures, old.shared / "many", 1000)

    def measure(checkout, command):
        with tempfile.TemporaryDirectory(dir=checkout.work) as folder:
            *_, memory = checkout.run(command + folder)
            return memory

    differences = []
    for name, command in {
        "training": f"cifar10_train.py {DATA} --max_steps=20 --train_dir=",
        "conversion": f"{CONVERT}/many --test_fraction=0.2 --output=",
    }.items():
        measurements = {c: functools.partial(measure, c, command) for c in (old, new)}
        figures = turns.take_turns(MEMORY_TURNS, measurements).values()
        before, after = map(statistics.median, figures)
        line = f"peak memory of {name}: {before} -> {after} ({after / before - 1:+.1%})"
        print(line, flush=True)
        if abs(after / before - 1) > MAX_MEMORY_CHANGE:
            differences.append(line)
    return differences


def compare_speed(old, new, turns, count):
    """Prints the seconds per training step; returns a difference if the new ones are larger."""
    measurements = {}
    for checkout in (old, new):
        script = checkout.root / "benchmarks" / "contender.py"
        data = f"--data_dir={checkout.shared}/data"
        contender = turns.Contender(script, "training", "--synthetic_data", data)
        contender.wait_until_ready()
        measurements[contender] = functools.partial(contender.seconds_per_step, TIMED_STEPS)
    before, after = turns.take_turns(count, measurements).values()
    for contender in measurements:
        contender.close()
    ratios = turns.ratios(after, before)
    ratio = statistics.median(ratios)
    line = (
        f"seconds per step: {statistics.median(before):.4f} -> {statistics.median(after):.4f}, "
        f"median ratio {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    print(line, flush=True)
    return [line] if ratio > MAX_SLOWDOWN else []


def main():
    """Compares the folders on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="folder of a checkout")
    parser.add_argument("new", nargs="?", default=ROOT, help="another one; by default, this one")
    parser.add_argument("--turns", type=int, default=12, help="0 skips memory and speed")
    arguments = parser.parse_args()
    os.environ.pop("TF_CONFIG", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # In a background job, SIGINT is ignored. The scripts would inherit that, but not a handler.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        old, new = (Checkout(getattr(arguments, n), folder, n) for n in ("old", "new"))
        prepare_shared_folder(old)
        print(f"Running the scripts of {old.root} and {new.root}", flush=True)
        with concurrent.futures.ThreadPoolExecutor() as executor:
            list(executor.map(observe, [old, new]))  # raises their exceptions
        differences = find_differences(old.observed, new.observed)
        if arguments.turns > 0:
            sys.path.insert(0, str(new.root / "benchmarks"))
            import turns

            differences += compare_memory(old, new, turns)
            differences += compare_speed(old, new, turns, arguments.turns)
    print(*differences, f"Differences: {len(differences)}", sep="\n")
    raise SystemExit(1 if differences else 0)


if __name__ == "__main__":
    main()
