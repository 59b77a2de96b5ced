"""One attention call of a layer as data, made of what the layer gave to its attention function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from skip_softmax.huggingface.masks import Seen, read
from skip_softmax.huggingface.route import Given
from skip_softmax.meaning.call import FP8
from skip_softmax.thresholds.types import Phase

# Arguments that change the scores or the softmax itself; `attention` cannot compute such a call.
_NAMED = {
    "softcap": "attention soft-cap",
    "s_aux": "attention sink logits",
    "position_bias": "position bias",
    "block_indices": "a selection of key blocks",
    "cu_seq_lens_q": "packed requests",
    "cache": "a paged cache",
}
UNDERSTOOD = frozenset(
    {
        # What `arguments` and `read` know.
        "scaling",
        "dropout",
        "is_causal",
        "sliding_window",
        "output_attentions",
        # What models hand down with every call, and no attention function of transformers reads. Positions
        # are in queries and keys already, and packed ones are in the mask.
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True)
class LayerCall:
    """One attention call of one layer, all requests of equal length.

    Attributes:
        layer: layer index.
        phase: `prefill` or `decode`; a decode call holds one or more tokens, each voting alone.
        q: [B, Hq, Sq, D]; the last query stands at position kv_len - 1.
        k: [B, Hkv, kv_len - kv_start, D], of q's dtype or FP8, with a scale of 1.
        v: like k.
        scale: factor of the scores.
        causal: whether rows see no later key.
        window: sliding window [tokens] or None.
        kv_start: absolute position of the first key.
    """

    layer: int
    phase: Phase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    causal: bool
    window: int | None
    kv_start: int

    @property
    def kv_len(self) -> int:
        """KV length of the call [tokens]."""
        return self.kv_start + self.k.shape[2]

    @property
    def position(self) -> int:
        """Absolute position of the first query."""
        return self.kv_len - self.q.shape[2]

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of `attention`, or of `decode_attention` for a decode call."""
        keywords: dict[str, Any] = {
            "scale": self.scale, "window": self.window, "kv_start": self.kv_start,
        }  # fmt: skip
        if self.k.dtype == FP8:
            keywords |= {"k_scale": 1.0, "v_scale": 1.0}
        return keywords if self.phase == "decode" else {**keywords, "causal": self.causal}

    def part(self, batch: slice, rows: slice, keys: slice, kv_start: int) -> LayerCall:
        """The same call for a part of the batch; `kv_start` is the position of the first of its keys."""
        return replace(
            self,
            q=self.q[batch, :, rows],
            k=self.k[batch, :, keys],
            v=self.v[batch, :, keys],
            kv_start=kv_start,
        )

    def rows(self, start: int, stop: int) -> LayerCall:
        """The same causal call for some rows, with the keys that the last of them sees."""
        keys = slice(0, self.position + stop - self.kv_start)
        return self.part(slice(None), slice(start, stop), keys, self.kv_start)

    def in_phases(self, handler: Handler, steps: Steps, padding: int = 0) -> torch.Tensor:
        """The output of `handler`, which is given the rows of either phase, as `steps` tells them apart.

        Args:
            handler: computes the output of one phase.
            steps: which tokens are decode steps.
            padding: tokens before the requests.
        """
        rows = self.q.shape[2]
        split = steps.split(self.position, rows, padding)
        if split in (0, rows):
            return handler(replace(self, phase="prefill" if split else "decode"))
        prefill = replace(self.rows(0, split), phase="prefill")
        decode = replace(self.rows(split, rows), phase="decode")
        return joined([handler(prefill), handler(decode)])

    def chunks(self, size: int | None) -> Iterator[LayerCall]:
        """The call in parts that end at multiples of `size` positions, each with the keys up to its end.

        Causal rows see no later key, so these are the calls of a prompt that arrives in chunks, with a cache
        between them. Others are left whole: nothing can serve them in chunks. So is decode, whose tokens are
        calls of their own.
        """
        if size is None or not self.causal or self.phase == "decode":
            yield self
            return
        start, rows = 0, self.q.shape[2]
        while start < rows:
            stop = min(size - (self.position + start) % size + start, rows)
            yield self.rows(start, stop)
            start = stop


Handler = Callable[[LayerCall], torch.Tensor]


@dataclass(frozen=True)
class DecodeCall:
    """A layer's decode step of several requests, one token each, whose keys are in pages.

    Attributes:
        layer: layer index.
        q: [B, Hq, D].
        k: pages [pages, Hkv, page_size, D].
        v: like k.
        scale: factor of the scores.
        kv_lens: KV length of each request, its new token included, int32 [B].
        table: page numbers, int32 [B, pages per request].
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    kv_lens: torch.Tensor
    table: torch.Tensor

    @property
    def phase(self) -> Phase:
        """Decode, as in a `LayerCall`."""
        return "decode"


DecodeHandler = Callable[[DecodeCall], torch.Tensor]


def joined(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Outputs of consecutive rows as one; a single output is not copied."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


@dataclass(frozen=True)
class Steps:
    """Which tokens are decode steps.

    Attributes:
        decode_from: a request's own position from which on they are; None: see `prompt`.
        prompt: length of the prompts that `generate` was given, padding included; whatever stands behind
            them was generated. None: a single token behind a non-empty cache is a decode step.
    """

    decode_from: int | None = None
    prompt: int | None = None

    def split(self, position: int, rows: int, padding: int = 0) -> int:
        """How many of a call's rows are prefill; the rest are decode steps.

        Args:
            position: where the first row stands in its request.
            rows: how many there are.
            padding: tokens before the request.
        """
        first = self.decode_from
        if first is None and self.prompt is not None:
            first = self.prompt - padding
        if first is None:
            return 0 if rows == 1 and position > 0 else rows
        return min(max(first - position, 0), rows)


@dataclass(frozen=True)
class Understood:
    """An attention call of which all is known that decides its output; see `LayerCall`."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    seen: Seen

    def run(self, handler: Handler, steps: Steps) -> torch.Tensor:
        """The output [B, Hq, Sq, Dv], computed by `handler` phase by phase.

        Rows of padding, which nobody reads, are zero.
        """
        batch, _, rows, _ = self.q.shape
        out: torch.Tensor | None = None
        for requests, some, keys, kv_start, padding in self.seen.requests(rows):
            whole = some == slice(0, rows) and requests == slice(0, batch)
            q = self.q if whole else self.q[requests, :, some]
            k, v = self.k, self.v
            if not whole or keys != slice(0, k.shape[2]):
                k, v = k[requests, :, keys], v[requests, :, keys]
            call = LayerCall(
                self.layer,
                "prefill",
                q,
                k,
                v,
                self.scale,
                self.seen.causal,
                self.seen.window,
                kv_start,
            )
            computed = call.in_phases(handler, steps, padding)
            if whole:
                return computed  # no copies
            if out is None:
                out = self._zeros()
            out[requests, :, some] = computed
        return self._zeros() if out is None else out

    def _zeros(self) -> torch.Tensor:
        return self.q.new_zeros(*self.q.shape[:3], self.v.shape[-1])


def understood(given: Given, layer: int, steps: Steps) -> Understood | str:
    """What a layer asks of its attention function, or why it must keep the model's own.

    Args:
        given: what the layer gave.
        layer: its index.
        steps: which tokens are decode steps.
    """
    plain = arguments(given, UNDERSTOOD)
    if isinstance(plain, str):
        return plain
    q, k, v, scale = plain
    seen = read(given.attention, given.module, q, k, given.mask, given.keywords)
    if isinstance(seen, str):
        return seen
    if not seen.causal and steps.split(seen.q_offset, q.shape[2]) < q.shape[2]:
        return "attention that sees later tokens"
    return Understood(layer, q, k, v, scale, seen)


def arguments(
    given: Given, known: frozenset[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float] | str:
    """Queries, keys, values and the scale of plain softmax attention, or why a call asks for another kind.

    Args:
        given: what the layer gave.
        known: arguments whose meaning the caller knows.
    """
    keywords = given.keywords
    for key, value in keywords.items():
        if value is not None and key not in known:
            return _NAMED.get(key, f"the argument `{key}`, whose meaning is not known here")
    if given.extra:
        return "arguments without a name"
    if keywords.get("dropout"):
        return "attention dropout (training)"
    weights = keywords.get("output_attentions")
    if weights or (weights is None and _asks_for_weights(given.module)):
        return "somebody asked for its attention weights"
    q, k, v = given.q, given.k, given.v
    (batch, q_heads, _, head_dim), (_, kv_heads, _, k_dim) = q.shape, k.shape
    if k.shape[:3] != v.shape[:3] or batch != k.shape[0]:
        return "queries, keys and values that differ in batch, heads or tokens"
    if not kv_heads or q_heads % kv_heads or head_dim != k_dim:
        return "query heads that are no multiple of its key heads, or of another size"
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
    if not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values of different dtypes ({q.dtype}, {k.dtype}, {v.dtype})"
    scale = keywords.get("scaling")
    if scale is None:
        scale = head_dim**-0.5
    elif not isinstance(scale, int | float):
        return "a scale that is not one number"
    return q, k, v, float(scale)


def _asks_for_weights(module: torch.nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """What `scaled_dot_product_attention` makes of an argument: autocast leaves only doubles alone."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
