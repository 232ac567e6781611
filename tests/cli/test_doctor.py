from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.commands import doctor
from orchestrator.commands.doctor import Level


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def level(what: str, home: Path) -> Level:
    return next(check.level for check in doctor.examine(home / "runs") if check.what == what)


def test_every_problem_has_its_fix(home: Path) -> None:
    checks = doctor.examine(home / "runs")
    assert all(check.fix for check in checks if check.level is not Level.OK)
    assert {"python", "torch", "gpu", "cores", "memory", "disk", "filesystem", "hub token", "tracking"} <= {
        check.what for check in checks
    }
    assert not (home / "runs").exists()


def test_json_and_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary@127.0.0.1:1/")
    assert cli.main(["doctor", "--json"]) in (0, 2)
    out = capsys.readouterr().out
    found = {check["what"]: check for check in json.loads(out)["checks"]}
    assert found["hub token"]["found"] == "present"
    assert found["tracking"]["level"] == "note"
    assert "canary" not in out


def test_a_tracking_server_that_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert level("tracking", home) is Level.OK


def test_sqlite_on_a_network_filesystem_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "filesystem", lambda path: "nfs4")
    assert level("filesystem", home) is Level.MISSING


def test_the_filesystem_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("dev / ext4 rw 0 0\nhost:/x /data nfs4 rw 0 0\nt /data/my\\040disk tmpfs rw 0 0\n")
    kinds = {
        path: doctor.filesystem(Path(path), mounts) for path in ("/home", "/data/runs", "/data/my disk/x", "/dataset")
    }
    assert kinds == {"/home": "ext4", "/data/runs": "nfs4", "/data/my disk/x": "tmpfs", "/dataset": "ext4"}


def test_torch_that_cannot_see_the_card(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "visible_gpus", lambda: 2)
    assert level("gpu", home) is Level.MISSING
    assert level("flash-attn", home) is Level.NOTE
