"""What a server refuses at start, what a user may insist on, and the line that says what runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted_file
import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights: shape and hash are all that is asked here."""
    about = {
        "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 128, "head_dim": 32,
    }  # fmt: skip
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(about))
    return path


def server(folder: Path, file: Path | None, **changes: Any) -> Any:
    """The parts of vLLM's configuration that are read; `section__key` changes one."""
    section = {} if file is None else {"thresholds": str(file)}
    config = SimpleNamespace(
        additional_config={"skip_softmax": {**section, "allow": changes.pop("allow", [])}},
        model_config=SimpleNamespace(
            model=str(folder), dtype=torch.float32, max_model_len=2048, use_mla=False,
            is_encoder_decoder=False, is_mm_prefix_lm=False, hf_overrides={}, quantization=None,
            hf_config=SimpleNamespace(),
            hf_text_config=SimpleNamespace(num_attention_heads=4), get_total_num_kv_heads=lambda: 2,
            get_total_num_hidden_layers=lambda: 2, get_head_size=lambda: 32,
        ),
        scheduler_config=SimpleNamespace(
            enable_chunked_prefill=True, max_num_batched_tokens=2048, long_prefill_token_threshold=0
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False, cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None, lora_config=None, kv_transfer_config=None,
    )  # fmt: skip
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = config
        for part in sections:
            place = getattr(place, part)
        setattr(place, key, value)
    return config


def planned(config: Any) -> Any:
    from skip_softmax.vllm import startup

    return startup.plan_of(config)


def test_a_server_that_fits_says_what_it_runs_in_one_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = planted_file.saved(folder, tmp_path / "t.yaml")
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO):
        plan = planned(server(folder, file))
    (line,) = {record.getMessage() for record in caplog.records if "t.yaml" in record.getMessage()}
    assert line == (
        f"{file} (sha256 {plan.sha256[:12]}) for planted; prefill skips in 2 of 2 layers, scale factors 60 "
        "to 240, tiles 16x32, from 256 keys on; decode skips in 2 of 2 layers, scale factors 4 to 20, tiles "
        "32, from 100 keys on; evidence passed, KL 0.01 (at most 0.02) on 8 held-out prompts, budget kl 0.2, "
        "confidence 0.95"
    )


def test_without_a_file_the_line_says_dense(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO):
        plan = planned(server(folder, None))
    assert "every layer is dense" in caplog.text
    assert plan.factors("model.layers.0.self_attn.attn", 0, {"prefill": 4, "decode": 2}) == {
        "prefill": (0.0,) * 4, "decode": (0.0,) * 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "changes", "said"),
    [
        ("model", {"model_config__hf_overrides": {"rope_scaling": None}}, "--hf-overrides changes it"),
        ("model", {"model_config__quantization": "fp8"}, "--quantization fp8 changes it"),
        ("model", {"lora_config": SimpleNamespace()}, "LoRA adapters changes it"),
        ("model", {"load_config__load_format": "dummy"}, "--load-format dummy changes it"),
        ("dtype", {"model_config__dtype": torch.bfloat16}, "it is bfloat16 instead of float32"),
        (
            "dtype",
            {"cache_config__cache_dtype": "fp8"},
            "it is fp8_e4m3 instead of float32; serve with --kv-cache-dtype auto, or calibrate with",
        ),
        (
            "chunks",
            {"scheduler_config__max_num_batched_tokens": 512},
            "whole, up to 1024 tokens, but this server cuts them into chunks of 512",
        ),
        (
            "chunks",
            {"scheduler_config__long_prefill_token_threshold": 700},
            "cuts them into chunks of 700",
        ),
        (
            "cache",
            {"kv_transfer_config": SimpleNamespace(kv_connector="LMCacheConnector")},
            "the KV connector LMCacheConnector",
        ),
    ],
)  # fmt: skip
def test_what_would_void_the_evidence_is_refused_unless_the_user_insists(
    folder: Path, tmp_path: Path, word: str, changes: dict[str, Any], said: str
) -> None:
    file = planted_file.saved(folder, tmp_path / "t.yaml")
    with pytest.raises(ValueError, match="to `allow`") as refusal:
        planned(server(folder, file, **changes))
    assert said in str(refusal.value) and f'add "{word}" to `allow`' in str(refusal.value)
    assert planned(server(folder, file, allow=[word], **changes)).allow == (word,)


def test_an_fp8_cache_is_that_of_calibration(folder: Path, tmp_path: Path) -> None:
    from skip_softmax.vllm import checks

    planted = planted_file.thresholds(folder)
    section = planted.model.model_copy(update={"kv_cache_dtype": "fp8_e4m3"})
    thresholds = planted.model_copy(update={"model": section})
    thresholds.save(tmp_path / "t.yaml")

    def reason(**changes: Any) -> str:
        with pytest.raises(ValueError, match='add "dtype" to `allow`') as refusal:
            planned(server(folder, tmp_path / "t.yaml", **changes))
        return str(refusal.value)

    assert "is float32 instead of fp8_e4m3; serve with --kv-cache-dtype fp8_e4m3" in reason()
    for word in ("fp8", "fp8_e4m3"):
        planned(server(folder, tmp_path / "t.yaml", cache_config__cache_dtype=word))
        for option in ("kv_cache_dtype_skip_layers", "calculate_kv_scales"):
            changes: dict[str, Any] = {
                "cache_config__cache_dtype": word, f"cache_config__{option}": ["0"],
            }  # fmt: skip
            assert f"but --{option.replace('_', '-')} changes that" in reason(**changes)
    layer = SimpleNamespace(layer_name="layers.0.attn", _k_scale_float=0.5, _v_scale_float=1.0)
    assert "checkpoint's are 0.5 and 1;" in str(checks.other_scales(layer, thresholds))
    assert checks.other_scales(layer, None) is None
    layer._k_scale_float = 1.0
    assert checks.other_scales(layer, thresholds) is None


def test_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    file = planted_file.saved(folder, tmp_path / "t.yaml")
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(
        ValueError, match=r"is for planted with hash [0-9a-f]{12} and .* has another"
    ):
        planned(server(folder, file))
    planned(server(folder, file, allow=["model"]))


@pytest.mark.parametrize("verdict", ["failed", "not validated"])
def test_a_file_that_did_not_pass_is_refused(folder: Path, tmp_path: Path, verdict: str) -> None:
    file = planted_file.saved(folder, tmp_path / "t.yaml", evidence={"verdict": verdict})
    config: dict[str, Any] = {"scheduler_config__enable_chunked_prefill": False}
    with pytest.raises(ValueError, match=f"must be `passed`, but it is `{verdict}`"):
        planned(server(folder, file, **config))
    planned(server(folder, file, allow=["unvalidated"], **config))


def test_a_file_that_skips_nothing_needs_no_evidence(folder: Path, tmp_path: Path) -> None:
    file = planted_file.saved(folder, tmp_path / "t.yaml", evidence={}, scale_factor={}, layers=[])
    planned(server(folder, file, model_config__dtype=torch.bfloat16))


def test_chunks_are_those_of_calibration(folder: Path, tmp_path: Path) -> None:
    geometry = {"prefill": {"tile_q": 32, "tile_kv": 64, "chunk": 512}, "decode": {"tile_kv": 32}}
    file = planted_file.saved(folder, tmp_path / "t.yaml", geometry=geometry)
    planned(server(folder, file, scheduler_config__max_num_batched_tokens=512))
    with pytest.raises(
        ValueError, match="in chunks of 512 tokens, but this server cuts them into chunks of 2048"
    ):
        planned(server(folder, file))
    with pytest.raises(ValueError, match="but this server computes them whole"):
        planned(server(folder, file, scheduler_config__enable_chunked_prefill=False))


def test_votes_are_those_of_a_kv_head(folder: Path, tmp_path: Path) -> None:
    geometry = {
        "prefill": {"tile_q": 32, "tile_kv": 64},
        "decode": {"tile_kv": 32, "tile_heads": 2},
    }
    planned(server(folder, planted_file.saved(folder, tmp_path / "t.yaml", geometry=geometry)))
    geometry["decode"]["tile_heads"] = 4
    file = planted_file.saved(folder, tmp_path / "t.yaml", geometry=geometry, layers=[])
    with pytest.raises(ValueError, match="for votes of 4; calibrate"):
        planned(server(folder, file))


def test_another_shape_is_refused_whatever_the_user_says(folder: Path, tmp_path: Path) -> None:
    from skip_softmax.vllm import checks

    file = planted_file.saved(folder, tmp_path / "t.yaml")
    with pytest.raises(
        ValueError, match=r"the file is for planted with \(2, 4, 2, 32\) and .* has \(2, 4, 2, 64\)"
    ):
        planned(
            server(
                folder, file, allow=list(checks.INSISTED), model_config__get_head_size=lambda: 64
            )
        )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_config__use_mla": True}, "latent attention"),
        ({"model_config__is_encoder_decoder": True}, "an encoder"),
        ({"model_config__is_mm_prefix_lm": True}, "prompts that see ahead"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "drafts by eagle3"),
        ({"speculative_config": SimpleNamespace(method="draft_model")}, "drafts by draft_model"),
    ],
)
def test_what_the_plug_in_does_not_have_is_refused_by_name_also_without_a_file(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"cannot serve {named}"):
        planned(server(folder, None, **changes))


def test_drafts_without_a_model_are_served(folder: Path) -> None:
    planned(server(folder, None, speculative_config=SimpleNamespace(method="ngram")))


@pytest.mark.parametrize(
    "section",
    [
        {"threshold": "t.yaml"},
        {"allow": ["everything"]},
        {"allow": "model"},
        {"thresholds": 3},
        "t.yaml",
    ],
)
def test_options_that_are_misspelt_are_refused(folder: Path, section: Any) -> None:
    config = server(folder, None)
    config.additional_config = {"skip_softmax": section}
    with pytest.raises(ValueError, match="must be"):
        planned(config)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_pages_that_no_kernel_can_read_are_refused(folder: Path, phase: str) -> None:
    from skip_softmax.launch import Device
    from skip_softmax.vllm import checks

    def reason(page: int, **tiles: Any) -> str | None:
        spec = SimpleNamespace(num_kv_heads=2, head_size=64, dtype=torch.bfloat16, block_size=page)
        given: Any = {"prefill": {}, "decode": {}, phase: tiles}
        return checks.no_kernel(server(folder, None), spec, Device(9), given)

    assert reason(64) is None
    assert "in pages of 48 tokens, but none can (" in str(reason(48))
    fp8 = server(folder, None, cache_config__cache_dtype="fp8")
    spec = SimpleNamespace(num_kv_heads=2, head_size=64, dtype=torch.uint8, block_size=64)
    given: Any = {"prefill": {}, "decode": {}}
    assert checks.no_kernel(fp8, spec, Device(9), given) is None
    assert "8.0 does not convert" in str(checks.no_kernel(fp8, spec, Device(8), given))
    assert f"run {phase} in pages of 64 tokens" in str(reason(64, tile_kv=512))


# Tensor parallel, and layers.


def numbers(folder: Path, tmp_path: Path) -> Any:
    layers = [{"layer": 1, "prefill": [1.0, 2.0, 3.0, 4.0], "decode": [5.0, 6.0]}]
    file = planted_file.saved(folder, tmp_path / "t.yaml", layers=layers)
    return planned(server(folder, file))


def test_a_rank_has_the_numbers_of_its_own_heads(folder: Path, tmp_path: Path) -> None:
    plan, name = numbers(folder, tmp_path), "model.layers.1.self_attn.attn"
    assert plan.factors(name, 0, {"prefill": 2, "decode": 1}) == {
        "prefill": (1.0, 2.0),
        "decode": (5.0,),
    }
    assert plan.factors(name, 1, {"prefill": 2, "decode": 1}) == {
        "prefill": (3.0, 4.0),
        "decode": (6.0,),
    }
    # Four ranks share two KV heads: each head is on two of them.
    found = [plan.factors(name, rank, {"prefill": 1, "decode": 1}) for rank in range(4)]
    assert [one["prefill"] for one in found] == [(1.0,), (2.0,), (3.0,), (4.0,)]
    assert [one["decode"] for one in found] == [(5.0,), (5.0,), (6.0,), (6.0,)]


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.attn", "vision.attn", "a.1.b.2.attn"])
def test_a_layer_that_the_file_does_not_know_is_dense_and_named(
    folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = numbers(folder, tmp_path)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        found = plan.factors(name, 0, {"prefill": 4, "decode": 2})
    assert found == {"prefill": (0.0,) * 4, "decode": (0.0,) * 2}
    assert f"{name} is dense" in caplog.text


def test_two_layers_do_not_share_an_index(folder: Path, tmp_path: Path) -> None:
    plan, heads = numbers(folder, tmp_path), {"prefill": 4, "decode": 2}
    plan.factors("model.layers.1.self_attn.attn", 0, heads)
    plan.factors("model.layers.1.self_attn.attn", 0, heads)  # the same one again
    with pytest.raises(
        ValueError, match=r"model.layers.1.self_attn.attn and draft.layers.1.attn are both"
    ):
        plan.factors("draft.layers.1.attn", 0, heads)
