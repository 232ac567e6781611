"""The driver's side of every trial: claim, tell, observe, close. Decides when to stop. Knows no Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import yaml

from orchestrator.engine import memory
from orchestrator.engine.failures import FAILURE_FILE
from orchestrator.engine.hands import Hands
from orchestrator.engine.messages import End, EndKind, Job, Report
from orchestrator.engine.stopping import Interrupt, Stop, StopKind
from orchestrator.engine.view import View
from orchestrator.engine.wishes import Wishes
from orchestrator.folders import SweepFolder
from orchestrator.study.records import NotYet, Trial, TrialRecord
from orchestrator.study.state import FailureKind, Outcome, TrialState
from orchestrator.study.study import Study
from orchestrator.tracking.names import ended_tags
from orchestrator.tracking.sink import Sink
from trainer.config import TrialConfig
from trainer.failpoint import failpoint
from trainer.report import GO_ON

SAME_BUGS = 3
LOSSES = 3
"""Workers lost by one trial in one driver's life before the sweep stops, resumably: who resumes it has looked."""
_STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAILED: "FAILED"}
_KEPT = ("trial.yaml", "samples.jsonl", FAILURE_FILE)
"""Files of an attempt that tracking shows."""


@dataclass(slots=True)
class _Live:
    trial: Trial
    job: Job
    kills: int
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
        longest: int = 1,
    ) -> None:
        """`longest`: tokens of the data's longest row, below which no micro-batch can be made smaller."""
        self._study, self._sink, self._view, self._interrupt = study, sink, view, interrupt
        self._folder: SweepFolder = study.folder
        self._place, self._on_closed, self._longest = place, on_closed, longest
        self._live: dict[str, _Live] = {}
        self._again: deque[Trial] = deque()
        self._losses: dict[int, int] = {}
        self._wishes = Wishes(study)
        self._hands = Hands(study, sink, view, on_closed)
        self._last_bug, self._same_bugs = "", 0
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
        trial = self._again.popleft() if self._again else self._study.claim()
        if isinstance(trial, NotYet):
            self._waits = True
            self._exhausted = not self._live
            return None
        if trial is None:
            self._exhausted = not self._live
            return None
        return self._issue(trial)

    def _issue(self, trial: Trial) -> Job:
        run, folder = str(trial.number), self._folder.attempt(trial.number, trial.attempt)
        configured = self._place(trial.config)
        config = memory.fitted(configured, trial)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trial.yaml").write_text(
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        earlier = [self._folder.attempt(trial.number, k) for k in range(1, trial.attempt)]
        job = Job(run, trial.attempt, config.model_dump_json(), folder, tuple(p for p in earlier if p.is_dir()))
        record = self._record(trial.number)
        tags = {"state": TrialState.RUNNING.value, "attempt": str(trial.attempt)}
        tags |= {"origin": record.origin} if record.origin else {}
        tags |= {"clone.of": str(record.parent)} if record.parent is not None else {}
        if config is not configured:  # the params stay what was asked for
            tags["memory.tokens_per_micro_batch"] = str(config.training.tokens_per_micro_batch)
        self._sink.start(run, name=f"trial {trial.number}", params=configured.leaves(), tags=tags, at=time.time())
        self._live[job.id] = _Live(trial, job, memory.kernel_kills())
        self._view.trial_changed(record)
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
        if end.kind in (EndKind.FINISHED, EndKind.DIVERGED, EndKind.FAILED):
            self._count_bug(end)

    def _no_disk(self, end: End) -> None:
        self._halt(StopKind.NO_DISK, f"the disk refused to be written to: {end.reason}")

    def _close(self, live: _Live, outcome: Outcome) -> None:
        run = str(live.trial.number)
        tags = ended_tags(live.trial.number, outcome)
        for name in _KEPT:
            # A trial whose ending an earlier attempt wrote has its files there.
            places = [folder / name for folder in (live.job.folder, *reversed(live.job.earlier))]
            if (found := next((place for place in places if place.is_file()), None)) is not None:
                self._sink.artifact(run, found)
        self._sink.end(run, status=_STATUS[outcome.state], tags=tags, at=time.time())
        failpoint("trial.told")
        record = self._study.close(live.trial, outcome)
        failpoint("trial.closed")
        if record.state is not outcome.state:  # the study knows better, e.g. a goal never reported
            known = Outcome(record.state, record.reason, record.failure, diverged=record.diverged)
            tags = ended_tags(record.number, known)
            self._sink.end(run, status=_STATUS[record.state], tags=tags, at=time.time())
        counted = " ".join(f"{name}={value}" for name, value in sorted(live.told.items()))
        self._study.note("worker", counted or "no worker", live.trial.number)
        self._waits = False
        del self._live[live.job.id]
        self._hands.answered(record.number)
        self._wishes.closed(record)
        self._view.trial_changed(record)
        self._on_closed(record)

    def _release(self, live: _Live) -> None:
        """Its worker let go of it: it is issued again later, unless somebody ended or paused it meanwhile."""
        ended = self._hands.ends(live.trial.number)
        if ended is not None:
            self._close(live, ended)
            return
        if self._hands.pauses(live.trial.number):
            del self._live[live.job.id]
            return
        tags = {"state": "INTERRUPTED"}
        self._sink.end(str(live.trial.number), status="KILLED", tags=tags, at=time.time())
        self._study.release(live.trial)
        del self._live[live.job.id]

    def _no_memory(self, live: _Live, why: str) -> None:
        """The same trial again from its newest checkpoint with half the micro-batch; at one pair it has failed."""
        trial = live.trial
        tokens = memory.smaller(memory.in_effect(trial), self._longest)
        if tokens is None:
            self._close(live, Outcome(TrialState.FAILED, memory.given_up(trial, why), FailureKind.OUT_OF_MEMORY))
            return
        self._live.pop(live.job.id, None)
        again = self._study.reissue(trial, tokens, why)
        if self.stop is not None:
            self._study.release(again)
            return
        self._view.say(
            f"trial {trial.number} ran out of memory ({why}); it goes on from its newest checkpoint with {tokens} "
            "tokens per micro-batch, as do the trials after it"
        )
        self._again.append(again)

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
        live = self._live.get(job_id)
        if live is None:
            return
        number = live.trial.number
        if killed := memory.killed_for_memory(cause, memory.kernel_kills() - live.kills):
            self._no_memory(live, killed)
            return
        del self._live[job_id]
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
        if self._wishes.trials:
            self._apply_hands()
        if stop is not None:
            self._halt(stop.kind, stop.text)

    def _apply_hands(self) -> None:
        asked, self._wishes.trials = self._wishes.trials, ()
        self._waits = False
        numbers = {request.trial for request in asked}
        for trial in [t for t in self._again if t.number in numbers]:  # no worker has it yet: it is as good as free
            self._again.remove(trial)
            self._study.release(trial)
        self._hands.apply(asked, {live.trial.number: live.job for live in self._live.values()})

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
        if self.stop is not None:
            return self.stop
        aside = [str(r.number) for r in self._study.trials() if r.state is TrialState.PAUSED]
        if aside:
            first = f"orchestrate unpause {self._folder.name} {aside[0]}"
            return Stop(StopKind.PUT_ASIDE, f"nothing is left to do but what is paused: {', '.join(aside)}; `{first}`")
        return Stop(StopKind.FINISHED, self._study.exhausted())
