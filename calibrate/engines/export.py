"""What an engine reads, made from a thresholds file: refused where it would mean something else there.

An engine takes less than a thresholds file holds, so every artefact has a sidecar: which numbers it carries,
what was measured with exactly these numbers, where they hold, and what was lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibrate.engines import artefacts
from calibrate.engines.catalogue import (
    Engine,
    Server,
    find_engine,
    find_gpu,
    objections,
    servers_for,
)
from calibrate.engines.config_json import ConfigPatch, patch_config
from calibrate.errors import UserError
from calibrate.model.config_json import ModelConfigFile, read_model_config
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase
from skip_softmax.thresholds.yaml_file import write_text_atomically

_READ_CONFIG = ("modelopt", "trtllm")
_WORTH_IT = 0.15  # below this sparsity engines' skipping kernels are slower than their dense ones


@dataclass(frozen=True)
class Served:
    """How the engine will be run.

    Attributes:
        phases: phases to export; None: all that have a number.
        gpu: GPU family, for example `sm90`; None: any on which the numbers hold.
        min_len: shortest request [tokens]; None: the file's `min_kv_len` is taken for granted.
        chunk_size: prefill chunk [tokens]; None: prompts are not chunked.
        at_length: KV length at which an absolute threshold is to hold [tokens].
        model: folder with the served model's `config.json`.
        pin: write `a = scale_factor, b = 0` where there is no fitted curve.
        trust_unpublished: the user has compared tiles that are not published.
    """

    phases: tuple[Phase, ...] | None = None
    gpu: str | None = None
    min_len: int | None = None
    chunk_size: int | None = None
    at_length: int | None = None
    model: Path | None = None
    pin: bool = False
    trust_unpublished: bool = False


@dataclass(frozen=True)
class Numbers:
    """What an engine can express, with the measurement that covers exactly this.

    Attributes:
        scale_factor: per phase, above 0 [tokens]; a phase that is missing is dense.
        dense_layers: layers without any skipping.
        loss: measured loss.
        sparsity: measured sparsity per phase.
        lost: what the thresholds file says and these numbers do not.
    """

    scale_factor: dict[Phase, float]
    dense_layers: tuple[int, ...]
    loss: dict[str, Any]
    sparsity: dict[str, Any]
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Artefact:
    """One export.

    Attributes:
        engine: for whom.
        text: the artefact itself.
        sidecar: numbers, evidence, limits and losses; None for `native`, whose file holds all this.
        patch: change of the model's `config.json`, if the engine reads one and the model was given.
        warnings: sentences for the user.
    """

    engine: str
    text: str
    sidecar: dict[str, Any] | None
    patch: ConfigPatch | None
    warnings: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Writes the artefact and, beside it, `<name>.evidence.json`.

        Raises:
            UserError: the folder cannot be written.
        """
        _write(path, self.text)
        if self.sidecar is not None:
            _write_sidecar(path, self.sidecar)

    def apply(self) -> Path:
        """Merges the patch into `config.json` and keeps the old file.

        Returns:
            The backup; the config itself if it already says all this.

        Raises:
            UserError: there is no patch, or the folder cannot be written.
        """
        patch = self.require_patch()
        if patch.before == patch.after:
            return patch.path
        backup = _free_name(patch.path)
        _write(backup, patch.before)
        _write(patch.path, patch.after)
        if self.sidecar is not None:
            _write_sidecar(patch.path, self.sidecar)
        return backup

    def require_patch(self) -> ConfigPatch:
        """The patch, to be asked for before anything is written.

        Raises:
            UserError: there is none.
        """
        if self.patch is None:
            raise UserError(
                "--apply needs --model DIR and an engine that reads config.json (modelopt, trtllm), "
                f"but got {self.engine}{' without --model' if self.engine in _READ_CONFIG else ''}"
            )
        return self.patch


def export(thresholds: Thresholds, engine_name: str, served: Served = Served()) -> Artefact:
    """Makes what an engine reads.

    Args:
        thresholds: a validated thresholds file.
        engine_name: one of `ENGINES`.
        served: how the engine will be run.

    Returns:
        The artefact with its sidecar.

    Raises:
        UserError: the numbers would not mean there what was measured, or there is nothing to export.
    """
    engine = find_engine(engine_name)
    gpu = find_gpu(served.gpu, engine)
    _check_flags(engine, engine_name, served)
    config = None if served.model is None else read_model_config(served.model)
    if engine.form == "native":
        notes = () if config is None else tuple(_check_model(thresholds, config))
        return Artefact("native", thresholds.to_yaml(), None, None, notes)
    _require_verdict(thresholds)
    numbers = expressible(thresholds, engine, served.phases)
    servers = _holding_servers(thresholds, engine, engine_name, numbers, gpu, served)
    warnings = [
        *_check_lengths(thresholds, numbers, servers, served),
        *(_check_model(thresholds, config) if config is not None else ()),
        *_low_sparsity(numbers),
    ]
    request = artefacts.Request(
        thresholds=thresholds,
        engine=engine_name,
        scale_factor=numbers.scale_factor,
        dense_layers=numbers.dense_layers,
        at_length=_reference_length(engine, numbers, served),
        pin=served.pin,
        attention_class=None if config is None else config.attention_class,
    )
    text, lost = artefacts.WRITERS[engine_name](request)
    patch = None
    if config is not None and engine_name in _READ_CONFIG:
        group, more = artefacts.config_group(request)
        lost = list(dict.fromkeys([*lost, *more]))
        patch = patch_config(config, group)
    elif engine_name == "trtllm" and numbers.dense_layers:
        raise UserError(
            f"TensorRT-LLM reads the layers left dense ({len(numbers.dense_layers)} here) from the model's "
            "config.json only; give --model DIR, and --apply to write it"
        )
    if engine_name == "sglang" and config is not None and "index_topk" in config.data:
        raise UserError(
            "SGLang's sparse-attention models (NSA, DSA) use the decode number in prefill too, or refuse it; "
            "serve this model dense or with another engine"
        )
    sidecar = _sidecar(thresholds, engine, engine_name, numbers, servers, served, lost, warnings)
    return Artefact(engine_name, text, sidecar, patch, tuple(warnings))


def needed_options(thresholds: Thresholds, engine_name: str, gpu: str | None) -> list[str]:
    """Options without which an export of a projected file is refused.

    Args:
        thresholds: the projection's file.
        engine_name: the engine that it was projected on.
        gpu: the GPU family that it was projected for, if one was named.

    Returns:
        Options as a user types them; what only the user knows is in capitals.
    """
    engine = find_engine(engine_name)
    numbers = expressible(thresholds, engine, None)
    options = [] if gpu is None else [f"--gpu {gpu}"]
    if engine.absolute:
        options.append("--at-length TOKENS")
    try:
        _holding_servers(thresholds, engine, engine_name, numbers, find_gpu(gpu, engine), Served())
    except UserError:
        options.append("--trust-geometry")
    if engine_name == "trtllm" and numbers.dense_layers:
        options.append("--model DIR --apply")
    if engine_name == "modelopt":
        request = artefacts.Request(
            thresholds, engine_name, numbers.scale_factor, numbers.dense_layers, None, False, None
        )
        try:
            artefacts.config_group(request)
        except UserError:
            options.append("--pin")
    return options


def expressible(thresholds: Thresholds, engine: Engine, phases: Sequence[Phase] | None) -> Numbers:
    """The numbers of a file that an engine can express and that were measured as such.

    Args:
        thresholds: a file whose validation passed.
        engine: whose form counts.
        phases: phases to export; None: all that have a number.

    Returns:
        The file's own numbers when the engine can express them, else its best single numbers.

    Raises:
        UserError: neither was measured, or nothing is left to export.
    """
    evidence = thresholds.evidence
    chosen = tuple(phases or PHASES)
    uncalibrated = tuple(sorted(entry.layer for entry in thresholds.uncalibrated))
    if uncalibrated and engine.form == "scalar":
        raise UserError(
            f"layers {list(uncalibrated)} cannot be calibrated and must stay dense, but {engine.title} "
            "skips in "
            "every layer; use an engine with an ignore list (trtllm, modelopt) or native"
        )
    own = _as_one_number(thresholds, chosen, uncalibrated)
    lost: list[str] = []
    if own is not None and (engine.form == "scalar+ignore" or not own[1]):
        factors, dense = own
        loss, sparsity = evidence.get("loss", {}), evidence.get("sparsity", {})
    else:
        best = evidence.get("uniform_baseline", {})
        file_numbers = {phase: getattr(thresholds.scale_factor, phase) for phase in PHASES}
        measured = {phase: best.get("scale_factor", {}).get(phase, 0.0) for phase in PHASES}
        if not any(file_numbers.values()) or file_numbers != measured:
            raise UserError(
                f"{engine.title} takes one number per phase{_AND_IGNORE[engine.form]}, and the file's "
                "numbers "
                "differ by layer; nothing was measured for what it can express. Measure it: "
                f"`calibrate project RUN_DIR --engine {engine.name}`, then export the file that this writes"
            )
        factors, dense = (
            {p: f for p, f in file_numbers.items() if f > 0 and p in chosen},
            uncalibrated,
        )
        loss, sparsity = best["loss"], best["sparsity"]
        lost.append(
            "numbers per layer: the best single number per phase, measured on the same held-out "
            "prompts, is used; "
            f"`calibrate project` searches for more that {engine.title} can express"
        )
    if not factors:
        raise UserError(
            f"there must be a scale factor above 0 in {' or '.join(chosen)}, but the file says dense; "
            "there is nothing to export: leave the engine's setting unset"
        )
    if set(factors) != {p for p in PHASES if _any_number(thresholds, p)}:
        lost.append(
            "the loss was measured with both phases skipping; this artefact skips in one only"
        )
    return Numbers(factors, dense, loss, {p: sparsity.get(p, {}) for p in factors}, lost)


_AND_IGNORE = {"scalar": "", "scalar+ignore": " and layers left dense", "native": ""}


def _as_one_number(
    thresholds: Thresholds, phases: Sequence[Phase], uncalibrated: tuple[int, ...]
) -> tuple[dict[Phase, float], tuple[int, ...]] | None:
    """One number per phase and the layers that are dense in all of them, if that is all the file says."""
    factors: dict[Phase, float] = {}
    dense: set[int] | None = None
    for phase in phases:
        values = {
            layer: set(thresholds.per_head(layer, phase))
            for layer in range(thresholds.model.layers)
        }
        above = {value for found in values.values() for value in found if value > 0}
        if not above:
            continue
        zero = {layer for layer, found in values.items() if found == {0.0}}
        if len(above) > 1 or any(len(found) > 1 for found in values.values()):
            return None
        if dense is not None and dense != zero:
            return None  # an ignored layer is dense in both phases
        factors[phase], dense = above.pop(), zero
    return factors, tuple(sorted(dense or set(uncalibrated)))


def _any_number(thresholds: Thresholds, phase: Phase) -> bool:
    return any(
        max(thresholds.per_head(layer, phase)) > 0 for layer in range(thresholds.model.layers)
    )


def _check_flags(engine: Engine, name: str, served: Served) -> None:
    """What is wrong whatever the file says."""
    for option, tokens in (
        ("--served-min-len", served.min_len),
        ("--chunk-size", served.chunk_size),
        ("--at-length", served.at_length),
    ):
        if tokens is not None and tokens < 1:
            raise UserError(f"{option} must be at least 1 token, but got {tokens}; correct it")
    if served.at_length is not None and not engine.absolute:
        raise UserError(
            f"--at-length is for engines that take the threshold itself; leave it out for {name}"
        )
    if served.phases is not None and engine.form == "native":
        raise UserError(
            f"--phase must be left out for {name}, which takes the whole file, but got "
            f"{' and '.join(served.phases)}; leave it out"
        )


def _require_verdict(thresholds: Thresholds) -> None:
    verdict = thresholds.evidence.get("verdict", "not validated")
    if verdict != "passed":
        cure = (
            "`calibrate validate RUN_DIR --thresholds FILE -o NEW_FILE` measures it on your model"
            if verdict == "not validated"
            else "raise the budget or give the search more trials"
        )
        raise UserError(
            f"evidence.verdict must be `passed` for an export, but it is `{verdict}`; {cure}"
        )


def _holding_servers(
    thresholds: Thresholds,
    engine: Engine,
    name: str,
    numbers: Numbers,
    gpu: str | None,
    served: Served,
) -> list[Server]:
    model = thresholds.model
    phases = tuple(numbers.scale_factor)
    held, refused = [], []
    for server in servers_for(engine, gpu):
        reasons = objections(
            server,
            thresholds.geometry,
            phases,
            model.head_dim,
            model.q_heads // model.kv_heads,
            trust_unpublished=served.trust_unpublished,
        )
        refused += reasons
        if not reasons:
            held.append(server)
    if held:
        return held
    cures = []
    if any("geometry." in reason for reason in refused):
        cures.append(
            f"`calibrate project RUN_DIR --engine {name} --gpu {gpu or 'GPU'}` measures at the engine's "
            "own tiles"
        )
    if len(phases) > 1 and any("ignores" in reason or "alone" in reason for reason in refused):
        cures.insert(0, "`--phase prefill` exports the prefill number only")
    if any("not published" in reason for reason in refused):
        cures.append("`--trust-geometry` once you have compared the tiles yourself")
    if not cures:
        cures.append("choose another --gpu or engine")
    raise UserError("\n  ".join([*dict.fromkeys(refused), "cure: " + "; or ".join(cures)]))


def _check_lengths(
    thresholds: Thresholds, numbers: Numbers, servers: Sequence[Server], served: Served
) -> list[str]:
    """The engine cannot run short requests densely by itself, so the user must not send any."""
    warnings = []
    harmless = all(server.above_one == "dense" for server in servers)
    for phase, factor in numbers.scale_factor.items():
        floor = getattr(thresholds.min_kv_len, phase)
        given = {"--served-min-len": served.min_len}
        if phase == "prefill":
            given["--chunk-size"] = served.chunk_size
        for option, tokens in given.items():
            if tokens is None or tokens >= floor:
                continue
            law = f"`{option} > scale_factor`" if tokens <= factor else f"`{option} >= min_kv_len`"
            effect = (
                f"a threshold of {factor / tokens:.3g} is 1 or more: "
                + ("these requests run dense" if harmless else "the engine skips almost every tile")
                if tokens <= factor
                else f"nothing was measured below {floor} tokens, and the engine skips there too"
            )
            message = (
                f"{law} must hold in {phase}, but got {tokens} and "
                f"{f'scale_factor={factor:g}' if tokens <= factor else f'min_kv_len={floor}'}: {effect}"
            )
            if not harmless:
                raise UserError(
                    f"{message}; keep shorter requests away from this server, calibrate with "
                    f"`target.min_kv_len.{phase}` of {tokens} or less, or use a larger chunk"
                )
            warnings.append(message)
        if served.min_len is None:
            warnings.append(
                f"no {phase} request may be shorter than {floor} tokens: the engine does not read min_kv_len "
                f"(--served-min-len checks yours)"
            )
    return warnings


def _reference_length(engine: Engine, numbers: Numbers, served: Served) -> int | None:
    if not engine.absolute:
        return None
    if served.at_length is None:
        raise UserError(
            f"{engine.title} takes the threshold itself, which holds at one KV length; give the "
            "longest served "
            "one with --at-length"
        )
    largest = max(numbers.scale_factor.values())
    if served.at_length <= largest:
        raise UserError(
            f"`--at-length > scale_factor` must hold, but got {served.at_length} and {largest:g}: the "
            "threshold "
            "would be 1 or more; give the longest served length"
        )
    return served.at_length


def _check_model(thresholds: Thresholds, config: ModelConfigFile) -> list[str]:
    made_for = thresholds.model
    shape = (made_for.layers, made_for.q_heads, made_for.kv_heads, made_for.head_dim)
    if config.shape != shape:
        raise UserError(
            "(layers, q_heads, kv_heads, head_dim) of file and --model must agree, but the file is for "
            f"{made_for.name} with {shape} and `{config.path}` says {config.shape}; calibrate this model"
        )
    recorded = thresholds.provenance.get("model_config_sha256")
    if recorded is None:
        return [
            "the file does not record its model's config hash; only layers and heads were compared"
        ]
    if recorded != config.sha256:
        raise UserError(
            f"the config hash of file and --model must agree, but the file is for {made_for.name} with "
            f"{recorded[:12]} and `{config.path}` has {config.sha256[:12]}; calibrate this model"
        )
    return []


def _low_sparsity(numbers: Numbers) -> list[str]:
    return [
        f"{phase} skips {100 * found['achieved']:.1f} % of the tiles: below about "
        f"{100 * _WORTH_IT:.0f} % the "
        f"engines' skipping kernels are slower than their dense ones; consider leaving {phase} out"
        for phase, found in numbers.sparsity.items()
        if "achieved" in found and found["achieved"] < _WORTH_IT
    ]


def _sidecar(
    thresholds: Thresholds,
    engine: Engine,
    name: str,
    numbers: Numbers,
    servers: Sequence[Server],
    served: Served,
    lost: Sequence[str],
    warnings: Sequence[str],
) -> dict[str, Any]:
    floors = {phase: getattr(thresholds.min_kv_len, phase) for phase in numbers.scale_factor}
    dropped = [
        f"min_kv_len {floors}: the engine does not run shorter requests densely by itself",
        "model, geometry, evidence and provenance: the artefact has no place for them",
        *(
            [f"{thresholds.model.dtype}: the engine computes in 16 bits"]
            if thresholds.model.dtype == "float32"
            else []
        ),
    ]
    return {
        "format": "skip-softmax-export/1",
        "engine": name,
        "holds_for": [{"server": server.title, "gpu": server.gpu} for server in servers],
        "model": thresholds.model.model_dump(mode="json"),
        "geometry": thresholds.geometry.model_dump(mode="json", exclude_none=True),
        "scale_factor": numbers.scale_factor,
        "dense_layers": list(numbers.dense_layers),
        "min_kv_len": floors,
        "served": {
            key: value
            for key, value in {
                "min_len": served.min_len,
                "chunk_size": served.chunk_size,
                "at_length": served.at_length,
            }.items()
            if value is not None
        },
        "evidence": {
            "verdict": "passed",
            "budget": thresholds.evidence.get("budget"),
            "loss": numbers.loss,
            "sparsity": numbers.sparsity,
        },
        "lost": [*numbers.lost, *lost, *dropped, *engine.notes],
        "warnings": list(warnings),
        "thresholds_sha256": hashlib.sha256(thresholds.to_yaml().encode()).hexdigest(),
        "provenance": thresholds.provenance,
    }


def _write_sidecar(path: Path, sidecar: dict[str, Any]) -> None:
    _write(path.with_name(path.name + ".evidence.json"), artefacts.to_json(sidecar))


def _write(path: Path, text: str) -> None:
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise UserError(
            f"--output: `{path}` cannot be written ({error}); choose another file"
        ) from None


def _free_name(path: Path) -> Path:
    """A backup never overwrites an older one."""
    candidates = [
        path.with_name(path.name + ".bak"),
        *(path.with_name(f"{path.name}.bak{i}") for i in range(1, 1000)),
    ]
    return next(candidate for candidate in candidates if not candidate.exists())
