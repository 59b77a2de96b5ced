"""What a server compiles when it starts is all that its batches need: no step waits for a compiler.

Without vLLM and without a GPU: a driver that names one stands in, and what Triton would compile is noted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import random
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


driver.set_active(Driver())
noted = set()
JITFunction._do_compile = lambda self, key, *rest, **more: noted.add((self.__name__, key))

from skip_softmax import launch
from skip_softmax.hopper import prefill as hopper
from skip_softmax.meaning import call
from skip_softmax.triton import decode, prefill
from skip_softmax.vllm import warm
from skip_softmax.vllm.stretch import Stretch

for room in (launch, hopper, decode, prefill):
    room.device_of = lambda of: launch.Device(9)
call._kernel_lengths = lambda name, lengths, *rest: lengths  # as on a GPU, where nobody reads them

LONGEST, MOST, FLOOR = 16384, 100, 1024


def cut(x, first, last):
    # Somewhere in a tensor of the whole batch: its address is a multiple of 4 only.
    return torch.cat([x.new_zeros(first, *x.shape[1:]), x])[first:]


def random_stretch(draw, page):
    first = draw.randrange(9)
    longest_kv = draw.choice((40, 700, 5000, LONGEST))
    width = -(-LONGEST // page) + draw.randrange(2)  # of any alignment
    if draw.random() < 0.5:
        count = draw.randrange(1, MOST + 1)
        lens = cut(torch.zeros(count, dtype=torch.int32), first, 0)
        table = cut(torch.zeros(count, width, dtype=torch.int32), first, 0)
        return Stretch("decode", slice(first, first + count), lens, lens, table, 1, longest_kv), first + count
    rows = [draw.choice((1, 7, 64, 700, 4000)) for _ in range(draw.randrange(1, 5))]
    starts = torch.tensor([first, *rows], dtype=torch.int32).cumsum(0).int()
    lens = cut(torch.full((len(rows),), longest_kv, dtype=torch.int32), first, 0)
    table = cut(torch.zeros(len(rows), width, dtype=torch.int32), first, 0)
    last, most = first + sum(rows), max(rows)
    longest_kv = max(longest_kv, most)
    starts = cut(starts, first, 0)
    return Stretch("prefill", slice(first, last), starts, lens, table, most, longest_kv), last + 3


for backend, heads, kv_heads, head_dim, page, window, armed, fp8 in (
    ("hopper", 32, 8, 128, 64, None, True, False), ("hopper", 32, 8, 128, 16, None, False, False),
    ("hopper", 8, 2, 64, 64, None, True, False), ("triton", 4, 1, 256, 32, 700, True, False),
    ("triton", 8, 2, 128, 64, None, True, True),
):
    cache = torch.zeros(3, 2, kv_heads, page, head_dim, dtype=call.FP8 if fp8 else torch.bfloat16)
    k, v = cache[:, 0], cache[:, 1]
    about = {"scale": head_dim**-0.5, "window": window, "min_kv_len": FLOOR}
    if fp8:
        about |= {"k_scale": torch.ones(()), "v_scale": torch.ones(())}
    keywords = {
        phase: about | {
            "backend": name, "scale_factor": torch.ones(count) if armed else 0.0,
            "counts": torch.zeros(count, 2, dtype=torch.int64), **more,
        }
        for phase, name, count, more in (
            ("prefill", backend, heads, {"tile_q": 64, "tile_kv": 128 if backend == "hopper" else 64}),
            ("decode", "triton", kv_heads, {"tile_kv": 64, "running_max": "seeded"}),
        )
    }
    before = len(noted)
    warm.compile_for(keywords, heads, torch.bfloat16, k, v, LONGEST, MOST)
    known = set(noted)
    names = {name for name, _ in known}
    assert {"_decode", "_combine", "_hopper" if backend == "hopper" else "_prefill"} <= names, names
    draw = random.Random(1)
    for _ in range(25):
        stretch, rows = random_stretch(draw, page)
        q = torch.empty(rows, heads, head_dim, dtype=torch.bfloat16)
        stretch.attend(q, k, v, torch.empty_like(q), **keywords[stretch.phase])
        new = noted - known
        assert not new, (backend, head_dim, stretch, new, sorted(known, key=str))
    print(len(noted) - before)
"""


def test_after_the_start_no_batch_needs_another_kernel(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Prefill armed and dense, decode (in two ways at head_dim 64), and what joins its splits, if it is new.
    assert done.stdout.split() == ["4", "2", "5", "4", "3"]
