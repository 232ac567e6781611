"""`Study`: ask, report, tell, release, retry, pause, amend. Everything else can be lost and rebuilt from the study."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Self

from optuna.trial import FrozenTrial
from sqlalchemy import Connection

from orchestrator.errors import StorageRefused
from orchestrator.folders import SweepFolder
from orchestrator.spec.pruners import WilcoxonPruner, depends_on_other_trials
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study import sweep_terms, trial_records
from orchestrator.study.database import driver_lease, optuna_trials
from orchestrator.study.database.driver_lease import DriverLease, Heartbeat
from orchestrator.study.database.optuna_trials import (
    MICRO_BATCH,
    OUTCOME,
    PAUSE_REASON,
    REQUESTED_OUTCOME,
    STARTED,
    TO_OPTUNA,
    VALUES,
)
from orchestrator.study.database.study_database import StudyDatabase, create_study
from orchestrator.study.pruning.divergence_guard import DivergenceGuard, as_number
from orchestrator.study.pruning.pruner import TrialPruner, pruning_objective
from orchestrator.study.reader import StudyReader
from orchestrator.study.running_trial import (
    AttemptSuperseded,
    EarlyStopping,
    LoggedMetrics,
    RunningTrial,
    TrialFinished,
    outcome_to_json,
    resolve_outcome,
)
from orchestrator.study.sweep_terms import Change, SweepTerms, Usage
from orchestrator.study.trial_issuer import TrialIssuer
from orchestrator.study.trial_records import PAUSED, UNPAUSED, Outcome, Trial, TrialRecord, WaitForTrial
from orchestrator.study.trial_snapshots import TrialSnapshot
from trainer.results import StepMetrics, StopDecision


class Study(StudyReader):
    """The study of one sweep. Every process may read it (reader.py); the first call that writes as a driver makes this
    process the driver: an older driver's writes are refused from then on.
    """

    def __init__(self, folder: SweepFolder, database: StudyDatabase) -> None:
        super().__init__(folder, database)
        self._running: dict[int, RunningTrial] = {}
        self._driver: DriverLease | None = None
        self._heart: Heartbeat | None = None
        self._gpus = 1.0
        self._set_spec(self.spec)

    def _set_spec(self, spec: SweepSpec) -> None:
        self.spec = spec
        self._issuer = TrialIssuer(self._optuna_trials, self._repository, self._queue, spec, self.terms)

    @classmethod
    def create(
        cls,
        folder: SweepFolder,
        spec: SweepSpec,
        storage: str | None = None,
        *,
        slots: int = 1,
        train_pairs: int | None = None,
        earlier: Sequence[TrialSnapshot] = (),
    ) -> Self:
        """A new study in `storage` (an SQLAlchemy URL without password); by default the spec's, else SQLite here.

        `slots`: trials at a time, which settles how much a trial may know of the others; `train_pairs`: pairs to train
        on, where rungs are shares of the training; `earlier`: another sweep's trials, for the sampler.
        """
        terms = SweepTerms.create(spec, slots, train_pairs, earlier)
        return cls(folder, create_study(folder, spec, terms, storage or spec.storage))

    # --- the right to drive --------------------------------------------------------------------------------------

    def start_driving(self, gpus: float | None = None) -> None:
        """Drive from now on: older drivers' writes are refused and working time counts. Claiming does so by itself.

        `gpus` are those of a trial's slot; without any, slots are counted in their place. SweepHeld where another
        driver lives; one of another machine that says nothing for a minute does not.
        """
        if gpus is not None:
            self._gpus = gpus or 1.0
        with self._driving():
            pass

    def heartbeat(self) -> None:
        """Called now and then while waiting: SweepHeld where another driver has taken over meanwhile."""
        if self._driver is not None and (
            self._driver.fenced or self._driver.seconds_since_write >= driver_lease.HEARTBEAT_SECONDS
        ):
            self.start_driving()

    @property
    def fenced(self) -> bool:
        """Whether another driver has taken over from this one, which has noticed."""
        return self._driver is not None and self._driver.fenced

    def check_fence(self) -> None:
        """SweepHeld where another driver has taken over from this one; for what is told elsewhere than in the study.

        From any thread. The database is asked only where this driver was silent for so long that it may be.
        """
        driver = self._driver
        if driver is not None and (driver.fenced or driver.seconds_since_write >= driver_lease.SILENCE_TIMEOUT / 2):
            with self._database.beside() as c:
                driver.check_fencing_token(c)

    def dispose(self) -> None:
        """Leave the study to the next driver and give the database connections back. Held trials stay RUNNING."""
        if self._heart is not None:
            self._heart.end()
            self._heart = None
        if self._driver is not None:
            # What the database refuses here is only a courtesy: the next driver sees that this process has ended.
            with suppress(StorageRefused), self._database.transaction() as c:
                self._driver.release(c)
            self._driver = None
        super().dispose()

    def pause_sweep(self, reason: str) -> None:
        """The whole sweep is paused: no working time counts until `resume_sweep`."""
        with self._driving() as c:
            self._repository.add_event(c, PAUSED, reason, None)
        assert self._driver is not None
        self._driver.pause()

    def resume_sweep(self, reason: str) -> None:
        """It goes on."""
        assert self._driver is not None
        self._driver.resume()
        with self._driving() as c:
            self._repository.add_event(c, UNPAUSED, reason, None)

    # --- the spec ------------------------------------------------------------------------------------------------

    def check_concurrency(self, slots: int) -> None:
        """TooManySlots where so many trials at a time are more than this sweep's visibility rule allows."""
        self.terms.check_concurrency(self.spec, slots)

    def exhausted_reason(self) -> str:
        """Why no new trial will be issued, in words; empty while there is one to come."""
        with self._database.snapshot() as c:
            return self._limit(c, self._optuna_trials.snapshots())

    def space_reason(self) -> str:
        """Why there is nothing left to try, however much time there is, in words; empty while there is."""
        with self._database.snapshot() as c:
            return self._issuer.space_reason(c, self._optuna_trials.snapshots())

    def amend(self, spec: SweepSpec) -> list[Change]:
        """Continue under another spec: budget, resources and the like may change, what makes trials comparable may not.

        Returns the settings that changed; the old spec stays in the history.
        """
        changed = sweep_terms.allowed_changes(self.spec, spec)
        if changed:
            with self._driving() as c:
                self._repository.add_spec(c, spec.model_dump_json(), sweep_terms.spec_digest(spec))
                self._repository.add_event(c, "spec", "; ".join(map(str, changed)), None)
            self._set_spec(spec)
        return changed

    # --- trials of this process's workers -------------------------------------------------------------------------

    def ask(self) -> Trial | WaitForTrial | None:
        """The next trial to run: first those a dead or interrupted driver left, then new ones; None: nothing is left.

        Returns WaitForTrial while the next trial's proposal or decisions depend on a trial that still runs, and None
        when the budget is spent or the space exhausted; `exhausted_reason` says which.
        """
        with self._driving() as c:
            trials = self._optuna_trials.snapshots()
            waiting = (t for t in self._optuna_trials.unfinished() if not optuna_trials.is_paused(t))
            orphan = next((t for t in waiting if t.number not in self._running), None)
            if orphan is not None:
                issued = self._issuer.retry(c, orphan)
            elif self._limit(c, trials):
                issued = None
            elif (blocking := self._issuer.blocking_trial(c, trials)) is not None:
                return WaitForTrial(blocking)
            else:
                issued = self._issuer.next(c, trials)
                trials = trials if issued is None else self._optuna_trials.snapshots()
            if issued is None:
                return None
            trial, trial_id = self._with_micro_batch_limit(issued[0]), issued[1]
            text = [] if orphan is None else self._logged_history(c, trial.number)
            pruner = self._issuer.make_pruner(c, trial.number, trials)
            self._repository.add_attempt(c, trial.number, trial.attempt, self._gpus)
        early_stopping = self._make_early_stopping(pruner, -1 if trial.fork is None else trial.fork.step)
        early_stopping.update(text)
        return self._register(trial, trial_id, early_stopping)

    def retry(self, trial: Trial, micro_batch: int | None = None, reason: str = "") -> Trial:
        """The worker of this trial is lost: the same trial, next attempt. The old attempt can write no more.

        Where it ran out of memory: with at most `micro_batch` tokens, remembered for whatever is issued from now on.
        """
        with self._driving() as c:
            running = self._require_current(trial, "another attempt")
            self._record_working_time(c, running)
            if micro_batch is not None:
                self._set(running.trial_id, MICRO_BATCH, micro_batch)
                text = f"attempt {trial.attempt}: {reason}; from now on {micro_batch} tokens per micro-batch"
                self._repository.add_event(c, "out of memory", text, trial.number)
            again, trial_id = self._issuer.retry(c, self._optuna_trials.trial(running.trial_id))
            again = self._with_micro_batch_limit(again)
            self._repository.add_attempt(c, again.number, again.attempt, self._gpus)
        return self._register(again, trial_id, running.early_stopping)

    def set_micro_batch_limit(self, tokens: int | None, reason: str) -> None:
        """Before the first trial memory ran out: from now on at most so many tokens; None: that did not help either."""
        with self._driving() as c:
            self._optuna_trials.set_study(MICRO_BATCH, tokens)
            text = "one pair was too much" if tokens is None else f"from now on {tokens} tokens per micro-batch"
            self._repository.add_event(c, "out of memory", f"sft: {reason}; {text}" if reason else f"sft: {text}", None)

    def report(
        self,
        trial: Trial,
        metrics: Sequence[StepMetrics],
        before_commit: Callable[[Sequence[StepMetrics]], None] = lambda _: None,
    ) -> tuple[list[StepMetrics], StopDecision]:
        """Commit the metrics that are new by their step.

        Returns the metrics that count and whether the trial goes on. Where it must stop at a step, no later metrics
        count, however early they arrived: a sweep that was killed in between ends with the same metrics.

        before_commit: called with the metrics that count before the transaction begins. What it writes to tracking is
        then written again, and ignored there, if the process is killed before the commit; the other way round the
        metrics would never be written.
        """
        stopping = self._require_current(trial, "points").early_stopping
        counted = stopping.update(metrics)
        if counted:
            before_commit(counted)
        with self._driving() as c:
            running = self._require_current(trial, "points")
            running.begin()
            self._record_working_time(c, running)
            before, running.logged = running.logged or self._repository.logged_metrics(c, trial.number), None
            fresh = {p.step: p for p in reversed(counted) if p.step not in before.steps}
            after = self._add_metrics(c, running, list(fresh.values()), before) if fresh else before
        running.logged = after
        return counted, stopping.decision

    def begun(self, trial: Trial) -> None:
        """A worker has begun with this trial: GPU time counts from now on, not from when it was issued. The first call
        counts."""
        self._require_current(trial, "beginning it").begin()

    def tell(self, trial: Trial, outcome: Outcome, worker: str = "") -> TrialRecord:
        """End the trial for good; the record says how it ended. The same again changes nothing, another is refused.

        `worker`: by which it was trained, noted beside its end.
        """
        requested = outcome_to_json(outcome)
        with self._driving() as c:
            frozen = self._find(trial.number)
            if frozen is not None and frozen.user_attrs.get(REQUESTED_OUTCOME) == requested:
                return self._record(c, frozen)
            running = self._require_current(trial, f"closing it as {outcome.state}")
            self._record_working_time(c, running)
            record = self._finish(c, running.trial_id, outcome)
            if worker:
                self._repository.add_event(c, "worker", worker, trial.number)
        del self._running[trial.number]
        return record

    def release(self, trial: Trial) -> None:
        """The trial is interrupted, not ended: it stays RUNNING and is issued again by a later claim."""
        with self._driving() as c:
            running = self._require_current(trial, "releasing it")
            self._record_working_time(c, running)
            self._repository.add_event(c, "released", f"attempt {trial.attempt} interrupted", trial.number)
        del self._running[trial.number]

    # --- by hand -------------------------------------------------------------------------------------------------

    def pause(self, number: int, reason: str) -> None:
        """Put a begun trial aside: it is not issued again before `unpause`. A held one must have checkpointed."""
        with self._driving() as c:
            trial_id = self._unfinished(number, "pausing it")
            if number in self._running:
                self._record_working_time(c, self._running[number])
            self._set(trial_id, PAUSE_REASON, reason)
            self._repository.add_event(c, trial_records.PAUSED, reason, number)
        self._running.pop(number, None)

    def unpause(self, number: int, reason: str) -> None:
        """Have it issued again, before any new trial."""
        with self._driving() as c:
            self._set(self._unfinished(number, "unpausing it"), PAUSE_REASON, "")
            self._repository.add_event(c, trial_records.UNPAUSED, reason, number)

    def tell_unassigned(self, number: int, outcome: Outcome) -> TrialRecord:
        """End a begun trial that no worker has."""
        with self._driving() as c:
            record = self._finish(c, self._unfinished(number, f"closing it as {outcome.state}"), outcome)
        self._running.pop(number, None)
        return record

    # --- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _driving(self) -> Generator[Connection]:
        if self._driver is None:
            DriverLease.wait_for_release(self._repository, self._database.snapshot)
            with self._database.transaction() as c:
                driver = DriverLease.acquire(self._repository, c)
            self._driver, self._heart = driver, Heartbeat(self._show_life)
            self._optuna_trials.set_exclusive()
        with self._database.transaction() as c:
            self._driver.check_fencing_token(c)
            yield c

    @contextmanager
    def _transaction(self) -> Generator[Connection]:
        """A driver's notes and answers to requests are refused too once another one has taken over."""
        with super()._transaction() if self._driver is None else self._driving() as c:
            yield c

    def _show_life(self) -> None:
        assert self._driver is not None
        with self._database.beside() as c:
            self._driver.beat(c)

    def _limit(self, c: Connection, trials: Sequence[TrialSnapshot]) -> str:
        return self._issuer.limit_reason(c, trials, lambda: self._usage(c))

    def _finish(self, c: Connection, trial_id: int, outcome: Outcome) -> TrialRecord:
        frozen = self._optuna_trials.trial(trial_id)
        _, seen = self._repository.progress_of(c, frozen.number)
        final, values = resolve_outcome(outcome, seen, self.spec.objectives)
        order = self._repository.add_event(c, final.state.lower(), final.reason, frozen.number)
        finished = max(time.time(), frozen.user_attrs[STARTED])
        self._set(trial_id, REQUESTED_OUTCOME, outcome_to_json(outcome))
        self._set(trial_id, OUTCOME, outcome_to_json(final) | {"order": order, "finished_at": finished})
        if values is not None:
            self._set(trial_id, VALUES, [str(value) for value in values])  # JSON has no infinity
        self._optuna_trials.finish(trial_id, TO_OPTUNA[final.state], values)
        return self._record(c, self._optuna_trials.trial(trial_id))

    def _find(self, number: int) -> FrozenTrial | None:
        frozen = self._frozen()
        return frozen[number] if number < len(frozen) else None

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
        """Optuna's id of a trial that has begun and not ended."""
        frozen = self._find(number)
        if frozen is None:
            raise AttemptSuperseded(number, 0, None)
        if frozen.state.is_finished():
            raise TrialFinished(number, optuna_trials.FROM_OPTUNA[frozen.state], operation)
        return self._optuna_trials.optuna_id(number)

    def _record_working_time(self, c: Connection, running: RunningTrial) -> None:
        self._repository.set_attempt_seconds(c, running.number, running.attempt, running.seconds)

    def _usage(self, c: Connection) -> Usage:
        """Of other processes what they wrote; of this one up to now."""
        if self._driver is None:
            return super()._usage(c)
        written = self._repository.gpu_seconds(c, excluding={(h.number, h.attempt) for h in self._running.values()})
        running = sum(h.seconds * h.gpus for h in self._running.values())
        return Usage(self._driver.total_working_seconds(c) / 3600, (written + running) / 3600)

    def _add_metrics(
        self, c: Connection, running: RunningTrial, fresh: Sequence[StepMetrics], before: LoggedMetrics
    ) -> LoggedMetrics:
        after = self._repository.add_metrics(c, running.number, fresh, before)
        if isinstance(self.spec.pruner, WilcoxonPruner):
            self._repository.add_pair_margins(c, running.number, fresh)
        looked_at = pruning_objective(self.spec).metric
        for step_metrics in fresh:
            if (value := step_metrics.metrics.get(looked_at)) is not None:
                self._optuna_trials.add_intermediate(running.trial_id, step_metrics.step, as_number(value))
        return after

    def _register(self, trial: Trial, trial_id: int, early_stopping: EarlyStopping) -> Trial:
        number, attempt = trial.number, trial.attempt
        self._running[number] = RunningTrial(number, attempt, trial_id, self._gpus, early_stopping)
        return trial

    def _logged_history(self, c: Connection, number: int) -> list[StepMetrics]:
        """The trial's points as they came, with what they know of each pair."""
        pairs = self._repository.pair_margins(c, number)
        return [
            replace(step_metrics, pairs=pairs.get(step_metrics.step, ""))
            for step_metrics in self._repository.metric_history(c, number)
        ]

    def _make_early_stopping(self, pruner: TrialPruner, inherited: int) -> EarlyStopping:
        """What stops this trial. In `order: asap` what its pruner knows changes all the time."""

        def make_pruner() -> TrialPruner:
            if self.terms.lag is not None or not depends_on_other_trials(self.spec.pruner):
                return pruner
            with self._database.snapshot() as c:
                return self._issuer.make_pruner(c, pruner.number, self._optuna_trials.snapshots())

        guard = DivergenceGuard(self.spec.guard, *(objective.metric for objective in self.spec.objectives))
        return EarlyStopping(guard, make_pruner, pruner.objective.metric, inherited=inherited)

    def _with_micro_batch_limit(self, trial: Trial) -> Trial:
        """The trial with what was learned of this machine's memory."""
        return replace(trial, micro_batch=self._micro_batch_limit())
