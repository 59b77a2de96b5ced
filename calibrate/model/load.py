"""Loads a model and says which of its layers can be calibrated.

`model.path` is a hub id, a local folder, a `.gguf` file, or `package://NAME/FILE`: a file inside an
installed package, found without importing that package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from calibrate.errors import UserError
from calibrate.model.config_json import json_mapping, model_hash
from calibrate.model.locate import locate
from calibrate.prompts.causes import cure
from calibrate.schema import ModelConfig
from skip_softmax.thresholds.identity import EXPORT_KEY
from skip_softmax.thresholds.types import KvCacheDtype

_NAMED = 5  # so many weights are named at most


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with what the thresholds file says about it.

    Attributes:
        model: the transformers model, in eval mode on its device; where `engine` runs it, only what the
            checkpoint says of itself (`served.Described`).
        tokenizer: its tokenizer.
        name: short name.
        sha256: hash of the weights file, of every file of the folder that decides the model, or of a model
            in memory (`from_memory`).
        layers: its attention layers (`skip_softmax.huggingface.layers.Layer`).
        max_context: longest sequence it was made for [tokens], if it says.
        kv_cache_dtype: of the keys and values that attention reads; None: as they are.
        vocabulary: token ids that it can read and write, from 0 on; None: it does not say.
        dtype: dtype of the weights as run.
        engine: the serving engine that runs it, see `served.py`, or None.
    """

    model: Any
    tokenizer: Any
    name: str
    sha256: str
    layers: list[Any]
    max_context: int | None
    dtype: str
    vocabulary: int | None = None
    engine: Any = None
    kv_cache_dtype: KvCacheDtype | None = None

    @property
    def calibratable(self) -> list[Any]:
        """Layers that can be calibrated."""
        return [layer for layer in self.layers if layer.reason is None]


def load(config: ModelConfig) -> LoadedModel:
    """Loads model and tokenizer and inspects the layers.

    Args:
        config: the `model` section.

    Returns:
        The loaded model.

    Raises:
        UserError: the path leads nowhere, the file is damaged, or no layer can be calibrated.
    """
    import torch
    import transformers

    if in_memory(config):
        raise UserError(
            f"model.path: `{config.path}` is a model that was in memory; pass it again: "
            "calibrate.run(config, output=..., model=..., tokenizer=...)"
        )
    location = locate(config.path)
    device = _device(config.device)
    require_shards(config.path, location)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = tokenizer_of(config, location)
    with readable(config.path, location):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            *_arguments(location)[0],
            **_arguments(location)[1],
            **_options(config),
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below, and not in a table on stderr
        )
    _require_whole(config.path, report)
    try:
        model = model.to(device).eval()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.device: `{device}` cannot hold the model: {reason}") from error
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name_of(location),
        sha256=model_hash(location, model),
        layers=_layers(model, f"model.path: `{config.path}`"),
        max_context=_max_context(model),
        dtype=config.dtype,
        vocabulary=_vocabulary(model),
        kv_cache_dtype=None if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
    )


def tokenizer_of(config: ModelConfig, location: str | Path) -> Any:
    """Loads the tokenizer that a section names, or that is with the model.

    Args:
        config: the `model` section.
        location: where the model is.

    Raises:
        UserError: there is none.
    """
    import transformers

    found = locate(config.tokenizer, "model.tokenizer") if config.tokenizer else location
    with readable(config.path, location):
        return transformers.AutoTokenizer.from_pretrained(
            *_arguments(found)[0], **_arguments(found)[1], **_options(config)
        )


def _options(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


@contextmanager
def readable(path: str, location: str | Path) -> Iterator[None]:
    """Says what helps where transformers cannot read a model.

    Args:
        path: as the user gave it.
        location: where that is.

    Raises:
        UserError: it cannot.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kinds = "give a hub id, a model folder, a .gguf file or package://NAME/FILE"
        helps = cure(error, location if isinstance(location, Path) else None, kinds)
        raise UserError(
            f"model.path: transformers could not load `{path}`: {reason}; {helps}"
        ) from error


def require_shards(path: str, location: str | Path) -> None:
    """Refuses a folder that lacks a file in which its index has weights.

    Args:
        path: as the user gave it.
        location: where that is.

    Raises:
        UserError: it does.
    """
    folder = location if isinstance(location, Path) and location.is_dir() else None
    for index in sorted(folder.glob("*.index.json")) if folder else ():
        placed: dict[str, str] = json_mapping(
            index.read_text(encoding="utf-8"), f"model.path: `{index}`"
        ).get("weight_map", {})
        for name, file in sorted(placed.items()):
            if not (index.parent / file).exists():
                others = sum(other == file for other in placed.values()) - 1
                raise UserError(
                    f"model.path: `{path}` must hold every weight of its model, but `{file}` is missing, "
                    f"which has {name}{f' and {others} more' if others else ''}; add the file"
                )


def _require_whole(path: str, report: dict[str, Any]) -> None:
    """Refuses a checkpoint that does not fill the model: transformers makes up the rest at random."""
    missing = sorted(report["missing_keys"])
    other = [
        f"{name} {tuple(found)} instead of {tuple(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    for names, what in ((missing, "lacks"), (other, "has in another shape")):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise UserError(
                f"model.path: `{path}` must hold every weight of its model, but {what} "
                f"{', '.join(names[:_NAMED])}{more}; give the whole checkpoint, all of its files, with its "
                "own config.json"
            )


def in_memory(config: ModelConfig) -> bool:
    """Whether the section describes a model that a program held, which cannot be loaded again."""
    return config.path.startswith("memory://")


def from_memory(model: Any, tokenizer: Any) -> tuple[LoadedModel, ModelConfig]:
    """A model in memory, ready to run; it is put in eval mode.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.

    Returns:
        The model, and the `model` section that describes it. Its `sha256` is over the config (JSON, sorted
        keys, without version, names and an exported `sparse_attention_config`), then over name, dtype, shape
        and bytes of every tensor of `state_dict()`, sorted by name.

    Raises:
        UserError: these are not a transformers model and a tokenizer, or no layer can be calibrated.
    """
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        raise UserError(
            f"`model` must be a transformers model in memory, but got {type(model).__name__}; a path or hub "
            "id goes into the config: model.path"
        )
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise UserError(
            f"`tokenizer` must be a transformers tokenizer, but got {type(tokenizer).__name__}; pass "
            "AutoTokenizer.from_pretrained(...)"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in get_args(ModelConfig.model_fields["dtype"].annotation):
        raise UserError(
            f"`model` must be of float32, float16 or bfloat16, but it is of {dtype}; convert it: "
            "model.to(torch.bfloat16)"
        )
    name = str(model.config.name_or_path).rstrip("/").rsplit("/", 1)[-1] or type(model).__name__
    loaded = LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        name=name,
        sha256=_hash_of_weights(model),
        layers=_layers(model, f"model: `{name}`"),
        max_context=_max_context(model),
        dtype=dtype,
        vocabulary=_vocabulary(model),
    )
    section = {"path": f"memory://{name}", "dtype": dtype, "device": model.device.type}
    return loaded, ModelConfig.model_validate(section)


def _layers(model: Any, where: str) -> list[Any]:
    from skip_softmax.huggingface.layers import inspect_layers

    try:
        layers: list[Any] = inspect_layers(model)
    except ValueError as error:
        raise UserError(f"{where} cannot be calibrated: {error}") from error
    if all(layer.reason is not None for layer in layers):
        raise UserError(
            f"{where} has no layer that can be calibrated "
            f"({layers[0].reason if layers else 'it has no layers'})"
        )
    return layers


def _max_context(model: Any) -> int | None:
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest


def _vocabulary(model: Any) -> int | None:
    """Rows of the embedding, or of the head that ranks tokens, whichever has fewer."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    sizes = [table.weight.shape[0] for table in tables if hasattr(table, "weight")]
    return min(sizes, default=None)


def _hash_of_weights(model: Any) -> str:
    import torch

    kept = {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith("_") and key not in (EXPORT_KEY, "transformers_version")
    }
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise UserError(
                f"`model` must be in memory whole, but `{name}` is on the meta device; load it without "
                "offloading"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1).cpu().contiguous()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _arguments(location: str | Path) -> tuple[tuple[str], dict[str, str]]:
    if isinstance(location, Path) and location.is_file():
        return (str(location.parent),), {"gguf_file": location.name}
    return (str(location),), {}


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"model.device: `{name}` needs a CUDA device, but torch sees none; use `auto` or `cpu`"
        )
    try:
        return str(torch.device(name))
    except RuntimeError:
        raise UserError(
            f"model.device: `{name}` is not a torch device; use `auto`, `cpu` or `cuda`"
        ) from None


def name_of(location: str | Path) -> str:
    """Short name of the model at a place."""
    if isinstance(location, Path):
        return location.stem if location.is_file() else location.name
    return location.rsplit("/", 1)[-1]
