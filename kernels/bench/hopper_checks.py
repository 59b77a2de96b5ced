"""Programs for the profiler and the sanitizer to inspect the Hopper kernel; results are in `hopper.md`.

    ncu --clock-control none --profile-from-start off -k regex:_hopper --section ComputeWorkloadAnalysis \
        --section WarpStateStats --page raw --csv python kernels/bench/hopper_checks.py points
    compute-sanitizer --tool memcheck python kernels/bench/hopper_checks.py small
    compute-sanitizer --tool racecheck python kernels/bench/hopper_checks.py control

`points`: the points of the table, each once. `small`: one and several items per program, contiguous and in
pages, compared with the reference. `control`: a kernel in plain Gluon that only passes words from one warp
partition to another; what racecheck reports there is about partitions and mbarriers, not about our kernel.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from functools import partial
from pathlib import Path

if importlib.util.find_spec("skip_softmax") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from inputs import in_pages, planted
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

import skip_softmax as ss

SPARSITIES = (0.59, 0.79, 0.92, 0.985)  # requested; the first tiles of every row are kept


def points(length: int = 16384) -> None:
    """Dense, armed with nothing skipped, and four sparsities, at both head_dims."""
    calls = {}
    for head_dim in (128, 64):
        for sparsity in (0.0, *SPARSITIES):
            q, k, v, factor = planted(
                "blocks", 1, 64, 4, length, length, head_dim, 128, sparsity, torch.bfloat16, "cuda"
            )
            call = partial(ss.attention, q, k, v, backend="hopper")
            name = f"head_dim {head_dim}"
            if sparsity == 0.0:
                calls[f"{name}, dense"] = partial(call, scale_factor=0.0)
                factor = torch.zeros(64, device="cuda")  # the host does not know that it is dense
            calls[f"{name}, {sparsity:.1%}"] = partial(call, scale_factor=factor)
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        print(name)
    torch.cuda.profiler.stop()


def small() -> bool:
    """Compares small calls with the reference; returns whether all agree."""
    right = True
    for head_dim in (128, 64):
        for q_len, kv_len, heads in ((300, 700, 4), (257, 500, 200)):
            q, k, v, factor = planted(
                "blocks",
                1,
                heads,
                heads // 2,
                q_len,
                kv_len,
                head_dim,
                128,
                0.6,
                torch.bfloat16,
                "cuda",
            )
            call = partial(ss.attention, q, k, v, scale_factor=factor, return_stats=True)
            out, stats = call(backend="hopper")
            truth, counted = call(backend="reference")
            off = (out - truth).abs().max().item()
            agree = torch.equal(stats.skipped, counted.skipped) and off < 0.02
            right = right and agree
            print(
                f"{heads} heads, {q_len}/{kv_len}, head_dim {head_dim}: agree {agree}, error {off:.4f}"
            )
            for page in (16, 64, 256):
                keys, values, table = in_pages(k, v, page)
                found, paged = ss.attention(
                    q, keys, values, scale_factor=factor, block_table=table, kv_lens=[kv_len],
                    backend="hopper", return_stats=True,
                )  # fmt: skip
                same = torch.equal(found, out) and torch.equal(paged.skipped, stats.skipped)
                right = right and same
                print(f"    pages of {page}: the same bits {same}")
    return right


@gluon.jit
def _send(words, full, free, rounds):
    rows = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    for i in range(rounds):
        mbarrier.wait(free.index(i % 2), (i // 2) & 1 ^ 1)
        words.index(i % 2).store(rows + i)
        mbarrier.arrive(full.index(i % 2), count=1)


@gluon.jit
def _receive(out, words, full, free, rounds):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    rows = gl.arange(0, 128, layout)
    out += gl.program_id(0) * rounds * 128
    for i in range(rounds):
        mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        gl.store(out + 128 * i + rows, words.index(i % 2).load(layout))
        mbarrier.arrive(free.index(i % 2), count=1)


@gluon.jit
def _control(out, rounds):
    words = gl.allocate_shared_memory(
        gl.int32, [2, 128], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    gl.warp_specialize(
        [(_receive, (out, words, full, free, rounds)), (_send, (words, full, free, rounds))],
        [4],
        [48],
    )


def control(programs: int = 264, rounds: int = 8) -> bool:
    """Two warp partitions that pass words by mbarriers, in plain Gluon; returns whether all arrived."""
    out = torch.full((programs, rounds, 128), -1, dtype=torch.int32, device="cuda")
    _control[(programs,)](out, rounds, num_warps=4)
    rows = torch.arange(128, device="cuda")
    sent = rows + torch.arange(rounds, device="cuda")[:, None]
    right = torch.equal(out, sent.int().expand_as(out))
    print(f"what one partition sent, the other received: {right}")
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("points", "small", "control"))
    chosen = parser.parse_args().what
    sys.exit(
        0 if {"points": points, "small": small, "control": control}[chosen]() in (None, True) else 1
    )
