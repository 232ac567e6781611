"""Optuna's samplers that learn, over a study rebuilt in memory from what the trial may know.

Nothing of Optuna's own state outlives a draw: the same view and the same seed give the same trial in every process.

CMA-ES, replayed from the trials: the `cmaes` package that Optuna uses too.

Optuna's own sampler pickles its optimiser into the study, and no pickle is ever loaded from a sweep's folder. Here the
optimiser is made anew for each draw and told the finished generations, so that its state is a function of the view.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, assert_never

import numpy as np
from cmaes import CMA, get_warm_start_mgd
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from orchestrator.spec.objectives import Goal
from orchestrator.spec.samplers import CmaEsSampler, GpSampler, NsgaIISampler, TpeSampler
from orchestrator.spec.search.space import SearchSpace
from orchestrator.study.sampling.distributions import Column, Outside, columns
from orchestrator.study.sampling.random_samplers import at_random, study_in_memory
from orchestrator.study.trial_records import TrialState
from orchestrator.study.trial_snapshots import Known

Asked = TpeSampler | GpSampler | NsgaIISampler


class Learning:
    """Asks one of Optuna's samplers."""

    def __init__(self, config: Asked, space: SearchSpace, goals: Sequence[Goal]) -> None:
        self._config, self._goals = config, goals
        self._space = space
        self._columns = columns(space, ordinal=isinstance(config, GpSampler))

    def propose(self, known: Sequence[Known], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The leaves of the next trial, and what has to be written down beside it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = self._sampler(seed)
            study = study_in_memory(sampler, [goal.direction for goal in self._goals])
            study.add_trials(self._lessons(known))
            trial = study.ask()
            params: dict[str, Any] = {}
            for column in self._columns:
                if column.axis.active(params):
                    params |= column.decode(column.suggest(trial))
        note = study.trials[-1].system_attrs if isinstance(self._config, NsgaIISampler) else {}
        return params, {key: value for key, value in note.items() if isinstance(value, int)}

    def _sampler(self, seed: int) -> BaseSampler:
        match self._config:
            case TpeSampler(n_startup_trials=startup, n_ei_candidates=candidates):
                # Branches of a conditional space are modelled apart from each other.
                grouped = any(column.axis.when for column in self._columns)
                return TPESampler(
                    seed=seed,
                    n_startup_trials=startup,
                    n_ei_candidates=candidates,
                    group=grouped,
                    constant_liar=True,
                    multivariate=True,
                )
            case GpSampler(n_startup_trials=startup):
                rest = RandomSampler(seed=seed)
                return GPSampler(
                    seed=seed, n_startup_trials=startup, independent_sampler=rest, warn_independent_sampling=False
                )
            case NsgaIISampler(population_size=size):
                return NSGAIISampler(seed=seed, population_size=size)
            case _:
                assert_never(self._config)

    def _lessons(self, known: Sequence[Known]) -> list[FrozenTrial]:
        worst = worst_values(known, self._goals)
        ranked_by_step = isinstance(self._config, TpeSampler) and len(self._goals) == 1
        return [self._lesson(trial, worst, ranked_by_step) for trial in known]

    def _lesson(self, trial: Known, worst: Sequence[float] | None, ranked_by_step: bool) -> FrozenTrial:
        """A trial as Optuna should see it. What it cannot learn from is FAIL, which its samplers pass over."""
        encoded = encode(self._columns, trial)
        if encoded is None:
            return create_trial(state=OptunaState.FAIL)
        common: dict[str, Any] = {
            "params": {column.name: value for column, value in encoded},
            "distributions": {column.name: column.distribution for column, _ in encoded},
            "system_attrs": dict(trial.note),
        }
        match trial.state:
            case TrialState.RUNNING | TrialState.PAUSED | TrialState.QUEUED:
                return create_trial(state=OptunaState.RUNNING, **common)
            case TrialState.FAILED:
                return create_trial(state=OptunaState.FAIL, **common)
            case TrialState.PRUNED if ranked_by_step:
                # TPE ranks pruned trials by how far they came, then by value; one without values comes last.
                values = None if trial.diverged or not finite(trial.values) else trial.values
                seen = {} if values is None else {_last(trial): values[0]}
                return create_trial(state=OptunaState.PRUNED, intermediate_values=seen, **common)
            case TrialState.PRUNED | TrialState.COMPLETE:
                values = worst if trial.diverged or not finite(trial.values) else trial.values
                if values is None:
                    return create_trial(state=OptunaState.FAIL, **common)
                return create_trial(state=OptunaState.COMPLETE, values=list(values), **common)
            case _:
                assert_never(trial.state)


def encode(found: Iterable[Column], trial: Known) -> list[tuple[Column, Any]] | None:
    """The trial's leaves as drawn values; None where one lies outside the search, or another leaf was given too."""
    found = list(found)
    if not trial.params.keys() <= {path for column in found for path in column.axis.paths}:
        return None
    try:
        return [(c, c.encode(trial.params)) for c in found if all(path in trial.params for path in c.axis.paths)]
    except Outside:
        return None


def finite(values: Sequence[float] | None) -> bool:
    """Whether there is a value of every goal."""
    return values is not None and all(map(math.isfinite, values))


def worst_values(known: Iterable[Known], goals: Sequence[Goal]) -> tuple[float, ...] | None:
    """The worst value seen of each goal: what a diverged trial counts as. None before there is any."""
    seen = [t.values for t in known if t.values is not None and finite(t.values) and not t.diverged]
    if not seen:
        return None
    ends = [min if goal.direction == "maximize" else max for goal in goals]
    return tuple(end(values[g] for values in seen) for g, end in enumerate(ends))


def _last(trial: Known) -> int:
    return max(trial.course, default=0)


GENERATION, PLACE = "generation", "place"


class Evolving:
    """Draws from the generation that the known trials have reached."""

    def __init__(self, config: CmaEsSampler, space: SearchSpace, goal: Goal) -> None:
        self._config, self._space, self._goal = config, space, goal
        self._columns = moved_columns(space)
        self._size = config.population_size or 4 + math.floor(3 * math.log(len(self._columns)))

    def propose(self, known: Sequence[Known], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The leaves of the next trial; beside it, its generation and its place in the unit cube are written down."""
        optimiser = self._start(known, seed)
        generation = 0
        while len(told := self._told(known, generation)) >= self._size:
            optimiser.tell(told[: self._size])
            generation += 1
        place = optimiser.ask()
        params = at_random(self._space, seed)
        for column, where in zip(self._columns, place.tolist(), strict=True):
            params |= column.decode(column.at(where))
        return self._space.active(params), {GENERATION: generation, PLACE: place.tolist()}

    def _start(self, known: Sequence[Known], seed: int) -> CMA:
        bounds = np.array([[0.0, 1.0]] * len(self._columns))
        common: dict[str, Any] = {"bounds": bounds, "seed": seed, "population_size": self._size}
        earlier = [pair for trial in known if trial.number < 0 if (pair := self._solution(trial)) is not None]
        if earlier:
            mean, sigma, cov = get_warm_start_mgd(earlier)
            return CMA(mean=mean, sigma=sigma, cov=cov, **common)
        return CMA(mean=np.full(len(self._columns), 0.5), sigma=self._config.sigma0, **common)

    def _told(self, known: Sequence[Known], generation: int) -> list[tuple[np.ndarray, float]]:
        own = (trial for trial in known if trial.note.get(GENERATION) == generation)
        return [pair for trial in own if (pair := self._solution(trial)) is not None]

    def _solution(self, trial: Known) -> tuple[np.ndarray, float] | None:
        """Where the trial was and its value, less being better; None while it has none."""
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            return None
        place = trial.note.get(PLACE) or self._place(trial)
        if place is None:
            return None
        bad = trial.diverged or trial.values is None or not finite(trial.values)
        value = math.inf if bad or trial.values is None else trial.values[0]
        return np.array(place), -value if self._goal.direction == "maximize" and not bad else value

    def _place(self, trial: Known) -> list[float] | None:
        encoded = encode(self._columns, trial)
        return None if encoded is None else [column.place(value) for column, value in encoded]


def moved_columns(space: SearchSpace) -> list[Column]:
    """The leaves that CMA-ES moves: numbers, searched whatever the others are."""
    return [c for c in columns(space, ordinal=True) if c.numeric and not c.axis.when]
