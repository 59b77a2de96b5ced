"""A study belongs to one run: who finds another's refuses it, says what differs, and names what cures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from calibrate.errors import UserError
from calibrate.prompts.build import SPLITS, Prompt
from calibrate.record.folder import Notes, claimed
from calibrate.schema import RunConfig
from calibrate.search.owner import owner_of
from calibrate.search.study import open_study, read_study


def config(storage: str | None, **sections: Any) -> RunConfig:
    search = {"storage": storage, **sections.pop("search", {})}
    return RunConfig.model_validate({"model": {"path": "x"}, "search": search, **sections})


def begun(folder: Path, chosen: RunConfig, model: str = "one", first: int = 1) -> Path:
    """A run folder as it is before any tile is counted."""
    folder.mkdir()
    Notes(folder, chosen).note_model(model, f"hash of {model}")
    rows = {s: [Prompt("text", s, 16, (first, n), (1,), False)] for n, s in enumerate(SPLITS)}
    written = {split: [prompt.to_json() for prompt in prompts] for split, prompts in rows.items()}
    (folder / "prompts.json").write_text(json.dumps(written))
    return folder


def opened(folder: Path, chosen: RunConfig) -> optuna.Study:
    return open_study(chosen.search, folder, owner_of(folder, chosen))


def with_a_trial(study: optuna.Study) -> None:
    study.add_trial(optuna.trial.create_trial(values=[0.1, 0.9]))


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A storage in which the study of a run with the default settings has a trial."""
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    with_a_trial(opened(begun(tmp_path / "first", config(storage)), config(storage)))
    return storage


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"model": {"path": "x", "dtype": "bfloat16"}},
            "model.dtype (float32 there, bfloat16 here)",
        ),
        (
            {"geometry": {"prefill": {"tile_q": 64, "tile_kv": 256}}},
            "geometry.prefill.tile_kv (128 there, 256 here)",
        ),
        (
            {
                "geometry": {"decode": {"tile_kv": 64, "running_max": "seeded"}},
                "search": {"groups": 2},
            },
            "geometry.decode.running_max (ascending there, seeded here), search.groups (3 there, 2 here)",
        ),
        ({"budget": {"kl": 0.5}}, "budget.kl (0.01 there, 0.5 here)"),
        ({"budget": {"kl_text": 0.5}}, "budget.kl_text (None there, 0.5 here)"),
        ({"target": {"engine": "trtllm"}}, "target.engine (native there, trtllm here)"),
        ({"search": {"groups": 2}}, "search.groups (3 there, 2 here)"),
        ({"cost": {"device": "Abacus"}}, "cost.device (NVIDIA H100 80GB HBM3 there, Abacus here)"),
    ],
)
def test_a_study_of_another_configuration_is_refused_by_what_differs(
    tmp_path: Path, url: str, sections: dict[str, Any], said: str
) -> None:
    other = config(url, **sections)
    with pytest.raises(UserError) as refused:
        opened(begun(tmp_path / "second", other), other)
    assert f"`calibrate` in `{url}` belongs to another run (different: {said});" in str(
        refused.value
    )
    assert "search.study_name" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"model": "two"}, r"model \(one there, two here\)\)"), ({"first": 2}, r"prompts\)")],
)
def test_a_study_of_another_model_or_other_prompts_is_refused(
    tmp_path: Path, url: str, changes: dict[str, Any], said: str
) -> None:
    folder = begun(tmp_path / "second", config(url), **changes)
    with pytest.raises(UserError, match=said):
        opened(folder, config(url))
    with pytest.raises(UserError, match=said):
        read_study(config(url).search, folder, owner_of(folder, config(url)))


def test_workers_share_a_study_and_the_named_cure_gives_another_run_its_own(
    tmp_path: Path, url: str
) -> None:
    worker = config(url, search={"sampler": "gp", "trials": 5, "prune_factor": 2.0})
    assert len(opened(begun(tmp_path / "worker", worker), worker).trials) == 1

    other, folder = config(url, budget={"kl": 0.5}), tmp_path / "other"
    cured = config(url, budget={"kl": 0.5}, search={"study_name": "other"})
    begun(folder, other)
    claimed(folder, other)
    with pytest.raises(UserError, match="belongs to another run"):
        opened(folder, other)
    assert claimed(folder, cured) == cured  # nothing was measured, so the config may be corrected
    assert opened(folder, cured).trials == []


def test_a_study_that_does_not_say_whose_it_is_is_taken_up_by_who_has_searched_in_it(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    folder, chosen = begun(tmp_path / "run", config(url)), config(url)
    with_a_trial(open_study(chosen.search, folder))  # as earlier versions did
    with pytest.raises(UserError, match=r"must say whose its trials are.*search\.study_name"):
        opened(folder, chosen)
    (folder / "validation.json").touch()
    assert len(opened(folder, chosen).trials) == 1
    other = begun(tmp_path / "other", chosen, model="two")
    with pytest.raises(UserError, match="different: model"):
        opened(other, chosen)


def test_a_study_in_its_own_folder_belongs_to_the_folder(tmp_path: Path) -> None:
    """The folder asks for one config itself, and says which key is another."""
    chosen = config(None)
    folder = begun(tmp_path / "run", chosen)
    with_a_trial(opened(folder, chosen))
    assert len(opened(folder, config(None, budget={"kl": 0.5})).trials) == 1


def test_a_study_with_other_objectives_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'other.db'}"
    optuna.create_study(study_name="calibrate", storage=url, direction="maximize")
    with pytest.raises(UserError, match=r"must have two objectives to minimise.*with: maximize;"):
        opened(begun(tmp_path / "run", config(url)), config(url))


def test_a_password_is_not_printed(tmp_path: Path) -> None:
    chosen = config("nonsense://me:secret@host/db")
    with pytest.raises(UserError, match=r"`nonsense://me:\*\*\*@host/db`"):
        open_study(chosen.search, tmp_path)
