"""Measured settings as points, and the front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from calibrate.loss.losses import LOSSES, largest_share
from calibrate.model.section import Setting
from skip_softmax.thresholds.types import Phase

# Shares of the budget, on the search prompts, at which warm starts aim.
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


def against_budget(point: Point, limits: Mapping[str, float], share: float) -> tuple[str, str]:
    """The loss of which a point spends most of the budget: its name, and beside a share of it in words."""
    losses = point.losses
    name = max(losses.keys() & limits, key=lambda n: losses[n] / limits[n])
    loss = LOSSES[name]
    return name, (
        f"{loss.title} {loss.text(losses[name])} {loss.unit}, where a candidate may have "
        f"{share * limits[name]:g}"
    )
