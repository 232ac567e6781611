"""What the search itself can and cannot tell, and where to look next.

Leaves that were varied together only: which of them mattered, no comparison of these trials can tell.

Trials that did not get to their end by themselves: where it diverges, and what broke.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from dashboards.analysis.held_out_pairs import spearman
from dashboards.analysis.param_effects import SEED, compared, diverged_from, edge, is_numeric, levels, told_apart
from dashboards.analysis.significance import Certainty
from dashboards.analysis.sweep_frame import SweepFrame, TrialCase, show
from dashboards.diagnosis.findings import Finding, Level, rounded
from orchestrator.spec.search.space import IntUniform, LogUniform, Uniform
from orchestrator.study.trial_records import FailureKind, TrialState

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


_FEWEST = 3
_FEWEST_RANKED = 5
"""Trials. Ranks of fewer are in order by chance in more than 5 of 100 cases (2 / 4! = 8 %)."""
ALIKE = 0.95
"""From this rank correlation on, two leaves are as good as one."""


def varied_together(frame: SweepFrame) -> Iterator[Finding]:
    """Pairs of leaves of which each value of one came with one value of the other, or nearly so."""
    for a, b in combinations([p for p in frame.paths if p != SEED], 2):
        cases = [c for c in frame.whole if a in c.record.params and b in c.record.params]
        ones, others = _values(cases, a), _values(cases, b)
        if len(cases) < _FEWEST or len(ones) < 2 or len(others) < 2:
            continue
        how = _how_close(frame, cases, a, b)
        if not how:
            continue
        first, second = frame.short.get(a, a), frame.short.get(b, b)
        mine = cases[0].record.params
        another = next(value for key, value in others.items() if key != repr(mine[b]))
        yield Finding(
            "varied_together",
            Level.WARNING,
            f"{first} and {second} were only varied together",
            f"Over {len(cases)} complete trials {how}: whichever of the two mattered, the other moved with it.",
            f"Add trials that change one alone, for example {first} {show(mine[a])} with {second} {show(another)}.",
            tuple(c.label for c in cases),
            b,
        )


def _values(cases: list[TrialCase], path: str) -> dict[str, Any]:
    return {repr(c.record.params[path]): c.record.params[path] for c in cases}


def _how_close(frame: SweepFrame, cases: list[TrialCase], a: str, b: str) -> str:
    """In words; empty where each was varied beside the other. Of a range each value is drawn once: ranks tell there."""
    pairs = {(repr(c.record.params[a]), repr(c.record.params[b])) for c in cases}
    drawn = any(isinstance(frame.space.dimensions.get(p), (Uniform, LogUniform, IntUniform)) for p in (a, b))
    if not drawn and len(pairs) == len(_values(cases, a)) == len(_values(cases, b)):
        return "each value of one came with one value of the other"
    if len(cases) >= _FEWEST_RANKED and is_numeric(frame, a) and is_numeric(frame, b):
        rho = spearman(*(np.array([float(c.record.params[p]) for c in cases]) for p in (a, b)))
        if rho is not None and abs(rho) >= ALIKE:
            return f"their rank correlation is {rho:+.2f}"
    return ""


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
