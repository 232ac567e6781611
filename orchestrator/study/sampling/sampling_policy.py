"""What to try next: a pure function of the sweep's seed, the trial's number and what it may know of the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

from orchestrator.spec.pruners import compares
from orchestrator.spec.samplers import (
    CmaEsSampler,
    GpSampler,
    GridSampler,
    Learner,
    NsgaIISampler,
    QmcSampler,
    RandomSampler,
    StagedSampler,
    TpeSampler,
)
from orchestrator.spec.search.space import Grid
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.sampling.adaptive_samplers import Evolving, Learning
from orchestrator.study.sampling.distributions import distributions
from orchestrator.study.sampling.random_samplers import at_random, seed_of, sobol, stable_seed
from orchestrator.study.sampling.staged_sampler import Staged
from orchestrator.study.trial_snapshots import Known, unfinished, view
from trainer.config.trial import TrialConfig, identity

REDRAWS = 20
"""How often a configuration that an earlier trial already has is drawn again at random before it is taken."""
ASKED_AGAIN = 3
"""How often a sampler that learns is asked again before that."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A trial's searched leaves, the whole of its configuration, and a name under which equal ones are equal."""

    params: dict[str, Any]
    config: TrialConfig
    identity: str
    note: dict[str, Any] = field(default_factory=dict[str, Any])
    left_out: tuple[str, ...] = ()
    """Combinations that the sampler passed over before this one, each with the reason."""


class Policy:
    """The sampler of one sweep. It keeps nothing between calls that another call's answer depends on.

    `lag`: trial n may know trials up to n - lag; None: whatever has finished. `earlier`: another sweep's trials,
    numbered below 0.
    """

    def __init__(self, spec: SweepSpec, lag: int | None = None, earlier: Sequence[Known] = ()) -> None:
        self._spec, self._sampler, self._space, self._base = spec, spec.sampler, spec.search, spec.base
        self._lag, self._earlier = lag, tuple(earlier)
        self._seed = seed_of(spec.sampler)
        self._grid = _GridWalk(spec) if isinstance(spec.sampler, GridSampler) else None
        self._learning = _learner(spec)
        self._staged = (
            Staged(spec.sampler, spec.search, spec.base, spec.goal) if isinstance(spec.sampler, StagedSampler) else None
        )
        self.distributions = distributions(spec.search)

    def waits_for(self, trials: Sequence[Known], *, given: bool = False) -> int | None:
        """A trial that must end before the trial after these may be drawn or judged; None: nothing is in the way.

        `given`: that trial is not drawn; its verdicts still depend on others.
        """
        learns = isinstance(self._sampler, Learner) and not given
        if self._lag is not None and (learns or compares(self._spec.pruner)):
            open_ = unfinished(trials, len(trials) - self._lag)
            if open_ is not None:
                return open_
        return None if given or self._staged is None else self._staged.step(trials).waits_for

    def spent(self, trials: Sequence[Known]) -> str:
        """Why there is nothing left to try after these trials; empty while there is, or while that is not yet known."""
        if self._grid is not None and self._grid.next({t.identity for t in trials}) is None:
            return f"all {_drawn(trials)} points of the grid issued"
        if self._staged is not None:
            step = self._staged.step(trials)
            if step.point is None and step.waits_for is None:
                return "; ".join([f"all {len(self._staged.stages)} stages done", *step.left_out])
        return ""

    def draw(self, trials: Sequence[Known]) -> Drawn | None:
        """The trial after these; None when nothing is left to try. Given ones move no other draw.

        What was tried before is drawn again, a bounded number of times, then taken as it is; of a grid each point that
        somebody else tried is passed over.
        """
        place = _drawn(trials)
        tried = {trial.identity for trial in trials}
        match self._sampler:
            case GridSampler():
                assert self._grid is not None
                params = self._grid.next(tried)
                return None if params is None else self.place(params)
            case StagedSampler():
                assert self._staged is not None
                step = self._staged.step(trials)
                point = step.point
                return None if point is None else Drawn(point.params, point.config, point.identity, {}, step.left_out)
            case RandomSampler():
                return self._first_new(place, 0, tried)
            case QmcSampler(seed=seed):
                drawn = self.place(sobol(self._space, seed, place))
                return drawn if drawn.identity not in tried else self._first_new(place, 1, tried)
            case TpeSampler() | GpSampler() | NsgaIISampler() | CmaEsSampler():
                return self._learned(trials, tried)
            case _:
                assert_never(self._sampler)

    def place(self, params: dict[str, Any], note: dict[str, Any] | None = None) -> Drawn:
        """The whole trial at this point."""
        config = self._space.place(self._base, params)
        return Drawn(params, config, identity(config), note or {})

    def _learned(self, trials: Sequence[Known], tried: Collection[str]) -> Drawn:
        assert self._learning is not None
        place = _drawn(trials)
        known = [*self._earlier, *view(trials, len(trials), self._lag)]
        for again in range(1 + ASKED_AGAIN):
            drawn = self.place(*self._learning.propose(known, stable_seed(self._seed, place, again)))
            if drawn.identity not in tried:
                return drawn
        return self._first_new(place, 1 + ASKED_AGAIN, tried)

    def _first_new(self, place: int, redraw: int, tried: Collection[str]) -> Drawn:
        drawn = None
        for again in range(redraw, redraw + 1 + REDRAWS):
            drawn = self.place(at_random(self._space, stable_seed(self._seed, place, again)))
            if drawn.identity not in tried:
                break
        assert drawn is not None
        return drawn


def _drawn(trials: Sequence[Known]) -> int:
    """How many of these the policy drew: its own count goes on as if nothing had been given between."""
    return sum(not trial.given for trial in trials)


class _GridWalk:
    """The grid's points in order, those that were given by hand left out."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec, self._grid = spec, Grid(spec.search, spec.base)
        self._names: list[str] = []

    def next(self, tried: Collection[str]) -> dict[str, Any] | None:
        """The first point that was not tried."""
        index = 0
        while (point := self._grid.point(index)) is not None:
            if index == len(self._names):
                self._names.append(identity(self._spec.search.place(self._spec.base, point)))
            if self._names[index] not in tried:
                return point
            index += 1
        return None


def _learner(spec: SweepSpec) -> Learning | Evolving | None:
    match spec.sampler:
        case TpeSampler() | GpSampler() | NsgaIISampler():
            return Learning(spec.sampler, spec.search, spec.goals)
        case CmaEsSampler():
            return Evolving(spec.sampler, spec.search, spec.goal)
        case GridSampler() | RandomSampler() | QmcSampler() | StagedSampler():
            return None
        case _:
            assert_never(spec.sampler)
