"""The decode kernel against the reference: on a CPU through Triton's interpreter, on a GPU as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from planting import DEVICE, DTYPES, Planted, assert_accurate, call_alone, expected, paged, plant

import skip_softmax as ss
from skip_softmax import api

pytest.importorskip("triton")
from skip_softmax.launch import Device
from skip_softmax.triton import decode, decode_kernel

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def planned_anew() -> Iterator[None]:
    """A plan outlives what a test changes."""
    decode._plans.clear()
    yield
    decode._plans.clear()


@pytest.fixture(params=[False, True], ids=["waits", "ahead"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """V loaded where it is used, and ahead of it; the splits joined in several ways too."""
    config = decode.AHEAD._replace(ahead=request.param)
    if request.param:
        config = config._replace(join=4, join_columns=16)
    monkeypatch.setattr(decode, "AHEAD", config)


def split_into(splits: int, monkeypatch: pytest.MonkeyPatch, *, batch_heads: int = 1) -> None:
    """Lets each request of the next calls have so many programs, however few tiles."""
    programs = splits * batch_heads
    on = Device(9, processors=programs, on_cpu=DEVICE == "cpu")
    monkeypatch.setattr(decode, "device_of", lambda of: on)
    monkeypatch.setattr(decode, "LEAST_TILES", 1)
    for name in ("AHEAD", "AHEAD_SMALL", "LATE", "LATE_MANY"):
        monkeypatch.setattr(decode, name, getattr(decode, name)._replace(per_processor=1))


def planted(*, tokens: int = 1, kv_len: int = 500, tile_kv: int = 32, **keywords: Any) -> Planted:
    return plant(q_len=tokens, kv_len=kv_len, tile_q=1, tile_kv=tile_kv, **keywords)


def check(
    p: Planted,
    *,
    tile_kv: int = 32,
    window: int | None = None,
    running_max: str = "seeded",
    scale_factor: float | None = None,
    kv_lens: list[int] | None = None,
    page: int = 0,
    tile_heads: int | None = None,
) -> tuple[torch.Tensor, ss.TileCounts]:
    factor = p.scale_factor if scale_factor is None else scale_factor
    k, v, table = paged(p, page) if page else (p.k, p.v, None)
    if p.v.data_ptr() == p.k.data_ptr():  # in pages, too, values are columns of their keys
        v = k[..., : v.shape[-1]]
    tokens = p.q.shape[2]
    if page and kv_lens is None:
        kv_lens = [p.k.shape[2]] * p.q.shape[0]
    out, stats = ss.decode_attention(
        p.q, k, v, kv_lens, scale_factor=factor, block_table=table, window=window, tile_kv=tile_kv,
        running_max=running_max, tile_heads=tile_heads, backend="triton", return_stats=True,
    )  # fmt: skip
    for b in range(p.q.shape[0]):
        kv_len = p.k.shape[2] if kv_lens is None else kv_lens[b]
        call = call_alone(
            p, tokens, kv_len, tile_q=None, tile_kv=tile_kv, window=window, running_max=running_max,
            tile_heads=tile_heads,
        )  # fmt: skip
        _, visited, skipped = expected(p, call, b, factor)
        assert stats.visited[b].tolist() == visited.tolist()
        assert stats.skipped[b].tolist() == skipped.tolist()
        if kv_len:
            assert_accurate(out[b], p, call, b, factor)
    return out, stats


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("running_max", ["seeded", "ascending"])
@pytest.mark.parametrize("kv_len", [1, 63, 129, 500])
def test_output_and_decisions_match_the_reference(
    kv_len: int, running_max: str, dtype: torch.dtype
) -> None:
    _, stats = check(planted(kv_len=kv_len, dtype=dtype), running_max=running_max)
    assert kv_len < 129 or stats.skipped.sum() > 0


def test_skipped_tiles_are_the_planted_ones() -> None:
    p = planted(kv_len=512)
    _, stats = check(p)
    middle = p.quiet[0, 0, 0, 1:-1]  # the first and the last tile are never skipped
    assert stats.skipped.tolist() == [[middle.sum().item()]]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("running_max", ["seeded", "ascending"])
@pytest.mark.parametrize("tokens, window", [(2, None), (4, None), (3, 100), (4, 33)])
def test_runs_of_tokens_vote_one_by_one(tokens: int, window: int | None, running_max: str) -> None:
    check(planted(tokens=tokens, kv_len=330), window=window, running_max=running_max)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (8, 1), (6, 2)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    check(planted(heads=heads, kv_heads=kv_heads, kv_len=200, tokens=2))


def in_parts(p: Planted) -> Planted:
    """One token whose query heads are the tokens of `p`: a part of them for each kind of planted tiles."""
    q = p.q.transpose(1, 2).flatten(1, 2)[:, :, None]
    return replace(p, q=q)


def latent(p: Planted, value_dim: int) -> Planted:
    """Values that are the first columns of their keys."""
    return replace(p, v=p.k[..., :value_dim])


@pytest.mark.parametrize("kv_heads, running_max", [(1, "seeded"), (2, "ascending")])
def test_parts_of_a_kv_head_vote_apart(kv_heads: int, running_max: str) -> None:
    p = in_parts(planted(tokens=4, heads=2, kv_heads=1, kv_len=288))
    if kv_heads == 2:  # two of the four parts belong to either
        p = replace(p, k=p.k.repeat(1, 2, 1, 1), v=p.v.repeat(1, 2, 1, 1))
    _, stats = check(p, tile_heads=2, running_max=running_max)
    assert (stats.skipped[0] > 0).all()
    if running_max == "seeded":
        assert stats.skipped[0].tolist() == p.quiet[0, 0, :, 1:-1].sum(-1).tolist()
    _, together = check(p, running_max=running_max)
    assert together.skipped.sum() * 8 < stats.skipped.sum() * p.q.shape[1]
    factors = torch.tensor([0.0, p.scale_factor, 0.0, p.scale_factor], device=DEVICE)
    _, some = ss.decode_attention(
        p.q, p.k, p.v, scale_factor=factors, tile_heads=2, tile_kv=32, running_max=running_max,
        backend="triton", return_stats=True,
    )  # fmt: skip
    assert torch.equal(some.skipped, stats.skipped * (factors > 0))


@pytest.mark.parametrize(
    "page, splits, aliased",
    [
        (0, 3, True), (16, 1, True), (64, 1, False),
        *(pytest.param(*case, marks=pytest.mark.gpu) for case in ((16, 3, False), (64, 3, True))),
    ],
)  # fmt: skip
def test_a_latent_cache(
    page: int, splits: int, aliased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are columns of their keys, whose head_dim comes in two pieces."""
    split_into(splits, monkeypatch, batch_heads=4)
    p = planted(tokens=2, batch=2, heads=2, kv_len=200, head_dim=48, dtype=torch.float16)
    p = latent(in_parts(p), 32)
    if not aliased:
        p = replace(p, v=p.v.clone())
    out, stats = check(p, page=page, tile_heads=2, kv_lens=[200, 77])
    assert (stats.skipped[0] > 0).all() and out.shape[-1] == 32
    if page == 16:
        check(p, page=page, running_max="ascending")
    else:
        check(p, page=page, scale_factor=0.0, window=40)


@pytest.mark.parametrize("page", [0, 16])
def test_the_latent_cache_of_deepseek(page: int) -> None:
    p = planted(tokens=2, heads=8, kv_len=100, head_dim=576, dtype=torch.float16)
    _, stats = check(latent(in_parts(p), 512), tile_heads=8, page=page)
    assert (stats.skipped > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("page", [0, 16, 64])
@pytest.mark.parametrize("tile_heads", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_latent_caches(dtype: torch.dtype, tile_heads: int, page: int) -> None:
    p = planted(
        batch=3, tokens=4, heads=32, kv_len=5003, head_dim=576, tile_kv=64, dtype=dtype
    )  # 128 heads, 32 of each kind
    p = latent(in_parts(p), 512)
    for armed in (True, False):
        _, stats = check(
            p, tile_kv=64, tile_heads=tile_heads, page=page, kv_lens=[5003, 70, 2500],
            scale_factor=p.scale_factor if armed else 0.0,
        )  # fmt: skip
        assert armed == bool((stats.skipped[0] > 0).all())
    apart = replace(p, v=p.v.clone())
    check(apart, tile_kv=64, tile_heads=tile_heads, page=page, kv_lens=[5003, 70, 2500])
    call = {"scale_factor": p.scale_factor, "tile_heads": tile_heads, "running_max": "seeded"}
    one = [ss.decode_attention(p.q, p.k, p.v, backend="triton", **call) for _ in range(20)]
    assert all(torch.equal(one[0], again) for again in one)


@pytest.mark.parametrize(
    "heads, kv_heads, change, words",
    [
        (128, 1, {}, r"128 rows per vote .* more than 64; let fewer heads vote together"),
        (4, 4, {"tile_heads": 2}, "votes of 2 query heads span KV heads, of 1 each"),
        (16, 1, {"tile_kv": 256}, "a tile of 256 keys of 576 columns and 16 queries take 314 KiB"),
        (16, 1, {"dtype": torch.float32}, "head_dim 576 in torch.float32 is above 256"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    heads: int, kv_heads: int, change: dict[str, Any], words: str
) -> None:
    dtype = change.pop("dtype", torch.float16)
    k = torch.zeros(1, kv_heads, 70, 576, dtype=dtype, device=DEVICE)
    q = torch.zeros(1, heads, 576, dtype=dtype, device=DEVICE)
    with pytest.raises(NotImplementedError, match=words):
        ss.decode_attention(q, k, k[..., :512], backend="triton", **change)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    check(planted(head_dim=head_dim, kv_len=200))


@pytest.mark.parametrize("tile_kv", [16, 64, 128, 256])
def test_tiles(tile_kv: int) -> None:
    check(planted(tile_kv=tile_kv, kv_len=700), tile_kv=tile_kv)


@pytest.mark.parametrize("armed", [True, False])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize(
    "head_dim, tile_kv, dtype",
    [
        (64, 256, torch.float32),
        (128, 64, torch.float32),
        (128, 128, torch.float32),
        (128, 256, torch.float16),
        (256, 128, torch.float16),
    ],
    ids=str,
)
def test_the_largest_tiles_fit_shared_memory(
    head_dim: int, tile_kv: int, dtype: torch.dtype, tokens: int, armed: bool
) -> None:
    p = planted(
        tokens=tokens, heads=4, kv_len=2 * tile_kv + 60, head_dim=head_dim, tile_kv=tile_kv, dtype=dtype
    )  # fmt: skip
    check(p, tile_kv=tile_kv, scale_factor=p.scale_factor if armed else 0.0)


@pytest.mark.usefixtures("both_ways")
def test_pages_equal_a_contiguous_cache() -> None:
    p = planted(batch=2, heads=4, kv_heads=2, kv_len=170, tokens=2)
    flat, counted = check(p, kv_lens=[170, 77])
    assert counted.skipped.sum() > 0
    for page in (16, 32, 64, 128):
        out, stats = check(p, page=page, kv_lens=[170, 77])
        torch.testing.assert_close(out, flat)  # the splits may differ
        assert torch.equal(stats.skipped, counted.skipped)


@pytest.mark.usefixtures("both_ways")
def test_ragged_requests_equal_each_one_alone() -> None:
    p = planted(batch=4, heads=4, kv_heads=2, kv_len=230)
    kv_lens = [230, 0, 33, 160]
    for b, n in enumerate(kv_lens):
        p.k[b, :, n:] = torch.nan  # what a cache holds behind its end
        p.v[b, :, n:] = torch.nan
    out, stats = check(p, kv_lens=kv_lens)
    assert (out[1] == 0).all() and stats.visited[1].sum() == 0
    for b, n in enumerate(kv_lens):
        if n:
            alone, counted = ss.decode_attention(
                p.q[b : b + 1], p.k[b : b + 1, :, :n], p.v[b : b + 1, :, :n],
                scale_factor=p.scale_factor,
                tile_kv=32, running_max="seeded", backend="triton", return_stats=True,
            )  # fmt: skip
            assert counted.skipped[0].tolist() == stats.skipped[b].tolist()
            torch.testing.assert_close(alone[0], out[b])


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("splits", [1, 2, 5, 16])
def test_decisions_do_not_depend_on_the_number_of_splits(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(splits, monkeypatch)
    check(planted(kv_len=500, tokens=2))
    check(planted(kv_len=500, tokens=2), kv_lens=[500])


@pytest.mark.parametrize("page, window", [(0, None), (16, 150)])
def test_a_mixed_batch_shares_the_programs(
    page: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 16, 0, 1, 3 and 10 tiles (5, 0, 1, 3 and 5 in the window) of 9 programs: some requests have several and
    # are joined, others have one that writes by itself.
    split_into(9, monkeypatch)
    p = planted(batch=5, heads=3, kv_len=500, tokens=2)
    _, stats = check(p, page=page, window=window, kv_lens=[500, 0, 20, 96, 300])
    assert stats.skipped.sum() > 0


@pytest.mark.usefixtures("both_ways")
def test_zero_is_bit_identical_to_the_kernel_without_skipping() -> None:
    p = planted(kv_len=500, heads=4, kv_heads=2)
    keywords = {"tile_kv": 32, "running_max": "seeded", "backend": "triton"}
    dense = ss.decode_attention(p.q, p.k, p.v, **keywords)
    zeros = torch.zeros(2, device=DEVICE)  # not known on the host: the kernel that may skip runs
    assert torch.equal(dense, ss.decode_attention(p.q, p.k, p.v, scale_factor=zeros, **keywords))


def test_loading_ahead_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    p = planted(batch=2, heads=4, kv_heads=2, kv_len=300, tokens=2)
    call = {"scale_factor": p.scale_factor, "tile_kv": 32, "running_max": "seeded"}
    split_into(5, monkeypatch, batch_heads=4)
    found = []
    for ahead in (False, True):
        monkeypatch.setattr(decode, "AHEAD", decode.AHEAD._replace(ahead=ahead))
        decode._plans.clear()
        found.append(
            ss.decode_attention(p.q, p.k, p.v, backend="triton", return_stats=True, **call)
        )
    (out, counts), (other, others) = found
    assert torch.equal(counts.skipped, others.skipped) and counts.skipped.sum() > 0
    assert torch.equal(out, other)


@pytest.mark.parametrize("page", [0, 16, 64])
def test_many_small_tiles_take_more_programs(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(batch_heads: int, tile_bytes: int) -> Any:
        return decode.choose(batch_heads, 128, 132, 16, tile_bytes, ahead=True, paged=page > 0)[0]

    assert chosen(512, 2**14) == decode.AHEAD_SMALL
    assert chosen(512, 2**15) == chosen(3, 2**14) == decode.AHEAD
    monkeypatch.setattr(decode, "MANY_TILES", 0)
    p = planted(batch=2, heads=4, kv_heads=2, kv_len=500, tile_kv=64, head_dim=64)
    _, stats = check(p, tile_kv=64, page=page)
    assert 0 < stats.skipped.sum() < stats.visited.sum()


@pytest.mark.parametrize(
    "change, ahead",
    [
        ({}, True),
        ({"scale_factor": 0.0}, True),
        ({"tokens": 16, "heads": 4}, False),  # 64 rows: Triton 3.6 aborts on such a product
        ({"tile_kv": 256, "head_dim": 64}, False),  # more shared memory than there may be
        ({"running_max": "ascending"}, False),
    ],
)
def test_v_is_loaded_ahead_where_that_compiles(
    change: dict[str, Any], ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Launched:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **keywords: seen.append(keywords)

    monkeypatch.setattr(decode_kernel, "_decode", Launched())
    monkeypatch.setattr(decode_kernel, "_combine", Launched())
    shape = {k: v for k, v in change.items() if k in ("tokens", "heads", "tile_kv", "head_dim")}
    p = planted(**{"tile_kv": 32, "kv_len": 600, **shape})
    keywords = {"scale_factor": p.scale_factor, "running_max": "seeded", **change}
    keywords = {
        k: v for k, v in keywords.items() if k in ("scale_factor", "running_max", "tile_kv")
    }
    ss.decode_attention(p.q, p.k, p.v, backend="triton", **{"tile_kv": 32, **keywords})
    assert seen[0]["AHEAD"] == ahead


@pytest.mark.usefixtures("both_ways")
def test_one_number_per_kv_head() -> None:
    p = planted(heads=4, kv_heads=2, kv_len=300)
    factors = torch.tensor([0.0, p.scale_factor], device=DEVICE)
    _, stats = ss.decode_attention(
        p.q, p.k, p.v, scale_factor=factors, tile_kv=32, backend="triton", return_stats=True
    )
    assert stats.skipped[0, 0] == 0 < stats.skipped[0, 1]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("running_max", ["seeded", "ascending"])
def test_a_token_that_sees_fewer_keys_than_min_kv_len_skips_nothing(
    running_max: str, backend: str
) -> None:
    p = planted(batch=3, heads=2, kv_len=250, tokens=3)
    call = {
        "scale_factor": p.scale_factor,
        "tile_kv": 32,
        "running_max": running_max,
        "backend": backend,
    }
    lengths, kept = [250, 200, 199], {"kv_lens": [250, 200, 199], **call, "return_stats": True}
    dense = ss.decode_attention(
        p.q, p.k, p.v, **{**kept, "scale_factor": torch.zeros(1, device=DEVICE)}
    )
    armed = ss.decode_attention(p.q, p.k, p.v, **kept)
    # The tokens of the requests see 248 to 250, 198 to 200 and 197 to 199 keys.
    found = ss.decode_attention(p.q, p.k, p.v, min_kv_len=200, **kept)
    assert torch.equal(found[0][0], armed[0][0]) and torch.equal(found[0][2], dense[0][2])
    assert torch.equal(found[0][1, :, :2], dense[0][1, :, :2])
    assert torch.equal(found[0][1, :, 2], armed[0][1, :, 2])
    assert not torch.equal(found[0][1, :, 2], dense[0][1, :, 2])
    assert torch.equal(found[1].visited, dense[1].visited)
    assert torch.equal(found[1].skipped[0], armed[1].skipped[0]) and not found[1].skipped[2].any()
    last = ss.decode_attention(
        p.q[1:2, :, 2:], p.k[1:2], p.v[1:2], **{**kept, "kv_lens": lengths[1:2]}
    )
    assert torch.equal(found[1].skipped[1], last[1].skipped[0]) and last[1].skipped.all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_out_is_written_and_counts_grow(backend: str) -> None:
    p = planted(batch=3, heads=4, kv_heads=2, kv_len=170)
    call = {
        "scale_factor": p.scale_factor,
        "tile_kv": 32,
        "running_max": "seeded",
        "backend": backend,
    }
    true, stats = ss.decode_attention(p.q, p.k, p.v, [170, 0, 90], return_stats=True, **call)
    total = torch.stack([stats.visited.sum(0), stats.skipped.sum(0)], 1)
    assert (total > 0).all() and (stats.visited[1] == 0).all()
    counts = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    held = torch.full((3, 2, 4, 40), 7.0, device=DEVICE)  # a slice of a layer's wider output
    out = held[:, 1, :, 4:36]
    for calls in (1, 2):
        found = ss.decode_attention(
            p.q[:, :, 0], p.k, p.v, [170, 0, 90], out=out, counts=counts, **call
        )
        assert found is out and torch.equal(out, true[:, :, 0])
        assert torch.equal(counts, calls * total)
    out.fill_(7.0)
    assert (held == 7.0).all()  # nothing beside it was written
    both = ss.decode_attention(
        p.q, p.k, p.v, [170, 0, 90], counts=counts, return_stats=True, **call
    )
    assert torch.equal(both[1].skipped, stats.skipped) and torch.equal(counts, 3 * total)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("running_max", ["seeded", "ascending"])
def test_padding_requests_give_zeros_and_read_nothing(running_max: str, backend: str) -> None:
    p = planted(batch=3, heads=4, kv_heads=2, kv_len=200, tokens=2)
    k, v, table = paged(p, 16)
    k[table[1]], v[table[1]] = torch.nan, torch.nan
    table[0], table[1] = 10**9, -5
    counts = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    call = {
        "block_table": table, "tile_kv": 32, "running_max": running_max, "backend": backend,
        "scale_factor": torch.full((2,), p.scale_factor, device=DEVICE),
    }  # fmt: skip
    lengths = torch.tensor([0, 0, 200], device=DEVICE)
    out = ss.decode_attention(p.q, k, v, lengths, counts=counts, **call)
    assert (out[:2] == 0).all()
    alone = {**call, "block_table": table[2:], "return_stats": True}
    true, stats = ss.decode_attention(p.q[2:], k, v, lengths[2:], **alone)
    torch.testing.assert_close(out[2:], true)
    assert torch.equal(counts, torch.stack([stats.visited[0], stats.skipped[0]], 1))


@pytest.mark.parametrize(
    "keyword, wrong, law",
    [
        ("out", torch.zeros(1, 4, 1, 16), r"`out` must be torch.float32 \(1, 4, 1, 32\)"),
        ("out", torch.zeros(1, 4, 1, 32).half(), "`out` must be torch.float32"),
        ("out", torch.zeros(1, 4, 1, 64)[..., ::2], "last stride of 1"),
        ("counts", torch.zeros(1, 2, 2).long(), r"`counts` must be contiguous int64 \(2, 2\)"),
        ("counts", torch.zeros(2, 2), "but got torch.float32"),
        ("min_kv_len", -1, "`min_kv_len` must be at least 0, but got -1"),
    ],
)
def test_what_cannot_take_the_result_is_refused(keyword: str, wrong: Any, law: str) -> None:
    p = planted(heads=4, kv_heads=2, kv_len=40, device="cpu")
    with pytest.raises(ValueError, match=law):
        ss.decode_attention(p.q, p.k, p.v, backend="reference", **{keyword: wrong})


def test_out_takes_no_gradients() -> None:
    p = planted(kv_len=40)
    q = p.q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="takes no gradients"):
        ss.decode_attention(q, p.k, p.v, out=torch.empty_like(p.q))
    with torch.no_grad():
        ss.decode_attention(q, p.k, p.v, out=torch.empty_like(p.q))


def test_a_call_is_asked_about_once_and_every_option_is_a_question() -> None:
    p = planted(heads=4, kv_heads=2, kv_len=200)
    call = {"scale_factor": p.scale_factor, "tile_kv": 32, "backend": "triton"}
    changes: list[dict[str, Any]] = [
        {}, {"window": 50}, {"scale": 0.5}, {"tile_kv": 64}, {"running_max": "seeded"}, {"min_kv_len": 201},
    ]  # fmt: skip
    api._asked.clear()
    alone = []
    for change in changes:
        alone.append(ss.decode_attention(p.q, p.k, p.v, **{**call, **change}))
        api._asked.clear()
    for known in (range(1, len(changes) + 1), [len(changes)] * len(changes)):
        for change, true, count in zip(changes, alone, known, strict=True):
            assert torch.equal(ss.decode_attention(p.q, p.k, p.v, **{**call, **change}), true)
            assert len(api._asked) == count
    assert len({out.sum().item() for out in alone}) > 4  # the options matter
    wide = torch.empty(1, 4, 1, 64, device=DEVICE)[..., ::2].copy_(p.q)
    assert torch.equal(ss.decode_attention(wide, p.k, p.v, **call), alone[0])
    for wrong in (p.q[:, :3], p.q.half(), p.q[..., :16]):
        with pytest.raises(ValueError):
            ss.decode_attention(wrong, p.k, p.v, **call)
    with pytest.raises(NotImplementedError):
        ss.decode_attention(p.q, p.k, p.v, **{**call, "tile_kv": 8})


def test_queries_without_a_token_dimension() -> None:
    p = planted(kv_len=200)
    keywords = {"scale_factor": p.scale_factor, "tile_kv": 32, "backend": "triton"}
    out = ss.decode_attention(p.q[:, :, 0], p.k, p.v, **keywords)
    assert torch.equal(out, ss.decode_attention(p.q, p.k, p.v, **keywords)[:, :, 0])


def test_torch_compile_sees_one_graph() -> None:
    p = planted(batch=2, kv_len=200)
    k, v, table = paged(p, 32)
    kv_lens = torch.tensor([200, 100], dtype=torch.int32, device=DEVICE)

    def call(q: torch.Tensor, lengths: torch.Tensor, **more: Any):
        return ss.decode_attention(
            q,
            k,
            v,
            lengths,
            scale_factor=0.05,
            block_table=table,
            tile_kv=32,
            backend="triton",
            **more,
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    true = call(p.q, kv_lens)
    assert torch.equal(compiled(p.q, kv_lens), true)
    out = torch.zeros_like(p.q)
    counts = torch.full((1, 2), 10, dtype=torch.int64, device=DEVICE)
    compiled(p.q, kv_lens, out=out, counts=counts)
    assert torch.equal(out, true) and counts[0, 0] == 10 + 7 + 4
    for tally in (None, counts):
        torch.library.opcheck(
            torch.ops.skip_softmax.decode.default,
            (
                p.q,
                k,
                v,
                out,
                tally,
                kv_lens,
                table.int(),
                0.05,
                None,
                0.2,
                None,
                32,
                True,
                100,
                *[None] * 5,
            ),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokens": 17}, "17 query tokens"),
        ({"heads": 256, "kv_len": 8}, "256 rows per vote of heads"),
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"head_dim": 256, "tile_kv": 128}, "128 x 256 numbers of torch.float32"),
        ({"head_dim": 128, "tile_kv": 128, "heads": 128}, "256 x 128 numbers of torch.float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    p = planted(**{"kv_len": 40, **change})
    with pytest.raises(NotImplementedError, match=words):
        ss.decode_attention(p.q, p.k, p.v, tile_kv=change.get("tile_kv", 64), backend="triton")


@pytest.mark.usefixtures("both_ways")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page", [0, 16, 128])
def test_long_caches(page: int, dtype: torch.dtype) -> None:
    p = planted(
        batch=3, heads=16, kv_heads=2, kv_len=9001, head_dim=128, tile_kv=64, dtype=dtype, tokens=2
    )
    check(p, tile_kv=64, page=page, kv_lens=[9001, 5000, 64])
    check(p, tile_kv=64, page=page, window=2000, running_max="ascending")


@pytest.mark.usefixtures("both_ways")
@pytest.mark.gpu
def test_128k_tokens() -> None:
    p = planted(heads=16, kv_heads=1, kv_len=131072, head_dim=128, tile_kv=64, dtype=torch.bfloat16)
    _, stats = check(p, tile_kv=64)
    assert 0.5 < (stats.skipped.sum() / stats.visited.sum()).item() < 0.7


@pytest.mark.usefixtures("both_ways")
@pytest.mark.gpu
def test_a_captured_graph_follows_new_thresholds_and_lengths() -> None:
    p = planted(
        batch=2, heads=4, kv_heads=2, kv_len=700, head_dim=64, tile_kv=64, dtype=torch.bfloat16
    )
    factors = torch.zeros(2, device="cuda")
    kv_lens = torch.tensor([700, 650], dtype=torch.int32, device="cuda")
    keywords = {"running_max": "seeded", "backend": "triton", "return_stats": True}
    ss.decode_attention(p.q, p.k, p.v, kv_lens, scale_factor=factors, **keywords)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stats = ss.decode_attention(p.q, p.k, p.v, kv_lens, scale_factor=factors, **keywords)
    factors.fill_(p.scale_factor)
    kv_lens.copy_(torch.tensor([600, 700]))
    graph.replay()
    eager, counted = ss.decode_attention(p.q, p.k, p.v, kv_lens, scale_factor=factors, **keywords)
    assert torch.equal(out, eager)
    assert torch.equal(stats.skipped, counted.skipped) and counted.skipped.sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("page, running_max", [(16, "seeded"), (64, "seeded"), (64, "ascending")])
def test_one_captured_graph_serves_short_and_long_requests(page: int, running_max: str) -> None:
    """Captured as vLLM does: the table as wide as the longest request may be, every length the longest."""
    batch, longest = 5, 16384
    p = planted(
        batch=batch,
        heads=8,
        kv_heads=2,
        kv_len=longest,
        head_dim=64,
        tile_kv=64,
        dtype=torch.bfloat16,
    )
    k, v, pages = paged(p, page)
    held = {
        "q": torch.zeros_like(p.q[:, :, 0]), "lengths": torch.full((batch,), longest, device="cuda").int(),
        "factors": torch.zeros(2, device="cuda"), "table": torch.zeros_like(pages).int(),
        "out": torch.empty_like(p.q[:, :, 0]),
        "counts": torch.zeros(2, 2, dtype=torch.int64, device="cuda"),
    }  # fmt: skip

    def call(held: dict[str, torch.Tensor], **more: Any) -> Any:
        return ss.decode_attention(
            held["q"], k, v, held["lengths"], scale_factor=held["factors"], block_table=held["table"],
            min_kv_len=300, running_max=running_max, backend="triton", **more,
        )  # fmt: skip

    call(held, out=held["out"], counts=held["counts"])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(held, out=held["out"], counts=held["counts"])
    held["counts"].zero_()
    total = torch.zeros_like(held["counts"])
    # Short, long, one long among short ones, padding, and below the floor.
    for lengths in (
        [900] * 5,
        [longest] * 5,
        [16000, 0, 70, 299, 301],
        [0] * 5,
        [0, 12345, 0, 0, 64],
    ):
        held["q"].copy_(p.q[:, :, 0])
        held["lengths"].copy_(torch.tensor(lengths))
        held["factors"].copy_(torch.tensor([p.scale_factor, p.scale_factor / 2]))
        held["table"].copy_(pages)
        held["table"][held["lengths"] == 0] = 10**9
        held["out"].fill_(torch.nan)
        graph.replay()
        fresh = {name: x.clone() for name, x in held.items()}
        eager, stats = call(fresh, return_stats=True)
        torch.testing.assert_close(held["out"], eager, rtol=0, atol=0)
        total += torch.stack([stats.visited.sum(0), stats.skipped.sum(0)], 1)
        assert torch.equal(held["counts"], total)
        for b, kv_len in enumerate(lengths):
            if not kv_len:
                assert (eager[b] == 0).all() and not stats.visited[b].any()
                continue
            alone = call_alone(
                p, 1, kv_len, tile_q=None, tile_kv=64, running_max=running_max, min_kv_len=300
            )
            _, visited, skipped = expected(p, alone, b)
            assert stats.visited[b].tolist() == visited.tolist()
            assert (
                stats.skipped[b].tolist() == skipped.tolist()
            )  # half the number cuts no other tile
            assert bool(stats.skipped[b].any()) == (kv_len > 300)
            if kv_len < 300:
                assert_accurate(eager[b, :, None], p, alone, b, 0.0)
    assert (total > 0).all()


@pytest.mark.gpu
def test_calls_without_a_graph_reuse_the_compiled_kernel() -> None:
    p = planted(
        batch=3, heads=8, kv_heads=2, kv_len=3000, head_dim=64, tile_kv=64, dtype=torch.bfloat16
    )
    call = {"scale_factor": p.scale_factor, "running_max": "seeded", "backend": "triton"}
    for lengths in ([3000, 40, 0], [64, 2000, 3000]):
        there = torch.tensor(lengths, device="cuda").int()
        first = ss.decode_attention(p.q, p.k, p.v, there, return_stats=True, **call)
        known = len(decode._plans)
        again = ss.decode_attention(p.q.clone(), p.k.clone(), p.v, there, return_stats=True, **call)
        assert len(decode._plans) == known == 1
        decode._plans.clear()
        anew = ss.decode_attention(p.q, p.k, p.v, there, return_stats=True, **call)
        assert torch.equal(first[0], again[0]) and torch.equal(first[0], anew[0])
        assert torch.equal(first[1].skipped, again[1].skipped)
        decode._plans.clear()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # another stream than the plan was made on
        other = [ss.decode_attention(p.q, p.k, p.v, there, **call) for _ in range(2)]
    stream.synchronize()
    assert torch.equal(other[0], anew[0]) and torch.equal(other[1], anew[0])


def test_freed_pages_before_the_window_and_stale_entries_are_not_read() -> None:
    p = planted(kv_len=190, tile_kv=64, batch=2)
    k, v, table = paged(p, 16)
    lost = table[:, :7].clone()  # no key that the window of 70 reaches
    k[lost.flatten()], v[lost.flatten()] = torch.nan, torch.nan
    table = torch.nn.functional.pad(table, (0, 3), value=10**6)
    table[:, :7] = -1
    call = {
        "scale_factor": p.scale_factor, "window": 70, "tile_kv": 64, "block_table": table,
        "return_stats": True,
    }  # fmt: skip
    found = ss.decode_attention(p.q, k, v, [190, 190], backend="triton", **call)
    true = ss.decode_attention(p.q, k, v, [190, 190], backend="reference", **call)
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(found[0], true[0], rtol=1e-4, atol=1e-4)
    assert found[1].skipped.tolist() == true[1].skipped.tolist()
    with pytest.raises(ValueError, match=r"must name pages from 0 to 23 .* 190 keys"):
        ss.decode_attention(p.q, k, v, [190, 190], backend="reference", **{**call, "window": 90})


@pytest.mark.parametrize("change", ["rows", "dtype"])
def test_a_table_that_does_not_fit_the_batch_is_refused(change: dict[str, Any]) -> None:
    p = planted(kv_len=64, batch=2)
    k, v, table = paged(p, 16)
    table = table[:1] if change == "rows" else table.short()
    with pytest.raises(ValueError, match=r"block_table must be int32 or int64 \[2, pages\]"):
        ss.decode_attention(p.q, k, v, [64, 64], block_table=table, backend="triton")


def test_tables_and_lengths_need_not_be_contiguous() -> None:
    p = planted(kv_len=100, batch=3)
    k, v, table = paged(p, 16)
    lengths = torch.tensor([[77, 1], [100, 2], [30, 3]], dtype=torch.int32, device=DEVICE)[:, 0]
    call = {"scale_factor": p.scale_factor, "tile_kv": 32, "backend": "triton"}
    strided = table.int().t().contiguous().t()
    out = ss.decode_attention(p.q, k, v, lengths, block_table=strided, **call)
    assert torch.equal(out, ss.decode_attention(p.q, p.k, p.v, [77, 100, 30], **call))


def test_queries_far_apart_in_memory() -> None:
    p = planted(heads=4, kv_len=100, dtype=torch.float16)
    # Offsets beyond 2^31 elements. NumPy's memory is not filled: what is never touched takes none.
    whole = torch.from_numpy(np.empty((1, 4, 20_000_000, 32), np.float16)).to(DEVICE)
    far = whole[:, :, -1:].copy_(p.q)
    call = {"scale_factor": p.scale_factor, "tile_kv": 32, "backend": "triton"}
    out = ss.decode_attention(far, p.k, p.v, **call)
    assert torch.equal(out, ss.decode_attention(p.q, p.k, p.v, **call))
