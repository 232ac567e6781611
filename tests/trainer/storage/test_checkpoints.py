from pathlib import Path

import pytest
import torch

from trainer.results import StepMetrics
from trainer.storage import checkpoints


def state(step: int, config: str = "c") -> checkpoints.TrainState:
    weights = {"w": torch.full((3, 2), float(step)), "b": torch.arange(4, dtype=torch.bfloat16)}
    history = [StepMetrics(0, {"eval_loss": 0.1 + 0.2}), StepMetrics(step, {"loss": 1 / 3})]
    return checkpoints.TrainState(
        config, step, weights, {"exp_avg.w": torch.rand(3, 2)}, history, {"loss": (0.1 + 0.7, 3.0)}
    )


def test_what_is_saved_is_read_back_to_the_bit(tmp_path: Path) -> None:
    saved = state(12)
    checkpoints.save_checkpoint(tmp_path, saved)
    found = checkpoints.load_newest([tmp_path])
    assert (found.result_digest, found.step, found.history, found.window) == ("c", 12, saved.history, saved.window)
    for mine, theirs in ((saved.weights, found.weights), (saved.optimizer, found.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
    assert not list(tmp_path.glob("checkpoints/.*"))


def test_the_most_updates_win_over_all_attempts(tmp_path: Path) -> None:
    for attempt, step in (("1", 30), ("2", 20)):
        checkpoints.save_checkpoint(tmp_path / attempt, state(step))
    assert checkpoints.load_newest([tmp_path / "1", tmp_path / "2"]).step == 30
    checkpoints.remove_checkpoints([tmp_path / "1", tmp_path / "2"], before=30)
    assert [p.name for p in tmp_path.glob("*/checkpoints/*")] == ["step-00000030"]
    checkpoints.remove_checkpoints([tmp_path / "1"])
    assert checkpoints.load_newest([tmp_path / "1", tmp_path / "2", tmp_path / "none"]) is None


def test_nothing_is_left_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save_checkpoint(tmp_path, state(10))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save_checkpoint(tmp_path, state(20))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_nan_is_refused_in_the_history(tmp_path: Path) -> None:
    bad = checkpoints.TrainState("c", 1, {}, {}, [StepMetrics(1, {"loss": float("nan")})])
    with pytest.raises(ValueError, match="JSON"):
        checkpoints.save_checkpoint(tmp_path, bad)
