"""What the sweep's own run says of it in MLflow: where it stands, the diagnosis, the judge's verdict."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from dashboards.diagnosis.finding import Finding
from dashboards.mlflow_pages.note import note
from orchestrator.driving.stages import load_report, steps_by_params
from orchestrator.judging.verdict import Verdict, headline, read_verdicts
from orchestrator.study.ranking import ranking
from orchestrator.study.study import Study
from orchestrator.tracking.names import NOTE
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.sink import SWEEP, Sink

FAILURE_FILE = "report-failure.txt"
DIAGNOSED = 200
"""Trials. A diagnosis reads every point: with more of them the driver leaves it to `orchestrate report` and the end."""


def tell_standing(study: Study, sink: Sink, state: str = "running") -> None:
    """The description as the sweep stands now, with the diagnosis once a trial has completed."""
    _tell(study, sink, state, _findings_so_far(study, state))


def tell_conclusion(study: Study, sink: Sink, state: str, findings: Sequence[Finding]) -> None:
    """The description at the end: with the diagnosis, and the report beside it."""
    _tell(study, sink, state, findings, report=True)


def keep_failure(study: Study, what: str, why: Exception) -> str:
    """A page that failed, kept in the history and, with its traceback, in a file beside the study; told in a line."""
    said = redact(f"{type(why).__name__}: {why}")
    place = study.folder.path / FAILURE_FILE
    place.write_text(redact("".join(traceback.format_exception(why))), encoding="utf-8")
    study.note(f"{what} failed", said)
    return f"{said}; the traceback is in {place}"


def best_judged(study: Study, verdicts: Sequence[Verdict]) -> tuple[int, str] | None:
    """The best trial that a judge has seen, and what it says in a sentence."""
    judged = {verdict.trial for verdict in verdicts}
    best = next((r.number for r in ranking(study.trials(), *study.spec.goals) if r.number in judged), None)
    if best is None:
        return None
    first = headline(verdict for verdict in verdicts if verdict.trial == best)
    return best, "no verdict" if first is None else first.in_words


def _tell(study: Study, sink: Sink, state: str, findings: Sequence[Finding], *, report: bool = False) -> None:
    judged = best_judged(study, read_verdicts(study.judged()))
    said = note(study.spec, study.trials(), state, findings=findings, report=report, judged=judged)
    sink.tag(SWEEP, {NOTE: said})


def _findings_so_far(study: Study, state: str) -> Sequence[Finding]:
    from dashboards.diagnosis.diagnose import diagnose
    from dashboards.gather import gather

    records = study.trials()
    if len(records) > DIAGNOSED or not ranking(records, *study.spec.goals):
        return ()
    data = load_report(study.folder)
    steps = None if data is None else steps_by_params(study.spec, data)
    try:
        return diagnose(gather(study, state=state, steps=steps))
    except Exception as why:  # noqa: BLE001 - a bug in a rule must not end days of training; it is kept and told
        keep_failure(study, "diagnosis", why)
        return ()
