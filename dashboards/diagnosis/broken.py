"""Trials that did not get to their end by themselves: where it diverges, and what broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dashboards.diagnosis.finding import Finding, Level
from dashboards.edges import diverged_from
from dashboards.frame import show
from dashboards.sweep_frame import SweepFrame
from orchestrator.study.state import FailureKind, TrialState


def diverging_region(frame: SweepFrame) -> Iterator[Finding]:
    """A value from which on everything diverged."""
    diverged = [case for case in frame.trials if case.record.diverged]
    if not diverged:
        return
    for path in frame.paths:
        limit = diverged_from(frame, path)
        if limit is None or path == "training.seed":
            continue
        there = [c for c in diverged if c.record.params.get(path, limit - 1) >= limit]
        yield Finding(
            "diverging_region",
            Level.WARNING,
            f"Every trial with {frame.short.get(path, path)} of {show(limit)} or more diverged",
            f"{len(there)} of {len(there)} trials, against {len(diverged) - len(there)} of "
            f"{len(frame.trials) - len(there)} below it. First: trial {there[0].label}, {there[0].record.reason}.",
            f"Leave {path} >= {show(limit)} out of the next search.",
            tuple(c.label for c in there),
            path,
        )
        return
    finished = frame.in_state(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)
    yield Finding(
        "diverging_region",
        Level.WARNING if 4 * len(diverged) >= len(finished) else Level.NOTE,
        f"{len(diverged)} of {len(finished)} finished trials diverged",
        f"Trial {diverged[0].label} ({frame.words(diverged[0])}): {diverged[0].record.reason}.",
        "No single searched leaf explains it; lower the learning rate, or lengthen the warmup.",
        tuple(c.label for c in diverged),
    )


_FIX = {
    FailureKind.OUT_OF_MEMORY: "Lower training.tokens_per_micro_batch (it does not change results), or turn on "
    "training.gradient_checkpointing.",
    FailureKind.PREEMPTED: "Resume the sweep; nothing is wrong with these configurations.",
    FailureKind.DATA: "Put the rows right, or set data.bad_rows: skip.",
    FailureKind.BUG: "The traceback is in failure.txt in the trial's folder; the last lines are below.",
}


def failures(frame: SweepFrame) -> Iterator[Finding]:
    """Trials that broke, one finding a kind."""
    failed = frame.in_state(TrialState.FAILED)
    for kind, count in Counter(case.record.failure for case in failed).most_common():
        of_kind = [case for case in failed if case.record.failure is kind]
        reason, most = Counter(case.record.reason for case in of_kind).most_common(1)[0]
        yield Finding(
            "failures",
            Level.SERIOUS if not frame.ranked else Level.WARNING,
            f"{count} of {len(frame.trials)} trials failed"
            + (f": {kind.value.lower().replace('_', ' ')}" if kind is not None else ""),
            f"{most} of them with: {reason}.",
            _FIX[kind] if kind is not None else "See the reasons below.",
            tuple(case.label for case in of_kind),
        )
