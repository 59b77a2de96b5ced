"""The law of passing: every loss's upper confidence bound is within its budget, and a phase skips.

Non-inferiority, paired: every prompt is its own control, and the upper confidence bound must stay
within the budget, not the mean; `bounds` says what each bound assumes. Several candidates are tried
in an order fixed beforehand, each at the full level, and each at several looks (`plan`, `validate.validate`).

Several losses are proven jointly at the full level each: a setting passes only if all of them do, so if it
breaks a promise, that promise's own test must have erred (intersection-union test, Berger 1982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibrate.errors import UserError
from calibrate.loss.losses import FINEST, LOSSES
from calibrate.loss.measure import Outcome, by_loss, sparsity
from calibrate.prompts.build import with_answer
from calibrate.proof.bounds import (
    bounded_upper,
    failing_share_upper,
    lognormal_upper,
    prompts_needed,
)
from calibrate.schema import RunConfig
from skip_softmax.thresholds.types import Phase

NEGLIGIBLE = 0.01
"""Losses below this share of the budget count as this much: they may be 0, and how far below they are
would otherwise pass for spread. It adds at most 1 % of the budget to the mean."""


@dataclass(frozen=True)
class Bound:
    """A mean with its one-sided upper confidence bound.

    Attributes:
        mean: over the prompts that show the loss.
        upper: bound of the mean.
        confidence: with which all bounds hold that were looked at to decide, this one among them.
        prompts: how many show the loss; None: an earlier version did not say.
    """

    mean: float
    upper: float
    confidence: float
    prompts: int | None = None


@dataclass(frozen=True)
class Failing:
    """How many prompts lose their answer: what a mean over few prompts cannot know.

    Attributes:
        seen: held-out prompts whose answer is lost (`Outcome.answer_lost`).
        of: held-out prompts that the dense run answers in full; no other can lose its answer.
        upper: exact upper bound of the share of such prompts that lose their answer, in [0, 1].
        confidence: of the bound.
    """

    seen: int
    of: int
    upper: float
    confidence: float


@dataclass(frozen=True)
class Law:
    """What a setting must meet.

    Attributes:
        limits: budget of each loss that has one.
        confidence: of every bound.
        seed: of the draws behind a bound.
    """

    limits: dict[str, float]
    confidence: float
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Law:
        """A run's law."""
        return cls(config.budget.limits, config.budget.confidence, config.seed)


@dataclass(frozen=True)
class Verdict:
    """Whether a setting passes.

    Attributes:
        losses: every loss that a prompt shows, with its bound.
        failing: prompts that lose their answer; reported, not judged.
        sparsity: achieved, per phase.
        reasons: why it does not pass; empty: it does.
    """

    losses: dict[str, Bound]
    failing: Failing
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
    outcomes: Sequence[Outcome],
    phases: Sequence[Phase],
    law: Law,
    objections: Sequence[str] = (),
    at: float | None = None,
) -> Verdict:
    """Decides whether a setting passes.

    Args:
        outcomes: of the held-out prompts.
        phases: in which tiles may be skipped; in one of them they must be.
        law: budgets and confidence.
        objections: what else speaks against the setting.
        at: confidence of this look, see `upper_bound`.
    """
    losses = {name: upper_bound(name, outcomes, law, at) for name in by_loss(outcomes)}
    achieved = {phase: sparsity(outcomes, phase) for phase in phases}
    reasons = list(objections)
    if achieved and not any(achieved.values()):
        reasons.append(f"nothing was skipped in {' and '.join(achieved)}")
    for name, limit in law.limits.items():
        loss, bound = LOSSES[name], losses.get(name)
        if bound is None:
            reasons.append(f"{loss.title}: no prompt shows it")
        elif bound.upper > limit:
            reasons.append(
                f"{loss.title} {loss.text(bound.mean)}, upper bound {loss.text(bound.upper)} "
                f"above the budget of {limit:g} {loss.unit}"
            )
    return Verdict(losses, _failing(outcomes, law, at), achieved, tuple(reasons))


def require_provable(config: RunConfig) -> None:
    """Refuses a budget that no result on the held-out prompts could prove.

    Raises:
        UserError: there are too few of them, or too few that show the loss.
    """
    law, heldout = Law.of(config), config.prompts.heldout
    answered = with_answer(config.prompts, heldout)
    # A look has most of the allowed error, not all of it (`plan.looks`).
    if math.isinf(lognormal_upper([1.0, 1.001] * heldout, 1 - (1 - law.confidence) / 2)):
        raise UserError(
            f"budget.confidence: losses must have an upper bound, but `prompts.heldout: {heldout}` have no "
            f"upper bound of the KL at a confidence of {law.confidence:g}; lower it, 0.9999 is possible"
        )
    if config.validation.generate is not None and not answered:
        raise UserError(
            f"validation.generate: what is generated is compared with a reference answer, but none of the "
            f"{heldout} held-out prompts has one; add such a source to `prompts.sources`, or leave it null"
        )
    for name, limit in law.limits.items():
        loss = LOSSES[name]
        showing, which = {
            None: (heldout, ""),
            True: (answered, " with a reference answer"),
            False: (heldout - answered, " without a reference answer"),
        }[loss.answer]
        bounded = math.isfinite(loss.most)
        # A single value has no spread to take a bound from.
        needed = prompts_needed(limit, law.confidence, high=loss.most) if bounded else 2
        untested = f"`budget.{name}: null`, which reports the loss without testing it"
        if showing < needed and not (bounded and showing):
            raise UserError(
                f"budget.{name}: at least {needed} held-out prompts{which} are needed, but "
                f"`prompts.heldout: {heldout}` of these `prompts.sources` has {showing}; add a source of "
                f"such prompts, give it a larger `weight`, raise `prompts.heldout`, or {untested}"
            )
        if showing < needed:
            best = bounded_upper([0.0] * showing, law.confidence, high=loss.most)
            part = f" ({showing}{which})" if which else ""
            raise UserError(
                f"budget.{name}: an upper bound of at most {limit:g} {loss.unit} must be possible, but with "
                f"`prompts.heldout: {heldout}`{part} it is {loss.text(best)} even if no prompt loses "
                f"anything; give at least {needed} held-out prompts{which} (more if some may lose), a larger "
                f"budget, or {untested}"
            )


def ran_dense(outcome: Outcome, law: Law) -> bool:
    """Whether a prompt that must run dense did.

    Two dense kernels differ by rounding, in fp16 by more than nothing; a leak is far larger.
    """
    skipped = sum(sum(layers) for layers in outcome.skipped.values())
    return skipped == 0 and outcome.losses[FINEST] < 0.1 * law.limits[FINEST]


def upper_bound(name: str, outcomes: Sequence[Outcome], law: Law, at: float | None = None) -> Bound:
    """Mean of a loss over the prompts that show it, with the upper bound that its entry in `LOSSES` asks for.

    Args:
        name: of the loss.
        outcomes: of the prompts, at least one of which shows the loss.
        law: confidence, and the budget.
        at: confidence of one look of several that together have the law's (`plan.looks`); None: there is
            only one. A loss that has a largest value has the law's confidence at every look: its capital
            is a martingale while prompts come, and reaches the level by chance at no look at all more
            often than at a single one (Ville's inequality).

    Returns:
        Mean and bound; infinite where a prompt's loss is no number, or the bound has none to go by.
    """
    showing = [outcome for outcome in outcomes if name in outcome.losses]
    values = [outcome.losses[name] for outcome in showing]
    upper = _upper(name, values, [outcome.task for outcome in showing], law, at)
    return Bound(float(np.mean(values)), upper, law.confidence, len(values))


def foreseen(
    outcomes: Sequence[Outcome], law: Law, prompts: int, at: float, times: float = 1.0
) -> dict[str, float]:
    """The bound that each budgeted loss will come to if all prompts lose what those seen do.

    Args:
        outcomes: of the prompts seen.
        law: budgets and confidence.
        prompts: how many there will be, at least as many as were seen.
        at: confidence of the last look.
        times: how much more they will lose than those seen did.

    Returns:
        Bounds, as shares of the budgets; infinite where a loss is no number; none of a loss that no prompt
        has shown.
    """
    repeated = [outcomes[i % len(outcomes)] for i in range(prompts)]
    found: dict[str, float] = {}
    for name, limit in law.limits.items():
        showing = [outcome for outcome in repeated if name in outcome.losses]
        values = [min(times * o.losses[name], LOSSES[name].most) for o in showing]
        if values:
            found[name] = _upper(name, values, [o.task for o in showing], law, at) / limit
    return found


def _upper(
    name: str, values: Sequence[float], tasks: Sequence[str], law: Law, at: float | None
) -> float:
    loss = LOSSES[name]
    if not np.isfinite(values).all() or at == 1:
        return math.inf
    if math.isfinite(loss.most):
        return bounded_upper(values, law.confidence, high=loss.most)
    floor = NEGLIGIBLE * law.limits.get(name, float(np.mean(values)))
    confidence = law.confidence if at is None else at
    return lognormal_upper(values, confidence, tasks, floor=floor, seed=law.seed)


def _failing(outcomes: Sequence[Outcome], law: Law, at: float | None) -> Failing:
    seen = sum(outcome.answer_lost for outcome in outcomes)
    of = sum(outcome.answered for outcome in outcomes)
    upper = failing_share_upper(seen, of, law.confidence if at is None else at)
    return Failing(seen, of, upper, law.confidence)
