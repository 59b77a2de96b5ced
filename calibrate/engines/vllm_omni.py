"""vLLM-Omni: the prefill-only attention of diffusion models, by a curve or by one threshold at one length."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from calibrate.engines.config_json import config_group, read_curve, section_with
from calibrate.engines.tiles import BLACKWELL_PREFILL, BLACKWELL_TWO, with_sizes
from calibrate.engines.types import (
    EACH_STEP,
    ONE_CALL,
    Engine,
    Foreign,
    Ignored,
    Request,
    Server,
    Source,
    Written,
    absolute_header,
    dropped,
    entry,
    from_threshold,
    one_length,
    option_json,
    spelled,
    stated_length,
)
from calibrate.errors import UserError
from skip_softmax.thresholds.identity import EXPORT_KEY

_OPTION = "--diffusion-attention-config"
_READ = ("threshold", "target_sparsity")


def write(request: Request) -> Written:
    """A line to serve with; without a length, the curve that `transformer/config.json` must have too."""
    factor = request.scale_factor["prefill"]
    if request.at_length is not None:
        line = _line({"threshold": factor / request.at_length})
        return Written(absolute_header(request.at_length) + line, (one_length(request.at_length),))
    group, lost = config_group(request)
    curve = json.dumps({EXPORT_KEY: section_with(group)})
    header = (
        "# Right at every KV length, with this curve in the config.json of the expert that was calibrated\n"
        "# (MODEL/transformer, or MODEL/transformer_2); --model FOLDER --apply writes it there:\n"
        f"#   {curve}\n"
    )
    one_target = "both experts of a model are read at the one target_sparsity of the command line"
    line = _line({"target_sparsity": group["target_sparsity"]["prefill"]})
    return Written(header + line, (*lost, one_target))


def read(source: Source) -> Foreign:
    """The threshold at the length that the file or the user states, or a target with its curve."""
    config = option_json(source, _OPTION)
    default = config.get("default")
    skip = entry(default, "skip_softmax")
    threshold, target = (spelled(entry(skip, key)) for key in ("threshold", "target_sparsity"))
    unread = [
        *(key for key in config if key != "default"),
        *(f"default.{key}" for key in default or () if key not in ("backend", "skip_softmax")),
        *(f"default.skip_softmax.{key}" for key in skip or () if key not in _READ),
    ]
    if target is not None and threshold is None:
        if source.coefficients is None:
            raise UserError(
                f"{source.path}: target_sparsity needs the curve in the transformer's config.json; give it "
                "with --coefficients"
            )
        found = read_curve(source.coefficients, target, ("prefill",), option="--coefficients")
        return replace(found, notes=found.notes + dropped(unread))
    if threshold is None or target is not None:
        raise UserError(
            f"{source.path}: default.skip_softmax must give either threshold or target_sparsity, but got "
            f"{skip!r}"
        )
    found = from_threshold(threshold, stated_length(source), ("prefill",))
    return replace(found, notes=found.notes + dropped(unread))


def _line(skip: dict[str, Any]) -> str:
    config = {"default": {"backend": "TRTLLM_ATTN", "skip_softmax": skip}}
    return f"vllm serve MODEL --omni {_OPTION} '{json.dumps(config)}'\n"


# vllm-omni 0.32.0rc1 and 0.30.0, diffusion/attention/backends: trtllm_attn.py (head size, GPUs,
# threshold times length), trtllm_calibration.py (formula, one curve per expert; of transformer_2
# only beside one of transformer).
ENGINE = Engine(
    "vllm-omni",
    "vLLM-Omni",
    "scalar",
    (
        Server(
            "vLLM-Omni",
            "sm100",
            with_sizes(BLACKWELL_PREFILL, (128,)),
            Ignored("diffusion models do not decode token by token"),
            whole_prompts=ONE_CALL,
            notes=(BLACKWELL_TWO,),
        ),
    ),
    write,
    read,
    numbers={"prefill": "default.skip_softmax.threshold or default.skip_softmax.target_sparsity"},
    options=("at_length", "coefficients"),
    absolute=True,
    config_json="curve",
    kv_cache=False,
    prefix_cache=EACH_STEP,
)
