"""Ray nodes on one machine, started by somebody else: one is killed in the middle of a trial, one has GPUs."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orchestrator import execution  # noqa: F401  what Ray reads when it is imported
from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study
from tests.faults.storm import NAME, sweep_file
from tests.support.fake_gpus import nvidia_list, write_nvidia_smi
from tests.support.processes import LIMIT_SECONDS, finished, orchestrate, wait_until
from tests.support.sweep_record import differences, sweep_record

ROOT = Path(__file__).parents[2]


@pytest.fixture
def token(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The token of a cluster that somebody else started."""
    file = fast_tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return file


@pytest.fixture
def three_nodes(fast_tmp_path: Path, token: Path) -> Iterator[Any]:
    from ray._raylet import AuthenticationTokenLoader
    from ray.cluster_utils import Cluster

    AuthenticationTokenLoader.instance().reset_cache()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": str(fast_tmp_path)}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def _sweep(path: Path) -> Path:
    given = sweep_file(trials=5, seed=3)
    given["budget"] = {"trials": 5, "concurrency": 3}
    given["order"] = {"kind": "reproducible", "lag": 3}
    given["base"]["training"] |= {"max_steps": 120, "save_steps": 5}
    file = path / "sweep.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def _raylet(node: Any) -> int:
    return next(info.process.pid for kind, info in node.all_processes.items() for info in info if kind == "raylet")


def _working(root: Path, raylets: set[int]) -> tuple[int, int] | None:
    """A trial with a checkpoint whose process belongs to one of these nodes, and that node's raylet."""
    for lock in sorted((root / NAME / "trials").glob("*/worker.lock")):
        if not list(lock.parent.glob("1/checkpoints/step-*/manifest.json")) or (lock.parent / "1/model").exists():
            continue
        messages = lock.read_text().split()
        if len(messages) < 2 or not psutil.pid_exists(int(messages[1])):
            continue
        parent = psutil.Process(int(messages[1])).ppid()
        if parent in raylets:
            return int(lock.parent.name), parent
    return None


@pytest.mark.slow
def test_a_node_is_killed_and_its_trial_goes_on_elsewhere(fast_tmp_path: Path, three_nodes: Any) -> None:
    file, alone, hit = _sweep(fast_tmp_path), fast_tmp_path / "alone", fast_tmp_path / "hit"
    driver = orchestrate(hit, "sweep", str(file), "--address", three_nodes.address, "--machines", "3")
    raylets = {_raylet(node): node for node in three_nodes.worker_nodes}
    number, raylet = wait_until(lambda: _working(hit, set(raylets)))
    below = psutil.Process(raylet).children(recursive=True)
    os.kill(raylet, signal.SIGKILL)
    _, err = driver.communicate(timeout=LIMIT_SECONDS)
    assert driver.returncode == 0, err
    assert "3 machines, 3 concurrent trials" in err
    assert not any(process.is_running() and process.status() != "zombie" for process in below), "the node is dead"
    with Study.open(SweepFolder(hit, NAME)) as study:
        records, events = study.trials(), study.events()
    assert records[number].attempts == 2, [record.attempts for record in records]
    assert {record.attempts for record in records if record.number != number} == {1}
    assert [event.trial for event in events if event.kind == "worker lost"] == [number]
    assert (hit / NAME / "trials" / f"{number:04d}" / "2").is_dir()
    finished(alone, "sweep", str(file))
    assert differences(sweep_record(alone, NAME), sweep_record(hit, NAME)) == []


ARRANGED = """
import sys
from pathlib import Path
from orchestrator import execution
from orchestrator.execution.remote_cluster import ClusterAddress, connect_cluster
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.spec.loading.loader import load_spec
from tests.support.recorders import SilentView
spec = load_spec(Path("sweeps/llama3-8b.yaml"))
with SignalHandler(lambda: "") as signals:
    with connect_cluster(Path(sys.argv[1]), spec, ClusterAddress(sys.argv[2], 2), signals, SilentView()) as found:
        slots, arrangement = found
        print(slots.count, slots.gpus, arrangement.gpus_per_trial, arrangement.trials.distributed)
"""


@pytest.fixture
def node_with_gpus(fast_tmp_path: Path, token: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without GPUs, and a node where nvidia-smi lists eight of 80 GB."""
    from ray._raylet import AuthenticationTokenLoader
    from ray.cluster_utils import Cluster

    AuthenticationTokenLoader.instance().reset_cache()
    write_nvidia_smi(fast_tmp_path, nvidia_list(8))
    monkeypatch.setenv("PATH", str(fast_tmp_path), prepend=os.pathsep)
    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "temp_dir": str(fast_tmp_path / "ray")}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=16, num_gpus=8)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_auto_is_chosen_for_the_gpus_of_the_clusters_nodes(fast_tmp_path: Path, node_with_gpus: Any) -> None:
    """As `plan --on 8xA100-80GB` says it, from what each node's own tool says, asked before anything is spent."""
    done = subprocess.run(
        [sys.executable, "-c", ARRANGED, str(fast_tmp_path / "runs" / "sweep"), node_with_gpus.address],
        capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "4.0", "4.0", "fsdp2"]
