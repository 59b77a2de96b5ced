"""A repeated launch hands the driver exactly what Triton's own launch would, whatever the tensors' addresses.

Without a GPU: the kernels are compiled for sm_90, and a driver that only notes what it is given stands in.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

noted = []


class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        noted.append((self.name, (x, y, z), stream, function, packed, plain))


class Utilities:
    def load_binary(self, name, kernel, shared, device):
        return (1, sum(kernel), 0, 0, 1024)

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def unload_module(self, module):
        pass


class Driver:
    launcher_cls = Launcher
    utils = Utilities()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Driver())
from skip_softmax.launch import Device
from skip_softmax.meaning.call import Requests, Scales, call_of
from skip_softmax.triton import decode

decode.device_of = lambda of: Device(9)
batch, pages = 3, 40


def draw(dtype):
    q = torch.empty(batch, 8, 1, 64, dtype=torch.bfloat16)
    k, v = torch.empty(2, pages, 2, 64, 64, dtype=dtype)
    table = torch.empty(batch, 9, dtype=torch.int32)
    return q, k, v, table, torch.empty(2), torch.empty(batch, dtype=torch.int32)


def alike(noted):
    # With the splits' buffer, which has an address of its own in each call, at 0.
    for name, *_, given in noted:
        at = {"_decode": 4, "_combine": 0}[name]
        given[at : at + 2] = 0, given[at + 1] - given[at]
    return noted


def launch(tensors, call, counts, odd, scales):
    q, k, v, table, factors, lengths = tensors
    out = torch.empty(q.numel() + 8, dtype=q.dtype)[odd : q.numel() + odd].view_as(q)
    decode.run(call, q, k, v, 0.0, factors, Requests(kv_lens=lengths, table=table), out, counts,
               scales)
    here = alike([*noted])
    noted.clear()
    return here, out


held, counts = [], torch.zeros(2, 2, dtype=torch.int64)
fp8 = Scales(k_each=torch.ones(2), v=0.5)
for odd, tally, floor, scales in (
    (0, None, 0, Scales()), (1, None, 0, Scales()), (0, counts, 100, Scales()), (0, None, 0, fp8),
):
    for again in range(2):
        tensors = draw(torch.bfloat16 if scales is not fp8 else torch.float8_e4m3fn)
        call = call_of(
            *tensors[:3], tile_q=None, tile_kv=64, scale=None, window=None, running_max="seeded",
            min_kv_len=floor, table=tensors[3],
        )
        known = len(decode._plans)
        noted_by_us, out = launch(tensors, call, tally, odd, scales)
        held.append((tensors, out))  # no later tensor has their addresses
        assert len(decode._plans) == known + 1 - again, "one plan for each kind of call"
    plan = next(reversed(decode._plans.values()))
    # Triton's own way, with the tensors of the second call.
    q, k, v, table, factors, lengths = tensors
    scratch = torch.empty(plan.parts + plan.lse)
    parts, lse = scratch[: plan.parts], scratch[plan.parts :]
    numbers = scales.k_each, scales.v_each, 0.0, call.scale * 1.4426950408889634, scales.v
    for kernel, changing in (
        (plan.decode, (q, k, v, out, parts, lse, tally, factors, lengths, table, *numbers)),
        (plan.combine, (parts, lse, out, lengths)),
    ):
        kernel.kernel[kernel.grid](*changing, *kernel.settled, **kernel.constants, **kernel.options)
    true = alike([*noted])
    noted.clear()
    assert [launch[0] for launch in true] == ["_decode", "_combine"]
    assert noted_by_us == true, (noted_by_us, true)
print("same")
"""


@pytest.mark.parametrize(
    "folder",
    [
        None,
        pytest.param(
            "SKIP_SOFTMAX_TRITON36",
            marks=pytest.mark.skipif(
                "SKIP_SOFTMAX_TRITON36" not in os.environ, reason="needs a folder with Triton 3.6"
            ),
        ),
    ],
)
def test_a_repeated_launch_is_tritons_own(folder: str | None, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = [*filter(None, [folder and os.environ[folder]]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(path),
        },
    )
    assert done.stdout == "same\n", done.stderr[-3000:]
