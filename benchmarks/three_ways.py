"""The same grid three ways in one run: a shell loop of TRL scripts, Ray Tune with TRL, and `orchestrate sweep`.

`python -m benchmarks.three_ways [simpo|dpo ...]`: same start model, rows, order, updates and float32; checks that the
trained results agree (final evaluation to 1e-3, first-step gradients to 1e-5) and prints ratios and where time went.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.material import Material, prepare

REPOSITORY = Path(__file__).parents[1]
PAIRS, UPDATES, TRAIN_ROWS, EVAL_ROWS = 8, 16, 128, 64
SLOTS = 2
GRIDS: dict[str, dict[str, list[float]]] = {
    "simpo": {"loss.beta": [2.0, 2.5], "loss.gamma": [0.5, 1.4], "training.learning_rate": [3e-5, 1e-4]},
    "dpo": {"loss.beta": [0.01, 0.05, 0.1, 0.5], "training.learning_rate": [3e-5, 1e-4]},
}


@dataclass
class Took:
    """One way's wall-clock, its parts, and the final evaluation of each trial."""

    seconds: float
    parts: dict[str, float]
    metrics: list[dict[str, float]]


def trials_of(method: str) -> list[dict[str, float]]:
    """The grid's points, the last hyperparameter advancing fastest."""
    grid = GRIDS[method]
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def trl_files(method: str, material: Material, folder: Path) -> list[Path]:
    """One JSON per trial for `benchmarks.trl_trial`, the rows in the order in which our trials see them."""
    from trainer.training.schedule import Order

    rows = material.train.read_text().splitlines()
    order = Order(len(rows), PAIRS, 42)
    ordered = folder / "ordered.jsonl"
    ordered.write_text("".join(rows[i] + "\n" for step in range(1, UPDATES + 1) for i in order.update(step)))
    files: list[Path] = []
    for n, point in enumerate(trials_of(method)):
        trial: dict[str, Any] = {
            "method": method,
            "model": str(material.model),
            "train": str(ordered),
            "eval": str(material.eval),
            "max_length": material.max_length,
            "out": str(folder / f"trl-{n}"),
            "threads": 1,
            "pairs_per_update": PAIRS,
            "max_steps": UPDATES,
            "learning_rate": point["training.learning_rate"],
            "beta": point["loss.beta"],
            "gamma": point.get("loss.gamma", 0.0),
            "gradients": n == 0,
        }
        files.append(folder / f"trl-{n}.json")
        files[-1].write_text(json.dumps(trial))
    return files


def shell_loop(files: list[Path], slots: int) -> Took:
    """What people do today: one script after the other, as many at a time as there are slots."""
    began = time.perf_counter()
    waiting, running = list(files), list[subprocess.Popen[bytes]]()
    while waiting or running:
        while waiting and len(running) < slots:
            command = [sys.executable, "-m", "benchmarks.trl_trial", str(waiting.pop(0))]
            running.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, env=one_thread()))
        for process in [p for p in running if p.poll() is not None]:
            if process.returncode:
                raise RuntimeError(f"{process.args} ended with {process.returncode}")
            running.remove(process)
        time.sleep(0.05)
    return read_trl(files, time.perf_counter() - began)


def ray_tune(files: list[Path], slots: int, folder: Path) -> Took:
    """Ray Tune around the same scripts, a fresh process per trial."""
    grid = folder / "grid.json"
    grid.write_text(json.dumps({"trials": [str(f) for f in files], "slots": slots, "repository": str(REPOSITORY)}))
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.ray_trl", str(grid)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, env=one_thread())
    return read_trl(files, time.perf_counter() - began)


def read_trl(files: list[Path], seconds: float) -> Took:
    """Results of the TRL trials; parts are summed over trials."""
    results = [json.loads((Path(json.loads(f.read_text())["out"]) / "result.json").read_text()) for f in files]
    parts = {k: sum(r["seconds"][k] for r in results) for k in results[0]["seconds"]}
    return Took(seconds, parts, [r["metrics"] for r in results])


def ours(method: str, material: Material, folder: Path, slots: int) -> Took:
    """`orchestrate sweep`, everything included: start-up, data, reference, trials, tracking."""
    sweep: dict[str, Any] = {
        "name": f"bench-{method}",
        "base": {
            "model": str(material.model),
            "data": {
                "train": str(material.train),
                "eval": str(material.eval),
                "max_length": material.max_length,
                "max_prompt_length": material.max_length - 8,
            },
            "loss": {"kind": method},
            "training": {
                "pairs_per_update": PAIRS,
                "max_steps": UPDATES,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
                "eval_steps": UPDATES,
            },
            "evaluation": {"prompts": 0, "samples": 0},
        },
        "search": GRIDS[method],
        "budget": {"concurrency": slots},
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    home = folder / "runs"
    began = time.perf_counter()
    command = [sys.executable, "-m", "orchestrator.cli", "sweep", str(file)]
    env = {**one_thread(), "ORCHESTRATE_HOME": str(home)}
    env.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=env)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    status = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "status", sweep["name"], "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, env=env, check=True,
    )  # fmt: skip
    trials = sorted(json.loads(status.stdout)["trials"], key=lambda t: t["number"])
    return Took(seconds, {}, [t["metrics"] for t in trials])


def one_thread() -> dict[str, str]:
    """Trials side by side, a thread each: the faster choice for everybody (docs/performance.md)."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


COMPARED = ("eval_rewards/margins", "eval_rewards/accuracies", "eval_rewards/chosen", "eval_rewards/rejected")


def worst_difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    """Largest relative difference (absolute below 1) of the final evaluations."""
    pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in COMPARED]
    return max(abs(p - q) / max(1.0, abs(p)) for p, q in pairs)


def compare(method: str, folder: Path, vocab_size: int) -> dict[str, Any]:
    """Run the three ways in turn and put the figures side by side."""
    folder.mkdir(parents=True)
    material = prepare(folder, vocab_size=vocab_size, train_rows=TRAIN_ROWS, eval_rows=EVAL_ROWS)
    files = trl_files(method, material, folder)
    mine = ours(method, material, folder, SLOTS)
    loop = shell_loop(files, 1)
    side_by_side = shell_loop(files, SLOTS)
    tune = ray_tune(files, SLOTS, folder)
    difference = worst_difference(loop.metrics, mine.metrics)
    if difference > 1e-3:
        raise RuntimeError(f"{method}: trained results differ by {difference:.2g}")
    return {
        "method": method,
        "data": material.source,
        "vocabulary": vocab_size,
        "trials": len(files),
        "updates": UPDATES,
        "seconds": {
            "shell loop of TRL": loop.seconds,
            f"TRL scripts, {SLOTS} at a time": side_by_side.seconds,
            "Ray Tune with TRL": tune.seconds,
            "orchestrate sweep": mine.seconds,
        },
        "shell loop, summed over trials": loop.parts,
        "times faster than the shell loop": loop.seconds / mine.seconds,
        "times faster than TRL side by side": side_by_side.seconds / mine.seconds,
        "times faster than Ray Tune with TRL": tune.seconds / mine.seconds,
        "largest difference of final metrics": difference,
    }


def main() -> None:
    methods = sys.argv[1:] or ["simpo", "dpo"]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for method in methods:
            print(json.dumps(compare(method, Path(folder) / method, 8192), indent=1), flush=True)


if __name__ == "__main__":
    main()
