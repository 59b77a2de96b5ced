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


# Both prefill kernels, with descriptors: nothing is compiled, what it would be launched with is noted.
PREFILL = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

noted = []


def plain(x):
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    if hasattr(x, "block_shape"):
        return x.base.data_ptr(), tuple(x.shape), tuple(x.strides), tuple(x.block_shape), x.padding
    return x


class Compiled:
    function = packed_metadata = None

    def __init__(self, name):
        self.name = name

    def launch_metadata(self, *arguments):
        pass

    def __getitem__(self, grid):
        return lambda *arguments, stream: noted.append((self.name, "again", grid, [*map(plain, arguments)]))

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        noted.append((self.name, "first", (x, y, z), [*map(plain, arguments)]))


class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


driver.set_active(Driver())
JITFunction._do_compile = lambda self, *rest, **more: Compiled(self.__name__)
from skip_softmax.hopper import prefill as hopper
from skip_softmax.launch import Device
from skip_softmax.meaning.call import FP8, Requests, Scales, call_of
from skip_softmax.triton import prefill as plain_prefill

hopper.device_of = plain_prefill.device_of = lambda of: Device(9)
COUNTER = 7  # a new tensor in each call


def lengths(count, longest):
    return torch.full((count,), longest, dtype=torch.int32)


def contiguous(odd, head_dim=128, **more):
    q = torch.empty(2, 4, 300, head_dim, dtype=torch.bfloat16)
    k = torch.empty(2, 2, 700, head_dim, dtype=torch.bfloat16)
    v = torch.empty(2, 2, 700, 128, dtype=torch.bfloat16)
    return q, k, v, Requests(kv_lens=lengths(2, 700)), {"ragged": True, **more}


def paged(odd, dtype=torch.bfloat16, **more):
    q = torch.empty(500, 4, 128, dtype=torch.bfloat16).transpose(0, 1)[None]
    k, v = torch.empty(40, 2, 2, 64, 128, dtype=torch.bfloat16).to(dtype).unbind(1)
    starts, table = torch.zeros(4 + odd, dtype=torch.int32)[odd:], torch.zeros(3, 9, dtype=torch.int32)
    requests = Requests(kv_lens=lengths(3, 500), q_starts=starts, table=table)
    return q, k, v, requests, {"ragged": True, "q_len": 300, "kv_len": 500, "table": table, **more}


held = []
for room, draw, more in (
    (hopper, contiguous, {"dense_last": 7}), (hopper, contiguous, {"head_dim": 192}),
    (hopper, paged, {"min_kv_len": 400}),
    (plain_prefill, contiguous, {"head_dim": 192}), (plain_prefill, paged, {"dtype": FP8}),
):
    for odd in (0, 1):
        for again in range(2):
            q, k, v, requests, about = draw(odd, **more)
            call = call_of(q, k, v, tile_q=64, tile_kv=128, scale=None, window=None, **about)
            shape = torch.Size((*q.shape[:3], 128))
            out = torch.empty(8 + shape.numel(), dtype=q.dtype)[odd : odd + shape.numel()].view(shape)
            counts, factors = torch.zeros(4, 2, dtype=torch.int64), torch.empty(4)
            scales = Scales(2.0, None, None, torch.ones(2)) if call.kv_dtype else Scales()
            given = call, q, k, v, 0.0, factors, requests, out, counts, scales
            held.append(given)  # no later tensor has their addresses
            known = len(room._plans)
            room.run(*given)
            assert len(room._plans) == known + 1 - again, (room.__name__, odd, again)
        room._plans.clear()
        room.run(*given)
        *_, ours, tritons = noted
        assert (ours[1], tritons[1]) == ("again", "first")
        for _, _, _, arguments in (ours, tritons):
            if room is hopper:
                arguments[COUNTER] = arguments[COUNTER] is None
        assert (ours[0], *ours[2:]) == (tritons[0], *tritons[2:]), (ours, tritons)
        assert any(isinstance(x, tuple) for x in ours[3]) == (room is hopper or call.page == 0), ours
print("same")
"""

FOLDERS = pytest.mark.parametrize(
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


@FOLDERS
@pytest.mark.parametrize("program", [PROGRAM, PREFILL], ids=["decode", "prefill"])
def test_a_repeated_launch_is_tritons_own(program: str, folder: str | None, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = [*filter(None, [folder and os.environ[folder]]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", program],
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
