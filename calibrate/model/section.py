"""The model section of a thresholds file, and a setting as a thresholds object of the loaded model."""

from __future__ import annotations

from pathlib import Path

from calibrate.errors import UserError
from calibrate.model.config_json import model_hash, read_model_config
from calibrate.model.load import LoadedModel
from calibrate.schema import RunConfig
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import (
    PHASES,
    Geometry,
    LayerOverride,
    MinKvLen,
    ModelSection,
    Phase,
    UncalibratedLayer,
)

Setting = dict[Phase, tuple[float, ...]]
"""Per phase one scale factor per layer [tokens]; 0 is dense."""


def thresholds_for(loaded: LoadedModel, config: RunConfig, setting: Setting) -> Thresholds:
    """A thresholds object that runs a setting: every layer named, no evidence yet."""
    per_layer = tuple(
        LayerOverride(layer=index, **{phase: setting[phase][index] for phase in setting})
        for index in range(len(loaded.layers))
    )
    return Thresholds(
        model=section_of(loaded),
        geometry=Geometry(prefill=config.geometry.prefill, decode=config.geometry.decode),
        min_kv_len=MinKvLen(**{phase: config.target.min_kv_len.get(phase) for phase in PHASES}),
        layers=per_layer,
        uncalibrated=tuple(
            UncalibratedLayer(layer=entry.index, reason=entry.reason)
            for entry in loaded.layers
            if entry.reason is not None
        ),
    )


def section_of(loaded: LoadedModel) -> ModelSection:
    """The model section of a loaded model; heads are those of the layers that can be calibrated."""
    layer = loaded.calibratable[0]
    return ModelSection(
        name=loaded.name,
        sha256=loaded.sha256,
        layers=len(loaded.layers),
        q_heads=layer.q_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        head_dim_v=layer.head_dim_v,
        dtype=loaded.dtype,
        kv_cache_dtype=loaded.kv_cache_dtype,
    )


def attention_modules(loaded: LoadedModel) -> str | list[str] | None:
    """Names of a loaded model's attention modules by layer; one text with `{layer}` where all follow it.

    Returns:
        Names, empty for layers that have no softmax attention; None where no module is known.
    """
    names = [layer.name.strip("?") for layer in loaded.layers]
    if not any(names):
        return None
    pattern = names[0].replace(".0.", ".{layer}.", 1)
    alike = all(name == pattern.replace("{layer}", str(i)) for i, name in enumerate(names))
    return pattern if alike and "{layer}" in pattern else names


def section_of_folder(folder: Path) -> ModelSection:
    """The model section of a transformers folder, without loading the model.

    Raises:
        UserError: it is a file, or its `config.json` cannot be read.
    """
    if folder.is_file():  # its hash would be the file's, and no run's model has that one
        raise UserError(
            f"--model must be the folder of a transformers model, but `{folder}` is a file; give its folder"
        )
    config = read_model_config(folder)
    layers, q_heads, kv_heads, head_dim = config.shape
    text = config.data.get("text_config", config.data)
    return ModelSection(
        name=folder.resolve().name,
        sha256=model_hash(folder, None),
        layers=layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_v=config.head_dim_v,
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "unknown"),
    )
