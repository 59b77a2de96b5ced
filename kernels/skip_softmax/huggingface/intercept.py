"""Sends the attention calls of a model's layers to a handler, until a `with` block ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from skip_softmax.huggingface.calls import DecodeHandler, Handler, Steps, understood
from skip_softmax.huggingface.continuous import batched
from skip_softmax.huggingface.layers import Inspected, inspected
from skip_softmax.huggingface.packed import is_packed, packed
from skip_softmax.huggingface.route import Given, length_of_prompt, routed
from skip_softmax.meaning.call import quantised
from skip_softmax.thresholds.types import KvCacheDtype

_log = logging.getLogger(__name__)


@contextmanager
def intercepted(
    model: PreTrainedModel,
    handler: Handler,
    *,
    decode_from: int | None = None,
    left_alone: dict[int, str] | None = None,
    decode: DecodeHandler | None = None,
    kv_cache_dtype: KvCacheDtype | None = None,
) -> Iterator[None]:
    """Sends the attention calls of a model's layers to `handler`, for the duration of a `with` block.

    Only modules that `inspect_layers` found to be plain attention of the model's usual shape are asked; a
    call of theirs that is not understood, and every other module, keeps the model's own attention.

    Args:
        model: a transformers model that uses the library's attention interface.
        handler: computes one call's output [B, Hq, Sq, D].
        decode_from: see `applied`.
        left_alone: layers that keep the model's own attention, and why.
        decode: computes decode steps [B, Hq, D] of several requests of continuous batching in one call; None:
            `handler` computes one after another.
        kv_cache_dtype: `handler` is given keys and values as a cache of this dtype keeps them; None: as they
            are. Rounding twice changes nothing, so that it may be done in every call anew.

    Yields:
        Nothing.

    Raises:
        ValueError: `inspect_layers` refuses the model, or it (or one that shares its config) already runs
            inside such a block. Inside the block: continuous batching with a `kv_cache_dtype`.
    """
    interceptor = _Interceptor(
        handler, decode, inspected(model), decode_from, left_alone or {}, kv_cache_dtype is not None
    )
    take = interceptor.take
    refusal = None
    if kv_cache_dtype is not None:
        refusal = (
            "continuous batching keeps its cache in the model's dtype, but these numbers are for "
            f"kv_cache_dtype {kv_cache_dtype}; call `generate`, or calibrate with "
            "`model.kv_cache_dtype: auto`"
        )
    with routed(model, take), batched(model, take, refusal):
        yield


@dataclass
class _Interceptor:
    handler: Handler
    decode: DecodeHandler | None
    model: Inspected
    decode_from: int | None
    left_alone: dict[int, str]
    fp8: bool
    named: set[int] = field(default_factory=set)  # layers that a warning has named

    def take(self, given: Given) -> tuple[torch.Tensor, Any]:
        index = self.model.modules.get(given.module)
        if index is None or index in self.left_alone:
            return given.by_itself()
        reason = self.model.layers[index].reason
        if reason is not None:
            return self._left(given, index, reason)
        if is_packed(given):
            batch = packed(given, index, self.decode_from, in_pages=self.decode is not None)
            if isinstance(batch, str):
                return self._left(given, index, batch)
            out = batch.run(self.handler, self.decode)
        else:
            steps = Steps(self.decode_from, length_of_prompt())
            call = understood(given, index, steps)
            if isinstance(call, str):
                return self._left(given, index, call)
            if self.fp8:
                call = replace(call, k=quantised(call.k), v=quantised(call.v))
            out = call.run(self.handler, steps)
        return out.transpose(1, 2).contiguous(), None

    def _left(self, given: Given, index: int, reason: str) -> tuple[torch.Tensor, Any]:
        """What the model's own attention computes; a layer's first reason is named."""
        # The layer is not given up: its next call may be one that we understand.
        if index not in self.named:
            self.named.add(index)
            _log.warning("layer %d keeps the model's own attention: %s", index, reason)
        return given.by_itself()
