"""Rows of files, of the hub and of memory: text and reference answer, with their place for messages."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from numbers import Real
from pathlib import Path
from typing import Any

from calibrate.errors import UserError
from calibrate.prompts.causes import cure, unreadable
from calibrate.prompts.packages import SCHEME, inside_package
from calibrate.schema import Source

# What readers of `datasets` raise for a broken file, a missing set, or no network.
_READ_ERRORS = (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError)


def texts(source: Source, where: str, row: dict[str, Any]) -> tuple[str, str | None]:
    """The row's prompt and, if the source has answers, its answer."""
    # pandas takes a first column without a name for an index, and the names would stand one off.
    if "__index_level_0__" in row:
        raise UserError(f"{where}: the row has more cells than the header; name every column")
    prompt = _cell(source, where, row, source.prompt_field)
    if not isinstance(prompt, str) or not prompt.strip():
        raise _bad_cell(where, source.prompt_field, "text", prompt)
    _check_characters(where, source.prompt_field, prompt)
    if source.answer_field is None:
        return prompt, None
    answer = _cell(source, where, row, source.answer_field)
    # NaN is how a table says that there is nothing.
    if isinstance(answer, Real) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise _bad_cell(where, source.answer_field, "text or a number", answer)
    _check_characters(where, source.answer_field, answer)
    return prompt, answer


def _check_characters(where: str, field: str, text: str) -> None:
    """JSON's escapes can spell half of a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start : error.start + 1]
        raise UserError(
            f"{where}: `{field}` must be whole Unicode characters, but got {half!r} alone at character "
            f"{error.start + 1}; write both halves, or remove it"
        ) from None


def _cell(source: Source, where: str, row: dict[str, Any], field: str) -> Any:
    if field in row:
        return row[field]
    near = difflib.get_close_matches(field, row, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    in_memory = source.task == "memory"
    cure = "rename it" if in_memory else "set `prompt_field` and `answer_field`"
    raise UserError(
        f"{where}: there is no column `{field}`, only {', '.join(f'`{name}`' for name in row)}; "
        f"{hint}{cure}"
    )


def _bad_cell(where: str, field: str, law: str, value: object) -> UserError:
    got = "nothing" if value is None or value == "" else repr(value)[:60]
    return UserError(
        f"{where}: `{field}` must be {law}, but got {got}; fill it in or remove the row"
    )


def name_of(source: Source) -> str:
    """How messages call a source."""
    if source.task == "memory":
        return "prompts"
    return f"dataset `{source.dataset}`" if source.task == "hub" else str(source.path)


def from_memory(prompts: Any) -> tuple[Source, list[dict[str, Any]]]:
    """Prompts in memory, as a source and its rows.

    Args:
        prompts: texts, or dicts with `prompt` and, if there are answers, `answer` or `continuation`; a list,
            a tuple or a `datasets.Dataset`.

    Returns:
        The source, whose `path` has the hash of the texts, so that a run resumes only with the same prompts;
        and its rows.

    Raises:
        UserError: they are something else.
    """
    law = "`prompts` must be a list of texts, a list of dicts with `prompt`, or a datasets.Dataset"
    # A DatasetDict is a mapping too.
    listed = isinstance(prompts, Iterable) and isinstance(prompts, Sized)
    if isinstance(prompts, (str, bytes, Mapping)) or not listed:
        cure = "choose one split" if isinstance(prompts, Mapping) else "pass a list"
        raise UserError(f"{law}, but got {type(prompts).__name__}; {cure}")
    rows = []
    for index, row in enumerate(prompts):
        if not isinstance(row, (str, Mapping)):
            raise UserError(f"{law}, but prompts[{index}] is {type(row).__name__}: {str(row)[:60]}")
        rows.append({"prompt": row} if isinstance(row, str) else dict(row))
    answers = [name for name in ("answer", "continuation") if any(name in row for row in rows)]
    answer = answers[0] if answers else None
    texts = [[row.get("prompt"), row.get(answer) if answer else None] for row in rows]
    digest = hashlib.sha256(json.dumps(texts, default=str).encode()).hexdigest()
    return Source(task="memory", path=f"sha256:{digest}", answer_field=answer), rows


def rows(
    source: Source, memory: Sequence[dict[str, Any]] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a `file`, `hub` or `memory` source, each with its place for messages."""
    if source.task == "memory":
        if memory is None:
            raise UserError(
                "`task: memory` needs prompts that are in memory; pass them: "
                "calibrate.run(config, output=..., prompts=[...])"
            )
        return ((f"prompts[{index}]", row) for index, row in enumerate(memory))
    if source.task == "hub":
        return _loaded(source, source.dataset, name=source.subset, split=source.split)
    path = _found(str(source.path))
    kind = Path(path).suffix.lower()
    if kind in (".jsonl", ".json"):
        return _json_rows(path)
    if kind == ".csv":
        # Cells are kept as they stand in the file: pandas would read 007 as 7, and NA as nothing.
        as_text = {field: str for field in (source.prompt_field, source.answer_field) if field}
        options = {"keep_default_na": False, "converters": as_text}
        return _loaded(source, "csv", data_files=path, split="train", **options)
    if kind == ".parquet":
        return _loaded(source, "parquet", data_files=path, split="train")
    raise UserError(
        f"{path}: the name must end in .jsonl, .json, .csv or .parquet, but it ends in `{kind}`; "
        "convert the file, or use `task: text` for plain text"
    )


def _loaded(source: Source, *args: Any, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams rows through `datasets`, so that a large set is neither downloaded nor held whole."""
    name, number = name_of(source), 0
    try:
        import datasets

        # It logs what it also raises, with a traceback.
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        for number, row in enumerate(datasets.load_dataset(*args, streaming=True, **options), 1):
            yield f"{name}: row {number}", row
    except _READ_ERRORS as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        helps = (
            cure(error, None, "check `dataset`, `subset` and `split`")
            if source.task == "hub"
            else cure(error, str(source.path), "fix the file")
        )
        raise UserError(f"{name}: cannot be read after row {number}: {cause}; {helps}") from error


def _json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON array or of JSON lines.

    Not read through `datasets`: that turns a text like 2020-01-01 into a date, refuses files whose
    other columns change their type, and does not tell the line.
    """
    if path.lower().endswith(".json"):
        text = read_text(path)
        if text.lstrip()[0] == "[":
            for number, row in enumerate(_parsed(path, 1, text), start=1):
                yield f"{path}: row {number}", _object(f"{path}: row {number}", row)
            return
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); make it readable") from None
    with file:
        for number, line in enumerate(file, start=1):
            if line := line.strip():
                yield f"{path}:{number}", _object(f"{path}:{number}", _parsed(path, number, line))


def _parsed(path: str, line: int, text: str | bytes) -> Any:
    # These two errors do not say where in a whole file they are.
    where = path if isinstance(text, str) else f"{path}:{line}"
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise UserError(
            f"{path}:{line}: not valid JSON: {error.msg} (column {error.colno}); "
            "a file must hold one object per line, or one array of objects (.json)"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{line}: not UTF-8: {error.reason}; save the file as UTF-8"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: arrays or objects are nested too deep; flatten them") from None
    except ValueError:
        # Python's own limit; its message speaks to programmers.
        raise UserError(
            f"{where}: a number has more than {sys.get_int_max_str_digits()} digits; write it as text"
        ) from None


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a row must be a JSON object, but got {repr(row)[:60]}; "
            'write it as {"prompt": ...}'
        )
    return row


def read_text(path: str) -> str:
    """A UTF-8 text file, or a package's, that is not empty; UserError otherwise."""
    path = _found(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        helps = unreadable(error, "save the file as UTF-8")
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); {helps}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty; give a text")
    return text


def _found(path: str) -> str:
    """The file's own path, also of `package://NAME/FILE`; UserError: there is none."""
    if path.startswith(SCHEME):
        path = str(inside_package(path, "prompts.sources"))
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; set `path` to a file (relative to the config file)")
    return path
