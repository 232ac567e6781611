"""How a trial is issued: a new one by the policy, or one again that nobody runs any more."""

from __future__ import annotations

import time
from collections.abc import Sequence

from optuna.trial import FrozenTrial, create_trial
from sqlalchemy import Connection

from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.ledger import Ledger
from orchestrator.study.policy import Policy
from orchestrator.study.reading import ATTEMPTS, IDENTITY, SECONDS, STARTED, TO_OPTUNA
from orchestrator.study.records import Trial
from orchestrator.study.state import TrialState
from orchestrator.study.store import Store

Issued = tuple[Trial, int]
"""A trial to run, and Optuna's id of it."""


class Issuer:
    """Issues trials of one study under one spec, inside transactions that somebody else opened."""

    def __init__(self, store: Store, ledger: Ledger, study_id: int, spec: SweepSpec) -> None:
        self._storage, self._ledger, self._study_id, self._spec = store.storage, ledger, study_id, spec
        self._policy = Policy(spec)

    def limit(self, issued: int, seconds: float) -> str:
        """Why there is no trial after so many and so long; empty while there is one."""
        budget = self._spec.budget
        if budget.trials is not None and issued >= budget.trials:
            return f"{issued} of {budget.trials} trials issued"
        if budget.hours is not None and (hours := seconds / 3600) >= budget.hours:
            return f"{hours:.2f} of {budget.hours:g} hours spent"
        return "" if self._policy.propose(issued, 0) is not None else f"all {issued} points of the grid issued"

    def new(self, c: Connection, trials: Sequence[FrozenTrial]) -> Issued | None:
        """The trial after these; None where the space is exhausted."""
        number = len(trials)
        earlier = {t.user_attrs[IDENTITY]: t.number for t in trials}
        drawn = self._policy.draw(number, earlier.keys())
        if drawn is None:
            return None
        template = create_trial(
            state=TO_OPTUNA[TrialState.RUNNING],
            params=drawn.params,
            distributions={path: self._policy.distributions[path] for path in drawn.params},
            user_attrs={IDENTITY: drawn.identity, ATTEMPTS: 1, STARTED: time.time(), SECONDS: 0.0},
        )
        trial_id = self._storage.create_new_trial(self._study_id, template)
        self._ledger.add_event(c, "issued", "attempt 1", number)
        if (twin := earlier.get(drawn.identity)) is not None:
            self._ledger.add_event(c, "twin", f"equal to trial {twin}: nothing else came up", number)
        return Trial(number, 1, drawn.params, drawn.config), trial_id

    def again(self, c: Connection, frozen: FrozenTrial) -> Issued:
        """The same trial, next attempt."""
        attempt = frozen.user_attrs[ATTEMPTS] + 1
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, frozen.number)
        self._storage.set_trial_user_attr(trial_id, ATTEMPTS, attempt)
        self._ledger.add_event(c, "issued", f"attempt {attempt}", frozen.number)
        config = self._spec.search.place(self._spec.base, frozen.params)
        return Trial(frozen.number, attempt, frozen.params, config), trial_id
