"""vLLM-Omni's line, read back."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from engine_files import (
    BLACKWELL,
    thresholds,
)

from calibrate.engines.export import export
from calibrate.engines.read import read_artefact
from calibrate.engines.types import Source
from calibrate.errors import UserError
from skip_softmax.thresholds.file import Thresholds

TRANSFORMER = {"_class_name": "WanTransformer3DModel", "num_layers": 4, "num_attention_heads": 8,
               "attention_head_dim": 128}  # fmt: skip


def video(**changes: Any) -> Thresholds:
    """Numbers of prefill for the transformer of `TRANSFORMER`."""
    floors = {"prefill": 6000, "decode": 4096}
    fields = {"decode": 0.0, "geometry": BLACKWELL, "min_kv_len": floors, "kv_heads": 8}
    return thresholds(**{"prefill": 5000.0, **fields, **changes})


def options(text: str) -> dict[str, Any]:
    words = shlex.split(text.splitlines()[-1])
    assert words[:2] == ["vllm", "serve"] and "--omni" in words
    config = json.loads(words[words.index("--diffusion-attention-config") + 1])["default"]
    assert config["backend"] == "TRTLLM_ATTN"
    return dict(config["skip_softmax"])


def resolve_factor(
    skip: dict[str, float], kv_len: int, curve: dict[str, Any] | None
) -> float | None:
    """0.32.0rc1, trtllm_attn.py: a threshold times the length, or the curve, which no length changes."""
    assert ("threshold" in skip) != ("target_sparsity" in skip)
    if "threshold" in skip:
        return skip["threshold"] * kv_len
    return None if curve is None else curve["a"] * math.exp(curve["b"] * skip["target_sparsity"])


def curve_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """0.32.0rc1, trtllm_calibration.py, `parse_sparse_attention_config`."""
    section = config.get("sparse_attention_config") or {}
    for group in section.get("config_groups", {}).values():
        if group.get("algorithm") == "skip_softmax":
            factors = group["threshold_scale_factor"]
            assert factors["formula"].replace(" ", "") == "a*exp(b*target_sparsity)"
            return dict(factors.get("coefficients") or factors["prefill"])
    return None


def test_golden_threshold_at_one_length() -> None:
    file = thresholds(
        prefill=5000.0, geometry=BLACKWELL, min_kv_len={"prefill": 6000, "decode": 4096}
    )
    made = export(file, "vllm-omni", gpu="sm100", phases=("prefill",), at_length=75_000)
    skip = options(made.text)
    assert set(skip) == {"threshold"}
    assert skip["threshold"] == pytest.approx(0.0667, abs=1e-4)
    assert resolve_factor(skip, 75_000, None) == pytest.approx(5000.0)
    assert "75000 tokens" in made.text and made.patch is None


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_golden_curve_of_an_expert_is_right_at_every_length(expert: str, tmp_path: Path) -> None:
    folder = tmp_path / expert
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TRANSFORMER))
    made = export(video(), "vllm-omni", gpu="sm100", model=folder)
    assert curve_of(json.loads((folder / "config.json").read_text())) is None
    made.apply()
    written = json.loads((folder / "config.json").read_text())
    assert {**written, "sparse_attention_config": None} == {
        **TRANSFORMER, "sparse_attention_config": None
    }  # fmt: skip
    skip, curve = options(made.text), curve_of(written)
    assert set(skip) == {"target_sparsity"} and curve == {"a": 7.92, "b": 8.615}
    for kv_len in (1000, 75_000, 200_000):
        assert resolve_factor(skip, kv_len, curve) == pytest.approx(5000.0, rel=1e-12)
    lost = " ".join(made.sidecar["lost"])
    assert "1/length law" not in lost and "one target_sparsity of the command line" in lost
    # The line alone says what the config must have, and reads back with it.
    assert "# " + " " * 2 + '{"sparse_attention_config"' in made.text
    made.write(tmp_path / "omni.sh")
    source = Source(tmp_path / "omni.sh", coefficients=folder)
    assert read_artefact("vllm-omni", source).scale_factor["prefill"] == pytest.approx(5000.0)
    with pytest.raises(UserError, match="--coefficients"):
        read_artefact("vllm-omni", Source(tmp_path / "omni.sh"))


def test_a_curve_needs_a_fit_or_a_length() -> None:
    file = video(fit={})
    with pytest.raises(UserError, match=r"needs a curve .* --pin"):
        export(file, "vllm-omni")
    skip = options(export(file, "vllm-omni", pin=True).text)
    assert skip == {"target_sparsity": 0.5}
    assert set(options(export(file, "vllm-omni", at_length=75_000).text)) == {"threshold"}


def test_a_pipeline_s_transformers_are_what_is_compared(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no config.json; .* its folder `transformer`"):
        export(video(), "vllm-omni", model=tmp_path)
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**TRANSFORMER, "num_layers": 3, "num_single_layers": 1}))
    export(video(), "vllm-omni", model=tmp_path / "transformer")
    config.write_text(json.dumps({**TRANSFORMER, "num_attention_heads": 16}))
    with pytest.raises(
        UserError, match=r"must agree, .* \(4, 8, 8, 128\) .* says \(4, 16, 16, 128\)"
    ):
        export(video(), "vllm-omni", model=tmp_path / "transformer")
