"""What numbers from elsewhere do to your model: loss and sparsity per length, beside dense and calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from calibrate.loss.measure import Outcome, mean_losses, sparsity
from calibrate.prompts.build import Prompt
from calibrate.proof.verdict import Law, judge
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, MinKvLen, Phase

Evaluate = Callable[[Thresholds, Prompt, bool], Outcome]
"""Runs one prompt; the flag says that a threshold is 1 or more and must be run as engines do."""


@dataclass(frozen=True)
class Row:
    """One setting at one prompt length.

    Attributes:
        length: prompt length [tokens].
        setting: `dense`, `given` or `calibrated`.
        threshold: largest scale factor / prompt length, per phase.
        losses: mean of every loss that a prompt shows.
        score: share of reference tokens ranked first [points].
        sparsity: achieved, per phase.
        above_one: a threshold is 1 or more: measured as engines run it (`skip_softmax/meaning/literal.py`).
    """

    length: int
    setting: str
    threshold: dict[Phase, float]
    losses: dict[str, float]
    score: float
    sparsity: dict[Phase, float]
    above_one: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data, with each loss under its own name."""
        row = asdict(self)
        return {**row.pop("losses"), **row}


@dataclass(frozen=True)
class Assessment:
    """All rows, and the verdict on the given numbers.

    Attributes:
        rows: by length; dense, given, calibrated.
        evidence: for the thresholds file: verdict, budget, loss, sparsity.
    """

    rows: tuple[Row, ...]
    evidence: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"rows": [row.to_json() for row in self.rows], "evidence": self.evidence}


def as_served(thresholds: Thresholds, kv_len: int) -> tuple[Thresholds, bool]:
    """Imported numbers as an engine uses them on a request: engines ignore `min_kv_len`.

    Args:
        thresholds: a thresholds file.
        kv_len: KV length of the request [tokens].

    Returns:
        What to run, and whether a threshold is 1 or more there. A file that was not imported, or was
        imported for our own kernel, is run as it is: dense below `min_kv_len`.
    """
    if thresholds.evidence.get("imported", {}).get("engine", "native") == "native":
        return thresholds, False
    if any(largest(thresholds, phase) >= kv_len for phase in PHASES):
        return thresholds, True
    floors = MinKvLen(prefill=kv_len, decode=kv_len)
    return thresholds.model_copy(update={"min_kv_len": floors}), False


def assess(
    given: Thresholds,
    calibrated: Thresholds | None,
    prompts: Sequence[Prompt],
    evaluate: Evaluate,
    law: Law,
) -> Assessment:
    """Measures a thresholds file on held-out prompts.

    Args:
        given: the file in question.
        calibrated: the run's own file, for comparison; None: there is none.
        prompts: held-out prompts.
        evaluate: runs one prompt with thresholds.
        law: what the numbers must meet.

    Returns:
        Rows and verdict; numbers with a threshold of 1 or more do not pass.
    """
    rows: list[Row] = []
    outcomes: list[Outcome] = []
    too_short: list[int] = []
    for length in sorted({prompt.length for prompt in prompts}):
        members = [prompt for prompt in prompts if prompt.length == length]
        served = [as_served(given, len(prompt.ids)) for prompt in members]
        above_one = any(above for _, above in served)
        found = [
            evaluate(file, prompt, above)
            for (file, above), prompt in zip(served, members, strict=True)
        ]
        dense_score = float(np.mean([o.dense_score for o in found]))
        none = dict.fromkeys(mean_losses(found), 0.0)
        rows.append(Row(length, "dense", {}, none, dense_score, {}))
        rows.append(_row(length, "given", given, found, above_one))
        if calibrated is not None:
            rows.append(
                _row(
                    length,
                    "calibrated",
                    calibrated,
                    [evaluate(calibrated, p, False) for p in members],
                    False,
                )
            )
        outcomes += found
        too_short += [length] if above_one else []
    return Assessment(tuple(rows), _evidence(given, outcomes, too_short, law))


def _row(
    length: int, name: str, thresholds: Thresholds, outcomes: Sequence[Outcome], above_one: bool
) -> Row:
    return Row(
        length,
        name,
        {phase: largest(thresholds, phase) / length for phase in PHASES},
        mean_losses(outcomes),
        float(np.mean([o.dense_score - o.losses["score_drop"] for o in outcomes])),
        {phase: sparsity(outcomes, phase) for phase in PHASES},
        above_one,
    )


def largest(thresholds: Thresholds, phase: Phase) -> float:
    """Largest scale factor of any layer and head [tokens]."""
    return max(max(thresholds.per_head(layer, phase)) for layer in range(thresholds.model.layers))


def _evidence(
    given: Thresholds,
    outcomes: Sequence[Outcome],
    too_short: list[int],
    law: Law,
) -> dict[str, Any]:
    phases = [phase for phase in PHASES if largest(given, phase) > 0]
    lengths = " and ".join(map(str, too_short))
    objections = [f"the threshold is 1 or more at {lengths} tokens"] if too_short else []
    verdict = judge(outcomes, phases, law, objections)
    return {
        **{key: value for key, value in given.evidence.items() if key == "imported"},
        "verdict": "passed" if verdict.passed else "failed",
        **({} if verdict.passed else {"reason": verdict.reason}),
        "budget": {**law.limits, "confidence": law.confidence},
        "loss": {
            **{name: asdict(bound) for name, bound in verdict.losses.items()},
            "heldout_prompts": len(outcomes),
        },
        "failing_prompts": asdict(verdict.failing),
        "sparsity": {
            phase: {
                "achieved": share,
                "by_length": {
                    str(n): {"achieved": sparsity([o for o in outcomes if o.length == n], phase)}
                    for n in sorted({o.length for o in outcomes})
                },
            }
            for phase, share in verdict.sparsity.items()
        },
    }
