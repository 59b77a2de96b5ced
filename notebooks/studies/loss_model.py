"""Which loss model predicts settings: how many levels, what power, and what correction.

    python notebooks/studies/loss_model.py measure 0 1 2 --output runs/loss_model
    python notebooks/studies/loss_model.py table runs/loss_model OUT.json

`measure` takes, per seed, every layer of SmolLM2-135M-Instruct alone at four levels, and 60 settings:
twelve of prefill alone, twelve of decode alone, and 36 of both. `table` predicts the 36: from the layers
only, and with a correction that is fitted to some of the 36, the others.

The answer, in `loss_model.json` beside this file (three sets of two prompts of 1K, a text and a needle; root
mean square of log2(predicted / measured), mean of the sets, with the interval of 95 % of resamples of the
settings):

- What looked like interaction was mostly a wrong power. With one level and the power 1.5, settings are off
  by 0.65 octaves (0.56 to 0.73); with the power 2, 0.46 (0.41 to 0.52); with a power per phase, fitted to
  three levels in the last third of the layers, 0.30 (0.25 to 0.34). Those powers lie between 1.6 and 2.4.
- More is no better: four levels in all layers 0.34, interpolated 0.31. The plan was picked among some twenty
  with errors from 0.28 to 0.46, by error and cost.
- Phases add: together they lose 0.97 to 1.01 times what each loses alone, and single settings scatter by
  8 %. Within decode layers add too. Within prefill they lose 1.1 to 1.6 times their sum, which differs
  between sets: no constant corrects it.
- A factor and a power per phase, fitted to 12 settings, leave 0.23 (0.21 to 0.26); one factor 0.29, a factor
  per phase 0.26, a coherent share per phase 0.27, but that one fails with the old model and few settings.
  Six settings correct little (0.28). With 12, one level and the power 2 do as well (0.22).
- Ranks were hardly wrong before: 0.966, now 0.982, corrected 0.990.

One model and short prompts. Every run folder has the error on its own trials, which had no part in picking
the plan, in its `loss_model.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from calibrate.loss.joint import PhaseLosses, correct
from calibrate.loss.losses import kl_divergence
from calibrate.loss.sensitivity import POWER, LossModel, Row, loss_model, measure_layers
from calibrate.model.load import LoadedModel
from calibrate.model.section import Setting, thresholds_for
from calibrate.pipeline import Stages
from calibrate.prompts.build import Prompt
from calibrate.record.files import read_json, write_json
from calibrate.record.folder import write_config
from calibrate.schema import RunConfig, load_config
from calibrate.search.space import Params, Space, build_space
from calibrate.statistics.counts import scale_factor_at
from skip_softmax.huggingface.applied import applied
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase

LEVELS = (0.3, 0.5, 0.7, 0.85)
SETTINGS = 12  # per phase, alone
PARTNERS = 3  # decode settings that each prefill setting is paired with
SPENT = (3e-4, 2e-2)  # sum of the layers' predicted losses, per phase [nats/token]
FITTED = (6, 12)  # how many settings a correction is fitted to
SPLITS = 20  # into settings that a correction is fitted to, and the others
RESAMPLES = 2000
SPREADS = {"factor": 1.0, "power": 0.25, "kl": 0.3}  # as in `calibrate.loss.joint`

LayerLosses = dict[Phase, "np.ndarray[Any, Any]"]
"""Predicted loss of every layer of a setting [nats/token]; of a phase that is dense, zeros."""


def config_of(seed: int) -> RunConfig:
    """The demo with prompts of one length: two that are scored, four that are counted."""
    demo = Path(__file__).resolve().parents[2] / "configs" / "smollm2-135m.yaml"
    changes = (
        f"seed={seed}",
        "prompts.lengths=[1024]",
        "prompts.calibration=4",
        "prompts.search=2",
    )
    return load_config(demo, changes)


def settings_of(space: Space, seed: int) -> dict[Phase, list[tuple[float, ...]]]:
    """Settings of each phase: tilts, offsets of groups, and scales that spread over two decades of loss."""
    rng = np.random.default_rng(seed)
    found: dict[Phase, list[tuple[float, ...]]] = {phase: [] for phase in PHASES}
    base = space.seeds()[0][1]
    for phase in PHASES:
        for index in range(SETTINGS):
            wanted = SPENT[0] * (SPENT[1] / SPENT[0]) ** ((index + rng.random()) / SETTINGS)
            tilt = float(rng.choice([0.0, 0.5, 1.0, 1.0, 1.3]))
            groups = rng.uniform(-1, 1, space.group_count) * (index % 2)
            params = base | {f"{phase}.tilt": tilt, f"{phase}.dense_below": 0.05 * (index % 3)}
            params |= {f"{phase}.group{i}": float(offset) for i, offset in enumerate(groups)}
            found[phase].append(_at_loss(space, phase, params, wanted))
    return found


def _at_loss(space: Space, phase: Phase, params: Params, wanted: float) -> tuple[float, ...]:
    low, high = -2.0, math.log2(space.target.largest_scale_factor(phase))
    setting: Setting = {}
    for _ in range(30):
        middle = (low + high) / 2
        setting = {phase: space.setting(params | {f"{phase}.log2_scale": middle})[phase]}
        below = space.predicted_loss(setting)[phase] <= wanted
        low, high = (middle, high) if below else (low, middle)
    return setting[phase]


def joint(
    loaded: LoadedModel,
    prompt: Prompt,
    dense: torch.Tensor,
    settings: dict[Phase, list[tuple[float, ...]]],
    thresholds: Callable[[Setting], Thresholds],
) -> Iterator[tuple[int | None, int | None, float]]:
    """Index of the prefill setting, of the decode setting (None: dense), and the KL of both together.

    The prompt runs once per prefill setting; its keys and values serve every decode setting.
    """
    layers = len(loaded.layers)
    steps = torch.tensor([prompt.continuation], device=loaded.model.device)
    for first in (None, *range(len(settings["prefill"]))):
        factors = (0.0,) * layers if first is None else settings["prefill"][first]
        with (
            torch.no_grad(),
            applied(loaded.model, thresholds({"prefill": factors}), decode_from=len(prompt.ids)),
        ):
            start = loaded.model(
                input_ids=torch.tensor([prompt.ids]), use_cache=True, logits_to_keep=1
            )
        partners: list[int | None] = list(range(len(settings["decode"])))
        if first is not None:
            size = len(settings["decode"])
            partners = [None, *((first + 5 * k + 3) % size for k in range(PARTNERS))]
        for second in partners:
            factors = (0.0,) * layers if second is None else settings["decode"][second]
            with (
                torch.no_grad(),
                applied(loaded.model, thresholds({"decode": factors}), decode_from=len(prompt.ids)),
            ):
                out = loaded.model(
                    input_ids=steps,
                    past_key_values=copy.deepcopy(start.past_key_values),
                    use_cache=True,
                )
            sparse = torch.cat([start.logits[0, -1:], out.logits[0]]).float().cpu()
            yield first, second, kl_divergence(dense, sparse)


def every_level(stages: Stages) -> list[tuple[Phase, int, float]]:
    """Each layer at the scale factors that reach the levels in it, as far as they may be used."""
    todo: list[tuple[Phase, int, float]] = []
    for phase in PHASES:
        ceiling = stages.config.target.largest_scale_factor(phase)
        for layer in stages.loaded.calibratable:
            reached = {
                min(scale_factor_at(stages.statistics, phase, level, layer.index), ceiling)
                for level in LEVELS
            }
            for factor in sorted(reached):
                if stages.statistics.layer_sparsity(phase, factor)[layer.index] >= 0.01:
                    todo.append((phase, layer.index, factor))
    return todo


def measure(seed: int, output: Path) -> None:
    """Measures layers alone and settings, one prompt at a time; continues where it stopped."""
    config, folder = config_of(seed), output / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    stages = Stages(folder, config)
    stages.capture()
    path = output / f"{seed}.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {"seed": seed, "alone": {}}
    prompts = stages.prompts["search"]
    todo = every_level(stages)

    def thresholds(setting: Setting) -> Thresholds:
        return thresholds_for(stages.loaded, config, setting)

    for index, prompt in enumerate(prompts):
        rows = found["alone"].setdefault(str(index), [])
        missing = todo[len(rows) :]
        for row in measure_layers(
            stages.loaded, stages.statistics, missing, thresholds, [prompt], stages.dense
        ):
            rows.append(asdict(row))
            write_json(path, found)
        print(f"seed {seed} prompt {index}: {len(rows)} layers alone", flush=True)
    if "settings" not in found:
        space = build_space(
            stages.statistics,
            stages.cost,
            loss_model(alone(found), len(stages.loaded.layers), PHASES),
            tuple(layer.index for layer in stages.loaded.calibratable),
            config.target,
            budget=config.budget.limits["kl"],
            groups=config.search.groups,
        )
        found["settings"] = settings_of(space, seed)
        found["mass"] = {
            phase: [stages.statistics.dropped_mass(phase, s).tolist() for s in of_phase]
            for phase, of_phase in found["settings"].items()
        }
        found["joint"] = {}
    settings = {phase: [tuple(s) for s in found["settings"][phase]] for phase in PHASES}
    for index, prompt in enumerate(prompts):
        if str(index) in found["joint"]:
            continue
        found["joint"][str(index)] = list(
            joint(stages.loaded, prompt, stages.dense(prompt), settings, thresholds)
        )
        write_json(path, found)
        print(f"seed {seed} prompt {index}: joint settings", flush=True)


def alone(found: dict[str, Any]) -> list[Row]:
    """Layers that were measured alone, with the mean KL of the prompts."""
    of_prompts = list(found["alone"].values())
    return [
        Row(**{**rows[0], "kl": float(np.mean([row["kl"] for row in rows]))})
        for rows in zip(*of_prompts, strict=True)
    ]


def compact(found: dict[str, Any]) -> dict[str, Any]:
    """What `table` needs of a set's measurements, in six digits."""

    def six(value: float) -> float:
        return float(f"{value:.6g}")

    return {
        "seed": found["seed"],
        "alone": [
            {k: six(v) if isinstance(v, float) else v for k, v in asdict(row).items()}
            for row in alone(found)
        ],
        "mass": {
            phase: [[six(mass) for mass in layers] for layers in of_phase]
            for phase, of_phase in found["mass"].items()
        },
        "joint": [
            [rows[0][0], rows[0][1], six(float(np.mean([row[2] for row in rows])))]
            for rows in zip(*found["joint"].values(), strict=True)
        ],
    }


# Models of a layer's loss: which measured rows, and what power of the dropped mass.


def rows_at(rows: Sequence[Row], levels: Callable[[int], Sequence[float]]) -> list[Row]:
    """The rows of a plan that measures each layer at some of the levels only.

    A level beyond what a layer can reach is its last row, as in the plan.
    """
    chosen: list[Row] = []
    for phase in PHASES:
        for layer in range(1 + max(row.layer for row in rows)):
            mine = [row for row in rows if (row.phase, row.layer) == (phase, layer)]
            picked = set()
            for level in levels(layer) if mine else ():
                reach = [i for i, row in enumerate(mine) if row.sparsity >= level - 0.01]
                picked.add(reach[0] if reach else len(mine) - 1)
            chosen += [mine[i] for i in sorted(picked)]
    return chosen


def of_power(rows: Sequence[Row], layers: int, power: float) -> LossModel:
    """Weights at a given power."""
    weights: dict[Phase, tuple[float, ...]] = {}
    for phase in PHASES:
        logs: dict[int, list[float]] = {}
        for row in rows:
            if row.phase == phase:
                log = math.log(max(row.kl, 1e-9)) - power * math.log(row.dropped_mass)
                logs.setdefault(row.layer, []).append(log)
        means = {layer: math.exp(float(np.mean(values))) for layer, values in logs.items()}
        weights[phase] = tuple(means.get(i, max(means.values())) for i in range(layers))
    return LossModel(weights, dict.fromkeys(PHASES, power))


def interpolated(
    rows: Sequence[Row], model: LossModel, phase: Phase, layer: int, mass: float
) -> float:
    """Log-linear between a layer's rows, with the model's power beyond them."""
    mine = sorted((row.dropped_mass, row.kl) for row in rows
                  if (row.phase, row.layer) == (phase, layer))  # fmt: skip
    if not mine or mass <= 0:
        return model.loss(phase, layer, mass)
    masses = [m for m, _ in mine]
    near = min(max(mass, masses[0]), masses[-1])
    inside = np.interp(math.log(near), np.log(masses), np.log([max(kl, 1e-9) for _, kl in mine]))
    return float(np.exp(inside)) * (mass / near) ** model.powers[phase]


def late(*levels: float) -> Callable[[int], Sequence[float]]:
    """The levels in the last third of the 30 layers, 0.5 elsewhere: `sensitivity.plan`."""
    return lambda layer: levels if layer >= 20 else (0.5,)


def everywhere(*levels: float) -> Callable[[int], Sequence[float]]:
    """The levels in all layers."""
    return lambda _: levels


BEFORE, NOW = "one level, power 1.5 (before)", "three levels in the last third, fitted power (now)"
MODELS: dict[str, tuple[Callable[[int], Sequence[float]], float | None]] = {
    BEFORE: (everywhere(0.5), 1.5),
    "one level, power 2": (everywhere(0.5), POWER),
    NOW: (late(0.3, 0.5, 0.7), None),
    "0.3 and 0.85 in the last third, fitted power": (late(0.3, 0.85), None),
    "two levels (0.3, 0.7) everywhere, fitted power": (everywhere(0.3, 0.7), None),
    "four levels everywhere, fitted power": (everywhere(*LEVELS), None),
    "four levels everywhere, interpolated": (everywhere(*LEVELS), None),
}
"""Levels of each layer, and the power; None: fitted."""


def layer_losses(name: str, measured: dict[str, Any]) -> list[LayerLosses]:
    """What a model predicts for every setting of both phases, layer by layer."""
    levels, power = MODELS[name]
    rows = rows_at([Row(**row) for row in measured["alone"]], levels)
    layers = len(measured["mass"][PHASES[0]][0])
    model = loss_model(rows, layers, PHASES) if power is None else of_power(rows, layers, power)

    def loss(phase: Phase, layer: int, mass: float) -> float:
        if name.endswith("interpolated"):
            return interpolated(rows, model, phase, layer, mass)
        return model.loss(phase, layer, mass)

    tables = {
        phase: [np.array([loss(phase, i, mass) for i, mass in enumerate(s)]) for s in settings]
        for phase, settings in measured["mass"].items()
    }
    return [
        {phase: tables[phase][index] for phase, index in zip(PHASES, pair, strict=True)}
        for *pair, _ in both(measured)
    ]


def both(measured: dict[str, Any]) -> list[list[Any]]:
    """Settings in which both phases skip: index of each, and the KL."""
    return [row for row in measured["joint"] if None not in row[:2]]


# Corrections: fitted to some settings, they predict the loss of others.


def summed(losses: LayerLosses) -> PhaseLosses:
    """Sum of the layers of each phase."""
    return {phase: float(of_phase.sum()) for phase, of_phase in losses.items()}


def parametric(
    form: Callable[[np.ndarray, LayerLosses], float], start: list[float], spread: list[float]
) -> Callable[[Sequence[LayerLosses], np.ndarray], Callable[[LayerLosses], float]]:
    """A correction whose parameters stay near `start`, within `spread`, unless settings tell otherwise."""

    def fit(settings: Sequence[LayerLosses], kl: np.ndarray) -> Callable[[LayerLosses], float]:
        def residuals(parameters: np.ndarray) -> np.ndarray:
            found = np.array([max(form(parameters, losses), 1e-9) for losses in settings])
            misses = (np.log(found) - np.log(kl)) / SPREADS["kl"]
            return np.concatenate([misses, (parameters - start) / spread])

        fitted = least_squares(residuals, start).x
        return lambda losses: form(fitted, losses)

    return fit


def mixed(parameters: np.ndarray, losses: LayerLosses) -> float:
    """Per phase a mixture of the sum of losses and the square of the sum of their roots."""
    total = 0.0
    for share, of_phase in zip(parameters, losses.values(), strict=True):
        incoherent, coherent = float(of_phase.sum()), float(np.sqrt(of_phase).sum() ** 2)
        total += incoherent + share * (coherent - incoherent)
    return total


def library(settings: Sequence[LayerLosses], kl: np.ndarray) -> Callable[[LayerLosses], float]:
    """`calibrate.loss.joint.correct`."""
    correction = correct([summed(losses) for losses in settings], kl.tolist())
    return lambda losses: correction.loss(summed(losses))


PIVOT = 0.005  # a typical loss [nats/token]
PHASE = "a factor and a power per phase (now)"
CORRECTIONS = {
    "one factor": parametric(
        lambda p, losses: math.exp(p[0]) * sum(summed(losses).values()), [0.0], [SPREADS["factor"]]
    ),
    "one factor and power": parametric(
        lambda p, losses: math.exp(p[0]) * PIVOT * (sum(summed(losses).values()) / PIVOT) ** p[1],
        [0.0, 1.0],
        [SPREADS["factor"], SPREADS["power"]],
    ),
    "a factor per phase": parametric(
        lambda p, losses: sum(
            math.exp(factor) * loss for factor, loss in zip(p, summed(losses).values(), strict=True)
        ),
        [0.0, 0.0],
        [SPREADS["factor"]] * 2,
    ),
    "coherent share per phase": parametric(mixed, [0.0, 0.0], [0.1, 0.1]),
    PHASE: library,
}


def misses(
    name: str, measured: dict[str, Any], correction: str | None, fitted: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of each setting by corrections that it had no part in, as log2 of predicted / measured.

    Returns:
        Mean square and mean over the splits [settings].
    """
    kl = np.array([row[2] for row in both(measured)])
    settings = layer_losses(name, measured)
    if correction is None:
        ratio = np.log2([sum(summed(losses).values()) for losses in settings]) - np.log2(kl)
        return ratio**2, ratio
    rng = np.random.default_rng(measured["seed"])
    found: list[list[float]] = [[] for _ in settings]
    for _ in range(SPLITS):
        order = rng.permutation(len(settings)).tolist()
        predict = CORRECTIONS[correction]([settings[i] for i in order[:fitted]], kl[order[:fitted]])
        for i in order[fitted:]:
            found[i].append(math.log2(max(predict(settings[i]), 1e-9) / kl[i]))
    return (
        np.array([np.mean(np.square(ratios)) for ratios in found]),
        np.array([np.mean(ratios) for ratios in found]),
    )


def error(
    name: str, sets: Sequence[dict[str, Any]], correction: str | None = None, fitted: int = 0
) -> dict[str, Any]:
    """Log error and rank correlation, of each set and their mean; 95 % of resamples of the settings."""
    squares, ratios = zip(*(misses(name, each, correction, fitted) for each in sets), strict=True)
    kls = [np.array([row[2] for row in both(each)]) for each in sets]
    rng = np.random.default_rng(0)

    def numbers(picks: Sequence[np.ndarray]) -> tuple[list[float], list[float]]:
        rms = [float(np.sqrt(s[pick].mean())) for s, pick in zip(squares, picks, strict=True)]
        ranks = [
            float(spearmanr(np.log2(kl[pick]) + r[pick], kl[pick]).statistic)
            for kl, r, pick in zip(kls, ratios, picks, strict=True)
        ]
        return rms, ranks

    rms, ranks = numbers([np.arange(len(kl)) for kl in kls])
    draws = [numbers([rng.integers(0, len(kl), len(kl)) for kl in kls]) for _ in range(RESAMPLES)]
    return {
        "model": name,
        "correction": correction,
        "fitted_to": fitted,
        "log2_error": _summary(rms, [draw[0] for draw in draws]),
        "rank_correlation": _summary(ranks, [draw[1] for draw in draws]),
    }


def _summary(sets: list[float], draws: list[list[float]]) -> dict[str, Any]:
    low, high = np.quantile(np.mean(draws, 1), (0.025, 0.975))
    return {
        "mean": round(float(np.mean(sets)), 3),
        "interval": [round(float(low), 3), round(float(high), 3)],
        "sets": [round(value, 3) for value in sets],
    }


def together(measured: dict[str, Any]) -> list[float]:
    """Mean and spread of log2 of the KL of both phases over the sum of the KLs that each has alone."""
    single = {
        phase: {row[i]: row[2] for row in measured["joint"] if row[1 - i] is None}
        for i, phase in enumerate(PHASES)
    }
    ratios = [
        math.log2(kl / (single["prefill"][first] + single["decode"][second]))
        for first, second, kl in both(measured)
    ]
    return [round(float(np.mean(ratios)), 3), round(float(np.std(ratios, ddof=1)), 3)]


def powers(measured: dict[str, Any]) -> dict[str, dict[Phase, float]]:
    """Powers that the models fit."""
    rows = [Row(**row) for row in measured["alone"]]
    layers = len(measured["mass"][PHASES[0]][0])
    return {
        name: {
            phase: round(power, 3)
            for phase, power in loss_model(rows_at(rows, levels), layers, PHASES).powers.items()
        }
        for name, (levels, power) in MODELS.items()
        if power is None
    }


def table(output: Path, target: Path) -> None:
    """Compares the models and corrections, prints a table, and writes it with what it is made from."""
    files = sorted(output.glob("*.json"), key=lambda path: int(path.stem))
    sets = [compact(read_json(path)) for path in files]
    errors = [error(name, sets) for name in MODELS]
    errors += [
        error(name, sets, correction, fitted)
        for name in (BEFORE, "one level, power 2", NOW)
        for fitted in FITTED
        for correction in CORRECTIONS
    ]
    for row in errors:
        log, rank = row["log2_error"], row["rank_correlation"]
        what = f"{row['correction']}, {row['fitted_to']} settings" if row["correction"] else "none"
        print(f"{row['model']:52} {what:52} {log['mean']:.2f} {log['interval']} {rank['mean']:.3f}")
    notes = {
        "powers": [powers(each) for each in sets],
        "both_phases_over_their_sum": [together(each) for each in sets],
    }
    rows = {"errors": errors, **notes, "measured": sets}
    # One row a line: measurements are long.
    lines = [
        f"{json.dumps(key)}: [\n" + ",\n".join(json.dumps(row) for row in values) + "\n]"
        for key, values in rows.items()
    ]
    target.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("measure", help="measure layers and settings")
    verb.add_argument("seeds", type=int, nargs="+")
    verb.add_argument("--output", type=Path, default=Path("runs/loss_model"))
    verb = verbs.add_parser("table", help="compare the models")
    verb.add_argument("output", type=Path)
    verb.add_argument("target", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "table":
        table(arguments.output, arguments.target)
        return
    for seed in arguments.seeds:
        measure(seed, arguments.output)


if __name__ == "__main__":
    main()
