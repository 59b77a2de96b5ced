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
    for row in data.values():
        assert set(row) == {"run_kwargs", "takers"}
        # `run` of a wrapper has no argument `backend`; no function of these has `skip_softmax_threshold`.
        assert set(row["run_kwargs"]) == {"skip_softmax_threshold_scale_factor"}
    return {p: row["run_kwargs"]["skip_softmax_threshold_scale_factor"] for p, row in data.items()}


def test_golden_flashinfer() -> None:
    made = export(thresholds(geometry=BLACKWELL), "flashinfer", gpu="sm103", served_min_len=8192)
    assert read_flashinfer(made.text) == {"prefill": 587.18, "decode": 16.52}
    for phase, wrapper in (("prefill", "Prefill"), ("decode", "Decode")):
        taker = json.loads(made.text)[phase]["takers"]["sm100"]
        assert taker["wrapper"] == f"flashinfer.Batch{wrapper}WithPagedKVCacheWrapper"
        assert taker["init_kwargs"] == taker["function_kwargs"] == {"backend": "trtllm-gen"}


def test_hopper_prefill_is_one_function_without_a_backend() -> None:
    made = export(thresholds(), "flashinfer", gpu="sm90", phases=("prefill",))
    assert read_flashinfer(made.text) == {"prefill": 587.18}
    assert json.loads(made.text)["prefill"]["takers"] == {
        "sm90": {"functions": ["flashinfer.prefill.trtllm_fmha_v2_prefill"]}
    }
