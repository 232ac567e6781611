"""CMA-ES, replayed from the trials: the `cmaes` package that Optuna uses too.

Optuna's own sampler pickles its optimiser into the study, and no pickle is ever loaded from a sweep's folder. Here the
optimiser is made anew for each draw and told the finished generations, so that its state is a function of the view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from cmaes import CMA, get_warm_start_mgd

from orchestrator.spec.goal import Goal
from orchestrator.spec.samplers import CmaEsSampler
from orchestrator.spec.space import SearchSpace
from orchestrator.study.knowing import Known
from orchestrator.study.sampling.columns import Column, columns
from orchestrator.study.sampling.learning import encode, finite
from orchestrator.study.sampling.spread import at_random
from orchestrator.study.state import TrialState

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
