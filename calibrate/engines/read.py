"""Numbers that somebody else found, as a thresholds file marked unvalidated.

Reads what engines read: TensorRT-LLM's YAML, `config.json` coefficients with a target, SGLang's variables,
vLLM's and FlashInfer's JSON, or a plain threshold with the length it was meant for.
"""

from __future__ import annotations

import math
import re
import reprlib
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from calibrate.engines.artefacts import FORMULA, SGLANG_VARIABLES, VLLM_KEYS
from calibrate.engines.catalogue import (
    Engine,
    Votes,
    find_engine,
    find_gpu,
    geometry_of,
    servers_for,
)
from calibrate.errors import UserError
from calibrate.model.config_json import KEY, json_mapping, read_model_config
from calibrate.schema import GeometryConfig
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import (
    PHASES,
    DecodeGeometry,
    Geometry,
    LayerOverride,
    MinKvLen,
    ModelSection,
    Phase,
    PrefillGeometry,
    ScaleFactors,
)
from skip_softmax.thresholds.yaml_file import read_mapping

_DEFAULT_TARGET = 0.5  # Model-Optimizer's, where neither file nor user names one
_SGLANG_PREFIX, _VLLM_PREFIX = "SGLANG_SKIP_SOFTMAX_", "trtllm_skip_softmax_"
_FLASHINFER_KEY = "skip_softmax_threshold_scale_factor"
_FACTORS: dict[str, dict[Phase, str]] = {
    "trtllm": {
        phase: f"{KEY}.threshold_scale_factor.{phase} or {KEY}.target_sparsity.{phase}"
        for phase in PHASES
    },
    "modelopt": {phase: f"threshold_scale_factor.{phase}" for phase in PHASES},
    "sglang": SGLANG_VARIABLES,
    "vllm": VLLM_KEYS,
    "flashinfer": {phase: f"{phase}.run_kwargs.{_FLASHINFER_KEY}" for phase in PHASES},
    "vllm-omni": {"prefill": "default.skip_softmax.threshold"},
    "tokenspeed": dict.fromkeys(PHASES, "--skip-softmax-threshold"),
}
"""Where each engine's file holds its numbers."""


@dataclass(frozen=True)
class Foreign:
    """Numbers as an engine's artefact states them.

    Attributes:
        scale_factor: per phase [tokens]; a phase that is missing or 0 is dense.
        ignore: layer name patterns that stay dense.
        notes: how the numbers were read.
    """

    scale_factor: dict[Phase, float]
    ignore: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_artefact(
    engine: str,
    path: Path,
    *,
    target: float | None = None,
    coefficients: Path | None = None,
    at_length: int | None = None,
    phases: tuple[Phase, ...] = PHASES,
) -> Foreign:
    """Reads an engine's own file.

    Args:
        engine: whose file it is.
        path: the file.
        target: sparsity at which a curve is read; None: the file's own, else 0.5.
        coefficients: `config.json` (or its folder) for a TensorRT-LLM YAML that names a target only.
        at_length: KV length of a threshold [tokens], where the file does not say it.
        phases: phases to read; the others stay dense.

    Returns:
        The numbers.

    Raises:
        UserError: the file holds no number, or one that is no finite scale factor of 0 or more.
        FileError: it is missing, or no YAML.
    """
    readers: dict[str, Callable[[], Foreign]] = {
        "trtllm": lambda: _trtllm(path, coefficients, phases),
        "modelopt": lambda: read_config_json(path, target, phases),
        "sglang": lambda: _sglang(_text(path), path),
        "vllm": lambda: _vllm(_text(path), path),
        "flashinfer": lambda: _flashinfer(_text(path), path),
        "vllm-omni": lambda: _vllm_omni(_text(path), path, at_length),
        "tokenspeed": lambda: _tokenspeed(_text(path), path, at_length),
    }
    if engine not in readers:
        raise UserError(f"--engine must be one of: {', '.join(readers)}; but got `{engine}`")
    found = readers[engine]()
    factors = {phase: f for phase, f in found.scale_factor.items() if phase in phases}
    if not factors:
        # Dense must be said with a 0: a misspelt name or a foreign file would read as dense too.
        names = [name for phase, name in _FACTORS[engine].items() if phase in phases]
        raise UserError(
            f"{path}: there must be a number for {' or '.join(phases)}, but none was found under "
            f"{', '.join(dict.fromkeys(names)) or f'any name of {engine}'}; "
            "check the names, --engine and --phase"
        )
    for phase, factor in factors.items():
        check_number(f"{path}: {phase}", factor)
    kept = {phase: factor for phase, factor in factors.items() if factor > 0}
    zeros = tuple(f"{phase} is 0: dense" for phase, factor in factors.items() if factor == 0)
    return Foreign(kept, found.ignore, found.notes + zeros)


def check_number(where: str, value: Any) -> None:
    """Refuses what engines take without a word.

    Raises:
        UserError: not a finite number of 0 or more.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value <= sys.float_info.max  # an integer can be finite and above every float
    ):
        raise UserError(
            f"{where}: a scale factor must be a finite number of 0 or more, but got "
            f"{reprlib.repr(value)}; engines take this "
            "without an error and pay for a kernel that skips nothing or everything: correct it, or "
            "leave it unset"
        )


def read_config_json(
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
    where = f"{config.path}: {KEY}"
    if len(groups) != 1:
        raise UserError(f"{where} must hold one skip_softmax group, but it holds {len(groups)}")
    group = next(iter(groups.values()))
    factors = group.get("threshold_scale_factor")
    if not isinstance(factors, dict):
        raise UserError(
            f"{where}: threshold_scale_factor must hold a formula and coefficients, but it is {factors!r}; "
            "Model-Optimizer's vLLM server would take this for a fixed threshold of 0.1"
        )
    if factors.get("formula") != FORMULA:
        raise UserError(
            f"{where}: the formula must be `{FORMULA}`, but it is `{factors.get('formula')}`"
        )
    found: dict[Phase, float] = {}
    notes = []
    for phase in phases:
        curve = factors.get(phase, factors.get("coefficients"))
        if not isinstance(curve, dict):
            continue
        a, b = (curve.get(name, math.nan) for name in ("a", "b"))
        check_number(f"{where}: {phase}.a", a)
        check_number(f"{where}: {phase}.b", b)
        s = _target(group.get("target_sparsity") if target is None else target, phase)
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
    return Foreign(found, tuple(ignore), tuple(notes))


def from_threshold(threshold: float, at_length: int | None, phases: tuple[Phase, ...]) -> Foreign:
    """A plain threshold that was meant for one KV length.

    Raises:
        UserError: there is no length, or the threshold is not in [0, 1).
    """
    if at_length is None:
        raise UserError("a threshold says nothing without its KV length; give --at-length TOKENS")
    if not 1 <= at_length <= sys.float_info.max:
        raise UserError(
            f"--at-length must be a KV length of 1 or more tokens, but got {reprlib.repr(at_length)}; "
            "give the length that the threshold was meant for"
        )
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, (int, float))
        or not 0 <= threshold < 1
    ):
        raise UserError(
            f"`0 <= threshold < 1` must hold, but got threshold={reprlib.repr(threshold)}; "
            "1 or more has no meaning"
        )
    found = dict.fromkeys(phases, threshold * at_length)
    return Foreign(found, notes=(f"threshold {threshold:g} at {at_length} tokens",))


def plain(factors: dict[Phase, float | None]) -> Foreign:
    """Scale factors from the command line.

    Raises:
        UserError: there are none, or one is no finite number of 0 or more.
    """
    given: dict[Phase, float] = {
        phase: factor for phase, factor in factors.items() if factor is not None
    }
    if not given:
        raise UserError(
            "there must be numbers to import: give the engine's file, --threshold, or --prefill and --decode "
            "for the phases of --phase"
        )
    for phase, factor in given.items():
        check_number(f"--{phase}", factor)
    return Foreign(given)


def model_of(
    folder: Path | None, config: Path | None
) -> tuple[ModelSection, GeometryConfig | None]:
    """The user's model, from its folder, or loaded as a run config says.

    Raises:
        UserError: neither or both are given.
    """
    if (folder is None) == (config is None):
        raise UserError(
            "a thresholds file holds for one model: give --model DIR, or --config RUN_CONFIG.yaml"
        )
    if folder is not None:
        return model_section(folder), None
    from calibrate.model.load import load
    from calibrate.model.section import thresholds_for
    from calibrate.schema import load_config

    assert config is not None
    run = load_config(config)
    return thresholds_for(load(run.model), run, {}).model, run.geometry


def to_thresholds(
    numbers: Foreign,
    model: ModelSection,
    engine: str,
    geometry: GeometryConfig | None,
    gpu: str | None,
    source: str,
) -> Thresholds:
    """Puts foreign numbers into a thresholds file.

    Args:
        numbers: from a reader.
        model: the user's model, not the one that the numbers were found on.
        engine: who will serve; decides the tiles.
        geometry: tiles, where the engine does not decide them.
        gpu: GPU family of that engine; None: its first.
        source: where the numbers come from.

    Returns:
        The thresholds; `evidence.verdict` is `not validated`.
    """
    ignored = [
        layer
        for layer in range(model.layers)
        if any(fnmatch(name, pattern) for pattern in numbers.ignore for name in _names(layer))
    ]
    floors = {
        phase: math.floor(factor) + 1 for phase, factor in numbers.scale_factor.items() if factor
    }
    tiles = geometry or GeometryConfig()
    return Thresholds(
        model=model,
        geometry=_geometry(find_engine(engine), gpu, model.head_dim, tiles),
        min_kv_len=MinKvLen(**floors),
        scale_factor=ScaleFactors(**numbers.scale_factor),
        layers=tuple(LayerOverride(layer=layer, prefill=0.0, decode=0.0) for layer in ignored),
        evidence={
            "verdict": "not validated",
            "reason": "numbers of another source; `calibrate validate DIR --thresholds FILE` measures "
            "them on your model",
            "imported": {
                "engine": engine,
                "source": source,
                "notes": list(numbers.notes),
                "scale_factor": dict(numbers.scale_factor),
            },
        },
    )


def model_section(folder: Path) -> ModelSection:
    """The model section of a transformers folder, without loading the model.

    Raises:
        UserError: it is a file, or its `config.json` cannot be read.
    """
    from calibrate.model.config_json import model_hash

    if folder.is_file():  # its hash would be the file's, and no run's model has that one
        raise UserError(
            f"--model must be the folder of a transformers model, but `{folder}` is a file; give its folder"
        )
    config = read_model_config(folder)
    layers, q_heads, kv_heads, head_dim = config.shape
    text = config.data.get("text_config", config.data)
    return ModelSection(
        name=folder.resolve().name,
        sha256=model_hash(folder, None),
        layers=layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "unknown"),
    )


def _geometry(engine: Engine, gpu: str | None, head_dim: int, tiles: GeometryConfig) -> Geometry:
    """Each phase at the tiles of the first server that runs it; the given ones where nothing is published."""
    geometry = Geometry(prefill=tiles.prefill, decode=tiles.decode)
    prefill: PrefillGeometry | None = geometry.prefill
    decode: DecodeGeometry | None = geometry.decode
    servers = servers_for(engine, find_gpu(gpu, engine))
    for server in servers:
        if isinstance(server.prefill, Votes) and server.prefill.tile_q is not None:
            prefill = geometry_of(server, head_dim, geometry).prefill
            break
    for server in servers:
        if isinstance(server.decode, Votes) and server.decode.keys(head_dim):
            decode = geometry_of(server, head_dim, geometry).decode
            break
    return Geometry(prefill=prefill, decode=decode)


def _names(layer: int) -> tuple[str, ...]:
    """What TensorRT-LLM compares its ignore patterns with."""
    return tuple(
        f"{head}layers.{layer}.{tail}"
        for head in ("model.", "")
        for tail in ("self_attn", "attention")
    )


def _target(targets: Any, phase: Phase) -> Any:
    return targets.get(phase) if isinstance(targets, dict) else targets


def _known_only(where: str, names: Collection[Any], known: Collection[str]) -> None:
    """Refuses what looks like a number's name and is none: its phase would stay dense without a word."""
    unknown = sorted(map(str, set(names) - set(known)))
    if unknown:
        raise UserError(
            f"{where} may hold {', '.join(sorted(known))}, but got {unknown}; correct the name"
        )


def _trtllm(path: Path, coefficients: Path | None, phases: tuple[Phase, ...]) -> Foreign:
    data, _ = read_mapping(path)
    section = data.get(KEY, data)
    if not isinstance(section, dict) or section.get("algorithm") != "skip_softmax":
        raise UserError(
            f"{path}: {KEY}.algorithm must be `skip_softmax`, but it is `{_get(section, 'algorithm')}`"
        )
    known = ("algorithm", "threshold_scale_factor", "target_sparsity")
    _known_only(f"{path}: {KEY}", section, known)
    for key in known[1:]:
        if isinstance(section.get(key), dict):
            _known_only(f"{path}: {key}", section[key], PHASES)
    factors = section.get("threshold_scale_factor")
    if factors is None:
        if coefficients is None:
            raise UserError(
                f"{path}: target_sparsity needs the curve in the model's config.json; give it with "
                "--coefficients"
            )
        targets = section.get("target_sparsity")
        wanted = tuple(phase for phase in phases if _target(targets, phase) is not None)
        if not wanted:
            return Foreign({})
        curve = read_config_json(coefficients, targets, wanted, option="--coefficients")
        missing = [phase for phase in wanted if phase not in curve.scale_factor]
        if missing and isinstance(targets, dict):
            raise UserError(
                f"{coefficients}: there must be a curve for {missing[0]}, of which {path} names a target, "
                "but there is none; leave the target out"
            )
        return curve
    if coefficients is not None:
        raise UserError(
            f"--coefficients is for a target_sparsity, but {path} holds threshold_scale_factor; leave it out"
        )
    if isinstance(factors, dict):
        return Foreign({phase: factors[phase] for phase in PHASES if phase in factors})
    value: Any = factors  # checked by the caller
    return Foreign(dict.fromkeys(PHASES, value), notes=("one number for both phases",))


def _sglang(text: str, path: Path) -> Foreign:
    code = "\n".join(line.partition("#")[0] for line in text.splitlines())
    given = dict(re.findall(rf"\b({_SGLANG_PREFIX}\w+)=([^\s;]+)", code))
    _known_only(str(path), given, SGLANG_VARIABLES.values())
    return Foreign(
        {
            phase: _number(f"{path}: {name}", given[name].strip("\"'"))
            for phase, name in SGLANG_VARIABLES.items()
            if name in given
        }
    )


def _vllm(text: str, path: Path) -> Foreign:
    config = _option(text, "--attention-config", path)
    ours = [key for key in config if key.startswith(_VLLM_PREFIX)]
    _known_only(f"{path}: --attention-config", ours, VLLM_KEYS.values())
    return Foreign({phase: config[key] for phase, key in VLLM_KEYS.items() if key in config})


def _flashinfer(text: str, path: Path) -> Foreign:
    data = json_mapping(text, str(path))
    _known_only(str(path), data, ("normalisation", *PHASES))
    try:
        return Foreign({p: data[p]["run_kwargs"][_FLASHINFER_KEY] for p in PHASES if p in data})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: every phase must hold run_kwargs with the scale factor, but {error} is missing"
        ) from None


def _vllm_omni(text: str, path: Path, at_length: int | None) -> Foreign:
    config = _option(text, "--diffusion-attention-config", path)
    skip = _get(config.get("default"), "skip_softmax")
    if _get(skip, "threshold") is None:
        raise UserError(f"{path}: default.skip_softmax.threshold must be given, but got {skip!r}")
    return from_threshold(_get(skip, "threshold"), _reference(text, path, at_length), ("prefill",))


def _tokenspeed(text: str, path: Path, at_length: int | None) -> Foreign:
    match = re.search(r"--skip-softmax-threshold[= ](\S+)", text)
    if match is None:
        raise UserError(f"{path}: --skip-softmax-threshold must be given, but it is not there")
    threshold = _number(f"{path}: --skip-softmax-threshold", match[1])
    return from_threshold(threshold, _reference(text, path, at_length), PHASES)


def _reference(text: str, path: Path, at_length: int | None) -> int | None:
    match = re.search(r"reference KV length: (\d{1,18}) tokens", text)
    if match is None:
        return at_length
    if at_length is not None and at_length != int(match[1]):
        raise UserError(
            f"--at-length must be the KV length that {path} states, {match[1]} tokens, but got {at_length}; "
            "leave it out"
        )
    return int(match[1])


def _option(text: str, option: str, path: Path) -> dict[str, Any]:
    """The JSON behind a command-line option, in a shell line or alone in the file."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    try:
        words = shlex.split("\n".join(lines)) if option in text else [option, "\n".join(lines)]
        value = (
            words[words.index(option) + 1]
            if option in words
            else next(word.partition("=")[2] for word in words if word.startswith(option + "="))
        )
    except (ValueError, IndexError, StopIteration) as error:
        raise UserError(f"{path}: {option} must be followed by JSON ({error})") from None
    return json_mapping(value, f"{path}: what follows {option}")


def _number(where: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where} must be a number, but got `{text}`") from None


def _get(data: Any, key: str) -> Any:
    return data.get(key) if isinstance(data, dict) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read ({error}); give the engine's file") from None
