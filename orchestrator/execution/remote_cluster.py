"""An existing Ray cluster: its address (`--address`), the token, checks of its nodes.

A sweep connects as one driver among others and does not change the cluster.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orchestrator
import trainer
from orchestrator import execution, loopback
from orchestrator.errors import OrchestrateError, first_line
from orchestrator.execution.local_cluster import (
    log_ray_to_file,
    prepare_ray_environment,
    propagate_no_secrets,
    server_is_gone,
    starting_ray,
    worker_environment,
)
from orchestrator.execution.slots import Machine, Slots, slots_on, threads_per_process
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted
from orchestrator.gpus import smallest_memory
from orchestrator.interfaces import ProgressView
from orchestrator.redaction import redact
from orchestrator.spec.estimates.arrangement import Arrangement, arranged
from orchestrator.spec.estimates.cost_estimate import trials_per_process
from orchestrator.spec.estimates.gpu_layouts import MachineGpus
from orchestrator.spec.sweep_spec import SweepSpec

AUTO = "auto"
_ADDRESS_PATTERN = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")


class ClusterError(OrchestrateError):
    """The given cluster cannot be used; nothing was started."""


@dataclass(frozen=True, slots=True)
class ClusterAddress:
    """An existing cluster. `address`: HOST:PORT or auto; `machines`: number of machines to wait for."""

    address: str
    machines: int = 1


def resolve_address(cluster_address: str) -> str:
    """Return the cluster's `host:port`; `auto` is RAY_ADDRESS, else the cluster started by `ray start` here.

    Raises:
        ClusterError: the address is invalid, or no cluster runs on this machine.
    """
    found = cluster_address
    if cluster_address == AUTO:
        found = os.environ.get("RAY_ADDRESS", "") or _local_ray_address()
        if not found:
            raise ClusterError(
                "--address auto: no Ray cluster runs on this machine; start one with `ray start --head`, join one "
                "with `ray start --address=HOST:PORT`, or omit --address"
            )
    match = _ADDRESS_PATTERN.fullmatch(found)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ClusterError(
            f"--address {found}: expected HOST:PORT or auto (ray:// is not supported, as the driver must run on a "
            "machine of the cluster)"
        )
    return found


def is_loopback(address: str) -> bool:
    """Return whether this is a loopback address."""
    return loopback.is_loopback(address.rpartition(":")[0].strip("[]"))


def authorize() -> None:
    """Set Ray's authentication mode: token, unless the user set RAY_AUTH_MODE=disabled.

    Raises:
        ClusterError: a token is needed and there is none.
    """
    mode = (execution.USER_AUTH_MODE or "token").lower()
    os.environ["RAY_AUTH_MODE"] = mode
    if mode == "token" and not _has_token():
        raise ClusterError(
            "the cluster's token is missing: set RAY_AUTH_TOKEN_PATH to the file with the token, or put it into "
            "~/.ray/auth_token; only for a cluster without authentication set RAY_AUTH_MODE=disabled"
        )


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    file = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(file) if file else Path.home() / ".ray" / "auth_token"
    return path.is_file() and bool(path.read_text(encoding="utf-8").strip())


def _local_ray_address() -> str:
    path = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


_FORWARDED_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HF_DATASETS_CACHE",
    "TRANSFORMERS_OFFLINE",
)
"""Variables of the driver that are passed to workers; tokens must be set on each machine."""
_RAY_VARIABLES = ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
_CHECK_TIMEOUT = 300.0
"""Seconds for the check worker of every machine to start and answer."""
CONNECT_TIMEOUT = 900.0
"""Seconds to wait for the requested number of machines."""
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class NodeCheck:
    """Result of the check on one machine."""

    host: str
    shared: bool
    """Whether the machine sees the driver's sweep folder."""
    gpu_memory: float | None = None
    """Bytes of its smallest GPU, also of those that Ray was not given; None without one, or where unknown."""


@contextmanager
def connect_cluster(
    folder: Path,
    spec: SweepSpec,
    cluster_address: ClusterAddress,
    signals: SignalHandler,
    view: ProgressView,
    *,
    is_new: bool = True,
) -> Generator[tuple[Slots, Arrangement | None]]:
    """Connect to the cluster within the context; yield the slots of its machines and the arrangement of the trials.

    Workers run the driver's version of the code. The sweep's folder must be on a disk shared by all machines.

    Raises:
        ClusterError: the cluster cannot be reached or used.
        SpecError: no trial fits its machines.
        Interrupted: after a stop signal while waiting.
    """
    address = resolve_address(cluster_address.address)
    authorize()
    # Ray's servers in this process listen on loopback, unless the cluster has other machines.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0" if is_loopback(address) else "1"
    folder.mkdir(parents=True, exist_ok=True)
    import ray
    from ray.exceptions import RayError

    prepare_ray_environment(folder)
    try:
        try:
            with starting_ray(signals):
                ray.init(
                    address=address,
                    log_to_driver=False,
                    configure_logging=False,
                    runtime_env={
                        "env_vars": _environment(threads_per_process(spec, trials_per_process(spec, None))),
                        "py_modules": _code_package(),
                    },
                )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise ClusterError(f"--address {address}: {redact(first_line(error))}") from error
        log_ray_to_file(folder / "driver.log")
        propagate_no_secrets()
        with signals.exit_when_lost(server_is_gone()):
            machines = _wait_for_nodes(cluster_address.machines, signals, view)
            checks = _check_nodes(folder.parent, machines, signals)
            sizes = {node: check.gpu_memory for node, check in checks.items()}
            gpus = [MachineGpus((sizes[node],) * int(has.gpus), has.cpus) for node, has in machines.items()]
            chosen, arrangement = arranged(spec, gpus, is_new=is_new)
            slots = slots_on(chosen, list(machines.values()), is_shared_cluster=True)
            os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots.max_count)
            many = "" if len(machines) == 1 else "s"
            view.log(f"Ray cluster {address}: {len(machines)} machine{many}, {slots.count} concurrent trials")
            yield slots, arrangement
    finally:
        ray.shutdown()


def _environment(threads: int) -> dict[str, str]:
    forwarded = {name: os.environ[name] for name in (*_FORWARDED_VARIABLES, *_RAY_VARIABLES) if name in os.environ}
    return worker_environment(threads) | forwarded


def _code_package() -> list[str]:
    """Return the packages that Ray distributes, so that workers run the driver's version of the code."""
    return [str(Path(str(folder.__file__)).parent) for folder in (trainer, orchestrator)]


def _wait_for_nodes(required: int, signals: SignalHandler, view: ProgressView) -> dict[str, Machine]:
    """Wait for the required number of machines with CPUs; return all live machines by Ray node id."""
    import ray

    deadline = time.monotonic() + CONNECT_TIMEOUT
    logged_count = -1
    while True:
        found: dict[str, Machine] = {}
        listed: Sequence[Mapping[str, Any]] = ray.nodes()
        for node in listed:
            resources: Mapping[str, float] = node["Resources"]
            if node["Alive"] and resources.get("CPU", 0.0) > 0:
                found[node["NodeID"]] = Machine(resources["CPU"], resources.get("GPU", 0.0))
        if len(found) >= required:
            return found
        if signals.received:
            raise StageInterrupted
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{len(found)} of {required} machines are in the cluster after {CONNECT_TIMEOUT / 60:.0f} min"
            )
        if len(found) != logged_count:
            logged_count = len(found)
            view.set_activity(f"waiting for the cluster: {logged_count} of {required} machines")
        time.sleep(_POLL_SECONDS)


def _check_nodes(path: Path, machines: Mapping[str, Machine], signals: SignalHandler) -> dict[str, NodeCheck]:
    """Check that every machine can run a worker and sees the sweep's folder; return what each one answered.

    Raises:
        ClusterError: naming the machines that do not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    marker = path / f".seen-by-{secrets.token_hex(8)}"
    marker.write_text(socket.gethostname(), encoding="utf-8")
    try:
        remote: Any = ray.remote(check_node)
        nodes = {
            remote.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(marker): node
            for node in machines
        }
        deadline = time.monotonic() + _CHECK_TIMEOUT
        waiting = list(nodes)
        while waiting and time.monotonic() < deadline:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_SECONDS)
            if signals.received:
                raise StageInterrupted
        problems = [f"{nodes[reference][:12]}: no worker answered" for reference in waiting]
        answered = {node: _answer(reference) for reference, node in nodes.items() if reference not in waiting}
        problems += [problem for answer in answered.values() if (problem := _node_problem(answer, path))]
    finally:
        marker.unlink()
    if problems:
        raise ClusterError("the cluster cannot run this sweep:\n" + "\n".join(f"  {line}" for line in problems))
    return {node: answer for node, answer in answered.items() if isinstance(answer, NodeCheck)}


def check_node(mark: Path) -> NodeCheck:
    """Check one machine; runs there as a Ray task. `mark`: a file that the driver wrote into the sweep's folder."""
    # Ray hides all GPUs from a task that asks for none.
    return NodeCheck(socket.gethostname(), mark.is_file(), smallest_memory(environment={}))


def _answer(reference: Any) -> NodeCheck | str:
    """Return the machine's check, or why it did not run."""
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(reference)
    except RayError as error:
        return f"a worker cannot start: {redact(str(error).strip().splitlines()[-1])}"


def _node_problem(check: NodeCheck | str, path: Path) -> str:
    if isinstance(check, str):
        return check
    if check.shared:
        return ""
    return (
        f"{check.host} does not see {path}: put the runs folder ($ORCHESTRATE_HOME) on a disk that all machines share "
        "under the same path"
    )
