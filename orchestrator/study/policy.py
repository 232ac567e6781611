"""What to try next: a pure function of the sweep's seed, the trial's number and what the sampler may know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, assert_never

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler as OptunaRandom

from orchestrator.spec.space import Choice, Dimension, Grid, IntUniform, LogUniform, SearchSpace, Uniform
from orchestrator.spec.sweep import GridSampler, RandomSampler, SweepSpec
from trainer.config import TrialConfig

REDRAWS = 20
"""How often a configuration that an earlier trial already has is drawn again before it is taken."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A trial's searched leaves, the whole of its configuration, and a name under which equal ones are equal."""

    params: dict[str, Any]
    config: TrialConfig
    identity: str


class Policy:
    """The sampler of one sweep. It keeps nothing between calls that another call's answer depends on.

    A sampler that learns gets, as one more argument of `propose`, what it may know: the results of trials up to n - L,
    later ones as running, so that neither concurrency nor chance changes what is tried.
    """

    def __init__(self, spec: SweepSpec) -> None:
        self._sampler, self._space, self._base = spec.sampler, spec.search, spec.base
        self._grid = Grid(spec.search, spec.base) if isinstance(spec.sampler, GridSampler) else None
        self.distributions = distributions(spec.search)

    def draw(self, number: int, tried: Container[str]) -> Drawn | None:
        """Trial `number`. What was tried before is drawn again, a bounded number of times, then taken as it is."""
        drawn = None
        for redraw in range(1 if self._grid is not None else 1 + REDRAWS):
            params = self.propose(number, redraw)
            if params is None:
                return None
            config = self._space.place(self._base, params)
            drawn = Drawn(params, config, identity(config))
            if drawn.identity not in tried:
                break
        return drawn

    def propose(self, number: int, redraw: int) -> dict[str, Any] | None:
        """The searched leaves of trial `number`, drawn `redraw` times already; None when nothing is left to try."""
        match self._sampler:
            case GridSampler():
                assert self._grid is not None
                return self._grid.point(number)
            case RandomSampler(seed=seed):
                return _draw(self._space, OptunaRandom(seed=stable_seed(seed, number, redraw)))
            case _:
                assert_never(self._sampler)


def identity(config: TrialConfig) -> str:
    """Equal for equal configurations, whichever way they were written."""
    return hashlib.sha256(json.dumps(config.identity(), sort_keys=True).encode()).hexdigest()


def stable_seed(*parts: int) -> int:
    """A seed that depends on these numbers alone, in every process and every version of Python."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:4], "big")


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Each searched leaf as Optuna records it."""
    found = {path: _distribution(dimension) for path, dimension in space.dimensions.items()}
    for group in space.zipped:
        found |= {path: CategoricalDistribution(choices) for path, choices in group.items()}
    return found


def _draw(space: SearchSpace, sampler: OptunaRandom) -> dict[str, Any]:
    """Every leaf is drawn, then those whose condition fails are left out: a draw never moves its neighbours."""
    asked = {path: _distribution(dimension) for path, dimension in space.dimensions.items()}
    asked |= {_zip_name(g): IntDistribution(0, _rows(group) - 1) for g, group in enumerate(space.zipped)}
    drawn = optuna.create_study(sampler=sampler).ask(asked).params
    params = {path: _tidy(space.dimensions[path], drawn[path]) for path in space.dimensions}
    for g, group in enumerate(space.zipped):
        params |= {path: choices[drawn[_zip_name(g)]] for path, choices in group.items()}
    return space.active(params)


def _zip_name(group: int) -> str:
    return f"zip {group}"


def _rows(group: dict[str, tuple[Any, ...]]) -> int:
    return len(next(iter(group.values())))


def _tidy(dimension: Dimension, value: Any) -> Any:
    """On a lattice 0.1 + 2 * 0.1 is 0.3, as a person writes it."""
    on_lattice = isinstance(dimension, Uniform) and dimension.step is not None
    return float(f"{value:.12g}") if on_lattice else value


def _distribution(dimension: Dimension) -> BaseDistribution:
    match dimension:
        case Choice(choice=choices):
            return CategoricalDistribution(choices)
        case Uniform(uniform=(low, high), step=step):
            return FloatDistribution(low, high, step=step)
        case LogUniform(log_uniform=(low, high)):
            return FloatDistribution(low, high, log=True)
        case IntUniform(int_uniform=(low, high), step=step, log=log):
            return IntDistribution(low, high, step=step, log=log)
        case _:
            assert_never(dimension)
