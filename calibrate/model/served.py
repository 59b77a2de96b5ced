"""A model that a serving engine runs while it is calibrated: the plug-in for vLLM, as it will serve.

The engine reads the weights itself, so that only a folder or a hub id can be given. Its layers are those that
the plug-in runs; its dense run is the plug-in's, skipping nothing.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.errors import UserError
from calibrate.model.config_json import model_hash
from calibrate.model.load import (
    LoadedModel,
    in_memory,
    name_of,
    readable,
    require_shards,
    tokenizer_of,
)
from calibrate.model.locate import locate
from calibrate.schema import ModelConfig, RunConfig

_OWN_LENGTH = ("file", "hub", "memory")  # sources whose prompts reach a factor √2 beyond their bin


@dataclass(frozen=True)
class Described:
    """What a checkpoint says of itself, without its weights.

    Attributes:
        config: the transformers config.
        generation_config: its defaults for generation.
    """

    config: Any
    generation_config: Any


def serve(config: RunConfig) -> LoadedModel:
    """Starts the engine that `model.engine` names, for prompts as the config has them.

    Args:
        config: the whole run config: the engine computes prompts in its chunks, and holds its longest one.

    Returns:
        The model, whose `engine` runs it.

    Raises:
        UserError: the path leads to a file or nowhere, the engine is not installed or cannot start, or no
            layer can be calibrated.
    """
    model = config.model
    if in_memory(model):
        raise UserError(
            f"model.path: `{model.path}` is a model that was in memory, which {model.engine} cannot load; "
            "give a folder or a hub id"
        )
    location = locate(model.path)
    if isinstance(location, Path) and location.is_file():
        raise UserError(
            f"model.path: {model.engine} must load a folder or a hub id, but got the file `{location}`; "
            "write the model as a folder (`save_pretrained`), or use `model.engine: transformers`"
        )
    require_shards(model.path, location)
    tokenizer = tokenizer_of(model, location)
    described = _described(model, location)
    context = getattr(described.config.get_text_config(), "max_position_embeddings", None)
    _require_votes(config, described.config.get_text_config())
    engine = _started(model, location, longest(config, context), config.geometry.prefill.chunk)
    return LoadedModel(
        model=described,
        tokenizer=tokenizer,
        name=name_of(location),
        sha256=model_hash(location, described),
        layers=_layers(model, engine),
        # vLLM always generates a token behind what it reads.
        max_context=None if context is None else context - 1,
        dtype=model.dtype,
        vocabulary=engine.vocabulary,
        engine=engine,
    )


def longest(config: RunConfig, context: int | None) -> int:
    """Most tokens of a request, one generated token behind the continuation included.

    Args:
        config: the run config.
        context: longest sequence that the model was made for [tokens]; None: it does not say.
    """
    prompts = config.prompts
    most = max(prompts.lengths)
    if any(source.task in _OWN_LENGTH for source in prompts.sources):
        most = math.ceil(most * math.sqrt(2))
    most += max(prompts.decode_tokens, config.generated_tokens or 0) + 1
    return most if context is None else min(most, context)


def _described(model: ModelConfig, location: str | Path) -> Described:
    import transformers

    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with readable(model.path, location):
        config = transformers.AutoConfig.from_pretrained(str(location), **options)
    try:
        generation = transformers.GenerationConfig.from_pretrained(
            str(location), revision=model.revision
        )
    except OSError:  # it has none of its own
        generation = transformers.GenerationConfig.from_model_config(config)
    return Described(config, generation)


def _require_votes(config: RunConfig, text: Any) -> None:
    """Refuses other votes in decode than the plug-in's, before it starts, which takes long."""
    heads = config.geometry.decode.tile_heads
    group = text.num_attention_heads // (
        getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    )
    if heads not in (None, group):
        raise UserError(
            f"geometry.decode.tile_heads must be left out for `model.engine: {config.model.engine}`, in "
            f"whose decode the {group} query heads of a KV head vote together, but got {heads}; leave it "
            "out, or use `model.engine: transformers`"
        )


def _started(model: ModelConfig, location: str | Path, most: int, chunk: int | None) -> Any:
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"model.engine: `{model.engine}` needs vLLM, which is not installed; "
            "pip install 'skip-softmax-calibrate[vllm]'"
        )
    from skip_softmax.vllm.calibrating import Engine

    start: Callable[..., Any] = Engine
    try:
        return start(
            str(location),
            dtype=model.dtype,
            longest=most,
            chunk=chunk,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            options=model.engine_options,
        )
    except Exception as error:  # vLLM's own, of whatever kind, most often from another process
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.engine: `{model.engine}` could not start with `{model.path}`: {reason}; what vLLM said "
            "is above, and VLLM_LOGGING_LEVEL=INFO tells more"
        ) from error


def _layers(model: ModelConfig, engine: Any) -> list[Any]:
    """One entry per layer of the model, with the reason where it cannot be calibrated."""
    from skip_softmax.huggingface.layers import Layer

    q_heads, kv_heads, head_dim = engine.shape
    none = "vLLM runs no attention of the backend CUSTOM there"
    layers = [
        Layer(index, "", q_heads, kv_heads, head_dim, None, none) for index in range(engine.depth)
    ]
    for one in engine.layers:
        other = (one.q_heads, one.kv_heads, one.head_dim) != engine.shape
        reason = "its heads are not those that the model's config names" if other else None
        layers[one.index] = Layer(
            one.index, one.name, one.q_heads, one.kv_heads, one.head_dim, one.window, reason
        )
    if all(layer.reason is not None for layer in layers):
        raise UserError(
            f"model.path: `{model.path}` has no layer that can be calibrated ({layers[0].reason})"
        )
    return layers
