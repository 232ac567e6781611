"""Figures of a plan from a measured update: beside the formulas (`compare_with_formula`), and time on this machine
(`wall_clock`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.spec.estimates.cost_estimate import CostEstimate, GpuAssumptions, update_seconds
from orchestrator.spec.estimates.gpu_memory import max_micro_batch_tokens, memory
from orchestrator.spec.estimates.input_sizes import ModelShape
from trainer.config.loss_config import DpoLoss, KtoLoss
from trainer.config.trial import TrialConfig


@dataclass(frozen=True, slots=True)
class MeasuredUpdate:
    """One measured update of the largest trial; `tokens_per_micro_batch`: the largest that ran."""

    device: str
    processes: int
    pairs: int
    tokens: int
    seconds: float
    peak_bytes: int
    tokens_per_micro_batch: int
    scoring_seconds: float = 0.0
    """Seconds of the log-probs of one held-out pair."""
    answer_seconds: float = 0.0
    """Seconds of all completions of one evaluation."""
    train_pairs: int = 0
    eval_pairs: int = 0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A measured update beside the formulas. `corrected`: the plan's estimate with measured time and GPU memory."""

    measured: MeasuredUpdate
    formula_seconds: float | None
    formula_bytes: int | None
    corrected: CostEstimate | None

    @property
    def gpu(self) -> bool:
        """Whether the update ran on a GPU, for which the memory formula holds."""
        return self.measured.device != "CPU"


def compare_with_formula(
    measured: MeasuredUpdate,
    config: TrialConfig,
    shape: ModelShape | None,
    assumptions: GpuAssumptions,
    by_formula: CostEstimate | None,
) -> ProbeResult:
    """Compare a measured update of the trial `config` with the plan's estimate `by_formula`."""
    if shape is None or by_formula is None:
        return ProbeResult(measured, None, None, None)
    predicted_bytes = memory(
        config, shape, max(measured.tokens_per_micro_batch, 2 * config.data.max_length), measured.processes
    )
    seconds = update_seconds(config, shape, assumptions)
    return ProbeResult(
        measured,
        seconds,
        predicted_bytes.total,
        _corrected(measured, config, shape, assumptions, by_formula, seconds, predicted_bytes.total),
    )


def _corrected(
    measured: MeasuredUpdate,
    config: TrialConfig,
    shape: ModelShape,
    assumptions: GpuAssumptions,
    by_formula: CostEstimate,
    seconds: float,
    predicted_bytes: int,
) -> CostEstimate:
    slower = measured.seconds / seconds
    gpu = measured.device != "CPU"
    fits = by_formula.tokens_per_micro_batch
    if gpu and assumptions.memory_per_process is not None:
        fits = max_micro_batch_tokens(
            config,
            shape,
            assumptions.memory_per_process * predicted_bytes / measured.peak_bytes,
            assumptions.processes,
            assumptions.trials,
        )
    return replace(
        by_formula,
        tokens_per_micro_batch=fits,
        gpu_hours_per_trial=_times(by_formula.gpu_hours_per_trial, slower),
        gpu_hours=_times(by_formula.gpu_hours, slower),
        cost=_times(by_formula.cost, slower),
        assumed=f"every update takes {measured.seconds:.3g} s, as measured on {measured.device}",
        warnings=(),
    )


def _times(hours: float | None, slower: float) -> float | None:
    return None if hours is None else hours * slower


@dataclass(frozen=True, slots=True)
class WallClock:
    """Seconds on the clock, without starting and stopping processes, checkpoints and judging.

    `trial_seconds`: the longest trial; `shared_seconds`: the initial model's evaluation and reference log-probs, once a
    sweep; `sft_seconds`: the SFT stage; `sweep_seconds`: everything, with `trials_at_a_time`, if no trial is pruned;
    None where only time limits the number of trials.
    """

    trial_seconds: float
    shared_seconds: float
    sft_seconds: float | None
    sweep_seconds: float | None
    trials_at_a_time: int


def wall_clock(
    configs: Sequence[TrialConfig],
    measured: MeasuredUpdate,
    sft: tuple[TrialConfig, MeasuredUpdate] | None,
    *,
    trials: int | None,
    slots: int,
) -> WallClock:
    """Return the time of a sweep whose trials are at most as long as the longest of `configs`.

    Args:
        configs: Configurations at the corners of the search space.
        measured: A measured trial of the sweep.
        sft: The SFT stage and its measurement.
        trials: Trials of the sweep; None if unknown.
        slots: Trials at a time.

    Raises:
        TrialError: The data has fewer pairs than one update.
    """
    trial_seconds = max(run_seconds(config, measured) for config in configs)
    shared_seconds = _evaluation_seconds(measured)
    if any(isinstance(config.loss, DpoLoss | KtoLoss) and not config.loss.moves_reference for config in configs):
        shared_seconds += measured.train_pairs * measured.scoring_seconds
    sft_seconds = None if sft is None else run_seconds(*sft) + _evaluation_seconds(sft[1])
    at_a_time = min(slots, trials or slots)
    return WallClock(
        trial_seconds,
        shared_seconds,
        sft_seconds,
        None
        if trials is None
        else (sft_seconds or 0.0) + shared_seconds + math.ceil(trials / at_a_time) * trial_seconds,
        at_a_time,
    )


def run_seconds(config: TrialConfig, measured: MeasuredUpdate) -> float:
    """Return the seconds of a run's updates and evaluations after the first, which all trials share."""
    from trainer.training.schedule import interval, total_updates

    training = config.training
    updates = total_updates(training, measured.train_pairs)
    every = interval(training.eval_steps, updates)
    configured = config.evaluation.answer_steps
    answers_every = every if configured is None else configured
    return (
        updates * measured.seconds * training.pairs_per_update / measured.pairs
        + math.ceil(updates / every) * measured.eval_pairs * measured.scoring_seconds
        + (math.ceil(updates / answers_every) if answers_every else 1) * measured.answer_seconds
    )


def _evaluation_seconds(measured: MeasuredUpdate) -> float:
    return measured.eval_pairs * measured.scoring_seconds + measured.answer_seconds
