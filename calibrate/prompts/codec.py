"""A built-in task cut to an exact number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from calibrate.errors import UserError
from calibrate.prompts.tasks import write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A generated prompt has as much filler as fits; this much may be left to its lead [tokens].
_ENOUGH = 32
# The seam between lead and body may tokenise a little differently than the body alone [tokens].
_SEAM = 4


class Codec:
    """A tokenizer seen as the plain tokens of a text, and what it puts in front of them.

    Attributes:
        prefix: the tokens in front (BOS), or nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> None:
        """Looks at what the tokenizer puts in front.

        Args:
            tokenizer: the model's.
            vocabulary: token ids that the model has, from 0 on; None: all.
        """
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        plain, full = self.encode("a"), list(tokenizer("a")["input_ids"])
        # Tokenizers may also add tokens behind (EOS, SEP); a prompt that continues must not have them.
        starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        self.prefix: tuple[int, ...] = tuple(full[: next(starts, 0)])

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special ones."""
        options = {"add_special_tokens": False, "truncation": False, "verbose": False}
        return list(self._tokenizer(text, **options)["input_ids"])

    def check(self, where: str, ids: tuple[int, ...]) -> None:
        """Refuses tokens that the model has no embedding for.

        Raises:
            UserError: there is one; the message names it.
        """
        largest = max(ids, default=0)
        if self._vocabulary is not None and largest >= self._vocabulary:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"{where}: token ids must be below {self._vocabulary}, the size of the model's vocabulary, "
                f"but {token!r} is {largest}; remove it from the text, or give the model's own tokenizer or "
                "a model whose embeddings were resized for it"
            )

    def split(self, prompt: str, after: str) -> tuple[list[int], list[int]]:
        """Parts the tokens of `prompt + after` at the last boundary that `prompt` alone has too."""
        whole, part = self.encode(prompt + after), self.encode(prompt)
        same = (i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b)
        cut = next(same, min(len(whole), len(part)))
        return whole[:cut], whole[cut:]


def generate(
    task: str, stream: str, length: int, codec: Codec
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """Makes one prompt of a built-in task, with the largest body that fits and the end of its lead.

    Args:
        task: one of `TASKS`.
        stream: name of the random stream; the same name gives the same prompt.
        length: how long the prompt is, exactly [tokens].
        codec: the tokenizer.

    Returns:
        The prompt, all tokens of its answer, and the values that the answer lists.

    Raises:
        UserError: not even the task without filler fits.
    """
    room = length - len(codec.prefix)

    def tokens_at(size: int) -> int:
        return len(codec.encode(write(task, stream, length=length, size=size).body)) + _SEAM

    least = tokens_at(0)
    if least > room:
        raise UserError(
            f"`{task}` needs prompts of at least about {least + len(codec.prefix)} tokens, "
            f"but got a length of {length}; raise `prompts.lengths`"
        )
    size = _largest_size(tokens_at, least, room)
    cloze = write(task, stream, length=length, size=size)
    ids, after = codec.split(cloze.lead + cloze.body, cloze.answer)
    assert len(ids) >= room
    return (*codec.prefix, *ids[len(ids) - room :]), tuple(after), cloze.values


def _largest_size(tokens_at: Callable[[int], int], least: int, room: int) -> int:
    """Largest size whose tokens fit in `room`, or one that leaves at most `_ENOUGH` tokens free."""
    low, held, high = 0, least, room + 1
    # A sentence has about 30 tokens, a word 4: the first guess is too small, and gives the slope.
    size = room // 64
    while high - low > 1 and room - held > _ENOUGH:
        size = min(max(size, low + 1), high - 1)
        tokens = tokens_at(size)
        if tokens <= room:
            low, held = size, tokens
        else:
            high = size
        aim = room - _ENOUGH // 2 - tokens
        size += math.floor(aim * size / max(1, tokens - least))
    return low
