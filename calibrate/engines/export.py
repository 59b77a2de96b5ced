"""What an engine reads, made from a thresholds file: refused where it would mean something else there.

An engine takes less than a thresholds file says, so every artefact has a sidecar: its numbers, what was
measured with exactly these numbers, where they are valid, and what was lost.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibrate.engines import guards
from calibrate.engines.catalogue import (
    ENGINES,
    as_run,
    find_engine,
    find_gpu,
    find_kv_dtype,
    find_phases,
)
from calibrate.engines.config_json import ConfigPatch, config_group, patch_config
from calibrate.engines.guards import Served
from calibrate.engines.numbers import Numbers, expressible
from calibrate.engines.types import REUSED, Engine, Request, Server, to_json
from calibrate.errors import UserError
from calibrate.model.config_json import read_model_config
from calibrate.record.files import write_output
from skip_softmax.thresholds.file import Thresholds


@dataclass(frozen=True)
class Artefact:
    """One export.

    Attributes:
        engine: for whom.
        text: the artefact itself.
        sidecar: numbers, evidence, limits and losses; None for `native`, whose file has all this.
        patch: change of the model's `config.json`, if the engine reads one and the model was given.
        warnings: sentences for the user.
    """

    engine: str
    text: str
    sidecar: dict[str, Any] | None
    patch: ConfigPatch | None
    warnings: tuple[str, ...]

    @property
    def is_patch(self) -> bool:
        """Whether the engine reads nothing but `config.json`, and its change is there."""
        return self.patch is not None and ENGINES[self.engine].config_json == "all"

    def write(self, path: Path) -> None:
        """Writes the artefact and, beside it, `<name>.evidence.json`.

        Raises:
            UserError: the folder cannot be written.
        """
        write_output(path, self.text)
        self._write_sidecar(path)

    def apply(self) -> Path:
        """Merges the patch into `config.json` and keeps the old file.

        Returns:
            The backup; the config itself if nothing changes.

        Raises:
            UserError: there is no patch, or the folder cannot be written.
        """
        patch = self.require_patch()
        if patch.before == patch.after:
            return patch.path
        backup = _free_name(patch.path)
        write_output(backup, patch.before)
        write_output(patch.path, patch.after)
        self._write_sidecar(patch.path)
        return backup

    def require_patch(self) -> ConfigPatch:
        """The patch, to be asked for before anything is written.

        Raises:
            UserError: there is none.
        """
        if self.patch is None:
            reading = sorted(e.name for e in ENGINES.values() if e.config_json != "nothing")
            raise UserError(
                f"--apply needs --model DIR and an engine that reads config.json ({', '.join(reading)}), "
                f"but got {self.engine}{' without --model' if self.engine in reading else ''}"
            )
        return self.patch

    def _write_sidecar(self, path: Path) -> None:
        if self.sidecar is not None:
            write_output(path.with_name(path.name + ".evidence.json"), to_json(self.sidecar))


def export(
    thresholds: Thresholds | str | os.PathLike[str],
    engine: str,
    *,
    phases: Sequence[str] | None = None,
    gpu: str | None = None,
    served_min_len: int | None = None,
    chunk_size: int | None = None,
    at_length: int | None = None,
    kv_dtype: str | None = None,
    speculative: bool | None = None,
    backend: str | None = None,
    model: str | os.PathLike[str] | None = None,
    pin: bool = False,
    trust_geometry: bool = False,
    experimental: bool = False,
) -> Artefact:
    """Makes what an engine reads.

    Args:
        thresholds: validated thresholds, or the path of their file.
        engine: who will serve, for example `trtllm`.
        phases: `prefill`, `decode` or both; None: all that have a number.
        gpu: GPU family that will serve, for example `sm90`; None: any on which the numbers are valid.
        served_min_len: shortest request [tokens]; None: none is shorter than the file's `min_kv_len`.
        chunk_size: prefill chunk [tokens]; None: unknown.
        at_length: longest served KV length [tokens], for engines that take the threshold itself.
        kv_dtype: type of the engine's KV cache, for example `fp8`; None: taken for a 16-bit one, with a
            warning where that matters.
        speculative: whether the engine decodes speculatively; None: it is taken not to, with a warning
            where that matters.
        backend: the engine's attention backend, by its own name, to be checked; None: not checked.
        model: folder of the served model with its `config.json`, for engines that read it.
        pin: write `a = scale_factor, b = 0` where there is no fitted curve.
        trust_geometry: you have compared tiles that are not published.
        experimental: write what no release of the engine reads.

    Returns:
        The artefact with its sidecar; nothing is written yet.

    Raises:
        UserError: the numbers would not mean there what was measured, or there is nothing to export.
        FileError: the thresholds file breaks its schema.
    """
    if not isinstance(thresholds, Thresholds):
        thresholds = Thresholds.load(thresholds)
    cache = find_kv_dtype(kv_dtype)
    chosen, target = find_phases(phases), as_run(find_engine(engine), cache, speculative)
    family = find_gpu(gpu, target)
    served = Served(served_min_len, chunk_size, at_length, cache, speculative, backend)
    guards.check_options(target, chosen, served)
    guards.require_release(target, experimental)
    config = None if model is None else read_model_config(Path(model))
    if target.form == "native":
        notes = () if config is None else tuple(guards.check_model(thresholds, config))
        return Artefact(engine, target.write(Request(thresholds)).text, None, None, notes)
    guards.require_verdict(thresholds)
    guards.require_cache(thresholds, target, cache)
    numbers = expressible(thresholds, target, chosen)
    servers = guards.valid_servers(
        thresholds, target, numbers, family, trust_geometry=trust_geometry, kv_dtype=cache
    )
    elsewhere = guards.other_readers(thresholds, target, numbers, family, servers)
    warnings = [
        f"holds for: {', '.join(server.name for server in servers)}",
        *(
            f"does not hold for {server.name}, which reads this artefact too: {'; '.join(reasons)}"
            for server, reasons in elsewhere
            if server.title not in {valid.title for valid in servers}
        ),
        *guards.unknown_service(numbers, servers, served),
        *guards.check_lengths(thresholds, numbers, servers, served),
        *guards.check_chunks(thresholds, target, numbers, served),
        *(guards.check_model(thresholds, config) if config is not None else ()),
        *guards.low_sparsity(numbers),
    ]
    length = guards.reference_length(target, numbers, served)
    guards.check_config(target, numbers, config)
    request = Request(
        thresholds=thresholds,
        scale_factor=numbers.scale_factor,
        dense_layers=numbers.dense_layers,
        at_length=length,
        gpus=tuple(server.gpu for server in servers),
        # An engine that takes its numbers from another file never evaluates the curve.
        pin=pin or target.config_json == "layers",
        attention_class=None if config is None else config.attention_class,
    )
    written = target.write(request)
    lost, patch = list(written.lost), None
    if config is not None and target.config_json != "nothing" and length is None:
        group, more = config_group(request)
        lost = list(dict.fromkeys([*lost, *more]))
        patch = patch_config(config, group)
    sidecar = _sidecar(thresholds, target, numbers, servers, elsewhere, served, lost, warnings)
    return Artefact(engine, written.text, sidecar, patch, tuple(warnings))


def needed_options(
    thresholds: Thresholds, engine_name: str, gpu: str | None, kv_dtype: str | None = None
) -> list[str]:
    """Options without which an export of a projected file is refused.

    Args:
        thresholds: the projection's file.
        engine_name: the engine that it was projected on.
        gpu: the GPU family that it was projected for, if one was named.
        kv_dtype: the KV cache that it was projected for, if one was named.

    Returns:
        Options as a user types them; what only the user knows is in capitals.
    """
    engine = as_run(find_engine(engine_name), find_kv_dtype(kv_dtype), None)
    numbers = expressible(thresholds, engine, None)
    options = [] if gpu is None else [f"--gpu {gpu}"]
    if kv_dtype is not None:
        options.append(f"--kv-dtype {kv_dtype}")
    if engine.experimental:
        options.append("--experimental")
    if engine.absolute and engine.config_json != "curve":
        options.append("--at-length TOKENS")
    try:
        guards.valid_servers(thresholds, engine, numbers, find_gpu(gpu, engine))
    except UserError:
        options.append("--trust-geometry")
    try:
        guards.check_config(engine, numbers, None)
    except UserError:
        options.append("--model DIR --apply")
    if engine.config_json in ("curve", "all"):
        try:
            config_group(Request(thresholds, numbers.scale_factor, numbers.dense_layers))
        except UserError:
            options.append("--pin")
    return options


def _sidecar(
    thresholds: Thresholds,
    engine: Engine,
    numbers: Numbers,
    servers: Sequence[Server],
    elsewhere: Sequence[tuple[Server, list[str]]],
    served: Served,
    lost: Sequence[str],
    warnings: Sequence[str],
) -> dict[str, Any]:
    floors = {phase: getattr(thresholds.min_kv_len, phase) for phase in numbers.scale_factor}
    notes = dict.fromkeys(note for server in servers for note in server.notes)
    dropped = [
        f"min_kv_len {floors}: the engine does not run shorter requests densely",
        "model, geometry, evidence and provenance: the artefact has no place for them",
    ]
    if thresholds.model.dtype == "float32":
        dropped.append(f"{thresholds.model.dtype}: the engine computes in 16 bits")
    if numbers.dense_layers and any(server.by_name for server in servers):
        dropped.append(
            "layers left dense have transformers' names of their modules, and the engine compares its own: "
            "check in its log that they are dense"
        )
    if served.kv_dtype == "fp8" and thresholds.model.kv_cache_dtype is None:
        dropped.append(
            "the rounding of an FP8 KV cache: the loss was measured without it, and is larger over one (a KL "
            "of 0.006 instead of 0.001 in a 135M model); calibrate with `model.kv_cache_dtype: fp8_e4m3`"
        )
    return {
        "format": "skip-softmax-export/1",
        "engine": engine.name,
        "holds_for": [{"server": server.title, "gpu": server.gpu} for server in servers],
        "does_not_hold_for": [
            {"server": server.title, "gpu": server.gpu, "why": reasons}
            for server, reasons in elsewhere
        ],
        "model": thresholds.model.model_dump(mode="json"),
        "geometry": thresholds.geometry.model_dump(mode="json", exclude_none=True),
        "scale_factor": numbers.scale_factor,
        "dense_layers": list(numbers.dense_layers),
        "min_kv_len": floors,
        "served": {name: given for name, given in asdict(served).items() if given is not None},
        "evidence": {
            "verdict": "passed",
            "budget": thresholds.evidence.get("budget"),
            "loss": numbers.loss,
            "sparsity": numbers.sparsity,
        },
        "lost": [*numbers.lost, *lost, *dropped, *notes],
        "prefix_cache": f"{REUSED if engine.kv_cache else 'no request reuses keys'}; {engine.prefix_cache}",
        "warnings": list(warnings),
        "thresholds_sha256": hashlib.sha256(thresholds.to_yaml().encode()).hexdigest(),
        "provenance": thresholds.provenance,
    }


def _free_name(path: Path) -> Path:
    """A backup never overwrites an older one."""
    candidates = [
        path.with_name(path.name + ".bak"),
        *(path.with_name(f"{path.name}.bak{i}") for i in range(1, 1000)),
    ]
    return next(candidate for candidate in candidates if not candidate.exists())
