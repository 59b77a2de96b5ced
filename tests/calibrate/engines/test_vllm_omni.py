"""vLLM-Omni's line, read back."""

from __future__ import annotations

import json
import shlex

import pytest
from engine_files import (
    BLACKWELL,
    thresholds,
)

from calibrate.engines.export import export


def test_golden_vllm_omni() -> None:
    made = export(
        thresholds(
            prefill=5000.0, geometry=BLACKWELL, min_kv_len={"prefill": 6000, "decode": 4096}
        ),
        "vllm-omni",
        gpu="sm100",
        phases=("prefill",),
        at_length=75_000,
    )
    words = shlex.split(made.text.splitlines()[-1])
    config = json.loads(words[words.index("--diffusion-attention-config") + 1])["default"]
    assert config["backend"] == "TRTLLM_ATTN"
    assert set(config["skip_softmax"]) == {"threshold"}
    assert config["skip_softmax"]["threshold"] == pytest.approx(0.0667, abs=1e-4)
    assert "75000 tokens" in made.text
