import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest

import sweeps
from orchestrator import cli
from orchestrator.commands import doctor
from orchestrator.commands.doctor import Check, CheckLevel, gpu_checks, machine_checks, network_checks
from orchestrator.folders import filesystem_type
from orchestrator.spec.loading.loader import load_spec
from tests.support.http_server import SilentHandler, refusing, serving
from tests.support.processes import LIMIT_SECONDS

SHIPPED = Path(sweeps.__file__).parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    return tmp_path


class Hub(SilentHandler):
    """A hub on loopback: what each repository answers to who asks whether he may have it."""

    answers: ClassVar[dict[str, tuple[int, str]]] = {
        "/api/models/org/open/auth-check": (200, ""),
        "/api/models/org/gated/auth-check": (403, "GatedRepo"),
        "/api/datasets/org/pairs/auth-check": (200, ""),
        "/api/models/org/none/auth-check": (401, "RepoNotFound"),
        "/health": (200, ""),
        "/other/health": (404, ""),
        "/closed/health": (401, ""),
    }

    def do_GET(self) -> None:
        code, error = self.answers.get(self.path, (500, ""))
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(network_checks, "_TIMEOUT", LIMIT_SECONDS)
    with serving(Hub) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        yield address


def found(checks: list[Check], what: str) -> Check:
    return next(check for check in checks if check.what == what)


def test_every_problem_has_its_fix(home: Path) -> None:
    checks = doctor.run_checks(home / "runs")
    assert all(check.fix for check in checks if check.level is not CheckLevel.OK)
    expected = {"python", "torch", "gpu", "flash-attention", "cores", "memory", "/dev/shm", "disk", "filesystem"}
    assert expected | {"ray", "ray sessions", "hub token", "tracking"} <= {check.what for check in checks}
    assert not (home / "runs").exists()


def test_json_and_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary@127.0.0.1:1/")
    assert cli.main(["doctor", "--json"]) in (0, 2)
    out = capsys.readouterr().out
    messages = {check["what"]: check for check in json.loads(out)["checks"]}
    assert (messages["hub token"]["found"], messages["tracking"]["level"]) == ("present", "warn")
    assert "canary" not in out


# --- elsewhere -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "name", "level", "told"),
    [
        ("model", "org/open", CheckLevel.OK, "can be downloaded"),
        ("dataset", "org/pairs", CheckLevel.OK, "can be downloaded"),
        ("model", "org/gated", CheckLevel.FAIL, "gated"),
        ("model", "org/none", CheckLevel.FAIL, "not found"),
        ("model", "org/broken", CheckLevel.WARN, "does not answer"),
    ],
)
def test_access_to_models_and_data_sets(kind: str, name: str, level: CheckLevel, told: str, hub: str) -> None:
    check = network_checks.check_hub_access(kind, name)
    assert (check.level, check.what) == (level, f"{kind} {name}")
    assert told in check.found
    if told == "gated":
        assert f"{hub}/org/gated" in check.fix
        assert "hf auth login" in check.fix


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with refusing() as port:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        check = network_checks.check_hub_access("model", "org/open")
    assert check.level is CheckLevel.WARN, check
    assert "HF_HOME" in check.fix


def test_offline_and_not_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check = network_checks.check_hub_access("model", "org/open")
    assert check.level is CheckLevel.FAIL
    assert "HF_HUB_OFFLINE" in check.found


def test_the_names_of_a_sweep(tmp_path: Path) -> None:
    names = network_checks.hub_names(load_spec(SHIPPED / "llama3-8b.yaml"))
    assert ("model", "princeton-nlp/Llama-3-Base-8B-SFT") in names
    assert ("dataset", "HuggingFaceH4/ultrafeedback_binarized") in names
    assert network_checks.hub_names(load_spec(SHIPPED / "quickstart.yaml")) == []
    here = load_spec(SHIPPED / "llama3-8b.yaml", [f"model.name_or_path={tmp_path}"])
    assert [kind for kind, _ in network_checks.hub_names(here)] == ["dataset"]


def test_a_sweep_file_is_looked_at_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        storage = f"storage=postgresql+psycopg://me@127.0.0.1:{server.getsockname()[1]}/db"
        cli.main(["doctor", str(SHIPPED / "llama3-8b.yaml"), "--json", "--set", storage])
    messages = json.loads(capsys.readouterr().out)
    levels = {check["what"]: check["level"] for check in messages["checks"]}
    assert (levels["model princeton-nlp/Llama-3-Base-8B-SFT"], levels["study"]) == ("fail", "ok")
    assert messages["healthy"] is False
    assert cli.main(["doctor", str(tmp_path / "none.yaml")]) == 2


def test_a_database_that_does_not_answer() -> None:
    with refusing() as port:
        spec = load_spec(SHIPPED / "quickstart.yaml", [f"storage=postgresql+psycopg://me@127.0.0.1:{port}/db"])
        check = found(list(network_checks.network_checks(Path("runs"), spec)), "study")
    assert check.level is CheckLevel.FAIL
    assert ".pgpass" in check.fix


def test_a_mirror_that_can_be_written_to_and_one_that_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = [f"mirror=file://{tmp_path}/far", f"tracking.artifacts=file://{tmp_path}/file/below"]
    checks = list(network_checks.network_checks(Path("runs"), load_spec(SHIPPED / "quickstart.yaml", given)))
    assert found(checks, "mirror").level is CheckLevel.OK
    assert not any((tmp_path / "far").iterdir())
    assert found(checks, "artifacts").level is CheckLevel.FAIL
    assert "environment" in found(checks, "artifacts").fix


@pytest.mark.parametrize(
    ("path", "level"), [("", CheckLevel.OK), ("/other", CheckLevel.WARN), ("/closed", CheckLevel.OK)]
)
def test_a_tracking_server(path: str, level: CheckLevel, hub: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", hub + path)
    assert found(list(network_checks.network_checks(home, None)), "tracking").level is level


def test_a_proxy_whose_package_is_missing(home: Path, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", hub.replace("127.0.0.1", "0.0.0.0"))
    check = found(list(network_checks.network_checks(home, None)), "tracking")
    assert check.level is CheckLevel.WARN
    assert "Using SOCKS proxy" in check.found


# --- the machine -----------------------------------------------------------------------------------------------------
def test_sqlite_on_a_network_filesystem_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "filesystem_type", lambda path: "nfs4")
    assert found(list(machine_checks.machine_checks(home, None)), "filesystem").level is CheckLevel.FAIL
    spec = load_spec(SHIPPED / "quickstart.yaml", ["storage=postgresql+psycopg://me@db/sweeps"])
    assert found(list(machine_checks.machine_checks(home, spec)), "filesystem").level is CheckLevel.OK


def test_the_filesystem_of_the_nearest_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [("/", "ext4"), ("/data", "ext4"), ("/data", "nfs4"), ("/data/my disk", "tmpfs")]
    listed = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: listed)
    kinds = {path: filesystem_type(Path(path)) for path in ("/home", "/data/runs", "/data/my disk/x", "/dataset")}
    assert kinds == {"/home": "ext4", "/data/runs": "nfs4", "/data/my disk/x": "tmpfs", "/dataset": "ext4"}


class Room:
    def __init__(self, free: float) -> None:
        self.free = self.total = int(free * (1 << 30))


@pytest.mark.parametrize(("free", "level"), [(0.06, CheckLevel.WARN), (8.0, CheckLevel.OK)])
def test_shared_memory(free: float, level: CheckLevel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: Room(free))
    assert machine_checks.shared_memory(tmp_path).level is level
    assert machine_checks.shared_memory(tmp_path / "none").level is CheckLevel.WARN


@pytest.mark.parametrize(("free", "level"), [(1.0, CheckLevel.FAIL), (20.0, CheckLevel.WARN), (500.0, CheckLevel.OK)])
def test_disk(free: float, level: CheckLevel, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: Room(free))
    assert found(list(machine_checks.machine_checks(home, None)), "disk").level is level


def test_doctor_and_plan_name_one_disk_need_and_count_what_they_list(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(SHIPPED / "quickstart.yaml")
    for changes in ((), ("--set", "budget.trials=1"), ("--set", "sft.training.max_steps=2")):
        assert cli.main(["plan", file, *changes, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert cli.main(["doctor", file, *changes, "--json"]) == 0
        checks = json.loads(capsys.readouterr().out)
        disk = next(check["found"] for check in checks["checks"] if check["what"] == "disk")
        assert disk.endswith(f"; the sweep needs {plan['disk']}")
        assert sum(checks["counts"].values()) == len(checks["checks"])
        places = [written["path"] for written in plan["writes"]]
        assert len(places) == len(set(places)), "each place once"
        assert cli.main(["plan", file, *changes]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"at most {plan['disk']} " in said
        assert f"files and folders to be written: {len(places)} " in said
        assert f"corner trials: {len(plan['corners'])}, all checked" in said
    assert cli.main(["doctor", file]) == 0
    *lines, count = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.split() and line.split()[0] in ("ok", "warn", "fail")]
    assert count.startswith(f"checks: {len(rows)} (")


def test_the_disk_that_a_sweep_takes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: Room(60.0))
    check = found(list(machine_checks.machine_checks(home, load_spec(SHIPPED / "llama3-8b.yaml"))), "disk")
    assert check.level is CheckLevel.FAIL
    assert "the sweep needs" in check.found
    assert (
        found(list(machine_checks.machine_checks(home, load_spec(SHIPPED / "quickstart.yaml"))), "disk").level
        is CheckLevel.OK
    )


# --- GPUs ------------------------------------------------------------------------------------------------------------
def test_torch_that_cannot_see_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("torch").cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_checks, "visible_gpus", lambda: 2)
    monkeypatch.setattr(gpu_checks, "driver_version", lambda: None)
    checks = list(gpu_checks.gpu_checks(None))
    assert found(checks, "gpu").level is CheckLevel.FAIL
    assert found(checks, "driver").level is CheckLevel.FAIL


def test_a_sweep_that_wants_gpus_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("torch").cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_checks, "visible_gpus", lambda: 0)
    spec = load_spec(
        SHIPPED / "llama3-8b.yaml", ["resources.gpus_per_trial=1", "model.load_in_4bit=true", "base.lora={}"]
    )
    monkeypatch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: None)
    checks = list(gpu_checks.gpu_checks(spec))
    assert found(checks, "gpu").level is CheckLevel.FAIL
    assert found(checks, "bitsandbytes").level is CheckLevel.FAIL


@pytest.mark.parametrize(
    ("version", "cuda", "level"),
    [
        ("570.86.15", "13.0", CheckLevel.FAIL),
        ("580.65.06", "13.0", CheckLevel.OK),
        ("535.104.05", "12.8", CheckLevel.OK),
        ("470.1", "12.1", CheckLevel.FAIL),
        ("470.1", None, CheckLevel.OK),
    ],
)
def test_drivers(version: str, cuda: str | None, level: CheckLevel) -> None:
    (check,) = gpu_checks.check_driver(1, version, cuda)
    assert check.level is level
    assert version in check.found


def test_the_version_in_proc(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert gpu_checks.driver_version(file) == "535.104.05"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert gpu_checks.driver_version(file) == "580.65.06"


@pytest.mark.parametrize(
    ("capability", "built", "level"), [((7, 5), True, "warn"), ((9, 0), True, "ok"), ((9, 0), False, "warn")]
)
def test_flash_attention(capability: tuple[int, int], built: bool, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(gpu_checks, "visible_gpus", lambda: 1)
    monkeypatch.setattr(gpu_checks, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    check = found(list(gpu_checks.gpu_checks(None)), "flash-attention")
    assert check.level.value == level
    assert check.fix or level == "ok"


# --- Ray -------------------------------------------------------------------------------------------------------------
def test_sessions_that_nobody_has_any_more(tmp_path: Path) -> None:
    assert [check.level for check in machine_checks.ray_checks(tmp_path)] == [CheckLevel.OK]
    (tmp_path / "prefsweep-dead").mkdir()
    (check,) = machine_checks.ray_checks(tmp_path)
    assert check.level is CheckLevel.WARN
    assert str(tmp_path / "prefsweep-dead") in check.fix


def test_an_old_ray_and_no_place_for_it(tmp_path: Path) -> None:
    assert found(list(machine_checks.ray_checks(tmp_path, "2.9.3")), "ray version").level is CheckLevel.FAIL
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert found(list(machine_checks.ray_checks(tmp_path)), "ray sessions").level is CheckLevel.FAIL
