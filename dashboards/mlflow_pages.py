"""A sweep in the MLflow UI: the parent run's description (Markdown) and the saved view of charts.

The description has state, winner, diagnosis, trials and links; links of the form `mlflow:...` are completed by
orchestrator.tracking, which knows MLflow's ids. The view is an experiment tag in the format that MLflow's UI saves
(read from mlflow 3.17).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

from dashboards.analysis.seed_means import compared_paths
from dashboards.analysis.sweep_frame import state_counts
from dashboards.diagnosis.findings import DiagnosisFinding, reasons_not_to_use
from dashboards.formatting import (
    format_counts,
    format_half_widths,
    format_measured,
    format_params,
    format_settings,
    format_value,
    short_names,
)
from orchestrator.commands.rehearsal import is_rehearsal
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.repeats import first_number, front_of_configurations, merge_records, rank_configurations
from orchestrator.study.trial_records import TrialRecord, TrialState, best_of, requirements_text
from orchestrator.tracking.run_metadata import trials_filter, view_key
from trainer.metrics import CHOSEN, LOG_RATIO_CHOSEN, LOG_RATIO_REJECTED, MARGIN, REJECTED

_ROWS, _STOPPED, _FINDINGS, _MORE_IN_REPORT, _TITLES = 10, 8, 3, 4, 2
"""Numbers of rows and findings that keep the description within MLflow's limit of 8000 characters."""
_MAX_REASON_LENGTH = 160
_MAX_EVIDENCE_LENGTH = 320


def run_description(
    spec: SweepSpec,
    records: Sequence[TrialRecord],
    state: str,
    *,
    findings: Sequence[DiagnosisFinding] = (),
    report: bool = False,
    judgements: tuple[int, str] | None = None,
) -> str:
    """Return the parent run's description in Markdown.

    Args:
        spec: the sweep.
        records: all trials.
        state: running, finished or interrupted.
        findings: findings of the diagnosis, most serious first.
        report: whether report.html is attached to the run.
        judgements: number and judgement summary of the best judged trial.
    """
    parts = [_status_line(spec, records, state)]  # MLflow collapses everything after the first lines
    if findings:
        parts.append(" · ".join(f"**{finding.level}:** {_one_line(finding.title)}" for finding in findings[:_TITLES]))
    if judgements is not None:
        parts.append(
            f"**Judge:** [trial {judgements[0]}](mlflow:{judgements[0]}) "
            f"{_one_line(judgements[1], _MAX_EVIDENCE_LENGTH)}"
        )
    parts.append(_links(spec, records, findings, report))
    parts.append(spec.description or f"A sweep over {', '.join(spec.search.paths) or 'one configuration'}.")
    if findings:
        parts += ["### Diagnosis", "\n".join(_finding_line(finding) for finding in findings[:_FINDINGS])]
        if rest := findings[_FINDINGS : _FINDINGS + _MORE_IN_REPORT]:
            parts.append("Also: " + "; ".join(_one_line(finding.title) for finding in rest) + ".")
    ranked = rank_configurations(records, spec)
    if ranked:
        metrics = [objective.metric for objective in spec.objectives]
        by = f"Best trials by {' and '.join(metrics)}" if best_of(ranked) else "Trials, the nearest to the bounds first"
        parts += [f"### {by}", _table(spec, ranked[:_ROWS], *metrics)]
    others = [r for r in records if r.state in (TrialState.RUNNING, TrialState.PRUNED, TrialState.FAILED)]
    if others:
        others.sort(key=_urgency)
        more = f"\n\nand {len(others) - _STOPPED} more" if len(others) > _STOPPED else ""
        parts += ["### Running, stopped and failed", _table(spec, others[:_STOPPED], "reason") + more]
    return "\n\n".join(parts)


def state_label(record: TrialRecord) -> str:
    """Return the trial's state in lower case; "diverged" for a trial that the divergence guard stopped."""
    return "diverged" if record.diverged else record.state.lower()


def _urgency(record: TrialRecord) -> tuple[int, int]:
    order = (TrialState.FAILED, TrialState.RUNNING, TrialState.PRUNED)
    return (1 if record.diverged else 2 * order.index(record.state), record.number)


def _status_line(spec: SweepSpec, records: Sequence[TrialRecord], state: str) -> str:
    many, ends = "" if len(records) == 1 else "s", format_counts(state_counts(records)) or "none yet"
    head = f"**{state.capitalize()}**: {len(records)} trial{many} ({ends})."
    ranked = rank_configurations(records, spec)
    best = best_of(ranked)
    if best is None and ranked:
        return f"{head} **{requirements_text(ranked)}.**"
    if best is None:
        return f"{head} No trial has completed{' yet' if state == 'running' else ''}."
    chosen = format_params(best.params, compared_paths(spec)) or "the only configuration"
    values = zip(spec.objectives, best.values or (best.value,), strict=False)
    value = ", ".join(f"{objective.metric} = **{format_value(each)}**" for objective, each in values)
    value += f" ({best.seeds_text})" if best.seeds else ""
    if len(spec.objectives) > 1:
        front = front_of_configurations(records, spec)
        listed = ", ".join(f"[{record.label}](mlflow:{record.number})" for record in front[:_ROWS])
        more = f" and {len(front) - _ROWS} more" if len(front) > _ROWS else ""
        return f"{head} **Pareto front: trials {listed}{more}.** The first has `{chosen}` {value}"
    return f"{head} **Best: [trial {best.number}](mlflow:{best.number})** `{chosen}` {value}"


def _links(spec: SweepSpec, records: Sequence[TrialRecord], findings: Sequence[DiagnosisFinding], report: bool) -> str:
    """Return links and commands; no export of a trial that the diagnosis advises not to use, nor of a rehearsal's."""
    links = ["[Charts of all trials](mlflow:charts)"]
    if report:
        links.append("[Report](mlflow:sweep/artifacts/report.html)")
    links.append(f"`orchestrate report {spec.name}`")
    ranked = rank_configurations(records, spec)
    best = best_of(ranked)
    found = best
    if best is not None and best.finalist_of is not None:  # findings name configurations of the search
        search = merge_records([record for record in records if record.finalist_of is None], spec)
        found = next((record for record in search if first_number(record) == best.finalist_of), best)
    if not is_rehearsal(spec) and (not ranked if found is None else not reasons_not_to_use(findings, found.label)):
        links.append(f"`orchestrate best {spec.name} --export DIR`")
    return " · ".join(links)


def _finding_line(finding: DiagnosisFinding) -> str:
    text = f"- **{finding.level}: {_one_line(finding.title)}** {_one_line(finding.evidence, _MAX_EVIDENCE_LENGTH)}"
    return f"{text} *Next: {_one_line(finding.next_step, _MAX_EVIDENCE_LENGTH)}*"


def _table(spec: SweepSpec, records: Sequence[TrialRecord], *last: str) -> str:
    """Return a table of trials. `last`: the last columns, the objectives' metrics or "reason"."""
    paths = compared_paths(spec) if any(record.seeds for record in records) else spec.search.paths
    short = short_names(paths)
    breaks = ["breaks"] if any(record.breaks for record in records) else []
    head = ["trial", "state", *(short[p] for p in paths), *last, *breaks]
    words = ("reason", "breaks")
    rule = ["---:", "---", *("---:" for _ in paths), *("---" if n in words else "---:" for n in (*last, *breaks))]
    columns = [format_settings([record.params.get(path) for record in records]) for path in paths]
    if last == ("reason",):
        columns.append([_one_line(record.reason) for record in records])
    else:
        values = [record.values or (record.value,) for record in records]
        columns += [format_measured([each[k] if k < len(each) else None for each in values]) for k in range(len(last))]
        widths = format_half_widths([record.interval for record in records])
        columns[len(paths)] = [v + width for v, width in zip(columns[len(paths)], widths, strict=True)]
    if breaks:
        columns.append([_one_line("; ".join(record.breaks)) for record in records])
    rows = [head]
    for k, record in enumerate(records):
        rows.append([f"[{record.label}](mlflow:{record.number})", state_label(record), *(c[k] for c in columns)])
    padded = [
        [first, *(f"&nbsp;{cell}" for cell in others)] for first, *others in rows
    ]  # MLflow's cells have no padding
    return "\n".join("| " + " | ".join(row) + " |" for row in (padded[0], rule, *padded[1:]))


def _one_line(text: str, longest: int = _MAX_REASON_LENGTH) -> str:
    """Return the text on one line, with `|` and `<` escaped, cut to `longest` characters."""
    flat = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return flat if len(flat) <= longest else flat[:longest].rstrip() + " …"


_OUTCOME, _SEARCH, _TRAINING, _REWARDS = "held out", "search", "training", "rewards, scaled by beta"
_LINES = (
    (_OUTCOME, "margin per token, held out", (MARGIN,)),
    (_OUTCOME, "accuracy, held out", ("eval_accuracies/logp",)),
    (_OUTCOME, "log-probs per token, chosen and rejected", (CHOSEN, REJECTED)),
    (_OUTCOME, "log-ratios per token to the initial model", (LOG_RATIO_CHOSEN, LOG_RATIO_REJECTED)),
    (_TRAINING, "loss", ("loss",)),
    (_TRAINING, "gradient norm", ("grad_norm",)),
    (_TRAINING, "tokens per second", ("tokens_per_second",)),
    (_REWARDS, "reward margin, held out", ("eval_rewards/margins",)),
    (_REWARDS, "reward margin, training", ("rewards/margins",)),
    (_REWARDS, "reward accuracy, training", ("rewards/accuracies",)),
)
"""Section, name and metrics of the line charts. The UI shows the metrics as title and the name only in the editor."""
_OF_GROUPS = ("eval_margins", "eval_accuracies", "eval_logps", "eval_logps_per_token", "eval_rewards", "eval_lengths")
_GROUPS = (*_OF_GROUPS, "eval_log_ratio_per_token", *(name.removeprefix("eval_") for name in _OF_GROUPS))
"""Sections that MLflow generates from the metrics' names; shown collapsed below the configured ones."""
_MORE = "Model metrics"
"""MLflow's own section for metrics without a group."""

_SECTION_DISPLAY = {"columns": 2, "cardHeight": 420}
"""Two columns instead of three: charts of settings have long axis labels."""


def saved_view(spec: SweepSpec, sweep_id: str, at: float) -> tuple[str, str]:
    """Return key and value of the experiment tag with the view of a sweep's trials. `at`: epoch seconds."""
    state = json.dumps(view_state(spec, trials_filter(sweep_id)), separators=(",", ":"))
    packed = "deflate;" + base64.b64encode(zlib.compress(state.encode(), 9)).decode()
    when = int(at * 1000)
    envelope = {"name": spec.name, "createdAt": when, "updatedAt": when, "state": packed}
    return f"mlflow.sharedViewState.{view_key(sweep_id)}", json.dumps(envelope)


def view_state(spec: SweepSpec, runs: str) -> dict[str, Any]:
    """Return filter, columns, sections and charts in the format of the UI's state. `runs`: MLflow's filter."""
    sections = [_section(_OUTCOME), _section(_SEARCH) | _SECTION_DISPLAY, _section(_TRAINING), _section(_REWARDS)]
    sections += [_section(name, shown=False) for name in (*_GROUPS, _MORE)]
    objective, *further = (f"metrics.`{each.metric}`" for each in spec.objectives)
    params = (f"params.`{path}`" for path in spec.search.paths)
    return {
        "searchFilter": runs,
        "orderByKey": objective,
        "orderByAsc": spec.first_objective.direction == "minimize",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": ["tags.`state`", objective, *further, *params, "tags.`reason`"],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [*_search_charts(spec), *_lines()],
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else the UI sorts the sections by name
        "hideEmptyCharts": True,
        "useGroupedValuesInCharts": True,
        "groupBy": None,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _section(name: str, *, shown: bool = True) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": shown, "isReordered": True, "deleted": False, "isGenerated": False}


def _card(kind: str, section: str, title: str) -> dict[str, Any]:
    return {
        "uuid": title,
        "type": kind,
        "metricSectionId": section,
        "displayName": title,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
    }


def _lines() -> list[dict[str, Any]]:
    return [
        _card("LINE", section, title)
        | {
            "metricKey": metrics[0],
            "selectedMetricKeys": list(metrics),
            "lineSmoothness": 0,
            "xAxisScaleType": "linear",
            "scaleType": "linear",
            "range": {},
            "xAxisKey": "step",
            "selectedXAxisMetricKey": "",
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "ignoreOutliers": False,
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
        }
        for section, title, metrics in _LINES
    ]


def _search_charts(spec: SweepSpec) -> list[dict[str, Any]]:
    """Return parallel coordinates of all searched settings and a contour of two numeric ones, first beta and gamma."""
    paths, metrics = spec.search.paths, [each.metric for each in spec.objectives]
    if not paths:
        return []
    parallel = _card("PARALLEL", _SEARCH, "parallel coordinates")
    cards = [parallel | {"selectedParams": list(paths), "selectedMetrics": metrics, "showAllRuns": False}]
    if pair := _two_numbers(spec):
        axes = {name: {"key": path, "type": "PARAM"} for name, path in zip(("xaxis", "yaxis"), pair, strict=True)}
        title = " x ".join(path.rpartition(".")[2] for path in pair)
        cards.append(_card("CONTOUR", _SEARCH, title) | axes | {"zaxis": {"key": metrics[0], "type": "METRIC"}})
    return cards


def _two_numbers(spec: SweepSpec) -> tuple[str, str] | None:
    preferred = ("loss.beta", "loss.gamma", "loss.gamma_beta_ratio")
    numeric = [p for p in spec.search.paths if _numeric(spec, p)]
    numeric.sort(key=lambda p: preferred.index(p) if p in preferred else len(preferred))
    return (numeric[0], numeric[1]) if len(numeric) > 1 else None


def _numeric(spec: SweepSpec, path: str) -> bool:
    """Return whether the setting is a range or a list of numbers."""
    listed = spec.search.listed_values(path)
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in listed)
