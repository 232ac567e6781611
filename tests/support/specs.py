"""Small sweeps, as specifications."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.folders import SweepFolder
from orchestrator.spec import pruners, samplers
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import Budget, GridSampler, Objective, SweepSpec
from tests.support.small_trials import DATA, MODEL

SAMPLERS: dict[str, samplers.Sampler] = {
    "grid": samplers.GridSampler(),
    "random": samplers.RandomSampler(seed=1),
    "qmc": samplers.QmcSampler(seed=1),
    "tpe": samplers.TpeSampler(seed=1, n_startup_trials=3),
    "gp": samplers.GpSampler(seed=1, n_startup_trials=3),
    "cmaes": samplers.CmaEsSampler(seed=1, population_size=4),
    "nsgaii": samplers.NsgaIISampler(seed=1, population_size=3),
    "staged": samplers.StagedSampler(points=4),
}
PRUNERS: dict[str, pruners.Pruner] = {
    "none": pruners.NoPruner(),
    "hyperband": pruners.HyperbandPruner(),
    "successive_halving": pruners.SuccessiveHalvingPruner(rungs=(0.1, 0.3)),
    "median": pruners.MedianPruner(n_startup_trials=2),
    "percentile": pruners.PercentilePruner(n_startup_trials=2, percentile=40.0, n_warmup_steps=0.2),
    "threshold": pruners.ThresholdPruner(lower=0.56, n_warmup_steps=100),
    "patient": pruners.PatientPruner(patience=2),
    "patient median": pruners.PatientPruner(patience=1, wrapped=pruners.MedianPruner(n_startup_trials=2)),
}
TINY_MODEL = (
    "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2}"
)
"""In a sweep's file."""
METRIC = "eval_accuracies/logp"
BASE = {
    "model": {"generated": {}},
    "data": {"train": [{"generated": "instructions"}]},
    "loss": {"kind": "simpo", "beta": 2.0, "gamma": 1.0},
}
GRID = {"loss.beta": {"choice": [2.0, 2.5]}, "loss.gamma": {"choice": [0.5, 1.0]}}
RANGES = {"loss.beta": {"uniform": [1.0, 4.0]}, "training.learning_rate": {"log_uniform": [1e-7, 1e-5]}}


def seeds(count: int) -> dict[str, Any]:
    """A range of seeds, in which each trial stands for itself; a list of them would be one configuration."""
    return {"training.seed": {"int_uniform": [0, count - 1]} if count > 1 else {"choice": [0]}}


def make_spec(search: Mapping[str, Any] | int = 6, zipped: Any = (), **more: Any) -> SweepSpec:
    """A grid named `s` over `search`: its dimensions, or a number of seeds."""
    dimensions = seeds(search) if isinstance(search, int) else search
    given: dict[str, Any] = {
        "name": "s",
        "base": BASE,
        "search": SearchSpace.model_validate({"dimensions": dimensions, "zipped": zipped}),
        "sampler": GridSampler(),
        "goal": Objective(metric=METRIC, direction="maximize"),
        "budget": Budget(),
    }
    return SweepSpec.model_validate(given | more)


def as_json(value: Any) -> Any:
    """A document of the loader as other readers of YAML see it: mappings and lists."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, tuple) else value


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
