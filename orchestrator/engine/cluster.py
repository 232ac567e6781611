"""Ray on this machine: started quietly, on loopback, with a token; its logs kept with the sweep."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trainer
from orchestrator.engine.stopping import Interrupt
from orchestrator.errors import Finding, SpecError
from orchestrator.spec.sweep import SweepSpec

_SLOT = "slot"
PROCESS = "process"
"""What each process of a trial that has several takes of Ray."""
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
_BIG = str(1 << 32)
"""glibc gives large blocks back at each step and faults them in again, unless told not to."""


@dataclass(frozen=True, slots=True)
class Slots:
    """How many trials run side by side, and what each takes."""

    count: int
    gpus: float
    threads: int
    """Of each process."""
    processes: int = 1
    """That train one trial together."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What a trial asks of Ray: one bundle, or one for its worker and one for each of its processes.

        CPUs are counted by slots: Ray would round fractions its own way.
        """
        slot = {"CPU": 0.0, _SLOT: 1.0}
        if self.processes == 1:
            return [slot | ({"GPU": self.gpus} if self.gpus else {})]
        return [
            slot,
            *({"CPU": 0.0, PROCESS: 1.0} | ({"GPU": 1.0} if self.gpus else {}) for _ in range(self.processes)),
        ]

    @property
    def strategy(self) -> str:
        """Where Ray puts the bundles: a trial's processes are on one machine."""
        return "PACK" if self.processes == 1 else "STRICT_PACK"


def plan_slots(spec: SweepSpec, *, cpus: int | None = None, gpus: int | None = None) -> Slots:
    """Slots from the spec and this machine; SpecError when not even one trial fits."""
    cpus = _cpus() if cpus is None else cpus
    gpus = visible_gpus() if gpus is None else gpus
    wants = spec.resources
    processes = wants.processes
    each = wants.gpus_per_trial if wants.gpus_per_trial is not None else float(processes if gpus else 0)
    if processes > 1 and spec.base.engine == "trl":
        problem = f"a trial has {processes} processes, and engine trl trains in one"
        raise SpecError([Finding("resources", "base.engine", problem, "use engine packed, or one GPU per trial")])
    cores = max(wants.cpus_per_trial, float(processes)) if processes > 1 else wants.cpus_per_trial
    fit = int(cpus / cores + 1e-9)
    if each:  # then GPUs decide: a trial on a GPU hardly needs its CPU
        fit = gpus * int(1 / each + 1e-9) if each <= 1 else gpus // int(each)
    if fit < 1:
        asked = f"{cores:g} CPUs and {each:g} GPUs"
        problem = f"a trial asks for {asked}; this machine has {cpus} CPUs and {gpus} GPUs"
        raise SpecError([Finding("resources", "resources", problem)])
    count = min(fit, spec.budget.concurrency or fit)
    return Slots(count=count, gpus=each, threads=max(1, int(cores / processes)), processes=processes)


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use, found without torch."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([d for d in allowed.split(",") if d.strip() and d.strip() != "-1"])
    listed = Path("/proc/driver/nvidia/gpus")
    return len(list(listed.iterdir())) if listed.is_dir() else 0


def gpu_memory() -> float | None:
    """Bytes of the smallest visible GPU, as the driver says; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None or not visible_gpus():
        return None
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    found = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(found) * 2.0**20 if found else None


@contextmanager
def cluster(folder: Path, slots: Slots, interrupt: Interrupt) -> Generator[None]:
    """Ray while entered; its logs end up in `folder`/logs."""
    _collect(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Ray's sockets need a short path (AF_UNIX takes 107 characters), so it lives in /tmp until it ends.
    place = Path(tempfile.mkdtemp(prefix="prefsweep-", dir="/tmp"))
    (folder / "session").write_text(str(place), encoding="utf-8")
    token = place / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ |= {"RAY_AUTH_TOKEN_PATH": str(token), "TUNE_MAX_PENDING_TRIALS_PG": str(slots.count)}
    import ray
    from ray._private import worker as printing
    from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
    from ray.tune.execution import class_cache

    AuthenticationTokenLoader.instance().reset_cache()  # each cluster of a process has a token of its own

    _quiet(folder / "driver.log")
    printing._worker_logs_enabled = False  # pyright: ignore[reportPrivateUsage]  what it prints would be on our stdout
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_SECRETS)  # workers inherit them; no need to write them down
    try:
        ray.init(
            address="local",
            num_cpus=0,  # slots count; Ray would start idle workers for CPUs
            num_gpus=visible_gpus(),
            resources={_SLOT: float(slots.count), PROCESS: float(slots.count * slots.processes)},
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": worker_environment(slots)},
            _temp_dir=str(place),
        )
        _quiet(folder / "driver.log")  # again: starting, it cleared its loggers
        interrupt.listen()
        yield
    finally:
        ray.shutdown()
        _collect(folder)


def worker_environment(slots: Slots) -> dict[str, str]:
    """What a worker needs in its environment before it starts. Written down by Ray: never a secret."""
    source = str(Path(trainer.__file__).resolve().parent.parent)
    known = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != source]
    threads = str(slots.threads)
    return {
        "PYTHONPATH": os.pathsep.join([source, *known]),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": _BIG,
        "MALLOC_TRIM_THRESHOLD_": _BIG,
    }


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _quiet(log: Path) -> None:
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


def _collect(folder: Path) -> None:
    """Bring a session's logs home and remove the rest; also that of a driver that was killed."""
    pointer = folder / "session"
    if not pointer.is_file():
        return
    place = Path(pointer.read_text(encoding="utf-8"))
    for logs in sorted(place.glob("session_2*/logs")):
        shutil.copytree(logs, folder / "logs" / logs.parent.name, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    if place.name.startswith("prefsweep-"):
        shutil.rmtree(place, ignore_errors=True)
    pointer.unlink()
