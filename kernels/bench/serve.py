"""What vLLM gains from skipping: time to the first token and per token, on a GPU, behind a gate.

    python kernels/bench/serve.py gate stock:16 dense:16 dense:64
    python kernels/bench/serve.py soak dense:16 armed:64
    python kernels/bench/serve.py stall armed:64
    python kernels/bench/serve.py time stock:16 dense:64 65536x1@0.75 armed:64 65536x1@0 65536x1@0.75

A setting is BACKEND:BLOCK: `stock` is FLASH_ATTN, `dense` our plug-in without a thresholds file, `armed` with
one; BLOCK is the cache's page [tokens]. A point is LENGTHxBATCH@SPARSITY: so many requests of so many tokens
arrive at once, and their prompts have this share of tiles that the file skips (`planted_model.py`). At
sparsity 0 an armed engine asks about every tile and skips none. Points belong to the settings right before
them.

`gate` serves prompts of several kinds (short, in chunks, with a cached prefix, in mixed batches) and compares
tokens and log-probabilities with the first setting's. `soak` serves random requests with prefix reuse and
preemption, and compares each with the same request alone. Both run a small model in fp16, whose rounding is
finer than bf16's. Still, rounding decides between tokens that are nearly alike: where both runs give two
tokens nearly the same probability, either may come, and behind it nothing is compared.

`stall` asks what the first batches of a server wait for: each batch is served twice, and what the first took
more is compiling, unless Triton finds its kernels on disk (TRITON_CACHE_DIR).

`time` runs a model of Llama-3.1-8B's shape in bf16. Every engine has a process of its own, and each row is
printed and written as soon as it is known.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
if importlib.util.find_spec("skip_softmax") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import planted_model

from calibrate.record import provenance

TIE = 0.03  # log-probabilities that differ by less may be in either order [nats]
CHUNK = 16384  # most tokens of a step: what vLLM's LLM takes by default on an H100 or H200
LONGEST = 131072 + 1024
ENOUGH_S = 6.0  # a point is repeated until it took so long, but at most REPEATS times
REPEATS = 5
DEFAULT = 16  # vLLM's page for its own backend [tokens]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """An engine: a key of `served.BACKENDS` and the cache's page [tokens]."""

    backend: str
    block: int

    def __str__(self) -> str:
        return f"{self.backend}:{self.block}"


@dataclass(frozen=True)
class Point:
    """A workload: tokens per prompt, requests that arrive at once, share of quiet tiles."""

    length: int
    batch: int
    sparsity: float

    def __str__(self) -> str:
        return f"{self.length}x{self.batch}@{self.sparsity:g}"

    def prompts(self, vocab: int) -> list[list[int]]:
        """Token ids of each request, the same in every engine."""
        return [
            planted_model.prompt(self.length, self.sparsity, vocab, seed=seed)
            for seed in range(self.batch)
        ]


def setting(text: str) -> Setting:
    """Reads BACKEND:BLOCK."""
    backend, _, block = text.partition(":")
    if backend not in ("stock", "dense", "armed") or not block.isdecimal():
        raise argparse.ArgumentTypeError(
            f"a setting must be stock, dense or armed, a colon and tokens per page, but got `{text}`"
        )
    return Setting(backend, int(block))


def word(text: str) -> Setting | Point:
    """Reads a setting or a point."""
    return setting(text) if ":" in text else point(text)


def point(text: str) -> Point:
    """Reads LENGTHxBATCH@SPARSITY."""
    try:
        size, _, sparsity = text.partition("@")
        length, batch = map(int, size.split("x"))
        read = Point(length, batch, float(sparsity))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a point must be LENGTHxBATCH@SPARSITY, as 65536x8@0.75, but got `{text}`"
        ) from None
    if not (0 < read.length < LONGEST and read.batch > 0 and 0 <= read.sparsity <= 1):
        raise argparse.ArgumentTypeError(
            f"a point must have 1 to {LONGEST - 1} tokens, a request or more, and a sparsity from 0 to 1, "
            f"but got `{text}`"
        )
    return read


def grouped(work: list[Setting | Point]) -> list[tuple[list[Setting], list[Point]]]:
    """Settings, and the points that stand behind them."""
    groups: list[tuple[list[Setting], list[Point]]] = []
    for word in work:
        if isinstance(word, Point):
            groups[-1][1].append(word)
        elif groups and not groups[-1][1]:
            groups[-1][0].append(word)
        else:
            groups.append(([word], []))
    return groups


# `gate` and `soak`.

Request = tuple[list[int], int]  # token ids, and how many tokens to generate


def gate_batches(vocab: int) -> list[list[Request]]:
    """Batches served one after another by an engine with chunks of 512 tokens and a prefix cache."""
    long = planted_model.prompt(6000, 0.75, vocab, seed=1)
    short = planted_model.prompt(700, 0.5, vocab, seed=2)
    return [
        [(short[:5], 12)],
        [(short, 12)],  # two chunks
        [(short[:672] + long[:40], 12)],  # its start is cached
        [(long[:n], 12) for n in (1, 17, 511, 512, 513, 1200)],  # prompts beside decodes
        [(long, 12), (planted_model.prompt(2500, 0.9, vocab, seed=3), 24)],
    ]


def gate_run(chosen: Setting, dtype: str) -> Any:
    """Tokens and log-probabilities of the gate's requests."""
    import served

    config = planted_model.SMALL
    llm = served.engine(
        config, chosen.backend, block=chosen.block, chunk=512, longest=8192, requests=8, dtype=dtype,
        enable_prefix_caching=True, gpu_memory_utilization=0.5,
    )  # fmt: skip
    served.clear_counts(llm)
    found = []
    for batch in gate_batches(config["vocab_size"]):
        done = served.run(llm, [ids for ids, _ in batch], [most for _, most in batch], top=2)
        found += list(zip(done.tokens, done.top, strict=True))
    return served.attention_class(llm), served.sparsity(llm), found


def soak_requests(count: int, vocab: int, longest: int) -> list[Request]:
    """Random requests; two of five begin like an earlier one."""
    draw = random.Random(0)
    requests: list[Request] = []
    for seed in range(count):
        length = round(longest ** draw.random())
        ids = planted_model.prompt(length, draw.choice((0.5, 0.75, 0.9)), vocab, seed=seed)
        if requests and draw.random() < 0.4:
            other = draw.choice(requests)[0]
            same = draw.randrange(len(other)) + 1
            ids = (other[:same] + ids[same:])[:longest]
        requests.append((ids, draw.randrange(1, 13)))
    return requests


def soak_run(chosen: Setting, dtype: str, count: int, together: bool) -> Any:
    """Tokens and log-probabilities of random requests, each alone or all at once in a small cache."""
    import served

    config, longest = planted_model.SMALL, 8192
    requests = soak_requests(count, config["vocab_size"], longest)
    # Alone there is room; together, 64 requests share what three of the longest need.
    small: dict[str, Any] = {"num_gpu_blocks_override": 3 * (longest + 64) // chosen.block}
    llm = served.engine(
        config, chosen.backend, block=chosen.block, chunk=2048, longest=longest + 64,
        requests=64 if together else 1, dtype=dtype, enable_prefix_caching=together,
        gpu_memory_utilization=0.4, disable_log_stats=False, **(small if together else {}),
    )  # fmt: skip
    served.clear_counts(llm)
    started = time.perf_counter()
    batches = [requests] if together else [[request] for request in requests]
    found = []
    for batch in batches:
        done = served.run(llm, [ids for ids, _ in batch], [most for _, most in batch], top=2)
        found += list(zip(done.tokens, done.top, strict=True))
    preempted = sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )
    say(
        f"{chosen} {'together' if together else 'alone'}: {count} requests in "
        f"{time.perf_counter() - started:.0f} s, {preempted} preemptions, skipped {served.sparsity(llm)}"
    )
    return found


def difference(one: Any, other: Any) -> tuple[float, int, list[str]]:
    """Compares what the same requests gave in two runs.

    Returns:
        Largest difference of log-probabilities [nats], requests that are the same up to a near-tie only, and
        what must not be.
    """
    largest, ties, wrong = 0.0, 0, []
    for index, ((mine, my_top), (theirs, their_top)) in enumerate(zip(one, other, strict=True)):
        if len(mine) != len(theirs):
            wrong.append(f"request {index}: {len(mine)} tokens and {len(theirs)}")
        for at, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            gaps = [
                abs(my_top[at][t] - their_top[at].get(t, -99.0))
                for t in {a} | {b} & set(my_top[at])
            ]
            largest = max(largest, *gaps)
            if max(gaps) > TIE:
                wrong.append(
                    f"request {index}, token {at}: log-probabilities differ by {max(gaps):.3f}"
                )
                break
            if a != b:
                margin = my_top[at][a] - my_top[at].get(b, -99.0)
                ties += 1
                if margin > 2 * TIE:
                    wrong.append(
                        f"request {index}, token {at}: {a} and {b}, {margin:.3f} nats apart"
                    )
                break
    return largest, ties, wrong


def gate(options: argparse.Namespace) -> int:
    """Runs `gate`; 0: all settings agree with the first."""
    results = {
        chosen: in_own_process(gate_run, chosen, options.dtype or "float16")
        for chosen in options.work
    }
    first, *others = options.work
    failed = results[first] is None
    for chosen in others:
        if results[first] is None or results[chosen] is None:
            failed = True
            continue
        failed |= not agreed(f"{first} and {chosen}", results[first][2], results[chosen][2])
    for chosen, result in results.items():
        say(f"{chosen}: {result and result[:2]}")
    return int(failed)


def soak(options: argparse.Namespace) -> int:
    """Runs `soak`; 0: every request gives alone what it gives among others."""
    failed = False
    for chosen in options.work:
        alone, together = (
            in_own_process(soak_run, chosen, options.dtype or "float16", options.requests, there)
            for there in (False, True)
        )
        if alone is None or together is None:
            failed = True
        else:
            failed |= not agreed(f"{chosen} alone and together", alone, together)
    return int(failed)


def agreed(what: str, one: Any, other: Any) -> bool:
    """Says how two runs compare."""
    largest, ties, wrong = difference(one, other)
    tokens = sum(len(tokens) for tokens, _ in one)
    print(
        f"{what}: {len(one)} requests, {tokens} tokens, {ties} requests equal up to a near-tie, "
        f"log-probabilities within {largest:.4f} nats, {len(wrong)} wrong {wrong[:5]}", flush=True,
    )  # fmt: skip
    return not wrong


# `stall`.


def stall_batches(vocab: int) -> dict[str, list[list[int]]]:
    """What a new server may be asked first; steps have up to 2048 tokens."""
    long = [planted_model.prompt(2100, 0.75, vocab, seed=seed) for seed in range(8)]
    return {
        "one prompt": long[:1],
        "parts of prompts, beside decodes": long,
        "five short prompts": [ids[:50] for ids in long[:5]],
        "short beside long": [long[0][:50], *long[1:4], long[4][:7]],
    }


def stall_run(chosen: Setting, dtype: str) -> dict[str, list[float]]:
    """Time to the last first token of each batch, new and again [ms]; and of the engine's start."""
    import served

    config, began = planted_model.SMALL, time.perf_counter()
    llm = served.engine(
        config, chosen.backend, block=chosen.block, chunk=2048, longest=8192, requests=8, dtype=dtype,
        gpu_memory_utilization=0.4,
    )  # fmt: skip
    taken = {"start": [1000 * (time.perf_counter() - began)]}
    for name, prompts in stall_batches(config["vocab_size"]).items():
        taken[name] = [max(served.run(llm, prompts, 8).first_ms) for _ in range(2)]
    return {name: [round(ms, 1) for ms in both] for name, both in taken.items()}


def stall(options: argparse.Namespace) -> int:
    """Runs `stall`; 0: every engine gave its times."""
    failed = False
    for chosen in options.work:
        taken = in_own_process(stall_run, chosen, options.dtype or "float16")
        failed |= taken is None
        print(
            json.dumps({"setting": str(chosen), "commit": options.commit, "ms": taken}), flush=True
        )
    return int(failed)


# `time`.


def time_run(chosen: Setting, points: list[Point], options: argparse.Namespace) -> int:
    """Times one engine at its points; rows are printed and written at once."""
    import served

    config = planted_model.SMALL if options.small else planted_model.LLAMA_8B
    dtype = options.dtype or "bfloat16"
    most = max(p.batch for p in points)
    started = time.perf_counter()
    llm = served.engine(
        config, chosen.backend, block=chosen.block, chunk=options.chunk,
        longest=8192 if options.small else LONGEST, requests=most,
        dtype=dtype, enable_prefix_caching=False, gpu_memory_utilization=0.92,
    )  # fmt: skip
    say(f"{chosen}: {served.attention_class(llm)}, ready in {time.perf_counter() - started:.1f} s")
    cache = llm.llm_engine.vllm_config.cache_config
    about = {
        "device": provenance.device(options.device), "versions": provenance.versions() | served.version(),
        "commit": options.commit, "date": datetime.date.today().isoformat(), "dtype": dtype,
        "model": "planted-small" if options.small else "planted-llama-3.1-8b",
        "shape": {k: v for k, v in config.items() if k.startswith("num_") or k.endswith(("_size", "_dim"))},
        "chunk": options.chunk, "graphs": "FULL_DECODE_ONLY", "prefix_caching": False,
        "backend": chosen.backend, "block": chosen.block, "attention": served.attention_class(llm),
        "cache_tokens": (cache.num_gpu_blocks or 0) * chosen.block,
    }  # fmt: skip
    if chosen.backend == "armed":
        file = served.thresholds(config, dtype)
        about["geometry"] = file.geometry.model_dump(mode="json", exclude_none=True)
        about["scale_factor"] = file.scale_factor.model_dump()
    needed = max(p.batch * (p.length + 512) for p in points)
    if about["cache_tokens"] < needed:
        raise ValueError(
            f"all requests of a point must be in the cache at once, which takes {needed} tokens, but it has "
            f"{about['cache_tokens']}; ask for shorter points or smaller batches"
        )
    warm: set[int] = set()
    done: set[tuple[int, int]] = set()
    for wanted in points:
        if chosen.backend != "armed" and (wanted.length, wanted.batch) in done:
            continue  # nothing is skipped, so the prompt does not matter
        done.add((wanted.length, wanted.batch))
        prompts = wanted.prompts(config["vocab_size"])
        if wanted.length not in warm:
            # Kernels are compiled, and tuned, in the first run of a shape.
            served.run(llm, prompts[:1], 2)
            warm.add(wanted.length)
        served.clear_counts(llm)
        passes: list[served.Pass] = []
        began = time.perf_counter()
        while not passes or (
            len(passes) < REPEATS and time.perf_counter() - began < options.enough
        ):
            passes.append(served.run(llm, prompts, options.steps))
        firsts = [max(p.first_ms) for p in passes]
        steps = [statistics.median(p.step_ms) for p in passes]
        row = about | {
            "length": wanted.length, "batch": wanted.batch, "planned_sparsity": wanted.sparsity,
            "sparsity": rounded(served.sparsity(llm)),
            "ttft_ms": round(statistics.median(firsts), 3), "tpot_ms": round(statistics.median(steps), 4),
            "mean_ttft_ms": round(statistics.median(statistics.mean(p.first_ms) for p in passes), 3),
            "ttft_each_ms": [round(x, 3) for x in firsts], "tpot_each_ms": [round(x, 4) for x in steps],
            "steps": options.steps, "tokens": [tokens[:8] for tokens in passes[0].tokens],
        }  # fmt: skip
        if wanted.length * wanted.batch <= options.profile:
            row["kernels_ms"] = kernels(
                lambda prompts=prompts: served.run(llm, prompts, options.steps)
            )
        say(
            f"{chosen} {wanted}: first token {row['ttft_ms']:.1f} ms, per token {row['tpot_ms']:.3f} ms, "
            f"skipped {row['sparsity']}, passes {row['ttft_each_ms']} {row['tpot_each_ms']}"
        )
        print(json.dumps(row), flush=True)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file_:
                file_.write(json.dumps(row) + "\n")
    return len(done)


def kernels(run: Callable[[], Any]) -> dict[str, float]:
    """The device's longest kernels in one pass, by name [ms]."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    return {row.key: round(row.self_device_time_total / 1000, 3) for row in rows[:12]}


def rounded(shares: dict[str, float | None]) -> dict[str, float]:
    """Without phases in which nothing was counted."""
    return {phase: round(share, 4) for phase, share in shares.items() if share is not None}


def table(rows: list[Row]) -> str:
    """Rows as Markdown; ratios are to `stock` rows of the same work: vLLM's default, and the fastest."""
    head = ["tokens", "batch", "engine", "page", "skipped: prefill", "decode"]
    for name in ("first token", "per token"):
        head += [f"{name} [ms]", f"to stock:{DEFAULT}", "to fastest stock"]
    lines = [head, ["---:", "---:", "---", *["---:"] * (len(head) - 3)]]
    for row in sorted(rows, key=lambda row: (row["length"], row["batch"])):
        peers = [
            peer for peer in rows
            if peer["backend"] == "stock" and all(peer[key] == row[key] for key in ("length", "batch"))
        ]  # fmt: skip
        default = [peer for peer in peers if peer["block"] == DEFAULT]
        cells = [
            f"{row['sparsity'][phase]:.1%}" if phase in row["sparsity"] else "–"
            for phase in ("prefill", "decode")
        ]
        for key, form in (("ttft_ms", ".1f"), ("tpot_ms", ".3f")):
            cells.append(f"{row[key]:{form}}")
            for stock in (default, peers):
                best = min((peer[key] for peer in stock), default=None)
                cells.append(f"{best / row[key]:.3f}×" if best else "–")
        lines.append(
            [str(row["length"]), str(row["batch"]), row["backend"], str(row["block"]), *cells]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def timed(options: argparse.Namespace) -> int:
    """Runs `time`; 0: every engine gave its rows."""
    done = [
        in_own_process(time_run, chosen, points, options)
        for settings, points in grouped(options.work)
        for chosen in settings
    ]
    if options.output is not None and options.output.exists():
        lines = options.output.read_text(encoding="utf-8").splitlines()
        say(table([json.loads(line) for line in lines]))
    return int(not all(done))


def in_own_process(function: Callable[..., Any], *given: Any) -> Any:
    """What a function returns in a new process that has imported vLLM already; None: it failed there."""
    import served  # noqa: F401  every process forks with it

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        try:
            there.send(function(*given))
        except BaseException:
            traceback.print_exc()
            there.send(None)
        sys.stderr.flush()
        os._exit(
            0
        )  # engines that share a process leave memory behind; this one has nothing to tidy up

    process = context.Process(target=work)
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:  # it died
        result = None
    process.join()
    return result


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs one of `gate`, `soak`, `stall` and `time`.

    Args:
        arguments: command line; None: `sys.argv`.

    Returns:
        0 done, 1 runs disagree or an engine failed, 2 the input is wrong.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("gate", "soak", "stall", "time"))
    parser.add_argument(
        "work", type=word, nargs="+", metavar="BACKEND:BLOCK or LENGTHxBATCH@SPARSITY"
    )
    parser.add_argument("--requests", type=int, default=1000, help="of `soak`")
    parser.add_argument("--small", action="store_true", help="time the small model")
    parser.add_argument("--dtype", help="default: bfloat16 for `time`, else float16")
    parser.add_argument("--device", default="cuda", help="as it is named in rows: cuda, cpu")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="most tokens of a step")
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a pass")
    parser.add_argument("--enough", type=float, default=ENOUGH_S, help="repeat for so long [s]")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="TOKENS",
        help="also one pass under the profiler, of points that have at most so many tokens in all",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="rows are added to this file")
    parser.add_argument("--commit", default=provenance.commit())
    options = parser.parse_args(arguments)
    if isinstance(options.work[0], Point):
        parser.error(f"a setting must come first, as stock:16, but got `{options.work[0]}`")
    if options.what == "time" and not all(points for _, points in grouped(options.work)):
        parser.error("`time` needs points behind the last setting, as 65536x1@0.75")
    if options.what != "time" and any(points for _, points in grouped(options.work)):
        parser.error(f"`{options.what}` takes settings only, as stock:16")
    return {"gate": gate, "soak": soak, "stall": stall, "time": timed}[options.what](options)


if __name__ == "__main__":
    sys.exit(main())
