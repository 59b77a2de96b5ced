"""TensorRT-LLM: a YAML file with one scale factor per phase; layers left dense stand in `config.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from calibrate.engines import tiles
from calibrate.engines.config_json import read_curve, target_of
from calibrate.engines.types import (
    STORED,
    Engine,
    Foreign,
    Request,
    Source,
    Written,
    entry,
    known_only,
    spelled,
)
from calibrate.errors import UserError
from skip_softmax.thresholds.identity import EXPORT_KEY
from skip_softmax.thresholds.types import PHASES
from skip_softmax.thresholds.yaml_file import read_mapping


def write(request: Request) -> Written:
    """The YAML of `--config`."""
    factors = dict(request.scale_factor)
    arguments = ", ".join(f'"{phase}": {factor!r}' for phase, factor in factors.items())
    section = {"algorithm": "skip_softmax", "threshold_scale_factor": factors}
    header = (
        "# TensorRT-LLM, PyTorch backend with the TRTLLM attention backend; a missing phase is dense.\n"
        "#   trtllm-serve MODEL --config THIS_FILE    (also trtllm-eval, trtllm-bench)\n"
        "# In Python:\n"
        f"#   config = SkipSoftmaxAttentionConfig(threshold_scale_factor={{{arguments}}})\n"
        f"#   LLM(MODEL, {EXPORT_KEY}=config)\n"
    )
    header += "".join(_formulas(request))
    lost = ("layers left dense: TensorRT-LLM reads them from the model's config.json",)
    return Written(
        header + yaml.safe_dump({EXPORT_KEY: section}, sort_keys=False),
        lost if request.dense_layers else (),
    )


def _formulas(request: Request) -> Iterator[str]:
    """Where the numbers come from, for a human: TensorRT-LLM reads a curve in config.json only."""
    found = request.thresholds.evidence.get("target_sparsity", {})
    for phase in request.scale_factor:
        if phase in found:
            fit = found[phase]["fit"]
            lowered = found[phase]["scale_factor"] < found[phase]["asked"]
            # A mapping: one number for both phases ends in a TypeError where one of them has no curve.
            target = f"{{{phase}: {found[phase]['target']!r}}}"
            floor = ", lowered to what min_kv_len allows" if lowered else ""
            yield (
                f"# {phase}: {fit['a']!r} * exp({fit['b']!r} * target_sparsity) at target_sparsity: "
                f"{target}{floor}\n"
            )


def read(source: Source) -> Foreign:
    """Scale factors, or a target with the curve of another file."""
    path, phases = source.path, source.phases
    data, _ = read_mapping(path, foreign=True)
    section = data.get(EXPORT_KEY, data)
    if not isinstance(section, dict) or section.get("algorithm") != "skip_softmax":
        raise UserError(
            f"{path}: {EXPORT_KEY}.algorithm must be `skip_softmax`, but it is "
            f"`{entry(section, 'algorithm')}`"
        )
    known = ("algorithm", "threshold_scale_factor", "target_sparsity")
    known_only(f"{path}: {EXPORT_KEY}", section, known)
    for key in known[1:]:
        if isinstance(section.get(key), dict):
            known_only(f"{path}: {key}", section[key], PHASES)
    factors = _spelled(section.get("threshold_scale_factor"))
    if factors is None:
        if source.coefficients is None:
            raise UserError(
                f"{path}: target_sparsity needs the curve in the model's config.json; give it with "
                "--coefficients"
            )
        targets = _spelled(section.get("target_sparsity"))
        wanted = tuple(phase for phase in phases if target_of(targets, phase) is not None)
        if not wanted:
            return Foreign({})
        curve = read_curve(source.coefficients, targets, wanted, option="--coefficients")
        missing = [phase for phase in wanted if phase not in curve.scale_factor]
        if missing and isinstance(targets, dict):
            raise UserError(
                f"{path} gives a target for {missing[0]}, so {source.coefficients} must give a curve for "
                f"{missing[0]}, but it does not; leave the target out"
            )
        return curve
    if source.coefficients is not None:
        raise UserError(
            f"--coefficients is for a target_sparsity, but {path} gives threshold_scale_factor; leave it out"
        )
    if isinstance(factors, dict):
        return Foreign({phase: factors[phase] for phase in PHASES if phase in factors})
    value: Any = factors  # checked by the caller
    return Foreign(dict.fromkeys(PHASES, value), notes=("one number for both phases",))


def _spelled(numbers: Any) -> Any:
    """One number or a mapping, each as TensorRT-LLM's schema reads it."""
    if isinstance(numbers, dict):
        return {phase: spelled(value) for phase, value in numbers.items()}
    return spelled(numbers)


ENGINE = Engine(
    "trtllm",
    "TensorRT-LLM",
    "scalar+ignore",
    tiles.TRTLLM_SERVERS,
    write,
    read,
    numbers={
        phase: f"{EXPORT_KEY}.threshold_scale_factor.{phase} or {EXPORT_KEY}.target_sparsity.{phase}"
        for phase in PHASES
    },
    options=("coefficients",),
    config_json="layers",
    prefix_cache="a new number needs a restart, which empties the blocks that are reused; "
    + STORED,
    backends={"TRTLLM": ""},
)
