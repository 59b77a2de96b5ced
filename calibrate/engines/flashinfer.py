"""FlashInfer: keyword arguments of a call, as JSON for the user's own code."""

from __future__ import annotations

from typing import Any

from calibrate.engines import tiles
from calibrate.engines.types import (
    Engine,
    Foreign,
    Ignored,
    Request,
    Server,
    Source,
    Written,
    known_only,
    to_json,
)
from calibrate.errors import UserError
from calibrate.model.config_json import json_mapping
from skip_softmax.thresholds.types import PHASES, Phase

_KEY = "skip_softmax_threshold_scale_factor"


def write(request: Request) -> Written:
    """Per phase the number, and per GPU what takes it."""
    phases: dict[str, Any] = {}
    for phase, factor in request.scale_factor.items():
        takers = {gpu: _TAKERS[gpu][phase] for gpu in request.gpus}
        phases[phase] = {"run_kwargs": {_KEY: factor}, "takers": takers}
    return Written(to_json({"normalisation": "per_request_kv_len", **phases}))


def read(source: Source) -> Foreign:
    """The arguments by scale factor."""
    data = json_mapping(source.text, str(source.path))
    known_only(str(source.path), data, ("normalisation", *PHASES))
    try:
        return Foreign(
            {phase: data[phase]["run_kwargs"][_KEY] for phase in PHASES if phase in data}
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{source.path}: every phase must have run_kwargs with the scale factor, but {error} is missing"
        ) from None


# flashinfer-python 0.7.2.post1, decode.py and prefill.py. A function takes `function_kwargs` and
# `run_kwargs` in one call; a wrapper takes `init_kwargs` when it is made, and its `run` takes
# `run_kwargs`. The backend is always named: `auto` may be XQA (decode) or FlashAttention (prefill),
# which ignore the number.
_BACKEND = {"backend": "trtllm-gen"}
_TAKERS: dict[str, dict[Phase, dict[str, Any]]] = {
    "sm90": {"prefill": {"functions": ["flashinfer.prefill.trtllm_fmha_v2_prefill"]}},
    "sm100": {
        "prefill": {
            "functions": [
                "flashinfer.prefill.trtllm_batch_context_with_kv_cache",
                "flashinfer.prefill.trtllm_ragged_attention_deepseek",
            ],
            "function_kwargs": _BACKEND,
            "wrapper": "flashinfer.BatchPrefillWithPagedKVCacheWrapper",
            "init_kwargs": _BACKEND,
        },
        "decode": {
            "functions": ["flashinfer.decode.trtllm_batch_decode_with_kv_cache"],
            "function_kwargs": _BACKEND,
            "wrapper": "flashinfer.BatchDecodeWithPagedKVCacheWrapper",
            "init_kwargs": _BACKEND,
        },
    },
}
# The same release: jit/attention/fmha_v2/fmha_library.py makes no skipping kernel for sm120, so
# that `trtllm_fmha_v2_prefill` launches none. attention/cute_dsl/sm120_fmha.py has the two FP8
# functions, whose kernel (cute_dsl/attention/fmha/sm120/fmha_prefill_fp8_tma.py) goes from the last
# key to the first: a tile is compared with another running max than in the ascending order of all
# other kernels.
_SM120 = Ignored(
    "trtllm_fmha_v2_prefill has no kernel that skips there and would return what was in memory; the two "
    "functions that skip (sm120_fmha_fp8_ragged_prefill, sm120_fmha_fp8_paged_prefill, by "
    "skip_softmax_threshold) visit the keys from the last to the first, and numbers are measured in "
    "ascending order",
    "cannot be given",
)

ENGINE = Engine(
    "flashinfer",
    "FlashInfer",
    "scalar",
    (
        tiles.by_flashinfer_on_hopper("FlashInfer"),
        tiles.by_flashinfer_on_blackwell("FlashInfer"),
        Server("FlashInfer", "sm120", _SM120, tiles.NO_XQA),
    ),
    write,
    read,
    numbers={phase: f"{phase}.run_kwargs.{_KEY}" for phase in PHASES},
    prefix_cache="the cache is your code's: drop its pages when the number changes, or make the number a "
    "part of their key",
    backends={
        "trtllm-gen": "",
        "auto": "it may be XQA in decode and FlashAttention in prefill, which silently ignore the number",
        "xqa": "it silently ignores the number",
        "fa2": "it silently ignores the number",
        "fa3": "it silently ignores the number",
        "cake": "none of its own routes takes a number that skips (cake_fmha.py)",
        "cute-dsl": "its ragged prefill divides by the longest KV length of the batch instead of each "
        "request's, and its paged prefill refuses the number (attention/cute_dsl/fmha.py, prefill.py)",
        "cute-dsl-prims": "it refuses the number",
        "cudnn": "it refuses the number",
    },
)
