"""What an engine's room is made of: facts, what it is asked to write, what it has read; readers of text."""

from __future__ import annotations

import json
import re
import reprlib
import shlex
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from calibrate.errors import UserError
from calibrate.model.config_json import json_mapping
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase

Form = Literal["native", "scalar+ignore", "scalar"]
"""What an engine can express: every layer; one number per phase and dense layers; one number per phase."""


@dataclass(frozen=True)
class Votes:
    """Tiles of one kernel: which rows and keys decide together. A number is valid for one such geometry only.

    Attributes:
        tile_kv: (largest head_dim, keys per tile that occur [tokens]); empty: not published.
        tile_q: query rows that vote together [tokens]; None in decode.
        voters: in decode, `group`: the query heads of a KV head vote together; `head`: each alone.
        head_dims: the only head sizes of this kernel; empty: any.
        groups: fewest and most query heads per KV head of this kernel; None: any.
        speculation: why this kernel does not run beside speculative decoding; empty: it does.
    """

    tile_kv: tuple[tuple[int, tuple[int, ...]], ...] = ()
    tile_q: int | None = None
    voters: Literal["group", "head"] = "group"
    head_dims: tuple[int, ...] | range = ()
    groups: tuple[int, int] | None = None
    speculation: str = ""

    def keys(self, head_dim: int) -> tuple[int, ...]:
        """Keys per tile at this head size [tokens]; empty: not published."""
        return next((sizes for limit, sizes in self.tile_kv if head_dim <= limit), ())


@dataclass(frozen=True)
class Ignored:
    """No kernel of this phase skips by the number.

    Attributes:
        why: the reason.
        how: what the server does instead, before the words "the prefill number".
    """

    why: str
    how: str = "silently ignores"


@dataclass(frozen=True)
class Server:
    """One engine on one family of GPUs.

    Attributes:
        title: its name as people write it.
        gpu: GPU family; `any`: all.
        prefill: the kernel of prefill, with a 16-bit KV cache.
        decode: the kernel of decode, with a 16-bit KV cache.
        above_one: what it does at a threshold of 1 or more: skip almost everything, or run dense.
        fp8: the kernels of phases that an FP8 KV cache changes.
        by_name: it leaves layers dense by their modules' names, not by their numbers.
        whole_prompts: why numbers that were measured in chunks of prompts do not hold there; empty: each
            chunk skips by its own KV length.
        notes: what the numbers do not say on this server; in every sidecar of an export for it.
    """

    title: str
    gpu: str
    prefill: Votes | Ignored
    decode: Votes | Ignored
    above_one: Literal["skips", "dense"] = "skips"
    fp8: Mapping[Phase, Votes | Ignored] = field(default_factory=dict)
    by_name: bool = False
    whole_prompts: str = ""
    notes: tuple[str, ...] = ()

    def phase(self, phase: Phase) -> Votes | Ignored:
        """The kernel of a phase."""
        return self.prefill if phase == "prefill" else self.decode

    def run_with(self, *, fp8: bool = False, speculation: bool = False) -> Server:
        """The server with an FP8 KV cache, with speculative decoding, or both."""

        def kernel(phase: Phase) -> Votes | Ignored:
            found = self.fp8.get(phase, self.phase(phase)) if fp8 else self.phase(phase)
            if speculation and isinstance(found, Votes) and found.speculation:
                return Ignored(found.speculation, "refuses")
            return found

        return replace(self, prefill=kernel("prefill"), decode=kernel("decode"))

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.title} on {self.gpu}" if self.gpu != "any" else self.title


@dataclass(frozen=True)
class Request:
    """What an artefact has to say.

    Attributes:
        thresholds: the file that the numbers come from.
        scale_factor: per phase, above 0 [tokens].
        dense_layers: layers without skipping.
        at_length: KV length of an absolute threshold [tokens].
        gpus: GPU families on which the numbers are valid.
        pin: whether a phase without a curve may be written as `a = scale_factor, b = 0`.
        attention_class: name of the model's attention class, if known.
    """

    thresholds: Thresholds
    scale_factor: dict[Phase, float] = field(default_factory=dict)
    dense_layers: tuple[int, ...] = ()
    at_length: int | None = None
    gpus: tuple[str, ...] = ()
    pin: bool = False
    attention_class: str | None = None


@dataclass(frozen=True)
class Written:
    """An artefact's text, and what it could not say."""

    text: str
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """An engine's own file, and what the user adds to it.

    Attributes:
        path: the file.
        phases: phases to read.
        target: sparsity at which a curve is read; None: the file's own, else 0.5.
        coefficients: `config.json` (or its folder) with the curve of a file that names a target only.
        at_length: KV length of a threshold [tokens], where the file does not state it.
    """

    path: Path
    phases: tuple[Phase, ...] = PHASES
    target: float | None = None
    coefficients: Path | None = None
    at_length: int | None = None

    @cached_property
    def text(self) -> str:
        """The file's text.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"`{self.path}` cannot be read ({error}); give the engine's file"
            ) from None


@dataclass(frozen=True)
class Foreign:
    """Numbers as an engine's artefact states them.

    Attributes:
        scale_factor: per phase [tokens]; a phase that is missing or 0 is dense.
        ignore: name patterns of layers that stay dense.
        notes: how the numbers were read, and what was not taken over.
        curves: per phase `a`, `b` and the `target` at which the curve was read.
    """

    scale_factor: dict[Phase, float]
    ignore: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    curves: Mapping[Phase, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """An engine as an export target.

    Attributes:
        name: as in `--engine`.
        title: its name as people write it.
        form: what it can express.
        servers: kernels that read the artefact.
        write: makes the artefact.
        read: reads the artefact back; None: there is nothing foreign to read.
        numbers: per phase, the name under which the artefact gives its number.
        options: what the artefact may leave open, so that `calibrate import` takes it as an option.
        absolute: it takes the threshold itself, which is right at one KV length only; not where it has a
            curve.
        config_json: what it reads from the model's `config.json`: nothing; `layers`: the dense layers,
            which its own file cannot name; `curve`: the curve behind its own file's target; `all`:
            everything, so the artefact is a change of that file.
        unfit: keys of a `config.json` whose models it must not serve with our numbers, and why.
        backends: attention backends by the engine's own names, and why the numbers are wrong there; empty:
            they are right.
        kv_cache: whether requests leave a KV cache behind, whose type can change the tiles.
        prefix_cache: what becomes of keys and values that were cached when its number changes.
        experimental: that no release reads the artefact, and what to use instead; empty: one does.
    """

    name: str
    title: str
    form: Form
    servers: tuple[Server, ...]
    write: Callable[[Request], Written]
    read: Callable[[Source], Foreign] | None = None
    numbers: Mapping[Phase, str] = field(default_factory=dict)
    options: tuple[Literal["target", "coefficients", "at_length"], ...] = ()
    absolute: bool = False
    config_json: Literal["nothing", "layers", "curve", "all"] = "nothing"
    unfit: Mapping[str, str] = field(default_factory=dict)
    backends: Mapping[str, str] = field(default_factory=dict)
    kv_cache: bool = True
    prefix_cache: str = ""
    experimental: str = ""


# What artefacts have in common.

REUSED = (
    "keys and values of a layer come from layers below it that skipped, so a cached prefix keeps the number "
    "that it was computed with"
)
"""What a prefix cache means for every number that changes."""

STORED = "no store outside the process can be relied on to know the number: empty it"
"""What becomes of a prefix cache outside an engine's process whose key is not known to have the number."""

ONE_CALL = "its models attend to a whole sequence in one call"
"""Why diffusion models have no chunks."""

EACH_STEP = "every denoising step computes its own, and a new number is whole at once"
"""Why diffusion models have nothing to empty when a number changes."""


def to_json(data: Any) -> str:
    """JSON as the artefacts are written: two spaces, a newline at the end, no NaN."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def absolute_header(tokens: int) -> str:
    """Comment above a threshold that is right at one KV length; `stated_length` reads it back."""
    return (
        f"# reference KV length: {tokens} tokens. The threshold is right at this length: longer requests\n"
        "# skip more than was measured, shorter ones less.\n"
    )


def one_length(tokens: int) -> str:
    """What such a threshold cannot say."""
    return f"the 1/length law: the threshold is right at {tokens} tokens and too high for longer requests"


# Readers.


def stated_length(source: Source) -> int | None:
    """KV length of the file's threshold [tokens]: the file's own, else the user's.

    Raises:
        UserError: the two differ.
    """
    match = re.search(r"reference KV length: (\d{1,18}) tokens", source.text)
    if match is None:
        return source.at_length
    if source.at_length is not None and source.at_length != int(match[1]):
        raise UserError(
            f"--at-length must be the KV length that {source.path} states, {match[1]} tokens, but got "
            f"{source.at_length}; leave it out"
        )
    return int(match[1])


def from_threshold(threshold: float, at_length: int | None, phases: tuple[Phase, ...]) -> Foreign:
    """A plain threshold that was meant for one KV length.

    Raises:
        UserError: there is no length, or the threshold is not in [0, 1).
    """
    if at_length is None:
        raise UserError("a threshold means nothing without its KV length; give --at-length TOKENS")
    if not 1 <= at_length <= sys.float_info.max:
        raise UserError(
            f"--at-length must be a KV length of 1 or more tokens, but got {reprlib.repr(at_length)}; "
            "give the length that the threshold was meant for"
        )
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, (int, float))
        or not 0 <= threshold < 1
    ):
        raise UserError(
            f"`0 <= threshold < 1` must hold, but got threshold={reprlib.repr(threshold)}; "
            "1 or more has no meaning"
        )
    found = dict.fromkeys(phases, threshold * at_length)
    return Foreign(found, notes=(f"threshold {threshold:g} at {at_length} tokens",))


def check_number(where: str, value: Any) -> None:
    """Refuses what engines accept silently.

    Raises:
        UserError: not a finite number of 0 or more.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value <= sys.float_info.max  # an integer can be finite and above every float
    ):
        raise UserError(
            f"{where}: a scale factor must be a finite number of 0 or more, but got "
            f"{reprlib.repr(value)}; engines accept this without an error and then skip nothing or "
            "everything: correct it, or leave it unset"
        )


def known_only(where: str, names: Collection[Any], known: Collection[str]) -> None:
    """Refuses a misspelt name of a number: its phase would silently stay dense.

    Raises:
        UserError: a name is not known.
    """
    unknown = sorted(map(str, set(names) - set(known)))
    if unknown:
        raise UserError(
            f"{where} may contain {', '.join(sorted(known))}, but got {unknown}; correct the name"
        )


def code_of(text: str) -> str:
    """A shell script or an environment file without its comments; continued lines are one."""
    quoted_or_comment = re.compile(r"""("[^"\n]*"|'[^'\n]*')|(?<!\S)#[^\n]*""")
    return quoted_or_comment.sub(lambda found: found[1] or "", text).replace("\\\n", " ")


def option_values(source: Source, *names: str) -> list[tuple[str, str]]:
    """What follows an option in a shell line, as often as it is given.

    `--name VALUE`, `--name=VALUE`, `--name.key VALUE`, with `_` for `-` in the name.

    Args:
        source: the file.
        names: of the option.

    Returns:
        The dotted key, empty without one, and the value.

    Raises:
        UserError: the line is not closed, or nothing follows the option.
    """
    found = []
    try:
        words = iter(shlex.split(code_of(source.text)))
        for word in words:
            head, equals, value = word.partition("=")
            name, _, key = head.partition(".")
            if name.replace("_", "-") in names:
                found.append((key, value if equals else next(words)))
    except StopIteration:
        raise UserError(f"{source.path}: {names[0]} must be followed by JSON or a value") from None
    except ValueError as error:
        raise UserError(f"{source.path} must be a shell line, but it is not ({error})") from None
    return found


def option_json(source: Source, *names: str) -> dict[str, Any]:
    """What a command-line option gives: its JSON, alone in the file or in a shell line, and its dotted keys.

    Raises:
        UserError: it is not given, is not JSON, or gives a key twice.
    """
    code = code_of(source.text)
    if not any(name in code.replace("_", "-") for name in names):
        return json_mapping(code, f"{source.path}: what follows {names[0]}")
    data: dict[str, Any] = {}
    given = option_values(source, *names)
    for key, value in given:
        if not key:
            part = json_mapping(value, f"{source.path}: what follows {names[0]}")
        else:
            part = _spelled_json(value)
            for name in reversed(key.split(".")):
                part = {name: part}
        _merge(data, part, f"{source.path}: {names[0]}")
    if not given:
        raise UserError(f"{source.path}: {names[0]} must be followed by JSON or a value")
    return data


def _spelled_json(value: str) -> Any:
    """A value behind a dotted key: JSON, or else text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _merge(data: dict[str, Any], more: dict[str, Any], where: str) -> None:
    for key, value in more.items():
        if isinstance(data.get(key), dict) and isinstance(value, dict):
            _merge(data[key], value, f"{where}.{key}")
        elif key in data:
            raise UserError(f"{where}.{key} must be given once, but is given twice; remove one")
        else:
            data[key] = value


def spelled(value: Any) -> Any:
    """A number as engines' own schemas read it: text too, such as `1e2`, which YAML 1.1 takes for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # the caller names it


def dropped(names: Collection[str]) -> tuple[str, ...]:
    """The note for what a file says beyond our numbers."""
    return (f"not taken over: {', '.join(names)}",) if names else ()


def number(where: str, text: str) -> float:
    """A number written as text.

    Raises:
        UserError: it is not one.
    """
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where} must be a number, but got `{text}`") from None


def entry(data: Any, key: str) -> Any:
    """The value of a key; None where there is no mapping or no such key."""
    return data.get(key) if isinstance(data, dict) else None
