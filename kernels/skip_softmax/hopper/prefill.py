"""The host side of the Hopper prefill kernel: which calls it can run, and the launch.

The kernel itself is in `prefill_kernel.py`; only a launch imports it, and Triton with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from skip_softmax.launch import (
    LOG2E,
    Device,
    Prepared,
    addresses_of,
    aligned,
    cdiv,
    device_of,
    launching_on,
    on_device,
    pieces,
    remember,
    stream_of,
    traced,
    why_not_here,
)
from skip_softmax.meaning.call import Call, Requests, Scales, call_of, moved

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
    """Runs a call that `why_not` accepts, without scales; never synchronises with the device.

    Arguments are those of the Triton kernel's `run`.
    """
    if traced(q):
        hopper(
            q, k, v, out, counts, factor, factors, call.causal, call.scale, call.dense_last,
            call.min_kv_len, requests.q_lens, requests.kv_lens, requests.q_starts, requests.kv_starts,
            requests.table, call.q_len, call.kv_len, call.ragged,
        )  # fmt: skip
    else:
        _launch(call, q, k, v, factor, factors, requests, out, counts)


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

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # The stride of a dimension of size 1 is never used, and may be anything.
    strides = [
        x.shape[-1] if n == 1 else step
        for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns], layout)


class _Plan(NamedTuple):
    """How calls of one shape are launched.

    Attributes:
        kernel: the kernel.
        counted: whether a counter says which item is next.
        tail: whether queries and keys come in two pieces.
    """

    kernel: Prepared
    counted: bool
    tail: bool


# By all that a launch depends on but addresses and scale factors.
_plans: dict[object, _Plan] = {}


def _launch(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    factor: float,
    factors: torch.Tensor | None,
    requests: Requests,
    out: torch.Tensor,
    counts: torch.Tensor | None,
) -> None:
    count = requests.count(q)
    if not count or not call.q_len or not q.numel():
        return
    if not k.numel():  # no key is read, but TMA cannot describe nothing
        call, (q, k, v) = moved(
            call,
            q,
            *(q.new_zeros(1, call.kv_heads, TILE_KV, n) for n in (call.head_dim, call.value_dim)),
        )
    if any(x.data_ptr() % 16 for x in (q, k, v)):
        call, (q, k, v) = moved(call, *(x.clone() if x.data_ptr() % 16 else x for x in (q, k, v)))
    # False where the host knows that the call is dense: the kernel without a branch.
    armed = factors is not None or factor > 0
    table = requests.table
    lengths = requests.q_lens, requests.kv_lens, requests.q_starts, requests.kv_starts, table
    others = addresses_of(out, counts, factors, *lengths)
    key = (
        call, q.device, out.stride(), armed, None if counts is None else counts.dim(), count,
        None if table is None else table.shape[1], *aligned(others[:3]), *[x is None for x in lengths],
    )  # fmt: skip
    plan = _plans.get(key) or _planned(call, q, out, armed, requests, counts)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device) if plan.counted else None
    numbers = factor, call.scale * LOG2E
    if plan.kernel.compiled:
        out_at, counts_at, *rest = others
        counter_at = None if counter is None else counter.data_ptr()
        with on_device(q.device):
            plan.kernel.again(
                stream_of(q.device), q, k, *((q, k) if plan.tail else (None, None)), v, out_at, counts_at,
                counter_at, *rest, *numbers,
            )  # fmt: skip
        return
    box, (first, tail) = box_of(call.page), pieces(call.head_dim, call.dtype)
    with launching_on(q):
        plan.kernel.first(
            _descriptor(q, ROWS, first), _descriptor(k, box, first),
            _descriptor(q, ROWS, tail) if tail else None, _descriptor(k, box, tail) if tail else None,
            _descriptor(v, box, call.value_dim), out, counts, counter, factors, *lengths, *numbers,
        )  # fmt: skip
    if plan.kernel.compiled:
        remember(_plans, key, plan)


def _planned(
    call: Call,
    q: torch.Tensor,
    out: torch.Tensor,
    armed: bool,
    requests: Requests,
    counts: torch.Tensor | None,
) -> _Plan:
    from skip_softmax.hopper.prefill_kernel import _hopper

    columns = call.head_dim, call.value_dim
    groups, box, tail = GROUPS[columns], box_of(call.page), pieces(call.head_dim, call.dtype)[1]
    blocks = cdiv(call.q_len + call.most_lead, ROWS * groups)
    items = requests.count(q) * call.q_heads * blocks
    processors = device_of(q.device).processors
    # The counter gives out the items after each program's first. Over pages it is there even if none is left:
    # batches of a server are of any size, and the first without it would wait for a kernel of its own.
    counted = items > processors or call.page > 0
    warps, heavy, light = partition(groups, box)
    few = items < FEW_ITEMS * processors
    size = call.kv_len * sum(columns) * call.dtype.itemsize
    # Blocks beyond a short request's end, or of early rows that see no key, are items without tiles.
    ragged = any(x is not None for x in (requests.q_lens, requests.kv_lens, requests.q_starts))
    kernel = Prepared(
        _hopper,
        (min(items, processors),),
        (
            call.q_len, call.kv_len,
            # None compiles the kernel without the rule.
            min(call.dense_last, call.q_len) or None if armed else None,
            call.min_kv_len or None if armed else None,
            items, call.group, call.kv_heads, blocks, _near(call.kv_heads, size) if few else 1,
            None if requests.table is None else requests.table.shape[1], *out.stride()[:3],
        ),
        {
            "GROUPS": groups, "D": call.head_dim, "TAIL": tail, "DV": call.value_dim,
            "V_SLOTS": V_SLOTS.get(columns, 3), "TILE": TILE_KV, "CAUSAL": call.causal, "ARMED": armed,
            "EMPTY": ragged or (call.causal and call.kv_len < call.q_len), "LEADS": call.most_lead > 0,
            "PAGE": call.page, "BOX": box, "SUMMED": counts is not None and counts.dim() == 2,
            "WARPS": warps, "HEAVY": heavy, "LIGHT": light,
        },
        num_warps=4,
    )  # fmt: skip
    return _Plan(kernel, counted, tail > 0)


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
    ragged: bool,
) -> None:
    """`run` for torch.compile and other tracers; what they see must not allocate the caller's output."""
    call = call_of(
        q, k, v, tile_q=ROWS, tile_kv=TILE_KV, scale=scale, window=None, causal=causal, dense_last=dense_last,
        min_kv_len=min_kv_len, ragged=ragged, table=table, q_len=most_q, kv_len=most_kv,
    )  # fmt: skip
    requests = Requests(q_lens, kv_lens, q_starts, kv_starts, table)
    _launch(call, q, k, v, factor, factors, requests, out, counts)
