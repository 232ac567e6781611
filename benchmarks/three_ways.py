"""The same grid in three ways in one run: a shell loop of TRL scripts, Ray Tune with TRL, and `orchestrate sweep`.

`python -m benchmarks.three_ways [--method simpo|dpo] [--updates 16]`: same initial model, rows, order and updates, in
float32. The script checks that the results agree (first-step gradients to 1e-5, final evaluation to 1e-3) and prints
ratios and parts of the time. The shell loop gives each script all cores, the other two a core per trial.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.agreement import final_metrics_difference, first_gradients_difference
from benchmarks.benchmark_inputs import BenchmarkInputs, prepare
from benchmarks.contestants import TimedRun, orchestrate_sweep, ray_tune, shell_loop
from benchmarks.results import write

PAIRS, EVAL_ROWS, SLOTS = 8, 64, 2
GRIDS: dict[str, dict[str, list[float]]] = {
    "simpo": {"loss.beta": [2.0, 2.5], "loss.gamma": [0.5, 1.4], "training.learning_rate": [3e-5, 1e-4]},
    "dpo": {"loss.beta": [0.01, 0.05, 0.1, 0.5], "training.learning_rate": [3e-5, 1e-4]},
}


def main() -> None:
    """Compare the requested methods one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=sorted(GRIDS), action="append", help="Both by default.")
    parser.add_argument("--updates", type=int, default=16, help="Optimizer steps of each trial.")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--write", action="store_true", help="Put the figures into docs/performance.md too.")
    options = parser.parse_args()
    for method in options.method or sorted(GRIDS, reverse=True):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found = compare(method, Path(folder), options.vocabulary, options.updates)
        print(json.dumps(found, indent=1), flush=True)
        if options.write:
            write(f"three_ways_{method}", found)


def compare(method: str, folder: Path, vocab_size: int, updates: int) -> dict[str, Any]:
    """Run the three ways one after the other and return their figures."""
    inputs = prepare(folder, vocab_size=vocab_size, train_rows=PAIRS * updates, eval_rows=EVAL_ROWS)
    configurations = trials_of(method)
    files = trl_files(method, inputs, folder, configurations, updates)
    sweep = sweep_of(method, inputs, updates)
    log(f"{method}: {len(configurations)} trials of {updates} updates of {PAIRS} pairs, {inputs.source} rows")
    product = log_time("orchestrate sweep", orchestrate_sweep(sweep, folder))
    loop = log_time("shell loop of TRL", shell_loop(files, threads=os.cpu_count() or 1))
    tune = log_time("Ray Tune with TRL", ray_tune(files, SLOTS, folder))
    gradients = first_gradients_difference(sweep, folder / "trl-0" / "gradients.safetensors", folder / "runs" / "cache")
    metrics = final_metrics_difference(loop.metrics, product.metrics)
    if gradients > 1e-5 or metrics > 1e-3:
        raise RuntimeError(f"{method}: not the same training: gradients {gradients:.2g}, final metrics {metrics:.2g}")
    return {
        "method": method,
        "data": inputs.source,
        "vocabulary": vocab_size,
        "trials": len(configurations),
        "updates": updates,
        "seconds": {"shell loop": loop.seconds, "ray tune": tune.seconds, "orchestrate": product.seconds},
        "parts": {"shell loop": loop.parts, "ray tune": tune.parts, "orchestrate": product.parts},
        "ended": product.ended,
        "times faster than the shell loop": loop.seconds / product.seconds,
        "times faster than Ray Tune with TRL": tune.seconds / product.seconds,
        "first-step gradients differ by": gradients,
        "final metrics differ by": metrics,
        "cores": os.cpu_count(),
    }


def log(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def log_time(name: str, took: TimedRun) -> TimedRun:
    """Print the time at once, since the whole run takes long."""
    log(f"  {name}: {took.seconds:.0f} s")
    return took


def trials_of(method: str) -> list[dict[str, float]]:
    """Return the grid's configurations, the last hyperparameter advancing fastest, in the order of the sweep."""
    grid = GRIDS[method]
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def trl_files(
    method: str, inputs: BenchmarkInputs, folder: Path, configurations: list[dict[str, float]], updates: int
) -> list[Path]:
    """Write one JSON per trial for `benchmarks.trl_trial`, with the rows in the order of this product's trials."""
    from trainer.training.schedule import DataOrder

    rows = inputs.train.read_text().splitlines()
    order = DataOrder(len(rows), PAIRS, 42)
    ordered = folder / "ordered.jsonl"
    ordered.write_text("".join(rows[i] + "\n" for step in range(1, updates + 1) for i in order.pairs_of(step)))
    files: list[Path] = []
    for n, configuration in enumerate(configurations):
        trial: dict[str, Any] = {
            "method": method,
            "model": str(inputs.model),
            "train": str(ordered),
            "eval": str(inputs.eval),
            "max_length": inputs.max_length,
            "out": str(folder / f"trl-{n}"),
            "pairs_per_update": PAIRS,
            "max_steps": updates,
            "learning_rate": configuration["training.learning_rate"],
            "beta": configuration["loss.beta"],
            "gamma": configuration.get("loss.gamma", 0.0),
            "gradients": n == 0,
        }
        files.append(folder / f"trl-{n}.json")
        files[-1].write_text(json.dumps(trial))
    return files


def sweep_of(method: str, inputs: BenchmarkInputs, updates: int) -> dict[str, Any]:
    """Return the same grid as a sweep."""
    data = {"train": str(inputs.train), "eval": str(inputs.eval), "max_length": inputs.max_length}
    return {
        "name": f"bench-{method}",
        "base": {
            "model": str(inputs.model),
            "data": {**data, "max_prompt_length": inputs.max_length - 8},
            "loss": {"kind": method},
            "training": {
                "pairs_per_update": PAIRS,
                "max_steps": updates,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
                "eval_steps": updates,
            },
            "evaluation": {"prompts": 0, "samples": 0},
        },
        "search": GRIDS[method],
        "budget": {"concurrency": SLOTS},
    }


if __name__ == "__main__":
    main()
