"""Prompts by task and length: three sets of token ids that never share a prompt.

Every prompt is a cloze: a text that stops where a reference answer, or the text's own continuation,
comes next. Chat templates are not applied: a base model and its chat version see the same tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from calibrate.errors import UserError
from calibrate.prompts.codec import Codec, generate
from calibrate.prompts.rows import name_of, read_text, rows, texts
from calibrate.prompts.tasks import TASKS, manual
from calibrate.schema import PromptsConfig, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Split = Literal["calibration", "search", "heldout"]

SPLITS: tuple[Split, ...] = ("calibration", "search", "heldout")
"""The three sets, in the order in which they are made."""
# How many rows are looked at, at most; and how many per prompt before lengths may be uneven.
_MAX_ROWS = 100_000
_PATIENCE = 20

_Tokens = tuple[int, ...]
_Row = tuple[_Tokens, _Tokens, tuple[str, ...]]
"""Prompt, continuation and answers."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids, and what comes after it."""

    task: str
    """`Source.task`."""
    split: Split
    length: int
    """Its length bin, one of `PromptsConfig.lengths` [tokens]."""
    ids: _Tokens
    """The prompt, with the tokens that the tokenizer puts in front (BOS)."""
    continuation: _Tokens
    """Teacher-forced tokens after the prompt, 1 to `decode_tokens` of them."""
    has_answer: bool
    """Whether `continuation` is a reference answer; else it is the text's own."""
    answers: tuple[str, ...] = ()
    """The values that the whole reference answer lists; empty: there is none, or an earlier version
    did not keep them."""

    @property
    def key(self) -> str:
        """Identity of the prompt: SHA-256 over ids and continuation, in hex."""
        return _digest((self.ids, self.continuation))

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes an equal prompt."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Prompt:
        """The prompt that `to_json` wrote."""
        lists = {key: tuple(row.get(key, ())) for key in ("ids", "continuation", "answers")}
        return cls(**{**row, **lists})


def build(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_context: int | None,
    vocabulary: int | None = None,
    memory: Sequence[dict[str, Any]] | None = None,
    generate: int | None = None,
) -> dict[Split, list[Prompt]]:
    """Builds the calibration, search and held-out prompts.

    The prompts of a set are shared out over sources by weight and over lengths evenly, so that any
    first part of a list is balanced too. Generators and `text` give exactly the lengths asked; rows
    of `file` and `hub` keep their own length and go to the nearest bin (log2), within a factor √2.
    An answer longer than `decode_tokens` is cut; a prompt never is. A generated prompt depends on
    the seed, its source's position, its set and its position in it, never on the size of a set.
    The sets share no prompt, window or row; all generated haystacks are sentences of one manual.

    Args:
        config: sources, lengths and counts.
        tokenizer: the model's tokenizer.
        seed: of every random choice, at least 0.
        max_context: longest prompt plus continuation that the model takes [tokens]; None: no limit.
        vocabulary: token ids that the model has, from 0 on; None: those that the tokenizer gives.
        memory: the rows of a source `task: memory`.
        generate: how many tokens the model may write after a prompt with an answer; they must fit into its
            context too. None: nothing is generated.

    Returns:
        The prompts of each set, exactly as many as `config` says.

    Raises:
        UserError: a source is missing, broken, too short or too long, or has a token that the model lacks;
            the message says where.
    """
    codec = Codec(tokenizer, vocabulary)
    setup = _Setup(config, codec, seed, max_context, memory, generate or 0)
    _check_sources(setup)
    counts = (config.calibration, config.search, config.heldout)
    plan = {split: _shares(config, count) for split, count in zip(SPLITS, counts, strict=True)}
    made = {
        index: iter(_MAKERS.get(source.task, _generated)(setup, index, _slots(plan, index)))
        for index, source in enumerate(config.sources)
    }
    sets = {split: [next(made[index]) for index, _ in plan[split]] for split in SPLITS}
    _check_distinct(sets)
    return sets


def with_answer(config: PromptsConfig, count: int) -> int:
    """How many of a set of `count` prompts have a reference answer."""
    return sum(config.sources[index].has_answer for index, _ in _shares(config, count))


@dataclass(frozen=True)
class _Slot:
    """A prompt to be made by one source: the `number`-th of that source in its set."""

    split: Split
    number: int
    length: int


@dataclass(frozen=True)
class _Setup:
    """What every source needs to know."""

    config: PromptsConfig
    codec: Codec
    seed: int
    max_context: int | None
    memory: Sequence[dict[str, Any]] | None
    generate: int

    def room(self, source: Source, after: int) -> tuple[int, str]:
        """What must fit behind a prompt [tokens], and what it is called: the longer of two runs."""
        if source.has_answer and self.generate > after:
            return self.generate, "generated tokens"
        return after, "continuation"


def _shares(config: PromptsConfig, count: int) -> list[tuple[int, int]]:
    """Source and length of each prompt of a set: always whichever is furthest behind its share."""
    weights = [source.weight for source in config.sources]
    taken: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    cells: Counter[tuple[int, int]] = Counter()
    plan = []
    for made in range(1, count + 1):
        behind = [w / sum(weights) * made - taken[i] for i, w in enumerate(weights)]
        index = behind.index(max(behind))
        length = min(config.lengths, key=lambda n: (cells[index, n], lengths[n]))
        taken[index] += 1
        lengths[length] += 1
        cells[index, length] += 1
        plan.append((index, length))
    return plan


def _slots(plan: dict[Split, list[tuple[int, int]]], index: int) -> list[_Slot]:
    return [
        _Slot(split, number, length)
        for split, shares in plan.items()
        for number, length in enumerate(length for i, length in shares if i == index)
    ]


def _check_sources(setup: _Setup) -> None:
    config, read = setup.config, Counter[tuple[str | None, ...]]()
    for source in config.sources:
        if _MAKERS.get(source.task) is not _from_rows:
            _check_context(setup, source)
        if source.task not in TASKS:
            read[source.task, source.path, source.dataset, source.subset, source.split] += 1
    for (task, path, dataset, *_), times in read.items():
        if times > 1:
            raise UserError(
                f"no two sources may read the same text, but {times} of `task: {task}` read "
                f"{path or dataset or 'the manual'}; give that source once, with a larger `weight`"
            )


def _check_context(setup: _Setup, source: Source) -> None:
    length, context = max(setup.config.lengths), setup.max_context
    after, _ = setup.room(source, setup.config.decode_tokens)
    name = "decode_tokens" if after == setup.config.decode_tokens else "validation.generate"
    if context is not None and length + after > context:
        raise UserError(
            f"`length + {name} <= context` must hold, but got {length} + {after} > {context} for model "
            "context; lower `prompts.lengths`"
        )


def _check_distinct(sets: dict[Split, list[Prompt]]) -> None:
    seen: dict[str, Prompt] = {}
    for prompt in (prompt for split in SPLITS for prompt in sets[split]):
        # Equal ids are one prompt, whatever comes after; so the keys are distinct too.
        other = seen.setdefault(_digest(prompt.ids), prompt)
        if other is not prompt:
            raise UserError(
                f"prompts must differ from each other, but `{other.task}` ({other.split}) and "
                f"`{prompt.task}` ({prompt.split}) gave the same {len(prompt.ids)} tokens; "
                "give sources that do not repeat themselves, or raise `prompts.lengths`"
            )


def _digest(tokens: _Tokens | tuple[_Tokens, ...]) -> str:
    return hashlib.sha256(repr(tokens).encode()).hexdigest()


def _generated(setup: _Setup, index: int, slots: list[_Slot]) -> Iterator[Prompt]:
    """One random stream per prompt, so that no prompt depends on another."""
    task = setup.config.sources[index].task
    for slot in slots:
        stream = f"{setup.seed}/{index}/{slot.split}/{slot.number}"
        ids, after, answers = generate(task, stream, slot.length, setup.codec)
        after = after[: setup.config.decode_tokens]
        setup.codec.check(f"`task: {task}`", (*ids, *after))
        yield Prompt(task, slot.split, slot.length, ids, after, has_answer=True, answers=answers)


def _windows(setup: _Setup, index: int, slots: list[_Slot]) -> Iterator[Prompt]:
    """Disjoint windows of a text, in random order and with random gaps."""
    task, path = setup.config.sources[index].task, setup.config.sources[index].path
    tokens = setup.codec.encode(manual() if path is None else read_text(path))
    prefix, decode = setup.codec.prefix, setup.config.decode_tokens
    sizes = [slot.length - len(prefix) + decode for slot in slots]
    spare = len(tokens) - sum(sizes)
    if spare < 0:
        raise UserError(
            f"{path or 'pydoc_data.topics'}: {len(slots)} windows that do not overlap need "
            f"{sum(sizes)} tokens, but the text has {len(tokens)}; give a longer text, "
            "or lower `prompts.lengths` or the number of prompts"
        )
    rng = Random(f"{setup.seed}/{index}/windows")
    gaps = sorted(rng.randrange(spare + 1) for _ in slots)
    starts, used = {}, 0
    for place, gap in zip(rng.sample(range(len(slots)), len(slots)), gaps, strict=True):
        starts[place] = used + gap
        used += sizes[place]
    for place, slot in enumerate(slots):
        window = tuple(tokens[starts[place] : starts[place] + sizes[place]])
        ids, after = prefix + window[:-decode], window[-decode:]
        setup.codec.check(path or "pydoc_data.topics", (*ids, *after))
        yield Prompt(task, slot.split, slot.length, ids, after, has_answer=False)


def _from_rows(setup: _Setup, index: int, slots: list[_Slot]) -> Iterator[Prompt]:
    """Rows of a file or a hub dataset; a slot gets a row of its length as long as there is one."""
    source = setup.config.sources[index]
    pools = _pools(setup, source, slots)
    rng = Random(f"{setup.seed}/{index}/rows")
    for pool in pools.values():
        rng.shuffle(pool)
    for slot in slots:
        length = slot.length if pools[slot.length] else max(pools, key=lambda n: len(pools[n]))
        ids, after, answers = pools[length].pop()
        yield Prompt(source.task, slot.split, length, ids, after, source.has_answer, answers)


def _pools(setup: _Setup, source: Source, slots: list[_Slot]) -> dict[int, list[_Row]]:
    """Different rows by length bin: enough for every slot, of the lengths wanted if they exist."""
    lengths, wanted = setup.config.lengths, Counter(slot.length for slot in slots)
    pools: dict[int, list[_Row]] = {length: [] for length in lengths}
    seen: set[str] = set()
    read = outside = repeated = 0
    full = False
    for where, row in islice(rows(source, setup.memory), _MAX_ROWS):
        if full and source.task == "hub":
            break
        read += 1
        if source.task == "hub" and not row.get(source.prompt_field, True):
            outside += 1  # a public set may hold empty rows; a user's own file may not
            continue
        prompt, answer = texts(source, where, row)
        if full:
            # A broken row is an error wherever it stands in a user's own file.
            continue
        ids, after = _row_tokens(setup, where, prompt, answer)
        answers = () if answer is None else (answer.strip(),)
        if source.task != "hub":
            _check_row(setup, source, where, len(ids), len(after))
        if not after or not _fits(setup, source, ids, after) or not _within(lengths, len(ids)):
            outside += 1
        elif (digest := _digest(ids)) in seen:
            repeated += 1
        else:
            seen.add(digest)
            pools[lengths[nearest_bin(len(ids), lengths)]].append((ids, after, answers))
        enough = len(seen) >= len(slots)
        balanced = all(len(pools[n]) >= wanted[n] for n in lengths)
        full = enough and (balanced or read >= _PATIENCE * len(slots))
    if not read:
        raise UserError(f"{name_of(source)}: there are no rows; give a file or a split with rows")
    if len(seen) < len(slots):
        raise UserError(
            f"{name_of(source)}: {len(slots)} different prompts are needed, but only {len(seen)} of "
            f"{read} rows can be used: {outside} lie outside the length bins {list(lengths)} "
            f"(each reaches a factor √2), {repeated} repeat another; "
            "give more rows, change `prompts.lengths`, or lower the number of prompts"
        )
    return pools


def _within(lengths: Sequence[int], tokens: int) -> bool:
    """Whether a length bin reaches so far: each reaches a factor of √2."""
    return min(lengths) / math.sqrt(2) <= tokens <= max(lengths) * math.sqrt(2)


def nearest_bin(tokens: int, lengths: Sequence[int]) -> int:
    """Index of the length bin that is nearest in log2."""
    return min(range(len(lengths)), key=lambda index: abs(math.log2(tokens / lengths[index])))


def _row_tokens(
    setup: _Setup, where: str, prompt: str, answer: str | None
) -> tuple[_Tokens, _Tokens]:
    """Prompt and continuation of a row; a text too short to have both has no continuation."""
    codec, decode = setup.codec, setup.config.decode_tokens
    if answer is None:
        tokens = codec.encode(prompt)
        ids, after = tokens[:-decode], tokens[-decode:] if len(tokens) > decode else []
    else:
        apart = prompt[-1].isspace() or answer[0].isspace()
        ids, after = codec.split(prompt, answer if apart else f" {answer}")
        if not after:
            raise UserError(f"{where}: the answer {answer!r} has no tokens; give a longer answer")
    ids, after = [*codec.prefix, *ids], after[:decode]
    codec.check(where, (*ids, *after))
    return tuple(ids), tuple(after)


def _fits(setup: _Setup, source: Source, ids: _Tokens, after: _Tokens) -> bool:
    room, _ = setup.room(source, len(after))
    return setup.max_context is None or len(ids) + room <= setup.max_context


def _check_row(setup: _Setup, source: Source, where: str, tokens: int, after: int) -> None:
    room, name = setup.room(source, after)
    if setup.max_context is not None and tokens + room > setup.max_context:
        raise UserError(
            f"{where}: `prompt + {name} <= context` must hold, but got "
            f"{tokens} + {room} > {setup.max_context} tokens; shorten the row or remove it"
        )


_MAKERS = {"text": _windows, "file": _from_rows, "hub": _from_rows, "memory": _from_rows}
