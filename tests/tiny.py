"""Tiny models and tokenizers, built in code: no hub, no download.

`python tests/tiny.py FOLDER` writes the model that `configs/smoke.yaml` calibrates.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from skip_softmax import Thresholds
from skip_softmax.huggingface.layers import Layer
from skip_softmax.thresholds.types import (
    Geometry,
    MinKvLen,
    ModelSection,
    ScaleFactors,
    UncalibratedLayer,
)

VOCABULARY = 400


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE trained on Python's own manual."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(list(topics.values())[:20], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>"
    )


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Random tokens of one request [1, count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (1, count), generator=generator)


def thresholds(
    found: list[Layer], prefill: float = 0.0, decode: float | None = None, *, floor: int = 60,
    dense_last: int = 0, chunk: int | None = None, **changes: Any,
) -> Thresholds:  # fmt: skip
    """A file for a model's layers, in tiles of 16; those that cannot be calibrated are listed.

    `decode` is `prefill` where it is not given; `floor` is `min_kv_len` of both phases.
    """
    able = [layer for layer in found if layer.reason is None] or found
    q_heads, kv_heads, head_dim = able[0].shape
    left = tuple(
        UncalibratedLayer(layer=layer.index, reason=layer.reason)
        for layer in found
        if layer.reason is not None
    )
    return Thresholds(
        model=ModelSection(
            name="tiny", sha256="0", layers=len(found), q_heads=q_heads, kv_heads=kv_heads,
            head_dim=head_dim, dtype="float32",
        ),
        geometry=Geometry(
            prefill={"tile_q": 16, "tile_kv": 16, "dense_last": dense_last, "chunk": chunk},
            decode={"tile_kv": 16},
        ),
        min_kv_len=MinKvLen(prefill=floor, decode=floor),
        scale_factor=ScaleFactors(prefill=prefill, decode=prefill if decode is None else decode),
        **{"uncalibrated": left, **changes},
    )  # fmt: skip


def model(family: str, sharpness: float = 1.0, **changes: Any) -> transformers.PreTrainedModel:
    """A randomly initialised model of a family; `sharpness` scales queries, so that attention is peaked."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    families: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
        "gemma3": (
            transformers.Gemma3TextConfig,
            transformers.Gemma3ForCausalLM,
            {
                "head_dim": 256,
                "sliding_window": 48,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        "mistral": (
            transformers.MistralConfig,
            transformers.MistralForCausalLM,
            {"sliding_window": 70},
        ),
        "phi": (transformers.PhiConfig, transformers.PhiForCausalLM, {"num_key_value_heads": 4}),
        "gpt2": (
            transformers.GPT2Config,
            transformers.GPT2LMHeadModel,
            {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024},
        ),
        "llama4": (
            transformers.Llama4TextConfig,
            transformers.Llama4ForCausalLM,
            {
                "num_hidden_layers": 4,
                "head_dim": 16,
                "intermediate_size_mlp": 96,
                "attention_chunk_size": 64,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
            },
        ),
        # Latent attention: keys of 16 + 8 columns and values of 16, from 32 columns that all heads share.
        "deepseek_v3": (
            transformers.DeepseekV3Config,
            transformers.DeepseekV3ForCausalLM,
            {
                "num_key_value_heads": 4,
                "q_lora_rank": None,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "first_k_dense_replace": 2,
            },
        ),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, {"head_dim": 16}),
    }
    config_class, model_class, special = families[family]
    arguments = {**sizes, **special, **changes}
    if family == "gpt2":
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            arguments.pop(key)
    torch.manual_seed(0)
    built = model_class(config_class(**arguments)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "q_proj" in name or "q_norm" in name:
                parameter.mul_(sharpness)
            elif "c_attn.weight" in name:
                parameter[:, :64].mul_(sharpness)
    return built


def write_smoke_model(folder: Path) -> Path:
    """Writes model and tokenizer of the smoke run as a transformers folder."""
    model("llama", sharpness=400.0, num_hidden_layers=4).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    write_smoke_model(Path(sys.argv[1]))
