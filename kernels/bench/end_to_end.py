"""What a thresholds file does to a whole model on a GPU: time to first token and per token, capture.

Usage: python kernels/bench/end_to_end.py RUN_FOLDER [LENGTH] > kernels/bench/results/end-to-end.json
The gate runs first: with all scale factors at 0 the model must rank the same next tokens as with its
own attention.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import skip_softmax as ss
from calibrate import provenance
from calibrate.capture import empty_statistics, forward, observe
from calibrate.models import LoadedModel, load
from calibrate.pipeline import open_run
from calibrate.prompts import Prompt, build
from calibrate.schema import PromptsConfig, Source
from skip_softmax.transformers import intercepted

REPEATS = 20
NEW_TOKENS = 32

Block = Callable[[], AbstractContextManager[Any]]


def milliseconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time on the device, after two warm-up calls."""
    times = []
    for repeat in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def first_token(loaded: LoadedModel, ids: torch.Tensor) -> Any:
    """The prompt in one call; returns the cache."""
    with torch.no_grad():
        return loaded.model(ids, use_cache=True, logits_to_keep=1)


def per_token(loaded: LoadedModel, ids: torch.Tensor, block: Block) -> float:
    """Median time of one decode step behind the prompt [ms]."""
    with block():
        out = first_token(loaded, ids)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

        def step() -> None:
            with torch.no_grad():
                loaded.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return milliseconds(step, NEW_TOKENS)


def main(folder: str, length: int) -> None:
    """Gates, times, prints one JSON document."""
    path, config = open_run(folder)
    thresholds = ss.Thresholds.load(Path(path) / "thresholds.yaml")
    dense_file = thresholds.model_copy(
        update={"layers": (), "scale_factor": type(thresholds.scale_factor)()}
    )
    loaded = load(config.model)
    prompts = build(
        PromptsConfig(
            sources=(Source(task="text"),), lengths=(length,), calibration=1, search=1, heldout=2
        ),
        loaded.tokenizer,
        seed=1,
        max_context=loaded.max_context,
    )
    prompt: Prompt = prompts["heldout"][0]
    ids = torch.tensor([prompt.ids], device=loaded.model.device)
    blocks: dict[str, Block] = {
        "model's own attention": nullcontext,
        "own kernel, dense": lambda: ss.applied(loaded.model, dense_file, count=False),
        "calibrated": lambda: ss.applied(loaded.model, thresholds, count=False),
        "no attention at all": lambda: intercepted(
            loaded.model, lambda call: call.q.new_zeros(call.q.shape)
        ),
    }
    plain = forward(loaded, prompt)
    with ss.applied(loaded.model, dense_file, decode_from=len(prompt.ids)):
        ours = forward(loaded, prompt)
    agreement = float((plain.argmax(-1) == ours.argmax(-1)).double().mean())
    if agreement < 0.95:
        raise SystemExit(
            f"gate: dense runs agree on {agreement:.0%} of next tokens only; no timing is reported"
        )
    rows = {}
    for name, block in blocks.items():
        with block():
            ttft = milliseconds(lambda: first_token(loaded, ids))
        rows[name] = {"ttft_ms": round(ttft, 3), "tpot_ms": round(per_token(loaded, ids, block), 3)}
    own, nothing = rows["model's own attention"], rows["no attention at all"]
    for row in rows.values():
        row |= {
            f"{key}_ratio": round(own[f"{key}_ms"] / row[f"{key}_ms"], 3)
            for key in ("ttft", "tpot")
        }
    share = {key: round(1 - nothing[f"{key}_ms"] / own[f"{key}_ms"], 3) for key in ("ttft", "tpot")}
    with ss.applied(loaded.model, thresholds, decode_from=len(prompt.ids)) as tiles:
        forward(loaded, prompt)
    counted = empty_statistics(loaded, config.geometry, [length])
    captures = milliseconds(lambda: observe(loaded, prompt, counted, config.geometry), 10)
    forwards = milliseconds(lambda: forward(loaded, prompt), 10)
    document = {
        "model": loaded.name,
        "dtype": loaded.dtype,
        "length": length,
        "device": torch.cuda.get_device_name(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "sparsity": {phase: round(tiles.sparsity(phase), 4) for phase in ("prefill", "decode")},
        "agreement_of_dense_runs": agreement,
        "rows": rows,
        "attention_share": share,
        "capture": {
            "forward_ms": round(forwards, 3),
            "capture_ms": round(captures, 3),
            "ratio": round(captures / forwards, 3),
        },
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8128)
