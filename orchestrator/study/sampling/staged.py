"""A few leaves at a time, each stage around the best trial of the stages before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.spec.given import params_of
from orchestrator.spec.goal import Goal
from orchestrator.spec.samplers import StagedSampler
from orchestrator.spec.space import SearchSpace
from orchestrator.spec.staging import listed, stages
from orchestrator.study.identity import identity
from orchestrator.study.knowing import Known
from orchestrator.study.state import TrialState
from trainer.config import TrialConfig


@dataclass(frozen=True, slots=True)
class Step:
    """What is next: a trial's leaves, or a trial to wait for, or neither: all stages are done."""

    params: dict[str, Any] | None = None
    waits_for: int | None = None


class Staged:
    """The stages of one sweep. Nothing is kept: each answer is replayed from the trials."""

    def __init__(self, config: StagedSampler, space: SearchSpace, base: TrialConfig, goal: Goal) -> None:
        self._config, self._space, self._base, self._goal = config, space, base, goal
        self.stages = stages(config, space)

    def step(self, trials: Sequence[Known]) -> Step:
        """The trial after these."""
        drawn = [trial for trial in trials if not trial.given]
        begun = len(trials) - len(drawn) if not drawn else drawn[0].number
        place = len(drawn)
        tried = {trial.identity for trial in trials[:begun]}
        winner: Known | None = None
        for k, stage in enumerate(self.stages):
            fixed = params_of(self._base, self._space, {} if winner is None else winner.params)
            points = [(name, point) for name, point in self._points(stage, fixed) if name not in tried]
            if place < len(points):
                return Step(points[place][1])
            place -= len(points)
            tried |= {name for name, _ in points}
            if k + 1 == len(self.stages):
                break
            ended = drawn[: len(drawn) - place]
            before = [t for t in trials if not t.forked and (not ended or t.number <= ended[-1].number)]
            if (open_ := next((t for t in before if not t.state.finished), None)) is not None:
                return Step(waits_for=open_.number)
            winner = self._best(before)
            tried |= {trial.identity for trial in before}
        return Step()

    def _points(self, stage: tuple[str, ...], fixed: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The stage's combinations around fixed leaves, the last leaf advancing fastest; equal ones once."""
        axes: list[list[dict[str, Any]]] = []
        for path in stage:
            if path in self._space.dimensions:
                values = listed(self._space.dimensions[path], self._config.points)
                axes.append([{path: value} for value in values])
        for group in self._space.zipped:
            if next(iter(group)) in stage:
                axes.append([dict(zip(group, row, strict=True)) for row in zip(*group.values(), strict=True)])
        seen: set[str] = set()
        for parts in itertools.product(*axes):
            params: dict[str, Any] = dict(fixed)
            for part in parts:
                params |= part
            params = self._whole(params)
            name = identity(self._space.place(self._base, params))
            if name not in seen:
                seen.add(name)
                yield name, params

    def _whole(self, params: dict[str, Any]) -> dict[str, Any]:
        """Active leaves only; one that another value of a stage wakes up has what `base` or its kind says."""
        active = self._space.active(params)
        kept = params_of(self._base, self._space, active)
        return self._space.active(kept | active)

    def _best(self, trials: Sequence[Known]) -> Known | None:
        sign = -1.0 if self._goal.direction == "maximize" else 1.0
        ranked = [
            (sign * trial.values[0], trial.number, trial)
            for trial in trials
            if trial.state is TrialState.COMPLETE and trial.values is not None and math.isfinite(trial.values[0])
        ]
        return min(ranked, key=lambda row: row[:2])[2] if ranked else None
