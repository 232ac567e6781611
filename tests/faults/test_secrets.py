"""Case 24: tokens and passwords are in no file, no database, no argument and no log that a sweep leaves behind."""

import sqlite3
import subprocess
from pathlib import Path

import psutil
import pytest

from orchestrator.errors import PasswordInUrl
from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study
from tests.faults.storm import _merged, sweep_file
from tests.support.local_driver import drive, forked, make_controller
from tests.support.processes import orchestrate
from tests.support.recorders import ListSink, SilentView
from tests.support.specs import make_spec

CANARIES = {
    "HF_TOKEN": "hf_canary0000000001",
    "MLFLOW_TRACKING_PASSWORD": "canary-password-0002",
    "WANDB_API_KEY": "canary-key-00000003",
    "PGPASSWORD": "canary-secret-00004",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-00000005",
}


def found_in(root: Path) -> list[str]:
    return [
        f"{name} in {file}"
        for file in root.rglob("*")
        if file.is_file() and not file.is_symlink()
        for name, value in CANARIES.items()
        if value.encode() in file.read_bytes()
    ]


def test_a_failing_trial_tells_no_secret(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)

    def go() -> None:
        from tests.support import local_driver

        def fails(*_: object) -> object:
            raise RuntimeError(f"401 for https://me:{CANARIES['PGPASSWORD']}@host with {CANARIES['HF_TOKEN']}")
            yield

        local_driver.CheckpointingSession.train = fails  # pyright: ignore[reportAttributeAccessIssue]
        drive(fast_tmp_path, make_spec(2))

    assert forked(go) == 0
    with Study.open(SweepFolder(fast_tmp_path, "s")) as study:
        assert [r.reason for r in study.trials()] == ["RuntimeError: 401 for https://***@host with ***"] * 2
    assert found_in(fast_tmp_path) == []
    with sqlite3.connect(fast_tmp_path / "mlflow.db") as store:
        assert "canary" not in "".join(store.iterdump())


def test_a_password_in_the_studys_url_is_refused_and_not_repeated(fast_tmp_path: Path) -> None:
    spec = make_spec(2, storage="postgresql+psycopg://me:canary-secret@host/db")
    with pytest.raises(PasswordInUrl) as refused:
        Study.create(SweepFolder(fast_tmp_path, "s"), spec)  # pyright: ignore[reportArgumentType]
    assert "canary" not in str(refused.value)


def test_what_ray_says_of_a_lost_worker_tells_no_secret(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causes are Ray's own texts: they name environments, arguments and addresses."""
    from orchestrator.execution.tune_adapter import TuneTrial
    from orchestrator.execution.workers import multi_process_trial, shared_worker

    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DB_PASSWORD", "/canary/0000006")
    messages = RuntimeError(" ".join([*CANARIES.values(), "/canary/0000006", "https://me:canary@host"]))
    trial = TuneTrial("train", stub=True)
    trial.handle_error(messages)
    for cause in (trial.death_cause, multi_process_trial._line(messages), shared_worker._lost_message(messages)):  # pyright: ignore[reportPrivateUsage]
        assert "canary" not in cause
        assert "***" in cause
    view, sink = SilentView(), ListSink()
    with Study.create(SweepFolder(fast_tmp_path, "s"), make_spec(1)) as study:
        driven = make_controller(study, sink, view)
        for _ in range(3):
            driven.on_worker_lost(driven.next_attempt(1).id, trial.death_cause)
        logged = [driven.stop_reason.text, *view.said, *(event.text for event in study.events()), str(sink.calls)]
    assert "canary" not in "".join(logged)
    assert found_in(fast_tmp_path) == []


def test_a_notice_and_a_refusal_tell_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestrator.cli import main
    from orchestrator.driver.notifications import NotifyingView
    from orchestrator.execution.stop_reasons import StopKind, StopReason
    from orchestrator.spec.sweep_spec import Notify

    monkeypatch.setenv("DB_PASSWORD", "/canary/0000006")
    sent: list[dict[str, object]] = []

    class Sent:
        def send(self, notice: dict[str, object]) -> None:
            sent.append(notice)

        def take_failures(self) -> list[str]:
            return []

        def close(self, timeout: float) -> None: ...

    config = Notify.model_validate({"command": ["true"]})
    NotifyingView(make_spec(1), SilentView(), Sent(), config).notify_end(  # pyright: ignore[reportArgumentType]
        StopReason(StopKind.WORKERS_LOST, "died of /canary/0000006"), None
    )
    assert "died of ***" in str(sent[0]["text"])
    assert main(["status", "/canary/0000006"]) != 0
    assert "canary" not in "".join(capsys.readouterr())


@pytest.mark.faults
def test_a_whole_sweep_with_ray(tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "storm.yaml"
    small = {
        "sampler": {"kind": "random", "seed": 1, "n_startup_trials": None},
        "pruner": "none",
        "budget": {"trials": 2},
    }
    file.write_text(yaml.safe_dump(_merged(sweep_file(2, 1), small)))
    root = tmp_path / "runs"
    process = orchestrate(root, "sweep", str(file), **CANARIES)
    arguments: set[str] = set()
    while process.poll() is None:
        try:
            for p in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                arguments |= set(p.cmdline())
        except psutil.Error:
            continue
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert found_in(root) == []
    logged = out + err + " ".join(arguments)
    assert [name for name, value in CANARIES.items() if value in logged] == []
