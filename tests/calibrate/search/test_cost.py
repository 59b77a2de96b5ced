"""Predicted time asks `choose` which kernel `auto` takes, without a GPU and without Triton."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fresh_process import loaded_by

from calibrate.schema import CostConfig, GeometryConfig
from calibrate.search.cost import load_curves
from skip_softmax.thresholds.types import PrefillGeometry

TILES = GeometryConfig()
WIDE = GeometryConfig(prefill=PrefillGeometry(tile_q=64, tile_kv=256))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Measurements of one device: phase, backend, head size, and the time where nothing is skipped."""
    rows = [
        {"device": "Abacus", "phase": phase, "backend": backend, "head_dim": size, "kv_len": 4096,
         "sparsity": share, "ms": ms - share, "dense_ms": 2.0}
        for phase, backend, size, ms in (
            ("prefill", "triton", 64, 2.0), ("prefill", "triton", 128, 2.2), ("prefill", "hopper", 128, 1.8),
            ("prefill", "hopper", 96, 1.0), ("prefill", "cudnn", 64, 1.0), ("decode", "triton", 128, 2.0),
        )
        for share in (0.0, 0.5)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize(
    ("head_dim", "geometry", "backend", "at_zero"),
    [
        (128, TILES, "hopper", 0.9),
        (128, WIDE, "triton", 1.1),
        (64, TILES, "triton", 1.0),  # no such row of the other kernel
        (96, TILES, "triton", 1.0),  # `auto` does not take the other kernel there
    ],
)
def test_prefill_costs_what_the_kernel_takes_that_auto_would_run(
    rows: Path, head_dim: int, geometry: GeometryConfig, backend: str, at_zero: float
) -> None:
    config = CostConfig(curves=str(rows), device="Abacus")
    found = load_curves(config, 4096, head_dim, geometry)
    assert found.source["backend"] == {"prefill": backend, "decode": "triton"}
    assert found.curves["prefill"].at(0.0) == pytest.approx(at_zero)
    assert found.curves["decode"].at(0.0) == pytest.approx(1.0)


def test_another_architecture_takes_another_kernel(rows: Path) -> None:
    lines = [json.loads(line) | {"capability": 10} for line in rows.read_text().splitlines()]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    found = load_curves(CostConfig(curves=str(rows), device="Abacus"), 4096, 128, TILES)
    assert found.source["backend"]["prefill"] == "triton"


def test_no_triton_is_needed_to_ask() -> None:
    program = (
        "from calibrate.search.cost import load_curves; from calibrate.schema import CostConfig; "
        "assert load_curves(CostConfig(), 16384, 128).source['backend']['prefill'] == 'hopper'"
    )
    assert "triton" not in loaded_by(program)
