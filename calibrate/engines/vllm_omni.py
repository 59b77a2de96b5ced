"""vLLM-Omni: one threshold at one KV length, for the prefill-only attention of diffusion models."""

from __future__ import annotations

import json

from calibrate.engines.tiles import ANY_SIZE, BLACKWELL_TWO
from calibrate.engines.types import (
    Engine,
    Foreign,
    Ignored,
    Request,
    Server,
    Source,
    Votes,
    Written,
    absolute_header,
    entry,
    from_threshold,
    one_length,
    option_json,
    stated_length,
)
from calibrate.errors import UserError

_OPTION = "--diffusion-attention-config"


def write(request: Request) -> Written:
    """A line to serve with."""
    assert request.at_length is not None
    threshold = request.scale_factor["prefill"] / request.at_length
    config = {"default": {"backend": "TRTLLM_ATTN", "skip_softmax": {"threshold": threshold}}}
    line = f"vllm serve MODEL --omni {_OPTION} '{json.dumps(config)}'\n"
    return Written(absolute_header(request.at_length) + line, (one_length(request.at_length),))


def read(source: Source) -> Foreign:
    """The threshold at the length that the file or the user states."""
    skip = entry(option_json(source, _OPTION).get("default"), "skip_softmax")
    threshold = entry(skip, "threshold")
    if threshold is None:
        raise UserError(
            f"{source.path}: default.skip_softmax.threshold must be given, but got {skip!r}"
        )
    return from_threshold(threshold, stated_length(source), ("prefill",))


ENGINE = Engine(
    "vllm-omni",
    "vLLM-Omni",
    "scalar",
    (
        Server(
            "vLLM-Omni",
            "sm100",
            Votes(((ANY_SIZE, (128,)),), tile_q=32, head_dims=(128,)),
            Ignored("diffusion models do not decode token by token"),
            notes=(BLACKWELL_TWO,),
        ),
    ),
    write,
    read,
    numbers={"prefill": "default.skip_softmax.threshold"},
    options=("at_length",),
    absolute=True,
    kv_cache=False,
)
