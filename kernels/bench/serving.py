"""What a serving engine pays for a decode call besides its tiles: the host's part, and too wide a table.

    python kernels/bench/serving.py host > host.jsonl
    python kernels/bench/serving.py graph > graph.jsonl

`host`: microseconds of the host per call, of our operations and PyTorch's, which take turns. The tensors are
so short that the device waits for the host. `graph`: device time of a graph that was captured with a table of
128K tokens, as engines do, beside one whose table is just as wide as its lengths need.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if importlib.util.find_spec("skip_softmax") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from timings import median_times, ready
from torch.nn.functional import scaled_dot_product_attention

import skip_softmax as ss

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3.1-8B
LONGEST = 131072
CALLS, ROUNDS = 200, 20


def microseconds(call: Callable[[], object]) -> float:
    """Of the host per call; the queue is empty at the start and never full."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - started) / CALLS * 1e6


def paged(batch: int, width: int, page: int, pages: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values in `pages` pages, and a table of `width` tokens per request."""
    q = torch.randn(batch, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    # Heads side by side in a page's rows, as engines have them by default.
    shape = pages, page, KV_HEADS, 2 * HEAD_DIM
    cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    table = torch.randint(pages, (batch, width // page), device="cuda", dtype=torch.int32)
    return q, *cache.split(HEAD_DIM, -1), table


def host() -> Iterator[dict[str, Any]]:
    """One row per operation."""
    q, k, v, table = paged(4, 1024, 64, 256)
    lengths = torch.tensor([100, 64, 0, 33], device="cuda", dtype=torch.int32)
    factors = torch.full((KV_HEADS,), 2.0, device="cuda")
    out, counts = torch.empty_like(q), torch.zeros(KV_HEADS, 2, dtype=torch.int64, device="cuda")
    served = partial(
        ss.decode_attention, q, k, v, lengths, scale_factor=factors, block_table=table,
        running_max="seeded", out=out,
    )  # fmt: skip
    run = q[:, :, None]
    one = run[:1].transpose(1, 2).reshape(1, 1, HEADS, HEAD_DIM).transpose(1, 2)
    flat_k, flat_v = (x[:2].transpose(0, 1).reshape(1, KV_HEADS, 128, HEAD_DIM) for x in (k, v))
    prompt = torch.randn(1, HEADS, 128, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {
        "decode, paged": served,
        "decode, paged, min_kv_len and counts": partial(served, min_kv_len=64, counts=counts),
        "decode, paged, dense": partial(served, scale_factor=0.0),
        "decode, contiguous, one number": partial(
            ss.decode_attention, one, flat_k, flat_v, scale_factor=2.0, running_max="seeded"
        ),
        "prefill": partial(ss.attention, prompt, flat_k, flat_v, scale_factor=2.0),
        "sdpa, decode": partial(scaled_dot_product_attention, one, flat_k, flat_v, enable_gqa=True),
        "sdpa, prefill": partial(
            scaled_dot_product_attention, prompt, flat_k, flat_v, is_causal=True, enable_gqa=True
        ),
    }  # fmt: skip
    with torch.no_grad():
        for call in calls.values():
            for _ in range(3):
                call()
        times = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(microseconds(call))
    for name, taken in times.items():
        yield {"part": "host", "call": name, "microseconds": median(taken), "least": min(taken)}


def graph() -> Iterator[dict[str, Any]]:
    """One row per page size and batch of lengths."""
    batches = {
        "1 x 1K": [1024], "1 x 16K": [16384], "1 x 128K": [LONGEST], "8 x 1K": [1024] * 8,
        "8 x 16K": [16384] * 8, "8 x 128K": [LONGEST] * 8, "128K and 7 x 1K": [LONGEST] + [1024] * 7,
        "32 x 1K": [1024] * 32, "32 x 16K": [16384] * 32, "128K and 31 x 1K": [LONGEST] + [1024] * 31,
    }  # fmt: skip
    for page in (16, 64):
        for name, lengths in batches.items():
            q, k, v, table = paged(len(lengths), LONGEST, page, 2**20 // page)
            calls = {}
            for width in (LONGEST, max(lengths)):
                call = partial(
                    ss.decode_attention, q, k, v,
                    torch.tensor(lengths, device="cuda", dtype=torch.int32),
                    block_table=table[:, : width // page].contiguous(),
                    scale_factor=torch.full((KV_HEADS,), 1e-6, device="cuda"), running_max="seeded",
                )  # fmt: skip
                calls["wide" if len(calls) == 0 else "exact"] = ready(call)
            times = median_times(calls, ROUNDS)
            # Nothing is skipped: every key and value is read.
            size = 4 * KV_HEADS * HEAD_DIM * sum(lengths)
            yield {
                "part": "graph", "page": page, "lengths": name, "ms": times["wide"],
                "ms_of_exact_table": times["exact"], "tb_per_s": size / times["wide"] / 1e9,
            }  # fmt: skip


def main() -> None:
    """Prints rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["host", "graph"])
    rows = {"host": host, "graph": graph}[parser.parse_args().part]()
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for row in rows:
        print(json.dumps({**row, **about}), flush=True)


if __name__ == "__main__":
    main()
