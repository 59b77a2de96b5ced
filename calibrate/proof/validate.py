"""The proof on held-out prompts: is the loss of a setting, run as it will be served, within the budget?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from calibrate.loss.losses import FINEST, LOSSES
from calibrate.loss.measure import Outcome, mean_losses, sparsity
from calibrate.model.section import Setting
from calibrate.prompts.build import Prompt
from calibrate.proof.verdict import Bound, Failing, Law, Verdict, judge, ran_dense
from calibrate.search.points import Point, dense_where_idle
from calibrate.statistics.counts import Statistics
from skip_softmax.thresholds.types import Phase


@dataclass(frozen=True)
class Attempt:
    """One candidate on the held-out prompts.

    Attributes:
        name: where the candidate came from.
        setting: scale factors per phase and layer.
        losses: every loss that a prompt shows, with its bound.
        passed: the verdict.
        reason: why it did not pass.
        relative_time: predicted attention time of `served` relative to dense, weighted over phases.
        sparsity: achieved, per phase.
        by_length: per phase and length: target (see `targets`) and achieved sparsity.
        by_task: mean losses and dense scores per task.
        prompts: how many held-out prompts.
        failing: those that lose their answer; None: an earlier version did not count them.
    """

    name: str
    setting: Setting
    losses: dict[str, Bound]
    passed: bool
    reason: str | None
    relative_time: float
    sparsity: dict[Phase, float]
    by_length: dict[Phase, dict[int, dict[str, float]]]
    by_task: dict[str, dict[str, float]]
    prompts: int
    failing: Failing | None = None

    @property
    def served(self) -> Setting:
        """What a file may hold of the setting: dense in each phase in which no tile was skipped."""
        return dense_where_idle(self.setting, self.sparsity)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with each loss under its own name."""
        row = asdict(self)
        return {**row.pop("losses"), **row}


def _gathered(row: Any) -> Any:
    """What `Attempt.to_json` wrote, with the losses in one place again."""
    if not isinstance(row, dict):
        return row
    return {
        **row,
        "losses": {name: row.get(name) for name in LOSSES if name in row or name == FINEST},
    }


_Stored = Annotated[Attempt, BeforeValidator(_gathered)]


@dataclass(frozen=True)
class Validation:
    """What the validation found.

    Attributes:
        attempts: candidates in the order they were tried.
        baseline: the best single scale factor per phase on the same prompts, found in the same way;
            None if no trial with one number was within the budget.
        short_prompt: the check that requests below `min_kv_len` run dense; None: not asked for.
    """

    attempts: tuple[_Stored, ...]
    baseline: _Stored | None
    short_prompt: dict[str, Any] | None

    @property
    def chosen(self) -> Attempt | None:
        """The last candidate that passed, or if none did the last that was tried; None: none was."""
        return _chosen(self.attempts)

    @property
    def passed(self) -> bool:
        """Whether a candidate met the budget and short prompts came out dense."""
        short_ok = self.short_prompt is None or bool(self.short_prompt["dense"])
        return self.chosen is not None and self.chosen.passed and short_ok

    def to_json(self) -> dict[str, Any]:
        """Plain data for `validation.json`."""
        return {
            "attempts": [attempt.to_json() for attempt in self.attempts],
            "chosen": self.attempts.index(self.chosen) if self.chosen else None,
            "baseline": self.baseline and self.baseline.to_json(),
            "short_prompt": self.short_prompt,
            "passed": self.passed,
        }


def validate(
    candidates: Sequence[Point],
    baselines: Sequence[Point],
    prompts: Sequence[Prompt],
    evaluate: Callable[[Setting, Prompt], Outcome],
    statistics: Statistics,
    law: Law,
    short: Prompt | None,
    relative_time: Callable[[Setting], float],
    searched: Statistics | None = None,
) -> Validation:
    """Tries candidates from safe to bold until one fails, and then the points with one number per phase.

    Fixed-sequence testing (Learn then Test, arXiv 2110.01052, section 3.2): the order was fixed before any
    held-out prompt was seen, and nothing behind the first failure is believed, so every test has the whole
    level and the last candidate that passed breaks the promise no more often than one test would.

    Args:
        candidates: from `points.candidates`, the safest first.
        baselines: from `points.uniform_candidates`, the safest first.
        prompts: held-out prompts.
        evaluate: runs one prompt with a setting.
        statistics: of the calibration prompts, see `targets`.
        law: what each candidate must meet.
        short: a prompt below `min_kv_len`, or None.
        relative_time: of a setting, as `Space.relative_time`.
        searched: of the search prompts, see `targets`.

    Returns:
        Attempts, baseline and short-prompt check.
    """

    def attempted(points: Sequence[Point]) -> list[Attempt]:
        attempts: list[Attempt] = []
        for point in points:
            outcomes = [evaluate(point.setting, prompt) for prompt in prompts]
            verdict = judge(outcomes, tuple(point.setting), law)
            served = dense_where_idle(point.setting, verdict.sparsity)
            if served != point.setting:
                point = replace(point, relative_time=relative_time(served))
            target = targets(point, statistics, searched)
            attempts.append(_attempt(point, outcomes, target, verdict))
            if not attempts[-1].passed:
                break
        return attempts

    attempts, compared = attempted(candidates), attempted(baselines)
    chosen, checked = _chosen(attempts), None
    if short is not None and chosen is not None:
        outcome = evaluate(chosen.setting, short)
        checked = {
            "tokens": len(short.ids),
            "skipped_tiles": sum(sum(layers) for layers in outcome.skipped.values()),
            FINEST: outcome.losses[FINEST],
            "dense": ran_dense(outcome, law),
        }
    return Validation(tuple(attempts), _chosen(compared), checked)


def targets(
    point: Point, statistics: Statistics, searched: Statistics | None = None
) -> dict[Phase, dict[int, float]]:
    """The sparsity to expect of a setting on new prompts.

    What dense runs count is a little too much: layers that skip leave later layers less to skip. How much
    less, the search prompts tell, whose tiles were counted and which were also run with the setting.

    Args:
        point: the setting, with its sparsity on the search prompts.
        statistics: of the calibration prompts.
        searched: of the search prompts; None: not counted, and nothing is taken off.

    Returns:
        Per phase and length of the statistics, in [0, 1].
    """
    counted = statistics if searched is None else statistics.merge(searched)
    found: dict[Phase, dict[int, float]] = {}
    for phase, factors in point.setting.items():
        moved = 0.0
        if searched is not None:
            moved = point.sparsity[phase] - searched.sparsity(phase, factors)
        shares = [counted.sparsity(phase, factors, i) for i in range(len(counted.lengths))]
        found[phase] = {
            length: min(max(share + moved, 0.0), 1.0)
            for length, share in zip(counted.lengths, shares, strict=True)
        }
    return found


def _chosen(attempts: Sequence[Attempt]) -> Attempt | None:
    # Earlier versions went from bold to safe, and the last one tried was the one that passed.
    passed = [attempt for attempt in attempts if attempt.passed]
    return (passed or [*attempts])[-1] if attempts else None


def _attempt(
    point: Point,
    outcomes: Sequence[Outcome],
    target: dict[Phase, dict[int, float]],
    verdict: Verdict,
) -> Attempt:
    return Attempt(
        name=point.name,
        setting=point.setting,
        losses=verdict.losses,
        passed=verdict.passed,
        reason=verdict.reason,
        relative_time=point.relative_time,
        sparsity=verdict.sparsity,
        by_length={
            phase: {
                length: {
                    "target": share,
                    "achieved": sparsity([o for o in outcomes if o.length == length], phase),
                }
                for length, share in target[phase].items()
            }
            for phase in point.setting
        },
        by_task={
            task: _task([outcome for outcome in outcomes if outcome.task == task])
            for task in sorted({outcome.task for outcome in outcomes})
        },
        prompts=len(outcomes),
        failing=verdict.failing,
    )


def _task(outcomes: Sequence[Outcome]) -> dict[str, float]:
    generated = [o.dense_generated for o in outcomes if o.dense_generated is not None]
    return {
        **mean_losses(outcomes),
        "dense_score": float(np.mean([o.dense_score for o in outcomes])),
        **({"dense_generated": float(np.mean(generated))} if generated else {}),
        "prompts": len(outcomes),
    }
