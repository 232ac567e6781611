"""SweepSpec: the whole of a sweep's YAML, frozen; its hash is the sweep's identity."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.spec.space import SearchSpace
from trainer.config import DataConfig, TrainingConfig, TrialConfig
from trainer.frozen import Count, Frozen, Name, NonNegative, Positive

DOOR = (
    "name",
    "description",
    "base",
    "search",
    "sampler",
    "maximize",
    "minimize",
    "pruner",
    "budget",
    "resources",
    "tracking",
    "sft",
    "keep_models",
)
"""The keys of the file, in the order in which it is written."""


class GridSampler(Frozen):
    """Every combination once, in the file's order (the last dimension advances fastest)."""

    kind: Literal["grid"] = "grid"


class RandomSampler(Frozen):
    """Independent draws; trial n depends on the seed and n alone."""

    kind: Literal["random"] = "random"
    seed: int = 0


Sampler = Annotated[GridSampler | RandomSampler, Field(discriminator="kind")]


class Goal(Frozen):
    """What the sweep is ranked by: a held-out metric that the search does not scale (objective.py refuses others)."""

    metric: Name
    direction: Literal["maximize", "minimize"]


class Budget(Frozen):
    """What the whole sweep may spend, earlier runs of it counted in."""

    trials: Count | None = Field(default=None, description="A total. By default all points of the grid.")
    hours: Positive | None = Field(default=None, description="Wall-clock of the sweep's drivers, added up.")
    concurrency: Count | None = Field(default=None, description="Trials at a time; by default what resources allow.")


class Resources(Frozen):
    """What one trial takes. Fractions share a device."""

    gpus_per_trial: NonNegative | None = Field(default=None, description="By default 1 where there are GPUs, else 0.")
    cpus_per_trial: Positive = 1.0


class Tracking(Frozen):
    """Where MLflow is. By default MLFLOW_TRACKING_URI, else runs/mlflow.db."""

    uri: Name | None = None
    experiment: Name = "prefsweep"


class SftStage(Frozen):
    """Supervised training of the start model on chosen responses: run once, cached by content."""

    training: TrainingConfig
    data: DataConfig | None = Field(default=None, description="By default the sweep's own.")


class SweepSpec(Frozen):
    """A sweep. `keep_models` says how many of the best trials' final weights stay on disk."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    description: str = ""
    base: TrialConfig
    search: SearchSpace = SearchSpace()
    sampler: Sampler = GridSampler()
    goal: Goal
    budget: Budget = Budget()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    sft: SftStage | None = None
    keep_models: Count = 1
    storage: Name | None = Field(
        default=None, description="Where the study is: an SQLAlchemy URL without password; by default SQLite beside it."
    )
