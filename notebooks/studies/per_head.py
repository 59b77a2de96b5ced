"""What one scale factor per head would gain over one per layer, at equal measured loss.

    python notebooks/studies/per_head.py RUN_FOLDER OUT.json

Both ways are analytic: for each price of loss, every layer takes the option with the least predicted
time plus price times predicted loss. Per layer, an option is one scale factor. Per head, options are
added in which every head takes the scale factor that minimises `mu * mass ** power - skipped tiles`,
for many `mu`. The KL of both is then measured on the run's search and held-out prompts.

The answer, in `per_head.json` beside this file (SmolLM2-135M-Instruct, 14 prompts of 1K and 2K): nothing.
Predicted time falls by 0.3 to 0.6 points of dense attention time at equal predicted loss, but at equal
measured KL the difference is -0.2 points (95 % of resamples: -0.7 to 0.3), or 0.0 (-0.5 to 0.4) with
squares: the loss model, measured with one number per layer, expects too little loss where heads differ.
So the search space has one number per layer. One model and short prompts: a longer study may differ.

The run folder must hold a finished run; measurements are kept there, in `per_head.json`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from calibrate.loss.losses import FINEST
from calibrate.loss.measure import Outcome, sparsity
from calibrate.loss.sensitivity import Row
from calibrate.model.section import Setting
from calibrate.pipeline import Stages
from calibrate.record.files import read_json, write_json
from calibrate.record.folder import open_run
from calibrate.search.cost import Curve
from calibrate.search.space import grid
from calibrate.statistics.counts import Statistics
from skip_softmax.thresholds.types import PHASES, Phase

LOSS_POWER = 1.5  # of the dropped mass, as the loss model had it
PER_OCTAVE = 8  # at the edges of the histograms' bins, below the largest scale factor
MULTIPLIERS = np.arange(-20.0, 40.0, 0.25)  # log2 of tiles' share per dropped mass
ALLOWED = (0.0025, 0.005, 0.01)  # predicted loss of both phases together [nats/token]
# The power in which heads of one layer are averaged: 1 as the loss model does; 2 spreads the mass over
# heads, because KL is quadratic in small changes.
WAYS = {"per layer": None, "per head": 1.0, "per head, squares": 2.0}
RESAMPLES = 4000


@dataclass(frozen=True)
class Option:
    """One thing a layer may do."""

    factors: tuple[float, ...]
    time: float
    loss: float


@dataclass(frozen=True)
class PerHead:
    """What each scale factor skips in a head: share of its layer's tiles and mass, [grid, layers, heads]."""

    factors: list[float]
    tiles: torch.Tensor
    mass: torch.Tensor


def per_head(statistics: Statistics, phase: Phase, factors: Sequence[float]) -> PerHead:
    """Reads the histograms of every head, the lengths added, at each scale factor."""
    visited = statistics.visited(phase).sum((1, 2)).clamp_min(1)
    layers, heads = statistics.counts[phase].shape[:2]
    tiles, mass = [], []
    for factor in factors:
        tiles.append(statistics.skipped(phase, factor).sum(2) / visited[:, None])
        # Of one head alone: the mean over heads is that head's mass / heads.
        alone = torch.eye(heads, dtype=torch.float64) * factor
        mass.append(
            torch.stack(
                [statistics.dropped_mass(phase, row.expand(layers, heads)) for row in alone], 1
            )
            * heads
        )
    return PerHead(list(factors), torch.stack(tiles), torch.stack(mass))


def weights(statistics: Statistics, rows: Sequence[Row], phase: Phase, power: float) -> list[float]:
    """The loss model's weight of each layer, when heads are averaged in this power."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.phase == phase:
            mass = per_head(statistics, phase, [row.scale_factor]).mass[0, row.layer]
            mean = float((mass**power).mean() ** (1 / power))
            found.setdefault(row.layer, []).append(max(row.kl, 1e-9) / mean**LOSS_POWER)
    means = {layer: math.exp(float(np.mean(np.log(values)))) for layer, values in found.items()}
    layers = statistics.counts[phase].shape[0]
    return [means.get(layer, max(means.values())) for layer in range(layers)]


def options(
    table: PerHead, curve: Curve, weight: Sequence[float], power: float | None
) -> list[list[Option]]:
    """What each layer may do; `power` None: one number per layer only."""
    heads, q = table.tiles.shape[2], power or 1.0

    def option(layer: int, index: torch.Tensor) -> Option:
        share = table.tiles[:, layer].gather(0, index[None])[0].sum()
        mass = (table.mass[:, layer].gather(0, index[None])[0] ** q).mean()
        return Option(
            tuple(table.factors[i] for i in index.tolist()),
            curve.at(float(share)) if index.any() else 1.0,
            weight[layer] * float(mass) ** (LOSS_POWER / q),
        )

    found: list[list[Option]] = []
    for layer in range(table.tiles.shape[1]):
        vectors = [torch.full((heads,), i) for i in range(len(table.factors))]
        if power is not None:
            for multiplier in MULTIPLIERS:
                price = 2.0**multiplier * table.mass[:, layer] ** q - table.tiles[:, layer]
                vectors.append(price.argmin(0))
        different = {tuple(vector.tolist()): vector for vector in vectors}
        found.append([option(layer, index) for index in different.values()])
    return found


def optimum(tables: dict[Phase, list[list[Option]]], allowed: float) -> dict[Phase, list[Option]]:
    """The least predicted time (phases count alike) for a total predicted loss of at most `allowed`."""
    times = {p: [np.array([o.time for o in layer]) for layer in t] for p, t in tables.items()}
    losses = {p: [np.array([o.loss for o in layer]) for layer in t] for p, t in tables.items()}

    def chosen(log2_price: float) -> dict[Phase, list[Option]]:
        return {
            phase: [
                layer[int((times[phase][i] + 2.0**log2_price * losses[phase][i]).argmin())]
                for i, layer in enumerate(table)
            ]
            for phase, table in tables.items()
        }

    low, high = -30.0, 60.0
    for _ in range(50):
        middle = (low + high) / 2
        spent = sum(o.loss for layers in chosen(middle).values() for o in layers)
        low, high = (low, middle) if spent <= allowed else (middle, high)
    return chosen(high)


def measured(stages: Stages, outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Mean KL, and predicted time at the sparsity that was achieved, mean over the phases."""
    times = []
    for phase in PHASES:
        skipped = np.sum([o.skipped[phase] for o in outcomes], axis=0)
        visited = np.maximum(np.sum([o.visited[phase] for o in outcomes], axis=0), 1)
        shares = (skipped / visited).tolist()
        times.append(stages.cost.relative_time(phase, shares, [share > 0 for share in shares]))
    return float(np.mean([o.losses[FINEST] for o in outcomes])), float(np.mean(times))


def gain(stages: Stages, base: list[list[Outcome]], other: list[list[Outcome]]) -> float:
    """How much less time `other` takes at equal KL, mean over the KLs that both reach."""
    lines = []
    for levels in (base, other):
        pairs = sorted(measured(stages, outcomes) for outcomes in levels)
        lines.append((np.log([kl for kl, _ in pairs]), [time for _, time in pairs]))
    low = max(line[0][0] for line in lines)
    high = min(line[0][-1] for line in lines)
    at = np.linspace(low, max(low, high), 9)
    return float(np.mean(np.interp(at, *lines[0]) - np.interp(at, *lines[1])))


def main(run_folder: str, target: str) -> None:
    """Measures, prints a table, and writes it with its intervals."""
    folder, config = open_run(run_folder)
    stages = Stages(folder, config)
    rows = [Row(**row) for row in read_json(folder / "sensitivity.json", list)]
    prompts = [*stages.prompts["search"], *stages.prompts["heldout"]]
    tables = {}
    for phase in PHASES:
        steps = grid(math.log2(config.target.largest_scale_factor(phase)), PER_OCTAVE)
        tables[phase] = per_head(stages.statistics, phase, [0.0, *(2.0**step for step in steps)])
    found: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, list[list[Outcome]]] = {}
    for way, power in WAYS.items():
        choices = {
            phase: options(
                tables[phase],
                stages.cost.curves[phase],
                weights(stages.statistics, rows, phase, power or 1.0),
                power,
            )
            for phase in PHASES
        }
        for allowed in ALLOWED:
            picked = optimum(choices, allowed)
            # A layer's entry may be a number per head: what `Thresholds` takes, and `Setting` not yet.
            setting = cast(Setting, {p: tuple(o.factors for o in picked[p]) for p in PHASES})
            outcomes = [
                stages.once(
                    "per_head.jsonl", setting, prompt, partial(stages.evaluate, setting, prompt)
                )
                for prompt in prompts
            ]
            kl, time = measured(stages, outcomes)
            runs.setdefault(way, []).append(outcomes)
            row = {
                "predicted_loss": sum(o.loss for layers in picked.values() for o in layers),
                "predicted_time": float(np.mean([[o.time for o in picked[p]] for p in PHASES])),
                "kl": kl,
                "time": time,
                "sparsity": {phase: sparsity(outcomes, phase) for phase in PHASES},
            }
            found.setdefault(way, []).append(row)
            print(f"{way:20}", json.dumps(row), flush=True)
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(prompts), len(prompts)) for _ in range(RESAMPLES)]
    gains: dict[str, dict[str, Any]] = {}
    for way in [way for way in WAYS if way != "per layer"]:
        spread = [
            gain(
                stages,
                [[outcomes[i] for i in draw] for outcomes in runs["per layer"]],
                [[outcomes[i] for i in draw] for outcomes in runs[way]],
            )
            for draw in draws
        ]
        low, high = np.quantile(spread, (0.025, 0.975)).tolist()
        gains[way] = {"time": gain(stages, runs["per layer"], runs[way]), "interval": [low, high]}
        print(f"{way:20} saves {gains[way]} of dense attention time at equal KL", flush=True)
    notes = {
        "model": stages.notes.model,
        "prompts": len(prompts),
        "lengths": config.prompts.lengths,
    }
    write_json(Path(target), {**notes, "ways": found, "gain_at_equal_kl": gains}, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:3])
