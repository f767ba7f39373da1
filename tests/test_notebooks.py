"""If this breaks: a notebook does not run from top to bottom."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(file, tmp_path, monkeypatch):
    """Every cell, in a kernel of its own, in an empty folder; and it is kept without outputs."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(file, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code")
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    output_text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "perplexity on unseen conversations" in output_text
    assert (tmp_path / "runs" / "notebook" / "export" / "config.json").is_file()
