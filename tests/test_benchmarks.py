"""The benchmark runs and prints its table; how fast things are is not tested."""

import re

import pytest
from conftest import run_script


@pytest.mark.slow
def test_the_comparison_prints_a_figure_for_each_row():
    process = run_script(
        "benchmarks/compare.py", "--turns=1", "--process_turns=0", "--steps=1", "--queued=200"
    )
    first, _, _, _, *lines = process.stdout.splitlines()
    assert "TensorFlow 2.21" in first
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 6
    for row in rows:
        assert re.fullmatch(r"\| .* \| \d+\.\d\d \| \d+\.\d\d to \d+\.\d\d \| .* \| .* \|", row)
    assert lines[-1].startswith("Images per second: stock ")
    assert process.stderr == ""
