"""`SamplingPolicy`: the next trial's settings, a pure function of seed, trial number and visible trials."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

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
from orchestrator.study.sampling.adaptive_samplers import CmaEsReplay, OptunaSampler
from orchestrator.study.sampling.distributions import space_distributions
from orchestrator.study.sampling.random_samplers import sample_sobol, sample_uniform, sampler_seed, stable_seed
from orchestrator.study.sampling.staged_sampler import StagedReplay
from orchestrator.study.trial_snapshots import TrialSnapshot, first_unfinished, visible_trials
from trainer.config.trial import TrialConfig, config_fingerprint

MAX_REDRAWS = 20
"""Random redraws of a configuration that an earlier trial has, before it is accepted as a duplicate."""
MAX_RESAMPLES = 3
"""Repeated proposals of an adaptive sampler before random redraws."""


@dataclass(frozen=True, slots=True)
class SampledTrial:
    """A sampled trial: its params, its complete configuration and a fingerprint that is equal for equal ones."""

    params: dict[str, Any]
    config: TrialConfig
    fingerprint: str
    sampler_note: dict[str, Any] = field(default_factory=dict[str, Any])
    skipped_combinations: tuple[str, ...] = ()
    """Invalid combinations that the sampler skipped before this one, each with the reason."""


class SamplingPolicy:
    """The sampler of one sweep. Stateless: a proposal depends on the arguments only.

    `lag`: trial n sees results of trials up to n - lag; None: all results.
    `warm_start_trials`: another sweep's trials, numbered below 0.
    """

    def __init__(
        self, spec: SweepSpec, lag: int | None = None, warm_start_trials: Sequence[TrialSnapshot] = ()
    ) -> None:
        self._spec, self._sampler, self._space, self._base = spec, spec.sampler, spec.search, spec.base
        self._lag, self._warm_start_trials = lag, tuple(warm_start_trials)
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
        return None if enqueued or self._staged is None else self._staged.next(trials).blocking_trial

    def exhausted_reason(self, trials: Sequence[TrialSnapshot]) -> str:
        """Return why the search is exhausted after these trials; "" if it is not, or not yet known to be."""
        if self._grid is not None and self._grid.next({trial.fingerprint for trial in trials}) is None:
            return f"all {_sampled_count(trials)} points of the grid issued"
        if self._staged is not None:
            step = self._staged.next(trials)
            if step.point is None and step.blocking_trial is None:
                return "; ".join([f"all {len(self._staged.stages)} stages done", *step.skipped_combinations])
        return ""

    def sample(self, trials: Sequence[TrialSnapshot]) -> SampledTrial | None:
        """Return the trial after these; None if the search is exhausted. Enqueued trials do not shift other draws.

        A configuration that was tried before is redrawn a bounded number of times, then accepted; the grid skips points
        that enqueued trials had.
        """
        position = _sampled_count(trials)
        tried = {trial.fingerprint for trial in trials}
        match self._sampler:
            case GridSampler():
                assert self._grid is not None
                params = self._grid.next(tried)
                return None if params is None else self.to_trial(params)
            case StagedSampler():
                assert self._staged is not None
                step = self._staged.next(trials)
                point = step.point
                return (
                    None
                    if point is None
                    else SampledTrial(point.params, point.config, point.fingerprint, {}, step.skipped_combinations)
                )
            case RandomSampler():
                return self._first_untried(position, 0, tried)
            case QmcSampler(seed=seed):
                sampled = self.to_trial(sample_sobol(self._space, seed, position))
                return sampled if sampled.fingerprint not in tried else self._first_untried(position, 1, tried)
            case TpeSampler() | GpSampler() | NsgaIISampler() | CmaEsSampler():
                return self._sample_adaptive(trials, tried)
            case _:
                assert_never(self._sampler)

    def to_trial(self, params: dict[str, Any], sampler_note: dict[str, Any] | None = None) -> SampledTrial:
        """Return the trial with these params over the base."""
        config = self._space.apply(self._base, params)
        return SampledTrial(params, config, config_fingerprint(config), sampler_note or {})

    def _sample_adaptive(self, trials: Sequence[TrialSnapshot], tried: Collection[str]) -> SampledTrial:
        assert self._adaptive is not None
        position = _sampled_count(trials)
        snapshots = [*self._warm_start_trials, *visible_trials(trials, len(trials), self._lag)]
        for again in range(1 + MAX_RESAMPLES):
            sampled = self.to_trial(*self._adaptive.propose(snapshots, stable_seed(self._seed, position, again)))
            if sampled.fingerprint not in tried:
                return sampled
        return self._first_untried(position, 1 + MAX_RESAMPLES, tried)

    def _first_untried(self, position: int, redraw: int, tried: Collection[str]) -> SampledTrial:
        sampled = None
        for again in range(redraw, redraw + 1 + MAX_REDRAWS):
            sampled = self.to_trial(sample_uniform(self._space, stable_seed(self._seed, position, again)))
            if sampled.fingerprint not in tried:
                break
        assert sampled is not None
        return sampled


def _sampled_count(trials: Sequence[TrialSnapshot]) -> int:
    """Return how many of the trials were sampled; enqueued ones do not count."""
    return sum(not trial.is_enqueued for trial in trials)


class _GridWalk:
    """The grid's points in order, without those that enqueued trials had."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec, self._grid = spec, Grid(spec.search, spec.base)
        self._fingerprints: list[str] = []

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


def _adaptive_sampler(spec: SweepSpec) -> OptunaSampler | CmaEsReplay | None:
    match spec.sampler:
        case TpeSampler() | GpSampler() | NsgaIISampler():
            return OptunaSampler(spec.sampler, spec.search, spec.objectives)
        case CmaEsSampler():
            return CmaEsReplay(spec.sampler, spec.search, spec.first_objective)
        case GridSampler() | RandomSampler() | QmcSampler() | StagedSampler():
            return None
        case _:
            assert_never(spec.sampler)
