"""Histograms answer every scale factor as brute force does, and add like counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from planting import graded

import skip_softmax as ss
from calibrate.errors import UserError
from calibrate.statistics.counts import Statistics, scale_factor_at
from skip_softmax.meaning.histogram import BINS, NEVER, edges


def statistics_of(heads: int, kv_heads: int) -> Statistics:
    return Statistics.empty({"model": "planted"}, 1, heads, kv_heads, [1000])


def useful_edges(kv_len: int) -> list[float]:
    """All bin edges that a threshold below 1 can have at this length."""
    return [edge for edge in edges().tolist() if edge < kv_len]


@pytest.mark.parametrize("window", [None, 70], ids=["full", "window"])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 1)], ids=["mha", "gqa3", "gqa8"])
@pytest.mark.parametrize("length", [1, 63, 127, 129, 200, 1000])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_sparsity_equals_brute_force_at_every_edge(
    phase: str, length: int, heads: tuple[int, int], window: int | None
) -> None:
    tokens = length if phase == "prefill" else min(length, 3)
    q, k, v = graded(*heads, tokens, length, dtype=torch.float32)
    tiles = {"tile_kv": 16} if phase == "decode" else {"tile_q": 32, "tile_kv": 16}
    out, histogram = ss.tile_statistics(q, k, v, decode=phase == "decode", window=window, **tiles)
    run = ss.decode_attention if phase == "decode" else ss.attention
    torch.testing.assert_close(out, run(q, k, v, window=window, **tiles), atol=0, rtol=0)
    statistics = statistics_of(*heads)
    statistics.add(0, phase, 0, histogram)
    shortest = length - tokens + 1 if phase == "decode" else length
    grid = useful_edges(shortest)
    skips = 0
    for edge in grid[:: max(1, len(grid) // 24)] + grid[-1:]:
        _, stats = run(q, k, v, scale_factor=edge, window=window, return_stats=True, **tiles)
        assert torch.equal(statistics.visited(phase)[0, :, 0], stats.visited[0])
        assert torch.equal(statistics.skipped(phase, edge)[0, :, 0], stats.skipped[0].double()), (
            edge
        )
        skips += int(stats.skipped.sum())
    if length >= 200:
        assert skips > 0, "the planted input must skip something, or this test shows nothing"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_edge_without_exception_on_one_shape(phase: str) -> None:
    tokens = 129 if phase == "prefill" else 4
    q, k, v = graded(3, 1, tokens, 129, dtype=torch.float32)
    tiles = {"tile_kv": 16} if phase == "decode" else {"tile_q": 16, "tile_kv": 16}
    _, histogram = ss.tile_statistics(q, k, v, decode=phase == "decode", **tiles)
    statistics = statistics_of(3, 1)
    statistics.add(0, phase, 0, histogram)
    run = ss.decode_attention if phase == "decode" else ss.attention
    for edge in useful_edges(129 - tokens + 1 if phase == "decode" else 129):
        skipped = run(q, k, v, scale_factor=edge, return_stats=True, **tiles)[1].skipped
        assert torch.equal(statistics.skipped(phase, edge)[0, :, 0], skipped[0].double()), edge


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_dropped_mass_is_the_dense_probability_of_skipped_tiles(phase: str) -> None:
    tokens = 129 if phase == "prefill" else 4
    q, k, v = graded(4, 2, tokens, 129)
    tiles = {"tile_kv": 16} if phase == "decode" else {"tile_q": 16, "tile_kv": 16}
    _, histogram = ss.tile_statistics(q, k, v, decode=phase == "decode", **tiles)
    statistics = statistics_of(4, 2)
    statistics.add(0, phase, 0, histogram)
    edge = next(e for e in edges().tolist() if e > 60)
    # With values that say which key they belong to, attention returns the probabilities themselves.
    eye = torch.eye(129, dtype=torch.float64).expand(1, 2, -1, -1)
    run = ss.decode_attention if phase == "decode" else ss.attention
    dense, sparse = run(q, k, eye, **tiles), run(q, k, eye, scale_factor=edge, **tiles)
    dropped = float((dense * (sparse == 0)).sum(-1).mean())
    assert dropped > 0
    assert float(statistics.dropped_mass(phase, edge)[0]) == pytest.approx(dropped, rel=1e-9)


def test_mass_of_all_tiles_is_one_per_row() -> None:
    q, k, v = graded(4, 2, 100, 100)
    _, histogram = ss.tile_statistics(q, k, v, tile_q=16, tile_kv=16)
    torch.testing.assert_close(histogram.mass.sum(1), torch.full((4,), 100.0, dtype=torch.float64))
    assert histogram.rows == 100


def test_statistics_of_two_runs_add_up_to_one_run(tmp_path) -> None:
    parts, whole = [], statistics_of(4, 2)
    for seed in (0, 1):
        part = statistics_of(4, 2)
        _, histogram = ss.tile_statistics(*graded(4, 2, 60, 60, seed=seed), tile_q=16, tile_kv=16)
        for statistics in (part, whole):
            statistics.add(0, "prefill", 0, histogram)
            statistics.kv_tokens["prefill"] += 60
            statistics.calls["prefill"] += 1
            statistics.prompts.append(str(seed))
        part.save(tmp_path / f"{seed}.safetensors")
        parts.append(Statistics.load(tmp_path / f"{seed}.safetensors"))
    merged = parts[0].merge(parts[1])
    assert merged.prompts == whole.prompts
    for name in ("counts", "mass", "rows", "kv_tokens", "calls"):
        for phase in ("prefill", "decode"):
            assert torch.equal(getattr(merged, name)[phase], getattr(whole, name)[phase])


def test_statistics_that_do_not_belong_together_are_refused(tmp_path) -> None:
    ours = statistics_of(4, 2)
    theirs = Statistics.empty({"model": "another"}, 1, 4, 2, [1000])
    with pytest.raises(
        UserError, match=r"share model, geometry and lengths, but \['model'\] differ"
    ):
        ours.merge(theirs)
    named = Statistics.empty({**ours.identity, "origin": "elsewhere"}, 1, 4, 2, [1000])
    for one, other in ((ours, named), (named, ours)):
        with pytest.raises(UserError, match=r"but \['origin'\] differ"):
            one.merge(other)
    ours.prompts.append("same")
    with pytest.raises(UserError, match="no prompt is in both, but 1 are"):
        ours.merge(ours)
    (tmp_path / "broken.safetensors").write_bytes(b"no statistics")
    with pytest.raises(UserError, match="cannot be read as tile statistics"):
        Statistics.load(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_at_the_edges_is_what_each_edge_skips_by_itself(phase: str) -> None:
    statistics = Statistics.empty({}, 2, 4, 2, [60, 90])
    for layer, (index, length) in itertools.product(range(2), enumerate(statistics.lengths)):
        tokens = length if phase == "prefill" else 3
        q, k, v = graded(4, 2, tokens, length, seed=layer)
        tiles = {"tile_kv": 16} if phase == "decode" else {"tile_q": 16, "tile_kv": 16}
        _, histogram = ss.tile_statistics(q, k, v, decode=phase == "decode", **tiles)
        statistics.add(layer, phase, index, histogram)
    found = statistics.at_edges(phase)
    assert int(found.skipped[..., -1].sum()) > 0
    for index, factor in enumerate(found.scale_factor.tolist()):
        assert torch.equal(found.skipped[..., index].double(), statistics.skipped(phase, factor))
        # Sums in another order.
        torch.testing.assert_close(
            found.dropped_mass[:, index], statistics.dropped_mass(phase, factor), rtol=1e-12, atol=0
        )


def test_the_scale_factor_for_a_sparsity_reaches_it() -> None:
    statistics = statistics_of(1, 1)
    statistics.counts["prefill"][0, 0, 0, 40:60] = 10
    statistics.counts["prefill"][0, 0, 0, NEVER] = 200
    for wanted in (0.1, 0.25, 0.4):
        factor = scale_factor_at(statistics, "prefill", wanted, layer=0)
        assert statistics.sparsity("prefill", factor) == pytest.approx(wanted, abs=1e-9)
    # More than can be reached gives the largest edge, and all that can be skipped.
    assert statistics.sparsity("prefill", scale_factor_at(statistics, "prefill", 0.9)) == 0.5
    assert statistics.sparsity("prefill", 0.0) == 0.0
    assert BINS == NEVER + 1
