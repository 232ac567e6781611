"""Trials that share a GPU: refused where, by formula, one of them does not fit its share."""

from __future__ import annotations

from orchestrator.errors import Finding, SpecError
from orchestrator.spec.corners import placed
from orchestrator.spec.cost import Machine, dearest, does_not_fit
from orchestrator.spec.memory import tokens_that_fit
from orchestrator.spec.sizes import shape_of
from orchestrator.spec.sweep import SweepSpec


def check_share(spec: SweepSpec, gpu_memory: float | None) -> None:
    """SpecError where the dearest trial with one pair at a time needs more than its share of a GPU of so many bytes."""
    share, shape = spec.resources.gpus_per_trial, shape_of(spec.base.model)
    if share is None or not 0 < share < 1 or shape is None or gpu_memory is None:
        return
    machine = Machine(gpu_memory=gpu_memory, share=share)
    largest = dearest(placed(spec.search, spec.base), shape, machine)
    assert machine.room is not None
    if tokens_that_fit(largest, shape, machine.room) is None:
        problem = f"{share:g} is too little: {does_not_fit(largest, shape, machine)}"
        raise SpecError(
            [Finding("resources", "resources.gpus_per_trial", problem, "or give it a larger share, 1 at most")]
        )
