"""The attention layers of a Hugging Face model, found by running four tokens through it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedModel

from skip_softmax.api import attention
from skip_softmax.huggingface.intercept import LayerCall, intercepted


@dataclass(frozen=True)
class Layer:
    """An attention layer, as a forward pass of a few tokens found it.

    Attributes:
        index: layer index.
        name: module path, for example `model.layers.3.self_attn`.
        q_heads: query heads.
        kv_heads: KV heads.
        head_dim: size of a head.
        window: sliding window [tokens] or None.
        reason: why it cannot be calibrated; None: it can be.
    """

    index: int
    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    reason: str | None


def inspect_layers(model: PreTrainedModel) -> list[Layer]:
    """Finds a model's attention layers by running four tokens through it.

    Args:
        model: a decoder-only model.

    Returns:
        One entry per layer of the config; a layer that never called the attention interface has a
        reason.

    Raises:
        ValueError: the model has an encoder, or computes attention without transformers' interface.
    """
    config = model.config.get_text_config()
    seen: dict[int, Layer] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def observer(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        window: int | None,
        reason: str | None,
    ) -> None:
        index = int(cast(int, module.layer_idx))
        if index in seen:
            reason = "two attention modules share this layer index"
        name = names.get(id(module), "?")
        seen[index] = Layer(index, name, q.shape[1], k.shape[1], q.shape[3], window, reason)

    def dense(call: LayerCall) -> torch.Tensor:
        out: torch.Tensor = attention(call.q, call.k, call.v, **call.keywords)
        return out

    try:
        with intercepted(model, dense, observer=observer), torch.no_grad():
            tokens = torch.zeros(1, 4, dtype=torch.long, device=model.device)
            model(input_ids=tokens, use_cache=False)
    except RuntimeError as error:
        if seen:
            raise
        raise ValueError(
            f"a model must use transformers' attention interface, but {type(model).__name__} computes "
            f"attention itself ({str(error).splitlines()[0]})"
        ) from error
    layers = []
    main = _most_common([(s.q_heads, s.kv_heads, s.head_dim) for s in seen.values()])
    for index in range(config.num_hidden_layers):
        layer = seen.get(index) or Layer(
            index, "?", 0, 0, 0, None, "no softmax attention of transformers"
        )
        if layer.reason is None and (layer.q_heads, layer.kv_heads, layer.head_dim) != main:
            layer = replace(layer, reason="other head counts or head size than most layers")
        layers.append(layer)
    return layers


def _most_common(values: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    return max(set(values), key=values.count) if values else (0, 0, 0)
