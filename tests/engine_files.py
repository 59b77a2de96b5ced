"""Thresholds files that engines can serve, and their models' `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import ROOT

from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import (
    DecodeGeometry,
    Geometry,
    LayerOverride,
    MinKvLen,
    ModelSection,
    PrefillGeometry,
    ScaleFactors,
)

HOPPER = Geometry(
    prefill=PrefillGeometry(tile_q=64, tile_kv=128), decode=DecodeGeometry(tile_kv=64)
)
BLACKWELL = Geometry(
    prefill=PrefillGeometry(tile_q=32, tile_kv=128), decode=DecodeGeometry(tile_kv=128)
)
MODELOPT = Geometry(
    prefill=PrefillGeometry(tile_q=128, tile_kv=128), decode=DecodeGeometry(tile_kv=128)
)
TOKENSPEED = Geometry(
    prefill=PrefillGeometry(tile_q=128, tile_kv=64), decode=DecodeGeometry(tile_kv=64)
)
LAYERS = 4
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_size": 1024,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "name": "Ünïcode",
}
CURVES: dict[str, Any] = {
    "prefill": {"a": 7.92, "b": 8.615, "r2": 0.97, "sparsity_range": [0.1, 0.9]},
    "decode": {"a": 0.1196, "b": 9.857, "r2": 0.95, "sparsity_range": [0.1, 0.9]},
}
FORMULA = "a * exp(b * target_sparsity)"
CURVE = {"formula": FORMULA, "prefill": {"a": 1.0, "b": 1.0}}
PAGES = ROOT / "calibrate" / "engines" / "pages"
PUBLISHED = PAGES / "qwen3-30b-a3b-published.json"
TRTLLM = "sparse_attention_config:\n  algorithm: skip_softmax\n"


def config_json(**group: Any) -> str:
    """A `config.json` with nothing but one group."""
    groups = {"g": {"algorithm": "skip_softmax", **group}}
    return json.dumps({"sparse_attention_config": {"config_groups": groups}})


def write_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**CONFIG, **changes}, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return folder


def thresholds(
    prefill: float = 587.18,
    decode: float = 16.52,
    *,
    geometry: Geometry = HOPPER,
    dense: tuple[int, ...] = (),
    kv_heads: int = 2,
    **changes: Any,
) -> Thresholds:
    """One number per phase, validated, for a model of the shape of `CONFIG`."""
    factors = {"prefill": prefill, "decode": decode}
    sparsity = {
        phase: {"achieved": 0.4, "by_length": {"8192": {"achieved": 0.4}}}
        for phase, factor in factors.items()
        if factor
    }
    evidence = {
        "verdict": "passed",
        "budget": {"kl": 0.01},
        "loss": {
            "kl": {"mean": 0.003, "upper": 0.005, "confidence": 0.95},
            "score_drop": {"mean": 0.0, "upper": 1.0, "confidence": 0.95},
            "heldout_prompts": 12,
        },
        "sparsity": sparsity,
    }
    fields: dict[str, Any] = {
        "model": ModelSection(
            name="tiny",
            sha256="0" * 64,
            layers=LAYERS,
            q_heads=8,
            kv_heads=kv_heads,
            head_dim=128,
            dtype="bfloat16",
        ),
        "geometry": geometry,
        "min_kv_len": MinKvLen(prefill=4096, decode=4096),
        "scale_factor": ScaleFactors(**factors),
        "layers": tuple(LayerOverride(layer=i, prefill=0.0, decode=0.0) for i in dense),
        "fit": CURVES,
        "evidence": evidence,
    }
    return Thresholds(**{**fields, **changes})


def per_layer(**changes: Any) -> Thresholds:
    """Every layer with its own number, and the best single numbers measured beside them."""
    base = thresholds(**changes)
    layers = tuple(
        LayerOverride(layer=i, prefill=100.0 * (i + 1), decode=4.0 * (i + 1)) for i in range(LAYERS)
    )
    best = {
        "scale_factor": {"prefill": base.scale_factor.prefill, "decode": base.scale_factor.decode},
        "loss": {"kl": {"mean": 0.004, "upper": 0.006, "confidence": 0.95}},
        "sparsity": base.evidence["sparsity"],
    }
    return base.model_copy(
        update={"layers": layers, "evidence": {**base.evidence, "uniform_baseline": best}}
    )
