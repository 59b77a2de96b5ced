"""Sends every attention call of a Hugging Face model to a handler, and undoes it."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skip_softmax.huggingface.masks import MaskRecipe, _mask_recipe, _requests
from skip_softmax.thresholds.types import Phase

_log = logging.getLogger(__name__)
_NAME = "skip_softmax"

# What changes the softmax itself; such a layer keeps the model's own attention, and is named.
_UNSUPPORTED = {
    "softcap": "attention soft-cap",
    "s_aux": "attention sink logits",
    "position_bias": "position bias",
}


@dataclass(frozen=True)
class Call:
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


Handler = Callable[[Call], torch.Tensor]


@contextmanager
def intercepted(
    model: PreTrainedModel,
    handler: Handler,
    *,
    decode_from: int | None = None,
    left_alone: dict[int, str] | None = None,
) -> Iterator[None]:
    """Sends every attention call of a model to `handler`, for the length of a `with` block.

    Args:
        model: a model of transformers that uses its attention interface.
        handler: computes one call's output [B, Hq, Sq, D].
        decode_from: see `applied`.
        left_alone: layers that keep the model's own attention, and why.

    Yields:
        Nothing.

    Raises:
        ValueError: the model has an encoder, or it (or one that shares its config) is already inside such
            a block.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"the model must be decoder-only, but {type(model).__name__} also has an encoder"
        )
    modules = list(model.modules())
    AttentionInterface.register(_NAME, _attention_forward)
    AttentionMaskInterface.register(_NAME, _mask_recipe)
    configs = {id(c): c for c in (getattr(m, "config", None) for m in modules) if c is not None}
    if any(config._attn_implementation == _NAME for config in configs.values()):
        raise ValueError(
            "this model, or one that shares its config, already runs inside `applied`; leave that block first"
        )
    before = {key: config._attn_implementation for key, config in configs.items()}
    text = type(model.config.get_text_config())
    interceptor = _Interceptor(handler, decode_from, before, dict(left_alone or {}), text)
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
    original: dict[int, str]
    left_alone: dict[int, str]
    text: type  # class of the config that text layers have, and those of images and sound have not
    note: Callable[..., None] | None = None
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
            return self._own_attention(module, q, k, v, mask, scale, kwargs)
        window = kwargs.get("sliding_window")
        reason, causal = self._reason(q, mask, window, kwargs)
        if self.note is not None:
            self.note(module, q, k, window, reason)
        if reason is not None or index in self.left_alone:
            # Another call of the layer may be one that is understood.
            if reason is not None and index not in self.left_alone and index not in self.named:
                self.named.add(index)
                _log.warning("layer %d keeps the model's own attention: %s", index, reason)
            return self._own_attention(module, q, k, v, mask, scale, kwargs)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        requests = list(_requests(q, k, mask))
        if requests and requests[0][:2] == (slice(0, q.shape[0]), slice(0, q.shape[2])):
            _, _, keys, kv_start, position = requests[0]  # the whole batch is one call: no copies
            out = self._by_phase(
                index,
                q,
                k[:, :, keys],
                v[:, :, keys],
                scale,
                causal,
                window,
                kv_start,
                position=position,
            )
            return out.transpose(1, 2).contiguous(), None
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        for b, rows, keys, kv_start, position in requests:
            call = (k[b, :, keys], v[b, :, keys], scale, causal, window, kv_start)
            out[b, :, rows] = self._by_phase(index, q[b, :, rows], *call, position=position)
        return out.transpose(1, 2).contiguous(), None

    def _by_phase(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        kv_start: int,
        *,
        position: int,
    ) -> torch.Tensor:
        """Splits the rows of a call at `decode_from`; the keys that the earlier rows see end there too."""
        rows = q.shape[2]
        if self.decode_from is None:
            phase: Phase = "decode" if rows == 1 and position > 0 else "prefill"
            return self.handler(Call(layer, phase, q, k, v, scale, causal, window, kv_start))
        split = min(max(self.decode_from - position, 0), rows)
        outputs = []
        if split:
            seen = position + split - kv_start
            outputs.append(
                self.handler(
                    Call(
                        layer,
                        "prefill",
                        q[:, :, :split],
                        k[:, :, :seen],
                        v[:, :, :seen],
                        scale,
                        causal,
                        window,
                        kv_start,
                    )
                )
            )
        if split < rows:
            outputs.append(
                self.handler(
                    Call(layer, "decode", q[:, :, split:], k, v, scale, causal, window, kv_start)
                )
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _reason(
        self, q: torch.Tensor, mask: Any, window: int | None, kwargs: dict[str, Any]
    ) -> tuple[str | None, bool]:
        for key, name in _UNSUPPORTED.items():
            if kwargs.get(key) is not None:
                return name, True
        if kwargs.get("dropout"):
            return "attention dropout (training)", True
        if not isinstance(mask, MaskRecipe):
            if isinstance(mask, torch.Tensor) and not mask.shape[-1]:
                raise RuntimeError(
                    "a mask must reach its layers as transformers' mask interface made it, but something "
                    "copied it on the way; remove the hook, or run this model without `applied`"
                )
            return "a mask that was built outside transformers' mask interface", True
        causal = mask.causal(window)
        if causal is None:
            return "an attention pattern other than full, causal or sliding window", True
        if not causal and self.decode_from is not None:
            return "attention that sees later tokens", True
        if mask.spans() is None:
            return "padding between valid tokens", True
        return None, causal

    def _own_attention(
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
            return interceptor._own_attention(module, *call)
    raise RuntimeError(
        f"a model must be copied outside `applied`, but this {type(module).__name__} was copied inside; "
        "copy it again"
    )
