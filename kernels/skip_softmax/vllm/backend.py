"""What vLLM asks an attention backend before it uses it: classes, what it supports, how its cache lies.

One class serves vLLM 0.22 and 0.32, which ask for different things; what a version does not ask for is not
called. What is refused here is refused at start in vLLM's own words; `checks.py` refuses the rest.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from skip_softmax.vllm.attend import SkipSoftmaxImpl
from skip_softmax.vllm.batch import SkipSoftmaxBuilder


class SkipSoftmaxBackend(AttentionBackend):
    """Attention that skips KV tiles, as the thresholds file of `--additional-config` says."""

    # The cache is written by vLLM's own operation before attention, which then reads every key from pages.
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto", "float16", "bfloat16", "fp8", "fp8_e4m3",
    ]  # fmt: skip

    @staticmethod
    def get_name() -> str:
        """CUSTOM: vLLM looks the name up among its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SkipSoftmaxImpl]:
        """The class that computes attention."""
        return SkipSoftmaxImpl

    @staticmethod
    def get_builder_cls() -> type[SkipSoftmaxBuilder]:
        """The class that reads a batch."""
        return SkipSoftmaxBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Pages of any multiple of 16 tokens."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """64 tokens, one decode tile, where the user names no size; pages of 16 are slower."""
        return 64

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Asked by 0.32."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: the host's query lengths say which tokens are decode (asked by 0.32)."""
        return False

    # The cache of 0.22: this shape, in memory as here. A head's page is in one piece.
    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """[pages, k and v, KV heads, page, head_dim]."""
        return num_blocks, 2, num_kv_heads, block_size, head_size

    # The cache of 0.32: always seen as [pages, KV heads, page, columns of k and v].
    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """In memory as it is seen (LBHNC) if vLLM is free to choose, else with tokens before heads."""
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return KVCacheLayout.LBHNC, KVCacheLayout.LBNHC
