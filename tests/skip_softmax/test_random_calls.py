"""Random legal calls of every kernel against the reference: what no list of cases thought of.

A case is drawn from its number, which a failure names. A GPU gets more of them, and longer ones; most
compile a kernel of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from planting import DEVICE, DTYPES, Planted, paged, plant, served_pages

import skip_softmax as ss

pytest.importorskip("triton")
from skip_softmax.hopper import prefill as hopper

pytestmark = pytest.mark.slow

CASES, LONGEST = (20, 5000) if DEVICE == "cuda" else (10, 300)
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def length(draw: Random, most: int = LONGEST) -> int:
    return draw.choice([1, 2, draw.randint(1, 64), draw.randint(1, most), draw.randint(1, most)])


def shape(draw: Random) -> dict[str, Any]:
    kv_heads = draw.choice([1, 1, 2, 3])
    return {
        "batch": draw.choice([1, 1, 2, 3]),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw.choice([1, 2, 3, 4, 7]),
        "head_dim": draw.choice([16, 32, 64, 80, 96, 128]),
        "tile_kv": draw.choice([16, 32, 64, 128]),
        "sparsity": draw.choice([0.0, 0.2, 0.6, 0.95, 1.0]),
        "dtype": draw.choice(DTYPES),
        "seed": draw.randrange(1000),
    }


def agree(
    found: tuple[torch.Tensor, ss.TileCounts],
    true: tuple[torch.Tensor, ss.TileCounts],
    dtype: torch.dtype,
) -> None:
    """Output within rounding, tile counts exactly; `found` and `true` are (output, stats)."""
    assert found[1].visited.tolist() == true[1].visited.tolist()
    assert found[1].skipped.tolist() == true[1].skipped.tolist()
    assert torch.isfinite(found[0]).all()
    close(found[0], true[0], dtype)


def close(out: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    allowed = 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    assert not out.numel() or (out.double() - truth).abs().max() <= allowed


def doubled(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() for x in tensors]


def prefill_case(draw: Random, **fixed: Any) -> tuple[Planted, dict[str, Any]]:
    """A planted prompt and the keywords of its call."""
    drawn = {**shape(draw), "tile_q": draw.choice([16, 32, 64, 128]), **fixed}
    kv_len = length(draw)
    p = plant(q_len=draw.choice([1, kv_len, draw.randint(1, kv_len)]), kv_len=kv_len, **drawn)
    causal = draw.random() < 0.7
    window = draw.choice([None, 1, length(draw), length(draw)]) if causal and not fixed else None
    tiles = {"tile_q": drawn["tile_q"], "tile_kv": drawn["tile_kv"]}
    dense_last = draw.choice([0, 0, 1, drawn["tile_q"], length(draw)])
    return p, {"causal": causal, "window": window, "dense_last": dense_last, **tiles}


def lengths(draw: Random, p: Planted) -> tuple[list[int], list[int]]:
    """Queries and keys of each request, some of them none."""
    q_lens = [draw.randint(0, p.q.shape[2]) for _ in range(p.q.shape[0])]
    return q_lens, [draw.randint(n, p.k.shape[2]) for n in q_lens]


def check_padded_and_whole(draw: Random, backend: str, **fixed: Any) -> None:
    p, call = prefill_case(draw, **fixed)
    if draw.random() < 0.5:
        call["q_lens"], call["kv_lens"] = lengths(draw, p)
    call |= {"scale_factor": p.scale_factor, "return_stats": True}
    true = ss.attention(*doubled(p.q, p.k, p.v), backend="reference", **call)
    agree(ss.attention(p.q, p.k, p.v, backend=backend, **call), true, p.q.dtype)


def check_packed(draw: Random, backend: str, **fixed: Any) -> None:
    p, call = prefill_case(draw, **fixed)
    q_lens, kv_lens = lengths(draw, p)

    def packed(x: torch.Tensor, kept: list[int]) -> torch.Tensor:
        return torch.cat([x[b, :, :n] for b, n in enumerate(kept)], 1).transpose(0, 1)

    def starts(kept: list[int]) -> torch.Tensor:
        return torch.tensor([0, *kept], device=DEVICE).cumsum(0).int()

    q, k, v = packed(p.q, q_lens), packed(p.k, kv_lens), packed(p.v, kv_lens)
    place = (starts(q_lens), starts(kv_lens), max(q_lens), max(kv_lens))
    call |= {"scale_factor": p.scale_factor, "return_stats": True}
    true = ss.attention_varlen(*doubled(q, k, v), *place, backend="reference", **call)
    agree(ss.attention_varlen(q, k, v, *place, backend=backend, **call), true, p.q.dtype)


def check_paged(draw: Random, backend: str, **fixed: Any) -> None:
    """Requests with a cached prefix in pages, packed or padded, against contiguous keys in the reference."""
    p, call = prefill_case(draw, **fixed)
    q_lens, kv_lens = lengths(draw, p)
    tile = call["tile_kv"]
    page = draw.choice([n for n in (16, 32, 64, 128, 256, 3 * tile) if not (tile % n and n % tile)])
    for b, (rows, keys) in enumerate(zip(q_lens, kv_lens, strict=True)):
        p.q[b, :, rows:] = p.k[b, :, keys:] = p.v[b, :, keys:] = torch.nan
    k, v, table = served_pages(p, page, q_lens, kv_lens, call["window"], draw.randrange(9))
    call |= {"scale_factor": p.scale_factor, "return_stats": True}
    call["min_kv_len"] = draw.choice([0, 0, draw.randint(1, p.k.shape[2])])
    ragged = {"q_lens": q_lens, "kv_lens": kv_lens}
    true = ss.attention(*doubled(p.q, p.k, p.v), backend="reference", **ragged, **call)
    call |= {"block_table": table, "backend": backend}
    if draw.random() < 0.5:
        found = ss.attention(p.q, k, v, **ragged, **call)
        agree(found, true, p.q.dtype)
    else:
        q = torch.cat([p.q[b, :, :n] for b, n in enumerate(q_lens)], 1).transpose(0, 1)
        starts = torch.tensor([0, *q_lens], device=DEVICE).cumsum(0).int()
        lens = torch.tensor(kv_lens, device=DEVICE)
        found = ss.attention_varlen(
            q, k, v, starts, None, max(q_lens), max(kv_lens), kv_lens=lens, **call
        )
        rows = [out[:, :n] for out, n in zip(true[0], q_lens, strict=True)]
        agree(found, (torch.cat(rows, 1).transpose(0, 1), true[1]), p.q.dtype)


@pytest.mark.parametrize("case", range(CASES))
def test_random_prompts_in_pages_match_contiguous_ones(case: int) -> None:
    check_paged(Random(case), "triton")


@pytest.mark.parametrize("case", range(CASES))
def test_a_random_prompt_matches_the_reference(case: int) -> None:
    check_padded_and_whole(Random(case), "triton")


@pytest.mark.parametrize("case", range(CASES))
def test_random_packed_prompts_match_the_reference(case: int) -> None:
    check_packed(Random(case), "triton")


@pytest.mark.skipif(not HOPPER, reason="needs an sm_90 device")
@pytest.mark.parametrize("check", [check_padded_and_whole, check_packed, check_paged])
@pytest.mark.parametrize("case", range(CASES))
def test_random_prompts_on_hopper_match_the_reference(
    check: Callable[..., None], case: int
) -> None:
    draw = Random(case)
    head_dim, value_dim = draw.choice(list(hopper.GROUPS))
    check(
        draw, "hopper", head_dim=head_dim, value_dim=value_dim, tile_q=64, tile_kv=128,
        dtype=draw.choice([torch.float16, torch.bfloat16]),
    )  # fmt: skip


@pytest.mark.parametrize("case", range(CASES))
def test_random_decoding_matches_the_reference(case: int) -> None:
    draw = Random(case)
    drawn, tokens = shape(draw), draw.choice([1, 1, 2, 4])
    kv_len = max(tokens, length(draw))
    p = plant(q_len=tokens, kv_len=kv_len, tile_q=1, **drawn)
    kv_lens = [draw.choice([0, kv_len, draw.randint(tokens, kv_len)]) for _ in range(len(p.q))]
    call = {
        "scale_factor": p.scale_factor, "tile_kv": drawn["tile_kv"], "return_stats": True,
        "window": draw.choice([None, 1, length(draw), length(draw)]),
        "running_max": draw.choice(["seeded", "ascending"]),
    }  # fmt: skip
    true = ss.decode_attention(*doubled(p.q, p.k, p.v), kv_lens, backend="reference", **call)
    k, v = p.k, p.v
    if draw.random() < 0.5:
        k, v, call["block_table"] = paged(p, draw.choice([16, 32, 64, 128]), draw.randrange(9))
    agree(ss.decode_attention(p.q, k, v, kv_lens, backend="triton", **call), true, p.q.dtype)


@pytest.mark.parametrize("case", range(CASES))
def test_statistics_of_a_random_prompt_match_the_reference(case: int) -> None:
    draw = Random(case)
    p, call = prefill_case(draw)
    if call["causal"] and draw.random() < 0.5:
        call |= {"decode": True, "running_max": "seeded"}
        call["dense_last"] = 0  # of prefill alone
    out, found = ss.tile_statistics(p.q, p.k, p.v, backend="triton", **call)
    true_out, true = ss.tile_statistics(*doubled(p.q, p.k, p.v), backend="reference", **call)
    close(out, true_out, p.q.dtype)
    assert found.rows == true.rows
    assert found.counts.sum(1).tolist() == true.counts.sum(1).tolist()
    assert found.counts[:, -1].tolist() == true.counts[:, -1].tolist()  # never skipped
    # Rounding moves a tile to the next bin at most.
    moved = (found.counts.cumsum(1) - true.counts.cumsum(1)).abs().max().item()
    assert moved <= max(2, 0.1 * true.counts.sum().item())
