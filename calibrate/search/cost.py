"""Predicted attention time relative to dense, from measured kernel curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import isotonic_regression

from calibrate import bench
from calibrate.errors import UserError
from calibrate.schema import CostConfig, GeometryConfig
from skip_softmax.thresholds.types import PHASES, Phase

if TYPE_CHECKING:
    from calibrate.model.section import Setting
    from calibrate.statistics.counts import Statistics


@dataclass(frozen=True)
class Curve:
    """Time of the armed kernel relative to the dense one, at measured sparsities.

    Attributes:
        sparsity: rising, in [0, 1].
        relative_time: armed time / dense time at those sparsities.
        kv_len: KV length of the measurement [tokens].
    """

    sparsity: tuple[float, ...]
    relative_time: tuple[float, ...]
    kv_len: int

    def at(self, sparsity: float) -> float:
        """Relative time, linear between measurements and constant beyond them."""
        return float(np.interp(sparsity, self.sparsity, self.relative_time))

    @property
    def break_even(self) -> float:
        """Smallest sparsity from which the armed kernel is faster than the dense one; 1.0 if it never is."""
        for share in np.linspace(0, 1, 1001):
            if self.at(float(share)) < 1.0:
                return float(share)
        return 1.0


@dataclass(frozen=True)
class Cost:
    """Curves of both phases.

    Attributes:
        curves: one per phase.
        source: where they come from, for the report.
    """

    curves: dict[Phase, Curve]
    source: dict[str, Any]

    def relative_time(
        self, phase: Phase, layer_sparsity: Sequence[float], armed: Sequence[bool]
    ) -> float:
        """Predicted attention time of a phase relative to dense, mean over layers.

        Args:
            phase: `prefill` or `decode`.
            layer_sparsity: one per layer, in [0, 1].
            armed: whether the layer runs the skipping kernel; a layer that does not costs 1.
        """
        times = [
            self.curves[phase].at(share) if on else 1.0
            for share, on in zip(layer_sparsity, armed, strict=True)
        ]
        return sum(times) / len(times)

    def phase_times(self, statistics: Statistics, setting: Setting) -> dict[Phase, float]:
        """Predicted attention time of each phase of a setting relative to dense."""
        return {
            phase: self.relative_time(
                phase,
                statistics.layer_sparsity(phase, factors).tolist(),
                [factor > 0 for factor in factors],
            )
            for phase, factors in setting.items()
        }

    def weighted_time(
        self, statistics: Statistics, setting: Setting, weights: Mapping[Phase, float]
    ) -> float:
        """Predicted attention time of a setting relative to dense, weighted over phases."""
        times = self.phase_times(statistics, setting)
        return sum(weights[p] * t for p, t in times.items()) / sum(weights[p] for p in times)


def load_curves(
    config: CostConfig, kv_len: int, head_dim: int, geometry: GeometryConfig | None = None
) -> Cost:
    """Picks the measurements nearest to what will be served.

    Args:
        config: which file and device.
        kv_len: typical KV length [tokens].
        head_dim: size of a head.
        geometry: tiles of both phases, which decide what kernel `backend="auto"` takes; None: the defaults.

    Returns:
        One curve per phase.

    Raises:
        UserError: the file is missing or damaged, or has no row of that device and phase.
    """
    if config.curves is not None:
        files = [Path(config.curves)]
    else:
        files = sorted((bench.folder() / "results").glob("*.jsonl"))
    by_file = [(file, row) for file in files for row in _rows(file)]
    devices = sorted({str(row["device"]) for _, row in by_file})
    rows = [row for _, row in by_file if row["device"] == config.device]
    curves: dict[Phase, Curve] = {}
    backends: dict[Phase, str] = {}
    for phase in PHASES:
        mine = [row for row in rows if row["phase"] == phase]
        backends[phase] = _backend(phase, mine, head_dim, geometry or GeometryConfig())
        mine = [row for row in mine if row["backend"] == backends[phase]]
        if not mine:
            raise UserError(
                f"cost.device: no {phase} measurement of `{config.device}` in "
                f"{', '.join(map(str, files)) or 'the bundled results'}; devices there: {', '.join(devices)}"
            )
        size = min({row["head_dim"] for row in mine}, key=lambda d: abs(d - head_dim))
        mine = [row for row in mine if row["head_dim"] == size]
        length = min({row["kv_len"] for row in mine}, key=lambda n: abs(np.log(n / max(kv_len, 1))))
        curves[phase] = _curve([row for row in mine if row["kv_len"] == length])
    source = {
        "device": config.device,
        "files": sorted({file.name for file, row in by_file if row["device"] == config.device}),
        "kv_len": {phase: curve.kv_len for phase, curve in curves.items()},
        "backend": backends,
    }
    return Cost(curves, source)


def _backend(
    phase: Phase, rows: list[dict[str, Any]], head_dim: int, geometry: GeometryConfig
) -> str:
    """The kernel that `backend="auto"` takes on the device of these rows, of those measured there."""
    # Only now: with torch, which reading a config does not need.
    import torch

    from skip_softmax.choose import able, backends
    from skip_softmax.launch import Device
    from skip_softmax.meaning.call import Call

    decode = phase == "decode"
    call = Call(
        q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=head_dim, value_dim=head_dim,
        dtype=torch.bfloat16, scale=1.0, tile_q=None if decode else geometry.prefill.tile_q,
        tile_kv=geometry.decode.tile_kv if decode else geometry.prefill.tile_kv,
        running_max=geometry.decode.running_max,
    )  # fmt: skip
    measured = {row["backend"] for row in rows if row["head_dim"] == head_dim}
    # Older rows do not name the architecture: only what ran on the device was measured there.
    device = Device(max((int(row.get("capability", 9)) for row in rows), default=9))
    # What no kernel can run was not measured either: the portable one, which comes last, is nearest.
    suits = [name for name in able(phase, call, device) if name in measured]
    return [*suits, backends(phase)[-1]][0]


def _curve(rows: list[dict[str, Any]]) -> Curve:
    """One curve through the rows; they scatter, but skipping more never takes longer."""
    rows = sorted(rows, key=lambda row: float(row["sparsity"]))
    times = isotonic_regression([row["ms"] / row["dense_ms"] for row in rows], increasing=False).x
    return Curve(
        tuple(float(row["sparsity"]) for row in rows),
        tuple(float(t) for t in times),
        int(rows[0]["kv_len"]),
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    needed = {"device", "phase", "backend", "head_dim", "kv_len", "sparsity", "ms", "dense_ms"}
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cost.curves: `{file}` cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: not valid JSON ({error})") from None
        if row.get("phase", PHASES[0]) not in PHASES:
            continue  # other measurements of the same file
        if not needed <= set(row):
            raise UserError(f"{file}:{number}: a row needs the keys {sorted(needed - set(row))}")
        rows.append(row)
    return rows
