"""A trial whose model and data are elsewhere than in its first attempt continues to the bit."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.small_trials import DATA, MODEL, finish, model_bytes, take, trial, without_speed
from trainer.config.trial import GeneratedModel, GeneratedSource, TrialConfig
from trainer.results import ResumeError
from trainer.synthetic import generate_model
from trainer.synthetic.instructions import generate_rows
from trainer.training_session import TrainingSession


def at(place: Path, seed: int = 0) -> TrialConfig:
    """The trial with its model and its rows in this folder."""
    if not place.exists():
        generated = GeneratedModel.model_validate(MODEL["generated"] | {"seed": seed})
        generate_model(generated, place / "made").rename(place / "model")
        rows = generate_rows(GeneratedSource(generated="instructions", rows=24))
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DATA | {"train": str(place / "rows.jsonl")}
    return trial(training={"save_steps": 1}, model={"name_or_path": str(place / "model")}, data=data)


def begin(session: TrainingSession, config: TrialConfig, folder: Path) -> Path:
    """A first attempt that is stopped after its fourth point, with the configuration beside it."""
    take(session.train(config, folder), 4)
    (folder / "trial.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


def test_a_trial_continues_where_its_model_and_data_are_now(session: TrainingSession, tmp_path: Path) -> None:
    old = at(tmp_path / "old")
    whole = finish(session.train(old, tmp_path / "whole"))
    first = begin(session, old, tmp_path / "1")
    (tmp_path / "old").rename(tmp_path / "new")
    new, second = at(tmp_path / "new"), tmp_path / "2"
    metrics, result = finish(session.train(new, second, [first]))
    assert (without_speed(metrics), result.status) == (without_speed(whole[0]), whole[1].status)
    assert model_bytes(second) == model_bytes(tmp_path / "whole")
    assert without_speed(finish(session.train(new, tmp_path / "3", [first, second]))[0]) == without_speed(metrics)


def test_without_its_first_configuration_or_with_other_weights_it_does_not_continue(
    session: TrainingSession, tmp_path: Path
) -> None:
    first = begin(session, at(tmp_path / "old"), tmp_path / "1")
    other = at(tmp_path / "other", seed=1)
    with pytest.raises(ResumeError, match="trained from another model or on other data"):
        finish(session.train(other, tmp_path / "2", [first]))
    longer = other.model_copy(update={"training": other.training.model_copy(update={"learning_rate": 1e-3})})
    with pytest.raises(ResumeError, match="belongs to another configuration"):
        finish(session.train(longer, tmp_path / "2", [first]))
    (first / "trial.yaml").unlink()
    with pytest.raises(ResumeError, match="belongs to another configuration"):
        finish(session.train(other, tmp_path / "2", [first]))
