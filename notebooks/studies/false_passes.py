"""How often a proof passes what it must not: simulated, for single bounds and for whole proofs.

    python notebooks/studies/false_passes.py [--reps 1500] [--proofs 400]

Losses are drawn whose true mean is exactly the budget ("at 1": at 95 % confidence at most 5 % may pass),
0.7 and half of it (there, many should). Writes `false_passes.json` beside this file and
`notebooks/images/false_passes.svg`; the committed ones come from the defaults, in 16 minutes on one core.

What it shows: the bound of KL keeps its promise where losses are lognormal within each task, whatever
their spreads, if every task has four prompts or more. Two cases are there because it does
not keep it: a task of one to three prompts that spreads more than the others and decides the mean, and
rare failures, of which a mean over few prompts knows nothing. The share of failing prompts has a bound
of its own, and that one assumes nothing; nor does the bound of the score drop.

Whole proofs run the code of `proof/validate.py` on planted losses: six search prompts say what settings on a
path spend, with their error; candidates are tried from safe to bold, and each is judged at several looks.
What is emitted breaks the promise if its true mean is above the budget. Beside it stands the proof as it was
before: five candidates from 0.1 to 1.0 of the budget on the search prompts, each on all held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from calibrate.loss.measure import Outcome
from calibrate.prompts.build import Prompt
from calibrate.proof.bounds import (
    bounded_upper,
    failing_share_upper,
    lognormal_upper,
    provable_share,
)
from calibrate.proof.plan import looks, shares, spread_seen
from calibrate.proof.validate import validate
from calibrate.proof.verdict import Law
from calibrate.search.path import Candidate
from calibrate.search.points import Point
from calibrate.statistics.counts import Statistics

CONFIDENCE = 0.95
SIZES = (10, 24, 50, 100, 200)
LEVELS = (1.0, 0.7, 0.5)
FLOOR = 0.01  # of the budget, as in `proof/verdict.py`
MARGIN = 3.0  # of the score drop [points]
TOKENS = 32  # of a continuation: one token is 3.1 points

Draw = Callable[[np.random.Generator, int], np.ndarray]


def bootstrap(samples: np.ndarray, seed: int) -> np.ndarray:
    """Upper bounds of the mean of each row: BCa, which the proof used before."""
    bounds = samples.mean(1)
    spread = np.ptp(samples, axis=1) > 0
    for part in np.array_split(np.flatnonzero(spread), max(1, len(samples) // 25)):
        if len(part):
            found = stats.bootstrap(
                (samples[part],), np.mean, axis=-1, confidence_level=CONFIDENCE, n_resamples=999,
                alternative="less", method="BCa", rng=np.random.default_rng(seed),
            )  # fmt: skip
            bounds[part] = found.confidence_interval.high
    return bounds


class Tasks:
    """Losses that are lognormal within each task, with a mean of 1 over all prompts.

    Attributes:
        shares: of the prompts, per task.
        means: of each task, relative to one another.
        spreads: standard deviation of the logarithm, per task.
        lost: share of the last task's prompts that lose `times` as much.
    """

    def __init__(self, shares, means, spreads, lost=0.0, times=60.0):
        self.shares, self.means, self.spreads = shares, means, spreads
        self.lost, self.times = lost, times

    def sizes(self, prompts: int) -> list[int]:
        sizes = [max(1, round(share * prompts)) for share in self.shares[:-1]]
        return [*sizes, prompts - sum(sizes)]

    def strata(self, prompts: int) -> list[str]:
        return [str(task) for task, size in enumerate(self.sizes(prompts)) for _ in range(size)]

    def draw(self, random: np.random.Generator, reps: int, prompts: int) -> np.ndarray:
        sizes = self.sizes(prompts)
        rare = [0.0] * (len(sizes) - 1) + [self.lost]
        means = [m * (1 + r * (self.times - 1)) for m, r in zip(self.means, rare, strict=True)]
        whole = sum(m * s for m, s in zip(means, sizes, strict=True)) / prompts
        parts = []
        for mean, spread, size, share in zip(self.means, self.spreads, sizes, rare, strict=True):
            part = random.lognormal(np.log(mean / whole) - spread**2 / 2, spread, (reps, size))
            parts.append(part * np.where(random.random((reps, size)) < share, self.times, 1.0))
        return np.concatenate(parts, axis=1)


KL = {
    "one task, sd(log) 0.5": Tasks((1.0,), (1.0,), (0.5,)),
    "one task, sd(log) 1": Tasks((1.0,), (1.0,), (1.0,)),
    "one task, sd(log) 1.5": Tasks((1.0,), (1.0,), (1.5,)),
    "two tasks, one loses 10 times as much": Tasks((0.5, 0.5), (1.0, 10.0), (1.0, 1.0)),
    "the same, the heavy one spreads more (0.5, 1.5)": Tasks((0.5, 0.5), (1.0, 10.0), (0.5, 1.5)),
    "the same, the heavy one spreads less (1.5, 0.5)": Tasks((0.5, 0.5), (1.0, 10.0), (1.5, 0.5)),
    "a fifth of the prompts is heavy and spreads more (0.5, 0.5, 1.5)": Tasks(
        (0.4, 0.4, 0.2), (1.0, 1.0, 4.0), (0.5, 0.5, 1.5)
    ),
    "a tenth of the prompts is heavy and spreads more (0.5, 1.5)": Tasks(
        (0.9, 0.1), (1.0, 10.0), (0.5, 1.5)
    ),
    "two tasks, 5 % of the second one's prompts lose 60 times as much": Tasks(
        (0.5, 0.5), (1.0, 1.0), (0.5, 0.5), lost=0.05
    ),
}


def tokens(random: np.random.Generator, shape: tuple[int, int], mean: float) -> np.ndarray:
    """Single tokens are lost and won: -1 to 3 of them per prompt."""
    flips = random.binomial(4, (1 + mean * TOKENS / 100) / 4, shape) - 1
    return flips * 100.0 / TOKENS


def answers(random: np.random.Generator, shape: tuple[int, int], mean: float) -> np.ndarray:
    """Whole answers are lost, all others are not touched."""
    return np.where(random.random(shape) < mean / 100, 100.0, 0.0)


DROPS = {"single tokens": tokens, "whole answers": answers}


def kl_row(tasks: Tasks, prompts: int, reps: int, seed: int) -> dict[str, object]:
    samples = tasks.draw(np.random.default_rng(seed), reps, prompts)
    strata = tasks.strata(prompts)

    def new(of: list[str] | None) -> list[float]:
        return [
            float(np.mean([
                lognormal_upper(row, CONFIDENCE, of, floor=FLOOR, seed=i, draws=2000) <= 1.0
                for i, row in enumerate(level * samples)
            ]))
            for level in LEVELS
        ]  # fmt: skip

    row: dict[str, object] = {
        "per_task": tasks.sizes(prompts),
        # A bootstrap's bound is proportional to the losses.
        "bootstrap": passes(bootstrap(samples, seed), LEVELS),
        "new": new(strata),
    }
    if len(tasks.sizes(prompts)) > 1:
        row["new_without_tasks"] = new(None)
    if tasks.lost:
        # Of all prompts; what the bound of the failing share says when none is met.
        none = (1 - tasks.lost) ** tasks.sizes(prompts)[-1]
        row |= {
            "no_failure_met": round(none, 4),
            "failing_share": tasks.lost * tasks.sizes(prompts)[-1] / prompts,
            "failing_share_upper_if_none_met": failing_share_upper(0, prompts, CONFIDENCE),
        }
    return row


def passes(bounds: np.ndarray, levels: tuple[float, ...]) -> list[float]:
    return [float(np.mean(level * bounds <= 1.0)) for level in levels]


def drop_row(draw, prompts: int, reps: int, seed: int) -> dict[str, object]:
    random = np.random.default_rng(seed)
    old, new = [], []
    for level in (*LEVELS, 0.0):
        samples = draw(random, (reps, prompts), level * MARGIN)
        # The bootstrap assumed one more prompt that loses a token.
        assumed = np.concatenate([samples, np.full((reps, 1), 100.0 / TOKENS)], axis=1)
        old.append(float(np.mean(bootstrap(assumed, seed) <= MARGIN)))
        bounds = [bounded_upper(row, CONFIDENCE, high=100.0) for row in np.sort(samples, axis=1)]
        new.append(float(np.mean(np.array(bounds) <= MARGIN)))
    return {"bootstrap": old, "new": new}


# Whole proofs.

SEARCH = 6  # prompts
ATTEMPTS = 10  # the default
BEFORE = (0.1, 0.325, 0.55, 0.775, 1.0)
# Losses do not all grow alike along a path: prompt by prompt, as a power of what is spent.
GROWTH = 0.15
PROOFS = {
    "one task, sd(log) 0.5": Tasks((1.0,), (1.0,), (0.5,)),
    "one task, sd(log) 1": Tasks((1.0,), (1.0,), (1.0,)),
    "one task, sd(log) 1.5": Tasks((1.0,), (1.0,), (1.5,)),
    # Means and spreads as measured in 28 calibrations (`calibrations.json`).
    "four tasks as measured (0.55, 0.55, 0.34, 0.55)": Tasks(
        (0.2, 0.2, 0.2, 0.4), (0.9, 0.65, 1.64, 0.8), (0.55, 0.55, 0.34, 0.55)
    ),
    "two tasks, the heavy one spreads more (0.5, 1.5)": Tasks((0.5, 0.5), (1.0, 10.0), (0.5, 1.5)),
}
LAW = Law({"kl": 1.0}, CONFIDENCE, 0)
NOTHING = Statistics.empty({}, 1, 1, 1, [1])
TILES = {"prefill": [1], "decode": [1]}


class Planted:
    """One planted proof: what settings on a path do to search and held-out prompts."""

    def __init__(self, tasks: Tasks, prompts: int, random: np.random.Generator):
        self.names, self.losses, self.growth = self.drawn(tasks, prompts, random)
        self.searched, found, _ = self.drawn(tasks, SEARCH, random)
        self.measured, self.scale = found, float(found.mean())  # of the setting that truly spends 1
        self.prompts = [
            Prompt(name, "heldout", 1, (i,), (1,), has_answer=False)
            for i, name in enumerate(self.names)
        ]
        self.runs = 0

    @staticmethod
    def drawn(tasks: Tasks, prompts: int, random: np.random.Generator):
        """Tasks in turn, as prompts come."""
        names = np.array(tasks.strata(prompts))
        order = np.argsort([(np.flatnonzero(names == n) == i).argmax() / sum(names == n)
                            for i, n in enumerate(names)], kind="stable")  # fmt: skip
        losses = tasks.draw(random, 1, prompts)[0]
        return names[order].tolist(), losses[order], random.normal(1.0, GROWTH, prompts)

    @staticmethod
    def true(spends: float) -> float:
        """The true mean of a setting, in budgets."""
        return float(spends * np.exp(GROWTH**2 * np.log(spends) ** 2 / 2))

    def kl(self, spends: float) -> np.ndarray:
        return self.losses * spends**self.growth

    def run(self, setting, prompt: Prompt) -> Outcome:
        self.runs += 1
        kl = float(self.kl(setting["prefill"][0])[prompt.ids[0]])
        return Outcome(prompt.key, prompt.task, 1, {"kl": kl}, 0.0, TILES, TILES)

    def now(self) -> float | None:
        """What the setting that the proof emits truly spends; None: nothing passed."""
        spread = spread_seen([self.measured.tolist()], self.searched, 1.0)
        last = looks(self.names, CONFIDENCE)[-1].confidence
        aims = shares(provable_share(self.names, last, spread), ATTEMPTS)
        sequence = []
        for share in aims:
            setting = dict.fromkeys(TILES, (share / self.scale,))
            point = Point("planted", setting, {}, 1.0, {"prefill": 1.0, "decode": 1.0})
            sequence.append(Candidate(point, setting, share, 1.0 / share))
        found = validate(sequence, (), self.prompts, self.run, NOTHING, LAW, None, lambda _: 1.0)
        return self.true(found.chosen.setting["prefill"][0]) if found.passed else None

    def before(self) -> float | None:
        emitted = None
        for share in BEFORE:
            spends = share / self.scale
            self.runs += len(self.names)
            if lognormal_upper(self.kl(spends), CONFIDENCE, self.names, floor=FLOOR) > 1.0:
                break
            emitted = self.true(spends)
        return emitted


def proof_row(tasks: Tasks, prompts: int, reps: int, seed: int) -> dict[str, object]:
    row: dict[str, object] = {"per_task": tasks.sizes(prompts)}
    for name in ("before", "new"):
        random, emitted, runs = np.random.default_rng(seed), [], 0
        for _ in range(reps):
            planted = Planted(tasks, prompts, random)
            emitted.append(planted.before() if name == "before" else planted.now())
            runs += planted.runs
        passed = [spent for spent in emitted if spent is not None]
        row[name] = [
            sum(spent > 1.0 for spent in passed) / reps,
            sum(passed) / reps,
            runs / reps / prompts,
            len(passed) / reps,
        ]
    return row


# The figure.

WIDTH, HEIGHT, GAP = 230, 130, 46
STYLES = {
    "bootstrap": ("#b3541e", "5 3", "bootstrap (BCa), as before"),
    "new": ("#1f6fc4", "", "today's bound"),
    "new_without_tasks": ("#646e78", "2 2", "the same, blind to tasks"),
    "before": ("#646e78", "5 3", "the proof before"),
}


def figure(found: dict[str, dict[str, dict[str, dict[str, object]]]]) -> str:
    cases = [
        (title, rows, group == "proofs") for group in found for title, rows in found[group].items()
    ]
    wide, columns = WIDTH + GAP, 4
    lines = -(-len(cases) // columns)
    tall = 3 * HEIGHT + 160
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * wide + 20} '
        f'{lines * tall + 40}" font-family="sans-serif" font-size="10" fill="#1c2127">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    x = 40
    for colour, dash, name in STYLES.values():
        out.append(
            f'<path d="M{x} 18h26" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        out.append(f'<text x="{x + 32}" y="22" font-size="12">{name}</text>')
        x += 230
    for index, (title, rows, whole) in enumerate(cases):
        left = 40 + index % columns * wide
        top = 66 + index // columns * tall
        for number, line in enumerate(folded(title, 42)):
            out.append(
                f'<text x="{left}" y="{top - 18 + 12 * number}" font-weight="bold">{line}</text>'
            )
        below = top + HEIGHT + 52
        if whole:
            panel(out, rows, left, top + 16, 0, 40, "emitted above the budget [%]; at most 5 may")
            panel(out, rows, left, below, 1, 100, "share of the budget spent [%], by prompts")
            third = below + HEIGHT + 36
            panel(out, rows, left, third, 2, 800, "runs per held-out prompt [%], by prompts")
        else:
            # False passes on a scale to 40 %, power at half the budget to 100 %.
            panel(out, rows, left, top + 16, 0, 40, "pass at 1 budget [%]; at most 5 may")
            panel(out, rows, left, below, 2, 100, "pass at half the budget [%], by prompts")
    return "\n".join([*out, "</svg>\n"])


def folded(title: str, width: int) -> list[str]:
    lines = [""]
    for word in title.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def panel(out, rows, left: int, top: int, level: int, most: int, title: str) -> None:
    def y(share: float) -> float:
        return round(top + HEIGHT - HEIGHT * min(100 * share / most, 1.0), 1)

    out.append(
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#dfe3e8"/>'
    )
    out.append(f'<text x="{left}" y="{top - 4}" fill="#646e78">{title}</text>')
    if level == 0:
        out.append(f'<path d="M{left} {y(0.05)}h{WIDTH}" stroke="#1c2127" stroke-width="0.7"/>')
    for tick in (0, most // 2, most):
        out.append(f'<text x="{left - 5}" y="{y(tick / 100) + 3}" text-anchor="end">{tick}</text>')
    places = [left + 12 + i * (WIDTH - 24) / (len(SIZES) - 1) for i in range(len(SIZES))]
    for place, size in zip(places, SIZES, strict=True):
        out.append(f'<text x="{place}" y="{top + HEIGHT + 12}" text-anchor="middle">{size}</text>')
    for name, (colour, dash, _) in STYLES.items():
        points = [
            (place, y(row[name][level]))
            for place, row in zip(places, rows.values(), strict=True)
            if name in row
        ]
        if points:
            path = " ".join(f"{a:.1f},{b}" for a, b in points)
            out.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
                f'stroke-dasharray="{dash}"/>'
            )
            out += [f'<circle cx="{a:.1f}" cy="{b}" r="2.5" fill="{colour}"/>' for a, b in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=1500, help="samples per case and size")
    parser.add_argument("--proofs", type=int, default=400, help="proofs per case and size")
    arguments = parser.parse_args()
    started = time.monotonic()
    found: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    seed = 0
    for group, cases, row_of, reps in (
        ("kl", KL, kl_row, arguments.reps),
        ("score_drop", DROPS, drop_row, arguments.reps),
        ("proofs", PROOFS, proof_row, arguments.proofs),
    ):
        found[group] = {}
        for title, case in cases.items():
            prefix = {"score_drop": f"score drop, margin {MARGIN:g}: ", "proofs": "proofs, "}
            shown = prefix.get(group, "") + title
            found[group][shown] = rows = {}
            for prompts in SIZES:
                seed += 1
                rows[str(prompts)] = row_of(case, prompts, reps, seed)
                print(
                    f"{time.monotonic() - started:5.0f} s  {shown}, {prompts}: {rows[str(prompts)]}"
                )
    data = {
        "confidence": CONFIDENCE,
        "reps": arguments.reps,
        "proofs": arguments.proofs,
        "levels": {"kl": LEVELS, "score_drop": (*LEVELS, 0.0)},
        "columns": {
            "kl, score_drop": "share of samples that pass, per level: true mean as a share of the budget",
            "proofs": "share that emits a setting above the budget; mean share of the budget spent, 0 where "
            "nothing is emitted; runs per held-out prompt; share that emits a setting",
        },
        "cases": found,
    }
    (HERE / "false_passes.json").write_text(json.dumps(data, indent=1) + "\n")
    (ROOT / "notebooks" / "images" / "false_passes.svg").write_text(figure(found))


if __name__ == "__main__":
    main()
