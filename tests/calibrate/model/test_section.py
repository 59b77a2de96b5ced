"""What a thresholds file says about its model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibrate.model.section import attention_modules
from skip_softmax.thresholds.file import Thresholds


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["model.layers.0.self_attn", "model.layers.1.self_attn"],
            "model.layers.{layer}.self_attn",
        ),
        (["transformer.h.0.attn", "transformer.h.1.attn"], "transformer.h.{layer}.attn"),
        (["?", "model.layers.1.mixer"], ["", "model.layers.1.mixer"]),
        (["h.0.attn", "h.2.attn"], ["h.0.attn", "h.2.attn"]),
        (["attn"], ["attn"]),
        (["?", "?"], None),
    ],
)
def test_modules_are_named_by_their_pattern_or_one_by_one(names: list[str], expected: Any) -> None:
    loaded: Any = SimpleNamespace(layers=[SimpleNamespace(name=name) for name in names])
    assert attention_modules(loaded) == expected


def test_a_run_records_its_model_s_modules(smoke_run: Path) -> None:
    file = Thresholds.load(smoke_run / "thresholds.yaml")
    assert file.provenance["attention_modules"] == "model.layers.{layer}.self_attn"
