"""vLLM's line, read back by a parser of its options."""

from __future__ import annotations

import argparse
import json
import shlex

import pytest
from engine_files import (
    BLACKWELL,
    thresholds,
)

from calibrate.engines.export import export
from calibrate.errors import UserError


def read_vllm(text: str) -> dict[str, float]:
    line = next(line for line in text.splitlines() if not line.startswith("#"))
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    parser.add_argument("model")
    parser.add_argument("--attention-config", type=json.loads)
    words = shlex.split(line)
    assert words[0] == "vllm"
    config = parser.parse_args(words[1:]).attention_config
    keys = {p: f"trtllm_skip_softmax_{p}_threshold_scale_factor" for p in ("prefill", "decode")}
    assert set(config) <= set(keys.values())
    return {p: config[key] for p, key in keys.items() if key in config}


def test_no_release_of_vllm_reads_it() -> None:
    """0.33.0: `AttentionConfig` is strict, and no file of the wheel contains `skip_softmax`."""
    with pytest.raises(UserError, match=r"vLLM 0.33.0 .*42989 and 39297.*modelopt.*--experimental"):
        export(thresholds(geometry=BLACKWELL), "vllm", gpu="sm100", served_min_len=8192)


def test_golden_vllm() -> None:
    file = thresholds(geometry=BLACKWELL)
    made = export(file, "vllm", gpu="sm100", served_min_len=8192, experimental=True)
    assert read_vllm(made.text) == {"prefill": 587.18, "decode": 16.52}
    assert "EXPERIMENTAL" in made.text and "42989" in made.text and "--engine modelopt" in made.text
