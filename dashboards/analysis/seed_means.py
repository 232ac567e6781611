"""Configurations trained with several seeds as one trial each: mean curves for tables, figures and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from dashboards.analysis.sweep_frame import TrialCurves, TrialFrame
from orchestrator.spec.search.trial_params import SEED
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.repeats import merge_records
from orchestrator.study.trial_records import TrialState

Curve = list[tuple[int, float]]


def compared_paths(spec: SweepSpec) -> tuple[str, ...]:
    """Return the searched settings that tell configurations apart: without a listed `training.seed`."""
    return tuple(path for path in spec.search.paths if path != SEED or spec.search.is_range(SEED))


def merge_curves(all_curves: Sequence[TrialCurves], spec: SweepSpec) -> list[TrialCurves]:
    """Return one `TrialCurves` a configuration, in order of first numbers; a configuration of one trial keeps its own.

    Curves are means over the complete trials, at the updates that all of them have.
    """
    by_number = {curves.record.number: curves for curves in all_curves}
    out: list[TrialCurves] = []
    for record in merge_records([curves.record for curves in all_curves], spec):
        own = by_number[record.number]
        if not record.seeds:
            out.append(own)
            continue
        complete = [by_number[seed.trial] for seed in record.seeds if seed.state is TrialState.COMPLETE]
        out.append(TrialCurves(record, _mean_curves(complete) if complete else own.curves))
    return out


def merge_frames(trials: Sequence[TrialFrame], spec: SweepSpec) -> tuple[TrialFrame, ...]:
    """Return one frame a configuration; samples, held-out pairs and judgements are those of its best seed."""
    by_number = {trial.number: trial for trial in trials}
    merged = merge_curves([trial.curves for trial in trials], spec)
    return tuple(
        replace(
            by_number[curves.record.number],
            curves=curves,
            label=curves.record.label,
            seed_pairs=tuple(
                pairs
                for seed in curves.record.seeds
                if seed.state is TrialState.COMPLETE and (pairs := by_number[seed.trial].held_out_pairs) is not None
            ),
        )
        if curves.record.seeds
        else by_number[curves.record.number]
        for curves in merged
    )


def _mean_curves(all_curves: Sequence[TrialCurves]) -> dict[str, Curve]:
    out: dict[str, Curve] = {}
    for name in all_curves[0].curves:
        each = [dict(curves.curves.get(name, ())) for curves in all_curves]
        common = [step for step in each[0] if all(step in curve for curve in each)]
        if common:
            out[name] = [(step, fmean(curve[step] for curve in each)) for step in common]
    return out
