"""A sweep's charts as a view that MLflow's UI has saved: an experiment tag in its own form (read from mlflow 3.17)."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from orchestrator.spec.sweep import SweepSpec
from orchestrator.tracking.names import view_key

_OUTCOME, _SEARCH, _TRAINING, _REWARDS = "held out", "search", "training", "rewards, scaled by beta"
_CHOSEN, _REJECTED = "eval_logps_per_token/chosen", "eval_logps_per_token/rejected"
_LINES = (
    (_OUTCOME, "margin per token, held out", ("eval_margins/logp",)),
    (_OUTCOME, "accuracy, held out", ("eval_accuracies/logp",)),
    (_OUTCOME, "log-probs per token, chosen and rejected", (_CHOSEN, _REJECTED)),
    (_TRAINING, "loss", ("loss",)),
    (_TRAINING, "gradient norm", ("grad_norm",)),
    (_TRAINING, "tokens per second", ("tokens_per_second",)),
    (_REWARDS, "reward margin, held out", ("eval_rewards/margins",)),
    (_REWARDS, "reward margin, training", ("rewards/margins",)),
    (_REWARDS, "reward accuracy, training", ("rewards/accuracies",)),
)
"""Rows of three. MLflow heads a chart with its metrics' names; ours are for whoever edits it."""
_OF_GROUPS = ("eval_margins", "eval_accuracies", "eval_logps", "eval_logps_per_token", "eval_rewards", "eval_lengths")
_GROUPS = (*_OF_GROUPS, *(name.removeprefix("eval_") for name in _OF_GROUPS))
"""Sections that MLflow makes by itself from the metrics' names; kept, folded, below ours."""
_MORE = "Model metrics"
"""MLflow's own section for metrics without a group."""

_ROOMY = {"columns": 2, "cardHeight": 420}
"""Axes with names need more room than lines do."""


def saved_view(spec: SweepSpec, runs: str, at: float) -> tuple[str, str]:
    """The experiment tag that holds the view. `runs` is MLflow's filter for the trials, `at` in Unix seconds."""
    state = json.dumps(view_state(spec, runs), separators=(",", ":"))
    packed = "deflate;" + base64.b64encode(zlib.compress(state.encode(), 9)).decode()
    when = int(at * 1000)
    envelope = {"name": spec.name, "createdAt": when, "updatedAt": when, "state": packed}
    return f"mlflow.sharedViewState.{view_key(spec.name)}", json.dumps(envelope)


def view_state(spec: SweepSpec, runs: str) -> dict[str, Any]:
    """Search, columns, sections and charts, as the UI's own state names them."""
    sections = [_section(_OUTCOME), _section(_SEARCH) | _ROOMY, _section(_TRAINING), _section(_REWARDS)]
    sections += [_section(name, shown=False) for name in (*_GROUPS, _MORE)]
    goal = f"metrics.`{spec.goal.metric}`"
    return {
        "searchFilter": runs,
        "orderByKey": goal,
        "orderByAsc": spec.goal.direction == "minimize",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": ["tags.`state`", goal, *(f"params.`{p}`" for p in spec.search.paths), "tags.`reason`"],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [*_of_search(spec), *_lines()],
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


def _of_search(spec: SweepSpec) -> list[dict[str, Any]]:
    """Parallel coordinates over all that is searched; a contour over two numbers, beta and gamma where they are."""
    paths, goal = spec.search.paths, spec.goal.metric
    if not paths:
        return []
    parallel = _card("PARALLEL", _SEARCH, "parallel coordinates")
    cards = [parallel | {"selectedParams": list(paths), "selectedMetrics": [goal], "showAllRuns": False}]
    if pair := _two_numbers(spec):
        axes = {name: {"key": path, "type": "PARAM"} for name, path in zip(("xaxis", "yaxis"), pair, strict=True)}
        title = " x ".join(path.rpartition(".")[2] for path in pair)
        cards.append(_card("CONTOUR", _SEARCH, title) | axes | {"zaxis": {"key": goal, "type": "METRIC"}})
    return cards


def _two_numbers(spec: SweepSpec) -> tuple[str, str] | None:
    preferred = ("loss.beta", "loss.gamma", "loss.gamma_beta_ratio")
    numeric = [p for p in spec.search.paths if _numeric(spec, p)]
    numeric.sort(key=lambda p: preferred.index(p) if p in preferred else len(preferred))
    return (numeric[0], numeric[1]) if len(numeric) > 1 else None


def _numeric(spec: SweepSpec, path: str) -> bool:
    """A range is of numbers; a list is when every value is."""
    listed = spec.search.listed(path)
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in listed)
