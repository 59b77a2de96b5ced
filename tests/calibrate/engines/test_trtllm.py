"""TensorRT-LLM's YAML, read back by its published rules."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from engine_files import (
    CURVE,
    LAYERS,
    PUBLISHED,
    TRTLLM,
    config_json,
    thresholds,
    write_model,
)
from pydantic import BaseModel, ConfigDict, field_validator

from calibrate.engines import read as importing
from calibrate.engines.export import export
from calibrate.engines.types import Source
from calibrate.errors import UserError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SkipSoftmaxAttentionConfig(_Strict):
    """TensorRT-LLM's rules: three keys, targets in [0, 1], a missing phase is 0."""

    algorithm: Literal["skip_softmax"]
    threshold_scale_factor: float | dict[str, float] | None = None
    target_sparsity: float | dict[str, float] | None = None

    @field_validator("target_sparsity")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        targets = value.values() if isinstance(value, dict) else [value]
        assert all(target is None or 0 <= target <= 1 for target in targets)
        return value

    def phase(self, name: str) -> float:
        value = self.threshold_scale_factor or 0.0
        return value.get(name, 0.0) if isinstance(value, dict) else value


class LlmArgs(_Strict):
    sparse_attention_config: SkipSoftmaxAttentionConfig


def read_trtllm(text: str) -> dict[str, float]:
    config = LlmArgs.model_validate(yaml.safe_load(text)).sparse_attention_config
    assert config.target_sparsity is None
    return {p: f for p in ("prefill", "decode") if (f := config.phase(p)) > 0}


def test_golden_trtllm() -> None:
    made = export(thresholds(), "trtllm", gpu="sm90", served_min_len=8192)
    assert read_trtllm(made.text) == {"prefill": 587.18, "decode": 16.52}
    body = "".join(line for line in made.text.splitlines(True) if not line.startswith("#"))
    assert body == (
        "sparse_attention_config:\n  algorithm: skip_softmax\n  threshold_scale_factor:\n"
        "    prefill: 587.18\n    decode: 16.52\n"
    )
    assert "trtllm-serve MODEL --config" in made.text
    assert (
        'SkipSoftmaxAttentionConfig(threshold_scale_factor={"prefill": 587.18, "decode": 16.52})'
        in made.text
    )


def test_ignored_layers_match_exactly_themselves_in_every_reader(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    made = export(thresholds(dense=(1, 2)), "trtllm", model=model, gpu="sm90")
    config = json.loads(made.patch.after)["sparse_attention_config"]["config_groups"]["group_0"]
    names = [f"model.layers.{i}.self_attn" for i in range(LAYERS * 10)]
    for pattern_of in (
        lambda name: name,
        lambda name: f"*{name}*",
    ):  # TensorRT-LLM, Model-Optimizer
        hit = [
            i
            for i, n in enumerate(names)
            if any(fnmatch(n, pattern_of(p)) for p in config["ignore"])
        ]
        assert hit == [1, 2]
    # Without coefficients Model-Optimizer would take a threshold of 0.1.
    assert all(
        {"a", "b"} <= set(config["threshold_scale_factor"][p]) for p in ("prefill", "decode")
    )
    assert read_trtllm(made.text) == {"prefill": 587.18, "decode": 16.52}


def test_a_target_is_read_with_the_curve_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "skip.yaml").write_text(TRTLLM + "  target_sparsity: {prefill: 0.5}\n")
    found = importing.read_artefact(
        "trtllm", Source(tmp_path / "skip.yaml", coefficients=PUBLISHED)
    )
    assert found.scale_factor == pytest.approx({"prefill": 587.18}, rel=0.002)
    with pytest.raises(UserError, match="--coefficients"):
        importing.read_artefact("trtllm", Source(tmp_path / "skip.yaml"))


def test_a_target_without_its_curve_is_refused(tmp_path: Path) -> None:
    factors = {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 2.0, "b": 1.0}}
    (tmp_path / "config.json").write_text(config_json(threshold_scale_factor=factors))
    (tmp_path / "skip.yaml").write_text(TRTLLM + "  target_sparsity: {prefill: 0.1, decode: 0.1}\n")
    with pytest.raises(UserError, match=r"gives a target for decode, so .* must give a curve"):
        importing.read_artefact("trtllm", Source(tmp_path / "skip.yaml", coefficients=tmp_path))
    with pytest.raises(UserError, match=r"^--coefficients: `.*none` is missing"):
        importing.read_artefact(
            "trtllm", Source(tmp_path / "skip.yaml", coefficients=tmp_path / "none")
        )


def test_notes_say_what_was_read(call: Callable[..., Any], tmp_path: Path) -> None:
    curve = {**CURVE, "prefill": {"a": 10.0, "b": 2.0}, "decode": {"a": 1.0, "b": 1.0}}
    (tmp_path / "c.json").write_text(config_json(threshold_scale_factor=curve, target_sparsity=0.9))
    (tmp_path / "skip.yaml").write_text(TRTLLM + "  target_sparsity: {prefill: 0.1}\n")
    found = importing.read_artefact(
        "trtllm", Source(tmp_path / "skip.yaml", coefficients=tmp_path / "c.json")
    )
    assert found.scale_factor == pytest.approx({"prefill": 10 * math.exp(0.2)})
    dropped = "not taken over: threshold_scale_factor.decode"
    assert found.notes == ("prefill: 10 * exp(2 * 0.1)", dropped)
