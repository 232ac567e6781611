from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from trainer.report import Point
from trainer.storage import checkpoint


def state(step: int, config: str = "c") -> checkpoint.State:
    weights = {"w": torch.full((3, 2), float(step)), "b": torch.arange(4, dtype=torch.bfloat16)}
    history = [Point(0, {"eval_loss": 0.1 + 0.2}), Point(step, {"loss": 1 / 3})]
    return checkpoint.State(config, step, weights, {"exp_avg.w": torch.rand(3, 2)}, history, {"loss": (0.1 + 0.7, 3.0)})


def test_what_is_saved_is_read_back_to_the_bit(tmp_path: Path) -> None:
    saved = state(12)
    checkpoint.save(tmp_path, saved)
    found = checkpoint.newest([tmp_path])
    assert found is not None
    assert (found.config, found.step, found.history, found.window) == ("c", 12, saved.history, saved.window)
    for mine, theirs in ((saved.weights, found.weights), (saved.optimiser, found.optimiser)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
    assert not list(tmp_path.glob("checkpoints/.*"))


def test_the_most_updates_win_over_all_attempts(tmp_path: Path) -> None:
    for attempt, step in (("1", 30), ("2", 20)):
        checkpoint.save(tmp_path / attempt, state(step))
    found = checkpoint.newest([tmp_path / "1", tmp_path / "2"])
    assert found is not None
    assert found.step == 30
    checkpoint.discard([tmp_path / "1", tmp_path / "2"], before=30)
    assert [p.name for p in tmp_path.glob("*/checkpoints/*")] == ["step-00000030"]
    checkpoint.discard([tmp_path / "1"])
    assert checkpoint.newest([tmp_path / "1", tmp_path / "2", tmp_path / "none"]) is None


@pytest.mark.parametrize("name", ["weights.safetensors", "optimiser.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "delete", "empty"])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, state(10))
    place = checkpoint.save(tmp_path, state(20))
    file = place / name
    content = bytearray(file.read_bytes())
    match harm:
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "flip":
            content[len(content) // 2] ^= 0x41
            file.write_bytes(content)
        case "delete":
            file.unlink()
        case _:
            file.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest([tmp_path])
    assert found is not None
    assert found.step == 10
    assert "damaged" in caplog.text
    assert (place.parent / "step-00000020.damaged").is_dir()


def test_a_half_written_one_is_not_seen(tmp_path: Path) -> None:
    place = checkpoint.save(tmp_path, state(10))
    shutil.copytree(place, place.with_name(".step-00000011.abcd.tmp"))
    found = checkpoint.newest([tmp_path])
    assert found is not None
    assert found.step == 10


def test_nothing_is_left_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state(10))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, state(20))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    place = checkpoint.save(tmp_path, state(10))

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (canary,)  # pyright: ignore[reportReturnType]

    for name in ("rng_state.pth", "optimizer.pt", "weights.safetensors"):
        torch.save(Bomb(), place / name)
    assert checkpoint.newest([tmp_path]) is None
    assert not canary.exists()


def test_nan_is_refused_in_the_history(tmp_path: Path) -> None:
    bad = checkpoint.State("c", 1, {}, {}, [Point(1, {"loss": float("nan")})])
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, bad)
