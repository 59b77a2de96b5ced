"""Unpacks vLLM's Python files, without its binaries: `python unpack.py WHEEL FOLDER`.

Those of 0.22.1 want another torch than 0.32.0 does. Its Python files run beside it, and are what a GPU runs.
"""

from __future__ import annotations

import sys
import zipfile


def main(wheel: str, folder: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name for name in archive.namelist() if name.endswith(".py") or ".dist-info/" in name
        ]
        archive.extractall(folder, names)


if __name__ == "__main__":
    main(*sys.argv[1:])
