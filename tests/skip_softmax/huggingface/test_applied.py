"""Attention inside Hugging Face models: replaced per layer and phase, exact, and undone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tiny import thresholds

from calibrate.loss import measure
from calibrate.model import section
from calibrate.model.config_json import read_model_config
from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from calibrate.schema import GeometryConfig, RunConfig
from calibrate.statistics import capture
from skip_softmax import applied
from skip_softmax.huggingface.layers import inspect_layers
from skip_softmax.thresholds.types import (
    LayerOverride,
    UncalibratedLayer,
)

FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "phi", "gpt2"]
SHARPNESS = 400.0  # so sharp that tiles can be skipped in a random model


def loaded(family: str, **changes: object) -> LoadedModel:
    model = tiny.model(family, SHARPNESS, **changes)
    return LoadedModel(model, None, family, "0", inspect_layers(model), 1024, "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_is_the_dense_model_and_counts_every_tile(family: str) -> None:
    """Sliding layers too: their tiles are those of the reference with that window."""
    one = loaded(family)
    prompt = Prompt(
        "text",
        "calibration",
        150,
        tuple(tiny.tokens(150)[0].tolist()),
        tuple(tiny.tokens(9, 1)[0].tolist()),
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
        assert torch.equal(statistics.visited(phase)[:, :, 0], counts[phase].visited)
        assert int(counts[phase].skipped.sum()) == 0
        assert int(counts[phase].visited.min()) > 0


@pytest.mark.parametrize("dense_last", [0, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_in_one_pass_equals_serving_step_by_step(family: str, dense_last: int) -> None:
    """Teacher forcing in one call equals prefill plus one token at a time with a cache.

    So the dense rows are the prompt's last ones, not those of the continuation that follows in one pass.
    """
    one = loaded(family)
    prompt, steps = tiny.tokens(150), tiny.tokens(6, 1)
    settings = thresholds(one.layers, 55.0, dense_last=dense_last)
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
        assert torch.equal(together[phase].visited, stepwise[phase].visited)
        assert torch.equal(together[phase].skipped, stepwise[phase].skipped)
        assert int(together[phase].skipped.sum()) > 0, "nothing skipped: this test shows nothing"


def test_the_last_rows_of_a_prompt_are_dense_and_statistics_know() -> None:
    """150 rows in votes of 16: the last vote has 6, so that 20 dense rows are those of two votes."""
    one = loaded("llama")
    ids = tuple(tiny.tokens(150)[0].tolist())
    prompt = Prompt("text", "calibration", 150, ids, tuple(tiny.tokens(6, 1)[0].tolist()), False)
    skipped = {}
    for dense_last in (0, 6, 7, 20, 150):
        tiles = {"tile_q": 16, "tile_kv": 16, "dense_last": dense_last}
        geometry = GeometryConfig(prefill=tiles, decode={"tile_kv": 16})
        statistics = capture.empty_statistics(one, geometry, [150])
        capture.observe(one, prompt, statistics, geometry)
        factor = 2.0**5.75  # an edge of the histogram, where its answer is exact
        settings = thresholds(one.layers, factor, dense_last=dense_last)
        with applied(one.model, settings, decode_from=150) as counts:
            capture.forward(one, prompt)
        skipped[dense_last] = int(counts["prefill"].skipped.sum())
        # Skipping in one layer moves what the next one sees; the first layer sees what capture saw.
        exact = statistics.skipped("prefill", factor)[0, :, 0]
        assert torch.equal(counts["prefill"].skipped[0].double(), exact)
        assert torch.equal(statistics.visited("prefill")[:, :, 0], counts["prefill"].visited)
        assert int(counts["decode"].skipped.sum()) > 0
    assert skipped[0] > skipped[6] > skipped[7] == skipped[20] > skipped[150] == 0


def test_batches_with_padding_equal_single_requests() -> None:
    one = loaded("llama")
    settings = thresholds(one.layers, 55.0, dense_last=16)
    long, short = tiny.tokens(150), tiny.tokens(97, 1)
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
    assert torch.equal(alone["prefill"].skipped, padded["prefill"].skipped)
    assert alone.sparsity("prefill") > 0.01


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_uses_both_phases(cache: str) -> None:
    one = loaded("llama")
    prompt = tiny.tokens(120)
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
    prompt = tiny.tokens(160)
    with torch.no_grad(), applied(one.model, thresholds(one.layers, 0.0)) as counts:
        first = one.model(prompt[:, :96], use_cache=True)
        chunked = one.model(prompt[:, 96:], past_key_values=first.past_key_values).logits[0, -1]
        whole = one.model(prompt, use_cache=False).logits[0, -1]
    torch.testing.assert_close(chunked, whole, atol=2e-4, rtol=2e-4)
    assert int(counts["decode"].visited.sum()) == 0


def test_calls_below_the_floor_run_dense() -> None:
    one = loaded("llama")
    with (
        torch.no_grad(),
        applied(one.model, thresholds(one.layers, 55.0, floor=151), decode_from=148) as counts,
    ):
        one.model(tiny.tokens(156), use_cache=False)
    assert int(counts["prefill"].skipped.sum()) == 0
    with (
        torch.no_grad(),
        applied(one.model, thresholds(one.layers, 55.0, floor=151), decode_from=150) as tail,
    ):
        one.model(tiny.tokens(156), use_cache=False)
    # Both runs decode positions 150 to 155 above the floor; the first also 148 and 149 below it.
    assert torch.equal(counts["decode"].skipped, tail["decode"].skipped)
    assert int(tail["decode"].skipped.sum()) > 0
    assert int(counts["decode"].visited.sum()) > int(tail["decode"].visited.sum())


def test_overrides_reach_their_layer_and_head_only() -> None:
    one = loaded("llama")
    override = LayerOverride(layer=1, prefill=(0.0, 55.0, 0.0, 0.0))
    settings = thresholds(one.layers, 0.0, layers=(override,))
    with torch.no_grad(), applied(one.model, settings) as counts:
        one.model(tiny.tokens(150), use_cache=False)
    skipped = counts["prefill"].skipped
    assert int(skipped[1, 1]) > 0
    assert int(skipped.sum()) == int(skipped[1, 1])


def test_soft_cap_layers_keep_their_own_attention_and_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny.model("gemma2", SHARPNESS)
    prompt = tiny.tokens(100)
    with torch.no_grad():
        dense = model(prompt, use_cache=False).logits
    layers = inspect_layers(model)
    assert [layer.reason for layer in layers] == ["attention soft-cap"] * 3
    caplog.clear()
    with torch.no_grad(), applied(model, thresholds(layers, 55.0, uncalibrated=())) as counts:
        assert torch.equal(model(prompt, use_cache=False).logits, dense)
    assert int(counts["prefill"].visited.sum()) == 0
    assert "layer 0 keeps the model's own attention: attention soft-cap" in caplog.text
    caplog.clear()
    with torch.no_grad(), applied(model, thresholds(layers, 55.0)):
        assert torch.equal(model(prompt, use_cache=False).logits, dense)
    assert caplog.text == "", "a layer that the file lists needs no warning"


def test_a_mask_of_the_users_own_is_left_alone() -> None:
    one = loaded("llama")
    prompt = tiny.tokens(100)
    mask = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
    mask[..., 50:, :20] = False
    with torch.no_grad():
        dense = one.model(prompt, attention_mask=mask, use_cache=False).logits
        with applied(one.model, thresholds(one.layers, 55.0)) as counts:
            assert torch.equal(
                one.model(prompt, attention_mask=mask, use_cache=False).logits, dense
            )
    assert int(counts["prefill"].visited.sum()) == 0


def test_everything_is_undone_after_an_exception() -> None:
    one = loaded("llama")
    before = one.model.config._attn_implementation
    with torch.no_grad():
        dense = one.model(tiny.tokens(80), use_cache=False).logits
        with (
            pytest.raises(RuntimeError, match="in the block"),
            applied(one.model, thresholds(one.layers, 55.0)),
        ):
            raise RuntimeError("in the block")
        assert one.model.config._attn_implementation == before
        assert torch.equal(one.model(tiny.tokens(80), use_cache=False).logits, dense)


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


def test_a_file_may_be_given_by_its_path(tmp_path: Path) -> None:
    one = loaded("llama")
    path = tmp_path / "thresholds.yaml"
    thresholds(one.layers, 55.0).save(path)
    for given in (path, str(path)):
        with torch.no_grad(), applied(one.model, given) as counts:
            one.model(tiny.tokens(150), use_cache=False)
        assert counts.sparsity("prefill") > 0.01
    with (
        pytest.raises(TypeError, match="must be the path of a YAML file, but got 580"),
        applied(one.model, 580),
    ):  # type: ignore[arg-type]
        pass


def test_two_models_can_run_at_once() -> None:
    first, second = loaded("llama"), loaded("gpt2")
    with (
        torch.no_grad(),
        applied(first.model, thresholds(first.layers, 55.0)) as a,
        applied(second.model, thresholds(second.layers, 0.0)) as b,
    ):
        first.model(tiny.tokens(150), use_cache=False)
        second.model(tiny.tokens(150), use_cache=False)
    assert int(a["prefill"].skipped.sum()) > 0
    assert int(b["prefill"].skipped.sum()) == 0
    assert int(b["prefill"].visited.sum()) > 0


def test_loss_is_zero_without_skipping_and_grows_with_it() -> None:
    one = loaded("llama")
    prompt = Prompt(
        "text",
        "search",
        150,
        tuple(tiny.tokens(150)[0].tolist()),
        tuple(tiny.tokens(9, 1)[0].tolist()),
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
            measure.compare(one, section.thresholds_for(one, config, setting), prompt, dense)
        )
    assert losses[0].losses["kl"] < 1e-7
    assert losses[0].losses["score_drop"] == 0.0
    assert 1e-7 < losses[1].losses["kl"] < losses[2].losses["kl"]
    assert losses[2].skipped["prefill"] != [0, 0, 0]


def test_layers_that_attend_in_chunks_are_found_out_by_their_first_long_prompt() -> None:
    one = loaded("llama4")
    assert all(layer.reason is None for layer in one.layers), "four tokens cannot tell"
    ids, steps = tuple(tiny.tokens(150)[0].tolist()), tuple(tiny.tokens(9, 1)[0].tolist())
    prompt = Prompt("text", "calibration", 150, ids, steps, False)
    geometry = GeometryConfig(prefill={"tile_q": 16, "tile_kv": 16}, decode={"tile_kv": 16})
    statistics = capture.empty_statistics(one, geometry, [150])
    [(_, statistics)] = capture.capture(one, [prompt], statistics, geometry)
    named = capture.without_unseen(one, statistics)
    assert [layer.reason is None for layer in named.layers] == [False, False, False, True]
    file = section.thresholds_for(named, RunConfig.model_validate({"model": {"path": "x"}}), {})
    assert [entry.layer for entry in file.uncalibrated] == [0, 1, 2]


def test_layers_left_alone_see_no_later_token_of_a_static_cache() -> None:
    """The cache's length is a tensor that grows before such a layer builds its mask."""
    model = tiny.model("llama", SHARPNESS)
    found = inspect_layers(model)
    left = tuple(UncalibratedLayer(layer=i, reason="test") for i in (0, 2))
    prompt = tiny.tokens(60)

    def in_chunks() -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=128)
        with torch.no_grad():
            chunks = [model(part, past_key_values=cache).logits for part in prompt.split(25, 1)]
        return torch.cat(chunks, 1)

    own = in_chunks()
    with applied(model, thresholds(found, 0.0, uncalibrated=left)) as counts:
        torch.testing.assert_close(in_chunks(), own, rtol=1e-4, atol=1e-5)
    assert counts["prefill"].visited.sum(1).bool().tolist() == [False, True, False]


def test_tokens_of_an_image_see_each_other() -> None:
    torch.manual_seed(0)
    text = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 48,
        "layer_types": ["full_attention", "sliding_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_id=399,
        boi_token_id=397, eoi_token_id=398,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(20)
    found = inspect_layers(model)
    assert [layer.reason for layer in found] == [None, None]
    ids = torch.randint(2, 390, (1, 200))
    ids[0, 20], ids[0, 21:37], ids[0, 37] = 397, 399, 398
    image = {
        "input_ids": ids,
        "token_type_ids": (ids == 399).long(),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }
    file = thresholds(found, 0.0)
    with torch.no_grad():
        own = model(**image).logits
        with applied(model, file) as counts:
            torch.testing.assert_close(model(**image).logits, own, rtol=1e-4, atol=1e-5)
            assert counts["prefill"].visited.sum() == 0, "no layer is plain causal beside an image"
            model(input_ids=ids[:, 40:])
            assert counts["prefill"].visited.sum(1).bool().all()


def test_layers_of_the_images_are_none_of_the_files() -> None:
    """Gemma 4 numbers its vision layers as it numbers those of the text."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "global_head_dim": 16,
        "num_global_key_value_heads": 4, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 400, "num_kv_shared_layers": 0, "sliding_window": 512,
        "layer_types": ["full_attention"] * 2, "use_bidirectional_attention": None,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 3,
    }  # fmt: skip
    config = transformers.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=399
    )
    model = transformers.Gemma4ForConditionalGeneration(config).eval()
    side = 18  # patches; 9 of them become one token
    ids = torch.randint(2, 390, (1, 60))
    ids[0, 5 : 5 + side * side // 9] = 399
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
    image = {
        "input_ids": ids,
        "pixel_values": torch.rand(1, side * side, 48),
        "image_position_ids": places.reshape(1, -1, 2),
        "mm_token_type_ids": (ids == 399).long(),
    }
    file = thresholds(inspect_layers(model), 250.0, floor=300)  # every text layer runs dense
    with torch.no_grad():
        own = model(**image).logits
        with applied(model, file) as counts:
            torch.testing.assert_close(model(**image).logits, own, rtol=1e-4, atol=1e-5)
    assert counts["prefill"].visited.sum(1).tolist() == [40, 40]  # 4 heads, 4 x 4 tiles, causal
    assert counts["prefill"].skipped.sum() == 0


def test_one_odd_call_is_left_alone_and_the_next_is_not(caplog: pytest.LogCaptureFixture) -> None:
    one = loaded("llama")
    prompt = tiny.tokens(100)
    hole = torch.ones(1, 100, dtype=torch.long)
    hole[0, 40:45] = 0
    with torch.no_grad(), applied(one.model, thresholds(one.layers, 55.0)) as counts:
        one.model(prompt)
        visited = int(counts["prefill"].visited.sum())
        for _ in range(2):
            one.model(prompt, attention_mask=hole)
        assert int(counts["prefill"].visited.sum()) == visited > 0
        one.model(prompt)
    assert int(counts["prefill"].visited.sum()) == 2 * visited
    assert caplog.text.count("layer 0 keeps the model's own attention") == 1


def test_hooks_may_move_what_a_layer_is_given() -> None:
    one = loaded("llama")
    prompt = tiny.tokens(100)

    def moved(module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        copies = {
            k: v.clone().to("cpu") if isinstance(v, torch.Tensor) else v
            for k, v in keywords.items()
        }
        return arguments, copies

    with torch.no_grad(), applied(one.model, thresholds(one.layers, 55.0)):
        own = one.model(prompt).logits
        for layer in one.model.model.layers:
            layer.register_forward_pre_hook(moved, with_kwargs=True)
        assert torch.equal(one.model(prompt).logits, own)


def test_models_that_share_a_config() -> None:
    first = tiny.model("llama", SHARPNESS)
    second = transformers.LlamaForCausalLM(first.config).eval()
    file = thresholds(inspect_layers(first), 55.0)
    prompt = tiny.tokens(100)
    with torch.no_grad():
        own, first_own = second(prompt).logits, first(prompt).logits
        with applied(first, file):
            assert torch.equal(second(prompt).logits, own)
            with (
                pytest.raises(ValueError, match="one that shares its config, already runs"),
                applied(second, file),
            ):
                pass
            copied = copy.deepcopy(first)
            assert torch.equal(copied(prompt).logits, first_own), "a copy is outside of the block"
        assert torch.equal(second(prompt).logits, own)
        assert torch.equal(copied(prompt).logits, first_own)


def test_latent_attention_runs_the_file_that_was_made_for_it(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    found = inspect_layers(model)
    assert {(layer.head_dim, layer.head_dim_v) for layer in found} == {(24, 16)}
    config.save_pretrained(tmp_path)  # and what `import --model` reads says the same
    read = read_model_config(tmp_path)
    assert (read.shape, read.head_dim_v) == ((2, 4, 4, 24), 16)
    prompt = tiny.tokens(100)
    with torch.no_grad():
        own = model(prompt).logits
        with applied(model, thresholds(found, 0.0)) as counts:
            torch.testing.assert_close(model(prompt).logits, own, rtol=1e-4, atol=1e-5)
    assert counts["prefill"].visited.sum() > 0


def test_a_block_entered_in_inference_mode_counts_outside_of_it() -> None:
    one = loaded("llama")
    with torch.inference_mode():
        block = applied(one.model, thresholds(one.layers, 55.0))
        counts = block.__enter__()
    with torch.no_grad():
        one.model(tiny.tokens(100))
    block.__exit__(None, None, None)
    assert counts["prefill"].visited.sum() > 0


def test_training_through_a_block_is_refused_by_name() -> None:
    one = loaded("llama")
    with applied(one.model, thresholds(one.layers, 55.0)):
        logits = one.model(tiny.tokens(100)).logits
    with pytest.raises(RuntimeError, match="skip-softmax attention has no backward"):
        logits.sum().backward()
