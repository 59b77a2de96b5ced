"""A checkpoint fills its model whole, or is refused with the names of what it lacks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from calibrate.errors import UserError
from calibrate.model.load import load
from calibrate.schema import ModelConfig

Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def changed(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A tiny model whose weights' file was changed."""
    tiny.model("llama").save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def without(*parts: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {
        name: tensor for name, tensor in weights.items() if not any(part in name for part in parts)
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(Q1), f"but lacks {Q1}; give the whole checkpoint"),
        (without("layers.1.", "layers.2."), "lacks model.layers.1.input_layernorm.* and 13 more;"),
        (
            lambda weights: {f"wrapped.{name}": tensor for name, tensor in weights.items()},
            "lacks lm_head.weight, model.embed_tokens.weight",
        ),
        (
            lambda weights: {**weights, Q1: weights[Q1][:32].contiguous()},
            rf"has in another shape {Q1} \(32, 64\) instead of \(64, 64\)",
        ),
    ],
)
def test_weights_that_a_folder_does_not_hold_are_named(
    tmp_path: Path, tokenizer: str, change: Any, said: str
) -> None:
    folder = changed(tmp_path / "model", change)
    with pytest.raises(UserError, match=f"model.path: `{folder}` must hold every weight.*{said}"):
        load(ModelConfig(path=str(folder), tokenizer=tokenizer))


def test_weights_of_shards_are_named_by_what_is_missing(tmp_path: Path, tokenizer: str) -> None:
    tiny.model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    placed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / placed[Q1]
    assert len(set(placed.values())) > 2
    weights = load_file(shard)
    save_file(without(Q1)(weights), shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {Q1};"):
        load(ModelConfig(path=str(tmp_path), tokenizer=tokenizer))
    shard.unlink()
    with pytest.raises(
        UserError, match=rf"`{shard.name}` is missing, which has model\..*add the file"
    ):
        load(ModelConfig(path=str(tmp_path), tokenizer=tokenizer))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_not_missing(
    tmp_path: Path, tokenizer: str, family: str, tied: bool
) -> None:
    tiny.model(family, tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size="100KB")
    assert load(ModelConfig(path=str(tmp_path), tokenizer=tokenizer)).vocabulary == tiny.VOCABULARY


def write_gguf(path: Path, lacks: str = "nothing", parts: int = 1) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 1024, "embedding_length": 64, "block_count": 3, "feed_forward_length": 96,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-6, "rope_dimension_count": 16,
        "vocab_size": tiny.VOCABULARY,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    if parts > 1:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", parts)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, tensor in tiny.model("llama").state_dict().items():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if lacks not in theirs:
            writer.add_tensor(theirs, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_that_a_gguf_file_does_not_hold_are_named(tmp_path: Path, tokenizer: str) -> None:
    file = write_gguf(tmp_path / "whole.gguf")
    assert len(load(ModelConfig(path=str(file), tokenizer=tokenizer)).calibratable) == 3
    file = write_gguf(tmp_path / "hole.gguf", lacks="blk.1.attn_q")
    with pytest.raises(UserError, match=f"`{file}` must hold every weight .*lacks {Q1};"):
        load(ModelConfig(path=str(file), tokenizer=tokenizer))


def test_one_part_of_a_gguf_file_is_refused(tmp_path: Path, tokenizer: str) -> None:
    file = write_gguf(tmp_path / "m-00001-of-00002.gguf", lacks="blk.2", parts=2)
    with pytest.raises(UserError, match=r"it is part 1 of 2; merge the parts"):
        load(ModelConfig(path=str(file), tokenizer=tokenizer))


def test_the_smaller_of_embedding_and_head_is_the_vocabulary(
    tmp_path: Path, tokenizer: str
) -> None:
    model = tiny.model("llama")
    model.lm_head = torch.nn.Linear(64, 390, bias=False)
    from calibrate.model.load import from_memory

    assert from_memory(model, tiny.tokenizer())[0].vocabulary == 390


def test_a_cache_that_cannot_be_written_is_not_a_missing_model(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    place = tmp_path / "cache" / "x"

    def refuse(*_: object, **__: object) -> None:
        try:
            raise PermissionError(13, os.strerror(13), str(place))
        except PermissionError as error:
            raise OSError("PermissionError when downloading") from error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError, match=f"`{place}` must be writable.*set HF_HOME"):
        load(ModelConfig(path="owner/model", tokenizer=tokenizer))
