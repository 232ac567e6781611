"""`TrialIssuer`: issues an enqueued trial, a new one by the sampling policy, or a trial whose worker was lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, create_trial
from sqlalchemy import Connection

from orchestrator.errors import first_line
from orchestrator.spec.pruners import NoPruner, broken_evaluations
from orchestrator.spec.search.manual_trials import out_of_space, resolve_params
from orchestrator.spec.search.trial_params import SEED, apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database import optuna_trials
from orchestrator.study.database.enqueued_trials import EnqueuedTrial, TrialQueue
from orchestrator.study.database.optuna_trials import (
    ATTEMPTS,
    ENQUEUED_ATTR,
    FINGERPRINT,
    PARAMS,
    SAMPLER_NOTE,
    STARTED,
    TO_OPTUNA,
    UPDATES,
    OptunaTrials,
)
from orchestrator.study.database.repository import SweepRepository
from orchestrator.study.finalists import (
    due_finalists,
    finalists_text,
    is_open,
    reserved_time_reason,
    with_confirm_rows,
)
from orchestrator.study.pruning.early_stopping import BrokenRequirements
from orchestrator.study.pruning.pruner import TrialPruner
from orchestrator.study.repeats import NextRepeat, configuration_key, merge_snapshots, next_repeat
from orchestrator.study.sampling.sampling_policy import SampledTrial, SamplingPolicy
from orchestrator.study.sweep_terms import SweepTerms, Usage, budget_exceeded, target_reached
from orchestrator.study.trial_records import (
    DUPLICATE_EVENT,
    FINALIST_EVENT,
    ISSUED,
    REPEAT_EVENT,
    SKIPPED_EVENT,
    Trial,
    TrialRecord,
    TrialState,
    WaitForTrial,
    miss_of,
)
from orchestrator.study.trial_snapshots import TrialSnapshot, first_unfinished, visible_trials
from trainer.config.locations import relocated
from trainer.config.trial import TrialConfig, config_fingerprint
from trainer.training.schedule import total_updates

IssuedTrial = tuple[Trial, int]
"""A trial to run, and its id in Optuna's tables."""


class TrialIssuer:
    """Issues trials of one study under one spec, inside transactions that the caller opened."""

    def __init__(
        self,
        optuna_trials: OptunaTrials,
        repository: SweepRepository,
        queue: TrialQueue,
        spec: SweepSpec,
        terms: SweepTerms,
        first: TrialConfig,
    ) -> None:
        """`first`: the base with which the sweep began. Fingerprints of trials contain its locations, wherever model
        and data are now.
        """
        self._trials, self._repository, self._queue = optuna_trials, repository, queue
        self._present, self._first = spec.base, relocated(spec.base, spec.base, first)
        spec = spec.model_copy(update={"base": self._first})
        self._spec, self._terms = spec, terms
        self._policy = SamplingPolicy(spec, terms.lag, terms.warm_start_trials, distinct=terms.distinct)
        self.draw_error: Exception | None = None
        """Why no new trial can be drawn: the first error, raised after the last trial that can run without a draw."""

    def no_more_trials_reason(
        self, connection: Connection, trials: Sequence[TrialSnapshot], usage: Callable[[], Usage]
    ) -> str:
        """Return why no trial follows `trials` at this usage; "" if one does."""
        ended = self._search_limit_reason(connection, trials) or self._budget_reason(trials, usage)
        if not ended or self._spec.finalists is None:
            return ended
        if not budget_exceeded(self._spec.budget, usage()) and self._has_finalists_left():
            return ""
        return f"{ended}; {finalists_text(self._records(), self._spec)}"

    def search_or_trial_limit_reason(self, connection: Connection, trials: Sequence[TrialSnapshot]) -> str:
        """Return why the search is exhausted, apart from limits on time; "" if it is not, or finalists are left."""
        reason = self._search_limit_reason(connection, trials)
        return "" if reason and self._has_finalists_left() else reason

    def _search_limit_reason(self, connection: Connection, trials: Sequence[TrialSnapshot]) -> str:
        waiting = self._queue.waiting(connection)
        if any(enqueued.by_command for enqueued in waiting) or self._next_repeat(trials, by_command=True) is not None:
            return ""
        issued, most = sum(not trial.by_command for trial in trials), self._spec.budget.trials
        if most is not None and issued >= most:
            beyond = len(trials) - issued
            return f"{issued} of {most} trials issued" + (f", and {beyond} enqueued beyond them" if beyond else "")
        if waiting or self._next_repeat(trials) is not None:
            return ""
        if self.draw_error is not None:
            return f"no trial can be drawn: {first_line(self.draw_error)}"
        return self._policy.exhausted_reason(trials)

    def _next_repeat(self, trials: Sequence[TrialSnapshot], *, by_command: bool = False) -> NextRepeat | None:
        if self._spec.repeats == 1:
            return None
        visible = visible_trials(trials, len(trials), self._terms.lag)
        return next_repeat(trials, visible, self._spec, by_command=by_command)

    def _budget_reason(self, trials: Sequence[TrialSnapshot], usage: Callable[[], Usage]) -> str:
        """Return the exceeded limit on time, or the trial that reached `budget.target`; "" if neither.

        The search also ends where the limit leaves finalists their time.
        """
        budget, objective = self._spec.budget, self._spec.first_objective
        if budget.has_time_limit:
            used, ended = usage(), sum(t.state.is_final and t.finalist_of is None for t in trials)
            if over := budget_exceeded(budget, used) or reserved_time_reason(self._spec, ended, used):
                return over
        for trial in merge_snapshots(trials, self._spec) if budget.target is not None else ():
            value = trial.values[0] if trial.values and trial.state is TrialState.COMPLETE else None
            if miss_of(trial.violations)[0] == 0 and target_reached(budget, objective, value):
                return f"trial {trial.number} reached the target {budget.target:g}: {objective.metric} is {value:g}"
        return ""

    def blocking_trial(self, connection: Connection, trials: Sequence[TrialSnapshot]) -> int | None:
        """Return the number of a trial that must end before the next one is issued; None if there is none."""
        waiting, repeat = self._queue.waiting(connection), self._next_repeat(trials)
        if repeat is not None and self._terms.lag is not None and not (waiting and waiting[0].by_command):
            # Whether it is issued depends on the results of its configuration that trial `len(trials)` may know.
            open_ = first_unfinished(repeat.group, len(trials) - self._terms.lag)
            if open_ is not None:
                return open_
        return self._policy.blocking_trial(trials, enqueued=bool(waiting) or repeat is not None)

    def next(
        self, connection: Connection, trials: Sequence[TrialSnapshot], usage: Callable[[], Usage]
    ) -> IssuedTrial | WaitForTrial | None:
        """Issue the trial after these: of the search, then of the finalists; None if neither has one left."""
        if self._search_limit_reason(connection, trials) or self._budget_reason(trials, usage):
            return self._next_finalist(connection, len(trials), usage)
        if (blocking := self.blocking_trial(connection, trials)) is not None:
            return WaitForTrial(blocking)
        return self._next_of_search(connection, trials)

    def _records(self) -> list[TrialRecord]:
        """Return the trials without metrics, for the choice of finalists."""
        return [optuna_trials.to_record(trial, 0, {}, self._spec.search.paths, 0.0) for trial in self._trials.trials()]

    def _has_finalists_left(self) -> bool:
        """Return whether finalists are to come, or may be: a trial of the search runs."""
        if self._spec.finalists is None or self.draw_error is not None:
            return False
        records = self._records()
        return any(map(is_open, records)) or bool(due_finalists(records, self._spec))

    def _next_finalist(
        self, connection: Connection, number: int, usage: Callable[[], Usage]
    ) -> IssuedTrial | WaitForTrial | None:
        """Issue the next finalist, once the trials of the search have ended; None if none is left or allowed."""
        if not self._has_finalists_left() or budget_exceeded(self._spec.budget, usage()):
            return None
        records = self._records()
        if (running := next(filter(is_open, records), None)) is not None:
            return WaitForTrial(running.number)
        finalist = due_finalists(records, self._spec)[0]
        first = self._trials.trials()[finalist.of]
        seed = {SEED: finalist.seed}
        params = {**optuna_trials.trial_params(first, self._spec.search.paths), **seed}
        settings = {**first.user_attrs.get(ENQUEUED_ATTR, {"leaves": params})["leaves"], **seed}
        config = with_confirm_rows(apply_params(self._spec.base, settings))
        attrs = {"leaves": settings, "params": params, "origin": finalist.origin, "finalist": finalist.of}
        attrs |= {"by_hand": False, "parent": None, "fork": None}
        inside = self._optuna_params(first.params, {*out_of_space(self._spec.search, dict(first.params)), SEED})
        issued = self._create(
            connection,
            number,
            SampledTrial(params, config, config_fingerprint(config)),
            inside,
            {ENQUEUED_ATTR: attrs},
        )
        if not any(record.finalist_of is not None for record in records):
            self._repository.add_event(connection, FINALIST_EVENT, finalists_text(records, self._spec), None)
        self._repository.add_event(
            connection, FINALIST_EVENT, f"{finalist.origin}: training.seed {finalist.seed}", number
        )
        return issued

    def _next_of_search(self, connection: Connection, trials: Sequence[TrialSnapshot]) -> IssuedTrial | None:
        """Issue a trial enqueued by hand, a repeat, one enqueued by the file or a sampled one; None if exhausted.

        Once the budget's trials are issued, only trials enqueued by hand and their repeats follow.
        """
        number = len(trials)
        waiting = self._queue.waiting(connection)
        if waiting and waiting[0].by_command:
            return self._issue_enqueued(connection, waiting[0], number)
        by_command = self._next_repeat(trials, by_command=True)
        if (repeat := by_command or self._next_repeat(trials)) is not None:
            return self._issue_repeat(connection, repeat, number)
        if waiting:
            return self._issue_enqueued(connection, waiting[0], number)
        try:
            sampled = self._policy.sample(trials)
        except Exception as error:  # noqa: BLE001 - raised by the driver once the running trials have ended
            self.draw_error = error
            return None
        if sampled is None:
            return None
        extra_attrs: dict[str, Any] = {SAMPLER_NOTE: sampled.sampler_note} if sampled.sampler_note else {}
        inside = self._optuna_params(sampled.params, out_of_space(self._spec.search, sampled.params))
        if len(inside) < len(sampled.params):
            extra_attrs[PARAMS] = sampled.params
        issued = self._create(connection, number, sampled, inside, extra_attrs)
        for text in sampled.skipped_combinations:
            self._repository.add_event(connection, SKIPPED_EVENT, text, number)
        duplicate = next((trial.number for trial in reversed(trials) if trial.fingerprint == sampled.fingerprint), None)
        if duplicate is not None:
            self._repository.add_event(
                connection, DUPLICATE_EVENT, f"equal to trial {duplicate}: no new configuration was drawn", number
            )
        return issued

    def _issue_enqueued(self, connection: Connection, enqueued: EnqueuedTrial, number: int) -> IssuedTrial:
        """Optuna's params hold values of the search space only; all others go to a trial attribute."""
        params = resolve_params(self._spec.base, self._spec.search, enqueued.settings)
        config = apply_params(self._spec.base, enqueued.settings)
        not_searched = out_of_space(self._spec.search, params)
        extra_attrs = {"leaves": dict(enqueued.settings), "params": params, "origin": enqueued.origin}
        extra_attrs |= {"by_hand": enqueued.by_command, "parent": enqueued.parent}
        extra_attrs |= {"fork": None if enqueued.fork is None else enqueued.fork.as_json()}
        inside = self._optuna_params(params, not_searched)
        # A fork differs from a trial with the same settings that starts from the initial model and may still be drawn.
        fingerprint = config_fingerprint(config) if enqueued.fork is None else f"fork {enqueued.seq}"
        trial, trial_id = self._create(
            connection, number, SampledTrial(params, config, fingerprint), inside, {ENQUEUED_ATTR: extra_attrs}
        )
        self._queue.mark_issued(connection, enqueued, number)
        return replace(trial, fork=enqueued.fork), trial_id

    def _optuna_params(self, params: Mapping[str, Any], not_searched: Collection[str]) -> dict[str, Any]:
        """Return the params that Optuna's tables can hold: in one study a list of values cannot change there."""
        stored = self._trials.distributions()
        inside = {path: value for path, value in params.items() if path not in not_searched}
        return {
            path: value
            for path, value in inside.items()
            if not isinstance(stored.get(path), CategoricalDistribution)
            or stored[path] == self._policy.distributions[path]
        }

    def _issue_repeat(self, connection: Connection, repeat: NextRepeat, number: int) -> IssuedTrial:
        """Issue a configuration again with another seed; of an enqueued trial, as an enqueued one."""
        first, place = self._trials.trials()[repeat.group[0].number], len(repeat.group)
        seed = {SEED: repeat.seed}
        params = {**optuna_trials.trial_params(first, self._spec.search.paths), **seed}
        given = first.user_attrs.get(ENQUEUED_ATTR)
        settings = params if given is None else {**given["leaves"], **seed}
        config = apply_params(self._spec.base, settings)
        attrs: dict[str, Any] = {PARAMS: params}
        if given is not None:
            origin = f"{given['origin']}; repeat {place} of trial {first.number}"
            attrs = {ENQUEUED_ATTR: {**given, "leaves": settings, "params": params, "origin": origin}}
        inside = self._optuna_params(first.params, {*out_of_space(self._spec.search, dict(first.params)), SEED})
        sampled = SampledTrial(params, config, config_fingerprint(config))
        issued = self._create(connection, number, sampled, inside, attrs)
        text = f"repeat {place} of trial {first.number}: training.seed {repeat.seed}"
        self._repository.add_event(connection, REPEAT_EVENT, text, number)
        return issued

    def _create(
        self,
        connection: Connection,
        number: int,
        sampled: SampledTrial,
        optuna_params: Mapping[str, Any],
        extra_attrs: Mapping[str, Any],
    ) -> IssuedTrial:
        attrs: dict[str, Any] = {FINGERPRINT: sampled.fingerprint, ATTEMPTS: 1, STARTED: time.time()}
        if (updates := self._updates(sampled.config)) is not None:
            attrs[UPDATES] = updates
        template = create_trial(
            state=TO_OPTUNA[TrialState.RUNNING],
            params=dict(optuna_params),
            distributions={path: self._policy.distributions[path] for path in optuna_params},
            user_attrs={**attrs, **extra_attrs},
        )
        trial_id = self._trials.create(template)
        self._repository.add_event(connection, ISSUED, "attempt 1", number)
        return Trial(number, 1, sampled.params, self._located(sampled.config)), trial_id

    def retry(self, connection: Connection, frozen: FrozenTrial) -> IssuedTrial:
        """Issue the next attempt at a trial."""
        attempt = frozen.user_attrs[ATTEMPTS] + 1
        trial_id = self._trials.optuna_id(frozen.number)
        self._trials.set(trial_id, ATTEMPTS, attempt)
        self._repository.add_event(connection, ISSUED, f"attempt {attempt}", frozen.number)
        params = optuna_trials.trial_params(frozen, self._spec.search.paths)
        all_params = frozen.user_attrs[ENQUEUED_ATTR]["leaves"] if ENQUEUED_ATTR in frozen.user_attrs else params
        config = apply_params(self._spec.base, all_params)
        if optuna_trials.finalist_of(frozen) is not None:
            config = with_confirm_rows(config)
        config = self._located(config)
        fork, first = optuna_trials.trial_fork(frozen), optuna_trials.first_attempt(frozen)
        return Trial(frozen.number, attempt, params, config, fork=fork, first_attempt=first), trial_id

    def _located(self, config: TrialConfig) -> TrialConfig:
        """Return the configuration with model and data where they are now."""
        return relocated(config, self._first, self._present)

    def make_pruner(self, connection: Connection, number: int, trials: Sequence[TrialSnapshot]) -> TrialPruner:
        """Return the pruner of trial `number` with the trials that are visible to it."""
        updates = next(trial.updates for trial in trials if trial.number == number)
        if any(trial.number == number and trial.finalist_of is not None for trial in trials):
            spec = self._spec.model_copy(update={"pruner": NoPruner()})  # compared at their end, on other rows
            return TrialPruner.create(spec, number, updates, (), lambda _: {})
        snapshots = visible_trials(trials, number, self._terms.lag)
        if self._terms.prunes_broken:  # else one that can never be the best would stop those that can
            snapshots = [trial for trial in snapshots if not miss_of(trial.violations)[0]]
        if self._spec.repeats > 1:  # compared with other configurations, never with another seed of its own
            key = configuration_key(next(trial.params for trial in trials if trial.number == number))
            snapshots = [trial for trial in snapshots if configuration_key(trial.params) != key]
        return TrialPruner.create(
            self._spec, number, updates, snapshots, lambda other: self._repository.pair_margins(connection, other)
        )

    def broken_requirements(self, pruner: TrialPruner) -> BrokenRequirements:
        """Return what prunes a trial with this pruner by the requirements; nothing prunes finalists."""
        evaluations = broken_evaluations(pruner.pruner) if self._terms.prunes_broken else None
        return BrokenRequirements(self._spec.require, evaluations, pruner.updates)

    def _updates(self, config: TrialConfig) -> int | None:
        """Updates of the whole run; None if the number of training pairs is unknown."""
        pairs = self._terms.train_pairs
        if config.training.max_steps is not None:
            return config.training.max_steps
        return None if pairs is None else total_updates(config.training, pairs)
