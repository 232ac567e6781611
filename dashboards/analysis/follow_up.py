"""A follow-up sweep that acts on the diagnosis: what to search next, and why each range was chosen.

A follow-up sweep as a file: each searched leaf under a comment that says why.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from dashboards.analysis.next_ranges import Next, next_values
from dashboards.analysis.param_effects import SEED, diverged_from, edge, tidy
from dashboards.analysis.significance import Certainty
from dashboards.analysis.sweep_frame import SweepFrame, brief, show
from dashboards.diagnosis.diagnose import Insight
from dashboards.diagnosis.findings import Finding, Level
from orchestrator.errors import ExitCode, OrchestrateError
from orchestrator.spec.loading.serialization import dump
from orchestrator.spec.samplers import GridSampler, RandomSampler
from orchestrator.spec.search.dimensions import same
from orchestrator.spec.search.space import Choice, Dimension, SearchSpace
from orchestrator.spec.search.trial_params import place
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from trainer.config.loss_config import SftLoss, SimpoLoss
from trainer.config.trial import TrialConfig

RATE = "training.learning_rate"
_MARGINS = ("loss.gamma", "loss.gamma_beta_ratio")
_SEEDS = (1, 2, 3)
_MOST_POINTS = 36
_TRIALS = 24
_CONFIRMED = 4
_SAID = frozenset({"too_few_pairs", "answers_lost", "gain_not_clear", "varied_together"})
"""Findings that no range of values answers: they are told at the top of the file."""


class NothingLearned(OrchestrateError):
    """No trial ended in a way that says where to look next."""

    code = ExitCode.NO_TRIAL_COMPLETED


@dataclass(frozen=True, slots=True)
class FollowUp:
    """The next sweep. `why`: searched leaf -> reason; `head`: what else was done and why."""

    spec: SweepSpec
    why: Mapping[str, str]
    head: tuple[str, ...]


def follow_up(seen: Insight, taken: Container[str] = ()) -> FollowUp:
    """The sweep to run after this one, named unlike those `taken`. NothingLearned where there is nothing to go by."""
    frame = seen.frame
    name = next_name(frame.name, taken)
    if seen.sure is None:
        return _after_nothing(frame, name)
    base = place(frame.spec.base, seen.sure.winner.record.params)
    found = _axes(seen)
    dimensions: dict[str, Dimension] = {p: n.dimension for p, n in found.items() if n.dimension is not None}
    dimensions = _conditional(frame, dimensions)
    why = {p: n.why for p, n in found.items()} | {
        p: f"as in {frame.name}: the winner has no such leaf" for p in dimensions if p not in found
    }
    head = [_where_from(seen.sure, frame)]
    if frame.state != "finished":
        planned = f" of {frame.planned}" if frame.planned else ""
        head.append(
            f"{frame.name} is {frame.state}: {len(frame.ranked)}{planned} trials are complete; wait for the rest."
        )
    head += [f"{p} is fixed: {n.why}" for p, n in found.items() if n.dimension is None]
    for path, extra in _sft_term(seen.findings, base, frame).items():
        dimensions[path], why[path] = extra
    zipped: tuple[dict[str, tuple[Any, ...]], ...] = ()
    if not dimensions:
        zipped, reason = _confirm(seen.sure, frame)
        dimensions[SEED] = Choice(choice=_SEEDS)
        why[SEED] = "the same again with other seeds: what chance alone does has not been measured yet"
        if zipped:
            why["zip"] = reason
    head += [f"note: {f.title}. {f.next_step}" for f in seen.findings if f.rule in _SAID]
    return FollowUp(_spec(frame, name, base, SearchSpace(dimensions=dimensions, zipped=zipped)), why, tuple(head))


def next_name(name: str, taken: Container[str]) -> str:
    """quickstart -> quickstart-2 -> quickstart-3; never one that is taken, never longer than a name may be."""
    stem, count = name, 2
    if found := re.fullmatch(r"(.+)-(\d{1,4})", name):
        stem, count = found.group(1), int(found.group(2)) + 1
    while (made := f"{stem[: 63 - len(str(count))]}-{count}") in taken:
        count += 1
    return made


def _axes(seen: Insight) -> dict[str, Next]:
    """What to do with each searched leaf that the winner has."""
    frame = seen.frame
    assert seen.sure is not None
    winner = seen.sure.winner
    out: dict[str, Next] = {}
    for path in frame.paths:
        if path == SEED or path not in winner.record.params:
            continue
        out[path] = _by_health(seen, path) or _no_wider_margin(seen, path) or next_values(frame, path)
    if RATE not in frame.paths and (found := _by_health(seen, RATE)) is not None:
        out[RATE] = found  # it was not searched, and is what the diagnosis says to change
    return out


def _conditional(frame: SweepFrame, chosen: Mapping[str, Dimension]) -> dict[str, Dimension]:
    """The conditions of leaves that are only searched under others, as far as those others are still searched."""
    out = dict(chosen)
    for path, before in frame.space.dimensions.items():
        if not before.when:
            continue
        still: dict[str, Any] = {}
        possible = True
        for other, wanted in before.when.items():
            allowed = wanted if isinstance(wanted, tuple) else (wanted,)
            decides = chosen.get(other)
            if isinstance(decides, Choice):
                still[other] = tuple(v for v in allowed if any(same(v, drawn) for drawn in decides.choice))
                possible = possible and bool(still[other])
            elif path not in chosen:
                possible = False  # the winner's value rules it out
        if path in chosen:
            out[path] = chosen[path].model_copy(update={"when": still})
        elif possible:
            out[path] = before.model_copy(update={"when": still})
    return out


def _by_health(seen: Insight, path: str) -> Next | None:
    """The learning rate answers for a model that came apart, or that never moved."""
    if path != RATE or seen.sure is None:
        return None
    at = seen.sure.winner.config.training.learning_rate
    rules: dict[str, Finding] = {f.rule: f for f in seen.findings if f.level is not Level.NOTE}
    for rule in ("chosen_falling", "degenerate_text", "unlikely_text", "answers_lost"):
        found = rules.get(rule)
        if found is not None and found.level is Level.SERIOUS:
            values = tuple(tidy(at * share) for share in (0.25, 0.5))
            return Next(Choice(choice=(*values, at)), f"downwards from {show(at)}: {_lower(found.title)}")
    if (found := rules.get("worse_than_start")) is not None:
        moved = seen.sure.winner.record.value != seen.frame.start(seen.frame.goal.metric)
        factors = (0.1, 0.3) if moved else (3.0, 10.0)
        values = tuple(tidy(at * factor) for factor in factors)
        return Next(Choice(choice=values), f"far from {show(at)}: {_lower(found.title)}")
    if (found := rules.get("overfitting")) is not None:
        values = tuple(tidy(at * share) for share in (0.1, 0.3))
        return Next(Choice(choice=(*values, at)), f"downwards from {show(at)}: {_lower(found.title)}")
    if "coin_toss" in rules or "loss_plateau" in rules:
        rule = "coin_toss" if "coin_toss" in rules else "loss_plateau"
        limit = diverged_from(seen.frame, path)
        values = tuple(v for v in (tidy(at * 3), tidy(at * 10)) if limit is None or v < limit)
        if values:
            return Next(Choice(choice=(at, *values)), f"upwards from {show(at)}: {_lower(rules[rule].title)}")
    return None


def _no_wider_margin(seen: Insight, path: str) -> Next | None:
    """A hollow winner at the upper end of gamma is no reason for larger margins still."""
    if path not in _MARGINS or not _hollow(seen.findings):
        return None
    found = edge(seen.frame, path)
    if found is None or found.low_end or found.inner is None:
        return None
    values = (found.inner, found.at)
    return Next(
        Choice(choice=values), f"not beyond {show(found.at)}: a larger margin asks for what already costs answers"
    )


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _sft_term(findings: tuple[Finding, ...], base: TrialConfig, frame: SweepFrame) -> dict[str, tuple[Dimension, str]]:
    """An SFT term holds the chosen responses up, at the price of some margin."""
    loss = base.loss
    if not _hollow(findings) or {"loss.sft_weight", "loss.nll_scale"} & set(frame.paths):
        return {}
    why = "an SFT term keeps the chosen responses likely"
    if isinstance(loss, SimpoLoss):
        author = f"{why} (0.1 is the authors' value)"
        return {} if loss.cross_entropy_weight > 0 else {"loss.sft_weight": (Choice(choice=(0.0, 0.1)), author)}
    if isinstance(loss, SftLoss):
        return {}
    at = loss.nll_scale
    return {"loss.nll_scale": (Choice(choice=(at, 0.1 if at == 0 else tidy(2 * at))), why)}


def _hollow(findings: tuple[Finding, ...]) -> bool:
    """Whether the winner's margin was bought with its chosen responses or its answers."""
    return any(f.rule in ("chosen_falling", "answers_lost") and f.level is Level.SERIOUS for f in findings)


def _confirm(sure: Certainty, frame: SweepFrame) -> tuple[tuple[dict[str, tuple[Any, ...]], ...], str]:
    """The configurations that cannot be told apart, side by side."""
    cases = sure.tied[:_CONFIRMED]
    paths = [p for p in frame.paths if p != SEED and all(p in case.record.params for case in cases)]
    varied = [p for p in paths if len({repr(case.record.params[p]) for case in cases}) > 1]
    if len(cases) < 2 or not varied:
        return (), ""
    group = {p: tuple(case.record.params[p] for case in cases) for p in varied}
    listed = ", ".join(case.label for case in cases)
    return (group,), f"trials {listed} of {frame.name} could not be told apart on {sure.pairs or 'the'} held-out pairs"


def _where_from(sure: Certainty, frame: SweepFrame) -> str:
    value, words = brief(sure.winner.record.value), frame.words(sure.winner) or "nothing was searched"
    return (
        f"Starts from trial {sure.winner.label} of {frame.name} ({words}; {frame.goal.metric} "
        f"{value}, best of {len(frame.ranked)})."
    )


def _after_nothing(frame: SweepFrame, name: str) -> FollowUp:
    """No trial completed: only divergence says something, namely that the steps were too large."""
    diverged = [case for case in frame.trials if case.record.diverged]
    if not diverged:
        raise NothingLearned(
            "no trial completed and none diverged, so nothing says where to look next; "
            "`orchestrate report` lists why they stopped"
        )
    lowest = min(case.config.training.learning_rate for case in diverged)
    values = tuple(tidy(lowest * share) for share in (0.03, 0.1, 0.3))
    dimensions = dict(frame.space.dimensions) | {RATE: Choice(choice=values)}
    zipped = tuple(kept for group in frame.space.zipped if (kept := {p: v for p, v in group.items() if p != RATE}))
    why = {RATE: f"all that ran diverged, the lowest at {show(lowest)}: far smaller steps"}
    for path in frame.space.paths:
        if path != RATE:
            why[path] = f"as in {frame.name}, which could not compare them"
    head = (f"No trial of {frame.name} completed and {len(diverged)} diverged.",)
    search = SearchSpace(dimensions=dimensions, zipped=zipped)
    return FollowUp(_spec(frame, name, frame.spec.base, search), why, head)


def _spec(frame: SweepFrame, name: str, base: TrialConfig, search: SearchSpace) -> SweepSpec:
    size = search.size()
    grid = size is not None and size <= _MOST_POINTS
    tree = frame.spec.model_dump() | {
        "name": name,
        "description": f"Follow-up of {frame.name}",
        "base": base.model_dump(),
        "search": search.model_dump(),
        "sampler": (GridSampler() if grid else RandomSampler()).model_dump(),
        "budget": Budget(trials=None if grid else _TRIALS, concurrency=frame.spec.budget.concurrency).model_dump(),
        "storage": None,
    }
    once = ("enqueue", "warm_start")  # what the first sweep began with
    return SweepSpec.model_validate({key: value for key, value in tree.items() if key not in once})


_COLUMNS = 110


def as_yaml(made: FollowUp) -> str:
    """The sweep's file, each searched leaf under a comment that says why."""
    head = [f"# {line}" for text in made.head for line in wrap(text, _COLUMNS)]
    body: list[str] = []
    inside = False
    for line in dump(made.spec, brief=True).splitlines():
        inside = line == "search:" or (inside and line.startswith("  "))
        path = line.strip().split(":")[0] if inside and re.match(r"  \S", line) else ""
        body += [f"  # {part}" for part in wrap(made.why.get(path, ""), _COLUMNS)] if path else []
        body.append(line)
    return "\n".join([*head, *body]) + "\n"
