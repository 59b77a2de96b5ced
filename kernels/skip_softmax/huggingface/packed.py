"""One attention call of a layer in a step of continuous batching, made of the rows of many requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from skip_softmax.huggingface.calls import (
    UNDERSTOOD,
    DecodeCall,
    DecodeHandler,
    Handler,
    LayerCall,
    Steps,
    arguments,
)
from skip_softmax.huggingface.continuous import Request, Step, step_of
from skip_softmax.huggingface.masks import MaskRecipe, is_flash
from skip_softmax.huggingface.route import Given

_OF_A_STEP = frozenset(
    {
        "block_table",
        "cache",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "logits_indices",
        "logits_processor_args",
        "max_length_k",
        "max_length_q",
        "read_index",
        "write_index",
    }
)


@dataclass(frozen=True)
class Together:
    """Decode steps of one token that are computed in one call, because their keys are in pages.

    Attributes:
        names: their requests.
        rows: places of their tokens in the packed row, int64 [B].
        kv_lens: KV lengths, int32 [B].
        table: page numbers, int32 [B, pages per request].
    """

    names: frozenset[str]
    rows: torch.Tensor
    kv_lens: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """A layer's attention call of which all is known that decides its output.

    Attributes:
        layer: its index.
        q: queries of all requests one after another [1, Hq, rows, D].
        scale: factor of the scores.
        window: sliding window [tokens] or None.
        requests: rows of a request and its number of keys in what `stored` returns.
        stored: stores this step's keys and values, and returns those that rows outside `together` see, of
            all requests one after another [1, Hkv, keys, D]. It may be called once.
        together: decode steps whose keys are read where they lie, or None.
        pages: keys and values of the layer [pages, Hkv, page_size, D].
        decode_from: see `Steps`.
    """

    layer: int
    q: torch.Tensor
    scale: float
    window: int | None
    requests: tuple[tuple[Request, int], ...]
    stored: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    together: Together | None
    pages: tuple[torch.Tensor, torch.Tensor]
    decode_from: int | None

    def run(self, handler: Handler, decode: DecodeHandler | None) -> torch.Tensor:
        """The output [1, Hq, rows, Dv], computed by `decode` for `together` and else for each request alone.

        Rows that belong to no request are zero.
        """
        k, v = self.stored()
        out = self.q.new_zeros(*self.q.shape[:3], v.shape[-1])
        row = key = 0
        for request, count in self.requests:
            rows, keys = slice(row, row + request.rows), slice(key, key + count)
            row, key = rows.stop, keys.stop
            if self.together is not None and request.name in self.together.names:
                continue
            call = LayerCall(
                self.layer, "prefill", self.q[:, :, rows], k[:, :, keys], v[:, :, keys], self.scale, True,
                self.window, request.position + request.rows - count,
            )  # fmt: skip
            steps = Steps(self.decode_from, request.prompt)
            out[:, :, rows] = call.in_phases(handler, steps)
        if self.together is not None:
            assert decode is not None
            some = self.together
            q = self.q[0][:, some.rows].transpose(0, 1)
            steps_of_all = DecodeCall(
                self.layer, q, *self.pages, self.scale, some.kv_lens, some.table
            )
            out[0][:, some.rows] = decode(steps_of_all).transpose(0, 1)
        return out


def is_packed(given: Given) -> bool:
    """Whether an attention call is one of continuous batching."""
    return given.keywords.get("cache") is not None


def packed(given: Given, layer: int, decode_from: int | None, *, in_pages: bool) -> Packed | str:
    """What a layer asks of its attention function, or why it must keep the model's own.

    Args:
        given: what the layer gave, in a step of continuous batching.
        layer: its index.
        decode_from: see `Steps`.
        in_pages: whether decode steps may be computed in one call, on pages.
    """
    cache = given.keywords["cache"]
    step = step_of(cache)
    if step is None:
        return "continuous batching of a kind that is not known here (that of transformers 5.21 to 5.23 is)"
    plain = arguments(given, UNDERSTOOD | _OF_A_STEP)
    if isinstance(plain, str):
        return plain
    q, k, _, scale = plain
    if q.shape[0] != 1 or q.shape[2] < sum(request.rows for request in step.requests):
        return "rows that its step does not speak of"
    if not q.dtype == cache.dtype == k.dtype:
        return f"a cache of another dtype ({cache.dtype}) than its queries ({q.dtype})"
    at: Any = getattr(given.module, "layer_idx", None)  # as the cache is asked
    allocator = cache.layer_to_allocator.get(at)
    if allocator is None:
        return "a layer that the paged cache does not know"
    kind = allocator.layer_type
    if kind not in ("full_attention", "sliding_attention"):
        return f"a paged cache for {kind}"
    window = allocator.sliding_window if kind == "sliding_attention" else None
    if not _as_batched(given, step.masks.get(kind), window):
        return "a mask that was built outside continuous batching, or another one than the layer's"
    together, pages = None, (given.k, given.v)
    if in_pages and allocator.supports_block_table:
        together = _together(step, allocator, q.device, decode_from)
        k_pages, v_pages = allocator.get_cache_for_block_table(at)
        pages = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    everywhere = together is not None and len(together.names) == len(step.requests)
    if given.keywords.get("block_table") is not None:
        stored = partial(_stored_in_place, given, step, allocator, at, everywhere)
    else:
        stored = partial(_stored, given, cache, at, everywhere)
    lengths = tuple(
        (request, allocator.get_seqlen_k(request.position, request.rows))
        for request in step.requests
    )
    return Packed(layer, q, scale, window, lengths, stored, together, pages, decode_from)


def _stored(
    given: Given, cache: Any, at: int, everywhere: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    keywords = dict(given.keywords)  # which the cache changes
    if everywhere:
        # Without indices to read, the cache stores keys and copies none.
        keywords["read_index"] = [index[:0] for index in keywords["read_index"]]
    k, v = cache.update(key_states=given.k, value_states=given.v, layer_idx=at, kwargs=keywords)
    return k, v


def _stored_in_place(
    given: Given, step: Step, allocator: Any, at: int, everywhere: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_stored` in a step of single tokens for which flash attention's kernel would store the keys."""
    k_pages, v_pages = allocator.get_cache_for_block_table(at)
    count = len(step.requests)
    numbers, slots = _places(step, allocator, given.q.device, last=True)
    k_pages[numbers, slots] = given.k[0, :, :count].transpose(0, 1)
    v_pages[numbers, slots] = given.v[0, :, :count].transpose(0, 1)
    if everywhere:
        return given.k, given.v
    numbers, slots = _places(step, allocator, given.q.device, last=False)
    k, v = (pages[numbers, slots].transpose(0, 1)[None] for pages in (k_pages, v_pages))
    return k, v


def _places(
    step: Step, allocator: Any, device: torch.device, last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page numbers, and places in these pages, of all keys of a step's requests or of their last ones."""
    key = ("places", allocator.layer_type, device, last)
    if key not in step.found:
        numbers, slots = [], []
        for request in step.requests:
            stop, page = request.position + request.rows, allocator.tokens_per_page
            entries = _entries(allocator, request).long()
            places = torch.arange(stop - 1 if last else 0, stop)
            numbers.append(entries[places // page])
            slots.append(places % page)
        step.found[key] = torch.cat(numbers).to(device), torch.cat(slots).to(device)
    found: tuple[torch.Tensor, torch.Tensor] = step.found[key]
    return found


def _entries(allocator: Any, request: Request) -> torch.Tensor:
    """Page numbers of a request, int32 [pages]."""
    entries = torch.empty(len(allocator.block_table[request.name]), dtype=torch.int32)
    allocator.fill_block_table(request.name, request.position, request.rows, entries)
    return entries


def _together(
    step: Step, allocator: Any, device: torch.device, decode_from: int | None
) -> Together | None:
    key = ("together", allocator.layer_type, device)
    found: Together | None = step.found.get(key)
    if key in step.found:
        return found
    rows, some, row = [], [], 0
    for request in step.requests:
        steps = Steps(decode_from, request.prompt)
        if request.rows == 1 and not steps.split(request.position, 1):
            rows.append(row)
            some.append(request)
        row += request.rows
    if some:
        tables = [_entries(allocator, request) for request in some]
        table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=-1)
        lengths = torch.tensor([request.position + 1 for request in some], dtype=torch.int32)
        found = Together(
            frozenset(request.name for request in some),
            torch.tensor(rows).to(device),
            lengths.to(device),
            table.to(device),
        )
    step.found[key] = found
    return found


def _as_batched(given: Given, batched: Any, window: int | None) -> bool:
    """Whether rows see all keys of their request up to themselves, within the window."""
    said, mask = given.keywords.get("sliding_window"), given.mask
    if not is_flash(given.attention):
        return batched is not None and mask is batched and said in (None, window)
    # Flash attention is given no mask, and takes the pattern from the layer.
    mask = mask.own() if isinstance(mask, MaskRecipe) else mask
    return mask is None and bool(given.keywords.get("is_causal")) and said == window
