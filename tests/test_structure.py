"""Tests of the layout of the project: which module may import what, and what importing does.

The rules are read from the sources. Each check is also tested on small sources that break it.
"""

import ast
import graphlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT, messages, run_script, script_environment

# From the top: each module may import those below it.
COMMANDS = {
    "cifar10_train",
    "cifar10_multi_gpu_train",
    "cifar10_eval",
    "cifar10_predict",
    "cifar10_convert",
}
TOP_LEVEL = {*COMMANDS, "cifar10", "cifar10_input"}
WITHOUT_TENSORFLOW = (
    "cifar10_convert",
    "support.run.charts",
    *(
        f"support.{room}.{path.stem}"
        for room in ("base", "data")
        for path in sorted((ROOT / "support" / room).glob("[a-z]*.py"))
    ),
)
# Tested through the training session, and through cifar10_convert.py.
NEEDS_NO_TESTS = {"__init__", "hooks", "conversion"}


def find_sources(root):
    """Returns the sources of the project by module: those at the top level and in support/."""
    paths = [*root.glob("*.py"), *(root / "support").rglob("*.py")]
    sources = {}
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[module] = path.read_text()
    return sources


SOURCES = find_sources(ROOT)
SUPPORT = {name: text for name, text in SOURCES.items() if name.partition(".")[0] == "support"}


# --- The checks.


def find_imports(source, package=""):
    """Returns the dotted names that a source imports, anywhere in it.

    `from a import b` gives `a` and `a.b`, because b may be a module. Imports within functions and
    calls of `importlib.import_module` and `__import__` count as well.

    Args:
      source: string; Python code.
      package: string; the package that the code belongs to, for relative imports.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, package) if node.level else node.module
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            function = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if function in ("import_module", "__import__"):
                names |= {value.value for value in node.args if isinstance(value, ast.Constant)}
    return names


def find_project_imports(module, sources):
    """Returns the modules in `sources` that one of them imports."""
    is_package = any(name.startswith(f"{module}.") for name in sources)
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for name in find_imports(sources[module], package):
        while name and name not in sources:
            name = name.rpartition(".")[0]
        found.add(name)
    # `from support.base import errors` gives `support` as well, which imports none of the modules.
    return {name for name in found if name and not any(o.startswith(f"{name}.") for o in found)}


def imports_tensorflow(source):
    return any(name.partition(".")[0] == "tensorflow" for name in find_imports(source))


def find_flag_access(source):
    """Returns the lines on which a source refers to flags of absl or TensorFlow."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = find_imports(ast.unparse(node), "support")
            is_access = any(
                name.startswith(("absl.flags", "absl.app"))
                or name.rpartition(".")[2] in ("flags", "FLAGS")
                for name in names
            )
        elif isinstance(node, ast.Attribute):
            is_access = node.attr in ("flags", "FLAGS") or node.attr.startswith("DEFINE_")
        else:
            is_access = isinstance(node, ast.Name) and node.id == "FLAGS"
        if is_access:
            lines.append(node.lineno)
    return sorted(set(lines))


def find_flag_definitions(source):
    """Returns the lines on which a source defines flags."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        if any(name.startswith("DEFINE_") for name in names):
            lines.add(node.lineno)
    return sorted(lines)


def find_cycle(imports):
    """Returns modules that import each other in a cycle, or an empty list.

    Args:
      imports: dict from modules to the modules that they import.
    """
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def find_upward_imports(sources):
    """Returns (module, imported module) for each import that points upward in the project."""
    levels = dict.fromkeys(COMMANDS, 3) | {"cifar10": 2, "cifar10_input": 1}
    return [
        (module, imported)
        for module in sources
        for imported in find_project_imports(module, sources)
        if levels.get(module, 0) < levels.get(imported, 0)
    ]


def find_missing_tests(folder, tests):
    """Compares a folder of modules with the folder of their tests.

    Returns:
      (set, set) of relative paths: modules without `test_MODULE.py`, and tests without a module.
    """
    modules = {path.relative_to(folder) for path in folder.rglob("*.py")}
    tested = {
        path.relative_to(tests).with_name(path.name.removeprefix("test_"))
        for path in tests.rglob("test_*.py")
    }
    untested = {path for path in modules - tested if path.stem not in NEEDS_NO_TESTS}
    return untested, tested - modules


# --- The checks themselves, on small sources.


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b as c, d", {"a.b", "d"}),
        ("from a import b, c", {"a", "a.b", "a.c"}),
        ("def f():\n    import a", {"a"}),
        (
            "if x:\n    try:\n        from a.b import c\n    except E:\n        pass",
            {"a.b", "a.b.c"},
        ),
        ("importlib.import_module('a.b')", {"a.b"}),
        ("__import__('a')", {"a"}),
        ("from . import b", {"support.cluster", "support.cluster.b"}),
        ("from ..errors import E", {"support.errors", "support.errors.E"}),
        ("x = 'import a'  # import b", set()),
    ],
)
def test_every_form_of_import_is_found(source, expected):
    assert find_imports(source, "support.cluster") == expected


def test_imports_of_the_project_are_distinguished_from_those_of_libraries():
    sources = {
        "top": "",
        "support": "",
        "support.a": "from support import b\nfrom support.c.d import x\nimport os, supportive",
        "support.b": "def f():\n    import top\nimport support.a",
        "support.c": "",
        "support.c.d": "from . import e",
        "support.c.e": "from .. import b",
    }
    found = {module: find_project_imports(module, sources) for module in sources}
    assert found["support.a"] == {"support.b", "support.c.d"}
    assert found["support.b"] == {"top", "support.a"}
    assert found["support.c.d"] == {"support.c.e"}
    assert found["support.c.e"] == {"support.b"}
    assert found["top"] == set()


@pytest.mark.parametrize(
    "source",
    [
        "import tensorflow as tf",
        "import tensorflow.compat.v1 as tf",
        "from tensorflow.python.ops import nn",
        "def f():\n    from tensorflow import keras",
        "importlib.import_module('tensorflow')",
    ],
)
def test_every_import_of_tensorflow_is_found(source):
    assert imports_tensorflow(source)
    assert not imports_tensorflow("from support.ops.tensorflow_v1 import tf\nimport tensorboard")


@pytest.mark.parametrize(
    "access",
    [
        "from absl import flags",
        "from absl import app, flags",
        "import absl.flags",
        "from absl.flags import DEFINE_string",
        "from absl import app",
        "from support.base.command_line import FLAGS",
        "value = FLAGS.batch_size",
        "value = command_line.FLAGS.batch_size",
        "value = tf.flags.FLAGS.batch_size",
        "value = tf.app.flags.FLAGS",
        "def f():\n    return absl.flags",
    ],
)
def test_every_access_to_flags_is_found(access):
    line = len(access.splitlines()) + 1
    assert find_flag_access(f"import os\n{access}") == [line]
    assert find_flag_access("def f(flags):\n    return {'flags': flags}  # FLAGS") == []


@pytest.mark.parametrize(
    "definition",
    [
        "flags.DEFINE_integer('a', 1, '')",
        "tf.app.flags.DEFINE_string('a', '', '')",
        "from absl.flags import DEFINE_string",
    ],
)
def test_every_definition_of_a_flag_is_found(definition):
    assert find_flag_definitions(f"import os\n{definition}") == [2]
    assert find_flag_definitions("flags.FLAGS.a = 'DEFINE_integer'") == []


def test_import_cycles_are_found():
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert set(find_cycle({"a": {"a"}})) == {"a"}
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("support.x", "cifar10_input"),
        ("support.x", "cifar10_convert"),
        ("cifar10_input", "cifar10"),
        ("cifar10_input", "cifar10_train"),
        ("cifar10", "cifar10_eval"),
    ],
)
def test_imports_that_point_upward_are_found(module, imported):
    sources = dict.fromkeys(("support", "support.x", *TOP_LEVEL), "")
    assert find_upward_imports(sources) == []
    sources[module] = f"def f():\n    import {imported}"
    assert find_upward_imports(sources) == [(module, imported)]
    assert find_upward_imports({**sources, module: "", imported: f"import {module}"}) == []


def test_modules_without_tests_and_tests_without_modules_are_found(tmp_path):
    folder, tests = tmp_path / "support", tmp_path / "tests"
    for path in (
        folder / "__init__.py",
        folder / "a.py",
        folder / "cluster" / "__init__.py",
        folder / "cluster" / "b.py",
        folder / "cluster" / "c.py",
        tests / "test___init__.py",
        tests / "test_a.py",
        tests / "test_c.py",
        tests / "cluster" / "test_b.py",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    untested, orphans = find_missing_tests(folder, tests)
    assert untested == {pathlib.Path("cluster/c.py")}
    assert orphans == {pathlib.Path("c.py")}


# --- The rules.


def test_the_top_level_has_the_five_files_of_the_tutorial_and_two_more_commands():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP_LEVEL


def test_imports_point_downward():
    assert find_upward_imports(SOURCES) == []


def test_no_modules_import_each_other_in_a_cycle():
    imports = {module: find_project_imports(module, SOURCES) for module in SOURCES}
    assert find_cycle(imports) == []
    assert "support.base.errors" in imports["support.cluster.server"]  # the check sees the imports


def test_only_one_module_imports_tensorflow():
    assert {name for name, source in SOURCES.items() if imports_tensorflow(source)} == {
        "support.ops.tensorflow_v1"
    }


def test_in_support_only_the_command_line_touches_flags():
    touching = {name for name, source in SUPPORT.items() if find_flag_access(source)}
    assert touching == {"support.base.command_line"}


def test_flags_are_defined_in_top_level_files_only():
    defining = {name for name, source in SOURCES.items() if find_flag_definitions(source)}
    assert defining == TOP_LEVEL


def test_every_module_of_support_has_a_test_module_of_the_same_name():
    for room in ("base", "data", "ops", "run", "cluster"):
        untested, orphans = find_missing_tests(ROOT / "support" / room, ROOT / "tests" / room)
        assert untested == set()
        assert orphans == set()


def test_every_command_and_tutorial_file_has_a_test_module_of_the_same_name():
    assert {f"test_{name}" for name in TOP_LEVEL} <= {
        path.stem for path in (ROOT / "tests").glob("test_*.py")
    }


# --- What importing does.


@pytest.mark.parametrize("module", WITHOUT_TENSORFLOW)
def test_modules_that_do_not_need_tensorflow_do_not_load_it(module):
    code = f"""
import sys
import {module}
loaded = [name for name in sys.modules if name.partition(".")[0] in ("tensorflow", "keras")]
assert loaded == [], loaded
"""
    process = run_script("-c", code)
    assert (process.stdout, process.stderr) == ("", "")


def test_importing_every_module_leaves_the_process_as_it_was():
    code = """
import gc, importlib, json, os, signal, sys, threading

def find_state():
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    return {
        "standard streams": [(file.st_dev, file.st_ino) for file in map(os.fstat, range(3))],
        "sys streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr)],
        "signal handlers": [
            str(signal.getsignal(number)) for number in sorted(signal.valid_signals())
        ],
        "wakeup file descriptor": wakeup_fd,
        "garbage collection": [gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()],
        "threads": threading.active_count(),
        "arguments": sys.argv,
        "folder": os.getcwd(),
    }

before = find_state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
after = find_state()
assert after == before, (before, after)
"""
    process = run_script("-c", code, json.dumps(sorted(SOURCES)))
    assert (process.stdout, messages(process.stderr)) == ("", [])


def test_what_is_written_to_stderr_is_not_lost_if_the_process_dies_during_the_import(tmp_path):
    # Stands for a TensorFlow that needs instructions which the processor does not have.
    package = tmp_path / "tensorflow" / "compat"
    package.mkdir(parents=True)
    (tmp_path / "tensorflow" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "v1.py").write_text(
        "import os\nos.write(2, b'this processor has no AVX\\n')\nos.abort()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", "import cifar10_train"],
        cwd=ROOT,
        env={**script_environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == -6
    assert process.stderr == "this processor has no AVX\n"


def test_notices_of_tensorflow_are_not_lost_if_the_process_dies_after_the_import():
    process = subprocess.run(
        [sys.executable, "-c", "import cifar10_train, os; os.abort()"],
        cwd=ROOT,
        env={**script_environment(), "TF_CPP_MIN_LOG_LEVEL": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == -6
    assert "All log messages before absl::InitializeLog() is called" in process.stderr


def test_importing_needs_no_temporary_folder():
    code = """
import os, tempfile
os.environ["TMPDIR"] = tempfile.tempdir = "/nonexistent"  # as if no folder could be written
import cifar10_train, cifar10_eval, cifar10_predict, cifar10_convert
"""
    run_script("-c", code)
