"""Where a model is: a hub id, a folder, a GGUF file, or a file inside an installed package."""

from __future__ import annotations

from pathlib import Path

from calibrate.errors import UserError
from calibrate.prompts.packages import SCHEME, inside_package

_GGUF_MAGIC = b"GGUF"


def locate(path: str, key: str = "model.path") -> str | Path:
    """Turns `model.path` into an existing file or folder, or a hub id.

    Args:
        path: hub id, folder, `.gguf` file or `package://NAME/FILE`.
        key: of the config, for messages.

    Returns:
        A `Path` that exists, or the hub id as given.

    Raises:
        UserError: the package or file is missing, or a `.gguf` file is truncated or not GGUF at all.
    """
    if path.startswith(SCHEME):
        found = inside_package(path, key)
    elif Path(path).exists():
        found = Path(path)
    elif path.endswith(".gguf") or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{key}: `{path}` does not exist; check the path")
    else:
        return path
    if found.is_file():
        _check_gguf(found)
    return found


def _check_gguf(path: Path) -> None:
    """Reports a damaged file here: the reader would fail deep inside with an unrelated message."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(
            f"model.path: `{path}` cannot be read ({error}); make it readable"
        ) from None
    if magic != _GGUF_MAGIC:
        raise UserError(
            f"model.path: `{path}` is a file, so it must be a GGUF file, but it starts with {magic!r}; "
            "give the folder of a transformers model or a real .gguf file"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
        parts = reader.fields.get("split.count")
        number = reader.fields.get("split.no")
    except (ValueError, IndexError, KeyError, OSError, TypeError) as error:
        raise UserError(
            f"model.path: `{path}` is truncated or damaged: its GGUF header cannot be read ({error}); "
            "download it again"
        ) from None
    if end == 0 or end > path.stat().st_size:
        raise UserError(
            f"model.path: `{path}` is truncated: its tensors need {end} bytes, but the file has "
            f"{path.stat().st_size}; download it again"
        )
    if parts is not None and number is not None and int(parts.contents()) > 1:
        raise UserError(
            f"model.path: `{path}` must be the whole model, but it is part {int(number.contents()) + 1} of "
            f"{parts.contents()}; merge the parts with `llama-gguf-split --merge`"
        )
