"""`SamplingPolicy`: the next trial's settings, a pure function of seed, trial number and visible trials."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, assert_never

from pydantic import ValidationError

from orchestrator.errors import OrchestrateError, first_line
from orchestrator.spec.loading.validation_errors import first_error
from orchestrator.spec.pruners import depends_on_other_trials
from orchestrator.spec.samplers import (
    AdaptiveSampler,
    CmaEsSampler,
    GpSampler,
    GridSampler,
    NsgaIISampler,
    QmcSampler,
    RandomSampler,
    StagedSampler,
    TpeSampler,
)
from orchestrator.spec.search.space import Grid
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.repeats import merge_snapshots
from orchestrator.study.sampling.adaptive_samplers import CmaEsReplay, OptunaSampler
from orchestrator.study.sampling.distributions import space_distributions
from orchestrator.study.sampling.random_samplers import sample_sobol, sample_uniform, sampler_seed, stable_seed
from orchestrator.study.sampling.staged_sampler import SampledTrial, StagedReplay
from orchestrator.study.trial_snapshots import TrialSnapshot, first_unfinished, visible_trials
from trainer.config.trial import TrialConfig, config_fingerprint

MAX_REDRAWS = 20
"""Random redraws of a configuration that an earlier trial has, before an untried one is looked for."""
MAX_INVALID = 50
"""Draws of one trial that may be invalid in a row; from the half on they are random."""
MAX_POINTS, MAX_DRAWS = 20_000, 1_000
"""Points of a finite search space and draws of an infinite one among which an untried one is looked for."""
MAX_RESAMPLES = 3
"""Repeated proposals of an adaptive sampler before random redraws."""


class SamplingPolicy:
    """The sampler of one sweep. Stateless: a proposal depends on the arguments only.

    `lag`: trial n sees results of trials up to n - lag; None: all results.
    `warm_start_trials`: another sweep's trials, numbered below 0.
    `distinct`: no configuration is proposed twice, and one with several seeds counts once, by its mean; a sweep that
    began before this rule accepts a repeated configuration after the redraws.
    """

    def __init__(
        self,
        spec: SweepSpec,
        lag: int | None = None,
        warm_start_trials: Sequence[TrialSnapshot] = (),
        *,
        distinct: bool = True,
    ) -> None:
        self._spec, self._sampler, self._space, self._base = spec, spec.sampler, spec.search, spec.base
        self._lag, self._warm_start_trials, self._distinct = lag, tuple(warm_start_trials), distinct
        self._points = _FinitePoints(spec) if spec.search.size() is not None else None
        self._seed = sampler_seed(spec.sampler)
        self._grid = _GridWalk(spec) if isinstance(spec.sampler, GridSampler) else None
        self._adaptive = _adaptive_sampler(spec)
        self._staged = (
            StagedReplay(spec.sampler, spec.search, spec.base, spec.first_objective)
            if isinstance(spec.sampler, StagedSampler)
            else None
        )
        self.distributions = space_distributions(spec.search)

    def blocking_trial(self, trials: Sequence[TrialSnapshot], *, enqueued: bool = False) -> int | None:
        """Return the number of a trial that must end before the trial after `trials` can be issued; None: no trial.

        `enqueued`: the next trial is enqueued, so that only its pruning depends on others.
        """
        learns = isinstance(self._sampler, AdaptiveSampler) and not enqueued
        if self._lag is not None and (learns or depends_on_other_trials(self._spec.pruner)):
            open_ = first_unfinished(trials, len(trials) - self._lag)
            if open_ is not None:
                return open_
        return (
            None
            if enqueued or self._staged is None
            else self._staged.next(self._merged(trials), len(trials)).blocking_trial
        )

    def exhausted_reason(self, trials: Sequence[TrialSnapshot]) -> str:
        """Return why the search is exhausted after these trials; "" if it is not, or not yet known to be."""
        tried = {trial.fingerprint for trial in trials}
        if self._grid is not None:
            if self._grid.next(tried) is not None:
                return ""
            return f"all points tried: {self._grid.seen} of the grid"
        if self._staged is not None:
            step = self._staged.next(self._merged(trials), len(trials))
            if step.point is None and step.blocking_trial is None:
                return "; ".join([f"all {len(self._staged.stages)} stages done", *step.skipped_combinations])
            return ""
        if not self._distinct or self._has_free_range or self._untried(_sampled_count(trials), tried) is not None:
            return ""
        return "all points tried" if self._points is None else f"all points tried: {self._points}"

    def sample(self, trials: Sequence[TrialSnapshot]) -> SampledTrial | None:
        """Return the trial after these; None if the search is exhausted. Enqueued trials do not shift other draws.

        A configuration that was tried before is redrawn a bounded number of times, then an untried one is looked for;
        the grid skips points that enqueued trials had.
        """
        tried = {trial.fingerprint for trial in trials}
        number, all_trials, trials = len(trials), trials, self._merged(trials)
        position = _sampled_count(trials)
        match self._sampler:
            case GridSampler():
                assert self._grid is not None
                params = self._grid.next(tried)
                left_out = self._grid.left_out(is_first=position == 0)
                return None if params is None else replace(self.to_trial(params), skipped_combinations=left_out)
            case StagedSampler():
                assert self._staged is not None
                step = self._staged.next(trials, number)
                point = step.point
                return None if point is None else replace(point, skipped_combinations=step.skipped_combinations)
            case RandomSampler():
                return self._first_untried(position, 0, tried)
            case QmcSampler(seed=seed):
                sampled = self._valid_trial(lambda other: self._sobol_or_uniform(seed, position, other), 0)
                return sampled if sampled.fingerprint not in tried else self._first_untried(position, 1, tried)
            case TpeSampler() | GpSampler() | NsgaIISampler() | CmaEsSampler():
                return self._sample_adaptive(visible_trials(all_trials, number, self._lag), position, tried)
            case _:
                assert_never(self._sampler)

    def to_trial(self, params: dict[str, Any], sampler_note: dict[str, Any] | None = None) -> SampledTrial:
        """Return the trial with these params over the base."""
        config = self._space.apply(self._base, params)
        return SampledTrial(params, config, config_fingerprint(config), sampler_note or {})

    def _merged(self, trials: Sequence[TrialSnapshot]) -> Sequence[TrialSnapshot]:
        return merge_snapshots(trials, self._spec) if self._distinct else trials

    def _sample_adaptive(
        self, visible: Sequence[TrialSnapshot], position: int, tried: Collection[str]
    ) -> SampledTrial | None:
        assert self._adaptive is not None
        snapshots = [*self._warm_start_trials, *self._merged(visible)]
        for again in range(1 + MAX_RESAMPLES):
            sampled = self._valid_trial(
                lambda seed: self._propose(snapshots, seed), stable_seed(self._seed, position, again)
            )
            if sampled.fingerprint not in tried:
                return sampled
        return self._first_untried(position, 1 + MAX_RESAMPLES, tried)

    def _valid_trial(self, draw: Callable[[int], _Drawn], seed: int) -> SampledTrial:
        """Return the trial that `draw` gives for the seed; invalid combinations are left out and others drawn.

        The corners are checked before a sweep begins, but not every combination of a large search. Raises NoValidTrial.
        """
        left_out: list[str] = []
        for again in range(MAX_INVALID):
            params, note = (draw if again < MAX_INVALID // 2 else self._uniform)(_other_seed(seed, again))
            try:
                sampled = self.to_trial(params, {k: v for k, v in note.items() if k != SAMPLER_ERROR})
            except ValidationError as error:
                left_out.append(invalid_text(params, error))
                continue
            problem = note.get(SAMPLER_ERROR)
            return replace(sampled, skipped_combinations=(*left_out, *([] if problem is None else [problem])))
        raise NoValidTrial(left_out[-1])

    def _propose(self, snapshots: Sequence[TrialSnapshot], seed: int) -> _Drawn:
        """Return the sampler's proposal; a random one, with the reason, where the sampler fails."""
        assert self._adaptive is not None
        try:
            return self._adaptive.propose(snapshots, seed)
        except Exception as error:  # noqa: BLE001 - a numerical failure of the library must not end the sweep
            text = f"{type(error).__name__}: {first_line(error)}"
            reason = f"sampler {self._sampler.kind} failed, drawn at random: {text}"
            return sample_uniform(self._space, seed), {SAMPLER_ERROR: reason}

    def _uniform(self, seed: int) -> _Drawn:
        return sample_uniform(self._space, seed), {}

    def _sobol_or_uniform(self, seed: int, position: int, other: int) -> _Drawn:
        return (sample_sobol(self._space, seed, position), {}) if not other else self._uniform(other)

    def _first_untried(self, position: int, redraw: int, tried: Collection[str]) -> SampledTrial | None:
        sampled = None
        for again in range(redraw, redraw + 1 + MAX_REDRAWS):
            try:
                sampled = self._draw(position, again)
            except NoValidTrial:
                if self._points is None or not self._distinct:
                    raise
                break  # few points of the space are valid: they are gone through in turn
            if sampled.fingerprint not in tried:
                return sampled
        return self._untried(position, tried) if self._distinct else sampled

    def _untried(self, position: int, tried: Collection[str]) -> SampledTrial | None:
        """Return an untried trial where redraws found none: of a finite space the next one after a random point."""
        if self._points is not None:
            params = self._points.untried(tried, stable_seed(self._seed, position, _START))
            return None if params is None else self.to_trial(params)
        draws = (self._draw(position, _START + again) for again in range(MAX_DRAWS))
        return next((sampled for sampled in draws if sampled.fingerprint not in tried), None)

    def _draw(self, position: int, again: int) -> SampledTrial:
        return self._valid_trial(self._uniform, stable_seed(self._seed, position, again))

    @functools.cached_property
    def _has_free_range(self) -> bool:
        """Whether a continuous range is searched in every trial, so that there is always an untried configuration."""
        return any(axis.values is None and not axis.when for axis in self._space.grid_index().ordered)


_Drawn = tuple[dict[str, Any], dict[str, Any]]
"""Params and a note of the sampler."""
SAMPLER_ERROR = "sampler error"


class NoValidTrial(OrchestrateError):
    """Every combination that was drawn is an invalid trial."""

    def __init__(self, example: str) -> None:
        super().__init__(
            f"{MAX_INVALID} draws in a row from search are invalid trials, such as {example}; "
            "begin another sweep with another search (`orchestrate sweep FILE --name OTHER`)"
        )


def invalid_text(params: Mapping[str, Any], error: ValidationError) -> str:
    """Return why these params are no trial."""
    loc, sentence, _ = first_error(TrialConfig, error)
    text = ", ".join(f"{path}={value}" for path, value in params.items())
    return f"not a valid trial: {text}: {'.'.join(map(str, loc))} {sentence}"


def _other_seed(seed: int, again: int) -> int:
    return seed if again == 0 else stable_seed(seed, again)


def _sampled_count(trials: Sequence[TrialSnapshot]) -> int:
    """Return how many of the trials were sampled; enqueued ones do not count."""
    return sum(not trial.is_enqueued for trial in trials)


_START = 1_000
"""First redraw that is not one of the bounded redraws."""


class _FinitePoints:
    """The combinations of a finite search space by number, with the fingerprints of those looked at; invalid: None."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec, self._axes = spec, spec.search.grid_index()
        self._fingerprints: dict[int, str | None] = {}

    def __str__(self) -> str:
        size, seen = len(self._axes), len({*self._fingerprints.values()} - {None})
        return f"{seen} of the search space" if len(self._fingerprints) == size else f"none is left among {seen:,}"

    def untried(self, tried: Collection[str], start: int) -> dict[str, Any] | None:
        """Return the first untried combination from `start` on, around the end; None if there is none."""
        size = len(self._axes)
        for step in range(min(size, MAX_POINTS)):
            index = (start + step) % size
            if index not in self._fingerprints:
                self._fingerprints[index] = self._fingerprint(index)
            if self._fingerprints[index] is not None and self._fingerprints[index] not in tried:
                return self._axes.params_at(index)
        return None

    def _fingerprint(self, index: int) -> str | None:
        try:
            config = self._spec.search.apply(self._spec.base, self._axes.params_at(index))
        except ValidationError:
            return None
        return config_fingerprint(config)


class _GridWalk:
    """The grid's points in order, without those that enqueued trials had."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec, self._grid = spec, _grid_of(spec)
        self._fingerprints: list[str] = []
        self._reported = 0

    @property
    def seen(self) -> int:
        """How many points were looked at."""
        return len(self._fingerprints)

    def next(self, tried: Collection[str]) -> dict[str, Any] | None:
        """Return the first point that was not tried; None if all were."""
        index = 0
        while (point := self._grid.params_at(index)) is not None:
            if index == len(self._fingerprints):
                self._fingerprints.append(config_fingerprint(self._spec.search.apply(self._spec.base, point)))
            if self._fingerprints[index] not in tried:
                return point
            index += 1
        return None

    def left_out(self, *, is_first: bool) -> tuple[str, ...]:
        """Return the invalid points passed since the last call, each with the reason; those of earlier drivers are not.

        `is_first`: no trial of the grid was issued before.
        """
        before = self._reported if self._reported or is_first else len(self._grid.invalid)
        self._reported = len(self._grid.invalid)
        return tuple(
            invalid_text(params, error) if isinstance(error, ValidationError) else str(error)
            for params, error in self._grid.invalid[before:]
        )


def _grid_of(spec: SweepSpec) -> Grid:
    seed = spec.sampler.shuffle_seed if isinstance(spec.sampler, GridSampler) else None
    return Grid(spec.search, spec.base, seed)


def _adaptive_sampler(spec: SweepSpec) -> OptunaSampler | CmaEsReplay | None:
    match spec.sampler:
        case TpeSampler() | GpSampler() | NsgaIISampler():
            required = [requirement.name for requirement in spec.require]
            return OptunaSampler(spec.sampler, spec.search, spec.objectives, required)
        case CmaEsSampler():
            return CmaEsReplay(spec.sampler, spec.search, spec.first_objective)
        case GridSampler() | RandomSampler() | QmcSampler() | StagedSampler():
            return None
        case _:
            assert_never(spec.sampler)
