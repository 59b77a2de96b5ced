"""What helps against an error of a library that reads models and data sets: its cause decides."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

_DENIED = (errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)
# By name: their packages are not loaded here.
_OFFLINE = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError")


def cure(error: BaseException, ours: str | Path | None, otherwise: str) -> str:
    """What the user can do.

    Args:
        error: what the library raised.
        ours: the user's own file or folder; None: it is on the hub.
        otherwise: what to do if the cause lies in the user's file or name.

    Returns:
        A clause for the end of a message.
    """
    for cause in _chain(error):
        place = getattr(cause, "filename", None)
        if isinstance(cause, OSError) and isinstance(place, (str, os.PathLike)):
            if cause.errno in _FULL:
                return f"free space for `{place}`"
            if ours is None or not _within(Path(place), Path(ours)):
                return f"`{place}` must be writable; make it so, or set HF_HOME to a folder that is"
            if cause.errno in _DENIED:
                return f"make `{place}` readable"
        if type(cause).__name__ in _OFFLINE:
            return f"{otherwise}; if that is right, check the network and HF_HUB_OFFLINE"
    return otherwise


def unreadable(error: Exception, otherwise: str) -> str:
    """What helps if a file cannot be opened or does not hold what it should."""
    return "make it readable" if isinstance(error, OSError) else otherwise


def _within(place: Path, ours: Path) -> bool:
    return place.absolute().is_relative_to(ours.absolute())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
