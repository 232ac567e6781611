"""The grid under Ray Tune with TRL, a fresh process per trial. `python -m benchmarks.ray_trl GRID.json`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run(trials: list[str], slots: int, repository: str) -> float:
    """Run each trial file in its own TRL process under Tune; return the wall-clock seconds."""
    import ray
    from ray import tune

    began = time.perf_counter()
    ray.init("local", num_cpus=slots, include_dashboard=False, log_to_driver=False, logging_level="error")

    def one(config: dict[str, Any]) -> None:
        subprocess.run([sys.executable, "-m", "benchmarks.trl_trial", config["trial"]], cwd=repository, check=True)
        tune.report({"done_at": time.time()})

    tune.Tuner(
        tune.with_resources(one, {"cpu": 1}),
        param_space={"trial": tune.grid_search(trials)},
        tune_config=tune.TuneConfig(metric="done_at", mode="min"),
        run_config=tune.RunConfig(verbose=0, storage_path=str(Path(trials[0]).parent / "ray")),
    ).fit()
    ray.shutdown()
    return time.perf_counter() - began


if __name__ == "__main__":
    grid = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({"seconds": run(grid["trials"], grid["slots"], grid["repository"])}))
