"""Cost of Ray for the driver of a large sweep: Ray Tune alone, then this product. `python -m benchmarks.driver_ray`.

Both run the same light trainables, which sleep a second and report, in as many worker processes as slots. Measured: CPU
time of the driver's process per report (Ray's own processes excluded), and the time from a worker's report to its
arrival in the driver. Reports during worker start-up, which uses the CPUs, are excluded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.driver import EVERY, OBJECTIVE, spec_of
from dashboards.sweep_reporter import DashboardReporter
from dashboards.terminal.progress_views import PlainLogView, SweepProgress
from orchestrator.driver.parent_run import open_sink
from orchestrator.driver.sweep_driver import AfterTrial
from orchestrator.execution.controller import TrialController
from orchestrator.execution.local_cluster import local_cluster
from orchestrator.execution.messages import AttemptReport
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.execution.tune_adapter import run_trials
from orchestrator.folders import SweepFolder, create_sweep_folder
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, RunStatus, StepMetrics

AT = "reported_at"


@dataclass(slots=True)
class LatencyWindow:
    """Latencies and CPU time from the moment at which every slot has reported `warm` times."""

    slots: int
    warm: int = 3
    count: int = 0
    latencies: list[float] = field(default_factory=list[float])
    began: tuple[float, float] = (0.0, 0.0)
    last: tuple[float, float] = (0.0, 0.0)
    load: float = 0.0

    def take(self, reported_at: float) -> None:
        """Record the arrival of a report."""
        self.count += 1
        self.last = time.perf_counter(), time.process_time()
        if self.count <= self.warm * self.slots:
            self.began, self.load = self.last, os.getloadavg()[0]
        else:
            self.latencies.append(time.time() - reported_at)

    def row(self, way: str) -> dict[str, Any]:
        """Return a row of the table."""
        seconds, cpu = (b - a for a, b in zip(self.began, self.last, strict=True))
        return {
            "way": way,
            "slots": self.slots,
            "reports": len(self.latencies),
            "reports_per_second": len(self.latencies) / seconds,
            "cpu_ms_per_report": 1e3 * cpu / len(self.latencies),
            "cores": cpu / seconds,
            "latency_p50_ms": 1e3 * float(np.percentile(self.latencies, 50)),
            "latency_p99_ms": 1e3 * float(np.percentile(self.latencies, 99)),
            "load": self.load,
        }


class Sleeper:
    """A training session whose trials sleep a second and report."""

    counters: dict[str, int]

    def __init__(self, cache: Path) -> None:
        del cache
        self.counters = {"imports": 0}

    def interrupt(self) -> None:
        """Do nothing; the benchmark interrupts no trial."""

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        """Yield one report per update, and one for the initial model."""
        del folder, earlier, fork
        last = config.training.max_steps or 0
        for step in range(last + 1):
            time.sleep(1.0)
            metrics = {"loss": 1.0 / (1 + step), AT: time.time()}
            if step % EVERY == 0 or step == last:
                metrics[OBJECTIVE] = 0.5
            yield StepMetrics(step, metrics)
        return RunResult(RunStatus.FINISHED, "", last)


def run_product(root: Path, slots: Slots, trials: int, window: LatencyWindow) -> None:
    """Run this product: trial controller, study, outbox and MLflow on top of Tune."""
    spec = spec_of(trials, slots.count)
    folder = SweepFolder(root, spec.name)
    create_sweep_folder(folder, dump_spec(spec))

    class Listening(TrialController):
        def on_report(self, task_id: str, report: AttemptReport) -> bool:
            if report.metrics:
                window.take(report.metrics[-1].metrics[AT])
            return super().on_report(task_id, report)

    from rich.console import Console

    from orchestrator.execution import tune_adapter

    with (
        Study.create(folder, spec, slots=slots.count, train_pairs=10_000) as study,
        SignalHandler(lambda: "") as signals,
    ):
        sink = open_sink(study, root, DashboardReporter())
        study.start_driving(0.0)
        sink.start_run(SWEEP_RUN, name=spec.name, params={}, tags={}, at=time.time())
        view = PlainLogView(SweepProgress(spec, trials), Console(file=(root / "log").open("w"), width=160))
        with (
            AfterTrial(study, sink, DashboardReporter()) as after,
            local_cluster(folder.path / "ray", slots, signals),
        ):
            tune_adapter.TrialController = Listening  # pyright: ignore[reportPrivateImportUsage]
            run_trials(study, sink, view, signals, slots, on_trial_end=after, open_session=Sleeper)
        sink.close(120.0)


def run_tune_alone(root: Path, slots: Slots, trials: int, window: LatencyWindow) -> None:
    """Run Ray Tune with a scheduler that only records."""
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler

    class Listening(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            window.take(result[AT])
            return super().on_trial_result(tune_controller, trial, result)

    with SignalHandler(lambda: "") as signals, local_cluster(root / "ray", slots, signals):
        tune.Tuner(
            tune.with_resources(Sleeping, tune.PlacementGroupFactory(slots.bundles)),
            param_space={"steps": spec_of(trials, slots.count).base.training.max_steps},
            tune_config=tune.TuneConfig(num_samples=trials, scheduler=Listening(), reuse_actors=True),
            run_config=tune.RunConfig(storage_path=str(root / "results"), verbose=0),
        ).fit()


def _trainable() -> type:
    from ray.tune import Trainable

    class Sleeping(Trainable):
        """The same trial as a plain Trainable."""

        def setup(self, config: dict[str, Any]) -> None:
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._left = new_config["steps"] + 1
            return True

        def step(self) -> dict[str, Any]:
            time.sleep(1.0)
            self._left -= 1
            return {"loss": 0.5, AT: time.time(), "done": self._left == 0}

    return Sleeping


Sleeping = _trainable()

WAYS: dict[str, Callable[[Path, Slots, int, LatencyWindow], None]] = {
    "Ray Tune alone": run_tune_alone,
    "this product": run_product,
}


def main() -> None:
    """Measure both; `--write` stores the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--trials", type=int, default=192)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for way, run in WAYS.items():
        window = LatencyWindow(options.slots)
        with tempfile.TemporaryDirectory(prefix="prefsweep-ray-") as path:
            run(Path(path), Slots(count=options.slots, gpus=0.0, threads=1), options.trials, window)
        rows.append(window.row(way))
        print(
            "  ".join(f"{k}={v:.1f}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()), flush=True
        )
    if options.write:
        results.write("driver_ray", {"trials": options.trials, "rows": rows})


if __name__ == "__main__":
    main()
