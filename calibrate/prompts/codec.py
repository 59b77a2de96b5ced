"""Text as tokens and back, for tasks cut to an exact number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Codec:
    """A tokenizer seen as the plain tokens of a text, and what it puts in front of them.

    Attributes:
        prefix: the tokens in front (BOS), or nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        plain, full = self.encode("a"), list(tokenizer("a")["input_ids"])
        # Tokenizers may also add tokens behind (EOS, SEP); a prompt that goes on has none of them.
        starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        self.prefix: tuple[int, ...] = tuple(full[: next(starts, 0)])

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special ones."""
        options = {"add_special_tokens": False, "truncation": False, "verbose": False}
        return list(self._tokenizer(text, **options)["input_ids"])

    def split(self, prompt: str, after: str) -> tuple[list[int], list[int]]:
        """Parts the tokens of `prompt + after` at the last boundary that `prompt` alone has too."""
        whole, part = self.encode(prompt + after), self.encode(prompt)
        same = (i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b)
        cut = next(same, min(len(whole), len(part)))
        return whole[:cut], whole[cut:]
