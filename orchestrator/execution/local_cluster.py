"""Ray on this machine: started quietly, on loopback, with a token; its logs kept with the sweep.

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
"""Of a worker whose trial is trained by processes of its own: Ray wants more than nothing."""
_PROXY_CPU = 0.0001
"""Of one whose trial shares a process with others: it may be on any machine, and must not keep that process off one."""
PROCESS_RESOURCE = "process"
"""What each process of a trial that has several takes of Ray, and each that several trials share."""
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
_BIG = str(1 << 32)
"""glibc gives large blocks back at each step and faults them in again, unless told not to."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What one machine has for trials."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


@dataclass(frozen=True, slots=True)
class Slots:
    """How many trials run side by side, and what each takes."""

    count: int
    gpus: float
    """Of each trial."""
    threads: int
    """Of each process."""
    processes: int = 1
    """That train one trial together."""
    cpus: float | None = None
    """What a trial asks of a cluster that others use too. None: the cluster is our own, and slots are counted."""
    trials_per_process: int = 1
    """Trials that take turns in one process, over one frozen base."""

    @property
    def shared_processes(self) -> int:
        """Processes, where trials share them."""
        return math.ceil(self.count / self.trials_per_process)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What a trial asks of Ray: one bundle, or one for its worker and one for each of its processes.

        CPUs are counted by slots where the cluster is our own: Ray would round fractions its own way.
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
        """What a process asks of Ray that is one of a trial's several, or in which trials take turns."""
        resources = {"CPU": 0.0, PROCESS_RESOURCE: 1.0}
        if self.cpus is not None:  # in Ray's steps of 0.0001, and with the worker no more than the trial's own
            resources = {
                "CPU": math.floor(1e4 * self.trials_per_process * (self.cpus - _WORKER_CPU) / self.processes) / 1e4
            }
        return resources | ({"GPU": self.gpu_fraction or 1.0} if self.gpus else {})

    @property
    def stage_resources(self) -> dict[str, float]:
        """What a worker asks of Ray before the trials, alone with what later one process has or speaks for."""
        return self.process_resources if self.trials_per_process > 1 else self.bundles[0]

    @property
    def gpu_fraction(self) -> float | None:
        """Of a GPU, for each process; None where it has whole ones or none."""
        share = round(self.gpus * self.trials_per_process, 4)
        return share if 0 < share < 1 else None

    @property
    def strategy(self) -> str:
        """Where Ray puts the bundles: a trial's processes are on one machine."""
        return "PACK" if self.processes == 1 else "STRICT_PACK"


def plan_slots(spec: SweepSpec, *, cpus: int | None = None, gpus: int | None = None) -> Slots:
    """Slots from the spec and this machine; SpecError when not even one trial fits."""
    here = Machine(_cpus() if cpus is None else cpus, visible_gpus() if gpus is None else gpus)
    return slots_on(spec, [here], gpu_memory=gpu_memory() if here.gpus else None)


def slots_on(
    spec: SweepSpec, machines: Sequence[Machine], *, shared: bool = False, gpu_memory: float | None = None
) -> Slots:
    """Slots of all these machines: a trial never spans two. On a `shared` cluster it asks for its CPUs too.

    gpu_memory: bytes of each GPU, where that is known.
    """
    wants = spec.resources
    processes = wants.processes
    if processes > 1 and spec.base.engine == "trl":
        problem = f"a trial has {processes} processes, and engine trl trains in one"
        raise SpecError([Finding("resources", "base.engine", problem, "use engine packed, or one GPU per trial")])
    with_gpus = any(machine.gpus for machine in machines)
    sharing = trials_per_process(spec, gpu_memory if with_gpus else None)
    each = wants.gpus_per_trial
    if each is None:
        each = processes / sharing if with_gpus else 0.0
    cores = sharing * _cores(spec)
    fit = sharing * sum(_fit(cores, sharing * each, machine, shared) for machine in machines)
    if fit < 1:
        has = ", ".join(map(str, dict.fromkeys(machines))) or "no machine at all"
        where = f"no machine of the cluster has them ({has})" if shared else f"this machine has {has}"
        label = "a trial asks" if sharing == 1 else f"{sharing} trials in one process ask"
        problem = f"{label} for {cores:g} CPUs and {sharing * each:g} GPUs; {where}"
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
    """Threads of each of a trial's processes, or of one in which so many trials take turns."""
    return max(1, int(trials_per_process * _cores(spec) / spec.resources.processes + 1e-9))


def _cores(spec: SweepSpec) -> float:
    wants = spec.resources
    return max(wants.cpus_per_trial, float(wants.processes)) if wants.processes > 1 else wants.cpus_per_trial


def _fit(cpus: float, gpus: float, machine: Machine, shared: bool) -> int:
    by_cpus = int(machine.cpus / cpus + 1e-9)
    if not gpus:
        return by_cpus
    # A trial on a GPU hardly needs its CPU: on a machine of our own, GPUs decide.
    by_gpus = int(machine.gpus) * int(1 / gpus + 1e-9) if gpus <= 1 else int(machine.gpus // int(gpus))
    return min(by_cpus, by_gpus) if shared else by_gpus


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use, found without torch."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([d for d in allowed.split(",") if d.strip() and d.strip() != "-1"])
    listed = Path("/proc/driver/nvidia/gpus")
    return len(list(listed.iterdir())) if listed.is_dir() else 0


def gpu_memory() -> float | None:
    """Bytes of the smallest visible GPU, as the driver says; None without one."""
    return smallest_memory() if visible_gpus() else None


@contextmanager
def local_cluster(folder: Path, slots: Slots, signals: SignalHandler) -> Generator[None]:
    """Ray while entered; its logs end up in `folder`/logs."""
    _collect_logs(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Ray's sockets need a short path (AF_UNIX takes 107 characters), so it lives in /tmp until it ends.
    ray_folder = Path(tempfile.mkdtemp(prefix="prefsweep-", dir="/tmp"))
    (folder / "session").write_text(str(ray_folder), encoding="utf-8")
    token = ray_folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ |= {"RAY_AUTH_TOKEN_PATH": str(token), "TUNE_MAX_PENDING_TRIALS_PG": str(slots.count)}
    import ray

    prepare_ray_environment(folder)
    try:
        with starting_ray(signals):
            ray.init(
                address="local",
                num_cpus=0,  # slots count; Ray would start idle workers for CPUs
                num_gpus=visible_gpus(),
                resources={_SLOT: float(slots.count), PROCESS_RESOURCE: float(slots.count * slots.processes)},
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={"env_vars": worker_environment(slots.threads)},
                _temp_dir=str(ray_folder),
            )
        log_ray_to_file(folder / "driver.log")  # again: starting, it cleared its loggers
        with signals.watching(server_is_gone()):
            yield
    finally:
        ray.shutdown()
        _collect_logs(folder)


@contextmanager
def starting_ray(signals: SignalHandler) -> Generator[None]:
    """What Ray starts while entered is never reached by SIGTERM, and this process's own handler holds afterwards."""
    from ray._private import utils

    def leave(_: object) -> None:
        """Instead of Ray's own, which would end this process without a word."""

    taken = utils.set_sigterm_handler
    utils.set_sigterm_handler = leave
    try:
        with deaf_to_sigterm():
            try:
                yield
            finally:
                signals.install()
    finally:
        utils.set_sigterm_handler = taken


def server_is_gone() -> Callable[[], bool]:
    """Whether Ray's own server (GCS) takes no more connections: then no call into Ray comes to an end."""
    import ray

    host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")

    def gone() -> bool:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
                return False
        except OSError:
            return True

    return gone


def prepare_ray_environment(folder: Path) -> None:
    """Before Ray starts: its token is read anew, its words go to `folder`/driver.log, no secret is propagated."""
    from ray._private import worker as printing
    from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
    from ray.tune.execution import class_cache

    AuthenticationTokenLoader.instance().reset_cache()  # each cluster of a process has a token of its own
    log_ray_to_file(folder / "driver.log")
    printing._worker_logs_enabled = False  # pyright: ignore[reportPrivateUsage]  what it prints would be on our stdout
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_SECRETS)  # workers inherit them; no need to write them down


def worker_environment(threads: int) -> dict[str, str]:
    """What a worker needs in its environment before it starts. Written down by Ray: never a secret."""
    source = str(Path(trainer.__file__).resolve().parent.parent)
    known = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != source]
    return {
        "PYTHONPATH": os.pathsep.join([source, *known]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": _BIG,
        "MALLOC_TRIM_THRESHOLD_": _BIG,
    }


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def log_ray_to_file(log: Path) -> None:
    """Ray's words go to a file, not to the user's terminal."""
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
    """Bring a session's logs home and remove the rest; also that of a driver that was killed."""
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
    """A process of Ray's own ended; no worker can be reached any more. The study has everything: begin again."""

    code = ExitCode.INTERNAL_ERROR

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"Ray's own process{'es' if len(names) > 1 else ''} {' and '.join(names)} ended")


def check_ray_health() -> None:
    """RayDied where nothing more can be expected of this cluster."""
    from ray._private import worker

    node: Any = worker._global_node  # pyright: ignore[reportPrivateUsage]
    ended = [] if node is None else [str(kind) for kind, _ in node.dead_processes() if kind in _REQUIRED_PROCESSES]
    if ended:
        raise RayDied(sorted(set(ended)))
