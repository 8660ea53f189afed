"""Systems on which no script runs."""

import pytest
from conftest import ROOT, run_script

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))

# Without TensorFlow, the test is fast, and fails if a script imports it before the check.
RUN_WITHOUT = """
import runpy, sys
import absl.app, absl.flags, absl.logging, numpy
{change}
sys.modules["tensorflow"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_changed(script, change):
    process = run_script("-c", RUN_WITHOUT.format(change=change), script, check=False, timeout=60)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_native_windows_is_refused_in_one_line(script):
    assert run_changed(script, 'sys.modules["fcntl"] = None') == (
        1,
        "",
        "error: the scripts do not run on native Windows; use the Windows Subsystem for Linux "
        "(WSL), Linux or macOS\n",
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_that_is_too_old_is_refused_in_one_line(script):
    assert run_changed(script, "sys.version_info = (3, 10, 13)") == (
        1,
        "",
        "error: the scripts need Python 3.11 or newer; this is Python 3.10\n",
    )
