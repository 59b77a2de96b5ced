"""Model-Optimizer: a curve and a target per phase in the model's `config.json`, read by TensorRT-LLM too."""

from __future__ import annotations

from calibrate.engines.config_json import config_group, read_curve, section_with
from calibrate.engines.tiles import ANY_SIZE, TRTLLM_SERVERS
from calibrate.engines.types import (
    STORED,
    Engine,
    Foreign,
    Ignored,
    Request,
    Server,
    Source,
    Votes,
    Written,
    to_json,
)
from skip_softmax.thresholds.identity import EXPORT_KEY
from skip_softmax.thresholds.types import PHASES


def write(request: Request) -> Written:
    """The section that a `config.json` without one would get."""
    group, lost = config_group(request)
    return Written(to_json({EXPORT_KEY: section_with(group)}), tuple(lost))


def read(source: Source) -> Foreign:
    """The curve at a target."""
    return read_curve(source.path, source.target, source.phases)


# nvidia-modelopt 0.48.0rc1, torch/sparsity/attention_sparsity/plugins: vllm.py (tiles, votes, the
# longest of the batch), vllm_runtime.py (`_global_errors`: speculation, cache types;
# `_layer_errors`: head sizes).
_SPECULATION = "it does not start with speculative decoding"
_SIZES = range(16, ANY_SIZE + 1, 16)
_CACHE = Ignored("its KV cache must be bfloat16 or float16", "refuses")
_OWN_SERVER = Server(
    "Model-Optimizer's vLLM server",
    "any",
    Votes(((ANY_SIZE, (128,)),), tile_q=128, head_dims=_SIZES, speculation=_SPECULATION),
    Votes(((ANY_SIZE, (128,)),), voters="head", head_dims=_SIZES, speculation=_SPECULATION),
    above_one="dense",
    fp8={"prefill": _CACHE, "decode": _CACHE},
    by_name=True,  # sparse_attn_config.py: `*name*` on vLLM's module names
    notes=(
        "Model-Optimizer's vLLM server divides by the longest KV length of the batch: shorter "
        "requests skip less",
    ),
)
ENGINE = Engine(
    "modelopt",
    "Model-Optimizer's config.json",
    "scalar+ignore",
    (_OWN_SERVER, *TRTLLM_SERVERS),
    write,
    read,
    numbers={phase: f"threshold_scale_factor.{phase}" for phase in PHASES},
    options=("target",),
    config_json="all",
    prefix_cache="restart both kinds of server for a new number, which empties the cache in their memory; "
    + STORED,
)
