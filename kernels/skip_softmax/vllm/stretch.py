"""A stretch of a batch: neighbouring requests in the same phase, which one call of an operation computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from skip_softmax.api import attention_varlen, decode_attention
from skip_softmax.thresholds.types import Phase


@dataclass(frozen=True)
class Stretch:
    """Neighbouring requests of a batch that are in the same phase.

    Attributes:
        phase: theirs.
        tokens: their rows in the tensors of the batch.
        q_starts: where the queries of each request start, and the end, int32 [requests + 1], counted in the
            whole batch; prefill only.
        kv_lens: KV length of each request with its new tokens, int32 [requests]; in decode one for each
            token, which is a request of its own there.
        table: their page numbers, int32 [as kv_lens, pages].
        longest_q: most query tokens of a request.
        longest_kv: an upper bound of the KV lengths.
    """

    phase: Phase
    tokens: slice
    q_starts: torch.Tensor
    kv_lens: torch.Tensor
    table: torch.Tensor
    longest_q: int
    longest_kv: int

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, **keywords: Any
    ) -> None:
        """Computes their rows of `out`, with a layer's numbers.

        Args:
            q: queries of the whole batch [tokens, heads, head_dim].
            k: pages of the layer's cache [pages, KV heads, page, head_dim].
            v: as `k`.
            out: of the whole batch, as `q`.
            keywords: of the phase's operation.
        """
        if self.phase == "decode":
            decode_attention(
                q[self.tokens],
                k,
                v,
                self.kv_lens,
                block_table=self.table,
                out=out[self.tokens],
                **keywords,
            )
        else:
            attention_varlen(
                q, k, v, self.q_starts, None, self.longest_q, self.longest_kv, block_table=self.table,
                kv_lens=self.kv_lens, out=out, **keywords,
            )  # fmt: skip
