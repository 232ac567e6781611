"""What a measured update says about a plan: the formulas beside it, and the plan's figures corrected by it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.spec.cost import Estimate, Machine, update_seconds
from orchestrator.spec.memory import memory, tokens_that_fit
from orchestrator.spec.sizes import Shape
from trainer.config import TrialConfig


@dataclass(frozen=True, slots=True)
class Update:
    """One update of the dearest trial, as it ran here; `tokens_per_micro_batch`: of the largest that did."""

    device: str
    processes: int
    pairs: int
    tokens: int
    seconds: float
    peak_bytes: int
    tokens_per_micro_batch: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Measured and by formula. `corrected` is the plan's estimate with its times, and on a GPU its memory, measured."""

    measured: Update
    formula_seconds: float | None
    formula_bytes: int | None
    corrected: Estimate | None

    @property
    def gpu(self) -> bool:
        """Whether it ran on a GPU: the formula of memory is of one."""
        return self.measured.device != "CPU"


def probed(
    measured: Update, config: TrialConfig, shape: Shape | None, machine: Machine, made: Estimate | None
) -> Probe:
    """`config` is the trial that was measured, `made` the plan's estimate by formula."""
    if shape is None or made is None:
        return Probe(measured, None, None, None)
    held = memory(config, shape, max(measured.tokens_per_micro_batch, 2 * config.data.max_length), measured.processes)
    seconds = update_seconds(config, shape, machine)
    return Probe(measured, seconds, held.total, _corrected(measured, config, shape, machine, made, seconds, held.total))


def _corrected(
    measured: Update, config: TrialConfig, shape: Shape, machine: Machine, made: Estimate, seconds: float, held: int
) -> Estimate:
    slower = measured.seconds / seconds
    gpu = measured.device != "CPU"
    fits = made.tokens_per_micro_batch
    if gpu and machine.room is not None:
        fits = tokens_that_fit(
            config, shape, machine.room * held / measured.peak_bytes, machine.processes, machine.trials
        )
    return replace(
        made,
        tokens_per_micro_batch=fits,
        gpu_hours_per_trial=_times(made.gpu_hours_per_trial, slower),
        gpu_hours=_times(made.gpu_hours, slower),
        cost=_times(made.cost, slower),
        assumed=f"every update takes {measured.seconds:.3g} s, as measured on {measured.device}",
        warnings=(),
    )


def _times(hours: float | None, slower: float) -> float | None:
    return None if hours is None else hours * slower
