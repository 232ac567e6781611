"""Follow-up sweep made from a diagnosis: the next search space, and a YAML file with the reason above each setting."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from dashboards.analysis.next_ranges import NextRange, next_range
from dashboards.analysis.param_effects import SEED, round_value
from dashboards.analysis.significance import Significance
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.conflicts import serious_harm
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.diagnosis.findings import LEARNING_RATE, DiagnosisFinding, FindingLevel, decided_steps
from dashboards.diagnosis.setting_steps import (
    DIVERGED_SHARES,
    FIRST_SFT_WEIGHT,
    LOWER_SHARES,
    lower_rate,
    lowest_rate,
)
from dashboards.formatting import format_brief, format_value
from orchestrator.errors import ExitCode, OrchestrateError
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.samplers import GridSampler, RandomSampler
from orchestrator.spec.search.dimensions import Choice, Dimension, values_equal
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from trainer.config.loss_config import SftLoss, SimpoLoss
from trainer.config.trial import ZERO3_REMOVED, TrialConfig, is_removed_distributed
from trainer.results import clause

_SEEDS = (1, 2, 3)
_MAX_GRID_POINTS = 36
_TRIALS = 24
_MAX_CONFIRMED = 4
_REPORTED_RULES = frozenset({"too_few_pairs", "answers_lost", "gain_not_clear", "varied_together"})
"""Findings that no search range can address; written as comments at the top of the file."""


class NothingLearned(OrchestrateError):
    """No search range can be derived: no trial completed and none diverged, or the sweep is a rehearsal."""

    code = ExitCode.NO_TRIAL_COMPLETED


@dataclass(frozen=True, slots=True)
class FollowUpSweep:
    """The next sweep. `reasons`: searched setting -> reason for its range; `notes`: comments at the top of the file."""

    spec: SweepSpec
    reasons: Mapping[str, str]
    notes: tuple[str, ...]


def follow_up(analysis: SweepAnalysis, taken: Container[str] = ()) -> FollowUpSweep:
    """Return the sweep to run after this one.

    Args:
        analysis: analysis of the finished or running sweep.
        taken: names of existing sweeps, which the new name must avoid.

    Raises:
        NothingLearned: no trial completed and none diverged, no trial keeps a requirement that the initial model breaks
            too, or the sweep is a rehearsal.
    """
    frame = analysis.frame
    if analysis.is_rehearsal:
        raise NothingLearned(f"{frame.name} is a rehearsal: its figures say nothing about the settings")
    name = next_name(frame.name, taken)
    if analysis.significance is None and frame.ranked:
        return _nearer_to_the_initial_model(frame, name)
    if analysis.significance is None:
        return _after_failures(frame, name)
    base = apply_params(frame.spec.base, analysis.significance.winner.record.params)
    found = _next_ranges(analysis)
    dimensions: dict[str, Dimension] = {p: n.dimension for p, n in found.items() if n.dimension is not None}
    dimensions = _conditional(frame, dimensions)
    reasons = {p: n.reason for p, n in found.items()} | {
        p: f"as in {frame.name}: the winner has no such setting" for p in dimensions if p not in found
    }
    head = [_provenance(analysis.significance, frame)]
    if frame.state != "finished":
        planned = f" of {frame.planned}" if frame.planned else ""
        head.append(
            f"{frame.name} is {frame.state}: {len(frame.ranked)}{planned} trials are complete; wait for the rest."
        )
    for path, extra in _sft_term(analysis.findings, base, frame).items():
        dimensions[path], reasons[path] = extra
    zipped: tuple[dict[str, tuple[Any, ...]], ...] = ()
    if not dimensions:
        zipped, reason = _confirmation_grid(analysis.significance, frame)
        dimensions[SEED] = Choice(choice=_SEEDS)
        reasons[SEED] = "repeated with other seeds: the variance between seeds has not been measured yet"
        if zipped:
            reasons["zip"] = reason
    repeated = {path for group in zipped for path in group}
    head += [f"{p} is fixed: {n.reason}" for p, n in found.items() if n.dimension is None and p not in repeated]
    head += _replacement_note(frame, base)
    head += [f"note: {f.title}. {f.next_step}" for f in analysis.findings if f.rule in _REPORTED_RULES]
    return FollowUpSweep(
        _spec(frame, name, base, SearchSpace(dimensions=dimensions, zipped=zipped)), reasons, tuple(head)
    )


def next_name(name: str, taken: Container[str]) -> str:
    """Return the next free name: quickstart -> quickstart-2 -> quickstart-3, cut to the longest legal name."""
    stem, count = name, 2
    if found := re.fullmatch(r"(.+)-(\d{1,4})", name):
        stem, count = found.group(1), int(found.group(2)) + 1
    while (made := f"{stem[: 63 - len(str(count))]}-{count}") in taken:
        count += 1
    return made


def _next_ranges(analysis: SweepAnalysis) -> dict[str, NextRange]:
    """Return the next range of each searched setting that the winner has."""
    frame = analysis.frame
    assert analysis.significance is not None
    winner = analysis.significance.winner
    decided, harm = decided_steps(analysis.findings), serious_harm(analysis.findings)
    out = {
        path: next_range(frame, path, decided.get(path), harm)
        for path in frame.paths
        if path != SEED and path in winner.record.params
    }
    if LEARNING_RATE in decided and LEARNING_RATE not in out:  # not searched, but the diagnosis asks to change it
        out[LEARNING_RATE] = next_range(frame, LEARNING_RATE, decided[LEARNING_RATE])
    return out


def _conditional(frame: SweepFrame, chosen: Mapping[str, Dimension]) -> dict[str, Dimension]:
    """Restrict the `when` conditions of conditional settings to the values that are still searched."""
    out = dict(chosen)
    for path, before in frame.space.dimensions.items():
        if not before.when:
            continue
        still: dict[str, Any] = {}
        possible = True
        for other, values in before.when.items():
            allowed = values if isinstance(values, tuple) else (values,)
            dimension = chosen.get(other)
            if isinstance(dimension, Choice):
                still[other] = tuple(v for v in allowed if any(values_equal(v, kept) for kept in dimension.choice))
                possible = possible and bool(still[other])
            elif path not in chosen:
                possible = False  # fixed at the winner's value, which excludes this setting
        if path in chosen:
            out[path] = chosen[path].model_copy(update={"when": still})
        elif possible:
            out[path] = before.model_copy(update={"when": still})
    return out


def _sft_term(
    findings: tuple[DiagnosisFinding, ...], base: TrialConfig, frame: SweepFrame
) -> dict[str, tuple[Dimension, str]]:
    """Return an SFT term to search: it keeps the chosen log-probs up at the cost of some margin."""
    loss = base.loss
    if not _margin_gained_by_collapse(findings) or {"loss.sft_weight", "loss.nll_scale"} & set(frame.paths):
        return {}
    reason = "an SFT term keeps the chosen responses likely"
    if isinstance(loss, SimpoLoss):
        cited = f"{reason} ({FIRST_SFT_WEIGHT} is the SimPO authors' value)"
        return (
            {}
            if loss.cross_entropy_weight > 0
            else {"loss.sft_weight": (Choice(choice=(0.0, FIRST_SFT_WEIGHT)), cited)}
        )
    if isinstance(loss, SftLoss):
        return {}
    nll_scale = loss.nll_scale
    return {
        "loss.nll_scale": (
            Choice(choice=(nll_scale, FIRST_SFT_WEIGHT if nll_scale == 0 else round_value(2 * nll_scale))),
            reason,
        )
    }


def _margin_gained_by_collapse(findings: tuple[DiagnosisFinding, ...]) -> bool:
    """Return whether the winner's chosen log-probs or right answers fell seriously while its margin rose."""
    return any(f.rule in ("chosen_falling", "answers_lost") and f.level is FindingLevel.SERIOUS for f in findings)


def _confirmation_grid(
    significance: Significance, frame: SweepFrame
) -> tuple[tuple[dict[str, tuple[Any, ...]], ...], str]:
    """Return the configurations that are not distinguishable from the winner, as a zipped group, and the reason."""
    trials = significance.not_distinguishable[:_MAX_CONFIRMED]
    paths = [p for p in frame.paths if p != SEED and all(p in trial.record.params for trial in trials)]
    varied = [p for p in paths if len({repr(trial.record.params[p]) for trial in trials}) > 1]
    if len(trials) < 2 or not varied:
        return (), ""
    group = {p: tuple(trial.record.params[p] for trial in trials) for p in varied}
    listed = ", ".join(trial.label for trial in trials)
    return (
        group,
    ), f"trials {listed} of {frame.name} are not distinguishable on {significance.pair_count or 'the'} held-out pairs"


def _provenance(significance: Significance, frame: SweepFrame) -> str:
    winner = significance.winner
    params = frame.describe_params(winner) or "nothing was searched"
    values = [f"{each.metric} {format_brief(frame.objective_value(winner, each))}" for each in frame.objectives]
    rank = "first of the Pareto front" if frame.further_objectives else "best"
    return (
        f"Starts from trial {winner.label} of {frame.name} ({params}; {', '.join(values)}, {rank} of "
        f"{len(frame.ranked)})."
    )


def _after_failures(frame: SweepFrame, name: str) -> FollowUpSweep:
    """Search smaller learning rates where no trial completed and some diverged."""
    diverged = [trial for trial in frame.trials if trial.record.diverged]
    if not diverged:
        raise NothingLearned(
            "no trial completed and none diverged, so no search range can be derived; "
            "`orchestrate report` lists why they stopped"
        )
    lowest = lowest_rate(frame)
    head = f"No trial of {frame.name} completed and {len(diverged)} diverged."
    reason = f"all trials diverged, the smallest at {format_value(lowest)}: much smaller learning rates"
    return _lower_rates(frame, name, DIVERGED_SHARES, head, reason, "no trial completed")


def _nearer_to_the_initial_model(frame: SweepFrame, name: str) -> FollowUpSweep:
    """Search smaller learning rates where each complete trial breaks a requirement."""
    text = f"{frame.name}: {frame.requirements_text}"
    if unmet := frame.broken_by_initial_model:
        raise NothingLearned(
            f"{clause(text)}; the initial model breaks a requirement too ({'; '.join(unmet)}), so that no search range "
            "can be derived; set another bound, which ranks the trials anew: orchestrate resume "
            f"{frame.name} --set 'require.{unmet[0].split(' ')[0]}=\"BOUND\"'"
        )
    lowest = format_value(lowest_rate(frame))
    reason = f"every complete trial breaks a requirement, the lowest rate is {lowest}: lower ones stay nearer to it"
    return _lower_rates(frame, name, LOWER_SHARES, f"{clause(text)}.", reason, "no trial keeps every requirement")


def _lower_rates(
    frame: SweepFrame, name: str, shares: tuple[float, ...], head: str, reason: str, why: str
) -> FollowUpSweep:
    """Return the same search with learning rates that are these shares of the lowest one."""
    values = lower_rate(lowest_rate(frame), *shares).values
    dimensions = dict(frame.space.dimensions) | {LEARNING_RATE: Choice(choice=values)}
    zipped = tuple(
        remaining
        for group in frame.space.zipped
        if (remaining := {p: v for p, v in group.items() if p != LEARNING_RATE})
    )
    reasons = {LEARNING_RATE: reason}
    reasons |= {path: f"as in {frame.name}, where {why}" for path in frame.space.paths if path != LEARNING_RATE}
    notes = (head, *_replacement_note(frame, frame.spec.base))
    search = SearchSpace(dimensions=dimensions, zipped=zipped)
    return FollowUpSweep(_spec(frame, name, frame.spec.base, search), reasons, notes)


def _spec(frame: SweepFrame, name: str, base: TrialConfig, search: SearchSpace) -> SweepSpec:
    size = search.size()
    grid = size is not None and size <= _MAX_GRID_POINTS
    tree: dict[str, Any] = frame.spec.model_dump() | {
        "name": name,
        "description": f"Follow-up of {frame.name}",
        "base": base.model_dump(),
        "search": search.model_dump(),
        "sampler": (GridSampler() if grid else RandomSampler()).model_dump(),
        "budget": Budget(trials=None if grid else _TRIALS, concurrency=frame.spec.budget.concurrency).model_dump(),
        "storage": None,
    }
    if SEED in search.paths:
        tree["repeats"] = 1
    once = ("enqueue", "warm_start")  # belong to the first sweep only
    for part in ("base", "sft"):
        if tree[part] is not None and is_removed_distributed(tree[part]["training"]["distributed"]):
            tree[part]["training"]["distributed"] = "fsdp2"
    return SweepSpec.model_validate({key: value for key, value in tree.items() if key not in once})


def _replacement_note(frame: SweepFrame, base: TrialConfig) -> list[str]:
    stages = (base, frame.spec.sft)
    replaced = any(s is not None and is_removed_distributed(s.training.distributed) for s in stages)
    return [f"training.distributed is fsdp2 here: {ZERO3_REMOVED}."] if replaced else []


_COLUMNS = 77


def to_yaml(made: FollowUpSweep) -> str:
    """Return the sweep file, with the reason as a comment above each searched setting."""
    head = [f"# {line}" for text in made.notes for line in wrap(text, _COLUMNS)]
    body: list[str] = []
    inside = False
    for line in dump_spec(made.spec, brief=True).splitlines():
        inside = line == "search:" or (inside and line.startswith("  "))
        path = line.strip().split(":")[0] if inside and re.match(r"  \S", line) else ""
        body += [f"  # {part}" for part in wrap(made.reasons.get(path, ""), _COLUMNS)] if path else []
        body.append(line)
    return "\n".join([*head, *body]) + "\n"
