"""Tests of the layout of the project: what the linters do not reach, and what importing does.

import-linter and ruff check which module may import what; see pyproject.toml.
"""

import ast
import re

import breakages
import pytest
from conftest import ROOT, messages, run_script

TOP_LEVEL = {path.stem for path in ROOT.glob("*.py")}
COMMANDS = TOP_LEVEL - {"cifar10", "cifar10_input"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [*ROOT.glob("*.py"), *(ROOT / "support").rglob("*.py")]
    if path.stem != "__init__"
}
WITHOUT_TENSORFLOW = ("cifar10_convert", "support.run.charts")


@pytest.mark.parametrize("module", sorted(TOP_LEVEL))
def test_no_script_imports_another_one_or_tensorflow_within_a_function(module):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported >= {"absl", "support"}
    if module == "cifar10_input":
        assert "cifar10" not in imported
    # An evaluator is a task of a cluster, and all its tasks run the same script.
    allowed = {"cifar10_eval"} if module == "cifar10_train" else set()
    assert imported & (COMMANDS | {"tensorflow"}) == allowed


def test_support_uses_no_flags_of_tensorflow():
    for path in (ROOT / "support").rglob("*.py"):
        assert not re.search(r"\btf\.(app\.)?flags\b", path.read_text()), path


def test_the_breakages_fit_the_code():
    assert breakages.find_stale() == []


# --- What importing does.


def test_modules_that_do_not_need_tensorflow_do_not_load_it():
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & {"tensorflow", "keras"}, name
"""
    rooms = ("support.base.", "support.data.")
    names = {name for name in MODULES if name.startswith(rooms)} | set(WITHOUT_TENSORFLOW)
    process = run_script("-c", code, *sorted(names))
    assert (process.stdout, process.stderr) == ("", "")


def test_importing_every_module_leaves_the_process_as_it_was():
    code = """
import importlib, os, signal, sys, threading

def find_state():
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    handlers = [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())]
    streams = [id(sys.stdin), id(sys.stdout), id(sys.stderr)]
    files = [(file.st_dev, file.st_ino) for file in map(os.fstat, range(3))]
    return wakeup_fd, handlers, streams, files, threading.active_count(), os.getcwd()

before = find_state()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert find_state() == before, (before, find_state())
"""
    process = run_script("-c", code, *sorted(MODULES))
    assert (process.stdout, messages(process.stderr)) == ("", [])
