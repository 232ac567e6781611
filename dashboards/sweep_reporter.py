"""`DashboardReporter`: a sweep's description in MLflow, its saved charts and its report, for the driver."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dashboards.diagnosis.findings import Finding
from dashboards.mlflow_pages import note, saved_view
from orchestrator.interfaces import ReportFiles, StepsOf
from orchestrator.judge.judgements import best_judged, read_verdicts
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import ranking
from orchestrator.tracking.run_metadata import trials_filter

DIAGNOSED = 200
"""Trials. A diagnosis reads every metric: with more of them a running sweep leaves it to its end and to `report`."""


class DashboardReporter:
    """Implements `orchestrator.interfaces.SweepReporter`."""

    def charts_view(self, spec: SweepSpec) -> tuple[str, str]:
        """Return key and value of the experiment tag with the saved view of charts."""
        return saved_view(spec, trials_filter(spec.name), time.time())

    def describe(self, study: Study, state: str, *, steps: StepsOf | None, diagnose: bool = True) -> str:
        """Return the description of the sweep as it stands now."""
        return _description(study, state, _findings(study, state, steps) if diagnose else ())

    def write_report(self, study: Study, state: str, *, steps: StepsOf | None) -> ReportFiles:
        """Write report.html and its figures into the sweep's folder."""
        from dashboards.analysis.load_frame import gather
        from dashboards.diagnosis.diagnose import insight
        from dashboards.report.html_page import panels_of, write_figures, write_report

        seen = insight(gather(study, state=state, steps=steps))
        panels = panels_of(seen)
        page = write_report(seen, study.folder.report, panels)
        figures = write_figures(seen, study.folder.path / "figures", panels)
        return ReportFiles(page, figures, _description(study, state, seen.findings, report=True))


def _findings(study: Study, state: str, steps: StepsOf | None) -> Sequence[Finding]:
    from dashboards.analysis.load_frame import gather
    from dashboards.diagnosis import diagnose

    records = study.trials()
    if len(records) > DIAGNOSED or not ranking(records, *study.spec.goals):
        return ()
    return diagnose.diagnose(gather(study, state=state, steps=steps))


def _description(study: Study, state: str, findings: Sequence[Finding], *, report: bool = False) -> str:
    judged = best_judged(study, read_verdicts(study.judged()))
    return note(study.spec, study.trials(), state, findings=findings, report=report, judged=judged)
