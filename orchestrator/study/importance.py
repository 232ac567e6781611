"""fANOVA hyperparameter importance (Hutter et al. 2014), as Optuna computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from orchestrator.spec.objectives import Objective
from orchestrator.spec.search.manual_trials import out_of_space
from orchestrator.spec.search.space import SearchSpace
from orchestrator.study.sampling.distributions import space_distributions
from orchestrator.study.trial_records import TrialRecord, TrialState

MIN_TRIALS = 4
"""With fewer complete trials a random forest is meaningless."""


def importance(space: SearchSpace, records: Sequence[TrialRecord], objective: Objective) -> dict[str, float]:
    """Return searched setting -> share of the objective's variance, largest first; empty with too few trials.

    Uses complete trials inside the search space that started from the initial model. Settings with a single value, or
    missing in some trials, are left out.
    """
    done = [r for r in records if r.state is TrialState.COMPLETE and r.value is not None and math.isfinite(r.value)]
    done = [r for r in done if r.fork is None and not out_of_space(space, r.params)]
    if len(done) < MIN_TRIALS or len({r.value for r in done}) < 2:
        return {}
    distributions = space_distributions(space)
    varied = [p for p in space.paths if len({str(r.params[p]) for r in done if p in r.params}) > 1]
    paths = [p for p in varied if all(p in r.params for r in done)]
    if not paths:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=objective.direction)
    for record in done:
        params = {p: record.params[p] for p in paths}
        study.add_trial(
            create_trial(params=params, distributions={p: distributions[p] for p in paths}, value=record.value)
        )
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=paths)
    return {path: float(share) for path, share in found.items()}
