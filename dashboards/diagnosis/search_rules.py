"""Rules about the search: optimum at the boundary, no clear effect, too few pairs, confounded settings, failures.

Confounded settings were only varied together, so that their effects cannot be separated. Failures: regions in which
trials diverge, and the reasons of failed trials.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from dashboards.analysis.held_out_pairs import spearman
from dashboards.analysis.param_effects import (
    SEED,
    boundary_optimum,
    diverged_from,
    has_clear_effect,
    is_numeric_setting,
    levels,
    matched_difference,
    stable_extension,
)
from dashboards.analysis.significance import Significance, recommend
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.findings import (
    Advice,
    DiagnosisFinding,
    Direction,
    FindingLevel,
    reasons_not_to_use,
    round_count,
)
from dashboards.diagnosis.setting_steps import DIVERGED_SHARES, is_ruled_out, lower_rate, lowest_rate
from dashboards.formatting import format_value
from orchestrator.spec.search.dimensions import IntUniform, LogUniform, Uniform
from orchestrator.study.trial_records import FailureKind, TrialState
from trainer.results import clause

_MAX_LISTED = 6


def optimum_at_boundary(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report a best trial at an end of a searched setting, so that the optimum may lie outside."""
    together = {path for pair in _confounded_pairs(frame) for path in pair[:2]}
    for path in frame.paths:
        found = boundary_optimum(frame, path)
        if found is None or path == SEED or path in together or has_clear_effect(frame, path) is False:
            continue  # without an effect there is no optimum; reported by `no_clear_effect`
        direction = Direction.LOWER if found.is_low_end else Direction.RAISE
        if is_ruled_out(frame, path, direction):
            continue  # of a range, a value nearer to its end was worse
        extension = stable_extension(frame, found)
        if found.extension and not extension:
            continue  # what lies beyond diverges; reported by `diverging_region`
        best = {level.value: level.best for level in levels(frame, path)}
        shown = ", ".join(f"{format_value(v)}: {format_value(b)}" for v, b in list(best.items())[:_MAX_LISTED])
        where = "lowest" if found.is_low_end else "highest"
        added = f"add {' and '.join(format_value(v) for v in extension)}"
        yield DiagnosisFinding(
            "at_the_edge",
            FindingLevel.WARNING if extension else FindingLevel.NOTE,
            f"The best {frame.short_names.get(path, path)} is the {where} that was tried",
            f"{path} = {format_value(found.value)}; best {frame.objective.metric} by value: {shown}.",
            "" if extension else "No valid value lies beyond it.",
            (frame.comparable_trials[0].label,),
            path,
            (Advice(added, path, direction, extension),) if extension else (),
            "The optimum may lie outside:",
        )


def no_clear_effect(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report settings whose values do not differ significantly on these held-out pairs."""
    for path in frame.paths:
        values = [level.value for level in levels(frame, path)]
        if path == SEED or len(values) < 2 or has_clear_effect(frame, path) is not False:
            continue
        # The two values that differ most give the strongest evidence.
        found = [(matched_difference(frame, path, a, b), a, b) for k, a in enumerate(values) for b in values[k + 1 :]]
        known = [(d, n, a, b) for trial, a, b in found if trial is not None for d, n in [trial]]
        widest, count, a, b = max(known, key=lambda row: abs(row[0].mean))
        required = widest.pairs_needed
        pairs = f"{widest.comparisons} pairs of values of the searched settings"
        counted = f", for all {pairs} together" if widest.comparisons > 1 else ""
        at = format_value(frame.ranked[0].record.params.get(path, a))
        more = f"hold out about {round_count(required)} pairs to see a difference this small" if required else ""
        yield DiagnosisFinding(
            "not_told_apart",
            FindingLevel.NOTE,
            f"The values of {frame.short_names.get(path, path)} are not distinguishable with these trials",
            f"{path} {format_value(a)} against {format_value(b)}, all else equal "
            f"({count} pair{'s' if count > 1 else ''} of trials): {frame.objective.metric} differs by "
            f"{format_value(widest.mean)}, 95 % interval {format_value(widest.joint_low)} to "
            f"{format_value(widest.joint_high)} over {widest.pair_count} held-out pairs{counted}.",
            setting=path,
            steps=(
                Advice(f"fix it at {at} and search other settings", path, Direction.FIX),
                *([Advice(more)] if more else []),
            ),
        )


def too_few_pairs(
    frame: SweepFrame, significance: Significance, found: Sequence[DiagnosisFinding]
) -> Iterator[DiagnosisFinding]:
    """Report differences to the runners-up that are not significant with this number of held-out pairs.

    `found`: the findings so far; none of the trials that a serious one warns of is recommended.
    """
    if not significance.runners_up or len(significance.not_distinguishable) < 2 or frame.confirmation is not None:
        return  # finalists decide between them on rows that the search has not seen
    runner_up, difference = significance.runners_up[0]
    required = difference.pairs_needed
    indistinguishable = ", ".join(trial.label for trial in significance.not_distinguishable[:_MAX_LISTED]) + (
        f" and {len(significance.not_distinguishable) - _MAX_LISTED} more"
        if len(significance.not_distinguishable) > _MAX_LISTED
        else ""
    )
    avoid = {t.label for t in significance.not_distinguishable if reasons_not_to_use(found, t.label)}
    recommended = recommend(frame, significance, avoid)
    use = "weigh the objectives yourself" if frame.further_objectives else "use the cheapest or the most stable one"
    if recommended is not None:
        use = f"use trial {recommended[0].label}, {recommended[1]}"
    wins_text = ""
    if significance.first_place_shares:
        share = significance.first_place_shares[significance.winner.number]
        wins_text = f" The winner ranks first in {share:.0%} of bootstrap resamples of the pairs."
    yield DiagnosisFinding(
        "too_few_pairs",
        FindingLevel.WARNING,
        f"These {len(significance.not_distinguishable)} configurations are not distinguishable",
        f"Trials {indistinguishable}. The runner-up, trial {runner_up.label}, is behind by "
        f"{format_value(abs(difference.mean))}, with a 95 % interval of {format_value(difference.joint_low)} to "
        f"{format_value(difference.joint_high)} over {difference.pair_count} held-out "
        f"{'pairs' if difference.paired else 'examples, compared without pairing'}"
        + (f", for all {difference.comparisons:,} pairs of trials together" if difference.comparisons > 1 else "")
        + f".{wins_text}",
        trials=tuple(trial.label for trial in significance.not_distinguishable),
        steps=(Advice(use, uses_model=True), Advice("train them with several seeds (repeats: 3)")),
        lead=f"{f'About {round_count(required)}' if required else 'More'} held-out pairs would distinguish them; "
        "until then",
    )


_LONGER_WARMUP = Advice("lengthen the warmup", "training.warmup_ratio", Direction.RAISE)
_MIN_TRIALS = 3
_FEWEST_RANKED = 5
"""Trials. With fewer, a perfect rank correlation has a p-value above 5 % (2 / 4! = 8 %)."""
CONFOUNDED_CORRELATION = 0.95
"""Rank correlation from which two settings count as confounded."""


def confounded(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report pairs of settings that were only varied together, exactly or by rank correlation."""
    for a, b, evidence in _confounded_pairs(frame):
        trials = _with_both(frame, a, b)
        first, second = frame.short_names.get(a, a), frame.short_names.get(b, b)
        first_params = trials[0].record.params
        other_value = next(value for key, value in _values(trials, b).items() if key != repr(first_params[b]))
        yield DiagnosisFinding(
            "varied_together",
            FindingLevel.WARNING,
            f"{first} and {second} were only varied together",
            f"Over {len(trials)} complete trials {evidence}, so that their effects cannot be separated.",
            f"Add trials that change one alone, for example {first} {format_value(first_params[a])} "
            f"with {second} {format_value(other_value)}.",
            tuple(trial.label for trial in trials),
            b,
        )


def _confounded_pairs(frame: SweepFrame) -> list[tuple[str, str, str]]:
    """Return the pairs of settings that were only varied together, with the evidence."""
    found: list[tuple[str, str, str]] = []
    for a, b in combinations([p for p in frame.paths if p != SEED], 2):
        trials = _with_both(frame, a, b)
        if len(trials) < _MIN_TRIALS or len(_values(trials, a)) < 2 or len(_values(trials, b)) < 2:
            continue
        if evidence := _confounding(frame, trials, a, b):
            found.append((a, b, evidence))
    return found


def _with_both(frame: SweepFrame, a: str, b: str) -> list[TrialFrame]:
    return [trial for trial in frame.comparable_trials if a in trial.record.params and b in trial.record.params]


def _values(trials: list[TrialFrame], path: str) -> dict[str, Any]:
    return {repr(trial.record.params[path]): trial.record.params[path] for trial in trials}


def _confounding(frame: SweepFrame, trials: list[TrialFrame], a: str, b: str) -> str:
    """Return a description of the confounding, empty without one; sampled ranges are compared by rank."""
    pairs = {(repr(trial.record.params[a]), repr(trial.record.params[b])) for trial in trials}
    is_sampled = any(isinstance(frame.space.dimensions.get(p), (Uniform, LogUniform, IntUniform)) for p in (a, b))
    if not is_sampled and len(pairs) == len(_values(trials, a)) == len(_values(trials, b)):
        return "each value of one occurred with only one value of the other"
    if len(trials) >= _FEWEST_RANKED and is_numeric_setting(frame, a) and is_numeric_setting(frame, b):
        rho = spearman(*(np.array([float(trial.record.params[p]) for trial in trials]) for p in (a, b)))
        if rho is not None and abs(rho) >= CONFOUNDED_CORRELATION:
            return f"their rank correlation is {rho:+.2f}"
    return ""


def diverging_region(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report a region of one setting in which every trial diverged, else the number of diverged trials."""
    diverged = [trial for trial in frame.trials if trial.record.diverged]
    if not diverged:
        return
    limits = {path: limit for path in frame.paths if (limit := diverged_from(frame, path)) is not None}
    limits.pop(SEED, None)
    explained = {p: [trial for trial in diverged if trial.record.params.get(p, x - 1) >= x] for p, x in limits.items()}
    # One trial of several says nothing about its value: others diverged without it.
    explained = {p: trials for p, trials in explained.items() if len(trials) > 1 or len(trials) == len(diverged)}
    if explained:
        path = max(explained, key=lambda p: len(explained[p]))  # the setting that explains most diverged trials
        limit, in_region = limits[path], explained[path]
        yield DiagnosisFinding(
            "diverging_region",
            FindingLevel.WARNING,
            f"Every trial with {frame.short_names.get(path, path)} of {format_value(limit)} or more diverged",
            f"{len(in_region)} of {len(in_region)} trials, against {len(diverged) - len(in_region)} of "
            f"{len(frame.trials) - len(in_region)} with smaller values. First: trial {in_region[0].label}, "
            f"{clause(in_region[0].record.reason)}.",
            trials=tuple(trial.label for trial in in_region),
            setting=path,
            steps=(Advice(f"exclude {path} >= {format_value(limit)} from the next search", path, Direction.EXCLUDE),),
        )
        return
    if (found := _diverging_values(frame, diverged)) is not None:
        yield found
        return
    finished = frame.in_state(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)
    many = 4 * len(diverged) >= len(finished)
    lower = lower_rate(lowest_rate(frame), *((0.3, 0.5) if frame.ranked else DIVERGED_SHARES))
    yield DiagnosisFinding(
        "diverging_region",
        FindingLevel.SERIOUS if not frame.ranked else FindingLevel.WARNING if many else FindingLevel.NOTE,
        f"{len(diverged)} of {len(finished)} finished trials diverged",
        f"Trial {diverged[0].label} ({frame.describe_params(diverged[0])}): {clause(diverged[0].record.reason)}.",
        trials=tuple(trial.label for trial in diverged),
        steps=(*([lower] if many or not frame.ranked else []), _LONGER_WARMUP),
        lead="No single searched setting explains it:",
    )


def _diverging_values(frame: SweepFrame, diverged: list[TrialFrame]) -> DiagnosisFinding | None:
    """Return a finding for listed values of one setting with which all trials diverged and without which none did."""
    ended = frame.in_state(TrialState.COMPLETE, TrialState.PRUNED)
    for path in frame.paths:
        if path == SEED or frame.space.is_continuous(path):
            continue
        safe = {repr(trial.record.params.get(path)) for trial in ended if not trial.record.diverged}
        bad = {repr(value): value for trial in diverged if (value := trial.record.params.get(path)) is not None}
        if not safe or safe & bad.keys() or any(path not in trial.record.params for trial in diverged):
            continue
        values = " or ".join(format_value(value) for value in bad.values())
        return DiagnosisFinding(
            "diverging_region",
            FindingLevel.WARNING,
            f"Every trial with {frame.short_names.get(path, path)} {values} diverged",
            f"{len(diverged)} of {len(diverged)} trials, against none with another value. First: trial "
            f"{diverged[0].label}, {clause(diverged[0].record.reason)}.",
            trials=tuple(trial.label for trial in diverged),
            setting=path,
            steps=(Advice(f"exclude {path} = {values} from the next search", path, Direction.EXCLUDE),),
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
    again = "" if frame.sweeps else f" Then try them again: orchestrate resume {frame.name} --retry-failed."
    for kind, count in Counter(trial.record.failure for trial in failed).most_common():
        of_kind = [trial for trial in failed if trial.record.failure is kind]
        reason, most_common = Counter(trial.record.reason for trial in of_kind).most_common(1)[0]
        yield DiagnosisFinding(
            "failures",
            FindingLevel.SERIOUS if not frame.ranked else FindingLevel.WARNING,
            f"{count} of {len(frame.trials)} trials failed"
            + (f": {kind.value.lower().replace('_', ' ')}" if kind is not None else ""),
            f"{most_common} of them with: {clause(reason)}.",
            (_FAILURE_ADVICE[kind] if kind is not None else "See the reasons below.") + again,
            tuple(trial.label for trial in of_kind),
        )
