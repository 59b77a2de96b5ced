"""The one key of a model's `config.json` that we may write: its group, its change, and reading its curve."""

from __future__ import annotations

import difflib
import json
import math
import reprlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import skip_softmax
from calibrate.engines.types import Foreign, Request, check_number, dropped
from calibrate.errors import UserError
from calibrate.model.config_json import ModelConfigFile, read_model_config
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.identity import EXPORT_KEY
from skip_softmax.thresholds.types import PHASES, Phase

FORMULA = "a * exp(b * target_sparsity)"
"""The only formula that TensorRT-LLM, vLLM-Omni and Model-Optimizer all read, byte by byte."""

# What is read of a group and of its curves.
_GROUP = ("algorithm", "ignore", "threshold_scale_factor", "target_sparsity")
_CURVES = ("formula", "coefficients")
_DEFAULT_TARGET = 0.5  # Model-Optimizer's, where neither file nor user names one


# Writing.


def config_group(request: Request) -> tuple[dict[str, Any], list[str]]:
    """The `skip_softmax` group of our key.

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
        lost.append(note)
    group: dict[str, Any] = {"algorithm": "skip_softmax"}
    if request.attention_class is not None:
        group["targets"] = [request.attention_class]
    if request.dense_layers:
        # TensorRT-LLM knows every model's layers by the first name, Model-Optimizer's vLLM server by the
        # module's own. Full names: readers match substrings, and `layers.1` is also in `layers.10`.
        own = attention_modules(request.thresholds) or {}
        names = [(_layer_names(layer)[0], own.get(layer)) for layer in request.dense_layers]
        group["ignore"] = list(dict.fromkeys(name for both in names for name in both if name))
    return {**group, "threshold_scale_factor": factors, "target_sparsity": targets}, lost


def attention_modules(thresholds: Thresholds) -> dict[int, str] | None:
    """Names of the model's own attention modules by layer, empty where there is none; None: not recorded."""
    names = thresholds.provenance.get("attention_modules")
    layers = range(thresholds.model.layers)
    if isinstance(names, str) and "{layer}" in names:
        return {layer: names.replace("{layer}", str(layer)) for layer in layers}
    if isinstance(names, list) and len(names) == len(layers):
        return dict(enumerate(map(str, names)))
    return None


def section_with(group: dict[str, Any]) -> dict[str, Any]:
    """The value of our key where there was none."""
    return {"config_groups": {"group_0": group}, "producer": _producer()}


@dataclass(frozen=True)
class ConfigPatch:
    """A change of a `config.json`, before and after."""

    path: Path
    before: str
    after: str

    def diff(self) -> str:
        """Unified diff; empty when nothing changes."""
        return "".join(
            difflib.unified_diff(
                self.before.splitlines(keepends=True),
                self.after.splitlines(keepends=True),
                str(self.path),
                f"{self.path} (patched)",
            )
        )


def patch_config(config: ModelConfigFile, group: dict[str, Any]) -> ConfigPatch:
    """Puts a `skip_softmax` group into a config and leaves everything else as it is.

    Args:
        config: the model's config.
        group: from `config_group`.

    Returns:
        The patch; nothing is written.

    Raises:
        UserError: the config has a schema or a formula that is not ours to replace.
    """
    section = config.data.get(EXPORT_KEY)
    ours = section_with(group) if section is None else _merged(config, section, group)
    if section == ours:
        return ConfigPatch(config.path, config.text, config.text)
    after = (
        _spliced(config, ours)
        if section is None
        else _dumped({**config.data, EXPORT_KEY: ours}, config.text)
    )
    changed = json.loads(after)
    assert {**changed, EXPORT_KEY: None} == {**config.data, EXPORT_KEY: None} and changed[
        EXPORT_KEY
    ] == ours
    return ConfigPatch(config.path, config.text, after)


def _curve(request: Request, phase: Phase, factor: float) -> tuple[float, float, float, str]:
    """`a`, `b`, the target at which the curve gives exactly the measured scale factor, and what is lost."""
    fit = request.thresholds.fit.get(phase, {})
    a, b = fit.get("a"), fit.get("b")
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and a > 0 and b > 0:
        # The last digits are the logarithms' rounding: a target that was given comes back as it was given.
        target = float(f"{(math.log(factor) - math.log(a)) / b:.14g}")
        if 0 <= target <= 1:
            note = f"{phase}: only target_sparsity={target:.3f} was measured; {_reliance(fit)}"
            return float(a), float(b), target, note
        reason = f"its fitted curve reaches {factor:g} at a target of {target:.3g}, outside [0, 1]"
    else:
        reason = f"it has no fitted curve ({fit.get('refused', 'none in the file')})"
    if not request.pin:
        raise UserError(
            f"config.json needs a curve `{FORMULA}` for {phase}, but {reason}; write the number itself with "
            "--pin (a = scale_factor, b = 0: target_sparsity then has no effect), or use --engine trtllm"
        )
    note = f"{phase}: {reason}; a = scale_factor, b = 0 pins it: target_sparsity has no effect"
    return factor, 0.0, _DEFAULT_TARGET, note


def _reliance(fit: dict[str, Any]) -> str:
    """How far other targets can be trusted."""
    near = ", ".join(
        f"{float(asked):.2f} skips {share:.3f}" for asked, share in fit.get("near", {}).items()
    )
    if "good" in fit:
        low, high = fit["good"]
        return (
            f"other targets are right to 2 points from {low:.3f} to {high:.3f}, by the prompts counted"
            + (f" ({near})" if near else "")
        )
    if "r2" not in fit:
        return (
            "every other target relies on the imported curve, which this model was not asked about"
        )
    low, high = fit.get("sparsity_range", (0.0, 1.0))
    span = f"R² {fit['r2']:.3f}, sparsity {low:.2f} to {high:.2f}"
    return f"every other target relies on the fitted curve ({span})"


def _producer() -> dict[str, str]:
    return {"name": "skip-softmax-calibrate", "version": skip_softmax.__version__}


def _merged(config: ModelConfigFile, section: Any, group: dict[str, Any]) -> dict[str, Any]:
    where = f"{config.path}: {EXPORT_KEY}"
    if not isinstance(section, dict) or not isinstance(section.get("config_groups"), dict):
        raise UserError(
            f"{where} must have config_groups, but it has an older or foreign schema; move it away yourself"
        )
    groups = config.skip_groups()
    if len(groups) > 1:
        raise UserError(
            f"{where} may have one skip_softmax group, but it has {len(groups)} ({', '.join(groups)}); "
            "remove all but one"
        )
    for name, old in groups.items():
        factors = old.get("threshold_scale_factor")
        formula = factors.get("formula") if isinstance(factors, dict) else factors
        if formula != FORMULA:
            raise UserError(
                f"{where}.{name}: the formula must be `{FORMULA}`, but it is `{formula}`; the same letters "
                "mean something else there: move this group away yourself"
            )
    free = next(f"group_{i}" for i in range(10_000) if f"group_{i}" not in section["config_groups"])
    name = next(iter(groups), free)
    return {
        **section,
        "config_groups": {**section["config_groups"], name: group},
        "producer": section.get("producer", _producer()),
    }


def _spliced(config: ModelConfigFile, section: dict[str, Any]) -> str:
    """Adds the key at the end of the text: not one byte before it changes."""
    head = config.text.rstrip()
    tail = config.text[len(head) :]
    body, indent = head[:-1].rstrip(), _indent(config.text)
    dumped = json.dumps(section, indent=indent, allow_nan=False).replace("\n", "\n" + " " * indent)
    comma = "" if body.endswith("{") else ","
    added = f'{comma}\n{" " * indent}"{EXPORT_KEY}": {dumped}\n}}'
    return body + added.replace("\n", _newline(config.text)) + tail


def _dumped(data: dict[str, Any], like: str) -> str:
    text = json.dumps(data, indent=_indent(like), ensure_ascii=like.isascii())
    return text.replace("\n", _newline(like)) + like[len(like.rstrip()) :]


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _indent(text: str) -> int:
    lines = text.splitlines()
    return len(lines[1]) - len(lines[1].lstrip()) if len(lines) > 1 else 2


# Reading.


def read_curve(
    path: Path,
    target: Any = None,
    phases: tuple[Phase, ...] = PHASES,
    *,
    option: str = "SOURCE",
) -> Foreign:
    """Reads the curve of a `config.json` at a target.

    Args:
        path: the file, or the model's folder.
        target: sparsity for both phases, or a mapping; None: the file's.
        phases: phases to read.
        option: where the user gave the file, for messages.

    Raises:
        UserError: no curve, several groups, another formula, or a target outside [0, 1].
    """
    config = read_model_config(path, option)
    groups = config.skip_groups()
    where = f"{config.path}: {EXPORT_KEY}"
    if len(groups) != 1:
        raise UserError(f"{where} must have one skip_softmax group, but it has {len(groups)}")
    group = next(iter(groups.values()))
    factors = group.get("threshold_scale_factor")
    if not isinstance(factors, dict):
        raise UserError(
            f"{where}: threshold_scale_factor must give a formula and coefficients, but it is {factors!r}; "
            "Model-Optimizer's vLLM server would take this for a fixed threshold of 0.1"
        )
    if factors.get("formula") != FORMULA:
        raise UserError(
            f"{where}: the formula must be `{FORMULA}`, but it is `{factors.get('formula')}`"
        )
    found: dict[Phase, float] = {}
    curves: dict[Phase, dict[str, float]] = {}
    notes = []
    for phase in phases:
        curve = factors.get(phase, factors.get("coefficients"))
        if not isinstance(curve, dict):
            continue
        a, b = (curve.get(name, math.nan) for name in ("a", "b"))
        check_number(f"{where}: {phase}.a", a)
        check_number(f"{where}: {phase}.b", b)
        s = target_of(group.get("target_sparsity") if target is None else target, phase)
        if s is None:
            s = _DEFAULT_TARGET
            notes.append(f"{phase}: no target_sparsity; read at {s}, as Model-Optimizer does")
        if isinstance(s, bool) or not isinstance(s, (int, float)) or not 0 <= s <= 1:
            raise UserError(
                f"{where}: the target sparsity of {phase} must lie in [0, 1], but got "
                f"{reprlib.repr(s)}; correct it where it is given"
            )
        try:
            found[phase] = a * math.exp(b * s)
        except OverflowError:
            found[phase] = math.inf
        notes.append(f"{phase}: {a:g} * exp({b:g} * {s:g})")
        check_number(f"{where}: {notes[-1]}", found[phase])
        if a > 0 and b > 0:
            curves[phase] = {"a": float(a), "b": float(b), "target": float(s)}
        else:
            notes.append(f"{phase}: no curve to keep: it has one number at every target")
    if not found:
        raise UserError(
            f"{where}: a and b must be given under {' or '.join(phases)}, but there are none"
        )
    ignore = group.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise UserError(
            f"{where}: ignore must be a list of layer names, but got {reprlib.repr(ignore)}; "
            "write even one name as a list"
        )
    others = [name for name in config.data[EXPORT_KEY]["config_groups"] if name not in groups]
    unread = [
        *(
            f"{EXPORT_KEY}.{key}"
            for key in config.data[EXPORT_KEY]
            if key not in ("config_groups", "producer")
        ),
        *(f"{EXPORT_KEY}.config_groups.{name}" for name in others),
        *(key for key in group if key not in _GROUP),
        *(f"threshold_scale_factor.{key}" for key in factors if key not in (*_CURVES, *phases)),
    ]
    return Foreign(found, tuple(ignore), (*notes, *dropped(unread)), curves)


def target_of(targets: Any, phase: Phase) -> Any:
    """A phase's target, from one for both phases or a mapping."""
    return targets.get(phase) if isinstance(targets, dict) else targets


def ignored_layers(patterns: tuple[str, ...], layers: int) -> list[int]:
    """Layers that an ignore list leaves dense."""
    return [
        layer
        for layer in range(layers)
        if any(fnmatch(name, pattern) for pattern in patterns for name in _layer_names(layer))
    ]


def _layer_names(layer: int) -> tuple[str, ...]:
    """What TensorRT-LLM compares its ignore patterns with; the first is the one that we write."""
    return tuple(
        f"{head}layers.{layer}.{tail}"
        for head in ("model.", "")
        for tail in ("self_attn", "attention")
    )
