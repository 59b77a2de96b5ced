"""What all kernels share on the host: the device, limits of a call, descriptors, outputs.

Neither this file nor a kernel's room loads Triton before a kernel runs, so `why_not` works on any machine.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from skip_softmax.meaning.call import Call

LOG2E = math.log2(math.e)
MOST_TILE_BYTES = 2**16  # of keys or queries; several tiles must fit in shared memory
# Triton 3.6 crashes on products inside a branch when it compiles for sm_100.
KNOWS_BLACKWELL = (3, 7)
# Triton compiles e4m3 for no device before this one, be it 3.6 or 3.9.
CONVERTS_FP8 = (8, 9)
# Triton reads the variable when a kernel is decorated, so it cannot change later.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Device:
    """What kernels must know about a device; `device_of` asks a real one.

    Attributes:
        major: major compute capability, 9 for sm_90.
        shared: shared memory of one program [bytes].
        processors: multiprocessors.
        on_cpu: whether there is no GPU, so that only Triton's interpreter can run a kernel.
        triton: version of the Triton that compiles for it.
        minor: minor compute capability.
    """

    major: int
    shared: int = 232448
    processors: int = 132
    on_cpu: bool = False
    triton: tuple[int, ...] = (3, 9)
    minor: int = 0


def device_of(of: torch.device) -> Device:
    """The device of tensors; on a CPU, Triton's interpreter counts as an sm_90 with few processors."""
    return Device(9, processors=8, on_cpu=True) if of.type == "cpu" else _gpu(of)


@functools.cache
def _gpu(of: torch.device) -> Device:
    import triton

    properties = torch.cuda.get_device_properties(of)
    return Device(
        properties.major,
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
        triton=tuple(int(n) for n in triton.__version__.split(".")[:2]),
        minor=properties.minor,
    )


def why_not_here(call: Call, device: Device, most_columns: int = 256) -> str | None:
    """Why no kernel can run a call on a device, or None; every kernel asks this, then adds its own limits."""
    if device.on_cpu and not INTERPRETED:
        return (
            "tensors on the CPU run only in Triton's interpreter; "
            "set TRITON_INTERPRET=1 before importing triton"
        )
    if call.criterion != "max":
        return f"criterion {call.criterion} is not max"
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {call.dtype} is not fp16, bf16 or fp32"
    if call.kv_dtype is not None and (device.major, device.minor) < CONVERTS_FP8:
        return (
            f"keys and values are FP8, which a device of compute capability {device.major}.{device.minor} "
            "does not convert; it must be 8.9 or more"
        )
    if max(call.head_dim, call.value_dim) > most_columns:
        return f"head_dim {max(call.head_dim, call.value_dim)} is above {most_columns}"
    if not call.scale > 0:  # NaN included
        return f"scale {call.scale} is not above 0"
    if call.kv_start:
        return f"kv_start {call.kv_start} is not 0 (a cache that dropped its first keys)"
    return None


def why_too_large(call: Call, tokens: int, most: int = MOST_TILE_BYTES) -> str | None:
    """Why a tile of `tokens` rows does not fit in shared memory, or None."""
    columns = max(sum(pieces(call.head_dim, call.dtype)), width(call.value_dim))
    size = tokens * columns * call.dtype.itemsize
    if size > most:
        return (
            f"{tokens} x {columns} numbers of {call.dtype} at once are {size // 1024} KiB, which is more "
            f"than {most // 1024}"
        )
    return None


def why_not_blackwell(device: Device) -> str | None:
    """Why the device's Triton cannot compile for it, or None; see KNOWS_BLACKWELL."""
    if device.major >= 10 and device.triton < KNOWS_BLACKWELL:
        version = ".".join(map(str, device.triton))
        return f"Triton {version} fails to compile this kernel for Blackwell; install 3.9"
    return None


@contextmanager
def launching_on(x: torch.Tensor) -> Iterator[None]:
    """Makes the tensor's device current, because Triton launches on the current device.

    Raises:
        NotImplementedError: the kernel needs more shared memory or registers than the device has.
    """
    from triton.runtime.errors import OutOfResources

    try:
        with on_device(x.device):
            yield
    except OutOfResources as error:
        unit = "bytes of " if error.name == "shared memory" else ""
        raise NotImplementedError(
            f"a kernel must fit the GPU, but these tiles need {error.required} {unit}{error.name} and it has "
            f"{error.limit}; take smaller tiles, 16-bit tensors or backend='reference'"
        ) from None


_HERE: AbstractContextManager[object] = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device current; costs nothing where it is."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as Triton names it."""
    return int(_driver().active.get_current_stream(device.index))


@functools.cache
def _driver() -> Any:
    from triton.runtime import (
        driver,
    )  # looks for a GPU the first time, and takes its time every time

    return driver


class _Described:
    """A tensor as TMA is told of it, of which all but the address is settled.

    Triton checks a descriptor whenever one is made, which takes the host as long as a launch.
    """

    def __init__(self, descriptor: Any) -> None:
        self._kind = type(descriptor)
        self._rest = vars(descriptor) | {"base": None}  # else the tensor would be kept

    def at(self, x: torch.Tensor) -> Any:
        """The descriptor of a tensor with the same shape and strides, at a multiple of 16."""
        made = object.__new__(self._kind)
        vars(made).update(self._rest, base=x)
        return made


class Prepared:
    """A kernel of which everything is settled but tensors and floats: a repeated launch costs little.

    Triton binds, classifies and hashes every argument of every launch. The compiled kernel of the first one
    is kept here, and later ones pass addresses: valid as long as the tensors' dtypes stay, and whether each
    is there and its address is a multiple of 16.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], settled: tuple[int | None, ...], constants: dict[str, Any],
        **options: Any,
    ) -> None:  # fmt: skip
        """Nothing is compiled yet.

        Args:
            kernel: its parameters are what changes, then `settled`, then constants.
            grid: programs.
            settled: whole numbers.
            constants: compile-time constants, by name.
            options: of the compiler.
        """
        self.kernel, self.grid, self.settled = kernel, (*grid, 1, 1)[:3], settled
        self.constants, self.options = constants, options
        self._again: Any = None

    @property
    def compiled(self) -> bool:
        """Whether `again` may be called; never in Triton's interpreter."""
        return self._again is not None

    def first(self, *changing: Any) -> None:
        """Compiles and launches, by Triton's own way, with tensors and descriptors."""
        compiled = self.kernel[self.grid](
            *changing, *self.settled, **self.constants, **self.options
        )
        if compiled is not None:
            # As Triton hands them over: in the kernel's order, constants too.
            names = self.kernel.arg_names[len(changing) + len(self.settled) :]
            self._rest = (*self.settled, *(self.constants[name] for name in names))
            self._described = [
                (place, _Described(x))
                for place, x in enumerate(changing)
                if hasattr(x, "block_shape")
            ]
            self._again = compiled[self.grid]

    def again(self, stream: int, *changing: torch.Tensor | float | None) -> None:
        """Launches on the current device, with the tensors' addresses; the tensor where it was described."""
        if self._described:
            given = list(changing)
            for place, described in self._described:
                given[place] = described.at(given[place])
            changing = tuple(given)
        self._again(*changing, *self._rest, stream=stream)


MOST_PLANS = 1024


def remember(plans: dict[Any, Any], key: object, plan: Any) -> None:
    """Keeps how calls of a kind are launched. A cache may grow by a token per call: the plans start anew."""
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan


def traced(q: torch.Tensor) -> bool:
    """Whether something traces the call, which must then be an operator: that costs more than a launch."""
    return torch.compiler.is_compiling() or type(q) is not torch.Tensor


def addresses_of(*tensors: torch.Tensor | None) -> list[int | None]:
    """Where tensors lie, as a kernel is told."""
    return [None if x is None else x.data_ptr() for x in tensors]


def aligned(addresses: Sequence[int | None]) -> list[bool | None]:
    """What Triton makes of addresses; None: there is none."""
    return [None if at is None else at % 16 == 0 for at in addresses]


def precision(dtype: torch.dtype, tile_kv: int) -> str:
    """How products of fp32 are computed.

    As six products of bf16 parts, which take less shared memory than three of TF32; the interpreter knows
    only the latter. Below 32 keys, where both give wrong results, in plain fp32.
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


def pieces(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Columns of a tile of keys as one or two powers of two: 192 as 128 and 64; the second is 0 without one.

    A product over columns is the sum of two, so keys are not padded to the next power of two. In fp32 they
    are: there 64 and 32 columns, one product after the other, gave wrong scores and illegal accesses on an
    H200 (Triton 3.6).
    """
    whole = width(head_dim)
    if dtype == torch.float32:
        return whole, 0
    first = whole // 2
    rest = width(head_dim - first)
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def descriptor_fits(x: torch.Tensor, columns: int) -> bool:
    """Whether TMA can address the tensor [B, H, S, D] as a matrix of rows `stride(2)` apart.

    Args:
        x: the tensor.
        columns: of a tile, in all its pieces.
    """
    row, column = x.stride()[2:]
    # The stride of a dimension of size 1 is never used, and may be anything.
    batch, head = (
        stride if n > 1 else 0 for n, stride in zip(x.shape[:2], x.stride()[:2], strict=True)
    )
    in_one_row = (x.shape[1] - 1) * head + x.shape[3] <= row
    return (
        x.numel() > 0
        and column == 1
        and x.shape[3] == columns
        and row * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and x.shape[3] <= row
        and batch % row == 0
        and (head % row == 0 or in_one_row)
    )


def descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """The matrix view of `descriptor_fits`; rows beyond the tensor read as zero."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    row = x.stride(2)
    last = sum((n - 1) * stride for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return TensorDescriptor(x, [last // row + 1, row], [row, 1], block)


def empty_output(q: torch.Tensor, columns: int) -> torch.Tensor:
    """An uninitialised tensor [B, H, S, columns] whose heads and tokens are nested in memory as q's are."""
    heads, rows = q.shape[1:3]
    if q.stride(1) < q.stride(2):
        strides = rows * heads * columns, columns, heads * columns, 1
    else:
        strides = heads * rows * columns, rows * columns, columns, 1
    return q.new_empty_strided((*q.shape[:3], columns), strides)
