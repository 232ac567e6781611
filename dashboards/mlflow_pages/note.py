"""The description of a sweep's parent run in MLflow: where it stands, the winner, the diagnosis, the trials, links.

Markdown; links of the form `mlflow:...` are made whole by the tracking room, which knows MLflow's ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from dashboards.diagnosis.finding import Finding
from dashboards.frame import endings, short_names, show, show_params, told
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.ranking import ranking
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState

_ROWS, _STOPPED, _FINDINGS, _MORE, _TITLES = 10, 8, 3, 4, 2
"""MLflow takes 8000 characters."""
_LONGEST = 160
_EVIDENCE = 320


def note(
    spec: SweepSpec,
    records: Sequence[TrialRecord],
    state: str,
    *,
    findings: Sequence[Finding] = (),
    report: bool = False,
    judged: tuple[int, str] | None = None,
) -> str:
    """The description. `state`: running, finished, interrupted. `report`: whether report.html is attached. `judged`:
    the best trial that a judge has seen, and its verdict.
    """
    parts = [_standing(spec, records, state)]  # MLflow folds what comes after the first lines
    if findings:
        parts.append(" · ".join(f"**{finding.level}:** {_line(finding.title)}" for finding in findings[:_TITLES]))
    if judged is not None:
        parts.append(f"**Judge:** [trial {judged[0]}](mlflow:{judged[0]}) {_line(judged[1], _EVIDENCE)}")
    parts.append(_links(spec, report))
    parts.append(spec.description or f"A sweep over {', '.join(spec.search.paths) or 'one configuration'}.")
    if findings:
        parts += ["### Diagnosis", "\n".join(_finding(finding) for finding in findings[:_FINDINGS])]
        if rest := findings[_FINDINGS : _FINDINGS + _MORE]:
            parts.append("Also: " + "; ".join(_line(finding.title) for finding in rest) + ".")
    ranked = ranking(records, spec.goal)
    if ranked:
        parts += [f"### Best trials by {spec.goal.metric}", _table(spec, ranked[:_ROWS], spec.goal.metric)]
    others = [r for r in records if r.state in (TrialState.RUNNING, TrialState.PRUNED, TrialState.FAILED)]
    if others:
        others.sort(key=_urgency)
        more = f"\n\nand {len(others) - _STOPPED} more" if len(others) > _STOPPED else ""
        parts += ["### Running, stopped and failed", _table(spec, others[:_STOPPED], "reason") + more]
    return "\n\n".join(parts)


def word(record: TrialRecord) -> str:
    """How a trial stands, in one word; a diverged one is told from one that was pruned."""
    return "diverged" if record.diverged else record.state.lower()


def _urgency(record: TrialRecord) -> tuple[int, int]:
    order = (TrialState.FAILED, TrialState.RUNNING, TrialState.PRUNED)
    return (1 if record.diverged else 2 * order.index(record.state), record.number)


def _standing(spec: SweepSpec, records: Sequence[TrialRecord], state: str) -> str:
    head = f"**{state.capitalize()}**: {len(records)} trials ({told(endings(records)) or 'none yet'})."
    best = next(iter(ranking(records, spec.goal)), None)
    if best is None:
        return f"{head} No trial has completed{' yet' if state == 'running' else ''}."
    chosen = show_params(best.params, spec.search.paths) or "the only configuration"
    value = f"{spec.goal.metric} = **{show(best.value)}**"
    return f"{head} **Best: [trial {best.number}](mlflow:{best.number})** `{chosen}` {value}"


def _links(spec: SweepSpec, report: bool) -> str:
    links = ["[Charts of all trials](mlflow:charts)"]
    if report:
        links.append("[Report](mlflow:sweep/artifacts/report.html)")
    return " · ".join([*links, f"`orchestrate report {spec.name}`", f"`orchestrate best {spec.name} --export DIR`"])


def _finding(finding: Finding) -> str:
    said = f"- **{finding.level}: {_line(finding.title)}** {_line(finding.evidence, _EVIDENCE)}"
    return f"{said} *Next: {_line(finding.next_step, _EVIDENCE)}*"


def _table(spec: SweepSpec, records: Sequence[TrialRecord], last: str) -> str:
    paths = spec.search.paths
    short = short_names(paths)
    head = ["trial", "state", *(short[p] for p in paths), last]
    rule = ["---:", "---", *("---:" for _ in paths), "---" if last == "reason" else "---:"]
    rows = [head]
    for record in records:
        cells = [f"[{record.number}](mlflow:{record.number})", word(record)]
        cells += [show(record.params.get(path)) for path in paths]
        rows.append([*cells, _line(record.reason) if last == "reason" else show(record.value)])
    apart = [[first, *(f"&nbsp;{cell}" for cell in others)] for first, *others in rows]  # MLflow leaves no room itself
    return "\n".join("| " + " | ".join(row) + " |" for row in (apart[0], rule, *apart[1:]))


def _line(text: str, longest: int = _LONGEST) -> str:
    """Text that cannot break out of its line, its cell or its tag."""
    flat = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return flat if len(flat) <= longest else flat[:longest].rstrip() + " …"
