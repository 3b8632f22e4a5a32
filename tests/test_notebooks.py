"""The notebooks in examples/ run from top to bottom, and were committed with what they print."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from steer import embedded

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SLOW = {"style_vector_from_zero", "context_steering"}


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[pytest.mark.full] * (path.stem in SLOW)) for path in NOTEBOOKS]
)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "researchers":
        pytest.importorskip("transformer_lens")
        pytest.importorskip("nnsight")
    if not embedded.installed("smollm2-135m"):
        pytest.skip("needs the model: steer models pull smollm2-135m")
    # The tests may share the machine.
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert str(Path.home()) not in path.read_text(encoding="utf-8"), "a path of somebody's machine"


def test_links_of_the_notebooks_resolve() -> None:
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                for link in re.findall(r"\]\(([^)#\s]+)", cell.source):
                    assert re.match(r"[a-z]+:", link) or (path.parent / link).exists(), link
