"""The same prompt at a server and at a dense one: time and log-probabilities.

What differs is evidence, not proof: other kernels round differently and take another time too.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from statistics import median

from calibrate.errors import WorkFailed
from calibrate.serving.client import Completion, Server
from calibrate.terminal import Table

# Log-probabilities that differ by less are equal but for the rounding of float32 [nats].
ROUNDING = 1e-4


@dataclass(frozen=True)
class Comparison:
    """The same prompt at this server and at a dense one, several times in turn.

    Attributes:
        url: the dense server.
        repeats: how many times.
        first_token_s: median time to the first token, here and there [s].
        total_s: median time of the whole answer, here and there [s].
        faster: every first token came earlier here than every one there.
        tokens_compared: tokens up to the first that differs, over all repeats.
        tokens: tokens of the answers.
        mean_difference: of the log-probabilities of those tokens [nats].
        largest_difference: likewise [nats].
        noise: largest difference between two answers of the dense server to one prompt [nats].
        differs: more than that noise and rounding explain.
    """

    url: str
    repeats: int
    first_token_s: tuple[float, float]
    total_s: tuple[float, float]
    faster: bool
    tokens_compared: int
    tokens: int
    mean_difference: float
    largest_difference: float
    noise: float
    differs: bool

    @property
    def reading(self) -> str:
        """What this is evidence of, in a sentence."""
        if self.faster and self.differs:
            return "faster and with other log-probabilities: it likely skips, or runs other kernels"
        if self.differs:
            return (
                "other log-probabilities, but not faster: it may skip where that saves no time, or only "
                "round differently"
            )
        if self.faster:
            return "faster with the same log-probabilities: other kernels, or skipped tiles that held nothing"
        return "no sign of skipping on this prompt"

    def to_terminal(self, url: str) -> Table:
        """As a table; `url` is the server here."""
        rows = [
            [name, f"{here:.3f} s", f"{there:.3f} s", f"{there / here:.2f}×"]
            for name, (here, there) in (
                ("first token", self.first_token_s),
                ("whole answer", self.total_s),
            )
        ]
        return Table(
            f"The same prompt at {url} and at {self.url}, median of {self.repeats}",
            ("time", "here", "dense", "dense / here"),
            rows,
            notes=(
                f"log-probabilities of {self.tokens_compared} of {self.tokens} tokens, up to the first other "
                f"one: mean difference {self.mean_difference:.2g}, largest {self.largest_difference:.2g} "
                f"nats; the dense server differs from itself by {self.noise:.2g}",
                self.reading,
            ),
        )


def compare(server: Server, dense: Server, prompt: str, tokens: int, repeats: int) -> Comparison:
    """Asks both in turn, the dense server twice, so that its own noise is known.

    Args:
        server: whom to judge.
        dense: the dense server.
        prompt: what to ask.
        tokens: longest answer [tokens].
        repeats: how many times both answer.

    Raises:
        UserError: the dense server does not answer, or one refuses the request.
        WorkFailed: one fails, or gives no log-probabilities.
    """
    # A prompt that was seen before is not computed again: where both servers take a salt it is new to the
    # prefix cache, elsewhere a first line makes it new.
    names = {one: one.model() for one in (server, dense)}
    salted = all(_takes_salt(one) for one in (server, dense))
    here: list[Completion] = []
    there: list[Completion] = []
    differences: list[float] = []
    noise: list[float] = []
    equal = noise_equal = True
    for repeat in range(repeats + 1):
        # Both read the same text; the dense server twice, whose second time is not used, only its numbers.
        text = prompt if salted else f"[{secrets.token_hex(8)}]\n{prompt}"

        def ask(one: Server, text: str = text) -> Completion:
            more = {"cache_salt": secrets.token_hex(8)} if salted else {}
            return one.complete(names[one], text, tokens, logprobs=True, **more)

        if repeat % 2:
            mine, theirs = ask(server), ask(dense)
        else:
            theirs, mine = ask(dense), ask(server)
        if repeat == 0:
            continue  # the first request of a server compiles, and warms caches
        again = ask(dense)
        here.append(mine)
        there.append(theirs)
        shared, same = _differences(mine, theirs)
        differences += shared
        equal &= same
        own, same = _differences(again, theirs)
        noise += own
        noise_equal &= same
    if not all(answer.logprobs for answer in (*here, *there)):
        raise WorkFailed("a server gave no log-probabilities, so that nothing can be compared")
    largest, own_largest = max(differences, default=0.0), max(noise, default=0.0)
    return Comparison(
        url=dense.url,
        repeats=repeats,
        first_token_s=(_median(here, "first_token_s"), _median(there, "first_token_s")),
        total_s=(_median(here, "total_s"), _median(there, "total_s")),
        faster=max(answer.first_token_s for answer in here)
        < min(answer.first_token_s for answer in there),
        tokens_compared=len(differences),
        tokens=sum(len(answer.tokens) for answer in there),
        mean_difference=sum(differences) / max(len(differences), 1),
        largest_difference=largest,
        noise=own_largest,
        differs=(not equal and noise_equal) or largest > max(2 * own_largest, ROUNDING),
    )


def _takes_salt(server: Server) -> bool:
    return any(sample.name.startswith("vllm:") for sample in server.metrics() or ())


def _median(answers: list[Completion], what: str) -> float:
    return float(median(getattr(answer, what) for answer in answers))


def _differences(one: Completion, other: Completion) -> tuple[list[float], bool]:
    """Differences of log-probabilities up to the first other token, and whether all tokens are equal."""
    found: list[float] = []
    for mine, theirs, p, q in zip(
        one.tokens, other.tokens, one.logprobs, other.logprobs, strict=False
    ):
        if mine != theirs:
            return found, False
        found.append(abs(p - q))
    return found, len(one.tokens) == len(other.tokens)
