"""What scale factors mean at a KV length: thresholds and expected sparsity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase

if TYPE_CHECKING:
    from calibrate.statistics.counts import Statistics

_TYPICAL = (1024, 4096, 16384, 65536, 131072)


def expectations(
    thresholds: Thresholds, statistics: Statistics | None = None
) -> list[dict[str, Any]]:
    """Scale factor, threshold and expected sparsity per phase and KV length.

    Args:
        thresholds: a thresholds file.
        statistics: tile statistics of a run of the same model and geometry, or None.

    Returns:
        One row per phase and length; sparsity is None where nothing is known.
    """
    rows: list[dict[str, Any]] = []
    layers = range(thresholds.model.layers)
    for phase in PHASES:
        factors = [thresholds.per_head(layer, phase) for layer in layers]
        above = [value for heads in factors for value in heads if value > 0]
        if not above:
            continue
        known: dict[int, tuple[float, str]] = {
            length: (share, "measured, held-out")
            for length, share in _measured(thresholds, phase).items()
        }
        if statistics is not None:
            for index, length in enumerate(statistics.lengths):
                share = statistics.sparsity(phase, [sum(f) / len(f) for f in factors], index)
                known[length] = (share, "from the run's statistics")
        floor = getattr(thresholds.min_kv_len, phase)
        curve = _from_curve(thresholds, phase, above)
        for length in sorted({*known, *_TYPICAL}):
            sparsity, source = known.get(length, (curve, "from the fitted curve"))
            if sparsity is None:
                source = "not known"
            if length < floor:
                sparsity, source = 0.0, f"dense: below min_kv_len {floor}"
            rows.append(
                {
                    "phase": phase,
                    "kv_len": length,
                    "scale_factor": [min(above), max(above)],
                    "threshold": [min(above) / length, max(above) / length],
                    "dense": length < floor,
                    "sparsity": sparsity,
                    "source": source,
                }
            )
    return rows


def _measured(thresholds: Thresholds, phase: Phase) -> dict[int, float]:
    found = thresholds.evidence.get("sparsity", {}).get(phase, {}).get("by_length", {})
    return {int(length): row["achieved"] for length, row in found.items()}


def _from_curve(thresholds: Thresholds, phase: Phase, above: list[float]) -> float | None:
    """The fitted curve's answer for one number, inside the range it was fitted on."""
    fit = thresholds.fit.get(phase, {})
    span = fit.get("good", fit.get("sparsity_range"))
    if not {"a", "b"} <= set(fit) or span is None or len(set(above)) > 1:
        return None
    low, high = span
    sparsity = (math.log(above[0]) - math.log(fit["a"])) / fit["b"]
    return sparsity if low <= sparsity <= high else None
