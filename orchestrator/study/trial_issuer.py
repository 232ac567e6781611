"""How a trial is issued: one that was given, a new one by the policy, or one again that nobody runs any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from optuna.trial import FrozenTrial, create_trial
from sqlalchemy import Connection

from orchestrator.spec.search.manual_trials import outside, params_of
from orchestrator.spec.search.trial_params import place
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database import optuna_trials
from orchestrator.study.database.enqueued_trials import Given, Queue
from orchestrator.study.database.optuna_trials import (
    ATTEMPTS,
    GIVEN,
    IDENTITY,
    NOTE,
    PARAMS,
    STARTED,
    TO_OPTUNA,
    UPDATES,
    Remembered,
)
from orchestrator.study.database.repository import Ledger
from orchestrator.study.pruning.pruner import Judge
from orchestrator.study.sampling.sampling_policy import Drawn, Policy
from orchestrator.study.sweep_terms import Settled, Spent, overspent, reached
from orchestrator.study.trial_records import Trial, TrialState
from orchestrator.study.trial_snapshots import Known, view
from trainer.config.trial import TrialConfig, identity
from trainer.training.schedule import total_updates

Issued = tuple[Trial, int]
"""A trial to run, and Optuna's id of it."""


class Issuer:
    """Issues trials of one study under one spec, inside transactions that somebody else opened."""

    def __init__(self, remembered: Remembered, ledger: Ledger, queue: Queue, spec: SweepSpec, settled: Settled) -> None:
        self._trials, self._ledger, self._queue = remembered, ledger, queue
        self._spec, self._settled = spec, settled
        self._policy = Policy(spec, settled.lag, settled.earlier)

    def limit(self, c: Connection, trials: Sequence[Known], spent: Callable[[], Spent]) -> str:
        """Why there is no trial after these and so long; empty while there is one."""
        return self.tried(c, trials) or self._over(trials, spent)

    def tried(self, c: Connection, trials: Sequence[Known]) -> str:
        """Why there is nothing left to issue, however much time there is; empty while there is."""
        waiting = self._queue.waiting(c)
        if any(given.by_hand for given in waiting):
            return ""
        issued, most = sum(not trial.by_hand for trial in trials), self._spec.budget.trials
        if most is not None and issued >= most:
            return f"{issued} of {most} trials issued"
        return "" if waiting else self._policy.spent(trials)

    def _over(self, trials: Sequence[Known], spent: Callable[[], Spent]) -> str:
        """What of time is used up, or which trial is as good as was asked for."""
        budget, goal = self._spec.budget, self._spec.goal
        if budget.timed and (over := overspent(budget, spent())):
            return over
        for trial in trials if budget.target is not None else ():
            value = trial.values[0] if trial.values and trial.state is TrialState.COMPLETE else None
            if reached(budget, goal, value):
                return f"trial {trial.number} reached the target {budget.target:g}: {goal.metric} is {value:g}"
        return ""

    def waits_for(self, c: Connection, trials: Sequence[Known]) -> int | None:
        """A trial that must end before the next one is issued."""
        return self._policy.waits_for(trials, given=bool(self._queue.waiting(c)))

    def new(self, c: Connection, trials: Sequence[Known]) -> Issued | None:
        """The trial after these: a given one if any waits, else the policy's; None where the space is exhausted."""
        number = len(trials)
        waiting = self._queue.waiting(c)
        if waiting:
            return self._given(c, waiting[0], number)
        drawn = self._policy.draw(trials)
        if drawn is None:
            return None
        kept: dict[str, Any] = {NOTE: drawn.note} if drawn.note else {}
        if beyond := outside(self._spec.search, drawn.params):
            kept[PARAMS] = drawn.params
        inside = {path: value for path, value in drawn.params.items() if path not in beyond}
        issued = self._create(c, number, drawn, inside, kept)
        for told in drawn.left_out:
            self._ledger.add_event(c, "left out", told, number)
        twin = next((trial.number for trial in reversed(trials) if trial.identity == drawn.identity), None)
        if twin is not None:
            self._ledger.add_event(c, "twin", f"equal to trial {twin}: nothing else came up", number)
        return issued

    def _given(self, c: Connection, given: Given, number: int) -> Issued:
        """Optuna keeps what the search could have drawn; the rest is beside it, for its distributions have no room."""
        params = params_of(self._spec.base, self._spec.search, given.leaves)
        config = place(self._spec.base, given.leaves)
        beyond = outside(self._spec.search, params)
        kept = {"leaves": dict(given.leaves), "params": params, "origin": given.origin}
        kept |= {"by_hand": given.by_hand, "parent": given.parent}
        kept |= {"fork": None if given.fork is None else asdict(given.fork)}
        inside = {path: value for path, value in params.items() if path not in beyond}
        # A fork is another trial than the one of the same leaves from the start model, which may still be drawn.
        name = identity(config) if given.fork is None else f"fork {given.seq}"
        trial, trial_id = self._create(c, number, Drawn(params, config, name), inside, {GIVEN: kept})
        self._queue.taken(c, given, number)
        return replace(trial, fork=given.fork), trial_id

    def _create(
        self, c: Connection, number: int, drawn: Drawn, known: Mapping[str, Any], kept: Mapping[str, Any]
    ) -> Issued:
        attrs: dict[str, Any] = {IDENTITY: drawn.identity, ATTEMPTS: 1, STARTED: time.time()}
        if (updates := self._updates(drawn.config)) is not None:
            attrs[UPDATES] = updates
        template = create_trial(
            state=TO_OPTUNA[TrialState.RUNNING],
            params=dict(known),
            distributions={path: self._policy.distributions[path] for path in known},
            user_attrs={**attrs, **kept},
        )
        trial_id = self._trials.create(template)
        self._ledger.add_event(c, "issued", "attempt 1", number)
        return Trial(number, 1, drawn.params, drawn.config), trial_id

    def again(self, c: Connection, frozen: FrozenTrial) -> Issued:
        """The same trial, next attempt."""
        attempt = frozen.user_attrs[ATTEMPTS] + 1
        trial_id = self._trials.id_of(frozen.number)
        self._trials.set(trial_id, ATTEMPTS, attempt)
        self._ledger.add_event(c, "issued", f"attempt {attempt}", frozen.number)
        params = optuna_trials.params(frozen, self._spec.search.paths)
        leaves = frozen.user_attrs[GIVEN]["leaves"] if GIVEN in frozen.user_attrs else params
        config = place(self._spec.base, leaves)
        return Trial(frozen.number, attempt, params, config, fork=optuna_trials.fork(frozen)), trial_id

    def judge(self, c: Connection, number: int, trials: Sequence[Known]) -> Judge:
        """The pruner of this trial, with what it may know of these."""
        updates = next(trial.updates for trial in trials if trial.number == number)
        known = view(trials, number, self._settled.lag)
        return Judge.of(self._spec, number, updates, known, lambda other: self._ledger.pairs(c, other))

    def _updates(self, config: TrialConfig) -> int | None:
        """Updates of the whole run; None where nobody counted the data."""
        pairs = self._settled.train_pairs
        if config.training.max_steps is not None:
            return config.training.max_steps
        return None if pairs is None else total_updates(config.training, pairs)
