"""The reference against a plain float64 loop over rows, tiles and keys, and its laws."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from planting import graded

import skip_softmax as ss
from skip_softmax.meaning import reference
from skip_softmax.meaning.call import Call


def loop(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_factor: float,
    *,
    causal: bool,
    window: int | None,
    tile_q: int,
    tile_kv: int,
    decode: bool = False,
    seeded: bool = False,
    dense_last: int = 0,
) -> tuple[torch.Tensor, int, int, list[float]]:
    """Section by section what the thresholds mean, one request, written without tensors' help.

    Returns the output, visited and skipped tiles, and every visited tile's critical scale factor.
    """
    heads, q_len, dim = q.shape
    kv_heads, kv_len, _ = k.shape
    group, offset = heads // kv_heads, kv_len - q_len
    out = torch.zeros(heads, q_len, v.shape[-1], dtype=torch.float64)
    visited = skipped = 0
    critical: list[float] = []
    if decode:
        votes = [
            ([(h * group + g, t) for g in range(group)], h, offset + t + 1)
            for h in range(kv_heads)
            for t in range(q_len)
        ]
    else:  # rows vote together whose positions lie in one tile
        tile_of = [(max(offset, 0) + r) // tile_q for r in range(q_len)]
        votes = [
            ([(h, r) for r in range(q_len) if tile_of[r] == tile], h // group, kv_len)
            for h in range(heads)
            for tile in sorted(set(tile_of))
        ]
    for rows, kv_head, length in votes:
        scores = {}
        for h, r in rows:
            s = (q[h, r].double() @ k[kv_head].double().T) / math.sqrt(dim)
            for c in range(kv_len):
                hidden = (causal and c > offset + r) or (
                    window is not None and c <= offset + r - window
                )
                if hidden:
                    s[c] = -math.inf
            scores[h, r] = s
        tiles = [
            j
            for j in range(-(-kv_len // tile_kv))
            if any(scores[row][j * tile_kv : (j + 1) * tile_kv].max() > -math.inf for row in rows)
        ]
        threshold = scale_factor / length if scale_factor < length else 0.0
        running = dict.fromkeys(rows, -math.inf)
        if seeded and tiles:
            ends = [tiles[0], tiles[-1]]
            running = {
                row: max(float(scores[row][j * tile_kv : (j + 1) * tile_kv].max()) for j in ends)
                for row in rows
            }
        kept = []
        for j in tiles:
            top = {row: float(scores[row][j * tile_kv : (j + 1) * tile_kv].max()) for row in rows}
            never = j == tiles[0] or (seeded and j == tiles[-1])
            gap = max(
                -math.inf if top[row] == -math.inf else top[row] - running[row] for row in rows
            )
            never = never or any(r >= q_len - dense_last for _, r in rows)
            critical.append(math.inf if never or gap >= 0 else length * math.exp(gap))
            visited += 1
            if not never and math.exp(min(gap, 700)) < threshold:
                skipped += 1
                continue
            kept.append(j)
            if not seeded:
                running = {row: max(running[row], top[row]) for row in rows}
        keep = torch.zeros(kv_len, dtype=torch.bool)
        for j in kept:
            keep[j * tile_kv : (j + 1) * tile_kv] = True
        for h, r in rows:
            s = scores[h, r].masked_fill(~keep, -math.inf)
            if s.max() > -math.inf:
                out[h, r] = torch.softmax(s, -1) @ v[kv_head].double()
    return out, visited, skipped, critical


@pytest.mark.parametrize("running_max", ["ascending", "seeded"])
@pytest.mark.parametrize("tile_heads", [1, 2, 4, 8])
def test_a_latent_cache_decides_as_its_expanded_keys_do(tile_heads: int, running_max: str) -> None:
    """Multi-head latent attention: 8 heads of 12 + 4 columns on a cache of 20 + 4, and expanded per head."""
    heads, kv_len, latent, rope, tokens = 8, 330, 20, 4, 3
    q, cache, _ = graded(heads, 1, tokens, kv_len, latent + rope)
    generator = torch.Generator().manual_seed(1)
    to_key, to_value = (
        torch.randn(heads, latent, 12, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    q = q[..., :16]
    quiet = torch.arange(kv_len) // 32 % 3 == 1
    q[..., 12:], cache[..., latent:] = 4.0, torch.where(quiet, -10.0, 0.0)[:, None]
    compressed, turned = cache[..., :latent], cache[..., latent:].expand(-1, heads, -1, -1)
    expanded = torch.cat([compressed @ to_key, turned], -1)
    absorbed = torch.cat([q[..., :12] @ to_key.mT, q[..., 12:]], -1)
    call = {"scale": 0.05, "tile_kv": 32, "running_max": running_max, "tile_heads": tile_heads}
    for factor in (0.0, 5.0, 200.0):
        out, stats = ss.decode_attention(
            q, expanded, compressed @ to_value, scale_factor=factor, return_stats=True, **call
        )
        short, same = ss.decode_attention(
            absorbed, cache, cache[..., :latent], scale_factor=factor, return_stats=True, **call
        )
        torch.testing.assert_close(short @ to_value, out)
        assert torch.equal(stats.skipped, same.skipped) and torch.equal(stats.visited, same.visited)
        assert stats.skipped.shape == (1, heads // tile_heads)
    assert 0 < stats.skipped.sum() < stats.visited.sum()
    _, one = ss.tile_statistics(q, expanded, compressed @ to_value, decode=True, **call)
    _, other = ss.tile_statistics(absorbed, cache, cache[..., :latent], decode=True, **call)
    assert one.rows == other.rows == tokens * tile_heads
    never = one.counts[:, -1]
    assert torch.equal(never, other.counts[:, -1]) and torch.equal(
        one.counts.sum(1), other.counts.sum(1)
    )
    torch.testing.assert_close(one.mass.sum(1), other.mass.sum(1))


def test_which_heads_vote_together_follows_from_their_number() -> None:
    q, k, v = graded(8, 2, 2, 330)
    call = {"scale_factor": 30.0, "tile_kv": 32, "return_stats": True}
    out, stats = ss.decode_attention(q, k, v, **call)
    same, counted = ss.decode_attention(q, k, v, tile_heads=4, **call)
    assert torch.equal(out, same) and torch.equal(stats.skipped, counted.skipped)
    for tile_heads in (1, 2, 8):
        out, stats = ss.decode_attention(q, k, v, tile_heads=tile_heads, **call)
        for part in range(8 // tile_heads):
            mine = range(part * tile_heads, (part + 1) * tile_heads)
            keys = torch.cat([k[:, h // 4 : h // 4 + 1] for h in mine], 1)
            values = torch.cat([v[:, h // 4 : h // 4 + 1] for h in mine], 1)
            alone, counted = ss.decode_attention(
                q[:, mine.start : mine.stop], keys, values, tile_heads=tile_heads, **call
            )
            torch.testing.assert_close(alone, out[:, mine.start : mine.stop])
            assert counted.skipped.tolist() == stats.skipped[:, part : part + 1].tolist()
    for wrong in (0, 3, 16):
        with pytest.raises(ValueError, match=f"`tile_heads` must divide the 8 .* but got {wrong}"):
            ss.decode_attention(q, k, v, tile_heads=wrong)
    with pytest.raises(ValueError, match="divide the 3 of a KV head or be a multiple of them"):
        ss.decode_attention(q[:, :6], k, v, tile_heads=2)


@pytest.mark.parametrize("window", [None, 70], ids=["full", "window"])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 1)], ids=["mha", "gqa3", "gqa8"])
@pytest.mark.parametrize("length", [1, 63, 129, 200])
def test_prefill_equals_the_loop(length: int, heads: tuple[int, int], window: int | None) -> None:
    q, k, v = graded(*heads, length, length)
    factor = min(20.0, 0.9 * length)
    expected, visited, skipped, _ = loop(
        q[0], k[0], v[0], factor, causal=True, window=window, tile_q=16, tile_kv=32
    )
    out, stats = ss.attention(
        q, k, v, scale_factor=factor, window=window, tile_q=16, tile_kv=32, return_stats=True
    )
    torch.testing.assert_close(out[0], expected, atol=1e-12, rtol=0)
    assert (int(stats.visited.sum()), int(stats.skipped.sum())) == (visited, skipped)
    if length >= 129:
        assert skipped > 0, "the planted input must skip something, or this test shows nothing"


@pytest.mark.parametrize("window", [None, 70], ids=["full", "window"])
@pytest.mark.parametrize("dense_last", [1, 16, 17, 33, 199, 1000])
@pytest.mark.parametrize("shape", [(200, 200), (129, 200), (97, 97)])
def test_votes_with_one_of_the_last_rows_skip_nothing(
    shape: tuple[int, int], dense_last: int, window: int | None
) -> None:
    q, k, v = graded(3, 1, *shape)
    call = {"window": window, "tile_q": 16, "tile_kv": 32, "dense_last": dense_last}
    expected, visited, skipped, critical = loop(q[0], k[0], v[0], 20.0, causal=True, **call)
    out, stats = ss.attention(q, k, v, scale_factor=20.0, return_stats=True, **call)
    torch.testing.assert_close(out[0], expected, atol=1e-12, rtol=0)
    assert (int(stats.visited.sum()), int(stats.skipped.sum())) == (visited, skipped)
    assert skipped == 0 if dense_last >= 199 else skipped > 0 or shape == (97, 97)
    gaps = ss.tile_gaps(q, k, **call)[0]
    seen = gaps[gaps > -torch.inf]
    found = torch.where(seen >= 0, torch.inf, shape[1] * seen.exp())
    torch.testing.assert_close(
        found, torch.tensor(critical, dtype=torch.float64), atol=0, rtol=1e-12
    )
    _, histogram = ss.tile_statistics(q, k, v, **call)
    assert int(histogram.counts[:, -1].sum()) == sum(c == math.inf for c in critical)


def test_dense_rows_change_no_other_vote() -> None:
    """129 rows from position 71 on are votes of 57, 64 and 8 rows; the dense rows touch the last ones."""
    q, k, v = graded(2, 1, 129, 200)
    call = {"scale_factor": 30.0, "tile_q": 64, "tile_kv": 16}
    dense, plain = (
        ss.attention(q, k, v, **call | {"scale_factor": 0.0}),
        ss.attention(q, k, v, **call),
    )
    for dense_last, first in (
        (0, 129),
        (1, 121),
        (8, 121),
        (9, 57),
        (72, 57),
        (73, 0),
        (10**12, 0),
    ):
        out = ss.attention(q, k, v, dense_last=dense_last, **call)
        assert torch.equal(out[:, :, :first], plain[:, :, :first])
        assert torch.equal(out[:, :, first:], dense[:, :, first:])
    for first, last in ((0, 57), (57, 121), (121, 129)):  # skipping must show in each vote
        assert not torch.equal(plain[:, :, first:last], dense[:, :, first:last])


def test_each_request_and_each_chunk_has_its_own_last_rows() -> None:
    q, k, v = (torch.cat([t, t.flip(2)]) for t in graded(4, 2, 100, 120))
    call = {
        "scale_factor": 25.0,
        "tile_q": 16,
        "tile_kv": 16,
        "dense_last": 16,
        "return_stats": True,
    }
    lengths = [(100, 120), (37, 90)]
    q_lens, kv_lens = ([pair[i] for pair in lengths] for i in (0, 1))
    out, stats = ss.attention(q, k, v, q_lens=q_lens, kv_lens=kv_lens, **call)
    cut = [(q[b, :, :n], k[b, :, :m], v[b, :, :m]) for b, (n, m) in enumerate(lengths)]
    packed = [torch.cat(parts, 1).transpose(0, 1) for parts in zip(*cut, strict=True)]
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in (q_lens, kv_lens)]
    together, counted = ss.attention_varlen(*packed, *starts, 100, 120, **call)
    assert torch.equal(counted.skipped, stats.skipped)
    for b, (one, (n, _)) in enumerate(zip(cut, lengths, strict=True)):
        alone, counts = ss.attention(*(x[None] for x in one), **call)
        torch.testing.assert_close(out[b, :, :n], alone[0], atol=1e-12, rtol=0)
        rows = slice(starts[0][b], starts[0][b + 1])
        torch.testing.assert_close(together[rows].transpose(0, 1), alone[0], atol=1e-12, rtol=0)
        assert torch.equal(counts.skipped[0], stats.skipped[b]) and int(counts.skipped.sum()) > 0
    # A chunk is a call: its last rows are dense, although more rows of the prompt follow.
    chunk = (q[:1, :, :64], k[:1, :, :84], v[:1, :, :84])
    sparse = ss.attention(*chunk, **call)[0]
    dense = ss.attention(*chunk, **call | {"scale_factor": 0.0})[0]
    assert torch.equal(sparse[:, :, 48:], dense[:, :, 48:])
    assert not torch.equal(sparse[:, :, :48], dense[:, :, :48])


def test_no_row_is_dense_where_there_is_none() -> None:
    q, k, v = graded(2, 1, 40, 100)
    out, stats = ss.attention(
        q, k, v, q_lens=[0], scale_factor=20.0, dense_last=64, return_stats=True
    )
    assert not out.any() and int(stats.visited.sum()) == 0


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", [(1, 200), (65, 129), (63, 64), (130, 130)])
def test_prefill_with_queries_shorter_than_keys(shape: tuple[int, int], causal: bool) -> None:
    q, k, v = graded(4, 2, *shape)
    expected, visited, skipped, _ = loop(
        q[0], k[0], v[0], 15.0, causal=causal, window=None, tile_q=32, tile_kv=16
    )
    out, stats = ss.attention(
        q, k, v, scale_factor=15.0, causal=causal, tile_q=32, tile_kv=16, return_stats=True
    )
    torch.testing.assert_close(out[0], expected, atol=1e-12, rtol=0)
    assert (int(stats.visited.sum()), int(stats.skipped.sum())) == (visited, skipped)


@pytest.mark.parametrize("cuts", [[64, 128], [1, 40, 41, 163], [199]], ids=str)
def test_chunks_are_cut_where_the_whole_prompt_is(cuts: list[int]) -> None:
    """A tile that two chunks share votes in each of them; any other votes as it does in one whole call."""
    q, k, v = graded(3, 1, 200, 200)
    tiles = {"tile_q": 16, "tile_kv": 32}
    whole = ss.tile_gaps(q, k, **tiles)
    joined, out = torch.full_like(whole, -torch.inf), torch.empty_like(q)
    for start, end in zip([0, *cuts], [*cuts, 200], strict=True):
        chunk = q[:, :, start:end], k[:, :, :end]
        gaps, first = ss.tile_gaps(*chunk, **tiles), start // 16
        assert gaps.shape[2] == -(-end // 16) - first
        there = joined[:, :, first : first + gaps.shape[2], : gaps.shape[3]]
        there.copy_(torch.maximum(there, gaps))
        # The same threshold as the whole call's, whose KV length is 200.
        out[:, :, start:end] = ss.attention(
            *chunk, v[:, :, :end], scale_factor=20.0 * end / 200, **tiles
        )
    torch.testing.assert_close(joined, whole, atol=1e-12, rtol=0)
    truth, stats = ss.attention(q, k, v, scale_factor=20.0, return_stats=True, **tiles)
    assert int(stats.skipped.sum()) > 0
    shared = {row for cut in cuts if cut % 16 for row in range(cut - cut % 16, cut - cut % 16 + 16)}
    rows = [row for row in range(200) if row not in shared]
    torch.testing.assert_close(out[:, :, rows], truth[:, :, rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("running_max", ["ascending", "seeded"])
@pytest.mark.parametrize("window", [None, 70], ids=["full", "window"])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 1)], ids=["mha", "gqa3", "gqa8"])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 127), (3, 200), (4, 129)])
def test_decode_equals_the_loop(
    tokens: int, length: int, heads: tuple[int, int], window: int | None, running_max: str
) -> None:
    q, k, v = graded(*heads, tokens, length)
    factor = min(20.0, 0.9 * (length - tokens + 1))
    expected, visited, skipped, _ = loop(
        q[0],
        k[0],
        v[0],
        factor,
        causal=True,
        window=window,
        tile_q=1,
        tile_kv=16,
        decode=True,
        seeded=running_max == "seeded",
    )
    out, stats = ss.decode_attention(
        q,
        k,
        v,
        scale_factor=factor,
        window=window,
        tile_kv=16,
        running_max=running_max,
        return_stats=True,
    )
    torch.testing.assert_close(out[0], expected, atol=1e-12, rtol=0)
    assert (int(stats.visited.sum()), int(stats.skipped.sum())) == (visited, skipped)
    if length >= 127 and window is None:
        assert skipped > 0, "the planted input must skip something, or this test shows nothing"


def test_a_run_of_tokens_equals_one_token_at_a_time() -> None:
    q, k, v = graded(6, 2, 5, 150)
    together, stats = ss.decode_attention(q, k, v, scale_factor=30.0, tile_kv=16, return_stats=True)
    skipped = torch.zeros_like(stats.skipped)
    for t in range(5):
        seen = 150 - 5 + t + 1
        alone, one = ss.decode_attention(
            q[:, :, t],
            k[:, :, :seen],
            v[:, :, :seen],
            scale_factor=30.0,
            tile_kv=16,
            return_stats=True,
        )
        torch.testing.assert_close(alone, together[:, :, t], atol=1e-12, rtol=0)
        skipped += one.skipped
    assert torch.equal(skipped, stats.skipped)
    assert int(skipped.sum()) > 0


def test_paged_cache_equals_contiguous() -> None:
    q, k, v = graded(4, 2, 1, 160)
    pages = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    paged = [torch.zeros(10, 2, 16, 16, dtype=torch.float64) for _ in range(2)]
    for cache, whole in zip(paged, (k, v), strict=True):
        cache[pages] = whole[0].view(2, 10, 16, 16).transpose(0, 1)
    expected = ss.decode_attention(q[:, :, 0], k, v, [150], scale_factor=40.0, tile_kv=16)
    table = torch.cat([pages, torch.tensor([-1])])[None]
    got = ss.decode_attention(
        q[:, :, 0], *paged, [150], block_table=table, scale_factor=40.0, tile_kv=16
    )
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_ragged_batch_equals_one_request_at_a_time() -> None:
    q, k, v = (torch.cat([t, t.flip(2)]) for t in graded(4, 2, 100, 120))
    q_lens, kv_lens = [100, 37], [120, 90]
    out, stats = ss.attention(
        q,
        k,
        v,
        scale_factor=25.0,
        tile_q=16,
        tile_kv=16,
        q_lens=q_lens,
        kv_lens=kv_lens,
        return_stats=True,
    )
    for b, (nq, nk) in enumerate(zip(q_lens, kv_lens, strict=True)):
        alone, one = ss.attention(
            q[b : b + 1, :, :nq],
            k[b : b + 1, :, :nk],
            v[b : b + 1, :, :nk],
            scale_factor=25.0,
            tile_q=16,
            tile_kv=16,
            return_stats=True,
        )
        torch.testing.assert_close(out[b : b + 1, :, :nq], alone, atol=1e-12, rtol=0)
        assert torch.equal(stats.skipped[b], one.skipped[0])
    assert bool((out[1, :, 37:] == 0).all())


def test_a_cache_without_its_first_keys_keeps_absolute_tiles() -> None:
    """A sliding cache holds the last keys only; tiles still begin at multiples of tile_kv."""
    q, k, v = graded(2, 1, 1, 200)
    whole, stats = ss.decode_attention(
        q, k, v, scale_factor=30.0, window=70, tile_kv=16, return_stats=True
    )
    held, fewer = ss.decode_attention(
        q,
        k[:, :, 125:],
        v[:, :, 125:],
        scale_factor=30.0,
        window=70,
        tile_kv=16,
        kv_start=125,
        return_stats=True,
    )
    torch.testing.assert_close(held, whole, atol=1e-12, rtol=0)
    assert torch.equal(stats.visited, fewer.visited)
    assert torch.equal(stats.skipped, fewer.skipped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_low_precision_pytorch(dtype: torch.dtype) -> None:
    q, k, v = graded(4, 2, 129, 129, dtype=dtype)
    exact, *_ = loop(q[0], k[0], v[0], 0.0, causal=True, window=None, tile_q=16, tile_kv=16)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    theirs = (plain[0].double() - exact).abs().max()
    ours = (ss.attention(q, k, v)[0].double() - exact).abs().max()
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert ours <= 2 * theirs + rounding


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_zero_is_bit_identical_to_dense(dtype: torch.dtype) -> None:
    q, k, v = graded(4, 2, 200, 200, dtype=dtype)
    dense = ss.attention(q, k, v, tile_q=16, tile_kv=16)
    factors = torch.tensor([0.0, 60.0, 0.0, 60.0])
    some_heads = ss.attention(q, k, v, tile_q=16, tile_kv=16, scale_factor=factors)
    assert torch.equal(ss.attention(q, k, v, tile_q=16, tile_kv=16, scale_factor=0.0), dense)
    assert torch.equal(some_heads[:, [0, 2]], dense[:, [0, 2]])
    assert not torch.equal(some_heads[:, [1, 3]], dense[:, [1, 3]])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_request_without_keys_is_empty_and_no_reason_to_warn(phase: str) -> None:
    q, k, v = graded(2, 1, 1 if phase == "decode" else 100, 100)
    q, k, v = (torch.cat([x, x]) for x in (q, k, v))
    run = ss.decode_attention if phase == "decode" else ss.attention
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, stats = run(q, k, v, kv_lens=[100, 0], scale_factor=5.0, return_stats=True)
    assert (out[1] == 0).all() and stats.visited[0].sum() > 0 == stats.visited[1].sum()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_threshold_of_one_or_more_runs_dense_with_one_warning(phase: str) -> None:
    q, k, v = graded(2, 1, 1 if phase == "decode" else 100, 100)
    run = ss.decode_attention if phase == "decode" else ss.attention
    dense = run(q, k, v)
    for factor in (100.0, 1e6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out, stats = run(q, k, v, scale_factor=factor, return_stats=True)
        assert [w.category for w in caught] == [ss.DenseCallWarning]
        assert "kv_len=100" in str(caught[0].message)
        assert torch.equal(out, dense)
        assert int(stats.skipped.sum()) == 0


def test_padding_rows_never_vote() -> None:
    """Rows beyond q_len hold huge queries that would veto every skip if they voted."""
    q, k, v = graded(2, 1, 40, 140)
    padded = torch.cat([q, torch.full_like(q[:, :, :24], 1e3)], dim=2)
    _, alone = ss.attention(q, k, v, scale_factor=40.0, tile_q=64, tile_kv=16, return_stats=True)
    _, stats = ss.attention(
        padded, k, v, scale_factor=40.0, tile_q=64, tile_kv=16, q_lens=[40], return_stats=True
    )
    assert torch.equal(alone.skipped, stats.skipped)
    assert int(alone.skipped.sum()) > 0


@pytest.mark.parametrize("factor", [0.0, 5.0, 150.0, 500.0])
def test_no_probability_reaches_a_future_token(factor: float) -> None:
    q, k, v = graded(2, 1, 200, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ss.DenseCallWarning)
        before = ss.attention(q, k, v, scale_factor=factor, tile_q=16, tile_kv=16)
        changed = v.clone()
        changed[:, :, 120:] = 1e9
        after = ss.attention(q, k, changed, scale_factor=factor, tile_q=16, tile_kv=16)
    assert torch.equal(before[:, :, :120], after[:, :, :120])


def test_skipped_tiles_grow_with_the_scale_factor() -> None:
    q, k, v = graded(4, 2, 300, 300)
    counts = [
        int(
            ss.attention(q, k, v, scale_factor=f, tile_q=16, tile_kv=16, return_stats=True)[
                1
            ].skipped.sum()
        )
        for f in (0.0, 10.0, 25.0, 50.0, 100.0, 299.0)
    ]
    assert counts == sorted(counts)
    assert counts[-1] > counts[1] > counts[0] == 0


def test_decode_is_the_last_row_of_prefill_for_one_head() -> None:
    q, k, v = graded(1, 1, 64, 200)
    decode = ss.decode_attention(q[:, :, -1], k, v, scale_factor=20.0, tile_kv=16)
    prefill = ss.attention(q[:, :, -1:], k, v, scale_factor=20.0, tile_q=16, tile_kv=16)
    torch.testing.assert_close(decode, prefill[:, :, 0], atol=1e-12, rtol=0)


def test_tile_gaps_are_the_loops() -> None:
    q, k, _ = graded(3, 1, 100, 130)
    gaps = ss.tile_gaps(q, k, tile_q=32, tile_kv=16)
    *_, critical = loop(q[0], k[0], k[0], 0.0, causal=True, window=None, tile_q=32, tile_kv=16)
    visited = gaps[0] > -torch.inf
    ours = torch.where(gaps[0][visited] >= 0, torch.inf, 130 * torch.exp(gaps[0][visited]))
    torch.testing.assert_close(
        ours, torch.tensor(critical, dtype=torch.float64), atol=0, rtol=1e-12
    )
    assert bool((gaps[0, :, :, 0] == torch.inf).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": -1.0}, "`scale_factor` must be finite and at least 0, but got -1.0"),
        ({"scale_factor": math.nan}, "`scale_factor` must be finite and at least 0, but got nan"),
        ({"scale_factor": torch.ones(3)}, r"a number or a tensor \[4\] \(one per query head\)"),
        ({"tile_q": 48}, "`tile_q` must be a power of two, but got 48"),
        ({"window": 0}, "`window` must be at least 1, but got 0"),
        ({"dense_last": -1}, "`dense_last` must be at least 0, but got -1; pass 0"),
        ({"kv_lens": [201]}, r"`kv_lens` must be 1 numbers from 0 to 200, but got \[201\]"),
        ({"backend": "fast"}, "backend must be auto, reference, triton or hopper, but got 'fast'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    q, k, v = graded(4, 2, 200, 200)
    with pytest.raises(ValueError, match=message):
        ss.attention(q, k, v, **changes)  # type: ignore[call-overload]


def test_decode_has_no_dense_rows() -> None:
    q, k, v = graded(4, 2, 1, 20)
    with pytest.raises(ValueError, match=r"`dense_last` must be 0 in decode.* but got 64; pass 0"):
        ss.tile_statistics(q, k, v, decode=True, dense_last=64)


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = graded(4, 2, 20, 20)
    with pytest.raises(
        ValueError, match="query heads must be a multiple of KV heads, but got 3 and 2"
    ):
        ss.attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="must share one floating dtype"):
        ss.attention(q.float(), k, v)
    with pytest.raises(ValueError, match="a paged cache needs `kv_lens`"):
        ss.decode_attention(q[:, :, 0], k, v, block_table=torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.parametrize("length", [1500, 3000, 6000])
def test_memory_grows_with_the_length_and_not_with_its_square(length: int) -> None:
    """Scores held at once stay within a fixed number, or one row of tiles where even that is more."""
    q, k, _ = graded(2, 1, length, length, dim=4, dtype=torch.float32)
    call = Call(length, length, 2, 1, 4, 4, torch.float32, 0.5, 64, 128)
    held = [block.scores.numel() for block in reference.blocks(q[0], k[0], call)]
    assert max(held) <= max(reference._BLOCK_ELEMENTS, 2 * 64 * (length + 128)) * 1.1
    assert sum(held) >= length * length, "every pair was looked at"


def test_autocast_does_not_lower_the_precision() -> None:
    q, k, v = graded(4, 2, 200, 200, dtype=torch.float32)
    keywords = {"tile_q": 16, "tile_kv": 16, "backend": "reference"}
    out, stats = ss.attention(q, k, v, scale_factor=60.0, return_stats=True, **keywords)
    gaps = ss.tile_gaps(q, k, **keywords)
    with torch.autocast("cpu", torch.bfloat16):
        lowered, same = ss.attention(q, k, v, scale_factor=60.0, return_stats=True, **keywords)
        assert torch.equal(gaps, ss.tile_gaps(q, k, **keywords))
    assert torch.equal(out, lowered) and torch.equal(stats.skipped, same.skipped)
    assert stats.skipped.sum() > 0


@pytest.mark.parametrize("heads, head_dim", [(0, 16), (2, 0)])
def test_no_heads_and_no_head_dim_are_named(heads: int, head_dim: int) -> None:
    x = torch.zeros(1, heads, 5, head_dim)
    with pytest.raises(ValueError, match="heads and head_dim must be above 0"):
        ss.attention(x, x, x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": "580"}, r"a number or a tensor \[2\] .*, but got '580'; 0 means dense"),
        ({"kv_lens": 20}, r"`kv_lens` must be a list or a tensor .* but got 20; pass \[20\]"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(changes: dict[str, object], message: str) -> None:
    q, k, v = graded(2, 1, 20, 20)
    with pytest.raises(TypeError, match=message):
        ss.attention(q, k, v, **changes)  # type: ignore[call-overload]
