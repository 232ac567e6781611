"""`archive` and `unarchive`: the original is there until the copy was compared, and killed calls are continued."""

import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.folders import SweepFolder, known_sweeps, sweep_lock
from orchestrator.mirror import Mirror
from orchestrator.study.study import Study
from tests.support.local_driver import KILLED, killed_at
from tests.support.processes import call, called
from tests.support.scripted_sweep import Script, make_spec, run_sweep

RATES = {"training.learning_rate": {"choice": [3e-7, 1e-6]}}


@pytest.fixture
def folder(home: Path) -> SweepFolder:
    made = run_sweep(home, make_spec("a", RATES), lambda _: Script())
    made.log.parent.mkdir()
    made.log.write_text("the driver's words", encoding="utf-8")
    return made


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'far away'}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_lock(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name not in ("driver.lock", "study.db")}


def trials(folder: SweepFolder) -> list[object]:
    with Study.open(folder) as study:
        return list(study.trials())


def test_there_and_back(folder: SweepFolder, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, records = without_lock(folder.path), trials(folder)
    assert main(["archive", "a", "--to", url]) == 0
    assert "each compared by its digest" in capsys.readouterr().err
    assert known_sweeps(folder.root) == []
    assert not folder.log.exists()
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["sweeps"]
    assert [(sweep["name"], sweep["state"]) for sweep in listed] == [("a", "archived")]
    assert main(["list"]) == 0
    assert f"at {url}" in capsys.readouterr().out
    for command in ("status", "resume", "best", "report", "logs"):
        assert main([command, "a"]) == 2
        assert "a is archived; `orchestrate unarchive a` brings it back" in capsys.readouterr().err
    assert main(["unarchive", "aa"]) == 2
    assert "did you mean 'a'?" in capsys.readouterr().err
    assert main(["unarchive", "a"]) == 0
    assert without_lock(folder.path) == before
    assert trials(folder) == records
    assert folder.log.read_text(encoding="utf-8") == "the driver's words"
    assert main(["unarchive", "a", "--from", url]) == 2  # the name is taken
    assert main(["archive", "a", "--to", url]) == 0
    assert "were there already" in capsys.readouterr().err
    assert main(["unarchive", "a", "--from", url]) == 0
    assert trials(folder) == records


def test_what_cannot_be_archived_is_refused_and_stays(
    folder: SweepFolder, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder.path)
    with sweep_lock(folder):
        assert main(["archive", "a", "--to", url]) == 4
    (folder.path / "link").symlink_to(tmp_path)
    assert main(["archive", "a", "--to", url]) == 2
    assert "is a symbolic link" in capsys.readouterr().err
    (folder.path / "link").unlink()
    assert main(["archive", "a", "--to", "fiel:///there"]) == 2
    assert "did you mean file://" in capsys.readouterr().err
    Mirror(f"{url}/archived-sweeps/a").write("id", b"of another sweep")
    assert main(["archive", "a", "--to", url]) == 2
    assert "another sweep named a" in capsys.readouterr().err
    assert main(["unarchive", "b", "--from", url]) == 2
    assert "no complete archive of b" in capsys.readouterr().err
    assert {n: c for n, c in contents(folder.path).items() if n != "driver.lock"} == {
        n: c for n, c in before.items() if n != "driver.lock"
    }


def test_a_damaged_copy_is_not_brought_back(
    folder: SweepFolder, url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["archive", "a", "--to", url]) == 0
    copy = next((tmp_path / "far away").rglob("sweep.yaml"))
    good = copy.read_bytes()
    copy.write_bytes(good[:-1] + b"x")
    assert main(["unarchive", "a"]) == 5
    assert "differs from its digest" in capsys.readouterr().err
    assert known_sweeps(folder.root) == []
    copy.write_bytes(good)
    assert main(["unarchive", "a"]) == 0
    assert len(trials(folder)) == 2


@pytest.mark.parametrize("point", ["mirror.file:3", "mirror.list", "archive.copied", "delete.moved", "delete.files"])
def test_an_archive_that_was_killed_is_continued(point: str, folder: SweepFolder, url: str) -> None:
    records = trials(folder)
    done = killed_then_finished(folder.root, point, "archive", "a", "--to", url)
    if point == "mirror.file:3":
        assert "2 were there already" in done or "3 were there already" in done
    assert known_sweeps(folder.root) == []
    assert not (folder.root / ".deleted").exists()
    assert main(["unarchive", "a"]) == 0
    assert trials(folder) == records


@pytest.mark.parametrize("point", ["mirror.file-fetched:3", "unarchive.fetched"])
def test_an_archive_whose_return_was_killed_is_continued(point: str, folder: SweepFolder, url: str) -> None:
    before, records = without_lock(folder.path), trials(folder)
    assert main(["archive", "a", "--to", url]) == 0
    killed_then_finished(folder.root, point, "unarchive", "a")
    assert without_lock(folder.path) == before
    assert trials(folder) == records
    assert [path.name for path in folder.root.iterdir() if "archive" in path.name] == []


def killed_then_finished(root: Path, point: str, *arguments: str) -> str:
    assert killed_at(lambda: call(root, *arguments), point) == KILLED
    return called(root, *arguments)[1]
