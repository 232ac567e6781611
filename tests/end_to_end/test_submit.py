"""`submit` hands over the bytes that `plan` prints; a Slurm job that runs out of time goes on in the next one."""

import json
import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from orchestrator import cli
from orchestrator.commands.status import status
from tests.faults.storm import NAME, sweep_file
from tests.support.processes import LIMIT_SECONDS, wait_until

JOB = ["--cpus-per-machine", "1", "--gpus-per-machine", "0", "--time", "60"]
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


def _program(path: Path, name: str, text: str) -> None:
    path.mkdir(exist_ok=True)
    file = path / name
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def sweep(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(fast_tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = sweep_file(trials=2, seed=1)
    given["budget"] = {"trials": 2, "concurrency": 1}
    given["pruner"] = "none"
    given["base"]["training"] |= {"max_steps": 150, "eval_steps": 50}
    file = fast_tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


@pytest.mark.parametrize(
    ("options", "command", "told"),
    [(["--slurm", *JOB], "sbatch", []), (["--kuberay", "--image", "a/b:1"], "kubectl", ["apply", "-f", "-"])],
)
def test_the_bytes_of_plan_are_the_bytes_that_are_submitted(
    options: list[str],
    command: str,
    told: list[str],
    sweep: Path,
    fast_tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    got = fast_tmp_path / "got"
    _program(fast_tmp_path / "bin", command, f'#!/bin/sh\ncat > {got}\necho "$@" > {got}.options\necho submitted 7\n')
    monkeypatch.setenv("PATH", f"{fast_tmp_path / 'bin'}:{os.environ['PATH']}")
    assert cli.main(["plan", str(sweep), *options]) == 0
    planned = capfdbinary.readouterr().out
    assert cli.main(["submit", str(sweep), *options]) == 0
    messages = capfdbinary.readouterr()
    assert messages.out == b"submitted 7\n"
    assert b"storage=postgresql" in messages.err
    assert b"mirror=s3://" in messages.err
    assert (b"assumed for each machine: 8 GPUs (--gpus-per-machine), 64 CPUs" in messages.err) == (
        "--kuberay" in options
    )
    assert (got.read_bytes(), (fast_tmp_path / "got.options").read_text().split()) == (planned, told)
    assert not (fast_tmp_path / "runs").exists()


def test_without_a_scheduler(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["submit", str(sweep), "--slurm"]) == 2
    assert "sbatch is not installed on this machine" in capsys.readouterr().err
    assert cli.main(["submit", str(sweep)]) == 2
    assert cli.main(["submit", str(sweep), "--slurm", "--kuberay"]) == 2
    assert cli.main(["submit", str(sweep), "--kuberay"]) == 2
    assert "--image" in capsys.readouterr().err


def test_a_scheduler_that_refuses(
    sweep: Path, fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _program(fast_tmp_path / "bin", "sbatch", "#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    monkeypatch.setenv("PATH", f"{fast_tmp_path / 'bin'}:{os.environ['PATH']}")
    assert cli.main(["submit", str(sweep), "--slurm"]) == 2
    assert "invalid partition" in capsys.readouterr().err


def _job(script: bytes, path: Path, restarts: int) -> subprocess.Popen[str]:
    """What slurmd does with a batch script, as far as the script can tell."""
    env = os.environ | {
        "PATH": f"{path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_RESTART_COUNT": str(restarts),
        "PREFSWEEP_HEAD_IP": "127.0.0.1",
    }
    for name in [name for name in env if name.startswith("RAY_")]:
        env.pop(name)  # a batch job does not have them
    file = path / "script.sh"
    file.write_bytes(script)
    log = (path / "job.log").open("ab")
    return subprocess.Popen(["bash", str(file)], env=env, stdout=log, stderr=log, text=True, start_new_session=True)


@pytest.mark.slow
def test_a_job_out_of_time_requeues_itself_and_goes_on(
    sweep: Path, fast_tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert cli.main(["plan", str(sweep), "--slurm", *JOB]) == 0
    script = capfdbinary.readouterr().out
    _program(fast_tmp_path / "bin", "srun", SRUN)
    _program(fast_tmp_path / "bin", "scontrol", f'#!/bin/sh\necho "$@" >> {fast_tmp_path / "scontrol.log"}\n')
    root, log = fast_tmp_path / "runs", fast_tmp_path / "job.log"

    first, started = _job(script, fast_tmp_path, 0), root / NAME / "trials" / "0000" / "1"
    wait_until(lambda: first.poll() is not None or list(started.glob("checkpoints/step-*")), log.read_text)
    assert first.poll() is None, log.read_text()
    token = next(root.glob(".slurm-*/token"))
    assert token.stat().st_mode & 0o077 == 0
    secret = token.read_text()
    os.kill(first.pid, signal.SIGUSR1)
    assert first.wait(timeout=LIMIT_SECONDS) == 130, log.read_text()
    assert (fast_tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    assert not list(root.glob(".slurm-*"))
    assert status(NAME, root)["state"] == "interrupted"

    assert _job(script, fast_tmp_path, 1).wait(timeout=LIMIT_SECONDS) == 0, log.read_text()
    assert (fast_tmp_path / "scontrol.log").read_text() == "requeue 4711\n", "nothing to requeue"
    found = status(NAME, root)
    assert ([t["state"] for t in found["trials"]], found["trials"][0]["attempts"]) == (["COMPLETE"] * 2, 2)
    assert secret not in log.read_text()
    assert secret not in json.dumps(found)
