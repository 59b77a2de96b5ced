"""A model's attention layers: found, described, and refused by name where that cannot be done."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

from skip_softmax.huggingface.layers import inspect_layers

FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "phi", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found(family: str) -> None:
    layers = inspect_layers(tiny.model(family))
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert all(layer.reason is None for layer in layers)
    assert {layer.kv_heads for layer in layers} == {4 if family in ("phi", "gpt2") else 2}
    windows = {"gemma3": [48, None, 48], "mistral": [70, 70, 70]}.get(family, [None, None, None])
    assert [layer.window for layer in layers] == windows


def test_models_that_cannot_be_looked_into_are_refused_by_name() -> None:
    sizes = {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    with pytest.raises(ValueError, match="GPTJForCausalLM computes attention itself"):
        inspect_layers(transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes)).eval())
    both = transformers.BartConfig(
        vocab_size=400, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    with pytest.raises(ValueError, match="must be decoder-only, but BartModel also has an encoder"):
        inspect_layers(transformers.BartModel(both))


def test_a_model_is_asked_again_once_it_changed() -> None:
    model = tiny.model("llama")
    asked = 0

    def count(*given: object) -> None:
        nonlocal asked
        asked += 1

    model.register_forward_pre_hook(count)
    assert inspect_layers(model) == inspect_layers(model)
    assert asked == 1
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert {layer.reason for layer in inspect_layers(model)} == {
        "somebody asked for its attention weights"
    }
    model.config.output_attentions = False
    model.model.layers[1] = tiny.model("llama").model.layers[0]  # it says that it is layer 0
    reasons = [layer.reason for layer in inspect_layers(model)]
    assert reasons == [
        "two attention modules share this layer index",
        "it did not ask for transformers' attention when it read four tokens",
        None,
    ]
    assert asked == 3


def test_a_model_in_training_is_inspected_without_dropout_and_stays_in_training() -> None:
    model = tiny.model("llama", attention_dropout=0.5).train()
    before = torch.random.get_rng_state()
    assert [layer.reason for layer in inspect_layers(model)] == [None] * 3
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), before)
