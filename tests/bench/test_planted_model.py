"""The planted model skips what its prompt says: tiles of quiet tokens, in every layer and phase."""

from __future__ import annotations

import planted_model
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skip_softmax as ss
from skip_softmax.thresholds.types import (
    PHASES,
    DecodeGeometry,
    Geometry,
    MinKvLen,
    ModelSection,
    PrefillGeometry,
    ScaleFactors,
)

LENGTH = 3000  # 24 tiles of 128, the last one of 56
TINY = planted_model.LLAMA_8B | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 512, "torch_dtype": "float32",
}  # fmt: skip


def thresholds() -> ss.Thresholds:
    return ss.Thresholds(
        model=ModelSection(
            name="planted", sha256="none", layers=2, q_heads=2, kv_heads=1, head_dim=128, dtype="float32"
        ),
        geometry=Geometry(
            prefill=PrefillGeometry(tile_q=64, tile_kv=128),
            decode=DecodeGeometry(tile_kv=64, running_max="seeded"),
        ),
        min_kv_len=MinKvLen(**dict.fromkeys(PHASES, planted_model.MIN_KV_LEN)),
        scale_factor=ScaleFactors(**dict.fromkeys(PHASES, planted_model.SCALE_FACTOR)),
    )  # fmt: skip


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9])
def test_the_planted_model_skips_the_quiet_tiles_and_no_others(sparsity: float) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    model.load_state_dict(dict(planted_model.weights(TINY, "cpu", torch.float32)))
    ids = planted_model.prompt(LENGTH, sparsity, TINY["vocab_size"], seed=3)
    with torch.no_grad(), ss.applied(model, thresholds()) as tiles:
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
        model(torch.tensor([[1]]), past_key_values=cache)
    quiet = torch.tensor([token % 2 == 0 and token != planted_model.SINK for token in ids])
    prefill = [
        sum(quiet[at : at + 128].all().item() for at in range(0, min(row + 64, LENGTH), 128))
        for row in range(0, LENGTH, 64)
    ]
    decode = sum(quiet[at : at + 64].all().item() for at in range(64, LENGTH - 63, 64))
    assert tiles["prefill"].skipped.tolist() == [[sum(prefill)] * 2] * 2
    assert tiles["decode"].skipped.tolist() == [[decode]] * 2
    whole = quiet[: LENGTH // 128 * 128].view(-1, 128).float().mean().item()
    assert whole == pytest.approx(
        sparsity, abs=2 / 23
    )  # the first tile is loud; 20 tiles hold the share


def test_a_prompt_holds_its_share_of_quiet_tiles_and_begins_with_the_sink() -> None:
    ids = planted_model.prompt(128 * 200, 0.75, 1000, seed=1)
    assert ids[0] == planted_model.SINK and planted_model.SINK not in ids[1:]
    assert max(ids) < 1000
    quiet = torch.tensor(ids).view(-1, 128)[1:] % 2 == 0
    assert (quiet.all(1) | (~quiet).all(1)).all()
    assert 149 <= quiet.all(1).sum() <= 150
    assert ids != planted_model.prompt(128 * 200, 0.75, 1000, seed=2)
    assert planted_model.prompt(50, 0.75, 1000) == planted_model.prompt(60, 0.75, 1000)[:50]
