"""What a result leaves dense, and why: phases in which no tile is skipped, and layers of the other phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibrate.proof.validate import Attempt
from calibrate.schema import TargetConfig
from calibrate.search.points import BOLDEST, Point, against_budget
from calibrate.statistics.counts import Statistics
from skip_softmax.thresholds.types import Phase

NO_TILE = "no tile can be skipped below the largest scale factor"
NOTHING, COSTS_MORE = "nothing to skip", "skipping costs more than it saves"


def left_dense(
    attempt: Attempt,
    found: Sequence[Point],
    statistics: Statistics,
    target: TargetConfig,
    limits: Mapping[str, float],
    layers: Sequence[int],
) -> dict[str, Any]:
    """What the setting of an attempt leaves dense, for the evidence.

    Args:
        attempt: what is emitted.
        found: the trials as they were measured.
        statistics: of the calibration prompts.
        target: phases, and their largest scale factors.
        limits: the budgets.
        layers: indices of the layers that were calibrated.

    Returns:
        `dense` (per phase: `reason`, and the numbers of `reach`) and `layers_dense` (per phase that skips:
        for each reason its layers); a key is missing where nothing is to be said.
    """
    phases: dict[Phase, dict[str, Any]] = {}
    by_layer: dict[Phase, dict[str, list[int]]] = {}
    for phase, factors in attempt.served.items():
        reached = reach(statistics, phase, target)
        if not any(factors):
            phases[phase] = {"reason": _why(attempt, phase, reached, found, limits), **reached}
            continue
        able = statistics.layer_sparsity(phase, target.largest_scale_factor(phase)).tolist()
        for layer in layers:
            if factors[layer] == 0:
                reason = COSTS_MORE if able[layer] > 0 else NOTHING
                by_layer.setdefault(phase, {}).setdefault(reason, []).append(layer)
    named = {"dense": phases, "layers_dense": by_layer}
    return {key: value for key, value in named.items() if value}


def reach(statistics: Statistics, phase: Phase, target: TargetConfig) -> dict[str, float]:
    """How much a phase could skip at most.

    Returns:
        `most`: sparsity at the largest scale factor that `min_kv_len` allows; `at`: that scale factor
        [tokens]; `first`: where `most` is 0, the smallest scale factor of the statistics that skips a tile
        [tokens], and missing if none below the KV length does.
    """
    at = target.largest_scale_factor(phase)
    found = {"most": statistics.sparsity(phase, at), "at": at}
    if found["most"] == 0:
        edges = statistics.at_edges(phase)
        skipping = edges.scale_factor[edges.skipped.sum((0, 1, 2)) > 0].tolist()
        found |= {"first": skipping[0]} if skipping else {}
    return {key: float(f"{value:.5g}") for key, value in found.items()}


def nothing_skipped(
    statistics: Statistics, target: TargetConfig, limits: Mapping[str, float], pruned: float | None
) -> str:
    """Why a run has no trial that skips a tile, how far away it was, and the cure.

    Args:
        statistics: of the calibration prompts.
        target: phases, and their largest scale factors.
        limits: the budgets.
        pruned: least share of a budget that a pruned trial would have spent; None: none was pruned.
    """
    reached = {phase: reach(statistics, phase, target) for phase in target.phases}
    texts = "; ".join(f"{phase}: {reach_text(numbers)}" for phase, numbers in reached.items())
    if not any(numbers["most"] for numbers in reached.values()):
        return (
            f"no trial skips any tiles: {NO_TILE} in {' or '.join(reached)} ({texts}); raise "
            "`target.min_kv_len`, which limits scale factors, and calibrate on prompts as long"
        )
    if pruned is None:
        return (
            f"no trial skips any tiles: what can be skipped is too little to save time ({texts}); raise "
            "`target.min_kv_len`, which limits scale factors, or calibrate on longer prompts"
        )
    return (
        f"no trial skips any tiles within the budget ({texts}); the nearest of those that were stopped "
        f"early spends at least {pruned:.3g} times the budget; raise `budget.{next(iter(limits))}`, or give "
        "the search more trials"
    )


def reach_text(numbers: Mapping[str, Any]) -> str:
    """The numbers of `reach` in words."""
    text = f"at most {100 * numbers['most']:.3g} % of the tiles at {numbers['at']:g} tokens"
    if "first" in numbers:
        return f"{text}, the first at {numbers['first']:g}"
    return text if numbers["most"] else f"{text}, and none at any threshold below 1"


def _why(
    attempt: Attempt,
    phase: Phase,
    reached: Mapping[str, float],
    found: Sequence[Point],
    limits: Mapping[str, float],
) -> str:
    if reached["most"] == 0:
        return NO_TILE
    if any(attempt.setting[phase]):
        return f"no tile was skipped there on the {attempt.prompts} held-out prompts"
    skipping = [point for point in found if point.sparsity[phase] > 0]
    if not skipping:
        return "no trial that ran to its end skipped a tile there"
    within = [point for point in skipping if point.share(limits) <= BOLDEST]
    if not within:
        nearest = min(skipping, key=lambda point: point.share(limits))
        return (
            "every trial that skipped there cost more than the budget: the nearest had "
            f"{against_budget(nearest, limits, BOLDEST)[1]}"
        )
    fastest = min(within, key=lambda point: point.relative_time)
    if fastest.relative_time >= attempt.relative_time:
        return (
            "no time is saved there: the fastest trial within the budget that skipped there takes "
            f"{fastest.relative_time:.3g} of the dense time, this one {attempt.relative_time:.3g}"
        )
    return "the faster trials that skipped there cost more than what passed on the held-out prompts"
