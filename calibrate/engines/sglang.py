"""SGLang: two environment variables, one per phase; unset is dense."""

from __future__ import annotations

import re

from calibrate.engines import tiles
from calibrate.engines.types import (
    Engine,
    Foreign,
    Ignored,
    Request,
    Server,
    Source,
    Written,
    code_of,
    known_only,
    number,
)
from skip_softmax.thresholds.types import PHASES, Phase

_PREFIX = "SGLANG_SKIP_SOFTMAX_"
_VARIABLES: dict[Phase, str] = {
    phase: f"{_PREFIX}{phase.upper()}_THRESHOLD_SCALE_FACTOR" for phase in PHASES
}

# In shells, .env and Compose files.
_STATEMENT = re.compile(
    rf"""\bunset\s+(?P<unset>(?:\w+[ \t]*)+)
    |(?<![\w$])(?P<name>{_PREFIX}\w+)[ \t]*[=:][ \t]*(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s;&|]*)""",
    re.VERBOSE,
)


def write(request: Request) -> Written:
    """A file to source in a shell."""
    lines = ["# Read by SGLang; unset is dense."]
    for phase, name in _VARIABLES.items():
        factor = request.scale_factor.get(phase)
        lines.append(f"unset {name}" if factor is None else f"export {name}={factor!r}")
    lines.append(
        "# python -m sglang.launch_server --model-path MODEL --attention-backend trtllm_mha"
    )
    return Written("\n".join(lines) + "\n")


def read(source: Source) -> Foreign:
    """Assignments anywhere in a shell script or an environment file; the last one of a name counts."""
    given: dict[str, str] = {}
    repeated: list[str] = []
    for found in _STATEMENT.finditer(code_of(source.text)):
        for name in (found["unset"] or "").split():
            given.pop(name, None)
        if name := found["name"]:
            repeated += [name] if name in given else []
            given[name] = found["value"].strip("\"'")
    known_only(str(source.path), given, _VARIABLES.values())
    return Foreign(
        {
            phase: number(f"{source.path}: {name}", given[name])
            for phase, name in _VARIABLES.items()
            if name in given
        },
        notes=tuple(f"{name} is set more than once: the last counts" for name in repeated),
    )


# sglang 0.5.23: srt/arg_groups/attention_hook.py (sm120);
# srt/layers/attention/trtllm_mha_backend.py (queries are cast to the type of an FP8 cache; decode
# names no backend) and dsa_backend.py (the sparse models).
_NO_START = Ignored(
    'its trtllm_mha backend "does not support ... skip-softmax" there', "does not start with"
)

ENGINE = Engine(
    "sglang",
    "SGLang",
    "scalar",
    (
        tiles.by_flashinfer_on_hopper("SGLang"),
        tiles.by_flashinfer_on_blackwell("SGLang"),
        Server("SGLang", "sm120", _NO_START, tiles.NO_XQA),
    ),
    write,
    read,
    numbers=_VARIABLES,
    backends={"trtllm_mha": ""},
    prefix_cache="a restart, or /flush_cache while no request runs, empties the radix cache; a hierarchical "
    "cache's store outside the process does not know the number: empty it",
    unfit={
        "index_topk": "SGLang's sparse-attention models (NSA, DSA) use the decode number in parts of "
        "prefill too, or refuse it"
    },
)
