"""A run that goes on from another run's checkpoint, and the checkpoint that is held for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trials import finish, model_bytes, told, trial

from trainer.config.trial import TrialConfig
from trainer.results import EndKind, Point, ResumeError
from trainer.storage import checkpoints
from trainer.storage.checkpoint_manifest import pin, place_of, places
from trainer.training_session import Workshop


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workshop(cache: Path) -> Workshop:
    return Workshop(cache)


def config(**training: Any) -> TrialConfig:
    return trial(training={"save_steps": 1, "logging_steps": 2, **training})


@pytest.fixture
def held(workshop: Workshop, tmp_path: Path) -> Path:
    """The checkpoint of update 3 of six, held in a place of its own; its run is gone."""
    run = workshop.train(config(), tmp_path / "parent")
    while next(run).step < 4:
        pass
    run.close()
    assert pin([tmp_path / "parent"], tmp_path / "held") == (3, [])
    shutil.rmtree(tmp_path / "parent")
    return tmp_path / "held"


def test_the_state_is_the_whole_state(workshop: Workshop, tmp_path: Path, held: Path) -> None:
    """Weights, moments, schedule, random numbers, place in the data, open window: nothing changed, nothing differs."""
    whole, _ = finish(workshop.train(config(), tmp_path / "whole"))
    points, ending = finish(workshop.train(config(), tmp_path / "fork", (), held))
    assert (ending.kind, told(points)) == (EndKind.FINISHED, told(whole))
    assert model_bytes(tmp_path / "fork") == model_bytes(tmp_path / "whole")


def test_another_rate_and_length_from_there_on(workshop: Workshop, tmp_path: Path, held: Path) -> None:
    other = config(learning_rate=1e-3, max_steps=8)
    points, ending = finish(workshop.train(other, tmp_path / "1", (), held))
    whole, _ = finish(workshop.train(config(), tmp_path / "whole"))
    assert (ending.kind, ending.steps) == (EndKind.FINISHED, 8)
    assert told(points)[:3] == told(whole)[:3], "its story begins with the other run's"
    assert points[2].step == 3
    assert told(points)[3:] != told(whole)[3:]
    rates = {p.step: p.metrics["learning_rate"] for p in points if "learning_rate" in p.metrics}
    assert rates[4] < 1e-3 < whole[1].metrics["learning_rate"]
    finish(workshop.train(other, tmp_path / "2", (), held))
    assert model_bytes(tmp_path / "1") == model_bytes(tmp_path / "2"), "the same again"
    finish(workshop.train(other, tmp_path / "anew"))
    assert model_bytes(tmp_path / "1") != model_bytes(tmp_path / "anew")


def test_interrupted_it_goes_on_from_its_own_checkpoint(workshop: Workshop, tmp_path: Path, held: Path) -> None:
    other = trial({"kind": "simpo", "beta": 9.0}, training={"save_steps": 1, "logging_steps": 2})
    whole, _ = finish(workshop.train(other, tmp_path / "whole", (), held))
    run = workshop.train(other, tmp_path / "1", (), held)
    while next(run).step < 5 and not places([tmp_path / "1"]):
        pass
    run.close()
    shutil.rmtree(held)
    points, _ = finish(workshop.train(other, tmp_path / "2", [tmp_path / "1"], held))
    assert told(points) == told(whole)
    assert model_bytes(tmp_path / "2") == model_bytes(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_never_from_the_start_instead(workshop: Workshop, tmp_path: Path, held: Path, harm: str) -> None:
    if harm == "gone":
        shutil.rmtree(held)
    else:
        (place_of(held, 3) / "optimiser.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ResumeError, match="the checkpoint that this trial goes on from is damaged or gone"):
        finish(workshop.train(config(learning_rate=1e-3), tmp_path / "fork", (), held))


def test_weights_of_another_shape_are_refused(workshop: Workshop, tmp_path: Path, held: Path) -> None:
    adapters = trial(training={"save_steps": 1}, lora={"r": 2, "alpha": 4})
    with pytest.raises(ResumeError, match="other weights"):
        finish(workshop.train(adapters, tmp_path / "fork", (), held))


# --- holding ---------------------------------------------------------------------------------------------------------


def _save(folder: Path, step: int) -> Path:
    weights = {"w": torch.full((3,), float(step))}
    return checkpoints.save(folder, checkpoints.State("c", step, weights, {}, [Point(step, {"loss": 1.0})]))


def test_a_held_checkpoint_outlives_its_run_and_takes_no_room_beside_it(tmp_path: Path) -> None:
    place = _save(tmp_path / "run", 4)
    assert pin([tmp_path / "run"], tmp_path / "held") == (4, [])
    same = [(place / f.name).stat().st_ino == f.stat().st_ino for f in place_of(tmp_path / "held", 4).iterdir()]
    assert same == [True] * 4
    _save(tmp_path / "run", 6)
    checkpoints.discard([tmp_path / "run"], before=6)
    found = checkpoints.newest([tmp_path / "held"])
    assert found is not None
    assert (found.step, float(found.weights["w"][0])) == (4, 4.0)


def test_the_newest_good_one_is_held(tmp_path: Path) -> None:
    _save(tmp_path / "1", 4)
    damaged = _save(tmp_path / "2", 6)
    (damaged / "weights.safetensors").write_bytes(b"rubbish")
    step, passed = pin([tmp_path / "1", tmp_path / "2"], tmp_path / "held")
    assert step == 4
    assert passed == ["the checkpoint of update 6 is damaged (weights.safetensors differs from its digest)"]
    assert [p.name for p in places([tmp_path / "held"])] == ["step-00000004"]
    assert damaged.is_dir(), "whether to set it aside is its own run's business"
    assert pin([tmp_path / "none"], tmp_path / "other") == (None, [])


def test_one_that_its_run_removes_meanwhile_is_followed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    _save(tmp_path / "run", 4)
    link, calls = os.link, 0

    def link_late(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            _save(tmp_path / "run", 6)
            checkpoints.discard([tmp_path / "run"], before=6)
        link(*args)

    monkeypatch.setattr(os, "link", link_late)
    assert pin([tmp_path / "run"], tmp_path / "held") == (6, [])
    assert [p.name for p in (tmp_path / "held" / "checkpoints").iterdir()] == ["step-00000006"]
