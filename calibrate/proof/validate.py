"""The proof on held-out prompts: is the loss of a setting, run as it will be served, within the budget?

Non-inferiority, paired: every prompt is its own control, prompts are the unit that is resampled,
and the upper confidence bound must stay within the budget, not the mean. When several candidates
are tried, each is held to a stricter level (Bonferroni), so that trying more does not make a false
pass more likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from calibrate.loss.measure import Outcome, sparsity
from calibrate.model.section import Setting
from calibrate.prompts.build import Prompt
from calibrate.schema import BudgetConfig, RunConfig
from calibrate.search.points import Point
from calibrate.statistics.counts import Statistics
from skip_softmax.thresholds.types import Phase


@dataclass(frozen=True)
class Bound:
    """A mean with its one-sided upper confidence bound."""

    mean: float
    upper: float
    confidence: float


@dataclass(frozen=True)
class Attempt:
    """One candidate on the held-out prompts.

    Attributes:
        name: where the candidate came from.
        setting: scale factors per phase and layer.
        kl: loss [nats/token].
        score_drop: dense score minus sparse score [points].
        passed: whether both bounds are within the budget and tiles were skipped in every phase.
        reason: why not.
        relative_time: predicted attention time relative to dense, weighted over phases.
        sparsity: achieved, per phase.
        by_length: per phase and length: target (from the statistics) and achieved sparsity.
        by_task: mean KL and score drop per task.
        prompts: how many held-out prompts.
    """

    name: str
    setting: Setting
    kl: Bound
    score_drop: Bound
    passed: bool
    reason: str | None
    relative_time: float
    sparsity: dict[Phase, float]
    by_length: dict[Phase, dict[int, dict[str, float]]]
    by_task: dict[str, dict[str, float]]
    prompts: int


@dataclass(frozen=True)
class Validation:
    """What the validation found.

    Attributes:
        attempts: candidates in the order they were tried; at most the last one passed.
        baseline: the best single scale factor per phase on the same prompts: the first that passed, or
            the last that did not; None if no such trial fits.
        short_prompt: the check that requests below `min_kv_len` run dense, or None if it was not
            asked for.
    """

    attempts: tuple[Attempt, ...]
    baseline: Attempt | None
    short_prompt: dict[str, Any] | None

    @property
    def passed(self) -> bool:
        """Whether a candidate met the budget and short prompts came out dense."""
        short_ok = self.short_prompt is None or bool(self.short_prompt["dense"])
        return bool(self.attempts) and self.attempts[-1].passed and short_ok

    def to_json(self) -> dict[str, Any]:
        """Plain data for `validation.json`."""
        return {**asdict(self), "passed": self.passed}


def validate(
    candidates: Sequence[Point],
    baselines: Sequence[Point],
    prompts: Sequence[Prompt],
    evaluate: Callable[[Setting, Prompt], Outcome],
    statistics: Statistics,
    config: RunConfig,
    short: Prompt | None,
) -> Validation:
    """Tries candidates in order until one passes, and then the points with one number per phase.

    Args:
        candidates: from `search.candidates`.
        baselines: from `search.uniform_candidates`.
        prompts: held-out prompts.
        evaluate: runs one prompt with a setting.
        statistics: of the calibration prompts, for the target sparsities.
        config: the run config.
        short: a prompt below `min_kv_len`, or None.

    Returns:
        Attempts, baseline and short-prompt check.
    """

    def attempted(points: Sequence[Point]) -> list[Attempt]:
        # Each of several attempts is held to a stricter level; one attempt to the level itself.
        confidence = 1.0 - (1.0 - config.budget.confidence) / max(len(points), 1)
        attempts: list[Attempt] = []
        for point in points:
            outcomes = [evaluate(point.setting, prompt) for prompt in prompts]
            attempts.append(judge(point, outcomes, statistics, config, confidence))
            if attempts[-1].passed:
                break
        return attempts

    attempts, compared = attempted(candidates), attempted(baselines)
    checked = None
    if short is not None and attempts:
        outcome = evaluate(attempts[-1].setting, short)
        skipped = sum(sum(layers) for layers in outcome.skipped.values())
        checked = {
            "tokens": len(short.ids),
            "skipped_tiles": skipped,
            "kl": outcome.kl,
            # Two dense kernels differ by rounding, in fp16 by more than nothing; a leak is far larger.
            "dense": skipped == 0 and outcome.kl < 0.1 * config.budget.kl,
        }
    return Validation(tuple(attempts), compared[-1] if compared else None, checked)


def judge(
    point: Point,
    outcomes: Sequence[Outcome],
    statistics: Statistics,
    config: RunConfig,
    confidence: float,
) -> Attempt:
    """Turns outcomes on held-out prompts into a verdict."""
    drops = [outcome.dense_score - outcome.score for outcome in outcomes]
    kl = upper_bound([outcome.kl for outcome in outcomes], confidence, config)
    # A sample without any change still proves only so much: one more prompt, one token worse, is
    # assumed.
    drop = upper_bound([*drops, 100.0 / config.prompts.decode_tokens], confidence, config)
    drop = Bound(float(np.mean(drops)), drop.upper, confidence)
    achieved: dict[Phase, float] = {
        phase: sparsity(outcomes, phase) for phase in config.target.phases
    }
    reason = _why_not(kl, drop, achieved, config.budget)
    tasks = sorted({outcome.task for outcome in outcomes})
    return Attempt(
        name=point.name,
        setting=point.setting,
        kl=kl,
        score_drop=drop,
        passed=reason is None,
        reason=reason,
        relative_time=point.relative_time,
        sparsity=achieved,
        by_length={
            phase: {
                length: {
                    "target": statistics.sparsity(phase, point.setting[phase], index),
                    "achieved": sparsity([o for o in outcomes if o.length == length], phase),
                }
                for index, length in enumerate(statistics.lengths)
            }
            for phase in config.target.phases
        },
        by_task={
            task: {
                "kl": float(np.mean([o.kl for o in outcomes if o.task == task])),
                "score_drop": float(
                    np.mean([o.dense_score - o.score for o in outcomes if o.task == task])
                ),
                "dense_score": float(np.mean([o.dense_score for o in outcomes if o.task == task])),
                "prompts": sum(o.task == task for o in outcomes),
            }
            for task in tasks
        },
        prompts=len(outcomes),
    )


def upper_bound(values: Sequence[float], confidence: float, config: RunConfig) -> Bound:
    """One-sided upper bound of a mean over prompts: bias-corrected bootstrap (scipy, BCa).

    Args:
        values: one per prompt.
        confidence: level of the bound.
        config: resamples and seed.

    Returns:
        Mean and bound; a sample whose values are all equal has no spread to resample, its bound is
        its mean.
    """
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Bound(mean, mean, confidence)
    result = scipy_stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=confidence,
        alternative="less",
        method="BCa",
        n_resamples=config.validation.bootstrap,
        rng=np.random.default_rng(config.seed),
    )
    return Bound(mean, float(result.confidence_interval.high), confidence)


def _why_not(
    kl: Bound, drop: Bound, achieved: dict[Phase, float], budget: BudgetConfig
) -> str | None:
    dense = [phase for phase, share in achieved.items() if share <= 0]
    if dense:
        return f"nothing was skipped in {' and '.join(dense)}"
    if kl.upper > budget.kl:
        return f"KL {kl.mean:.3g}, upper bound {kl.upper:.3g} above the budget of {budget.kl:g} nats/token"
    if budget.score_drop is not None and drop.upper > budget.score_drop:
        return (
            f"score drop {drop.mean:.2f}, upper bound {drop.upper:.2f} "
            f"above the budget of {budget.score_drop:g} points"
        )
    return None
