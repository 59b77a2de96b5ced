"""A proof, fixed before any held-out prompt is seen: when it looks, what it tries, what it can prove.

Prompts are spent where a test is undecided. A candidate is judged at a few looks, after more and more
prompts; the error that is allowed is shared out over the looks, so that all bounds together hold at the
promised confidence, whatever the look at which a candidate passes. Giving a candidate up early costs
nothing: what fails is not believed anyway.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from calibrate.loss.losses import FINEST, LOSSES
from calibrate.proof.bounds import FREEDOM, bounded_upper, prompts_for, provable_share
from calibrate.proof.verdict import NEGLIGIBLE, Law

# Looks before the last: the share of the prompts, and of the allowed error. In simulated proofs
# (`notebooks/studies/false_passes.py`) they cost 1 % of the budget and save half of the prompts and more.
_LOOKS = ((1 / 8, 0.02), (1 / 4, 0.03), (1 / 2, 0.1))
_FEWEST = 10  # prompts from which a candidate may pass
_FEWEST_SEEN = 4  # prompts from which a candidate may be given up

ASSUMED_SPREAD = 0.7
"""Standard deviation of log KL within a task where nothing is known: losses differ by a factor of 2. In 28
calibrations of SmolLM2-135M (`notebooks/studies/calibrations.json`) it was 0.34 to 0.56."""
_ASSUMED_WEIGHT = (
    4  # degrees of freedom that the assumption counts as, beside what search prompts show
)

# How far the search prompts' estimate may lie from where a proof ends: standard deviation of its logarithm.
# A mean over six prompts is off by 20 to 40 %, and the spread that decides the rest is not known well.
_OPEN = 0.5
_SAFEST = 1.2  # the first of K candidates aims at this / K of what can be proven

_LEAST = 0.001  # of what can be proven: too few prompts may have no bound before they are seen

GOAL = 0.85
"""The share of the budget for which a run says how many prompts it would take."""


@dataclass(frozen=True)
class Look:
    """A moment at which a candidate is judged.

    Attributes:
        prompts: how many of the held-out prompts, from the first, have been run.
        confidence: of the bounds that decide; 1: too early to pass, a candidate can only be given up.
    """

    prompts: int
    confidence: float


def looks(tasks: Sequence[str], confidence: float) -> tuple[Look, ...]:
    """When a candidate is judged.

    A look comes where every task has had its share of the prompts, to the nearest prompt, so that the mean
    so far is one over the same mixture of tasks.

    Args:
        tasks: the task of each held-out prompt, in the order in which they are run.
        confidence: with which all looks together hold.

    Returns:
        Looks after rising numbers of prompts; the last has seen them all. `1 - confidence` of the looks
        adds up to that of all.
    """
    whole, error, left = len(tasks), 1 - confidence, 1.0
    fewest = max(_FEWEST, (FREEDOM + 1) * len(set(tasks)))
    found: dict[int, float] = {}
    for share, spent in _LOOKS:
        prompts = _balanced(tasks, max(math.ceil(share * whole), _FEWEST_SEEN))
        if prompts == whole:
            break
        allowed = spent if prompts >= fewest else 0.0
        found[prompts] = found.get(prompts, 0.0) + allowed
        left -= allowed
    return (*(Look(k, 1 - error * a) for k, a in found.items()), Look(whole, 1 - error * left))


def _balanced(tasks: Sequence[str], fewest: int) -> int:
    """The smallest number of prompts, at least `fewest`, in which each task has its share of them."""
    whole, total = len(tasks), Counter(tasks)
    for prompts in range(fewest, whole):
        seen = Counter(tasks[:prompts])
        if all(abs(seen[task] - prompts * n / whole) <= 0.5 for task, n in total.items()):
            return prompts
    return whole


def hopeless_above(look: Look, prompts: int) -> float:
    """A candidate is given up at a look if all prompts would put its bound above so many budgets.

    Fewer prompts know less of where the bound will come to: 1.5 after half of them, 3.5 after an eighth.
    """
    return float((prompts / look.prompts) ** 0.6)


NEXT_HOPELESS = 1.05
"""No further candidate is tried if the one that passed foretells a bound above so many budgets."""


def provable(tasks: Sequence[str], law: Law, spread: float) -> float:
    """The largest share of the KL budget that the held-out prompts can prove.

    Args:
        tasks: of the held-out prompts, in their order.
        law: budgets and confidence.
        spread: standard deviation of log KL within a task.

    Returns:
        The share, in [0, 1): `bounds.provable_share` at the last look.
    """
    return provable_share(tasks, looks(tasks, law.confidence)[-1].confidence, spread)


def shares(provable: float, attempts: int) -> list[float]:
    """Shares of the budget, on the search prompts, at which candidates aim, rising.

    The first is safe, and some lead up from it. The others are the quantiles of where a proof may end: around
    what can be proven, dense in the middle, and past the budget itself, because the search prompts may have
    overestimated a setting and a sequence ends by itself where nothing more can be proven.

    Args:
        provable: the share that the held-out prompts can prove, in (0, 1].
        attempts: how many, at least 1.
    """
    provable = max(provable, _LEAST)
    between = (attempts - 1) // 5
    others = attempts - 1 - between
    ends = [
        provable * math.exp(_OPEN * float(stats.norm.ppf((i + 0.5) / others)))
        for i in range(others)
    ]
    first = provable * min(_SAFEST / attempts, 0.8)
    # A step so wide that what passed foretells the next one's failure would end the sequence there.
    steps = (
        [first * (ends[0] / first) ** ((i + 1) / (between + 1)) for i in range(between)]
        if ends
        else []
    )
    return [first, *steps, *ends]


def spread_seen(measured: Sequence[Sequence[float]], tasks: Sequence[str], budget: float) -> float:
    """Spread of the KL within a task, from the search prompts and, as they are few, from what is assumed.

    Args:
        measured: KL of each search prompt [nats/token], for each trial.
        tasks: of the search prompts.
        budget: of the KL [nats/token].

    Returns:
        Standard deviation of the logarithm.
    """
    names = np.asarray(tasks)
    freedom = len(names) - len(set(tasks))
    squares = [
        sum(float(((logs[names == n] - logs[names == n].mean()) ** 2).sum()) for n in set(tasks))
        for logs in (np.log(np.maximum(row, NEGLIGIBLE * budget)) for row in measured)
    ]
    # Trials were run on the same prompts: together they know no more than one of them.
    seen = sum(squares) / len(squares) if squares and freedom else 0.0
    known = freedom if squares else 0
    return math.sqrt((seen + _ASSUMED_WEIGHT * ASSUMED_SPREAD**2) / (known + _ASSUMED_WEIGHT))


def foresight(tasks: Sequence[str], law: Law, spread: float, *, seen: bool) -> str:
    """What the held-out prompts can prove, and how many more would take, in a line.

    Args:
        tasks: of the held-out prompts, in their order.
        law: budgets and confidence.
        spread: standard deviation of log KL within a task.
        seen: whether the spread is of the search prompts; else it is assumed.
    """
    share = provable(tasks, law, spread)
    known = (
        f"the spread seen on the search prompts (sd of log KL {spread:.2g})"
        if seen
        else f"losses that differ by a factor of {math.exp(spread):.2g} within a task"
    )
    text = (
        f"with {len(tasks)} held-out prompts and {known} a setting of at most {share:.2f} of the KL "
        f"budget can be proven"
    )
    if share < GOAL:
        last = looks(tasks, law.confidence)[-1].confidence
        needed = prompts_for(GOAL, tasks, last, spread)
        more = "more than 10000" if needed is None else f"about {needed}"
        text += f"; {GOAL} would take {more} prompts"
    for name, limit in law.limits.items():
        loss = LOSSES[name]
        if name != FINEST and math.isfinite(loss.most):
            best = bounded_upper([0.0] * len(tasks), law.confidence, high=loss.most)
            text += (
                f"; the upper bound of the {loss.title} is {loss.text(best)} {loss.unit} if no prompt loses "
                f"anything, of {limit:g}"
            )
    return text
