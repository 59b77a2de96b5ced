"""What the profiler and the sanitizer run to look into the Hopper kernel; `hopper.md` has what they said.

    ncu --clock-control none --profile-from-start off -k regex:_hopper --section ComputeWorkloadAnalysis \
        --section WarpStateStats --page raw --csv python kernels/bench/hopper_checks.py points
    compute-sanitizer --tool memcheck python kernels/bench/hopper_checks.py small
    compute-sanitizer --tool racecheck python kernels/bench/hopper_checks.py control

`points`: the points of the table, each once. `small`: one and several items per program, against the
reference. `control`: a kernel that only has warp partitions; what racecheck says of it, it says of Triton.
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
from inputs import planted
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
                factor = torch.zeros(64, device="cuda")  # not known on the host to be dense
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
    """Small calls against the reference; whether all agree."""
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
                f"{heads} heads, {q_len}/{kv_len}, head_dim {head_dim}: agree {agree}, off {off:.4f}"
            )
    return right


@gluon.jit
def _write(out, value: gl.constexpr):
    rows = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out + 128 * value + rows, gl.full([128], value, gl.int32, rows.type.layout))


@gluon.jit
def _control(out):
    gl.warp_specialize([(_write, (out, 0)), (_write, (out, 1))], [4], [48])


def control() -> bool:
    """Two warp partitions that share nothing."""
    out = torch.full((256,), -1, dtype=torch.int32, device="cuda")
    _control[(1,)](out, num_warps=4)
    right = out.tolist() == [0] * 128 + [1] * 128
    print(f"two partitions wrote what they should: {right}")
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
