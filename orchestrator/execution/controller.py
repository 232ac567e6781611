"""`TrialController`: which trial runs next, ends or stops; the driver's side of every trial. Knows no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from orchestrator.execution import retry_policy
from orchestrator.execution.messages import MIRROR, AttemptReport, AttemptResult, AttemptStatus, AttemptTask
from orchestrator.execution.retry_policy import RepeatedBug, RetryPolicy
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.execution.trainer_warnings import WarningLog
from orchestrator.execution.trial_lifecycle import ActiveAttempt, AttemptLauncher, finish_attempt, release_attempt
from orchestrator.execution.user_requests import StopConditions, TrialRequests, remaining_reason
from orchestrator.interfaces import ProgressView, TrackingSink
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, Outcome, TrialRecord, TrialState, WaitForTrial
from trainer.config.trial import TrialConfig
from trainer.results import CONTINUE


class TrialController:
    """One run of the engine over a study. The sink is always told before the study commits."""

    def __init__(
        self,
        study: Study,
        sink: TrackingSink,
        view: ProgressView,
        signals: SignalHandler,
        *,
        finish_config: Callable[[TrialConfig], TrialConfig],
        on_trial_end: Callable[[TrialRecord], None],
        longest_row: int = 1,
    ) -> None:
        """`longest_row`: tokens of the data's longest row, below which no micro-batch can be made smaller."""
        self._study, self._sink, self._view, self._signals = study, sink, view, signals
        self._launcher = AttemptLauncher(study, sink, view, finish_config)
        self._on_trial_end = on_trial_end
        self._active: dict[str, ActiveAttempt] = {}
        self._retries = RetryPolicy(study, view, longest_row)
        self._stop_conditions = StopConditions(study)
        self._trial_requests = TrialRequests(study, sink, view, on_trial_end)
        self._repeated_bug = RepeatedBug(study)
        self._kills = retry_policy.KernelKills()
        self._warnings = WarningLog(study, sink, view)
        self._exhausted = False
        self._is_waiting = False
        self.stop_reason: StopReason | None = None
        self.error: BaseException | None = None
        """What went wrong inside a call from Tune, which would wrap it beyond recognition."""

    # --- as a context: remembers what passes through ---------------------------------------------------------------

    def __enter__(self) -> TrialController:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self.error = self.error or error

    # --- what runs next ------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing will."""
        return not self._active and not self._retries and (self.stop_reason is not None or self._exhausted)

    def next_attempt(self, slots: int) -> AttemptTask | None:
        """The next attempt to start, if a slot is free and there is one; a slot is idle while the study says wait."""
        if self.stop_reason is not None or len(self._active) >= slots:
            return None
        if self._is_waiting and not self._retries:
            self._exhausted = not self._active  # then what it waits for is paused
            return None  # nothing has ended since the study said so
        trial = self._retries.pop() if self._retries else self._study.ask()
        if isinstance(trial, WaitForTrial):
            self._is_waiting = True
            self._exhausted = not self._active
            return None
        if trial is None:
            self._exhausted = not self._active
            return None
        active = self._launcher.start_attempt(trial)
        self._active[active.task.id] = active
        return active.task

    def began(self, task_id: str) -> None:
        """A worker process has this attempt: until now it waited for a slot, which is no GPU time. Told again, nothing
        changes."""
        if (active := self._active.get(task_id)) is not None:
            self._study.begun(active.trial)

    # --- what workers say ----------------------------------------------------------------------------------------

    def on_report(self, task_id: str, report: AttemptReport) -> bool:
        """Take a report; whether the attempt goes on."""
        active = self._active.get(task_id)
        if active is None:
            return False
        trial, run = active.trial, str(active.trial.number)
        self._study.begun(trial)
        active.kills_at_start = retry_policy.kernel_kills()  # none of these was this worker
        if tags := active.new_tags(report.pid, report.counters):
            self._sink.set_tags(run, tags)
        for notice in report.notices:
            self._study.add_event(MIRROR, notice, trial.number)
            self._view.log(f"trial {trial.number}: {notice}")
        self._warnings.tell(report.warnings, trial.number)
        decision = CONTINUE
        if report.metrics:
            counted, decision = self._study.preview(trial, report.metrics)
            if counted:
                self._sink.log_metrics(run, counted, at=time.time())
                self._study.report(trial, counted)
                self._view.add_metrics(trial.number, counted)
        if decision.stop:  # before any end: it came after the point at which the trial was to stop
            self._close(active, Outcome(TrialState.PRUNED, decision.reason, diverged=decision.diverged))
            if report.result is not None and report.result.status is AttemptStatus.NO_DISK:
                self._on_disk_full(report.result)
        elif report.result is not None:
            self._end(active, report.result)
        elif (ended := self._trial_requests.end_outcome(trial.number)) is not None:
            self._close(active, ended)
        else:
            return True
        return False

    def _end(self, active: ActiveAttempt, result: AttemptResult) -> None:
        match result.status:
            case AttemptStatus.FINISHED:
                self._close(active, Outcome(TrialState.COMPLETE))
            case AttemptStatus.DIVERGED:
                self._close(active, Outcome(TrialState.PRUNED, f"diverged: {result.reason}", diverged=True))
            case AttemptStatus.FAILED if result.failure is FailureKind.OUT_OF_MEMORY:
                self._on_out_of_memory(active, result.reason)
            case AttemptStatus.FAILED:
                failure = result.failure or FailureKind.BUG
                self._close(active, Outcome(TrialState.FAILED, result.reason, failure))
            case AttemptStatus.RELEASED:
                self._release(active)
            case AttemptStatus.NO_DISK:
                self._release(active)
                self._on_disk_full(result)
            case AttemptStatus.LOST:
                self.on_worker_lost(active.task.id, result.reason)
        if result.status in (AttemptStatus.FINISHED, AttemptStatus.DIVERGED, AttemptStatus.FAILED) and (
            reason := self._repeated_bug.count(result)
        ):
            self._stop(StopKind.SAME_BUG, reason)

    def _on_disk_full(self, result: AttemptResult) -> None:
        self._stop(StopKind.NO_DISK, f"the disk refused to be written to: {result.reason}")

    def _close(self, active: ActiveAttempt, outcome: Outcome) -> None:
        record = finish_attempt(self._study, self._sink, active, outcome)
        self._is_waiting = False
        del self._active[active.task.id]
        self._trial_requests.complete(record.number)
        self._stop_conditions.on_trial_end(record)
        self._view.update_trial(record)
        self._on_trial_end(record)

    def _release(self, active: ActiveAttempt) -> None:
        """Its worker let go of it: it is issued again later, unless somebody ended or paused it meanwhile."""
        ended = self._trial_requests.end_outcome(active.trial.number)
        if ended is not None:
            self._close(active, ended)
            return
        if self._trial_requests.pause_if_requested(active.trial.number):
            del self._active[active.task.id]
            return
        release_attempt(self._study, self._sink, active)
        del self._active[active.task.id]

    def _on_out_of_memory(self, active: ActiveAttempt, reason: str) -> None:
        failed = self._retries.retry_with_less_memory(active.trial, reason, stopping=self.stop_reason is not None)
        if failed is not None:
            self._close(active, failed)
        else:
            del self._active[active.task.id]

    # --- workers that die ----------------------------------------------------------------------------------------

    def on_worker_lost(self, task_id: str, cause: str) -> None:
        """The worker of this attempt is gone. Told twice, it counts once. No outcome: the trial is issued again."""
        active = self._active.get(task_id)
        if active is None:
            return
        if killed := self._kills.answer(active.task.folder, cause, active.kills_at_start):
            self._on_out_of_memory(active, killed)
            return
        del self._active[task_id]
        if reason := self._retries.retry_after_loss(active.trial, cause, stopping=self.stop_reason is not None):
            self._stop(StopKind.WORKERS_LOST, reason)

    # --- when to stop --------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Time passed: look at signals, requests and the clock."""
        self._view.refresh()
        if self._signals.stop_requested:
            self._stop(StopKind.INTERRUPTED)
        stop = self._stop_conditions.poll()
        if self._stop_conditions.has_polled:  # a trial that somebody gave meanwhile waits for less
            self._is_waiting = False
        if self._stop_conditions.trial_requests:
            self._apply_trial_requests()
        if stop is not None:
            self._stop(stop.kind, stop.text)

    def _apply_trial_requests(self) -> None:
        requested, self._stop_conditions.trial_requests = self._stop_conditions.trial_requests, ()
        self._retries.release({request.trial for request in requested})  # without a worker it is as good as free
        self._trial_requests.apply(requested, {active.trial.number: active.task for active in self._active.values()})

    def _stop(self, kind: StopKind, text: str = "") -> None:
        """Start nothing more, and have every running trial checkpoint and come back."""
        if self.stop_reason is not None:
            return
        self.stop_reason = StopReason(kind, text)
        self._study.add_event("stopping", f"{kind.value}: {text}" if text else kind.value)
        for active in self._active.values():
            active.task.request_stop()
        self._retries.release()
        waiting = f"; waiting for {len(self._active)} running trials to checkpoint" if self._active else ""
        self._view.log(f"stopping ({kind.value}{f': {text}' if text else ''}){waiting}")

    def result(self) -> StopReason:
        """How it ended."""
        if self.stop_reason is not None:
            return self.stop_reason
        # The last trial's end may come between two looks at the clock and the target.
        over = None if self._study.space_reason() else self._stop_conditions.budget_reason()
        return over or remaining_reason(self._study)
