"""What supports the numbers of a thresholds file: the fitted curves, and the evidence."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)

from skip_softmax.thresholds.types import Phase, ScaleFactor

_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value)
        _ANY.dump_python(value, mode="json")  # as `to_yaml` does, which limits nesting
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"may contain text, numbers, lists and mappings only, but got something else ({error}); "
            "put quotes around a date, and flatten what is nested too deeply"
        ) from None
    return value


def shaped(shape: type[BaseModel]) -> AfterValidator:
    """Checks a mapping against a model but keeps the mapping, so that it is written back as it was read."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        shape.model_validate(value)
        return value

    return AfterValidator(check)


def _length(key: Any) -> str:
    text = str(key)
    if not re.fullmatch("[1-9][0-9]{0,11}", text):
        raise ValueError(f"a KV length must be a whole number of tokens above 0, but got {key!r}")
    return text


Plain = Annotated[dict[str, Any], AfterValidator(_plain)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Pair = Field(min_length=2, max_length=2)


class FitSection(BaseModel):
    """The curve `scale_factor = a * exp(b * sparsity)` of a phase, or why there is none.

    Attributes:
        a: at sparsity 0 [tokens].
        b: growth of its logarithm from sparsity 0 to 1.
        r2: share of the variance of log(scale_factor) that a fitted curve explains.
        points: how many were fitted.
        sparsity_range: theirs.
        kv_len_range: theirs [tokens].
        length_exponent: gamma of threshold ~ kv_len^-gamma.
        target: sparsity at which it gives the number that an engine gets.
        near: for targets near it, the sparsity that the counted prompts have there.
        good: from where to where the two differ by 2 points at most, all lengths counted together.
        source: the file that an imported curve stood in.
        refused: why there is no curve.
    """

    # Strict: the mapping itself is kept, so text that looks like a number would remain text.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    a: _Positive = 1.0
    b: _Positive = 1.0
    r2: _Number = 0.0
    points: int = 0
    sparsity_range: Annotated[list[_Share], _Pair] = [0.0, 1.0]
    kv_len_range: Annotated[list[_Number], _Pair] = [0.0, 0.0]
    length_exponent: _Number = 1.0
    target: _Share = 0.0
    near: dict[str, _Share] = {}
    good: Annotated[list[_Share], _Pair] = [0.0, 1.0]
    source: str = ""
    refused: str = ""

    @model_validator(mode="after")
    def _curve_or_reason(self) -> FitSection:
        given = self.model_fields_set & {"a", "b", "refused"}
        if given not in ({"a", "b"}, {"refused"}):
            raise ValueError(
                "must contain both `a` and `b`, or else `refused` (why there is no curve), but got "
                f"{' and '.join(f'`{key}`' for key in sorted(given)) or 'none of them'}"
            )
        return self


class _Evidence(BaseModel):
    # Evidence may say more than the parts that we read.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class BoundSection(_Evidence):
    """A mean over prompts, and its upper confidence bound; None: too few prompts show it for a bound."""

    mean: float
    upper: float | None


class LossSection(_Evidence):
    """What skipping costs on the held-out prompts."""

    kl: BoundSection
    kl_answer: BoundSection | None = None
    kl_text: BoundSection | None = None
    flips: BoundSection | None = None
    score_drop: BoundSection
    generated_drop: BoundSection | None = None
    heldout_prompts: int


class FailingSection(_Evidence):
    """Held-out prompts that lose their answer, of those that the dense run answers in full."""

    seen: int
    of: int
    upper: _Share
    confidence: _Share


class ShareSection(_Evidence):
    """Skipped / visited tiles."""

    achieved: _Share


class SparsitySection(ShareSection):
    """Skipped / visited tiles of a phase, overall and by KV length [tokens]."""

    by_length: dict[Annotated[str, BeforeValidator(_length)], ShareSection] = {}


class SpeedSection(_Evidence):
    """Predicted speed-up: dense attention time / attention time."""

    prefill: _Number = 1.0
    decode: _Number = 1.0
    weighted: _Number = 1.0


class BaselineSection(_Evidence):
    """What the best single number per phase achieves."""

    loss: dict[str, Any]
    sparsity: dict[Phase, SparsitySection]
    scale_factor: dict[Phase, ScaleFactor] = {}


class ImportedSection(_Evidence):
    """Which engine imported numbers come from."""

    engine: str = "native"


class DenseSection(_Evidence):
    """Why a phase is left dense, and how much it could skip at most.

    Attributes:
        reason: in words.
        most: skipped / visited tiles at the largest scale factor.
        at: that scale factor [tokens].
        first: the smallest scale factor that skips a tile [tokens], where `most` is 0; None: none does.
    """

    reason: str
    most: _Share
    at: _Positive
    first: _Positive | None = None


class TargetFitSection(_Evidence):
    """Model-Optimizer's curve `a * exp(b * target_sparsity)` [tokens], and how well it fits.

    Attributes:
        a: at sparsity 0 [tokens].
        b: growth of its logarithm from sparsity 0 to 1.
        r2: of the logarithms.
        r2_raw: of the scale factors themselves.
        points: how many were fitted.
        sparsity_range: theirs.
    """

    a: _Positive
    b: _Positive
    r2: _Number
    r2_raw: _Number
    points: int
    sparsity_range: Annotated[list[_Share], _Pair]


class PredictedSection(ShareSection):
    """Sparsity that two curves and the histograms predicted, and what was achieved."""

    nvidia: _Share | None = None
    ours: _Share | None = None
    histogram: _Share


class TargetSection(ShareSection):
    """What a phase was to skip, and what came of it.

    Attributes:
        target: share of the tiles that was asked for.
        asked: what the curve gives for it [tokens].
        scale_factor: what was used, at most what `min_kv_len` allows [tokens].
        fit: the curve.
        by_length: per KV length.
        affordable: a sparsity that the budget allows by estimate; None: the target keeps within it.
    """

    target: _Share
    asked: _Positive
    scale_factor: _Positive
    fit: TargetFitSection
    by_length: dict[Annotated[str, BeforeValidator(_length)], PredictedSection] = {}
    affordable: _Share | None = None


class EvidenceSection(_Evidence):
    """The parts of `evidence` that are read."""

    verdict: Literal["passed", "failed", "not validated"] = "not validated"
    loss: LossSection | None = None
    failing_prompts: FailingSection | None = None
    sparsity: dict[Phase, SparsitySection] = {}
    predicted_speedup: SpeedSection = SpeedSection()
    uniform_baseline: BaselineSection = BaselineSection(loss={}, sparsity={})
    imported: ImportedSection = ImportedSection()
    dense: dict[Phase, DenseSection] = {}
    target_sparsity: dict[Phase, TargetSection] = {}
    layers_dense: dict[Phase, dict[str, list[Annotated[int, Field(ge=0)]]]] = {}
