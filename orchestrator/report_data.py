"""Data of `report`, `suggest` and `compare`: page, follow-up sweep and comparison from sweep frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dashboards.analysis.comparison import SweepComparison, compare_sweeps
from dashboards.analysis.follow_up import follow_up, to_yaml
from dashboards.analysis.interactions import interacting_paths, interactions
from dashboards.analysis.load_frame import load_frame
from dashboards.analysis.significance import recommend
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.diagnose import SweepAnalysis, analyze, diagnose
from dashboards.diagnosis.findings import reasons_not_to_use
from dashboards.report.comparison_page import comparison_page
from dashboards.report.html_page import write_page, write_report
from dashboards.report.panels.result_panels import trials_to_avoid
from orchestrator.commands.rehearsal import is_rehearsal
from orchestrator.commands.status import sweep_state
from orchestrator.driver.data_stage import load_data_report, updates_by_params
from orchestrator.errors import OrchestrateError, StorageRefused
from orchestrator.folders import SweepFolder, existing_sweep, known_sweeps
from orchestrator.judge.judgements import as_json as judgements_as_json
from orchestrator.study.repeats import first_number
from orchestrator.study.study import Study
from trainer.storage.atomic_files import write_text


class NothingToReport(OrchestrateError):
    """The sweep has no study database yet."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} has not started a trial yet: there is nothing to report")


class OutputExists(OrchestrateError):
    """The output file exists already."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} exists already and is not overwritten; name another file")


def load_sweep_frame(folder: SweepFolder) -> SweepFrame:
    """Load a sweep's frame.

    Raises:
        NothingToReport: no trial has started.
    """
    if not Study.exists(folder):
        raise NothingToReport(folder.name)
    with Study.open(folder, read_only=True) as study, study.at_one_moment():
        report = load_data_report(folder)
        updates_of = None if report is None else updates_by_params(study.spec, report)
        return load_frame(study, state=sweep_state(study), updates_of=updates_of)


def report(name: str, root: Path, to: Path | None) -> dict[str, Any]:
    """Write the report to `to` (default: report.html in the sweep's folder) and return its contents for `--json`."""
    folder = existing_sweep(root, name)
    analysis = analyze(load_sweep_frame(folder))
    path = write_report(analysis, to or folder.report)
    return {"file": str(path), **as_json(analysis)}


def reasons_not_to_export(name: str, root: Path, trial: int) -> list[str]:
    """Return why the diagnosis advises not to use this trial's model, in lower case; empty without such findings.

    Findings about a configuration of the search hold for it as a finalist.
    """
    frame = load_sweep_frame(existing_sweep(root, name))
    if is_rehearsal(frame.spec):
        return ["it belongs to a rehearsal"]
    of = next((t.record.finalist_of for t in frame.finalist_trials if t.number == trial), None)
    found = next((t for t in frame.trials if t.number == trial), None) if of is None else frame.in_search(of)
    return reasons_not_to_use(diagnose(frame), str(trial) if found is None else found.label)


def suggest(name: str, root: Path, to: Path | None) -> str:
    """Return the follow-up sweep file as YAML, also written to `to` if given.

    Raises:
        NothingLearned: no search range can be derived from the trials.
        OutputExists: `to` exists already.
        StorageRefused: `to` cannot be written.
    """
    made = follow_up(analyze(load_sweep_frame(existing_sweep(root, name))), known_sweeps(root))
    text = to_yaml(made)
    if to is not None:
        if to.exists():
            raise OutputExists(to)
        try:
            write_text(to, text)
        except OSError as error:
            raise StorageRefused(f"{to} cannot be written: {error}") from error
    return text


def compare(names: Sequence[str], root: Path, to: Path | None) -> SweepComparison:
    """Return the comparison of these sweeps, also written as an HTML page to `to` if given."""
    frames = [load_sweep_frame(existing_sweep(root, name)) for name in dict.fromkeys(names)]
    found = compare_sweeps(frames)
    if to is not None:
        write_page(to, comparison_page(found))
    return found


def as_json(analysis: SweepAnalysis) -> dict[str, Any]:
    """Return the report's conclusions as printed by `report --json`."""
    frame, significance = analysis.frame, analysis.significance
    paths = interacting_paths(frame, list(analysis.importances))
    found: dict[str, Any] = {
        "name": frame.name,
        "state": frame.state,
        "goal": {"metric": frame.objective.metric, "direction": frame.objective.direction},
        "goals": [{"metric": each.metric, "direction": each.direction} for each in frame.objectives],
        "front": [trial.number for trial in frame.pareto_front],
        "start": frame.initial_value(frame.objective.metric),
        "best": None,
        "importance": analysis.importances,
        "importance_ped_anova": analysis.ped_anova.shares,
        "interactions": [found.as_json() for found in interactions(frame, paths)],
        "findings": [finding.as_json() for finding in analysis.findings],
        "judge": judgements_as_json([judgement for trial in frame.judged for judgement in trial.judgements]),
        "notices": list(frame.notices),
    }
    if frame.spec.require:
        found["requirements"] = frame.requirements_text
        found["breaks"] = {trial.label: list(trial.record.breaks) for trial in frame.ranked if trial.record.breaks}
    if (confirmation := frame.confirmation) is not None:
        found["finalists"] = confirmation.as_json({first_number(t.record): t.record.value for t in frame.trials})
    if significance is not None:
        against = significance.against_initial
        found["best"] = {
            "trial": significance.winner.number,
            "value": significance.winner.record.value,
            "params": dict(significance.winner.record.params),
            "gain": None
            if against is None
            else {
                "mean": against.mean,
                "low": against.low,
                "high": against.high,
                "joint_low": against.joint_low,
                "joint_high": against.joint_high,
                "comparisons": against.comparisons,
                "clear": against.is_clear,
            },
            "held_out_pairs": significance.pair_count,
            "would_win": significance.first_place_shares.get(significance.winner.number),
            "cannot_be_told_apart": [trial.number for trial in significance.not_distinguishable],
        }
        recommended = recommend(frame, significance, trials_to_avoid(analysis))
        if recommended is not None:
            found["best"]["recommended"] = {"trial": recommended[0].number, "reason": recommended[1]}
    return found
