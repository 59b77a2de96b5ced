"""The text of every engine's artefact. Values are ours; names and shapes are the engines'."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

from calibrate.errors import UserError
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import Phase

FORMULA = "a * exp(b * target_sparsity)"
"""The only formula that TensorRT-LLM, vLLM-Omni and Model-Optimizer all read, byte by byte."""

SGLANG_VARIABLES: dict[Phase, str] = {
    "prefill": "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR",
    "decode": "SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR",
}
VLLM_KEYS: dict[Phase, str] = {
    "prefill": "trtllm_skip_softmax_prefill_threshold_scale_factor",
    "decode": "trtllm_skip_softmax_decode_threshold_scale_factor",
}


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Attributes:
        thresholds: the file that the numbers come from.
        engine: for whom.
        scale_factor: per phase, above 0 [tokens].
        dense_layers: layers without skipping.
        at_length: KV length of an absolute threshold [tokens].
        pin: whether a phase without a curve may be written as `a = scale_factor, b = 0`.
        attention_class: name of the model's attention class, if known.
    """

    thresholds: Thresholds
    engine: str
    scale_factor: dict[Phase, float]
    dense_layers: tuple[int, ...]
    at_length: int | None
    pin: bool
    attention_class: str | None


Written = tuple[str, list[str]]
"""The artefact's text, and what it could not say."""


def config_group(request: Request) -> tuple[dict[str, Any], list[str]]:
    """The `skip_softmax` group of `sparse_attention_config`.

    Returns:
        The group, and what it could not say.

    Raises:
        UserError: a phase has no usable curve, and pinning was not asked for.
    """
    factors: dict[str, Any] = {"formula": FORMULA}
    targets: dict[str, float] = {}
    lost = []
    for phase, factor in request.scale_factor.items():
        a, b, targets[phase], note = _curve(request, phase, factor)
        factors[phase] = {"a": a, "b": b}
        lost += note
    group: dict[str, Any] = {"algorithm": "skip_softmax"}
    if request.attention_class is not None:
        group["targets"] = [request.attention_class]
    if request.dense_layers:
        # Full names: readers match substrings, and `layers.1` is also in `layers.10`.
        group["ignore"] = [f"model.layers.{layer}.self_attn" for layer in request.dense_layers]
    return {**group, "threshold_scale_factor": factors, "target_sparsity": targets}, lost


def producer() -> dict[str, str]:
    """Who wrote a config group."""
    try:
        version = metadata.version("skip-softmax-calibrate")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return {"name": "skip-softmax-calibrate", "version": version}


def to_json(data: Any) -> str:
    """JSON as the artefacts are written: two spaces, a newline at the end, no NaN."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _curve(request: Request, phase: Phase, factor: float) -> tuple[float, float, float, list[str]]:
    """`a`, `b` and the target at which the curve gives exactly the measured scale factor."""
    fit = request.thresholds.fit.get(phase, {})
    a, b = fit.get("a"), fit.get("b")
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and a > 0 and b > 0:
        target = (math.log(factor) - math.log(a)) / b
        if 0 <= target <= 1:
            low, high = fit.get("sparsity_range", (0.0, 1.0))
            note = [
                f"{phase}: only target_sparsity={target:.3f} was measured; every other target is the fitted "
                f"curve's word (R² {fit.get('r2', float('nan')):.3f}, sparsity {low:.2f} to {high:.2f})"
            ]
            return float(a), float(b), target, note
        reason = f"its fitted curve reaches {factor:g} at a target of {target:.3g}, outside [0, 1]"
    else:
        reason = f"it has no fitted curve ({fit.get('refused', 'none in the file')})"
    if not request.pin and request.engine == "modelopt":
        raise UserError(
            f"config.json needs a curve `{FORMULA}` for {phase}, but {reason}; write the number itself with "
            "--pin (a = scale_factor, b = 0: target_sparsity then has no effect), or use --engine trtllm"
        )
    return (
        factor,
        0.0,
        0.5,
        [f"{phase}: {reason}; a = scale_factor, b = 0 pins it: target_sparsity has no effect"],
    )


def _modelopt(request: Request) -> Written:
    group, lost = config_group(request)
    section = {"config_groups": {"group_0": group}, "producer": producer()}
    return to_json({"sparse_attention_config": section}), lost


def _trtllm(request: Request) -> Written:
    factors = dict(request.scale_factor)
    arguments = ", ".join(f'"{phase}": {factor!r}' for phase, factor in factors.items())
    section = {"algorithm": "skip_softmax", "threshold_scale_factor": factors}
    header = (
        "# TensorRT-LLM, PyTorch backend with the TRTLLM attention backend; a phase that is "
        "missing is dense.\n"
        "#   trtllm-serve MODEL --config THIS_FILE    (also trtllm-eval, trtllm-bench)\n"
        "# In Python:\n"
        f"#   config = SkipSoftmaxAttentionConfig(threshold_scale_factor={{{arguments}}})\n"
        "#   LLM(MODEL, sparse_attention_config=config)\n"
    )
    lost = (
        ["layers left dense: TensorRT-LLM reads them from the model's config.json"]
        if request.dense_layers
        else []
    )
    return header + yaml.safe_dump({"sparse_attention_config": section}, sort_keys=False), lost


def _vllm(request: Request) -> Written:
    config = {VLLM_KEYS[phase]: factor for phase, factor in request.scale_factor.items()}
    header = (
        "# EXPERIMENTAL: names of an open pull request of vLLM (42989), in no release; they may change.\n"
        "# A path that exists: Model-Optimizer's vLLM server reads what --engine modelopt writes.\n"
    )
    return f"{header}vllm serve MODEL --attention-config '{json.dumps(config)}'\n", []


def _sglang(request: Request) -> Written:
    lines = [
        "# SGLang reads these at start; unset is dense, and any other value, 0.0 included, is not the same."
    ]
    for phase, name in SGLANG_VARIABLES.items():
        factor = request.scale_factor.get(phase)
        lines.append(f"unset {name}" if factor is None else f"export {name}={factor!r}")
    lines.append(
        "# python -m sglang.launch_server --model-path MODEL --attention-backend trtllm_mha"
    )
    return "\n".join(lines) + "\n", []


def _flashinfer(request: Request) -> Written:
    phases: dict[str, Any] = {}
    for phase, factor in request.scale_factor.items():
        kwargs: dict[str, Any] = {"skip_softmax_threshold_scale_factor": factor}
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
    return to_json({"normalisation": "per_request_kv_len", **phases}), []


def _vllm_omni(request: Request) -> Written:
    assert request.at_length is not None
    threshold = request.scale_factor["prefill"] / request.at_length
    config = {"default": {"backend": "TRTLLM_ATTN", "skip_softmax": {"threshold": threshold}}}
    line = f"vllm serve MODEL --omni --diffusion-attention-config '{json.dumps(config)}'"
    return _absolute_header(request.at_length) + line + "\n", [_one_length(request.at_length)]


def _tokenspeed(request: Request) -> Written:
    assert request.at_length is not None
    if len(request.scale_factor) < 2:
        raise UserError(
            "tokenspeed applies one threshold to both phases, but only "
            f"{next(iter(request.scale_factor))} has a number; calibrate both phases, or use another engine"
        )
    threshold = min(request.scale_factor.values()) / request.at_length
    lost = [_one_length(request.at_length)]
    if len(set(request.scale_factor.values())) > 1:
        lost.append(
            "one threshold serves both phases: the smaller number is written, the other phase skips less"
        )
    return _absolute_header(request.at_length) + f"--skip-softmax-threshold {threshold!r}\n", lost


def _absolute_header(tokens: int) -> str:
    return (
        f"# reference KV length: {tokens} tokens. The threshold itself holds at this length: "
        "longer requests skip\n"
        "# more than was measured, shorter ones less.\n"
    )


def _one_length(tokens: int) -> str:
    return (
        f"the 1/length law: the threshold holds at {tokens} tokens, is too high for longer requests"
    )


WRITERS: dict[str, Callable[[Request], Written]] = {
    "trtllm": _trtllm,
    "modelopt": _modelopt,
    "vllm": _vllm,
    "sglang": _sglang,
    "flashinfer": _flashinfer,
    "vllm-omni": _vllm_omni,
    "tokenspeed": _tokenspeed,
}
