"""Ray on this machine: which of its processes run."""

import os
from typing import Any

import psutil
import pytest

from orchestrator.execution.slots import Slots

CLUSTER_SLOTS = Slots(count=1, gpus=0.0, threads=3)
pytestmark = pytest.mark.usefixtures("ray_cluster")


def children_of_raylet() -> list[list[str]]:
    from ray._private import worker

    node: Any = worker._global_node
    (raylet,) = [process.pid for kind, process in node.live_processes() if str(kind) == "raylet"]
    return [child.cmdline() for child in psutil.Process(raylet).children()]


def stand_ins() -> int:
    return sum(any(part.endswith("agent_stand_in.py") for part in command) for command in children_of_raylet())


def test_ray_runs_without_usage_statistics_autoscaler_and_log_monitor() -> None:
    import ray
    from ray._private import worker

    node: Any = worker._global_node
    assert {str(kind) for kind, _ in node.live_processes()} == {"gcs_server", "raylet"}
    assert ray.get(ray.remote(lambda: 1).options(num_cpus=0).remote()) == 1


def test_workers_have_their_variables_and_start_without_an_agent() -> None:
    import ray

    threads = ray.remote(lambda: os.environ["OMP_NUM_THREADS"]).options(num_cpus=0)
    assert ray.get(threads.remote()) == "3"
    assert stand_ins() == 2


def test_a_process_with_a_runtime_environment_gets_the_agent_that_makes_it() -> None:
    import ray

    variable = ray.remote(lambda: os.environ["OF_ONE_TASK"]).options(
        num_cpus=0, runtime_env={"env_vars": {"OF_ONE_TASK": "yes"}}
    )
    assert ray.get(variable.remote(), timeout=60) == "yes"
    assert stand_ins() == 1
