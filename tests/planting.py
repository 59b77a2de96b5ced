"""Inputs whose skipped tiles are known, and the tolerance that every kernel test uses.

The bench's inputs, with query rows in four kinds, one per vote. For each kind a KV tile is loud or quiet; the
first tile is the sink. The scale factor cuts between loud and quiet, several nats from either, so that
decisions are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import inputs
import torch

import skip_softmax as ss
from skip_softmax.choose import Backend
from skip_softmax.meaning import reference
from skip_softmax.meaning.call import Call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter has no bf16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
KINDS = 4


@dataclass(frozen=True)
class Planted:
    """Inputs, the scale factor between loud and quiet tiles, and which tiles are quiet.

    Attributes:
        q: [B, Hq, Sq, D].
        k: [B, Hkv, Skv, D].
        v: [B, Hkv, Skv, Dv].
        scale_factor: [tokens].
        quiet: bool [B, Hkv, KINDS, tiles].
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale_factor: float
    quiet: torch.Tensor


def plant(
    *, batch: int = 1, heads: int = 2, kv_heads: int = 1, q_len: int = 200, kv_len: int = 200,
    head_dim: int = 32, value_dim: int | None = None, tile_q: int = 64, tile_kv: int = 32,
    sparsity: float = 0.6, dtype: torch.dtype = torch.float32, device: str = DEVICE, seed: int = 0,
) -> Planted:  # fmt: skip
    """Vote i of a request is of kind i % KINDS; `sparsity` is the share of quiet tiles."""
    q, k, v, scale_factor = inputs.planted(
        "blocks", batch, heads, kv_heads, q_len, kv_len, head_dim, tile_kv, sparsity, dtype, device, seed,
        groups=KINDS, tile_q=tile_q, value_dim=value_dim,
    )  # fmt: skip
    level = k[:, :, ::tile_kv, :KINDS] * inputs.STRENGTH / math.sqrt(head_dim)
    return Planted(q, k, v, scale_factor, (level < inputs.CUT).transpose(2, 3))


def call_alone(
    p: Planted, q_len: int, kv_len: int, *, tile_q: int | None, tile_kv: int, **about: Any
) -> Call:
    """The call of one request of so many tokens, as the reference takes it."""
    (_, q_heads, _, head_dim), kv_heads = p.q.shape, p.k.shape[1]
    return Call(
        q_len, kv_len, q_heads, kv_heads, head_dim, p.v.shape[3], p.q.dtype, head_dim**-0.5, tile_q, tile_kv,
        **about,
    )  # fmt: skip


def expected(
    planted: Planted, call: Call, b: int = 0, scale_factor: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference in float64: output, visited and skipped tiles of request `b`."""
    q, k, v = (x[b].double() for x in (planted.q, planted.k, planted.v))
    factor = planted.scale_factor if scale_factor is None else scale_factor
    factors = torch.full((call.vote_heads,), factor, dtype=torch.float64, device=q.device)
    return reference.attend(q, k, v, call, factors)


def assert_accurate(
    out: torch.Tensor,
    planted: Planted,
    call: Call,
    b: int = 0,
    scale_factor: float | None = None,
) -> None:
    """At most twice the error of PyTorch in the same dtype over the same kept keys, plus rounding."""
    truth = expected(planted, call, b, scale_factor)[0]
    factor = planted.scale_factor if scale_factor is None else scale_factor
    q, k, v = (
        planted.q[b, :, : call.q_len],
        planted.k[b, :, : call.kv_len],
        planted.v[b, :, : call.kv_len],
    )
    scale = q.shape[-1] ** -0.5
    gaps = reference.gaps(q.double(), k.double(), call)
    lengths = torch.tensor([float(call.kv_len)], dtype=torch.float64, device=q.device)
    if call.decode:
        lengths = torch.arange(
            call.kv_len - call.q_len + 1, call.kv_len + 1, device=q.device
        ).double()
    active = (factor > 0) & (factor < lengths)[None, :, None]
    skipped = active & (gaps < (math.log(factor or 1.0) - lengths.log())[None, :, None])
    per_row = skipped.repeat_interleave(q.shape[0] // skipped.shape[0], 0)
    per_row = per_row.repeat_interleave(call.tile_q or 1, 1)[:, call.lead : call.lead + call.q_len]
    hidden = per_row.repeat_interleave(call.tile_kv, 2)[:, :, : call.kv_len]
    position = torch.arange(call.q_len, device=q.device)[:, None] + call.kv_len - call.q_len
    key = torch.arange(call.kv_len, device=q.device)
    if call.causal:
        hidden = hidden | (key > position)
    if call.window is not None:
        hidden = hidden | (key <= position - call.window)
    group = q.shape[0] // k.shape[0]
    scores = (q * scale) @ k.repeat_interleave(group, 0).transpose(1, 2)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    low = ((weights @ v.repeat_interleave(group, 0)).double() - truth).abs().max()
    # Three TF32 products make an fp32 one: a few bits less than PyTorch's own.
    rounding = (
        (4 if out.dtype == torch.float32 else 1) * torch.finfo(out.dtype).eps * truth.abs().max()
    )
    error = (out.double() - truth).abs().max()
    assert torch.isfinite(out).all()
    assert error <= 2 * low + 4 * rounding, f"error {error:.2e}, PyTorch in {out.dtype} {low:.2e}"


def in_fp8(
    p: Planted,
) -> tuple[Planted, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The same, with a cache in e4m3 and a scale per KV head.

    Returns:
        What the cache means, which every dtype holds exactly; keys and values in FP8; and the keywords.
    """
    heads = p.k.shape[1]
    scales = {
        name: torch.tensor(numbers, device=p.k.device).repeat(heads)[:heads]
        for name, numbers in (("k_scale", (0.75, 1.5, 0.5)), ("v_scale", (0.5, 0.75, 3.0)))
    }
    quantised, meant = [], []
    for x, scale in zip((p.k, p.v), scales.values(), strict=True):
        each = scale.view(-1, 1, 1)
        quantised.append((x.float() / each).to(torch.float8_e4m3fn))
        meant.append((quantised[-1].float() * each).to(x.dtype))
    return replace(p, k=meant[0], v=meant[1]), *quantised, scales


def paged(p: Planted, page: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same cache in shuffled pages whose unused rows are NaN, and its table."""
    return inputs.in_pages(p.k, p.v, page, seed)


def served_pages(
    p: Planted,
    page: int,
    q_lens: list[int],
    kv_lens: list[int],
    window: int | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages as engines keep them, three of them owned by nobody and NaN, and their table.

    Entries of the table that no request needs are far out of range.
    """
    k, v, table = paged(p, page, seed)
    nobody = torch.full_like(k[:3], torch.nan)
    table = table + len(nobody)
    for b, (rows, keys) in enumerate(zip(q_lens, kv_lens, strict=True)):
        table[b, -(-keys // page) if rows else 0 :] = 10**9
        if window is not None:
            table[b, : max(keys - rows + 1 - window, 0) // page] = -(10**9)
    return *inputs.as_engines_keep(torch.cat([nobody, k]), torch.cat([nobody, v])), table


def check_prefill(
    p: Planted,
    backend: Backend,
    *,
    causal: bool = True,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    dense_last: int = 0,
    scale_factor: float | None = None,
    q_lens: list[int] | None = None,
    kv_lens: list[int] | None = None,
) -> tuple[torch.Tensor, ss.TileCounts]:
    """Output and exact tile counts of every request against the reference."""
    factor = p.scale_factor if scale_factor is None else scale_factor
    out, stats = ss.attention(
        p.q, p.k, p.v, scale_factor=factor, causal=causal, window=window, tile_q=tile_q, tile_kv=tile_kv,
        dense_last=dense_last, q_lens=q_lens, kv_lens=kv_lens, backend=backend, return_stats=True,
    )  # fmt: skip
    for b in range(p.q.shape[0]):
        q_len = p.q.shape[2] if q_lens is None else q_lens[b]
        kv_len = p.k.shape[2] if kv_lens is None else kv_lens[b]
        call = call_alone(
            p, q_len, kv_len, causal=causal, window=window, tile_q=tile_q, tile_kv=tile_kv,
            dense_last=dense_last,
        )  # fmt: skip
        _, visited, skipped = expected(p, call, b, factor)
        assert stats.visited[b].tolist() == visited.tolist()
        assert stats.skipped[b].tolist() == skipped.tolist()
        assert (out[b, :, q_len:] == 0).all()
        if q_len and kv_len:
            assert_accurate(out[b, :, :q_len], p, call, b, factor)
    return out, stats


def check_decisions_near_the_threshold(
    backend: Backend, head_dim: int, dtype: torch.dtype, tokens: int
) -> None:
    """Scores of noise: tiles of every gap, so that some lie within rounding of any threshold."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, head_dim, generator=generator).to(DEVICE, dtype)
        for heads in (8, 2, 2)
    )
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 0, 0] = 6.0 * head_dim**0.5 / 4.0
    gaps = ss.tile_gaps(q, k, backend="reference")
    finite = gaps[torch.isfinite(gaps)]
    factor = tokens * finite.median().exp().item()
    found, true = (
        ss.attention(q, k, v, scale_factor=factor, backend=name, return_stats=True)[1]
        for name in (backend, "reference")
    )
    near = ((finite - finite.median()).abs() < 1e-3).sum().item()
    differ = (found.skipped - true.skipped).abs().sum().item()
    print(f"{differ} of {finite.numel()} decisions differ, {near} within 1e-3 nats")
    assert true.skipped.sum() > 0 and differ <= near


def graded(
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    dim: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs with gaps of every size: each scale factor skips other tiles. `plant` has two levels only.

    Ever weaker keys that every query likes stand among keys of different size.

    Returns:
        q [1, heads, q_len, dim], k and v [1, kv_heads, kv_len, dim].
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, q_len, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(1, kv_heads, kv_len, dim, generator=generator, dtype=torch.float64)
    v = torch.randn(1, kv_heads, kv_len, dim, generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.ones(dim, dtype=torch.float64), dim=0)
    q += 4 * direction
    k *= torch.exp2(-(torch.arange(kv_len) // 48 % 5).double())[:, None]
    liked = torch.arange(0, kv_len, 40)
    k[:, :, liked] = 6 * direction * 0.97 ** torch.arange(len(liked), dtype=torch.float64)[:, None]
    return q.to(dtype), k.to(dtype), v.to(dtype)
