"""How much of the goal's spread each searched leaf explains: fANOVA (Hutter et al. 2014) as Optuna computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from orchestrator.spec.search.manual_trials import outside
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import Goal
from orchestrator.study.sampling.distributions import distributions
from orchestrator.study.trial_records import TrialRecord, TrialState

FEWEST = 4
"""With fewer complete trials a random forest tells nothing."""


def importance(space: SearchSpace, records: Sequence[TrialRecord], goal: Goal) -> dict[str, float]:
    """Searched leaf -> share of the variance, the biggest first; empty where there is nothing to compare.

    Only complete trials of the search count, begun from the start model. A leaf that had one value in all of them is
    left out, and so is one that some did not have.
    """
    done = [r for r in records if r.state is TrialState.COMPLETE and r.value is not None and math.isfinite(r.value)]
    done = [r for r in done if r.fork is None and not outside(space, r.params)]
    if len(done) < FEWEST or len({r.value for r in done}) < 2:
        return {}
    known = distributions(space)
    told = [p for p in space.paths if len({str(r.params[p]) for r in done if p in r.params}) > 1]
    everywhere = [p for p in told if all(p in r.params for r in done)]
    if not everywhere:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=goal.direction)
    for record in done:
        params = {p: record.params[p] for p in everywhere}
        study.add_trial(
            create_trial(params=params, distributions={p: known[p] for p in everywhere}, value=record.value)
        )
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=everywhere)
    return {path: float(share) for path, share in found.items()}
