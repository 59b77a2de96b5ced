"""What a serving engine pays for a call besides its tiles: the host's part, and in decode too wide a table.

    python kernels/bench/serving.py host --commit COMMIT > host.jsonl
    python kernels/bench/serving.py graph --commit COMMIT > graph.jsonl

`host`: microseconds of the host per call, of our operations and PyTorch's, which take turns. The tensors are
so short that the device waits for the host. `graph`: device time of a graph that was captured with a table of
128K tokens, as engines do, beside one whose table is just as wide as its lengths need.
"""

from __future__ import annotations

import argparse
import datetime
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
import triton
from timings import median_times, ready
from torch.nn.functional import scaled_dot_product_attention

import skip_softmax as ss
from skip_softmax.choose import backends

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


def prefills(
    q: torch.Tensor, flat_k: torch.Tensor, flat_v: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Prefill by both kernels: contiguous, packed, and a server's call over pages, dense and armed."""
    rows = q[0].transpose(0, 1).contiguous()
    k, v = (x[0].transpose(0, 1).contiguous() for x in (flat_k, flat_v))
    starts = torch.tensor([0, 100, 128], device="cuda", dtype=torch.int32)
    # One allocation per page, as engines have them: keys, then values.
    cache = torch.randn(64, 2, KV_HEADS, 64, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    table = torch.randint(64, (2, 8), device="cuda", dtype=torch.int32)
    lengths = torch.tensor([300, 28], device="cuda", dtype=torch.int32)
    factors = torch.full((HEADS,), 2.0, device="cuda")
    counts = torch.zeros(HEADS, 2, dtype=torch.int64, device="cuda")
    calls: dict[str, Callable[[], object]] = {}
    for backend in backends("prefill"):
        plain = partial(ss.attention, q, flat_k, flat_v, backend=backend)
        calls[backend] = partial(plain, scale_factor=2.0)
        calls[f"{backend}, dense"] = plain
        calls[f"{backend}, packed"] = partial(
            ss.attention_varlen,
            rows,
            k,
            v,
            starts,
            starts,
            100,
            100,
            scale_factor=2.0,
            backend=backend,
        )
        calls[f"{backend}, packed, paged, min_kv_len and counts"] = partial(
            ss.attention_varlen, rows, cache[:, 0], cache[:, 1], starts, None, 100, 300, scale_factor=factors,
            block_table=table, kv_lens=lengths, min_kv_len=64, counts=counts, out=torch.empty_like(rows),
            backend=backend,
        )  # fmt: skip
    return calls


def host_calls() -> dict[str, Callable[[], object]]:
    """What `host` times, by name."""
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
    return {
        "decode, paged": served,
        "decode, paged, min_kv_len and counts": partial(served, min_kv_len=64, counts=counts),
        "decode, paged, dense": partial(served, scale_factor=0.0),
        "decode, contiguous, one number": partial(
            ss.decode_attention, one, flat_k, flat_v, scale_factor=2.0, running_max="seeded"
        ),
        **{f"prefill, {name}": call for name, call in prefills(prompt, flat_k, flat_v).items()},
        "sdpa, decode": partial(scaled_dot_product_attention, one, flat_k, flat_v, enable_gqa=True),
        "sdpa, prefill": partial(
            scaled_dot_product_attention, prompt, flat_k, flat_v, is_causal=True, enable_gqa=True
        ),
    }  # fmt: skip


def host() -> Iterator[dict[str, Any]]:
    """One row per operation."""
    calls = host_calls()
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
    parser.add_argument("--commit", required=True, help="written into each row")
    options = parser.parse_args()
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": options.commit, "date": datetime.date.today().isoformat(), "dtype": "bfloat16",
        "q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
    }  # fmt: skip
    for row in {"host": host, "graph": graph}[options.part]():
        print(json.dumps(row | about), flush=True)


if __name__ == "__main__":
    main()
