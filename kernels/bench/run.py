"""Times of the kernels: the gate first, then one JSON line per measurement.

    python kernels/bench/run.py [--phase prefill decode statistics] [--length N ...] [--head-dim D ...]
                                [--repeats N] [--output FILE] [--plot FILE.svg] [--commit HASH]

The gate compares output and decisions with the reference on this device; when it is red nothing is timed.
Times are medians of replays of a captured graph, by device events: what the device does for one call, without
the host's part. The rivals are
cuDNN and flash attention through PyTorch, and FlashInfer where it is installed, all in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
import triton
from inputs import planted
from torch.nn.attention import SDPBackend, sdpa_kernel

import skip_softmax as ss
from skip_softmax import histogram

HEADS, KV_HEADS = 64, 4
SPARSITIES = (0.0, 0.3, 0.57, 0.77, 0.91, 0.97)
DECODE_SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9, 0.99)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Row = dict[str, Any]


def gate(dtype: torch.dtype) -> list[str]:
    """What differs from the reference; empty: green."""
    wrong = []
    for head_dim in (64, 128):
        q, k, v, factor = planted("blocks", 1, 4, 2, 1000, 1500, head_dim, 128, 0.5, dtype, "cuda")
        calls = {
            "prefill": partial(ss.attention, q, k, v, scale_factor=factor, return_stats=True),
            "decode": partial(
                ss.decode_attention,
                q[:, :, :2],
                k,
                v,
                scale_factor=factor,
                running_max="seeded",
                return_stats=True,
            ),
        }
        for name, call in calls.items():
            (out, stats), (truth, true_stats) = call(backend="triton"), call(backend="reference")
            if not torch.equal(stats.visited, true_stats.visited) or not torch.equal(
                stats.skipped, true_stats.skipped
            ):
                wrong.append(
                    f"{name} head_dim {head_dim}: {stats.skipped} skipped, not {true_stats.skipped}"
                )
            error = ((out.float() - truth.float()).norm() / truth.float().norm()).item()
            if not error < 2 * torch.finfo(dtype).eps:
                wrong.append(f"{name} head_dim {head_dim}: relative error {error:.2e}")
        found = ss.tile_statistics(q, k, v, backend="triton")[1]
        true = ss.tile_statistics(q, k, v, backend="reference")[1]
        moved = (found.counts.cumsum(1) - true.counts.cumsum(1)).abs().max().item()
        if moved > 0.01 * true.counts.sum().item() or not torch.allclose(
            found.mass.sum(1), true.mass.sum(1), rtol=1e-3
        ):
            wrong.append(f"statistics head_dim {head_dim}: {moved} tiles moved")
    return wrong


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median device time of one call, as the replay of a captured graph: without the host's part."""
    call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()
    captured.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        captured.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def rivals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, repeats: int) -> dict[str, float]:
    """Dense causal attention of others [ms]; keys are repeated outside the time, which favours them."""
    group = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(group, 1) for x in (k, v)]
    found = {}
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
    ):
        with sdpa_kernel(backend):
            found[name] = milliseconds(
                lambda: torch.nn.functional.scaled_dot_product_attention(q, *wide, is_causal=True),
                repeats,
            )
    try:
        import flashinfer
    except ImportError:
        return found
    tokens_first = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    found["flashinfer"] = milliseconds(
        lambda: flashinfer.single_prefill_with_kv_cache(*tokens_first, causal=True), repeats
    )
    return found


def factor_for(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sparsity: float, tile_kv: int
) -> float:
    """The scale factor that skips this share of tiles, by the statistics of the same input."""
    counts = ss.tile_statistics(q, k, v, tile_kv=tile_kv, backend="triton")[1].counts.sum(0)
    share = counts.cumsum(0)[: histogram.EDGES] / counts.sum()
    return histogram.edges()[int((share - sparsity).abs().argmin())].item()


def prefill_rows(
    length: int, head_dim: int, tile_kv: int, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """Dense, then every sparsity of both kinds of inputs, and the statistics kernel."""
    flops = 4 * HEADS * length * length / 2 * head_dim
    shape = {"phase": "prefill", "batch": 1, "q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": head_dim,
             "q_len": length, "kv_len": length, "tile_q": 64, "tile_kv": tile_kv}  # fmt: skip
    sink = planted(
        "sink", 1, HEADS, KV_HEADS, length, length, head_dim, tile_kv, 0.0, dtype, "cuda"
    )
    for sparsity in SPARSITIES:
        for kind in ("blocks", "sink"):
            if kind == "blocks":
                q, k, v, factor = planted(
                    kind,
                    1,
                    HEADS,
                    KV_HEADS,
                    length,
                    length,
                    head_dim,
                    tile_kv,
                    sparsity,
                    dtype,
                    "cuda",
                )
            else:
                if sparsity in (0.0, 0.3, 0.97):
                    continue
                q, k, v, _ = sink
                factor = factor_for(q, k, v, sparsity, tile_kv)

            def call(factor: float = factor, q=q, k=k, v=v) -> object:
                return ss.attention(q, k, v, scale_factor=factor, tile_kv=tile_kv, backend="triton")

            _, stats = ss.attention(
                q, k, v, scale_factor=factor, tile_kv=tile_kv, backend="triton", return_stats=True
            )
            # Rivals again beside every row: the clock moves with the load.
            others = rivals(q, k, v, max(3, repeats // 3))
            dense, armed = milliseconds(partial(call, 0.0), repeats), milliseconds(call, repeats)
            measured = (stats.skipped.sum() / stats.visited.sum()).item()
            yield {
                **shape, "inputs": kind, "requested_sparsity": sparsity, "sparsity": round(measured, 4),
                "ms": armed, "dense_ms": dense, "tflops": flops / armed / 1e9,
                "dense_tflops": flops / dense / 1e9,
                "speedup_to_dense": dense / armed, "bound": 2 / (2 - measured),
                "speedup_to_cudnn": others["cudnn"] / armed, "dense_to_cudnn": others["cudnn"] / dense,
                "repeats": repeats, **{f"{name}_ms": t for name, t in others.items()},
            }  # fmt: skip


def statistics_rows(
    length: int, head_dim: int, tile_kv: int, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """The statistics kernel against cuDNN's dense time."""
    q, k, v, _ = planted(
        "blocks", 1, HEADS, KV_HEADS, length, length, head_dim, tile_kv, 0.5, dtype, "cuda"
    )
    others = rivals(q, k, v, repeats)
    ms = milliseconds(
        lambda: ss.tile_statistics(q, k, v, tile_kv=tile_kv, backend="triton"), repeats
    )
    yield {
        "phase": "statistics", "batch": 1, "q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": head_dim,
        "q_len": length, "kv_len": length, "tile_q": 64, "tile_kv": tile_kv, "ms": ms,
        "times_cudnn": ms / others["cudnn"], "repeats": repeats,
        **{f"{name}_ms": t for name, t in others.items()},
    }  # fmt: skip


def copy_bandwidth() -> float:
    """What a device copy reads and writes [TB/s]; a graph would copy by another, slower engine."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() * 2 / ms / 1e9


def decode_rows(
    batch: int, length: int, head_dim: int, tile_kv: int, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """Every sparsity, against a device copy's bandwidth."""
    copy = copy_bandwidth()
    size = 2 * batch * KV_HEADS * length * head_dim * 2
    for sparsity in DECODE_SPARSITIES:
        q, k, v, factor = planted(
            "blocks", batch, HEADS, KV_HEADS, 1, length, head_dim, tile_kv, sparsity, dtype, "cuda"
        )

        def call(factor: float, stats: bool = False, q=q, k=k, v=v) -> Any:
            return ss.decode_attention(
                q, k, v, scale_factor=factor, tile_kv=tile_kv, running_max="seeded", backend="triton",
                return_stats=stats,
            )  # fmt: skip

        counted = call(factor, True)[1]
        measured = (counted.skipped.sum() / counted.visited.sum()).item()
        dense = milliseconds(partial(call, 0.0), repeats)
        armed = milliseconds(partial(call, factor), repeats)
        bound = 2 / (2 - measured)
        yield {
            "phase": "decode", "batch": batch, "q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": head_dim,
            "q_len": 1, "kv_len": length, "tile_kv": tile_kv, "running_max": "seeded", "inputs": "blocks",
            "requested_sparsity": sparsity, "sparsity": round(measured, 4), "ms": armed, "dense_ms": dense,
            "dense_tb_per_s": size / dense / 1e9, "copy_tb_per_s": copy,
            "dense_to_copy": size / dense / 1e9 / copy,
            "speedup_to_dense": dense / armed, "bound": bound, "share_of_bound": dense / armed / bound,
            "repeats": repeats,
        }  # fmt: skip


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up against sparsity, one panel per phase."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, phase, key in zip(
        axes, ("prefill", "decode"), ("speedup_to_cudnn", "speedup_to_dense"), strict=True
    ):
        chosen = [row for row in rows if row["phase"] == phase]
        for label in dict.fromkeys(_label(row) for row in chosen):
            line = sorted((row["sparsity"], row[key]) for row in chosen if _label(row) == label)
            axis.plot(*zip(*line, strict=True), marker="o", label=label)
        curve = [i / 100 for i in range(101)]
        axis.plot(curve, [2 / (2 - s) for s in curve], "k:", label="2 / (2 - sparsity)")
        axis.set(xlabel="skipped tiles / visited tiles", ylabel=key.replace("_", " "), title=phase)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path)


def _label(row: Row) -> str:
    tiles = f"{row['tile_q']}x{row['tile_kv']}" if "tile_q" in row else f"{row['tile_kv']}"
    shape = f"batch {row['batch']}, {row['kv_len'] // 1024}K, D {row['head_dim']}"
    return f"{shape}, tiles {tiles}, {row['inputs']}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the gate and the measurements; rows go to stdout and to `--output`.

    Args:
        arguments: command line; None: `sys.argv`.

    Returns:
        0 done, 1 the gate is red.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    phases = ("prefill", "statistics", "decode")
    parser.add_argument("--phase", nargs="+", choices=phases, default=phases)
    parser.add_argument(
        "--length", nargs="+", type=int, default=[16384, 65536], help="prefill [tokens]"
    )
    parser.add_argument("--head-dim", nargs="+", type=int, default=[128, 64])
    parser.add_argument(
        "--decode", nargs="+", default=["64x16384", "1x131072"], help="batch x tokens"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON lines are appended here")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--commit", default=_commit())
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    dtype = DTYPES[options.dtype]
    if wrong := gate(dtype):
        print("the gate is red, nothing is timed:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    header = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": options.commit, "backend": "triton", "dtype": options.dtype,
    }  # fmt: skip
    rows = []
    for row in _measure(options, dtype):
        row = {**header, **{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if options.plot:
        plot(rows, options.plot)
    return 0


def _measure(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[Row]:
    if "decode" in options.phase:
        for case in options.decode:
            batch, length = (int(n) for n in case.split("x"))
            yield from decode_rows(batch, length, 128, 64, dtype, options.repeats)
            torch.cuda.empty_cache()
    for length in options.length:
        for head_dim in options.head_dim:
            repeats = (
                max(3, math.ceil(options.repeats * 16384 / length))
                if length > 16384
                else options.repeats
            )
            if "prefill" in options.phase:
                yield from prefill_rows(length, head_dim, 128, dtype, repeats)
            if "statistics" in options.phase:
                yield from statistics_rows(length, head_dim, 128, dtype, repeats)


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
