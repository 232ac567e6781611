"""What the search itself can and cannot tell, and where to look next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dashboards.certainty import Certainty
from dashboards.diagnosis.finding import Finding, Level
from dashboards.effects import compared, diverged_from, edge, levels, told_apart
from dashboards.frame import show
from dashboards.sweep_frame import SweepFrame
from orchestrator.study.state import FailureKind, TrialState

_LISTED = 6


def at_the_edge(frame: SweepFrame) -> Iterator[Finding]:
    """The best trial lies at an end of a searched leaf: the optimum may lie outside."""
    for path in frame.paths:
        found = edge(frame, path)
        if found is None or path == "training.seed":
            continue
        best = {level.value: level.best for level in levels(frame, path)}
        shown = ", ".join(f"{show(v)}: {show(b)}" for v, b in list(best.items())[:_LISTED])
        where = "lowest" if found.low_end else "highest"
        beyond = " and ".join(show(v) for v in found.beyond)
        limit = diverged_from(frame, path)
        past = limit is not None and any(v >= limit for v in found.beyond)
        flat = told_apart(frame, path) is False
        yield Finding(
            "at_the_edge",
            Level.NOTE if flat else Level.WARNING,
            f"The best {frame.short.get(path, path)} is the {where} that was tried",
            f"{path} = {show(found.at)}; best {frame.goal.metric} by value: {shown}."
            + (" Its values cannot be told apart, though, so this may be chance." if flat else ""),
            "There is nothing legal beyond it."
            if not found.beyond
            else f"The optimum may lie outside: add {beyond}."
            + (f" From {show(limit)} on every trial diverged, so go carefully." if past else ""),
            (frame.ranked[0].label,),
            path,
        )


def not_told_apart(frame: SweepFrame) -> Iterator[Finding]:
    """Leaves whose values made no difference that these held-out pairs can show."""
    for path in frame.paths:
        values = [level.value for level in levels(frame, path)]
        if path == "training.seed" or len(values) < 2 or told_apart(frame, path) is not False:
            continue
        # The pair that is furthest apart says most.
        found = [(compared(frame, path, a, b), a, b) for k, a in enumerate(values) for b in values[k + 1 :]]
        known = [(d, n, a, b) for c, a, b in found if c is not None for d, n in [c]]
        widest, count, a, b = max(known, key=lambda row: abs(row[0].mean))
        needed = widest.pairs_needed
        yield Finding(
            "not_told_apart",
            Level.NOTE,
            f"The values of {frame.short.get(path, path)} cannot be told apart with these trials",
            f"{path} {show(a)} against {show(b)}, all else equal ({count} pair{'s' if count > 1 else ''} of trials): "
            f"{frame.goal.metric} differs by {show(widest.mean)}, 95 % interval {show(widest.low)} to "
            f"{show(widest.high)} over {widest.pairs} held-out pairs.",
            f"Fix it at {show(frame.ranked[0].record.params.get(path, a))} and spend the trials elsewhere"
            + (f", or hold out about {_round(needed)} pairs to see a difference this small." if needed else "."),
            (),
            path,
        )


def too_few_pairs(sure: Certainty) -> Iterator[Finding]:
    """The differences seen are smaller than what this many held-out pairs can show."""
    if not sure.rivals or len(sure.tied) < 2:
        return
    rival, difference = sure.rivals[0]
    needed = difference.pairs_needed
    tied = ", ".join(case.label for case in sure.tied[:_LISTED]) + (" …" if len(sure.tied) > _LISTED else "")
    again = ""
    if sure.wins:
        again = f" The winner would come first in {sure.wins[sure.winner.number]:.0%} of redraws of the pairs."
    yield Finding(
        "too_few_pairs",
        Level.WARNING,
        f"These {len(sure.tied)} configurations cannot be told apart",
        f"Trials {tied}. The runner-up, trial {rival.label}, is behind by {show(abs(difference.mean))}, with a 95 % "
        f"interval of {show(difference.low)} to {show(difference.high)} over {difference.pairs} held-out "
        f"{'pairs' if difference.paired else 'examples, compared without pairing'}.{again}",
        (f"About {_round(needed)} held-out pairs would settle it" if needed else "More held-out pairs would settle it")
        + "; until then take the cheapest or the safest of them, or run them again with other values of training.seed.",
        tuple(case.label for case in sure.tied),
    )


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


def _round(count: int) -> str:
    """Two digits are enough for an estimate."""
    if count < 100:
        return str(count)
    digits = len(str(count)) - 2
    return f"{round(count, -digits):,}"
