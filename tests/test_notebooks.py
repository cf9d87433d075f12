"""The notebooks run from the first cell to the last, quickly, and are kept without outputs."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

import tmpq_exp

NOTEBOOKS = sorted((Path(tmpq_exp.__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_the_three_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["01_first_run", "02_reading_a_search", "03_winograd_ranges"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert notebook.cells[0].cell_type == "markdown"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.slow
def test_all_notebooks_run_in_three_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
    nbclient = pytest.importorskip("nbclient", reason="needs the dev extra")
    monkeypatch.setenv("PYTHONPATH", str(Path(tmpq_exp.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for path in NOTEBOOKS:  # in one folder: the first makes the run that the others read
        notebook = nbformat.read(path, as_version=4)
        client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
        outputs = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
        assert any("image/png" in output for output in outputs), f"{path.name} draws nothing"
    assert (tmp_path / "outputs" / "notebooks" / "small" / "report.json").exists()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time: what else runs on this machine does not count
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 180
