"""A Llama of any size with random weights whose attention skips as asked: what a whole model is timed with.

Random weights alone skip nothing, because all scores are alike. So every token has a level (`inputs.QUIET`,
`LOUD`, or 0 for the sink) in one channel of its embedding, which no layer writes to. In every layer one
channel of each key reads it, and the same channel of each query is constant, so that a key's level is added
to all its scores. The channel belongs to RoPE's slowest pair: at theta 500000 and 128K tokens it turns by 0.3
radians, which takes 5 % from a level. All other channels are noise, and what layers add to the residual
stream is small, so that levels mean the same in every layer.

A prompt decides what is skipped: tiles of quiet tokens fall below the threshold, tiles of loud ones do not.
So one thresholds file serves every sparsity.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from inputs import LOUD, QUIET, STRENGTH

# The shape of Llama-3.1-8B (its config.json, without RoPE scaling); biases hold the queries' constant.
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 135168,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": True, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    "planted_attention": 0.25,  # ours: size of what attention adds to the normalised residual stream
}  # fmt: skip
# Small enough for checks, where what attention adds must show; heads as wide as above.
SMALL = LLAMA_8B | {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 8192, "planted_attention": 1.0,
}  # fmt: skip
SCALE_FACTOR = (
    40.0  # [tokens]: its threshold is between loud and quiet from MIN_KV_LEN to 128K keys
)
MIN_KV_LEN = 2048
SINK = 0  # the token of level 0, at position 0; other even ids are quiet, odd ids are loud
UNIT = 0.25  # a level of 1 nat in the embedding, whose other channels are N(0, 1)
NOISE = 0.6  # of the other channels of q and k: scores of N(0, NOISE**4) [nats]
MLP = 0.1  # size of what the other half of a layer adds
SPREAD = 3.0  # standard deviation of logits
STRATUM = 20  # among so many tiles in a row a prompt has exactly its share of quiet ones


def weights(
    config: dict[str, Any], device: str | torch.device, dtype: torch.dtype, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names, as in a Llama checkpoint, and tensors, one at a time.

    Args:
        config: keys of `config.json`, see `LLAMA_8B`.
        device: where tensors are made; different kinds of device make different noise.
        dtype: of all tensors.
        seed: of the noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    channel, partner = dim // 2 - 1, dim - 1  # RoPE's slowest pair

    def noise(rows: int, columns: int, size: float) -> torch.Tensor:
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        return out.normal_(0.0, size / math.sqrt(columns), generator=generator)

    def constant(size: int, value: float = 0.0) -> torch.Tensor:
        return torch.full((size,), value, device=device, dtype=dtype)

    def into_stream(columns: int, size: float) -> torch.Tensor:
        out = noise(hidden, columns, size)
        out[0] = 0  # the levels' channel
        return out

    embedding = noise(config["vocab_size"], hidden, math.sqrt(hidden))
    embedding[0::2, 0], embedding[1::2, 0], embedding[SINK, 0] = UNIT * QUIET, UNIT * LOUD, 0
    yield "model.embed_tokens.weight", embedding
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        q, k = noise(heads * dim, hidden, NOISE), noise(kv_heads * dim, hidden, NOISE)
        for projection in (q, k):
            projection.view(-1, dim, hidden)[:, [channel, partner]] = 0
        k.view(-1, dim, hidden)[:, channel, 0] = math.sqrt(dim) / (STRENGTH * UNIT)
        bias = constant(heads * dim)
        bias.view(-1, dim)[:, channel] = STRENGTH
        yield name + "self_attn.q_proj.weight", q
        yield name + "self_attn.q_proj.bias", bias
        yield name + "self_attn.k_proj.weight", k
        yield name + "self_attn.k_proj.bias", constant(kv_heads * dim)
        yield name + "self_attn.v_proj.weight", noise(kv_heads * dim, hidden, 1.0)
        yield name + "self_attn.v_proj.bias", constant(kv_heads * dim)
        yield (
            name + "self_attn.o_proj.weight",
            into_stream(heads * dim, config["planted_attention"]),
        )
        yield name + "self_attn.o_proj.bias", constant(hidden)
        yield name + "mlp.gate_proj.weight", noise(inner, hidden, 1.0)
        yield name + "mlp.up_proj.weight", noise(inner, hidden, 1.0)
        yield name + "mlp.down_proj.weight", into_stream(inner, MLP)
        yield name + "input_layernorm.weight", constant(hidden, 1.0)
        yield name + "post_attention_layernorm.weight", constant(hidden, 1.0)
    yield "model.norm.weight", constant(hidden, 1.0)
    yield "lm_head.weight", noise(config["vocab_size"], hidden, SPREAD)


def prompt(
    length: int, sparsity: float, vocab: int, *, tile_kv: int = 128, seed: int = 0
) -> list[int]:
    """Token ids of which a share of the tiles is quiet, spread evenly; the first tile never is.

    Args:
        length: [tokens].
        sparsity: share of quiet tiles, in [0, 1], in steps of 1 / `STRATUM`.
        vocab: how many ids there are.
        tile_kv: keys per tile [tokens]; tiles of any size that divides it are skipped alike.
        seed: of ids and places.
    """
    draw = random.Random(seed)
    quiet: list[bool] = []
    while len(quiet) * tile_kv < length:
        stratum = [i < round(sparsity * STRATUM) for i in range(STRATUM)]
        draw.shuffle(stratum)
        quiet += stratum
    quiet[0] = False
    ids = [2 * draw.randrange(1, vocab // 2) + (not quiet[i // tile_kv]) for i in range(length)]
    return [SINK, *ids[1:length]]
