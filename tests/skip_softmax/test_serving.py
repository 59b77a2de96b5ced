"""What a serving engine needs of prefill: pages, a floor per request, its own output and counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planting import DEVICE, Planted, plant, served_pages

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
    # Drawn on the CPU: which tiles of a request can be skipped is then the same on every device.
    p = plant(batch=4, heads=2, q_len=70, kv_len=120, tile_q=16, device="cpu")
    q, k, v, quiet = (x.to(DEVICE) for x in (p.q, p.k, p.v, p.quiet))
    return Planted(q, k, v, p.scale_factor, quiet)


def call_of(p: Planted, backend: str, **more: Any) -> dict[str, Any]:
    return {"scale_factor": p.scale_factor, "tile_q": 16, "tile_kv": 32, "backend": backend, **more}


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def packed(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.cat([x[b, :, :n] for b, n in enumerate(lengths)], 1).transpose(0, 1)


@pytest.mark.parametrize(
    "backend, page, dtype, window",
    [
        ("reference", 48, torch.float32, None),
        ("reference", 16, torch.float16, 37),
        ("triton", 16, torch.float16, 37),
        ("triton", 32, torch.float32, None),
        ("triton", 96, torch.float16, 37),
    ],
    ids=str,
)
def test_pages_give_what_contiguous_keys_give(
    batch: Planted, backend: str, page: int, dtype: torch.dtype, window: int | None
) -> None:
    """Tiles of 32 keys: a page holds one tile, several, or half of one."""
    p = Planted(
        *(x.to(dtype, copy=True) for x in (batch.q, batch.k, batch.v)),
        batch.scale_factor,
        batch.quiet,
    )
    call = call_of(p, backend, window=window, return_stats=True)
    lengths = {"q_lens": Q_LENS, "kv_lens": KV_LENS}
    true, counted = ss.attention(p.q, p.k, p.v, **lengths, **call)
    assert counted.skipped.sum() > 0
    for b, n in enumerate(KV_LENS):
        p.k[b, :, n:] = p.v[b, :, n:] = torch.nan
    k, v, table = served_pages(p, page, Q_LENS, KV_LENS, window)
    out, stats = ss.attention(p.q, k, v, block_table=table, **lengths, **call)
    assert torch.equal(out, true)
    assert torch.equal(stats.skipped, counted.skipped)
    where = starts(Q_LENS), None, 70, 120
    lens = torch.tensor(KV_LENS, device=DEVICE)
    together, stats = ss.attention_varlen(
        packed(p.q, Q_LENS), k, v, *where, block_table=table.long(), kv_lens=lens, **call
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


def test_torch_compile_sees_what_a_call_writes_into() -> None:
    p = plant(q_len=30, kv_len=70, tile_q=16)

    def step(out: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        counts += 1
        call = call_of(p, "triton")
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
    p = plant(q_len=20, kv_len=40)
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


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_prompts_in_pages_are_those_of_contiguous_keys(head_dim: int, page: int) -> None:
    """Chunks of 4000, 700 and 1 rows behind prefixes that no tile divides, in bf16."""
    p = plant(
        batch=3, heads=8, kv_heads=2, q_len=4000, kv_len=9001, head_dim=head_dim, tile_kv=128,
        dtype=torch.bfloat16, sparsity=0.7,
    )  # fmt: skip
    q_lens, kv_lens = [4000, 700, 1], [9001, 5003, 8100]
    for window in (None, 1500):
        call = {
            "scale_factor": p.scale_factor,
            "window": window,
            "backend": "triton",
            "return_stats": True,
        }
        true, counted = ss.attention(p.q, p.k, p.v, q_lens=q_lens, kv_lens=kv_lens, **call)
        k, v, table = served_pages(p, page, q_lens, kv_lens, window)
        out, stats = ss.attention_varlen(
            packed(p.q, q_lens), k, v, starts(q_lens), None, 4000, 9001, block_table=table,
            kv_lens=torch.tensor(kv_lens, device=DEVICE), **call,
        )  # fmt: skip
        assert torch.equal(stats.skipped, counted.skipped) and counted.skipped.sum() > 0
        assert torch.equal(stats.visited, counted.visited)
        assert (out - packed(true, q_lens)).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
def test_a_captured_step_follows_new_lengths_and_pages() -> None:
    """A padded batch: requests without rows and keys, and numbers of pages that do not exist."""
    p = plant(
        batch=4,
        heads=8,
        kv_heads=2,
        q_len=300,
        kv_len=700,
        head_dim=64,
        tile_kv=128,
        dtype=torch.bfloat16,
    )
    k, v, table = served_pages(p, 16, [300] * 4, [700] * 4)
    given = {
        "cu_seqlens_q": starts([0] * 4), "kv_lens": torch.zeros(4, dtype=torch.int32, device="cuda"),
        "block_table": torch.full_like(table, 10**9).int(),
    }  # fmt: skip
    fixed = {"cu_seqlens_k": None, "max_seqlen_q": 300, "max_seqlen_k": 700, "min_kv_len": 500,
             "scale_factor": p.scale_factor, "backend": "triton"}  # fmt: skip
    q = packed(p.q, [300] * 4).contiguous()
    out, counts = torch.full_like(q, 7.0), torch.zeros(8, 2, dtype=torch.int64, device="cuda")

    def step() -> None:
        ss.attention_varlen(q, k, v, out=out, counts=counts, **given, **fixed)

    step()
    torch.cuda.synchronize()
    assert (out == 7).all() and not counts.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for q_lens, kv_lens in (
        ([300, 17, 0, 0], [700, 600, 0, 0]),
        ([1, 200, 300, 5], [450, 700, 499, 640]),
    ):
        given["cu_seqlens_q"].copy_(starts(q_lens))
        given["kv_lens"].copy_(torch.tensor(kv_lens))
        given["block_table"].copy_(table)
        out.fill_(7.0)
        counts.zero_()
        graph.replay()
        rows = sum(q_lens)
        assert (out[rows:] == 7).all()
        eager, stats = ss.attention_varlen(
            q, k, v, return_stats=True, **given, **fixed | {"backend": "reference"}
        )
        assert (out[:rows] - eager[:rows]).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps
        total = torch.stack([stats.visited.sum(0), stats.skipped.sum(0)], 1)
        assert torch.equal(counts, total) and (total > 0).all()
