"""Model-Optimizer's `config.json`, read back by its published rules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from engine_files import (
    FORMULA,
    MODELOPT,
    PUBLISHED,
    thresholds,
    write_model,
)

from calibrate.engines.config_json import read_curve
from calibrate.engines.export import export
from calibrate.errors import UserError

# NVIDIA's table for Qwen3-30B-A3B-Instruct-2507: target, prefill, decode.
TABLE = [
    (0.1, 18.76, 0.32), (0.2, 44.37, 0.86), (0.3, 104.97, 2.30), (0.4, 248.40, 6.17), (0.5, 587.18, 16.52),
    (0.6, 1390.63, 44.26), (0.7, 3293.04, 118.62), (0.8, 7799.91, 317.99), (0.9, 18471.56, 852.20),
]  # fmt: skip


@pytest.mark.parametrize(("target", "prefill", "decode"), TABLE)
def test_the_published_table_is_its_curve(target: float, prefill: float, decode: float) -> None:
    found = read_curve(PUBLISHED, target).scale_factor
    assert found["prefill"] == pytest.approx(prefill, rel=0.003)
    assert found["decode"] == pytest.approx(decode, rel=0.01)


def read_modelopt(config: dict[str, Any]) -> dict[str, float]:
    """Model-Optimizer's vLLM server reads a and b, TensorRT-LLM evaluates the formula."""
    groups = [
        g
        for g in config["sparse_attention_config"]["config_groups"].values()
        if g["algorithm"] == "skip_softmax"
    ]
    assert len(groups) == 1
    factors = groups[0]["threshold_scale_factor"]
    assert factors["formula"] == FORMULA
    found = {}
    for phase in ("prefill", "decode"):
        if phase in factors:
            a, b = factors[phase]["a"], factors[phase]["b"]
            assert a > 0
            target = groups[0]["target_sparsity"][phase]
            assert 0 <= target <= 1
            by_formula = eval(
                factors["formula"], {"exp": math.exp}, {"a": a, "b": b, "target_sparsity": target}
            )
            assert by_formula == a * math.exp(b * target)
            found[phase] = by_formula
    return found


def test_golden_modelopt_merges_without_touching_anything_else(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    before = (model / "config.json").read_text(encoding="utf-8")
    file = thresholds(geometry=MODELOPT, kv_heads=8)
    write_model(model, num_key_value_heads=8)
    before = (model / "config.json").read_text(encoding="utf-8")
    made = export(file, "modelopt", model=model, served_min_len=8192)
    diff = made.patch.diff()
    # A diff of pure additions but for the comma after the last key.
    assert [
        line for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")
    ] == ['-  "name": "Ünïcode"']
    assert (model / "config.json").read_text(encoding="utf-8") == before
    backup = made.apply()
    assert backup.name == "config.json.bak" and backup.read_text(encoding="utf-8") == before
    after = json.loads((model / "config.json").read_text(encoding="utf-8"))
    found = read_modelopt(after)
    assert found == {
        "prefill": pytest.approx(587.18, rel=1e-12),
        "decode": pytest.approx(16.52, rel=1e-12),
    }
    assert after.pop("sparse_attention_config")["config_groups"]["group_0"]["targets"] == [
        "Qwen3Attention"
    ]
    assert after == json.loads(before)
    assert json.loads((model / "config.json.evidence.json").read_text())["engine"] == "modelopt"
    # Again: nothing to do, no second backup; other numbers: another backup.
    assert export(file, "modelopt", model=model).apply() == model / "config.json"
    assert not (model / "config.json.bak1").exists()
    changed = thresholds(prefill=100.0, geometry=MODELOPT, kv_heads=8)
    assert export(changed, "modelopt", model=model).apply().name == "config.json.bak1"
    assert read_modelopt(json.loads((model / "config.json").read_text()))[
        "prefill"
    ] == pytest.approx(100)


def test_modelopt_keeps_other_groups_and_producer(tmp_path: Path) -> None:
    other = {"algorithm": "sparse_softmax", "targets": ["A"], "sparsity_n": 2}
    section = {
        "config_groups": {"group_0": other},
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }
    model = write_model(tmp_path / "model", sparse_attention_config=section)
    export(thresholds(), "modelopt", model=model).apply()
    after = json.loads((model / "config.json").read_text())["sparse_attention_config"]
    assert after["config_groups"]["group_0"] == other and after["producer"] == section["producer"]
    assert after["config_groups"]["group_1"]["algorithm"] == "skip_softmax"


def test_pinned_numbers_say_that_the_target_has_no_effect(tmp_path: Path) -> None:
    file = thresholds(fit={"prefill": {"refused": "R² too low", "points": 5}})
    with pytest.raises(
        UserError, match=r"needs a curve .* for prefill, but it has no fitted curve .*--pin"
    ):
        export(file, "modelopt")
    made = export(file, "modelopt", pin=True)
    assert read_modelopt(json.loads(made.text)) == {"prefill": 587.18, "decode": 16.52}
    assert sum("target_sparsity has no effect" in loss for loss in made.sidecar["lost"]) == 2
