"""The gate, and the measurements that follow it; `run.py` is the command line.

Times are medians of queued replays of captured graphs, by device events: what the device does for one call,
without the host's part. Calls that are compared take turns, because the clock changes with the load.
FlashInfer's calls are queued too, but neither captured nor in turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import rivals
import torch
import triton
from inputs import Kind, as_engines_keep, in_pages, planted

import skip_softmax as ss
from skip_softmax.choose import Backend, backends
from skip_softmax.meaning import histogram

HEADS, KV_HEADS = 64, 4
TILE_Q, TILE_KV, DECODE_TILE_KV = 64, 128, 64  # [tokens]
SPARSITIES = (0.0, 0.3, 0.57, 0.77, 0.91, 0.97)
SINK_SPARSITIES = (0.57, 0.77, 0.91)
DECODE_SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9, 0.99)
AGREEMENT = 0.02  # from this relative error on, a rival computes something else
DEVICE = "cuda"
Row = dict[str, Any]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def gate(
    dtype: torch.dtype,
    backend: Backend,
    q_len: int = 1000,
    kv_len: int = 1500,
    pages: Sequence[int] = (),
) -> list[str]:
    """Where a backend disagrees with the reference on this device; empty: green."""
    wrong = []
    for head_dim in (64, 128):
        q, k, v, factor = planted(
            "blocks", 1, 4, 2, q_len, kv_len, head_dim, TILE_KV, 0.5, dtype, DEVICE
        )
        calls: dict[str, Callable[..., Any]] = {
            "prefill": partial(ss.attention, q, k, v, scale_factor=factor),
            "dense prefill": partial(ss.attention, q, k, v),
        }
        for page in pages:
            calls[f"prefill in pages of {page}"] = partial(
                _in_pages(q, k, v, page), scale_factor=factor
            )
        if backend in backends("decode"):
            calls["decode"] = partial(
                ss.decode_attention, q[:, :, :2], k, v, scale_factor=factor, running_max="seeded"
            )
        for name, call in calls.items():
            out, stats = call(backend=backend, return_stats=True)
            truth, true_stats = call(backend="reference", return_stats=True)
            if not torch.equal(stats.visited, true_stats.visited) or not torch.equal(
                stats.skipped, true_stats.skipped
            ):
                wrong.append(
                    f"{backend} {name} head_dim {head_dim}: skipped {stats.skipped.tolist()} of "
                    f"{stats.visited.tolist()} tiles, not {true_stats.skipped.tolist()} of "
                    f"{true_stats.visited.tolist()}"
                )
            error = _relative_error(out, truth)
            if not error < 2 * torch.finfo(dtype).eps:
                wrong.append(f"{backend} {name} head_dim {head_dim}: relative error {error:.2e}")
        if backend in backends("statistics"):
            wrong += _wrong_statistics(q, k, v, backend)
    return wrong


def _in_pages(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page: int) -> Callable[..., Any]:
    """Prefill of the same keys and values through a block table, as an engine keeps them."""
    k_pages, v_pages, table = in_pages(k, v, page)
    kv_lens = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)
    return partial(
        ss.attention,
        q,
        *as_engines_keep(k_pages, v_pages),
        block_table=table.int(),
        kv_lens=kv_lens,
    )


def _wrong_statistics(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: Backend
) -> list[str]:
    found = ss.tile_statistics(q, k, v, backend=backend)[1]
    true = ss.tile_statistics(q, k, v, backend="reference")[1]
    moved = (found.counts.cumsum(1) - true.counts.cumsum(1)).abs().max().item()
    if moved <= 0.01 * true.counts.sum().item() and torch.allclose(
        found.mass.sum(1), true.mass.sum(1), rtol=1e-3
    ):
        return []
    return [f"{backend} statistics head_dim {q.shape[-1]}: {moved} tiles moved"]


def _relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.float() - truth.float()).norm() / truth.float().norm())


def ready(call: Callable[[], object], *, captured: bool = True) -> Callable[[], object]:
    """The call after a first run, which compiles and allocates; captured as a graph to leave out the host."""
    call()
    torch.cuda.synchronize()
    if not captured:
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(_reads: Callable[[], object] = call) -> None:
        # A graph keeps addresses, not tensors: the call keeps alive what only it refers to.
        graph.replay()

    return replay


def median_times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median device time of each call [ms], taken in turns: the clock changes with the load.

    Args:
        calls: what is timed, by name; each is `ready`.
        repeats: rounds.
    """
    for call in calls.values():
        call()
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: float(statistics.median(start.elapsed_time(end) for start, end in taken))
        for name, taken in pairs.items()
    }


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median device time of calls of another package, which are queued, not captured."""
    return median_times({"": ready(call, captured=False)}, repeats)[""]


def sdpa_ready(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> dict[str, Callable[[], object]]:
    """Dense attention of cuDNN and flash; one that PyTorch refuses here is named on stderr."""
    found = {}
    for name, call in rivals.sdpa(q, k, v, causal=causal).items():
        try:
            found[name] = ready(call)
        except RuntimeError as error:
            # A refusal is a plain RuntimeError; a fault of the device or of its memory is a subclass.
            if type(error) is not RuntimeError:
                raise
            phase = "prefill" if causal else "decode"
            rivals.say(f"{name} refuses {phase}, so it is not measured: {_first_line(error)}")
    return found


def _working(
    name: str, make: Callable[[], Any], truth: torch.Tensor | None, *arguments: float
) -> Callable[..., torch.Tensor] | None:
    """A rival's call, if it runs here and agrees with `truth` (None: unchecked); if not, stderr says why."""
    try:
        call: Callable[..., torch.Tensor] | None = make()
        if call is None:
            return None
        out = call(*arguments)
        torch.cuda.synchronize()
    except Exception as error:  # another package's fault must not end the run
        rivals.say(f"{name} fails, so it is not measured: {_first_line(error)}")
        return None
    if truth is None:
        return call
    rows = min(256, out.shape[0])  # the last queries see most keys
    off = _relative_error(out[-rows:], truth[0, :, -rows:].transpose(0, 1))
    if not off < AGREEMENT:
        rivals.say(f"{name} computes something else (relative error {off:.2g}): not measured")
        return None
    return call


def _beside(
    rivals_ready: dict[str, Callable[[], object]],
    attend: Callable[..., Any],
    factor: float,
    backends: Sequence[str],
    repeats: int,
    paged: dict[int, Callable[..., Any]] | None = None,
) -> tuple[dict[str, float], dict[str, float], torch.Tensor]:
    """Rivals and each backend, dense and armed, in turns: times [ms], sparsities, and one armed output.

    `paged` calls, by size of page, take turns with them; `_over` names them.
    """
    calls, sparsities = dict(rivals_ready), {}
    for backend in backends:
        for page, one in [*(paged or {}).items(), (0, attend)]:
            name, call = _over(backend, page), partial(one, backend=backend)
            out, stats = call(scale_factor=factor, return_stats=True)
            sparsities[name] = (stats.skipped.sum() / stats.visited.sum()).item()
            calls[f"{name} dense"] = ready(partial(call, scale_factor=0.0))
            calls[name] = ready(partial(call, scale_factor=factor))
    return median_times(calls, repeats), sparsities, out


def _over(backend: str, page: int) -> str:
    return f"{backend} in pages of {page}" if page else backend


def prefill_rows(
    length: int,
    head_dim: int,
    dtype: torch.dtype,
    repeats: int,
    backends: Sequence[str],
    pages: Sequence[int] = (),
) -> Iterator[Row]:
    """Every sparsity of both kinds of inputs with each backend, also in pages, and the rivals' rows."""
    flops = 4 * HEADS * length * length / 2 * head_dim
    shape = {
        "phase": "prefill", "batch": 1, "q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": head_dim,
        "q_len": length, "kv_len": length, "tile_q": TILE_Q, "tile_kv": TILE_KV,
    }  # fmt: skip
    few = max(3, repeats // 3)

    def row(name: str, ms: float, dense: float, sparsity: float, about: Row) -> Row:
        return {
            "backend": name, **shape, **about, "sparsity": round(sparsity, 4), "ms": ms, "dense_ms": dense,
            "tflops": flops / ms / 1e9, "dense_tflops": flops / dense / 1e9,
            **_compared(ms, dense, sparsity, others),
        }  # fmt: skip

    trtllm = True  # until it fails here: a failure can cost a compilation
    for number, (about, q, k, v, factor) in enumerate(_prefill_inputs(length, head_dim, dtype)):
        call = partial(ss.attention, q, k, v, tile_q=TILE_Q, tile_kv=TILE_KV)
        sdpa = sdpa_ready(q, k, v, causal=True)
        paged = {
            page: partial(_in_pages(q, k, v, page), tile_q=TILE_Q, tile_kv=TILE_KV)
            for page in pages
        }
        times, sparsities, out = _beside(sdpa, call, factor, backends, repeats, paged)
        others = {name: times[name] for name in sdpa}
        for backend in backends:
            for page in (0, *pages):
                name = _over(backend, page)
                ms, dense = times[name], times[f"{name} dense"]
                pair = {
                    "to_contiguous": ms / times[backend],
                    "dense_to_contiguous": dense / times[f"{backend} dense"],
                }
                yield {
                    **row(backend, ms, dense, sparsities[name], about), **_taken(repeats),
                    **({"page": page, **pair} if page else {}),
                    **{f"{name}_ms": ms for name, ms in others.items()},
                }  # fmt: skip
        sparsity = sparsities[backends[-1]]
        if number == 0:  # the first inputs skip nothing: `out` is dense attention
            for name, ms in others.items():
                yield {**row(name, ms, ms, 0.0, {}), **_taken(repeats)}
            theirs = _working("flashinfer", partial(rivals.flashinfer_dense, q, k, v), out)
            if theirs is not None:
                ms = milliseconds(theirs, few)
                yield {**row("flashinfer", ms, ms, 0.0, {}), **_taken(few, captured=False)}
        if not trtllm:
            continue
        # On `sink` inputs many tiles are so close to the threshold that rounding decides.
        truth = out if about["inputs"] == "blocks" else None
        theirs = _working("fmha_v2", partial(rivals.fmha_v2, q, k, v), truth, factor)
        trtllm = theirs is not None
        if theirs is not None:
            dense = milliseconds(partial(theirs, 0.0), few)
            armed = milliseconds(partial(theirs, factor), few)
            # The same tiles and the same rule: our share of skipped tiles is theirs, apart from rounding.
            yield {**row("fmha_v2", armed, dense, sparsity, about), **_taken(few, captured=False)}


def _prefill_inputs(
    length: int, head_dim: int, dtype: torch.dtype
) -> Iterator[tuple[Row, torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """What a row says about its inputs, the inputs, and the scale factor that skips the requested share."""

    def made(kind: Kind, sparsity: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        return planted(
            kind, 1, HEADS, KV_HEADS, length, length, head_dim, TILE_KV, sparsity, dtype, DEVICE
        )

    sink = made("sink", 0.0)[:3]
    for sparsity in SPARSITIES:
        yield {"inputs": "blocks", "requested_sparsity": sparsity}, *made("blocks", sparsity)
        if sparsity in SINK_SPARSITIES:
            yield (
                {"inputs": "sink", "requested_sparsity": sparsity},
                *sink,
                factor_for(*sink, sparsity),
            )


def factor_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sparsity: float) -> float:
    """The scale factor that skips this share of tiles, by the statistics of the same input."""
    histograms = ss.tile_statistics(q, k, v, tile_q=TILE_Q, tile_kv=TILE_KV, backend="triton")[1]
    counts = histograms.counts.sum(0)
    share = counts.cumsum(0)[: histogram.EDGES] / counts.sum()
    return float(histogram.edges()[int((share - sparsity).abs().argmin())])


def statistics_rows(
    length: int, head_dim: int, dtype: torch.dtype, repeats: int, backends: Sequence[str]
) -> Iterator[Row]:
    """The statistics kernels against cuDNN's dense time."""
    q, k, v, _ = planted(
        "blocks", 1, HEADS, KV_HEADS, length, length, head_dim, TILE_KV, 0.5, dtype, DEVICE
    )
    call = partial(ss.tile_statistics, q, k, v, tile_q=TILE_Q, tile_kv=TILE_KV)
    calls = {name: ready(partial(call, backend=name)) for name in backends}
    others = median_times({**sdpa_ready(q, k, v, causal=True), **calls}, repeats)
    times = {name: others.pop(name) for name in backends}
    for name, ms in times.items():
        yield {
            "backend": name, "phase": "statistics", "batch": 1, "q_heads": HEADS, "kv_heads": KV_HEADS,
            "head_dim": head_dim, "q_len": length, "kv_len": length, "tile_q": TILE_Q, "tile_kv": TILE_KV,
            "inputs": "blocks", "ms": ms,
            "tflops": 4 * HEADS * length * length / 2 * head_dim / ms / 1e9,
            "times_cudnn": ms / others["cudnn"] if "cudnn" in others else None,
            "speedup_to_cudnn": others["cudnn"] / ms if "cudnn" in others else None,
            **_taken(repeats), **{f"{name}_ms": t for name, t in others.items()},
        }  # fmt: skip


def copy_bandwidth() -> float:
    """What a device copy reads and writes [TB/s]; a graph would use another, slower copy engine."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device=DEVICE).normal_()
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() * 2 / ms / 1e9


def decode_rows(
    batch: int,
    length: int,
    head_dim: int,
    dtype: torch.dtype,
    repeats: int,
    backends: Sequence[str],
) -> Iterator[Row]:
    """Every sparsity with each backend, against a device copy's bandwidth, and the rivals' rows."""
    copy = copy_bandwidth()
    size = 2 * batch * KV_HEADS * length * head_dim * dtype.itemsize
    shape = {
        "phase": "decode", "batch": batch, "q_heads": HEADS, "kv_heads": KV_HEADS,
        "head_dim": head_dim, "q_len": 1, "kv_len": length, "tile_kv": DECODE_TILE_KV,
    }  # fmt: skip

    def row(name: str, ms: float, dense: float, sparsity: float, about: Row) -> Row:
        return {
            "backend": name, **shape, **about, "sparsity": round(sparsity, 4), "ms": ms, "dense_ms": dense,
            # A skipped tile's keys are read, its values are not.
            "tb_per_s": size * (1 - sparsity / 2) / ms / 1e9, "dense_tb_per_s": size / dense / 1e9,
            "copy_tb_per_s": copy, "dense_to_copy": size / dense / 1e9 / copy,
            **_compared(ms, dense, sparsity, others),
        }  # fmt: skip

    for number, requested in enumerate(DECODE_SPARSITIES):
        q, k, v, factor = planted(
            "blocks", batch, HEADS, KV_HEADS, 1, length, head_dim, DECODE_TILE_KV, requested, dtype,
            DEVICE,
        )  # fmt: skip
        about = {"running_max": "seeded", "inputs": "blocks", "requested_sparsity": requested}
        call = partial(ss.decode_attention, q, k, v, tile_kv=DECODE_TILE_KV, running_max="seeded")
        sdpa = sdpa_ready(q, k, v, causal=False)
        times, sparsities, _ = _beside(sdpa, call, factor, backends, repeats)
        others = {name: times[name] for name in sdpa}
        for backend, sparsity in sparsities.items():
            dense = times[f"{backend} dense"]
            yield {**row(backend, times[backend], dense, sparsity, about), **_taken(repeats)}
        if number == 0:
            for name, ms in others.items():
                yield {**row(name, ms, ms, 0.0, {}), **_taken(repeats)}


def _compared(ms: float, dense: float, sparsity: float, others: dict[str, float]) -> Row:
    """A time against its own dense time, the bound 2 / (2 - sparsity) and cuDNN's dense time."""
    bound, cudnn = 2 / (2 - sparsity), others.get("cudnn")
    return {
        "speedup_to_dense": dense / ms, "bound": bound, "share_of_bound": dense / ms / bound,
        "speedup_to_cudnn": None if cudnn is None else cudnn / ms,
        "dense_to_cudnn": None if cudnn is None else cudnn / dense,
    }  # fmt: skip


def _taken(repeats: int, *, captured: bool = True) -> Row:
    return {"repeats": repeats, "timing": "graph replay" if captured else "queued calls"}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
