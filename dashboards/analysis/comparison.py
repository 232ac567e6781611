"""Comparison of several sweeps by the comparison metric, which no loss hyperparameter scales.

Sweeps are comparable at equal data, initial model, tokens and pairs per update; mismatches are listed. `merge_frames`
makes one sweep of all trials, ranked by the comparison metric.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dashboards.analysis.held_out_pairs import Column, metric_by_pair
from dashboards.analysis.run_costs import costs
from dashboards.analysis.significance import analyze_significance, compared_trials
from dashboards.analysis.simultaneous_intervals import Difference
from dashboards.analysis.sweep_frame import SweepFrame, TrialCurves, TrialFrame
from dashboards.diagnosis.diagnose import SweepAnalysis, diagnose
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel, by_level, lower_first
from dashboards.formatting import format_value, short_names
from orchestrator.commands.rehearsal import is_rehearsal
from orchestrator.spec.objectives import Objective
from orchestrator.spec.search.dimensions import Choice
from orchestrator.spec.search.space import SearchSpace
from orchestrator.study.confirmation import FinalistSample, compare_finalists
from orchestrator.study.importance import importance, ped_anova
from trainer.metrics import CHOSEN, COMPARISON_METRIC, EXACT_ANSWERS, MARGIN

_TOKEN_RATIO = 1.05
"""Largest ratio of training tokens that counts as matched: the lengths of sampled pairs vary."""
_EFFORT_RATIO = 1.5
"""Largest ratio of complete trials that counts as matched."""
_INITIAL_METRIC = CHOSEN

Entry = tuple[SweepFrame, TrialFrame | None]


def find_mismatches(entries: Sequence[Entry]) -> list[str]:
    """Return one sentence, with the numbers, for each condition in which these sweeps and best trials differ."""
    problems = [
        _differ(
            "the data differs", entries, lambda frame, _: None if frame.data is None else frame.data.fingerprint[:12]
        ),
        _held_out_mismatch(entries),
        _differ("the initial models differ", entries, lambda frame, _: _model(frame)),
        _initial_mismatch(entries),
        _differ(
            "pairs per update differ",
            entries,
            lambda _, trial: None if trial is None else str(_pairs_per_update(trial)),
        ),
        _differ("updates differ", entries, lambda _, trial: None if trial is None else f"{trial.curves.last_update:,}"),
        _token_mismatch(entries),
        _differ("precision differs", entries, lambda frame, _: _precision(frame)),
        _differ(
            "the trained weights differ", entries, lambda frame, _: "LoRA" if frame.spec.base.lora else "all weights"
        ),
        _effort_mismatch(entries),
        _differ("the best had to keep other bounds", entries, lambda frame, _: _requirements(frame)),
    ]
    rehearsed = [
        f"{frame.name} is a rehearsal: its figures say nothing about the settings."
        for frame, _ in entries
        if is_rehearsal(frame.spec)
    ]
    unfinished = [f"{frame.name} is {frame.state}" for frame, _ in entries if frame.state != "finished"]
    return (
        [line for line in problems if line]
        + rehearsed
        + [f"{text}: its results are preliminary." for text in unfinished]
    )


def _differ(what: str, entries: Sequence[Entry], of: Callable[[SweepFrame, TrialFrame | None], str | None]) -> str:
    known = [(frame.name, value) for frame, trial in entries if (value := of(frame, trial)) is not None]
    if len({value for _, value in known}) < 2:
        return ""
    return f"Not matched: {what} (" + "; ".join(f"{name}: {value}" for name, value in known) + ")."


def _pairs_per_update(trial: TrialFrame) -> int:
    return trial.config.training.pairs_per_update


def _model(frame: SweepFrame) -> str:
    base, sft = frame.spec.base, frame.spec.sft
    name = base.model.name_or_path or "generated"
    after = "" if sft is None else f" after {sft.training.max_steps or 'some'} updates of sft"
    return f"{name}{after}"


def _requirements(frame: SweepFrame) -> str:
    return ", ".join(requirement.name for requirement in frame.spec.require) or "none"


def _precision(frame: SweepFrame) -> str:
    base = frame.spec.base
    return f"{base.model.dtype}{' with bf16 autocast' if base.training.bf16 else ''}"


def _initial_mismatch(entries: Sequence[Entry]) -> str:
    """Compare the initial models by their log-probs of the held-out pairs: equal names do not prove equal weights."""
    known = [(frame.name, value) for frame, _ in entries if (value := frame.initial_value(_INITIAL_METRIC)) is not None]
    if len(known) < 2 or all(math.isclose(value, known[0][1], rel_tol=1e-4) for _, value in known):
        return ""
    listed = "; ".join(f"{name}: {format_value(value)}" for name, value in known)
    return f"Not matched: the initial models have other log-probs of the held-out pairs (per chosen token {listed})."


def _held_out_mismatch(entries: Sequence[Entry]) -> str:
    known = [
        (frame.name, trial.held_out_pairs)
        for frame, trial in entries
        if trial is not None and trial.held_out_pairs is not None
    ]
    if len(known) < len([trial for _, trial in entries if trial is not None]):
        return "Some trials stored no log-probs of held-out pairs: differences to them have no interval."
    if not known or all(pairs.same_pairs(known[0][1]) for _, pairs in known):
        return ""
    listed = "; ".join(f"{name}: {len(pairs)}" for name, pairs in known)
    return f"Not matched: the held-out pairs are not the same ({listed}), so differences have no interval."


def _token_mismatch(entries: Sequence[Entry]) -> str:
    known = [(frame.name, trial.tokens) for frame, trial in entries if trial is not None]
    counted = [(name, tokens) for name, tokens in known if tokens is not None]
    if len(counted) < len(known):
        return "Some trials logged no token counts, so that equal training tokens cannot be checked."
    if len(counted) < 2 or max(tokens for _, tokens in counted) <= _TOKEN_RATIO * min(tokens for _, tokens in counted):
        return ""
    return (
        "Not matched: training tokens differ (" + "; ".join(f"{name}: {tokens:,.0f}" for name, tokens in counted) + ")."
    )


def _effort_mismatch(entries: Sequence[Entry]) -> str:
    counts = [(frame.name, len(frame.ranked)) for frame, _ in entries if frame.ranked]
    if len(counts) < 2 or max(count for _, count in counts) <= _EFFORT_RATIO * min(count for _, count in counts):
        return ""
    listed = "; ".join(f"{name}: {count}" for name, count in counts)
    return f"Not matched: the best of many trials looks better than the best of few (complete trials {listed})."


COMPARISON_OBJECTIVE = Objective(metric=COMPARISON_METRIC, direction="maximize")
_NOT_COMPARED = frozenset(
    f"training.{key}" for key in ("eval_steps", "save_steps", "logging_steps", "tokens_per_micro_batch", "max_steps")
)
"""Settings that only affect evaluation and logging, or that the comparison of updates covers."""
_EQUIVALENT_PATH = "loss.gamma_beta_ratio"


def merge_frames(frames: Sequence[SweepFrame]) -> SweepFrame:
    """Return all trials as one sweep ranked by the comparison metric.

    Trials are labeled `sweep/number` and described by every setting that varies among the sweeps.
    """
    first = frames[0]
    rows = [(frame, trial, trial.config.flat_params()) for frame in frames for trial in frame.trials]
    searched = list(dict.fromkeys(path for frame in frames for path in frame.paths))
    candidates = ["loss.kind", *searched, *_differing_fixed_paths(frames)]
    varied = [p for p in dict.fromkeys(candidates) if len({repr(flat_params.get(p)) for _, _, flat_params in rows}) > 1]
    if "loss.gamma" in varied:
        varied = [p for p in varied if p != _EQUIVALENT_PATH]
    paths = tuple(p for p in varied if all(_scalar(flat_params.get(p)) for _, _, flat_params in rows))
    trials: list[TrialFrame] = []
    for number, (frame, trial, flat_params) in enumerate(rows):
        value = trial.last(COMPARISON_METRIC) if trial.record.value is not None else None
        params = {p: flat_params[p] for p in paths if p in flat_params}
        record = dataclasses.replace(trial.record, number=number, params=params, value=value, values=None)
        label = f"{frame.name}/{trial.label}"
        trials.append(dataclasses.replace(trial, curves=TrialCurves(record, trial.curves.curves), label=label))
    listed = {
        p: tuple(
            {
                repr(trial.record.params[p]): trial.record.params[p] for trial in trials if p in trial.record.params
            }.values()
        )
        for p in paths
    }
    return SweepFrame(
        name=" against ".join(frame.name for frame in frames),
        description="",
        objective=COMPARISON_OBJECTIVE,
        paths=paths,
        space=SearchSpace(dimensions={p: Choice(choice=values) for p, values in listed.items() if values}),
        trials=tuple(trials),
        spec=first.spec,
        state="finished" if all(frame.state == "finished" for frame in frames) else "running",
        at=max(frame.at for frame in frames),
        hours=sum(frame.hours for frame in frames),
        data=first.data,
        gpus=any(frame.gpus for frame in frames),
        notices=tuple(notice for frame in frames for notice in frame.notices),
        sweeps=tuple(frame.name for frame in frames),
        short_names=short_names(paths),
    )


def _differing_fixed_paths(frames: Sequence[SweepFrame]) -> list[str]:
    """Return the `loss.*` and `training.*` settings of `base` that differ between the sweeps."""
    bases = [frame.spec.base.flat_params() for frame in frames]
    shared = set(bases[0]).intersection(*bases[1:])
    return sorted(
        path
        for path in shared
        if path.startswith(("loss.", "training."))
        and path not in _NOT_COMPARED
        and len({repr(base[path]) for base in bases}) > 1
    )


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


@dataclass(frozen=True, slots=True, eq=False)
class ComparedSweep:
    """One sweep and its best trial by the comparison metric; None where no trial completed."""

    frame: SweepFrame
    trial: TrialFrame | None
    value: float | None
    behind: Difference | None = None
    """Best sweep minus this one; None for the best one, and without common held-out pairs."""

    @property
    def loss_name(self) -> str:
        """`loss.kind`, with `loss.loss_type` where it is not the default."""
        loss = (self.trial.config if self.trial else self.frame.spec.base).loss
        kind = getattr(loss, "loss_type", None)
        plain = kind in (None, "sigmoid")
        return loss.kind if plain else f"{loss.kind} ({kind if isinstance(kind, str) else ' + '.join(kind or ())})"

    @property
    def own_best(self) -> TrialFrame | None:
        """Best trial by the sweep's own objective."""
        return next(iter(self.frame.eligible), None)


@dataclass(frozen=True, slots=True, eq=False)
class SweepComparison:
    """Compared sweeps, best first; warnings about conditions that differ; the analysis of all trials in one frame."""

    sweeps: tuple[ComparedSweep, ...]
    warnings: tuple[str, ...]
    analysis: SweepAnalysis

    @property
    def serious(self) -> tuple[DiagnosisFinding, ...]:
        """Serious findings about the sweeps, each with its sweep's name in the title."""
        return tuple(finding for finding in self.analysis.findings if finding.level is FindingLevel.SERIOUS)


def compare_sweeps(frames: Sequence[SweepFrame]) -> SweepComparison:
    """Rank these sweeps by the comparison metric of their best trials."""
    confirmed = all(frame.confirmation is not None for frame in frames)
    found = [_confirmed_sweep(frame) if confirmed else _compared_sweep(frame) for frame in frames]
    ranked = sorted(found, key=lambda sweep: (sweep.value is None, -(sweep.value or 0.0)))
    merged = merge_frames(frames)
    compared = [
        ranked[0],
        *(dataclasses.replace(sweep, behind=_behind(merged, ranked[0], sweep)) for sweep in ranked[1:]),
    ]
    significance = analyze_significance(merged)
    records = [trial.record for trial in merged.trials]
    weights = importance(merged.space, records, merged.objective)
    by_best = ped_anova(merged.space, records, merged.objective)
    own = [] if confirmed else _own_choices(compared)
    warnings = [*find_mismatches([(sweep.frame, sweep.trial) for sweep in compared]), *own]
    if not confirmed and (names := [frame.name for frame in frames if frame.confirmation is not None]):
        warnings.append(
            f"Only {', '.join(names)} confirmed {'its' if len(names) == 1 else 'their'} best by finalists: all values "
            "here are those of the searches."
        )
    if names := [frame.name for frame in frames if lacks_comparison(frame)]:
        warnings.append(
            f"{', '.join(names)}: not ranked here, as {COMPARISON_METRIC} is not measured on rows with one response "
            "each."
        )
    findings = by_level(finding for frame in frames for finding in _findings(frame))
    analysis = SweepAnalysis(merged, significance, tuple(findings), weights, by_best)
    return SweepComparison(tuple(compared), tuple(warnings), analysis)


def lacks_comparison(frame: SweepFrame) -> bool:
    """Return whether no trial that could be ranked measured the comparison metric: of rows with one response each."""
    return bool(frame.eligible) and all(trial.last(COMPARISON_METRIC) is None for trial in frame.eligible)


def _findings(frame: SweepFrame) -> list[DiagnosisFinding]:
    """Return the findings about a sweep ranked by the comparison metric, with its name in titles and trials."""
    ranked = merge_frames([frame])
    listed = tuple(trial.label for trial in ranked.trials)
    return [
        dataclasses.replace(
            finding, title=f"{frame.name}: {lower_first(finding.title)}", trials=finding.trials or listed
        )
        for finding in diagnose(ranked)
    ]


def _compared_sweep(frame: SweepFrame) -> ComparedSweep:
    known = [(value, trial) for trial in frame.eligible if (value := trial.last(COMPARISON_METRIC)) is not None]
    if not known:
        return ComparedSweep(frame, None, None)
    value, trial = max(known, key=lambda row: row[0])
    return ComparedSweep(frame, trial, value)


def _confirmed_sweep(frame: SweepFrame) -> ComparedSweep:
    """Return the sweep with the configuration that its finalists recommend, by their mean on the confirming rows."""
    trial = next((trial for trial in frame.finalists if trial.record.is_recommended), None)
    return ComparedSweep(frame, trial, None if trial is None else trial.last(COMPARISON_METRIC))


def _seed_values(trial: TrialFrame) -> Column | None:
    """Return the comparison metric of each seed on each held-out pair, [S, N]; None where the pairs of one differ."""
    found = [metric_by_pair(COMPARISON_METRIC, pairs, trial.config.loss) for pairs in trial.seed_pairs]
    known = [values for values in found if values is not None]
    same = len({len(values) for values in known}) == 1
    return np.stack(known) if same and len(known) == trial.record.complete_seeds else None


def _behind(merged: SweepFrame, first: ComparedSweep, other: ComparedSweep) -> Difference | None:
    """Return how far a sweep's best trial is behind the first one's, jointly over all pairs of trials of all sweeps.

    Of confirmed sweeps, how far its finalist is behind, counting seeds and pairs.
    """
    if first.trial is not None and first.trial.record.finalist_of is not None:
        return None if other.trial is None else _finalist_behind(first.trial, other.trial)
    compared = compared_trials(merged)
    labels = [None if each.trial is None else f"{each.frame.name}/{each.trial.label}" for each in (first, other)]
    trials = [next((t for t in merged.trials if t.label == label), None) for label in labels]
    a, b = trials
    return None if compared is None or a is None or b is None else compared.difference(a, b)


def _finalist_behind(first: TrialFrame, other: TrialFrame) -> Difference | None:
    if first.held_out_pairs is None or other.held_out_pairs is None:
        return None
    ours, theirs = _seed_values(first), _seed_values(other)
    if ours is None or theirs is None or not first.held_out_pairs.same_pairs(other.held_out_pairs):
        return None
    apart = compare_finalists([FinalistSample(0, ours, 0.0), FinalistSample(1, theirs, 0.0)], (), 1.0).values[1].behind
    if apart is None:
        return None
    spread = float((ours.mean(axis=0) - theirs.mean(axis=0)).std())
    return Difference(apart.value, apart.low, apart.high, ours.shape[1], spread)


def _own_choices(sweeps: Sequence[ComparedSweep]) -> list[str]:
    return [
        f"{sweep.frame.name}: {_own_objectives(sweep.frame)} trial {own.label}, "
        f"the comparison metric trial {sweep.trial.label}."
        for sweep in sweeps
        if sweep.trial is not None and (own := sweep.own_best) is not None and own is not sweep.trial
    ]


def _own_objectives(frame: SweepFrame) -> str:
    metrics = ", ".join(objective.metric for objective in frame.objectives)
    if frame.further_objectives:
        return f"the Pareto front of its own objectives ({metrics}) begins with"
    return f"its own objective ({metrics}) selects"


def as_json(found: SweepComparison) -> dict[str, Any]:
    """Return the comparison as printed by `compare --json`."""
    rows: list[dict[str, Any]] = []
    for rank, sweep in enumerate(found.sweeps, 1):
        usage = costs(sweep.frame.all_trials)
        rows.append(
            {
                "place": rank if sweep.trial else None,
                "sweep": sweep.frame.name,
                "objective": sweep.loss_name,
                "trial": None if sweep.trial is None else sweep.trial.number,
                "params": {} if sweep.trial is None else dict(sweep.trial.record.params),
                COMPARISON_METRIC: sweep.value,
                MARGIN: None if sweep.trial is None else sweep.trial.last(MARGIN),
                "start": sweep.frame.initial_value(COMPARISON_METRIC),
                "chosen_change": None if sweep.trial is None else sweep.trial.change(CHOSEN),
                EXACT_ANSWERS: None if sweep.trial is None else sweep.trial.last(EXACT_ANSWERS),
                "behind": None
                if sweep.behind is None
                else {
                    "mean": sweep.behind.mean,
                    "low": sweep.behind.low,
                    "high": sweep.behind.high,
                    "joint_low": sweep.behind.joint_low,
                    "joint_high": sweep.behind.joint_high,
                    "comparisons": sweep.behind.comparisons,
                    "clear": sweep.behind.is_clear,
                },
                "complete": len(sweep.frame.ranked),
                "trials": len(sweep.frame.trials),
                "updates": None if sweep.trial is None else sweep.trial.curves.last_update,
                "tokens": None if sweep.trial is None else sweep.trial.tokens,
                "slot_hours": usage.seconds / 3600,
            }
        )
    serious = [finding.as_json() for finding in found.serious]
    return {"ruler": COMPARISON_METRIC, "sweeps": rows, "warnings": list(found.warnings), "serious": serious}
