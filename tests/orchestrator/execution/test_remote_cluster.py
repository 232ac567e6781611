"""Joining a cluster: which one is meant, who may, what a trial gets of it."""

from pathlib import Path

import pytest

from orchestrator import execution
from orchestrator.errors import SpecError
from orchestrator.execution import remote_cluster
from orchestrator.execution.remote_cluster import ClusterError, authorize, is_loopback, resolve_address
from orchestrator.execution.slots import Machine, plan_slots, slots_on
from tests.support.specs import make_spec


@pytest.mark.parametrize("asked", ["10.0.0.3:6379", "head-0.cluster.local:6379", "[fd00::1]:6379", "127.0.0.1:1"])
def test_an_address(asked: str) -> None:
    assert resolve_address(asked) == asked


@pytest.mark.parametrize("asked", ["ray://10.0.0.3:10001", "10.0.0.3", "host:0", "host:99999", "a b:1", ""])
def test_no_address(asked: str) -> None:
    with pytest.raises(ClusterError, match="HOST:PORT or auto"):
        resolve_address(asked)


def test_auto(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(fast_tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="ray start"):
        resolve_address("auto")
    (fast_tmp_path / "ray").mkdir()
    (fast_tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.3:6379\n")
    assert resolve_address("auto") == "10.0.0.3:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.4:6379")
    assert resolve_address("auto") == "10.0.0.4:6379"


def test_loopback() -> None:
    messages = {path: is_loopback(path) for path in ("127.0.0.1:1", "localhost:1", "[::1]:1", "10.0.0.3:1", "head:1")}
    assert messages == {"127.0.0.1:1": True, "localhost:1": True, "[::1]:1": True, "10.0.0.3:1": False, "head:1": False}


def test_nobody_joins_without_a_token_unless_the_user_says_so(
    fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote_cluster.Path, "home", lambda: fast_tmp_path)
    monkeypatch.setattr(execution, "USER_AUTH_MODE", None)
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH"):
        authorize()
    (fast_tmp_path / "empty").touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(fast_tmp_path / "empty"))
    with pytest.raises(ClusterError):
        authorize()
    (fast_tmp_path / "token").write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(fast_tmp_path / "token"))
    authorize()
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setattr(execution, "USER_AUTH_MODE", "disabled")
    authorize()


def test_slots_are_the_clusters_and_no_trial_spans_two_machines() -> None:
    spec = make_spec(resources={"cpus_per_trial": 3})
    slots = slots_on(spec, [Machine(4, 0), Machine(7, 0), Machine(2, 0)], is_shared_cluster=True)
    assert (slots.count, slots.gpus, slots.bundles) == (3, 0.0, [{"CPU": 3.0}])
    gpus = slots_on(
        make_spec(resources={"gpus_per_trial": 0.5}), [Machine(8, 1), Machine(3, 2)], is_shared_cluster=True
    )
    assert (gpus.count, gpus.bundles) == (2 + 3, [{"CPU": 1.0, "GPU": 0.5}])
    by_default = slots_on(make_spec(), [Machine(8, 0), Machine(8, 4)], is_shared_cluster=True)
    assert (by_default.count, by_default.gpus) == (4, 1.0)
    complete = slots_on(
        make_spec(resources={"gpus_per_trial": 3}), [Machine(8, 4), Machine(8, 2)], is_shared_cluster=True
    )
    assert complete.count == 1
    assert sum(bundle["CPU"] for bundle in complete.bundles) <= 3.0
    assert [bundle.get("GPU", 0.0) for bundle in complete.bundles] == [0.0, 1.0, 1.0, 1.0]
    assert all(bundle.keys() <= {"CPU", "GPU"} for bundle in complete.bundles), "the cluster knows no slots"
    assert plan_slots(make_spec(), cpus=2, gpus=0).bundles == [{"CPU": 0.0, "slot": 1.0}]


def test_a_cluster_without_room_for_one_trial() -> None:
    with pytest.raises(SpecError, match=r"no machine of the cluster has them \(8 CPUs and 2 GPUs\)"):
        slots_on(make_spec(resources={"gpus_per_trial": 4}), [Machine(8, 2), Machine(8, 2)], is_shared_cluster=True)
