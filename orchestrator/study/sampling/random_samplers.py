"""Samplers that learn nothing: random draws, and Sobol points.

Seeds that depend on numbers alone.

Optuna's study in memory: made for one draw and forgotten.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, assert_never

import optuna
from optuna import samplers
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study

from orchestrator.spec.samplers import (
    CmaEsSampler,
    GpSampler,
    GridSampler,
    NsgaIISampler,
    QmcSampler,
    RandomSampler,
    Sampler,
    StagedSampler,
    TpeSampler,
)
from orchestrator.spec.search.dimensions import Uniform
from orchestrator.spec.search.space import SearchSpace
from orchestrator.study.sampling.distributions import columns, distribution


def study_in_memory(
    sampler: BaseSampler, directions: Sequence[Literal["maximize", "minimize"]] = ("maximize",)
) -> Study:
    """A study that says nothing: what Optuna warns of here is meant."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(directions=directions, sampler=sampler)


def at_random(space: SearchSpace, seed: int) -> dict[str, Any]:
    """Every leaf is drawn, then those whose condition fails are left out: a draw never moves its neighbours."""
    asked = {path: distribution(dimension) for path, dimension in space.dimensions.items()}
    asked |= {f"zip {g}": IntDistribution(0, _rows(group) - 1) for g, group in enumerate(space.zipped)}
    drawn = study_in_memory(samplers.RandomSampler(seed=seed)).ask(asked).params
    params = {path: _tidy(dimension, drawn[path]) for path, dimension in space.dimensions.items()}
    for g, group in enumerate(space.zipped):
        params |= {path: choices[drawn[f"zip {g}"]] for path, choices in group.items()}
    return space.active(params)


def sobol(space: SearchSpace, seed: int, index: int) -> dict[str, Any]:
    """The index-th point of a scrambled Sobol sequence over the space (Owen 1998), one coordinate per column."""
    from scipy.stats.qmc import Sobol

    found = columns(space)
    if not found:
        return {}
    sequence = Sobol(d=len(found), scramble=True, rng=seed)
    if index:
        sequence.fast_forward(index)
    places: Sequence[float] = sequence.random(1)[0].tolist()
    params: dict[str, Any] = {}
    for column, place in zip(found, places, strict=True):
        params |= column.decode(column.at(place))
    return space.active(params)


def _rows(group: Mapping[str, tuple[Any, ...]]) -> int:
    return len(next(iter(group.values())))


def _tidy(dimension: Any, value: Any) -> Any:
    """On a lattice 0.1 + 2 * 0.1 is 0.3, as a person writes it."""
    return float(f"{value:.12g}") if isinstance(dimension, Uniform) and dimension.step is not None else value


@functools.lru_cache(maxsize=1 << 16)
def stable_seed(*parts: int) -> int:
    """A seed that depends on these numbers alone, in every process and every version of Python."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:4], "big")


def seed_of(sampler: Sampler) -> int:
    """The sweep's seed."""
    match sampler:
        case GridSampler() | StagedSampler():
            return 0
        case (
            RandomSampler(seed=seed)
            | QmcSampler(seed=seed)
            | TpeSampler(seed=seed)
            | GpSampler(seed=seed)
            | CmaEsSampler(seed=seed)
            | NsgaIISampler(seed=seed)
        ):
            return seed
        case _:
            assert_never(sampler)
