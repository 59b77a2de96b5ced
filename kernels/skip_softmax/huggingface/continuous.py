"""Continuous batching of transformers, `generate_batch` and the managers behind it: who is in a step.

Its scheduler packs the next rows of many requests, prompts and generated tokens alike, into one row of
tokens. What the tensors of a step do not say, or only on the device, the scheduler knows on the host: where
each request's rows stand, and how long its prompt is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from weakref import WeakSet

from transformers import GenerationMixin

from skip_softmax.huggingface.route import Patches, RoutedName, Taker

try:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.cache_allocators import (
        FullAttentionCacheAllocator,
    )
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    # Older releases take other arguments, and give keys in another shape.
    _KNOWN = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters and all(
        hasattr(FullAttentionCacheAllocator, name)
        for name in (
            "layer_type",
            "supports_block_table",
            "get_seqlen_k",
            "fill_block_table",
            "get_cache_for_block_table",
        )
    )
except ImportError:
    _KNOWN = False


@dataclass(frozen=True)
class Request:
    """Which rows of a request a step computes.

    Attributes:
        name: its id.
        rows: how many.
        position: where the first of them stands.
        prompt: tokens of its prompt; whatever stands behind them was generated, also where the scheduler
            drops a request's cache and reads its own tokens back as if they were a prompt.
    """

    name: str
    rows: int
    position: int
    prompt: int


@dataclass(frozen=True)
class Step:
    """One forward pass of continuous batching.

    Attributes:
        requests: in the order of their rows; rows behind them are padding.
        masks: what the model was given as its masks, by the kind of its layers.
        found: what `packed.py` found, which all layers of a kind share.
    """

    requests: tuple[Request, ...]
    masks: dict[str, Any]
    found: dict[Any, Any] = field(default_factory=dict)


_STEP: ContextVar[Step | None] = ContextVar("step of continuous batching", default=None)


def step_of(cache: Any) -> Step | None:
    """The step that runs now, or None: it, or its paged cache, is of a kind that is not known here."""
    return _STEP.get() if _KNOWN and isinstance(cache, PagedAttentionCache) else None


@contextmanager
def batched(model: Any, take: Taker, refusal: str | None = None) -> Iterator[None]:
    """Learns of each step of a routed model's continuous batching, for the duration of a `with` block.

    Managers that are made inside end with the block, because their caches hold keys of its attention.

    Args:
        model: a transformers model.
        take: computes its attention calls.
        refusal: why no manager may be made inside; None: they may.

    Yields:
        Nothing.
    """
    with _PATCHES:
        managers = _MADE[take] = WeakSet()
        if refusal is not None:
            _REFUSED[take] = refusal
        try:
            yield
        finally:
            try:
                for manager in list(managers):
                    if getattr(model, _KEPT, None) is manager:
                        model.destroy_cached_continuous_batching_manager()
                    manager.destroy()
            finally:
                del _MADE[take]
                _REFUSED.pop(take, None)


_KEPT = "_cached_continuous_batching_manager"  # where transformers keeps a persistent manager
_MADE: dict[Taker, WeakSet[Any]] = {}  # managers that were made in each open block
_REFUSED: dict[Taker, str] = {}  # open blocks in which none may be made, and why


def _init(before: Any) -> Any:
    @wraps(before)
    def method(self: Any, *positional: Any, **keywords: Any) -> Any:
        name = self.config._attn_implementation
        if not isinstance(name, RoutedName) or name.take not in _MADE:
            return before(self, *positional, **keywords)
        if name.take in _REFUSED:
            raise ValueError(_REFUSED[name.take])
        made, kept = _MADE[name.take], getattr(self, _KEPT, None)
        if kept is not None and kept not in made:
            raise ValueError(
                "a manager of continuous batching must be made in the `applied` block in which it runs, "
                "because its cache holds keys of other attention, but this model keeps one from before; call "
                "model.destroy_cached_continuous_batching_manager() first"
            )
        manager = before(self, *positional, **keywords)
        refusal = _why_not(manager.continuous_batching_config)
        if refusal is not None:
            self.set_attn_implementation(name.plain)
            raise ValueError(refusal)
        made.add(manager)
        return manager

    return method


def _why_not(config: Any) -> str | None:
    """Why steps with this configuration would not be what they seem."""
    law = "continuous batching inside `applied` must"
    if any(config.cuda_graph_booleans):
        return (
            f"{law} run without CUDA graphs, because a replayed graph keeps the requests and phases with "
            f"which it was captured, but use_cuda_graph is {config.use_cuda_graph}; pass "
            "ContinuousBatchingConfig(use_cuda_graph=False)"
        )
    for key in ("varlen_compile_config", "decode_compile_config"):
        if getattr(config, key) is not None:
            return (
                f"{law} run without torch.compile, because compiled steps outlive the block, but `{key}` "
                "is set (by itself, by default_compile_level or by the model's compile_config); leave them "
                "unset"
            )
    return None


def _compute_batch(before: Any) -> Any:
    @wraps(before)
    def method(self: Any, model: Any, batch_data: dict[str, Any]) -> Any:
        name = model.config._attn_implementation
        if not isinstance(name, RoutedName) or name.take not in _MADE:
            return before(self, model, batch_data)
        known = (manager.continuous_batching_config for manager in _MADE[name.take])
        if not any(config is self.cb_config for config in known):
            raise RuntimeError(
                "a manager of continuous batching must be made in the `applied` block in which it runs, but "
                "this one was made outside; stop it, and make another inside"
            )
        try:
            step = _step(self.inputs_and_outputs, batch_data)
        except (AttributeError, LookupError):
            step = None  # another release; each layer says that it is not understood
        token = _STEP.set(step)
        try:
            return before(self, model, batch_data)
        finally:
            _STEP.reset(token)

    return method


def _step(buffers: Any, batch_data: dict[str, Any]) -> Step:
    pairs = getattr(buffers, "io_pairs", None)  # asynchronous batching prepares one while one runs
    if pairs is not None:
        buffers = pairs[buffers.current_pair].host_io
    requests = []
    for planned in buffers.requests_in_batch:
        state, rows = planned.state, planned.query_length
        prompt = state._true_initial_tokens or len(state.initial_tokens)
        requests.append(Request(state.request_id, rows, state.position_offset - rows, prompt))
    masks = batch_data["attention_mask"]
    if not isinstance(masks, dict):  # one kind of layers, or no mask
        masks = dict.fromkeys(batch_data["cu_seq_lens_k"], masks)
    return Step(tuple(requests), masks)


_PATCHES = Patches(
    *(
        (
            (GenerationMixin, "init_continuous_batching", _init),
            (ModelRunner, "compute_batch", _compute_batch),
        )
        if _KNOWN
        else ()
    )
)
