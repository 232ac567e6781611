"""`Study`: ask, report, tell, release, retry, pause, amend. The study is the only state that cannot be rebuilt."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Self

from sqlalchemy import Connection

from orchestrator.errors import StorageRefused
from orchestrator.folders import SweepFolder
from orchestrator.spec.pruners import WilcoxonPruner, depends_on_other_trials
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study import retried_trials, sweep_terms, trial_records
from orchestrator.study.confirmation import Confirmation
from orchestrator.study.database import driver_lease, optuna_trials
from orchestrator.study.database.driver_lease import DriverLease, Heartbeat
from orchestrator.study.database.optuna_trials import MICRO_BATCH, OUTCOME, PAUSE_REASON, REQUESTED_OUTCOME, TO_OPTUNA
from orchestrator.study.database.study_database import StudyDatabase, create_study
from orchestrator.study.pruning.divergence_guard import DivergenceGuard, as_number
from orchestrator.study.pruning.pruner import TrialPruner, pruning_objective
from orchestrator.study.reader import CONFIRMATION, StudyReader
from orchestrator.study.running_trial import (
    AttemptSuperseded,
    EarlyStopping,
    LoggedMetrics,
    RunningTrial,
    TrialFinished,
    outcome_to_json,
    resolve_outcome,
)
from orchestrator.study.sweep_terms import SettingChange, SweepTerms, Usage
from orchestrator.study.trial_issuer import TrialIssuer
from orchestrator.study.trial_records import PAUSED, RELEASED, UNPAUSED, Outcome, Trial, TrialRecord, WaitForTrial
from orchestrator.study.trial_snapshots import TrialSnapshot
from trainer.results import StepMetrics, StopDecision, clause


class Study(StudyReader):
    """The study of one sweep, with an ask-and-tell interface. `StudyReader` has what every process may read.

    The first call that needs the driver's lease acquires it, `ask` among them.
    """

    def __init__(self, folder: SweepFolder, database: StudyDatabase) -> None:
        super().__init__(folder, database)
        self._running: dict[int, RunningTrial] = {}
        self._driver: DriverLease | None = None
        self._heartbeat: Heartbeat | None = None
        self._gpus = 1.0
        self._set_spec(self.spec)

    def _set_spec(self, spec: SweepSpec) -> None:
        self.spec = spec
        self._issuer = TrialIssuer(
            self._optuna_trials, self._repository, self._queue, spec, self.terms, self._first_spec.base
        )

    @classmethod
    def create(
        cls,
        folder: SweepFolder,
        spec: SweepSpec,
        storage: str | None = None,
        *,
        slots: int = 1,
        train_pairs: int | None = None,
        warm_start_trials: Sequence[TrialSnapshot] = (),
    ) -> Self:
        """Create the study of a sweep.

        Args:
            folder: The sweep's folder.
            spec: The sweep.
            storage: An SQLAlchemy URL without password; by default the spec's, else SQLite in the sweep's folder.
            slots: Trials at a time; the default lag depends on it.
            train_pairs: Training pairs, needed where rungs are shares of the training; None if unknown.
            warm_start_trials: Trials of another sweep for the sampler (warm start).

        Raises:
            NameTaken: The database has a sweep of this name.
        """
        terms = SweepTerms.create(spec, slots, train_pairs, warm_start_trials)
        return cls(folder, create_study(folder, spec, terms, storage or spec.storage))

    # --- the driver's lease --------------------------------------------------------------------------------------

    def start_driving(self, gpus: float | None = None) -> None:
        """Acquire the driver's lease: older drivers' writes are refused, and working time counts. `ask` does it too.

        `gpus`: GPUs of a trial's slot; 0 counts slots instead. Raises SweepHeld if another driver is alive; a driver on
        another machine counts as ended after a minute without heartbeats.
        """
        if gpus is not None:
            self._gpus = gpus or 1.0
        with self._driving():
            pass

    def heartbeat(self) -> None:
        """Write a heartbeat if one is due; called while waiting. Raises SweepHeld if another driver took over."""
        if self._driver is not None and (
            self._driver.fenced or self._driver.seconds_since_write >= driver_lease.HEARTBEAT_SECONDS
        ):
            self.start_driving()

    @property
    def fenced(self) -> bool:
        """Whether a write of this driver was refused because another one took over."""
        return self._driver is not None and self._driver.fenced

    def check_fence(self) -> None:
        """Raise SweepHeld if another driver took over; for writes to other stores than the study.

        Callable from any thread. Queries the database only if the last write is so old that the lease may be lost.
        """
        driver = self._driver
        if driver is not None and (driver.fenced or driver.seconds_since_write >= driver_lease.SILENCE_TIMEOUT / 2):
            with self._database.separate_transaction() as connection:
                driver.check_fencing_token(connection)

    def dispose(self) -> None:
        """Release the lease and close the database connections. Running trials stay RUNNING."""
        if self._heartbeat is not None:
            self._heartbeat.end()
            self._heartbeat = None
        if self._driver is not None:
            # Releasing is optional: the next driver also sees that this process has ended.
            with suppress(StorageRefused), self._database.transaction() as connection:
                self._driver.release(connection)
            self._driver = None
        super().dispose()

    def pause_sweep(self, reason: str) -> None:
        """Pause the whole sweep: no working time counts until `resume_sweep`."""
        with self._driving() as connection:
            self._repository.add_event(connection, PAUSED, reason, None)
        assert self._driver is not None
        self._driver.pause()

    def unpause_sweep(self, reason: str) -> None:
        """Continue a paused sweep."""
        assert self._driver is not None
        self._driver.unpause()
        with self._driving() as connection:
            self._repository.add_event(connection, UNPAUSED, reason, None)

    # --- the spec ------------------------------------------------------------------------------------------------

    def check_concurrency(self, slots: int) -> None:
        """Raise TooManySlots if the visibility rule does not allow this many trials at a time."""
        self.terms.check_concurrency(self.spec, slots)

    @property
    def draw_error(self) -> Exception | None:
        """The error for which no new trial can be drawn; None without one. Enqueued trials and retries still run."""
        return self._issuer.draw_error

    def no_more_trials_reason(self) -> str:
        """Return why no new trial will be issued; "" if one will be."""
        with self._database.snapshot() as connection:
            trials = self._optuna_trials.snapshots()
            return self._issuer.no_more_trials_reason(connection, trials, lambda: self._usage(connection))

    def search_or_trial_limit_reason(self) -> str:
        """Return why the search is exhausted, apart from limits on time; "" if it is not."""
        with self._database.snapshot() as connection:
            return self._issuer.search_or_trial_limit_reason(connection, self._optuna_trials.snapshots())

    def amend(self, spec: SweepSpec) -> list[SettingChange]:
        """Continue with another spec and return the settings that changed; the old spec stays in the history.

        What no result depends on may change, and `require`, by which ended trials are measured anew. Else SpecChanged.
        """
        changed = sweep_terms.allowed_changes(self.spec, spec)
        if changed:
            with self._driving() as connection:
                self._repository.add_spec(connection, spec.model_dump_json(), sweep_terms.full_spec_digest(spec))
                self._repository.add_event(connection, "spec", "; ".join(map(str, changed)), None)
                if spec.require != self.spec.require:
                    self._optuna_trials.measure_again(connection, lambda n: self._violations(connection, n, spec))
            self._set_spec(spec)
        return changed

    # --- running trials ------------------------------------------------------------------------------------------

    def ask(self) -> Trial | WaitForTrial | None:
        """Return the next trial to run: first unfinished trials of an ended driver, then new ones.

        Returns WaitForTrial while the next trial's proposal or pruning depends on a trial that still runs, and None
        if the budget is spent or the search space exhausted; `exhausted_reason` tells which.
        """
        with self._driving() as connection:
            trials = self._optuna_trials.snapshots()
            waiting = (frozen for frozen in self._optuna_trials.unfinished() if not optuna_trials.is_paused(frozen))
            orphan = next((frozen for frozen in waiting if frozen.number not in self._running), None)
            if orphan is not None:
                issued = self._issuer.retry(connection, orphan)
            else:
                issued = self._issuer.next(connection, trials, lambda: self._usage(connection))
            if issued is None or isinstance(issued, WaitForTrial):
                return issued
            trials = self._optuna_trials.snapshots()
            trial, trial_id = self._with_micro_batch_limit(issued[0]), issued[1]
            logged = [] if orphan is None else self._logged_history(connection, trial.number)
            pruner = self._issuer.make_pruner(connection, trial.number, trials)
            self._repository.add_attempt(connection, trial.number, trial.attempt, self._gpus)
        early_stopping = self._make_early_stopping(pruner, -1 if trial.fork is None else trial.fork.step)
        early_stopping.update(logged)
        return self._register(trial, trial_id, early_stopping)

    def retry(self, trial: Trial, micro_batch_limit: int | None = None, reason: str = "") -> Trial:
        """Retry a trial whose worker was lost: return its next attempt. Writes of the old attempt are refused.

        After running out of memory, `micro_batch_limit` limits the tokens per micro-batch of this and later trials;
        `reason` goes to the history.
        """
        with self._driving() as connection:
            running = self._require_current(trial, "another attempt")
            self._record_working_time(connection, running)
            if micro_batch_limit is not None:
                self._set(running.trial_id, MICRO_BATCH, micro_batch_limit)
                shown = clause(reason)
                text = f"attempt {trial.attempt}: {shown}; from now on {micro_batch_limit} tokens per micro-batch"
                self._repository.add_event(connection, "out of memory", text, trial.number)
            again, trial_id = self._issuer.retry(connection, self._optuna_trials.trial(running.trial_id))
            again = self._with_micro_batch_limit(again)
            self._repository.add_attempt(connection, again.number, again.attempt, self._gpus)
        return self._register(again, trial_id, running.early_stopping)

    def set_micro_batch_limit(self, tokens: int | None, reason: str) -> None:
        """Limit the tokens per micro-batch after the SFT stage ran out of memory; None: the smallest did not fit."""
        with self._driving() as connection:
            self._optuna_trials.set_study(MICRO_BATCH, tokens)
            limit = f"from now on {tokens} tokens per micro-batch"
            text = f"sft: {clause(reason)}; " if reason else "sft: "
            text += "the smallest micro-batch was too large" if tokens is None else limit
            self._repository.add_event(connection, "out of memory", text, None)

    def report(
        self,
        trial: Trial,
        metrics: Sequence[StepMetrics],
        log_first: Callable[[Sequence[StepMetrics]], None] = lambda _: None,
    ) -> tuple[list[StepMetrics], StopDecision]:
        """Store metrics of new steps; return those that count and the decision after them. A repeated step counts once.

        If the trial must stop at a step, later metrics do not count, whenever they arrived, so that a sweep that is
        killed in between ends with the same metrics.

        log_first: called with the counted metrics before they are stored, to write them to tracking. If the process is
        killed in between, they are reported again, and tracking ignores the repetition.
        """
        stopping = self._require_current(trial, "metrics").early_stopping
        counted = stopping.update(metrics)
        if counted:
            log_first(counted)
        with self._driving() as connection:
            running = self._require_current(trial, "metrics")
            running.mark_started()
            self._record_working_time(connection, running)
            before, running.logged = running.logged or self._repository.logged_metrics(connection, trial.number), None
            by_step = {step_metrics.step: step_metrics for step_metrics in reversed(counted)}
            fresh = [step_metrics for step, step_metrics in by_step.items() if step not in before.steps]
            after = self._add_metrics(connection, running, fresh, before) if fresh else before
        running.logged = after
        return counted, stopping.decision

    def mark_started(self, trial: Trial) -> None:
        """Record that a worker started the trial: GPU time counts from the first such call, not from `ask`."""
        self._require_current(trial, "beginning it").mark_started()

    def tell(self, trial: Trial, outcome: Outcome, worker: str = "") -> TrialRecord:
        """End a trial and return its record; the same outcome again changes nothing. `worker`: for the history.

        Raises TrialFinished if the trial has another outcome already, AttemptSuperseded if a later attempt was issued.
        """
        requested = outcome_to_json(outcome)
        with self._driving() as connection:
            frozen = self._find(trial.number)
            if frozen is not None and frozen.user_attrs.get(REQUESTED_OUTCOME) == requested:
                return self._record(connection, frozen)
            running = self._require_current(trial, f"closing it as {outcome.state}")
            self._record_working_time(connection, running)
            record = self._record_outcome(connection, running.trial_id, outcome)
            if worker:
                self._repository.add_event(connection, "worker", worker, trial.number)
        del self._running[trial.number]
        return record

    def release(self, trial: Trial) -> None:
        """Give an interrupted trial back: it stays RUNNING and is issued again by a later `ask`."""
        with self._driving() as connection:
            running = self._require_current(trial, "releasing it")
            self._record_working_time(connection, running)
            self._repository.add_event(connection, RELEASED, f"attempt {trial.attempt} interrupted", trial.number)
        del self._running[trial.number]

    def save_confirmation(self, confirmation: Confirmation) -> None:
        """Store the comparison of the finalists, in place of an earlier one."""
        with self._driving() as connection:
            self._optuna_trials.set_study(CONFIRMATION, confirmation.model_dump(mode="json"))
            self._repository.add_event(connection, trial_records.CONFIRMED_EVENT, confirmation.text, None)

    # --- requests of users ---------------------------------------------------------------------------------------

    def pause(self, number: int, reason: str) -> None:
        """Pause a trial that has begun: it is not issued before `unpause`. A running one must have checkpointed."""
        with self._driving() as connection:
            trial_id = self._unfinished(number, "pausing it")
            if number in self._running:
                self._record_working_time(connection, self._running[number])
            self._set(trial_id, PAUSE_REASON, reason)
            self._repository.add_event(connection, trial_records.PAUSED, reason, number)
        self._running.pop(number, None)

    def unpause(self, number: int, reason: str) -> None:
        """Continue a paused trial: it is issued again before any new trial."""
        with self._driving() as connection:
            self._set(self._unfinished(number, "unpausing it"), PAUSE_REASON, "")
            self._repository.add_event(connection, trial_records.UNPAUSED, reason, number)

    def end_without_worker(self, number: int, outcome: Outcome) -> TrialRecord:
        """End a trial that has begun and that no worker runs."""
        with self._driving() as connection:
            trial_id = self._unfinished(number, f"closing it as {outcome.state}")
            record = self._record_outcome(connection, trial_id, outcome)
        self._running.pop(number, None)
        return record

    def retry_failed(self, numbers: Sequence[int], reason: str) -> None:
        """Make failed trials unfinished again: each is issued before any new trial, with its number, from the start."""
        with self._driving() as connection:
            retried_trials.reopen(connection, self._optuna_trials, self._repository, numbers, reason)

    # --- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _driving(self) -> Generator[Connection]:
        if self._driver is None:
            DriverLease.wait_for_release(self._repository, self._database.snapshot)
            with self._database.transaction() as connection:
                driver = DriverLease.acquire(self._repository, connection)
            self._driver = driver  # after the commit
            self._heartbeat = Heartbeat(self._write_heartbeat)
            self._optuna_trials.set_exclusive()
        with self._database.transaction() as connection:
            self._driver.check_fencing_token(connection)
            yield connection

    @contextmanager
    def _transaction(self) -> Generator[Connection]:
        """A driver's transactions check the fencing token too; other processes may add events and requests."""
        with super()._transaction() if self._driver is None else self._driving() as connection:
            yield connection

    def _write_heartbeat(self) -> None:
        assert self._driver is not None
        with self._database.separate_transaction() as connection:
            self._driver.heartbeat(connection)

    def _record_outcome(self, connection: Connection, trial_id: int, outcome: Outcome) -> TrialRecord:
        frozen = self._optuna_trials.trial(trial_id)
        _, last_metrics = self._repository.progress_of(connection, frozen.number)
        final, values = resolve_outcome(outcome, last_metrics, self.spec.objectives)
        order = self._repository.add_event(connection, final.state.lower(), final.reason, frozen.number)
        finished = max(time.time(), frozen.user_attrs[optuna_trials.STARTED])
        self._set(trial_id, REQUESTED_OUTCOME, outcome_to_json(outcome))
        self._set(trial_id, OUTCOME, outcome_to_json(final) | {"order": order, "finished_at": finished})
        if values is not None:
            self._set(trial_id, optuna_trials.VALUES, [str(value) for value in values])  # JSON has no infinity
        violations = self._violations(connection, frozen.number, self.spec) if values and not final.diverged else {}
        self._optuna_trials.finish(trial_id, TO_OPTUNA[final.state], values, violations)
        return self._record(connection, self._optuna_trials.trial(trial_id))

    def _set(self, trial_id: int, key: str, value: object) -> None:
        self._optuna_trials.set(trial_id, key, value)

    def _require_current(self, trial: Trial, operation: str) -> RunningTrial:
        running = self._running.get(trial.number)
        if running is not None and running.attempt == trial.attempt:
            return running
        frozen = self._find(trial.number)
        if frozen is not None and frozen.state.is_finished():
            raise TrialFinished(trial.number, optuna_trials.FROM_OPTUNA[frozen.state], operation)
        raise AttemptSuperseded(trial.number, trial.attempt, None if running is None else running.attempt)

    def _unfinished(self, number: int, operation: str) -> int:
        """Optuna's id of a trial that has begun and not ended; else AttemptSuperseded or TrialFinished."""
        frozen = self._find(number)
        if frozen is None:
            raise AttemptSuperseded(number, 0, None)
        if frozen.state.is_finished():
            raise TrialFinished(number, optuna_trials.FROM_OPTUNA[frozen.state], operation)
        return self._optuna_trials.optuna_id(number)

    def _record_working_time(self, connection: Connection, running: RunningTrial) -> None:
        self._repository.set_attempt_seconds(connection, running.number, running.attempt, running.seconds)

    def _usage(self, connection: Connection) -> Usage:
        """Return the usage that other processes wrote, and this process's up to now."""
        if self._driver is None:
            return super()._usage(connection)
        own_attempts = {(trial.number, trial.attempt) for trial in self._running.values()}
        written = self._repository.gpu_seconds(connection, excluding=own_attempts)
        running = sum(trial.seconds * trial.gpus for trial in self._running.values())
        return Usage(self._driver.total_working_seconds(connection) / 3600, (written + running) / 3600)

    def _add_metrics(
        self, connection: Connection, running: RunningTrial, fresh: Sequence[StepMetrics], before: LoggedMetrics
    ) -> LoggedMetrics:
        after = self._repository.add_metrics(connection, running.number, fresh, before)
        if isinstance(self.spec.pruner, WilcoxonPruner):
            self._repository.add_pair_margins(connection, running.number, fresh)
        pruned_by = pruning_objective(self.spec).metric
        for step_metrics in fresh:
            if (value := step_metrics.metrics.get(pruned_by)) is not None:
                self._optuna_trials.add_intermediate(running.trial_id, step_metrics.step, as_number(value))
        return after

    def _register(self, trial: Trial, trial_id: int, early_stopping: EarlyStopping) -> Trial:
        self._running[trial.number] = RunningTrial(trial.number, trial.attempt, trial_id, self._gpus, early_stopping)
        return trial

    def _logged_history(self, connection: Connection, number: int) -> list[StepMetrics]:
        """Return the trial's stored metrics by step, with pair margins where they were stored."""
        pairs = self._repository.pair_margins(connection, number)
        return [
            replace(step_metrics, pair_margins=pairs.get(step_metrics.step, ""))
            for step_metrics in self._repository.metric_history(connection, number)
        ]

    def _make_early_stopping(self, pruner: TrialPruner, inherited_until: int) -> EarlyStopping:
        """Return early stopping for the trial. In `order: asap` it uses the results that exist at each evaluation."""

        def make_pruner() -> TrialPruner:
            if self.terms.lag is not None or not depends_on_other_trials(self.spec.pruner):
                return pruner
            with self._database.snapshot() as connection:
                return self._issuer.make_pruner(connection, pruner.number, self._optuna_trials.snapshots())

        guard = DivergenceGuard(self.spec.guard, *(objective.metric for objective in self.spec.objectives))
        broken = self._issuer.broken_requirements(pruner)
        return EarlyStopping(guard, make_pruner, pruner.objective.metric, broken, inherited_until=inherited_until)

    def _with_micro_batch_limit(self, trial: Trial) -> Trial:
        """Return the trial with the limit on tokens per micro-batch that out-of-memory errors have set."""
        return replace(trial, micro_batch_limit=self._micro_batch_limit())
