"""What a setting costs the model: loss against its own dense run, on one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibrate.model.forward import forward
from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from skip_softmax.huggingface.applied import applied
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import (
    PHASES,
    Phase,
)


@dataclass(frozen=True)
class Outcome:
    """One prompt run with a setting, against the same prompt run densely.

    Attributes:
        key: the prompt's key.
        task: its task.
        length: its length bin [tokens].
        kl: mean KL(dense || sparse) over the positions that predict the continuation and after
            [nats/token].
        score: share of reference tokens ranked first [points].
        dense_score: the same of the dense run.
        visited: tiles per phase and layer.
        skipped: tiles per phase and layer.
    """

    key: str
    task: str
    length: int
    kl: float
    score: float
    dense_score: float
    visited: dict[Phase, list[int]]
    skipped: dict[Phase, list[int]]


def compare(
    loaded: LoadedModel, thresholds: Thresholds, prompt: Prompt, dense: torch.Tensor
) -> Outcome:
    """Runs one prompt as it will be served and compares it with its dense run.

    The continuation is teacher-forced in one pass; its tokens are decode steps. By
    `decode_attention`'s rule this equals sending them one by one.

    Args:
        loaded: the model.
        thresholds: what to apply.
        prompt: what to run.
        dense: `dense_logits` of the prompt.

    Returns:
        Loss and tile counts.
    """
    with applied(loaded.model, thresholds, decode_from=len(prompt.ids)) as tiles:
        sparse = forward(loaded, prompt).float().cpu()
    visited = {phase: tiles[phase].visited.sum(1).tolist() for phase in PHASES}
    skipped = {phase: tiles[phase].skipped.sum(1).tolist() for phase in PHASES}
    return outcome(prompt, dense, sparse, visited, skipped)


def outcome(
    prompt: Prompt,
    dense: torch.Tensor,
    sparse: torch.Tensor,
    visited: dict[Phase, list[int]],
    skipped: dict[Phase, list[int]],
) -> Outcome:
    """What two runs of a prompt differ by, and the tiles that the sparse one counted."""
    return Outcome(
        prompt.key,
        prompt.task,
        prompt.length,
        kl_divergence(dense, sparse),
        score(sparse, prompt),
        score(dense, prompt),
        visited,
        skipped,
    )


def kl_divergence(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """Mean KL(dense || sparse) over positions [nats/token], from logits [positions, vocabulary]."""
    p = torch.log_softmax(dense.double(), dim=-1)
    q = torch.log_softmax(sparse.double(), dim=-1)
    # Rounding can leave -1e-17 where both are equal.
    return max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)


def score(logits: torch.Tensor, prompt: Prompt) -> float:
    """Share of the continuation's tokens that the model ranks first [points, 0 to 100].

    For an answer that is all first-ranked, greedy generation gives exactly that answer.
    """
    reference = torch.tensor(prompt.continuation)
    first = logits[:-1].argmax(-1)
    return 100.0 * float((first == reference).double().mean())


def sparsity(outcomes: Sequence[Outcome] | Sequence[dict[str, Any]], phase: Phase) -> float:
    """Skipped / visited tiles over outcomes, in [0, 1]."""
    rows = [row if isinstance(row, dict) else vars(row) for row in outcomes]
    visited = sum(sum(row["visited"][phase]) for row in rows)
    skipped = sum(sum(row["skipped"][phase]) for row in rows)
    return skipped / visited if visited else 0.0
