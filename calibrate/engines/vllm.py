"""vLLM: a command-line option of an open pull request (42989), not in any release."""

from __future__ import annotations

import json

from calibrate.engines import tiles
from calibrate.engines.types import (
    STORED,
    Engine,
    Foreign,
    Ignored,
    Request,
    Server,
    Source,
    Written,
    dropped,
    known_only,
    option_json,
    spelled,
)
from skip_softmax.thresholds.types import PHASES, Phase

_PREFIX = "trtllm_skip_softmax_"
_KEYS: dict[Phase, str] = {phase: f"{_PREFIX}{phase}_threshold_scale_factor" for phase in PHASES}


def write(request: Request) -> Written:
    """A line to serve with."""
    config = {_KEYS[phase]: factor for phase, factor in request.scale_factor.items()}
    header = (
        "# EXPERIMENTAL: names of vLLM's open pull request 42989 (39297 has others). No release has them:\n"
        "# vLLM 0.33.0 ends at start with `unexpected_keyword_argument`. They may change.\n"
        "# What works today: Model-Optimizer's vLLM server reads what --engine modelopt writes.\n"
    )
    return Written(f"{header}vllm serve MODEL --attention-config '{json.dumps(config)}'\n")


def read(source: Source) -> Foreign:
    """The JSON of the option, in a line or alone, and its dotted form."""
    config = option_json(source, "--attention-config", "-ac")
    ours = [key for key in config if key.startswith(_PREFIX)]
    known_only(f"{source.path}: --attention-config", ours, _KEYS.values())
    return Foreign(
        {phase: spelled(config[key]) for phase, key in _KEYS.items() if key in config},
        notes=dropped([key for key in config if key not in ours]),
    )


_NO_KERNEL = Ignored("it has no kernel that skips there")

ENGINE = Engine(
    "vllm",
    "vLLM",
    "scalar",
    (
        Server("vLLM", "sm90", _NO_KERNEL, _NO_KERNEL),
        tiles.by_flashinfer_on_blackwell("vLLM"),
        Server("vLLM", "sm120", _NO_KERNEL, _NO_KERNEL),
    ),
    write,
    read,
    numbers=_KEYS,
    prefix_cache="a new number needs a restart, which empties the cache in memory; " + STORED,
    experimental="vLLM 0.33.0 refuses these names at start and has no skip-softmax at all (its pull requests "
    "42989 and 39297 are open); use Model-Optimizer's vLLM server (--engine modelopt)",
)
