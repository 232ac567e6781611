"""Costs of trials, savings by stopping early, and the attempts of a sweep over slots, read from its events."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dashboards.analysis.sweep_frame import TrialFrame
from orchestrator.study.trial_records import Event, TrialState


@dataclass(frozen=True, slots=True)
class Costs:
    """Sums over trials. `tokens` is None where some trial logged none."""

    trials: int
    seconds: float
    """In workers' hands, all attempts."""
    updates: int
    pairs: int
    tokens: float | None
    saved_updates: int
    saved_seconds: float
    """What the pruned trials had left to do, at each one's own pace."""


def costs(trials: Sequence[TrialFrame]) -> Costs:
    """The cost of these trials together."""
    saved_updates, saved_seconds = 0, 0.0
    for trial in trials:
        if trial.record.state is TrialState.PRUNED and trial.steps is not None and trial.curves.step > 0:
            left = max(0, trial.steps - trial.curves.step)
            saved_updates += left
            saved_seconds += trial.record.seconds * left / trial.curves.step
    counted = [trial.tokens for trial in trials if trial.curves.step > 0]
    tokens = [count for count in counted if count is not None]
    return Costs(
        trials=len(trials),
        seconds=sum(trial.record.seconds for trial in trials),
        updates=sum(trial.curves.step for trial in trials),
        pairs=sum(trial.curves.step * trial.config.training.pairs_per_update for trial in trials),
        tokens=sum(tokens) if tokens and len(tokens) == len(counted) else None,
        saved_updates=saved_updates,
        saved_seconds=saved_seconds,
    )


_END_EVENTS = frozenset({*(s.lower() for s in TrialState if s.finished), "released", "worker lost"})
_PID = re.compile(r"worker\.pid=(\d+)")


@dataclass(frozen=True, slots=True)
class AttemptSpan:
    """One attempt: seconds since the epoch, the slot it took (0, 1, ...), and the event that ended it."""

    trial: int
    attempt: int
    begun: float
    ended: float
    end: str
    text: str
    slot: int
    pid: str = ""
    """The worker process, where the study knows it."""


def attempt_spans(events: Sequence[Event], now: float) -> list[AttemptSpan]:
    """Every attempt, in order of its beginning. One that has not ended lasts until `now`."""
    open_: dict[int, tuple[int, float]] = {}
    done: list[tuple[int, int, float, float, str, str]] = []
    pids: dict[tuple[int, int], str] = {}
    newest: dict[int, int] = {}
    for event in events:
        trial = event.trial
        if trial is None:
            continue
        if event.kind == "issued":
            if trial in open_:  # its driver died without a word
                attempt, begun = open_.pop(trial)
                done.append((trial, attempt, begun, _last_event_before(events, event), "lost", "the driver died"))
            newest[trial] = newest.get(trial, 0) + 1
            open_[trial] = (newest[trial], event.at)
        elif event.kind in _END_EVENTS and trial in open_:
            attempt, begun = open_.pop(trial)
            done.append((trial, attempt, begun, event.at, event.kind, event.text))
        elif event.kind == "worker" and (found := _PID.search(event.text)):
            pids[trial, newest.get(trial, 1)] = found.group(1)
    done += [(trial, attempt, begun, max(begun, now), "running", "") for trial, (attempt, begun) in open_.items()]
    return _in_slots(sorted(done, key=lambda row: row[2]), pids)


def _last_event_before(events: Sequence[Event], event: Event) -> float:
    """When the sweep was last heard of before a later driver issued this trial again."""
    earlier = [e.at for e in events if e.seq < event.seq and e.kind != "driver"]
    return max(earlier, default=event.at)


def _in_slots(
    rows: Sequence[tuple[int, int, float, float, str, str]], pids: dict[tuple[int, int], str]
) -> list[AttemptSpan]:
    """The first free slot each, rather the one whose last worker was the same process."""
    free_from: list[float] = []
    last_pid: list[str] = []
    out: list[AttemptSpan] = []
    for trial, attempt, begun, ended, end, text in rows:
        pid = pids.get((trial, attempt), "")
        free = [k for k, at in enumerate(free_from) if at <= begun + 1e-6]
        slot = next((k for k in free if pid and last_pid[k] == pid), free[0] if free else len(free_from))
        if slot == len(free_from):
            free_from.append(0.0)
            last_pid.append("")
        free_from[slot], last_pid[slot] = ended, pid
        out.append(AttemptSpan(trial, attempt, begun, ended, end, text, slot, pid))
    return out


def idle_gaps(found: Sequence[AttemptSpan], least: float) -> list[tuple[float, float]]:
    """Stretches in which nothing ran for at least `least` seconds: the sweep was stopped."""
    gaps: list[tuple[float, float]] = []
    until = found[0].begun if found else 0.0
    for span in found:
        if span.begun - until >= least:
            gaps.append((until, span.begun))
        until = max(until, span.ended)
    return gaps
