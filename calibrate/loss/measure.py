"""What a setting costs the model: loss against its own dense run, on one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from calibrate.errors import UserError
from calibrate.loss.losses import GENERATED, LOSSES, compared, generated_score, score
from calibrate.model.forward import forward
from calibrate.model.generate import greedy_text
from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from skip_softmax.huggingface.applied import applied
from skip_softmax.huggingface.calls import LayerCall, joined
from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.meaning import literal
from skip_softmax.meaning.call import call_of, dequantised
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase


@dataclass(frozen=True)
class Outcome:
    """One prompt run with a setting, against the same prompt run densely.

    Attributes:
        key: the prompt's key.
        task: its task.
        length: its length bin [tokens].
        losses: those of `LOSSES` that the prompt shows, over the positions that predict the continuation
            and after.
        dense_score: share of reference tokens that the dense run ranks first [points].
        visited: tiles per phase and layer.
        skipped: tiles per phase and layer.
        dense_generated: share of the answer's values in the text that the dense run generates [points];
            None: nothing was generated.
    """

    key: str
    task: str
    length: int
    losses: dict[str, float]
    dense_score: float
    visited: dict[Phase, list[int]]
    skipped: dict[Phase, list[int]]
    dense_generated: float | None = None

    @property
    def answered(self) -> bool:
        """Whether the dense run ranks every reference token first: greedy generation gives the answer."""
        return self.dense_score == 100.0

    @property
    def answer_lost(self) -> bool:
        """Whether the dense run gives the whole answer and the sparse run does not."""
        return self.answered and self.losses["score_drop"] > 0

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Outcome:
        """What `asdict` made of an outcome, in this version or an earlier one."""
        if "losses" in row:
            return cls(**row)
        losses = {"kl": row["kl"], "score_drop": row["dense_score"] - row["score"]}
        kept = {key: value for key, value in row.items() if key not in ("kl", "score")}
        return cls(**kept, losses=losses)


def require_measurable(loaded: LoadedModel, thresholds: Thresholds, *, unguarded: bool) -> None:
    """Refuses what a serving engine does not run.

    Raises:
        UserError: it serves other chunks, or knows no thresholds of 1 or more.
    """
    if loaded.engine is None:
        return
    cure = "measure with `model.engine: transformers`"
    if unguarded:
        raise UserError(
            "thresholds must be below 1 where the plug-in for vLLM measures them, as it is dense from 1 on, "
            f"but `{loaded.name}` is to be measured with 1 and more; {cure}"
        )
    ours, theirs = loaded.engine.chunk, thresholds.geometry.chunk
    if ours != theirs:
        raise UserError(
            f"geometry.prefill.chunk must be the engine's, {_chunks(ours)}, but the thresholds are for "
            f"{_chunks(theirs)}; {cure}, or in a run with that chunk"
        )


def _chunks(size: int | None) -> str:
    return "whole prompts" if size is None else f"chunks of {size} tokens"


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
        Losses and tile counts.
    """
    if loaded.engine is not None:
        sparse, counts = loaded.engine.logits(prompt.ids, prompt.continuation, thresholds)
        of_layers = {phase: counts[phase].sum(1).unbind(1) for phase in PHASES}
        visited, skipped = ({p: of_layers[p][i].tolist() for p in PHASES} for i in (0, 1))
        return outcome(prompt, dense, sparse, visited, skipped)
    with applied(loaded.model, thresholds, decode_from=len(prompt.ids)) as tiles:
        sparse = forward(loaded, prompt).float().cpu()
    visited = {phase: tiles[phase].visited.sum(1).tolist() for phase in PHASES}
    skipped = {phase: tiles[phase].skipped.sum(1).tolist() for phase in PHASES}
    return outcome(prompt, dense, sparse, visited, skipped)


def compare_unguarded(
    loaded: LoadedModel, thresholds: Thresholds, prompt: Prompt, dense: torch.Tensor
) -> Outcome:
    """As `compare`, in an engine that knows neither `min_kv_len` nor a largest threshold (`literal`)."""
    with _unguarded(loaded, thresholds, decode_from=len(prompt.ids)) as (visited, skipped):
        sparse = forward(loaded, prompt).float().cpu()
    return outcome(prompt, dense, sparse, visited, skipped)


def with_generated(
    measured: Outcome,
    loaded: LoadedModel,
    thresholds: Thresholds,
    prompt: Prompt,
    dense: str,
    tokens: int,
    *,
    unguarded: bool = False,
) -> Outcome:
    """Adds the loss that takes generated text: thresholds act on prompt and steps as they come.

    Args:
        measured: what `compare` or `compare_unguarded` gave.
        loaded: the model.
        thresholds: what to apply.
        prompt: one that has `answers`.
        dense: what the dense run generates, from `greedy_text`.
        tokens: how many tokens at most, as for the dense run.
        unguarded: as engines run thresholds of 1 or more.

    Returns:
        The outcome with one loss more.
    """
    if loaded.engine is not None:
        served: AbstractContextManager[Any] = nullcontext()
    elif unguarded:
        served = _unguarded(loaded, thresholds)
    else:
        served = applied(loaded.model, thresholds, count=False)
    with served:
        sparse = greedy_text(loaded, prompt, tokens, thresholds)
    score = generated_score(dense, prompt)
    drop = score - generated_score(sparse, prompt)
    return replace(measured, losses={**measured.losses, GENERATED: drop}, dense_generated=score)


@contextmanager
def _unguarded(
    loaded: LoadedModel, thresholds: Thresholds, decode_from: int | None = None
) -> Iterator[tuple[dict[Phase, list[int]], dict[Phase, list[int]]]]:
    """As `applied`, by the published rule to the letter; yields visited and skipped tiles per layer."""
    layers = len(loaded.layers)
    visited: dict[Phase, list[int]] = {phase: [0] * layers for phase in PHASES}
    skipped: dict[Phase, list[int]] = {phase: [0] * layers for phase in PHASES}

    def handler(call: LayerCall) -> torch.Tensor:
        return joined([attend(part) for part in call.chunks(thresholds.geometry.chunk)])

    def attend(call: LayerCall) -> torch.Tensor:
        tiles = getattr(thresholds.geometry, call.phase)
        # Without `dense_last`: such an engine does not know it.
        alone = call_of(
            call.q, call.k, call.v, tile_q=getattr(tiles, "tile_q", None), tile_kv=tiles.tile_kv,
            scale=call.scale, window=call.window, causal=call.causal, kv_start=call.kv_start,
        )  # fmt: skip
        factors = torch.tensor(
            thresholds.per_head(call.layer, call.phase), dtype=torch.float64, device=call.q.device
        )
        outputs = []
        scales = call.keywords.get("k_scale"), call.keywords.get("v_scale")
        for q, k, v in zip(call.q, call.k, call.v, strict=True):
            k, v = (dequantised(x, scale, None, q) for x, scale in zip((k, v), scales, strict=True))
            out, seen, left_out = literal.attend(q, k, v, alone, factors)
            visited[call.phase][call.layer] += int(seen.sum())
            skipped[call.phase][call.layer] += int(left_out.sum())
            outputs.append(out)
        return torch.stack(outputs)

    left_alone = {entry.layer: entry.reason for entry in thresholds.uncalibrated}
    with intercepted(
        loaded.model, handler, decode_from=decode_from, left_alone=left_alone,
        kv_cache_dtype=thresholds.model.kv_cache_dtype,
    ):  # fmt: skip
        yield visited, skipped


def outcome(
    prompt: Prompt,
    dense: torch.Tensor,
    sparse: torch.Tensor,
    visited: dict[Phase, list[int]],
    skipped: dict[Phase, list[int]],
) -> Outcome:
    """How two runs of a prompt differ, with the tiles that the sparse one counted."""
    return Outcome(
        prompt.key,
        prompt.task,
        prompt.length,
        compared(dense, sparse, prompt),
        score(dense, prompt),
        visited,
        skipped,
    )


def by_loss(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Values of each loss, of the prompts that show it; a loss that none shows is absent."""
    found = {name: [o.losses[name] for o in outcomes if name in o.losses] for name in LOSSES}
    return {name: values for name, values in found.items() if values}


def mean_losses(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean of each loss, over the prompts that show it; a loss that none shows is absent."""
    return {name: sum(values) / len(values) for name, values in by_loss(outcomes).items()}


def sparsity(outcomes: Sequence[Outcome], phase: Phase) -> float:
    """Skipped / visited tiles over outcomes, in [0, 1]."""
    visited = sum(sum(outcome.visited[phase]) for outcome in outcomes)
    skipped = sum(sum(outcome.skipped[phase]) for outcome in outcomes)
    return skipped / visited if visited else 0.0
