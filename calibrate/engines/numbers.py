"""What of a thresholds file an engine can express, with the measurement that covers exactly this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from calibrate.engines.catalogue import ENGINES
from calibrate.engines.types import Engine
from calibrate.errors import UserError
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase

_AND_IGNORE = {"scalar": "", "scalar+ignore": " and layers left dense", "native": ""}


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
    chosen = tuple(phases or engine.numbers)
    uncalibrated = tuple(sorted(entry.layer for entry in thresholds.uncalibrated))
    if uncalibrated and engine.form == "scalar":
        able = [known.name for known in ENGINES.values() if known.form == "scalar+ignore"]
        raise UserError(
            f"layers {list(uncalibrated)} cannot be calibrated and must stay dense, but {engine.title} skips "
            f"in every layer; use an engine with an ignore list ({', '.join(able)}) or native"
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
                f"{engine.title} takes one number per phase{_AND_IGNORE[engine.form]}, but the file's "
                "numbers differ by layer, and nothing that it can express was measured. Run "
                f"`calibrate project RUN_DIR --engine {engine.name}`, then export the file that it writes"
            )
        factors, dense = (
            {p: f for p, f in file_numbers.items() if f > 0 and p in chosen},
            uncalibrated,
        )
        loss, sparsity = best["loss"], best["sparsity"]
        lost.append(
            "numbers per layer: the artefact has the best single number per phase, measured on the same "
            f"held-out prompts; `calibrate project` looks for more that {engine.title} can express"
        )
    if not factors:
        raise UserError(
            f"an export needs a scale factor above 0 in {' or '.join(chosen)}, but the file leaves "
            f"{'it' if len(chosen) == 1 else 'both'} dense, so there is nothing to export; leave the "
            "engine's setting unset"
        )
    numbered = {phase for phase in PHASES if _any_number(thresholds, phase)}
    lost += [
        f"{phase}: {engine.title} has no kernel that skips there, so it stays dense"
        for phase in PHASES
        if phase in numbered and phase not in engine.numbers
    ]
    if set(factors) != numbered:
        lost.append(
            "the loss was measured with both phases skipping; this artefact skips in one only"
        )
    return Numbers(factors, dense, loss, {p: sparsity.get(p, {}) for p in factors}, lost)


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
