"""tokenspeed: one threshold at one KV length for both phases, on AMD gfx950."""

from __future__ import annotations

import re

from calibrate.engines.types import (
    Engine,
    Foreign,
    Request,
    Server,
    Source,
    Votes,
    Written,
    absolute_header,
    from_threshold,
    number,
    one_length,
    stated_length,
)
from calibrate.errors import UserError
from skip_softmax.thresholds.types import PHASES

_OPTION = "--skip-softmax-threshold"


def write(request: Request) -> Written:
    """An option to serve with; the smaller number, which is safe for both phases."""
    assert request.at_length is not None
    threshold = min(request.scale_factor.values()) / request.at_length
    lost = [one_length(request.at_length)]
    if len(set(request.scale_factor.values())) > 1:
        lost.append(
            "one threshold serves both phases: the smaller number is written, the other phase skips less"
        )
    return Written(absolute_header(request.at_length) + f"{_OPTION} {threshold!r}\n", tuple(lost))


def read(source: Source) -> Foreign:
    """The threshold at the length that the file or the user states."""
    match = re.search(rf"{_OPTION}[= ](\S+)", source.text)
    if match is None:
        raise UserError(f"{source.path}: {_OPTION} must be given, but it is not there")
    threshold = number(f"{source.path}: {_OPTION}", match[1])
    return from_threshold(threshold, stated_length(source), PHASES)


ENGINE = Engine(
    "tokenspeed",
    "tokenspeed",
    "scalar",
    (Server("tokenspeed", "gfx950", Votes(), Votes()),),
    write,
    read,
    numbers=dict.fromkeys(PHASES, _OPTION),
    options=("at_length",),
    absolute=True,
    joint=True,
)
