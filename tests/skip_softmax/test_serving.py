"""What a serving engine needs of prefill: pages, a floor per request, its own output and counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planting import DEVICE, Planted, paged, plant

import skip_softmax as ss

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

BACKENDS = ["reference", "triton"]
Q_LENS, KV_LENS = (
    [45, 0, 33, 70],
    [120, 40, 90, 70],
)  # a prefix, no rows, a prefix, a whole prompt


@pytest.fixture(scope="module")
def batch() -> Planted:
    return plant(batch=4, heads=2, q_len=70, kv_len=120, tile_q=16)


def call_of(p: Planted, backend: str, **more: Any) -> dict[str, Any]:
    return {"scale_factor": p.scale_factor, "tile_q": 16, "tile_kv": 32, "backend": backend, **more}


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def packed(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.cat([x[b, :, :n] for b, n in enumerate(lengths)], 1).transpose(0, 1)


@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("page", [16, 48])
def test_pages_give_what_contiguous_keys_give(batch: Planted, page: int, backend: str) -> None:
    p, call = batch, call_of(batch, backend, return_stats=True)
    k, v, table = paged(p, page)
    lengths = {"q_lens": Q_LENS, "kv_lens": KV_LENS}
    true, counted = ss.attention(p.q, p.k, p.v, **lengths, **call)
    out, stats = ss.attention(p.q, k, v, block_table=table, **lengths, **call)
    assert torch.equal(out, true) and counted.skipped.sum() > 0
    assert torch.equal(stats.skipped, counted.skipped)
    # Entries behind a request's last page, and all of one without rows, may be anything.
    table = table.clone()
    for b, n in enumerate(KV_LENS):
        table[b, -(-n // page) if Q_LENS[b] else 0 :] = 10**6
    where = starts(Q_LENS), None, 70, 120
    together, stats = ss.attention_varlen(
        packed(p.q, Q_LENS), k, v, *where, block_table=table, kv_lens=torch.tensor(KV_LENS), **call
    )
    assert torch.equal(together, packed(true, Q_LENS))
    assert torch.equal(stats.skipped, counted.skipped)
    assert torch.equal(stats.visited, counted.visited)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_shorter_than_the_floor_is_dense(batch: Planted, backend: str) -> None:
    p, lengths = batch, {"q_lens": Q_LENS, "kv_lens": torch.tensor(KV_LENS, device=DEVICE)}
    plain, counted = ss.attention(
        p.q, p.k, p.v, **lengths, **call_of(p, backend, return_stats=True)
    )
    dense = ss.attention(p.q, p.k, p.v, **lengths, **call_of(p, backend, scale_factor=0.0))
    for floor, short in ((90, [False, True, False, True]), (91, [False, True, True, True])):
        out, stats = ss.attention(
            p.q, p.k, p.v, min_kv_len=floor, **lengths, **call_of(p, backend, return_stats=True)
        )
        for b, below in enumerate(short):
            assert torch.equal(out[b], (dense if below else plain)[b])
            expected = torch.zeros_like(stats.skipped[b]) if below else counted.skipped[b]
            assert torch.equal(stats.skipped[b], expected)
    assert counted.skipped[2].sum() > 0 < counted.skipped[3].sum()
    all_short = ss.attention(p.q, p.k, p.v, min_kv_len=121, **lengths, **call_of(p, backend))
    assert torch.equal(all_short, dense)


def test_a_request_below_the_floor_is_dense_without_a_warning(recwarn: Any) -> None:
    p = plant(q_len=20, kv_len=40)
    for backend in BACKENDS:
        for kv_lens in (None, [40]):
            ss.attention(
                p.q, p.k, p.v, scale_factor=50.0, min_kv_len=60, kv_lens=kv_lens, backend=backend
            )
    assert not [w for w in recwarn if issubclass(w.category, ss.DenseCallWarning)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_goes_where_it_is_wanted(batch: Planted, backend: str) -> None:
    p, call = batch, call_of(batch, backend)
    lengths = {"q_lens": Q_LENS, "kv_lens": KV_LENS}
    true = ss.attention(p.q, p.k, p.v, **lengths, **call)
    # Heads and tokens in another order in memory, and more columns than are used.
    wide = torch.full((4, 70, 2, 40), torch.nan, device=DEVICE)
    out = wide.transpose(1, 2)[..., 4:36]
    assert ss.attention(p.q, p.k, p.v, out=out, **lengths, **call) is out
    assert torch.equal(out, true)  # padding rows are zero there too
    assert wide[..., :4].isnan().all() and wide[..., 36:].isnan().all()
    q, k, v = packed(p.q, Q_LENS), packed(p.k, KV_LENS), packed(p.v, KV_LENS)
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, 5), value=torch.nan)  # rows of no request
    together = torch.full_like(q, 7.0)
    where = starts(Q_LENS), starts(KV_LENS), 70, 120
    assert ss.attention_varlen(q, k, v, *where, out=together, **call) is together
    assert torch.equal(together[:-5], packed(true, Q_LENS))
    assert (together[-5:] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_are_added_up(batch: Planted, backend: str) -> None:
    p, call = batch, call_of(batch, backend, q_lens=Q_LENS, kv_lens=KV_LENS)
    _, stats = ss.attention(p.q, p.k, p.v, return_stats=True, **call)
    total = torch.stack([stats.visited.sum(0), stats.skipped.sum(0)], 1)
    assert (total > 0).all()
    counts = torch.ones(2, 2, dtype=torch.int64, device=DEVICE)
    ss.attention(p.q, p.k, p.v, counts=counts, **call)
    assert torch.equal(counts, 1 + total)
    _, again = ss.attention(p.q, p.k, p.v, counts=counts, return_stats=True, **call)
    assert torch.equal(counts, 1 + 2 * total) and torch.equal(again.skipped, stats.skipped)


def test_torch_compile_sees_what_a_call_writes_into(batch: Planted) -> None:
    p, lengths = batch, {"q_lens": Q_LENS, "kv_lens": KV_LENS}

    def step(out: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        counts += 1
        call = call_of(p, "triton", **lengths)
        return ss.attention(p.q, p.k, p.v, out=out, counts=counts, **call) + counts.sum()

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out, counts = torch.full_like(p.q, 7.0), torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
        found.append((run(out, counts), out, counts))
    for mine, compiled in zip(*found, strict=True):
        assert torch.equal(mine, compiled)
    assert (found[0][2] > 1).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"out": torch.zeros(1, 2, 20, 31)}, r"`out` must be torch.float32 \(1, 2, 20, 32\)"),
        ({"out": torch.zeros(1, 2, 20, 32).half()}, "but got torch.float16"),
        ({"out": torch.zeros(1, 2, 32, 20).transpose(2, 3)}, "last stride of 1"),
        ({"counts": torch.zeros(2, 2)}, r"`counts` must be contiguous int64 \(2, 2\)"),
        ({"counts": torch.zeros(1, 2, dtype=torch.int64)}, r"but got torch.int64 \(1, 2\)"),
        ({"min_kv_len": -1}, "`min_kv_len` must be at least 0, but got -1"),
        ({"block_table": torch.zeros(1, 2)}, "must be int32 or int64"),
        ({"block_table": torch.zeros(1, 2, dtype=torch.int32)}, "needs `kv_lens`"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(backend: str, change: dict[str, Any], words: str) -> None:
    p = plant(q_len=20, kv_len=40, device="cpu")
    with pytest.raises(ValueError, match=words):
        ss.attention(p.q, p.k, p.v, **call_of(p, backend, **change))


def test_packed_requests_have_lengths_of_one_kind() -> None:
    p = plant(q_len=20, kv_len=40, device="cpu")
    q, k, v = (x[0].transpose(0, 1) for x in (p.q, p.k, p.v))
    cu = torch.tensor([0, 20], dtype=torch.int32)
    table = {"block_table": torch.zeros(1, 3, dtype=torch.int32)}
    lens = {"kv_lens": [40]}
    for tensors, cu_k, more, words in (
        ((q, k, v), None, {}, "without `block_table`"),
        ((q, k, v), cu, lens, "`kv_lens` None"),
        ((q, p.k, p.v), cu, table | lens, "pass cu_seqlens_k=None"),
        ((q, p.k, p.v), None, table, "a paged cache needs `kv_lens`"),
        ((q, k, v), None, table | lens, "pages, heads, page_size, head_dim"),
        ((q, p.k, p.v), None, table | {"kv_lens": [41]}, "numbers from 0 to 40"),
        ((q, p.k[:, :, :16], p.v[:, :, :16]), None, table | lens, "must name pages"),
    ):
        table["block_table"][0, 2] = 9
        with pytest.raises(ValueError, match=words):
            ss.attention_varlen(*tensors, cu, cu_k, 20, 40, backend="reference", **more)
