"""The thresholds file: schema, laws, load, save.

A thresholds file says which scale factor the attention kernel may use, per phase and layer; for which
model and tile geometry that is valid; and what evidence supports it. Unknown keys are errors.

Prefix caches: keys and values of a layer come from layers below it that skipped. A cached prefix therefore
keeps the numbers that it was computed with, whatever file is loaded later: after a change, or after skipping
was turned off, requests that hit it mix both, which nobody measured. Empty such caches when a file changes,
or make its hash a part of their key. With one file throughout, a hit gives what was measured.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from skip_softmax.thresholds.evidence import EvidenceSection, FitSection, Plain, shaped
from skip_softmax.thresholds.types import (
    PHASES,
    Geometry,
    LayerOverride,
    MinKvLen,
    ModelSection,
    Phase,
    ScaleFactors,
    Section,
    UncalibratedLayer,
)
from skip_softmax.thresholds.yaml_file import parse, read_mapping, user_path, write_text_atomically


class Thresholds(Section):
    """A thresholds file, version 1.

    Attributes:
        format: name and version of the format.
        model: the model that the numbers were calibrated for.
        criterion: what a tile is judged by.
        geometry: tiles of both phases [tokens], those of the kernel that serves.
        min_kv_len: shortest KV length that may skip [tokens]; it is above every scale factor.
        scale_factor: one number per phase for every layer, threshold * kv_len [tokens]; 0 is dense.
        layers: numbers of single layers, which replace those of `scale_factor`.
        uncalibrated: layers that stay dense, and why.
        fit: the fitted curve of each phase, or why there is none.
        evidence: what was measured with these numbers on held-out prompts.
        provenance: versions, device, seeds and hashes of the run that wrote the file.
    """

    format: Literal["skip-softmax/1"] = "skip-softmax/1"
    model: ModelSection
    criterion: Literal["max"] = "max"
    geometry: Geometry
    min_kv_len: MinKvLen = MinKvLen()
    scale_factor: ScaleFactors = ScaleFactors()
    layers: tuple[LayerOverride, ...] = ()
    uncalibrated: tuple[UncalibratedLayer, ...] = ()
    fit: dict[Phase, Annotated[dict[str, Any], shaped(FitSection)]] = Field(default_factory=dict)
    evidence: Annotated[Plain, shaped(EvidenceSection)] = Field(default_factory=dict)
    provenance: Plain = Field(default_factory=dict)

    @model_validator(mode="after")
    def _laws(self) -> Thresholds:
        decode, q_heads = self.geometry.decode, self.model.q_heads
        together = None if decode is None else decode.tile_heads
        if together is not None and q_heads % together:
            raise ValueError(
                f"geometry.decode.tile_heads must divide model.q_heads={q_heads}, but got {together}; leave "
                "it out where the query heads of a KV head vote together"
            )
        seen: set[int] = set()
        for index, override in enumerate(self.layers):
            where = f"layers[{index}] (layer {override.layer})"
            if override.layer >= self.model.layers:
                raise ValueError(
                    f"{where}: layer must be below model.layers={self.model.layers}; "
                    "remove it or fix the number"
                )
            if override.layer in seen:
                raise ValueError(f"{where}: this layer is listed twice; keep one entry")
            seen.add(override.layer)
            for phase in PHASES:
                value, heads = getattr(override, phase), self.vote_heads(phase)
                if isinstance(value, tuple) and len(value) != heads:
                    kind = "query" if phase == "prefill" else "KV" if together is None else "voting"
                    raise ValueError(
                        f"{where}: {phase} needs one number, or {heads} (one per {kind} head), "
                        f"got {len(value)}"
                    )
        for entry in self.uncalibrated:
            if entry.layer >= self.model.layers:
                raise ValueError(
                    f"uncalibrated: layer must be below model.layers={self.model.layers}, but got "
                    f"{entry.layer}; remove it or fix the number"
                )
        for phase in PHASES:
            self._check_phase(phase)
        return self

    def _check_phase(self, phase: Phase) -> None:
        largest = max(
            [getattr(self.scale_factor, phase)]
            + [max(self.per_head(layer.layer, phase)) for layer in self.layers]
        )
        if largest == 0:
            return
        if getattr(self.geometry, phase) is None:
            raise ValueError(
                f"geometry.{phase} is required when a {phase} scale factor is above 0; "
                "a number is valid for one tile geometry only"
            )
        floor = getattr(self.min_kv_len, phase)
        if floor is None or floor <= largest:
            raise ValueError(
                f"`min_kv_len.{phase} > scale_factor` must hold, but got min_kv_len={floor} and a largest "
                f"scale factor of {largest:g}; raise `min_kv_len.{phase}` or lower the scale factor "
                "(a threshold of 1 or more has no meaning)"
            )

    def vote_heads(self, phase: Phase) -> int:
        """How many numbers a layer may have in a phase: one for each of the heads that vote separately."""
        return self.geometry.vote_heads(phase, self.model.q_heads, self.model.kv_heads)

    def per_head(self, layer: int, phase: Phase) -> tuple[float, ...]:
        """Scale factors of one layer and phase.

        Args:
            layer: layer index.
            phase: `prefill` or `decode`.

        Returns:
            One number per query head (prefill) or KV head (decode; see `vote_heads`) [tokens]; 0 is dense.
        """
        heads = self.vote_heads(phase)
        if any(entry.layer == layer for entry in self.uncalibrated):
            return (0.0,) * heads
        value: float | tuple[float, ...] = getattr(self.scale_factor, phase)
        for override in self.layers:
            if override.layer == layer and getattr(override, phase) is not None:
                value = getattr(override, phase)
        return value if isinstance(value, tuple) else (value,) * heads

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Thresholds:
        """Reads and checks a thresholds file.

        Args:
            path: the YAML file.

        Returns:
            The thresholds.

        Raises:
            FileError: the file breaks a law; the message names file, line, key and cure.
            TypeError: `path` is not a path.
        """
        data, text = read_mapping(path)
        return parse(cls, data, source=str(path), text=text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file atomically; `load` returns an equal object.

        Args:
            path: the target; its folder must exist.

        Raises:
            OSError: the file cannot be written.
        """
        write_text_atomically(user_path(path), self.to_yaml())

    def to_yaml(self) -> str:
        """The file's text."""
        data = self.model_dump(mode="json", exclude_none=True)
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes sections as blocks and their leaves on one line, so that a table looks like one."""


def _represent_mapping(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.Node:
    flat = all(not isinstance(v, dict) for v in data.values()) and len(data) <= 12
    node = dumper.represent_mapping("tag:yaml.org,2002:map", data.items())
    node.flow_style = flat and bool(data) and sum(len(str(v)) for v in data.values()) < 160
    return node


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    # PyYAML writes 1e-05 without a dot, which YAML 1.1 readers take for a string.
    if math.isfinite(value):
        text = repr(value)
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")
        return dumper.represent_scalar("tag:yaml.org,2002:float", text)
    return yaml.SafeDumper.represent_float(dumper, value)


_Dumper.add_representer(dict, _represent_mapping)
_Dumper.add_representer(float, _represent_float)
