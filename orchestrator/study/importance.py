"""fANOVA hyperparameter importance (Hutter et al. 2014), as Optuna computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import optuna
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
    done = [
        record
        for record in records
        if record.state is TrialState.COMPLETE and record.value is not None and math.isfinite(record.value)
    ]
    done = [record for record in done if record.fork is None and not out_of_space(space, record.params)]
    if len(done) < MIN_TRIALS or len({record.value for record in done}) < 2:
        return {}
    distributions = space_distributions(space)
    varied = [
        path for path in space.paths if len({str(record.params[path]) for record in done if path in record.params}) > 1
    ]
    paths = [path for path in varied if all(path in record.params for record in done)]
    if not paths:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances  # scikit-learn takes seconds to load

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=objective.direction)
    for record in done:
        params = {path: record.params[path] for path in paths}
        study.add_trial(
            create_trial(params=params, distributions={path: distributions[path] for path in paths}, value=record.value)
        )
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=paths)
    return {path: float(share) for path, share in found.items()}
