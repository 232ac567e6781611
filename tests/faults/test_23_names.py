"""Case 23: no name leads out of the runs folder, and no link is followed."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted import make_spec

from orchestrator import cli
from orchestrator.errors import BadName
from orchestrator.folders import existing, fresh
from trainer.storage import checkpoints

NAMES = ["../x", "/etc", "a/b", "a\0b", "..%2f", "a\u2215b", "x" * 300, "", ".", "..", "-rf", ".hidden", "a b", "ä"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_folders(tmp_path: Path, name: str) -> None:
    for ask in (existing, fresh):
        with pytest.raises(BadName):
            ask(tmp_path, name)
    with pytest.raises(ValueError, match="name"):
        make_spec(name=name)


@pytest.mark.parametrize("name", ["../x", "..%2f", "a\u2215b", "x" * 300])
def test_at_the_command_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    for command in ("status", "resume", "stop", "best"):
        assert cli.main([command, name]) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_linked_sweep_and_a_linked_checkpoint_are_not_followed(tmp_path: Path) -> None:
    from test_checkpoint import state

    elsewhere = tmp_path / "elsewhere"
    place = checkpoints.save(elsewhere, state(10))
    (elsewhere / "sweep.yaml").write_text("name: s")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "s").symlink_to(elsewhere)
    with pytest.raises(BadName, match="no link"):
        existing(tmp_path / "runs", "s")
    mine = tmp_path / "mine" / "checkpoints"
    mine.mkdir(parents=True)
    (mine / place.name).symlink_to(place)
    assert checkpoints.newest([tmp_path / "mine"]) is None
    checkpoints.discard([tmp_path / "mine"])
    assert place.is_dir()
