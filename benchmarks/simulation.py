"""Simulate a sweep without training: the real sampler and pruners with simulated learning curves and a fake clock."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from orchestrator.spec.pruners import WilcoxonPruner, broken_evaluations
from orchestrator.spec.requirements import find_violations
from orchestrator.spec.samplers import RandomSampler
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.pruning.early_stopping import BrokenRequirements
from orchestrator.study.pruning.pruner import TrialPruner
from orchestrator.study.sampling.sampling_policy import SampledTrial, SamplingPolicy
from orchestrator.study.trial_records import TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot, visible_trials
from trainer.results import StepMetrics


@dataclass(frozen=True, slots=True)
class Curve:
    """A trial without pruning: the objective at each evaluation, NaN after divergence, and its speed."""

    values: Mapping[int, float]
    updates: int
    seconds_per_update: float
    pairs: Callable[[int], str] = lambda _: ""
    """`StepMetrics.pair_margins` at an evaluation."""
    metrics: Mapping[int, Mapping[str, float]] = field(default_factory=dict[int, Mapping[str, float]])
    """All metrics by update, 0 included, for the sweep's requirements; without them nothing is required."""


CurveFn = Callable[[int, Mapping[str, Any]], Curve]
"""Number and settings of a trial -> its curve."""


@dataclass(slots=True)
class SimulatedSweep:
    """Result of a simulated sweep. Times are seconds of the fake clock."""

    trials: list[TrialSnapshot] = field(default_factory=list[TrialSnapshot])
    reasons: dict[int, str] = field(default_factory=dict[int, str])
    trained: int = 0
    """Updates done in all trials."""
    full_updates: int = 0
    """Updates of all trials without pruner and divergence guard."""
    busy: float = 0.0
    idle: float = 0.0
    """Slot time spent waiting for results of other trials while there was more to try."""
    makespan: float = 0.0

    @property
    def table(self) -> list[tuple[Any, ...]]:
        """Params, state, reason and curve of every trial: independent of concurrency."""
        return [(t.number, dict(t.params), t.state, self.reasons.get(t.number, ""), dict(t.curve)) for t in self.trials]

    @property
    def idle_share(self) -> float:
        """Share of the slots' time spent waiting."""
        return self.idle / (self.busy + self.idle) if self.busy else 0.0

    def best(self) -> TrialSnapshot | None:
        """Return the complete trial with the highest value of those that keep every requirement."""
        done = [
            t
            for t in self.trials
            if t.state is TrialState.COMPLETE and t.values is not None and all(v <= 0 for v in t.violations.values())
        ]
        return max(done, key=lambda t: (t.values[0] if t.values else -math.inf, -t.number), default=None)


@dataclass(slots=True)
class _ActiveTrial:
    curve: Curve
    pruner: TrialPruner
    broken: BrokenRequirements
    steps: list[int]
    observed: dict[int, float] = field(default_factory=dict[int, float])


class CachedSamplingPolicy(SamplingPolicy):
    """A sampling policy that caches random samples across sweeps; they depend on seed and number only."""

    memory: ClassVar[dict[tuple[str, int], SampledTrial]] = {}

    def sample(self, trials: Sequence[TrialSnapshot]) -> SampledTrial | None:
        """Return the trial after these; with the random sampler from the cache, unless it is a duplicate here."""
        if not isinstance(self._spec.sampler, RandomSampler):
            return super().sample(trials)
        key = (f"{self._spec.search}{self._spec.sampler}", len(trials))
        sampled = self.memory.get(key)
        if sampled is None or any(trial.fingerprint == sampled.fingerprint for trial in trials):
            sampled = super().sample(trials)
            assert sampled is not None
            self.memory[key] = sampled
        return sampled


def simulate(spec: SweepSpec, curve_of: CurveFn, *, slots: int, lag: int | None, trials: int) -> SimulatedSweep:
    """Run `trials` trials over `slots` slots; `lag` None is `order: asap`. The objective is maximized."""
    policy, sweep, clock = CachedSamplingPolicy(spec, lag), SimulatedSweep(), 0.0
    active: dict[int, _ActiveTrial] = {}
    events: list[tuple[float, int]] = []
    is_exhausted = is_waiting = False

    pair_margins: dict[int, dict[int, str]] = {}
    paired = isinstance(spec.pruner, WilcoxonPruner)

    def make_pruner(number: int, updates: int, trials: list[TrialSnapshot]) -> TrialPruner:
        return TrialPruner.create(spec, number, updates, trials, lambda other: pair_margins[other])

    def broken_of(curve: Curve) -> BrokenRequirements:
        """Return the rule about broken requirements of a trial, with its initial values."""
        requirements = spec.require if curve.metrics else ()
        broken = BrokenRequirements(requirements, broken_evaluations(spec.pruner), curve.updates)
        if 0 in curve.metrics:
            broken.start(StepMetrics(0, curve.metrics[0]))
        return broken

    def snapshots() -> list[TrialSnapshot]:
        if lag is not None:
            return list(sweep.trials)  # of running trials only the settings are visible
        return [replace(t, curve=dict(active[t.number].observed)) if t.number in active else t for t in sweep.trials]

    while True:
        while not is_exhausted and not is_waiting and len(active) < slots:
            now = snapshots()
            if len(now) >= trials or policy.exhausted_reason(now):
                is_exhausted = True
            elif policy.blocking_trial(now) is not None or (sampled := policy.sample(now)) is None:
                is_waiting = True  # until another trial ends
            else:
                number = len(now)
                curve = curve_of(number, sampled.params)
                sweep.trials.append(
                    TrialSnapshot(
                        number,
                        sampled.params,
                        updates=curve.updates,
                        sampler_note=sampled.sampler_note,
                        fingerprint=sampled.fingerprint,
                    )
                )
                sweep.full_updates += curve.updates
                pruner = make_pruner(number, curve.updates, visible_trials(now, number, lag))
                pair_margins[number] = {}
                active[number] = _ActiveTrial(curve, pruner, broken_of(curve), sorted(curve.values))
                heapq.heappush(events, (clock + curve.seconds_per_update * min(curve.values), number))
        if not events:
            break
        at, number = heapq.heappop(events)
        sweep.idle += 0.0 if is_exhausted else (slots - len(active)) * (at - clock)
        sweep.busy += len(active) * (at - clock)
        clock = at
        trial = active[number]
        step = trial.steps.pop(0)
        trial.observed[step] = trial.curve.values[step]
        if lag is None:
            trial.pruner = make_pruner(number, trial.curve.updates, visible_trials(snapshots(), number, None))
        if paired:
            pair_margins[number][step] = trial.curve.pairs(step)
        state, reason = _decision(trial, step, pair_margins[number].get(step, ""))
        if state is None:
            heapq.heappush(events, (clock + trial.curve.seconds_per_update * (trial.steps[0] - step), number))
            continue
        sweep.trained += step
        sweep.reasons[number] = reason
        bad = reason.startswith("diverged")
        values = (-math.inf,) if bad else (trial.observed[step],)
        measured = trial.curve.metrics
        missed = find_violations(spec.require, measured.get(step, {}), measured.get(0, {})) if measured else {}
        ended = replace(
            sweep.trials[number],
            state=state,
            values=values,
            curve=dict(trial.observed),
            diverged=bad,
            violations=missed,
        )
        sweep.trials[number] = ended
        del active[number]
        is_waiting = False
    sweep.makespan = clock
    return sweep


def _decision(trial: _ActiveTrial, step: int, pairs: str) -> tuple[TrialState | None, str]:
    if math.isnan(trial.observed[step]):
        return TrialState.PRUNED, f"diverged at update {step}"
    if reason := trial.broken.update(StepMetrics(step, trial.curve.metrics.get(step, {}))):
        return TrialState.PRUNED, reason
    if reason := trial.pruner.prune_reason(trial.observed, step, pairs):
        return TrialState.PRUNED, reason
    return (None, "") if trial.steps else (TrialState.COMPLETE, "")
