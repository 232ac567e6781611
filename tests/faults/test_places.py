"""Runs folders, sweeps and experiments with unusual names: handled, or refused before anything is written."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import cli, folders
from orchestrator.folders import RESERVED_NAMES, SweepFolder, runs_folder
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from orchestrator.tracking.mlflow_client import connect, default_store, ensure_experiment
from tests.support.processes import LIMIT_SECONDS, environment
from tests.support.specs import TINY_MODEL, make_spec

QUICKSTART = str(Path(__file__).parents[2] / "sweeps" / "quickstart.yaml")
UNKNOWN = 23456
"""A user id without an entry in /etc/passwd."""


@pytest.mark.parametrize("folder", ["what?", "a%41b", "~nobody-of-this-name/runs"])
def test_a_runs_folder_that_urls_cannot_name_is_refused_by_every_command(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATE_HOME", folder)
    for command in (["plan", QUICKSTART], ["sweep", QUICKSTART], ["status", "x"], ["ui"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("the runs folder ")
        assert "set ORCHESTRATE_HOME" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["c#d", "100% sure", "ü 文"])
def test_other_unusual_names_of_a_runs_folder_hold_their_databases(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / name))
    root = runs_folder()
    spec = make_spec()
    folder = SweepFolder(root, "s")
    folder.path.mkdir(parents=True)
    Study.create(folder, spec, slots=1, train_pairs=8).dispose()
    with Study.open(folder) as study:
        assert study.spec == spec
    client = connect(root, default_store(root))
    run = client.create_run(ensure_experiment(client, root, default_store(root), "e"))
    client.log_text(run.info.run_id, "here", "a.txt")
    assert (root / "mlflow.db").is_file()
    assert len(list((root / "artifacts" / "e").rglob("a.txt"))) == 1
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_home_and_an_empty_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ORCHESTRATE_HOME", "~/sweeps")
    assert runs_folder() == tmp_path / "home" / "sweeps"
    monkeypatch.setenv("ORCHESTRATE_HOME", "")
    assert runs_folder() == tmp_path / "runs"


@pytest.mark.parametrize("name", sorted(RESERVED_NAMES))
def test_a_sweep_is_not_named_as_what_the_runs_folder_uses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    for command in ("plan", "sweep"):
        assert cli.main([command, QUICKSTART, "--name", name]) == 2
        assert "the runs folder uses itself" in capsys.readouterr().err
    with pytest.raises(folders.ReservedName):
        folders.new_sweep_folder(tmp_path, name)
    assert not (tmp_path / "runs").exists()


def test_a_sweep_that_is_not_found_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "absent"))
    assert cli.main(["status", "x"]) == 2
    assert f"in {tmp_path}/absent, which does not exist" in capsys.readouterr().err
    (tmp_path / "absent").mkdir()
    assert cli.main(["status", "x"]) == 2
    assert f"in {tmp_path}/absent (it has no sweeps yet)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/abs", "/", "../../up", "a/../../b"])
def test_artifacts_of_an_experiment_stay_in_the_runs_folder(name: str, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    client = connect(root, default_store(root))
    run = client.create_run(ensure_experiment(client, root, default_store(root), name))
    client.log_text(run.info.run_id, "here", "a.txt")
    (found,) = tmp_path.rglob("a.txt")
    assert found.is_relative_to(root / "artifacts")
    assert client.download_artifacts(run.info.run_id, "a.txt", str(tmp_path))


@pytest.fixture
def nameless(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command as a user without an entry in /etc/passwd, with HOME unset."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can be another user")
    user = ["setpriv", f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups"]
    reads = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]  # Python may be in root's home
    tmp_path.chmod(0o777)
    env = environment(tmp_path / "runs", TMPDIR=str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME", "HF_HOME"):
        env.pop(name, None)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*user, *reads, sys.executable, "-B", "-m", "orchestrator.cli", *command],
            env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS,
        )  # fmt: skip

    return run


def test_a_user_id_without_a_name_or_a_home_plans_and_is_checked(
    nameless: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    for command in (["plan", QUICKSTART], ["doctor", QUICKSTART], ["status", "x"]):
        done = nameless(*command)
        assert "internal error" not in done.stderr, done.stderr
        assert done.returncode == (2 if command[0] == "status" else done.returncode)
        assert command[0] == "status" or done.stdout


def test_a_user_id_without_a_name_or_a_home_runs_a_sweep(
    tmp_path: Path, nameless: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    small = ("budget.trials=1", "sft=null", "training.max_steps=2", "training.pairs_per_update=8")
    small += ("base.data.train=[{generated: instructions, rows: 64}]", "evaluation.prompts=0", "require=off")
    small += ("base.data.eval=[{generated: instructions, split: eval, rows: 16}]", f"model.generated={TINY_MODEL}")
    done = nameless("sweep", QUICKSTART, "--name", "small", *(f"--set={one}" for one in small))
    assert done.returncode == 0, done.stderr
    with Study.open(SweepFolder(tmp_path / "runs", "small"), read_only=True) as study:
        assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE]
    assert (tmp_path / "runs" / "small" / "study.db").stat().st_uid == UNKNOWN
