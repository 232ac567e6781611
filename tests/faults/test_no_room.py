"""Case 11: a full disk stops the sweep with its own exit code and loses nothing; and it is foreseen where it can be."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.driver import preflight
from orchestrator.driver.checkpoint_retention import CheckpointRetention, model_folder
from orchestrator.driver.preflight import DiskTooSmall, check_disk_space
from orchestrator.errors import ExitCode, StorageRefused
from orchestrator.execution.slots import Slots
from orchestrator.folders import SweepFolder
from orchestrator.spec.estimates.disk_space import disk_need, parameter_count
from orchestrator.study.database import study_database
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_client import connect
from tests.support.local_driver import drive, forked
from tests.support.metrics import COMPLETE, DIVERGED, evaluated
from tests.support.specs import METRIC, make_spec
from tests.support.storage_faults import require_mounts, write_locked
from tests.support.sweep_record import differences, sweep_record
from trainer.config.trial import ModelConfig

SMALL_DISK = """
import sys
from pathlib import Path
from tests.support import local_driver
from orchestrator import cli
from orchestrator.cli import command_line
command_line.cli.main = lambda *_, **__: local_driver.drive(Path(sys.argv[1]))  # what the command does with every error
sys.stderr = sys.stdout
sys.exit(cli.main([]))
"""


@pytest.mark.faults
def test_a_disk_of_two_megabytes_that_fills_up(tmp_path: Path) -> None:
    """A real file system, filled to the last bytes: the driver stops with 5, and goes on once there is room."""
    require_mounts()
    calm = tmp_path / "calm"
    calm.mkdir()
    assert forked(lambda: drive(calm)) == 0
    disk, code = tmp_path / "disk", tmp_path / "small_disk.py"  # no name of the standard library
    disk.mkdir()
    code.write_text(SMALL_DISK)
    run = f'"{sys.executable}" "{code}" "{disk}"'
    (tmp_path / "made").mkdir()
    connect(tmp_path / "made", f"sqlite:///{tmp_path / 'made/mlflow.db'}")  # tables alone: they take seconds
    shell = f"""
        mount -t tmpfs -o size=8m none "{disk}" && cp -r "{tmp_path}/made/." "{disk}"
        codes=""
        for room in 0 60 150 300 600; do
            rm -f "{disk}/ballast"
            free=$(df --output=avail -k "{disk}" | tail -1)
            dd if=/dev/zero of="{disk}/ballast" bs=1k count=$((free > room ? free - room : 0)) status=none
            {run} >> "{tmp_path}/said" 2>> "{tmp_path}/trouble"; codes="$codes $?"
        done
        rm -f "{disk}/ballast"
        {run} || exit 99
        cp -r "{disk}/." "{tmp_path}/after"
        echo $codes
    """
    (tmp_path / "after").mkdir()
    done = subprocess.run(["unshare", "-rm", "sh", "-c", shell], capture_output=True, text=True, check=False)
    trouble = (tmp_path / "trouble").read_text()[-2000:]
    assert done.returncode == 0, done.stdout + done.stderr + trouble
    codes = [int(c) for c in done.stdout.split()]
    assert set(codes) <= {0, int(ExitCode.REFUSED)}, trouble
    assert codes.count(int(ExitCode.REFUSED)) >= 2, codes
    messages = (tmp_path / "said").read_text()
    assert "No space left" in messages or "disk is full" in messages
    shutil.copytree(tmp_path / "after", disk, dirs_exist_ok=True)  # where the study and MLflow say their files are
    assert differences(sweep_record(calm, "s"), sweep_record(disk, "s")) == []


def test_a_sweep_that_cannot_fit_is_refused_before_it_begins(
    fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = make_spec(4, keep_models=3), SweepFolder(fast_tmp_path, "s")
    need = disk_need(spec, 2)
    check_disk_space(folder, spec, Slots(2, 0.0, 1))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, need.bytes - 1))
    with pytest.raises(DiskTooSmall, match=r"free in .*budget\.concurrency=1 .*keep_models=1 .*base\.lora") as refused:
        check_disk_space(folder, spec, Slots(2, 0.0, 1))
    assert refused.value.code is ExitCode.REFUSED
    (folder.path / "trials").mkdir(parents=True)
    (folder.path / "trials" / "checkpoint").write_bytes(b"x")
    check_disk_space(folder, spec, Slots(2, 0.0, 1))  # what it wrote itself is part of what it needs


def test_the_size_of_a_model_is_known_before_it_is_loaded(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.synthetic import generate_model

    monkeypatch.setenv("HF_HUB_CACHE", str(fast_tmp_path))
    config = ModelConfig.model_validate({"generated": {"hidden_size": 64, "num_hidden_layers": 3}})
    exact = parameter_count(ModelConfig(name_or_path=str(generate_model(config.generated, fast_tmp_path))))
    assert parameter_count(config) == pytest.approx(exact, rel=0.1)
    assert parameter_count(ModelConfig(name_or_path="meta-llama/Meta-Llama-3-8B-Instruct")) == 8_000_000_000
    assert parameter_count(ModelConfig(name_or_path="Qwen/Qwen2.5-0.5B")) == 500_000_000
    assert parameter_count(ModelConfig(name_or_path="microsoft/phi-4")) is None


def test_48_trials_never_hold_more_than_the_best_and_the_running(fast_tmp_path: Path) -> None:
    spec, most = make_spec(48, keep_models=3), 0
    with Study.create(SweepFolder(fast_tmp_path, "s"), spec) as study:
        folder, running = study.folder, []
        for trial in iter(study.ask, None):
            path = folder.attempt(trial.number, trial.attempt)
            for part in ("checkpoints/step-00000010", "model"):
                (path / part).mkdir(parents=True)
                (path / part / "weights").write_bytes(b"w")
            running.append(trial)
            if len(running) < 2:
                continue
            ended = running.pop(0)
            study.report(ended, [evaluated(1, (ended.number * 7 % 48) / 48)])
            study.tell(ended, DIVERGED if ended.number % 5 == 0 else COMPLETE)
            CheckpointRetention(folder, spec, study.trials())
            most = max(most, len(list(folder.path.glob("trials/*/*/*/weights"))))
            checkpoints = {p.parents[1].name for p in folder.path.glob("trials/*/*/checkpoints")}
            assert checkpoints == {f"{t.number:04d}" for t in running}
        best = sorted((r for r in study.trials() if r.value is not None), key=lambda r: -(r.value or 0))[:3]
        assert [model_folder(folder, r) is not None for r in best] == [True] * 3
        assert spec.first_objective.metric == METRIC
    assert most <= 3 + 2, "three kept, one running with its checkpoint and its weights"


def test_a_locked_study_is_waited_for_and_then_refused_in_words(
    fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SweepFolder(fast_tmp_path, "s")
    Study.create(folder, make_spec(4)).dispose()
    with Study.open(folder) as study:
        trial = study.ask()
        with write_locked(folder.database, 1.0):
            study.report(trial, [evaluated(1, 0.5)])  # a minute's patience is more than that
    monkeypatch.setattr(study_database, "_BUSY_SECONDS", 0.2)
    with Study.open(folder) as study:
        trial = study.ask()
        with write_locked(folder.database), pytest.raises(StorageRefused, match="locked"):
            study.report(trial, [evaluated(2, 0.6)])
        study.report(trial, [evaluated(2, 0.6)])
        assert [p.step for p in study.metric_history(0)] == [1, 2]
