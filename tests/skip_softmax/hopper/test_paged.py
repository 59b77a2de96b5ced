"""The Hopper kernel over a cache in pages, against its own contiguous calls and the reference, on an H100."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from planting import Planted, assert_accurate, call_alone, expected, plant

import skip_softmax as ss

pytest.importorskip("triton")
from skip_softmax.hopper import prefill as hopper
from skip_softmax.launch import Device
from skip_softmax.meaning.call import call_of

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs an sm_90 device",
)
# A part of a tile, a tile, a multiple of it, and what shares only 16 rows with a tile.
PAGES = [16, 32, 48, 64, 128, 256]
NOBODYS = (2**31 - 1, -7, 10**6)  # what a table may hold where no key is


def planted(head_dim: int = 128, **shape: Any) -> Planted:
    """Values of 128 columns where keys have 192."""
    shape = {"tile_kv": 128, "dtype": torch.bfloat16, "device": "cuda", **shape}
    return plant(head_dim=head_dim, value_dim=min(head_dim, 128), **shape)


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).int()


def in_pages(
    p: Planted, page: int, kv_lens: list[int], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cache in shuffled pages, NaN where no key is, and a table with nonsense where no page is."""
    draw = Random(seed)
    columns = -(-p.k.shape[2] // page) + 1
    free = list(range(len(kv_lens) * columns))
    draw.shuffle(free)
    table = torch.tensor([[draw.choice(NOBODYS) for _ in range(columns)] for _ in kv_lens])
    k, v = (
        torch.full(
            (len(free), x.shape[1], page, x.shape[3]), torch.nan, dtype=x.dtype, device=x.device
        )
        for x in (p.k, p.v)
    )
    for b, kv_len in enumerate(kv_lens):
        for first in range(0, kv_len, page):
            table[b, first // page] = number = free.pop()
            rows = slice(first, min(first + page, kv_len))
            k[number, :, : rows.stop - first] = p.k[b, :, rows]
            v[number, :, : rows.stop - first] = p.v[b, :, rows]
    return k, v, table.int().to(p.k.device)


@on_hopper
@pytest.mark.timeout(120)
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("page", PAGES)
def test_pages_give_the_bits_of_the_contiguous_call(page: int, head_dim: int) -> None:
    p = planted(batch=4, heads=4, kv_heads=2, q_len=333, kv_len=1500, head_dim=head_dim)
    q_lens, kv_lens = [333, 70, 0, 1], [1500, 1203, 77, 1]
    k, v, table = in_pages(p, page, kv_lens)
    call = {"q_lens": q_lens, "kv_lens": kv_lens, "backend": "hopper", "return_stats": True}
    for factor in (p.scale_factor, 0.0):
        call |= {
            "scale_factor": factor,
            "causal": page != 48,
        }  # every variant is compiled on its own
        true, counted = ss.attention(p.q, p.k, p.v, **call)
        out, stats = ss.attention(p.q, k, v, block_table=table, **call)
        assert torch.equal(out, true)
        assert torch.equal(stats.visited, counted.visited)
        assert torch.equal(stats.skipped, counted.skipped)
        assert (stats.skipped.sum() > 0) == (factor > 0)


@on_hopper
@pytest.mark.timeout(120)
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("page", [16, 64, 256])
def test_packed_requests_with_a_cached_prefix_match_the_reference(page: int, head_dim: int) -> None:
    """Before the first row of a request, in the same vote, lie rows of another: they must not count."""
    p = planted(batch=5, heads=4, kv_heads=2, q_len=700, kv_len=2011, head_dim=head_dim)
    q_lens, kv_lens = [700, 1, 0, 65, 500], [2011, 1900, 300, 1065, 500]
    q = torch.cat([x[:, :n] for x, n in zip(p.q, q_lens, strict=True)], 1).transpose(0, 1)
    at = starts(q_lens)
    k, v, table = in_pages(p, page, kv_lens)
    counts = torch.zeros(4, 2, dtype=torch.int64, device="cuda")
    out = torch.full((len(q) + 3, 4, p.v.shape[3]), 7.0, dtype=q.dtype, device="cuda")
    place = (at, None, 700, 2011)
    call = {
        "scale_factor": p.scale_factor,
        "block_table": table,
        "kv_lens": kv_lens,
        "backend": "hopper",
    }
    got, stats = ss.attention_varlen(
        q, k, v, *place, out=out[:-3], counts=counts, return_stats=True, **call
    )
    assert got.data_ptr() == out.data_ptr() and (out[-3:] == 7).all()
    for b, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        alone = call_alone(p, q_len, kv_len, tile_q=64, tile_kv=128)
        if not q_len:
            assert not stats.visited[b].any()
            continue
        mine = Planted(p.q[b : b + 1, :, :q_len], p.k[b : b + 1, :, :kv_len], p.v[b : b + 1, :, :kv_len],
                       p.scale_factor, p.quiet)  # fmt: skip
        _, visited, skipped = expected(mine, alone)
        assert stats.visited[b].tolist() == visited.tolist()
        assert stats.skipped[b].tolist() == skipped.tolist()
        assert_accurate(out[at[b] : at[b + 1]].transpose(0, 1), mine, alone)
    assert counts.tolist() == [
        [v, s]
        for v, s in zip(stats.visited.sum(0).tolist(), stats.skipped.sum(0).tolist(), strict=True)
    ]
    before = counts.clone()
    ss.attention_varlen(q, k, v, *place, counts=counts, **call)
    assert torch.equal(counts, 2 * before) and before[:, 1].sum() > 0


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("first", [640, 700, 1279, 1999])
def test_the_last_chunk_gives_the_bits_of_the_whole_prompt(first: int, head_dim: int) -> None:
    """Votes are cut where the whole prompt's are; only the one in which the chunk begins holds fewer rows."""
    p = planted(heads=4, kv_heads=2, q_len=2000, kv_len=2000, head_dim=head_dim)
    call = {"scale_factor": p.scale_factor, "backend": "hopper", "return_stats": True}
    whole, counted = ss.attention(p.q, p.k, p.v, **call)
    chunk, stats = ss.attention(p.q[:, :, first:], p.k, p.v, **call)
    same = -(-first // 64) * 64
    assert torch.equal(chunk[:, :, same - first :], whole[:, :, same:])
    alone = call_alone(p, 2000 - first, 2000, tile_q=64, tile_kv=128)
    part = Planted(p.q[:, :, first:], p.k, p.v, p.scale_factor, p.quiet)
    _, visited, skipped = expected(part, alone)
    assert stats.visited[0].tolist() == visited.tolist()
    assert stats.skipped[0].tolist() == skipped.tolist()
    assert counted.skipped.sum() > stats.skipped.sum()


@on_hopper
@pytest.mark.parametrize("page", [0, 64])
def test_short_requests_below_min_kv_len_skip_nothing(page: int) -> None:
    p = planted(batch=3, heads=4, kv_heads=2, q_len=600, kv_len=1100)
    kv_lens = torch.tensor([1100, 999, 1000], dtype=torch.int32, device="cuda")
    k, v, table = in_pages(p, page, kv_lens.tolist()) if page else (p.k, p.v, None)
    call = {"kv_lens": kv_lens, "block_table": table, "backend": "hopper"}
    dense = ss.attention(p.q, k, v, **call)
    out, stats = ss.attention(
        p.q, k, v, scale_factor=p.scale_factor, min_kv_len=1000, return_stats=True, **call
    )
    _, every = ss.attention(p.q, k, v, scale_factor=p.scale_factor, return_stats=True, **call)
    assert torch.equal(out[1], dense[1])
    assert every.skipped[1].all() and not stats.skipped[1].any()
    assert torch.equal(stats.skipped[[0, 2]], every.skipped[[0, 2]])


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_what_others_hold_decides_nothing(head_dim: int) -> None:
    """Rows of inf before and behind a request that begins inside a vote."""
    p = planted(heads=4, kv_heads=2, q_len=500, kv_len=1530, head_dim=head_dim)
    k, v, table = in_pages(p, 64, [1530])
    q = torch.full((4, 900, head_dim), torch.inf, dtype=p.q.dtype, device="cuda")
    q[:, 100:600] = p.q[0]
    out, stats = ss.attention_varlen(
        q.transpose(0, 1), k, v, starts([100, 500, 300]), None, 500, 1530, scale_factor=p.scale_factor,
        block_table=table.expand(3, -1), kv_lens=[100, 1530, 300], backend="hopper", return_stats=True,
    )  # fmt: skip
    alone, counted = ss.attention(
        p.q, p.k, p.v, scale_factor=p.scale_factor, backend="hopper", return_stats=True
    )
    assert torch.equal(out[100:600].transpose(0, 1), alone[0])
    assert torch.equal(stats.skipped[1], counted.skipped[0]) and counted.skipped.sum() > 0


@on_hopper
def test_the_layout_of_an_engine() -> None:
    """Keys and values side by side, tokens before heads: what vLLM keeps."""
    p = planted(batch=2, heads=4, kv_heads=2, q_len=300, kv_len=900)
    k, v, table = in_pages(p, 16, [900, 650])
    cache = torch.stack([k, v], 1).transpose(2, 3).contiguous().transpose(2, 3)
    call = {
        "kv_lens": [900, 650],
        "scale_factor": p.scale_factor,
        "block_table": table,
        "backend": "hopper",
    }
    found = ss.attention(p.q, cache[:, 0], cache[:, 1], **call)
    assert torch.equal(found, ss.attention(p.q, k, v, **call))


@on_hopper
@pytest.mark.timeout(120)
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("page", [16, 128])
def test_values_that_are_fetched_late_are_those_of_their_tile(page: int, head_dim: int) -> None:
    """Most tiles are skipped and most blocks have none: values are settled by other items, or without any."""
    p = planted(
        batch=6, heads=14, kv_heads=2, q_len=1899, kv_len=4000, head_dim=head_dim, sparsity=0.9
    )
    q_lens, kv_lens = [1233, 1, 1899, 0, 1, 1242], [1250, 1, 4000, 0, 1900, 1279]
    k, v, table = in_pages(p, page, kv_lens)

    def packed(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return torch.cat([x[b, :, :n] for b, n in enumerate(lengths)], 1).transpose(0, 1)

    q, at, keys_at = packed(p.q, q_lens), starts(q_lens), starts(kv_lens)
    call = {"scale_factor": p.scale_factor, "backend": "hopper", "return_stats": True}
    together = packed(p.k, kv_lens), packed(p.v, kv_lens), at, keys_at, 1899, 4000
    true, counted = ss.attention_varlen(q, *together, **call)
    assert counted.skipped.sum() > 0 and not counted.visited[3].any()
    call |= {"block_table": table, "kv_lens": kv_lens}
    for _ in range(20):  # which program takes which block differs from run to run
        out, stats = ss.attention_varlen(q, k, v, at, None, 1899, 4000, **call)
        assert torch.equal(out, true) and torch.equal(stats.skipped, counted.skipped)


@on_hopper
def test_a_captured_graph_follows_new_lengths_and_pages() -> None:
    p = planted(batch=3, heads=8, kv_heads=2, q_len=200, kv_len=700)
    k, v, table = in_pages(p, 32, [700, 650, 700])
    nothing = torch.full_like(table, 2**31 - 1)
    place, at = nothing.clone(), starts([0, 0, 0])
    kv_lens = torch.zeros(3, dtype=torch.int32, device="cuda")
    q = p.q.transpose(1, 2).flatten(0, 1)
    out, counts = torch.zeros_like(q), torch.zeros(8, 2, dtype=torch.int64, device="cuda")

    def call(out: torch.Tensor, counts: torch.Tensor | None) -> None:
        ss.attention_varlen(
            q, k, v, at, None, 200, 700, scale_factor=p.scale_factor, min_kv_len=660, kv_lens=kv_lens,
            block_table=place, backend="hopper", out=out, counts=counts,
        )  # fmt: skip

    call(out, counts)
    torch.cuda.synchronize()
    assert not counts.any() and not out.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out, counts)
    for lengths, keys in (([200, 200, 200], [700, 650, 700]), ([200, 0, 77], [700, 650, 690])):
        at.copy_(starts(lengths))
        kv_lens.copy_(torch.tensor(keys))
        place.copy_(table)
        counts.zero_()
        graph.replay()
        eager, again = torch.zeros_like(out), torch.zeros_like(counts)
        call(eager, again)
        rows = sum(lengths)
        assert torch.equal(out[:rows], eager[:rows]) and torch.equal(counts, again)
        assert counts[:, 1].sum() > 0


@pytest.mark.parametrize("groups", hopper.GROUPS.values())
@pytest.mark.parametrize("box", [16, 32, 64, 128])
def test_warpgroups_share_all_registers_of_a_multiprocessor(groups: int, box: int) -> None:
    """A launch gives all threads as many, a multiple of 8; the producer's warps count as a warpgroup."""
    warps, heavy, light = hopper.partition(groups, box)
    each = 2**16 // (128 * (groups + 1)) // 8 * 8
    assert warps <= 4 and groups * heavy + light == (groups + 1) * each


def refusal(
    page: int, head_dim: int = 128, layout: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> str:
    """What the kernel says of a cache in pages of a size, on a device that need not be here."""
    q = torch.zeros(1, 2, 64, head_dim, dtype=torch.bfloat16)
    k = torch.zeros(8, 2, page, head_dim, dtype=torch.bfloat16)
    k = k if layout is None else layout(k)
    table = torch.zeros(1, 4, dtype=torch.int32)
    call = call_of(
        q, k, k, tile_q=64, tile_kv=128, scale=0.1, window=None, table=table, ragged=True
    )
    return hopper.why_not(call, Device(9)) or ""


def test_pages_that_loads_cannot_follow_are_refused_by_name() -> None:
    assert all(refusal(page) == "" for page in [*PAGES, 160, 784])
    assert "page size 24 is not a multiple of 16" in refusal(24)
    assert "page size 8 is not" in refusal(8)
    odd = torch.zeros(8, 2, 64, 129, dtype=torch.bfloat16)
    assert "strides" in refusal(64, layout=lambda _: odd[..., :128])
