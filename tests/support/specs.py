"""Small sweeps, as specifications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.folders import SweepFolder
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import Budget, GridSampler, Objective, SweepSpec
from tests.support.small_trials import DATA, MODEL

METRIC = "eval_accuracies/logp"
BASE = {
    "model": {"generated": {}},
    "data": {"train": [{"generated": "instructions"}]},
    "loss": {"kind": "simpo", "beta": 2.0, "gamma": 1.0},
}
GRID = {"loss.beta": {"choice": [2.0, 2.5]}, "loss.gamma": {"choice": [0.5, 1.0]}}
RANGES = {"loss.beta": {"uniform": [1.0, 4.0]}, "training.learning_rate": {"log_uniform": [1e-7, 1e-5]}}


def make_spec(search: Mapping[str, Any] | int = 6, zipped: Any = (), **more: Any) -> SweepSpec:
    """A grid named `s` over `search`: its dimensions, or a number of seeds."""
    dimensions = {"training.seed": {"choice": list(range(search))}} if isinstance(search, int) else search
    given: dict[str, Any] = {
        "name": "s",
        "base": BASE,
        "search": SearchSpace.model_validate({"dimensions": dimensions, "zipped": zipped}),
        "sampler": GridSampler(),
        "goal": Objective(metric=METRIC, direction="maximize"),
        "budget": Budget(),
    }
    return SweepSpec.model_validate(given | more)


def real_spec(strategy: str = "ddp", steps: int = 6, rates: Sequence[float] = (1e-3,), **more: Any) -> SweepSpec:
    """Trials of a few updates of two small layers, a checkpoint after each; one trial a learning rate."""
    training = {"pairs_per_update": 7, "max_steps": steps, "eval_steps": 3, "save_steps": 1, "distributed": strategy}
    base = {
        "model": MODEL,
        "data": DATA,
        "loss": {"kind": "simpo"},
        "training": training | {"adam_epsilon": 1e-4, "adam_beta2": 0.95},
        "evaluation": {"prompts": 2, "max_new_tokens": 6},
    }
    return make_spec({"training.learning_rate": {"choice": list(rates)}}, base=base, **more)


def sweep_folder(root: Path) -> SweepFolder:
    return SweepFolder(root, "s")
