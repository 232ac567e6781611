"""The driver's side of every trial: claim, tell, observe, close. Decides when to stop. Knows no Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType

import yaml

from orchestrator.engine.failures import FAILURE_FILE
from orchestrator.engine.messages import End, EndKind, Job, Report
from orchestrator.engine.stopping import Interrupt, Stop, StopKind
from orchestrator.engine.view import View
from orchestrator.engine.wishes import Wishes
from orchestrator.folders import SweepFolder
from orchestrator.study.guard import judge
from orchestrator.study.records import Trial, TrialRecord
from orchestrator.study.state import FailureKind, Outcome, TrialState
from orchestrator.study.study import Study
from orchestrator.tracking.sink import Sink
from trainer.config import TrialConfig

SAME_BUGS = 3
LOSSES = 3
"""Workers lost by one trial in one driver's life before the sweep stops, resumably."""
_STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAILED: "FAILED"}
_KEPT = ("trial.yaml", "samples.jsonl", FAILURE_FILE)
"""Files of an attempt that tracking shows."""


@dataclass(slots=True)
class _Live:
    trial: Trial
    job: Job
    told: dict[str, str] = field(default_factory=dict[str, str])


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
    ) -> None:
        self._study, self._sink, self._view, self._interrupt = study, sink, view, interrupt
        self._folder: SweepFolder = study.folder
        self._place, self._on_closed = place, on_closed
        self._live: dict[str, _Live] = {}
        self._again: deque[Trial] = deque()
        self._losses: dict[int, int] = {}
        self._wishes = Wishes(study)
        self._last_bug, self._same_bugs = "", 0
        self._exhausted = False
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
        """The next attempt to start, if a slot is free and there is one."""
        if self.stop is not None or len(self._live) >= slots:
            return None
        trial = self._again.popleft() if self._again else self._study.claim()
        if trial is None:
            self._exhausted = not self._live
            return None
        return self._issue(trial)

    def _issue(self, trial: Trial) -> Job:
        run, folder = str(trial.number), self._folder.attempt(trial.number, trial.attempt)
        config = self._place(trial.config)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trial.yaml").write_text(
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        earlier = [self._folder.attempt(trial.number, k) for k in range(1, trial.attempt)]
        job = Job(run, trial.attempt, config.model_dump_json(), folder, tuple(p for p in earlier if p.is_dir()))
        tags = {"state": TrialState.RUNNING.value, "attempt": str(trial.attempt)}
        self._sink.start(run, name=f"trial {trial.number}", params=config.leaves(), tags=tags, at=time.time())
        self._live[job.id] = _Live(trial, job)
        self._view.trial_changed(self._record(trial.number))
        return job

    def _record(self, number: int) -> TrialRecord:
        return next(r for r in self._study.trials() if r.number == number)

    # --- what workers say ----------------------------------------------------------------------------------------

    def heard(self, job_id: str, report: Report) -> bool:
        """Take a report; whether the attempt goes on."""
        live = self._live.get(job_id)
        if live is None:
            return False
        trial, run = live.trial, str(live.trial.number)
        self._tell_counters(live, report.pid, report.counters)
        verdict = None
        if report.points:
            self._sink.points(run, report.points, at=time.time())
            verdict = self._study.observe(trial, report.points)
            self._view.points(trial.number, report.points)
        if report.end is not None and report.end.kind is not EndKind.FINISHED:
            self._end(live, report.end)
        elif verdict is not None and verdict.stop:
            diverged = judge(report.points).stop
            self._close(live, Outcome(TrialState.PRUNED, verdict.reason, diverged=diverged))
        elif report.end is not None:
            self._end(live, report.end)
        elif trial.number in self._wishes.trials:
            self._close(live, Outcome(TrialState.PRUNED, self._wishes.trials.pop(trial.number)))
        else:
            return True
        return False

    def _tell_counters(self, live: _Live, pid: int, counters: Mapping[str, int]) -> None:
        """Tags say by which worker a trial ran, and what that worker had loaded by then."""
        tags = {"worker.pid": str(pid)} | {f"worker.{name}": str(count) for name, count in counters.items()}
        fresh = {name: value for name, value in tags.items() if live.told.get(name) != value}
        if fresh:
            live.told |= fresh
            self._sink.tag(str(live.trial.number), fresh)

    def _end(self, live: _Live, end: End) -> None:
        match end.kind:
            case EndKind.FINISHED:
                self._close(live, Outcome(TrialState.COMPLETE))
            case EndKind.DIVERGED:
                self._close(live, Outcome(TrialState.PRUNED, end.reason, diverged=True))
            case EndKind.FAILED:
                failure = end.failure or FailureKind.BUG
                self._close(live, Outcome(TrialState.FAILED, end.reason, failure))
            case EndKind.RELEASED:
                self._release(live)
            case EndKind.NO_DISK:
                self._release(live)
                self._halt(StopKind.NO_DISK, f"the disk refused to be written to: {end.reason}")
        if end.kind in (EndKind.FINISHED, EndKind.DIVERGED, EndKind.FAILED):
            self._count_bug(end)

    def _close(self, live: _Live, outcome: Outcome) -> None:
        run = str(live.trial.number)
        tags = {"state": outcome.state.value, "reason": outcome.reason}
        tags |= {"failure": outcome.failure.value} if outcome.failure else {}
        tags |= {"diverged": "true"} if outcome.diverged else {}
        for name in _KEPT:
            if (live.job.folder / name).is_file():
                self._sink.artifact(run, live.job.folder / name)
        self._sink.end(run, status=_STATUS[outcome.state], tags=tags, at=time.time())
        record = self._study.close(live.trial, outcome)
        if record.state is not outcome.state:  # the study knows better, e.g. a goal never reported
            tags = {"state": record.state.value, "reason": record.reason}
            self._sink.end(run, status=_STATUS[record.state], tags=tags, at=time.time())
        counted = " ".join(f"{name}={value}" for name, value in sorted(live.told.items()))
        self._study.note("worker", counted or "no worker", live.trial.number)
        del self._live[live.job.id]
        self._view.trial_changed(record)
        self._on_closed(record)

    def _release(self, live: _Live) -> None:
        tags = {"state": "INTERRUPTED"}
        self._sink.end(str(live.trial.number), status="KILLED", tags=tags, at=time.time())
        self._study.release(live.trial)
        del self._live[live.job.id]

    def _count_bug(self, end: End) -> None:
        if end.kind is not EndKind.FAILED or (end.failure or FailureKind.BUG) is not FailureKind.BUG:
            self._last_bug, self._same_bugs = "", 0
            return
        self._same_bugs = self._same_bugs + 1 if end.signature == self._last_bug else 1
        self._last_bug = end.signature
        if max(self._same_bugs, self._study.consecutive_bugs()[0]) >= SAME_BUGS:
            self._halt(StopKind.SAME_BUG, f"the same bug ended {SAME_BUGS} trials in a row: {end.reason}")

    # --- workers that die ----------------------------------------------------------------------------------------

    def lost(self, job_id: str, cause: str) -> None:
        """The worker of this attempt is gone. Told twice, it counts once. No outcome: the trial is issued again."""
        live = self._live.pop(job_id, None)
        if live is None:
            return
        number = live.trial.number
        self._losses[number] = self._losses.get(number, 0) + 1
        self._study.note("worker lost", f"attempt {live.trial.attempt}: {cause}", number)
        if self.stop is not None:
            self._study.release(live.trial)
        elif self._losses[number] >= LOSSES:
            self._study.release(live.trial)
            self._halt(StopKind.WORKERS_LOST, f"trial {number} lost its worker {LOSSES} times; last: {cause}")
        else:
            self._view.say(f"trial {number} lost its worker ({cause}); it is issued again from its newest checkpoint")
            self._again.append(self._study.reissue(live.trial))

    # --- when to stop --------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Time passed: look at signals, requests and the clock."""
        self._view.tick()
        if self._interrupt.asked:
            self._halt(StopKind.INTERRUPTED)
        stop = self._wishes.ask()
        if stop is not None:
            self._halt(stop.kind, stop.text)

    def _halt(self, kind: StopKind, text: str = "") -> None:
        """Start nothing more, and have every running trial checkpoint and come back."""
        if self.stop is not None:
            return
        self.stop = Stop(kind, text)
        self._study.note("stopping", f"{kind.value}: {text}" if text else kind.value)
        for live in self._live.values():
            live.job.ask_to_stop()
        while self._again:
            self._study.release(self._again.popleft())
        waiting = f"; waiting for {len(self._live)} running trials to checkpoint" if self._live else ""
        self._view.say(f"stopping ({kind.value}{f': {text}' if text else ''}){waiting}")

    def result(self) -> Stop:
        """How it ended."""
        return self.stop or replace(Stop(StopKind.FINISHED), text=self._study.exhausted())
