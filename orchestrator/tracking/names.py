"""Names by which a sweep's runs and pages are found again in MLflow, and links between them."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote, urlencode

from orchestrator.study.state import Outcome
from orchestrator.tracking.sink import SFT, SWEEP

SWEEP_ID = "prefsweep.sweep_id"
SWEEP_NAME = "prefsweep.sweep"
RUN = "prefsweep.run"
"""Tags of every run."""

NOTE = "mlflow.note.content"
"""MLflow's tag for a run's description, in Markdown."""
RUN_NAME = "mlflow.runName"
"""MLflow's tag for the name under which it lists a run."""
COLOUR = "mlflow.runColor"
"""MLflow's tag for a run's colour in charts."""

OF_TRAINING = ("mlflow.experimentKind", "custom_model_development")
"""The experiment tag with which MLflow 3 shows its pages for training instead of those for language applications."""

_FOR_TRAINING = {"workflowType": "machine_learning"}
"""Without it MLflow shows a run among the pages for language applications."""

CHARTS = "charts"
_LINK = re.compile(r"\]\(mlflow:(?P<run>[^)/\s]+)(?P<rest>/[^)\s]*)?\)")


_TRIALS = ("#0072b2", "#d55e00", "#008c66", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#8c510a", "#1b9e9e", "#4d4d4d")
"""Of trials by number, in turn, after Okabe and Ito: MLflow's own choice gives neighbours nearly the same."""
_COLOURS = {"PRUNED": "#9a9a9a", "DIVERGED": "#b83280", "FAILED": "#c82d2d"}
"""Curves that were stopped stand back behind the complete ones, and those that broke stand out."""


def begun_tags(number: int) -> dict[str, str]:
    """A colour in charts that is told from the next trial's."""
    return {COLOUR: _TRIALS[number % len(_TRIALS)]}


def ended_tags(number: int, outcome: Outcome) -> dict[str, str]:
    """How a trial ended, to be seen at once: a state that tells diverged from pruned, in its name too, and a colour."""
    state = "DIVERGED" if outcome.diverged else outcome.state.value
    tags = {"state": state, "reason": outcome.reason}
    tags |= {"failure": outcome.failure.value} if outcome.failure else {}
    tags |= {"diverged": "true"} if outcome.diverged else {}
    if state in _COLOURS:
        tags |= {COLOUR: _COLOURS[state], RUN_NAME: f"trial {number} {state.lower()}"}
    return tags


def trials_filter(sweep: str) -> str:
    """MLflow's search for the trials of one sweep: neither its own run nor its sft stage, which has other steps."""
    return f"tags.`{SWEEP_NAME}` = '{sweep}' and tags.`{RUN}` != '{SWEEP}' and tags.`{RUN}` != '{SFT}'"


def view_key(sweep: str) -> str:
    """What the sweep's saved view is called in addresses."""
    return f"prefsweep-{sweep}"


def charts_page(experiment_id: str, sweep: str) -> str:
    """The part of the address behind `#` where the sweep's saved view opens. Search words beside it would undo it."""
    asked = {"viewStateShareKey": view_key(sweep), "compareRunsMode": "CHART", **_FOR_TRAINING}
    return f"/experiments/{experiment_id}/runs?{urlencode(asked, quote_via=quote, safe='')}"


def run_page(experiment_id: str, run_id: str, rest: str = "") -> str:
    """The part of the address behind `#` of a run's page; `rest`: of one of its artifacts, from the slash on."""
    return f"/experiments/{experiment_id}/runs/{run_id}{rest}?{urlencode(_FOR_TRAINING)}"


def with_links(text: str, experiment_id: str, sweep: str, run_id: Callable[[str], str | None]) -> str:
    """Markdown whose links `mlflow:RUN`, `mlflow:RUN/artifacts/...` and `mlflow:charts` lead to MLflow's own pages.

    A link to a run that MLflow does not know leads to the charts.
    """

    def link(found: re.Match[str]) -> str:
        known = None if found["run"] == CHARTS else run_id(found["run"])
        if known is None:
            return f"](#{charts_page(experiment_id, sweep)})"
        return f"](#{run_page(experiment_id, known, found['rest'] or '')})"

    return _LINK.sub(link, text)
