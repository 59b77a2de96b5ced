"""Numbers from elsewhere (a blog post, another team, an engine's own file) as a thresholds file.

The file is marked as not validated: what its numbers do to a model is not known before
`calibrate validate` has measured it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from calibrate.engines.catalogue import (
    ENGINES,
    find_engine,
    find_gpu,
    find_phases,
    geometry_of,
    servers_for,
    skipping_everywhere,
)
from calibrate.engines.config_json import ignored_layers
from calibrate.engines.types import (
    Engine,
    Foreign,
    Source,
    Votes,
    check_number,
    dropped,
    from_threshold,
)
from calibrate.errors import UserError
from calibrate.model.section import section_of, section_of_folder
from calibrate.schema import GeometryConfig, load_config
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import (
    PHASES,
    Geometry,
    LayerOverride,
    MinKvLen,
    ModelSection,
    Phase,
    ScaleFactors,
)
from skip_softmax.thresholds.yaml_file import user_path


def import_numbers(
    source: str | os.PathLike[str] | None = None,
    *,
    engine: str = "trtllm",
    prefill: float | None = None,
    decode: float | None = None,
    threshold: float | None = None,
    at_length: int | None = None,
    target: float | None = None,
    coefficients: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    gpu: str | None = None,
    phases: Sequence[str] | None = None,
) -> Thresholds:
    """Puts numbers from elsewhere into thresholds for your model.

    The numbers come from one place: `source`, `threshold`, or `prefill` and `decode`.

    Args:
        source: the engine's own file.
        engine: whose file it is, and who will serve; decides the tiles.
        prefill: scale factor [tokens].
        decode: scale factor [tokens].
        threshold: plain threshold in [0, 1); needs `at_length`.
        at_length: KV length that a threshold was meant for [tokens], where its file does not state it.
        target: sparsity in [0, 1] at which a curve is read; None: the file's own, else 0.5.
        coefficients: `config.json` with the curve of a TensorRT-LLM YAML that gives a target only.
        model: your model's folder; it is not loaded.
        config: instead of `model`: the run config that names your model, which is then loaded.
        gpu: GPU family that will serve, for example `sm90`; None: the engine's first.
        phases: `prefill`, `decode` or both; None: both. A phase that is left out is dense.

    Returns:
        The thresholds; `evidence["verdict"]` is `not validated`, `evidence["imported"]["notes"]` says how
        the numbers were read.

    Raises:
        UserError: numbers, options or model are missing or contradict each other.
        FileError: a YAML file is missing or not YAML.
    """
    chosen = find_phases(phases) or PHASES
    factors: dict[Phase, float | None] = {"prefill": prefill, "decode": decode}
    path = None if source is None else user_path(source)
    _require_one_origin(path, threshold, factors)
    serving = find_engine(engine)
    reads = serving.options if path is not None else ()
    for option, value, applies in (
        ("target", target, "target" in reads),
        ("coefficients", coefficients, "coefficients" in reads),
        ("at_length", at_length, threshold is not None or "at_length" in reads),
    ):
        if value is not None and not applies:
            readers = " or ".join(e.name for e in ENGINES.values() if option in e.options)
            plain_too = "--threshold, or " if option == "at_length" else ""
            raise UserError(
                f"--{option.replace('_', '-')} is for {plain_too}a SOURCE of --engine {readers}, but got "
                f"{value} without; leave it out"
            )
    if path is not None:
        curve = None if coefficients is None else user_path(coefficients)
        found = read_artefact(engine, Source(path, chosen, target, curve, at_length))
    elif threshold is not None:
        found = from_threshold(threshold, at_length, chosen)
    else:
        found = plain({phase: factors[phase] for phase in chosen})
    section, geometry = _model(model, config)
    origin = "the command line" if path is None else path.name
    return to_thresholds(found, section, engine, geometry, gpu, origin)


def read_artefact(engine: str, source: Source) -> Foreign:
    """Reads an engine's own file.

    Args:
        engine: whose file it is.
        source: the file; phases that it does not ask for stay dense.

    Returns:
        The numbers.

    Raises:
        UserError: the file gives no number, or one that is not a finite scale factor of 0 or more.
        FileError: it is missing, or not YAML.
    """
    readers = {name: known for name, known in ENGINES.items() if known.read is not None}
    if engine not in readers:
        raise UserError(f"--engine must be one of: {', '.join(readers)}; but got `{engine}`")
    read, numbers = readers[engine].read, readers[engine].numbers
    assert read is not None
    path, phases = source.path, source.phases
    found = read(source)
    factors = {phase: f for phase, f in found.scale_factor.items() if phase in phases}
    if not factors:
        # Dense must be said with a 0: a misspelt name or a foreign file would read as dense too.
        names = [name for phase, name in numbers.items() if phase in phases]
        raise UserError(
            f"{path} must give a number for {' or '.join(phases)}, but none was found under "
            f"{', '.join(dict.fromkeys(names)) or f'any name of {engine}'}; "
            "check the names, --engine and --phase"
        )
    for phase, factor in factors.items():
        check_number(f"{path}: {phase}", factor)
    kept = {phase: factor for phase, factor in factors.items() if factor > 0}
    others = dropped([phase for phase in found.scale_factor if phase not in phases])
    zeros = tuple(f"{phase} is 0: dense" for phase, factor in factors.items() if factor == 0)
    curves = {phase: curve for phase, curve in found.curves.items() if phase in kept}
    return Foreign(kept, found.ignore, found.notes + zeros + others, curves)


def plain(factors: dict[Phase, float | None]) -> Foreign:
    """Scale factors that are given without a file.

    Raises:
        UserError: there are none, or one is not a finite number of 0 or more.
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
    floors = {
        phase: math.floor(factor) + 1 for phase, factor in numbers.scale_factor.items() if factor
    }
    unmatched = [
        pattern for pattern in numbers.ignore if not ignored_layers((pattern,), model.layers)
    ]
    notes = [
        *numbers.notes,
        *(f"not taken over: ignore `{name}`, which names no layer" for name in unmatched),
    ]
    return Thresholds(
        model=model,
        geometry=_geometry(find_engine(engine), gpu, model.head_dim, geometry or GeometryConfig()),
        min_kv_len=MinKvLen(**floors),
        scale_factor=ScaleFactors(**numbers.scale_factor),
        layers=tuple(
            LayerOverride(layer=layer, prefill=0.0, decode=0.0)
            for layer in ignored_layers(numbers.ignore, model.layers)
        ),
        fit={phase: {**curve, "source": source} for phase, curve in numbers.curves.items()},
        evidence={
            "verdict": "not validated",
            "reason": "numbers from elsewhere; `calibrate validate DIR --thresholds FILE` measures them on "
            "your model",
            "imported": {
                "engine": engine,
                "source": source,
                "notes": notes,
                "scale_factor": dict(numbers.scale_factor),
            },
        },
    )


def _require_one_origin(
    source: Path | None, threshold: float | None, factors: dict[Phase, float | None]
) -> None:
    """Numbers of two places would be merged by chance, so only one may be given."""
    given = [f"--{phase}" for phase, factor in factors.items() if factor is not None]
    origins = [
        *([f"SOURCE ({source})"] if source is not None else []),
        *(["--threshold"] if threshold is not None else []),
        *([" and ".join(given)] if given else []),
    ]
    if len(origins) > 1:
        raise UserError(
            f"numbers must come from one place, but got {' and '.join(origins)}; leave out all but one"
        )


def _model(
    folder: str | os.PathLike[str] | None, config: str | os.PathLike[str] | None
) -> tuple[ModelSection, GeometryConfig | None]:
    """The user's model, from its folder, or loaded as a run config says, with that config's tiles."""
    if folder is not None and config is None:
        return section_of_folder(user_path(folder)), None
    if config is not None and folder is None:
        from calibrate.model.load import load

        run = load_config(config)
        # Loaded: only a forward pass shows which layers can be calibrated, and their heads.
        return section_of(load(run.model)), run.geometry
    raise UserError(
        "a thresholds file is valid for one model only: give --model DIR, or --config RUN_CONFIG.yaml"
    )


def _geometry(engine: Engine, gpu: str | None, head_dim: int, tiles: GeometryConfig) -> Geometry:
    """Each phase at the tiles of the first server that runs it; the given ones where nothing is published."""
    given = Geometry(prefill=tiles.prefill, decode=tiles.decode)
    if engine.form != "native":
        given = skipping_everywhere(given)
    prefill, decode = given.prefill, given.decode
    servers = servers_for(engine, find_gpu(gpu, engine))
    for server in servers:
        if isinstance(server.prefill, Votes) and server.prefill.tile_q is not None:
            prefill = geometry_of(server, head_dim, given).prefill
            break
    for server in servers:
        if isinstance(server.decode, Votes) and server.decode.keys(head_dim):
            decode = geometry_of(server, head_dim, given).decode
            break
    return Geometry(prefill=prefill, decode=decode)
