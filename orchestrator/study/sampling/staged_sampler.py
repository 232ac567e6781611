"""`StagedReplay`: searches a few settings at a time, each stage around the best trial of the stages before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from orchestrator.spec.loading.validation_errors import first_error
from orchestrator.spec.objectives import Objective
from orchestrator.spec.samplers import StagedSampler, stage_paths, stage_values
from orchestrator.spec.search.manual_trials import resolve_params
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.study.trial_records import TrialState, miss_of
from orchestrator.study.trial_snapshots import TrialSnapshot, as_seen_by
from trainer.config.trial import TrialConfig, config_fingerprint


@dataclass(frozen=True, slots=True)
class SampledTrial:
    """A sampled trial: its params, its complete configuration and a fingerprint that is equal for equal ones.

    Some params may be outside of the search space: values of the base or of an enqueued trial.
    """

    params: dict[str, Any]
    config: TrialConfig
    fingerprint: str
    sampler_note: dict[str, Any] = field(default_factory=dict[str, Any])
    skipped_combinations: tuple[str, ...] = ()
    """Invalid combinations that the sampler skipped before this one, each with the reason."""


@dataclass(slots=True)
class _Stage:
    """The points of one stage, and the reasons why other combinations are invalid."""

    points: list[SampledTrial] = field(default_factory=list[SampledTrial])
    invalid: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class NextPoint:
    """The next step: a trial, a trial to wait for, or neither if all stages are done."""

    point: SampledTrial | None = None
    blocking_trial: int | None = None
    skipped_combinations: tuple[str, ...] = ()
    """With a stage's first trial, and at the end: invalid combinations, each with the reason."""


class StagedReplay:
    """The stages of one sweep. Stateless: each call replays the stages from the trials."""

    def __init__(self, config: StagedSampler, space: SearchSpace, base: TrialConfig, objective: Objective) -> None:
        self._config, self._space, self._base, self._objective = config, space, base, objective
        self.stages = stage_paths(config, space)

    def next(self, trials: Sequence[TrialSnapshot], next_number: int) -> NextPoint:
        """Return the step after these trials, the repeats of each merged; `next_number`: of the trial to be issued."""
        sampled = [trial for trial in trials if not trial.is_enqueued]
        first_sampled = sampled[0].number if sampled else math.inf
        remaining = len(sampled)
        tried = {trial.fingerprint for trial in trials if trial.number < first_sampled}
        winner: TrialSnapshot | None = None
        invalid: list[str] = []
        for number, stage in enumerate(self.stages):
            fixed = resolve_params(self._base, self._space, {} if winner is None else winner.params)
            combined = self._combined(stage, fixed)
            points = [point for point in combined.points if point.fingerprint not in tried]
            invalid += combined.invalid
            if remaining < len(points):
                return NextPoint(points[remaining], skipped_combinations=() if remaining else tuple(invalid))
            if points:
                invalid = []
            remaining -= len(points)
            tried |= {point.fingerprint for point in points}
            if number + 1 == len(self.stages):
                break
            ended, following = sampled[: len(sampled) - remaining], sampled[len(sampled) - remaining :]
            first = following[0].number if following else next_number  # of the next stage
            before = [
                trial for trial in trials if not trial.is_hidden and (not ended or trial.number <= ended[-1].number)
            ]
            before = [as_seen_by(trial, first) for trial in before]
            if (unfinished := next((trial for trial in before if not trial.state.is_final), None)) is not None:
                return NextPoint(blocking_trial=unfinished.number)
            winner = self._best(before)
            tried |= {trial.fingerprint for trial in before}
        return NextPoint(skipped_combinations=tuple(invalid))

    def _combined(self, stage: tuple[str, ...], fixed: dict[str, Any]) -> _Stage:
        """Return the stage's distinct combinations around fixed params, the last axis advancing fastest."""
        found, seen = _Stage(), set[str]()
        for part in self._parts(stage):
            try:
                params = self._active_params(fixed | part)
                config = apply_params(self._base, params)
            except ValidationError as error:
                loc, sentence, _ = first_error(TrialConfig, error)
                text = ", ".join(f"{path}={value}" for path, value in part.items())
                found.invalid.append(f"not a valid trial: {text}: {'.'.join(map(str, loc))} {sentence}")
                continue
            point = SampledTrial(params, config, config_fingerprint(config))
            if point.fingerprint not in seen:
                seen.add(point.fingerprint)
                found.points.append(point)
        return found

    def _parts(self, stage: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Yield the settings of a stage: a value of each of its dimensions, a row of each of its zipped groups."""
        axes: list[list[dict[str, Any]]] = []
        for path in stage:
            if path in self._space.dimensions:
                values = stage_values(self._space.dimensions[path], self._config.points)
                axes.append([{path: value} for value in values])
        for group in self._space.zipped:
            if next(iter(group)) in stage:
                axes.append([dict(zip(group, row, strict=True)) for row in zip(*group.values(), strict=True)])
        for parts in itertools.product(*axes):
            yield {path: value for part in parts for path, value in part.items()}

    def _active_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the active params; one that a value of the stage makes active has its value in `base` or its default.

        Settings outside of the search that the best trial so far was enqueued with stay, if the trial has that path.
        """
        active = self._space.active(params)
        searched = self._space.active(resolve_params(self._base, self._space, active) | active)
        enqueued = {path: value for path, value in params.items() if path not in self._space.paths}
        existing = apply_params(self._base, searched).flat_params() if enqueued else {}
        return searched | {path: value for path, value in enqueued.items() if path in existing}

    def _best(self, trials: Sequence[TrialSnapshot]) -> TrialSnapshot | None:
        sign = -1.0 if self._objective.direction == "maximize" else 1.0
        ranked = [
            (miss_of(trial.violations), sign * trial.values[0], trial.number, trial)
            for trial in trials
            if trial.state is TrialState.COMPLETE and trial.values is not None and math.isfinite(trial.values[0])
        ]
        return min(ranked, key=lambda row: row[:3])[3] if ranked else None
