"""`calibrate probe`: what it says of servers whose answers are planted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, refused
from planted_server import INFO, WORDS, Planted, serving

from calibrate.errors import UserError, WorkFailed
from calibrate.serving import probe as probing
from calibrate.serving.client import Server, parse_metrics
from calibrate.serving.probe import probe

TILES = {("prefill", "0-7"): (400, 100), ("prefill", "8-15"): (400, 0), ("decode", "0-7"): (60, 45)}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def start() -> Iterator[Callable[..., Planted]]:
    """Starts servers that end with the test."""
    with ExitStack() as stack:
        yield lambda **planted: stack.enter_context(serving(Planted(**planted)))


def ours(**changes: Any) -> dict[str, Any]:
    return {"info": INFO, "per_request": TILES, **changes}


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("To be or", encoding="utf-8")
    return path


# The plug-in says it.


@pytest.mark.parametrize("late", [0, 2])
def test_counts_around_a_request_are_its_own(
    start: Callable[..., Planted], call: Callable[..., Result], prompt: Path, late: int
) -> None:
    # The server may count a request a moment after it has answered.
    server = start(**ours(late=late))
    result = call("probe", server.url, "--prompt", prompt, "--json")
    assert (result.code, result.stderr) == (0, ""), result
    found = json.loads(result.stdout)
    assert (found["skipping"], found["exact"], found["model"]) == ("on", True, "m")
    assert (found["prompt_tokens"], found["generated"]) == (10, len(WORDS))
    counts = {
        (row["phase"], row["layers"]): (row["visited"], row["skipped"]) for row in found["tiles"]
    }
    assert counts == TILES
    assert found["tiles"][0]["sparsity"] == 0.25
    assert found["serving"] == {
        "sha256": "ab" * 32,
        "verdict": "passed",
        "armed_layers": 3,
        "min_kv_len": {"prefill": 4, "decode": 6},
    }
    (asked,) = server.requests
    assert asked["prompt"] == "To be or" and asked["temperature"] == 0
    # The prefix cache must not have it, and the first request with log-probabilities compiles in a server.
    assert asked["cache_salt"] and "logprobs" not in asked


def test_the_table_has_a_line_for_each_phase(
    start: Callable[..., Planted], call: Callable[..., Result], prompt: Path
) -> None:
    result = call("probe", start(**ours()).url, "--prompt", prompt)
    assert result.code == 0, result
    lines = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert ["prefill", "all", "800", "100", "12.5", "%"] in lines
    assert ["decode", "all", "60", "45", "75.0", "%"] in lines
    assert "ab" * 32 in result.stdout


def test_without_a_prompt_nothing_is_sent(
    start: Callable[..., Planted], call: Callable[..., Result]
) -> None:
    server = start(**ours())
    result = call("probe", f"{server.url}/v1", "--json")
    found = json.loads(result.stdout)
    assert (result.code, server.requests) == (0, [])
    assert (found["exact"], found["prompt_tokens"]) == (None, None)
    assert [row["visited"] for row in found["tiles"]] == [1_000_000] * 3


def test_a_file_of_zeros_is_off(start: Callable[..., Planted]) -> None:
    server = start(**ours(info={**INFO, "armed_layers": "0"}))
    assert probe(Server(server.url)).skipping == "off"


@pytest.mark.parametrize(
    ("planted", "note"),
    [
        ({"others": 3}, "computed 10 prompt and 7 generated tokens, this request had 10 and 4"),
        ({"running": 1}, "probe it while it is idle"),
        ({"silent": 1}, "1 workers did not answer"),
    ],
    ids=["other requests", "one still runs", "a worker is silent"],
)
def test_counts_that_are_not_of_this_request_alone_are_no_answer(
    start: Callable[..., Planted],
    call: Callable[..., Result],
    prompt: Path,
    planted: dict[str, int],
    note: str,
) -> None:
    result = call("probe", start(**ours(**planted)).url, "--prompt", prompt, "--json")
    assert (result.code, json.loads(result.stdout)["exact"]) == (1, False)
    assert note in result.stderr and "not known exactly" in result.stderr


def test_a_server_that_never_counts_the_request_is_not_exact(
    start: Callable[..., Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "SETTLE", 0.2)
    found = probe(Server(start(**ours(late=1000)).url), "To be or")
    assert found.exact is False
    assert "computed 0 prompt and 0 generated tokens" in found.notes[0]


@pytest.mark.parametrize(
    ("tokens", "noted"), [(10, []), (3, ["prefill"]), (1, ["prefill", "decode"])]
)
def test_a_prompt_below_the_file_s_floor_is_named(
    start: Callable[..., Planted], tokens: int, noted: list[str]
) -> None:
    # The floors are 4 and 6 tokens; the answer has 4.
    found = probe(Server(start(**ours(prompt_tokens=tokens)).url), "To be or")
    assert [note.split()[0] for note in found.notes] == noted


def test_the_served_file_is_compared_with_a_file(
    start: Callable[..., Planted], call: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "thresholds.yaml"
    file.write_text("format: skip-softmax/1\n")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    right = start(**ours(info={**INFO, "thresholds_sha256": sha256}))
    assert call("probe", right.url, "--thresholds", file).code == 0
    other = call("probe", start(**ours()).url, "--thresholds", file)
    assert other.code == 1 and f"not {sha256}" in other.stderr
    silent = call("probe", start().url, "--thresholds", file)
    assert silent.code == 1 and "does not say which thresholds file" in silent.stderr
    missing = call("probe", right.url, "--thresholds", tmp_path / "none.yaml")
    assert missing.code == 2 and "cannot be read" in missing.stderr


def test_another_version_of_the_plug_in_is_named(start: Callable[..., Planted]) -> None:
    with pytest.raises(WorkFailed, match="not of this version"):
        probe(Server(start(**ours(info={"verdict": "passed"})).url))


def test_workers_that_do_not_answer_are_named(start: Callable[..., Planted]) -> None:
    with pytest.raises(WorkFailed, match="none of its workers answers"):
        probe(Server(start(info={}, silent=2).url))


# Nobody says it.


@pytest.mark.parametrize("planted", [{}, {"counts": False}], ids=["other metrics", "no metrics"])
def test_one_server_without_the_plug_in_is_unknown(
    start: Callable[..., Planted],
    call: Callable[..., Result],
    prompt: Path,
    planted: dict[str, bool],
) -> None:
    result = call("probe", start(**planted).url, "--prompt", prompt, "--json")
    assert (result.code, json.loads(result.stdout)["skipping"]) == (1, "unknown")
    assert "its answers alone cannot show it" in result.stderr
    assert "--against URL" in result.stderr


SHIFTED = [-0.5, -0.3, -0.125, -1.0]  # 0.05 nats at the second of four tokens


@pytest.mark.parametrize(
    ("here", "dense", "differs", "faster", "reading"),
    [
        ({"logprobs": lambda _: SHIFTED}, {"delay": 0.08}, True, True, "likely skips"),
        ({"logprobs": lambda _: SHIFTED}, {}, True, False, "but not faster"),
        ({}, {"delay": 0.08}, False, True, "faster with the same"),
        ({}, {}, False, False, "no sign of skipping"),
        ({"words": ["to", "be", "and", "not"]}, {}, True, False, "but not faster"),
        # A dense server that differs from itself by as much says nothing.
        (
            {"logprobs": lambda _: SHIFTED},
            {"logprobs": lambda n: [-0.5, -0.25 - 0.04 * (n % 2), -0.125, -1.0]},
            False,
            False,
            "no sign of skipping",
        ),
    ],
    ids=["both", "differs", "faster", "neither", "other words", "noise"],
)
def test_beside_a_dense_server_both_signs_are_told(
    start: Callable[..., Planted],
    call: Callable[..., Result],
    prompt: Path,
    here: dict[str, Any],
    dense: dict[str, Any],
    differs: bool,
    faster: bool,
    reading: str,
) -> None:
    server, other = start(**{"delay": 0.0 if faster else 0.03, **here}), start(**dense)
    result = call(
        "probe", server.url, "--prompt", prompt, "--against", other.url, "--repeats", "3", "--json"
    )
    assert (result.code, result.stderr) == (0, ""), result
    found = json.loads(result.stdout)
    assert found["skipping"] == "unknown"  # evidence is not proof
    compared = found["against"]
    assert (compared["differs"], compared["faster"]) == (differs, faster), compared
    assert reading in compared["reading"]
    assert compared["tokens"] == 12
    if "words" in here:
        assert compared["tokens_compared"] == 6  # up to the first other word
    elif here and not faster and "logprobs" not in dense:
        assert compared["largest_difference"] == pytest.approx(0.05)
        assert compared["mean_difference"] == pytest.approx(0.05 / 4)
    assert len(server.requests) == 4 and len(other.requests) == 7  # one to warm up; its noise
    salts = [asked["cache_salt"] for asked in (*server.requests, *other.requests)]
    assert len(set(salts)) == 11, (
        "every request is new to the cache, also where two servers share one"
    )


def test_where_a_salt_means_nothing_a_first_line_makes_the_prompt_new(
    start: Callable[..., Planted],
) -> None:
    server, other = start(counts=False), start()
    found = probe(Server(server.url), "To be or", against=Server(other.url), repeats=2)
    assert found.against is not None
    prompts = [asked["prompt"] for asked in server.requests]
    assert len(set(prompts)) == 3 and all(text.endswith("]\nTo be or") for text in prompts)
    assert all("cache_salt" not in asked for asked in server.requests)
    assert {asked["prompt"] for asked in other.requests} == set(prompts)


def test_the_plug_in_may_be_compared_too(
    start: Callable[..., Planted], call: Callable[..., Result], prompt: Path
) -> None:
    server, other = start(**ours()), start()
    result = call("probe", server.url, "--prompt", prompt, "--against", other.url, "--repeats", "2")
    assert result.code == 0, result
    assert "12.5 %" in result.stdout and "dense / here" in result.stdout


# Input that is wrong, and servers that fail.


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "8000"])
def test_an_address_is_a_url(call: Callable[..., Result], url: str) -> None:
    refused(call("probe", url), "a server's address is http:// or https://", repr(url))


def test_nobody_answers(call: Callable[..., Result]) -> None:
    with serving(Planted()) as gone:
        pass
    refused(call("probe", gone.url), f"nobody answers at {gone.url}", "is the server up")


def test_a_key_is_asked_for_and_sent(
    start: Callable[..., Planted], call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(**ours(key="secret"))
    refused(call("probe", server.url), "401", "--api-key")
    assert call("probe", server.url, "--api-key", "secret").code == 0
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert call("probe", server.url).code == 0


@pytest.mark.parametrize(
    ("planted", "error", "message"),
    [
        ({"status": 400}, UserError, "400, it refuses the request: .*the prompt is too long"),
        ({"status": 404}, UserError, "must speak the OpenAI interface with completions"),
        ({"status": 500}, WorkFailed, "answered 500"),
        ({"breaks": True}, WorkFailed, "broke off in the middle of an answer"),
        ({"words": [], "logprobs": lambda _: []}, WorkFailed, "without a single token"),
    ],
    ids=["refuses", "has none", "fails", "breaks off", "says nothing"],
)
def test_a_request_that_fails_is_named(
    start: Callable[..., Planted], planted: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = start(**ours(**planted))
    with pytest.raises(error, match=message):
        probe(Server(server.url), "To be or")


def test_a_silent_server_is_not_waited_for_forever(start: Callable[..., Planted]) -> None:
    server = start(**ours(delay=0.5))
    with pytest.raises(WorkFailed, match="kept silent for 0 s"):
        probe(Server(server.url, timeout=0.1), "To be or")


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"], ids=["empty", "blank", "no text"])
def test_a_prompt_is_text(
    start: Callable[..., Planted], call: Callable[..., Result], prompt: Path, content: bytes
) -> None:
    prompt.write_bytes(content)
    refused(call("probe", start(**ours()).url, "--prompt", prompt), "prompt.txt")


def test_a_comparison_needs_a_prompt(
    start: Callable[..., Planted], call: Callable[..., Result]
) -> None:
    refused(call("probe", start().url, "--against", start().url), "give one with --prompt FILE")


def test_a_page_of_metrics_is_read_as_prometheus_writes_it() -> None:
    page = '# TYPE a counter\na{x="1,\\"2\\"\\n",y="\\\\"} 2.5e3\nb 1 1700000000\nc{} NaN\n\nnot a line {\n'
    samples = parse_metrics(page)
    assert [(one.name, one.labels) for one in samples] == [
        ("a", {"x": '1,"2"\n', "y": "\\"}),
        ("b", {}),
        ("c", {}),
    ]
    assert [one.value for one in samples[:2]] == [2500.0, 1.0]
