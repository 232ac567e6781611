"""Samplers that learn from visible trials: Optuna's TPE, GP and NSGA-II, and CMA-ES by replay.

Optuna's samplers run over a study rebuilt in memory for each proposal, so that the same visible trials and seed give
the same proposal in every process. CMA-ES uses the `cmaes` package, as Optuna does. Optuna's own CMA-ES pickles its
optimizer into the study, and no pickle is loaded from a sweep's folder; here the optimizer is rebuilt for each proposal
by replaying the finished generations.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from orchestrator.spec.objectives import Objective
from orchestrator.spec.samplers import CmaEsSampler, GpSampler, NsgaIISampler, TpeSampler
from orchestrator.spec.search.space import SearchSpace
from orchestrator.study.sampling.distributions import OutOfSpace, SearchColumn, search_columns
from orchestrator.study.sampling.random_samplers import in_memory_study, sample_uniform
from orchestrator.study.trial_records import TrialState, miss_of
from orchestrator.study.trial_snapshots import TrialSnapshot

if TYPE_CHECKING:
    from cmaes import CMA

OptunaSamplerConfig = TpeSampler | GpSampler | NsgaIISampler


class OptunaSampler:
    """Proposes trials with one of Optuna's samplers."""

    def __init__(
        self,
        config: OptunaSamplerConfig,
        space: SearchSpace,
        objectives: Sequence[Objective],
        required: Sequence[str] = (),
    ) -> None:
        """`required`: names of the requirements, which the sampler gets as constraints."""
        self._config, self._objectives, self._required = config, objectives, required
        self._space = space
        self._columns = search_columns(space, ordinal=isinstance(config, GpSampler))

    def propose(self, snapshots: Sequence[TrialSnapshot], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the params of the next trial, and a note to store with it (NSGA-II's generation)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = self._sampler(seed)
            study = in_memory_study(sampler, [objective.direction for objective in self._objectives])
            study.add_trials(self._to_optuna_trials(snapshots))
            trial = study.ask()
            params: dict[str, Any] = {}
            for column in self._columns:
                if column.axis.is_active(params):
                    params |= column.decode(column.suggest(trial))
        stored_note = study.trials[-1].system_attrs if isinstance(self._config, NsgaIISampler) else {}
        return params, {key: value for key, value in stored_note.items() if isinstance(value, int)}

    def _sampler(self, seed: int) -> BaseSampler:
        match self._config:
            case TpeSampler(n_startup_trials=startup, n_ei_candidates=candidates):
                # Branches of a conditional space are modeled separately.
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

    def _to_optuna_trials(self, snapshots: Sequence[TrialSnapshot]) -> list[FrozenTrial]:
        worst = worst_values(snapshots, self._objectives)
        ranked_by_step = isinstance(self._config, TpeSampler) and len(self._objectives) == 1
        missed = worst_violations(snapshots, self._required)
        return [self._to_optuna_trial(trial, worst, ranked_by_step, missed) for trial in snapshots]

    def _to_optuna_trial(
        self, trial: TrialSnapshot, worst: Sequence[float] | None, ranked_by_step: bool, missed: Mapping[str, float]
    ) -> FrozenTrial:
        """Return the trial for Optuna; one that it cannot learn from is FAIL, which its samplers ignore."""
        encoded = encode(self._columns, trial)
        if encoded is None:
            return create_trial(state=OptunaState.FAIL)
        common: dict[str, Any] = {
            "params": {column.name: value for column, value in encoded},
            "distributions": {column.name: column.distribution for column, _ in encoded},
            "system_attrs": dict(trial.sampler_note),
            "constraints": finite_violations(trial, missed) or None,
        }
        match trial.state:
            case TrialState.RUNNING | TrialState.PAUSED:
                return create_trial(state=OptunaState.RUNNING, **common)
            case TrialState.FAILED:
                return create_trial(state=OptunaState.FAIL, **common)
            case TrialState.PRUNED if ranked_by_step:
                # TPE ranks pruned trials by their last step, then by value; one without values comes last.
                values = None if trial.diverged or not has_finite_values(trial.values) else trial.values
                reported = {} if values is None else {_last_step(trial): values[0]}
                return create_trial(state=OptunaState.PRUNED, intermediate_values=reported, **common)
            case TrialState.PRUNED | TrialState.COMPLETE:
                values = worst if trial.diverged or not has_finite_values(trial.values) else trial.values
                if values is None:
                    return create_trial(state=OptunaState.FAIL, **common)
                return create_trial(state=OptunaState.COMPLETE, values=list(values), **common)
            case _:
                assert_never(trial.state)


def encode(found: Iterable[SearchColumn], trial: TrialSnapshot) -> list[tuple[SearchColumn, Any]] | None:
    """Return the trial's settings as sampled values.

    None if a value is outside of the search space, or if the trial also sets a path that is not searched.
    """
    found = list(found)
    if not trial.params.keys() <= {path for column in found for path in column.axis.paths}:
        return None
    try:
        return [
            (column, column.encode(trial.params))
            for column in found
            if all(path in trial.params for path in column.axis.paths)
        ]
    except OutOfSpace:
        return None


def has_finite_values(values: Sequence[float] | None) -> bool:
    """Return whether there are values and all are finite."""
    return values is not None and all(map(math.isfinite, values))


def worst_values(snapshots: Iterable[TrialSnapshot], objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    """Return the worst value so far of each objective, which a diverged trial counts as; None without values."""
    reported = [
        trial.values
        for trial in snapshots
        if trial.values is not None and has_finite_values(trial.values) and not trial.diverged
    ]
    if not reported:
        return None
    worst = [min if objective.direction == "maximize" else max for objective in objectives]
    return tuple(worst_of(values[index] for values in reported) for index, worst_of in enumerate(worst))


def worst_violations(snapshots: Iterable[TrialSnapshot], required: Iterable[str]) -> dict[str, float]:
    """Return the violation of each requirement that a diverged or unmeasured trial counts as, which is above 0.

    It is the largest amount by which a trial has missed or kept the bound.
    """
    snapshots = list(snapshots)
    found = {name: [abs(trial.violations.get(name, math.inf)) for trial in snapshots] for name in required}
    return {name: max(filter(math.isfinite, each), default=0.0) or 1.0 for name, each in found.items()}


def finite_violations(trial: TrialSnapshot, worst: Mapping[str, float]) -> dict[str, float]:
    """Return the trial's violation of each requirement; the worst one where it diverged or was not measured."""
    known = {} if trial.diverged else trial.violations
    return {name: v if math.isfinite(v := known.get(name, math.inf)) else worst[name] for name in worst}


def _last_step(trial: TrialSnapshot) -> int:
    return max(trial.curve, default=0)


GENERATION, POSITION = "generation", "place"


class CmaEsReplay:
    """Samples from the current CMA-ES generation, rebuilt by replaying the finished trials."""

    def __init__(self, config: CmaEsSampler, space: SearchSpace, objective: Objective) -> None:
        self._config, self._space, self._objective = config, space, objective
        self._columns = cma_columns(space)
        self._size = config.population_size or 4 + math.floor(3 * math.log(len(self._columns)))
        self._worst_cost = 0.0

    def propose(self, snapshots: Sequence[TrialSnapshot], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the params of the next trial, and its generation and position in the unit cube as a note."""
        ended = [self._cost(trial) for trial in snapshots if has_finite_values(trial.values) and not trial.diverged]
        self._worst_cost = max(ended, default=0.0)
        optimizer = self._start(snapshots, seed)
        generation = 0
        while len(solutions := self._solutions(snapshots, generation)) >= self._size:
            optimizer.tell(solutions[: self._size])
            generation += 1
        position = optimizer.ask()
        params = sample_uniform(self._space, seed)
        for column, where in zip(self._columns, position.tolist(), strict=True):
            params |= column.decode(column.value_at(where))
        return self._space.active(params), {GENERATION: generation, POSITION: position.tolist()}

    def _start(self, snapshots: Sequence[TrialSnapshot], seed: int) -> CMA:
        from cmaes import CMA, get_warm_start_mgd  # imports scipy.stats: 0.8 s that only this sampler needs

        bounds = np.array([[0.0, 1.0]] * len(self._columns))
        common: dict[str, Any] = {"bounds": bounds, "seed": seed, "population_size": self._size}
        warm_start = [
            solution for trial in snapshots if trial.number < 0 and (solution := self._solution(trial)) is not None
        ]
        if warm_start:
            mean, sigma, cov = get_warm_start_mgd(warm_start)
            return CMA(mean=mean, sigma=sigma, cov=cov, **common)
        return CMA(mean=np.full(len(self._columns), 0.5), sigma=self._config.sigma0, **common)

    def _solutions(self, snapshots: Sequence[TrialSnapshot], generation: int) -> list[tuple[np.ndarray, float]]:
        own = (trial for trial in snapshots if trial.sampler_note.get(GENERATION) == generation)
        return [pair for trial in own if (pair := self._solution(trial)) is not None]

    def _solution(self, trial: TrialSnapshot) -> tuple[np.ndarray, float] | None:
        """Return the trial's position and value, lower being better; None without a value.

        A trial that breaks a requirement is worse than `_worst_cost` by the amount, as CMA-ES uses ranks only.
        """
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            return None
        position = trial.sampler_note.get(POSITION)
        if position is None or not self._is_at(trial, position):
            position = self._position(trial)
        if position is None:
            return None
        bad = trial.diverged or trial.values is None or not has_finite_values(trial.values)
        cost = math.inf if bad else self._cost(trial)
        missed = miss_of(trial.violations)[1]
        return np.array(position), self._worst_cost + missed if missed and not bad else cost

    def _cost(self, trial: TrialSnapshot) -> float:
        value = math.nan if trial.values is None else trial.values[0]
        return -value if self._objective.direction == "maximize" else value

    def _is_at(self, trial: TrialSnapshot, position: Sequence[float]) -> bool:
        """Return whether the trial's settings are at this position: after a range was widened they may not be."""
        placed = zip(self._columns, position, strict=True)
        at = {path: value for column, x in placed for path, value in column.decode(column.value_at(x)).items()}
        return all(path in trial.params and math.isclose(trial.params[path], value) for path, value in at.items())

    def _position(self, trial: TrialSnapshot) -> list[float] | None:
        encoded = encode(self._columns, trial)
        return None if encoded is None else [column.position_of(value) for column, value in encoded]


def cma_columns(space: SearchSpace) -> list[SearchColumn]:
    """Return the columns that CMA-ES searches: numbers without a condition."""
    return [column for column in search_columns(space, ordinal=True) if column.numeric and not column.axis.when]
