"""Ray on this machine: which of its processes run."""

from typing import Any

import pytest

from orchestrator.execution.slots import Slots

CLUSTER_SLOTS = Slots(count=1, gpus=0.0, threads=1)
pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_ray_runs_without_usage_statistics_autoscaler_and_log_monitor() -> None:
    import ray
    from ray._private import worker

    node: Any = worker._global_node
    assert {str(kind) for kind, _ in node.live_processes()} == {"gcs_server", "raylet"}
    assert ray.get(ray.remote(lambda: 1).options(num_cpus=0).remote()) == 1
