"""What a number means per length, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_files import (
    thresholds,
)

from calibrate.report.lengths import expectations
from skip_softmax.thresholds.file import Thresholds


def test_show_puts_scale_factor_threshold_and_sparsity_together(
    call: Callable[..., Any], smoke_run: Path
) -> None:
    code, out, _ = call("show", smoke_run / "thresholds.yaml", "--run", smoke_run)
    assert code == 0
    found = Thresholds.load(smoke_run / "thresholds.yaml")
    factor = found.scale_factor.decode
    assert f"{factor / 1024:.4g}" in out and f"{factor / 384:.4g}" in out
    assert "from the run's statistics" in out


def test_expected_sparsity_names_its_source() -> None:
    rows = {(row["phase"], row["kv_len"]): row for row in expectations(thresholds())}
    assert rows["prefill", 8192]["source"] == "measured, held-out"
    assert rows["prefill", 8192]["threshold"] == [587.18 / 8192] * 2
    assert rows["prefill", 1024]["dense"] and rows["prefill", 1024]["sparsity"] == 0
    assert rows["prefill", 65536]["source"] == "from the fitted curve"
    assert rows["prefill", 65536]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_statistics_of_another_run_are_refused(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    thresholds().save(tmp_path / "t.yaml")
    code, out, err = call("show", tmp_path / "t.yaml", "--run", smoke_run)
    assert (code, out) == (2, "") and "must be a run of the file's model" in err
