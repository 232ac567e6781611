"""User requests and limits of the budget while a sweep runs.

A request for a single trial stays in the study until it has taken effect, so that a killed driver loses none. While
the whole sweep is paused, its driver waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from orchestrator.execution.messages import AttemptTask
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.interfaces import ProgressView, TrackingSink
from orchestrator.spec.estimates.sweep_plan import planned_trials
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study import budget_changes
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import budget_exceeded, target_reached
from orchestrator.study.trial_records import (
    ABANDONED,
    ANSWERED_EVENT,
    LAPSED_EVENT,
    Outcome,
    Request,
    RequestKind,
    TrialRecord,
    TrialState,
)
from trainer.results import clause
from trainer.storage.atomic_files import write_text

KILLED_STATUS = "KILLED"
"""MLflow has no status for paused runs; their tag `state` is PAUSED."""


class TrialRequests:
    """Pending user requests for single trials.

    The worker of a running trial is asked to give it back between two micro-batches; a request is completed only after
    it took effect.
    """

    def __init__(
        self, study: Study, sink: TrackingSink, view: ProgressView, on_trial_end: Callable[[TrialRecord], None]
    ) -> None:
        self._study, self._sink, self._view, self._on_trial_end = study, sink, view, on_trial_end
        self._end_requests: dict[int, Request] = {}
        self._pause_requests: dict[int, Request] = {}

    def apply(self, requests: Sequence[Request], active: Mapping[int, AttemptTask]) -> None:
        """Apply requests; those for the running trials in `active` take effect when their workers give them back."""
        for request in requests:
            number = request.trial
            assert number is not None
            if number in active:
                self._forward(number, request, active[number])
            else:
                self._apply_now(number, request)

    def _forward(self, number: int, request: Request, task: AttemptTask) -> None:
        """Store a request for a running trial until its next report, and ask its worker for that report."""
        match request.kind:
            case RequestKind.PRUNE | RequestKind.STOP:
                if number not in self._end_requests:
                    self._end_requests[number] = request
                    task.request_release(checkpoint=False)
            case RequestKind.PAUSE:
                self._pause_requests[number] = request
                if not task.release_requested:
                    self._view.log(f"trial {number} will checkpoint and pause: {request.text}")
                    task.request_release()
            case RequestKind.RETRY:
                self._complete(request, f"trial {number} is not retried: it runs")
            case _ if number not in self._pause_requests:
                self._complete(request, f"trial {number} was not paused")
            case _:
                pass  # takes effect after the pause

    def _apply_now(self, number: int, request: Request) -> None:
        record = self._study.trial(number)
        if request.kind == RequestKind.RETRY:
            self._retry(number, request, record)
        elif record is None or record.state.is_final:
            state = "unknown" if record is None else f"{record.state} already"
            self._complete(request, f"too late to {request.kind}: trial {number} is {state}")
        elif request.kind in (RequestKind.PRUNE, RequestKind.STOP):
            outcome = outcome_of_request(request)
            tags = {"state": outcome.state.value, "reason": outcome.reason}
            self._sink.end_run(str(number), status=KILLED_STATUS, tags=tags, at=time.time())
            ended = self._study.end_without_worker(number, outcome)
            self.complete(number)
            self._complete(request)
            self._view.update_trial(ended)
            self._on_trial_end(ended)
        elif request.kind == RequestKind.PAUSE:
            self.pause(number, request)
        elif request.kind == RequestKind.UNPAUSE:
            self._study.unpause(number, request.text)
            self._complete(request)
            self._view.log(f"trial {number} continues: {request.text}")

    def _retry(self, number: int, request: Request, record: TrialRecord | None) -> None:
        if record is None or record.state is not TrialState.FAILED:
            state = "unknown" if record is None else record.state
            self._complete(request, f"trial {number} is not retried: it is {state}, and only failed trials are")
            return
        self._study.retry_failed([number], request.text)
        self._complete(request)
        self._view.log(f"trial {number} is tried again: {request.text}")

    def requested_outcome(self, number: int) -> Outcome | None:
        """Return the outcome that a user requested for this trial; None without a request."""
        request = self._end_requests.get(number)
        return None if request is None else outcome_of_request(request)

    def pause_if_requested(self, number: int) -> bool:
        """Pause a released trial if requested; return whether it was."""
        request = self._pause_requests.get(number)
        if request is None:
            return False
        self.pause(number, request)
        return True

    def pause(self, number: int, request: Request) -> None:
        """Pause a trial without worker and complete the request."""
        tags = {"state": TrialState.PAUSED.value, "reason": request.text}
        self._sink.end_run(str(number), status=KILLED_STATUS, tags=tags, at=time.time())
        self._study.pause(number, request.text)
        self._complete(request)
        self._pause_requests.pop(number, None)
        paused = self._study.trial(number)
        assert paused is not None
        self._view.update_trial(paused)

    def complete(self, number: int) -> None:
        """Complete all requests for a trial that has ended, by request or before."""
        for waiting in (self._end_requests, self._pause_requests):
            request = waiting.pop(number, None)
            if request is not None:
                self._complete(request)

    def _complete(self, request: Request, message: str = "") -> None:
        self._study.complete_request(request.seq)
        if message:
            self._study.add_event(ANSWERED_EVENT, message, request.trial)
            self._view.log(message)


def end_unfinished_trials(study: Study, sink: TrackingSink, reason: str) -> list[TrialRecord]:
    """End every trial that has begun and not ended as PRUNED, in tracking and in the study; return their records."""
    outcome = Outcome(TrialState.PRUNED, f"{ABANDONED}: {reason}")
    ended: list[TrialRecord] = []
    for record in study.trials():
        if not record.state.is_final:
            tags = {"state": outcome.state.value, "reason": outcome.reason}
            sink.end_run(str(record.number), status=KILLED_STATUS, tags=tags, at=time.time())
            ended.append(study.end_without_worker(record.number, outcome))
    for request in study.requests():
        study.complete_request(request.seq)
        study.add_event(LAPSED_EVENT, f"a request to {request.kind} lapsed: {request.text}", request.trial)
    return ended


def outcome_of_request(request: Request) -> Outcome:
    """Return the outcome of a trial that a user stopped or pruned."""
    return Outcome(TrialState.PRUNED, f"by request: {request.text}")


def apply_budget_request(study: Study, view: ProgressView | None, request: Request) -> None:
    """Change the budget as requested (`orchestrate set`), in the study, in the sweep's file and in the view."""
    spec = budget_changes.with_budget(study.spec, request.text)
    changes = study.amend(spec)
    write_text(study.folder.spec, dump_spec(spec))
    study.complete_request(request.seq)
    if view is not None:
        view.change_spec(spec, planned_trials(spec))
        for change in changes:
            view.log(f"changed {change}")


_REQUEST_READ_SECONDS = 0.2
"""Seconds between two looks for requests."""
_CHECK_SECONDS = 1.0
"""Seconds between two heartbeats and checks of the budget."""


class StopConditions:
    """Why the sweep must stop: a stop request or the budget, read from the study.

    `stop_reason` is never unset, except after a pause. `trial_requests`: requests for single trials found at the last
    reading. `has_read`: whether the last call of `read_study` made all checks, those of the budget too.
    """

    def __init__(self, study: Study, view: ProgressView | None = None) -> None:
        self.stop_reason: StopReason | None = None
        self._view = view
        self.trial_requests: Sequence[Request] = ()
        self.has_read = False
        self._study, self._checked_at, self._requests_read_at = study, 0.0, 0.0
        self._target = _target_reached(study.spec, study.best()) if study.spec.budget.target is not None else ""

    def read_study(self) -> StopReason | None:
        """Read requests five times a second, the budget once a second; return why the sweep must stop, else None."""
        now = time.monotonic()
        self.has_read = False
        if self.stop_reason is not None or now - self._requests_read_at < _REQUEST_READ_SECONDS:
            return self.stop_reason
        self._requests_read_at = now
        self.has_read = now - self._checked_at >= _CHECK_SECONDS
        if self.has_read:
            self._checked_at = now
            self._study.heartbeat()
        requests = self._study.requests()
        self.trial_requests = [request for request in requests if request.trial is not None]
        for request in requests:
            if request.trial is None:
                self._apply_sweep_request(request)
        if self.has_read:
            self.stop_reason = self.stop_reason or self.budget_reason()
        return self.stop_reason

    def _apply_sweep_request(self, request: Request) -> None:
        if request.kind == RequestKind.SET:
            apply_budget_request(self._study, self._view, request)
            self._target = _target_reached(self._study.spec, self._study.best())
            return
        if request.kind == RequestKind.ABANDON:
            self.stop_reason = StopReason(StopKind.ABANDONED, request.text)
        elif request.kind == RequestKind.STOP:
            self.stop_reason = StopReason(StopKind.STOPPED, request.text or "stopped by `orchestrate stop`")
        elif request.kind == RequestKind.PAUSE and self.stop_reason is None:
            self.stop_reason = StopReason(StopKind.PAUSED, request.text)
        elif (
            request.kind == RequestKind.UNPAUSE
            and self.stop_reason is not None
            and self.stop_reason.kind is StopKind.PAUSED
        ):
            self.stop_reason = None
        self._study.complete_request(request.seq)

    def on_trial_end(self, record: TrialRecord) -> None:
        """Check an ended trial against the budget's target."""
        if self._study.spec.budget.target is not None and not self._target:
            spec = self._study.spec
            self._target = _target_reached(spec, record if spec.repeats == 1 else self._study.best())

    def budget_reason(self) -> StopReason | None:
        """Return the stop reason where the time limit or the target is reached, with the setting that extends it."""
        budget = self._study.spec.budget
        if self._target:
            hint = "`--set budget.target=VALUE` sets another target, null none"
            return StopReason(StopKind.TARGET, f"{self._target}; {hint}")
        if not budget.has_time_limit or not (over := budget_exceeded(budget, self._study.usage())):
            return None
        setting = "gpu_hours" if "gpu_hours" in over else "hours"
        usage = self._study.usage()
        used = usage.gpu_hours if setting == "gpu_hours" else usage.hours
        more = budget_changes.more_than_used(self._study.spec, self._study.snapshots(), used, getattr(budget, setting))
        return StopReason(StopKind.OUT_OF_BUDGET, f"{over}; `--set budget.{setting}={more:g}` extends it")


def _target_reached(spec: SweepSpec, record: TrialRecord | None) -> str:
    objective, target = spec.first_objective, spec.budget.target
    if spec.finalists is not None:
        return ""  # the target ends the search; finalists follow
    if record is None or not record.keeps_requirements or not target_reached(spec.budget, objective, record.value):
        return ""
    if record.complete_seeds < spec.repeats:
        return ""
    return f"trial {record.number} has {objective.metric} {record.value:g}, the target is {target:g}"


_PAUSED_POLL_SECONDS = 0.5


def wait_while_paused(study: Study, view: ProgressView, signals: SignalHandler, reason: str) -> StopReason | None:
    """Wait until the paused sweep continues (None), is stopped or interrupted; requests for single trials wait too."""
    study.pause_sweep(reason)
    view.set_activity(f"paused: {clause(reason)}; `orchestrate unpause {study.folder.name}` continues")
    while True:
        view.refresh()
        study.heartbeat()
        if signals.received:
            return StopReason(StopKind.INTERRUPTED)
        for request in study.requests():
            if request.trial is None and request.kind == RequestKind.SET:
                apply_budget_request(study, view, request)
            elif request.trial is None:
                study.complete_request(request.seq)
                if request.kind == RequestKind.ABANDON:
                    return StopReason(StopKind.ABANDONED, request.text)
                if request.kind == RequestKind.STOP:
                    return StopReason(StopKind.STOPPED, request.text)
                if request.kind == RequestKind.UNPAUSE:
                    study.unpause_sweep(request.text)
                    view.log(f"continuing: {request.text}")
                    return None
        time.sleep(_PAUSED_POLL_SECONDS)


def paused_notices(study: Study) -> list[str]:
    """Return notices about an ended pause of the sweep and about trials that are still paused."""
    name = study.folder.name
    notices: list[str] = []
    if reason := study.pause_reason():
        notices.append(f"{name} was paused when its last driver ended ({reason}): it continues now")
    continuing = {request.trial for request in study.requests() if request.kind == RequestKind.UNPAUSE}
    for record in study.trials():
        if record.state is TrialState.PAUSED and record.number not in continuing:
            hint = f"`orchestrate unpause {name} {record.number}` continues it"
            notices.append(f"trial {record.number} stays paused ({record.reason}): {hint}")
    return notices


def remaining_reason(study: Study) -> StopReason:
    """Return the stop reason of a sweep without trials to run: finished, or only paused trials are left."""
    paused = [str(r.number) for r in study.trials() if r.state is TrialState.PAUSED]
    if paused:
        hint = f"`orchestrate unpause {study.folder.name} {paused[0]}` continues {'it' if len(paused) == 1 else 'one'}"
        return StopReason(StopKind.ONLY_PAUSED_LEFT, f"{', '.join(paused)}; {hint}")
    return StopReason(StopKind.FINISHED, study.no_more_trials_reason())
