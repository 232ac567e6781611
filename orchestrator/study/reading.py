"""Optuna's trials as the house knows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from orchestrator.study.records import TrialRecord
from orchestrator.study.state import FailureKind, TrialState

TO_OPTUNA = {
    TrialState.RUNNING: OptunaState.RUNNING,
    TrialState.COMPLETE: OptunaState.COMPLETE,
    TrialState.PRUNED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
}
FROM_OPTUNA = {theirs: ours for ours, theirs in TO_OPTUNA.items()}

# Keys of a trial's user attributes.
IDENTITY = "identity"
ATTEMPTS = "attempts"
STARTED = "started_at"
SECONDS = "seconds"
OUTCOME = "outcome"
ASKED = "asked"


def record(trial: FrozenTrial, step: int, metrics: dict[str, float], order: Sequence[str]) -> TrialRecord:
    """All that is known of a trial; its params in the file's order."""
    kept = trial.user_attrs
    ended: dict[str, Any] = kept.get(OUTCOME, {})
    failure = ended.get("failure")
    complete = trial.state is OptunaState.COMPLETE
    return TrialRecord(
        number=trial.number,
        state=FROM_OPTUNA[trial.state],
        params={path: trial.params[path] for path in order if path in trial.params},
        attempts=kept[ATTEMPTS],
        reason=ended.get("reason", ""),
        failure=None if failure is None else FailureKind(failure),
        diverged=ended.get("diverged", False),
        step=step,
        metrics=metrics,
        value=trial.value if complete else None,
        started_at=kept[STARTED],
        finished_at=ended.get("finished_at"),
        seconds=kept[SECONDS],
    )


def goal_value(trial: FrozenTrial) -> float | None:
    """The goal's last value, finite or not; None if it was never reported."""
    seen = trial.intermediate_values
    return seen[max(seen)] if seen else None


def consecutive_bugs(trials: Iterable[FrozenTrial]) -> tuple[int, str]:
    """How many of the trials that ended last ended in the same BUG, and its text."""
    ended = sorted((t for t in trials if OUTCOME in t.user_attrs), key=lambda t: t.user_attrs[OUTCOME]["order"])
    count, text = 0, ""
    for trial in reversed(ended):
        outcome = trial.user_attrs[OUTCOME]
        if outcome["failure"] != FailureKind.BUG or (count and outcome["reason"] != text):
            break
        count, text = count + 1, outcome["reason"]
    return count, text
