"""native: the kernels of this package. They read the thresholds file itself, so nothing is lost."""

from __future__ import annotations

from calibrate.engines.types import Engine, Request, Written


def write(request: Request) -> Written:
    """The file as it is."""
    return Written(request.thresholds.to_yaml())


ENGINE = Engine(
    "native", "the kernel of this package", "native", servers=(), write=write, kv_cache=False
)
