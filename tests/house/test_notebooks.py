"""Every notebook runs from top to bottom in a fresh kernel of this interpreter, and is stored with its outputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat: pip install 'nullspace-optim[dev]'")
nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient: pip install 'nullspace-optim[dev]'")
pytest.importorskip("ipykernel", reason="notebooks need ipykernel: pip install 'nullspace-optim[dev]'")

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes
FOREIGN = ("/home/", "/tmp/", "/wo" + "rk/", "/Users/", "site-packages")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


class ThisInterpreter(KernelSpecManager):
    """Knows one kernel, the running interpreter; nothing has to be registered on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return the specification of a kernel that runs on `sys.executable`."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name=kernel_name, language="python")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def errors(notebook: Any) -> list[str]:
    return [f"{output.ename}: {output.evalue}" for output in outputs(notebook) if output.output_type == "error"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@each_notebook
def test_runs_without_error(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "06_scale_out" and not hasattr(torch.cpu.current_stream(), "record_event"):
        pytest.skip("this torch cannot run FSDP2 on a CPU")
    for variable in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter())
    client = nbclient.NotebookClient(
        notebook, km=manager, timeout=180, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    inline = "module://matplotlib_inline.backend_inline"
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "MPLBACKEND": inline})
    assert errors(notebook) == []
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


@each_notebook
def test_is_stored_with_clean_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert outputs(notebook) and errors(notebook) == []
    assert all(cell.execution_count == number for number, cell in enumerate(code_cells(notebook), 1))
    assert [output for output in outputs(notebook) if output.get("name") == "stderr"] == []
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in notebook.cells)
    assert [place for place in FOREIGN if place in path.read_text(encoding="utf-8")] == []
    assert path.stat().st_size < LARGEST
