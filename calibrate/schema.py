"""The run config: every key a user may set, and the only place where a default lives.

Precedence: command line > `--set section.key=value` > YAML file > the defaults below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from calibrate.errors import UserError
from skip_softmax.thresholds.types import DecodeGeometry, Phase, PrefillGeometry
from skip_softmax.thresholds.yaml_file import parse, read_mapping, read_value, user_path

Task = Literal[
    "needle_single",
    "needle_multikey",
    "needle_multivalue",
    "needle_multiquery",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "text",
    "file",
    "hub",
    "memory",
]
"""`memory` is what `calibrate.run(..., prompts=[...])` puts there; a config file cannot name it."""

Engine = Literal[
    "native",
    "trtllm",
    "modelopt",
    "vllm",
    "sglang",
    "flashinfer",
    "vllm-omni",
    "sglang-diffusion",
    "tokenspeed",
    "scalar+ignore",
    "scalar",
]


EngineOption = Literal[
    "block_size",
    "compilation_config",
    "cpu_offload_gb",
    "disable_custom_all_reduce",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "tensor_parallel_size",
]

WHOLE_PROMPTS: tuple[Engine, ...] = ("vllm-omni", "sglang-diffusion", "tokenspeed")
"""Engines that skip only where a whole prompt is one call."""

LEAST_GENERATED = 128
"""Errors of decoding add up, so that fewer generated tokens would hide them."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_not_switches(cls, value: Any, info: ValidationInfo) -> Any:
        # To Python, and so to pydantic, `true` is the number 1.
        annotation = cls.model_fields[str(info.field_name)].annotation
        if annotation is not bool and not hasattr(annotation, "model_fields"):
            inside = value.values() if isinstance(value, dict) else value
            values = inside if isinstance(value, list | tuple | dict) else [value]
            if any(isinstance(one, bool) for one in values):
                raise ValueError(f"must not be true or false, but got {value}")
        return value


# Files and folders; `~` is the user's own folder, as in a shell.
_Path = Annotated[str, AfterValidator(os.path.expanduser)]


def _with_home(url: str) -> str:
    """The same in a URL of a file: `sqlite:///~/study.db`."""
    kind, slashes, place = url.partition(":///")
    return kind + slashes + os.path.expanduser(place)


class ModelConfig(_Section):
    """Which model, and how it is loaded."""

    path: _Path
    """Hub id, local folder, `.gguf` file, or `package://NAME/FILE` (a file inside an installed package)."""
    tokenizer: _Path | None = None
    """Where the tokenizer is, if not with the model; same forms as `path`."""
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = "auto"
    """Of the server's KV cache (vLLM: `--kv-cache-dtype`), on which decisions depend; `auto`: as `dtype`.
    `fp8_e4m3`: keys and values are rounded to e4m3 as they are (scales of 1, which a server has unless its
    checkpoint brings others), also in the dense run that losses are measured against."""
    device: str = "auto"
    """`auto` (cuda if there is one, else cpu), `cpu`, `cuda`, `cuda:1`."""
    trust_remote_code: bool = False
    engine: Literal["transformers", "vllm-native"] = "transformers"
    """Who runs the model while it is calibrated. `vllm-native`: the plug-in for vLLM, so that evidence and
    service are the same code."""
    engine_options: dict[EngineOption, Any] = {}
    """`engine: vllm-native`: more keywords of `vllm.LLM`, of the machine and not of what is computed."""

    @property
    def served(self) -> bool:
        """Whether a serving engine runs the model, in the place of transformers."""
        return self.engine != "transformers"

    @model_validator(mode="after")
    def _fits_the_engine(self) -> ModelConfig:
        if self.served and self.device != "auto":
            raise ValueError(
                f"`device` must be auto for `engine: {self.engine}`, which finds its devices itself, but got "
                f"{self.device}; leave it out, and choose with CUDA_VISIBLE_DEVICES"
            )
        if self.served and self.kv_cache_dtype != "auto":
            raise ValueError(
                f"`kv_cache_dtype` must be auto for `engine: {self.engine}`, which does not calibrate over "
                f"another cache yet, but got {self.kv_cache_dtype}; use `engine: transformers`"
            )
        if self.engine_options and not self.served:
            raise ValueError(
                "`engine_options` must be left out for `engine: transformers`, which has none, but got "
                f"{', '.join(sorted(self.engine_options))}; leave it out, or set `engine`"
            )
        return self


class GeometryConfig(_Section):
    """Tile geometry of the kernel that will serve; a thresholds file is valid for this geometry only.

    `prefill.dense_last` [tokens] is for `target.engine: native` alone: see `PrefillGeometry`. `prefill.chunk`
    [tokens] is the prefill chunk of the server (vLLM: `max_num_batched_tokens`); null: whole prompts.
    """

    prefill: PrefillGeometry = PrefillGeometry(tile_q=64, tile_kv=128)
    decode: DecodeGeometry = DecodeGeometry(tile_kv=64)


class Source(_Section):
    """One source of prompts; sources share the prompts of a set in proportion to `weight`."""

    task: Task
    weight: float = Field(default=1.0, gt=0)
    path: _Path | None = None
    """`task: file`: JSONL, JSON, CSV or Parquet. `task: text`: a text file; unset: Python's own manual.
    Either may be `package://NAME/FILE`: a file that an installed package ships, or one beside its metadata
    (`METADATA` holds its description). `task: memory`: `sha256:` and the hash of the prompts."""
    dataset: str | None = None
    """`task: hub`: dataset id."""
    subset: str | None = None
    split: str = "train"
    prompt_field: str = "prompt"
    answer_field: str | None = None
    """Column with the reference answer; unset: the text continues itself."""

    @property
    def has_answer(self) -> bool:
        """Whether its prompts have a reference answer; those without are continued by their own text."""
        if self.task in ("file", "hub", "memory"):
            return self.answer_field is not None
        return self.task != "text"

    @model_validator(mode="after")
    def _fields_fit_the_task(self) -> Source:
        if self.task == "file" and self.path is None:
            raise ValueError("`task: file` needs `path`, the JSONL, JSON, CSV or Parquet file")
        if self.task == "hub" and self.dataset is None:
            raise ValueError("`task: hub` needs `dataset`, the dataset's id")
        return self


class PromptsConfig(_Section):
    """What the model is calibrated on. Calibration, search and held-out sets never share a prompt."""

    sources: tuple[Source, ...] = (Source(task="needle_single"), Source(task="text"))
    lengths: tuple[int, ...] = (1024, 2048)
    """Prompt lengths [tokens]; each is one length bin of the statistics."""
    decode_tokens: int = Field(default=32, ge=1)
    """Longest teacher-forced continuation per prompt [tokens]; an answer may be shorter."""
    calibration: int = Field(default=16, ge=1)
    """Prompts whose tiles are counted. The decode steps of one text are alike, so it is the number of texts
    that makes decode's predicted sparsity certain."""
    search: int = Field(default=4, ge=1)
    """Prompts on which trials are scored."""
    heldout: int = Field(default=12, ge=2)
    """Prompts that only the validation sees."""

    @model_validator(mode="after")
    def _lengths_make_sense(self) -> PromptsConfig:
        if not self.sources:
            raise ValueError("`sources` must name at least one source of prompts")
        if not self.lengths:
            raise ValueError("`lengths` must hold at least one length")
        if min(self.lengths) < 16:
            raise ValueError(
                f"every length must be at least 16 tokens, but got {list(self.lengths)}"
            )
        if len(set(self.lengths)) != len(self.lengths):
            raise ValueError(f"lengths must differ from each other, but got {list(self.lengths)}")
        return self


class BudgetConfig(_Section):
    """The largest loss the user accepts, against the model's own dense run."""

    kl: float = Field(default=0.01, gt=0)
    """Mean KL(dense || sparse) of the next-token distributions [nats/token]."""
    kl_answer: float | None = Field(default=None, gt=0)
    """As `kl`, of prompts with a reference answer only [nats/token]; null: only reported, as all below."""
    kl_text: float | None = Field(default=None, gt=0)
    """As `kl`, of prompts without a reference answer only [nats/token]."""
    flips: float | None = Field(default=None, gt=0, le=100)
    """Mean share of the positions of a continuation at which another token is ranked first [%]."""
    score_drop: float | None = Field(default=None, gt=0, le=100)
    """Mean drop of the share of reference tokens that the model ranks first [points].
    A few points take hundreds of held-out prompts to prove: a run says how many before it begins."""
    generated_drop: float | None = Field(default=None, gt=0, le=100)
    """Mean drop of the share of an answer's values that generated text contains [points], of held-out prompts
    with a reference answer."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Each upper confidence bound, not the mean, must lie within its budget."""

    @property
    def limits(self) -> dict[str, float]:
        """The budget of each loss that has one, by the loss's name."""
        return {name: value for name, value in self if name != "confidence" and value is not None}


class TargetConfig(_Section):
    """What is being optimised, and for which engine."""

    engine: Engine = "native"
    """The search space is what this engine can express: `native` every layer and phase, `trtllm` and
    `modelopt` (`scalar+ignore`) one number per phase and layers left dense, the others (`scalar`) one
    number per phase."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    phase_weight: dict[Phase, float] = {"prefill": 1.0, "decode": 1.0}
    """How much each phase's predicted attention time counts in the objective."""
    min_kv_len: dict[Phase, int] = {"prefill": 512, "decode": 512}
    """Shortest KV length that will use the thresholds [tokens]; shorter requests run dense."""
    target_sparsity: float | dict[Phase, float] | None = None
    """Share of the tiles to skip, of all phases or of each, in (0, 1): in place of a search, each phase gets
    the number that Model-Optimizer's curve has there, and that setting is proven. null: search."""

    def largest_scale_factor(self, phase: Phase) -> float:
        """Largest scale factor that `min_kv_len > scale_factor` allows [tokens]."""
        return self.min_kv_len[phase] * 0.98

    def first_chunks(self, chunk: int | None, engine: Engine) -> str | None:
        """Why an engine computes a prompt's first chunks in another way than this run; None: it does not.

        Args:
            chunk: `geometry.prefill.chunk` [tokens].
            engine: who will serve.
        """
        floor = self.min_kv_len.get("prefill", 0)
        if engine == "native" or "prefill" not in self.phases or chunk is None or chunk >= floor:
            return None
        return (
            f"`geometry.prefill.chunk >= target.min_kv_len.prefill` must hold for {engine}, which skips "
            f"below `min_kv_len` too, but got {chunk} and {floor}; lower `target.min_kv_len.prefill`, or "
            "calibrate for the native engine"
        )

    @property
    def targets(self) -> dict[Phase, float]:
        """The target sparsity of each phase, in (0, 1); empty: the setting is searched for."""
        if isinstance(self.target_sparsity, dict):
            return self.target_sparsity
        return (
            {} if self.target_sparsity is None else dict.fromkeys(self.phases, self.target_sparsity)
        )

    @model_validator(mode="after")
    def _phases_make_sense(self) -> TargetConfig:
        if not self.phases or len(set(self.phases)) != len(self.phases):
            raise ValueError(f"`phases` must name each phase at most once, got {list(self.phases)}")
        for phase in self.phases:
            if not 0 < self.phase_weight.get(phase, 0.0) <= 1e6:
                raise ValueError(
                    f"`phase_weight` needs a number above 0, at most 1e6, for phase `{phase}`"
                )
            if self.min_kv_len.get(phase, 0) < 1:
                raise ValueError(f"`min_kv_len` needs a positive number for phase `{phase}`")
        return self

    @model_validator(mode="after")
    def _targets_make_sense(self) -> TargetConfig:
        for phase, share in self.targets.items():
            if not 0 < share < 1:
                raise ValueError(
                    f"`0 < target_sparsity < 1` must hold, but got {share:g} for {phase}; give the share of "
                    "the tiles to skip, for example 0.5"
                )
        if isinstance(self.target_sparsity, dict) and set(self.targets) != set(self.phases):
            raise ValueError(
                "`target_sparsity` must give a number for each of `phases`, "
                f"{' and '.join(self.phases)}, and for no other, but gives "
                f"{' and '.join(self.targets) or 'none'}; correct one of the two, or give one number for all"
            )
        return self


class FitConfig(_Section):
    """Curves `scale_factor = a * exp(b * sparsity)`, fitted in log space."""

    min_r2: float = Field(default=0.8, ge=0, le=1)
    """A model-wide curve below this R² is refused."""
    sparsity_range: tuple[float, float] = (0.05, 0.95)
    """Points outside this part of the reachable sparsity are saturated, and dropped."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> FitConfig:
        low, high = self.sparsity_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"`0 <= low < high <= 1` must hold, but got [{low}, {high}]")
        return self


class SensitivityConfig(_Section):
    """Loss as a function of each layer's scale factor, one layer at a time."""

    prompts: int = Field(default=2, ge=1)
    """How many of the search prompts are used."""
    target_sparsity: tuple[float, ...] = (0.3, 0.5, 0.7)
    """The last third of the layers is measured at the scale factors that reach these sparsities in them, the
    others, which take more of a pass, at the middle one."""

    @model_validator(mode="after")
    def _levels_make_sense(self) -> SensitivityConfig:
        if not self.target_sparsity or not all(0 < level < 1 for level in self.target_sparsity):
            raise ValueError(f"levels must lie in (0, 1), but got {list(self.target_sparsity)}")
        return self


class SearchConfig(_Section):
    """Optuna, two objectives: the largest loss as a share of its budget, and predicted attention time."""

    trials: int = Field(default=32, ge=1)
    """The most trials; `min_gain` may end the search before."""
    min_gain: float = Field(default=0.002, ge=0, lt=1)
    """What the last six trials of the sampler must together have gained in predicted attention time
    [of the dense time], or the search stops; 0: it never does."""
    sampler: Literal["tpe", "gp", "nsga2", "qmc", "random"] = "tpe"
    storage: Annotated[str, AfterValidator(_with_home)] | None = None
    """Any Optuna storage URL; unset: `study.db` (SQLite) in the run folder."""
    study_name: str = "calibrate"
    groups: int = Field(default=3, ge=1, le=6)
    """Layers are split by sensitivity into this many groups, each with its own offset."""
    prune_factor: float = Field(default=4.0, gt=1)
    """A trial stops as soon as its loss so far alone proves a mean above this many budgets."""


class ValidationConfig(_Section):
    """The proof on held-out prompts."""

    attempts: int = Field(default=12, ge=1)
    """Settings tried at most, the safest first, until one fails; more come nearer to the budget."""
    generate: int | None = Field(default=None, ge=LEAST_GENERATED)
    """Tokens generated greedily, with a KV cache, after each held-out prompt that has a reference answer; a
    token that ends the text ends it earlier. Null: `LEAST_GENERATED` if `budget.generated_drop` is set, else
    nothing is generated."""
    short_prompt: int | None = Field(default=256, ge=16)
    """Length of an extra prompt that must come out dense because it is below `min_kv_len` [tokens]."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired_keys(cls, data: Any) -> Any:
        # Earlier versions resampled; their run folders must still open.
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key != "bootstrap"}
        return data


class CostConfig(_Section):
    """Where predicted times come from."""

    curves: _Path | None = None
    """A JSON Lines file of kernels/bench/run.py; unset: the measurements that come with this package."""
    device: str = "NVIDIA H100 80GB HBM3"
    """Which device's rows of that file."""


class RunConfig(_Section):
    """A whole run: the YAML file that `calibrate run` reads."""

    model: ModelConfig
    geometry: GeometryConfig = GeometryConfig()
    prompts: PromptsConfig = PromptsConfig()
    budget: BudgetConfig = BudgetConfig()
    target: TargetConfig = TargetConfig()
    fit: FitConfig = FitConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    search: SearchConfig = SearchConfig()
    validation: ValidationConfig = ValidationConfig()
    cost: CostConfig = CostConfig()
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: _Path | None = None
    """Run folder, from where the command is started; unset: `runs/` and the config file's name."""

    @property
    def generated_tokens(self) -> int | None:
        """Tokens generated after each held-out prompt with an answer; None: nothing is generated."""
        least = None if self.budget.generated_drop is None else LEAST_GENERATED
        return self.validation.generate or least

    @model_validator(mode="after")
    def _sensitivity_prompts_exist(self) -> RunConfig:
        if self.sensitivity.prompts > self.prompts.search:
            raise ValueError(
                f"`sensitivity.prompts <= prompts.search` must hold, but got "
                f"{self.sensitivity.prompts} > {self.prompts.search}"
            )
        return self

    @model_validator(mode="after")
    def _the_engine_knows_dense_rows(self) -> RunConfig:
        dense_last = self.geometry.prefill.dense_last
        if dense_last and self.target.engine != "native":
            raise ValueError(
                f"`geometry.prefill.dense_last` must be 0 for `target.engine: {self.target.engine}`, which "
                f"skips in the last rows too, but got {dense_last}; set it to 0, or use the native engine"
            )
        return self

    @model_validator(mode="after")
    def _the_engine_serves_chunks(self) -> RunConfig:
        chunk, engine = self.geometry.prefill.chunk, self.target.engine
        if chunk is not None and engine in WHOLE_PROMPTS:
            raise ValueError(
                f"`geometry.prefill.chunk` must be left out for `target.engine: {engine}`, which skips only "
                f"where a whole prompt is one call, but got {chunk}; leave it out"
            )
        refused = self.target.first_chunks(chunk, engine)
        if refused is not None:
            raise ValueError(refused)
        return self

    @model_validator(mode="after")
    def _some_prompt_is_long_enough(self) -> RunConfig:
        longest = max(self.prompts.lengths) + self.prompts.decode_tokens
        for phase in self.target.phases:
            if self.target.min_kv_len[phase] > longest:
                raise ValueError(
                    f"`target.min_kv_len.{phase}` must be within reach of the longest prompt with its "
                    f"continuation, {longest} tokens, but is {self.target.min_kv_len[phase]}: every prompt "
                    "would run dense; lower it, or lengthen `prompts.lengths`"
                )
        return self


def load_config(
    config: str | os.PathLike[str] | Mapping[str, Any],
    overrides: tuple[str, ...] = (),
    model: ModelConfig | None = None,
) -> RunConfig:
    """Reads a run config and applies `--set` overrides.

    Args:
        config: the YAML file, or its content as a dict.
        overrides: strings `section.key=value`; the value is read as YAML.
        model: stands in for the `model` section; None: the config's own.

    Returns:
        The validated config. File paths in it are made absolute: relative to the config file, or of a dict
        to the working directory.

    Raises:
        FileError: the file or an override breaks the schema.
        UserError: an override is not of the form `section.key=value`.
    """
    text: str | None = None
    if isinstance(config, Mapping):
        data, source, folder = deepcopy(dict(config)), "the config", Path.cwd()
    else:
        data, text = read_mapping(config)
        source, folder = str(config), user_path(config).resolve().parent
    if model is not None:
        given = data.get("model")
        if isinstance(given, dict):
            require_in_memory(given.get("engine"))
        data["model"] = model
    for override in overrides:
        _apply_override(data, override)
    if overrides:
        source = f"{source} with --set"
    return _with_absolute_paths(parse(RunConfig, data, source=source, text=text), folder)


def require_in_memory(engine: Any) -> None:
    """Refuses an engine that cannot run a model that a program holds.

    Args:
        engine: what the config's `model.engine` is; None: it says nothing.

    Raises:
        UserError: it is one that loads the model itself.
    """
    if engine not in (None, ModelConfig.model_fields["engine"].default):
        raise UserError(
            f"model.engine: `{engine}` must load the model itself, from a folder or a hub id, but got one in "
            "memory; save it (`model.save_pretrained`) and give `model.path`, or leave `model.engine` out"
        )


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(
            f"`--set` takes `section.key=value`, but got `{override}`; "
            "write for example `--set search.trials=64`"
        )
    parsed = read_value(value, f"`--set {override}`")
    section: Any = data
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UserError(f"`--set {override}`: `{part}` is a value, not a section")
    section[parts[-1]] = parsed


def _absolute(place: str, folder: Path) -> str:
    """A place of a model: a path from the config file, else from here, else a hub id."""
    if "://" in place:
        return place
    found = (path for path in (folder / place, Path.cwd() / place) if path.exists())
    return str(next(found, place))


def _with_absolute_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Paths in a config are relative to the config file, so that a run does not depend on where it starts."""
    changes: dict[str, Any] = {}
    places = {key: getattr(config.model, key) for key in ("path", "tokenizer")}
    changes["model"] = config.model.model_copy(
        update={key: _absolute(place, folder) for key, place in places.items() if place is not None}
    )
    sources = tuple(
        source.model_copy(update={"path": str(folder / source.path)})
        if source.path and source.task != "memory" and "://" not in source.path
        else source
        for source in config.prompts.sources
    )
    changes["prompts"] = config.prompts.model_copy(update={"sources": sources})
    if config.cost.curves is not None:
        changes["cost"] = config.cost.model_copy(
            update={"curves": str(folder / config.cost.curves)}
        )
    return config.model_copy(update=changes)
