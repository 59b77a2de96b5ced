"""The law of passing: every loss's upper confidence bound is within its budget, and a phase skips.

Non-inferiority, paired: every prompt is its own control, prompts are the unit that is resampled,
and the upper confidence bound must stay within the budget, not the mean. Several candidates are tried
in an order fixed beforehand, each at the full level (`validate.validate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats as scipy_stats

from calibrate.loss.losses import FINEST, LOSSES
from calibrate.loss.measure import Outcome, sparsity
from calibrate.schema import RunConfig
from skip_softmax.thresholds.types import Phase


@dataclass(frozen=True)
class Bound:
    """A mean with its one-sided upper confidence bound."""

    mean: float
    upper: float
    confidence: float


@dataclass(frozen=True)
class Law:
    """What a setting must meet.

    Attributes:
        limits: budget of each loss that has one.
        confidence: of every bound.
        decode_tokens: longest continuation of a prompt [tokens].
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    limits: dict[str, float]
    confidence: float
    decode_tokens: int
    resamples: int
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Law:
        """A run's law."""
        return cls(
            config.budget.limits,
            config.budget.confidence,
            config.prompts.decode_tokens,
            config.validation.bootstrap,
            config.seed,
        )


@dataclass(frozen=True)
class Verdict:
    """Whether a setting passes.

    Attributes:
        losses: every loss, with its bound.
        sparsity: achieved, per phase.
        reasons: why it does not pass; empty: it does.
    """

    losses: dict[str, Bound]
    sparsity: dict[Phase, float]
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the setting."""
        return not self.reasons

    @property
    def reason(self) -> str | None:
        """All reasons in one line; None: it passes."""
        return "; ".join(self.reasons) or None


def judge(
    outcomes: Sequence[Outcome], phases: Sequence[Phase], law: Law, objections: Sequence[str] = ()
) -> Verdict:
    """Decides whether a setting passes.

    Args:
        outcomes: of the held-out prompts.
        phases: in which tiles may be skipped; in one of them they must be.
        law: budgets and confidence.
        objections: what else speaks against the setting.
    """
    losses = {name: _bound(name, outcomes, law) for name in LOSSES}
    achieved = {phase: sparsity(outcomes, phase) for phase in phases}
    reasons = list(objections)
    if achieved and not any(achieved.values()):
        reasons.append(f"nothing was skipped in {' and '.join(achieved)}")
    for name, limit in law.limits.items():
        loss, bound = LOSSES[name], losses[name]
        if bound.upper > limit:
            reasons.append(
                f"{loss.title} {loss.text(bound.mean)}, upper bound {loss.text(bound.upper)} "
                f"above the budget of {limit:g} {loss.unit}"
            )
    return Verdict(losses, achieved, tuple(reasons))


def ran_dense(outcome: Outcome, law: Law) -> bool:
    """Whether a prompt that must run dense did.

    Two dense kernels differ by rounding, in fp16 by more than nothing; a leak is far larger.
    """
    skipped = sum(sum(layers) for layers in outcome.skipped.values())
    return skipped == 0 and outcome.losses[FINEST] < 0.1 * law.limits[FINEST]


def upper_bound(values: Sequence[float], confidence: float, resamples: int, seed: int) -> Bound:
    """One-sided upper bound of a mean over prompts: bias-corrected bootstrap (scipy, BCa).

    Args:
        values: one per prompt.
        confidence: level of the bound, in (0, 1).
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Mean and bound; a sample whose values are all equal has no spread to resample, so its bound
        is its mean.
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
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )
    return Bound(mean, float(result.confidence_interval.high), confidence)


def _bound(name: str, outcomes: Sequence[Outcome], law: Law) -> Bound:
    values, unseen = [outcome.losses[name] for outcome in outcomes], LOSSES[name].unseen
    assumed = [] if unseen is None else [unseen(law.decode_tokens)]
    bound = upper_bound([*values, *assumed], law.confidence, law.resamples, law.seed)
    return replace(bound, mean=float(np.mean(values)))
