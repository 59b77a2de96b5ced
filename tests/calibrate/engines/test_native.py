"""Our own kernels get the whole file."""

from __future__ import annotations

from pathlib import Path

from engine_files import (
    per_layer,
)

from calibrate.engines.export import export
from skip_softmax.thresholds.file import Thresholds


def test_native_loses_nothing(tmp_path: Path) -> None:
    made = export(per_layer(), "native")
    made.write(tmp_path / "t.yaml")
    assert Thresholds.load(tmp_path / "t.yaml") == per_layer()
    assert made.sidecar is None and not (tmp_path / "t.yaml.evidence.json").exists()
