"""Sends every attention call of a Hugging Face model to a handler, until a `with` block ends."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skip_softmax.huggingface.masks import MaskRecipe, mask_recipe
from skip_softmax.thresholds.types import Phase

_log = logging.getLogger(__name__)
_NAME = "skip_softmax"

# Keywords that change the scores or the softmax itself; `attention` cannot compute such a call.
_UNSUPPORTED = {
    "softcap": "attention soft-cap",
    "s_aux": "attention sink logits",
    "position_bias": "position bias",
}


@dataclass(frozen=True)
class LayerCall:
    """One attention call of one layer, all requests of equal length.

    Attributes:
        layer: layer index.
        phase: `prefill` or `decode`; a decode call holds one or more tokens, each voting alone.
        q: [B, Hq, Sq, D]; the last query stands at position kv_len - 1.
        k: [B, Hkv, kv_len - kv_start, D].
        v: like k.
        scale: factor of the scores.
        causal: whether rows see no later key.
        window: sliding window [tokens] or None.
        kv_start: absolute position of the first key.
    """

    layer: int
    phase: Phase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    causal: bool
    window: int | None
    kv_start: int

    @property
    def kv_len(self) -> int:
        """KV length of the call [tokens]."""
        return self.kv_start + self.k.shape[2]

    @property
    def position(self) -> int:
        """Absolute position of the first query."""
        return self.kv_len - self.q.shape[2]

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of `attention`, or of `decode_attention` for a decode call."""
        keywords = {"scale": self.scale, "window": self.window, "kv_start": self.kv_start}
        return keywords if self.phase == "decode" else {**keywords, "causal": self.causal}

    def part(self, batch: slice, rows: slice, keys: slice, kv_start: int) -> LayerCall:
        """The same call for a part of the batch; `kv_start` is the position of the first of its keys."""
        return replace(
            self,
            q=self.q[batch, :, rows],
            k=self.k[batch, :, keys],
            v=self.v[batch, :, keys],
            kv_start=kv_start,
        )

    def rows(self, start: int, stop: int) -> LayerCall:
        """The same causal call for some rows, with the keys that the last of them sees."""
        keys = slice(0, self.position + stop - self.kv_start)
        return self.part(slice(None), slice(start, stop), keys, self.kv_start)


Handler = Callable[[LayerCall], torch.Tensor]
# Is told of a call before it runs: the module, q, k, the window, and why the module keeps its own attention.
Observer = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, int | None, str | None], None]


def joined(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Outputs of consecutive rows as one; a single output is not copied."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


@contextmanager
def intercepted(
    model: PreTrainedModel,
    handler: Handler,
    *,
    decode_from: int | None = None,
    left_alone: dict[int, str] | None = None,
    observer: Observer | None = None,
) -> Iterator[None]:
    """Sends every attention call of a model to `handler`, for the duration of a `with` block.

    Args:
        model: a transformers model that uses the library's attention interface.
        handler: computes one call's output [B, Hq, Sq, D].
        decode_from: see `applied`.
        left_alone: layers that keep the model's own attention, and why.
        observer: is told of every call, including those that keep the model's own attention.

    Yields:
        Nothing.

    Raises:
        ValueError: the model has an encoder, or it (or one that shares its config) already runs inside
            such a block.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"the model must be decoder-only, but {type(model).__name__} also has an encoder"
        )
    modules = list(model.modules())
    AttentionInterface.register(_NAME, _attention_forward)
    AttentionMaskInterface.register(_NAME, mask_recipe)
    configs = {id(c): c for c in (getattr(m, "config", None) for m in modules) if c is not None}
    if any(config._attn_implementation == _NAME for config in configs.values()):
        raise ValueError(
            "this model, or one that shares its config, already runs inside `applied`; leave that block first"
        )
    before = {key: config._attn_implementation for key, config in configs.items()}
    text = type(model.config.get_text_config())
    interceptor = _Interceptor(handler, decode_from, before, left_alone or {}, text, observer)
    try:
        for module in modules:
            _ACTIVE[module] = interceptor
        for config in configs.values():
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for module in modules:
            _ACTIVE.pop(module, None)


@dataclass
class _Interceptor:
    handler: Handler
    decode_from: int | None
    original: dict[int, str]  # id of a config: the attention that its model came with
    left_alone: dict[int, str]
    text: type  # config class of text layers; layers for images and sound have another
    observer: Observer | None
    named: set[int] = field(default_factory=set)  # layers that a warning has named

    def forward(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scale: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Any]:
        index = getattr(module, "layer_idx", None)
        config = getattr(module, "config", None)
        if index is None or (config is not None and not isinstance(config, self.text)):
            return self.own_attention(module, q, k, v, mask, scale, kwargs)
        window = kwargs.get("sliding_window")
        reason = _why_not(mask, window, kwargs, self.decode_from)
        if self.observer is not None:
            self.observer(module, q, k, window, reason)
        if reason is not None or index in self.left_alone:
            # The layer is not given up: its next call may be one that we understand.
            if reason is not None and index not in self.left_alone and index not in self.named:
                self.named.add(index)
                _log.warning("layer %d keeps the model's own attention: %s", index, reason)
            return self.own_attention(module, q, k, v, mask, scale, kwargs)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        # The phase and `kv_start` are those of each part, below.
        call = LayerCall(index, "prefill", q, k, v, scale, mask.causal(window), window, 0)
        parts = list(mask.requests(q))
        if parts and parts[0][:2] == (slice(0, q.shape[0]), slice(0, q.shape[2])):
            out = self._by_phase(call.part(*parts[0]))  # the whole batch is one call: no copies
        else:
            out = q.new_zeros(*q.shape[:3], v.shape[-1])
            for batch, rows, keys, kv_start in parts:
                part = call.part(batch, rows, keys, kv_start)
                out[batch, :, rows] = self._by_phase(part)
        return out.transpose(1, 2).contiguous(), None

    def _by_phase(self, call: LayerCall) -> torch.Tensor:
        """Decides which rows are decode steps, and hands each phase's rows to the handler."""
        rows = call.q.shape[2]
        if self.decode_from is None:
            phase: Phase = "decode" if rows == 1 and call.position > 0 else "prefill"
            return self.handler(replace(call, phase=phase))
        split = min(max(self.decode_from - call.position, 0), rows)
        outputs = []
        if split:
            outputs.append(self.handler(call.rows(0, split)))
        if split < rows:
            outputs.append(self.handler(replace(call.rows(split, rows), phase="decode")))
        return joined(outputs)

    def own_attention(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scale: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Any]:
        config = getattr(module, "config", None)
        name = self.original.get(id(config), "sdpa")
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        if isinstance(mask, MaskRecipe):
            mask = ALL_MASK_ATTENTION_FUNCTIONS[name](**mask.arguments)
        out: tuple[torch.Tensor, Any] = function(module, q, k, v, mask, scaling=scale, **kwargs)  # type: ignore[misc]
        return out


def _why_not(
    mask: Any, window: int | None, kwargs: dict[str, Any], decode_from: int | None
) -> str | None:
    """Why a call must keep the model's own attention; None: a `LayerCall` can express it.

    Args:
        mask: what the layer was given as its mask.
        window: sliding window [tokens] or None.
        kwargs: everything else that the layer passed to its attention function.
        decode_from: see `applied`.

    Raises:
        RuntimeError: the mask is a copy that lost its recipe.
    """
    for key, name in _UNSUPPORTED.items():
        if kwargs.get(key) is not None:
            return name
    if kwargs.get("dropout"):
        return "attention dropout (training)"
    if not isinstance(mask, MaskRecipe):
        if isinstance(mask, torch.Tensor) and not mask.shape[-1]:
            raise RuntimeError(
                "a layer must be given its mask as transformers' mask interface made it, but something "
                "copied the mask on the way; remove the hook, or run this model without `applied`"
            )
        return "a mask that was built outside transformers' mask interface"
    causal = mask.causal(window)
    if causal is None:
        return "an attention pattern other than full, causal or sliding window"
    if not causal and decode_from is not None:
        return "attention that sees later tokens"
    if mask.spans is None:
        return "padding between valid tokens"
    return None


_ACTIVE: weakref.WeakKeyDictionary[torch.nn.Module, _Interceptor] = weakref.WeakKeyDictionary()


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    interceptor = _ACTIVE.get(module)
    if interceptor is not None:
        return interceptor.forward(module, query, key, value, attention_mask, scaling, kwargs)
    # Another model that shares a config with one inside a block.
    config = id(getattr(module, "config", None))
    for interceptor in _ACTIVE.values():
        if config in interceptor.original:
            call = (query, key, value, attention_mask, scaling, kwargs)
            return interceptor.own_attention(module, *call)
    raise RuntimeError(
        f"a model must be copied outside `applied`, but this {type(module).__name__} was copied inside; "
        "copy it again"
    )
