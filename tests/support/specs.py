from __future__ import annotations

from typing import Any

from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import Budget, GridSampler, Objective, SweepSpec
from orchestrator.study.trial_records import FailureKind, Outcome, TrialState
from trainer.results import StepMetrics

METRIC = "eval_accuracies/logp"
BASE = {
    "model": {"generated": {}},
    "data": {"train": [{"generated": "instructions"}]},
    "loss": {"kind": "simpo", "beta": 2.0, "gamma": 1.0},
}
GRID = {"loss.beta": {"choice": [2.0, 2.5]}, "loss.gamma": {"choice": [0.5, 1.0]}}
RANGES = {"loss.beta": {"uniform": [1.0, 4.0]}, "training.learning_rate": {"log_uniform": [1e-7, 1e-5]}}

COMPLETE = Outcome(TrialState.COMPLETE)
DIVERGED = Outcome(TrialState.PRUNED, "diverged: loss is nan at step 3", diverged=True)


def make_spec(search: dict[str, Any] | None = None, zipped: Any = (), **more: Any) -> SweepSpec:
    space = {"dimensions": GRID if search is None else search, "zipped": zipped}
    given: dict[str, Any] = {
        "name": "s",
        "base": BASE,
        "search": SearchSpace.model_validate(space),
        "sampler": GridSampler(),
        "goal": Objective(metric=METRIC, direction="maximize"),
        "budget": Budget(),
    }
    return SweepSpec.model_validate(given | more)


def bug(text: str) -> Outcome:
    return Outcome(TrialState.FAILED, text, FailureKind.BUG)


def evaluated(step: int, value: float, **more: float) -> StepMetrics:
    return StepMetrics(step, {METRIC: value, **more})
