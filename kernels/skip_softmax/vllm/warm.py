"""Compiles, when a server starts, every kernel that its batches may need: else the first of each kind waits.

Triton compiles a kernel anew for each set of constants, and for arguments that are absent. What a batch
changes about these is little: a layer is armed, or dense because no request of the batch is long enough, and
decode is computed in one of two ways, which the number of requests decides. Calls without rows and keys have
all of that, read nothing and count nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from skip_softmax.thresholds.types import Phase
from skip_softmax.vllm.stretch import Stretch

# vLLM's block tables are as wide as requests of a multiple of so many tokens need.
_TOGETHER = 128


def compile_for(
    keywords: dict[Phase, dict[str, Any]],
    heads: int,
    dtype: torch.dtype,
    k: torch.Tensor,
    v: torch.Tensor,
    longest: int,
    requests: int,
) -> None:
    """Runs calls without rows and keys, of all kinds that a layer can meet.

    Args:
        keywords: of the operations, as the layer gives them.
        heads: query heads of the layer.
        dtype: of its queries.
        k: pages of its cache [pages, KV heads, page, head_dim].
        v: as `k`.
        longest: most tokens of a request.
        requests: most decode tokens of a batch.
    """
    width = -(-longest // _TOGETHER) * _TOGETHER // k.shape[2]
    q = torch.zeros(requests, heads, k.shape[3], dtype=dtype, device=k.device)
    none = torch.zeros(requests + 1, dtype=torch.int32, device=k.device)
    table = none.new_zeros(requests, width)
    # A batch that is longer than `min_kv_len`, and one that cannot be.
    for longest_kv in (longest, 1):
        Stretch("prefill", slice(0, 1), none[:2], none[:1], table[:1], 1, longest_kv).attend(
            q, k, v, torch.empty_like(q), **keywords["prefill"]
        )
    for count in {1, requests}:
        Stretch("decode", slice(0, count), none, none[:count], table[:count], 1, longest).attend(
            q, k, v, torch.empty_like(q), **keywords["decode"]
        )
