"""The driver's side of every trial: claim, tell, observe, close. Decides when to stop. Knows no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from orchestrator.execution import retry_policy
from orchestrator.execution.messages import MIRROR, End, EndKind, Job, Report
from orchestrator.execution.retry_policy import Retries, SameBug
from orchestrator.execution.stop_reasons import Interrupt, Stop, StopKind
from orchestrator.execution.trial_lifecycle import Beginning, Live, close, release
from orchestrator.execution.user_requests import Hands, Wishes, left_over
from orchestrator.interfaces import Sink, View
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, NotYet, Outcome, TrialRecord, TrialState
from trainer.config.trial import TrialConfig
from trainer.results import GO_ON


class Conductor:
    """One run of the engine over a study. The sink is always told before the study commits."""

    def __init__(
        self,
        study: Study,
        sink: Sink,
        view: View,
        interrupt: Interrupt,
        *,
        place: Callable[[TrialConfig], TrialConfig],
        on_closed: Callable[[TrialRecord], None],
        longest: int = 1,
    ) -> None:
        """`longest`: tokens of the data's longest row, below which no micro-batch can be made smaller."""
        self._study, self._sink, self._view, self._interrupt = study, sink, view, interrupt
        self._beginning = Beginning(study, sink, view, place)
        self._on_closed = on_closed
        self._live: dict[str, Live] = {}
        self._again = Retries(study, view, longest)
        self._wishes = Wishes(study)
        self._hands = Hands(study, sink, view, on_closed)
        self._bugs = SameBug(study)
        self._kills = retry_policy.KernelKills()
        self._exhausted = False
        self._waits = False
        self.stop: Stop | None = None
        self.error: BaseException | None = None
        """What went wrong inside a call from Tune, which would wrap it beyond recognition."""

    # --- as a context: remembers what passes through ---------------------------------------------------------------

    def __enter__(self) -> Conductor:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self.error = self.error or error

    # --- what runs next ------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing will."""
        return not self._live and not self._again and (self.stop is not None or self._exhausted)

    def next(self, slots: int) -> Job | None:
        """The next attempt to start, if a slot is free and there is one; a slot is idle while the study says wait."""
        if self.stop is not None or len(self._live) >= slots:
            return None
        if self._waits and not self._again:
            self._exhausted = not self._live  # then what it waits for is paused
            return None  # nothing has ended since the study said so
        trial = self._again.pop() if self._again else self._study.claim()
        if isinstance(trial, NotYet):
            self._waits = True
            self._exhausted = not self._live
            return None
        if trial is None:
            self._exhausted = not self._live
            return None
        live = self._beginning.begin(trial)
        self._live[live.job.id] = live
        return live.job

    def began(self, job_id: str) -> None:
        """A worker process has this attempt: until now it waited for a slot, which is no GPU time. Told again, nothing
        changes."""
        if (live := self._live.get(job_id)) is not None:
            self._study.begun(live.trial)

    # --- what workers say ----------------------------------------------------------------------------------------

    def heard(self, job_id: str, report: Report) -> bool:
        """Take a report; whether the attempt goes on."""
        live = self._live.get(job_id)
        if live is None:
            return False
        trial, run = live.trial, str(live.trial.number)
        self._study.begun(trial)
        live.kills = retry_policy.kernel_kills()  # none of these was this worker
        if tags := live.news(report.pid, report.counters):
            self._sink.tag(run, tags)
        for told in report.said:
            self._study.note(MIRROR, told, trial.number)
            self._view.say(f"trial {trial.number}: {told}")
        verdict = GO_ON
        if report.points:
            counted, verdict = self._study.accept(trial, report.points)
            if counted:
                self._sink.points(run, counted, at=time.time())
                self._study.observe(trial, counted)
                self._view.points(trial.number, counted)
        if verdict.stop:  # before any end: it came after the point at which the trial was to stop
            self._close(live, Outcome(TrialState.PRUNED, verdict.reason, diverged=verdict.diverged))
            if report.end is not None and report.end.kind is EndKind.NO_DISK:
                self._no_disk(report.end)
        elif report.end is not None:
            self._end(live, report.end)
        elif (ended := self._hands.ends(trial.number)) is not None:
            self._close(live, ended)
        else:
            return True
        return False

    def _end(self, live: Live, end: End) -> None:
        match end.kind:
            case EndKind.FINISHED:
                self._close(live, Outcome(TrialState.COMPLETE))
            case EndKind.DIVERGED:
                self._close(live, Outcome(TrialState.PRUNED, f"diverged: {end.reason}", diverged=True))
            case EndKind.FAILED if end.failure is FailureKind.OUT_OF_MEMORY:
                self._no_memory(live, end.reason)
            case EndKind.FAILED:
                failure = end.failure or FailureKind.BUG
                self._close(live, Outcome(TrialState.FAILED, end.reason, failure))
            case EndKind.RELEASED:
                self._release(live)
            case EndKind.NO_DISK:
                self._release(live)
                self._no_disk(end)
            case EndKind.LOST:
                self.lost(live.job.id, end.reason)
        if end.kind in (EndKind.FINISHED, EndKind.DIVERGED, EndKind.FAILED) and (why := self._bugs.count(end)):
            self._halt(StopKind.SAME_BUG, why)

    def _no_disk(self, end: End) -> None:
        self._halt(StopKind.NO_DISK, f"the disk refused to be written to: {end.reason}")

    def _close(self, live: Live, outcome: Outcome) -> None:
        record = close(self._study, self._sink, live, outcome)
        self._waits = False
        del self._live[live.job.id]
        self._hands.answered(record.number)
        self._wishes.closed(record)
        self._view.trial_changed(record)
        self._on_closed(record)

    def _release(self, live: Live) -> None:
        """Its worker let go of it: it is issued again later, unless somebody ended or paused it meanwhile."""
        ended = self._hands.ends(live.trial.number)
        if ended is not None:
            self._close(live, ended)
            return
        if self._hands.pauses(live.trial.number):
            del self._live[live.job.id]
            return
        release(self._study, self._sink, live)
        del self._live[live.job.id]

    def _no_memory(self, live: Live, why: str) -> None:
        failed = self._again.smaller(live.trial, why, stopping=self.stop is not None)
        if failed is not None:
            self._close(live, failed)
        else:
            del self._live[live.job.id]

    # --- workers that die ----------------------------------------------------------------------------------------

    def lost(self, job_id: str, cause: str) -> None:
        """The worker of this attempt is gone. Told twice, it counts once. No outcome: the trial is issued again."""
        live = self._live.get(job_id)
        if live is None:
            return
        if killed := self._kills.answer(live.job.folder, cause, live.kills):
            self._no_memory(live, killed)
            return
        del self._live[job_id]
        if why := self._again.lost(live.trial, cause, stopping=self.stop is not None):
            self._halt(StopKind.WORKERS_LOST, why)

    # --- when to stop --------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Time passed: look at signals, requests and the clock."""
        self._view.tick()
        if self._interrupt.asked:
            self._halt(StopKind.INTERRUPTED)
        stop = self._wishes.ask()
        if self._wishes.looked:  # a trial that somebody gave meanwhile waits for less
            self._waits = False
        if self._wishes.trials:
            self._apply_hands()
        if stop is not None:
            self._halt(stop.kind, stop.text)

    def _apply_hands(self) -> None:
        asked, self._wishes.trials = self._wishes.trials, ()
        self._again.give_back({request.trial for request in asked})  # without a worker it is as good as free
        self._hands.apply(asked, {live.trial.number: live.job for live in self._live.values()})

    def _halt(self, kind: StopKind, text: str = "") -> None:
        """Start nothing more, and have every running trial checkpoint and come back."""
        if self.stop is not None:
            return
        self.stop = Stop(kind, text)
        self._study.note("stopping", f"{kind.value}: {text}" if text else kind.value)
        for live in self._live.values():
            live.job.ask_to_stop()
        self._again.give_back()
        waiting = f"; waiting for {len(self._live)} running trials to checkpoint" if self._live else ""
        self._view.say(f"stopping ({kind.value}{f': {text}' if text else ''}){waiting}")

    def result(self) -> Stop:
        """How it ended."""
        if self.stop is not None:
            return self.stop
        # The last trial's end may come between two looks at the clock and the target.
        over = None if self._study.tried() else self._wishes.over()
        return over or left_over(self._study)
