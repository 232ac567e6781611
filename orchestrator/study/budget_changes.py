"""Changes of a begun sweep's budget: the text of a request to its driver, and refusal of limits that are used up."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from orchestrator.errors import OrchestrateError
from orchestrator.spec.estimates.sweep_plan import total_trials
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.sweep_terms import Usage, target_reached
from orchestrator.study.trial_records import Request, RequestKind, TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot

SETTABLE = tuple(f"budget.{name}" for name in Budget.model_fields)
"""Settings that `orchestrate set` changes while a sweep runs."""


class BudgetUsedUp(OrchestrateError):
    """The new limit is used up already, so that the sweep would end at once. Nothing was changed."""


def request_text(old: Budget, new: Budget, by: str) -> str:
    """Return the text of a request to change the budget, which `with_budget` reads."""
    changes = [f"budget.{name}={json.dumps(value)}" for name, value in new if value != getattr(old, name)]
    return f"{' '.join(changes)} ({by})"


def with_budget(spec: SweepSpec, text: str) -> SweepSpec:
    """Return the sweep with the budget changed as a request's text says."""
    changed = dict(one.removeprefix("budget.").split("=", 1) for one in text.partition(" (")[0].split())
    values = {name: json.loads(value) for name, value in changed.items()}
    return spec.model_copy(update={"budget": Budget.model_validate(spec.budget.model_dump() | values)})


def with_requests(spec: SweepSpec, requests: Sequence[Request]) -> SweepSpec:
    """Return the sweep with the budget changed by the pending requests, in their order."""
    for request in requests:
        if request.kind == RequestKind.SET:
            spec = with_budget(spec, request.text)
    return spec


def check_not_used_up(old: SweepSpec, new: SweepSpec, trials: Sequence[TrialSnapshot], usage: Usage) -> None:
    """Check that a changed limit leaves something to do.

    Raises:
        BudgetUsedUp: with what was used, and a value that would suffice for the remaining trials if these are known.
    """
    before, after = old.budget, new.budget
    for name, used in (("hours", usage.hours), ("gpu_hours", usage.gpu_hours)):
        limit = getattr(after, name)
        if limit is not None and limit != getattr(before, name) and limit <= used:
            what = f"budget.{name}={limit:g}: {new.name} has used {used:.3g} {name} already and would end at once"
            raise BudgetUsedUp(f"{what}; {_enough(new, trials, used)}, null takes the limit away")
    issued = sum(not trial.by_command for trial in trials)
    if after.trials is not None and after.trials != before.trials and after.trials < issued:
        raise BudgetUsedUp(
            f"budget.trials={after.trials}: {new.name} has begun {issued} trials already; set {issued} or more "
            f"({issued}: those that run are finished and no new one begins)"
        )
    if after.target is not None and after.target != before.target:
        for trial in trials:
            value = trial.values[0] if trial.values and trial.state is TrialState.COMPLETE else None
            if target_reached(after, new.goal, value):
                better = "above" if new.goal.direction == "maximize" else "below"
                raise BudgetUsedUp(
                    f"budget.target={after.target:g}: trial {trial.number} of {new.name} has reached it with "
                    f"{new.goal.metric} {value:g}; set a value {better} that, or null for none"
                )


def more_than_used(spec: SweepSpec, trials: Sequence[TrialSnapshot], used: float, limit: float) -> float:
    """Return a limit to offer where `limit` is used up: above `used`, and enough for the trials left if known."""
    return max(_remaining(spec, trials, used)[0], _round_up(used + limit))


def _enough(spec: SweepSpec, trials: Sequence[TrialSnapshot], used: float) -> str:
    """Return a limit that suffices for the remaining trials at the mean time of the ended ones."""
    enough, ended, left = _remaining(spec, trials, used)
    if not left:
        return f"set more than {enough:g}"
    return f"its {ended} ended trials took {used / ended:.3g} each and {left} are left: set about {enough:g}"


def _remaining(spec: SweepSpec, trials: Sequence[TrialSnapshot], used: float) -> tuple[float, int, int]:
    """Return a limit above `used`, the ended trials, and the trials left (0 where unknown) for which it suffices."""
    total, ended = total_trials(spec), sum(trial.state.is_final for trial in trials)
    total = None if total is None else total + (0 if spec.finalists is None else spec.finalists.trials)
    if total is None or not ended or total <= ended:
        return _round_up(used), ended, 0
    left = total - ended
    return _round_up(used + left * used / ended), ended, left


def _round_up(value: float) -> float:
    """Return the next number of two significant digits above `value`."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{(math.floor(value / unit) + 1) * unit:.2g}")
