"""tokenspeed: one threshold at one KV length, for prefill on AMD gfx950."""

from __future__ import annotations

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
    from_threshold,
    number,
    one_length,
    option_values,
    stated_length,
)
from calibrate.errors import UserError

_OPTION = "--skip-softmax-threshold"


def write(request: Request) -> Written:
    """An option to serve with."""
    assert request.at_length is not None
    threshold = request.scale_factor["prefill"] / request.at_length
    return Written(
        absolute_header(request.at_length) + f"{_OPTION} {threshold!r}\n",
        (one_length(request.at_length),),
    )


def read(source: Source) -> Foreign:
    """The threshold at the length that the file or the user states."""
    given = [value for key, value in option_values(source, _OPTION) if not key]
    if not given:
        raise UserError(f"{source.path}: {_OPTION} must be given, but it is not there")
    threshold = number(f"{source.path}: {_OPTION}", given[-1])  # as its own command line reads it
    return from_threshold(threshold, stated_length(source), ("prefill",))


# tokenspeed 0.1.1: runtime/utils/server_args.py (the option's help says when it has no effect),
# runtime/layers/attention/backends/paged/mha.py (`mha_prefill` alone gets it: no decode, no cached
# prefix). tokenspeed-kernel 0.1.4: ops/attention/mha/gluon.py (head sizes). tokenspeed-kernel-amd
# 0.1.4: ops/gfx950/attention/mha/prefill.py (tiles in `get_config`; 128 rows of one query head vote
# together).
ENGINE = Engine(
    "tokenspeed",
    "tokenspeed",
    "scalar",
    (
        Server(
            "tokenspeed",
            "gfx950",
            Votes(((128, (64,)),), tile_q=128, head_dims=(64, 128)),
            Ignored("only its prefill kernel has the threshold"),
            fp8={"prefill": Ignored("no batch with such a KV cache reaches the kernel that skips")},
            whole_prompts="its second chunk of a prompt and all later ones run dense",
            notes=(
                "a batch skips only if none of its requests has a cached prefix: one prefix-cache hit, or "
                "the second chunk of one prompt, makes the whole batch dense without a word",
                "the triton backend and FP8 or MXFP8 KV caches never reach the kernel that skips",
            ),
        ),
    ),
    write,
    read,
    numbers={"prefill": _OPTION},
    options=("at_length",),
    absolute=True,
    # runtime/cache/l3/backend.py: the threshold is a part of the L3 cache's key.
    prefix_cache="a new threshold needs a restart, which empties the cache in memory; the L3 cache has the "
    "threshold in its key, so nothing old is found",
    backends={"gluon": "", "mha": "", "triton": "it never reaches the kernel that skips"},
)
