"""The notebooks: no output is committed, only the public API is called, all of them run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment

jupyter_client = pytest.importorskip("jupyter_client")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [
    "01_where_attention_can_be_skipped",
    "02_what_skipping_costs",
    "03_choosing_a_point",
    "04_speed",
    "05_your_own_model",
]


def cells(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def test_all_are_here() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_output(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_opens_with_its_question(path: Path) -> None:
    first = cells(path, "markdown")[0]
    assert re.match(r"# .+\?\n\n\*\*The question:\*\* ", first)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_calls_only_the_public_api(path: Path) -> None:
    for source in cells(path, "code"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute):
                assert not re.match(r"_[^_]", node.attr)
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
                assert not any(alias.name.startswith("_") for alias in node.names)
            # What stands in a module of ours may move; what the package offers does not.
            assert not any(name.startswith(("calibrate.", "skip_softmax.")) for name in modules)


@pytest.fixture(scope="module")
def kernel(smoke_run: Path) -> Iterator[Any]:
    """One Jupyter kernel for all notebooks, so that torch is loaded once; each begins with no names."""
    manager = jupyter_client.KernelManager()
    manager.start_kernel(env=environment(CALIBRATE_RUN=str(smoke_run)), cwd=str(ROOT / "notebooks"))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_the_smoke_run(path: Path, kernel: Any) -> None:
    notebook = nbformat.read(path, 4)
    forget = nbformat.v4.new_code_cell("%reset -f")
    client = nbclient.NotebookClient(
        nbformat.v4.new_notebook(cells=[forget, *notebook.cells]), km=kernel, timeout=120
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert outputs
    assert all(out.output_type != "error" for out in outputs)
