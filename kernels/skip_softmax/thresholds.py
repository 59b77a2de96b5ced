"""The thresholds file: schema, laws, load, save.

A thresholds file says, per phase and layer, which scale factor the attention kernel may use, for
which model and tile geometry it holds, and what evidence there is. Unknown keys are errors.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)

from skip_softmax.strict_yaml import FileError, parse, read_mapping, write_text_atomically

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


def _no_boolean(value: Any) -> Any:
    # Python counts `true` as 1, and so does pydantic.
    if isinstance(value, bool):
        raise ValueError(f"must be a number, but got {str(value).lower()}")
    return value


ScaleFactor = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_boolean)]
PositiveInt = Annotated[int, Field(gt=0), BeforeValidator(_no_boolean)]
PowerOfTwo = Annotated[int, Field(ge=16, le=512), BeforeValidator(_no_boolean)]
Layer = Annotated[int, Field(ge=0), BeforeValidator(_no_boolean)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """Which model the numbers hold for; heads and layers are checked before the file is used."""

    name: str
    sha256: str
    layers: PositiveInt
    q_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    dtype: str

    @model_validator(mode="after")
    def _groups_are_whole(self) -> ModelSection:
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"`q_heads` must be a multiple of `kv_heads`, but got {self.q_heads} and {self.kv_heads}"
            )
        return self


class PrefillGeometry(_Section):
    """Prefill tile [tokens]: `tile_q` query rows vote together on `tile_kv` keys."""

    tile_q: PowerOfTwo
    tile_kv: PowerOfTwo

    @model_validator(mode="after")
    def _powers_of_two(self) -> PrefillGeometry:
        _require_power_of_two("tile_q", self.tile_q)
        _require_power_of_two("tile_kv", self.tile_kv)
        return self


class DecodeGeometry(_Section):
    """Decode tile [tokens]: the query heads of one KV head vote together on `tile_kv` keys.

    `running_max` says what a tile is compared with: `ascending` is every kept tile before it, in
    ascending position; `seeded` is the first and the last visited tile, whatever order and splits
    the kernel uses.
    """

    tile_kv: PowerOfTwo
    running_max: Literal["ascending", "seeded"] = "ascending"

    @model_validator(mode="after")
    def _powers_of_two(self) -> DecodeGeometry:
        _require_power_of_two("tile_kv", self.tile_kv)
        return self


class Geometry(_Section):
    """Tiles of both phases; a phase without tiles is dense."""

    prefill: PrefillGeometry | None = None
    decode: DecodeGeometry | None = None
    order: Literal["ascending"] = "ascending"


class MinKvLen(_Section):
    """Shortest KV length that may use the numbers [tokens]; shorter calls run dense."""

    prefill: PositiveInt | None = None
    decode: PositiveInt | None = None


class ScaleFactors(_Section):
    """One number per phase [tokens]; absent or 0 is dense."""

    prefill: ScaleFactor = 0.0
    decode: ScaleFactor = 0.0


class LayerOverride(_Section):
    """Numbers of one layer: one for all heads, or one per query head (prefill) or KV head (decode)."""

    layer: Layer
    prefill: ScaleFactor | tuple[ScaleFactor, ...] | None = None
    decode: ScaleFactor | tuple[ScaleFactor, ...] | None = None


class UncalibratedLayer(_Section):
    """A layer that was left dense because it could not be calibrated, and why."""

    layer: Layer
    reason: str


_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value)
        _ANY.dump_python(value, mode="json")  # as `to_yaml` does: has a limit on nesting
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"must hold text, numbers, lists and mappings only, but got something else ({error}); "
            "put quotes around a date, and flatten what is nested too deep"
        ) from None
    return value


def _shaped(shape: type[BaseModel]) -> AfterValidator:
    """Checks a mapping and keeps it as it stands, so that it is written back as it was read."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        shape.model_validate(value)
        return value

    return AfterValidator(check)


def _length(key: Any) -> str:
    text = str(key)
    if not re.fullmatch("[1-9][0-9]{0,11}", text):
        raise ValueError(f"a KV length must be a whole number of tokens above 0, but got {key!r}")
    return text


_Plain = Annotated[dict[str, Any], AfterValidator(_plain)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Pair = Field(min_length=2, max_length=2)


class FitSection(BaseModel):
    """The fitted curve `scale_factor = a * exp(b * sparsity)` of a phase, or why there is none."""

    # Strict: the mapping itself is kept, so a text that looks like a number would stay a text.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    a: _Positive = 1.0
    b: _Positive = 1.0
    r2: _Number = 0.0
    points: int = 0
    sparsity_range: Annotated[list[_Share], _Pair] = [0.0, 1.0]
    kv_len_range: Annotated[list[_Number], _Pair] = [0.0, 0.0]
    length_exponent: _Number = 1.0
    refused: str = ""

    @model_validator(mode="after")
    def _curve_or_reason(self) -> FitSection:
        given = self.model_fields_set & {"a", "b", "refused"}
        if given not in ({"a", "b"}, {"refused"}):
            raise ValueError(
                "must hold both `a` and `b`, or else `refused` (why there is no curve), but got "
                f"{' and '.join(f'`{key}`' for key in sorted(given)) or 'none of them'}"
            )
        return self


class _Evidence(BaseModel):
    # What evidence says beyond the parts that are read is its writer's own business.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class BoundSection(_Evidence):
    """A mean over prompts, and its upper confidence bound."""

    mean: float
    upper: float


class LossSection(_Evidence):
    """What skipping costs on the held-out prompts."""

    kl: BoundSection
    score_drop: BoundSection
    heldout_prompts: int


class ShareSection(_Evidence):
    """Skipped / visited tiles."""

    achieved: _Share


class SparsitySection(ShareSection):
    """The same of a phase, and by length."""

    by_length: dict[Annotated[str, BeforeValidator(_length)], ShareSection] = {}


class SpeedSection(_Evidence):
    """Dense time / time, predicted."""

    prefill: _Number = 1.0
    decode: _Number = 1.0
    weighted: _Number = 1.0


class BaselineSection(_Evidence):
    """The best single number per phase."""

    loss: dict[str, Any]
    sparsity: dict[Phase, SparsitySection]
    scale_factor: dict[Phase, ScaleFactor] = {}


class ImportedSection(_Evidence):
    """Where numbers of another source come from."""

    engine: str = "native"


class EvidenceSection(_Evidence):
    """The parts of `evidence` that are read."""

    verdict: Literal["passed", "failed", "not validated"] = "not validated"
    loss: LossSection | None = None
    sparsity: dict[Phase, SparsitySection] = {}
    predicted_speedup: SpeedSection = SpeedSection()
    uniform_baseline: BaselineSection = BaselineSection(loss={}, sparsity={})
    imported: ImportedSection = ImportedSection()


class Thresholds(_Section):
    """A thresholds file, version 1."""

    format: Literal["skip-softmax/1"] = "skip-softmax/1"
    model: ModelSection
    criterion: Literal["max"] = "max"
    geometry: Geometry
    min_kv_len: MinKvLen = MinKvLen()
    scale_factor: ScaleFactors = ScaleFactors()
    layers: tuple[LayerOverride, ...] = ()
    uncalibrated: tuple[UncalibratedLayer, ...] = ()
    fit: dict[Phase, Annotated[dict[str, Any], _shaped(FitSection)]] = {}
    evidence: Annotated[_Plain, _shaped(EvidenceSection)] = {}
    provenance: _Plain = {}

    @model_validator(mode="after")
    def _laws(self) -> Thresholds:
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
            for phase, heads in (("prefill", self.model.q_heads), ("decode", self.model.kv_heads)):
                value = getattr(override, phase)
                if isinstance(value, tuple) and len(value) != heads:
                    kind = "query" if phase == "prefill" else "KV"
                    raise ValueError(
                        f"{where}: {phase} needs one number, or {heads} (one per {kind} head), "
                        f"got {len(value)}"
                    )
        for entry in self.uncalibrated:
            if entry.layer >= self.model.layers:
                raise ValueError(
                    f"uncalibrated: layer {entry.layer} is not below {self.model.layers}"
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
                "a number holds for one tile geometry only"
            )
        floor = getattr(self.min_kv_len, phase)
        if floor is None or floor <= largest:
            raise ValueError(
                f"`min_kv_len.{phase} > scale_factor` must hold, but got min_kv_len={floor} and a largest "
                f"scale factor of {largest:g}; raise `min_kv_len.{phase}` or lower the scale factor "
                "(a threshold of 1 or more has no meaning)"
            )

    def per_head(self, layer: int, phase: Phase) -> tuple[float, ...]:
        """Scale factors of one layer and phase.

        Args:
            layer: layer index.
            phase: `prefill` or `decode`.

        Returns:
            One number per query head (prefill) or KV head (decode) [tokens]; 0 is dense.
        """
        heads = self.model.q_heads if phase == "prefill" else self.model.kv_heads
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
        """
        data, text = read_mapping(path)
        return parse(cls, data, source=str(path), text=text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file atomically; `load` gives back an equal object.

        Args:
            path: the target; its folder must exist.
        """
        write_text_atomically(path, self.to_yaml())

    def to_yaml(self) -> str:
        """The file's text."""
        data = self.model_dump(mode="json", exclude_none=True)
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def shape_of_config(value: Callable[[str], Any]) -> tuple[int, int, int, int]:
    """Layers, query heads, KV heads and head size that a config of transformers means.

    Args:
        value: gives a key's value, None where the config has none.

    Raises:
        KeyError: a key is missing.
        TypeError: a value is no number; or ValueError.
    """

    def needed(key: str) -> int:
        if (number := value(key)) is None:
            raise KeyError(key)
        return int(number)

    heads = needed("num_attention_heads")
    kv_heads = int(value("num_key_value_heads") or heads)
    if value("qk_nope_head_dim"):  # latent attention: a part with positions, one without
        head_dim = needed("qk_nope_head_dim") + needed("qk_rope_head_dim")
    else:
        head_dim = int(value("head_dim") or needed("hidden_size") // heads)
    return needed("num_hidden_layers"), heads, kv_heads, head_dim


class _Dumper(yaml.SafeDumper):
    """Sections as blocks, their leaves on one line: a table stays a table."""


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


def _require_power_of_two(name: str, value: int) -> None:
    if value & (value - 1):
        raise ValueError(f"`{name}` must be a power of two from 16 to 512, but got {value}")


__all__ = [
    "PHASES",
    "DecodeGeometry",
    "FileError",
    "Geometry",
    "LayerOverride",
    "MinKvLen",
    "ModelSection",
    "Phase",
    "PrefillGeometry",
    "ScaleFactor",
    "ScaleFactors",
    "Thresholds",
    "UncalibratedLayer",
]
