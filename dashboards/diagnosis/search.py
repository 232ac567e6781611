"""What the search itself can and cannot tell, and where to look next."""

from __future__ import annotations

from collections.abc import Iterator

from dashboards.certainty import Certainty
from dashboards.diagnosis.finding import Finding, Level, rounded
from dashboards.edges import diverged_from, edge
from dashboards.effects import compared, levels, told_apart
from dashboards.frame import show
from dashboards.sweep_frame import SweepFrame

_LISTED = 6


def at_the_edge(frame: SweepFrame) -> Iterator[Finding]:
    """The best trial lies at an end of a searched leaf: the optimum may lie outside."""
    for path in frame.paths:
        found = edge(frame, path)
        if found is None or path == "training.seed" or told_apart(frame, path) is False:
            continue  # what made no difference has no edge: `not_told_apart` says so
        best = {level.value: level.best for level in levels(frame, path)}
        shown = ", ".join(f"{show(v)}: {show(b)}" for v, b in list(best.items())[:_LISTED])
        where = "lowest" if found.low_end else "highest"
        beyond = " and ".join(show(v) for v in found.beyond)
        limit = diverged_from(frame, path)
        past = limit is not None and any(v >= limit for v in found.beyond)
        yield Finding(
            "at_the_edge",
            Level.WARNING,
            f"The best {frame.short.get(path, path)} is the {where} that was tried",
            f"{path} = {show(found.at)}; best {frame.goal.metric} by value: {shown}.",
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
            + (f", or hold out about {rounded(needed)} pairs to see a difference this small." if needed else "."),
            (),
            path,
        )


def too_few_pairs(sure: Certainty) -> Iterator[Finding]:
    """The differences seen are smaller than what this many held-out pairs can show."""
    if not sure.rivals or len(sure.tied) < 2:
        return
    rival, difference = sure.rivals[0]
    needed = difference.pairs_needed
    tied = ", ".join(case.label for case in sure.tied[:_LISTED]) + (
        f" and {len(sure.tied) - _LISTED} more" if len(sure.tied) > _LISTED else ""
    )
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
        (f"About {rounded(needed)} held-out pairs would settle it" if needed else "More held-out pairs would settle it")
        + "; until then take the cheapest or the safest of them, or run them again with other values of training.seed.",
        tuple(case.label for case in sure.tied),
    )
