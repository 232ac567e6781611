"""How a sweep chooses what to try, and how much a trial may know of the others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.frozen import Count, Frozen, Name, Positive

Seed = Annotated[int, Field(description="Same seed, same trials.")]
Startup = Annotated[int, Field(ge=1, description="Trials drawn at random before the sampler trusts what it learned.")]


class GridSampler(Frozen):
    """Every combination once, in the file's order (the last dimension advances fastest)."""

    kind: Literal["grid"] = "grid"


class RandomSampler(Frozen):
    """Independent draws; trial n depends on the seed and n alone."""

    kind: Literal["random"] = "random"
    seed: Seed = 0


class QmcSampler(Frozen):
    """Scrambled Sobol points: covers the space more evenly than random draws; trial n depends on seed and n alone."""

    kind: Literal["qmc"] = "qmc"
    seed: Seed = 0


class TpeSampler(Frozen):
    """Optuna's tree-structured Parzen estimator, all leaves together; one goal or several."""

    kind: Literal["tpe"] = "tpe"
    seed: Seed = 0
    n_startup_trials: Startup = 10
    n_ei_candidates: Count = 24


class GpSampler(Frozen):
    """Optuna's Gaussian process: fewer trials for few continuous leaves; about a quarter of a second per trial."""

    kind: Literal["gp"] = "gp"
    seed: Seed = 0
    n_startup_trials: Startup = 10


class CmaEsSampler(Frozen):
    """CMA-ES (Hansen): one goal, for many continuous leaves. What is neither number nor unconditional is random."""

    kind: Literal["cmaes"] = "cmaes"
    seed: Seed = 0
    population_size: Annotated[int, Field(ge=4)] | None = Field(
        default=None, description="Trials per generation; by default 4 + 3 ln(leaves), Hansen's rule."
    )
    sigma0: Positive = Field(default=1 / 6, description="First step, as a share of each leaf's range.")


class NsgaIISampler(Frozen):
    """Optuna's NSGA-II: evolves a population towards the Pareto front of several goals."""

    kind: Literal["nsgaii"] = "nsgaii"
    seed: Seed = 0
    population_size: Annotated[int, Field(ge=2)] = Field(
        default=20, description="Trials per generation. (Optuna's 50 suits functions that cost nothing.)"
    )


class StagedSampler(Frozen):
    """A few leaves at a time, each stage from the best trial so far: the SimPO authors' advice.

    By default the learning rate, then gamma (or its ratio), then beta, then each other leaf; what is not yet tuned has
    its value in `base`. A stage waits until the one before has ended.
    """

    kind: Literal["staged"] = "staged"
    stages: Annotated[tuple[Annotated[tuple[Name, ...], Field(min_length=1)], ...], Field(min_length=1)] | None = Field(
        default=None, description="Leaves per stage, each searched leaf in one of them."
    )
    points: Annotated[int, Field(ge=2)] = Field(
        default=5, description="Values tried of a continuous range, evenly over it, both ends included."
    )


Sampler = Annotated[
    GridSampler | RandomSampler | QmcSampler | TpeSampler | GpSampler | CmaEsSampler | NsgaIISampler | StagedSampler,
    Field(discriminator="kind"),
]

Learner = TpeSampler | GpSampler | CmaEsSampler | NsgaIISampler
"""Samplers that look at results."""


class Reproducible(Frozen):
    """Trial n knows the results of trials up to n - lag, whoever finished first: the same sweep at any speed."""

    kind: Literal["reproducible"] = "reproducible"
    lag: Count | None = Field(
        default=None, description="At least the trials at a time; by default twice that, fixed when the sweep begins."
    )


class Asap(Frozen):
    """Trial n knows whatever has finished by then: no slot waits, and no two runs of the sweep are alike."""

    kind: Literal["asap"] = "asap"


Order = Annotated[Reproducible | Asap, Field(discriminator="kind")]
