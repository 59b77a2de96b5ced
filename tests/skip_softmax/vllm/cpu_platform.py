"""vLLM's CPU platform, which ignores CUSTOM, made to take the backend that the user selects.

An out-of-tree platform, as plug-ins of vLLM add them; `vllm_serving.py` writes its entry point. Tests only.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def platform() -> str:
    """What the entry point calls."""
    return "cpu_platform.CustomCpuPlatform"


class CustomCpuPlatform(CpuPlatform):
    """The CPU, with `--attention-backend CUSTOM`."""

    @classmethod
    def get_attn_backend_cls(cls, selected_backend: Any, *others: Any, **named: Any) -> str:
        if selected_backend == AttentionBackendEnum.CUSTOM:
            path: str = selected_backend.get_path()
            return path
        return super().get_attn_backend_cls(selected_backend, *others, **named)

    @classmethod
    def import_kernels(cls) -> None:
        super().import_kernels()
        if not hasattr(torch.ops._C, "compute_slot_mapping_kernel_impl"):
            _stand_in()


_ours: list[torch.library.Library] = []


def _stand_in() -> None:
    """The two operators that vLLM 0.22.1 cannot do without, where its binaries are not installed."""
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("init_cpu_memory_env(int[] nodes) -> ()")
    library.define(
        "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
        "Tensor(a!) slot_mapping, int block_size) -> ()"
    )
    library.impl("init_cpu_memory_env", lambda nodes: None, "CompositeExplicitAutograd")
    library.impl("compute_slot_mapping_kernel_impl", _slots, "CPU")
    _ours.append(library)  # as long as the process


def _slots(
    starts: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    size: int,
) -> None:
    slots.fill_(-1)
    for request, (start, stop) in enumerate(
        zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ):
        at = positions[start:stop]
        slots[start:stop] = table[request, at // size].long() * size + at % size
