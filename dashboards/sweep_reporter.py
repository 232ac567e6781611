"""`DashboardReporter`: writes a sweep's MLflow description, saved charts and report for the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from dashboards.diagnosis.findings import DiagnosisFinding
from dashboards.mlflow_pages import run_description, saved_view
from orchestrator.interfaces import ReportFiles, UpdatesOf
from orchestrator.judge.judgements import best_judged_trial, parse_judgements
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, rank_trials

MAX_DIAGNOSED_TRIALS = 200
"""Above this many trials a running sweep is diagnosed only at its end: a diagnosis reads every metric."""


class DashboardReporter:
    """Implements `orchestrator.interfaces.SweepReporter`."""

    def charts_view(self, spec: SweepSpec, sweep_id: str) -> tuple[str, str]:
        """Return key and value of the experiment tag with the saved view of charts."""
        return saved_view(spec, sweep_id, time.time())

    def describe(self, study: Study, state: str, *, updates_of: UpdatesOf | None, diagnose: bool = True) -> str:
        """Return the sweep's current description in Markdown."""
        return _description(study, state, _findings(study, state, updates_of) if diagnose else ())

    def write_report(self, study: Study, state: str, *, updates_of: UpdatesOf | None) -> ReportFiles:
        """Write report.html and its figures into the sweep's folder.

        Raises:
            StorageRefused: a file cannot be written.
        """
        from dashboards.analysis.load_frame import load_frame
        from dashboards.diagnosis.diagnose import analyze
        from dashboards.report.html_page import draw_panels, write_figures, write_report

        analysis = analyze(load_frame(study, state=state, updates_of=updates_of))
        panels = draw_panels(analysis)
        page = write_report(analysis, study.folder.report, panels)
        figures = write_figures(analysis, study.folder.path / "figures", panels)
        return ReportFiles(page, figures, _description(study, state, analysis.findings, report=True))

    def pair_values(
        self, study: Study, records: Sequence[TrialRecord], *, initial: bool = False
    ) -> Mapping[int, Sequence[float]]:
        """Return trial number -> the first objective on each held-out pair, as the protocol says."""
        from dashboards.analysis.load_frame import pair_values

        return pair_values(study, records, initial=initial)


def _findings(study: Study, state: str, updates_of: UpdatesOf | None) -> Sequence[DiagnosisFinding]:
    from dashboards.analysis.load_frame import load_frame
    from dashboards.diagnosis import diagnose

    records = study.trials()
    if len(records) > MAX_DIAGNOSED_TRIALS or not rank_trials(records, *study.spec.objectives):
        return ()
    return diagnose.diagnose(load_frame(study, state=state, updates_of=updates_of))


def _description(study: Study, state: str, findings: Sequence[DiagnosisFinding], *, report: bool = False) -> str:
    judgements = best_judged_trial(study, parse_judgements(study.judgements()))
    return run_description(study.spec, study.trials(), state, findings=findings, report=report, judgements=judgements)
