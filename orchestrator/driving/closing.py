"""The last thing a sweep does: its report and its description, beside the study and on the parent run."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.driving.describing import keep_failure, tell_conclusion, tell_standing
from orchestrator.driving.stages import load_report, steps_by_params
from orchestrator.engine.stopping import Stop, StopKind
from orchestrator.engine.view import View
from orchestrator.study.study import Study
from orchestrator.tracking.sink import SWEEP, Sink

OVER = frozenset({StopKind.FINISHED, StopKind.OUT_OF_BUDGET, StopKind.TARGET, StopKind.SAME_BUG})


def write_last_report(study: Study, sink: Sink, view: View, ended: Stop) -> None:
    """Write report.html and attach it, unless the sweep was interrupted and goes on later."""
    if not study.trials():
        return
    if ended.kind not in OVER:
        tell_standing(study, sink, "interrupted")
        return
    view.stage("writing the report")
    attach_report(study, sink, view.say, "finished" if ended.kind is StopKind.FINISHED else "interrupted")


def attach_report(study: Study, sink: Sink, say: Callable[[str], None], state: str) -> None:
    """Write report.html and its figures, attach them to the parent run, describe it. `state`: as the report says."""
    from dashboards.gather import gather
    from dashboards.insight import insight
    from dashboards.page import panels_of, write_figures, write_report

    data = load_report(study.folder)
    steps = None if data is None else steps_by_params(study.spec, data)
    try:
        seen = insight(gather(study, state=state, steps=steps))
        panels = panels_of(seen)
        path = write_report(seen, study.folder.report, panels)
        figures = write_figures(seen, study.folder.path / "figures", panels)
    except Exception as why:  # noqa: BLE001 - a bug in a page must not end days of training; it is kept and told
        kept = keep_failure(study, "report", why)
        say(f"the report could not be made ({kept}); try orchestrate report {study.spec.name}")
        tell_standing(study, sink, state)
        return
    sink.artifact(SWEEP, path)
    sink.artifact(SWEEP, figures, "figures")
    tell_conclusion(study, sink, state, seen.findings)
