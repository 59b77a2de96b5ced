"""Runs every architecture of `architectures.py` inside `applied` at scale factor 0, and through capture.

Nothing may change: an attention layer either gives the model's own output up to rounding, or is named
and left alone. `python tests/sweep.py` writes what was found to `architectures.md` beside the adapter.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from architectures import HEADS, NO_STEPS, NOT_RUN, architectures, build

from calibrate.model.forward import forward
from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from calibrate.schema import GeometryConfig
from calibrate.statistics import capture
from skip_softmax import applied
from skip_softmax.api import attention
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.huggingface.layers import Layer, inspect_layers

PAGE = Path(__file__).resolve().parent.parent / "kernels/skip_softmax/huggingface/architectures.md"
PROMPT, PADDING = 48, 7  # tokens
STEPS = (1, 8, 1)  # tokens of the calls that follow the prompt: the second is a chunk, or a draft
TILES = {"prefill": {"tile_q": 16, "tile_kv": 16}, "decode": {"tile_kv": 16}}
LOUDNESS = 4.0  # of weights: a model as initialised attends to all tokens alike, and hides mistakes
ROUNDING = 10.0  # ours may differ by so many times what the model's own two attentions do
FINEST, COARSEST = 1e-6, 1e-4  # limits of that tolerance, relative to the largest logit


@dataclass(frozen=True)
class Row:
    """What the sweep found for one architecture.

    Attributes:
        name: model class.
        verdict: `equal` (all layers are ours), `partly` (some are the model's own), `own` (all are),
            `refused` or `not run`.
        note: which layers are left alone and why, or why the model is refused or was not run.
    """

    name: str
    verdict: str
    note: str


def tokens(count: int, seed: int, batch: int = 1) -> torch.Tensor:
    """Random text tokens [batch, count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 250, (batch, count), generator=generator)


def logits(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits of a prefill, of calls with its cache, and of a left-padded batch with one step."""

    name = type(model).__name__

    def call(ids: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None) -> Any:
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        return model(**{key: value for key, value in given.items() if value is not None})

    found = {}
    torch.manual_seed(0)  # some start from noise
    out = call(tokens(PROMPT, 0))
    found["prefill"] = out.logits
    cache = None if name in NO_STEPS else getattr(out, "past_key_values", None)
    for step, count in enumerate(STEPS if cache is not None else ()):
        out = call(tokens(count, step + 1), None, cache)
        found[f"step {step}"] = out.logits
        cache = out.past_key_values
    mask = torch.ones(2, PROMPT + 1, dtype=torch.long)
    mask[0, :PADDING] = 0
    out = call(tokens(PROMPT, 5, 2), mask[:, :-1])
    found["padded"] = torch.cat([out.logits[0, PADDING:], out.logits[1]])
    if cache is not None:
        cache = out.past_key_values
        found["padded step"] = call(tokens(1, 6, 2), mask, cache).logits
    if model._can_compile_fullgraph and name not in NO_STEPS:
        cache = transformers.StaticCache(config=model.config, max_cache_len=2 * PROMPT)
        out = call(tokens(PROMPT, 0), None, cache)
        found["static"] = out.logits
        found["static step"] = call(tokens(1, 1), None, cache).logits
    return found


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of two runs of a model, each relative to its largest logit."""
    return {
        key: float((one[key] - value).abs().max() / value.abs().max())
        for key, value in other.items()
    }


@torch.no_grad()
def sweep(name: str) -> Row:
    """Compares one architecture with itself.

    Raises:
        AssertionError: it gives other logits than without us, or a layer is left alone unsaid.
    """
    if name in NOT_RUN:
        return Row(name, "not run", NOT_RUN[name])
    model = build(name)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(LOUDNESS)
    try:
        layers = inspect_layers(model)
    except ValueError as error:
        any_file = tiny.thresholds([Layer(0, "", HEADS, 2, 16, None, None)])
        with (
            pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"),
            applied(model, any_file),
        ):
            pass
        assert name in str(error), f"a refusal that is not ours: {error}"
        return Row(name, "refused", str(error).replace("|", "/"))
    own = logits(model)
    limit = tolerance(model, own)
    said = [layer.reason for layer in layers]
    if all(said):  # no file can be made for it
        with intercepted(model, never, left_alone=dict(enumerate(said))):
            found = difference(logits(model), own)
        assert not any(found.values()), f"not the model's own logits: {found}"
        return Row(name, "own", note_of(said))
    with warnings() as lines, applied(model, tiny.thresholds(layers)) as counts:
        found = difference(logits(model), own)
    assert max(found.values()) <= limit, (
        f"not the model's own logits: {found}, rounding is {limit:.1e}"
    )
    for line in lines:
        index = int(line.split()[1])
        said[index] = said[index] or line.split(": ", 1)[1]
    for phase in counts:
        if phase == "decode" and "step 0" not in own:
            continue
        unseen = (counts[phase].visited.sum(1) == 0).tolist()
        silent = [i for i, reason in enumerate(said) if unseen[i] and reason is None]
        assert not silent, f"layers {silent} are left alone in {phase}, and nothing says so"
    check_capture(LoadedModel(model, None, name, "0", layers, None, "float32"), limit)
    verdict = "equal" if not any(said) else "own" if all(said) else "partly"
    return Row(name, verdict, note_of(said))


def note_of(said: list[str | None]) -> str:
    """How many layers are left alone, by reason."""
    left = Counter(reason for reason in said if reason is not None)
    return "; ".join(f"{count} of {len(said)}: {reason}" for reason, count in left.items())


def never(call: LayerCall) -> torch.Tensor:
    """Stands where no call may arrive."""
    raise AssertionError(f"layer {call.layer} was said to be left alone")


def tolerance(model: transformers.PreTrainedModel, own: dict[str, torch.Tensor]) -> float:
    """Rounding of this model: how far its eager attention is from its SDPA attention."""
    if model.config._attn_implementation != "sdpa":
        return FINEST
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    before = [config._attn_implementation for config in configs]
    try:
        model.set_attn_implementation("eager")
        rounding = max(difference(logits(model), own).values())
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
    return min(max(ROUNDING * rounding, FINEST), COARSEST)


def check_capture(loaded: LoadedModel, limit: float) -> None:
    """Capture must return the model's own logits; the same pass with one value lost must not."""
    ids = [tuple(tokens(count, seed)[0].tolist()) for count, seed in ((PROMPT, 0), (sum(STEPS), 1))]
    prompt = Prompt("text", "calibration", PROMPT, *ids, False)
    geometry = GeometryConfig(**TILES)
    own = {"capture": forward(loaded, prompt)}
    statistics = capture.empty_statistics(loaded, geometry, [PROMPT])
    found = difference({"capture": capture.observe(loaded, prompt, statistics, geometry)}, own)
    assert found["capture"] <= limit, (
        f"capture changes the logits by {found}, rounding is {limit:.1e}"
    )

    def one_value_lost(call: LayerCall) -> torch.Tensor:
        v = call.v.clone()
        v[:, :, PROMPT - call.kv_start - 2] = 0  # in a window of rows whose logits are compared
        out: torch.Tensor = attention(call.q, call.k, v, **call.keywords)
        return out

    left_alone = {layer.index: layer.reason for layer in loaded.layers if layer.reason is not None}
    with intercepted(loaded.model, one_value_lost, left_alone=left_alone):
        planted = difference({"capture": forward(loaded, prompt)}, own)
    assert planted["capture"] > 2 * limit, f"a lost value changes the logits by {planted} only"


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What `skip_softmax` warns of inside the block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("skip_softmax")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


# The page.

VERDICTS = {
    "equal": "all layers are ours",
    "partly": "some layers keep the model's own attention, named with the reason",
    "own": "all layers keep the model's own attention, named with the reason: nothing to calibrate",
    "refused": "a `ValueError` says why, before the model runs",
    "not run": "this sweep cannot run it",
}


def page(rows: list[Row]) -> str:
    """The table as a Markdown page."""
    counts = Counter(row.verdict for row in rows)
    lines = [
        "# Which architectures of transformers run inside `applied`",
        "",
        f"Written by `python tests/sweep.py` and repeated by the tests, for the {len(rows)} model classes",
        f"of transformers {transformers.__version__}'s mappings for text generation, as tiny random models",
        "that are fed with text. At scale factor 0 nothing may change: inside `applied` a prefill, decode",
        "and chunks with a cache, a static cache and a left-padded batch, and the pass that captures",
        "statistics, give the model's own logits up to rounding: at most ten times what its own eager and",
        "SDPA attention differ by.",
        "",
        "| verdict | classes | meaning |",
        "|---|---|---|",
        *(f"| {verdict} | {counts[verdict]} | {text} |" for verdict, text in VERDICTS.items()),
        "",
        "Layers are counted in the tiny model, which has one of each kind.",
        "",
        "| model class | verdict | layers left alone, or why not |",
        "|---|---|---|",
        *(
            f"| {row.name} | {row.verdict} | {row.note} |"
            for row in sorted(rows, key=lambda row: row.name.lower())
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("skip_softmax").addHandler(logging.NullHandler())  # it stands on the page
    PAGE.write_text(page([sweep(name) for name in architectures()]), encoding="utf-8")
