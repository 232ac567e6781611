"""`TrialController`: decides which trial runs next and handles reports, lost workers and stops. Independent of Ray."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from orchestrator.execution import trial_retries
from orchestrator.execution.messages import MIRROR_EVENT, AttemptReport, AttemptResult, AttemptStatus, AttemptTask
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.execution.trainer_warnings import WarningLog
from orchestrator.execution.trial_lifecycle import ActiveAttempt, AttemptLauncher, finish_attempt, release_attempt
from orchestrator.execution.trial_retries import RepeatedBug, RetryPolicy
from orchestrator.execution.user_requests import StopConditions, TrialRequests, remaining_reason
from orchestrator.interfaces import ProgressView, TrackingSink
from orchestrator.study.database.driver_lease import EXTENDING_REQUESTS
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, Outcome, TrialRecord, TrialState, WaitForTrial
from trainer.config.trial import TrialConfig
from trainer.results import CONTINUE


class TrialController:
    """Runs the trials of a study until it is exhausted or stopped.

    Tracking is always written before the study commits.
    """

    def __init__(
        self,
        study: Study,
        sink: TrackingSink,
        view: ProgressView,
        signals: SignalHandler,
        *,
        finalize_config: Callable[[TrialConfig, Mapping[str, Any]], TrialConfig],
        on_trial_end: Callable[[TrialRecord], None],
        on_trial_start: Callable[[int], None] = lambda _: None,
        longest_row: int = 1,
    ) -> None:
        """`longest_row`: tokens of the longest row: a micro-batch cannot be smaller."""
        self._study, self._sink, self._view, self._signals = study, sink, view, signals
        self._launcher = AttemptLauncher(study, sink, view, finalize_config)
        self._on_trial_end, self._on_trial_start = on_trial_end, on_trial_start
        self._active: dict[str, ActiveAttempt] = {}
        self._retries = RetryPolicy(study, view, longest_row)
        self._stop_conditions = StopConditions(study, view)
        self._trial_requests = TrialRequests(study, sink, view, on_trial_end)
        self._repeated_bug = RepeatedBug(study)
        self._oom_kills = trial_retries.OomKillCounter()
        self._warnings = WarningLog(study, sink, view)
        self._exhausted = False
        self._is_waiting = False
        self.stop_reason: StopReason | None = None
        self.error: BaseException | None = None
        """First exception inside a call from Tune, which would wrap it."""

    # --- context manager: stores exceptions ------------------------------------------------------------------------

    def __enter__(self) -> TrialController:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self.error = self.error or error

    # --- what runs next ------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        """Whether no attempt runs and none will start."""
        return not self._active and not self._retries and (self.stop_reason is not None or self._exhausted)

    def next_attempt(self, slots: int) -> AttemptTask | None:
        """Return the next attempt to start; None where no slot is free, or none can start yet.

        `slots`: number of slots. A slot stays idle while the study returns WaitForTrial.
        """
        if self.stop_reason is not None or len(self._active) >= slots:
            return None
        if self._is_waiting and not self._retries:
            self._exhausted = not self._active  # the trial that the study waits for is paused
            return None  # no trial has ended since WaitForTrial
        trial = self._retries.next_attempt() if self._retries else self._study.ask()
        if isinstance(trial, WaitForTrial):
            self._is_waiting = True
            self._exhausted = not self._active
            return None
        if trial is None:
            # A request that arrived with the last trial's end may give more to do; `poll` answers it first.
            pending = any(request.kind in EXTENDING_REQUESTS for request in self._study.requests())
            self._exhausted = not self._active and not pending
            return None
        active = self._launcher.start_attempt(trial)
        self._active[active.task.id] = active
        self._on_trial_start(trial.number)
        return active.task

    def trials_at_a_time(self, slots: Slots) -> int:
        """Return how many trials may run now: `budget.concurrency` can be changed while the sweep runs."""
        most = slots.at_a_time(self._study.spec.budget.concurrency)
        visible = self._study.terms.most_at_a_time(self._study.spec)
        return most if visible is None else min(most, visible)

    def mark_started(self, task_id: str) -> None:
        """Record that a worker started this attempt, from which its GPU time counts; repeated calls have no effect."""
        if (active := self._active.get(task_id)) is not None:
            self._study.mark_started(active.trial)

    # --- reports of workers --------------------------------------------------------------------------------------

    def on_report(self, task_id: str, report: AttemptReport) -> bool:
        """Handle a report; return whether the attempt continues."""
        active = self._active.get(task_id)
        if active is None:
            return False
        trial, run = active.trial, str(active.trial.number)
        self._study.mark_started(trial)
        # This worker just reported, so kernel kills counted so far were others.
        active.oom_kills_at_start = max(active.oom_kills_at_start, self._oom_kills.sample())
        if tags := active.new_tags(report.pid, report.counters):
            self._sink.set_tags(run, tags)
        for notice in report.notices:
            self._study.add_event(MIRROR_EVENT, notice, trial.number)
            self._view.log(f"trial {trial.number}: {notice}")
        self._warnings.report(report.warnings, trial.number)
        decision = CONTINUE
        if report.metrics:
            log_metrics = functools.partial(self._sink.log_metrics, run, at=time.time())
            counted, decision = self._study.report(trial, report.metrics, log_first=log_metrics)
            if counted:
                self._view.add_metrics(trial.number, counted)
        if decision.stop:  # the decision wins over the report's result, which is from after the deciding metrics
            self._finish_trial(active, Outcome(TrialState.PRUNED, decision.reason, diverged=decision.diverged))
            if report.result is not None and report.result.status is AttemptStatus.NO_DISK:
                self._on_disk_full(report.result)
        elif report.result is not None:
            self._handle_result(active, report.result)
        elif (outcome := self._trial_requests.requested_outcome(trial.number)) is not None:
            self._finish_trial(active, outcome)
        else:
            return True
        return False

    def _handle_result(self, active: ActiveAttempt, result: AttemptResult) -> None:
        match result.status:
            case AttemptStatus.FINISHED:
                self._finish_trial(active, Outcome(TrialState.COMPLETE))
            case AttemptStatus.DIVERGED:
                self._finish_trial(active, Outcome(TrialState.PRUNED, f"diverged: {result.reason}", diverged=True))
            case AttemptStatus.FAILED if result.failure is FailureKind.OUT_OF_MEMORY:
                self._on_out_of_memory(active, result.reason)
            case AttemptStatus.FAILED:
                failure = result.failure or FailureKind.BUG
                self._finish_trial(active, Outcome(TrialState.FAILED, result.reason, failure))
            case AttemptStatus.RELEASED:
                self._release(active)
            case AttemptStatus.NO_DISK:
                self._release(active)
                self._on_disk_full(result)
            case AttemptStatus.LOST:
                self.on_worker_lost(active.task.id, result.reason)
        if result.status in (AttemptStatus.FINISHED, AttemptStatus.DIVERGED, AttemptStatus.FAILED) and (
            reason := self._repeated_bug.stop_reason_after(result)
        ):
            self._stop(StopKind.SAME_BUG, reason)

    def _on_disk_full(self, result: AttemptResult) -> None:
        self._stop(StopKind.NO_DISK, result.reason)

    def _finish_trial(self, active: ActiveAttempt, outcome: Outcome) -> None:
        record = finish_attempt(self._study, self._sink, active, outcome)
        self._is_waiting = False
        del self._active[active.task.id]
        self._trial_requests.complete(record.number)
        self._stop_conditions.on_trial_end(record)
        self._view.update_trial(record)
        self._on_trial_end(record)

    def _release(self, active: ActiveAttempt) -> None:
        """Handle a trial released by its worker: it is issued again later, unless a user ended or paused it."""
        outcome = self._trial_requests.requested_outcome(active.trial.number)
        if outcome is not None:
            self._finish_trial(active, outcome)
            return
        if self._trial_requests.pause_if_requested(active.trial.number):
            del self._active[active.task.id]
            return
        release_attempt(self._study, self._sink, active)
        del self._active[active.task.id]

    def _on_out_of_memory(self, active: ActiveAttempt, reason: str) -> None:
        failed = self._retries.retry_with_less_memory(active.trial, reason, stopping=self.stop_reason is not None)
        if failed is not None:
            self._finish_trial(active, failed)
        else:
            del self._active[active.task.id]

    # --- lost workers --------------------------------------------------------------------------------------------

    def on_worker_lost(self, task_id: str, cause: str) -> None:
        """Handle a lost worker: its trial is retried without outcome. Repeated calls for an attempt have no effect."""
        active = self._active.get(task_id)
        if active is None:
            return
        if killed := self._oom_kills.out_of_memory_cause(active.task.folder, cause, active.oom_kills_at_start):
            self._on_out_of_memory(active, killed)
            return
        del self._active[task_id]
        if reason := self._retries.retry_after_loss(active.trial, cause, stopping=self.stop_reason is not None):
            self._stop(StopKind.WORKERS_LOST, reason)

    # --- when to stop --------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Check signals, user requests and the budget; called regularly."""
        self._view.refresh()
        if self._signals.received:
            self._stop(StopKind.INTERRUPTED)
        stop = self._stop_conditions.read_study()
        if self._stop_conditions.has_read:  # an enqueued trial may not need to wait
            self._is_waiting = False
        if self._stop_conditions.trial_requests:
            self._apply_trial_requests()
        if stop is not None:
            self._stop(stop.kind, stop.text)

    def _apply_trial_requests(self) -> None:
        requested, self._stop_conditions.trial_requests = self._stop_conditions.trial_requests, ()
        self._retries.release(
            {request.trial for request in requested}
        )  # without a worker they can be changed in the study
        self._trial_requests.apply(requested, {active.trial.number: active.task for active in self._active.values()})

    def _stop(self, kind: StopKind, text: str = "") -> None:
        """Start no more trials, and request every running one to checkpoint and stop."""
        if self.stop_reason is not None:
            return
        self.stop_reason = StopReason(kind, text)
        self._study.add_event("stopping", str(self.stop_reason))
        for active in self._active.values():
            active.task.request_release()
        self._retries.release()
        waiting = f"; waiting for {len(self._active)} running trials to checkpoint" if self._active else ""
        self._view.log(f"stopping ({self.stop_reason}){waiting}")

    def result(self) -> StopReason:
        """Return why the run ended."""
        if self.stop_reason is not None:
            return self.stop_reason
        # The last trial may have ended after the last check of the budget.
        reason = None if self._study.search_or_trial_limit_reason() else self._stop_conditions.budget_reason()
        return reason or remaining_reason(self._study)
