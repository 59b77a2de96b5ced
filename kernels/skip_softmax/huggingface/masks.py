"""Which keys each row sees, learned from a mask's recipe instead of the mask itself.

A mask of transformers is batch x queries x keys. Its recipe is a function of positions, and one padding mask
per request. Plain causal, windowed and full attention are recognised by that function; any other function is
evaluated for every row, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

_ASKED_AT_ONCE = 1 << 24  # pairs of row and key that are evaluated together


class MaskRecipe(torch.Tensor):
    """What transformers would build a mask from; the mask is built only for layers that we leave alone.

    It is an empty 4-D tensor, because `generate` prepares the masks of static caches in advance and
    hands them to the model as masks that are already built.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, arguments: dict[str, Any], known: dict[int | None, bool]) -> MaskRecipe:  # noqa: D102
        empty = torch.empty(int(arguments["batch_size"]), 1, int(arguments["q_length"]), 0)
        return empty.as_subclass(cls)

    def __init__(self, arguments: dict[str, Any], known: dict[int | None, bool]) -> None:
        self.q_len = int(arguments["q_length"])
        self.q_offset = int(arguments.get("q_offset", 0))
        self.kv_offset = int(arguments.get("kv_offset", 0))
        # A static cache's offset is a tensor, and may have grown before a mask is built from it.
        self.arguments = {**arguments, "q_offset": self.q_offset, "kv_offset": self.kv_offset}
        self.kv_len = self.q_offset + self.q_len  # a static cache holds more keys than are written
        # A known pattern need not be evaluated, which would make a GPU wait.
        self._patterns: dict[int | None, bool | None] = {**known}

    def _itself(self, *arguments: Any, **keywords: Any) -> MaskRecipe:
        return self

    # Hooks that move or copy a model's inputs would produce an empty tensor without a recipe.
    to = clone = detach = contiguous = _itself

    def causal(self, window: int | None) -> bool | None:
        """Whether the mask, with this window, is causal (True) or full (False); None: neither."""
        if window not in self._patterns:
            self._patterns[window] = self._recognise(window)
        return self._patterns[window]

    @cached_property  # once per forward pass: reading a padding mask makes a GPU wait
    def spans(self) -> list[tuple[int, int]] | None:
        """First valid key of each request, and one past its last; None: padding between valid keys."""
        padding = self.arguments.get("attention_mask")
        size = int(self.arguments["batch_size"])
        if padding is None:
            return [(0, self.kv_len)] * size
        padding = padding[:, : self.kv_len].bool()
        if padding.shape[1] < self.kv_len:
            return None
        if bool(padding.all()):
            return [(0, self.kv_len)] * size
        spans = []
        for row in padding:
            valid = row.nonzero()[:, 0]
            first, count = (int(valid[0]), len(valid)) if len(valid) else (0, 0)
            if count and int(valid[-1]) != first + count - 1:
                return None
            spans.append((first, first + count))
        return spans

    def requests(self, q: torch.Tensor) -> Iterator[tuple[slice, slice, slice, int]]:
        """Cuts a batch into calls whose requests have equal length.

        Positions of a padded request count from its first valid token, as if it ran alone.

        Args:
            q: the batch's queries [B, Hq, Sq, D].

        Yields:
            Which requests, which of their rows and keys, and the position of the first of these keys.
        """
        assert self.spans is not None
        if all(span == (0, self.kv_len) for span in self.spans):
            keys = slice(0, self.kv_len - self.kv_offset)
            yield slice(0, q.shape[0]), slice(0, q.shape[2]), keys, self.kv_offset
            return
        for b, (first, last) in enumerate(self.spans):
            rows = slice(max(first - self.q_offset, 0), max(last - self.q_offset, 0))
            if rows.start >= rows.stop:
                continue
            start = max(first, self.kv_offset)
            keys = slice(start - self.kv_offset, last - self.kv_offset)
            yield slice(b, b + 1), rows, keys, start - first

    def _recognise(self, window: int | None) -> bool | None:
        if self.arguments.get("use_vmap"):
            return None
        device = self.arguments.get("device", "cpu")
        size = int(self.arguments["batch_size"])
        keys = torch.arange(self.kv_offset, self.kv_len, device=device)[None, None, None, :]
        batch = torch.arange(size, device=device)[:, None, None, None]
        same = torch.ones(2, dtype=torch.bool, device=device)  # as full, and as causal attention
        step = max(1, _ASKED_AT_ONCE // max(1, size * keys.shape[-1]))
        for start in range(0, self.q_len, step):
            rows = torch.arange(start, min(start + step, self.q_len), device=device)
            rows = (rows + self.q_offset)[None, None, :, None]
            try:
                seen = self.arguments["mask_function"](batch, torch.zeros_like(batch), rows, keys)
            except (RuntimeError, TypeError, IndexError):
                return None  # a custom function that cannot be evaluated on tensors of positions
            seen = torch.as_tensor(seen, device=device)
            full = keys > rows - window if window is not None else keys >= 0
            same &= torch.stack([(seen == full).all(), (seen == (full & (keys <= rows))).all()])
        as_full, as_causal = same.tolist()
        return True if as_causal else False if as_full else None


def mask_recipe(**kwargs: Any) -> MaskRecipe:
    """What transformers calls in place of its own functions that build a mask."""
    return MaskRecipe(kwargs, {} if kwargs.get("use_vmap") else _known(kwargs["mask_function"]))


def _known(function: Any) -> dict[int | None, bool]:
    """Window, and whether it is causal, of a mask function that transformers itself made."""
    if function is causal_mask_function:
        return {None: True}
    if function is bidirectional_mask_function:
        return {None: False}
    parts = _closed_over(function).get("mask_functions", ())
    overlay = "sliding_window_overlay.<locals>.inner_mask"
    if [getattr(part, "__qualname__", "") for part in parts] == [overlay, "causal_mask_function"]:
        return {_closed_over(parts[0])["sliding_window"]: True}
    return {}


def _closed_over(function: Any) -> dict[str, Any]:
    if getattr(function, "__module__", "") != causal_mask_function.__module__:
        return {}
    cells = getattr(function, "__closure__", None) or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }
