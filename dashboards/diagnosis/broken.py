"""Trials that did not get to their end by themselves: where it diverges, and what broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dashboards.diagnosis.finding import Finding, Level
from dashboards.edges import diverged_from
from dashboards.frame import show
from dashboards.sweep_frame import SweepFrame, TrialCase
from orchestrator.study.state import FailureKind, TrialState


def diverging_region(frame: SweepFrame) -> Iterator[Finding]:
    """A value from which on everything diverged."""
    diverged = [case for case in frame.trials if case.record.diverged]
    if not diverged:
        return
    limits = {path: limit for path in frame.paths if (limit := diverged_from(frame, path)) is not None}
    limits.pop("training.seed", None)
    explained = {p: [c for c in diverged if c.record.params.get(p, x - 1) >= x] for p, x in limits.items()}
    if explained:
        path = max(explained, key=lambda p: len(explained[p]))  # the leaf that explains most
        limit, there = limits[path], explained[path]
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
    if (found := _by_value(frame, diverged)) is not None:
        yield found
        return
    finished = frame.in_state(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)
    yield Finding(
        "diverging_region",
        Level.SERIOUS if not frame.ranked else Level.WARNING if 4 * len(diverged) >= len(finished) else Level.NOTE,
        f"{len(diverged)} of {len(finished)} finished trials diverged",
        f"Trial {diverged[0].label} ({frame.words(diverged[0])}): {diverged[0].record.reason}.",
        "No single searched leaf explains it; lower the learning rate, or lengthen the warmup.",
        tuple(c.label for c in diverged),
    )


def _by_value(frame: SweepFrame, diverged: list[TrialCase]) -> Finding | None:
    """Values of one leaf with which all diverged, and without which none did: small ones, or names."""
    ended = frame.in_state(TrialState.COMPLETE, TrialState.PRUNED)
    for path in frame.paths:
        if path == "training.seed" or frame.space.endless(path):
            continue
        safe = {repr(c.record.params.get(path)) for c in ended if not c.record.diverged}
        bad = {repr(value): value for c in diverged if (value := c.record.params.get(path)) is not None}
        if not safe or safe & bad.keys() or any(path not in c.record.params for c in diverged):
            continue
        values = " or ".join(show(value) for value in bad.values())
        return Finding(
            "diverging_region",
            Level.WARNING,
            f"Every trial with {frame.short.get(path, path)} {values} diverged",
            f"{len(diverged)} of {len(diverged)} trials, against none with another value. First: trial "
            f"{diverged[0].label}, {diverged[0].record.reason}.",
            f"Leave {path} = {values} out of the next search.",
            tuple(c.label for c in diverged),
            path,
        )
    return None


_FIX = {
    FailureKind.OUT_OF_MEMORY: "Lower training.tokens_per_micro_batch (it does not change results), or turn on "
    "training.gradient_checkpointing.",
    FailureKind.PREEMPTED: "Resume the sweep; nothing is wrong with these configurations.",
    FailureKind.DATA: "Put the rows right, or raise data.max_bad_share.",
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
