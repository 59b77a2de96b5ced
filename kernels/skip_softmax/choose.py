"""Which kernel runs a call: an ordered list per operation. The only file that imports kernels."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

    from skip_softmax.launch import Device
    from skip_softmax.meaning.call import Call

Backend = Literal["auto", "reference", "triton", "hopper"]
Operation = Literal["prefill", "decode", "statistics", "gaps"]
# Best first. A kernel's room is a file with two functions: `why_not(call, device)`, which needs neither a GPU
# nor Triton, and `run(call, ...)`. Its folder's name is the backend's.
KERNELS: dict[Operation, tuple[str, ...]] = {
    "prefill": ("hopper.prefill", "triton.prefill"),
    "decode": ("triton.decode",),
    "statistics": ("triton.statistics",),
    "gaps": (),
}
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """The slow reference runs a call on a GPU because no kernel can; issued once per reason."""


def backends(operation: Operation) -> list[str]:
    """The backends that have a kernel for an operation, best first."""
    return [path.split(".")[0] for path in KERNELS[operation]]


def able(operation: Operation, call: Call, device: Device) -> list[str]:
    """Backends that can run a call on a device, which need not be present; `auto` takes the first."""
    return [
        path.split(".")[0]
        for path in KERNELS[operation]
        if _room(path).why_not(call, device) is None
    ]


def why_not(operation: Operation, call: Call, device: Device) -> str | None:
    """Why no kernel can run a call on a device, kernel by kernel; None: one can."""
    reasons = []
    for path in KERNELS[operation]:
        reason = _room(path).why_not(call, device)
        if reason is None:
            return None
        reasons.append(f"{path.split('.')[0]}: {reason}")
    return "; ".join(reasons) or f"no kernel implements {operation}"


def choose(
    operation: Operation, backend: Backend, call: Call, of: torch.device, stacklevel: int = 4
) -> ModuleType | None:
    """The room of the kernel that runs a call here; None if the reference does.

    Args:
        operation: what to run.
        backend: `auto`, or a backend by name.
        call: its shapes and options.
        of: the device of the tensors.
        stacklevel: frames between the warning and the caller of the operation.

    Raises:
        ValueError: the backend does not exist.
        NotImplementedError: the named backend cannot run this call.
    """
    from skip_softmax.launch import device_of

    if backend not in get_args(Backend):
        *names, last = get_args(Backend)
        raise ValueError(f"backend must be {', '.join(names)} or {last}, but got {backend!r}")
    if backend == "reference" or (backend == "auto" and of.type != "cuda"):
        return None
    if backend != "auto" and backend not in backends(operation):
        others = " or ".join(map(repr, [*backends(operation), "reference"]))
        raise NotImplementedError(
            f"backend={backend!r} does not implement {operation}; use {others}"
        )
    reason = f"no kernel implements {operation}"
    for path in KERNELS[operation]:
        if backend not in ("auto", path.split(".")[0]):
            continue
        if not _HAS_TRITON:
            reason = "triton is not installed; `pip install skip-softmax-calibrate[gpu]` adds it"
            continue
        room = _room(path)
        why_not = room.why_not(call, device_of(of))
        if why_not is None:
            return room
        reason = why_not
    if backend != "auto":
        raise NotImplementedError(f"backend={backend!r} cannot run this call: {reason}")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"falling back to the slow reference implementation: {reason}",
            FallbackWarning,
            stacklevel=stacklevel,
        )
    return None


def _room(path: str) -> ModuleType:
    # Import statements, because torch.compile cannot follow any other import.
    import skip_softmax.hopper.prefill
    import skip_softmax.triton.decode
    import skip_softmax.triton.prefill
    import skip_softmax.triton.statistics  # noqa: F401

    return sys.modules[f"skip_softmax.{path}"]
