"""FlashInfer: keyword arguments of a call, as JSON for the user's own code."""

from __future__ import annotations

from typing import Any

from calibrate.engines import tiles
from calibrate.engines.types import (
    Engine,
    Foreign,
    Request,
    Server,
    Source,
    Votes,
    Written,
    known_only,
    to_json,
)
from calibrate.errors import UserError
from calibrate.model.config_json import json_mapping
from skip_softmax.thresholds.types import PHASES

_KEY = "skip_softmax_threshold_scale_factor"


def write(request: Request) -> Written:
    """Per phase, the arguments by scale factor and by threshold."""
    phases: dict[str, Any] = {}
    for phase, factor in request.scale_factor.items():
        kwargs: dict[str, Any] = {_KEY: factor}
        if phase == "decode":
            kwargs["backend"] = "trtllm-gen"  # "auto" may choose XQA, which ignores the number
        phases[phase] = {
            "run_kwargs": kwargs,
            "absolute": {
                "argument": "skip_softmax_threshold",
                "scale_factor": factor,
                "value": "scale_factor / kv_len of each request, float32 tensor [batch] on the GPU",
            },
        }
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


ENGINE = Engine(
    "flashinfer",
    "FlashInfer",
    "scalar",
    (
        Server("FlashInfer", "sm90", tiles.HOPPER_PREFILL, tiles.NO_XQA),
        Server("FlashInfer", "sm100", tiles.BLACKWELL_PREFILL, tiles.BLACKWELL_DECODE),
        Server("FlashInfer", "sm120", Votes(head_dims=(128,)), tiles.NO_XQA),
    ),
    write,
    read,
    numbers={phase: f"{phase}.run_kwargs.{_KEY}" for phase in PHASES},
    notes=(tiles.SPLITS, tiles.BLACKWELL_TWO),
)
