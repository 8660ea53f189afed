"""examples/cifar10.ipynb runs, and shows what its texts say."""

import re

import nbclient
import nbformat
import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_trains_evaluates_predicts_and_shows_an_edited_distortion(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "examples" / "cifar10.ipynb", 4)
    resources = {"metadata": {"path": str(ROOT / "examples")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    pictures = [sum("image/png" in output.get("data", {}) for output in c.outputs) for c in cells]
    assert "step 350, loss = " in printed[1]
    assert float(printed[2].split("precision @ 1 = ")[1]) > 0.7
    assert re.search(r"triangle\.png: \w+ 0\.\d{3}, ", printed[4])
    assert re.search(r"loss = \d{4}|where the learning rate is 2", printed[5])
    assert "step 0, loss = " in printed[6]
    assert "images do not support" in printed[6]  # hue: each image is distorted by itself
    assert pictures[4:] == [1, 0, 0, 2]
