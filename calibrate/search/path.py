"""The path from safe to bold: settings between and beyond the measured ones, for the proof to walk.

A path is the line through one measured setting: all its scale factors, times the same power of two. The
bolder of two settings on it skips whatever the safer one skips. Nothing on it has to be measured on the
search prompts again: the predicted losses say by how much a step changes the measured one, and no estimate
contradicts another measured setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrate.errors import WorkFailed
from calibrate.model.section import Setting
from calibrate.search.points import Point, against_budget, dense_where_idle, front
from calibrate.search.space import Space

_OCTAVES = 8.0  # how far a setting may lie from the measured one
_FARTHEST = 4.0  # budgets that the measured setting may have spent
_LEAST_SHARE = 1e-6  # of a budget: what lost nothing on the search prompts has a path too
_HALVINGS = 20  # of that range: 2e-5 octaves


@dataclass(frozen=True)
class Candidate:
    """A setting to prove on the held-out prompts.

    Attributes:
        of: the measured point through which its path goes.
        setting: scale factors per phase and layer.
        share: the largest share of any budget that it is expected to spend: what the point spent on the
            search prompts, times the ratio of their predicted losses, and no less than what points spent that
            skip less; None: it was not tried there.
        relative_time: predicted attention time relative to dense.
    """

    of: Point
    setting: Setting
    share: float | None
    relative_time: float

    @property
    def name(self) -> str:
        """Where the path comes from: the name of the measured point."""
        return self.of.name


def candidates(
    points: Sequence[Point],
    space: Space,
    limits: Mapping[str, float],
    shares: Sequence[float],
    provable: float,
) -> list[Candidate]:
    """What the validation should try, in order: settings on the fastest path, at rising shares of the budget.

    The order is fixed before any held-out prompt is seen, as fixed-sequence testing requires
    (`validate.validate`).

    Args:
        points: measured settings.
        space: predicts losses and times.
        limits: the budgets.
        shares: of the budget, rising.
        provable: the share at which paths are compared: about where the proof will end.

    Returns:
        Candidates, the safest first; each skips more tiles and is faster than the one before, and than dense.

    Raises:
        WorkFailed: nothing skips any tiles within the budget, or nothing that does is faster than dense.
    """
    found = walked(points, space, limits, shares, provable)
    if not found:
        measured = _Measured.of(points, limits)
        near = _near(points, limits)
        steps = [_step(point, space, limits, shares[-1], measured) for point in near]
        times = [step.relative_time for step in steps if step is not None]
        if times:
            raise WorkFailed(
                "no setting within the budget is predicted faster than dense: the fastest takes "
                f"{min(times):.4g} of the dense attention time; skipping does not pay here: raise the "
                "budget, calibrate on longer prompts, or name the device that serves with `cost.device`"
            )
        raise WorkFailed(
            f"no trial skips any tiles within the budget: {_nearest(points, limits, shares[-1])}, or give "
            "the search more trials"
        )
    return found


def walked(
    points: Sequence[Point],
    space: Space,
    limits: Mapping[str, float],
    shares: Sequence[float],
    provable: float,
) -> list[Candidate]:
    """As `candidates`, but empty if there is none."""
    measured = _Measured.of(points, limits)
    ends = [
        end
        for point in front(_near(points, limits), limits)
        if (end := _step(point, space, limits, provable, measured)) is not None
    ]
    if not ends:
        return []
    best = min(ends, key=lambda end: end.relative_time).of
    itself = Candidate(best, best.setting, best.share(limits), best.relative_time)
    # Nothing is tried first that is bolder than what was measured.
    steps = [itself] if best.share(limits) < shares[0] else []
    for share in shares:
        step = _step(best, space, limits, share, measured)
        if step is not None:
            steps.append(step)
    found: list[Candidate] = []
    for step in steps:
        if step.relative_time < (found[-1].relative_time if found else 1.0):
            found.append(step)
    return found


def _near(points: Sequence[Point], limits: Mapping[str, float]) -> list[Point]:
    """Points whose path can be believed near the budget."""
    return [point for point in points if point.skips and point.share(limits) <= _FARTHEST]


@dataclass(frozen=True)
class _Measured:
    """All measured settings, to hold estimates against: what skips more does not lose less.

    Attributes:
        factors: scale factors of each point, phase by phase [points, phases x layers].
        shares: of the budget, of each point.
    """

    factors: NDArray[np.float64]
    shares: NDArray[np.float64]

    @classmethod
    def of(cls, points: Sequence[Point], limits: Mapping[str, float]) -> _Measured:
        """The points as arrays."""
        rows = [_flat(point.setting) for point in points]
        return cls(np.array(rows), np.array([point.share(limits) for point in points]))

    def at_least(self, setting: Setting) -> float:
        """The most that a point has spent which skips nothing that the setting does not skip."""
        return float(self.shares[(self.factors <= _flat(setting)).all(1)].max(initial=0.0))


def _flat(setting: Setting) -> list[float]:
    return [factor for phase in sorted(setting) for factor in setting[phase]]


def _step(
    point: Point, space: Space, limits: Mapping[str, float], share: float, measured: _Measured
) -> Candidate | None:
    """The setting on a point's path that should spend a share of the budget; None: it would skip nothing."""
    spent = max(point.share(limits), _LEAST_SHARE)
    predicted = _predicted(space, point.setting)
    if predicted == 0:
        return None

    def expected(octaves: float) -> float:
        setting = _shifted(point, space, octaves)
        return max(spent * _predicted(space, setting) / predicted, measured.at_least(setting))

    low, high = -_OCTAVES, _OCTAVES
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) <= share else (low, middle)
    setting = _shifted(point, space, low)
    skipped = {phase: space.statistics.sparsity(phase, f) for phase, f in setting.items()}
    if not any(skipped.values()):
        return None
    setting = dense_where_idle(setting, skipped)
    return Candidate(point, setting, expected(low), space.relative_time(setting))


def _shifted(point: Point, space: Space, octaves: float) -> Setting:
    """All scale factors of a point times a power of two, none above the largest that is allowed."""
    return {
        phase: tuple(
            float(f"{min(factor * 2**octaves, space.target.largest_scale_factor(phase)):.5g}")
            for factor in factors
        )
        for phase, factors in point.setting.items()
    }


def _predicted(space: Space, setting: Setting) -> float:
    return sum(space.predicted_loss(setting).values())


def _nearest(points: Sequence[Point], limits: Mapping[str, float], share: float) -> str:
    """How far the nearest point that skips is from the budget, and which budget to raise."""
    useful = [point for point in points if point.skips]
    if not useful:
        return f"none that ran to its end skips; raise `budget.{next(iter(limits))}`"
    name, text = against_budget(min(useful, key=lambda p: p.share(limits)), limits, share)
    return f"the nearest one that skips has {text}; raise `budget.{name}`"
