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
from calibrate.proof.plan import NEXT_HOPELESS, Look, hopeless_above, looks
from calibrate.proof.verdict import Bound, Failing, Law, Verdict, foreseen, judge, ran_dense
from calibrate.search.path import Candidate
from calibrate.search.points import dense_where_idle
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
        prompts: how many held-out prompts it was run on, the first ones.
        failing: those that lose their answer; None: an earlier version did not count them.
        expected: share of the budget that it was expected to spend, from the search prompts; None: an earlier
            version did not say.
        level: confidence of the bounds at the look that decided; None: an earlier version, or it was given
            up, and the bounds are for information.
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
    expected: float | None = None
    level: float | None = None

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
        ended: why no bolder candidate was tried after one that passed; None: there was none, or an earlier
            version.
    """

    attempts: tuple[_Stored, ...]
    baseline: _Stored | None
    short_prompt: dict[str, Any] | None
    ended: str | None = None

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
            "ended": self.ended,
            "passed": self.passed,
        }


def validate(
    candidates: Sequence[Candidate],
    baselines: Sequence[Candidate],
    prompts: Sequence[Prompt],
    evaluate: Callable[[Setting, Prompt], Outcome],
    statistics: Statistics,
    law: Law,
    short: Prompt | None,
    relative_time: Callable[[Setting], float],
    searched: Statistics | None = None,
) -> Validation:
    """Tries candidates from safe to bold until one fails, and then those with one number per phase.

    Fixed-sequence testing (Learn then Test, arXiv 2110.01052, section 3.2): the order was fixed before any
    held-out prompt was seen, and nothing behind the first failure is believed, so every test has the whole
    level and the last candidate that passed breaks the promise no more often than one test would. Within a
    test, prompts are run until a look of `plan.looks` decides. A candidate that is sure to fail is not
    tried, or not to its end: what is given up is not believed either.

    Args:
        candidates: from `path.candidates`, the safest first.
        baselines: from `path.walked`, the safest first.
        prompts: held-out prompts, in the order in which they are run.
        evaluate: runs one prompt with a setting.
        statistics: of the calibration prompts, see `targets`.
        law: what each candidate must meet.
        short: a prompt below `min_kv_len`, or None.
        relative_time: of a setting, as `Space.relative_time`.
        searched: of the search prompts, see `targets`.

    Returns:
        Attempts, baseline and short-prompt check.
    """
    planned = looks([prompt.task for prompt in prompts], law.confidence)

    def attempted(sequence: Sequence[Candidate]) -> tuple[list[Attempt], str | None]:
        attempts: list[Attempt] = []
        outcomes: list[Outcome] = []
        for index, candidate in enumerate(sequence):
            before = sequence[index - 1].share if index else None
            if before is not None and candidate.share is not None:
                bolder = candidate.share / before
                ended = _ended(outcomes, law, planned[-1], bolder, len(sequence) - index)
                if ended is not None:
                    return attempts, ended
            outcomes, level, verdict = _tested(
                candidate, prompts, evaluate, planned, law, patient=not index
            )
            served = dense_where_idle(candidate.setting, verdict.sparsity)
            if served != candidate.setting:
                candidate = replace(candidate, relative_time=relative_time(served))
            target = targets(candidate, statistics, searched)
            attempts.append(_attempt(candidate, outcomes, level, target, verdict))
            if not verdict.passed:
                break
        return attempts, None

    (attempts, ended), (compared, _) = attempted(candidates), attempted(baselines)
    chosen, checked = _chosen(attempts), None
    if short is not None and chosen is not None:
        outcome = evaluate(chosen.setting, short)
        checked = {
            "tokens": len(short.ids),
            "skipped_tiles": sum(sum(layers) for layers in outcome.skipped.values()),
            FINEST: outcome.losses[FINEST],
            "dense": ran_dense(outcome, law),
        }
    return Validation(tuple(attempts), _chosen(compared), checked, ended)


def _tested(
    candidate: Candidate,
    prompts: Sequence[Prompt],
    evaluate: Callable[[Setting, Prompt], Outcome],
    planned: Sequence[Look],
    law: Law,
    *,
    patient: bool,
) -> tuple[list[Outcome], float | None, Verdict]:
    """Runs prompts until a look decides.

    Args:
        candidate: what is tested.
        prompts: held-out prompts.
        evaluate: runs one prompt with a setting.
        planned: the looks.
        law: what must be met.
        patient: give up only what loses more than a budget on the prompts seen. Nothing comes after a first
            candidate that fails, and few prompts overstate the bound.

    Returns:
        Outcomes of the prompts that were run; confidence of the bounds that decided, None: given up; verdict.
    """
    outcomes: list[Outcome] = []
    phases, last = tuple(candidate.setting), planned[-1]
    for look in planned:
        outcomes += [
            evaluate(candidate.setting, prompt) for prompt in prompts[len(outcomes) : look.prompts]
        ]
        verdict = judge(outcomes, phases, law, at=look.confidence)
        if verdict.passed or look is last:
            break
        found = foreseen(outcomes, law, last.prompts, last.confidence)
        worst = max(found, key=lambda name: found[name])
        if patient and verdict.losses[worst].mean <= law.limits[worst]:
            continue
        if not found[worst] <= hopeless_above(look, last.prompts):
            verdict = judge(outcomes, phases, law)
            reason = (
                f"given up after {look.prompts} of {last.prompts} held-out prompts: "
                f"{_bound_text(worst, verdict.losses[worst].mean, found[worst], law)}"
            )
            return outcomes, None, replace(verdict, reasons=(reason,))
    return outcomes, look.confidence, verdict


def _ended(
    outcomes: Sequence[Outcome], law: Law, last: Look, times: float, left: int
) -> str | None:
    """Why the next candidate is not worth trying, from the outcomes of the one before; None: it is.

    Args:
        outcomes: of the candidate that passed.
        law: budgets and confidence.
        last: the last look.
        times: how much more the next one is expected to lose.
        left: how many candidates are left.
    """
    found = foreseen(outcomes, law, last.prompts, last.confidence, times)
    worst = max(found, key=lambda name: found[name])
    if found[worst] <= NEXT_HOPELESS:
        return None
    mean = times * mean_losses(outcomes)[worst]
    return (
        f"{left} bolder {'candidate was' if left == 1 else 'candidates were'} not tried: the next would have "
        f"{_bound_text(worst, mean, found[worst], law)}"
    )


def _bound_text(name: str, mean: float, share: float, law: Law) -> str:
    loss, limit = LOSSES[name], law.limits[name]
    return (
        f"{loss.title} {loss.text(mean)}, and an upper bound of about {loss.text(share * limit)}, above "
        f"the budget of {limit:g} {loss.unit}"
    )


def targets(
    candidate: Candidate, statistics: Statistics, searched: Statistics | None = None
) -> dict[Phase, dict[int, float]]:
    """The sparsity to expect of a setting on new prompts.

    What dense runs count is a little too much: layers that skip leave later layers less to skip. How much
    less, the search prompts tell, whose tiles were counted and which were also run with the measured
    setting on the candidate's path.

    Args:
        candidate: the setting, and the measured one.
        statistics: of the calibration prompts.
        searched: of the search prompts; None: not counted, and nothing is taken off.

    Returns:
        Per phase and length of the statistics, in [0, 1].
    """
    counted = statistics if searched is None else statistics.merge(searched)
    measured = candidate.of
    found: dict[Phase, dict[int, float]] = {}
    for phase, factors in candidate.setting.items():
        moved = 0.0
        if searched is not None:
            moved = measured.sparsity[phase] - searched.sparsity(phase, measured.setting[phase])
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
    candidate: Candidate,
    outcomes: Sequence[Outcome],
    level: float | None,
    target: dict[Phase, dict[int, float]],
    verdict: Verdict,
) -> Attempt:
    by_length = {
        length: [outcome for outcome in outcomes if outcome.length == length]
        for length in sorted({outcome.length for outcome in outcomes})
    }
    return Attempt(
        name=candidate.name,
        setting=candidate.setting,
        losses=verdict.losses,
        passed=verdict.passed,
        reason=verdict.reason,
        relative_time=candidate.relative_time,
        sparsity=verdict.sparsity,
        by_length={
            phase: {
                length: {"target": target[phase][length], "achieved": sparsity(members, phase)}
                for length, members in by_length.items()
            }
            for phase in candidate.setting
        },
        by_task={
            task: _task([outcome for outcome in outcomes if outcome.task == task])
            for task in sorted({outcome.task for outcome in outcomes})
        },
        prompts=len(outcomes),
        failing=verdict.failing,
        expected=candidate.share,
        level=level,
    )


def _task(outcomes: Sequence[Outcome]) -> dict[str, float]:
    generated = [o.dense_generated for o in outcomes if o.dense_generated is not None]
    return {
        **mean_losses(outcomes),
        "dense_score": float(np.mean([o.dense_score for o in outcomes])),
        **({"dense_generated": float(np.mean(generated))} if generated else {}),
        "prompts": len(outcomes),
    }
