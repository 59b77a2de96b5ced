"""One attention call as data, and the laws that it obeys. Errors state the law, the value and the cure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch

from skip_softmax.meaning.criterion import Criterion, has_threshold

RunningMax = Literal["ascending", "seeded"]
Lengths = torch.Tensor | Sequence[int] | None
FP8 = torch.float8_e4m3fn
"""What keys and values of a cache may be instead of the queries' dtype."""
Scale = float | torch.Tensor | None


class DenseCallWarning(UserWarning):
    """A call ran dense because its threshold would be 1 or more, which has no meaning."""


@dataclass(frozen=True)
class Call:
    """What is computed, without the tensors: enough to decide which kernel can run it, and to run it.

    Attributes:
        q_len: query rows of a request, of the longest where they differ [tokens].
        kv_len: its KV length, from position 0 on [tokens]; the last query row is at position kv_len - 1.
        q_heads: query heads, a multiple of `kv_heads`.
        kv_heads: KV heads.
        head_dim: columns of queries and keys.
        value_dim: columns of values.
        dtype: of the queries and the output.
        scale: factor of the scores.
        tile_q: query rows per vote; None: decode, where `tile_heads` heads vote once per query token.
        tile_kv: keys per tile.
        causal: whether a row sees no key after its own position.
        window: a row sees only its own position and the `window - 1` before it; None: no window.
        kv_start: absolute position of the first key in the key tensor (a sliding cache drops keys).
        running_max: decode only, what a tile is compared with (`DecodeGeometry`).
        tile_heads: decode only, consecutive query heads that vote together, all those of a KV head or a part
            of them, or those of several; None: those of a KV head.
        criterion: what a tile is judged by.
        dense_last: prefill only: a vote that holds one of the last `dense_last` query rows of its request
            skips nothing [tokens]; 0: every vote may skip. These rows give the next token; all others reach
            the output only through the keys and values of later layers.
        min_kv_len: a request whose KV length is below it skips nothing [tokens]; in decode, a token that
            sees fewer keys.
        ragged: whether each request has lengths of its own, which only the device may know.
        page: rows of a page of the cache; 0: keys and values are contiguous.
        kv_dtype: of keys and values, `FP8`; None: as `dtype`.
        aliased: whether values are the first columns of their keys, in the same memory (a latent cache).
        places: shape and strides of q, k and v; empty: dense tensors.
    """

    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    scale: float
    tile_q: int | None
    tile_kv: int
    causal: bool = True
    window: int | None = None
    kv_start: int = 0
    running_max: RunningMax = "ascending"
    tile_heads: int | None = None
    criterion: Criterion = "max"
    dense_last: int = 0
    min_kv_len: int = 0
    ragged: bool = False
    page: int = 0
    kv_dtype: torch.dtype | None = None
    aliased: bool = False
    places: tuple[tuple[Sequence[int], Sequence[int]], ...] = ()

    def __post_init__(self) -> None:
        for name, tile in (("tile_q", self.tile_q), ("tile_kv", self.tile_kv)):
            if tile is not None and (tile < 1 or tile & (tile - 1)):
                raise ValueError(f"`{name}` must be a power of two, but got {tile}")
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"`window` must be at least 1, but got {self.window}; pass None for no window"
            )
        if self.dense_last < 0 or (self.decode and self.dense_last):
            law = "0 in decode, which has no query tiles" if self.decode else "at least 0"
            raise ValueError(f"`dense_last` must be {law}, but got {self.dense_last}; pass 0")
        if self.min_kv_len < 0:
            raise ValueError(
                f"`min_kv_len` must be at least 0, but got {self.min_kv_len}; pass 0 for no lower limit"
            )
        if self.tile_heads is not None:
            self._check_tile_heads(self.tile_heads)
        if self.running_max not in get_args(RunningMax):
            raise ValueError(
                f"`running_max` must be ascending or seeded, but got {self.running_max!r}"
            )

    def _check_tile_heads(self, heads: int) -> None:
        if not self.decode:
            raise ValueError(
                f"`tile_heads` must be None in prefill, where each query head votes alone, but got {heads}"
            )
        fits = heads >= 1 and self.q_heads % heads == 0
        if not fits or (self.group % heads and heads % self.group):
            raise ValueError(
                f"`tile_heads` must divide the {self.q_heads} query heads, and divide the {self.group} of a "
                f"KV head or be a multiple of them, but got {heads}; pass None for those of a KV head"
            )

    @cached_property
    def _hashed(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        # Kept: a launch looks its call up, and the fields of one take longer than the look-up.
        return self._hashed

    @property
    def decode(self) -> bool:
        """Whether this is a decode call."""
        return self.tile_q is None

    @property
    def seeded(self) -> bool:
        """Whether tiles are compared with the first and the last visited tile."""
        return self.decode and self.running_max == "seeded"

    @property
    def lead(self) -> int:
        """Rows of the first query tile that lie before the call's first row, which has a position inside it.

        Query tiles begin at multiples of `tile_q` of the request's positions, so that a prompt that comes
        in chunks is cut as if it came whole, whatever the chunks are. Rows before the call neither vote nor
        are computed.
        """
        if self.tile_q is None or not self.q_len:
            return 0
        return max(self.kv_len - self.q_len, 0) % self.tile_q

    @property
    def most_lead(self) -> int:
        """The most that `lead` may be for any of its requests."""
        return self.lead if self.tile_q is None or not self.ragged else self.tile_q - 1

    @property
    def query_tiles(self) -> int:
        """Query tiles of a request, in decode its tokens."""
        return -(-(self.lead + self.q_len) // (self.tile_q or 1))

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    @property
    def heads_per_vote(self) -> int:
        """Query heads that vote together."""
        return (self.tile_heads or self.group) if self.decode else 1

    @property
    def vote_heads(self) -> int:
        """Heads that vote separately: query heads in prefill; in decode KV heads, or every `tile_heads`."""
        return self.q_heads // self.heads_per_vote


def call_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tile_q: int | None,
    tile_kv: int,
    scale: float | None,
    window: int | None,
    causal: bool = True,
    kv_start: int = 0,
    running_max: RunningMax = "ascending",
    tile_heads: int | None = None,
    dense_last: int = 0,
    min_kv_len: int = 0,
    ragged: bool = False,
    table: torch.Tensor | None = None,
    q_len: int | None = None,
    kv_len: int | None = None,
) -> Call:
    """The call of tensors [batch, heads, tokens, head_dim]; with a `table`, k and v are pages.

    The lengths are those of the tensors and of the table, unless packed requests give them.

    Raises:
        ValueError: the tensors do not fit together, or the geometry is invalid.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [batch, heads, tokens, head_dim], {_got(q, k, v)}")
    batch_agrees = table is not None or q.shape[0] == k.shape[0]
    if k.shape[:3] != v.shape[:3] or not batch_agrees or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k and v must agree in batch and head_dim, k and v also in heads and tokens, "
            + _got(q, k, v)
        )
    if not k.shape[1] or not q.shape[1] or not q.shape[3]:
        raise ValueError(f"heads and head_dim must be above 0, {_got(q, k, v)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of KV heads, but got {q.shape[1]} and {k.shape[1]}"
        )
    whole = q.is_floating_point() and q.dtype.itemsize > 1
    if not whole or k.dtype != v.dtype or k.dtype not in (q.dtype, FP8):
        raise ValueError(
            "q, k and v must share one floating dtype of 16 bits or more, or k and v be float8_e4m3fn, "
            f"but got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    page = 0 if table is None else k.shape[2]
    held = kv_start + k.shape[2] if table is None else page * table.shape[1]
    if kv_len is None or table is not None:
        kv_len = held if kv_len is None else min(kv_len, held)
    return Call(
        q.shape[2] if q_len is None else q_len, kv_len, q.shape[1], k.shape[1], q.shape[3], v.shape[3],
        q.dtype, 1.0 / math.sqrt(q.shape[3]) if scale is None else scale, tile_q, tile_kv, causal, window,
        kv_start, running_max, tile_heads, dense_last=dense_last, min_kv_len=min_kv_len, ragged=ragged,
        page=page, kv_dtype=None if k.dtype == q.dtype else k.dtype, aliased=same_memory(k, v),
        places=tuple((x.shape, x.stride()) for x in (q, k, v)),
    )  # fmt: skip


def same_memory(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether values are the first columns of their keys; False too while a call is only traced."""
    if torch.compiler.is_compiling() or type(k) is not torch.Tensor or type(v) is not torch.Tensor:
        return False
    alike = k.dtype == v.dtype and k.stride() == v.stride() and v.shape[-1] <= k.shape[-1]
    return alike and k.data_ptr() == v.data_ptr()


def moved(call: Call, *tensors: torch.Tensor) -> tuple[Call, tuple[torch.Tensor, ...]]:
    """The call of other q, k and v with the same numbers."""
    _, k, v = tensors
    places = tuple((x.shape, x.stride()) for x in tensors)
    return replace(call, aliased=same_memory(k, v), places=places), tensors


def with_columns_together(
    call: Call, *tensors: torch.Tensor
) -> tuple[Call, tuple[torch.Tensor, ...]]:
    """The call and its q, k and v, copied where columns are not side by side."""
    if all(x.stride(-1) == 1 for x in tensors):
        return call, tensors
    return moved(call, *(x if x.stride(-1) == 1 else x.contiguous() for x in tensors))


def _got(*tensors: torch.Tensor) -> str:
    return f"but got {', '.join(str(tuple(x.shape)) for x in tensors)}"


@dataclass(frozen=True)
class Requests:
    """Where the requests of a call are in its tensors.

    Attributes:
        q_lens: valid query rows of each [requests], right-padded; None: all.
        kv_lens: KV length of each [requests]; None: all.
        q_starts: where the queries of each packed request start, and the end [requests + 1]; or None.
        kv_starts: the same for keys; None where a `table` says where they are.
        table: page numbers [requests, pages], or None.
    """

    q_lens: Lengths = None
    kv_lens: Lengths = None
    q_starts: torch.Tensor | None = None
    kv_starts: torch.Tensor | None = None
    table: torch.Tensor | None = None

    def count(self, q: torch.Tensor) -> int:
        """How many requests there are."""
        return q.shape[0] if self.q_starts is None else self.q_starts.shape[0] - 1

    def as_kernels_read(self, call: Call, q: torch.Tensor) -> Requests:
        """The same, contiguous int32 on q's device; numbers on the host are checked."""
        requests = self.count(q)
        return Requests(
            _kernel_lengths("q_lens", self.q_lens, q.device, requests, call.q_len),
            _kernel_lengths("kv_lens", self.kv_lens, q.device, requests, call.kv_len),
            *(
                None if x is None else _as_kernels_read(x, q.device, torch.int32)
                for x in (self.q_starts, self.kv_starts, self.table)
            ),
        )

    def each(self, call: Call, q: torch.Tensor) -> Iterator[Alone]:
        """The requests one after another. Waits for the GPU."""
        requests = self.count(q)
        tables = [None] * requests if self.table is None else self.table
        if self.q_starts is None:
            entries, first_rows = [*range(requests)], [0] * requests
            q_lens = _on_the_host("q_lens", self.q_lens, requests, call.q_len)
        else:
            entries, starts = [0] * requests, self.q_starts.tolist()
            first_rows, q_lens = starts[:-1], [end - start for start, end in pairwise(starts)]
        if self.kv_starts is None:
            first_keys = [0] * requests
            kv_lens = _on_the_host("kv_lens", self.kv_lens, requests, call.kv_len)
        else:
            starts = self.kv_starts.tolist()
            first_keys, kv_lens = starts[:-1], [end - start for start, end in pairwise(starts)]
        for b, row, key, q_len, kv_len, table in zip(
            entries, first_rows, first_keys, q_lens, kv_lens, tables, strict=True
        ):
            alone = replace(call, q_len=q_len, kv_len=kv_len, ragged=False)
            yield Alone(alone, b, row, key, table)


@dataclass(frozen=True)
class Alone:
    """One request, and where it is in the tensors of its batch.

    Attributes:
        call: its own.
        entry: of the batch; 0 where requests are packed.
        row: its first query row there.
        key: its first key there.
        table: its page numbers [pages], or None.
    """

    call: Call
    entry: int
    row: int
    key: int
    table: torch.Tensor | None = None

    @property
    def rows(self) -> slice:
        """Its query rows."""
        return slice(self.row, self.row + self.call.q_len)

    def held(self, cache: torch.Tensor) -> torch.Tensor:
        """Its keys or values [Hkv, tokens, D], from `call.kv_start` on."""
        if self.table is None:
            end = self.key + max(self.call.kv_len - self.call.kv_start, 0)
            return cache[self.entry, :, self.key : end]
        return gathered(cache, self.table[: -(-self.call.kv_len // self.call.page)])


def check_packed(starts: torch.Tensor, total: int, longest: int, name: str) -> None:
    """Checks that `cu_seqlens` rise within 0 to `total`; on the host only, to avoid a synchronisation."""
    if starts.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = starts.diff()
    if starts[0] < 0 or starts[-1] > total or (lengths < 0).any() or (lengths > longest).any():
        raise ValueError(
            f"cu_seqlens_{name} must rise within 0 to {total} by at most max_seqlen_{name} {longest}, but "
            f"got {starts.tolist()}"
        )


def check_table(table: torch.Tensor, kv_lens: Lengths, requests: int, kv_start: int = 0) -> None:
    """Checks that a block table is [requests, pages], and that the cache has lengths and its first keys."""
    integers = table.dtype in (torch.int32, torch.int64)
    if table.dim() != 2 or table.shape[0] != requests or not integers:
        raise ValueError(
            f"block_table must be int32 or int64 [{requests}, pages], but got {table.dtype} "
            f"{tuple(table.shape)}"
        )
    if kv_lens is None or kv_start:
        raise ValueError("a paged cache needs `kv_lens`, and `kv_start=0`")


def check_out(out: torch.Tensor, q: torch.Tensor, columns: int) -> None:
    """Checks that `out` can take the output of queries q, `columns` wide."""
    shape = (*q.shape[:-1], columns)
    alike = out.shape == shape and out.dtype == q.dtype and out.device == q.device
    if not alike or (out.stride(-1) != 1 and columns > 1):
        raise ValueError(
            f"`out` must be {q.dtype} {tuple(shape)} on {q.device} with a last stride of 1, but got "
            f"{out.dtype} {tuple(out.shape)} on {out.device} with strides {out.stride()}"
        )


def check_counts(counts: torch.Tensor, call: Call, device: torch.device) -> None:
    """Checks that `counts` can take the tiles of each head that votes, visited and skipped."""
    shape = (call.vote_heads, 2)
    alike = counts.shape == shape and counts.dtype == torch.int64 and counts.device == device
    if not alike or not counts.is_contiguous():
        raise ValueError(
            f"`counts` must be contiguous int64 {shape} on {device}, zero before the first call, but got "
            f"{counts.dtype} {tuple(counts.shape)} on {counts.device}"
        )


def gathered(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[pages, Hkv, page, D] -> [Hkv, tokens, D] of one request; an invalid page number gives zeros."""
    named = (table >= 0) & (table < cache.shape[0])
    pages = cache[torch.where(named, table, 0).long()]
    # By bytes in FP8, which PyTorch does not fill; they are zero for zero.
    bits = pages.view(torch.uint8) if cache.dtype == FP8 else pages
    bits = bits.masked_fill(~named[:, None, None, None], 0)
    return bits.view(cache.dtype).transpose(0, 1).flatten(1, 2)


def check_pages(each: Iterable[Alone], pages: int) -> None:
    """Checks that entries which a request's keys need are pages of the cache; others may be anything."""
    for alone in each:
        assert alone.table is not None
        call, first = alone.call, 0
        if not call.q_len:
            continue
        if call.window is not None:
            first = max(call.kv_len - call.q_len + 1 - call.window, 0) // call.page
        needed = alone.table[first : -(-call.kv_len // call.page)].tolist()
        if any(not 0 <= number < pages for number in needed):
            raise ValueError(
                f"block_table must name pages from 0 to {pages - 1} for a request's {call.kv_len} keys, "
                f"but got {needed}"
            )


def _kernel_lengths(
    name: str, lengths: Lengths, device: torch.device, requests: int, most: int
) -> torch.Tensor | None:
    """int32 [requests]; lengths on the host are checked, the kernel clamps those on the device."""
    if lengths is None:
        return None
    if isinstance(lengths, torch.Tensor) and (
        lengths.device.type != "cpu" or torch.compiler.is_compiling()
    ):
        if lengths.shape != (requests,):
            raise ValueError(
                f"`{name}` must be {requests} numbers, but got shape {tuple(lengths.shape)}"
            )
        return _as_kernels_read(lengths, device, torch.int32)
    values = _on_the_host(name, lengths, requests, most)
    return torch.tensor(values, dtype=torch.int32, device=device)


def _as_kernels_read(x: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # Asked first: three calls that change nothing take the host several microseconds.
    if x.dtype == dtype and x.device == device and x.is_contiguous():
        return x
    return x.to(device, dtype).contiguous()


def _on_the_host(name: str, lengths: Lengths, batch: int, most: int) -> list[int]:
    if lengths is None:
        return [most] * batch
    if isinstance(lengths, int | float | str):
        raise TypeError(
            f"`{name}` must be a list or a tensor with a length per request, but got {lengths!r}; "
            f"pass [{lengths}]"
        )
    values = [int(n) for n in lengths]
    if len(values) != batch or any(not 0 <= n <= most for n in values):
        raise ValueError(f"`{name}` must be {batch} numbers from 0 to {most}, but got {values}")
    return values


class Scales(NamedTuple):
    """What the numbers of an FP8 cache are multiplied by; without one, nothing.

    Attributes:
        k: of all keys; None: `k_each`, or keys that are not FP8.
        k_each: one number, or one per KV head, fp32 on the device; or None.
        v: as `k`, of values.
        v_each: as `k_each`.
    """

    k: float | None = None
    k_each: torch.Tensor | None = None
    v: float | None = None
    v_each: torch.Tensor | None = None

    @property
    def k_per_head(self) -> bool:
        """Whether each KV head has a number of its own."""
        return self.k_each is not None and self.k_each.shape[0] > 1

    @property
    def v_per_head(self) -> bool:
        """As `k_per_head`, of values."""
        return self.v_each is not None and self.v_each.shape[0] > 1


_NO_SCALES = Scales()


def scales_of(k_scale: Scale, v_scale: Scale, call: Call, device: torch.device) -> Scales:
    """The scales of a call's keys and values; a tensor on the device is not read, to avoid waiting.

    Raises:
        ValueError: a scale is missing or superfluous, has another shape, or is not finite and above 0.
    """
    if k_scale is None and v_scale is None and call.kv_dtype is None:
        return _NO_SCALES
    return Scales(
        *_checked_scale("k_scale", k_scale, call, device),
        *_checked_scale("v_scale", v_scale, call, device),
    )


def _checked_scale(
    name: str, scale: Scale, call: Call, device: torch.device
) -> tuple[float | None, torch.Tensor | None]:
    if call.kv_dtype is None:
        if scale is None:
            return None, None
        raise ValueError(
            f"`{name}` must be None unless k and v are float8_e4m3fn, but got {scale} with {call.dtype}; "
            "leave it out"
        )
    heads = call.kv_heads
    law = f"`{name}` must be a number, or a tensor with one number or one per KV head [{heads}],"
    if scale is None:
        raise ValueError(
            f"{law} where k and v are float8_e4m3fn, but got None; pass what the cache was divided by, 1.0 "
            "if by nothing"
        )
    if isinstance(scale, int | float):
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"`{name}` must be finite and above 0, but got {scale}")
        return float(scale), None
    if not isinstance(scale, torch.Tensor):
        raise TypeError(f"{law} but got {scale!r}")
    if scale.shape not in ((), (1,), (heads,)) or not scale.is_floating_point():
        raise ValueError(f"{law} but got {scale.dtype} {tuple(scale.shape)}")
    readable = scale.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"`{name}` must be finite and above 0, but got {scale.tolist()}")
    return None, _as_kernels_read(scale.reshape(-1), device, torch.float32)


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Keys or values as an FP8 cache with a scale of 1 keeps them: what is too large becomes the largest."""
    largest = torch.finfo(FP8).max
    return x.float().clamp(-largest, largest).to(FP8)


def dequantised(
    x: torch.Tensor, scale: float | None, each: torch.Tensor | None, q: torch.Tensor
) -> torch.Tensor:
    """Keys or values [Hkv, tokens, D] as they are meant: FP8 times its scale, others as they are.

    In fp32, in fp64 for such queries.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if scale is not None:
        return x.to(dtype) * scale
    return x if each is None else x.to(dtype) * each.to(dtype).view(-1, 1, 1)


ScaleFactor = float | Sequence[float] | torch.Tensor


def scale_factors(value: ScaleFactor, call: Call, device: torch.device) -> torch.Tensor:
    """One number per head that votes, float64 [heads], each finite and not below 0."""
    factors = _checked_shape(value, call).to(device, torch.float64)
    if not bool(torch.isfinite(factors).all()) or bool((factors < 0).any()):
        raise _no_scale_factor(value)
    return factors.expand(call.vote_heads)


def kernel_factors(
    value: ScaleFactor, call: Call, device: torch.device
) -> tuple[float, torch.Tensor | None]:
    """One number for all heads, or fp32 [heads]; a tensor on the device is not read, to avoid waiting."""
    # No tensors on this path: every layer takes it in every step.
    if isinstance(value, int | float):
        if not (math.isfinite(value) and value >= 0):
            raise _no_scale_factor(value)
        return float(value), None
    if isinstance(value, torch.Tensor) and (
        value.device.type != "cpu" or torch.compiler.is_compiling()
    ):
        factors = _checked_shape(value, call)
    else:
        factors = scale_factors(value, call, device)
    if factors.dim() == 0:
        factors = factors.expand(call.vote_heads)
    return 0.0, _as_kernels_read(factors, device, torch.float32)


def _checked_shape(value: ScaleFactor, call: Call) -> torch.Tensor:
    heads = call.vote_heads
    if isinstance(value, torch.Tensor) and value.shape == (heads,):
        return value
    kind = "query" if not call.decode else "KV" if call.heads_per_vote == call.group else "voting"
    law = f"scale_factor must be a number or a tensor [{heads}] (one per {kind} head)"
    try:
        # A tensor on the device stays there, unread.
        factors = value if isinstance(value, torch.Tensor) else torch.tensor(value).double()
    except (TypeError, ValueError):
        raise TypeError(f"{law}, but got {value!r}; 0 means dense") from None
    if factors.shape not in ((), (heads,)):
        raise ValueError(f"{law}, but got shape {tuple(factors.shape)}")
    return factors


def _no_scale_factor(value: object) -> ValueError:
    return ValueError(
        f"`scale_factor` must be finite and at least 0, but got {value}; 0 means dense"
    )


def warn_if_dense(largest: float, call: Call, kv_lens: Iterable[int]) -> None:
    """Warns that requests run dense because their threshold would be 1 or more.

    Args:
        largest: scale factor of any head [tokens].
        call: what runs; in decode, the first token of a run sees the fewest keys.
        kv_lens: KV length of each request; one without keys is empty, not dense, and one below `min_kv_len`
            is dense because it should be.
    """
    before = call.q_len - 1 if call.decode else 0
    least = before + max(call.min_kv_len, 1)
    shortest = min((n - before for n in kv_lens if n >= least), default=math.inf)
    if largest > 0 and not has_threshold(largest, shortest):
        warnings.warn(
            f"`scale_factor` must be below `kv_len`, but got scale_factor={largest:g} with "
            f"kv_len={shortest}; these calls run dense. Lower the scale factor, or send short requests to "
            "dense attention",
            DenseCallWarning,
            stacklevel=4,  # whoever called the operation
        )
