"""A whole run of a DeepSeek-shaped model, and its file on the latent cache that servers decode on."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from conftest import smoke_config

import calibrate
import skip_softmax as ss
from calibrate.loss.measure import compare
from calibrate.pipeline import Stages
from calibrate.schema import load_config
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.intercept import intercepted

CHANGES = (
    "geometry.decode={tile_kv: 16, tile_heads: 2}",
    "prompts.lengths=[384]",
    "prompts.calibration=2",
    "search.trials=2",
)
NOPE = 16  # columns of a key without a position

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> calibrate.Run:
    """Votes of 2 of 4 heads, which have keys of their own here and share a latent cache when served."""
    folder = tmp_path_factory.mktemp("latent")
    model = tiny.model("deepseek_v3", sharpness=400.0, num_hidden_layers=2)
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    config = smoke_config(folder, folder / "model")
    return calibrate.run(config, folder / "run", overrides=CHANGES)


def test_the_file_holds_on_the_latent_cache(run: calibrate.Run) -> None:
    file = run.thresholds
    assert file.evidence["verdict"] == "passed", file.evidence
    assert (file.model.q_heads, file.model.kv_heads) == (4, 4)
    assert (file.model.head_dim, file.model.head_dim_v) == (24, 16)
    assert run.stats.counts["decode"].shape[:2] == (2, 2)
    assert "tile_heads 2" in (run.folder / "report.html").read_text(encoding="utf-8")
    stages = Stages(run.folder, load_config(run.folder / "config.yaml"))
    prompt = stages.prompts["heldout"][0]
    outcome = compare(stages.loaded, file, prompt, stages.dense(prompt))
    assert sum(outcome.skipped["decode"]) > 0 and sum(outcome.skipped["prefill"]) > 0

    # The same model, run by hand: prefill on expanded keys, decode with queries that absorbed the projection
    # of keys, on the cache of 32 + 8 columns.
    model: Any = stages.loaded.model
    compressed: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.kv_a_layernorm.register_forward_hook(
            lambda module, inputs, out, index=index: compressed.update({index: out})
        )
    counts = {phase: torch.zeros(2, dtype=torch.int64) for phase in ("prefill", "decode")}

    def attend(call: LayerCall) -> torch.Tensor:
        factors = torch.tensor(file.per_head(call.layer, call.phase), dtype=torch.float64)
        about = {
            "scale_factor": factors,
            "return_stats": True,
            **file.geometry.keywords(call.phase),
        }
        if call.phase == "prefill":
            out, stats = ss.attention(call.q, call.k, call.v, **call.keywords, **about)
        else:
            latent = compressed[call.layer].view(1, 1, -1, 32)[:, :, : call.kv_len]
            cache = torch.cat([latent, call.k[:, :1, :, NOPE:]], -1)
            up = model.model.layers[call.layer].self_attn.kv_b_proj.weight.view(4, -1, 32)
            absorbed = torch.cat([call.q[..., :NOPE] @ up[:, :NOPE], call.q[..., NOPE:]], -1)
            short, stats = ss.decode_attention(
                absorbed, cache, cache[..., :32], scale=call.scale, **about
            )
            out = short @ up[:, NOPE:].mT
        counts[call.phase] += torch.stack([stats.visited.sum(), stats.skipped.sum()])
        return out

    tokens = torch.tensor([[*prompt.ids, *prompt.continuation]])
    with torch.no_grad(), intercepted(model, attend, decode_from=len(prompt.ids)):
        model(tokens)
    for phase in ("prefill", "decode"):
        true = [sum(outcome.visited[phase]), sum(outcome.skipped[phase])]
        assert counts[phase].tolist() == true, phase
