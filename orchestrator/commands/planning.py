"""The plan of a sweep on this machine: counts rows and slots, touches no GPU and no network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.engine.cluster import Slots, gpu_memory, plan_slots
from orchestrator.errors import SpecError
from orchestrator.folders import SweepFolder
from orchestrator.spec.corners import placed
from orchestrator.spec.cost import Machine, dearest
from orchestrator.spec.plan import Plan, plan
from orchestrator.spec.probed import probed
from orchestrator.spec.rows import count_rows
from orchestrator.spec.shares import check_share, of_gpu
from orchestrator.spec.sizes import shape_of
from orchestrator.spec.sweep import SweepSpec

_PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")


def plan_here(
    spec: SweepSpec,
    root: Path,
    notices: Sequence[str],
    machine: Machine | None = None,
    *,
    probe: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """The plan, with this machine's slots; a machine too small for one trial is a notice, as plans travel.

    probe: one update of the dearest trial is measured in a process of its own, beside the formulas. ProbeFailed where
    it does not run; SpecError where no trial fits this machine.
    """
    said = list(notices)
    try:
        slots: Slots | None = plan_slots(spec)
    except SpecError as error:
        if probe:
            raise
        slots = None
        said += [finding.problem for finding in error.findings]
    if spec.warm_start is not None:
        from orchestrator.study.warm import warm_start  # plans of other sweeps do without the study's libraries

        said += warm_start(spec, root).said
    machine = machine or Machine()
    if machine.gpu_memory is None:
        machine = replace(machine, gpu_memory=gpu_memory())
    check_share(spec, machine.gpu_memory)
    machine = replace(of_gpu(spec, machine.gpu_memory, machine), processes=spec.resources.processes)
    rows = count_rows(spec.base.data)
    if machine.train_pairs is not None:
        rows = replace(rows, train=machine.train_pairs, exact=False)
    elif rows.train is None:
        said.append("the number of training pairs is unknown until the data is downloaded")
    if (root / spec.name).exists():
        said.append(f"a sweep named {spec.name} exists already; give another --name to start this one")
    made = plan(
        spec,
        root,
        rows,
        concurrency=None if slots is None else slots.count,
        tracking=tracking_uri(spec, root),
        notices=said,
        machine=machine,
    )
    if not probe or slots is None:
        return made
    from orchestrator.commands.probing import measure  # the others of this room's plans start nothing

    configs, shape = placed(spec.search, spec.base), shape_of(spec.base.model)
    config = configs[0] if shape is None else dearest(configs, shape, machine)
    measured = measure(config, SweepFolder(root, spec.name).cache, slots, trust_remote_code=trust_remote_code)
    return replace(made, probe=probed(measured, config, shape, machine, made.estimate))


def tracking_uri(spec: SweepSpec, root: Path) -> str:
    """Where MLflow is, without the password that may be in it."""
    uri = spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    return _PASSWORD.sub("", uri)
