"""What every kernel's host code says: limits of a call, the device, descriptors, outputs."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = math.log2(math.e)
MOST_TILE_BYTES = 2**16  # of keys or queries; shared memory holds several tiles
# 3.6 crashes on products inside a branch when it compiles for sm_100.
KNOWS_BLACKWELL = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)
# Triton reads it when a kernel is decorated, so it cannot change later.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_here(q: torch.Tensor, v: torch.Tensor, scale: float, kv_start: int) -> str | None:
    """What every kernel asks of a call: why it cannot run, or None."""
    if not q.is_cuda and not INTERPRETED:
        return (
            "tensors on the CPU run only in Triton's interpreter; "
            "set TRITON_INTERPRET=1 before importing triton"
        )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype} is not fp16, bf16 or fp32"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"head_dim {max(q.shape[-1], v.shape[-1])} is above 256"
    if not scale > 0:  # NaN included
        return f"scale {scale} is not above 0"
    if kv_start:
        return f"kv_start {kv_start} is not 0 (a cache that dropped its first keys)"
    return None


def why_too_large(
    q: torch.Tensor, v: torch.Tensor, tokens: int, most: int = MOST_TILE_BYTES
) -> str | None:
    """Whether the tile of so many tokens has more bytes than shared memory can do with."""
    columns = width(max(q.shape[-1], v.shape[-1]))
    size = tokens * columns * q.element_size()
    if size > most:
        return (
            f"{tokens} x {columns} numbers of {q.dtype} at once are {size // 1024} KiB, which is more than "
            f"{most // 1024}"
        )
    return None


def why_not_blackwell(q: torch.Tensor) -> str | None:
    """Whether this Triton fails on the device; see KNOWS_BLACKWELL."""
    if q.is_cuda and device(q.device)[0] >= 10 and not KNOWS_BLACKWELL:
        return (
            f"Triton {triton.__version__} fails to compile this kernel for Blackwell; install 3.9"
        )
    return None


@functools.cache
def device(of: torch.device) -> tuple[int, int]:
    """Major compute capability and shared memory per program [bytes]."""
    if of.type != "cuda":
        return 9, 232448
    properties = torch.cuda.get_device_properties(of)
    return properties.major, properties.shared_memory_per_block_optin


@contextmanager
def launching_on(x: torch.Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors'.

    Raises:
        NotImplementedError: the kernel needs more of the device than it has.
    """
    try:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            yield
    except OutOfResources as error:
        raise NotImplementedError(
            f"a kernel must fit the GPU, but these tiles need {error.required} of its {error.limit} units of "
            f"{error.name}; take smaller tiles, 16-bit tensors or backend='reference'"
        ) from None


def precision(dtype: torch.dtype, tile_kv: int) -> str:
    """How products of fp32 are made.

    From six products of bf16 parts, which take less shared memory than three of TF32; the interpreter knows
    the latter only. Below 32 keys, where those go wrong, in plain fp32.
    """
    if dtype != torch.float32:
        return "tf32"
    if tile_kv < 32:
        return "ieee"
    return "tf32x3" if INTERPRETED else "bf16x6"


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up; Triton's own takes 14 microseconds, as does its `next_power_of_2`."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def width(head_dim: int) -> int:
    """Columns of a tile in registers: a power of two, at least 16."""
    return max(16, next_power_of_2(head_dim))


def descriptor_fits(x: torch.Tensor) -> bool:
    """Whether TMA can show the tensor [B, H, S, D] as a matrix of rows `stride(2)` apart."""
    row, column = x.stride()[2:]
    # The stride of a dimension of size 1 is never used, and may be anything.
    batch, head = (
        stride if n > 1 else 0 for n, stride in zip(x.shape[:2], x.stride()[:2], strict=True)
    )
    in_one_row = (x.shape[1] - 1) * head + x.shape[3] <= row
    return (
        x.numel() > 0
        and column == 1
        and x.shape[3] == width(x.shape[3])
        and row * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and x.shape[3] <= row
        and batch % row == 0
        and (head % row == 0 or in_one_row)
    )


def descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """The matrix view of `descriptor_fits`; rows beyond the tensor read as zero."""
    row = x.stride(2)
    last = sum((n - 1) * stride for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return TensorDescriptor(x, [last // row + 1, row], [row, 1], block)


def empty_output(q: torch.Tensor, columns: int) -> torch.Tensor:
    """A dense tensor [B, H, S, columns] whose heads and tokens nest as q's do."""
    heads, rows = q.shape[1:3]
    if q.stride(1) < q.stride(2):
        strides = rows * heads * columns, columns, heads * columns, 1
    else:
        strides = heads * rows * columns, rows * columns, columns, 1
    return q.new_empty_strided((*q.shape[:3], columns), strides)


def empty_results(
    q: torch.Tensor, v: torch.Tensor, q_starts: torch.Tensor | None, stats: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `prefill` returns, with nothing in it."""
    requests = q.shape[0] if q_starts is None else q_starts.shape[0] - 1
    counts = q.new_empty((requests if stats else 0, q.shape[1], 2), dtype=torch.int64)
    return empty_output(q, v.shape[-1]), counts
