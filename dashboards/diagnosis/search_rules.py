"""Rules about the search: optimum at the boundary, no clear effect, too few pairs, confounded settings, failures.

Confounded settings were only varied together, so that their effects cannot be separated. Failures: regions in which
trials diverge, and the reasons of failed trials.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from dashboards.analysis.held_out_pairs import spearman
from dashboards.analysis.param_effects import (
    SEED,
    boundary_optimum,
    diverged_from,
    has_clear_effect,
    is_numeric,
    levels,
    matched_difference,
)
from dashboards.analysis.significance import Significance
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel, round_count
from dashboards.formatting import format_value
from orchestrator.spec.search.dimensions import IntUniform, LogUniform, Uniform
from orchestrator.study.trial_records import FailureKind, TrialState

_MAX_LISTED = 6


def optimum_at_boundary(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report a best trial at an end of a searched setting, so that the optimum may lie outside."""
    for path in frame.paths:
        found = boundary_optimum(frame, path)
        if found is None or path == "training.seed" or has_clear_effect(frame, path) is False:
            continue  # without an effect there is no optimum; reported by `no_clear_effect`
        best = {level.value: level.best for level in levels(frame, path)}
        shown = ", ".join(f"{format_value(v)}: {format_value(b)}" for v, b in list(best.items())[:_MAX_LISTED])
        where = "lowest" if found.is_low_end else "highest"
        extension = " and ".join(format_value(v) for v in found.extension)
        limit = diverged_from(frame, path)
        crosses_limit = limit is not None and any(v >= limit for v in found.extension)
        yield DiagnosisFinding(
            "at_the_edge",
            FindingLevel.WARNING,
            f"The best {frame.short_names.get(path, path)} is the {where} that was tried",
            f"{path} = {format_value(found.value)}; best {frame.objective.metric} by value: {shown}.",
            "No valid value lies beyond it."
            if not found.extension
            else f"The optimum may lie outside: add {extension}."
            + (
                f" From {format_value(limit)} upwards every trial diverged, so use small steps."
                if crosses_limit
                else ""
            ),
            (frame.ranked[0].label,),
            path,
        )


def no_clear_effect(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report settings whose values do not differ significantly on these held-out pairs."""
    for path in frame.paths:
        values = [level.value for level in levels(frame, path)]
        if path == "training.seed" or len(values) < 2 or has_clear_effect(frame, path) is not False:
            continue
        # The two values that differ most give the strongest evidence.
        found = [(matched_difference(frame, path, a, b), a, b) for k, a in enumerate(values) for b in values[k + 1 :]]
        known = [(d, n, a, b) for c, a, b in found if c is not None for d, n in [c]]
        widest, count, a, b = max(known, key=lambda row: abs(row[0].mean))
        required = widest.pairs_needed
        yield DiagnosisFinding(
            "not_told_apart",
            FindingLevel.NOTE,
            f"The values of {frame.short_names.get(path, path)} are not distinguishable with these trials",
            f"{path} {format_value(a)} against {format_value(b)}, all else equal "
            f"({count} pair{'s' if count > 1 else ''} of trials): {frame.objective.metric} differs by "
            f"{format_value(widest.mean)}, 95 % interval {format_value(widest.low)} to "
            f"{format_value(widest.high)} over {widest.pairs} held-out pairs.",
            f"Fix it at {format_value(frame.ranked[0].record.params.get(path, a))} and search other settings"
            + (
                f", or hold out about {round_count(required)} pairs to see a difference this small."
                if required
                else "."
            ),
            (),
            path,
        )


def too_few_pairs(significance: Significance) -> Iterator[DiagnosisFinding]:
    """Report differences to the runners-up that are not significant with this number of held-out pairs."""
    if not significance.runners_up or len(significance.not_distinguishable) < 2:
        return
    runner_up, difference = significance.runners_up[0]
    required = difference.pairs_needed
    indistinguishable = ", ".join(trial.label for trial in significance.not_distinguishable[:_MAX_LISTED]) + (
        f" and {len(significance.not_distinguishable) - _MAX_LISTED} more"
        if len(significance.not_distinguishable) > _MAX_LISTED
        else ""
    )
    wins_text = ""
    if significance.first_place_shares:
        share = significance.first_place_shares[significance.winner.number]
        wins_text = f" The winner ranks first in {share:.0%} of bootstrap resamples of the pairs."
    yield DiagnosisFinding(
        "too_few_pairs",
        FindingLevel.WARNING,
        f"These {len(significance.not_distinguishable)} configurations are not distinguishable",
        f"Trials {indistinguishable}. The runner-up, trial {runner_up.label}, is behind by "
        f"{format_value(abs(difference.mean))}, with a 95 % interval of {format_value(difference.low)} to "
        f"{format_value(difference.high)} over {difference.pairs} held-out "
        f"{'pairs' if difference.paired else 'examples, compared without pairing'}.{wins_text}",
        (
            f"About {round_count(required)} held-out pairs would distinguish them"
            if required
            else "More held-out pairs would distinguish them"
        )
        + "; until then use the cheapest or the most stable one, or repeat them with other values of training.seed.",
        tuple(trial.label for trial in significance.not_distinguishable),
    )


_MIN_TRIALS = 3
_FEWEST_RANKED = 5
"""Trials. With fewer, a perfect rank correlation has a p-value above 5 % (2 / 4! = 8 %)."""
CONFOUNDED_CORRELATION = 0.95
"""Rank correlation from which two settings count as confounded."""


def confounded(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report pairs of settings that were only varied together, exactly or by rank correlation."""
    for a, b in combinations([p for p in frame.paths if p != SEED], 2):
        trials = [c for c in frame.comparable_trials if a in c.record.params and b in c.record.params]
        values_a, values_b = _values(trials, a), _values(trials, b)
        if len(trials) < _MIN_TRIALS or len(values_a) < 2 or len(values_b) < 2:
            continue
        evidence = _confounding(frame, trials, a, b)
        if not evidence:
            continue
        first, second = frame.short_names.get(a, a), frame.short_names.get(b, b)
        first_params = trials[0].record.params
        other_value = next(value for key, value in values_b.items() if key != repr(first_params[b]))
        yield DiagnosisFinding(
            "varied_together",
            FindingLevel.WARNING,
            f"{first} and {second} were only varied together",
            f"Over {len(trials)} complete trials {evidence}, so that their effects cannot be separated.",
            f"Add trials that change one alone, for example {first} {format_value(first_params[a])} "
            f"with {second} {format_value(other_value)}.",
            tuple(c.label for c in trials),
            b,
        )


def _values(trials: list[TrialFrame], path: str) -> dict[str, Any]:
    return {repr(c.record.params[path]): c.record.params[path] for c in trials}


def _confounding(frame: SweepFrame, trials: list[TrialFrame], a: str, b: str) -> str:
    """Return a description of the confounding, empty without one; sampled ranges are compared by rank."""
    pairs = {(repr(c.record.params[a]), repr(c.record.params[b])) for c in trials}
    is_sampled = any(isinstance(frame.space.dimensions.get(p), (Uniform, LogUniform, IntUniform)) for p in (a, b))
    if not is_sampled and len(pairs) == len(_values(trials, a)) == len(_values(trials, b)):
        return "each value of one occurred with only one value of the other"
    if len(trials) >= _FEWEST_RANKED and is_numeric(frame, a) and is_numeric(frame, b):
        rho = spearman(*(np.array([float(c.record.params[p]) for c in trials]) for p in (a, b)))
        if rho is not None and abs(rho) >= CONFOUNDED_CORRELATION:
            return f"their rank correlation is {rho:+.2f}"
    return ""


def diverging_region(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report a region of one setting in which every trial diverged, else the number of diverged trials."""
    diverged = [trial for trial in frame.trials if trial.record.diverged]
    if not diverged:
        return
    limits = {path: limit for path in frame.paths if (limit := diverged_from(frame, path)) is not None}
    limits.pop("training.seed", None)
    explained = {p: [c for c in diverged if c.record.params.get(p, x - 1) >= x] for p, x in limits.items()}
    if explained:
        path = max(explained, key=lambda p: len(explained[p]))  # the setting that explains most diverged trials
        limit, in_region = limits[path], explained[path]
        yield DiagnosisFinding(
            "diverging_region",
            FindingLevel.WARNING,
            f"Every trial with {frame.short_names.get(path, path)} of {format_value(limit)} or more diverged",
            f"{len(in_region)} of {len(in_region)} trials, against {len(diverged) - len(in_region)} of "
            f"{len(frame.trials) - len(in_region)} with smaller values. First: trial {in_region[0].label}, "
            f"{in_region[0].record.reason}.",
            f"Exclude {path} >= {format_value(limit)} from the next search.",
            tuple(c.label for c in in_region),
            path,
        )
        return
    if (found := _diverging_values(frame, diverged)) is not None:
        yield found
        return
    finished = frame.in_state(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)
    yield DiagnosisFinding(
        "diverging_region",
        FindingLevel.SERIOUS
        if not frame.ranked
        else FindingLevel.WARNING
        if 4 * len(diverged) >= len(finished)
        else FindingLevel.NOTE,
        f"{len(diverged)} of {len(finished)} finished trials diverged",
        f"Trial {diverged[0].label} ({frame.describe_params(diverged[0])}): {diverged[0].record.reason}.",
        "No single searched setting explains it; lower the learning rate, or lengthen the warmup.",
        tuple(c.label for c in diverged),
    )


def _diverging_values(frame: SweepFrame, diverged: list[TrialFrame]) -> DiagnosisFinding | None:
    """Return a finding for listed values of one setting with which all trials diverged and without which none did."""
    ended = frame.in_state(TrialState.COMPLETE, TrialState.PRUNED)
    for path in frame.paths:
        if path == "training.seed" or frame.space.is_continuous(path):
            continue
        safe = {repr(c.record.params.get(path)) for c in ended if not c.record.diverged}
        bad = {repr(value): value for c in diverged if (value := c.record.params.get(path)) is not None}
        if not safe or safe & bad.keys() or any(path not in c.record.params for c in diverged):
            continue
        values = " or ".join(format_value(value) for value in bad.values())
        return DiagnosisFinding(
            "diverging_region",
            FindingLevel.WARNING,
            f"Every trial with {frame.short_names.get(path, path)} {values} diverged",
            f"{len(diverged)} of {len(diverged)} trials, against none with another value. First: trial "
            f"{diverged[0].label}, {diverged[0].record.reason}.",
            f"Exclude {path} = {values} from the next search.",
            tuple(c.label for c in diverged),
            path,
        )
    return None


_FAILURE_ADVICE = {
    FailureKind.OUT_OF_MEMORY: "Lower training.tokens_per_micro_batch (it does not change results), or turn on "
    "training.gradient_checkpointing.",
    FailureKind.DATA: "Correct the rows, or raise data.max_bad_share.",
    FailureKind.BUG: "The traceback is in failure.txt in the trial's folder; its last lines are below.",
}


def failures(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report failed trials, one finding per kind of failure."""
    failed = frame.in_state(TrialState.FAILED)
    for kind, count in Counter(trial.record.failure for trial in failed).most_common():
        of_kind = [trial for trial in failed if trial.record.failure is kind]
        reason, most_common = Counter(trial.record.reason for trial in of_kind).most_common(1)[0]
        yield DiagnosisFinding(
            "failures",
            FindingLevel.SERIOUS if not frame.ranked else FindingLevel.WARNING,
            f"{count} of {len(frame.trials)} trials failed"
            + (f": {kind.value.lower().replace('_', ' ')}" if kind is not None else ""),
            f"{most_common} of them with: {reason}.",
            _FAILURE_ADVICE[kind] if kind is not None else "See the reasons below.",
            tuple(trial.label for trial in of_kind),
        )
