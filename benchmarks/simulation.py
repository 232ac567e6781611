"""A sweep without training: the real policy and pruners over scripted learning curves and a fake clock."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from orchestrator.spec.pruners import WilcoxonPruner
from orchestrator.spec.samplers import RandomSampler
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.pruning.pruner import TrialPruner
from orchestrator.study.sampling.sampling_policy import SampledTrial, SamplingPolicy
from orchestrator.study.trial_records import TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot, visible_trials


@dataclass(frozen=True, slots=True)
class Curve:
    """What a trial would do if left alone: the goal at each evaluation, NaN from where it diverges, and its pace."""

    values: Mapping[int, float]
    updates: int
    seconds_per_update: float
    pairs: Callable[[int], str] = lambda _: ""
    """`Point.pairs` at an evaluation."""


World = Callable[[int, Mapping[str, Any]], Curve]
"""The curve of a trial by its number and leaves."""


@dataclass(slots=True)
class Ran:
    """What became of a simulated sweep. Times in seconds of the fake clock."""

    trials: list[TrialSnapshot] = field(default_factory=list[TrialSnapshot])
    reasons: dict[int, str] = field(default_factory=dict[int, str])
    trained: int = 0
    """Updates done in all trials."""
    whole: int = 0
    """Updates that all trials would have done without a pruner and without a guard."""
    busy: float = 0.0
    idle: float = 0.0
    """Time that slots waited for other trials' results while there was more to try."""
    makespan: float = 0.0

    @property
    def table(self) -> list[tuple[Any, ...]]:
        """Params, state, reason and course of every trial: what must not depend on concurrency."""
        return [(t.number, dict(t.params), t.state, self.reasons.get(t.number, ""), dict(t.curve)) for t in self.trials]

    @property
    def idle_share(self) -> float:
        """Of the slots' time, that in which they waited."""
        return self.idle / (self.busy + self.idle) if self.busy else 0.0

    def best(self) -> TrialSnapshot | None:
        """The complete trial with the highest value."""
        done = [t for t in self.trials if t.state is TrialState.COMPLETE and t.values is not None]
        return max(done, key=lambda t: (t.values[0] if t.values else -math.inf, -t.number), default=None)


@dataclass(slots=True)
class _ActiveTrial:
    curve: Curve
    judge: TrialPruner
    steps: list[int]
    course: dict[int, float] = field(default_factory=dict[int, float])


class Drawing(SamplingPolicy):
    """The policy, remembering random draws from sweep to sweep: they depend on the seed and the number alone."""

    memory: ClassVar[dict[tuple[str, int], SampledTrial]] = {}

    def sample(self, trials: Sequence[TrialSnapshot]) -> SampledTrial | None:
        if not isinstance(self._spec.sampler, RandomSampler):
            return super().sample(trials)
        key = (f"{self._spec.search}{self._spec.sampler}", len(trials))
        sampled = self.memory.get(key)
        if sampled is None or any(trial.fingerprint == sampled.fingerprint for trial in trials):
            sampled = super().sample(trials)
            assert sampled is not None
            self.memory[key] = sampled
        return sampled


def simulate(spec: SweepSpec, world: World, *, slots: int, lag: int | None, trials: int) -> Ran:
    """Run `trials` trials over `slots` slots; `lag` None is `order: asap`. The goal is to be maximized."""
    policy, ran, clock = Drawing(spec, lag), Ran(), 0.0
    active: dict[int, _ActiveTrial] = {}
    events: list[tuple[float, int]] = []
    over = waits = False

    output: dict[int, dict[int, str]] = {}
    paired = isinstance(spec.pruner, WilcoxonPruner)

    def judge_of(number: int, updates: int, trials: list[TrialSnapshot]) -> TrialPruner:
        return TrialPruner.create(spec, number, updates, trials, lambda other: output[other])

    def known() -> list[TrialSnapshot]:
        if lag is not None:
            return list(ran.trials)  # what runs is known by its settings alone
        return [replace(t, curve=dict(active[t.number].course)) if t.number in active else t for t in ran.trials]

    while True:
        while not over and not waits and len(active) < slots:
            now = known()
            if len(now) >= trials or policy.exhausted_reason(now):
                over = True
            elif policy.blocking_trial(now) is not None or (sampled := policy.sample(now)) is None:
                waits = True  # until another trial ends
            else:
                number = len(now)
                curve = world(number, sampled.params)
                ran.trials.append(
                    TrialSnapshot(
                        number,
                        sampled.params,
                        updates=curve.updates,
                        note=sampled.note,
                        fingerprint=sampled.fingerprint,
                    )
                )
                ran.whole += curve.updates
                judge = judge_of(number, curve.updates, visible_trials(now, number, lag))
                output[number] = {}
                active[number] = _ActiveTrial(curve, judge, sorted(curve.values))
                heapq.heappush(events, (clock + curve.seconds_per_update * min(curve.values), number))
        if not events:
            break
        at, number = heapq.heappop(events)
        ran.idle += 0.0 if over else (slots - len(active)) * (at - clock)
        ran.busy += len(active) * (at - clock)
        clock = at
        one = active[number]
        step = one.steps.pop(0)
        one.course[step] = one.curve.values[step]
        if lag is None:
            one.judge = judge_of(number, one.curve.updates, visible_trials(known(), number, None))
        if paired:
            output[number][step] = one.curve.pairs(step)
        state, reason = _decision(one, step, output[number].get(step, ""))
        if state is None:
            heapq.heappush(events, (clock + one.curve.seconds_per_update * (one.steps[0] - step), number))
            continue
        ran.trained += step
        ran.reasons[number] = reason
        bad = reason.startswith("diverged")
        values = (-math.inf,) if bad else (one.course[step],)
        ended = replace(ran.trials[number], state=state, values=values, curve=dict(one.course), diverged=bad)
        ran.trials[number] = ended
        del active[number]
        waits = False
    ran.makespan = clock
    return ran


def _decision(one: _ActiveTrial, step: int, pairs: str) -> tuple[TrialState | None, str]:
    if math.isnan(one.course[step]):
        return TrialState.PRUNED, f"diverged at update {step}"
    if reason := one.judge.prune_reason(one.course, step, pairs):
        return TrialState.PRUNED, reason
    return (None, "") if one.steps else (TrialState.COMPLETE, "")
