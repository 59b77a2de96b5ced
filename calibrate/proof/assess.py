"""What somebody's numbers do to your model: loss and sparsity per length, beside dense and calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrate.loss.measure import Outcome, sparsity
from calibrate.prompts.build import Prompt
from calibrate.proof.validate import upper_bound
from calibrate.schema import RunConfig
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
        kl: mean loss [nats/token].
        score: share of reference tokens ranked first [points].
        sparsity: achieved, per phase.
        above_one: a threshold is 1 or more: measured as engines run it, see `above_one`.
    """

    length: int
    setting: str
    threshold: dict[Phase, float]
    kl: float
    score: float
    sparsity: dict[Phase, float]
    above_one: bool = False


@dataclass(frozen=True)
class Assessment:
    """All rows, and the verdict on the given numbers.

    Attributes:
        rows: by length; dense, given, calibrated.
        evidence: for the thresholds file: verdict, budget, loss, sparsity.
    """

    rows: tuple[Row, ...]
    evidence: dict[str, Any]


def as_served(thresholds: Thresholds, kv_len: int) -> tuple[Thresholds, bool]:
    """Imported numbers as an engine uses them on a request: it knows no shortest length.

    Args:
        thresholds: a thresholds file.
        kv_len: KV length of the request [tokens].

    Returns:
        What to run, and whether a threshold is 1 or more there. A file that was not imported, or for our
        own kernel, is run as it is: dense below `min_kv_len`.
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
    config: RunConfig,
) -> Assessment:
    """Measures a thresholds file on held-out prompts.

    Args:
        given: the file in question.
        calibrated: the run's own file, for comparison; None: there is none.
        prompts: held-out prompts.
        evaluate: runs one prompt with thresholds.
        config: budget, confidence, resamples.

    Returns:
        Rows and verdict: passed only if both bounds hold and no threshold was 1 or more.
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
        rows.append(
            Row(length, "dense", {}, 0.0, float(np.mean([o.dense_score for o in found])), {})
        )
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
    return Assessment(tuple(rows), _evidence(given, outcomes, too_short, config))


def _row(
    length: int, name: str, thresholds: Thresholds, outcomes: Sequence[Outcome], above_one: bool
) -> Row:
    return Row(
        length,
        name,
        {phase: largest(thresholds, phase) / length for phase in PHASES},
        float(np.mean([o.kl for o in outcomes])),
        float(np.mean([o.score for o in outcomes])),
        {phase: sparsity(outcomes, phase) for phase in PHASES},
        above_one,
    )


def largest(thresholds: Thresholds, phase: Phase) -> float:
    """Largest scale factor of any layer and head [tokens]."""
    return max(max(thresholds.per_head(layer, phase)) for layer in range(thresholds.model.layers))


def _evidence(
    given: Thresholds, outcomes: Sequence[Outcome], too_short: list[int], config: RunConfig
) -> dict[str, Any]:
    confidence = config.budget.confidence
    drops = [o.dense_score - o.score for o in outcomes]
    kl = upper_bound([o.kl for o in outcomes], confidence, config)
    drop = upper_bound([*drops, 100.0 / config.prompts.decode_tokens], confidence, config)
    reasons = []
    if too_short:
        reasons.append(f"the threshold is 1 or more at {' and '.join(map(str, too_short))} tokens")
    if kl.upper > config.budget.kl:
        reasons.append(
            f"KL {kl.mean:.3g}, upper bound {kl.upper:.3g} above {config.budget.kl:g} nats/token"
        )
    if config.budget.score_drop is not None and drop.upper > config.budget.score_drop:
        reasons.append(
            f"score drop, upper bound {drop.upper:.2f} above {config.budget.score_drop:g} points"
        )
    phases = [phase for phase in PHASES if largest(given, phase) > 0]
    reasons += [
        f"nothing was skipped in {phase}" for phase in phases if sparsity(outcomes, phase) == 0
    ]
    lengths = sorted({o.length for o in outcomes})
    return {
        **{key: value for key, value in given.evidence.items() if key in ("imported",)},
        "verdict": "failed" if reasons else "passed",
        **({"reason": "; ".join(reasons)} if reasons else {}),
        "budget": config.budget.model_dump(mode="json", exclude_none=True),
        "loss": {
            "kl": {"mean": kl.mean, "upper": kl.upper, "confidence": confidence},
            "score_drop": {
                "mean": float(np.mean(drops)),
                "upper": drop.upper,
                "confidence": confidence,
            },
            "heldout_prompts": len(outcomes),
        },
        "sparsity": {
            phase: {
                "achieved": sparsity(outcomes, phase),
                "by_length": {
                    str(n): {"achieved": sparsity([o for o in outcomes if o.length == n], phase)}
                    for n in lengths
                },
            }
            for phase in phases
        },
    }
