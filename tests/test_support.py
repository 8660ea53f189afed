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


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            'sys.modules["fcntl"] = None',
            "the scripts do not run on native Windows; use the Windows Subsystem for Linux (WSL), "
            "Linux or macOS",
        ),
        (
            "sys.version_info = (3, 10, 13)",
            "the scripts need Python 3.11 or newer; this is Python 3.10",
        ),
    ],
    ids=["windows", "old_python"],
)
def test_an_unsupported_system_is_refused_in_one_line(script, change, error):
    process = run_script("-c", RUN_WITHOUT.format(change=change), script, check=False, timeout=60)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"error: {error}\n"
