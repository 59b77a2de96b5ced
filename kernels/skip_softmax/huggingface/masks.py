"""What a mask would have said, without building it: who sees which keys, asked row by row.

A mask of transformers is batch x queries x keys. Its recipe is a function of positions and a padding mask
per request. Plain causal, windowed and full attention are known by their functions; any other is asked for
every row, a part of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
)

_ASKED_AT_ONCE = 1 << 24  # pairs of row and key


class MaskRecipe(torch.Tensor):
    """What transformers would build a mask from; built only for layers that keep their own attention.

    It is an empty 4-D tensor, because `generate` prepares masks ahead for static caches, and hands
    them to the model as masks that are already built.
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
        # A static cache's offset is a tensor that grows with the cache, before the mask may be built.
        self.arguments = {**arguments, "q_offset": self.q_offset, "kv_offset": self.kv_offset}
        self.kv_len = self.q_offset + self.q_len  # a static cache holds more keys than are written
        # Of what is known nothing need be asked: asking a mask on a GPU makes it wait.
        self._patterns: dict[int | None, bool | None] = {**known}
        self._spans: list[tuple[int, int]] | None = None
        self._spans_known = False

    def _itself(self, *arguments: Any, **keywords: Any) -> MaskRecipe:
        return self

    # Hooks that move or copy a model's inputs would leave an empty tensor without its recipe.
    to = clone = detach = contiguous = _itself

    def causal(self, window: int | None) -> bool | None:
        """Whether the mask is causal (True) or full (False) with this window; None: it is neither."""
        if window not in self._patterns:
            self._patterns[window] = self._recognise(window)
        return self._patterns[window]

    def spans(self) -> list[tuple[int, int]] | None:
        """First and one-past-last valid key of each request; None: padding inside a request."""
        if not self._spans_known:  # once per forward: looking at a mask makes a GPU wait
            self._spans, self._spans_known = self._find_spans(), True
        return self._spans

    def _find_spans(self) -> list[tuple[int, int]] | None:
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

    def _recognise(self, window: int | None) -> bool | None:
        if self.arguments.get("use_vmap"):
            return None
        device = self.arguments.get("device", "cpu")
        size = int(self.arguments["batch_size"])
        keys = torch.arange(self.kv_offset, self.kv_len, device=device)[None, None, None, :]
        batch = torch.arange(size, device=device)[:, None, None, None]
        same = torch.ones(2, dtype=torch.bool, device=device)  # as full, as causal attention
        step = max(1, _ASKED_AT_ONCE // max(1, size * keys.shape[-1]))
        for start in range(0, self.q_len, step):
            rows = torch.arange(start, min(start + step, self.q_len), device=device)
            rows = (rows + self.q_offset)[None, None, :, None]
            try:
                seen = self.arguments["mask_function"](batch, torch.zeros_like(batch), rows, keys)
            except (RuntimeError, TypeError, IndexError):
                return None  # a custom mask that cannot be asked row by row
            seen = torch.as_tensor(seen, device=device)
            full = keys > rows - window if window is not None else keys >= 0
            same &= torch.stack([(seen == full).all(), (seen == (full & (keys <= rows))).all()])
        as_full, as_causal = same.tolist()
        return True if as_causal else False if as_full else None


def _mask_recipe(**kwargs: Any) -> MaskRecipe:
    return MaskRecipe(kwargs, {} if kwargs.get("use_vmap") else _known(kwargs["mask_function"]))


def _known(function: Any) -> dict[int | None, bool]:
    """Window of a mask function and whether it is causal, of those that transformers makes itself."""
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


def _requests(
    q: torch.Tensor, k: torch.Tensor, mask: MaskRecipe
) -> Iterator[tuple[slice, slice, slice, int, int]]:
    """Cuts a batch into calls of equal length: batch slice, rows, keys, kv_start, first row's position.

    Positions of a padded request count from its first valid token, as they would without the batch.
    """
    spans = mask.spans()
    assert spans is not None
    if all(span == (0, mask.kv_len) for span in spans):
        keys = slice(0, mask.kv_len - mask.kv_offset)
        yield slice(0, q.shape[0]), slice(0, q.shape[2]), keys, mask.kv_offset, mask.q_offset
        return
    for b, (first, last) in enumerate(spans):
        rows = slice(max(first - mask.q_offset, 0), max(last - mask.q_offset, 0))
        if rows.start >= rows.stop:
            continue
        start = max(first, mask.kv_offset)
        keys = slice(start - mask.kv_offset, last - mask.kv_offset)
        position = max(mask.q_offset - first, 0)
        yield slice(b, b + 1), rows, keys, start - first, position
