"""Case 10: a damaged checkpoint is set aside with a warning, the one before is used, and the result is the same."""

import logging
import shutil
from pathlib import Path

import pytest

from tests.support.fake_session import CheckpointingSession
from tests.support.small_trials import finish
from tests.support.specs import make_spec
from tests.trainer.storage.test_checkpoints import state
from trainer.results import RunResult, RunStatus, StepMetrics
from trainer.storage import checkpoints


@pytest.mark.parametrize("name", ["weights.safetensors", "optimiser.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "delete", "empty"])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.save_checkpoint(tmp_path, state(10))
    path = checkpoints.save_checkpoint(tmp_path, state(20))
    file = path / name
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
        found = checkpoints.load_newest([tmp_path])
    assert found.step == 10
    assert "damaged" in caplog.text
    assert (path.parent / "step-00000020.damaged").is_dir()


def test_a_half_written_one_is_not_seen(tmp_path: Path) -> None:
    path = checkpoints.save_checkpoint(tmp_path, state(10))
    shutil.copytree(path, path.with_name(".step-00000011.abcd.tmp"))
    assert checkpoints.load_newest([tmp_path]).step == 10


@pytest.mark.parametrize("harm", ["newest", "all"])
def test_the_trial_goes_on_from_what_is_good_or_from_the_start(tmp_path: Path, harm: str) -> None:
    config = make_spec().base

    def go(folder: Path, *earlier: Path, until: int | None = None) -> tuple[list[StepMetrics], RunResult | None]:
        run = CheckpointingSession().train(config, folder, earlier)
        return finish(run) if until is None else ([next(run) for _ in range(until)], None)

    complete, _ = go(tmp_path / "whole")
    go(tmp_path / "1", until=5)
    (newest,) = (tmp_path / "1" / "checkpoints").iterdir()
    older = newest.with_name("step-00000001")
    shutil.copytree(newest, older)
    for path in [newest] if harm == "newest" else [newest, older]:
        (path / "manifest.json").write_text("{")
    metrics, result = go(tmp_path / "2", tmp_path / "1")
    assert (result.status, result.updates) == (RunStatus.FINISHED, CheckpointingSession.STEPS)
    assert metrics == complete
    assert len(list(tmp_path.glob("1/checkpoints/*.damaged"))) == (1 if harm == "newest" else 2)
