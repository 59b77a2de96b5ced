"""Model-Optimizer's `config.json`, read back by its published rules."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatch
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


OWN = {"geometry": MODELOPT, "kv_heads": 8, "dense": (1, 3)}


@pytest.mark.parametrize(
    ("names", "ignored"),
    [
        ("model.layers.{layer}.self_attn", ["model.layers.1.self_attn", "model.layers.3.self_attn"]),
        (
            "transformer.h.{layer}.attn",
            ["model.layers.1.self_attn", "transformer.h.1.attn",
             "model.layers.3.self_attn", "transformer.h.3.attn"],
        ),
        (["", "decoder.1.mixer", "decoder.2.mixer", ""],
         ["model.layers.1.self_attn", "decoder.1.mixer", "model.layers.3.self_attn"]),
    ],
)  # fmt: skip
def test_layers_left_dense_carry_the_model_s_own_names(names: Any, ignored: list[str]) -> None:
    """Model-Optimizer matches `*name*` with vLLM's names, TensorRT-LLM the first name by its number."""
    file = thresholds(**OWN, provenance={"attention_modules": names})
    made = export(file, "modelopt", gpu="any")
    section = json.loads(made.text)["sparse_attention_config"]["config_groups"]["group_0"]
    assert section["ignore"] == ignored
    served = [str(name).replace("{layer}", "3") + ".attn" for name in ignored if ".h." in name]
    assert all(any(fnmatch(name, f"*{p}*") for p in section["ignore"]) for name in served)


def test_without_the_names_only_the_engine_that_counts_layers_is_served() -> None:
    with pytest.raises(
        UserError, match=r"by their modules' names, .* does not name those of layers \[1, 3\]"
    ):
        export(thresholds(**OWN), "modelopt", gpu="any")
    made = export(thresholds(dense=(1, 3)), "modelopt", gpu="sm90")
    assert made.sidecar["holds_for"] == [{"server": "TensorRT-LLM", "gpu": "sm90"}]
    section = json.loads(made.text)["sparse_attention_config"]["config_groups"]["group_0"]
    assert section["ignore"] == ["model.layers.1.self_attn", "model.layers.3.self_attn"]


def test_a_target_is_written_for_each_phase_that_has_a_curve() -> None:
    """TensorRT-LLM's `_compute` would take the whole mapping for a phase without one: a TypeError."""
    made = export(thresholds(), "modelopt", gpu="sm90", phases=("prefill",))
    section = json.loads(made.text)["sparse_attention_config"]["config_groups"]["group_0"]
    assert set(section["target_sparsity"]) == {"prefill"}
    assert set(section["threshold_scale_factor"]) == {"formula", "prefill"}


def test_pinned_numbers_say_that_the_target_has_no_effect(tmp_path: Path) -> None:
    file = thresholds(fit={"prefill": {"refused": "R² too low", "points": 5}})
    with pytest.raises(
        UserError, match=r"needs a curve .* for prefill, but it has no fitted curve .*--pin"
    ):
        export(file, "modelopt")
    made = export(file, "modelopt", pin=True)
    assert read_modelopt(json.loads(made.text)) == {"prefill": 587.18, "decode": 16.52}
    assert sum("target_sparsity has no effect" in loss for loss in made.sidecar["lost"]) == 2
