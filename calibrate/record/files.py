"""JSON files of a run folder, which a crash or an editor may have damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.errors import UserError
from calibrate.prompts.causes import unreadable
from skip_softmax.thresholds.yaml_file import user_path, write_text_atomically

if TYPE_CHECKING:
    import torch


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file of the run folder, which must hold an object (or a list: `kind`)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"`{path}` is missing; run again") from None
    except (OSError, ValueError) as error:
        helps = unreadable(error, "delete it and run again")
        raise UserError(f"`{path}` cannot be read ({error}); {helps}") from None
    if not isinstance(found, kind):
        raise UserError(
            f"`{path}` must hold a JSON {kind.__name__}, but holds {type(found).__name__}; delete it and "
            "run again"
        )
    return found


def write_json(path: Path, data: Any, indent: int | None = None) -> None:
    """Writes a JSON file of the run folder so that a reader sees the old one or the new one."""
    write_text_atomically(path, json.dumps(data, indent=indent))


def write_output(path: Path, text: str) -> Path:
    """Writes a file whose place the user chose, so that a reader sees the old one or the new one.

    Returns:
        The path.

    Raises:
        UserError: it cannot be written there.
    """
    path = user_path(path)
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise UserError(
            f"--output: `{path}` cannot be written ({error}); choose another file"
        ) from None
    return path


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
    from safetensors.torch import save_file

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
