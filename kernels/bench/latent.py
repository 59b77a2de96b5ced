"""Latent attention (MLA) on this GPU: prefill on expanded keys beside SDPA, decode on the latent cache.

    python kernels/bench/latent.py --commit COMMIT -o results/latent-h200.json

Gates on the reference first. Calls that are compared take turns (`timings.py`). What bounds decode is in
`triton.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timings
import torch
import triton
from inputs import planted

import skip_softmax as ss
from skip_softmax.choose import backends

HEADS = 128
D, DV = 192, 128  # columns of expanded keys and values
LATENT, V_LATENT = 576, 512  # of the cache, and of them the values
TILE_HEADS = 64  # query heads that vote together in decode
REPEATS = 20
SPARSITIES = (0.0, 0.3, 0.57, 0.77, 0.91, 0.97)
# What an H200 SXM is sold with: HBM, bf16 without sparsity.
BYTES_PER_MS, FLOPS_PER_MS = 4.8e9, 989e9
Row = dict[str, Any]


def latent_inputs(
    batch: int, length: int, sparsity: float, heads: int = HEADS
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries and a latent cache whose quiet tiles are planted; values are its first columns."""
    q, k, _, factor = planted(
        "blocks", batch, heads, 1, 1, length, LATENT, 64, sparsity, torch.bfloat16, "cuda", value_dim=16,
    )  # fmt: skip
    return q, k, factor


def wrong() -> list[str]:
    """Where a kernel disagrees with the reference; empty: green."""
    found = []
    q, k, v, factor = planted(
        "blocks", 1, 8, 8, 1000, 1500, D, 128, 0.5, torch.bfloat16, "cuda", value_dim=DV
    )
    q1, cache, factor1 = latent_inputs(2, 3000, 0.5)
    calls: dict[str, Callable[..., Any]] = {
        f"prefill {name}": partial(ss.attention, q, k, v, scale_factor=factor, backend=name)
        for name in backends("prefill")
    }
    for heads in (16, 32, 64):
        calls[f"decode, votes of {heads}"] = partial(
            ss.decode_attention, q1, cache, cache[..., :V_LATENT], scale_factor=factor1, tile_heads=heads,
            running_max="seeded", backend="triton",
        )  # fmt: skip
    for name, call in calls.items():
        out, stats = call(return_stats=True)
        truth, true = call(return_stats=True, backend="reference")
        error = ((out.float() - truth.float()).norm() / truth.float().norm()).item()
        alike = torch.equal(stats.visited, true.visited) and torch.equal(
            stats.skipped, true.skipped
        )
        print(f"{name}: relative error {error:.1e}, {int(stats.skipped.sum())} tiles skipped")
        if not alike or not error < 2 * torch.finfo(torch.bfloat16).eps or not stats.skipped.any():
            found.append(
                f"{name}: error {error:.2e}, tiles {'as' if alike else 'not as'} the reference's"
            )
    return found


def prefill_rows(length: int, kernels: tuple[str, ...]) -> list[Row]:
    """128 heads with keys of their own, one request."""
    flops = 2 * HEADS * length * length / 2 * (D + DV)
    rows = []
    for requested in SPARSITIES:
        q, k, v, factor = planted(
            "blocks", 1, HEADS, HEADS, length, length, D, 128, requested, torch.bfloat16, "cuda",
            value_dim=DV,
        )  # fmt: skip
        calls = timings.sdpa_ready(q, k, v, causal=True)
        names = list(calls)
        sparsity = {}
        for backend in kernels:
            call = partial(ss.attention, q, k, v, backend=backend)
            _, stats = call(scale_factor=factor, return_stats=True)
            sparsity[backend] = (stats.skipped.sum() / stats.visited.sum()).item()
            calls[f"{backend} dense"] = timings.ready(partial(call, scale_factor=0.0))
            calls[backend] = timings.ready(partial(call, scale_factor=factor))
        times = timings.median_times(calls, REPEATS)
        others = {f"{name}_ms": times[name] for name in names}
        for backend in kernels:
            ms, dense = times[backend], times[f"{backend} dense"]
            rows.append({
                "phase": "prefill", "backend": backend, "kv_len": length, "q_heads": HEADS,
                "kv_heads": HEADS, "head_dim": D, "head_dim_v": DV, "requested": requested,
                "sparsity": sparsity[backend], "ms": ms, "dense_ms": dense, **others,
                "dense_tflops": flops / dense / 1e9, "to_own_dense": dense / ms,
                **{f"to_{name}": times[name] / ms for name in names},
                **{f"dense_to_{name}": times[name] / dense for name in names},
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        del q, k, v, calls
        torch.cuda.empty_cache()
    return rows


def bounds(batch: int, length: int, sparsity: float) -> Row:
    """Least time of the cache's bytes and of the products [ms]: a skipped tile saves p v, but no byte."""
    keys = batch * length
    flops = 2 * HEADS * keys * (LATENT + V_LATENT * (1 - sparsity))
    return {"bytes_ms": keys * LATENT * 2 / BYTES_PER_MS, "products_ms": flops / FLOPS_PER_MS}


def decode_rows(batch: int, length: int) -> list[Row]:
    """128 heads on one latent cache per request, 64 of them to a vote."""
    rows = []
    table = torch.randperm(batch * length // 64, device="cuda").view(batch, -1).int()
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    for requested in SPARSITIES:
        q, cache, factor = latent_inputs(batch, length, requested)
        pages = torch.empty_like(cache).view(-1, 1, 64, LATENT)
        pages[table.flatten().long()] = cache.view(-1, 1, 64, LATENT)
        about = {"tile_heads": TILE_HEADS, "running_max": "seeded", "backend": "triton"}
        flat = partial(ss.decode_attention, q, cache, cache[..., :V_LATENT], **about)
        paged = partial(
            ss.decode_attention,
            q,
            pages,
            pages[..., :V_LATENT],
            lengths,
            block_table=table,
            **about,
        )
        _, stats = flat(scale_factor=factor, return_stats=True)
        sparsity = (stats.skipped.sum() / stats.visited.sum()).item()
        calls = {
            "dense": timings.ready(flat), "armed": timings.ready(partial(flat, scale_factor=factor)),
            "paged dense": timings.ready(paged),
            "paged": timings.ready(partial(paged, scale_factor=factor)),
        }  # fmt: skip
        times = timings.median_times(calls, REPEATS)
        bound = bounds(batch, length, sparsity)
        dense = max(bounds(batch, length, 0.0).values())
        rows.append({
            "phase": "decode", "backend": "triton", "batch": batch, "kv_len": length, "q_heads": HEADS,
            "kv_heads": 1, "head_dim": LATENT, "head_dim_v": V_LATENT, "tile_heads": TILE_HEADS,
            "requested": requested, "sparsity": sparsity, "ms": times["armed"], "dense_ms": times["dense"],
            "paged_64_ms": times["paged"], "paged_64_dense_ms": times["paged dense"], **bound,
            "dense_over_bound": times["dense"] / dense, "to_own_dense": times["dense"] / times["armed"],
            "bound_to_dense": dense / max(bound.values()),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        del q, cache, pages, calls, flat, paged
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Gate, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--backend", default=",".join(backends("prefill")), help="of prefill")
    parser.add_argument("--length", type=int, default=16384, help="of prefill [tokens]")
    parser.add_argument("--decode", default="16x32768", help="batch x length")
    options = parser.parse_args()
    faults = wrong()
    if faults:
        sys.exit("\n".join(faults))
    batch, length = map(int, options.decode.split("x"))
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": options.commit, "date": datetime.date.today().isoformat(), "gate": "green",
        "dtype": "bfloat16", "repeats": REPEATS, "timing": "graph replay, in turns",
        "copy_tb_per_s": timings.copy_bandwidth(),
        "rows": decode_rows(batch, length),
    }  # fmt: skip
    result["rows"] += prefill_rows(options.length, tuple(options.backend.split(",")))
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
