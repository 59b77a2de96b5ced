"""Decode over an FP8 cache (e4m3) beside the same call over bf16, dense and skipping, on this GPU.

    python kernels/bench/fp8.py > fp8.jsonl

The gate comes first: output and decisions against the reference on what the cache means. If it is red,
nothing is timed. Rivals in the same run, taking turns: our call over bf16, and PyTorch's SDPA over bf16.
Rows are JSON lines.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if importlib.util.find_spec("skip_softmax") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from inputs import in_pages, planted
from timings import copy_bandwidth, median_times, ready, sdpa_ready

import skip_softmax as ss

HEADS, KV_HEADS, HEAD_DIM, TILE_KV = 32, 8, 128, 64  # Llama-3.1-8B
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9, 0.95)
Row = dict[str, Any]


class Inputs:
    """A planted decode call, its cache in bf16 and in FP8 with a scale per KV head.

    Attributes:
        q: queries [B, Hq, 1, D].
        k: keys as the FP8 cache means them, in bf16, which holds them exactly.
        v: values likewise.
        factor: the scale factor that skips the quiet tiles [tokens].
        k8: keys in FP8.
        v8: values in FP8.
        scales: keywords of the operations.
    """

    def __init__(self, batch: int, length: int, sparsity: float) -> None:
        self.q, k, v, self.factor = planted(
            "blocks",
            batch,
            HEADS,
            KV_HEADS,
            1,
            length,
            HEAD_DIM,
            TILE_KV,
            sparsity,
            torch.bfloat16,
            "cuda",
        )
        # Of few digits, so that a number of e4m3 times its scale is one of bf16.
        self.scales = {
            name: torch.tensor(numbers, device="cuda").repeat(KV_HEADS // 2)
            for name, numbers in (("k_scale", (0.75, 1.5)), ("v_scale", (0.5, 0.75)))
        }
        (self.k8, self.k), (self.v8, self.v) = (
            _in_fp8(x, scale) for x, scale in zip((k, v), self.scales.values(), strict=True)
        )

    def call(self, *, fp8: bool, page: int = 0, **keywords: Any) -> Any:
        """`decode_attention` on these tensors, in pages of `page` rows, 0: contiguous."""
        k, v = (self.k8, self.v8) if fp8 else (self.k, self.v)
        given: dict[str, Any] = {"tile_kv": TILE_KV, "running_max": "seeded", **keywords}
        if fp8:
            given |= self.scales
        if page:
            batch, length = k.shape[0], k.shape[2]
            k, v, table = in_pages(k, v, page)
            lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
            given |= {"block_table": table.int(), "kv_lens": lengths}
        return partial(ss.decode_attention, self.q, k, v, **given)


def _in_fp8(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor in e4m3, and what that means in bf16; request by request, to spare memory."""
    quantised = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    meant = torch.empty_like(x)
    each = scale.view(-1, 1, 1)
    for here, there, one in zip(quantised, meant, x, strict=True):
        here.copy_((one.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn))
        there.copy_(here.float() * each)
    return quantised, meant


def gate() -> list[str]:
    """What is wrong with the kernel; each line names the call."""
    wrong = []
    given = Inputs(2, 4096, 0.5)
    for scale_factor in (0.0, given.factor):
        truth, counts = ss.decode_attention(
            given.q.double(), given.k.double(), given.v.double(), scale_factor=scale_factor,
            tile_kv=TILE_KV, running_max="seeded", backend="reference", return_stats=True,
        )  # fmt: skip
        for page in (0, 16, 64):
            call = given.call(fp8=True, page=page, scale_factor=scale_factor, return_stats=True)
            out, found = call()
            error = float((out.double() - truth).norm() / truth.norm())
            same = torch.equal(found.skipped, counts.skipped)
            if not (same and error < 4e-3) or bool(scale_factor) != bool(found.skipped.sum()):
                wrong.append(
                    f"scale factor {scale_factor:g}, page {page}: error {error:.2g}, tiles {same}"
                )
    return wrong


def rows(batch: int, length: int, page: int, repeats: int) -> Iterator[Row]:
    """One row per sparsity and dtype of the cache, and SDPA's."""
    copy = copy_bandwidth()
    shape = {
        "phase": "decode", "batch": batch, "q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "kv_len": length, "tile_kv": TILE_KV, "page": page,
    }  # fmt: skip
    for requested in SPARSITIES:
        given = Inputs(batch, length, requested)
        calls: dict[str, Callable[[], object]] = {}
        sparsity = {}
        for name, fp8 in (("fp8", True), ("bf16", False)):
            dense = given.call(fp8=fp8, page=page)
            armed = partial(dense, scale_factor=given.factor)
            counts: Any = armed(return_stats=True)[1]
            sparsity[name] = counts.sparsity
            calls[f"{name} dense"], calls[name] = ready(dense), ready(armed)
        sdpa = {} if page or requested else sdpa_ready(given.q, given.k, given.v, causal=False)
        times = median_times({**calls, **sdpa}, repeats)
        for name, size in (("fp8", 1), ("bf16", 2)):
            ms, dense_ms, skipped = times[name], times[f"{name} dense"], sparsity[name]
            bound = 2 / (2 - skipped)
            total = 2 * batch * KV_HEADS * length * HEAD_DIM * size
            yield {
                **shape, "cache": name, "requested_sparsity": requested, "sparsity": round(skipped, 4),
                "ms": ms, "dense_ms": dense_ms, "speedup_to_dense": dense_ms / ms, "bound": bound,
                "share_of_bound": dense_ms / ms / bound, "dense_tb_per_s": total / dense_ms / 1e9,
                "dense_to_copy": total / dense_ms / 1e9 / copy,
                "to_bf16_dense": times["bf16 dense"] / ms,
                "dense_to_bf16_dense": times["bf16 dense"] / dense_ms, "repeats": repeats,
            }  # fmt: skip
        for name in sdpa:
            yield {**shape, "cache": f"{name} over bf16", "ms": times[name], "repeats": repeats}
        del given, calls, sdpa, dense, armed, counts
        torch.cuda.empty_cache()


def main() -> int:
    """Prints rows as JSON lines; 1 if the gate is red."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=16384, help="[tokens]")
    parser.add_argument("--page", type=int, nargs="*", default=[0, 64], help="0: contiguous")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="written into each row")
    options = parser.parse_args()
    wrong = gate()
    if wrong:
        print("error: the gate is red, nothing is timed: " + "; ".join(wrong), file=sys.stderr)
        return 1
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": options.commit, "date": datetime.date.today().isoformat(), "gate": "green",
    }  # fmt: skip
    for page in options.page:
        for row in rows(options.batch, options.length, page, options.repeats):
            print(json.dumps(row | about), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
