"""Settings of samplers, of the visibility rule (`order`), and the stages of the staged sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.errors import closest_match
from orchestrator.spec.search.dimensions import Choice, Dimension, IntUniform, LogUniform, Scalar, Uniform, all_values
from orchestrator.spec.search.space import SearchSpace
from trainer.config.base import FrozenModel, NonEmptyStr, PositiveFloat, PositiveInt

Seed = Annotated[int, Field(description="Same seed, same trials.")]
Startup = Annotated[int, Field(ge=1, description="Random trials before the sampler uses results.")]


class GridSampler(FrozenModel):
    """Every combination once, in the file's order (the last dimension advances fastest)."""

    kind: Literal["grid"] = "grid"


class RandomSampler(FrozenModel):
    """Independent draws; trial n depends on the seed and n only."""

    kind: Literal["random"] = "random"
    seed: Seed = 0


class QmcSampler(FrozenModel):
    """Scrambled Sobol points cover the space more evenly than random draws; trial n depends on the seed and n only."""

    kind: Literal["qmc"] = "qmc"
    seed: Seed = 0


class TpeSampler(FrozenModel):
    """Optuna's tree-structured Parzen estimator over all settings jointly; one objective or several."""

    kind: Literal["tpe"] = "tpe"
    seed: Seed = 0
    n_startup_trials: Startup = 10
    n_ei_candidates: PositiveInt = Field(
        default=24, description="Candidates from which the best expected improvement is taken."
    )


class GpSampler(FrozenModel):
    """Optuna's Gaussian process: few trials for few continuous settings; takes about 0.25 seconds per trial."""

    kind: Literal["gp"] = "gp"
    seed: Seed = 0
    n_startup_trials: Startup = 10


class CmaEsSampler(FrozenModel):
    """CMA-ES (Hansen): one objective, numeric settings. Categorical and conditional (`when`) ones are random."""

    kind: Literal["cmaes"] = "cmaes"
    seed: Seed = 0
    population_size: Annotated[int, Field(ge=4)] | None = Field(
        default=None, description="Trials per generation; by default 4 + 3 ln(number of settings), Hansen's rule."
    )
    sigma0: PositiveFloat = Field(default=1 / 6, description="Initial step size, as a share of each setting's range.")


class NsgaIISampler(FrozenModel):
    """Optuna's NSGA-II: evolves a population towards the Pareto front of several objectives."""

    kind: Literal["nsgaii"] = "nsgaii"
    seed: Seed = 0
    population_size: Annotated[int, Field(ge=2)] = Field(
        default=20, description="Trials per generation. (Optuna's default of 50 is for cheap functions.)"
    )


class StagedSampler(FrozenModel):
    """Searches a few settings at a time, each stage from the best trial so far, as the SimPO authors advise.

    By default the learning rate, then gamma (or its ratio), then beta, then each other setting. Settings of later
    stages have their value in `base`. A stage starts when the one before has ended.
    """

    kind: Literal["staged"] = "staged"
    stages: (
        Annotated[tuple[Annotated[tuple[NonEmptyStr, ...], Field(min_length=1)], ...], Field(min_length=1)] | None
    ) = Field(default=None, description="Settings of each stage; each searched setting is in exactly one.")
    points: Annotated[int, Field(ge=2)] = Field(
        default=5, description="Values tried of a continuous range: evenly spaced, both ends included."
    )


Sampler = Annotated[
    GridSampler | RandomSampler | QmcSampler | TpeSampler | GpSampler | CmaEsSampler | NsgaIISampler | StagedSampler,
    Field(discriminator="kind"),
]

AdaptiveSampler = TpeSampler | GpSampler | CmaEsSampler | NsgaIISampler
"""Samplers whose proposals depend on results."""


class Reproducible(FrozenModel):
    """Trial n sees the results of trials up to n - lag, whichever finished first: the same sweep at any speed."""

    kind: Literal["reproducible"] = "reproducible"
    lag: PositiveInt | None = Field(
        default=None,
        description="At least the number of trials at a time; by default twice that, fixed when the sweep begins.",
    )


class Asap(FrozenModel):
    """Trial n sees all results that exist when it starts: no slot waits, but the sweep is not reproducible."""

    kind: Literal["asap"] = "asap"


Order = Annotated[Reproducible | Asap, Field(discriminator="kind")]


DEFAULT_STAGES = (
    ("loss.kind", "loss.loss_type"),
    ("training.learning_rate",),
    ("loss.gamma", "loss.gamma_beta_ratio"),
    ("loss.beta",),
)
"""The learning rate matters most, then the margin, then beta (SimPO's README and its issues 50 and 69)."""


def stage_paths(sampler: StagedSampler, search: SearchSpace) -> tuple[tuple[str, ...], ...]:
    """Return the settings of each stage. Zipped settings are in the same stage."""
    if sampler.stages is not None:
        return sampler.stages
    remaining = list(search.paths)
    out: list[tuple[str, ...]] = []
    for default in (*DEFAULT_STAGES, *((path,) for path in search.paths)):
        stage = tuple(p for path in default if path in remaining for p in _zipped_with(search, path))
        if stage:
            out.append(stage)
            remaining = [path for path in remaining if path not in stage]
    return tuple(out)


def check_stages(sampler: StagedSampler, search: SearchSpace) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """Yield each problem of the stages: its location below `sampler`, a message and a hint."""
    if sampler.stages is None:
        return
    seen: set[str] = set()
    for stage_index, stage in enumerate(sampler.stages):
        for index, path in enumerate(stage):
            if path not in search.paths:
                near = closest_match(path, search.paths)
                yield ("stages", stage_index, index), f"{path} is not searched", f"did you mean {near}?" if near else ""
            elif path in seen:
                yield ("stages", stage_index, index), f"{path} is in a stage already", ""
            elif set(_zipped_with(search, path)) - set(stage):
                yield (
                    ("stages", stage_index, index),
                    f"{path} is zipped with {', '.join(_zipped_with(search, path))}",
                    "",
                )
            seen.add(path)
    if missing := [path for path in search.paths if path not in seen]:
        yield ("stages",), f"every searched setting belongs to a stage; missing: {', '.join(missing)}", ""


def stage_values(dimension: Dimension, points: int) -> tuple[Scalar, ...]:
    """Return the values of a setting that a stage tries: its list or lattice, or `points` values over its range."""
    match dimension:
        case Choice(choice=choice):
            return choice
        case Uniform(uniform=(low, high), step=None):
            return tuple(_round_value(low + (high - low) * index / (points - 1)) for index in range(points))
        case LogUniform(log_uniform=(low, high)):
            return tuple(_round_value(low * (high / low) ** (index / (points - 1))) for index in range(points))
        case IntUniform(int_uniform=(low, high), step=1, log=log) if high - low >= points:
            evenly_spaced = (
                low * (high / low) ** (index / (points - 1)) if log else low + (high - low) * index / (points - 1)
                for index in range(points)
            )
            return tuple(dict.fromkeys(round(value) for value in evenly_spaced))
        case Uniform() | IntUniform():
            return tuple(all_values(dimension) or ())


def max_trials(sampler: StagedSampler, search: SearchSpace) -> int:
    """Return the trials of all stages; trials that a later stage can reuse are counted twice."""
    return sum(_size(stage, sampler.points, search) for stage in stage_paths(sampler, search))


def _size(stage: tuple[str, ...], points: int, search: SearchSpace) -> int:
    size = 1
    for path in stage:
        if path in search.dimensions:
            size *= len(stage_values(search.dimensions[path], points))
    for group in search.zipped:
        if next(iter(group)) in stage:
            size *= len(next(iter(group.values())))
    return size


def _zipped_with(search: SearchSpace, path: str) -> tuple[str, ...]:
    return next((tuple(group) for group in search.zipped if path in group), (path,))


def _round_value(value: float) -> float:
    return float(f"{value:.6g}")
