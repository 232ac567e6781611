"""Makes finished sweeps for `benchmarks.service`: one by the real study, the others as its copies."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from benchmarks.driver import OBJECTIVE, spec_of
from orchestrator.folders import SweepFolder, create_sweep_folder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.pruners import NoPruner
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialState
from trainer.results import StepMetrics

FIRST = "finished-0000"
_PAIR = [f"{kind}/{side}" for kind in ("logps", "logps_per_token", "lengths") for side in ("chosen", "rejected")]
METRICS = ["loss", "grad_norm", "learning_rate", "rewards/margins", "rewards/accuracies", "margins/logp", *_PAIR]
EVALUATED = [f"eval_{name}" for name in METRICS if name not in ("grad_norm", "learning_rate")]
EVERY = 5
"""Reports between two evaluations."""


def metrics_of(step: int, share: float) -> dict[str, float]:
    """Return what a real trial logs after an update, of about the same length."""
    names = [*METRICS, *(EVALUATED if step % EVERY == 0 else ())]
    return {name: round(random.gauss(1.0 + share, 0.01), 6) for name in names} | (
        {OBJECTIVE: min(1.0, 0.5 + share / 3)} if step % EVERY == 0 else {}
    )


def finish(root: Path, trials: int) -> SweepFolder:
    """Make a sweep whose trials have ended."""
    spec = spec_of(trials, trials).model_copy(update={"name": FIRST, "pruner": NoPruner()})
    folder = SweepFolder(root, FIRST)
    create_sweep_folder(folder, dump_spec(spec))
    with Study.create(folder, spec) as study:
        while isinstance(trial := study.ask(), Trial):
            study.report(trial, [StepMetrics(step, metrics_of(step, trial.number / trials)) for step in range(21)])
            study.tell(trial, Outcome(TrialState.COMPLETE))
    return folder


def copy(first: SweepFolder, number: int) -> None:
    """Make another sweep with the same trials: its name, of the same length, is replaced in the files."""
    name = f"finished-{number:04d}"
    shutil.copytree(first.path, first.root / name)
    for path in (first.root / name).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(first.name.encode(), name.encode()))
