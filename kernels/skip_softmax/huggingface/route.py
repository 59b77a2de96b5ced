"""Sends a model's attention calls and masks to us, through transformers' own registries, for a while.

A config names the attention of its model, and the model's code looks that name up whenever it attends or
builds a mask. Inside a block the name is a `RoutedName`: equal to the name that the model came with, so that
code which asks for it takes the way that it always takes, and recognised by the look-up, which answers with
us. So we are also told what the model itself would have called, its own eager function included.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationMixin,
    PreTrainedModel,
)

from skip_softmax.huggingface.masks import MaskRecipe, mask_recipe

_ARGUMENTS = ("module", "query", "key", "value", "attention_mask")


class RoutedName(str):
    """The name of a model's own attention, and who is called in its place.

    A copy is the plain name: a model that is copied inside a block is a model outside of it.
    """

    plain: str
    take: Taker

    def __new__(cls, name: str, take: Taker) -> RoutedName:  # noqa: D102
        self = super().__new__(cls, name)
        self.plain, self.take = name, take
        return self

    def __reduce__(self) -> Any:
        return str, (self.plain,)

    def __deepcopy__(self, memo: Any) -> str:
        return self.plain


@dataclass(frozen=True)
class Given:
    """One attention call as a module made it.

    Attributes:
        own: what the module would have called.
        attention: the name under which it was looked up.
        module: who attends.
        q: queries [B, Hq, Sq, D].
        k: keys [B, Hkv, Skv, D].
        v: values [B, Hkv, Skv, Dv].
        mask: what the module was given as its mask.
        keywords: all arguments that were given by name, but for these.
        extra: further arguments without a name.
    """

    own: Callable[..., Any]
    attention: str
    module: torch.nn.Module
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Any
    keywords: dict[str, Any]
    extra: tuple[Any, ...] = ()

    def by_itself(self) -> tuple[torch.Tensor, Any]:
        """What the module would have computed without us."""
        mask = self.mask
        if isinstance(mask, MaskRecipe):
            mask = mask.own()
            # Where layers are spread over devices, hooks move a mask along; a recipe stays where it is.
            mask = mask.to(self.q.device) if isinstance(mask, torch.Tensor) else mask
        out: tuple[torch.Tensor, Any] = self.own(
            self.module, self.q, self.k, self.v, mask, *self.extra, **self.keywords
        )
        return out


Taker = Callable[[Given], tuple[torch.Tensor, Any]]


class _Detour:
    """Stands where the model expects its attention function."""

    def __init__(self, own: Callable[..., Any], name: RoutedName) -> None:
        self.own, self.name = own, name

    def __call__(self, *arguments: Any, **keywords: Any) -> tuple[torch.Tensor, Any]:
        missing = _ARGUMENTS[len(arguments) :]
        if not all(name in keywords for name in missing):
            out: tuple[torch.Tensor, Any] = self.own(*arguments, **keywords)
            return out  # called as no attention function is
        module, q, k, v, mask = (*arguments[:5], *(keywords.pop(name) for name in missing))
        extra = arguments[5:]
        return self.name.take(
            Given(self.own, self.name.plain, module, q, k, v, mask, keywords, extra)
        )


@contextmanager
def routed(model: PreTrainedModel, take: Taker) -> Iterator[None]:
    """Sends every attention call of a model to `take`, for the duration of a `with` block.

    Args:
        model: a transformers model.
        take: computes one call, or has it done by `Given.by_itself`.

    Yields:
        Nothing.

    Raises:
        ValueError: the model, or one that shares its config, is already inside such a block.
    """
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    before = {
        id(config): (config, config._attn_implementation)
        for config in configs
        if isinstance(getattr(config, "_attn_implementation", None), str)
    }
    if any(isinstance(name, RoutedName) for _, name in before.values()):
        raise ValueError(
            "this model, or one that shares its config, already runs inside `applied`; leave that block first"
        )
    with _PATCHES:
        try:
            for config, name in before.values():
                config._attn_implementation_internal = RoutedName(name, take)
            yield
        finally:
            for config, name in before.values():
                config._attn_implementation_internal = name


class Patches:
    """What transformers looks up or calls by way of a class, replaced while at least one block is open.

    Args:
        made: class, name of its method, and what makes the replacement of that method.
    """

    def __init__(self, *made: tuple[type, str, Callable[[Any], Any]]) -> None:
        self.open, self.lock, self.made = 0, threading.Lock(), made
        self.before: list[tuple[type, str, Any]] = []

    def __enter__(self) -> None:
        with self.lock:
            self.open += 1
            if self.open > 1:
                return
            for owner, name, make in self.made:
                self.before.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, make(getattr(owner, name)))

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.open -= 1
            while not self.open and self.before:
                owner, name, value = self.before.pop()
                if value is None:  # inherited
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


def _get_interface(before: Any) -> Any:
    def method(self: Any, attn_implementation: Any, default: Any) -> Any:
        # A module's eager function is the default that it gives; no registry has it.
        found = before(self, attn_implementation, default)
        if isinstance(attn_implementation, RoutedName) and not isinstance(found, _Detour):
            return _Detour(found, attn_implementation)
        return found

    return method


def _attention(before: Any) -> Any:
    def method(self: Any, key: Any) -> Any:
        found = before(self, key)
        return _Detour(found, key) if isinstance(key, RoutedName) else found

    return method


def _mask(before: Any) -> Any:
    def method(self: Any, key: Any) -> Any:
        found = before(self, key)
        return partial(mask_recipe, found, key.plain) if isinstance(key, RoutedName) else found

    return method


def _set_attention(before: Any) -> Any:
    @wraps(before)
    def method(self: Any, attn_implementation: Any, *arguments: Any, **keywords: Any) -> Any:
        configs: list[Any] = [getattr(module, "config", None) for module in self.modules()]
        ours = [
            (config, config._attn_implementation.take)
            for config in configs
            if isinstance(getattr(config, "_attn_implementation", None), RoutedName)
        ]
        done = before(self, _plain(attn_implementation), *arguments, **keywords)
        for config, take in ours:
            name = config._attn_implementation
            if not isinstance(name, RoutedName):
                config._attn_implementation_internal = RoutedName(name, take)
        return done

    return method


def _plain(name: Any) -> Any:
    if isinstance(name, dict):
        return {key: _plain(value) for key, value in name.items()}
    return name.plain if isinstance(name, RoutedName) else name


def _generate(before: Any) -> Any:
    @wraps(before)
    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if _PROMPT.get() is not None:  # drafts for a text that is being written
            return before(self, *arguments, **keywords)
        token = _PROMPT.set(_length_of_prompt(self, *arguments, **keywords))
        try:
            return before(self, *arguments, **keywords)
        finally:
            _PROMPT.reset(token)

    return method


_PATCHES = Patches(
    (AttentionInterface, "get_interface", _get_interface),
    (AttentionInterface, "__getitem__", _attention),
    (AttentionMaskInterface, "__getitem__", _mask),
    (PreTrainedModel, "set_attn_implementation", _set_attention),
    (GenerationMixin, "generate", _generate),
)

_PROMPT: ContextVar[int | None] = ContextVar(
    "length of the prompt that is being continued", default=None
)


def length_of_prompt() -> int | None:
    """Tokens of the prompts that `generate` continues now, padding included; None: outside, or unknown."""
    return _PROMPT.get()


def _length_of_prompt(
    model: PreTrainedModel, inputs: Any = None, *rest: Any, **keywords: Any
) -> int | None:
    if model.config.is_encoder_decoder:
        start = keywords.get("decoder_input_ids")
        return start.shape[1] if isinstance(start, torch.Tensor) else 1
    mask = keywords.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.shape[1]  # of the whole text, also where only its new part is given
    given = [keywords.get("inputs_embeds"), keywords.get("input_ids"), inputs]
    lengths = [x.shape[1] for x in given if isinstance(x, torch.Tensor) and x.dim() >= 2]
    return lengths[0] if lengths else None
