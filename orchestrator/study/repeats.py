"""Repeats: trials that differ in `training.seed` only are one configuration, with the mean of its seeds.

Repeat k of a configuration has the first trial's seed + k. Samplers, ranking, tables and the report see one trial for
each configuration; its value is the mean over the seeds that completed, with a t interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, TypeVar

from orchestrator.spec.objectives import Objective
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import SEED
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.trial_records import SeedResult, TrialRecord, TrialState, pareto_front, rank_trials
from orchestrator.study.trial_snapshots import TrialSnapshot, as_running

CONFIDENCE = 0.95
"""Of the t interval of a mean over seeds."""

AnyTrial = TypeVar("AnyTrial", TrialRecord, TrialSnapshot)


def group_by_configuration(trials: Sequence[AnyTrial], space: SearchSpace) -> list[list[AnyTrial]]:
    """Return the trials of each configuration, which differ in `training.seed` only, in order of their first numbers.

    A seed that is searched over a range is a setting like others; forks and trials with equal seeds stay apart.
    Finalists follow the search: those of one configuration are a group, apart from its trials in the search.
    """
    finalists: dict[int, list[AnyTrial]] = {}
    for trial in trials:
        if trial.finalist_of is not None:
            finalists.setdefault(trial.finalist_of, []).append(trial)
    search = [trial for trial in trials if trial.finalist_of is None] if finalists else trials
    return [*_search_groups(search, space), *finalists.values()]


def _search_groups(trials: Sequence[AnyTrial], space: SearchSpace) -> list[list[AnyTrial]]:
    if space.is_range(SEED) or not any(SEED in trial.params for trial in trials):
        return [[trial] for trial in trials]
    groups: list[list[AnyTrial]] = []
    known: dict[str, tuple[list[AnyTrial], set[Any]]] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        if _is_fork(trial):
            groups.append([trial])
            continue
        key, seed = configuration_key(trial.params), trial.params.get(SEED)
        members, seeds = known.get(key, ([], set[Any]()))
        if not members or seed in seeds:
            members, seeds = known[key] = ([], set())
            groups.append(members)
        members.append(trial)
        seeds.add(seed)
    return groups


def configuration_key(params: Mapping[str, Any]) -> str:
    """Return a text that is equal for params which differ in `training.seed` only."""
    return json.dumps({path: value for path, value in params.items() if path != SEED}, sort_keys=True)


def _is_fork(trial: TrialRecord | TrialSnapshot) -> bool:
    return trial.is_fork if isinstance(trial, TrialSnapshot) else trial.fork is not None


# --- which repeat comes next -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NextRepeat:
    """The next trial of a configuration with fewer than `repeats`: its trials so far, and the seed."""

    group: tuple[TrialSnapshot, ...]
    seed: int


def next_repeat(
    trials: Sequence[TrialSnapshot], visible: Sequence[TrialSnapshot], spec: SweepSpec, *, by_command: bool = False
) -> NextRepeat | None:
    """Return the next repeat to train: of the first configuration with too few; None if there is none.

    A configuration of which a visible trial was pruned or diverged gets no more.

    Args:
        trials: All trials.
        visible: The trials with the results that the next trial may depend on.
        spec: The sweep.
        by_command: Only repeats of trials enqueued while the sweep runs.
    """
    if spec.repeats == 1:
        return None
    stopped = {trial.number for trial in visible if trial.diverged or trial.state is TrialState.PRUNED}
    for group in group_by_configuration(trials, spec.search):
        first = group[0]
        if len(group) >= spec.repeats or first.is_hidden or (by_command and not first.by_command):
            continue
        if any(trial.number in stopped for trial in group):
            continue
        begun = int(first.params.get(SEED, spec.base.training.seed))
        used = {int(trial.params.get(SEED, spec.base.training.seed)) for trial in group}
        seed = next(begun + k for k in range(len(used) + 1) if begun + k not in used)
        return NextRepeat(tuple(group), seed)
    return None


def free_seed(group: Sequence[TrialRecord], base_seed: int, waiting: Sequence[int] = ()) -> int:
    """Return the seed of the next trial of a configuration: the smallest after its first that none of them has."""
    used = {int(record.params.get(SEED, base_seed)) for record in group} | set(waiting)
    begun = int(group[0].params.get(SEED, base_seed))
    return next(begun + k for k in range(len(used) + 1) if begun + k not in used)


# --- one trial for a configuration -----------------------------------------------------------------------------------


def merge_snapshots(trials: Sequence[TrialSnapshot], spec: SweepSpec) -> list[TrialSnapshot]:
    """Return one snapshot a configuration, for samplers, with the number and params of its first trial.

    It runs until all its trials have ended. Its values are the means over the complete ones; if one was pruned or
    diverged, the configuration counts as pruned or diverged. Finalists are left out.
    """
    trials = [trial for trial in trials if trial.finalist_of is None]
    if SEED in spec.search.paths:
        return trials
    groups = group_by_configuration(trials, spec.search)
    return [g[0] if len(g) == 1 and spec.repeats == 1 else _merge(g, spec.repeats) for g in groups]


def _merge(group: Sequence[TrialSnapshot], repeats: int) -> TrialSnapshot:
    first = replace(group[0], is_enqueued=all(trial.is_enqueued for trial in group))
    stopped = any(trial.diverged or trial.state is TrialState.PRUNED for trial in group)
    waits = len(group) < repeats and not stopped and not first.is_fork
    if waits or any(not trial.state.is_final for trial in group):
        return as_running(first)
    diverged = next((trial for trial in group if trial.diverged), None)
    pruned = [trial for trial in group if trial.state is TrialState.PRUNED]
    complete = [trial for trial in group if trial.state is TrialState.COMPLETE]
    if diverged is not None:
        return replace(first, state=diverged.state, values=diverged.values, curve=diverged.curve, diverged=True)
    members = pruned or complete
    if not members:
        return replace(first, state=TrialState.FAILED, values=None)
    values = [trial.values for trial in members if trial.values is not None]
    means = tuple(fmean(column) for column in zip(*values, strict=True)) if values else None
    return replace(
        first,
        state=members[0].state,
        values=means,
        curve=members[0].curve,
        diverged=False,
        violations=mean_violations(members),
    )


def mean_violations(trials: Sequence[TrialSnapshot] | Sequence[TrialRecord]) -> dict[str, float]:
    """Return each requirement's mean violation over the trials: that of the mean of its metric."""
    known = [trial.violations for trial in trials if trial.violations]
    return {name: fmean(violations[name] for violations in known) for name in (known[0] if known else ())}


def merge_records(records: Sequence[TrialRecord], spec: SweepSpec) -> list[TrialRecord]:
    """Return one record a configuration. A configuration of one trial is its record.

    Of several: values and metrics are means over the complete trials; number, attempts and step are those of the
    complete trial with the best first objective, whose weights stand for the configuration; seconds are the sum. Of
    finalists, a trial that keeps the requirements stands before one that breaks one.
    """
    groups, is_repeated = group_by_configuration(records, spec.search), _is_repeated(spec)
    return [
        merge_record(g, spec) if is_repeated or len(g) > 1 or g[0].finalist_of is not None else g[0] for g in groups
    ]


def _is_repeated(spec: SweepSpec) -> bool:
    """Whether the sweep trains configurations with several seeds, so that a single one is named as such."""
    return spec.repeats > 1 or spec.search.choices(SEED) is not None


def merge_record(group: Sequence[TrialRecord], spec: SweepSpec) -> TrialRecord:
    """Return the record of one configuration; see `merge_records`."""
    complete = [record for record in group if record.state is TrialState.COMPLETE and record.value is not None]
    sign = -1.0 if spec.first_objective.direction == "maximize" else 1.0
    best = min(complete, key=lambda r: _for_weights(r, sign)) if complete else group[0]
    seeds = tuple(
        SeedResult(r.number, int(r.params.get(SEED, spec.base.training.seed)), r.state, r.value) for r in group
    )
    merged = replace(
        best,
        state=_state_of(group, complete),
        params={path: value for path, value in best.params.items() if path != SEED},
        origin=best.origin if best.finalist_of is None else f"finalist: trial {best.finalist_of}'s configuration",
        seeds=seeds,
        seconds=sum(record.seconds for record in group),
        started_at=min((r.started_at for r in group if r.started_at is not None), default=None),
        finished_at=max((r.finished_at for r in group if r.finished_at is not None), default=None),
    )
    if not complete:
        return replace(merged, reason=next((r.reason for r in group if r.reason), ""))
    rows = [record.values or (record.value or 0.0,) for record in complete]
    values = tuple(fmean(column) for column in zip(*rows, strict=True))
    names = [name for name in complete[0].metrics if all(name in record.metrics for record in complete)]
    return replace(
        merged,
        value=values[0],
        values=values,
        interval=_interval_of(complete, [row[0] for row in rows]),
        metrics={name: fmean(record.metrics[name] for record in complete) for name in names},
        violations=mean_violations(complete),
    )


def _interval_of(complete: Sequence[TrialRecord], values: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval of the mean: of finalists that were compared that of the comparison, which counts pairs."""
    known = {record.confirmed_interval for record in complete}
    return known.pop() if len(known) == 1 and None not in known else mean_interval(values)


def _for_weights(record: TrialRecord, sign: float) -> tuple[bool, float, int]:
    broken = record.finalist_of is not None and not record.keeps_requirements
    return broken, sign * (record.value or 0.0), record.number


def _state_of(group: Sequence[TrialRecord], complete: Sequence[TrialRecord]) -> TrialState:
    for state in (TrialState.RUNNING, TrialState.PAUSED):
        if any(record.state is state for record in group):
            return state
    if complete:
        return TrialState.COMPLETE
    return TrialState.PRUNED if any(record.state is TrialState.PRUNED for record in group) else TrialState.FAILED


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% t interval of the mean, which assumes normal values; None for fewer than two finite values."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


# --- ranking ---------------------------------------------------------------------------------------------------------


def rank_configurations(
    records: Sequence[TrialRecord], spec: SweepSpec, objectives: Sequence[Objective] = ()
) -> list[TrialRecord]:
    """Return the configurations with a value, best mean first; those with all their seeds come before the others.

    Else a configuration with one lucky seed would win. `objectives`: by default the sweep's. Configurations whose mean
    breaks a requirement come last. Finalists: see `confirmed_first`.
    """
    ranked = [r for tier in _tiers(records, spec) for r in rank_trials(tier, *(objectives or spec.objectives))]
    return sorted(confirmed_first(ranked), key=lambda record: not record.keeps_requirements)


CONFIRMING_SEEDS = 2
"""Complete seeds from which on a configuration's value as a finalist counts: one has no interval."""


def confirmed_first(ranked: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return configurations that are confirmed as finalists before those of the search, in the order given.

    The recommended one is the first. A confirmed configuration has its value as a finalist only, not that of the
    search; finalists with too few complete seeds are left out.
    """
    finalists = [r for r in ranked if r.finalist_of is not None and r.complete_seeds >= CONFIRMING_SEEDS]
    finalists.sort(key=lambda record: not record.is_recommended)
    confirmed = {record.finalist_of for record in finalists}
    search = [r for r in ranked if r.finalist_of is None and first_number(r) not in confirmed]
    return [*finalists, *search]


def first_number(record: TrialRecord) -> int:
    """Return the number of the first trial of a configuration."""
    return record.seeds[0].trial if record.seeds else record.number


def front_of_configurations(records: Sequence[TrialRecord], spec: SweepSpec) -> list[TrialRecord]:
    """Return the Pareto front of the configurations with the most of their seeds; with one objective, the best.

    Of finalists where these are confirmed, the recommended one first.
    """
    if any(record.finalist_of is not None for record in records):
        best = [record for record in rank_configurations(records, spec) if record.keeps_requirements]
        confirmed = [record for record in best if record.finalist_of is not None]
        if len(spec.objectives) == 1:
            return best[:1]
        front = pareto_front(confirmed, spec.objectives) if confirmed else []
        if front:
            return sorted(front, key=lambda record: not record.is_recommended)
        records = [record for record in records if record.finalist_of is None]
    return next((front for tier in _tiers(records, spec) if (front := pareto_front(tier, spec.objectives))), [])


def _tiers(records: Sequence[TrialRecord], spec: SweepSpec) -> list[list[TrialRecord]]:
    """Return the configurations by how many of their seeds are missing, fewest first."""
    tiers: dict[int, list[TrialRecord]] = {}
    seeds = spec.seeds_per_configuration
    for record in merge_records(records, spec):
        # A merged record is ranked once it has a value, also while further seeds run.
        ranked = replace(record, state=TrialState.COMPLETE) if record.value is not None and record.seeds else record
        wanted = seeds if record.finalist_of is None else _finalist_seeds(record, spec)
        missing = max(0, wanted - record.complete_seeds)
        tiers.setdefault(missing, []).append(ranked)
    return [tiers[missing] for missing in sorted(tiers)]


def _finalist_seeds(record: TrialRecord, spec: SweepSpec) -> int:
    return len(record.seeds) if spec.finalists is None else spec.finalists.seeds


def is_decided(group: Sequence[TrialRecord], spec: SweepSpec) -> bool:
    """Return whether a configuration's trials have all ended and no more are to come, so that its mean is final."""
    if not all(record.state.is_final for record in group):
        return False
    if group[0].finalist_of is not None:
        return spec.finalists is None or len(group) >= spec.finalists.seeds
    stopped = spec.repeats > 1 and any(record.state is TrialState.PRUNED for record in group)
    return stopped or group[0].fork is not None or len(group) >= spec.seeds_per_configuration
