"""YAML file -> pydantic model, with errors that name the file, the line, the key and the nearest known key.

The thresholds file and the run config are both read here.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class FileError(ValueError):
    """What a user wrote, in a file or as arguments, breaks a law; the message says which and the cure."""


# What YAML 1.1 reads as something else than it looks like: a switch, an octal number, a time, a day.
_DIGITS = "write the digits alone, without leading zeros, or quote it if it is text"
_TRAPS = {
    "bool": (
        re.compile("(?!true|false)", re.IGNORECASE),
        "write true or false, or quote it if it is text",
    ),
    "int": (re.compile(r"[-+]?(0[0-9_]|.*[_:])"), _DIGITS),
    "float": (re.compile(".*[_:]"), _DIGITS),
    "timestamp": (re.compile(""), "quote it if it is text"),
}


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses YAML's traps, and a repeated key: YAML would silently keep the last one."""

    traps: ClassVar = _TRAPS

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        # YAML's patterns and tags accept what Python cannot build: 2024-13-45, 0b_, `!!bool x`.
        try:
            built = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError):
            value = repr(node.value[:60]) if isinstance(node.value, str) else "this"
            problem = f"{value} is not a valid {kind}; correct it, or quote it if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        if isinstance(node, yaml.ScalarNode) and kind in self.traps:
            trap, cure = self.traps[kind]
            if trap.match(node.value):
                problem = f"YAML does not read {node.value} as it looks; {cure}"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return built

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        # Here, before `<<` is replaced by the keys that it stands for.
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # YAML allows a list as a key; the base class refuses it and names the line
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if merge else self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return node


class _ForeignLoader(_UniqueKeyLoader):
    """For files of other programs, whose own reader takes `yes` and `1_000` as YAML 1.1 does."""

    traps: ClassVar = {
        "int": (re.compile(r"[-+]?(0[0-9_]|.*:)"), _DIGITS),
        "float": (re.compile(".*:"), _DIGITS),
    }


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave; `~` is the user's own folder, as in a shell."""
    return Path(os.path.expanduser(path))


def read_value(text: str, where: str) -> Any:
    """Reads a YAML value that is not in a file.

    Text without quotes is taken whole, also where YAML would see a comment in it.

    Args:
        text: the value.
        where: who gave it, for messages.

    Raises:
        FileError: it is not YAML.
    """
    value, given = _loaded(text, where), text.strip()
    if isinstance(value, str):
        return value if given[0] in "'\"|>!&" else given
    return given if value is None and given.startswith(("#", "&")) else value


def _loaded(text: str, where: str, *, lines: bool = False, foreign: bool = False) -> Any:
    try:
        if foreign:
            return yaml.load(text, Loader=_ForeignLoader)
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if lines and mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        cure = "" if lines or "quote" in problem else "; put quotes around text"
        raise FileError(f"{where}{line}: not valid YAML: {problem}{cure}") from None
    except RecursionError:
        raise FileError(f"{where}: lists or mappings are nested too deeply; flatten them") from None


def read_mapping(
    path: str | os.PathLike[str], *, foreign: bool = False
) -> tuple[dict[str, Any], str]:
    """Reads a YAML mapping.

    Args:
        path: the file.
        foreign: it is another program's, which may write `yes` and `1_000`.

    Returns:
        The mapping and the file's text (for line numbers in later messages).

    Raises:
        FileError: the file is missing, unreadable, not YAML, or not a mapping.
        TypeError: `path` is not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f'must be the path of a YAML file, but got {path!r}; pass "thresholds.yaml"'
        )
    try:
        text = user_path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; pass the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    data = _loaded(text, str(path), lines=True, foreign=foreign)
    if not isinstance(data, dict):
        raise FileError(f"{path}: the file must be a YAML mapping, but it contains {_kind(data)}")
    return data, text


def parse(model: type[Model], data: Any, *, source: str, text: str | None = None) -> Model:
    """Validates data against a model and turns every complaint into one readable line.

    Args:
        model: the pydantic class.
        data: what the YAML contained.
        source: name for messages, usually the file's path.
        text: the YAML text that `data` came from, for line numbers.

    Returns:
        The validated instance.

    Raises:
        FileError: `data` breaks the schema.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise FileError(explained(error, model, source, text)) from None


def explained(
    error: ValidationError, model: type[BaseModel], source: str, text: str | None = None
) -> str:
    """One readable line per mistake; `model`, `source` and `text` are those of `parse`."""
    lines = [_complaint(model, item, source, text) for item in _one_per_mistake(error.errors())]
    return "\n".join(dict.fromkeys(lines))


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new, never a part of it.

    Args:
        path: the target file; its folder must exist.
        text: the new content.

    Raises:
        OSError: the file cannot be written; the error names the target.
    """
    try:
        _replace(Path(path), text)
    except OSError as error:
        # The user knows the target, not the temporary file that becomes it.
        raise OSError(error.errno, error.strerror, str(path)) from None


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes a private file; a result should be as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _one_per_mistake(items: list[Any]) -> list[Any]:
    """Drops the complaints that pydantic adds to the one that matters.

    A union complains once per member: about the whole value, and about the wrong part of it. A
    misspelt required key is also reported as missing.
    """
    places = [tuple(_location(item)) for item in items]
    unknown = {
        place[:-1]: str(place[-1])
        for item, place in zip(items, places, strict=True)
        if item["type"] == "extra_forbidden"
    }
    kept: dict[tuple[Any, ...], Any] = {}
    for item, place in zip(items, places, strict=True):
        deeper = any(len(other) > len(place) and other[: len(place)] == place for other in places)
        misspelt = item["type"] == "missing" and difflib.get_close_matches(
            unknown.get(place[:-1], ""), [str(place[-1])], cutoff=0.5
        )
        if deeper or misspelt:
            continue
        # Of several members, the one that accepts the value's type knows what is wrong with it.
        if place not in kept or kept[place]["type"].endswith("_type"):
            kept[place] = item
    return list(kept.values())


def _complaint(model: type[BaseModel], item: Any, source: str, text: str | None) -> str:
    location = _location(item)
    key = ".".join(str(part) for part in location)
    line = _line_of(text, location) if text is not None else None
    where = f"{source}:{line}" if line is not None else source
    where = f"{where}: {key}" if key else where
    if item["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"known keys here: {', '.join(known)}" if known else "remove it"
        if near:
            hint = f"did you mean `{near[0]}`?"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: this key is required"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {message}"
    if item["type"] == "string_type" and isinstance(item["input"], (int, float)):
        return f"{where}: must be text, but got the number {item['input']!r}; put quotes around it"
    return f"{where}: {message[0].lower()}{message[1:]}, but got {item['input']!r}"


def _location(item: Any) -> list[Any]:
    location = list(item["loc"])
    # An unknown key is the user's own word, even if it looks like a tag.
    last = [location.pop()] if item["type"] == "extra_forbidden" else []
    return [part for part in location if not _is_tag(part)] + last


def _is_tag(part: Any) -> bool:
    # Members of a union put their own names in the location ("float", "function-after[...]").
    return isinstance(part, str) and (
        part in {"float", "int", "bool", "str", "none"}
        or "[" in part
        or part.startswith("constrained-")
        or part[:1].isupper()
    )


def _known_keys(model: type[BaseModel], location: list[Any]) -> list[str]:
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if _is_model(current) else None
        if field is None:
            return []
        current = _model_inside(field.annotation)
    return sorted(current.model_fields) if _is_model(current) else []


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _model_inside(annotation: Any) -> Any:
    if _is_model(annotation):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_inside(inner)
        if found is not None:
            return found
    return None


def _line_of(text: str, location: list[Any]) -> int | None:
    """Line (1-based) of the deepest node of `location` that the text contains."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            match = [(k, v) for k, v in node.value if k.value == str(part)]
            if not match:
                return line
            line, node = match[0][0].start_mark.line + 1, match[0][1]
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)
        ):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _kind(data: Any) -> str:
    return "nothing" if data is None else f"a {type(data).__name__}"
