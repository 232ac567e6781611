"""Record learning curves of small trials into benchmarks/recorded.json: `python -m benchmarks.recorded`.

Random search, the real trainer, no pruner. Each trial's confirmed metric is its share of exact answers on prompts that
were neither trained nor evaluated on. Continues where it was interrupted; `benchmarks/replay.py` reads the file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from array import array
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.results import machine
from benchmarks.simulation import Curve
from benchmarks.tiny_trials import Progress, TinyTrainer
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.sampling.sampling_policy import SamplingPolicy
from orchestrator.study.trial_snapshots import TrialSnapshot
from trainer.metrics import ANSWER_LENGTH, CHOSEN, COMPARISON_METRIC, EXACT_ANSWERS, REPETITION
from trainer.results import StepMetrics, pack_floats, unpack_floats

FILE = Path(__file__).with_name("recorded.json")
COMMAND = "nice -n 15 python -m benchmarks.recorded"
TRIALS, FRESH = 60, 1000
UPDATES, EVALUATIONS = 100, 10
KEPT = (COMPARISON_METRIC, EXACT_ANSWERS, CHOSEN, REPETITION, ANSWER_LENGTH)
"""Metrics of the file: the objective and what requirements are about."""
PAIRS = 150
"""Held-out pairs whose margins the file keeps, of the second half of a run, for the paired test."""

_BASE: dict[str, Any] = {
    "model": {"generated": {"architecture": "llama", "hidden_size": 64, "num_hidden_layers": 2}},
    "data": {
        "train": {"generated": "instructions", "rows": 4000},
        "eval": {"generated": "instructions", "split": "eval", "rows": 400},
        "max_length": 128,
    },
    "training": {
        "pairs_per_update": 32,
        "max_steps": UPDATES,
        "eval_steps": UPDATES // EVALUATIONS,
        "logging_steps": UPDATES // EVALUATIONS,
        "save_steps": UPDATES,
    },
    "evaluation": {"prompts": 200, "samples": 0, "max_new_tokens": 16},
}
_SFT = {"training": {"learning_rate": 3e-3, "pairs_per_update": 32, "max_steps": 250}}
_SIMPO = {
    "loss.beta": {"uniform": [1.0, 12.0]},
    "loss.gamma_beta_ratio": {"uniform": [0.0, 1.0]},
    "loss.sft_weight": {"uniform": [0.0, 3.0]},
}
_DPO = {"loss.beta": {"log_uniform": [0.02, 1.0]}, "loss.nll_scale": {"uniform": [0.0, 3.0]}}
TASKS: dict[str, dict[str, Any]] = {
    "simpo": {"base": {"loss": {"kind": "simpo"}}, "search": {**_SIMPO, "training.learning_rate": [2e-4, 1e-2]}},
    "dpo": {"base": {"loss": {"kind": "dpo"}}, "search": {**_DPO, "training.learning_rate": [2e-4, 1e-2]}},
    "simpo with adapters": {
        "base": {"loss": {"kind": "simpo"}, "lora": {"r": 8}},
        "search": {**_SIMPO, "training.learning_rate": [2e-3, 1e-1]},
    },
}
"""Tasks by name; of the learning rate the ends of its range."""


def task_spec(name: str) -> SweepSpec:
    """Return a task as a sweep of random trials."""
    task = TASKS[name]
    low, high = task["search"]["training.learning_rate"]
    tree = {
        "name": name.replace(" ", "-"),
        "base": {**_BASE, **task["base"]},
        "sft": _SFT,
        "search": {**task["search"], "training.learning_rate": {"log_uniform": [low, high]}},
        "sampler": {"kind": "random", "seed": 0},
        "budget": {"trials": 1000},
        "maximize": COMPARISON_METRIC,
        "require": {EXACT_ANSWERS: ">= initial"},
    }
    return load_spec_text(yaml.safe_dump(tree, sort_keys=False), Path())


@dataclass(frozen=True)
class RecordedTrial:
    """A trial as in the file. `metrics`: values of KEPT by update; `margins`: packed as float16 by update."""

    params: Mapping[str, Any]
    metrics: Mapping[int, Mapping[str, float]]
    margins: Mapping[int, str]
    confirmed: float | None
    """Share of fresh prompts answered right; None after divergence."""
    cpu_seconds: float = field(compare=False)

    @cached_property
    def curve(self) -> Curve:
        """The curve for `simulate`: NaN from the evaluation on that a diverged trial did not reach."""
        steps = range(UPDATES // EVALUATIONS, UPDATES + 1, UPDATES // EVALUATIONS)
        values = {at: self.metrics.get(at, {}).get(COMPARISON_METRIC, math.nan) for at in steps}
        pairs = {at: _unpack_half(text) for at, text in self.margins.items()}
        return Curve(values, UPDATES, 1.0, lambda at: pairs.get(at, ""), self.metrics)

    @property
    def as_json(self) -> list[Any]:
        """The trial as a row of the file."""
        rows = [[at, *(values.get(name) for name in KEPT)] for at, values in self.metrics.items()]
        return [dict(self.params), rows, dict(self.margins), self.confirmed, self.cpu_seconds]

    @classmethod
    def read(cls, row: list[Any]) -> RecordedTrial:
        """Return the trial of a row of the file."""
        params, rows, margins, confirmed, seconds = row
        metrics = {at: {k: v for k, v in zip(KEPT, values, strict=True) if v is not None} for at, *values in rows}
        return cls(params, metrics, {int(at): text for at, text in margins.items()}, confirmed, seconds)


@dataclass
class RecordedTask:
    """A task's trials; `initial`: the confirmed metric of the initial model."""

    initial: float
    trials: list[RecordedTrial]


def read_tasks(file: Path = FILE) -> dict[str, RecordedTask]:
    """Return the recorded tasks by name; {} before the first."""
    if not file.is_file():
        return {}
    stored = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    return {
        name: RecordedTask(task["initial"], [RecordedTrial.read(row) for row in task["trials"]])
        for name, task in stored.items()
    }


def write_tasks(tasks: Mapping[str, RecordedTask], file: Path = FILE) -> None:
    """Write the file, a line a trial, replacing it whole."""
    parts = [
        f'{json.dumps(name)}: {{"initial": {task.initial}, "trials": [\n'
        + ",\n".join(json.dumps(trial.as_json, separators=(",", ":")) for trial in task.trials)
        + "\n]}"
        for name, task in tasks.items()
    ]
    head = {"command": COMMAND, "machine": machine(), "fresh prompts": FRESH, "metrics": KEPT}
    text = json.dumps(head)[:-1] + ', "tasks": {\n' + ",\n".join(parts) + "\n}}\n"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def record(name: str, trials: int, scratch: Path, file: Path = FILE) -> None:
    """Train a task's trials that the file lacks, and add each to the file as it ends."""
    spec, trainer = task_spec(name), TinyTrainer(scratch)
    tasks = read_tasks(file)
    from orchestrator.driver.sft_stage import with_model

    started = time.process_time()
    initial = trainer.initial_model(spec)
    base = with_model(spec.base, initial)
    if name not in tasks:
        tasks[name] = RecordedTask(trainer.confirm(base, initial, FRESH), [])
        print(f"{name}: initial model, {time.process_time() - started:.0f} s of CPU", flush=True)
    found = tasks[name].trials
    progress = Progress(trials - len(found))
    policy = SamplingPolicy(spec, None)
    for number in range(len(found), trials):
        sampled = policy.sample([TrialSnapshot(k, trial.params) for k, trial in enumerate(found)])
        assert sampled is not None
        began = time.process_time()
        config = apply_params(base, sampled.params)
        trained = trainer.train(config, str(number))
        confirmed = None if trained.model is None else trainer.confirm(base, trained.model, FRESH)
        trainer.forget(str(number))
        seconds = round(time.process_time() - began, 1)
        found.append(_recorded(sampled.params, trained.history, confirmed, seconds))
        write_tasks(tasks, file)
        progress.advance(f"{name} trial {number}")


def _recorded(
    params: Mapping[str, Any], history: list[StepMetrics], confirmed: float | None, seconds: float
) -> RecordedTrial:
    evaluated = [point for point in history if COMPARISON_METRIC in point.metrics]
    metrics = {p.step: {k: round(p.metrics[k], 5) for k in KEPT if k in p.metrics} for p in evaluated}
    margins = {p.step: _pack_half(p.pair_margins) for p in evaluated if UPDATES / 2 <= p.step < UPDATES}
    return RecordedTrial(params, metrics, margins, confirmed, seconds)


def _pack_half(margins: str) -> str:
    values = np.asarray(unpack_floats(margins)[:PAIRS], dtype="<f2")
    return b64encode(values.tobytes()).decode("ascii")


def _unpack_half(text: str) -> str:
    return pack_floats(array("f", np.frombuffer(b64decode(text), dtype="<f2").astype(np.float32)))


def main() -> None:
    """Record one task or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), action="append", help="by default all")
    parser.add_argument("--trials", type=int, default=TRIALS, help="trials of a task, those of the file among them")
    parser.add_argument("--scratch", type=Path, default=Path("runs/recorded"), help="folder of models and data")
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args()
    for name in options.task or TASKS:
        record(name, options.trials, options.scratch, options.file)


if __name__ == "__main__":
    main()
