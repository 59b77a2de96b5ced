"""Model-Optimizer's fit: its points, planted parameters, and what it cannot fit."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import tiny
import torch

import skip_softmax as ss
from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from calibrate.schema import FitConfig, GeometryConfig
from calibrate.statistics import capture, nvidia
from calibrate.statistics.counts import Statistics
from calibrate.statistics.fit import fit_phase
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.huggingface.layers import inspect_layers
from skip_softmax.meaning.histogram import BINS, NEVER, edges

TILES = 10**9


def planted(
    a: float, b: float, kv_len: int, ceiling: float = 0.95, floor: float = 0.0
) -> torch.Tensor:
    """One head's histogram [1, BINS] in which a*exp(b*s) skips the share s, between `floor` and `ceiling`."""
    share = (edges().log() - math.log(a)) / b
    reached = torch.where(edges() <= kv_len, share, share[edges() <= kv_len][-1]).clamp(
        floor, ceiling
    )
    below = (reached * TILES).round()
    counts = torch.zeros(1, BINS, dtype=torch.int64)
    counts[0, :NEVER] = torch.diff(below, prepend=torch.zeros(1, dtype=torch.float64)).long()
    counts[0, NEVER] = TILES - int(below[-1])
    return counts


def samples(a: float, b: float, *lengths: int, **limits: float) -> torch.Tensor:
    return torch.stack([nvidia.sample([planted(a, b, n, **limits)], n) for n in lengths])


@pytest.mark.parametrize(("a", "b"), [(7.92, 8.615), (0.1196, 9.857), (54.6, 4.0)])
def test_planted_parameters_come_back(a: float, b: float) -> None:
    found = nvidia.fit(samples(a, b, 1024, 4096, 16384))
    assert found["refused"] is None
    assert (found["a"], found["b"]) == (pytest.approx(a, rel=1e-3), pytest.approx(b, rel=1e-3))
    assert found["r2"] == pytest.approx(1.0, abs=1e-4)
    assert found["r2_raw"] == pytest.approx(1.0, abs=1e-4)
    assert found["collected"] == 60 and 3 <= found["points"] < 60
    low, high = found["sparsity_range"]
    assert 0.1 <= low < high <= 0.9
    assert found["kv_len_range"] == (1024, 16384)


def test_the_fit_follows_the_largest_numbers_as_model_optimizer_s_does() -> None:
    """Two lengths on different curves: the raw fit leans to the longer one, ours lies between."""
    one, other = planted(2.0, 6.0, 1024), planted(60.0, 6.0, 16384)
    found = nvidia.fit(torch.stack([nvidia.sample([one], 1024), nvidia.sample([other], 16384)]))
    assert found["refused"] is None
    statistics = Statistics.empty({}, 1, 1, 1, [1024, 16384])
    for index, (counts, tokens) in enumerate(((one, 1024), (other, 16384))):
        statistics.counts["prefill"][0, 0, index] = counts[0]
        statistics.kv_tokens["prefill"][index], statistics.calls["prefill"][index] = tokens, 1
    ours = fit_phase(statistics, "prefill", FitConfig(min_r2=0.0))["model"]
    at = [curve["a"] * math.exp(curve["b"] * 0.7) for curve in (found, ours)]
    longer = 60.0 * math.exp(6.0 * 0.7)
    assert abs(math.log(at[0] / longer)) < abs(math.log(at[1] / longer)) - 0.3
    assert found["r2"] < found["r2_raw"], "what it prints looks better than what it is"


def test_layers_count_alike_and_heads_by_their_tiles() -> None:
    """Layer one: a head that skips nothing has three times the tiles of one that skips all. Two: all."""
    none, everything = (torch.zeros(BINS, dtype=torch.int64) for _ in range(2))
    none[NEVER], everything[0] = 30, 10
    row = nvidia.sample([torch.stack([none, everything]), everything[None]], 10_000)
    assert row[0] == 10_000
    assert row[1:].tolist() == [pytest.approx((0.25 + 1.0) / 2)] * len(nvidia.THRESHOLDS)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"ceiling": 0.08}, r"only 0 of 40 points have a sparsity of 10 to 90 %, .* 0 to 8 %"),
        ({"floor": 0.94}, r"only 0 of 40 points have a sparsity of 10 to 90 %, .* 94 to 95 %"),
    ],
    ids=["never skipped", "always skipped"],
)
def test_a_saturated_phase_is_refused(limits: dict[str, float], said: str) -> None:
    found = nvidia.fit(samples(1.0, 8.0, 4096, 16384, **limits))
    assert found["a"] is None and found["points"] == 0
    assert re.search(said, found["refused"])


def test_a_phase_without_samples_is_refused() -> None:
    found = nvidia.fit(torch.zeros(0, 0, dtype=torch.float64))
    assert found["refused"] == "only 0 points, where 10 are needed"


def test_a_flat_curve_is_refused() -> None:
    """Longer requests skip less at every number: the best curve falls, and b stops at 0."""
    rows = samples(1.0, 8.0, 1024, 2048)
    rows[:, 1:] = rows[:, 1:].flip(1)
    found = nvidia.fit(rows)
    assert found["r2"] is None and found["a"] > 0
    assert "does not grow with sparsity" in found["refused"]


def test_samples_are_what_the_gaps_say() -> None:
    """Every prompt's prefill and every decode step, at every threshold, against the gaps of the same call."""
    model = tiny.model("llama", 400.0)
    loaded = LoadedModel(model, None, "llama", "0", inspect_layers(model), 1024, "float32")
    ids = tiny.tokens(158)[0].tolist()
    prompt = Prompt("text", "calibration", 150, tuple(ids[:150]), tuple(ids[150:]), False)
    geometry = GeometryConfig.model_validate(
        {"prefill": {"tile_q": 16, "tile_kv": 16}, "decode": {"tile_kv": 16}}
    )
    empty = capture.empty_statistics(loaded, geometry, [150])
    [(_, plain)] = capture.capture(loaded, [prompt], empty, geometry)
    [(_, sampled)] = capture.capture(loaded, [prompt], empty, geometry, samples=True)
    gaps: dict[int, list[torch.Tensor]] = {}

    def handler(call: LayerCall) -> torch.Tensor:
        decode = call.phase == "decode"
        parts = [call.rows(i, i + 1) for i in range(call.q.shape[2])] if decode else [call]
        for part in parts:
            # The heads of a KV head vote together in decode, as the rows of a tile do in prefill.
            heads, dim = part.k.shape[1], part.k.shape[3]
            q = part.q.reshape(1, heads, -1, dim) if decode else part.q
            found = ss.tile_gaps(
                q, part.k, causal=not decode, scale=part.scale, tile_q=16, tile_kv=16
            )
            gaps.setdefault(part.kv_len, []).append(found[found > -math.inf])
        out: torch.Tensor = ss.attention(call.q, call.k, call.v, scale=call.scale)
        return out

    with intercepted(model, handler, decode_from=150):
        capture.forward(loaded, prompt)
    rows = torch.cat([sampled.samples["prefill"], sampled.samples["decode"]])
    assert rows[:, 0].tolist() == list(range(150, 159)) == sorted(gaps)
    widest = 0.0
    for kv_len, *shares in rows.tolist():
        for threshold, share in zip(nvidia.THRESHOLDS, shares, strict=True):
            # Between bin edges a sample is interpolated: the truth lies between the edges' shares.
            near = [2 ** (step / 8) for step in (-1, 0, 1)]
            low, exact, high = (
                np.mean(
                    [float((g < math.log(threshold * n)).double().mean()) for g in gaps[kv_len]]
                )
                for n in near
            )
            assert low - 1e-9 <= share <= high + 1e-9 or threshold * kv_len < 2**-8
            widest = max(widest, exact)
    assert widest > 0.3, "the model skips too little for this test to show anything"
    # Counting step by step changes no count, and the samples survive the disk.
    for phase in ("prefill", "decode"):
        assert torch.equal(plain.counts[phase], sampled.counts[phase])
        assert len(plain.samples[phase]) == 0


def test_samples_are_kept_and_merged(tmp_path: object) -> None:
    one, other = (Statistics.empty({}, 1, 1, 1, [64]) for _ in range(2))
    one.samples["prefill"], one.prompts = samples(1.0, 8.0, 1024), ["a"]
    other.samples["prefill"], other.prompts = samples(1.0, 8.0, 2048), ["b"]
    both = one.merge(other)
    assert both.samples["prefill"][:, 0].tolist() == [1024, 2048]
    assert len(both.samples["decode"]) == 0
    both.save(f"{tmp_path}/stats.safetensors")
    again = Statistics.load(f"{tmp_path}/stats.safetensors")
    assert torch.equal(again.samples["prefill"], both.samples["prefill"])
    assert len(again.samples["decode"]) == 0
