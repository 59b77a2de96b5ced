"""Attention inside Hugging Face models: replaced per layer and phase, exact, and undone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from calibrate import capture, measure
from calibrate.models import LoadedModel
from calibrate.prompts import Prompt
from calibrate.schema import GeometryConfig, RunConfig
from skip_softmax import Thresholds, applied
from skip_softmax.thresholds import (
    Geometry,
    LayerOverride,
    MinKvLen,
    ModelSection,
    ScaleFactors,
    UncalibratedLayer,
)
from skip_softmax.transformers import inspect_layers, intercepted

FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "phi", "gpt2"]
SHARPNESS = 400.0  # so sharp that tiles can be skipped in a random model


def thresholds(found: list, factor: float, *, floor: int = 60, **changes: object) -> Thresholds:
    first = found[0]
    return Thresholds(
        model=ModelSection(
            name="tiny",
            sha256="0",
            layers=len(found),
            q_heads=first.q_heads,
            kv_heads=first.kv_heads,
            head_dim=first.head_dim,
            dtype="float32",
        ),
        geometry=Geometry(prefill={"tile_q": 16, "tile_kv": 16}, decode={"tile_kv": 16}),
        min_kv_len=MinKvLen(prefill=floor, decode=floor),
        scale_factor=ScaleFactors(prefill=factor, decode=factor),
        **changes,
    )


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        2, tiny.VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed)
    )


def loaded(family: str, **changes: object) -> LoadedModel:
    model = tiny.model(family, SHARPNESS, **changes)
    return LoadedModel(model, None, family, "0", inspect_layers(model), 1024, "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found(family: str) -> None:
    layers = inspect_layers(tiny.model(family))
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert all(layer.reason is None for layer in layers)
    assert {layer.kv_heads for layer in layers} == {4 if family in ("phi", "gpt2") else 2}
    windows = {"gemma3": [48, None, 48], "mistral": [70, 70, 70]}.get(family, [None, None, None])
    assert [layer.window for layer in layers] == windows


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_is_the_dense_model_and_counts_every_tile(family: str) -> None:
    """Sliding layers too: their tiles are those of the reference with that window."""
    one = loaded(family)
    prompt = Prompt(
        "text",
        "calibration",
        150,
        tuple(tokens(150)[0].tolist()),
        tuple(tokens(9, 1)[0].tolist()),
        False,
    )
    geometry = GeometryConfig(prefill={"tile_q": 16, "tile_kv": 16}, decode={"tile_kv": 16})
    statistics = capture.empty_statistics(one, geometry, [150])
    logits = capture.observe(one, prompt, statistics, geometry)
    dense = capture.forward(one, prompt)
    assert (logits - dense).abs().max() <= 2e-4 * dense.abs().max()
    with applied(one.model, thresholds(one.layers, 0.0), decode_from=150) as counts:
        capture.forward(one, prompt)
    for phase in ("prefill", "decode"):
        assert torch.equal(statistics.visited(phase)[:, :, 0], counts.visited[phase])
        assert int(counts.skipped[phase].sum()) == 0
        assert int(counts.visited[phase].min()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_in_one_pass_equals_serving_step_by_step(family: str) -> None:
    """Teacher forcing in one call equals prefill plus one token at a time with a cache."""
    one = loaded(family)
    prompt, steps = tokens(150), tokens(6, 1)
    settings = thresholds(one.layers, 55.0)
    with torch.no_grad(), applied(one.model, settings, decode_from=150) as together:
        whole = one.model(torch.cat([prompt, steps], 1), use_cache=False).logits[0, 149:]
    with torch.no_grad(), applied(one.model, settings) as stepwise:
        out = one.model(prompt, use_cache=True)
        logits = [out.logits[0, -1]]
        for t in range(6):
            out = one.model(
                steps[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True
            )
            logits.append(out.logits[0, -1])
    torch.testing.assert_close(torch.stack(logits), whole, atol=2e-4, rtol=2e-4)
    for phase in ("prefill", "decode"):
        assert torch.equal(together.visited[phase], stepwise.visited[phase])
        assert torch.equal(together.skipped[phase], stepwise.skipped[phase])
        assert int(together.skipped[phase].sum()) > 0, "nothing skipped: this test shows nothing"


def test_batches_with_padding_equal_single_requests() -> None:
    one = loaded("llama")
    settings = thresholds(one.layers, 55.0)
    long, short = tokens(150), tokens(97, 1)
    batch = torch.cat([long, torch.cat([torch.ones(1, 53, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :53] = 0
    with torch.no_grad():
        with applied(one.model, settings) as alone:
            expected = [one.model(ids, use_cache=False).logits[0, -1] for ids in (long, short)]
        with applied(one.model, settings) as padded:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            logits = one.model(
                batch, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits[:, -1]
    torch.testing.assert_close(logits, torch.stack(expected), atol=2e-4, rtol=2e-4)
    assert torch.equal(alone.skipped["prefill"], padded.skipped["prefill"])
    assert alone.sparsity("prefill") > 0.01


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_uses_both_phases(cache: str) -> None:
    one = loaded("llama")
    prompt = tokens(120)
    arguments = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "disable_compile": True,
    }
    with applied(one.model, thresholds(one.layers, 0.0)):
        same = one.model.generate(prompt, cache_implementation=cache, **arguments)
    assert torch.equal(same, one.model.generate(prompt, **arguments))
    with applied(one.model, thresholds(one.layers, 55.0)) as counts:
        one.model.generate(prompt, cache_implementation=cache, **arguments)
    assert counts.sparsity("prefill") > 0.01
    assert counts.sparsity("decode") > 0.01


def test_chunked_prefill_is_prefill() -> None:
    one = loaded("llama")
    prompt = tokens(160)
    with torch.no_grad(), applied(one.model, thresholds(one.layers, 0.0)) as counts:
        first = one.model(prompt[:, :96], use_cache=True)
        chunked = one.model(prompt[:, 96:], past_key_values=first.past_key_values).logits[0, -1]
        whole = one.model(prompt, use_cache=False).logits[0, -1]
    torch.testing.assert_close(chunked, whole, atol=2e-4, rtol=2e-4)
    assert int(counts.visited["decode"].sum()) == 0


def test_calls_below_the_floor_run_dense() -> None:
    one = loaded("llama")
    with (
        torch.no_grad(),
        applied(one.model, thresholds(one.layers, 55.0, floor=151), decode_from=148) as counts,
    ):
        one.model(tokens(156), use_cache=False)
    assert int(counts.skipped["prefill"].sum()) == 0
    with (
        torch.no_grad(),
        applied(one.model, thresholds(one.layers, 55.0, floor=151), decode_from=150) as tail,
    ):
        one.model(tokens(156), use_cache=False)
    # Both runs decode positions 150 to 155 above the floor; the first also 148 and 149 below it.
    assert torch.equal(counts.skipped["decode"], tail.skipped["decode"])
    assert int(tail.skipped["decode"].sum()) > 0
    assert int(counts.visited["decode"].sum()) > int(tail.visited["decode"].sum())


def test_overrides_reach_their_layer_and_head_only() -> None:
    one = loaded("llama")
    override = LayerOverride(layer=1, prefill=(0.0, 55.0, 0.0, 0.0))
    settings = thresholds(one.layers, 0.0, layers=(override,))
    with torch.no_grad(), applied(one.model, settings) as counts:
        one.model(tokens(150), use_cache=False)
    skipped = counts.skipped["prefill"]
    assert int(skipped[1, 1]) > 0
    assert int(skipped.sum()) == int(skipped[1, 1])


def test_soft_cap_layers_keep_their_own_attention_and_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny.model("gemma2", SHARPNESS)
    prompt = tokens(100)
    with torch.no_grad():
        dense = model(prompt, use_cache=False).logits
    layers = inspect_layers(model)
    assert [layer.reason for layer in layers] == ["attention soft-cap"] * 3
    left = tuple(UncalibratedLayer(layer=i, reason="attention soft-cap") for i in range(3))
    caplog.clear()
    with torch.no_grad(), applied(model, thresholds(layers, 55.0)) as counts:
        assert torch.equal(model(prompt, use_cache=False).logits, dense)
    assert int(counts.visited["prefill"].sum()) == 0
    assert "layer 0 keeps the model's own attention: attention soft-cap" in caplog.text
    caplog.clear()
    with torch.no_grad(), applied(model, thresholds(layers, 55.0, uncalibrated=left)):
        assert torch.equal(model(prompt, use_cache=False).logits, dense)
    assert caplog.text == "", "a layer that the file lists needs no warning"


def test_a_mask_of_the_users_own_is_left_alone() -> None:
    one = loaded("llama")
    prompt = tokens(100)
    mask = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
    mask[..., 50:, :20] = False
    with torch.no_grad():
        dense = one.model(prompt, attention_mask=mask, use_cache=False).logits
        with applied(one.model, thresholds(one.layers, 55.0)) as counts:
            assert torch.equal(
                one.model(prompt, attention_mask=mask, use_cache=False).logits, dense
            )
    assert int(counts.visited["prefill"].sum()) == 0


def test_everything_is_undone_after_an_exception() -> None:
    one = loaded("llama")
    before = one.model.config._attn_implementation
    with torch.no_grad():
        dense = one.model(tokens(80), use_cache=False).logits
        with (
            pytest.raises(RuntimeError, match="in the block"),
            applied(one.model, thresholds(one.layers, 55.0)),
        ):
            raise RuntimeError("in the block")
        assert one.model.config._attn_implementation == before
        assert torch.equal(one.model(tokens(80), use_cache=False).logits, dense)


def test_a_second_block_on_the_same_model_is_refused() -> None:
    one = loaded("llama")
    settings = thresholds(one.layers, 0.0)
    with (
        applied(one.model, settings),
        pytest.raises(ValueError, match="already runs inside `applied`"),
        applied(one.model, settings),
    ):
        pass


def test_a_file_for_another_model_is_refused() -> None:
    one = loaded("llama")
    other = inspect_layers(tiny.model("gpt2"))
    with (
        pytest.raises(
            ValueError, match=r"must agree, but the file is for tiny with \(3, 4, 4, 16\)"
        ),
        applied(one.model, thresholds(other, 0.0)),
    ):
        pass


def test_two_models_can_run_at_once() -> None:
    first, second = loaded("llama"), loaded("gpt2")
    with (
        torch.no_grad(),
        applied(first.model, thresholds(first.layers, 55.0)) as a,
        applied(second.model, thresholds(second.layers, 0.0)) as b,
    ):
        first.model(tokens(150), use_cache=False)
        second.model(tokens(150), use_cache=False)
    assert int(a.skipped["prefill"].sum()) > 0
    assert int(b.skipped["prefill"].sum()) == 0
    assert int(b.visited["prefill"].sum()) > 0


def test_handlers_see_absolute_positions() -> None:
    one = loaded("gemma3")
    seen: list[tuple[int, str, int, int]] = []

    def handler(call) -> torch.Tensor:
        seen.append((call.layer, call.phase, call.kv_start, call.kv_len))
        return call.q.new_zeros(call.q.shape)

    with torch.no_grad(), intercepted(one.model, handler):
        out = one.model(tokens(100), use_cache=True)
        one.model(tokens(1), past_key_values=out.past_key_values)
    assert seen[:3] == [(i, "prefill", 0, 100) for i in range(3)]
    # A sliding cache holds the last 47 keys and the new one; the full layer holds all.
    assert seen[3:] == [(0, "decode", 53, 101), (1, "decode", 0, 101), (2, "decode", 53, 101)]


def test_loss_is_zero_without_skipping_and_grows_with_it() -> None:
    one = loaded("llama")
    prompt = Prompt(
        "text",
        "search",
        150,
        tuple(tokens(150)[0].tolist()),
        tuple(tokens(9, 1)[0].tolist()),
        False,
    )
    config = RunConfig(
        model={"path": "unused"},
        geometry={"prefill": {"tile_q": 16, "tile_kv": 16}, "decode": {"tile_kv": 16}},
        target={"min_kv_len": {"prefill": 150, "decode": 150}},
    )
    dense = capture.forward(one, prompt).float()
    losses = []
    for factor in (0.0, 20.0, 140.0):
        setting = {"prefill": (factor,) * 3, "decode": (factor,) * 3}
        losses.append(
            measure.compare(one, measure.thresholds_for(one, config, setting), prompt, dense)
        )
    assert losses[0].kl < 1e-7
    assert losses[0].score == losses[0].dense_score
    assert 1e-7 < losses[1].kl < losses[2].kl
    assert SimpleNamespace(**vars(losses[2])).skipped["prefill"] != [0, 0, 0]


def test_layers_that_attend_in_chunks_are_found_out_by_their_first_long_prompt() -> None:
    one = loaded("llama4")
    assert all(layer.reason is None for layer in one.layers), "four tokens cannot tell"
    ids, steps = tuple(tokens(150)[0].tolist()), tuple(tokens(9, 1)[0].tolist())
    prompt = Prompt("text", "calibration", 150, ids, steps, False)
    geometry = GeometryConfig(prefill={"tile_q": 16, "tile_kv": 16}, decode={"tile_kv": 16})
    statistics = capture.empty_statistics(one, geometry, [150])
    list(capture.capture(one, [prompt], statistics, geometry))
    named = capture.without_unseen(one, statistics)
    assert [layer.reason is None for layer in named.layers] == [False, False, False, True]
    file = measure.thresholds_for(named, RunConfig.model_validate({"model": {"path": "x"}}), {})
    assert [entry.layer for entry in file.uncalibrated] == [0, 1, 2]
