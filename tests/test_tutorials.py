"""Every notebook runs from top to bottom, and what is kept of it comes from such a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
HUB = "hub"  # the tag of cells that need a download, and say so where it is not there
EXACT = {"01", "03", "09", "10"}  # those without a network
TRAINS = [pytest.mark.trains]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
MACHINE = re.compile(r"/(?:home|root|tmp|var|opt|usr|work|private|Users|content)/|[A-Za-z]:\\\\|site-packages")
COMPLAINT = re.compile(r"warning|traceback|deprecat", re.IGNORECASE)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(output: nbformat.NotebookNode) -> str:
    """All that a reader sees of an output as text."""
    if output.output_type == "stream":
        return output.text
    return "\n".join(str(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    """No error, nothing on stderr, no warning and no path of the machine that ran it."""
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert not COMPLAINT.search(printed(output)), printed(output)
        assert not MACHINE.search(printed(output)), printed(output)


def test_there_are_notebooks():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 4


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[] if path.name[:2] in EXACT else TRAINS) for path in NOTEBOOKS]
)
def test_runs_from_top_to_bottom(path, tmp_path):
    notebook = read(path)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises at the first cell that fails, the last of which asserts what the notebook claims
    check_outputs(notebook)


@each
def test_what_is_kept_comes_from_such_a_run(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    check_outputs(notebook)
    kinds = {kind for cell in code_cells(notebook) for output in cell.outputs for kind in output.get("data", {})}
    assert "image/png" in kinds


@each
def test_is_short_and_asserts_its_claim(path):
    notebook = read(path)
    assert len([cell for cell in notebook.cells if HUB not in cell.metadata.get("tags", ())]) <= 21
    assert re.search(r"^\s*assert ", notebook.cells[-1].source, re.MULTILINE)
    assert notebook.cells[-1].cell_type == "code"
    assert "<details>" in notebook.cells[-2].source
    assert "## Exercises" in notebook.cells[-3].source


@each
def test_links_lead_somewhere(path):
    for cell in read(path).cells:
        for target in re.findall(r"\]\(([^)#]+)", cell.source if cell.cell_type == "markdown" else ""):
            assert target.startswith("https://") or (FOLDER / target).exists(), target


def test_the_list_names_every_notebook():
    page = (FOLDER / "README.md").read_text("utf-8")
    for path in NOTEBOOKS:
        assert f"]({path.name})" in page
