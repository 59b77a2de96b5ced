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
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils.generic import GeneralInterface

from skip_softmax.huggingface.masks import MaskRecipe, mask_recipe

_ARGUMENTS = ("module", "query", "key", "value", "attention_mask")


class RoutedName(str):
    """The name of a model's own attention, and who is called in its place.

    A copy is the plain name: a model that is copied inside a block is a model outside of it.
    """

    take: Taker

    def __new__(cls, name: str, take: Taker) -> RoutedName:  # noqa: D102
        self = super().__new__(cls, name)
        self.take = take
        return self

    def __reduce__(self) -> Any:
        return str, (str(self),)

    def __deepcopy__(self, memo: Any) -> str:
        return str(self)


@dataclass(frozen=True)
class Given:
    """One attention call as a module made it.

    Attributes:
        own: what the module would have called.
        attention: the name under which it was looked up.
        arguments: all arguments, by name.
        extra: whether there were more positional arguments than the interface has names for.
    """

    own: Callable[..., Any]
    attention: str
    arguments: dict[str, Any]
    extra: tuple[Any, ...]

    @property
    def module(self) -> torch.nn.Module:
        """The module that attends."""
        module: torch.nn.Module = self.arguments["module"]
        return module

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [B, H, S, D]."""
        q, k, v = (self.arguments[name] for name in ("query", "key", "value"))
        return q, k, v

    @property
    def mask(self) -> Any:
        """What the module was given as its mask."""
        return self.arguments["attention_mask"]

    @property
    def keywords(self) -> dict[str, Any]:
        """All arguments but module, tensors and mask."""
        return {key: value for key, value in self.arguments.items() if key not in _ARGUMENTS}

    def by_itself(self) -> tuple[torch.Tensor, Any]:
        """What the module would have computed without us."""
        mask, first = self.mask, self.arguments["query"]
        if isinstance(mask, MaskRecipe):
            mask = mask.own()
            # Where layers are spread over devices, hooks move a mask along; a recipe stays where it is.
            mask = mask.to(first.device) if isinstance(mask, torch.Tensor) else mask
        given = {**self.arguments, "attention_mask": mask}
        positional = [given.pop(name) for name in _ARGUMENTS]
        out: tuple[torch.Tensor, Any] = self.own(*positional, *self.extra, **given)
        return out


Taker = Callable[[Given], tuple[torch.Tensor, Any]]


class _Detour:
    """Stands where the model expects its attention function."""

    def __init__(self, own: Callable[..., Any], name: RoutedName) -> None:
        self.own, self.name = own, name

    def __call__(self, *arguments: Any, **keywords: Any) -> tuple[torch.Tensor, Any]:
        named = {**dict(zip(_ARGUMENTS, arguments, strict=False)), **keywords}
        if not all(name in named for name in _ARGUMENTS):
            out: tuple[torch.Tensor, Any] = self.own(*arguments, **keywords)
            return out  # called as no attention function is
        given = Given(self.own, str(self.name), named, arguments[len(_ARGUMENTS) :])
        return self.name.take(given)


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
    with _LOOK_UPS:
        try:
            for config, name in before.values():
                config._attn_implementation_internal = RoutedName(name, take)
            yield
        finally:
            for config, name in before.values():
                config._attn_implementation_internal = name


class _LookUps:
    """Registries of transformers that know a `RoutedName`, while at least one block is open."""

    def __init__(self) -> None:
        self.open, self.lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.open += 1
            if self.open == 1:
                self.get_interface = AttentionInterface.get_interface
                AttentionInterface.get_interface = _with_detour(self.get_interface)
                AttentionInterface.__getitem__ = _attention
                AttentionMaskInterface.__getitem__ = _mask

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.open -= 1
            if not self.open:
                AttentionInterface.get_interface = self.get_interface
                del AttentionInterface.__getitem__, AttentionMaskInterface.__getitem__


_LOOK_UPS = _LookUps()


def _with_detour(get_interface: Any) -> Any:
    def method(self: Any, attn_implementation: Any, default: Any) -> Any:
        # A module's eager function is the default that it gives; no registry has it.
        found = get_interface(self, attn_implementation, default)
        if isinstance(attn_implementation, RoutedName) and not isinstance(found, _Detour):
            return _Detour(found, attn_implementation)
        return found

    return method


def _attention(self: Any, key: Any) -> Any:
    found = GeneralInterface.__getitem__(self, key)
    return _Detour(found, key) if isinstance(key, RoutedName) else found


def _mask(self: Any, key: Any) -> Any:
    found = GeneralInterface.__getitem__(self, key)
    return partial(mask_recipe, found, str(key)) if isinstance(key, RoutedName) else found
