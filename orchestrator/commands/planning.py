"""The plan of a sweep on this machine: counts rows and slots, touches no GPU and no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.engine.cluster import plan_slots, visible_gpus
from orchestrator.errors import SpecError
from orchestrator.spec.cost import Machine
from orchestrator.spec.plan import Plan, plan
from orchestrator.spec.rows import count_rows
from orchestrator.spec.sweep import SweepSpec

_PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")


def plan_here(spec: SweepSpec, root: Path, notices: Sequence[str], machine: Machine | None = None) -> Plan:
    """The plan, with this machine's slots; a machine too small for one trial is a notice, as plans travel."""
    said = list(notices)
    try:
        concurrency: int | None = plan_slots(spec).count
    except SpecError as error:
        concurrency = None
        said += [finding.problem for finding in error.findings]
    if spec.warm_start is not None:
        from orchestrator.study.warm import warm_start  # plans of other sweeps do without the study's libraries

        said += warm_start(spec, root).said
    machine = machine or Machine()
    if machine.gpu_memory is None:
        machine = replace(machine, gpu_memory=gpu_memory())
    rows = count_rows(spec.base.data)
    if machine.train_pairs is not None:
        rows = replace(rows, train=machine.train_pairs, exact=False)
    elif rows.train is None:
        said.append("the number of training pairs is unknown until the data is downloaded")
    if (root / spec.name).exists():
        said.append(f"a sweep named {spec.name} exists already; give another --name to start this one")
    return plan(
        spec, root, rows, concurrency=concurrency, tracking=tracking_uri(spec, root), notices=said, machine=machine
    )


def gpu_memory() -> float | None:
    """Bytes of the smallest visible GPU, as the driver says; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None or not visible_gpus():
        return None
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    found = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(found) * 2.0**20 if found else None


def tracking_uri(spec: SweepSpec, root: Path) -> str:
    """Where MLflow is, without the password that may be in it."""
    uri = spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    return _PASSWORD.sub("", uri)
