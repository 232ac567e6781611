"""Hyperparameter importance as Optuna computes it: fANOVA (Hutter et al. 2014) and PED-ANOVA (Watanabe et al. 2023).

fANOVA: the share of the objective's variance over all complete trials, by a random forest. PED-ANOVA, Optuna's default
since version 5: how much a setting's values differ between the best trials and all (arXiv 2304.10255); it also knows
settings that only some trials have (arXiv 2601.20800).
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import create_trial

from orchestrator.spec.objectives import Objective
from orchestrator.spec.search.manual_trials import out_of_space
from orchestrator.spec.search.space import SearchSpace
from orchestrator.study.sampling.distributions import space_distributions
from orchestrator.study.trial_records import TrialRecord, TrialState

MIN_TRIALS = 4
"""With fewer complete trials a random forest is meaningless."""
MIN_PED_ANOVA_TRIALS = 20
"""With fewer complete trials the best _TOP_TRIALS are more than a quarter of them."""
_TOP_SHARE = 0.1
"""Optuna's default for the share of trials that count as the best."""
_TOP_TRIALS = 5
"""Trials. Optuna advises at least so many among the best."""


_MOST_KEPT = 32
_guard, _kept = threading.Lock(), OrderedDict[str, dict[str, float]]()
"""fANOVA's importances by what they were computed from: a page of a running sweep asks again after every report."""


@dataclass(frozen=True, slots=True)
class PedAnova:
    """PED-ANOVA's importances. `shares`: setting -> share of their sum, largest first; empty with too few trials."""

    shares: dict[str, float]
    best_share: float
    """Share of the complete trials that count as the best."""
    trials: int
    """Complete trials."""


def importance(space: SearchSpace, records: Sequence[TrialRecord], objective: Objective) -> dict[str, float]:
    """Return fANOVA's searched setting -> share of the objective's variance, largest first; empty with too few trials.

    Uses complete trials inside the search space that started from the initial model. Settings with a single value, or
    missing in some trials, are left out.
    """
    done = _comparable(space, records)
    paths = [path for path in _varied(space, done) if all(path in record.params for record in done)]
    if len(done) < MIN_TRIALS or len({record.value for record in done}) < 2 or not paths:
        return {}
    distributions, given = space_distributions(space), [([r.params[path] for path in paths], r.value) for r in done]
    key = repr((objective.direction, [(path, distributions[path]) for path in paths], given))
    with _guard:
        if key in _kept:
            _kept.move_to_end(key)
            return dict(_kept[key])
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances  # scikit-learn takes seconds to load

    study = _optuna_study(space, done, paths, objective)
    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=paths)
    found = {path: float(share) for path, share in shares.items()}
    with _guard:
        _kept[key] = found
        while len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    return dict(found)


def ped_anova(space: SearchSpace, records: Sequence[TrialRecord], objective: Objective) -> PedAnova:
    """Return PED-ANOVA's importances from the same trials as `importance`, also of settings missing in some.

    Of several objectives the one given counts: each trial enters with its value.
    """
    done = _comparable(space, records)
    paths = _varied(space, done)
    best_share = max(_TOP_SHARE, _TOP_TRIALS / len(done)) if done else 1.0
    if len(done) < MIN_PED_ANOVA_TRIALS or len({record.value for record in done}) < 2 or not paths:
        return PedAnova({}, best_share, len(done))
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    study = _optuna_study(space, done, paths, objective)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=best_share)
    with warnings.catch_warnings():
        # A value that one trial has, or best trials that tie with all: importances of 0, which are left out below.
        warnings.simplefilter("ignore", ExperimentalWarning)  # `normalize`: else zeros would be equal shares
        warnings.filterwarnings("ignore", message="Some regimes for parameter|Target and region quantiles")
        found = get_param_importances(study, evaluator=evaluator, params=paths, normalize=False)
    total = sum(found.values())
    return PedAnova({p: float(v) / total for p, v in found.items()} if total > 0 else {}, best_share, len(done))


def _comparable(space: SearchSpace, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the complete trials inside the search space that started from the initial model."""
    return [
        record
        for record in records
        if record.state is TrialState.COMPLETE
        and record.value is not None
        and math.isfinite(record.value)
        and record.fork is None
        and not out_of_space(space, record.params)
    ]


def _varied(space: SearchSpace, done: Sequence[TrialRecord]) -> list[str]:
    return [
        path for path in space.paths if len({str(record.params[path]) for record in done if path in record.params}) > 1
    ]


def _optuna_study(
    space: SearchSpace, done: Sequence[TrialRecord], paths: Sequence[str], objective: Objective
) -> optuna.Study:
    distributions = space_distributions(space)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=objective.direction)
    for record in done:
        params = {path: record.params[path] for path in paths if path in record.params}
        study.add_trial(
            create_trial(
                params=params, distributions={path: distributions[path] for path in params}, value=record.value
            )
        )
    return study
