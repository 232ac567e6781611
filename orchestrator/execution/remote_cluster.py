"""A Ray cluster that exists already: joined as one driver among others, looked over, left as it was.

Which existing Ray cluster is meant by `--address`, and whether this process may knock there.
"""

from __future__ import annotations

import ipaddress
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
from orchestrator import execution
from orchestrator.errors import OrchestrateError
from orchestrator.execution.local_cluster import (
    Machine,
    Slots,
    hush,
    quiet,
    server_is_gone,
    slots_on,
    starting_ray,
    threads_of,
    worker_environment,
)
from orchestrator.execution.stop_reasons import Interrupt, Interrupted
from orchestrator.interfaces import View
from orchestrator.redaction import redact
from orchestrator.spec.estimates.cost_estimate import sharing_of
from orchestrator.spec.sweep_spec import SweepSpec

AUTO = "auto"
_PLACE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")


class ClusterError(OrchestrateError):
    """The cluster that was asked for cannot be used; nothing was started."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A cluster that exists: HOST:PORT or auto, and how many of its machines are waited for."""

    address: str
    machines: int = 1


def find(asked: str) -> str:
    """`host:port` of the cluster; `auto` is RAY_ADDRESS, else the one that `ray start` began on this machine."""
    found = asked
    if asked == AUTO:
        found = os.environ.get("RAY_ADDRESS", "") or _started_here()
        if not found:
            raise ClusterError(
                "--address auto: no Ray cluster runs on this machine; start one with `ray start --head`, join one "
                "with `ray start --address=HOST:PORT`, or leave --address out"
            )
    match = _PLACE.fullmatch(found)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ClusterError(
            f"--address {found}: HOST:PORT or auto is expected (ray:// is not possible: the driver has to run on a "
            "machine of the cluster)"
        )
    return found


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def authorise() -> None:
    """Ray is told whether to show a token; ClusterError where it must and there is none.

    RAY_AUTH_MODE=disabled, set by the user, is the only way to use a cluster that lets everybody in.
    """
    mode = (execution.ASKED_AUTH or "token").lower()
    os.environ["RAY_AUTH_MODE"] = mode
    if mode == "token" and not _has_token():
        raise ClusterError(
            "a cluster is joined with its token: set RAY_AUTH_TOKEN_PATH to the file that holds it, or put it into "
            "~/.ray/auth_token; only for a cluster without authentication set RAY_AUTH_MODE=disabled"
        )


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    file = os.environ.get("RAY_AUTH_TOKEN_PATH")
    place = Path(file) if file else Path.home() / ".ray" / "auth_token"
    return place.is_file() and bool(place.read_text(encoding="utf-8").strip())


def _started_here() -> str:
    place = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return place.read_text(encoding="utf-8").strip() if place.is_file() else ""


_PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_CACHE", "TRANSFORMERS_OFFLINE")
"""Of the driver's environment, what workers on other machines get; tokens have to be in theirs already."""
_OF_RAY = ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
_LOOK_SECONDS = 300.0
"""For the first worker of every machine to start and answer."""
JOIN_SECONDS = 900.0
"""For the machines that were asked for to join."""
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What a worker on one machine finds there."""

    host: str
    shared: bool
    """Whether the sweep's folder is the driver's."""


@contextmanager
def joined(folder: Path, spec: SweepSpec, asked: Asked, interrupt: Interrupt, view: View) -> Generator[Slots]:
    """Be a driver of that cluster while entered; gives the slots of its machines. Its logs stay with it.

    This program's code travels with the driver. The sweep's folder has to be the same on every machine.
    """
    address = find(asked.address)
    authorise()
    # Ray's servers in this process listen on loopback, unless the user asked for a cluster of several machines.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0" if is_loopback(address) else "1"
    folder.mkdir(parents=True, exist_ok=True)
    import ray
    from ray.exceptions import RayError

    hush(folder)
    try:
        try:
            with starting_ray(interrupt):
                ray.init(
                    address=address,
                    log_to_driver=False,
                    configure_logging=False,
                    runtime_env={
                        "env_vars": _environment(threads_of(spec, sharing_of(spec, None))),
                        "py_modules": _code(),
                    },
                )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise ClusterError(f"--address {address}: {_first_line(error)}") from error
        quiet(folder / "driver.log")
        with interrupt.watching(server_is_gone()):
            machines = _machines(asked.machines, interrupt, view)
            _look_over(folder.parent, machines, interrupt)
            slots = slots_on(spec, list(machines.values()), shared=True)
            os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots.count)
            many = "" if len(machines) == 1 else "s"
            view.say(f"Ray cluster {address}: {len(machines)} machine{many}, {slots.count} trials at a time")
            yield slots
    finally:
        ray.shutdown()


def _environment(threads: int) -> dict[str, str]:
    kept = {name: os.environ[name] for name in (*_PASSED_ON, *_OF_RAY) if name in os.environ}
    return worker_environment(threads) | kept


def _code() -> list[str]:
    """This very program: whatever version the machines have, trials run the driver's."""
    return [str(Path(str(room.__file__)).parent) for room in (trainer, orchestrator)]


def _machines(wanted: int, interrupt: Interrupt, view: View) -> dict[str, Machine]:
    """The living machines by Ray's id, once enough of them can run a trial."""
    import ray

    until = time.monotonic() + JOIN_SECONDS
    told = -1
    while True:
        found: dict[str, Machine] = {}
        listed: Sequence[Mapping[str, Any]] = ray.nodes()
        for node in listed:
            has: Mapping[str, float] = node["Resources"]
            if node["Alive"] and has.get("CPU", 0.0) > 0:
                found[node["NodeID"]] = Machine(has["CPU"], has.get("GPU", 0.0))
        if len(found) >= wanted:
            return found
        if interrupt.asked:
            raise Interrupted
        if time.monotonic() > until:
            raise ClusterError(
                f"{len(found)} of {wanted} machines joined the cluster within {JOIN_SECONDS / 60:.0f} min"
            )
        if len(found) != told:
            told = len(found)
            view.stage(f"waiting for the cluster: {told} of {wanted} machines")
        time.sleep(_POLL_SECONDS)


def _look_over(place: Path, machines: Mapping[str, Machine], interrupt: Interrupt) -> None:
    """Every machine must run this program and see the sweep's folder; ClusterError names those that do not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark = place / f".seen-by-{secrets.token_hex(8)}"
    mark.write_text(socket.gethostname(), encoding="utf-8")
    try:
        remote: Any = ray.remote(look)
        asked = {
            remote.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(mark): node
            for node in machines
        }
        until = time.monotonic() + _LOOK_SECONDS
        waiting = list(asked)
        while waiting and time.monotonic() < until:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_SECONDS)
            if interrupt.asked:
                raise Interrupted
        problems = [f"{asked[reference][:12]}: no worker answered" for reference in waiting]
        problems += [said for reference in asked if reference not in waiting if (said := _problem(reference, place))]
    finally:
        mark.unlink()
    if problems:
        raise ClusterError("the cluster cannot run this sweep:\n" + "\n".join(f"  {line}" for line in problems))


def look(mark: Path) -> Seen:
    """Runs on each machine."""
    return Seen(socket.gethostname(), mark.is_file())


def _problem(reference: Any, place: Path) -> str:
    import ray
    from ray.exceptions import RayError

    try:
        seen: Seen = ray.get(reference)
    except RayError as error:
        return f"a worker cannot start: {redact(str(error).strip().splitlines()[-1])}"
    if seen.shared:
        return ""
    return (
        f"{seen.host} does not see {place}: put the runs folder ($ORCHESTRATE_HOME) on a disk that all machines share "
        "under the same path"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(lines[0]) if lines else type(error).__name__
