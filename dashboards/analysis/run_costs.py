"""Costs of trials, savings by pruning, and the attempts of a sweep by slot, read from its events."""

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
    """Running time on workers, all attempts."""
    updates: int
    pairs: int
    tokens: float | None
    saved_updates: int
    saved_seconds: float
    """Remaining updates of pruned trials at each trial's own seconds per update."""


def costs(trials: Sequence[TrialFrame]) -> Costs:
    """Return the summed cost of these trials."""
    saved_updates, saved_seconds = 0, 0.0
    for trial in trials:
        if (
            trial.record.state is TrialState.PRUNED
            and trial.planned_updates is not None
            and trial.curves.last_update > 0
        ):
            left = max(0, trial.planned_updates - trial.curves.last_update)
            saved_updates += left
            saved_seconds += trial.record.seconds * left / trial.curves.last_update
    counted = [trial.tokens for trial in trials if trial.curves.last_update > 0]
    tokens = [count for count in counted if count is not None]
    return Costs(
        trials=len(trials),
        seconds=sum(trial.record.seconds for trial in trials),
        updates=sum(trial.curves.last_update for trial in trials),
        pairs=sum(trial.curves.last_update * trial.config.training.pairs_per_update for trial in trials),
        tokens=sum(tokens) if tokens and len(tokens) == len(counted) else None,
        saved_updates=saved_updates,
        saved_seconds=saved_seconds,
    )


_END_EVENTS = frozenset({*(s.lower() for s in TrialState if s.is_final), "released", "worker lost"})
_PID = re.compile(r"worker\.pid=(\d+)")


@dataclass(frozen=True, slots=True)
class AttemptSpan:
    """One attempt: start and end in seconds since the epoch, its slot (0, 1, ...), and the event that ended it."""

    trial: int
    attempt: int
    begun: float
    ended: float
    end: str
    text: str
    slot: int
    pid: str = ""
    """Process id of the worker; empty where no event has it."""


def attempt_spans(events: Sequence[Event], now: float) -> list[AttemptSpan]:
    """Return all attempts by start time; an attempt without an end event lasts until `now` (epoch seconds)."""
    open_: dict[int, tuple[int, float]] = {}
    ended: list[tuple[int, int, float, float, str, str]] = []
    pids: dict[tuple[int, int], str] = {}
    newest: dict[int, int] = {}
    for event in events:
        trial = event.trial
        if trial is None:
            continue
        if event.kind == "issued":
            if trial in open_:  # its driver was killed before it could record an end
                attempt, begun = open_.pop(trial)
                ended.append((trial, attempt, begun, _last_event_before(events, event), "lost", "the driver died"))
            newest[trial] = newest.get(trial, 0) + 1
            open_[trial] = (newest[trial], event.at)
        elif event.kind in _END_EVENTS and trial in open_:
            attempt, begun = open_.pop(trial)
            ended.append((trial, attempt, begun, event.at, event.kind, event.text))
        elif event.kind == "worker" and (found := _PID.search(event.text)):
            pids[trial, newest.get(trial, 1)] = found.group(1)
    ended += [(trial, attempt, begun, max(begun, now), "running", "") for trial, (attempt, begun) in open_.items()]
    return _in_slots(sorted(ended, key=lambda row: row[2]), pids)


def _last_event_before(events: Sequence[Event], event: Event) -> float:
    """Return the time of the last event before a later driver issued this trial again."""
    earlier = [e.at for e in events if e.seq < event.seq and e.kind != "driver"]
    return max(earlier, default=event.at)


def _in_slots(
    rows: Sequence[tuple[int, int, float, float, str, str]], pids: dict[tuple[int, int], str]
) -> list[AttemptSpan]:
    """Assign each attempt a free slot, preferably the one whose last worker was the same process."""
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
    """Return the (start, end) intervals of at least `least` seconds in which no attempt ran."""
    gaps: list[tuple[float, float]] = []
    until = found[0].begun if found else 0.0
    for span in found:
        if span.begun - until >= least:
            gaps.append((until, span.begun))
        until = max(until, span.ended)
    return gaps
