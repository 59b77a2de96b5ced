"""JSON files of a run folder, which a crash or an editor may have damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from calibrate.errors import UserError


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file of the run folder, which must hold an object (or a list: `kind`)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"`{path}` is missing; run again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"`{path}` cannot be read ({error}); delete it and run again") from None
    if not isinstance(found, kind):
        raise UserError(
            f"`{path}` must hold a JSON {kind.__name__}, but holds {type(found).__name__}; delete it and "
            "run again"
        )
    return found


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Names the file whose content is not what a run writes."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"`{path}` does not hold what a run writes there ({type(error).__name__}: {error}); delete it "
            "and run again"
        ) from None


def save_atomically(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file so that a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        save_file(tensors, temporary, metadata)
        # `save_file` makes the file private; a result should be as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
