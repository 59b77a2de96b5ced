"""What a mask would have said, without building it: who sees which keys, asked row by row.

A mask of transformers is batch x queries x keys. Its recipe is a function of positions and a padding mask
per request; from a few rows of it we learn whether it is plain causal, windowed or full attention.
"""

from __future__ import annotations

from typing import Any

import torch


class MaskRecipe(torch.Tensor):
    """What transformers would build a mask from; built only for layers that keep their own attention.

    It is an empty 4-D tensor, because `generate` prepares masks ahead for static caches, and hands
    them to the model as masks that are already built.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, arguments: dict[str, Any], plain_causal: bool) -> MaskRecipe:  # noqa: D102
        empty = torch.empty(int(arguments["batch_size"]), 1, int(arguments["q_length"]), 0)
        return empty.as_subclass(cls)

    def __init__(self, arguments: dict[str, Any], plain_causal: bool) -> None:
        self.arguments = arguments
        self.q_len = int(arguments["q_length"])
        self.q_offset = int(arguments.get("q_offset", 0))
        self.kv_offset = int(arguments.get("kv_offset", 0))
        self.kv_len = self.q_offset + self.q_len  # a static cache holds more keys than are written
        # Known by name, so nothing need be asked: asking a mask on a GPU makes it wait.
        self._patterns: dict[int | None, bool | None] = {None: True} if plain_causal else {}
        self._spans: list[tuple[int, int]] | None = None
        self._spans_known = False

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
        rows = torch.tensor(
            sorted({0, self.q_len // 3, self.q_len // 2, self.q_len - 1}), device=device
        )
        rows = (rows + self.q_offset)[None, None, :, None]
        keys = torch.arange(self.kv_offset, self.kv_len, device=device)[None, None, None, :]
        batch = torch.arange(int(self.arguments["batch_size"]), device=device)[:, None, None, None]
        try:
            seen = self.arguments["mask_function"](batch, torch.zeros_like(batch), rows, keys)
        except (RuntimeError, TypeError, IndexError):
            return None  # a custom mask that cannot be asked row by row
        seen = torch.as_tensor(seen, device=device)
        in_window = (
            torch.ones_like(keys, dtype=torch.bool) if window is None else keys > rows - window
        )
        for causal in (True, False):
            expected = in_window & (
                (keys <= rows) if causal else torch.ones_like(keys, dtype=torch.bool)
            )
            shape = torch.broadcast_shapes(expected.shape, seen.shape)  # type: ignore[no-untyped-call]
            if torch.equal(expected.expand(shape), seen.expand(shape)):
                return causal
        return None
