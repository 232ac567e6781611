"""`Slots`: how many trials run at a time and what each takes; `Machine`: what one machine has for trials."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import Finding, SpecError
from orchestrator.nvidia_smi import smallest_memory
from orchestrator.spec.estimates.cost_estimate import trials_per_process
from orchestrator.spec.sweep_spec import SweepSpec

SLOT_RESOURCE = "slot"
_WORKER_CPU = 0.01
"""Of a worker whose trial is trained by processes of its own: Ray wants more than nothing."""
_PROXY_CPU = 0.0001
"""Of one whose trial shares a process with others: it may be on any machine, and must not keep that process off one."""
PROCESS_RESOURCE = "process"
"""What each process of a trial that has several takes of Ray, and each that several trials share."""


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
            return [{"CPU": 0.0, SLOT_RESOURCE: 1.0} if self.cpus is None else {"CPU": _PROXY_CPU}]
        if self.processes > 1:
            worker = {"CPU": 0.0, SLOT_RESOURCE: 1.0} if self.cpus is None else {"CPU": _WORKER_CPU}
            return [worker, *(self.process_resources for _ in range(self.processes))]
        resources = {"CPU": 0.0, SLOT_RESOURCE: 1.0} if self.cpus is None else {"CPU": self.cpus}
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


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
