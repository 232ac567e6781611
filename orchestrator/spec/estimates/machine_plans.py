"""`MachinePlan`: a sweep on a machine of the GPU table: arrangement, memory, hours and cost, by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.spec.estimates.arrangement import NothingFits, arrange_sweep, with_arrangement
from orchestrator.spec.estimates.cost_estimate import GpuAssumptions
from orchestrator.spec.estimates.gpu_layouts import Arrangement, MachineGpus
from orchestrator.spec.estimates.gpu_table import PlannedMachine
from orchestrator.spec.estimates.input_sizes import RowCounts
from orchestrator.spec.estimates.sweep_plan import SweepPlan, make_plan
from orchestrator.spec.sweep_spec import SweepSpec


@dataclass(frozen=True, slots=True)
class MachinePlan:
    """A sweep on one machine; `plan` and `arrangement` are None where it does not fit, `refusal` says why."""

    machine: PlannedMachine
    arrangement: Arrangement | None
    plan: SweepPlan | None
    refusal: NothingFits | None
    assumptions: GpuAssumptions

    @property
    def hours(self) -> float | None:
        """Hours of the sweep with all GPUs of the machine, if no trial is pruned; None if unknown."""
        if self.plan is None or self.arrangement is None or self.plan.estimate is None:
            return None
        found, trials, at_a_time = self.plan.estimate, self.plan.trainings, self.plan.concurrency
        if found.gpu_hours is None or found.gpu_hours_per_trial is None or trials is None or not at_a_time:
            return None
        gpus = self.arrangement.gpus_per_trial
        once = found.gpu_hours - trials * found.gpu_hours_per_trial  # the reference's log-probs
        return math.ceil(trials / at_a_time) * found.gpu_hours_per_trial / gpus + once / max(1.0, gpus)

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all GPUs of the machine, idle ones included, as they are paid for."""
        return None if self.hours is None else self.hours * self.machine.count

    @property
    def cost(self) -> float | None:
        """Price of these GPU-hours; None without a price."""
        price = self.assumptions.price
        return None if self.gpu_hours is None or price is None else self.gpu_hours * price

    @property
    def assumed(self) -> str:
        """The assumptions as text."""
        share = f"{self.assumptions.efficiency:.0%} of the GPUs' peak in bfloat16"
        return f"{self.assumptions.data}, {share}, no trial pruned; hours and cost are of all GPUs of the machine"

    def as_json(self) -> dict[str, Any]:
        """Return the row of this machine as JSON values."""
        found = self.arrangement
        return {
            "machine": str(self.machine),
            "gpus": self.machine.count,
            "gpu": asdict(self.machine.gpu) | {"memory_bytes": self.machine.gpu.memory},
            "fits": found is not None,
            "gpus_per_trial": found and found.gpus_per_trial,
            "trials_at_a_time": self.plan and self.plan.concurrency,
            "trials_per_process": found and found.trials_per_process,
            "memory_bytes": found and found.memory,
            "distributed": found and found.trials.distributed,
            "gradient_checkpointing": found and found.trials.gradient_checkpointing,
            "tokens_per_micro_batch": found and found.trials.tokens_per_micro_batch,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "assumed": self.assumed,
            "reasons": [] if found is None else list(found.reasons),
            "problem": self.refusal and self.refusal.problem,
            "hint": self.refusal and self.refusal.hint(),
            "plan": self.plan and self.plan.as_json(),
        }


def plan_on(
    spec: SweepSpec,
    machine: PlannedMachine,
    root: Path,
    rows: RowCounts,
    *,
    tracking: str,
    notices: Sequence[str] = (),
    assumptions: GpuAssumptions | None = None,
) -> MachinePlan:
    """Return the plan of this sweep on a machine.

    Args:
        spec: The sweep.
        machine: The machine; its number of CPUs is not limited.
        root: The runs folder.
        rows: Rows of its data.
        tracking: MLflow's tracking URI.
        notices: Notices to include, such as the loader's.
        assumptions: Assumptions about efficiency, price and data.
    """
    assumptions = assumptions or GpuAssumptions()
    found = arrange_sweep(spec, [MachineGpus((machine.gpu.memory,) * machine.count)])
    if isinstance(found, NothingFits):
        return MachinePlan(machine, None, None, found, assumptions)
    made = make_plan(
        spec,
        root,
        rows,
        concurrency=found.trials_at_a_time,
        tracking=tracking,
        notices=notices,
        assumptions=replace(
            assumptions,
            gpu_memory=machine.gpu.memory,
            processes=found.processes,
            share=min(1.0, found.gpus_per_trial * found.trials_per_process) if found.gpus_per_trial < 1 else 1.0,
            trials=found.trials_per_process,
            tflops=machine.gpu.tflops,
        ),
        chosen=with_arrangement(spec, found),
        arrangement=found,
    )
    return MachinePlan(machine, found, made, None, assumptions)
