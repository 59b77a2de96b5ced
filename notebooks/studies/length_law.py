"""What a threshold of another law in the KV length than `scale_factor / kv_len` would gain.

    python notebooks/studies/length_law.py run 0 1 2 --output runs/generalisation
    python notebooks/studies/length_law.py table runs/generalisation OUT.json

Prompts of several lengths share one file. Three ways to set its numbers are compared, each the analytic
optimum of predicted time at a predicted loss (both are means over lengths): `one` scale factor per layer for
all lengths, as files have now; one times `kv_len ** (1 - exponent)`, with the best exponent of each phase;
and `free`, one number per layer and length, which no law can beat. The KL of each is measured on held-out
prompts, and times are compared at equal KL.

From statistics and sensitivities alone, the best exponents are predicted to gain 0.05 to 0.17 points of
attention time; nothing was measured for so little, and files keep the engines' law.

It takes the prompts and folders of `generalisation.py`, whatever that has measured there or not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from generalisation import BUDGET, SHARE, Seed, mean, measure, measuring, seeds_of

from calibrate.loss.losses import FINEST
from calibrate.loss.measure import Outcome
from calibrate.loss.sensitivity import LossModel
from calibrate.model.section import Setting
from calibrate.record.files import write_json
from calibrate.search.cost import Cost
from calibrate.search.space import grid
from calibrate.statistics.counts import PARTS, Statistics
from skip_softmax.thresholds.types import PHASES, Phase

WAYS = ("one", "exponent", "free")
LEVELS = (0.0025, 0.005, 0.01)  # predicted losses at which they are compared [nats/token]
EXPONENTS = tuple(np.arange(0.0, 3.01, 0.25).tolist())
PER_OCTAVE = 8  # scale factors, at the edges of the histograms' bins
RESAMPLES = 2000


def law(seed: Seed) -> dict[str, Any]:
    """Time and loss of settings under three laws in the KV length, at several predicted losses."""
    statistics = seed.counted(seed.sets["calibration"])
    table = Table(seed, statistics, seed.losses(statistics, seed.probes))
    found: dict[str, Any] = {"exponents": table.exponents()}
    for way in WAYS:
        for allowed in LEVELS:
            settings, note = table.best(way, allowed)
            outcomes = [seed.evaluate(settings[p.length], p) for p in seed.sets["heldout"]]
            row = {**note, "allowed": allowed, "outcomes": [_spent(seed.cost, o) for o in outcomes]}
            found.setdefault(way, []).append(row)
    return found


def _spent(cost: Cost, found: Outcome) -> dict[str, Any]:
    """Length, loss, predicted time at the achieved sparsity and tiles of one outcome."""
    times, tiles = {}, {}
    for phase in PHASES:
        pairs = zip(found.skipped[phase], found.visited[phase], strict=True)
        shares = [skipped / max(visited, 1) for skipped, visited in pairs]
        times[phase] = cost.relative_time(phase, shares, [share > 0 for share in shares])
        tiles[phase] = [sum(found.skipped[phase]), sum(found.visited[phase])]
    return {
        "length": found.length,
        "task": found.task,
        "kl": found.losses[FINEST],
        "time": times,
        "tiles": tiles,
    }


@dataclass(frozen=True)
class _Law:
    """Threshold ~ kv_len ** -exponent.

    Attributes:
        exponent: 1 is the law of scale factors.
        index: of the grid at each length [lengths, grid].
        time: [lengths, grid, layers], or their mean over lengths [1, grid, layers].
        loss: likewise.
    """

    exponent: float
    index: np.ndarray
    time: np.ndarray
    loss: np.ndarray


_Picked = tuple[_Law, np.ndarray]
"""A law, and its option for each layer [lengths or 1, layers]."""


class Table:
    """What each scale factor does at each length: share of tiles, dropped mass, time and predicted loss.

    Attributes:
        factors: the grid of scale factors, rising; the first is 0 [tokens].
        share: per phase, [lengths, grid, layers].
        mass: likewise.
        time: likewise, relative to dense.
        loss: likewise [nats/token].
    """

    def __init__(self, seed: Seed, statistics: Statistics, losses: LossModel) -> None:
        self.lengths = statistics.lengths
        top = {p: math.log2(seed.config.target.largest_scale_factor(p)) for p in PHASES}
        self.factors = {p: [0.0, *(2.0**step for step in grid(top[p], PER_OCTAVE))] for p in PHASES}
        self.share, self.mass, self.time, self.loss = ({} for _ in range(4))
        for phase in PHASES:
            share, mass = [], []
            for length_bin in range(len(self.lengths)):
                one = only(statistics, length_bin)
                share.append([one.layer_sparsity(phase, f).tolist() for f in self.factors[phase]])
                mass.append([one.dropped_mass(phase, f).tolist() for f in self.factors[phase]])
            self.share[phase], self.mass[phase] = np.array(share), np.array(mass)
            at = np.vectorize(seed.cost.curves[phase].at)
            self.time[phase] = at(self.share[phase])
            self.time[phase][:, 0] = 1.0  # the dense kernel
            self.loss[phase] = np.array(
                [
                    [[losses.loss(phase, i, m) for i, m in enumerate(row)] for row in rows]
                    for rows in mass
                ]
            )

    def shifts(self, phase: Phase, exponent: float) -> np.ndarray:
        """Grid index at each length [lengths, grid] under threshold ~ kv_len ** -exponent."""
        steps = [
            round(PER_OCTAVE * (1 - exponent) * math.log2(n / self.lengths[0]))
            for n in self.lengths
        ]
        last = len(self.factors[phase]) - 1
        index = np.arange(last + 1)[None] + np.array(steps)[:, None]
        return np.where(np.arange(last + 1)[None] == 0, 0, index.clip(1, last))

    def best(self, way: str, allowed: float) -> tuple[dict[int, Setting], dict[str, Any]]:
        """The setting of each length with the least time, mean over lengths and phases, within a loss.

        Args:
            way: `one` scale factor per layer for all lengths, one times a power of the length
                (`exponent`, the best one of each phase), or one per length (`free`).
            allowed: predicted loss, mean over lengths [nats/token].

        Returns:
            Settings by length, and what is predicted for them.
        """
        options = {phase: list(self._options(phase, way)) for phase in PHASES}

        def picked(log2_price: float) -> dict[Phase, _Picked]:
            """For this price the phases and layers do not depend on each other."""
            found = {}
            for phase, laws in options.items():
                costs = [law.time + 2.0**log2_price * law.loss for law in laws]
                best = int(np.argmin([cost.min(1).sum() for cost in costs]))
                found[phase] = laws[best], costs[best].argmin(1)
            return found

        def total(picks: dict[Phase, _Picked], what: str) -> float:
            """Sum over layers and phases, mean over lengths."""
            return sum(
                float(np.take_along_axis(getattr(law, what), pick[:, None], 1).mean(0).sum())
                for law, pick in picks.values()
            )

        low, high = -30.0, 60.0
        for _ in range(50):
            middle = (low + high) / 2
            spent = total(picked(middle), "loss")
            low, high = (low, middle) if spent <= allowed else (middle, high)
        picks = picked(high)
        settings: dict[int, Setting] = {
            length: {
                phase: tuple(
                    self.factors[phase][i] for i in law.index[row][pick[min(row, len(pick) - 1)]]
                )
                for phase, (law, pick) in picks.items()
            }
            for row, length in enumerate(self.lengths)
        }
        layers = self.time["prefill"].shape[2]
        return settings, {
            "time": total(picks, "time") / layers / len(PHASES),
            "loss": total(picks, "loss"),
            "exponents": {phase: law.exponent for phase, (law, _) in picks.items()},
        }

    def _options(self, phase: Phase, way: str) -> Iterator[_Law]:
        """The laws that a way allows, with what each of their scale factors does."""
        every = np.arange(len(self.lengths))[:, None]
        for exponent in EXPONENTS if way == "exponent" else (1.0,):
            index = self.shifts(phase, exponent)
            time, loss = self.time[phase][every, index], self.loss[phase][every, index]
            if way != "free":
                time, loss = time.mean(0, keepdims=True), loss.mean(0, keepdims=True)
            yield _Law(exponent, index, time, loss)

    def exponents(self) -> dict[str, Any]:
        """Of threshold ~ kv_len ** -exponent, per layer: at equal dropped mass and at equal sparsity."""
        settings, _ = self.best("one", SHARE * BUDGET)
        found: dict[str, Any] = {}
        for phase in PHASES:
            for name, values in (("mass", self.mass[phase]), ("sparsity", self.share[phase])):
                fitted = []
                for layer, factor in enumerate(settings[self.lengths[0]][phase]):
                    at = self.factors[phase].index(factor)
                    fitted.append(
                        _exponent(values[:, :, layer], at, self.factors[phase], self.lengths)
                    )
                found.setdefault(phase, {})[name] = fitted
        return found


def _exponent(
    values: np.ndarray, at: int, factors: Sequence[float], lengths: Sequence[int]
) -> float | None:
    """The exponent that keeps a quantity [lengths, grid] equal at all lengths; None: it cannot be."""
    wanted = float(values[:, at].mean())
    if at == 0 or wanted <= 0 or any(row[-1] < wanted for row in values):
        return None
    logs = np.log2(factors[1:])
    found = [float(np.interp(wanted, row[1:], logs)) for row in values]
    slope = np.polyfit(np.log2(lengths), found, 1)[0]
    return 1.0 - float(slope)


def only(statistics: Statistics, length_bin: int) -> Statistics:
    """The same statistics with every other length left out."""
    one = statistics.like()
    for name in PARTS:
        for phase in PHASES:
            kept, whole = getattr(one, name)[phase], getattr(statistics, name)[phase]
            if name in ("counts", "mass"):
                kept[:, :, length_bin] = whole[:, :, length_bin]
            else:
                kept[..., length_bin] = whole[..., length_bin]
    return one


def gain(base: list[list[dict[str, Any]]], other: list[list[dict[str, Any]]]) -> float:
    """How much less time `other` takes at equal KL, mean over the KLs that both reach [of dense time]."""
    lines = []
    for levels in (base, other):
        pairs = sorted(
            (
                float(np.mean([row["kl"] for row in rows])),
                float(np.mean([list(row["time"].values()) for row in rows])),
            )
            for rows in levels
        )
        lines.append((np.log([kl for kl, _ in pairs]), [time for _, time in pairs]))
    low = max(line[0][0] for line in lines)
    high = min(line[0][-1] for line in lines)
    at = np.linspace(low, max(low, high), 9)
    return float(np.mean(np.interp(at, *lines[0]) - np.interp(at, *lines[1])))


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """What each law gains over one number for all lengths, over the prompts of all seeds."""
    runs = [seed["law"] for seed in seeds if "law" in seed]
    if not runs:
        return {}
    pooled = {
        way: [
            [row for run in runs for row in run[way][level]["outcomes"]]
            for level in range(len(LEVELS))
        ]
        for way in WAYS
    }
    lengths = np.array([row["length"] for row in pooled["one"][0]])
    random = np.random.default_rng(0)
    # Within each length, so that every draw has as many prompts of each.
    places = [np.flatnonzero(lengths == n) for n in sorted(set(lengths))]
    draws = [
        np.concatenate([random.choice(at, len(at)) for at in places]) for _ in range(RESAMPLES)
    ]
    found: dict[str, Any] = {}
    for way in WAYS:
        rows = []
        for level, outcomes in enumerate(pooled[way]):
            tiles = {p: np.sum([row["tiles"][p] for row in outcomes], axis=0) for p in PHASES}
            rows.append(
                {
                    "predicted": [
                        mean([run[way][level][name] for run in runs]) for name in ("loss", "time")
                    ],
                    "exponents": [run[way][level]["exponents"] for run in runs],
                    "kl": mean([row["kl"] for row in outcomes]),
                    "kl_by_length": {
                        str(n): mean([r["kl"] for r in outcomes if r["length"] == n])
                        for n in sorted(set(lengths.tolist()))
                    },
                    "time": mean([np.mean(list(row["time"].values())) for row in outcomes]),
                    "tiles_skipped": {p: round(float(t[0] / t[1]), 4) for p, t in tiles.items()},
                }
            )
        found[way] = {"levels": rows}
        if way == "one":
            continue
        spread = [
            gain(
                [[outcomes[i] for i in draw] for outcomes in pooled["one"]],
                [[outcomes[i] for i in draw] for outcomes in pooled[way]],
            )
            for draw in draws
        ]
        low, high = np.quantile(spread, (0.025, 0.975)).tolist()
        found[way]["gain"] = [round(x, 4) for x in (gain(pooled["one"], pooled[way]), low, high)]
    for phase in PHASES:
        for name in ("mass", "sparsity"):
            values = [x for run in runs for x in run["exponents"][phase][name] if x is not None]
            quartiles = np.quantile(values, (0.25, 0.5, 0.75)).round(2).tolist() if values else None
            found.setdefault("exponents", {}).setdefault(phase, {})[name] = {
                "quartiles": quartiles,
                "layers": len(values),
            }
    return found


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    measuring(verbs.add_parser("run", help="measure"))
    verb = verbs.add_parser("table", help="sum up the seeds")
    verb.add_argument("output", type=Path)
    verb.add_argument("target", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "run":
        measure(arguments, {"law": law})
        return
    found = summary(seeds_of(arguments.output))
    write_json(arguments.target, found, indent=1)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
