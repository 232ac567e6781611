"""Ray on this machine: started silently, on loopback, with a token; logs are kept in the sweep's folder.

`check_ray_health` raises RayDied if the GCS server or the raylet has exited.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer
from orchestrator.errors import ExitCode, Finding, OrchestrateError, SpecError
from orchestrator.execution.stop_reasons import SignalHandler, deaf_to_sigterm
from orchestrator.nvidia_smi import smallest_memory
from orchestrator.spec.estimates.cost_estimate import trials_per_process
from orchestrator.spec.sweep_spec import SweepSpec

_SLOT = "slot"
_WORKER_CPU = 0.01
"""CPUs of the worker of a multi-process trial; Ray needs a value above 0."""
_PROXY_CPU = 0.0001
"""CPUs of the proxy of a trial in a shared process; small, as it must not displace that process."""
PROCESS_RESOURCE = "process"
"""Ray resource of one process of a multi-process trial, or of one process shared by several trials."""
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
_BIG = str(1 << 32)
"""Bytes. Keeps glibc from returning large blocks to the system at each step and faulting them in again."""


@dataclass(frozen=True, slots=True)
class Machine:
    """CPUs and GPUs of one machine."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


@dataclass(frozen=True, slots=True)
class Slots:
    """Number of concurrent trials and the resources of each."""

    count: int
    gpus: float
    """GPUs per trial."""
    threads: int
    """Threads per process."""
    processes: int = 1
    """Processes per trial."""
    cpus: float | None = None
    """CPUs per trial on a cluster shared with others; None on our own, where slots are counted instead."""
    trials_per_process: int = 1
    """Trials that take turns in one process over one frozen base model."""

    @property
    def shared_processes(self) -> int:
        """Number of processes that are shared by trials."""
        return math.ceil(self.count / self.trials_per_process)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Placement group bundles of a trial: one, or one for its worker and one for each of its processes.

        On our own cluster a slot resource replaces CPUs, whose fractions Ray would round.
        """
        if self.trials_per_process > 1:
            return [{"CPU": 0.0, _SLOT: 1.0} if self.cpus is None else {"CPU": _PROXY_CPU}]
        if self.processes > 1:
            worker = {"CPU": 0.0, _SLOT: 1.0} if self.cpus is None else {"CPU": _WORKER_CPU}
            return [worker, *(self.process_resources for _ in range(self.processes))]
        resources = {"CPU": 0.0, _SLOT: 1.0} if self.cpus is None else {"CPU": self.cpus}
        return [resources | ({"GPU": self.gpus} if self.gpus else {})]

    @property
    def process_resources(self) -> dict[str, float]:
        """Ray resources of one process of a multi-process trial, or of one process shared by trials."""
        resources = {"CPU": 0.0, PROCESS_RESOURCE: 1.0}
        if self.cpus is not None:  # in Ray's steps of 0.0001; worker and processes together at most the trial's CPUs
            resources = {
                "CPU": math.floor(1e4 * self.trials_per_process * (self.cpus - _WORKER_CPU) / self.processes) / 1e4
            }
        return resources | ({"GPU": self.gpu_fraction or 1.0} if self.gpus else {})

    @property
    def stage_resources(self) -> dict[str, float]:
        """Ray resources of the SFT stage's worker, which runs before the trials."""
        return self.process_resources if self.trials_per_process > 1 else self.bundles[0]

    @property
    def gpu_fraction(self) -> float | None:
        """Share of a GPU per process; None for whole GPUs or none."""
        share = round(self.gpus * self.trials_per_process, 4)
        return share if 0 < share < 1 else None

    @property
    def strategy(self) -> str:
        """Placement strategy of the bundles: all processes of a trial on one machine."""
        return "PACK" if self.processes == 1 else "STRICT_PACK"


def plan_slots(spec: SweepSpec, *, cpus: int | None = None, gpus: int | None = None) -> Slots:
    """Return the slots of this machine for the sweep.

    Raises:
        SpecError: not even one trial fits.
    """
    here = Machine(_cpus() if cpus is None else cpus, visible_gpus() if gpus is None else gpus)
    return slots_on(spec, [here], gpu_memory=gpu_memory() if here.gpus else None)


def slots_on(
    spec: SweepSpec, machines: Sequence[Machine], *, shared: bool = False, gpu_memory: float | None = None
) -> Slots:
    """Return the slots of these machines for the sweep; a trial never spans two machines.

    Args:
        spec: the sweep.
        machines: machines of the cluster.
        shared: whether others use the cluster too, so that trials request their CPUs.
        gpu_memory: bytes of each GPU; None where unknown.

    Raises:
        SpecError: not even one trial fits.
    """
    resources = spec.resources
    processes = resources.processes
    if processes > 1 and spec.base.engine == "trl":
        problem = f"a trial has {processes} processes, but engine trl supports only one"
        raise SpecError([Finding("resources", "base.engine", problem, "use engine packed, or one GPU per trial")])
    with_gpus = any(machine.gpus for machine in machines)
    sharing = trials_per_process(spec, gpu_memory if with_gpus else None)
    each = resources.gpus_per_trial
    if each is None:
        each = processes / sharing if with_gpus else 0.0
    cores = sharing * _cores(spec)
    fit = sharing * sum(_fit(cores, sharing * each, machine, shared) for machine in machines)
    if fit < 1:
        has = ", ".join(map(str, dict.fromkeys(machines))) or "no machine"
        where = f"no machine of the cluster has them ({has})" if shared else f"this machine has {has}"
        label = "a trial needs" if sharing == 1 else f"{sharing} trials in one process need"
        problem = f"{label} {cores:g} CPUs and {sharing * each:g} GPUs; {where}"
        raise SpecError([Finding("resources", "resources", problem)])
    count = min(fit, spec.budget.concurrency or fit)
    sharing = min(sharing, count)
    return Slots(
        count,
        each,
        threads_per_process(spec, sharing),
        processes,
        cpus=_cores(spec) if shared else None,
        trials_per_process=sharing,
    )


def threads_per_process(spec: SweepSpec, trials_per_process: int = 1) -> int:
    """Return the threads of each process of a trial, or of a process shared by `trials_per_process` trials."""
    return max(1, int(trials_per_process * _cores(spec) / spec.resources.processes + 1e-9))


def _cores(spec: SweepSpec) -> float:
    resources = spec.resources
    if resources.processes == 1:
        return resources.cpus_per_trial
    return max(resources.cpus_per_trial, float(resources.processes))


def _fit(cpus: float, gpus: float, machine: Machine, shared: bool) -> int:
    by_cpus = int(machine.cpus / cpus + 1e-9)
    if not gpus:
        return by_cpus
    # A trial on a GPU hardly uses its CPU, so that on our own cluster only GPUs limit the slots.
    by_gpus = int(machine.gpus) * int(1 / gpus + 1e-9) if gpus <= 1 else int(machine.gpus // int(gpus))
    return min(by_cpus, by_gpus) if shared else by_gpus


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs visible to this process, without importing torch."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([d for d in allowed.split(",") if d.strip() and d.strip() != "-1"])
    listed = Path("/proc/driver/nvidia/gpus")
    return len(list(listed.iterdir())) if listed.is_dir() else 0


def gpu_memory() -> float | None:
    """Return the memory of the smallest visible GPU in bytes; None without GPUs."""
    return smallest_memory() if visible_gpus() else None


@contextmanager
def local_cluster(folder: Path, slots: Slots, signals: SignalHandler) -> Generator[None]:
    """Run Ray on this machine within the context; its logs are copied to `folder`/logs."""
    _collect_logs(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Ray's session is in /tmp, since its sockets need a short path (AF_UNIX: 107 characters).
    session_folder = Path(tempfile.mkdtemp(prefix="prefsweep-", dir="/tmp"))
    (folder / "session").write_text(str(session_folder), encoding="utf-8")
    token = session_folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ |= {"RAY_AUTH_TOKEN_PATH": str(token), "TUNE_MAX_PENDING_TRIALS_PG": str(slots.count)}
    import ray

    prepare_ray_environment(folder)
    try:
        with starting_ray(signals):
            ray.init(
                address="local",
                num_cpus=0,  # slots are counted instead; Ray would start idle workers for CPUs
                num_gpus=visible_gpus(),
                resources={_SLOT: float(slots.count), PROCESS_RESOURCE: float(slots.count * slots.processes)},
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={"env_vars": worker_environment(slots.threads)},
                _temp_dir=str(session_folder),
            )
        log_ray_to_file(folder / "driver.log")  # again, as Ray resets its loggers at start
        with signals.watching(server_is_gone()):
            yield
    finally:
        ray.shutdown()
        _collect_logs(folder)


@contextmanager
def starting_ray(signals: SignalHandler) -> Generator[None]:
    """Block SIGTERM for processes that Ray starts in the context, and reinstall this process's handlers after it."""
    from ray._private import utils

    def keep_own_handler(_: object) -> None:
        """Replace Ray's function, whose handler would end this process silently."""

    original = utils.set_sigterm_handler
    utils.set_sigterm_handler = keep_own_handler
    try:
        with deaf_to_sigterm():
            try:
                yield
            finally:
                signals.install()
    finally:
        utils.set_sigterm_handler = original


def server_is_gone() -> Callable[[], bool]:
    """Return a check whether Ray's GCS server accepts no connections, in which case calls into Ray never return."""
    import ray

    host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")

    def is_gone() -> bool:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
                return False
        except OSError:
            return True

    return is_gone


def prepare_ray_environment(folder: Path) -> None:
    """Prepare the start of Ray: re-read the token, log to `folder`/driver.log, propagate no secrets."""
    from ray._private import worker as printing
    from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
    from ray.tune.execution import class_cache

    AuthenticationTokenLoader.instance().reset_cache()  # each cluster has its own token
    log_ray_to_file(folder / "driver.log")
    printing._worker_logs_enabled = False  # pyright: ignore[reportPrivateUsage]  would print to stdout
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_SECRETS)  # inherited by workers, must not be stored


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment variables of workers. Ray stores them, so that they must not contain secrets."""
    source = str(Path(trainer.__file__).resolve().parent.parent)
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != source]
    return {
        "PYTHONPATH": os.pathsep.join([source, *others]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": _BIG,
        "MALLOC_TRIM_THRESHOLD_": _BIG,
    }


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def log_ray_to_file(log: Path) -> None:
    """Redirect Ray's log from the terminal to a file."""
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("ray")
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _collect_logs(folder: Path) -> None:
    """Copy the logs of the last Ray session and remove its folder, also after a killed driver."""
    pointer = folder / "session"
    if not pointer.is_file():
        return
    ray_folder = Path(pointer.read_text(encoding="utf-8"))
    for logs in sorted(ray_folder.glob("session_2*/logs")):
        shutil.copytree(logs, folder / "logs" / logs.parent.name, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    if ray_folder.name.startswith("prefsweep-"):
        shutil.rmtree(ray_folder, ignore_errors=True)
    pointer.unlink()


_REQUIRED_PROCESSES = ("gcs_server", "raylet")


class RayDied(OrchestrateError):
    """The GCS server or the raylet exited, so that no worker can be reached. Ray must be restarted."""

    code = ExitCode.INTERNAL_ERROR

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"Ray's own process{'es' if len(names) > 1 else ''} {' and '.join(names)} ended")


def check_ray_health() -> None:
    """Raise RayDied if the GCS server or the raylet of the local cluster has exited."""
    from ray._private import worker

    node: Any = worker._global_node  # pyright: ignore[reportPrivateUsage]
    ended = [] if node is None else [str(kind) for kind, _ in node.dead_processes() if kind in _REQUIRED_PROCESSES]
    if ended:
        raise RayDied(sorted(set(ended)))
