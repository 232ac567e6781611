"""Optuna's study in memory: made for one draw and forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import optuna
from optuna.samplers import BaseSampler
from optuna.study import Study


def study_in_memory(
    sampler: BaseSampler, directions: Sequence[Literal["maximize", "minimize"]] = ("maximize",)
) -> Study:
    """A study that says nothing: what Optuna warns of here is meant."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(directions=directions, sampler=sampler)
