"""A run that goes on from another run's checkpoint, and the checkpoint that is held for it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.small_trials import finish, model_bytes, trial, without_speed
from trainer.config.trial import TrialConfig
from trainer.results import ResumeError, RunStatus, StepMetrics
from trainer.storage import checkpoints
from trainer.storage.checkpoint_manifest import checkpoint_path, list_checkpoints, pin_checkpoint
from trainer.training_session import TrainingSession


def config(**training: Any) -> TrialConfig:
    return trial(training={"save_steps": 1, "logging_steps": 2, **training})


@pytest.fixture
def pinned(session: TrainingSession, tmp_path: Path) -> Path:
    """The checkpoint of update 3 of six, held in a place of its own; its run is gone."""
    run = session.train(config(), tmp_path / "parent")
    while next(run).step < 4:
        pass
    run.close()
    assert pin_checkpoint([tmp_path / "parent"], tmp_path / "held") == (3, [])
    shutil.rmtree(tmp_path / "parent")
    return tmp_path / "held"


def test_the_state_is_the_whole_state(session: TrainingSession, tmp_path: Path, pinned: Path) -> None:
    """Weights, moments, schedule, random numbers, place in the data, open window: nothing changed, nothing differs."""
    full, _ = finish(session.train(config(), tmp_path / "whole"))
    metrics, result = finish(session.train(config(), tmp_path / "fork", (), pinned))
    assert (result.status, without_speed(metrics)) == (RunStatus.FINISHED, without_speed(full))
    assert model_bytes(tmp_path / "fork") == model_bytes(tmp_path / "whole")


def test_another_rate_and_length_from_there_on(session: TrainingSession, tmp_path: Path, pinned: Path) -> None:
    other = config(learning_rate=1e-3, max_steps=8)
    metrics, result = finish(session.train(other, tmp_path / "1", (), pinned))
    full, _ = finish(session.train(config(), tmp_path / "whole"))
    assert (result.status, result.updates) == (RunStatus.FINISHED, 8)
    assert without_speed(metrics)[:3] == without_speed(full)[:3], "its story begins with the other run's"
    assert metrics[2].step == 3
    assert without_speed(metrics)[3:] != without_speed(full)[3:]
    rates = {p.step: p.metrics["learning_rate"] for p in metrics if "learning_rate" in p.metrics}
    assert rates[4] < 1e-3 < full[1].metrics["learning_rate"]
    finish(session.train(other, tmp_path / "2", (), pinned))
    assert model_bytes(tmp_path / "1") == model_bytes(tmp_path / "2"), "the same again"
    finish(session.train(other, tmp_path / "anew"))
    assert model_bytes(tmp_path / "1") != model_bytes(tmp_path / "anew")


def test_interrupted_it_goes_on_from_its_own_checkpoint(session: TrainingSession, tmp_path: Path, pinned: Path) -> None:
    other = trial({"kind": "simpo", "beta": 9.0}, training={"save_steps": 1, "logging_steps": 2})
    full, _ = finish(session.train(other, tmp_path / "whole", (), pinned))
    run = session.train(other, tmp_path / "1", (), pinned)
    while next(run).step < 5 and not list_checkpoints([tmp_path / "1"]):
        pass
    run.close()
    shutil.rmtree(pinned)
    metrics, _ = finish(session.train(other, tmp_path / "2", [tmp_path / "1"], pinned))
    assert without_speed(metrics) == without_speed(full)
    assert model_bytes(tmp_path / "2") == model_bytes(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_never_from_the_start_instead(session: TrainingSession, tmp_path: Path, pinned: Path, harm: str) -> None:
    if harm == "gone":
        shutil.rmtree(pinned)
    else:
        (checkpoint_path(pinned, 3) / "optimiser.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ResumeError, match="the checkpoint from which this trial continues is damaged or missing"):
        finish(session.train(config(learning_rate=1e-3), tmp_path / "fork", (), pinned))


def test_weights_of_another_shape_are_refused(session: TrainingSession, tmp_path: Path, pinned: Path) -> None:
    adapters = trial(training={"save_steps": 1}, lora={"r": 2, "alpha": 4})
    with pytest.raises(ResumeError, match="other weights"):
        finish(session.train(adapters, tmp_path / "fork", (), pinned))


def _save(folder: Path, step: int) -> Path:
    weights = {"w": torch.full((3,), float(step))}
    return checkpoints.save_checkpoint(
        folder, checkpoints.TrainState("c", step, weights, {}, [StepMetrics(step, {"loss": 1.0})])
    )


def test_a_held_checkpoint_outlives_its_run_and_takes_no_room_beside_it(tmp_path: Path) -> None:
    path = _save(tmp_path / "run", 4)
    assert pin_checkpoint([tmp_path / "run"], tmp_path / "held") == (4, [])
    same = [(path / f.name).stat().st_ino == f.stat().st_ino for f in checkpoint_path(tmp_path / "held", 4).iterdir()]
    assert same == [True] * 4
    _save(tmp_path / "run", 6)
    checkpoints.remove_checkpoints([tmp_path / "run"], before=6)
    found = checkpoints.load_newest([tmp_path / "held"])
    assert (found.step, float(found.weights["w"][0])) == (4, 4.0)


def test_the_newest_good_one_is_held(tmp_path: Path) -> None:
    _save(tmp_path / "1", 4)
    damaged = _save(tmp_path / "2", 6)
    (damaged / "weights.safetensors").write_bytes(b"rubbish")
    step, passed = pin_checkpoint([tmp_path / "1", tmp_path / "2"], tmp_path / "held")
    assert step == 4
    assert passed == ["the checkpoint of update 6 is damaged (weights.safetensors differs from its digest)"]
    assert [p.name for p in list_checkpoints([tmp_path / "held"])] == ["step-00000004"]
    assert damaged.is_dir(), "whether to set it aside is its own run's business"
    assert pin_checkpoint([tmp_path / "none"], tmp_path / "other") == (None, [])


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
            checkpoints.remove_checkpoints([tmp_path / "run"], before=6)
        link(*args)

    monkeypatch.setattr(os, "link", link_late)
    assert pin_checkpoint([tmp_path / "run"], tmp_path / "held") == (6, [])
    assert [p.name for p in (tmp_path / "held" / "checkpoints").iterdir()] == ["step-00000006"]
