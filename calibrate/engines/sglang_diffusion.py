"""SGLang's diffusion models: the scale factor goes along with each request."""

from __future__ import annotations

from calibrate.engines import tiles
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
    entry,
    known_only,
    to_json,
)
from calibrate.errors import UserError
from calibrate.model.config_json import json_mapping

_KEY = "skip_softmax_params"
_FACTOR = "threshold_scale_factor"
_SIZES = (128, 256)


def write(request: Request) -> Written:
    """What a request's body must contain."""
    return Written(to_json({_KEY: {_FACTOR: request.scale_factor["prefill"], "start_step": 0}}))


def read(source: Source) -> Foreign:
    """The scale factor of a request's body."""
    params = entry(json_mapping(source.text, str(source.path)), _KEY)
    if not isinstance(params, dict):
        raise UserError(
            f"{source.path}: {_KEY} must be a mapping, but it is {params!r}; correct it"
        )
    known_only(f"{source.path}: {_KEY}", params, (_FACTOR, "start_step"))
    start = params.get("start_step", 0)
    notes = (f"start_step {start}: earlier steps are dense there",) if start else ()
    return Foreign({"prefill": params[_FACTOR]} if _FACTOR in params else {}, notes=notes)


# sglang 0.5.23, multimodal_gen: configs/sample/sampling_params.py (the keys; 0 is refused),
# runtime/layers/attention/backends/skip_softmax.py (GPUs, head sizes, kernels; 16-bit only).
_NO_DECODE = Ignored("diffusion models do not decode token by token")
_FAILS = "ring attention, other head sizes and other GPUs fail the request instead of running dense"
ENGINE = Engine(
    "sglang-diffusion",
    "SGLang diffusion",
    "scalar",
    (
        Server(
            "SGLang diffusion",
            "sm90",
            tiles.with_sizes(tiles.HOPPER_PREFILL, _SIZES),
            _NO_DECODE,
            whole_prompts=ONE_CALL,
            notes=(_FAILS,),
        ),
        Server(
            "SGLang diffusion",
            "sm100",
            tiles.with_sizes(tiles.BLACKWELL_PREFILL, _SIZES),
            _NO_DECODE,
            whole_prompts=ONE_CALL,
            notes=(_FAILS, tiles.BLACKWELL_TWO),
        ),
    ),
    write,
    read,
    numbers={"prefill": f"{_KEY}.{_FACTOR}"},
    kv_cache=False,
    prefix_cache=EACH_STEP,
)
