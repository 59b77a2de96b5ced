"""At scale factor 0 nothing may change: a layer gives the model's own attention, or keeps it and is named."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tiny import thresholds
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from skip_softmax import applied
from skip_softmax.huggingface.layers import Layer, inspect_layers

SMALL = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def louder(model: Any, factor: float = 5.0) -> Any:
    """Weights so large that every key matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model.eval()


def unchanged(
    model: Any, run: Callable[[], torch.Tensor], layers: list[Layer] | None = None
) -> Any:
    """Runs a model with and without a dense file, and returns the tiles that were counted."""
    layers = inspect_layers(model) if layers is None else layers
    with torch.no_grad():
        own = run()
        with applied(model, thresholds(layers)) as counts:
            got = run()
    assert got.dtype == own.dtype
    rounding = 2e-2 if own.dtype == torch.bfloat16 else 1e-4
    assert (got.float() - own.float()).abs().max() <= rounding * own.float().abs().max()
    return counts


# Which keys a layer attends to.


def test_a_selection_of_key_blocks_is_part_of_the_model() -> None:
    """https://github.com/ggml-org/llama.cpp/pull/24908"""
    torch.manual_seed(0)
    config = transformers.MiniMaxM3VLTextConfig(
        **{**SMALL, "num_hidden_layers": 3}, dense_intermediate_size=64, shared_intermediate_size=64,
        head_dim=16, rotary_dim=16, num_local_experts=4, num_experts_per_tok=2, index_n_heads=2,
        index_head_dim=16, index_block_size=16, index_topk_blocks=2, mlp_layer_types=["dense"] * 3,
        layer_types=["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"],
    )  # fmt: skip
    model = louder(transformers.MiniMaxM3VLForCausalLM(config), 4.0)
    layers = inspect_layers(model)
    reason = "a selection of key blocks"
    assert [layer.reason for layer in layers] == [reason, None, reason]
    counts = unchanged(model, lambda: model(tiny.tokens(200), use_cache=False).logits, layers)
    assert counts["prefill"].visited.sum(1).bool().tolist() == [False, True, False]


class Telling(LlamaAttention):
    """Hands an argument to its attention function that nobody else knows."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return super().forward(*arguments, **keywords, my_bias=torch.ones(1))


def test_an_argument_that_nobody_knows_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("llama")
    layers = inspect_layers(model)
    other = Telling(model.config, 1)
    other.load_state_dict(model.model.layers[1].self_attn.state_dict())
    model.model.layers[1].self_attn = other.eval()
    assert [layer.reason is None for layer in inspect_layers(model)] == [True, False, True]
    counts = unchanged(model, lambda: model(tiny.tokens(100)).logits, layers)
    assert counts["prefill"].visited.sum(1).bool().tolist() == [True, False, True]
    assert "layer 1 keeps the model's own attention: the argument `my_bias`" in caplog.text


def half(module: nn.Module, *given: Any, **keywords: Any) -> Any:
    out, weights = transformers.models.llama.modeling_llama.eager_attention_forward(
        module, *given, **keywords
    )
    return out / 2, weights


def test_what_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.models.qwen3.modeling_qwen3, "eager_attention_forward", half)
    model = tiny.model("qwen3")
    assert [layer.reason for layer in inspect_layers(model)] == [None] * 3
    model.set_attn_implementation("eager")
    layers = inspect_layers(model)
    assert {layer.reason for layer in layers} == {
        "its own attention computes something else than softmax attention"
    }
    unchanged(model, lambda: model(tiny.tokens(100)).logits, layers)


def gpt2(**changes: Any) -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=2, n_head=4, add_cross_attention=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("states", [12, 120])
def test_cross_attention_sees_all_states_of_its_encoder(states: int) -> None:
    """https://github.com/huggingface/transformers/pull/47946"""
    torch.manual_seed(0)
    model = louder(transformers.GPT2LMHeadModel(gpt2()))
    encoded = torch.randn(1, states, 64)
    counts = unchanged(
        model,
        lambda: model(tiny.tokens(30), encoder_hidden_states=encoded, use_cache=False).logits,
    )
    assert counts["prefill"].visited.bool().all()


def test_a_captioner_writes_the_same_caption() -> None:
    torch.manual_seed(0)
    vision = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32,
        patch_size=4,
    )  # fmt: skip
    decoder = transformers.GPT2LMHeadModel(gpt2(is_decoder=True))
    model = louder(
        transformers.VisionEncoderDecoderModel(
            encoder=transformers.ViTModel(vision), decoder=decoder
        )
    )
    pixels = torch.randn(1, 3, 32, 32)
    unchanged(model.decoder, lambda: model.generate(
        pixel_values=pixels, max_new_tokens=8, min_new_tokens=8, do_sample=False,
        decoder_start_token_id=1, pad_token_id=0,
    ))  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_that_stand_before_the_tokens(attention: str) -> None:
    """A prefix of keys and values that was tuned, not computed: the mask is longer than the tokens."""
    model = louder(tiny.model("llama"))
    model.set_attn_implementation(attention)
    torch.manual_seed(0)
    prefix = [(torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)) for _ in range(3)]
    mask = torch.ones(1, 140, dtype=torch.long)
    mask[0, :7] = 0

    def run() -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config)
        for layer, (k, v) in enumerate(prefix):
            cache.update(k, v, layer)
        logits: torch.Tensor = model(
            tiny.tokens(100), past_key_values=cache, attention_mask=mask
        ).logits
        return logits

    assert unchanged(model, run)["prefill"].visited.bool().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_in_both_directions_stays_so(attention: str) -> None:
    """Decoders that read a text as an encoder does; the mask and the module say so."""
    model = louder(tiny.model("llama"))
    model.set_attn_implementation(attention)
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    layers = inspect_layers(model)
    assert (
        unchanged(model, lambda: model(tiny.tokens(100), use_cache=False).logits, layers)["prefill"]
        .visited.bool()
        .all()
    )


def test_a_module_that_is_not_causal_decides_where_there_is_no_mask() -> None:
    model = louder(tiny.model("llama"))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    padded = torch.ones(1, 100, dtype=torch.long)
    padded[0, :9] = 0
    unchanged(model, lambda: model(tiny.tokens(100), use_cache=False).logits)
    unchanged(
        model,
        lambda: model(tiny.tokens(100), attention_mask=padded, use_cache=False).logits[:, 9:],
    )


def flash(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **given: Any) -> Any:
    """As flash attention: the last row stands at the last key, and of a mask only padding is given."""
    rows = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    keys = torch.arange(k.shape[2])
    seen = keys <= rows
    if given.get("sliding_window") is not None:
        seen = seen & (keys > rows - given["sliding_window"])
    if mask is not None:
        assert mask.dim() == 2
        seen = seen & mask[:, None, None, :].bool()
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, seen, scale=given["scaling"], enable_gqa=True
    )
    return out.transpose(1, 2), None


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("left", [None, 1], ids=["all ours", "one left alone"])
def test_flash_attention_is_given_padding_alone(
    family: str, left: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "flash_attention_2"
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, name, flash)
    model = louder(tiny.model(family), 3.0)
    model.config._attn_implementation_internal = name
    layers = [
        replace(layer, reason="a test" if layer.index == left else None)
        for layer in inspect_layers(model)
    ]
    batch, mask = tiny.tokens(120).expand(2, -1), torch.ones(2, 120, dtype=torch.long)
    mask[0, :17] = 0
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    for arguments in ({}, {"attention_mask": mask}):
        counts = unchanged(model, lambda a=arguments: model.generate(batch, **a, **given), layers)
        for phase in counts:
            seen = counts[phase].visited.sum(1).bool().tolist()
            assert seen == [index != left for index in range(3)]


def test_attention_weights_that_somebody_asks_for_are_given() -> None:
    model = tiny.model("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = model(tiny.tokens(60), output_attentions=True).attentions
        with applied(model, thresholds(inspect_layers(model))):
            got = model(tiny.tokens(60), output_attentions=True).attentions
    assert len(own) == len(got) == 3
    assert all(torch.equal(a, b) for a, b in zip(own, got, strict=True))


# What a model's shape is.


def test_layers_of_another_head_size_are_left_alone() -> None:
    """https://github.com/vllm-project/vllm/issues/52768"""
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        **{**SMALL, "num_hidden_layers": 4}, head_dim=16, global_head_dim=32, num_global_key_value_heads=2,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=tiny.VOCABULARY, num_kv_shared_layers=0,
        sliding_window=48, layer_types=["sliding_attention"] * 3 + ["full_attention"],
        max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.Gemma4ForCausalLM(config).eval()
    layers = inspect_layers(model)
    other = "other head counts or head size than most layers"
    assert [(layer.head_dim, layer.reason) for layer in layers] == [(16, None)] * 3 + [(32, other)]
    counts = unchanged(model, lambda: model(tiny.tokens(100)).logits, layers)
    assert counts["prefill"].visited.sum(1).bool().tolist() == [True, True, True, False]


def test_a_decoder_s_shape_is_not_its_encoder_s() -> None:
    """Bart's config calls the encoder's heads and layers simply heads and layers."""
    torch.manual_seed(0)
    model = louder(transformers.BartForCausalLM(transformers.BartConfig(
        vocab_size=400, d_model=64, encoder_layers=5, decoder_layers=2, encoder_attention_heads=8,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )), 2.0)  # fmt: skip
    layers = inspect_layers(model)
    assert [(layer.index, layer.shape, layer.reason) for layer in layers] == [
        (0, (4, 4, 16), None),
        (1, (4, 4, 16), None),
    ]
    unchanged(model, lambda: model(tiny.tokens(100)).logits, layers)
    with (
        pytest.raises(
            ValueError, match=r"must agree, but the file .* \(5, 8, 8, 8\) and the model has"
        ),
        applied(model, thresholds([Layer(i, "", 8, 8, 8, None, None) for i in range(5)])),
    ):
        pass


# Which number a token takes.


@pytest.fixture(scope="module")
def sharp() -> Any:
    return tiny.model("llama", 400.0)


GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 1}


@pytest.mark.parametrize("how", ["assistant", "prompt lookup", "early exit"])
def test_drafts_that_are_verified_together_are_decode_steps(sharp: Any, how: str) -> None:
    """https://github.com/huggingface/transformers/issues/30042: both outputs must be the same."""
    prompt = tiny.tokens(120)
    arguments: dict[str, dict[str, Any]] = {
        "assistant": {"assistant_model": tiny.model("llama", 1.0)},
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "early exit": {"assistant_early_exit": 2},
    }
    given = {**GREEDY, **arguments[how]}
    for prefill, decode in ((55.0, 0.0), (55.0, 55.0)):
        file = thresholds(inspect_layers(sharp), prefill, decode)
        with applied(sharp, file) as plain:
            expected = sharp.generate(prompt, **GREEDY)
        with applied(sharp, file) as drafted:
            assert torch.equal(sharp.generate(prompt, **given), expected)
        if how != "early exit":  # whose drafts read the prompt too, with some of the layers
            assert torch.equal(plain["prefill"].skipped, drafted["prefill"].skipped)
        assert plain.sparsity("prefill") > 0.01
        assert int(drafted["decode"].visited.sum()) >= int(plain["decode"].visited.sum()) > 0
        assert (drafted.sparsity("decode") > 0) == (decode > 0)


def test_drafts_are_decode_steps_of_the_model_that_writes_them_too(sharp: Any) -> None:
    """It is asked to go on with a text of which a part was generated."""
    prompt, writer = tiny.tokens(120), tiny.model("llama", 1.0)
    with applied(sharp, thresholds(inspect_layers(sharp))) as counts:
        writer.generate(prompt, assistant_model=sharp, **GREEDY)
    # 8 votes of 16 rows, the last of 8 rows, on 1 to 8 tiles; and, after its first drafts were rejected, the
    # last token of the prompt once more.
    assert counts["prefill"].visited.unique().tolist() == [36 + 8]
    assert int(counts["decode"].visited.min()) > 0


def test_a_copy_that_is_made_inside_generates_outside(sharp: Any) -> None:
    prompt, file = tiny.tokens(120), thresholds(inspect_layers(sharp), 55.0, 55.0)
    own = sharp.generate(prompt, **GREEDY)
    with applied(sharp, file) as counts:
        copied = copy.deepcopy(sharp)
        assert torch.equal(copied.generate(prompt, **GREEDY), own)
        assert int(counts["prefill"].visited.sum()) == 0


@pytest.mark.parametrize("chunk", [120, 119, 59, 100])
def test_every_chunk_of_a_prompt_is_prefill_in_generate(sharp: Any, chunk: int) -> None:
    """The last chunk has 120, 1, 2 and 20 tokens."""
    prompt, given = tiny.tokens(120), {**GREEDY, "prefill_chunk_size": chunk}
    with applied(sharp, thresholds(inspect_layers(sharp), 0.0, 55.0)) as counts:
        chunked = sharp.generate(prompt, **given)
    with applied(sharp, thresholds(inspect_layers(sharp), 0.0, 55.0)) as whole:
        assert torch.equal(sharp.generate(prompt, **GREEDY), chunked)
    assert torch.equal(counts["decode"].visited, whole["decode"].visited)
    assert torch.equal(counts["decode"].skipped, whole["decode"].skipped)
    assert int(counts["prefill"].visited.sum()) >= int(whole["prefill"].visited.sum())


def test_the_next_turn_of_a_conversation_is_prefill(sharp: Any) -> None:
    first, more = tiny.tokens(100), tiny.tokens(30, 1)
    with applied(sharp, thresholds(inspect_layers(sharp), 0.0, 0.0)) as counts:
        out = sharp.generate(first, return_dict_in_generate=True, **GREEDY)
        prefill, decode = (counts[phase].visited for phase in ("prefill", "decode"))
        turn = torch.cat([out.sequences, more], 1)
        sharp.generate(turn, past_key_values=out.past_key_values, **GREEDY)
    # The last token was written, not read, so 31 rows from position 123 on: votes of 5, 16 and 10 rows, which
    # see tiles of 16 keys up to positions 127, 143 and 153.
    assert (counts["prefill"].visited - prefill).unique().tolist() == [8 + 9 + 10]
    # 23 tokens each from positions 124 and 154 on; in a tile of 16 keys each.
    tiles = [sum(-(-(first + i + 1) // 16) for i in range(23)) for first in (100, 154)]
    assert decode.unique().tolist() == [tiles[0]]
    assert (counts["decode"].visited - decode).unique().tolist() == [tiles[1]]


def test_padded_prompts_end_where_the_batch_s_prompts_end(sharp: Any) -> None:
    long, short = tiny.tokens(120), tiny.tokens(90, 1)
    batch = torch.cat([long, torch.cat([torch.ones(1, 30, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :30] = 0
    file = thresholds(inspect_layers(sharp), 0.0, 55.0)
    with applied(sharp, file) as together:
        sharp.generate(batch, attention_mask=mask, **GREEDY)
    with applied(sharp, file) as alone:
        for prompt in (long, short):
            sharp.generate(prompt, **GREEDY)
    for phase in ("prefill", "decode"):
        assert torch.equal(together[phase].visited, alone[phase].visited)


# Dtypes.


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_does_what_it_does_without_us(family: str, attention: str) -> None:
    """https://github.com/kohya-ss/musubi-tuner/pull/1037: rotation leaves q and k in float32."""
    model = tiny.model(family)
    model.set_attn_implementation(attention)
    with torch.autocast("cpu", torch.bfloat16):
        counts = unchanged(model, lambda: model(tiny.tokens(100)).logits)
    assert counts["prefill"].visited.bool().all()


def test_other_dtypes_are_the_model_s_own_business(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("llama")
    layers = inspect_layers(model)
    for layer in model.model.layers:
        layer.self_attn.v_proj.to(torch.float64)
        layer.self_attn.v_proj.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    with torch.no_grad():
        with pytest.raises(RuntimeError) as own:
            model(tiny.tokens(60))
        with applied(model, thresholds(layers)), pytest.raises(RuntimeError) as got:
            model(tiny.tokens(60))
    assert str(got.value) == str(own.value)
    assert "different dtypes" in caplog.text


# The function that a module would have called.


class Patched(LlamaAttention):
    """A user's own class in a user's own file."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_subclass_keeps_the_attention_of_its_parent(attention: str) -> None:
    """https://github.com/huggingface/transformers/pull/45811"""
    model = tiny.model("llama")
    model.set_attn_implementation(attention)
    for index, layer in enumerate(model.model.layers):
        other = Patched(model.config, index)
        other.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = other.eval()
    hole = torch.ones(1, 80, dtype=torch.long)
    hole[0, 30:40] = 0
    run = lambda: model(tiny.tokens(80), attention_mask=hole, use_cache=False).logits  # noqa: E731
    assert unchanged(model, run)["prefill"].visited.sum() == 0
    assert unchanged(model, lambda: model(tiny.tokens(80)).logits)["prefill"].visited.bool().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_image_tower_with_a_function_of_another_name(attention: str) -> None:
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128,
        "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "projector_input_dim": 64,
        "projector_output_dim": 64, "pixel_shuffle_ratio": 0.5, "num_channels": 3,
    }  # fmt: skip
    text = {
        **SMALL, "head_dim": 16, "intermediate_size_mlp": 64, "attention_chunk_size": 64,
        "num_local_experts": 2, "num_experts_per_tok": 1,
    }  # fmt: skip
    model = transformers.Llama4ForConditionalGeneration._from_config(
        transformers.Llama4Config(
            text_config=text, vision_config=vision, image_token_index=299, boi_token_index=297,
            eoi_token_index=298,
        ),
        attn_implementation=attention,
    ).eval()  # fmt: skip
    seen = tiny.tokens(60)
    seen[0, 10] = 299
    unchanged(model, lambda: model(input_ids=seen, pixel_values=torch.ones(1, 3, 28, 28)).logits)


def test_code_that_asks_for_the_name_of_the_attention_takes_its_own_way() -> None:
    model = tiny.model("llama")
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda module, _: seen.append(module.config._attn_implementation)
    )
    with applied(model, thresholds(inspect_layers(model))):
        model(tiny.tokens(20))
        assert model.config._attn_implementation in ("eager", "sdpa")
        assert type(copy.deepcopy(model.config)._attn_implementation) is str
    handle.remove()
    assert seen[-1] == "sdpa"
    assert type(model.config._attn_implementation) is str


# Weights that are elsewhere.


def test_weights_on_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """https://github.com/huggingface/transformers/pull/37688"""
    own = tiny.model("llama", 400.0)
    own.save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    layers = inspect_layers(model)
    assert [layer.reason for layer in layers] == [None] * 3
    prompt = tiny.tokens(100)
    with torch.no_grad():
        with applied(own, thresholds(layers, 55.0, 0.0)) as expected:
            wanted = own(prompt).logits
        with applied(model, thresholds(layers, 55.0, 0.0)) as counts:
            torch.testing.assert_close(model(prompt).logits, wanted)
    assert counts.sparsity("prefill") == expected.sparsity("prefill") > 0.01
    assert torch.equal(counts["prefill"].skipped, expected["prefill"].skipped)


def test_a_model_without_numbers_says_so() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match=r"must have weights, .* on the meta device"):
        inspect_layers(model)


def test_nothing_is_left_of_a_block(caplog: pytest.LogCaptureFixture) -> None:
    before = (
        transformers.AttentionInterface.get_interface,
        transformers.GenerationMixin.generate,
        dict(vars(transformers.AttentionInterface)),
        dict(vars(transformers.AttentionMaskInterface)),
    )
    model, other = tiny.model("llama"), tiny.model("gpt2")
    with (
        caplog.at_level(logging.WARNING),
        applied(model, thresholds(inspect_layers(model))),
        applied(other, thresholds(inspect_layers(other))),
    ):
        model(tiny.tokens(20))
    assert before == (
        transformers.AttentionInterface.get_interface,
        transformers.GenerationMixin.generate,
        dict(vars(transformers.AttentionInterface)),
        dict(vars(transformers.AttentionMaskInterface)),
    )
    assert caplog.text == ""
