"""The commands on a machine whose only GPU another sweep has."""

import json
import os
import pwd
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sweeps
from orchestrator import cli, gpus
from orchestrator.driver import run_sweep
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted
from orchestrator.study.study import Study
from orchestrator.study.trial_records import RequestKind
from tests.support.gpu_driver import VISIBLE, GpuDriver, machine
from tests.support.processes import LIMIT_SECONDS, finished, json_of, orchestrate, wait_until
from tests.support.recorders import SilentView
from tests.support.specs import make_spec, sweep_folder

QUICKSTART = str(Path(sweeps.__file__).parent / "quickstart.yaml")
GPU = "GPU-00000000-0000"


@pytest.fixture
def busy(fast_tmp_path: Path) -> Iterator[tuple[GpuDriver, dict[str, str]]]:
    """The sweep `first` has the GPU; the variables of commands on that machine."""
    environment = machine(fast_tmp_path, 1)
    driver = GpuDriver(environment, "first")
    assert driver.takes() == ["0"]
    yield driver, {name: environment[name] for name in ("PATH", "ORCHESTRATE_GPU_LOCKS")} | {VISIBLE: "0"}
    driver.process.kill()
    driver.process.communicate()


def test_plan_and_doctor_say_who_has_the_gpu(
    busy: tuple[GpuDriver, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    driver, variables = busy
    for name, value in (variables | {"ORCHESTRATE_HOME": str(tmp_path / "runs")}).items():
        monkeypatch.setenv(name, value)
    gpus.forget_gpus()

    def found(*arguments: str) -> Any:
        cli.main([*arguments, "--json"])
        return json.loads(capsys.readouterr().out)

    def checks() -> dict[str, str]:
        return {check["what"]: check["found"] for check in found("doctor")["checks"]}

    try:
        who = f"by sweep first of {pwd.getpwuid(os.getuid()).pw_name} (pid {driver.process.pid}, since "
        (notice,) = [line for line in found("plan", QUICKSTART)["notices"] if "in use" in line]
        assert notice.startswith(f"1 GPU is in use: GPU 0 {who}")
        assert notice.endswith("; a sweep that starts now waits for them (--no-wait refuses)")
        known = f"NVIDIA A100-SXM4-80GB, 79.6 GiB, {GPU}"
        assert checks()["gpu 0"].startswith(f"{known}, in use {who}")
        driver.ends()
        assert checks()["gpu 0"] == f"{known}, free"
        monkeypatch.setenv(VISIBLE, "")
        assert checks()["gpu 0"] == f"{known}, free, hidden by CUDA_VISIBLE_DEVICES=''"
    finally:
        gpus.forget_gpus()


def test_a_request_to_stop_ends_the_waiting_of_a_sweep_that_was_resumed(
    busy: tuple[GpuDriver, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in busy[1].items():
        monkeypatch.setenv(name, value)
    gpus.forget_gpus()
    folder, spec = sweep_folder(tmp_path), make_spec(2)
    folder.path.mkdir(parents=True)
    with Study.create(folder, spec) as study:
        study.add_request(RequestKind.STOP, "by me")
    try:
        with (
            SignalHandler(lambda: "") as signals,
            pytest.raises(StageInterrupted),
            run_sweep._own_gpus(folder, spec, None, signals, SilentView(), waits=True),
        ):
            raise AssertionError("it has a GPU")
    finally:
        gpus.forget_gpus()
    assert not (folder.path / "waiting.txt").exists()


def test_a_sweep_that_waits_can_be_refused_interrupted_and_left_in_the_background(
    busy: tuple[GpuDriver, dict[str, str]], tmp_path: Path
) -> None:
    driver, variables = busy
    root = tmp_path / "runs"
    _, refused = finished(root, "sweep", QUICKSTART, "--no-wait", code=4, **variables)
    assert "1 GPU is in use: GPU 0 by sweep first of " in refused
    assert not (root / "quickstart").exists(), "the name is free"

    _, said = finished(root, "sweep", QUICKSTART, "--detach", **variables)
    assert "waiting for a GPU: 1 GPU is in use: GPU 0 by sweep first of " in said
    status = json_of(root, "status", "quickstart")
    assert (status["state"], status["why"].partition(":")[0]) == ("preparing", "waiting for a GPU")
    watching = orchestrate(root, "attach", "quickstart")
    assert watching.stderr is not None
    assert "waiting for a GPU: 1 GPU is in use" in watching.stderr.readline()
    watching.kill()
    watching.communicate()
    (pid,) = {int(line.split()[1]) for line in said.splitlines() if line.startswith("  kill ")}
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: json_of(root, "status", "quickstart")["state"] == "interrupted")
    assert not (root / "quickstart" / "waiting.txt").exists()

    resumed = orchestrate(root, "resume", "quickstart", **variables)
    assert resumed.stderr is not None
    said = ""
    while "waiting for a GPU" not in said:
        said = resumed.stderr.readline()
        assert said, "it has ended"
    driver.ends()
    while "starting Ray" not in said:
        said = resumed.stderr.readline()
        assert said, "it has ended"
    resumed.send_signal(signal.SIGINT)
    resumed.communicate(timeout=LIMIT_SECONDS)
    assert resumed.returncode == 130
