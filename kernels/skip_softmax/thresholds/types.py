"""The sections of a thresholds file: model, tiles, numbers per phase, layer and head."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from skip_softmax.thresholds.yaml_file import FileError, explained

Phase = Literal["prefill", "decode"]
KvCacheDtype = Literal["fp8_e4m3"]
"""Of a KV cache whose dtype is not the model's, in vLLM's words."""
PHASES: tuple[Phase, ...] = ("prefill", "decode")


def _no_boolean(value: Any) -> Any:
    # To Python, and so to pydantic, `true` is the number 1.
    if isinstance(value, bool):
        raise ValueError(f"must be a number, but got {str(value).lower()}")
    return value


# threshold * kv_len [tokens]; 0 is dense.
ScaleFactor = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_boolean)]
PositiveInt = Annotated[int, Field(gt=0), BeforeValidator(_no_boolean)]
PowerOfTwo = Annotated[int, Field(ge=16, le=512), BeforeValidator(_no_boolean)]
Tokens = Annotated[int, Field(ge=0), BeforeValidator(_no_boolean)]
LayerIndex = Annotated[int, Field(ge=0), BeforeValidator(_no_boolean)]


class Section(BaseModel):
    """A section of the file: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **values: Any) -> None:
        """Checks arguments as a file's keys are checked.

        Raises:
            FileError: an argument breaks a law; the message names it, the law and the value.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise FileError(explained(error, type(self), type(self).__name__)) from None

    # Without this mark pydantic calls the constructor of a nested section too, and loses which key is wrong.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class ModelSection(Section):
    """The model that the numbers were calibrated for; its shape is checked before the file is used.

    Heads are those that calibration saw: with latent attention (DeepSeek's), whose keys and values are
    expanded per head there, `head_dim` is 192 and `head_dim_v` 128, though a server may decode on a cache of
    576 and 512 columns with one KV head.

    Attributes:
        name: for humans.
        sha256: of what decides its numbers.
        layers: attention layers or others, all of them.
        q_heads: query heads.
        kv_heads: KV heads.
        head_dim: columns of queries and keys.
        head_dim_v: columns of values; None: as many.
        dtype: of its weights.
        kv_cache_dtype: of the keys and values that attention reads, on which decisions depend; None: `dtype`.
            FP8 stands for numbers rounded to e4m3 as they are (scales of 1).
    """

    name: str
    sha256: str
    layers: PositiveInt
    q_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    head_dim_v: PositiveInt | None = None
    dtype: str
    kv_cache_dtype: KvCacheDtype | None = None

    @property
    def latent(self) -> bool:
        """Whether it has latent attention (MLA), which shows in values of another size than keys."""
        return self.head_dim_v not in (None, self.head_dim)

    @model_validator(mode="after")
    def _groups_are_whole(self) -> ModelSection:
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"`q_heads` must be a multiple of `kv_heads`, but got {self.q_heads} and {self.kv_heads}"
            )
        return self


class PrefillGeometry(Section):
    """Prefill tile [tokens]: `tile_q` query rows vote together on `tile_kv` keys.

    A vote that holds one of the last `dense_last` query rows of a call skips nothing; 0: every vote may
    skip. The last row of a prompt gives the first token of the answer, while all others reach the output
    only through the keys and values of later layers. In chunked prefill the last rows of every chunk are
    dense.

    `chunk` [tokens]: prompts are computed in chunks that end at its multiples, each as one call, so that
    early chunks have larger thresholds than late ones; None: each prompt is one call.
    """

    tile_q: PowerOfTwo
    tile_kv: PowerOfTwo
    dense_last: Tokens = 0
    chunk: PositiveInt | None = None

    @model_validator(mode="after")
    def _powers_of_two(self) -> PrefillGeometry:
        _require_power_of_two("tile_q", self.tile_q)
        _require_power_of_two("tile_kv", self.tile_kv)
        return self

    @model_validator(mode="after")
    def _chunks_hold_whole_votes(self) -> PrefillGeometry:
        if self.chunk is not None and self.chunk % self.tile_q:
            raise ValueError(
                f"`chunk` must be a multiple of `tile_q`, or a chunk's end would split a vote, but got "
                f"{self.chunk} with tile_q={self.tile_q}; round it to a multiple"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_what_says_something(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Files, configs and statistics from before these keys must compare as equal to those of today.
        values: dict[str, Any] = write(self)
        unsaid = {key for key in ("dense_last", "chunk") if not getattr(self, key)}
        return {key: value for key, value in values.items() if key not in unsaid}

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of `attention` with this tile; how prompts are cut is up to who calls it."""
        return self.model_dump(exclude={"chunk"})


class DecodeGeometry(Section):
    """Decode tile [tokens]: query heads vote together on `tile_kv` keys.

    `tile_heads` query heads, next to one another, vote together; None: those of one KV head. Of a latent
    cache (MLA), whose single KV head has all query heads, kernels hold 16 to 64 in a tile, and this says how
    many. Heads that vote together may have keys of their own: calibration sees latent attention with its keys
    and values expanded per head, and its numbers are valid on the cache because the scores are the same.

    `running_max` says what a tile is compared with. `ascending`: every kept tile before it, in
    ascending position. `seeded`: the first and the last visited tile, whatever the kernel's order and
    splits.
    """

    tile_kv: PowerOfTwo
    running_max: Literal["ascending", "seeded"] = "ascending"
    tile_heads: PositiveInt | None = None

    @model_validator(mode="after")
    def _powers_of_two(self) -> DecodeGeometry:
        _require_power_of_two("tile_kv", self.tile_kv)
        return self

    @model_serializer(mode="wrap")
    def _only_what_says_something(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # As in prefill: what was written before this key must compare as equal.
        values: dict[str, Any] = write(self)
        return {key: value for key, value in values.items() if value is not None}

    def vote_heads(self, q_heads: int, kv_heads: int) -> int:
        """How many votes a model's heads cast together, one for each number of a layer."""
        return kv_heads if self.tile_heads is None else q_heads // self.tile_heads

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of `decode_attention` with this tile."""
        return self.model_dump()


class Geometry(Section):
    """Tiles of both phases, visited in `order`; a phase without tiles is dense."""

    prefill: PrefillGeometry | None = None
    decode: DecodeGeometry | None = None
    order: Literal["ascending"] = "ascending"

    @property
    def chunk(self) -> int | None:
        """Chunk in which prompts are computed [tokens]; None: whole."""
        return None if self.prefill is None else self.prefill.chunk

    def vote_heads(self, phase: Phase, q_heads: int, kv_heads: int) -> int:
        """Heads that vote separately: query heads in prefill; in decode KV heads, or every `tile_heads`."""
        if phase == "prefill":
            return q_heads
        return kv_heads if self.decode is None else self.decode.vote_heads(q_heads, kv_heads)

    def keywords(self, phase: Phase) -> dict[str, Any]:
        """Keywords of a phase's operation; none for a phase without tiles, as dense is the same for any."""
        tiles = self.prefill if phase == "prefill" else self.decode
        return {} if tiles is None else tiles.keywords


class MinKvLen(Section):
    """Shortest KV length [tokens] that may skip, per phase; shorter calls run dense."""

    prefill: PositiveInt | None = None
    decode: PositiveInt | None = None


class ScaleFactors(Section):
    """One scale factor per phase, threshold * kv_len [tokens]; absent or 0 is dense."""

    prefill: ScaleFactor = 0.0
    decode: ScaleFactor = 0.0


class LayerOverride(Section):
    """Scale factors of one layer: one number, or one per query head (prefill) or KV head (decode).

    With `geometry.decode.tile_heads`, decode has one for every so many query heads instead.
    """

    layer: LayerIndex
    prefill: ScaleFactor | tuple[ScaleFactor, ...] | None = None
    decode: ScaleFactor | tuple[ScaleFactor, ...] | None = None


class UncalibratedLayer(Section):
    """A layer that is left dense because it could not be calibrated, and why."""

    layer: LayerIndex
    reason: str


def _require_power_of_two(name: str, value: int) -> None:
    if value & (value - 1):
        raise ValueError(f"`{name}` must be a power of two from 16 to 512, but got {value}")
