"""Three ways to run a grid of trials, each timed from the start of its command to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]


@dataclass
class TimedRun:
    """Wall-clock time of one way, its parts (summed over trials), and each trial's final evaluation."""

    seconds: float
    parts: dict[str, float]
    metrics: list[dict[str, float]]
    ended: list[float] = field(default_factory=list[float])
    """End of each trial, in seconds after the start of the command."""


def shell_loop(files: list[Path], threads: int) -> TimedRun:
    """Run one script after the other, each with all cores."""
    began = time.perf_counter()
    for file in files:
        _run([sys.executable, "-m", "benchmarks.trl_trial", str(file)], threads)
    return read_trl(files, time.perf_counter() - began)


def _run(command: list[str], threads: int) -> None:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment(threads))
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])


def ray_tune(files: list[Path], slots: int, folder: Path) -> TimedRun:
    """Run the same scripts under Ray Tune, a fresh process and a core per trial."""
    grid = folder / "grid.json"
    grid.write_text(json.dumps({"trials": [str(f) for f in files], "slots": slots, "repository": str(REPOSITORY)}))
    began = time.perf_counter()
    _run([sys.executable, "-m", "benchmarks.ray_trl", str(grid)], threads=1)
    return read_trl(files, time.perf_counter() - began)


def orchestrate_sweep(sweep: dict[str, Any], folder: Path) -> TimedRun:
    """Run `orchestrate sweep`, including start-up, data, reference, trials, tracking and report."""
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    env = {**environment(1), "ORCHESTRATE_HOME": str(folder / "runs")}
    env.pop("MLFLOW_TRACKING_URI", None)
    started, began = time.time(), time.perf_counter()
    command = [sys.executable, "-m", "orchestrator.cli", "sweep", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=env)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return _read_sweep(folder / "runs", sweep, started, seconds)


def environment(threads: int) -> dict[str, str]:
    """Return a child's environment: number of threads, and this checkout's code."""
    path = os.pathsep.join(p for p in (str(REPOSITORY), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}


def read_trl(files: list[Path], seconds: float) -> TimedRun:
    """Return the results of the TRL trials; parts are summed over trials."""
    results = [json.loads((Path(json.loads(f.read_text())["out"]) / "result.json").read_text()) for f in files]
    parts = {k: sum(r["seconds"][k] for r in results) for k in results[0]["seconds"]}
    return TimedRun(seconds, parts, [r["metrics"] for r in results])


def _read_sweep(home: Path, sweep: dict[str, Any], started: float, seconds: float) -> TimedRun:
    """Split the time of a sweep: updates by `pairs_per_second`; the rest of a trial is evaluation and first-time
    loading.
    """
    from orchestrator.folders import SweepFolder
    from orchestrator.study.study import Study

    pairs = sweep["base"]["training"]["pairs_per_update"]
    with Study.open(SweepFolder(home, sweep["name"])) as study:
        trials = study.trials()
        metrics = {t.number: study.metric_history(t.number) for t in trials}
    steps = sum(
        pairs / p.metrics["pairs_per_second"]
        for history in metrics.values()
        for p in history
        if "pairs_per_second" in p.metrics
    )
    begun = [t.started_at or 0.0 for t in trials]
    ended = [t.finished_at or 0.0 for t in trials]
    slots = sweep["budget"]["concurrency"]
    in_trials = sum(b - a for a, b in zip(begun, ended, strict=True))
    # Trials that started with the sweep waited for imports, the initial model's evaluation and the reference.
    loading = sum(b - a for a, b in list(zip(begun, ended, strict=True))[:slots]) - slots * median_trial_seconds(
        begun, ended
    )
    parts = {
        "before the first trial": min(begun) - started,
        "imports, loading, initial model (first trial of each worker)": loading,
        "steps": steps,
        "evaluation and the rest of trials": in_trials - steps - loading,
        "slots without a trial": slots * (max(ended) - min(begun)) - in_trials,
        "after the last trial": started + seconds - max(ended),
    }
    return TimedRun(seconds, parts, [dict(t.metrics) for t in trials], [e - started for e in ended])


def median_trial_seconds(begun: list[float], ended: list[float]) -> float:
    """Return the median duration of a trial in seconds."""
    lengths = sorted(b - a for a, b in zip(begun, ended, strict=True))
    return lengths[len(lengths) // 2]
