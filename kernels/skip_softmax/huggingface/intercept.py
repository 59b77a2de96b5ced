"""Sends the attention calls of a model's layers to a handler, until a `with` block ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from skip_softmax.huggingface.calls import Handler as Handler
from skip_softmax.huggingface.calls import LayerCall as LayerCall
from skip_softmax.huggingface.calls import Steps, understood
from skip_softmax.huggingface.calls import joined as joined
from skip_softmax.huggingface.layers import Inspected, inspected
from skip_softmax.huggingface.route import Given, routed

_log = logging.getLogger(__name__)


@contextmanager
def intercepted(
    model: PreTrainedModel,
    handler: Handler,
    *,
    decode_from: int | None = None,
    left_alone: dict[int, str] | None = None,
) -> Iterator[None]:
    """Sends the attention calls of a model's layers to `handler`, for the duration of a `with` block.

    Only modules that `inspect_layers` found to be plain attention of the model's usual shape are asked; a
    call of theirs that is not understood, and every other module, keeps the model's own attention.

    Args:
        model: a transformers model that uses the library's attention interface.
        handler: computes one call's output [B, Hq, Sq, D].
        decode_from: see `applied`.
        left_alone: layers that keep the model's own attention, and why.

    Yields:
        Nothing.

    Raises:
        ValueError: `inspect_layers` refuses the model, or it (or one that shares its config) already runs
            inside such a block.
    """
    interceptor = _Interceptor(handler, inspected(model), Steps(decode_from), left_alone or {})
    with routed(model, interceptor.take), _prompts_of_generate(model, interceptor):
        yield


@dataclass
class _Interceptor:
    handler: Handler
    model: Inspected
    steps: Steps
    left_alone: dict[int, str]
    named: set[int] = field(default_factory=set)  # layers that a warning has named

    def take(self, given: Given) -> tuple[torch.Tensor, Any]:
        index = self.model.modules.get(given.module)
        if index is None or index in self.left_alone:
            return given.by_itself()
        call = self.model.layers[index].reason or understood(given, index, self.steps)
        if isinstance(call, str):
            # The layer is not given up: its next call may be one that we understand.
            if index not in self.named:
                self.named.add(index)
                _log.warning("layer %d keeps the model's own attention: %s", index, call)
            return given.by_itself()
        return call.run(self.handler, self.steps).transpose(1, 2).contiguous(), None


@contextmanager
def _prompts_of_generate(model: PreTrainedModel, interceptor: _Interceptor) -> Iterator[None]:
    """Inside `model.generate` the length of the prompt is known, and with it which tokens were generated."""
    generate: Callable[..., Any] | None = getattr(model, "generate", None)
    own = model.__dict__.get("generate")
    if generate is None:
        yield
        return

    def with_prompt(*arguments: Any, **keywords: Any) -> Any:
        before = interceptor.steps
        if (
            before.prompt is None
        ):  # else a draft that the model makes for itself: generated tokens too
            interceptor.steps = Steps(before.decode_from, _prompt(*arguments, **keywords))
        try:
            return generate(*arguments, **keywords)
        finally:
            interceptor.steps = before

    model.generate = with_prompt
    try:
        yield
    finally:
        del model.generate
        if own is not None:
            model.generate = own


def _prompt(inputs: Any = None, *rest: Any, **keywords: Any) -> int | None:
    """Positions that `generate`'s arguments fill, those of its cache included; None: they do not say."""
    mask = keywords.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.shape[1]  # of the whole text, also where only its new part is given
    given = [keywords.get("inputs_embeds"), keywords.get("input_ids"), inputs]
    lengths = [x.shape[1] for x in given if isinstance(x, torch.Tensor) and x.dim() >= 2]
    return lengths[0] if lengths else None
