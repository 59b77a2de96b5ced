"""Seeded prompts in the style of RULER (arXiv 2404.06654), as cloze: the answer is what comes next.

A task can be written at any size (units of filler), so that it can be fitted to a number of tokens.
One random stream is one prompt: its sizes differ only in how much filler they have. The counts of keys,
values and hops are RULER's. A new task is a function with `@_task` here and its name in `schema.Task`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from string import ascii_lowercase, ascii_uppercase

_LEAD_SENTENCES = 16
# RULER's counts of common words need 4K tokens; shorter lists have fewer of each [tokens].
_RULER_LENGTH = 4096
# The manual's words last for lists of this length; longer ones have more of each [tokens].
_WORDS_LAST = 16384
_CODE_WORDS_ASKED = 3

_ADJECTIVES = """
amber ancient bitter brisk broken calm clever copper crimson crooked dusty eager early faint frosty
gentle golden hollow humble icy idle ivory jolly keen late lively lonely lucky mellow misty narrow
noble odd pale plain polite proud quick quiet rapid rusty scarlet secret shallow sharp silent silver
simple sleepy smooth solid spare steady stormy sunny sweet tidy tiny velvet warm wild wise wooden
"""
_NOUNS = """
acorn anchor anvil apple arrow badger basket beacon bottle bridge button cabin candle canyon castle
cherry cloud comet compass cradle crane dagger desert dolphin drum eagle ember falcon feather fiddle
forest fountain garden glacier guitar hammer harbor island jacket kettle ladder lantern lemon lizard
marble meadow mirror monkey needle orchard otter paddle parrot pebble pepper pillow planet pocket
rabbit ribbon river saddle sparrow spider teapot thunder tiger tunnel turtle valley violin walnut
"""


@dataclass(frozen=True)
class Cloze:
    """One prompt as text, not yet cut to a number of tokens."""

    lead: str
    """Filler in front of `body`, ends in white space; its beginning is cut to reach a length."""
    body: str
    """All that the answer needs; ends just before the answer, without white space."""
    values: tuple[str, ...]
    """What is asked for, in order; each once."""

    @property
    def answer(self) -> str:
        """What comes next; begins with a space."""
        return f" {', '.join(self.values)}."


TASKS: dict[str, Callable[[Random, int, int], Cloze]] = {}
"""The built-in tasks by name: from a random stream, a length [tokens] and a size to a prompt."""


def _task(function: Callable[[Random, int, int], Cloze]) -> Callable[[Random, int, int], Cloze]:
    """Makes a function a built-in task, under its own name."""
    TASKS[function.__name__] = function
    return function


def write(task: str, stream: str, *, length: int, size: int) -> Cloze:
    """Writes one prompt of a built-in task.

    Args:
        task: one of `TASKS`.
        stream: name of the random stream; the same name gives the same prompt.
        length: length of the prompt [tokens]; RULER's word counts scale with it.
        size: how much filler the body holds [sentences, or words for the word tasks], at least 0.

    Returns:
        The prompt and its only correct answer.
    """
    return TASKS[task](Random(stream), length, size)


def manual() -> str:
    """Returns the text of Python's own manual topics: real English that every Python has."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


@cache
def _sentences() -> tuple[str, ...]:
    """The manual's sentences, in order, each once; code, tables and headings are left out."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", manual()))
    texts = (text for part in paragraphs for text in re.split(r"(?<=[.!?:])\s+(?=[A-Z\"])", part))
    whole = re.compile(r"[A-Z\"].{40,240}\.")
    return tuple(dict.fromkeys(text for text in texts if whole.fullmatch(text) and _is_prose(text)))


def _is_prose(text: str) -> bool:
    return sum(c.isalpha() or c == " " for c in text) > 0.88 * len(text)


@cache
def _words() -> tuple[str, ...]:
    """The manual's different words of 4 to 10 letters."""
    return tuple(dict.fromkeys(re.findall(r"(?<![\w'’])[a-z]{4,10}(?![\w'’])", manual())))


def _haystack(rng: Random, size: int) -> tuple[str, list[str]]:
    """A random window of the manual's sentences (around the end): a lead, and `size` sentences."""
    text = _sentences()
    start = rng.randrange(len(text))
    window = [text[(start + i) % len(text)] for i in range(_LEAD_SENTENCES + size)]
    return " ".join(window[:_LEAD_SENTENCES]), window[_LEAD_SENTENCES:]


def _hidden(rng: Random, size: int, statements: list[str]) -> tuple[str, str]:
    """Lead, and a haystack of `size` sentences with the statements at random depths, in order."""
    lead, hay = _haystack(rng, size)
    depths = sorted(rng.random() for _ in statements)
    for depth, statement in reversed(list(zip(depths, statements, strict=True))):
        hay.insert(int(depth * (size + 1)), statement)
    return lead + " ", " ".join(hay)


def _names(rng: Random, count: int) -> list[str]:
    pairs = [f"{first}-{second}" for first in _ADJECTIVES.split() for second in _NOUNS.split()]
    return rng.sample(pairs, count)


def _numbers(rng: Random, count: int, digits: int) -> list[str]:
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


@_task
def needle_single(rng: Random, _: int, size: int) -> Cloze:
    """One name and its number."""
    return _needle_keys(rng, size, keys=1, asked=1)


@_task
def needle_multikey(rng: Random, _: int, size: int) -> Cloze:
    """Four names with one number each; one is asked for."""
    return _needle_keys(rng, size, keys=4, asked=1)


@_task
def needle_multiquery(rng: Random, _: int, size: int) -> Cloze:
    """Four names with one number each; all are asked for."""
    return _needle_keys(rng, size, keys=4, asked=4)


def _needle_keys(rng: Random, size: int, *, keys: int, asked: int) -> Cloze:
    """`keys` names with one number each; the numbers of `asked` of them are asked for, in any order."""
    number_of = dict(zip(_names(rng, keys), _numbers(rng, keys, 7), strict=True))
    wanted = rng.sample(list(number_of), asked)
    statements = [f"The special magic number for {k} is {n}." for k, n in number_of.items()]
    lead, hay = _hidden(rng, size, statements)
    question = (
        f"The special magic number for {wanted[0]} is"
        if asked == 1
        else f"The special magic numbers for {_listed(wanted)} are"
    )
    return Cloze(lead, f"{hay}\n\n{question}", tuple(number_of[name] for name in wanted))


@_task
def needle_multivalue(rng: Random, _: int, size: int) -> Cloze:
    """One name with four numbers; all of them are asked for, in the order of the text."""
    (name,), numbers = _names(rng, 1), _numbers(rng, 4, 7)
    statements = [f"One of the special magic numbers for {name} is {n}." for n in numbers]
    lead, hay = _hidden(rng, size, statements)
    question = f"The special magic numbers for {name} are"
    return Cloze(lead, f"{hay}\n\n{question}", tuple(numbers))


@_task
def variable_tracking(rng: Random, _: int, size: int) -> Cloze:
    """A chain of five assignments; every variable that ends up with the first value is asked for."""
    digits = rng.sample("0123456789", 5)
    names = ["".join(rng.choices(ascii_uppercase, k=3)) + digit for digit in digits]
    (value,) = _numbers(rng, 1, 5)
    sources = [value, *names[:-1]]
    statements = [f"VAR {name} = {it}." for name, it in zip(names, sources, strict=True)]
    lead, hay = _hidden(rng, size, statements)
    question = f"The variables that are equal to {value} are VAR"
    return Cloze(lead, f"{hay}\n\n{question}", tuple(names))


@_task
def common_words(rng: Random, length: int, size: int) -> Cloze:
    """A numbered list: up to 10 words stand in it ten times as often as all others."""
    share = min(1.0, length / _RULER_LENGTH) * math.ceil(length / _WORDS_LAST)
    count = min(10, max(2, length // 100))
    rare = max(1, round(3 * share))
    often = max(4, round(30 * share))
    words = rng.sample(_words(), len(_words()))
    common, others = words[:count], words[count:]
    entries = common * often + [others[i // rare % len(others)] for i in range(size)]
    rng.shuffle(entries)
    common.sort(key=entries.index)
    lines = " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1))
    question = f"The {count} words that occur most often in the list are"
    return Cloze(_aside(rng), f"{lines}\n\n{question}", tuple(common))


@_task
def frequent_words(rng: Random, length: int, size: int) -> Cloze:
    """Coded words with Zipf counts (exponent 2); the first is noise, the next three are asked for."""
    codes = ("".join(rng.choices(ascii_lowercase, k=6)) for _ in range(max(8, length // 50)))
    words = ["...", *dict.fromkeys(codes)]
    # Shorter texts would leave two of the three with equal counts.
    total = 30 + size
    counts = [int(total / (math.pi**2 / 6) / rank**2) for rank in range(1, len(words) + 1)]
    counts[0] += total - sum(counts)
    last = _CODE_WORDS_ASKED
    # A tie with the last word asked would be a second right answer.
    counts[last + 1 :] = [min(n, counts[last] - 1) for n in counts[last + 1 :]]
    entries = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
    rng.shuffle(entries)
    question = "Leaving out the dots, the three words that occur most often in the text are"
    return Cloze(_aside(rng), f"{' '.join(entries)}\n\n{question}", tuple(words[1 : last + 1]))


def _aside(rng: Random) -> str:
    """A lead for texts that are not sentences."""
    return _haystack(rng, 0)[0] + "\n\n"
