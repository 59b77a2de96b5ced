"""Loads a model and says which of its layers can be calibrated.

`model.path` is a hub id, a local folder, a `.gguf` file, or `package://NAME/FILE`: a file inside an
installed package, found without importing that package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.errors import UserError
from calibrate.model.config_json import model_hash
from calibrate.model.locate import locate
from calibrate.schema import ModelConfig


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with what the thresholds file says about it.

    Attributes:
        model: the transformers model, in eval mode on its device.
        tokenizer: its tokenizer.
        name: short name.
        sha256: hash of the weights file, or of every file of the folder that decides the model.
        layers: its attention layers (`skip_softmax.huggingface.layers.Layer`).
        max_context: longest sequence it was made for [tokens], if it says.
        dtype: dtype of the weights as run.
    """

    model: Any
    tokenizer: Any
    name: str
    sha256: str
    layers: list[Any]
    max_context: int | None
    dtype: str

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
    from safetensors import SafetensorError

    from skip_softmax.huggingface.layers import inspect_layers

    location = locate(config.path)
    tokenizer_at = locate(config.tokenizer, "model.tokenizer") if config.tokenizer else location
    device = _device(config.device)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            *_arguments(tokenizer_at)[0], **_arguments(tokenizer_at)[1], **options
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            *_arguments(location)[0],
            **_arguments(location)[1],
            **options,
            dtype=getattr(torch, config.dtype),
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.path: `{config.path}` must be a hub id, a model folder, a .gguf file or "
            f"package://NAME/FILE that transformers can load, but it says: {reason}"
        ) from error
    try:
        model = model.to(device).eval()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.device: `{device}` cannot hold the model: {reason}") from error
    try:
        layers = inspect_layers(model)
    except ValueError as error:
        raise UserError(f"model.path: `{config.path}` cannot be calibrated: {error}") from error
    if all(layer.reason is not None for layer in layers):
        raise UserError(
            f"model.path: no layer of `{config.path}` can be calibrated "
            f"({layers[0].reason if layers else 'it has no layers'})"
        )
    text_config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=_name(location),
        sha256=model_hash(location, model),
        layers=layers,
        max_context=getattr(text_config, "max_position_embeddings", None),
        dtype=config.dtype,
    )


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
            f"model.device: `{name}` is no device of torch; use `auto`, `cpu` or `cuda`"
        ) from None


def _name(location: str | Path) -> str:
    if isinstance(location, Path):
        return location.stem if location.is_file() else location.name
    return location.rsplit("/", 1)[-1]
