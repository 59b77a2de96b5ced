"""A setting as a thresholds object of the loaded model."""

from __future__ import annotations

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
    layer = loaded.calibratable[0]
    per_layer = tuple(
        LayerOverride(layer=index, **{phase: setting[phase][index] for phase in setting})
        for index in range(len(loaded.layers))
    )
    return Thresholds(
        model=ModelSection(
            name=loaded.name,
            sha256=loaded.sha256,
            layers=len(loaded.layers),
            q_heads=layer.q_heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            dtype=loaded.dtype,
        ),
        geometry=Geometry(prefill=config.geometry.prefill, decode=config.geometry.decode),
        min_kv_len=MinKvLen(**{phase: config.target.min_kv_len.get(phase) for phase in PHASES}),
        layers=per_layer,
        uncalibrated=tuple(
            UncalibratedLayer(layer=entry.index, reason=entry.reason)
            for entry in loaded.layers
            if entry.reason is not None
        ),
    )
