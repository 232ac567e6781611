"""Tags, links and environment of MLflow runs.

The environment has what a result depends on besides its configuration: versions, hardware, the commit.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from orchestrator.gpus import HANGS, driver_hangs, installed_gpus, output_of
from orchestrator.interfaces import SFT_RUN, SWEEP_RUN
from orchestrator.study.trial_records import Outcome

SWEEP_ID = "prefsweep.sweep_id"
SWEEP_NAME = "prefsweep.sweep"
RUN = "prefsweep.run"
"""Tags of every run."""

FIRST_ATTEMPT = "prefsweep.first_attempt"
"""Tag of a trial that was retried after a failure: the first attempt of this run. Earlier ones have a run of their own.
"""

NOTE = "mlflow.note.content"
"""MLflow's tag for a run's description, in Markdown."""
RUN_NAME = "mlflow.runName"
"""MLflow's tag for a run's name."""
COLOR = "mlflow.runColor"
"""MLflow's tag for a run's color in charts."""

TRAINING_EXPERIMENT = ("mlflow.experimentKind", "custom_model_development")
"""The experiment tag with which MLflow 3 shows its pages for model training instead of those for LLM applications."""

_FOR_TRAINING = {"workflowType": "machine_learning"}
"""Query parameter of the same effect for a run's page."""

CHARTS = "charts"
_LINK = re.compile(r"\]\(mlflow:(?P<run>[^)/\s]+)(?P<rest>/[^)\s]*)?\)")


_TRIAL_COLORS = (
    "#0072b2",
    "#d55e00",
    "#008c66",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#6a3d9a",
    "#8c510a",
    "#1b9e9e",
    "#4d4d4d",
)
"""Colors of trials by number, after Okabe and Ito; MLflow's default gives successive trials similar colors."""
_STATE_COLORS = {"PRUNED": "#9a9a9a", "DIVERGED": "#b83280", "FAILED": "#c82d2d"}
"""Gray for pruned trials, signal colors for diverged and failed ones."""


def start_tags(number: int) -> dict[str, str]:
    """Return the tag with the trial's color in charts."""
    return {COLOR: _TRIAL_COLORS[number % len(_TRIAL_COLORS)]}


def end_tags(number: int, outcome: Outcome) -> dict[str, str]:
    """Return the tags of an ended trial: state (with DIVERGED), reason, failure; color and name if not complete."""
    state = "DIVERGED" if outcome.diverged else outcome.state.value
    tags = {"state": state, "reason": outcome.reason}
    tags |= {"failure": outcome.failure.value} if outcome.failure else {}
    tags |= {"diverged": "true"} if outcome.diverged else {}
    if state in _STATE_COLORS:
        tags |= {COLOR: _STATE_COLORS[state], RUN_NAME: f"trial {number} {state.lower()}"}
    return tags


def trials_filter(sweep_id: str) -> str:
    """Return MLflow's search filter for the trials of one sweep, without its parent run and its SFT stage.

    By the sweep's id, as runs of a deleted sweep may have the same name.
    """
    return f"tags.`{SWEEP_ID}` = '{sweep_id}' and tags.`{RUN}` != '{SWEEP_RUN}' and tags.`{RUN}` != '{SFT_RUN}'"


def view_key(sweep_id: str) -> str:
    """Return the name of the sweep's saved view in URLs."""
    return f"prefsweep-{sweep_id}"


def charts_page(experiment_id: str, sweep_id: str) -> str:
    """Return the URL fragment of the sweep's saved view. A search filter in the URL would override the view."""
    query = {"viewStateShareKey": view_key(sweep_id), "compareRunsMode": "CHART", **_FOR_TRAINING}
    return f"/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote, safe='')}"


def run_page(experiment_id: str, run_id: str, rest: str = "") -> str:
    """Return the URL fragment of a run's page; `rest`: path of one of its artifacts, from the slash on."""
    return f"/experiments/{experiment_id}/runs/{run_id}{rest}?{urlencode(_FOR_TRAINING)}"


def with_links(text: str, experiment_id: str, sweep_id: str, run_id: Callable[[str], str | None]) -> str:
    """Return Markdown with links `mlflow:RUN`, `mlflow:RUN/artifacts/...` and `mlflow:charts` resolved to MLflow pages.

    Links to runs without an MLflow id point to the charts.
    """

    def link(found: re.Match[str]) -> str:
        known = None if found["run"] == CHARTS else run_id(found["run"])
        if known is None:
            return f"](#{charts_page(experiment_id, sweep_id)})"
        return f"](#{run_page(experiment_id, known, found['rest'] or '')})"

    return _LINK.sub(link, text)


_SECONDS = 10.0


def environment(folder: Path | None = None) -> dict[str, Any]:
    """Return machine and installation as JSON values; `folder`: in the git repository, by default this program's."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
        "git": git_commit(folder or Path(__file__).parent),
        "packages": _packages(),
    }


def environment_tags(found: dict[str, Any]) -> dict[str, str]:
    """Return the entries of `environment` to filter runs by, as tags."""
    packages = found["packages"]
    git = found["git"]
    tags = {f"env.{name}": packages[name] for name in ("torch", "transformers", "prefsweep") if name in packages}
    tags |= {"env.python": found["python"], "env.gpus": ", ".join(found["gpus"]) or "none"}
    if git is not None:
        tags |= {"mlflow.source.git.commit": git["commit"], "git.dirty": str(git["dirty"]).lower()}
    return tags


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the repository around `folder` and whether files differ from it; None outside of one."""
    commit = _command_output("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(_command_output("git", "-C", str(folder), "status", "--porcelain"))}


def _packages() -> dict[str, str]:
    found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _gpus() -> list[str]:
    if driver_hangs():
        return [HANGS]
    return [", ".join(filter(None, (gpu.name, gpu.memory_text, gpu.driver))) for gpu in installed_gpus()]


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _command_output(*command: str) -> str | None:
    """Return the command's output; None if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    return output_of(command, _SECONDS) or None
