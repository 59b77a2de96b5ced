"""Finished trials as points: the front, and which of them to prove."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from calibrate.errors import WorkFailed
from calibrate.model.section import Setting
from calibrate.record.interrupts import held_back
from calibrate.schema import RunConfig
from skip_softmax.thresholds.types import Phase


@dataclass(frozen=True)
class Point:
    """A finished trial.

    Attributes:
        name: `analytic`, `uniform` (warm starts) or `search`.
        setting: scale factors per phase and layer.
        kl: mean over the search prompts [nats/token].
        relative_time: predicted attention time relative to dense.
        sparsity: achieved on the search prompts, per phase.
    """

    name: str
    setting: Setting
    kl: float
    relative_time: float
    sparsity: dict[Phase, float]


@held_back()
def points(study: optuna.Study) -> list[Point]:
    """All completed trials, in the order they were made."""
    return [
        _point(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def front(candidates: Sequence[Point]) -> list[Point]:
    """Points that no other point beats in both loss and time, fastest first."""
    best: list[Point] = []
    for point in sorted(candidates, key=lambda p: (p.relative_time, p.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def candidates(all_points: Sequence[Point], config: RunConfig) -> list[Point]:
    """What the validation should try: the fastest points within shrinking shares of the budget.

    The search prompts are few, and the winner was chosen on them, so its loss there is too good:
    the first candidate already keeps a margin.

    Args:
        all_points: completed trials.
        config: budget, phases, number of attempts.

    Returns:
        At most `validation.attempts` points, the fastest first.

    Raises:
        WorkFailed: no point skips anything in every phase within the budget.
    """
    useful = _skipping(all_points, config)
    chosen = _within_shares(useful, config)
    if not chosen:
        least = min((p.kl for p in useful), default=None)
        raise WorkFailed(
            "no trial skips tiles in every phase within the budget: the smallest loss of one that skips is "
            f"{'unknown (none skips)' if least is None else f'{least:.3g} nats/token'}, the budget is "
            f"{config.budget.kl:g}; raise `budget.kl`, or give the search more trials"
        )
    return chosen


def uniform_candidates(all_points: Sequence[Point], config: RunConfig) -> list[Point]:
    """As `candidates`, of the points with one number per phase; empty where none skips within the budget."""
    uniform = [point for point in all_points if point.name == "uniform"]
    return _within_shares(_skipping(uniform, config), config)


def _skipping(all_points: Sequence[Point], config: RunConfig) -> list[Point]:
    return [p for p in all_points if all(p.sparsity[phase] > 0 for phase in config.target.phases)]


def _within_shares(useful: Sequence[Point], config: RunConfig) -> list[Point]:
    """The fastest point within each of shrinking shares of the budget."""
    chosen: list[Point] = []
    for attempt in range(config.validation.attempts):
        share = 0.7 * 0.5**attempt
        within = [p for p in useful if p.kl <= share * config.budget.kl and p not in chosen]
        if within:
            chosen.append(min(within, key=lambda p: (p.relative_time, p.kl)))
    return chosen


def _setting(trial: FrozenTrial) -> Setting:
    return {phase: tuple(factors) for phase, factors in trial.user_attrs["setting"].items()}


def _point(trial: FrozenTrial) -> Point:
    attributes: dict[str, Any] = trial.user_attrs
    return Point(
        name=attributes.get("name", "search"),
        setting=_setting(trial),
        kl=trial.values[0],
        relative_time=trial.values[1],
        sparsity=attributes["sparsity"],
    )
