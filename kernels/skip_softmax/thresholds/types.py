"""Words of a thresholds file: phases, tiles, numbers per phase, layer and head."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

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


class Section(BaseModel):
    """A section of the file: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
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


class PrefillGeometry(Section):
    """Prefill tile [tokens]: `tile_q` query rows vote together on `tile_kv` keys."""

    tile_q: PowerOfTwo
    tile_kv: PowerOfTwo

    @model_validator(mode="after")
    def _powers_of_two(self) -> PrefillGeometry:
        _require_power_of_two("tile_q", self.tile_q)
        _require_power_of_two("tile_kv", self.tile_kv)
        return self


class DecodeGeometry(Section):
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


class Geometry(Section):
    """Tiles of both phases; a phase without tiles is dense."""

    prefill: PrefillGeometry | None = None
    decode: DecodeGeometry | None = None
    order: Literal["ascending"] = "ascending"


class MinKvLen(Section):
    """Shortest KV length that may use the numbers [tokens]; shorter calls run dense."""

    prefill: PositiveInt | None = None
    decode: PositiveInt | None = None


class ScaleFactors(Section):
    """One number per phase [tokens]; absent or 0 is dense."""

    prefill: ScaleFactor = 0.0
    decode: ScaleFactor = 0.0


class LayerOverride(Section):
    """Numbers of one layer: one for all heads, or one per query head (prefill) or KV head (decode)."""

    layer: Layer
    prefill: ScaleFactor | tuple[ScaleFactor, ...] | None = None
    decode: ScaleFactor | tuple[ScaleFactor, ...] | None = None


class UncalibratedLayer(Section):
    """A layer that was left dense because it could not be calibrated, and why."""

    layer: Layer
    reason: str


def _require_power_of_two(name: str, value: int) -> None:
    if value & (value - 1):
        raise ValueError(f"`{name}` must be a power of two from 16 to 512, but got {value}")
