"""`Slots`: number of concurrent trials and the resources of each; `Machine`: CPUs and GPUs of one machine."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.gpus import smallest_memory, visible_devices, visible_gpus
from orchestrator.spec.estimates.cost_estimate import trials_per_process
from orchestrator.spec.estimates.gpu_layouts import MachineGpus
from orchestrator.spec.sweep_spec import SweepSpec

SLOT_RESOURCE = "slot"
_WORKER_CPU = 0.01
"""CPUs of the worker of a multi-process trial; Ray needs a value above 0."""
_PROXY_CPU = 0.0001
"""CPUs of the proxy of a trial in a shared process; small, as it must not displace that process."""
PROCESS_RESOURCE = "process"
"""Ray resource of one process of a multi-process trial, or of one process shared by several trials."""

WORKER_BYTES = 600 * 2**20
"""Bytes. Memory of a worker process that has imported what a trial uses, with something to spare."""


@dataclass(frozen=True, slots=True)
class Machine:
    """CPUs and GPUs of one machine."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return _amounts(self.cpus, self.gpus)


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
    fitting: int | None = None
    """Concurrent trials that fit, if a larger `budget.concurrency` allows them; None: `count`."""

    @property
    def max_count(self) -> int:
        """Concurrent trials that fit without a restart of Ray."""
        return self.count if self.fitting is None else max(self.count, self.fitting)

    def at_a_time(self, concurrency: int | None) -> int:
        """Return how many trials run at a time with this `budget.concurrency`, which may have changed meanwhile."""
        return min(self.max_count, concurrency or self.max_count)

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
            return [{"CPU": 0.0, SLOT_RESOURCE: 1.0} if self.cpus is None else {"CPU": _PROXY_CPU}]
        if self.processes > 1:
            worker = {"CPU": 0.0, SLOT_RESOURCE: 1.0} if self.cpus is None else {"CPU": _WORKER_CPU}
            return [worker, *(self.process_resources for _ in range(self.processes))]
        resources = {"CPU": 0.0, SLOT_RESOURCE: 1.0} if self.cpus is None else {"CPU": self.cpus}
        return [resources | ({"GPU": self.gpus} if self.gpus else {})]

    @property
    def process_resources(self) -> dict[str, float]:
        """Ray resources of one process of a multi-process trial, or of one process shared by trials."""
        resources = {"CPU": 0.0, PROCESS_RESOURCE: 1.0}
        if self.cpus is not None:
            # Ray rounds to 0.0001; worker plus processes must not exceed the trial's CPUs.
            resources = {
                "CPU": math.floor(1e4 * self.trials_per_process * (self.cpus - _WORKER_CPU) / self.processes) / 1e4
            }
        return resources | ({"GPU": self.gpu_fraction or 1.0} if self.gpus else {})

    @property
    def gpus_needed(self) -> tuple[int, int]:
        """GPUs that one trial needs at least, and that all concurrent trials use."""
        share = self.gpus * self.trials_per_process
        units = self.shared_processes if self.trials_per_process > 1 else self.count
        if not share:
            return 0, 0
        if share <= 1:
            return 1, math.ceil(units / int(1 / share + 1e-9))
        return math.ceil(share), math.ceil(share) * units

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
    here = Machine(usable_cpus() if cpus is None else cpus, visible_gpus() if gpus is None else gpus)
    return slots_on(spec, [here], gpu_memory=gpu_memory() if here.gpus else None)


def slots_on(
    spec: SweepSpec, machines: Sequence[Machine], *, is_shared_cluster: bool = False, gpu_memory: float | None = None
) -> Slots:
    """Return the slots of these machines for the sweep; a trial never spans two machines.

    Args:
        spec: the sweep.
        machines: machines of the cluster.
        is_shared_cluster: whether others use the cluster too, so that trials request their CPUs.
        gpu_memory: bytes of each GPU; None where unknown.

    Raises:
        SpecError: not even one trial fits.
    """
    resources = spec.resources
    processes = resources.processes
    if processes > 1 and spec.base.engine == "trl":
        problem = f"a trial has {processes} processes, but engine trl supports only one"
        raise SpecError([SpecProblem("resources", "base.engine", problem, "use engine packed, or one GPU per trial")])
    has_gpus = any(machine.gpus for machine in machines)
    trials_in_process = trials_per_process(spec, gpu_memory if has_gpus else None)
    gpus_per_trial = resources.gpus_per_trial
    if gpus_per_trial is None:
        gpus_per_trial = processes / trials_in_process if has_gpus else 0.0
    cores = trials_in_process * _cores(spec)
    fitting = trials_in_process * sum(
        _count_fitting(cores, trials_in_process * gpus_per_trial, machine, is_shared_cluster) for machine in machines
    )
    if fitting < 1:
        has = ", ".join(map(str, dict.fromkeys(machines))) or "no machine"
        where = f"no machine of the cluster has them ({has})" if is_shared_cluster else f"this machine has {has}"
        label = "a trial needs" if trials_in_process == 1 else f"{trials_in_process} trials in one process need"
        problem = f"{label} {_amounts(cores, trials_in_process * gpus_per_trial)}; {where}"
        raise SpecError([SpecProblem("", "resources", problem)])
    count = min(fitting, spec.budget.concurrency or fitting)
    # Fewer trials than would share a process have processes of their own, which may not fit another one.
    most = fitting if count >= trials_in_process else count
    trials_in_process = min(trials_in_process, count)
    return Slots(
        count,
        gpus_per_trial,
        threads_per_process(spec, trials_in_process),
        processes,
        cpus=_cores(spec) if is_shared_cluster else None,
        trials_per_process=trials_in_process,
        fitting=most,
    )


def threads_per_process(spec: SweepSpec, trials_per_process: int = 1) -> int:
    """Return the threads of each process of a trial, or of a process shared by `trials_per_process` trials."""
    return max(1, int(trials_per_process * _cores(spec) / spec.resources.processes + 1e-9))


def _cores(spec: SweepSpec) -> float:
    resources = spec.resources
    if resources.processes == 1:
        return resources.cpus_per_trial
    return max(resources.cpus_per_trial, float(resources.processes))


def _count_fitting(cpus: float, gpus: float, machine: Machine, is_shared_cluster: bool) -> int:
    by_cpus = int(machine.cpus / cpus + 1e-9)
    if not gpus:
        return by_cpus
    # A trial on a GPU hardly uses its CPU, so that on our own cluster only GPUs limit the slots.
    by_gpus = int(machine.gpus) * int(1 / gpus + 1e-9) if gpus <= 1 else int(machine.gpus // int(gpus))
    return min(by_cpus, by_gpus) if is_shared_cluster else by_gpus


def machine_gpus() -> MachineGpus:
    """Return the GPUs of this machine that the process may use."""
    return MachineGpus(tuple(gpu.memory for gpu in visible_devices()), usable_cpus())


def gpu_memory() -> float | None:
    """Return the memory of the smallest visible GPU in bytes; None without GPUs."""
    return smallest_memory() if visible_gpus() else None


def available_memory() -> float:
    """Return the bytes of memory that this process may still use, within its control group."""
    available = float(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - float(used.read_text()))
    return available


def workers_before_trials(slots: Slots) -> int:
    """Return how many worker processes start before there are trials, as many as half of the free memory holds.

    Only on our own cluster and without GPUs: Ray gives a process its GPUs, and its share of others' CPUs, at its start.
    """
    if slots.cpus is not None or slots.gpus or slots.processes > 1 or slots.trials_per_process > 1:
        return 0
    return min(slots.count, int(available_memory() // (2 * WORKER_BYTES)))


def _amounts(cpus: float, gpus: float) -> str:
    return " and ".join(f"{n:g} {what}{'' if n == 1 else 's'}" for n, what in ((cpus, "CPU"), (gpus, "GPU")))


def usable_cpus() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS lacks it
