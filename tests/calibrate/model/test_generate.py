"""Greedy generation: the cache changes nothing, thresholds act step by step, and a text may end."""

from __future__ import annotations

import pytest
import tiny
import torch

from calibrate.loss.losses import generated_score
from calibrate.loss.measure import compare, compare_unguarded, with_generated
from calibrate.model.forward import forward
from calibrate.model.generate import greedy, greedy_text
from calibrate.model.load import LoadedModel
from calibrate.model.section import thresholds_for
from calibrate.prompts.build import Prompt
from calibrate.schema import RunConfig
from skip_softmax.huggingface.applied import applied
from skip_softmax.huggingface.layers import inspect_layers
from skip_softmax.thresholds.file import Thresholds

PROMPT = Prompt("text", "heldout", 157, tuple(tiny.tokens(157)[0].tolist()), (2, 3), True)
CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "unused"},
        "geometry": {"prefill": {"tile_q": 16, "tile_kv": 16}, "decode": {"tile_kv": 16}},
        "target": {"min_kv_len": {"prefill": 150, "decode": 150}},
    }
)


def loaded(family: str = "llama") -> LoadedModel:
    model = tiny.model(family, sharpness=400.0)
    model.generation_config.eos_token_id = None  # random tokens end no text
    words = tiny.tokenizer()
    words.eos_token = None
    return LoadedModel(model, words, family, "0", inspect_layers(model), 1024, "float32")


def skipping(one: LoadedModel, prefill: float, decode: float) -> Thresholds:
    layers = len(one.layers)
    return thresholds_for(
        one, CONFIG, {"prefill": (prefill,) * layers, "decode": (decode,) * layers}
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "phi"])
def test_generation_with_a_cache_equals_what_one_pass_ranks_first(family: str) -> None:
    one = loaded(family)
    written = greedy(one, PROMPT, 23)
    assert len(written) == 23 and len(set(written)) > 3, "a text that repeats itself shows little"
    whole = Prompt("text", "heldout", 157, PROMPT.ids, tuple(written), True)
    assert forward(one, whole)[:-1].argmax(-1).tolist() == written


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi"])
def test_without_thresholds_generation_is_the_dense_one_token_for_token(family: str) -> None:
    one = loaded(family)
    dense = greedy(one, PROMPT, 19)
    with applied(one.model, skipping(one, 0.0, 0.0)) as tiles:
        assert greedy(one, PROMPT, 19) == dense
    # 18 steps: the last token is written but not read.
    steps = sum(-(-length // 16) for length in range(158, 176))
    assert family == "gemma3" or tiles["decode"].visited[0, 0] == steps
    assert int(tiles["decode"].skipped.sum()) == int(tiles["prefill"].skipped.sum()) == 0


@pytest.mark.parametrize(("prefill", "decode"), [(149.0, 0.0), (0.0, 149.0)])
def test_thresholds_of_each_phase_act_on_what_is_generated(prefill: float, decode: float) -> None:
    one = loaded()
    with applied(one.model, skipping(one, prefill, decode)) as tiles:
        written = greedy(one, PROMPT, 31)
    assert (int(tiles["prefill"].skipped.sum()) > 0) == (prefill > 0)
    assert (int(tiles["decode"].skipped.sum()) > 0) == (decode > 0)
    assert written != greedy(one, PROMPT, 31)
    # The thresholds act on every step: each token follows from those before it.
    whole = Prompt("text", "heldout", 157, PROMPT.ids, tuple(written), True)
    with applied(one.model, skipping(one, prefill, decode), decode_from=157):
        assert forward(one, whole)[:-1].argmax(-1).tolist() == written


def test_a_token_that_ends_the_text_ends_it() -> None:
    one = loaded()
    written = greedy(one, PROMPT, 23)
    end = written[11]
    until = written[: written.index(end) + 1]
    for ends in (end, [399, end]):
        one.model.generation_config.eos_token_id = ends
        assert greedy(one, PROMPT, 23) == until
    one.model.generation_config.eos_token_id = None
    one.tokenizer.eos_token = one.tokenizer.convert_ids_to_tokens(end)
    assert greedy(one, PROMPT, 23) == until


def test_a_score_is_the_share_of_values_that_a_text_contains() -> None:
    asked = Prompt("t", "heldout", 1, (0,), (1,), True, ("Amber", "1234567", "x y"))
    assert generated_score("the AMBER needle, 1234567.", asked) == pytest.approx(200 / 3)
    assert generated_score("", asked) == 0.0
    assert generated_score("x y 1234567 amber", asked) == 100.0


@pytest.mark.parametrize("unguarded", [False, True])
def test_a_threshold_that_ruins_generation_gives_the_drop_that_was_planted(unguarded: bool) -> None:
    """The answer lists what the dense run writes first, and what no run writes."""
    one = loaded()
    dense = greedy_text(one, PROMPT, 29)
    asked = Prompt(
        "t", "heldout", 157, PROMPT.ids, (2, 3), True, (dense[:17], "no run writes this")
    )
    logits = forward(one, asked).float()

    def drop(factor: float) -> float:
        file = skipping(one, factor, factor)
        run = compare_unguarded if unguarded else compare
        before = run(one, file, asked, logits)
        after = with_generated(before, one, file, asked, dense, 29, unguarded=unguarded)
        assert "generated_drop" not in before.losses and before.dense_generated is None
        assert after.dense_generated == 50.0
        assert (after.visited, after.skipped) == (before.visited, before.skipped)
        return after.losses["generated_drop"]

    assert drop(0.0) == 0.0
    assert drop(149.0) == 50.0
    gained = greedy_text_of(one, 149.0)
    only = Prompt("t", "heldout", 157, PROMPT.ids, (2, 3), True, (gained[:17],))
    found = compare(one, skipping(one, 149.0, 149.0), only, logits)
    found = with_generated(found, one, skipping(one, 149.0, 149.0), only, dense, 29)
    assert found.losses["generated_drop"] == -100.0, "what only the sparse run writes is a gain"


def greedy_text_of(one: LoadedModel, factor: float) -> str:
    with applied(one.model, skipping(one, factor, factor)):
        return greedy_text(one, PROMPT, 29)


def test_half_precision_generates_too() -> None:
    one = loaded()
    one.model.to(torch.bfloat16)
    assert len(greedy(one, PROMPT, 5)) == 5
