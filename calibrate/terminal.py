"""The terminal: data on stdout, everything else on stderr, progress bars, tables and exit codes."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from calibrate.errors import FileError, UserError, WorkFailed

_stderr = Console(stderr=True)
_RUNS_MODELS = ("transformers", "gguf", "accelerate")


class Bars:
    """A run's `Progress`: bars on a terminal; plain lines, one per stage, elsewhere."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn(
                "{task.fields[note]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=_stderr,
            disable=not _stderr.is_terminal,
            expand=True,
            speed_estimate_period=3600,  # a step can take minutes, and its time left is wanted too
        )
        self._task: Any = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bars.stop()
        if kind is KeyboardInterrupt:
            say("interrupted: run the same command again to resume")

    def stage(self, name: str, total: int, done: int) -> None:
        """Starts a bar."""
        self._task = self._bars.add_task(name, total=total, completed=done, note="")
        if not _stderr.is_terminal:
            say(f"{name}: {done} of {total} done")

    def step(self, note: str) -> None:
        """Moves the bar."""
        self._bars.update(self._task, advance=1, note=note)

    def note(self, text: str) -> None:
        """Prints a line; bars go on below it."""
        say(f"note: {text}")


@dataclass(frozen=True)
class Table:
    """A table as text, for the terminal and for the report.

    Attributes:
        title: what it shows.
        columns: headings.
        rows: one cell per column.
        notes: sentences below it.
        words: columns of words, left-aligned like the first; all others are numbers, right-aligned.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def show(*parts: Table | str) -> None:
    """Prints tables and lines on stdout."""
    # A terminal or a file in Latin-1 has no ×: a question mark in its place is still a table.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # A pipe or a file has no width: rich would cut tables at 80 columns there.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with _writable():
        for part in parts:
            console.print(Text(part) if isinstance(part, str) else _drawn(part))


def _drawn(table: Table) -> RichTable:
    # As text, not as markup: a name may contain [brackets] or :colons:.
    drawn = RichTable(title_justify="left", caption_justify="left")
    drawn.title = Text(table.title, "table.title")
    for column in table.columns:
        left = column in (table.columns[0], *table.words)
        drawn.add_column(Text(column), justify="left" if left else "right")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    if table.notes:
        drawn.caption = Text("\n".join(table.notes), "table.caption")
    return drawn


def write(text: str) -> None:
    """Writes data to stdout as it is.

    Raises:
        UserError: stdout has no such character, or cannot be written.
    """
    with _writable():
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError as error:
            raise UserError(
                f"stdout must take {text[error.start]!a}, but its encoding is {error.encoding}; write to a "
                "file with --output, or set PYTHONIOENCODING=utf-8"
            ) from None


def write_path(path: Path) -> None:
    """Writes a path to stdout in the bytes of its name, whatever the terminal's encoding."""
    with _writable():
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")
        sys.stdout.buffer.flush()


def argument(path: str | os.PathLike[str]) -> str:
    """A path as it stands in a command line, for messages that name a command."""
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def write_json(data: Any) -> None:
    """Writes one JSON document to stdout."""
    write(json.dumps(data, indent=2) + "\n")


def say(message: str) -> None:
    """Writes a message to stderr."""
    # A path in the message must not be taken for markup or wrapped.
    _stderr.print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns a failure into one message and an exit code: 1 the work failed, 2 the input is wrong."""
    try:
        yield
    except (UserError, FileError) as error:
        _fail(str(error), 2)
    except WorkFailed as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _RUNS_MODELS:
            raise
        _fail(
            f"`{package}` must be installed to run models; install it with the extra [hf]: "
            "pip install 'skip-softmax-calibrate[hf]'",
            2,
        )


def _fail(message: str, code: int) -> None:
    # Plain text: a path in the message must not be taken for markup or wrapped.
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(code)


@contextmanager
def _writable() -> Iterator[None]:
    """Turns an stdout that accepts no more data into one message."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # the reader has what it wanted; typer ends quietly
    except OSError as error:
        # What is still in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(
            f"stdout cannot be written ({error}); free space, or redirect it elsewhere"
        ) from None
