"""The thresholds file: what it refuses, what it says, and that it comes back as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from thresholds_files import GOOD, write

from skip_softmax import FileError, PrefillGeometry, Thresholds


def test_load_save_load_gives_the_same(tmp_path: Path) -> None:
    loaded = Thresholds.load(write(tmp_path, GOOD))
    loaded.save(tmp_path / "again.yaml")
    assert Thresholds.load(tmp_path / "again.yaml") == loaded
    assert list(tmp_path.glob(".*")) == [], "an atomic write leaves no temporary file"


def test_dense_rows_are_written_only_where_there_are_some(tmp_path: Path) -> None:
    before = Thresholds.load(write(tmp_path, GOOD))
    assert before.geometry.prefill.dense_last == 0 and "dense_last" not in before.to_yaml()
    zero = GOOD.replace("tile_kv: 128}", "tile_kv: 128, dense_last: 0}")
    assert Thresholds.load(write(tmp_path, zero)).to_yaml() == before.to_yaml()
    some = Thresholds.load(write(tmp_path, zero.replace("dense_last: 0", "dense_last: 64")))
    assert some.geometry.prefill.dense_last == 64
    assert "prefill: {tile_q: 64, tile_kv: 128, dense_last: 64}" in some.to_yaml()
    assert Thresholds.load(write(tmp_path, some.to_yaml())) == some != before


def test_a_file_says_chunks_only_where_it_was_calibrated_in_some(tmp_path: Path) -> None:
    before = Thresholds.load(write(tmp_path, GOOD))
    assert before.geometry.prefill.chunk is None and "chunk" not in before.to_yaml()
    null = GOOD.replace("tile_kv: 128}", "tile_kv: 128, chunk: null}")
    assert Thresholds.load(write(tmp_path, null)).to_yaml() == before.to_yaml()
    some = Thresholds.load(write(tmp_path, null.replace("chunk: null", "chunk: 1024")))
    assert some.geometry.prefill.chunk == 1024
    assert "prefill: {tile_q: 64, tile_kv: 128, chunk: 1024}" in some.to_yaml()
    assert Thresholds.load(write(tmp_path, some.to_yaml())) == some != before


def test_heads_that_vote_together_are_written_only_where_the_file_says_so(tmp_path: Path) -> None:
    before = Thresholds.load(write(tmp_path, GOOD))
    assert before.geometry.decode.tile_heads is None and "tile_heads" not in before.to_yaml()
    assert "tile_heads" not in before.geometry.keywords("decode")
    assert (before.vote_heads("prefill"), before.vote_heads("decode")) == (4, 2)
    each = GOOD.replace("decode: {tile_kv: 64}", "decode: {tile_kv: 64, tile_heads: 1}")
    with pytest.raises(
        FileError, match=r"decode needs one number, or 4 \(one per voting head\), got 2"
    ):
        Thresholds.load(write(tmp_path, each))
    some = Thresholds.load(write(tmp_path, each.replace("[4.0, 9.5]", "[4.0, 9.5, 0.0, 1.0]")))
    assert some.per_head(2, "decode") == (4.0, 9.5, 0.0, 1.0)
    assert some.geometry.keywords("decode")["tile_heads"] == 1
    assert Thresholds.load(write(tmp_path, some.to_yaml())) == some != before
    with pytest.raises(FileError, match="tile_heads must divide"):
        Thresholds.load(write(tmp_path, each.replace("tile_heads: 1", "tile_heads: 3")))


def test_columns_of_values_are_written_only_where_they_differ(tmp_path: Path) -> None:
    before = Thresholds.load(write(tmp_path, GOOD))
    assert before.model.head_dim_v is None and "head_dim_v" not in before.to_yaml()
    some = Thresholds.load(
        write(tmp_path, GOOD.replace("head_dim: 64", "head_dim: 64, head_dim_v: 48"))
    )
    assert some.model.head_dim_v == 48
    assert Thresholds.load(write(tmp_path, some.to_yaml())) == some != before


def test_a_file_says_the_caches_dtype_only_where_it_is_not_the_models(tmp_path: Path) -> None:
    before = Thresholds.load(write(tmp_path, GOOD))
    assert before.model.kv_cache_dtype is None and "kv_cache" not in before.to_yaml()
    section = before.model.model_copy(update={"kv_cache_dtype": "fp8_e4m3"})
    fp8 = before.model_copy(update={"model": section})
    assert "kv_cache_dtype: fp8_e4m3" in fp8.to_yaml()
    assert Thresholds.load(write(tmp_path, fp8.to_yaml())) == fp8 != before
    with pytest.raises(FileError, match=r"kv_cache_dtype: .*'fp8_e4m3'.*got 'fp8_e5m2'"):
        Thresholds.load(write(tmp_path, fp8.to_yaml().replace("fp8_e4m3", "fp8_e5m2")))


def test_overrides_come_before_model_wide_numbers(tmp_path: Path) -> None:
    loaded = Thresholds.load(write(tmp_path, GOOD))
    assert loaded.per_head(0, "prefill") == (0.0,) * 4
    assert loaded.per_head(1, "prefill") == (180.0,) * 4
    assert loaded.per_head(2, "prefill") == (90.0, 0.0, 240.0, 1e-5)
    assert loaded.per_head(2, "decode") == (4.0, 9.5)
    assert loaded.per_head(3, "decode") == (12.5, 12.5)


def test_a_missing_phase_and_an_uncalibrated_layer_are_dense(tmp_path: Path) -> None:
    text = GOOD.replace(
        "scale_factor: {prefill: 180.0, decode: 12.5}", "scale_factor: {prefill: 180.0}"
    )
    loaded = Thresholds.load(
        write(tmp_path, text + "uncalibrated: [{layer: 1, reason: soft-cap}]\n")
    )
    assert loaded.per_head(3, "decode") == (0.0, 0.0)
    assert loaded.per_head(1, "prefill") == (0.0,) * 4


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "min_kv_len:",
            "min_kv_length:",
            r"thresholds.yaml:5: min_kv_length: unknown key; did you mean `min_kv_len`\?",
        ),
        (
            "tile_q: 64",
            "tile_queue: 64",
            r"thresholds.yaml:4: geometry.prefill.tile_queue: unknown key; did you mean `tile_q`",
        ),
        (
            "tile_kv: 128",
            "tile_kv: 128, dense_last: -1",
            "geometry.prefill.dense_last: .*greater than or equal to 0, but got -1",
        ),
        (
            "tile_kv: 128",
            "tile_kv: 128, dense_last: true",
            "geometry.prefill.dense_last: must be a number, but got true",
        ),
        (
            "tile_kv: 128",
            "tile_kv: 128, chunk: 1000",
            "geometry.prefill: `chunk` must be a multiple of `tile_q`, .* but got 1000 with tile_q=64; round",
        ),
        ("tile_kv: 128", "tile_kv: 128, chunk: 0", "prefill.chunk: .*greater than 0, but got 0"),
        ("tile_kv: 128", "tile_kv: 128, chunk: true", "chunk: must be a number, but got true"),
        ("tile_kv: 128", "tile_kv: 128, chunks: 64", "unknown key; did you mean `chunk`"),
        (
            "decode: {tile_kv: 64}",
            "decode: {tile_kv: 64, chunk: 64}",
            "geometry.decode.chunk: unknown key",
        ),
        (
            "decode: {tile_kv: 64}",
            "decode: {tile_kv: 64, dense_last: 64}",
            "geometry.decode.dense_last: unknown key",
        ),
        (
            "layer: 0, prefill",
            "layer: 0, prefil",
            "thresholds.yaml:8: layers.0.prefil: unknown key; did you mean `prefill`",
        ),
        (
            "prefill: 180.0",
            "prefill: many",
            "thresholds.yaml:6: scale_factor.prefill: .*number.*'many'",
        ),
        (
            "prefill: 180.0",
            "prefill: -1",
            "scale_factor.prefill: .*greater than or equal to 0, but got -1",
        ),
        ("prefill: 180.0", "prefill: .nan", "scale_factor.prefill: .*finite number.*nan"),
        (
            "prefill: 1024",
            "prefill: 240",
            r"`min_kv_len.prefill > scale_factor` must hold, but got min_kv_len=240",
        ),
        (
            "min_kv_len: {prefill: 1024, decode: 512}",
            "",
            "`min_kv_len.prefill > scale_factor` must hold, but got min_kv_len=None",
        ),
        ("layer: 2", "layer: 4", r"layers\[1\] \(layer 4\): layer must be below model.layers=4"),
        ("layer: 2", "layer: 0", "this layer is listed twice"),
        (
            "decode: [4.0, 9.5]",
            "decode: [4.0]",
            r"decode needs one number, or 2 \(one per KV head\), got 1",
        ),
        (
            "tile_kv: 64}",
            "tile_kv: 48}",
            "`tile_kv` must be a power of two from 16 to 512, but got 48",
        ),
        (
            "geometry: {prefill: {tile_q: 64, tile_kv: 128}, ",
            "geometry: {",
            "geometry.prefill is required when a prefill scale factor is above 0",
        ),
        ("criterion: max", "criterion: min", "thresholds.yaml:3: criterion: .*'max'.*'min'"),
        ("criterion: max", "criterion: mass", "thresholds.yaml:3: criterion: .*'max'.*'mass'"),
        (
            "criterion: max",
            "criterion: {prefill: max, decode: mass}",
            "thresholds.yaml:3: criterion: .*'max'",
        ),
        ("format: skip-softmax/1", "format: skip-softmax/2", "thresholds.yaml:1: format"),
        (
            "kv_heads: 2",
            "kv_heads: 3",
            "`q_heads` must be a multiple of `kv_heads`, but got 4 and 3",
        ),
        (
            "criterion: max",
            "criterion: max\ncriterion: max",
            "thresholds.yaml:4: not valid YAML: key 'criterion' is given twice",
        ),
        ("criterion: max", "criterion: [", "not valid YAML"),
        (GOOD, "just a sentence\n", "the file must be a YAML mapping, but it contains a str"),
        (GOOD, "", "the file must be a YAML mapping, but it contains nothing"),
        ("criterion: max", "criterion: !!python/object/apply:os.system [true]", "not valid YAML"),
        (
            "criterion: max",
            "criterion: 2024-13-45",
            "thresholds.yaml:3: not valid YAML: '2024-13-45' is not a valid timestamp; .* quote it",
        ),
        (
            "criterion: max",
            "criterion: 0b_",
            "thresholds.yaml:3: .*'0b_' is not a valid int; correct it",
        ),
        (
            "criterion: max",
            f"criterion: {'9' * 5000}",
            "thresholds.yaml:3: .*'9{60}' is not a valid int",
        ),
        ("criterion: max", "criterion: !!bool x", "thresholds.yaml:3: .*'x' is not a valid bool"),
        (
            "criterion: max",
            "criterion: !!timestamp x",
            "thresholds.yaml:3: .*'x' is not a valid timestamp",
        ),
        ("criterion: max", "criterion: !!set [a]", "thresholds.yaml:3: .*expected a mapping"),
        (
            "criterion: max",
            "criterion: " + "[" * 3000,
            "thresholds.yaml: .*nested too deeply; flatten",
        ),
        ("prefill: 180.0", "prefill: true", "scale_factor.prefill: must be a number, but got true"),
        ("prefill: 0.0", "prefill: false", "layers.0.prefill: must be a number, but got false"),
        ("[4.0, 9.5]", "[4.0, true]", "layers.1.decode.1: must be a number, but got true"),
        ("layer: 2", "layer: true", "layers.1.layer: must be a number, but got true"),
        ("layers: 4", "layers: true", "model.layers: must be a number, but got true"),
    ],
)
def test_broken_files_are_refused_with_line_key_and_cure(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    assert before in GOOD
    with pytest.raises(FileError, match=message):
        Thresholds.load(write(tmp_path, GOOD.replace(before, after)))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ("null", "fit.prefill: input should be a valid dictionary, but got None"),
        ("{}", "fit.prefill: must contain both `a` and `b`, or else `refused` .* got none of them"),
        ("{a: 1.0}", "fit.prefill: must contain both `a` and `b`.* got `a`"),
        ("{a: 1.0, b: 2.0, refused: why}", "or else `refused` .* got `a` and `b` and `refused`"),
        ("{a: 0, b: 2.0}", "fit.prefill.a: .*greater than 0, but got 0"),
        ("{a: -1, b: 2.0}", "fit.prefill.a: .*greater than 0, but got -1"),
        ("{a: true, b: 2.0}", "fit.prefill.a: .*number, but got True"),
        ("{a: 1.0, b: 0}", "fit.prefill.b: .*greater than 0, but got 0"),
        ("{a: 1.0, b: .inf}", "fit.prefill.b: .*finite number, but got inf"),
        ("{a: 1.0, b: 2.0, r2: good}", "fit.prefill.r2: .*number, but got 'good'"),
        ("{a: 1.0, b: 2.0, r2: null}", "fit.prefill.r2: .*number, but got None"),
        ("{a: 1.0, b: 2.0, sparsity_range: [1]}", r"fit.prefill.sparsity_range: .*2 .*\[1\]"),
        ("{a: 1.0, b: 2.0, sparsity_range: [0, 40]}", "sparsity_range.1: .*or equal to 1.* got 40"),
        ("{a: 1.0, b: 2.0, colour: red}", "fit.prefill.colour: unknown key; remove it"),
    ],
)
def test_a_curve_that_nothing_can_be_read_from_is_refused(
    tmp_path: Path, fit: str, message: str
) -> None:
    with pytest.raises(FileError, match=message):
        Thresholds.load(write(tmp_path, f"{GOOD}fit: {{prefill: {fit}}}\n"))


@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        ("null", "evidence: input should be a valid dictionary"),
        (
            "{verdict: Passed}",
            "evidence.verdict: .*'passed', 'failed' or 'not validated'.*'Passed'",
        ),
        ("{loss: {}}", "evidence.loss.kl: this key is required"),
        ("{loss: {kl: {mean: 1}}}", "evidence.loss.kl.upper: this key is required"),
        ("{loss: {kl: {mean: 1, upper: '2'}}}", "evidence.loss.kl.upper: .*number, but got '2'"),
        ("{sparsity: null}", "evidence.sparsity: .*dictionary, but got None"),
        ("{sparsity: [1]}", r"evidence.sparsity: .*dictionary, but got \[1\]"),
        ("{sparsity: {prefill: {}}}", "evidence.sparsity.prefill.achieved: this key is required"),
        (
            "{sparsity: {decode: {achieved: 40}}}",
            "sparsity.decode.achieved: .*equal to 1, but got 40",
        ),
        (
            "{sparsity: {decode: {achieved: 0.4, by_length: {abc: {achieved: 0.4}}}}}",
            "by_length.abc: a KV length must be a whole number of tokens above 0, but got 'abc'",
        ),
        (
            "{sparsity: {decode: {achieved: 0.4, by_length: {0: {achieved: 0.4}}}}}",
            "by_length.0: a KV length must be a whole number of tokens above 0, but got 0",
        ),
        ("{predicted_speedup: 3}", "evidence.predicted_speedup: .*dictionary.* got 3"),
        ("{predicted_speedup: {prefill: fast}}", "predicted_speedup.prefill: .*number.*'fast'"),
        ("{uniform_baseline: {}}", "evidence.uniform_baseline.loss: this key is required"),
        (
            "{uniform_baseline: {loss: {}, sparsity: {}, scale_factor: {decode: true}}}",
            "uniform_baseline.scale_factor.decode: must be a number, but got true",
        ),
        ("{imported: 3}", "evidence.imported: .*dictionary.* got 3"),
        (
            "{note: 2024-01-01}",
            ":10: not valid YAML: YAML does not read 2024-01-01 as it looks; quote it",
        ),
        ("&all {note: *all}", "evidence: may contain text, .*Circular reference"),
        ("{note: " + "[" * 300 + "]" * 300 + "}", "evidence: .*flatten what is nested too deeply"),
    ],
)
def test_evidence_that_cannot_be_read_is_refused(
    tmp_path: Path, evidence: str, message: str
) -> None:
    with pytest.raises(FileError, match=message):
        Thresholds.load(write(tmp_path, GOOD.replace("{verdict: passed}", evidence)))


def test_fit_and_evidence_are_kept_as_they_stand(tmp_path: Path) -> None:
    """Checked, but not changed: no default is added, no number is converted, notes are left alone."""
    evidence = {
        "verdict": "passed",
        "reviewed": {"by": None, "score": [1, 2.5, True]},
        "sparsity": {
            "decode": {"by_length": {8192: {"achieved": 0, "target": 0.1}}, "achieved": 1}
        },
    }
    fit = {"decode": {"b": 2, "a": 1}, "prefill": {"points": 2, "refused": "only 2 usable points"}}
    loaded = Thresholds.load(write(tmp_path, GOOD))
    given = Thresholds(**{**dict(loaded), "fit": fit, "evidence": evidence})
    assert repr((given.fit, given.evidence)) == repr((fit, evidence))
    given.save(tmp_path / "given.yaml")
    again = Thresholds.load(tmp_path / "given.yaml")
    assert again.to_yaml() == (tmp_path / "given.yaml").read_text()


def test_a_file_that_cannot_be_written_is_called_by_its_own_name(tmp_path: Path) -> None:
    loaded = Thresholds.load(write(tmp_path, GOOD))
    for target in (tmp_path / "missing" / "t.yaml", tmp_path):
        with pytest.raises(OSError, match=rf"'{target}'$"):
            loaded.save(target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale_facto": {"prefill": 180.0}},
            r"Thresholds: scale_facto: unknown key; did you mean `scale_factor`\?",
        ),
        (
            {"scale_factor": {"prefill": -1}},
            "Thresholds: scale_factor.prefill: .*greater than or equal to 0, but got -1",
        ),
        (
            {"min_kv_len": {"prefill": 240, "decode": 512}},
            "Thresholds: `min_kv_len.prefill > scale_factor` must hold, but got min_kv_len=240",
        ),
        ({"model": None}, "Thresholds: model: .* got None"),
        (
            {"layers": [{"layer": 0, "decode": [4.0, "x"]}]},
            "Thresholds: layers.0.decode.1: .*number.* got 'x'",
        ),
    ],
    ids=["unknown key", "value", "law", "section", "override"],
)
def test_wrong_arguments_are_refused_as_a_file_is(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = dict(Thresholds.load(write(tmp_path, GOOD)))
    with pytest.raises(FileError, match=f"^{message}") as error:
        Thresholds(**{**given, **changes})
    assert "\n" not in str(error.value) and "pydantic" not in str(error.value)


def test_missing_arguments_are_named_one_per_line() -> None:
    message = "Thresholds: model: this key is required\nThresholds: geometry: this key is required"
    with pytest.raises(FileError, match=f"^{message}$"):
        Thresholds()  # type: ignore[call-arg]


def test_a_section_alone_is_refused_too() -> None:
    law = "PrefillGeometry: `tile_q` must be a power of two from 16 to 512, but got 48"
    with pytest.raises(FileError, match=f"^{law}$"):
        PrefillGeometry(tile_q=48, tile_kv=128)


@pytest.mark.parametrize("path", [123, None, b"t.yaml"])
def test_what_is_not_a_path_is_refused(path: Any) -> None:
    with pytest.raises(TypeError, match=f'path of a YAML file, but got {path!r}; pass "thresholds'):
        Thresholds.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere.yaml: no such file"):
        Thresholds.load(tmp_path / "nowhere.yaml")
