"""Last step of a diagnosis: each setting is moved by one finding, the one with the strongest evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dashboards.diagnosis.findings import LEVELS, Advice, DiagnosisFinding, FindingLevel, lower_first

_BY_STRENGTH = (
    "unlikely_text",
    "degenerate_text",
    "answers_lost",
    "chosen_falling",
    "diverging_region",
    "worse_than_start",
    "coin_toss",
    "overfitting",
    "loss_plateau",
    "at_the_edge",
    "not_told_apart",
    "gain_not_clear",
    "gain_not_confirmed",
    "margin_below_gamma",
)
"""Rules of one level, strongest evidence first: harm to the model, then results, then single curves."""
HARM = frozenset(_BY_STRENGTH[:4])
"""Rules about damage that the objective does not show, so that the objective's optimum is none."""
_ABOUT_THE_SEARCH = frozenset({"at_the_edge", "not_told_apart"})
"""Rules that say nothing but where to search next."""


def resolve_conflicts(found: Sequence[DiagnosisFinding]) -> list[DiagnosisFinding]:
    """Return the findings such that no setting is moved by two of them.

    The strongest finding about a setting keeps its step, with the others' titles among its evidence. The others lose
    that step; those that only advise where to search next are left out. No finding advises to use a trial that another
    one advises not to use.
    """
    out = [_unused(finding, found) for finding in found]
    holders: dict[str, int] = {}
    for k in sorted(range(len(out)), key=lambda k: _strength(out[k])):
        kept, lost = _divide(out[k], holders)
        for step in kept:
            if step.setting:
                holders[step.setting] = k
        if lost:
            out[k] = _without(out[k], kept, out[holders[lost[0].setting]], lost[0])
    harmful = min((k for k in range(len(out)) if _is_harm(out[k])), key=lambda k: _strength(out[k]), default=None)
    dropped: set[int] = set()
    for k, finding in enumerate(found):
        if finding.rule not in _ABOUT_THE_SEARCH:
            continue
        holder = next((holders[s.setting] for s in finding.steps if s.setting and holders[s.setting] != k), None)
        if holder is None and finding.rule == "at_the_edge" and harmful is not None:
            holder = harmful  # the best by an objective that the harm does not enter
        if holder is not None:
            dropped.add(k)
            evidence = f"{out[holder].evidence} Also weighed: {lower_first(finding.title)}."
            out[holder] = replace(out[holder], evidence=evidence)
    for k, finding in enumerate(out):
        if finding.setting in holders and holders[finding.setting] != k:
            out[k] = replace(finding, setting="")
    return [finding for k, finding in enumerate(out) if k not in dropped]


def serious_harm(findings: Sequence[DiagnosisFinding]) -> DiagnosisFinding | None:
    """Return the strongest serious finding about damage that the objective does not show."""
    return min((f for f in findings if _is_harm(f)), key=_strength, default=None)


def _strength(finding: DiagnosisFinding) -> tuple[int, int]:
    known = finding.rule in _BY_STRENGTH
    return LEVELS.index(finding.level), _BY_STRENGTH.index(finding.rule) if known else len(_BY_STRENGTH)


def _is_harm(finding: DiagnosisFinding) -> bool:
    return finding.rule in HARM and finding.level is FindingLevel.SERIOUS


def _unused(finding: DiagnosisFinding, found: Sequence[DiagnosisFinding]) -> DiagnosisFinding:
    """Return the finding without steps that use the model of a trial that another finding warns of."""
    if not any(step.uses_model for step in finding.steps):
        return finding
    warned = [f for f in found if f.level is FindingLevel.SERIOUS or f.rule in HARM]
    if not any(not f.trials or set(f.trials) & set(finding.trials) for f in warned):
        return finding
    return replace(finding, steps=tuple(step for step in finding.steps if not step.uses_model))


def _divide(finding: DiagnosisFinding, holders: dict[str, int]) -> tuple[list[Advice], list[Advice]]:
    """Return the steps about settings that no stronger finding moves, and the others."""
    kept = [step for step in finding.steps if step.setting not in holders]
    return kept, [step for step in finding.steps if step.setting in holders]


def _without(
    finding: DiagnosisFinding, kept: Sequence[Advice], holder: DiagnosisFinding, lost: Advice
) -> DiagnosisFinding:
    remark = finding.remark
    if not kept and not remark:
        remark = f"For {lost.setting} see: {lower_first(holder.title)}."
    setting = next((step.setting for step in kept if step.setting), "")
    return replace(finding, steps=tuple(kept), remark=remark, setting=setting)
