"""The plan of a sweep on this machine: counts rows and slots, touches no GPU and no network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from orchestrator.engine.cluster import plan_slots
from orchestrator.errors import SpecError
from orchestrator.spec.plan import Plan, plan
from orchestrator.spec.rows import count_rows
from orchestrator.spec.sweep import SweepSpec

_PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")


def plan_here(spec: SweepSpec, root: Path, notices: Sequence[str]) -> Plan:
    """The plan, with this machine's slots; a machine too small for one trial is a notice, as plans travel."""
    said = list(notices)
    try:
        concurrency: int | None = plan_slots(spec).count
    except SpecError as error:
        concurrency = None
        said += [finding.problem for finding in error.findings]
    rows = count_rows(spec.base.data)
    if rows.train is None:
        said.append("the number of training pairs is unknown until the data is downloaded")
    if (root / spec.name).exists():
        said.append(f"a sweep named {spec.name} exists already; give another --name to start this one")
    return plan(spec, root, rows, concurrency=concurrency, tracking=tracking_uri(spec, root), notices=said)


def tracking_uri(spec: SweepSpec, root: Path) -> str:
    """Where MLflow is, without the password that may be in it."""
    uri = spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    return _PASSWORD.sub("", uri)
