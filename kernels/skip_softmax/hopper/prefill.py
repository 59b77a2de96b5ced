"""The host side of the Hopper prefill kernel: which calls it can run, and the launch.

The kernel itself is in `prefill_kernel.py`; only a launch imports it, and Triton with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from skip_softmax.launch import (
    LOG2E,
    Device,
    cdiv,
    device_of,
    launching_on,
    pieces,
    why_not_here,
)
from skip_softmax.meaning.call import Call, Requests, Scales

ROWS = 64  # query rows of a warpgroup, which vote together
# Registers per thread of consumers and producer, by consumer warpgroups: all that a multiprocessor has.
REGISTERS = {2: (240, 24), 3: (160, 32)}
# By columns of keys and of values. At 64 the softmax takes longer than a product, so a third warpgroup keeps
# the tensor cores busy.
GROUPS = {(64, 64): 3, (128, 128): 2, (192, 128): 2}
V_SLOTS = {(192, 128): 2}  # tiles of values in shared memory, where three do not fit
TILE_KV = 128
# A tile of keys comes out of pages in boxes of rows, each inside one page: as many rows as a page and a tile
# have in common. Smaller boxes than this were not tried; they must be whole swizzle atoms of 8 rows.
SMALLEST_BOX = 16
# With fewer items per program than this, those that start last decide when the launch ends, so they must be
# short: several KV heads are processed together, up to NEAR_BYTES (L2 has 50 MB in two parts). With more
# items, one KV head at a time is as fast when dense, and faster where tiles are skipped.
FEW_ITEMS = 48
NEAR_BYTES = 2**25


def why_not(call: Call, device: Device) -> str | None:
    """Why this kernel cannot run a call on a device, or None when it can."""
    if device.on_cpu:
        return "tensors are on the CPU, and Triton's interpreter does not know Gluon"
    if device.major != 9:
        return f"the device has compute capability {device.major}.x, not 9.0"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {call.dtype} is not fp16 or bf16"
    if call.kv_dtype is not None:
        return f"keys and values are {call.kv_dtype}, not {call.dtype}"
    if (call.head_dim, call.value_dim) not in GROUPS:
        return f"head_dim {call.head_dim} (of values {call.value_dim}) is not 64, 128, or 192 (of values 128)"
    if (call.tile_q, call.tile_kv) != (ROWS, TILE_KV):
        return f"votes of {call.tile_q} x {call.tile_kv} are not {ROWS} x {TILE_KV}"
    if call.window is not None:
        return "a sliding window is not supported"
    if call.page % SMALLEST_BOX:
        return f"page size {call.page} is not a multiple of {SMALLEST_BOX}"
    for name, (shape, strides) in zip("qkv", call.places, strict=False):
        if not _has_descriptor(shape, strides):
            return f"{name} has strides {tuple(strides)}, which TMA cannot follow"
    return why_not_here(call, device)


def run(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    factor: float,
    factors: torch.Tensor | None,
    requests: Requests,
    out: torch.Tensor,
    counts: torch.Tensor | None,
    scales: Scales,
) -> None:
    """Runs a call that `why_not` accepts, without scales; see `hopper`."""
    hopper(
        q, k, v, out, counts, factor, factors, call.causal, call.scale, call.dense_last,
        call.min_kv_len, requests.q_lens, requests.kv_lens, requests.q_starts, requests.kv_starts,
        requests.table, call.q_len, call.kv_len, call.most_lead,
    )  # fmt: skip


def box_of(page: int) -> int:
    """Rows that one load takes from a page: what pages and KV tiles have in common; 0: no pages."""
    return math.gcd(page, TILE_KV)


def partition(groups: int, box: int) -> tuple[int, int, int]:
    """Warps of the producer, and registers per thread of consumers and producer, by rows of a load.

    A tile of more than two boxes takes one warp about as long to request as to compute with. At head_dim 128
    a box is two loads, of 64 columns, which two warps share; they need more registers than one. At 64 it is
    one load, and three warpgroups have no registers to spare.
    """
    if groups == 2 and 2 * box < TILE_KV:
        return 2, 232, 40
    return 1, *REGISTERS[groups]


def _near(kv_heads: int, size: int) -> int:
    """How many KV heads of `size` bytes of keys and values are processed together: all or an equal part."""
    return max(
        n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * size <= max(NEAR_BYTES, size)
    )


def _has_descriptor(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether TMA can address a tensor of 16-bit numbers."""
    return strides[-1] == 1 and all(
        n == 1 or (step > 0 and step % 8 == 0)
        for n, step in zip(shape[:-1], strides[:-1], strict=True)
    )


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> Any:
    """Describes [B, H, S, D] to TMA in boxes of `rows` tokens of one head; tokens beyond S read as zero.

    A box has some of the D columns.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if x.data_ptr() % 16:
        x = x.clone()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # The stride of a dimension of size 1 is never used, and may be anything.
    strides = [
        x.shape[-1] if n == 1 else step
        for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns], layout)


@torch.library.custom_op("skip_softmax::hopper", mutates_args=("out", "counts"))
def hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    counts: torch.Tensor | None,
    factor: float,
    factors: torch.Tensor | None,
    causal: bool,
    scale: float,
    dense_last: int,
    min_kv_len: int,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    q_starts: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
    table: torch.Tensor | None,
    most_q: int,
    most_kv: int,
    most_lead: int,
) -> None:
    """Skip-softmax prefill attention on Hopper with votes of 64 x 128; never synchronises with the device.

    Arguments are those of the Triton kernel's `prefill`, without window and geometry.
    """
    from skip_softmax.hopper.prefill_kernel import _hopper

    batch, heads, _, head_dim = q.shape
    requests = batch if q_starts is None else q_starts.shape[0] - 1
    # False where the host knows that the call is dense: the kernel without a branch.
    armed = factors is not None or factor > 0
    value_dim = v.shape[-1]
    groups = GROUPS[head_dim, value_dim]
    first, rest = pieces(head_dim)
    blocks = cdiv(most_q + most_lead, ROWS * groups)
    items = requests * heads * blocks
    if not items or not q.numel():
        return
    if not k.numel():  # no key is read, but TMA cannot describe nothing
        k, v = (q.new_zeros(1, k.shape[1], TILE_KV, n) for n in (head_dim, value_dim))
    page = 0 if table is None else k.shape[2]
    box = box_of(page)
    processors = device_of(q.device).processors
    # Counts the items handed out after each program's first. Over pages also where no item is left: batches
    # of a server are of any size, and the first without a counter would wait for a kernel of its own.
    counted = items > processors or table is not None
    counter = torch.zeros(1, dtype=torch.int32, device=q.device) if counted else None
    warps, heavy, light = partition(groups, box)
    few = items < FEW_ITEMS * processors
    near = _near(k.shape[1], most_kv * (head_dim + value_dim) * k.element_size()) if few else 1
    # Blocks beyond a short request's end, or of early rows that see no key, are items without tiles.
    ragged = any(x is not None for x in (q_lens, kv_lens, q_starts))
    with launching_on(q):
        _hopper[(min(items, processors),)](
            _descriptor(q, ROWS, first), _descriptor(k, box, first),
            _descriptor(q, ROWS, rest) if rest else None, _descriptor(k, box, rest) if rest else None,
            _descriptor(v, box, value_dim), out, counts, counter, factors,
            q_lens, kv_lens, q_starts, kv_starts, table, factor, scale * LOG2E, most_q, most_kv,
            # None compiles the kernel without the rule.
            min(dense_last, most_q) or None if armed else None,
            min_kv_len or None if armed else None,
            items, heads // k.shape[1], k.shape[1], blocks, near,
            None if table is None else table.shape[1], *out.stride()[:3],
            GROUPS=groups, D=head_dim, TAIL=rest, DV=value_dim, V_SLOTS=V_SLOTS.get((head_dim, value_dim), 3),
            TILE=TILE_KV, CAUSAL=causal, ARMED=armed,
            EMPTY=ragged or (causal and most_kv < most_q), LEADS=most_lead > 0, PAGE=page, BOX=box,
            SUMMED=counts is not None and counts.dim() == 2, WARPS=warps, HEAVY=heavy, LIGHT=light,
            num_warps=4,
        )  # fmt: skip
