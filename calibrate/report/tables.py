"""The only tables: from findings, thresholds files and assessments to text, for a page and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calibrate.loss.losses import FINEST, GENERATED, LOSSES, Loss
from calibrate.proof.dense import reach_text
from calibrate.report.findings import Findings
from calibrate.terminal import Table
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, DecodeGeometry, PrefillGeometry

if TYPE_CHECKING:
    from calibrate.proof.assess import Row


def tables_of(found: Findings) -> dict[str, Table]:
    """All tables of the report that this run has the numbers for."""
    tables = {"provenance": provenance(found), "trials": _trials(found)}
    if found["heldout"]["searched"] is not None:
        tables |= {
            "heldout": heldout(found),
            "lengths": _lengths(found),
            "thresholds": _thresholds(found),
            "speed": _speed(found),
        }
    if found["tasks"]:
        tables["tasks"] = _tasks(found)
    if found["target_sparsity"]:
        # The user's target, not what the statistics say of the setting.
        tables["lengths"] = targets(found["target_sparsity"])
    return tables


def heldout(found: Findings) -> Table:
    """All candidates, from safe to bold, and one number per phase, on the held-out prompts."""
    rows = found["heldout"]
    searched, uniform = rows["searched"], rows["uniform"]
    named = [
        ("chosen" if row == searched and row["passed"] else f"candidate {index}", row)
        for index, row in enumerate(rows["attempts"], start=1)
    ]
    if uniform is not None:
        named.append(("best single number", uniform))
    limits = found["budget"]["losses"]
    parts = _parts(limits, limits)
    setting = "Chosen" if searched["passed"] else "Last candidate"
    untested = [
        _bound_text(name, bound, searched["prompts"])
        for name, bound in searched["losses"].items()
        if name not in limits
    ]
    notes = [", ".join(untested)] if untested else []
    notes += [] if searched["failing"] is None else [failing_text(searched["failing"])]
    return Table(
        "Held-out prompts: loss against sparsity",
        (
            "setting",
            *_bound_columns(parts),
            *_phase_columns(found),
            "predicted speed-up",
            "within budget",
        ),
        [
            [
                name,
                *_bound_cells(row["losses"], parts),
                *(percent_text(row["sparsity"][phase]) for phase in found["phases"]),
                speedup_text(row["speedup"]),
                "yes" if row["passed"] else "no",
            ]
            for name, row in named
        ],
        notes=tuple(f"{setting}: {note}" for note in notes),
    )


def provenance(found: Findings) -> Table:
    """What the result was made with, and how long it took."""
    notes = found["provenance"]
    rows = {
        "model": f"{found['name']}, SHA-256 {notes.get('model', {}).get('sha256', 'unknown')}",
        "device": str(notes.get("device", "unknown")),
        "commit": str(notes.get("commit") or "installed package"),
        "seed": str(notes["config"]["seed"]),
        "versions": _listed(notes.get("versions", {})),
        "config": f"SHA-256 {notes.get('config_sha256', 'unknown')}",
        "seconds": ", ".join(
            f"{stage} {seconds:g}" for stage, seconds in notes.get("seconds", {}).items()
        ),
        "tiles": "; ".join(
            f"{phase} {_listed(found['geometry'][phase])}" for phase in found["phases"]
        ),
        "min KV length": ", ".join(
            f"{phase} {tokens} tokens" for phase, tokens in found["min_kv_len"].items()
        ),
        "trials": "; ".join(
            [
                f"{len(found['trials'])} complete, {found['pruned']} pruned",
                *([found["stopped"]] if found["stopped"] else []),
            ]
        ),
    }
    short = found["short_prompt"]
    if short is not None:
        rows["short prompt"] = (
            f"{short['tokens']} tokens, below the minimum: {short['skipped_tiles']} tiles skipped, "
            f"{'dense' if short['dense'] else 'not dense'}"
        )
    return Table("Provenance", ("", "value"), [*map(list, rows.items())], words=("value",))


def compared(runs: Sequence[Findings]) -> Table:
    """Results of two runs side by side."""
    verdicts = {True: "passed", False: "failed", None: "not proven"}
    limits = [run["budget"]["losses"] for run in runs]
    lines = [["verdict", *(verdicts[run["verdict"]["passed"]] for run in runs)]]
    for name, loss in LOSSES.items():
        if any(name in each for each in limits):
            cells = (f"{each[name]:g}" if name in each else "–" for each in limits)
            lines.append([f"budget, {loss.title} [{loss.unit}]", *cells])
    rows = [run["heldout"]["searched"] for run in runs]
    if all(row is not None for row in rows):
        for name, loss in LOSSES.items():
            if not any(name in row["losses"] for row in rows):
                continue
            bounds = [row["losses"].get(name, {}) for row in rows]
            means, uppers = ([loss.text(b.get(key)) for b in bounds] for key in ("mean", "upper"))
            lines.append([f"{loss.title} [{loss.unit}]", *means])
            lines.append([f"{loss.title}, upper bound", *uppers])
        for phase in runs[0]["phases"]:
            shares = (percent_text(row["sparsity"].get(phase)) for row in rows)
            lines.append([f"{phase} skipped", *shares])
        lines.append(["predicted speed-up", *(speedup_text(row["speedup"]) for row in rows)])
        lines.append(["held-out prompts", *(str(row["prompts"]) for row in rows)])
    return Table("Both runs on held-out prompts", ("", "A", "B"), lines)


def at_the_same_loss(runs: Sequence[Findings]) -> Table | None:
    """What a search found for the loss that a target sparsity costs; None: the runs are no such pair."""
    aimed = [run for run in runs if run["target_sparsity"]]
    searched = [run for run in runs if run["trials"]]
    made = [
        (run["provenance"].get("model", {}).get("sha256"), run["geometry"], run["min_kv_len"])
        for run in runs
    ]
    if len(aimed) != 1 or len(searched) != 1 or made[0] != made[1]:
        return None
    row = aimed[0]["heldout"]["searched"]
    spent = {
        name: row["losses"][name]["mean"]
        for name in aimed[0]["budget"]["losses"]
        if name in row["losses"]
    }
    within = [
        trial
        for trial in searched[0]["trials"]
        if all(trial["losses"].get(name, math.inf) <= loss for name, loss in spent.items())
    ]
    best = max(within, key=lambda trial: float(trial["speedup"]), default=None)
    phases = list(aimed[0]["phases"])

    def cells(losses: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
        return [
            *(LOSSES[name].text(losses[name]) for name in spent),
            *(percent_text(found["sparsity"].get(phase)) for phase in phases),
            speedup_text(found["speedup"]),
        ]

    lines = [["target sparsity", *cells(spent, row)]]
    if best is None:
        lines.append(["search: no trial costs as little", *["–"] * (len(lines[0]) - 1)])
    else:
        lines.append([f"search: trial {best['number']}", *cells(best["losses"], best)])
    return Table(
        "At the same loss",
        (
            "setting",
            *(f"{LOSSES[name].title} [{LOSSES[name].unit}]" for name in spent),
            *(f"{phase} skipped" for phase in phases),
            "predicted speed-up",
        ),
        lines,
        ("a trial was measured on its run's search prompts, the target on the held-out prompts",),
    )


def config_differences(configs: Sequence[dict[str, Any]]) -> Table:
    """The keys in which two run configs differ."""
    flat = [_flat(config) for config in configs]
    keys = [
        key for key in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(key) != flat[1].get(key)
    ]
    rows = [[key, *(str(config.get(key, "–")) for config in flat)] for key in keys]
    return Table("What differs in the configs", ("key", "A", "B"), rows, words=("A", "B"))


def phases(thresholds: Thresholds) -> Table:
    """A thresholds file in one line per phase, with its evidence."""
    evidence = thresholds.evidence
    rows = []
    for phase in PHASES:
        tiles = getattr(thresholds.geometry, phase)
        skipping = sum(
            max(thresholds.per_head(layer, phase)) > 0 for layer in range(thresholds.model.layers)
        )
        speedup = evidence.get("predicted_speedup", {}).get(phase)
        rows.append(
            [
                phase,
                _tiles(tiles),
                str(getattr(thresholds.min_kv_len, phase) or "–"),
                f"{getattr(thresholds.scale_factor, phase):g}",
                f"{skipping} of {thresholds.model.layers}",
                percent_text(evidence.get("sparsity", {}).get(phase, {}).get("achieved")),
                "–" if speedup is None else f"{speedup_text(speedup)} (predicted)",
            ]
        )
    notes = []
    measured = evidence.get("loss")
    if measured is not None:
        prompts = measured["heldout_prompts"]
        losses = (_bound_text(name, measured[name], prompts) for name in LOSSES if name in measured)
        notes.append(f"{', '.join(losses)} on {prompts} held-out prompts")
    if "failing_prompts" in evidence:
        notes.append(failing_text(evidence["failing_prompts"]))
    if thresholds.model.kv_cache_dtype is not None:
        notes.append(f"for a KV cache of {thresholds.model.kv_cache_dtype} with scales of 1")
    return Table(
        f"{thresholds.model.name}: {evidence.get('verdict', 'not validated')}",
        (
            "phase",
            "tiles",
            "min KV length",
            "one number",
            "layers skipping",
            "sparsity",
            "speed-up",
        ),
        rows,
        tuple(notes),
    )


def left_dense(evidence: Mapping[str, Any]) -> list[str]:
    """What a result leaves dense and why, a line each; of a file's evidence, or of findings."""
    lines = [
        f"{phase} is left dense: {entry['reason']} ({reach_text(entry)})"
        for phase, entry in evidence.get("dense", {}).items()
    ]
    for phase, reasons in evidence.get("layers_dense", {}).items():
        for reason, numbers in reasons.items():
            which = (
                f"layer {numbers[0]} is" if len(numbers) == 1 else f"layers {_ranges(numbers)} are"
            )
            lines.append(f"{phase}: {which} left dense: {reason}")
    return lines


def targets(found: Mapping[str, Any]) -> Table:
    """How close a target sparsity came: what each curve predicted of the number, and what it skipped.

    Args:
        found: per phase, from `proof.target.attained`.
    """
    rows, notes = [], []
    for phase, entry in found.items():
        rows += [
            [
                f"{phase}, {length} tokens",
                percent_text(entry["target"]),
                *(percent_text(row.get(name)) for name in ("nvidia", "ours", "histogram")),
                percent_text(row["achieved"]),
            ]
            for length, row in sorted(entry["by_length"].items(), key=lambda item: int(item[0]))
        ]
        fit = entry["fit"]
        low, high = fit["sparsity_range"]
        notes.append(
            f"{phase}: {fit['a']:g} * exp({fit['b']:g} * target_sparsity) from {fit['points']} points of "
            f"{100 * low:.0f} to {100 * high:.0f} %; R² {fit['r2']:.3f} of the logarithms, "
            f"{fit['r2_raw']:.3f} of the numbers themselves; all lengths together skip "
            f"{percent_text(entry['achieved'])}"
        )
        if not low <= entry["target"] <= high:
            notes.append(
                f"{phase}: the target is outside those points, so the curve is a guess there"
            )
        if entry["scale_factor"] < entry["asked"]:
            notes.append(
                f"{phase}: the curve asks for {entry['asked']:.5g} tokens, but `target.min_kv_len` allows "
                f"{entry['scale_factor']:.5g}, which is used"
            )
    columns = (
        "phase and length",
        "target",
        "Model-Optimizer's curve",
        "our curve",
        "our histogram",
        "achieved",
    )
    title = (
        "Target sparsity: what was predicted of its number, and what it skipped on held-out prompts"
    )
    return Table(title, columns, rows, tuple(notes))


def cure(evidence: Mapping[str, Any]) -> str:
    """What helps a result that failed."""
    found = evidence.get("target_sparsity")
    if not found:
        if not _within(evidence):
            return "Raise the budget, or give the search more trials"
        return (
            f"What {evidence['loss'][FINEST]['prompts']} held-out prompts lose is within the budget, but "
            "they are too few to prove it: give `prompts.heldout` more, or raise the budget"
        )
    allowed = " and ".join(
        f"{percent_text(entry['affordable'])} in {phase}"
        for phase, entry in found.items()
        if "affordable" in entry
    )
    estimate = f" (by the statistics, about {allowed} would keep within it)" if allowed else ""
    return f"Lower `target.target_sparsity`{estimate}, or raise the budget"


def _within(evidence: Mapping[str, Any]) -> bool:
    """Whether every loss that has a budget is within it on the prompts that were run."""
    measured, budget = evidence.get("loss", {}), evidence.get("budget", {})
    means = {name: loss["mean"] for name, loss in measured.items() if budget.get(name) is not None}
    return FINEST in means and all(mean <= budget[name] for name, mean in means.items())


def layers(thresholds: Thresholds) -> Table:
    """Scale factors of a thresholds file per layer."""
    rows = [
        [str(layer), *(_span(thresholds.per_head(layer, phase)) for phase in PHASES)]
        for layer in range(thresholds.model.layers)
    ]
    return Table(
        "Scale factor per layer; 0 is dense",
        ("layer", *(f"{phase} [tokens]" for phase in PHASES)),
        rows,
    )


def expected(rows: Sequence[dict[str, Any]]) -> Table:
    """Threshold = scale factor / KV length, with the sparsity that it is expected to give.

    Args:
        rows: from `lengths.expectations`.
    """
    return Table(
        "Threshold and expected sparsity by KV length",
        (
            "phase",
            "KV length [tokens]",
            "scale factor [tokens]",
            "threshold",
            "expected sparsity",
            "source",
        ),
        [
            [
                row["phase"],
                str(row["kv_len"]),
                _span(row["scale_factor"], 4),
                "–" if row["dense"] else _span(row["threshold"], 4),
                percent_text(row["sparsity"]),
                row["source"],
            ]
            for row in rows
        ],
        words=("source",),
    )


def assessed(rows: Sequence[Row]) -> Table:
    """Dense, given and calibrated numbers per prompt length."""
    loss = LOSSES[FINEST]
    note = (
        "(1 or more): measured as engines run it, which keep skipping; the kernels of this package would "
        "run dense there"
    )
    return Table(
        "Held-out prompts: loss and sparsity by length",
        (
            "setting",
            "tokens",
            *(f"{phase} threshold" for phase in PHASES),
            f"{loss.title} [{loss.unit}]",
            "score [points]",
            *(f"{phase} skipped" for phase in PHASES),
        ),
        [
            [
                row.setting + (" (1 or more)" if row.above_one else ""),
                str(row.length),
                *(f"{row.threshold[p]:.3g}" if row.threshold.get(p) else "–" for p in PHASES),
                loss.text(row.losses[FINEST]),
                f"{row.score:.1f}",
                *(percent_text(row.sparsity.get(phase)) for phase in PHASES),
            ]
            for row in rows
        ],
        (note,) if any(row.above_one for row in rows) else (),
    )


def _trials(found: Findings) -> Table:
    losses = _measured(found["trials"])
    return Table(
        "All trials",
        (
            "trial",
            *(f"{loss.title} [{loss.unit}]" for loss in losses.values()),
            "predicted speed-up",
            *_phase_columns(found),
        ),
        [
            [
                f"{trial['number']} {trial['name']}{' (chosen)' if trial['chosen'] else ''}",
                *(loss.text(trial["losses"].get(name)) for name, loss in losses.items()),
                speedup_text(trial["speedup"]),
                *(percent_text(trial["sparsity"][phase]) for phase in found["phases"]),
            ]
            for trial in found["trials"]
        ],
    )


def _lengths(found: Findings) -> Table:
    rows = []
    for phase, numbers in found["phases"].items():
        for length, row in sorted(
            numbers["by_length"]["searched"].items(), key=lambda item: int(item[0])
        ):
            off = 100 * (row["achieved"] - row["target"])
            shares = [percent_text(row["target"]), percent_text(row["achieved"])]
            rows.append([f"{phase}, {length} tokens", *shares, f"{off:+.1f} points"])
    columns = ("phase and length", "target", "achieved", "difference")
    return Table("Target and achieved sparsity by length", columns, rows)


def _tasks(found: Findings) -> Table:
    measured = _measured([*found["tasks"].values()])
    parts = _parts(measured, found["budget"]["losses"])
    columns = ("dense generated score [points]",) if GENERATED in measured else ()
    return Table(
        "Losses of each task",
        ("task", "prompts", *_bound_columns(parts), "dense score [points]", *columns),
        [
            [
                name,
                str(task["prompts"]),
                *_bound_cells(task["losses"], parts),
                f"{task['dense_score']:.1f}",
                *(_points(task["dense_generated"]) for _ in columns),
            ]
            for name, task in found["tasks"].items()
        ],
    )


def _speed(found: Findings) -> Table:
    rows = []
    for phase, numbers in found["phases"].items():
        speed = numbers["speed"]
        if speed is None:  # nothing was emitted
            continue
        measured = speed["measured"]
        points = [
            (f"{phase}, measured", *point)
            for point in zip(measured["sparsity"], measured["speedup"], strict=True)
        ]
        if speed["predicted"] is not None:
            points.append((f"{phase}, chosen (predicted)", *speed["predicted"].values()))
        rows += [
            [name, percent_text(share), speedup_text(times), speedup_text(2 / (2 - share))]
            for name, share, times in points
        ]
    columns = ("kernel", "tiles skipped", "speed-up", "bound 2/(2−s)")
    return Table("Measured and predicted speed-ups", columns, rows)


def _thresholds(found: Findings) -> Table:
    """Scale factor, skipped tiles and dropped mass of every layer."""
    numbers = [found["phases"][phase] for phase in found["phases"]]
    columns = ["layer"]
    for phase in found["phases"]:
        columns += [f"{phase} scale factor [tokens]", "skipped", "held-out", "mass dropped"]
    rows = [[str(layer)] for layer in range(len(numbers[0]["scale_factor"]))]
    for layer, row in enumerate(rows):
        for phase in numbers:
            factors, shares = phase["scale_factor"][layer], phase["layer_heldout"]
            row += [
                _span(factors) if max(factors) > 0 else "0 (dense)",
                percent_text(phase["layer_sparsity"][layer]),
                percent_text(None if shares is None else shares[layer]),
                # Three significant digits: dropped mass spans many orders of magnitude.
                f"{100 * phase['layer_dropped_mass'][layer]:.3g} %",
            ]
    return Table("Scale factor per layer", tuple(columns), rows)


def _points(score: float | None) -> str:
    """A score, one decimal; a dash for none."""
    return "–" if score is None else f"{score:.1f}"


def percent_text(share: float | None) -> str:
    """A share in percent, one decimal; a dash for none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def failing_text(failing: Mapping[str, Any]) -> str:
    """One line on the prompts that lose their answer, from a `proof.verdict.Failing`."""
    if failing["of"] == 0:
        return "the dense run answers no held-out prompt in full, so none can lose its answer"
    return (
        f"{failing['seen']} of {failing['of']} held-out prompts that the dense run answers in full lose "
        f"their answer (upper bound {percent_text(failing['upper'])} of such prompts)"
    )


def speedup_text(times: float) -> str:
    """A speed-up, two decimals."""
    return f"{times:.2f}×"


def _phase_columns(found: Findings) -> list[str]:
    return [f"{phase} skipped" for phase in found["phases"]]


def _measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, Loss]:
    """The losses that any of these rows has."""
    return {
        name: loss for name, loss in LOSSES.items() if any(name in row["losses"] for row in rows)
    }


_Parts = list[tuple[str, str]]
"""Columns of losses: each a loss's name, and which part of its bound."""


def _parts(names: Iterable[str], limits: Container[str]) -> _Parts:
    """The mean of each loss, and the upper bound of each that has a budget."""
    return [
        (name, part)
        for name in names
        for part in (("mean", "upper") if name in limits else ("mean",))
    ]


def _bound_columns(parts: _Parts) -> list[str]:
    return [
        f"{LOSSES[name].title} [{LOSSES[name].unit}]" if part == "mean" else "upper bound"
        for name, part in parts
    ]


def _bound_cells(losses: Mapping[str, Any], parts: _Parts) -> list[str]:
    return [LOSSES[name].text(losses.get(name, {}).get(part)) for name, part in parts]


def _bound_text(name: str, bound: Mapping[str, Any], prompts: int) -> str:
    """`KL 0.00310 (upper bound 0.00420) nats/token`, and how many of the prompts show it if not all do."""
    loss, shown = LOSSES[name], bound.get("prompts") or prompts
    upper = f"(upper bound {loss.text(bound['upper'])}) {loss.unit}"
    part = "" if shown == prompts else f" ({shown} prompts)"
    return f"{loss.title} {loss.text(bound['mean'])} {upper}{part}"


def _ranges(numbers: Sequence[int]) -> str:
    """`0, 3 to 5` for 0, 3, 4, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _tiles(tiles: PrefillGeometry | DecodeGeometry | None) -> str:
    if tiles is None:
        return "–"
    size = "×".join(str(v) for k, v in tiles if k in ("tile_q", "tile_kv"))
    if isinstance(tiles, DecodeGeometry) and tiles.tile_heads:
        size += f", votes of {tiles.tile_heads} query heads"
    if isinstance(tiles, PrefillGeometry):
        size += f", last {tiles.dense_last} rows dense" if tiles.dense_last else ""
        size += f", chunks of {tiles.chunk}" if tiles.chunk else ""
    return size


def _listed(pairs: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in pairs.items())


def _span(values: Sequence[float], digits: int = 6) -> str:
    """The smallest and the largest of some numbers, or the one that all are."""
    low, high = (f"{value:.{digits}g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if not isinstance(section, dict):
        return {prefix: section}
    return {
        key: value
        for name, inner in section.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }
