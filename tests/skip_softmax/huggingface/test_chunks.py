"""Prompts in chunks: each chunk is a call of its own, whichever way the prompt arrives."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from calibrate.loss import measure
from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from calibrate.schema import GeometryConfig
from calibrate.statistics import capture, nvidia
from skip_softmax import Thresholds, applied
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.layers import inspect_layers
from skip_softmax.meaning.histogram import NEVER

LENGTH, CHUNK, STEPS = 310, 64, 6
ENDS = [64, 128, 192, 256]
EDGE = 2.0**5.875  # 58.7 tokens, an edge of the histogram, where its answer is exact
TILES = {"tile_q": 16, "tile_kv": 16}


def loaded(family: str) -> LoadedModel:
    model = tiny.model(family, 400.0)  # so sharp that tiles can be skipped in a random model
    return LoadedModel(model, None, family, "0", inspect_layers(model), 1024, "float32")


def thresholds(
    one: LoadedModel, factor: float, chunk: int | None = CHUNK, floor: int = 64, dense_last: int = 0
) -> Thresholds:
    return tiny.thresholds(one.layers, factor, floor=floor, chunk=chunk, dense_last=dense_last)


def a_prompt() -> Prompt:
    ids = tuple(tiny.tokens(LENGTH)[0].tolist())
    return Prompt("text", "heldout", LENGTH, ids, tuple(tiny.tokens(STEPS, 1)[0].tolist()), False)


def in_calls(one: LoadedModel, tokens: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Logits of a prompt that a server sends in chunks, with a cache between them."""
    cache, logits = None, []
    for start, end in zip([0, *ends], [*ends, tokens.shape[1]], strict=True):
        out = one.model(tokens[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


def counted(one: LoadedModel, chunk: int | None, floor: int, **prefill: int) -> Any:
    geometry = GeometryConfig(prefill={**TILES, "chunk": chunk, **prefill}, decode={"tile_kv": 16})
    statistics = capture.empty_statistics(one, geometry, [LENGTH], floor)
    capture.observe(one, a_prompt(), statistics, geometry, samples=True)
    return statistics


@pytest.mark.parametrize("dense_last", [0, 20])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_a_whole_prompt_is_computed_as_if_it_came_in_chunks(family: str, dense_last: int) -> None:
    """Full and windowed layers; decisions are equal, and a dense chunk is where a server has one."""
    one, tokens = loaded(family), tiny.tokens(LENGTH)
    sent = thresholds(one, EDGE, None, dense_last=dense_last)
    ours = thresholds(one, EDGE, dense_last=dense_last)
    with torch.no_grad():
        with applied(one.model, sent, decode_from=LENGTH) as server:
            expected = in_calls(one, tokens, ENDS)
        with applied(one.model, ours, decode_from=LENGTH) as together:
            logits = one.model(tokens, use_cache=False).logits
        with applied(one.model, ours, decode_from=LENGTH) as again:
            both = in_calls(one, tokens, ENDS)
        with applied(one.model, sent, decode_from=LENGTH) as whole:
            one.model(tokens, use_cache=False)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(both, expected, atol=0, rtol=0)
    for counts in (server, again):
        assert torch.equal(counts["prefill"].skipped, together["prefill"].skipped)
    assert torch.equal(whole["prefill"].visited, together["prefill"].visited)
    less, more = (int(counts["prefill"].skipped.sum()) for counts in (whole, together))
    # Larger thresholds skip more, but the dense rows of every chunk skip nothing.
    assert (more > less > 0) if not dense_last else more > 0


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_statistics_count_what_chunks_skip(family: str) -> None:
    """Skipping in one layer moves what the next one sees; the first layer sees what capture saw."""
    one, prompt = loaded(family), a_prompt()
    statistics = counted(one, CHUNK, 192)
    for factor in (EDGE, 2.0**6.875):
        with applied(one.model, thresholds(one, factor, floor=192), decode_from=LENGTH) as tiles:
            capture.forward(one, prompt)
        exact = statistics.skipped("prefill", factor)[0, :, 0]
        assert torch.equal(tiles["prefill"].skipped[0].double(), exact)
        assert int(exact.sum()) > 0
    whole = counted(one, None, 192)
    for phase in ("prefill", "decode"):
        assert torch.equal(statistics.visited(phase), whole.visited(phase))
        assert torch.equal(statistics.rows[phase], whole.rows[phase])
    assert torch.equal(statistics.counts["decode"], whole.counts["decode"])
    # What is dense below the floor is never skipped, not even by a threshold of nearly 1.
    without = counted(one, CHUNK, 0).counts["prefill"][..., NEVER]
    assert int((statistics.counts["prefill"][..., NEVER] - without).sum()) > 0


def test_a_prompt_in_chunks_is_one_sample_of_all_its_tiles() -> None:
    """At each threshold its sparsity is that of the histogram, with the prompt's length as label."""
    one = loaded("llama")
    statistics = counted(one, CHUNK, 192)
    assert statistics.samples["prefill"].shape == (1, 1 + len(nvidia.THRESHOLDS))
    assert statistics.samples["decode"].shape[0] == STEPS
    row = statistics.samples["prefill"][0]
    assert float(row[0]) == LENGTH
    for threshold, share in zip(nvidia.THRESHOLDS, row[1:].tolist(), strict=True):
        if threshold * LENGTH >= 1:
            layers = statistics.layer_sparsity("prefill", threshold * LENGTH)
            assert share == pytest.approx(float(layers.mean()), abs=1e-9)


def test_statistics_of_other_floors_do_not_merge_where_chunks_depend_on_them() -> None:
    one = loaded("llama")
    assert counted(one, CHUNK, 192).identity["min_kv_len"] == 192
    assert counted(one, None, 192).identity == counted(one, None, 64).identity


def test_losses_are_those_of_a_server_that_sends_chunks() -> None:
    one, prompt = loaded("llama"), a_prompt()
    dense = capture.forward(one, prompt).float()
    ours = thresholds(one, EDGE)
    found = measure.compare(one, ours, prompt, dense)
    tokens = torch.tensor([[*prompt.ids, *prompt.continuation]])
    with torch.no_grad():
        with applied(one.model, thresholds(one, EDGE, None), decode_from=LENGTH):
            sparse = in_calls(one, tokens, [*ENDS, LENGTH])[0, LENGTH - 1 :]
        plain = in_calls(one, tokens, [*ENDS, LENGTH])[0, LENGTH - 1 :]
    expected = measure.outcome(prompt, plain, sparse, found.visited, found.skipped)
    assert found.losses["kl"] > 1e-4
    assert found.losses == pytest.approx(expected.losses, rel=1e-3, abs=1e-6)
    # The dense run is the same either way, so it is not chunked.
    torch.testing.assert_close(dense, plain, atol=2e-4, rtol=2e-4)
    # An engine without `min_kv_len` computes the same chunks, by the published rule.
    unguarded = measure.compare_unguarded(one, ours, prompt, dense)
    assert unguarded.visited == found.visited
    assert unguarded.skipped["prefill"] == found.skipped["prefill"]


def test_generate_computes_a_prompt_as_in_chunks_of_its_own() -> None:
    """Also a padded request of a batch: its chunks are those of its own positions."""
    one = loaded("llama")
    given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
    long, short = tiny.tokens(LENGTH), tiny.tokens(197, 1)
    with applied(one.model, thresholds(one, EDGE, None)) as server:
        expected = [
            one.model.generate(ids, prefill_chunk_size=CHUNK, **given)[0, -5:]
            for ids in (long, short)
        ]
    batch = torch.cat([long, torch.cat([torch.ones(1, LENGTH - 197, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, : LENGTH - 197] = 0
    with applied(one.model, thresholds(one, EDGE)) as ours:
        written = one.model.generate(batch, attention_mask=mask, **given)[:, -5:]
    assert torch.equal(written, torch.stack(expected))
    for phase in ("prefill", "decode"):
        assert torch.equal(ours[phase].visited, server[phase].visited)
        assert torch.equal(ours[phase].skipped, server[phase].skipped)
    assert ours.sparsity("prefill") > 0.01


def test_chunks_end_at_multiples_of_their_size() -> None:
    """A call that begins behind a cached prefix of 40 tokens, in a cache that has lost its first 10."""
    q, k = torch.zeros(1, 2, 70, 4), torch.zeros(1, 1, 100, 4)
    call = LayerCall(0, "prefill", q, k, k, 1.0, True, None, 10)
    parts = list(call.chunks(32))
    assert [(part.position, part.kv_len) for part in parts] == [(40, 64), (64, 96), (96, 110)]
    assert [part.q.shape[2] for part in parts] == [24, 32, 14]
    assert {part.kv_start for part in parts} == {10}
    assert list(call.chunks(None)) == [call]
    # Rows that see later keys cannot be computed before these keys are there.
    whole = LayerCall(0, "prefill", q, k, k, 1.0, False, None, 10)
    assert list(whole.chunks(32)) == [whole]
