"""Inputs whose tiles are skipped as requested: random scores skip nothing, so structure is planted.

Both kinds have a sink in the first tile, as causal language models do. `blocks` gives every KV tile a level:
loud tiles are kept and quiet ones skipped, for all rows alike or for several groups of rows, each with
levels of its own. `sink` plants only the sink, so noise decides, independently in each vote, which tiles fall
below the threshold: the hardest case for a kernel whose block contains several votes.

The bench times these inputs, and the kernel tests compare decisions on them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Kind = Literal["blocks", "sink"]

QUIET, LOUD, CUT = -13.0, -2.5, -8.0  # level of quiet and loud tiles, and the threshold [nats]
STRENGTH = 4.0  # of a planted channel in q; the level is in the key's channel
SINK = 6.0  # how far the sink is above the mean score of `sink` inputs [nats]


def planted(
    kind: Kind,
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    tile_kv: int,
    sparsity: float,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    *,
    groups: int = 1,
    tile_q: int = 1,
    value_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Queries, keys, values, and (for `blocks`) the scale factor that skips the quiet tiles.

    Args:
        kind: `blocks` or `sink`.
        batch: requests.
        heads: query heads.
        kv_heads: KV heads.
        q_len: query rows per request.
        kv_len: keys per request [tokens].
        head_dim: columns of queries and keys.
        tile_kv: keys per tile [tokens].
        sparsity: share of quiet tiles, in [0, 1]; `sink` takes any and is set by its scale factor.
        dtype: of all three.
        device: where they are made.
        seed: of the random numbers.
        groups: how many groups of rows, each with its own quiet tiles and planted channel (`blocks` only).
        tile_q: rows of a query tile, cut as in attention; those of the call's tile i are of group i % groups.
        value_dim: columns of values; None: `head_dim`.

    Returns:
        q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv], scale factor [tokens].
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    noise = 0.6 if kind == "blocks" else 1.0  # scores of N(0, noise**4) [nats]
    q = normal(batch, heads, q_len, head_dim).mul_(noise)
    k = normal(batch, kv_heads, kv_len, head_dim).mul_(noise)
    v = normal(batch, kv_heads, kv_len, head_dim if value_dim is None else value_dim)
    tiles = -(-kv_len // tile_kv)
    if kind == "blocks":
        # Quiet tiles are spread evenly between the sink in tile 0 and the diagonal in the last tiles.
        shuffled = torch.rand(batch, kv_heads, groups, tiles, device=device, generator=generator)
        level = torch.where(shuffled < sparsity, QUIET, LOUD)
        level[..., 0] = 0.0
        keys = level.repeat_interleave(tile_kv, -1)[..., :kv_len].transpose(2, 3)
        lead = max(kv_len - q_len, 0) % tile_q
        group = (torch.arange(q_len, device=device) + lead) // tile_q % groups
        q[..., :groups] = STRENGTH * torch.nn.functional.one_hot(group, groups)
    else:
        keys = torch.zeros(batch, kv_heads, kv_len, 1, device=device)
        keys[:, :, 0] = SINK
        q[..., :1] = STRENGTH
    k[..., : keys.shape[-1]] = (keys * math.sqrt(head_dim) / STRENGTH).to(dtype)
    return q, k, v, kv_len * math.exp(CUT)


def in_pages(
    k: torch.Tensor, v: torch.Tensor, page: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same keys and values in shuffled pages whose unused rows are NaN, and their table.

    Args:
        k: keys [B, Hkv, Skv, D].
        v: values [B, Hkv, Skv, Dv].
        page: rows of a page.
        seed: of the order of pages.

    Returns:
        Pages of keys and of values [pages, Hkv, page, D], page numbers [B, pages per request].
    """
    batch, heads, kv_len, _ = k.shape
    count = -(-kv_len // page)
    table = torch.randperm(batch * count, generator=torch.Generator().manual_seed(seed)).to(
        k.device
    )

    def pages(x: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, count * page - kv_len), value=torch.nan)
        split = padded.view(batch, heads, count, page, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        return split[table.argsort()]

    return pages(k), pages(v), table.view(batch, count)


def as_engines_keep(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages with tokens before heads in memory, and each key beside its value."""
    both = torch.cat([k, v], -1).transpose(1, 2).contiguous().transpose(1, 2)
    return both[..., : k.shape[-1]], both[..., k.shape[-1] :]
