"""The benchmark that comes with the package: where it lies, and how its program is run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from calibrate.errors import UserError

# Inside the package in a wheel, in the source tree otherwise.
_FOLDERS = (
    Path(__file__).parent / "bench_files",
    Path(__file__).parent.parent / "kernels" / "bench",
)


def folder() -> Path:
    """The benchmark's folder: its programs, and the committed `results`.

    Raises:
        UserError: this installation has none.
    """
    for place in _FOLDERS:
        if place.is_dir():
            return place
    raise UserError(
        f"the benchmark must lie in {' or '.join(f'`{place}`' for place in _FOLDERS)}, but neither "
        "exists; install the package again"
    )


def run(arguments: Sequence[str]) -> int:
    """Runs the benchmark's program, `run.py`.

    Args:
        arguments: its command line, without the program's name.

    Returns:
        Its exit code: 0 done, 1 the gate or the work failed, 2 the input is wrong.
    """
    place = folder()
    spec = importlib.util.spec_from_file_location("skip_softmax_bench", place / "run.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    # The program imports the files beside it, as when it is run by its path.
    sys.path.insert(0, str(place))
    try:
        spec.loader.exec_module(program)
        return int(program.main(list(arguments), prog="calibrate bench"))
    finally:
        sys.path.remove(str(place))
