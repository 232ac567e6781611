"""Case 23: no name leads out of the runs folder, and no link is followed."""

from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.errors import InvalidSweepName
from orchestrator.folders import existing_sweep, new_sweep_folder
from tests.support.specs import make_spec
from trainer.storage import checkpoints

NAMES = ["../x", "/etc", "a/b", "a\0b", "..%2f", "a\u2215b", "x" * 300, "", ".", "..", "-rf", ".hidden", "a b", "ä"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_folders(tmp_path: Path, name: str) -> None:
    for ask in (existing_sweep, new_sweep_folder):
        with pytest.raises(InvalidSweepName):
            ask(tmp_path, name)
    with pytest.raises(ValueError, match="name"):
        make_spec(name=name)


@pytest.mark.parametrize("name", ["../x", "..%2f", "a\u2215b", "x" * 300])
def test_at_the_command_line(home: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "resume", "stop", "best"):
        assert cli.main([command, name]) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert not home.exists()


def test_a_linked_sweep_and_a_linked_checkpoint_are_not_followed(tmp_path: Path) -> None:
    from tests.trainer.storage.test_checkpoints import state

    elsewhere = tmp_path / "elsewhere"
    path = checkpoints.save_checkpoint(elsewhere, state(10))
    (elsewhere / "sweep.yaml").write_text("name: s")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "s").symlink_to(elsewhere)
    with pytest.raises(InvalidSweepName, match="no symbolic link"):
        existing_sweep(tmp_path / "runs", "s")
    mine = tmp_path / "mine" / "checkpoints"
    mine.mkdir(parents=True)
    (mine / path.name).symlink_to(path)
    assert checkpoints.load_newest([tmp_path / "mine"]) is None
    checkpoints.remove_checkpoints([tmp_path / "mine"])
    assert path.is_dir()
