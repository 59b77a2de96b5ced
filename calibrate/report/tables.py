"""The report's tables, as text: from `findings` to rows."""

from __future__ import annotations

from dataclasses import dataclass

from calibrate.report.findings import Findings

_DENSE = "0 (dense)"


@dataclass(frozen=True)
class Table:
    """A table as text; all columns but the first are numbers and right-aligned."""

    columns: tuple[str, ...]
    rows: list[list[str]]


def tables_of(found: Findings) -> dict[str, Table]:
    """All tables that this run has the numbers for."""
    tables = {"provenance": provenance_table(found), "trials": _trials(found)}
    if found["heldout"]["searched"] is not None:
        tables |= {
            "heldout": _heldout(found),
            "lengths": _lengths(found),
            "thresholds": _thresholds(found),
            "speed": _speed(found),
        }
    if found["tasks"]:
        tables["tasks"] = _tasks(found)
    return tables


def _heldout(found: Findings) -> Table:
    """The chosen setting and the uniform baseline on the held-out prompts."""
    phases = list(found["phases"])
    rows = []
    for name, key in (("chosen", "searched"), ("one number per phase", "uniform")):
        row = found["heldout"][key]
        if row is not None:
            rows.append(
                [
                    name,
                    loss_text(row["kl"]["mean"]),
                    loss_text(row["kl"]["upper"]),
                    f"{row['score_drop']['mean']:.2f}",
                    f"{row['score_drop']['upper']:.2f}",
                    *(percent_text(row["sparsity"][phase]) for phase in phases),
                    f"{row['speedup']:.2f}×",
                    "yes" if row["passed"] else "no",
                ]
            )
    return Table(
        (
            "on held-out prompts",
            "KL [nats/token]",
            "upper bound",
            "score drop [points]",
            "upper bound",
            *(f"{phase} skipped" for phase in phases),
            "predicted speed-up",
            "within budget",
        ),
        rows,
    )


def _trials(found: Findings) -> Table:
    phases = list(found["phases"])
    rows = [
        [
            f"{trial['number']} {trial['name']}{' (chosen)' if trial['chosen'] else ''}",
            loss_text(trial["kl"]),
            f"{trial['speedup']:.2f}×",
            *(percent_text(trial["sparsity"][phase]) for phase in phases),
        ]
        for trial in found["trials"]
    ]
    return Table(
        (
            "trial",
            "KL [nats/token]",
            "predicted speed-up",
            *(f"{phase} skipped" for phase in phases),
        ),
        rows,
    )


def _lengths(found: Findings) -> Table:
    rows = []
    for phase, numbers in found["phases"].items():
        for length, row in sorted(
            numbers["by_length"]["searched"].items(), key=lambda item: int(item[0])
        ):
            off = 100 * (row["achieved"] - row["target"])
            rows.append(
                [
                    f"{phase}, {length} tokens",
                    percent_text(row["target"]),
                    percent_text(row["achieved"]),
                    f"{off:+.1f} points",
                ]
            )
    return Table(("phase and length", "target", "achieved", "difference"), rows)


def _tasks(found: Findings) -> Table:
    rows = [
        [
            name,
            str(task["prompts"]),
            loss_text(task["kl"]["mean"]),
            loss_text(task["kl"]["upper"]),
            f"{task['score_drop']['mean']:.2f}",
            f"{task['dense_score']:.1f}",
        ]
        for name, task in found["tasks"].items()
    ]
    return Table(
        (
            "task",
            "prompts",
            "KL [nats/token]",
            "upper bound",
            "score drop [points]",
            "dense score [points]",
        ),
        rows,
    )


def _speed(found: Findings) -> Table:
    rows = []
    for phase, numbers in found["phases"].items():
        speed = numbers["speed"]
        if speed is None:  # nothing was emitted
            continue
        points = zip(speed["measured"]["sparsity"], speed["measured"]["speedup"], strict=True)
        rows += [
            [f"{phase}, measured", percent_text(s), f"{x:.2f}×", f"{2 / (2 - s):.2f}×"]
            for s, x in points
        ]
        if speed["predicted"] is not None:
            s, x = speed["predicted"]["sparsity"], speed["predicted"]["speedup"]
            rows.append(
                [
                    f"{phase}, chosen (predicted)",
                    percent_text(s),
                    f"{x:.2f}×",
                    f"{2 / (2 - s):.2f}×",
                ]
            )
    return Table(("kernel", "tiles skipped", "speed-up", "bound 2/(2−s)"), rows)


def _thresholds(found: Findings) -> Table:
    """Scale factor, skipped tiles and dropped mass of every layer."""
    phases = list(found["phases"])
    columns = ["layer"]
    for phase in phases:
        columns += [f"{phase} scale factor [tokens]", "skipped", "held-out", "mass dropped"]
    rows = []
    for layer in range(len(found["phases"][phases[0]]["scale_factor"])):
        row = [str(layer)]
        for phase in phases:
            numbers = found["phases"][phase]
            factors, heldout = numbers["scale_factor"][layer], numbers["layer_heldout"]
            low, high = min(factors), max(factors)
            row += [
                _DENSE if high == 0 else f"{low:g}" if low == high else f"{low:g} to {high:g}",
                percent_text(numbers["layer_sparsity"][layer]),
                "–" if heldout is None else percent_text(heldout[layer]),
                _share(numbers["layer_dropped_mass"][layer]),
            ]
        rows.append(row)
    return Table(tuple(columns), rows)


def provenance_table(found: Findings) -> Table:
    """What the result was made with, and how long it took."""
    notes = found["provenance"]
    rows = [
        ["model", f"{found['name']}, SHA-256 {notes.get('model', {}).get('sha256', 'unknown')}"],
        ["device", str(notes.get("device", "unknown"))],
        ["commit", str(notes.get("commit") or "installed package")],
        ["seed", str(notes["config"]["seed"])],
        [
            "versions",
            ", ".join(f"{name} {version}" for name, version in notes.get("versions", {}).items()),
        ],
        ["config", f"SHA-256 {notes.get('config_sha256', 'unknown')}"],
        [
            "seconds",
            ", ".join(
                f"{stage} {seconds:g}" for stage, seconds in notes.get("seconds", {}).items()
            ),
        ],
        [
            "tiles",
            "; ".join(
                f"{phase} {', '.join(f'{key} {value}' for key, value in found['geometry'][phase].items())}"
                for phase in found["phases"]
            ),
        ],
        [
            "min KV length",
            ", ".join(f"{phase} {tokens} tokens" for phase, tokens in found["min_kv_len"].items()),
        ],
        ["trials", f"{len(found['trials'])} complete, {found['pruned']} pruned"],
    ]
    if found["short_prompt"] is not None:
        short = found["short_prompt"]
        rows.append(
            [
                "short prompt",
                f"{short['tokens']} tokens, below the minimum: {short['skipped_tiles']} tiles skipped, "
                f"{'dense' if short['dense'] else 'not dense'}",
            ]
        )
    return Table(("", "value"), rows)


def percent_text(share: float | None) -> str:
    """A share in percent, one decimal; a dash for none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def _share(share: float) -> str:
    """Three significant digits: dropped mass spans many orders of magnitude."""
    return f"{100 * share:.3g} %"


def loss_text(value: float | None) -> str:
    """A loss to three significant digits; a dash for none."""
    return "–" if value is None else f"{value:#.3g}"
