"""Measured settings as points: the front, and which of them to prove."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from calibrate.errors import WorkFailed
from calibrate.loss.losses import LOSSES, largest_share
from calibrate.model.section import Setting
from skip_softmax.thresholds.types import Phase

# Shares of the budget, on the search prompts, of the safest and the boldest candidate. The safest one must
# pass or nothing does: of 28 calibrations that began at 0.3 with 24 held-out prompts, 8 ended there, with an
# upper bound 3 to 6 times the mean (`notebooks/studies/calibrations.json`).
SAFEST, BOLDEST = 0.1, 1.0
MIDDLE = (SAFEST + BOLDEST) / 2


@dataclass(frozen=True)
class Point:
    """A setting, measured on the search prompts.

    Attributes:
        name: `analytic`, `uniform`, `prefill alone`, `decode alone` (warm starts), `search` or `projection`.
        setting: scale factors per phase and layer.
        losses: mean over the search prompts that show each; a trial of an earlier version has its KL only.
        relative_time: predicted attention time relative to dense.
        sparsity: achieved on the search prompts, per phase.
    """

    name: str
    setting: Setting
    losses: dict[str, float]
    relative_time: float
    sparsity: dict[Phase, float]

    def share(self, limits: Mapping[str, float]) -> float:
        """The largest share of any budget that the setting spends."""
        return largest_share(self.losses, limits)

    @property
    def skips(self) -> bool:
        """Whether tiles were skipped in any phase of the setting."""
        return any(self.sparsity[phase] > 0 for phase in self.setting)

    def without_idle(self, relative_time: Callable[[Setting], float]) -> Point:
        """The same point, dense in each phase in which it skipped nothing.

        Without skipping the outputs are those of the dense kernel, so what was measured still holds.

        Args:
            relative_time: of a setting, as `Space.relative_time`.
        """
        setting = dense_where_idle(self.setting, self.sparsity)
        if setting == self.setting:
            return self
        return replace(self, setting=setting, relative_time=relative_time(setting))


def dense_where_idle(setting: Setting, sparsity: Mapping[Phase, float]) -> Setting:
    """A setting with 0 throughout each phase whose measured sparsity is 0."""
    return {
        phase: factors if sparsity[phase] > 0 else (0.0,) * len(factors)
        for phase, factors in setting.items()
    }


def front(points: Sequence[Point], limits: Mapping[str, float]) -> list[Point]:
    """Points that no other point beats in both share of the budget and time, fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.relative_time, p.share(limits))):
        if not best or point.share(limits) < best[-1].share(limits):
            best.append(point)
    return best


def candidates(points: Sequence[Point], limits: Mapping[str, float], attempts: int) -> list[Point]:
    """What the validation should try, in order: the fastest point within each of rising shares of the budget.

    A point that is predicted no faster than the dense kernel is none.

    The order and the number are fixed before any held-out prompt is seen, as fixed-sequence testing
    requires (`validate.validate`).

    Args:
        points: measured settings.
        limits: the budgets.
        attempts: how many candidates at most.

    Returns:
        Points, the safest first; each spends more of the budget and is faster than the one before.

    Raises:
        WorkFailed: no point skips any tiles within the budget, or none that does is faster than dense.
    """
    chosen = _within_shares(points, limits, attempts)
    if not chosen:
        boldest = _shares(attempts)[-1]
        within = [p for p in points if p.skips and p.share(limits) <= boldest]
        if within:
            least = min(point.relative_time for point in within)
            raise WorkFailed(
                f"no trial within the budget is predicted faster than dense: the fastest takes {least:.4g} "
                "of the dense attention time; skipping does not pay here: raise the budget, calibrate on "
                "longer prompts, or name the device that serves with `cost.device`"
            )
        raise WorkFailed(
            f"no trial skips any tiles within the budget: {_nearest(points, limits, boldest)}, or give "
            "the search more trials"
        )
    return chosen


def uniform_candidates(
    points: Sequence[Point], limits: Mapping[str, float], attempts: int
) -> list[Point]:
    """As `candidates`, of the points with one number per phase; empty if none skips within the budget."""
    return _within_shares([p for p in points if p.name == "uniform"], limits, attempts)


def _within_shares(
    points: Sequence[Point], limits: Mapping[str, float], attempts: int
) -> list[Point]:
    chosen: list[Point] = []
    for share in _shares(attempts):
        within = [
            p for p in points if p.skips and p.relative_time < 1.0 and p.share(limits) <= share
        ]
        fastest = min(within, key=lambda p: (p.relative_time, p.share(limits)), default=None)
        if fastest is not None and fastest not in chosen:
            chosen.append(fastest)
    return chosen


def _shares(attempts: int) -> list[float]:
    """Shares of the budget that the candidates may spend, rising; a single one takes the middle."""
    if attempts == 1:
        return [MIDDLE]
    return [SAFEST + (BOLDEST - SAFEST) * i / (attempts - 1) for i in range(attempts)]


def _nearest(points: Sequence[Point], limits: Mapping[str, float], share: float) -> str:
    """How far the nearest point that skips is from the budget, and which budget to raise."""
    useful = [point for point in points if point.skips]
    if not useful:
        return f"none that ran to its end skips; raise `budget.{next(iter(limits))}`"
    name, text = against_budget(min(useful, key=lambda p: p.share(limits)), limits, share)
    return f"the nearest one that skips has {text}; raise `budget.{name}`"


def against_budget(point: Point, limits: Mapping[str, float], share: float) -> tuple[str, str]:
    """The loss of which a point spends most of the budget: its name, and beside a share of it in words."""
    losses = point.losses
    name = max(losses.keys() & limits, key=lambda n: losses[n] / limits[n])
    loss = LOSSES[name]
    return name, (
        f"{loss.title} {loss.text(losses[name])} {loss.unit}, where a candidate may have "
        f"{share * limits[name]:g}"
    )
