"""The losses: what skipping costs a model against its own dense run, one number per prompt.

A loss is an entry in `LOSSES` and a budget of the same name in `schema.BudgetConfig`; search, proof
and report go through the table. A loss that a prompt cannot show is absent among its losses, and means
and bounds are those of the prompts that show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from calibrate.prompts.build import Prompt


@dataclass(frozen=True)
class Loss:
    """One way to compare a prompt's sparse run with its dense run.

    Attributes:
        title: its name in sentences and tables.
        unit: of its values.
        compare: loss of one prompt, from the logits of the dense and the sparse run
            [continuation + 1, vocabulary] and the prompt; None: it takes generated text (`generated_score`).
        format: how a value is printed.
        least: the smallest possible value.
        answer: which prompts show it: those with a reference answer (True), those without (False), or all
            (None).
        most: the largest possible value. If there is one, the upper bound of the mean assumes nothing
            else (`bounds.bounded_upper`); if not, it takes the loss as lognormal within each task
            (`bounds.lognormal_upper`), and `least` must be 0.
    """

    title: str
    unit: str
    compare: Callable[[torch.Tensor, torch.Tensor, Prompt], float] | None
    format: str
    least: float
    most: float = math.inf
    answer: bool | None = None

    def shown_by(self, prompt: Prompt) -> bool:
        """Whether a prompt can show this loss."""
        return self.answer in (None, prompt.has_answer)

    @property
    def axis(self) -> str:
        """Title of an axis."""
        return f"loss: {self.title} [{self.unit}]"

    def text(self, value: float | None) -> str:
        """A value without its unit; a dash for none."""
        return "–" if value is None else format(value, self.format)


def kl_divergence(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """Mean KL(dense || sparse) over positions [nats/token], from logits [positions, vocabulary]."""
    p = torch.log_softmax(dense.double(), dim=-1)
    q = torch.log_softmax(sparse.double(), dim=-1)
    # Rounding can leave -1e-17 where both are equal.
    return max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)


def score(logits: torch.Tensor, prompt: Prompt) -> float:
    """Share of the continuation's tokens that the model ranks first [points, 0 to 100].

    If the whole answer is ranked first, greedy generation gives exactly that answer.
    """
    reference = torch.tensor(prompt.continuation)
    first = logits[:-1].argmax(-1)
    return 100.0 * float((first == reference).double().mean())


def generated_score(text: str, prompt: Prompt) -> float:
    """Share of the values of the prompt's answer that a generated text contains [points, 0 to 100].

    As RULER (arXiv 2404.06654) scores: anywhere in the text, in any order, upper or lower case.
    """
    written = text.casefold()
    found = [value.casefold() in written for value in prompt.answers]
    return 100.0 * sum(found) / len(found)


def flips(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """Share of positions at which the two runs rank different tokens first [%, 0 to 100]."""
    return 100.0 * float((dense.argmax(-1) != sparse.argmax(-1)).double().mean())


_KL = Loss(
    title="KL",
    unit="nats/token",
    compare=lambda dense, sparse, _: kl_divergence(dense, sparse),
    format="#.3g",
    least=0.0,
)

GENERATED = "generated_drop"
"""The loss that takes generated text; dear, so that only the validation measures it, and only if asked to."""

LOSSES = {
    "kl": _KL,
    "kl_answer": replace(_KL, title="KL on answers", answer=True),
    "kl_text": replace(_KL, title="KL on text", answer=False),
    "flips": Loss(
        title="share of flips",
        unit="%",
        compare=lambda dense, sparse, _: flips(dense, sparse),
        format=".2f",
        least=0.0,
        most=100.0,
    ),
    "score_drop": Loss(
        title="score drop",
        unit="points",
        compare=lambda dense, sparse, prompt: score(dense, prompt) - score(sparse, prompt),
        format=".2f",
        least=-100.0,
        most=100.0,
    ),
    GENERATED: Loss(
        title="generated score drop",
        unit="points",
        compare=None,
        format=".2f",
        least=-100.0,
        most=100.0,
        answer=True,
    ),
}

FINEST = "kl"
"""The loss that responds to the smallest change, and always has a budget: the one that is measured
layer by layer and predicted, and that tells a dense run's rounding from a leak."""


def compared(dense: torch.Tensor, sparse: torch.Tensor, prompt: Prompt) -> dict[str, float]:
    """The losses that a prompt shows in the logits of both runs [continuation + 1, vocabulary]."""
    return {
        name: loss.compare(dense, sparse, prompt)
        for name, loss in LOSSES.items()
        if loss.compare is not None and loss.shown_by(prompt)
    }


def largest_share(losses: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """The largest loss / budget of all losses that are known and have a budget; at most 1 is within."""
    return max(losses[name] / limit for name, limit in limits.items() if name in losses)


def text(losses: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """The losses that have a budget, for a progress line: `KL 0.00310, score drop 0.50`."""
    return ", ".join(
        f"{LOSSES[name].title} {LOSSES[name].text(losses[name])}"
        for name in limits
        if name in losses
    )
