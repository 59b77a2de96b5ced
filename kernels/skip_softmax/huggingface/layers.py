"""The attention layers of a Hugging Face model, found by running four tokens through it."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from skip_softmax.api import attention
from skip_softmax.huggingface.calls import LayerCall, Steps, understood
from skip_softmax.huggingface.route import Given, routed

_TOKENS = 4
# How far two ways to compute the same attention may differ, relative to its largest number.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Layer:
    """An attention layer, as a forward pass of a few tokens found it.

    Attributes:
        index: layer index.
        name: module path, for example `model.layers.3.self_attn`.
        q_heads: query heads.
        kv_heads: KV heads.
        head_dim: columns of a head's queries and keys.
        window: sliding window [tokens] or None.
        reason: why it cannot be calibrated; None: it can be.
        head_dim_v: columns of its values; None: as many.
    """

    index: int
    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    reason: str | None
    head_dim_v: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Query heads, KV heads, head size."""
        return self.q_heads, self.kv_heads, self.head_dim


def inspect_layers(model: PreTrainedModel) -> list[Layer]:
    """Finds a model's attention layers by running four tokens through it.

    A layer can be calibrated if our dense attention gives there what the model's own gives, up to rounding.

    Args:
        model: a decoder-only model.

    Returns:
        One entry per layer of the model, whether it attends or not; a layer that cannot be calibrated has a
        reason.

    Raises:
        ValueError: the model has an encoder, cannot be run on tokens alone, or computes attention without
            transformers' interface.
    """
    return list(inspected(model).layers)


@dataclass(frozen=True)
class Inspected:
    """What four tokens showed of a model.

    Attributes:
        layers: its layers in order.
        modules: the index of every module that is the attention of one layer, and of no other.
        shape: query heads, KV heads and head size of the layers that can be calibrated.
    """

    layers: tuple[Layer, ...]
    modules: weakref.WeakKeyDictionary[torch.nn.Module, int]
    shape: tuple[int, int, int]


def inspected(model: PreTrainedModel) -> Inspected:
    """As `inspect_layers`; asked again of a model that did not change, it answers from memory."""
    key = _identity(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != key:
        known = _KNOWN[model] = (key, _inspect(model))
    return known[1]


_KNOWN: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, Inspected]] = (
    weakref.WeakKeyDictionary()
)


def _identity(model: PreTrainedModel) -> Any:
    """Modules, and what their configs say of attention; references do not keep replaced modules alive."""
    said = ("_attn_implementation", "output_attentions")
    configs = {module: getattr(module, "config", None) for module in model.modules()}
    return [
        (weakref.ref(module), *(getattr(config, key, None) for key in said))
        for module, config in configs.items()
    ]


def _inspect(model: PreTrainedModel) -> Inspected:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"the model must be decoder-only, but {type(model).__name__} also has an encoder"
        )
    names = {module: name for name, module in model.named_modules()}
    text = type(model.config.get_text_config())
    found: dict[int, Layer] = {}
    others: set[str] = set()
    modules: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()

    def take(given: Given) -> tuple[torch.Tensor, Any]:
        module, own = given.module, given.by_itself()
        index = _index(module, names.get(module, ""))
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, text):
            others.add(type(config).__name__)
            return own  # layers for images and sound have another config, and numbers of their own
        if index is None or module not in names:
            return own
        q, k = given.q, given.k
        window, reason = given.keywords.get("sliding_window"), None
        call = understood(given, index, Steps())
        if isinstance(call, str):
            reason = call
        else:
            window = call.seen.window or window
            if not _same(call.run(_dense, Steps()).transpose(1, 2), own[0]):
                reason = "its own attention computes something else than softmax attention"
        if index in found:
            reason = (
                "its attention is called more than once for a token"
                if modules.get(module) == index
                else "two attention modules share this layer index"
            )
        modules[module] = index
        shape = (q.shape[1], k.shape[1], q.shape[3])
        other = given.v.shape[3] if given.v.shape[3] != shape[2] else None
        found[index] = Layer(index, names[module], *shape, window, reason, other)
        return own

    _run(model, take)
    if not found and others:
        raise ValueError(
            f"attention layers must share the config of their text model, {text.__name__}, but those of "
            f"{type(model).__name__} have {', '.join(sorted(others))}"
        )
    if not found:
        raise ValueError(
            f"a model must use transformers' attention interface, but {type(model).__name__} computes "
            "attention itself, or has none"
        )
    shapes = [layer.shape for layer in found.values() if layer.reason is None]
    main = _most_common(shapes or [layer.shape for layer in found.values()])
    layers = []
    for index in range(_count(model, found)):
        layer = found.get(index) or Layer(
            index,
            "?",
            0,
            0,
            0,
            None,
            "it did not ask for transformers' attention when it read four tokens",
        )
        if layer.reason is None and layer.shape != main:
            layer = replace(layer, reason="other head counts or head size than most layers")
        layers.append(layer)
    return Inspected(tuple(layers), modules, main)


def _run(model: PreTrainedModel, take: Any) -> None:
    """Four tokens, without dropout; where the weights are elsewhere, accelerate's hooks move the tokens."""
    device = model.device
    if device.type == "meta":
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ValueError(
                f"a model must have weights, but those of {type(model).__name__} are on the meta device, "
                "which holds no numbers; load them"
            )
        device = torch.device("cpu")
    training = [module for module in model.modules() if module.training]
    with routed(model, take), torch.no_grad():
        try:
            for module in training:
                module.training = False
            tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device=device)
            model(input_ids=tokens, use_cache=False)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"a model must be able to read {_TOKENS} token ids and nothing else, but "
                f"{type(model).__name__} could not: {reason}"
            ) from error
        finally:
            for module in training:
                module.training = True


def _dense(call: LayerCall) -> torch.Tensor:
    out: torch.Tensor = attention(call.q, call.k, call.v, **call.keywords)
    return out


def _same(ours: torch.Tensor, own: torch.Tensor) -> bool:
    if ours.shape != own.shape:
        return False
    rounding = max(_ROUNDING.get(x.dtype, 5e-2) for x in (ours, own))
    a, b = ours.float(), own.float()
    both = torch.isfinite(a) & torch.isfinite(b)
    largest = torch.where(both, b.abs(), 0.0).max()
    near = (a - b).abs() <= rounding * largest
    return bool((near | ~both).all())


def _index(module: torch.nn.Module, name: str) -> int | None:
    """The number that a module gives itself, or that of its place in the list of layers."""
    index = getattr(module, "layer_idx", None)
    if index is None or index < 0:
        index = next((part for part in name.split(".") if part.isdigit()), None)
    return None if index is None else int(index)


def _count(model: PreTrainedModel, found: dict[int, Layer]) -> int:
    """Layers of the list in which those stand that attend: some of a hybrid's have other attention."""
    lengths = [max(found) + 1]
    for name in {layer.name for layer in found.values()}:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                lengths.append(len(model.get_submodule(".".join(parts[:place]))))
                break
    return max(lengths)


def _most_common(shapes: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    return Counter(shapes).most_common(1)[0][0]
