"""A report as a reader sees it: its JSON block, its tables and its text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna

PHASES = ("prefill", "decode")


def chosen_of(validation: dict[str, Any]) -> dict[str, Any]:
    """The attempt that `validation.json` calls chosen."""
    return dict(validation["attempts"][validation["chosen"]])


def disown(folder: Path) -> None:
    """Makes a run's study nobody's, so that a test may edit the run's config."""
    storage = f"sqlite:///{folder / 'study.db'}"
    optuna.load_study(study_name="calibrate", storage=storage).set_user_attr("belongs_to", {})


class Page(HTMLParser):
    """The report's JSON block, its tables as text, and all other text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._block = ""
        self._inside: str | None = None
        self._cell: list[str] | None = None
        self.feed(html)

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self._block))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = None
        elif tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._inside == "findings":
            self._block += data
        elif self._inside is None:
            self.text += data
            if self._cell is not None:
                self._cell.append(data)

    def table(self, first: str) -> list[list[str]]:
        """The table whose first heading is `first`, without its headings."""
        return next(rows[1:] for rows in self.tables if rows[0][0] == first)


def close(actual: Any, expected: Any) -> None:
    """Equal up to the six digits that the report keeps."""
    assert np.asarray(actual).shape == np.asarray(expected).shape
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-12)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def loss_text(value: float) -> str:
    return f"{value:#.3g}"
