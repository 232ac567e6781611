"""Samplers that do not learn: uniform random and Sobol points; seeds; Optuna's in-memory study.

A seed depends on numbers only. An in-memory study is used for one proposal.
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
from orchestrator.study.sampling.distributions import search_columns, to_distribution


def in_memory_study(
    sampler: BaseSampler, directions: Sequence[Literal["maximize", "minimize"]] = ("maximize",)
) -> Study:
    """Return an in-memory Optuna study with warnings turned off."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(directions=directions, sampler=sampler)


def sample_uniform(space: SearchSpace, seed: int) -> dict[str, Any]:
    """Return uniform random params. Inactive settings are drawn too, then dropped, so that draws are independent."""
    search_space = {path: to_distribution(dimension) for path, dimension in space.dimensions.items()}
    search_space |= {f"zip {index}": IntDistribution(0, _rows(group) - 1) for index, group in enumerate(space.zipped)}
    sampled = in_memory_study(samplers.RandomSampler(seed=seed)).ask(search_space).params
    params = {path: _round_to_lattice(dimension, sampled[path]) for path, dimension in space.dimensions.items()}
    for index, group in enumerate(space.zipped):
        params |= {path: choices[sampled[f"zip {index}"]] for path, choices in group.items()}
    return space.active(params)


def sample_sobol(space: SearchSpace, seed: int, index: int) -> dict[str, Any]:
    """Return the index-th point of a scrambled Sobol sequence (Owen 1998) with one coordinate per column."""
    from scipy.stats.qmc import Sobol

    found = search_columns(space)
    if not found:
        return {}
    sequence = Sobol(d=len(found), scramble=True, rng=seed)
    if index:
        sequence.fast_forward(index)
    positions: Sequence[float] = sequence.random(1)[0].tolist()
    params: dict[str, Any] = {}
    for column, position in zip(found, positions, strict=True):
        params |= column.decode(column.value_at(position))
    return space.active(params)


def _rows(group: Mapping[str, tuple[Any, ...]]) -> int:
    return len(next(iter(group.values())))


def _round_to_lattice(dimension: Any, value: Any) -> Any:
    """Rounded, so that 0.1 + 2 * 0.1 on a lattice is 0.3."""
    return float(f"{value:.12g}") if isinstance(dimension, Uniform) and dimension.step is not None else value


@functools.lru_cache(maxsize=1 << 16)
def stable_seed(*parts: int) -> int:
    """Return a 32-bit seed that is the same for these numbers in every process and Python version."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:4], "big")


def sampler_seed(sampler: Sampler) -> int:
    """Return the sampler's seed; 0 for samplers without one."""
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
