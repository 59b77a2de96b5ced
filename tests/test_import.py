"""Numbers of others: read from every engine's file, marked unvalidated, and measured on the user's model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_files import thresholds, write_model

from calibrate import cli, importing
from calibrate.above_one import compare_unguarded
from calibrate.assess import as_served
from calibrate.errors import UserError
from calibrate.lengths import expectations
from skip_softmax.thresholds import Thresholds

PUBLISHED = Path(cli.__file__).parent / "engine_docs" / "qwen3-30b-a3b-published.json"
# NVIDIA's table for Qwen3-30B-A3B-Instruct-2507: target, prefill, decode.
TABLE = [
    (0.1, 18.76, 0.32), (0.2, 44.37, 0.86), (0.3, 104.97, 2.30), (0.4, 248.40, 6.17), (0.5, 587.18, 16.52),
    (0.6, 1390.63, 44.26), (0.7, 3293.04, 118.62), (0.8, 7799.91, 317.99), (0.9, 18471.56, 852.20),
]  # fmt: skip


@pytest.mark.parametrize(("target", "prefill", "decode"), TABLE)
def test_the_published_table_is_its_curve(target: float, prefill: float, decode: float) -> None:
    found = importing.read_config_json(PUBLISHED, target).scale_factor
    assert found["prefill"] == pytest.approx(prefill, rel=0.003)
    assert found["decode"] == pytest.approx(decode, rel=0.01)


def test_published_numbers_become_an_unvalidated_file(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    code, out, err = call(
        "import", PUBLISHED, "--engine", "modelopt", "--model", model, "-o", tmp_path / "t.yaml"
    )
    assert (code, out) == (0, "") and "not validated" in err
    found = Thresholds.load(tmp_path / "t.yaml")
    assert found.scale_factor.prefill == pytest.approx(7.92 * math.exp(8.615 * 0.5))
    assert found.evidence["verdict"] == "not validated"
    assert found.min_kv_len.prefill == 589 and found.min_kv_len.decode == 17
    assert (found.model.layers, found.model.q_heads, found.model.kv_heads) == (4, 8, 2)
    # It cannot be exported before it was measured.
    code, out, err = call("export", tmp_path / "t.yaml", "--engine", "trtllm")
    assert code == 2 and "calibrate validate" in err
    code, out, err = call("show", tmp_path / "t.yaml")
    assert code == 0 and "not validated" in out


TRTLLM = "sparse_attention_config:\n  algorithm: skip_softmax\n"
READ: dict[str, tuple[str, str, dict[str, float]]] = {
    "dictionary": ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: 587.18, decode: 16.52}\n",
                   {"prefill": 587.18, "decode": 16.52}),
    "one-number": ("trtllm", TRTLLM + "  threshold_scale_factor: 100\n", {"prefill": 100, "decode": 100}),
    "missing-phase": ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: 5}\n", {"prefill": 5}),
    "zero": ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: 5, decode: 0}\n",
             {"prefill": 5}),
    "sglang": ("sglang", "export SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=1e4\n",
               {"prefill": 10000}),
    "vllm-json": ("vllm", '{"trtllm_skip_softmax_prefill_threshold_scale_factor": 1000.0}',
                  {"prefill": 1000}),
    "vllm-line": ("vllm", "vllm serve M --attention-config="
                  """'{"trtllm_skip_softmax_decode_threshold_scale_factor": 20}'""",
                  {"decode": 20}),
    "tokenspeed": ("tokenspeed", "# reference KV length: 1000 tokens\n--skip-softmax-threshold 0.018",
                   {"prefill": 18, "decode": 18}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_engines_files_are_read(name: str, tmp_path: Path) -> None:
    engine, text, expected = READ[name]
    (tmp_path / "file").write_text(text)
    found = importing.read_artefact(engine, tmp_path / "file")
    assert found.scale_factor == pytest.approx(expected)
    assert any("dense" in note for note in found.notes) == (name == "zero")


def test_a_target_is_read_with_the_curve_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "skip.yaml").write_text(TRTLLM + "  target_sparsity: {prefill: 0.5}\n")
    found = importing.read_artefact("trtllm", tmp_path / "skip.yaml", coefficients=PUBLISHED)
    assert found.scale_factor == pytest.approx({"prefill": 587.18}, rel=0.002)
    with pytest.raises(UserError, match="--coefficients"):
        importing.read_artefact("trtllm", tmp_path / "skip.yaml")


@pytest.mark.parametrize(
    ("engine", "text", "message"),
    [
        ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: -1}\n", "number of 0 or more, but got -1"),
        ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: .nan}\n", "but got nan"),
        ("trtllm", TRTLLM + "  threshold_scale_factor: {prefil: 1}\n", r"but got \['prefil'\]"),
        ("trtllm", TRTLLM + "  ignore: [x]\n", "may hold"),
        ("trtllm", "sparse_attention_config: {algorithm: rocket}\n", "but it is `rocket`"),
        ("sglang", "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=abc", "must be a number"),
        ("vllm", "vllm serve --attention-config '{'", "followed by JSON"),
        ("vllm", '{"trtllm_skip_softmax_prefill_threshold_scale_factor": "many"}', "but got 'many'"),
        ("tokenspeed", "--skip-softmax-threshold 0.018", "--at-length"),
        ("modelopt", "{}", "one skip_softmax group, but it holds 0"),
        ("modelopt", '{"a": 1, "a": 2}', "given twice"),
        ("flashinfer", '{"prefill": {}}', "'run_kwargs' is missing"),
        ("native", "", "--engine must be one of: trtllm"),
    ],
)  # fmt: skip
def test_what_says_no_number_is_refused(
    engine: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match=message):
        importing.read_artefact(engine, tmp_path / "file")


def config_json(**group: Any) -> str:
    return json.dumps(
        {
            "sparse_attention_config": {
                "config_groups": {"g": {"algorithm": "skip_softmax", **group}}
            }
        }
    )


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"threshold_scale_factor": 1000.0}, "fixed threshold of 0.1"),
        ({"threshold_scale_factor": {"formula": "x", "prefill": {"a": 1, "b": 1}}}, "formula must be"),
        ({"threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)"}}, "there are none"),
        (
            {"threshold_scale_factor":
                 {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 1, "b": 1}},
             "target_sparsity": 1.5},
            r"\[0, 1\], but got 1.5",
        ),
    ],
)  # fmt: skip
def test_coefficients_that_engines_misread_are_refused(
    group: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config_json(**group))
    with pytest.raises(UserError, match=message):
        importing.read_config_json(tmp_path)


def test_shared_coefficients_and_ignore_are_read(tmp_path: Path) -> None:
    factors = {"formula": "a * exp(b * target_sparsity)", "coefficients": {"a": 2.0, "b": 0.0}}
    text = config_json(
        threshold_scale_factor=factors, ignore=["model.layers.1.self_attn", "*layers.3.*"]
    )
    (tmp_path / "x.json").write_text(text)
    found = importing.read_config_json(tmp_path / "x.json")
    assert found.scale_factor == {"prefill": 2.0, "decode": 2.0}
    file = importing.to_thresholds(found, thresholds().model, "trtllm", None, "sm90", "x.json")
    assert [max(file.per_head(layer, "prefill")) for layer in range(4)] == [2.0, 0.0, 2.0, 0.0]
    assert file.geometry.prefill is not None and file.geometry.prefill.tile_q == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "0.1"), "give --at-length"),
        (("--threshold", "1.5", "--at-length", "100"), "must hold, but got threshold=1.5"),
        (("--prefill", "-3"), "--prefill: a scale factor must be a finite number"),
        ((), "there must be numbers to import"),
        (("--prefill", "5", "--engine", "none"), "--engine must be one of"),
    ],
)  # fmt: skip
def test_wrong_numbers_on_the_command_line_exit_2(
    arguments: tuple[str, ...], message: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    code, out, err = call("import", *arguments, "--model", model, "-o", tmp_path / "t.yaml")
    assert (code, out) == (2, "") and message in err and not (tmp_path / "t.yaml").exists()


def test_import_needs_a_model(call: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = call("import", "--prefill", "5", "-o", tmp_path / "t.yaml")
    assert code == 2 and "--model DIR, or --config" in err


# What the numbers do to a model.


def import_for(
    smoke_run: Path, target: Path, prefill: float, decode: float, engine: str = "native"
) -> Thresholds:
    run = Thresholds.load(smoke_run / "thresholds.yaml")
    foreign = importing.plain({"prefill": prefill, "decode": decode})
    file = importing.to_thresholds(foreign, run.model, engine, None, None, "a blog")
    # The tiny model's tiles, so that something can be skipped.
    file = file.model_copy(update={"geometry": run.geometry})
    file.save(target)
    return file


def test_numbers_that_hold_pass_and_can_be_written_with_their_evidence(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    import_for(smoke_run, tmp_path / "t.yaml", 100.0, 100.0)
    code, out, err = call(
        "validate", smoke_run, "--thresholds", tmp_path / "t.yaml", "-o", tmp_path / "v.yaml"
    )
    assert code == 0, err
    assert all(word in out for word in ("dense", "given", "calibrated", "256", "384"))
    new = Thresholds.load(tmp_path / "v.yaml")
    assert new.evidence["verdict"] == "passed"
    assert new.evidence["sparsity"]["decode"]["achieved"] > 0
    assert new.min_kv_len.prefill == 256  # nothing shorter was measured


def test_a_threshold_of_1_or_more_fails_and_says_where(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    import_for(smoke_run, tmp_path / "t.yaml", 300.0, 0.0, engine="trtllm")
    code, out, err = call("validate", smoke_run, "--thresholds", tmp_path / "t.yaml", "--json")
    assert code == 1 and "the threshold is 1 or more at 256 tokens" in err
    rows = {(row["length"], row["setting"]): row for row in json.loads(out)["rows"]}
    assert rows[256, "given"]["above_one"] and not rows[384, "given"]["above_one"]
    assert rows[256, "given"]["threshold"]["prefill"] == pytest.approx(300 / 256)
    assert rows[256, "dense"]["kl"] == 0


def test_engines_know_no_shortest_length_but_our_kernel_does(
    smoke_run: Path, tmp_path: Path
) -> None:
    foreign = import_for(smoke_run, tmp_path / "t.yaml", 300.0, 10.0, engine="sglang")
    assert as_served(foreign, 256) == (foreign, True)
    served, above_one = as_served(foreign, 512)
    assert not above_one and served.min_kv_len.prefill == served.min_kv_len.decode == 512
    own = import_for(smoke_run, tmp_path / "t.yaml", 300.0, 10.0)
    assert as_served(own, 256) == (own, False)


def test_numbers_for_another_model_are_refused(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    thresholds().save(tmp_path / "t.yaml")
    code, out, err = call("validate", smoke_run, "--thresholds", tmp_path / "t.yaml")
    assert (code, out) == (2, "") and "must be for the run's model" in err


def test_a_run_is_not_needed_beforehand(
    call: Callable[..., Any], smoke_run: Path, smoke_model: Path, tmp_path: Path
) -> None:
    import_for(smoke_run, tmp_path / "t.yaml", 0.0, 50.0)
    config = tmp_path / "c.yaml"
    config.write_text((smoke_run / "config.yaml").read_text())
    arguments = ("--thresholds", tmp_path / "t.yaml", "--config", config)
    code, out, err = call("validate", tmp_path / "new", *arguments)
    assert code == 0, err
    assert "calibrated" not in out and (tmp_path / "new" / "prompts.json").exists()
    code, _, err = call("validate", "--thresholds", tmp_path / "t.yaml")
    assert code == 2 and "needs a run folder, or --config" in err


def test_below_1_the_engines_rule_is_ours_and_above_it_skips_what_dominates(
    smoke_run: Path, smoke_model: Path, tmp_path: Path
) -> None:
    from calibrate.measure import compare
    from calibrate.models import load
    from calibrate.pipeline import Silent, Work, open_run
    from calibrate.schema import ModelConfig

    loaded = load(ModelConfig(path=str(smoke_model)))
    shutil.copytree(smoke_run, tmp_path / "run")
    work = Work(open_run(tmp_path / "run")[1], tmp_path / "run", Silent())
    prompt = work.prompts["heldout"][0]
    dense = work._dense(prompt)
    for prefill, decode in ((150.0, 0.0), (0.0, 120.0), (199.0, 199.0)):
        file = import_for(smoke_run, tmp_path / "t.yaml", prefill, decode)
        ours = compare(loaded, file, prompt, dense)
        theirs = compare_unguarded(loaded, file, prompt, dense)
        assert (theirs.visited, theirs.skipped) == (ours.visited, ours.skipped)
        assert sum(ours.skipped["prefill"]) + sum(ours.skipped["decode"]) > 0
        assert theirs.kl == pytest.approx(ours.kl, rel=1e-3, abs=1e-6)
    huge = import_for(smoke_run, tmp_path / "t.yaml", 1e300, 1e300, engine="trtllm")
    found = compare_unguarded(loaded, huge, prompt, dense)
    # What is left is one tile per vote: the first.
    kept = [v - s for v, s in zip(found.visited["prefill"], found.skipped["prefill"], strict=True)]
    assert kept == [4 * -(-len(prompt.ids) // 16)] * 4
    assert compare(loaded, huge, prompt, dense).kl < 1e-6  # our kernel runs dense


# What a number means, before anything is measured.


def test_show_puts_scale_factor_threshold_and_sparsity_together(
    call: Callable[..., Any], smoke_run: Path
) -> None:
    code, out, _ = call("show", smoke_run / "thresholds.yaml", "--run", smoke_run)
    assert code == 0
    found = Thresholds.load(smoke_run / "thresholds.yaml")
    factor = found.scale_factor.decode
    assert f"{factor / 1024:.4g}" in out and f"{factor / 384:.4g}" in out
    assert "from the run's statistics" in out


def test_expected_sparsity_names_its_source() -> None:
    rows = {(row["phase"], row["kv_len"]): row for row in expectations(thresholds())}
    assert rows["prefill", 8192]["source"] == "measured, held-out"
    assert rows["prefill", 8192]["threshold"] == [587.18 / 8192] * 2
    assert rows["prefill", 1024]["dense"] and rows["prefill", 1024]["sparsity"] == 0
    assert rows["prefill", 65536]["source"] == "from the fitted curve"
    assert rows["prefill", 65536]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_statistics_of_another_run_are_refused(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    thresholds().save(tmp_path / "t.yaml")
    code, out, err = call("show", tmp_path / "t.yaml", "--run", smoke_run)
    assert (code, out) == (2, "") and "must be a run of the file's model" in err
