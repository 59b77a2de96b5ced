"""What was measured once: a JSON Lines file of the run folder, to which every measurement adds a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from calibrate.errors import UserError
from calibrate.prompts.build import Prompt
from calibrate.record.files import read_json
from calibrate.record.provenance import digest


class Measured:
    """What settings did to prompts, kept across processes; the folder's lock allows one writer.

    A line is `{"setting": digest, "prompt": key, "measured": row}`. A process that dies while it writes
    leaves a last line without an end, which is not counted and is overwritten.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Args:
            path: the `.jsonl` file, which may be missing. Older runs kept one `.json` object: where it lies
                beside, its rows count too.
        """
        self.path = path
        self._end = 0  # of the last whole line [bytes]

    def once(
        self, setting: Any, prompt: Prompt, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What a setting did to a prompt: taken from the file, or else measured and kept there.

        Args:
            setting: plain data that decides the measurement.
            prompt: the prompt.
            measure: measures it; the result must be plain data.

        Returns:
            The measurement.

        Raises:
            UserError: the file is damaged.
        """
        key = digest(setting), prompt.key
        if key not in self._rows:
            self._append(key, measure())
        return self._rows[key]

    def of(self, setting: Any) -> list[dict[str, Any]]:
        """All that was measured of a setting, in the order in which it was."""
        wanted = digest(setting)
        return [row for (found, _), row in self._rows.items() if found == wanted]

    @cached_property
    def _rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        before = self.path.with_suffix(".json")
        if before.exists():
            for joined, row in read_json(before).items():
                setting, _, prompt = joined.partition(":")
                rows[setting, prompt] = row
        for number, line in enumerate(self._lines(), 1):
            self._end += len(line) + 1
            try:
                found = json.loads(line)
                rows[found["setting"], found["prompt"]] = found["measured"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"`{self.path}`, line {number}: not what a run writes there ({type(error).__name__}: "
                    f"{error}); delete the line and run again"
                ) from None
        return rows

    def _lines(self) -> list[bytes]:
        """Whole lines."""
        try:
            return self.path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"`{self.path}` cannot be read ({error}); make it readable") from None

    def _append(self, key: tuple[str, str], row: dict[str, Any]) -> None:
        setting, prompt = key
        line = json.dumps({"setting": setting, "prompt": prompt, "measured": row}) + "\n"
        with self.path.open("ab") as file:
            file.truncate(self._end)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()
        self._rows[key] = row
