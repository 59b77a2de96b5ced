"""Which keys each row of a call sees, learned from a mask's recipe instead of the mask itself.

A mask of transformers is batch x queries x keys. Its recipe is a function of positions, and one padding mask
per request. Plain causal, windowed and full attention are recognised by that function; any other function is
evaluated for every row, some rows at a time. Code that reads a mask is given the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

_ASKED_AT_ONCE = 1 << 24  # pairs of row and key that are evaluated together

# What may be asked of a mask without building it.
_ABOUT = {
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.is_meta.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
}


def is_flash(attention: str) -> bool:
    """Whether attention of this name takes padding alone as its mask, and the pattern from keywords."""
    return "flash" in attention


class MaskRecipe(torch.Tensor):
    """What transformers would build a mask from; it is built only for code that reads it.

    As a tensor it has the mask's shape, dtype and device, and one element of memory.
    """

    def __new__(  # noqa: D102
        cls, make: Callable[..., Any], attention: str, arguments: dict[str, Any]
    ) -> MaskRecipe:
        shape = [int(arguments[key]) for key in ("batch_size", "q_length", "kv_length")]
        shape = [shape[0], shape[2]] if is_flash(attention) else [shape[0], 1, *shape[1:]]
        dtype = arguments.get("dtype", torch.float32) if attention == "eager" else torch.bool
        one = torch.empty((1,) * len(shape), dtype=dtype, device=arguments.get("device", "cpu"))
        return one.expand(shape).as_subclass(cls)

    def __init__(self, make: Callable[..., Any], attention: str, arguments: dict[str, Any]) -> None:
        self.make, self.arguments = make, arguments
        self.batch = int(arguments["batch_size"])
        self.q_len = int(arguments["q_length"])
        self.q_offset = int(arguments.get("q_offset", 0))
        self.keys = int(arguments["kv_length"])
        self.kv_offset = int(arguments.get("kv_offset", 0))
        self.mask_function = arguments.get("mask_function", causal_mask_function)
        self.answers: dict[Any, Seen | str] = {}  # what `read` found so far

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers what is known of the mask; for everything else it is built."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(MaskRecipe, lambda recipe: recipe.built, (args, kwargs))
        return func(*args, **kwargs)

    def _moved(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        # Hooks move and copy what a layer is given; only another dtype makes it another mask.
        values = (*arguments, *keywords.values())
        if any(isinstance(value, torch.dtype | torch.Tensor) for value in values):
            return self.built.to(*arguments, **keywords)
        return self

    to = clone = detach = contiguous = _moved

    @cached_property
    def _made(self) -> Any:
        return self.make(**self.arguments)

    def own(self) -> Any:
        """What the model's own attention would have been given: a mask, or None."""
        return self._made

    @property
    def built(self) -> torch.Tensor:
        """The mask itself, as a tensor."""
        if self._made is not None:
            made: torch.Tensor = self._made
            return made
        device = self.arguments.get("device", "cpu")
        return torch.ones(self.shape, dtype=torch.bool, device=device)  # nothing is hidden

    def pattern(self, *windows: int | None) -> tuple[bool, int | None] | None:
        """Whether rows see no later key, and their window; None: neither full nor causal attention.

        Args:
            windows: sliding windows [tokens] that the layer may mean, beside that of the mask.
        """
        if self.arguments.get("use_vmap"):
            return None
        if (known := _known(self.mask_function)) is not None:
            return known  # it need not be evaluated, which would make a GPU wait
        given = [None, self.arguments.get("local_size"), *windows]
        candidates = list(dict.fromkeys(given))
        device = self.arguments.get("device", "cpu")
        keys = torch.arange(self.keys, device=device)[None, None, None, :] + self.kv_offset
        batch = torch.arange(self.batch, device=device)[:, None, None, None]
        same = torch.ones(len(candidates) + 1, dtype=torch.bool, device=device)
        step = max(1, _ASKED_AT_ONCE // max(1, self.batch * self.keys))
        for start in range(0, self.q_len, step):
            rows = torch.arange(start, min(start + step, self.q_len), device=device)
            rows = (rows + self.q_offset)[None, None, :, None]
            try:
                seen = self.mask_function(batch, torch.zeros_like(batch), rows, keys)
            except (RuntimeError, TypeError, IndexError):
                return None  # a custom function that cannot be evaluated on tensors of positions
            seen = torch.as_tensor(seen, device=device)
            causal = keys <= rows
            wanted = [causal if w is None else causal & (keys > rows - w) for w in candidates]
            wanted.append(torch.ones_like(causal))
            same &= torch.stack([(seen == each).all() for each in wanted])
        *as_causal, as_full = same.tolist()
        if any(as_causal):
            return True, candidates[as_causal.index(True)]
        return (False, None) if as_full else None

    @cached_property  # once per forward pass: reading a padding mask makes a GPU wait
    def spans(self) -> list[tuple[int, int]] | None:
        """First valid key of each request, and one past its last; None: padding between valid keys."""
        padding, end = self.arguments.get("attention_mask"), self.kv_offset + self.keys
        if padding is None:
            return [(0, end)] * self.batch
        padding = padding[:, :end].bool()  # keys that it does not reach are hidden
        places = torch.arange(padding.shape[1], device=padding.device)
        first = torch.where(padding, places, padding.shape[1]).amin(1)
        last = torch.where(padding, places, -1).amax(1)
        each = torch.stack([first, last + 1, padding.sum(1)], 1).tolist()
        if any(count and stop - start != count for start, stop, count in each):
            return None
        return [(start, stop) if count else (0, 0) for start, stop, count in each]


def mask_recipe(
    make: Callable[..., Any], attention: str, *positional: Any, **arguments: Any
) -> Any:
    """What transformers calls in place of its own function that builds a mask.

    Args:
        make: that function.
        attention: the name under which it was looked up.
        positional: what transformers itself never gives.
        arguments: its arguments.

    Returns:
        None where `make` returns None, else a recipe.
    """
    if positional or not {"batch_size", "q_length", "kv_length"} <= arguments.keys():
        return make(*positional, **arguments)
    # A static cache's offset is a tensor, and may have grown before a mask is built from it.
    fixed = {
        key: int(value) if key in ("q_offset", "kv_offset") else value
        for key, value in arguments.items()
    }
    # Models branch on whether there is a mask, so there is none exactly where they would have none.
    if attention in ("sdpa", "eager") and not arguments.get("use_vmap"):
        try:
            if make(**{**fixed, "mask_function": _stop}) is None:
                return None
        except _Asked:
            pass
    return MaskRecipe(make, attention, fixed)


class _Asked(Exception):
    """A mask would be built."""


def _stop(*positions: Any) -> Any:
    raise _Asked


def _known(function: Any) -> tuple[bool, int | None] | None:
    """What `pattern` says of a mask function that transformers itself made."""
    if function is causal_mask_function:
        return True, None
    if function is bidirectional_mask_function:
        return False, None
    parts = _closed_over(function).get("mask_functions", ())
    overlay = "sliding_window_overlay.<locals>.inner_mask"
    if [getattr(part, "__qualname__", "") for part in parts] == [overlay, "causal_mask_function"]:
        return True, _closed_over(parts[0])["sliding_window"]
    return None


def _closed_over(function: Any) -> dict[str, Any]:
    if getattr(function, "__module__", "") != causal_mask_function.__module__:
        return {}
    cells = getattr(function, "__closure__", None) or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


@dataclass(frozen=True)
class Seen:
    """Which of a call's keys its rows see.

    Attributes:
        causal: whether rows see no later key.
        window: sliding window [tokens] or None.
        q_offset: absolute position of the first row.
        kv_offset: absolute position of the first key.
        kv_len: one past the last key that any row sees.
        spans: first valid key of each request, and one past its last.
    """

    causal: bool
    window: int | None
    q_offset: int
    kv_offset: int
    kv_len: int
    spans: tuple[tuple[int, int], ...]

    def requests(self, rows: int) -> Iterator[tuple[slice, slice, slice, int, int]]:
        """Cuts a batch into calls whose requests have equal length.

        Positions of a padded request count from its first valid token, as if it ran alone.

        Args:
            rows: query rows of the batch.

        Yields:
            Which requests, which of their rows and keys, the position of the first of these keys, and how
            many padding tokens stand before the request.
        """
        if all(first == 0 and last >= self.kv_len for first, last in self.spans):
            keys = slice(0, self.kv_len - self.kv_offset)
            yield slice(0, len(self.spans)), slice(0, rows), keys, self.kv_offset, 0
            return
        for b, (first, last) in enumerate(self.spans):
            last = min(last, self.kv_len)
            valid = slice(max(first - self.q_offset, 0), max(last - self.q_offset, 0))
            if not self.causal:
                valid = slice(valid.start, min(valid.stop, rows))
            if valid.start >= valid.stop:
                continue
            start = max(first, self.kv_offset)
            keys = slice(start - self.kv_offset, last - self.kv_offset)
            yield slice(b, b + 1), valid, keys, start - first, first


def read(
    attention: str,
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    mask: Any,
    keywords: dict[str, Any],
) -> Seen | str:
    """Which keys the rows of an attention call see, as the attention of that name would have it.

    Args:
        attention: `eager`, `sdpa`, `flex_attention`, or one of flash attention's names.
        module: who attends.
        q: queries [B, Hq, Sq, D].
        k: keys [B, Hkv, Skv, D].
        mask: what the module was given as its mask.
        keywords: further arguments of the call.

    Returns:
        What they see, or why that cannot be told.
    """
    flash = is_flash(attention)
    if not flash and attention not in ("eager", "sdpa", "flex_attention"):
        return f"attention implementation {attention!r}"
    batch, rows, keys = q.shape[0], q.shape[2], k.shape[2]
    window, causal = keywords.get("sliding_window"), keywords.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if window is not None and not isinstance(window, int):
        return "a sliding window that is not one number"
    if mask is None:
        whole = ((0, keys),) * batch
        if attention == "flex_attention" or rows > keys:
            return "no mask where one was expected"
        if rows == 1 or (flash and causal):
            return Seen(True, window if flash else None, keys - rows, 0, keys, whole)
        if attention == "sdpa" and causal:  # rows stand at the first keys
            return Seen(True, None, 0, 0, rows, ((0, rows),) * batch)
        if flash and window is not None:
            return "a sliding window that sees later tokens"
        return Seen(False, None, keys - rows, 0, keys, whole)
    if not isinstance(mask, MaskRecipe):
        return "a mask that was built outside transformers' mask interface"
    key = (flash, batch, rows, keys, window, causal)
    if key not in mask.answers:  # all layers ask the same
        mask.answers[key] = _read(mask, *key)
    return mask.answers[key]


def _read(
    mask: MaskRecipe,
    flash: bool,
    batch: int,
    rows: int,
    keys: int,
    window: int | None,
    causal: bool,
) -> Seen | str:
    if (mask.batch, mask.q_len, mask.keys) != (batch, rows, keys):
        return "keys or rows that its mask does not speak of"
    pattern = mask.pattern(window)
    if pattern is None:
        return "an attention pattern other than full, causal or sliding window"
    # Flash attention is given padding alone, and takes the pattern from the layer.
    if flash and (pattern[1] != window or (rows > 1 and pattern[0] != bool(causal))):
        return "a mask and a layer that disagree on the attention pattern"
    (causal, window), end = pattern, mask.kv_offset + mask.keys
    if causal or (rows == 1 and mask.q_offset + 1 == end):
        causal, end = True, min(end, mask.q_offset + rows)
        if end < mask.q_offset + rows:
            return "rows behind the last of their keys"
    if mask.spans is None:
        return "padding between valid tokens"
    return Seen(causal, window, mask.q_offset, mask.kv_offset, end, tuple(mask.spans))
