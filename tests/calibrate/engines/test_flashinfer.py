"""FlashInfer's keyword arguments, read back."""

from __future__ import annotations

import json

from engine_files import (
    BLACKWELL,
    thresholds,
)

from calibrate.engines.export import export


def read_flashinfer(text: str) -> dict[str, float]:
    data = json.loads(text)
    assert data.pop("normalisation") == "per_request_kv_len"
    for phase in data.values():
        # At any length, both arguments mean the same threshold.
        assert phase["absolute"]["argument"] == "skip_softmax_threshold"
        assert (
            phase["absolute"]["scale_factor"]
            == phase["run_kwargs"]["skip_softmax_threshold_scale_factor"]
        )
    if "decode" in data:
        assert data["decode"]["run_kwargs"]["backend"] == "trtllm-gen"
    return {p: row["run_kwargs"]["skip_softmax_threshold_scale_factor"] for p, row in data.items()}


def test_golden_flashinfer() -> None:
    made = export(thresholds(geometry=BLACKWELL), "flashinfer", gpu="sm103", served_min_len=8192)
    assert read_flashinfer(made.text) == {"prefill": 587.18, "decode": 16.52}
