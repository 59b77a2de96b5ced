"""Times of the kernels on this GPU: the gate first, then one row per measurement.

The gate compares output and decisions with the reference on this device; if it is red, nothing is
timed. Rivals are measured in the same run: cuDNN and flash attention through PyTorch, FlashInfer where it
is installed. The table goes to stdout, everything else to stderr.
"""

# `calibrate bench` and `python kernels/bench/run.py` are this program.
from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if importlib.util.find_spec("skip_softmax") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

from skip_softmax.choose import KERNELS, backends

PHASES = tuple(phase for phase in KERNELS if backends(phase))
# What each backend has a kernel for.
BACKENDS = {
    name: [phase for phase in PHASES if name in backends(phase)]
    for phase in PHASES
    for name in reversed(backends(phase))
}
Row = dict[str, Any]


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Runs the gate and the measurements.

    Args:
        arguments: command line; None: `sys.argv`.
        prog: the program's name in its messages; None: the script's.

    Returns:
        0 done, 1 the gate is red or the work failed, 2 the input is wrong.
    """
    options = _options(arguments, prog)
    # Only now: a mistake in the command is reported before torch is loaded, and `--help` never loads it.
    import torch

    if not torch.cuda.is_available():
        return _refuse(
            f"kernels are timed on a CUDA device, but torch {torch.__version__} sees none; run this on a "
            "machine with an NVIDIA GPU and a CUDA build of torch"
        )
    if importlib.util.find_spec("triton") is None:
        return _refuse(
            "the kernels need triton, but it is not installed; install it with the extra [gpu]: "
            "pip install 'skip-softmax-calibrate[gpu]'"
        )
    import timings
    import triton

    dtype = getattr(torch, options.dtype)
    wrong = []
    for backend in options.backend:
        try:
            pages = options.page if "prefill" in BACKENDS[backend] else ()
            wrong += timings.gate(dtype, backend, pages=pages)
        except NotImplementedError as error:
            return _refuse(f"--backend {backend} must run on this device, but it says: {error}")
    if wrong:
        _say("error: the gate is red, nothing is timed: " + "; ".join(wrong))
        return 1
    header = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability()[0], "torch": torch.__version__,
        "triton": triton.__version__, "commit": options.commit,
        "date": datetime.date.today().isoformat(), "dtype": options.dtype,
    }  # fmt: skip
    rows: list[Row] = []
    code, problem = 0, ""
    try:
        for measured in _measure(options, dtype):
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in measured.items()}
            rows.append({**header, **rounded})
            _say("  ".join(cell for cell in _cells(rows[-1]) if cell != "–"))
            if options.output is not None:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    except torch.OutOfMemoryError as error:
        code = 1
        problem = (
            f"the inputs must fit the GPU's memory, but: {str(error).splitlines()[0]}; lower --length or "
            "--decode, or stop what else runs on this GPU"
        )
    except NotImplementedError as error:
        code, problem = 2, f"each --backend must run each shape, but {error}"
    if options.json:
        sys.stdout.write(json.dumps({**header, "rows": rows}, indent=2) + "\n")
    elif rows:
        _print_table(rows)
    if options.plot is not None:
        plot(rows, options.plot)
    if problem:
        _say(f"error: {problem}")
    return code


def _options(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument(
        "--backend", action="append", type=_backends, metavar="NAME[,NAME]",
        help=f"kernels to time, from {', '.join(BACKENDS)}; may be repeated (default: triton)",
    )  # fmt: skip
    parser.add_argument(
        "--length", nargs="+", type=_positive, default=[16384, 65536], metavar="TOKENS",
        help="for prefill and statistics",
    )  # fmt: skip
    parser.add_argument(
        "--head-dim", nargs="+", type=_positive, default=[128, 64], metavar="SIZE",
        help="for all phases",
    )  # fmt: skip
    parser.add_argument(
        "--page", nargs="+", type=_positive, default=(), metavar="ROWS",
        help="for prefill: also through a block table, in pages of so many tokens",
    )  # fmt: skip
    parser.add_argument(
        "--decode", nargs="+", type=_case, default=[(64, 16384), (1, 131072)], metavar="BATCHxTOKENS",
        help="decode cases",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--repeats", type=_positive, default=15, help="timed calls per measurement")
    parser.add_argument("--output", type=_path, help="JSON lines are appended here")
    parser.add_argument("--plot", type=_path, help="speed-up against sparsity; needs matplotlib")
    parser.add_argument("--commit", default=_commit(), help="written into each row")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    options = parser.parse_args(arguments)
    given = options.backend or [["triton"]]
    options.backend = list(dict.fromkeys(name for names in given for name in names))
    if not any(set(options.phase) & set(BACKENDS[name]) for name in options.backend):
        parser.error(
            f"--backend {','.join(options.backend)} has no kernel for --phase {' '.join(options.phase)}; "
            "name a phase that it has, or --backend triton"
        )
    for name, path in (("--output", options.output), ("--plot", options.plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(
                f"{name} must be a file in a folder that exists, but got `{path}`; make the folder first"
            )
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, but it is not installed; pip install matplotlib")
    return options


def _backends(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BACKENDS:
            raise argparse.ArgumentTypeError(
                f"must be of {', '.join(BACKENDS)}, but got `{name}`; correct the name"
            )
    return names


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, but got `{text}`")
    return int(text)


def _case(text: str) -> tuple[int, int]:
    batch, _, tokens = text.partition("x")
    try:
        return _positive(batch), _positive(tokens)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be BATCHxTOKENS, but got `{text}`; write for example 64x16384"
        ) from None


def _measure(options: argparse.Namespace, dtype: Any) -> Iterator[Row]:
    import timings
    import torch

    able = {
        phase: [name for name in options.backend if phase in BACKENDS[name]]
        for phase in options.phase
    }
    for phase, names in able.items():
        for name in set(options.backend) - set(names):
            _say(f"{name} has no kernel for {phase}, so it is not measured there")
    if able.get("decode"):
        for (batch, length), head_dim in itertools.product(options.decode, options.head_dim):
            yield from timings.decode_rows(
                batch, length, head_dim, dtype, options.repeats, able["decode"]
            )
            torch.cuda.empty_cache()
    for length in options.length:
        for head_dim in options.head_dim:
            # A long call needs fewer repeats for the same time.
            repeats = max(
                min(3, options.repeats), math.ceil(options.repeats * min(1, 16384 / length))
            )
            if able.get("prefill"):
                yield from timings.prefill_rows(
                    length, head_dim, dtype, repeats, able["prefill"], options.page
                )
            if able.get("statistics"):
                yield from timings.statistics_rows(
                    length, head_dim, dtype, repeats, able["statistics"]
                )


COLUMNS = (
    "phase", "backend", "shape", "inputs", "sparsity", "ms", "rate", "to cuDNN dense", "to own dense",
    "of the bound", "time to contiguous",
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    """A row as `COLUMNS` shows it; a dash where it has no number."""

    def number(key: str, form: str) -> str:
        return "–" if row.get(key) is None else form.format(row[key])

    rate = number("tflops", "{:.0f} TFLOP/s")
    return [
        row["phase"],
        row["backend"],
        f"{row['batch']} × {row['q_heads']}/{row['kv_heads']} heads × {row['q_len']}/{row['kv_len']} × "
        f"{row['head_dim']}",
        row.get("inputs", "–") + (f", pages of {row['page']}" if "page" in row else ""),
        number("sparsity", "{:.1%}"),
        number("ms", "{:.4g} ms"),
        rate if rate != "–" else number("tb_per_s", "{:.2f} TB/s"),
        number("speedup_to_cudnn", "{:.2f}×"),
        number("speedup_to_dense", "{:.2f}×"),
        number("share_of_bound", "{:.0%}"),
        number("to_contiguous", "{:.3f}×"),
    ]


def _print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(title=f"{first['device']}, {first['dtype']}", title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 4 else "right")
    for row in rows:
        table.add_row(*_cells(row))
    # A pipe or a file has no width: rich would cut the table at 80 columns there.
    (Console() if sys.stdout.isatty() else Console(width=180)).print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up against sparsity, a panel per phase and head_dim; colour: backend, dash: kind of inputs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if row["phase"] in ("prefill", "decode") and "inputs" in row]
    drawn = [row for row in drawn if "page" not in row]
    panels = sorted({(row["phase"], row["head_dim"]) for row in drawn}, reverse=True)
    figure, axes = plt.subplots(
        1, max(1, len(panels)), figsize=(5 * max(1, len(panels)), 4.5), layout="constrained", squeeze=False
    )  # fmt: skip
    for axis, (phase, head_dim) in zip(axes[0], panels, strict=False):
        key = "speedup_to_cudnn" if phase == "prefill" else "speedup_to_dense"
        mine = [row for row in drawn if (row["phase"], row["head_dim"]) == (phase, head_dim)]
        mine = [row for row in mine if row[key] is not None]
        shapes = sorted({(row["kv_len"], row["batch"]) for row in mine})
        for label in dict.fromkeys(_label(row) for row in mine):
            line = sorted((row["sparsity"], row[key]) for row in mine if _label(row) == label)
            one = next(row for row in mine if _label(row) == label)
            axis.plot(
                *zip(*line, strict=True), label=label, markersize=5,
                color=f"C{list(BACKENDS).index(one['backend'])}",
                linestyle="-" if one["inputs"] == "blocks" else "--",
                marker="os^vD"[shapes.index((one["kv_len"], one["batch"])) % 5],
            )  # fmt: skip
        if phase == "decode":
            curve = [i / 100 for i in range(101)]
            axis.plot(curve, [2 / (2 - s) for s in curve], "k:", label="2 / (2 - sparsity)")
        else:
            axis.axhline(1.0, color="black", linestyle=":", label="cuDNN, dense")
        axis.set(
            xlabel="skipped tiles / visited tiles",
            ylabel="speed-up over cuDNN dense" if phase == "prefill" else "speed-up over own dense",
            title=f"{phase}, head_dim {head_dim}",
        )
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path)


def _label(row: Row) -> str:
    tiles = f"{row['tile_q']}x{row['tile_kv']}" if "tile_q" in row else f"{row['tile_kv']}"
    shape = f"batch {row['batch']}, {row['kv_len'] / 1024:g}K"
    return f"{row['backend']}, {shape}, tiles {tiles}, {row['inputs']}"


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository around it would be another project's
        return "unknown"
    try:
        return subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
            check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _refuse(message: str) -> int:
    _say(f"error: {message}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
