"""Cost of events for the driver of a large sweep as trials accumulate. `python -m benchmarks.driver --write`.

The real trial controller, study (SQLite), outbox with its thread, MLflow store and plain log; 2,000 trials over 64
slots with scripted trainers, so that only the driver's time is measured. `benchmarks.driver_ray` adds Ray.

In real time: every slot reports once per second, reports spread over the second; the driver handles them one after the
other. An event's latency is the time from its due time to the driver's decision.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import io
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import results
from dashboards.sweep_reporter import DashboardReporter
from dashboards.terminal.progress_views import PlainLogView, SweepProgress
from orchestrator.driver.parent_run import open_sink
from orchestrator.driver.sweep_driver import AfterTrial
from orchestrator.execution.controller import TrialController
from orchestrator.execution.messages import AttemptReport, AttemptResult, AttemptStatus, AttemptTask
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.folders import SweepFolder, create_sweep_folder
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from trainer.results import StepMetrics

OBJECTIVE = "eval_accuracies/logp"
REPORTS = 20
"""Reports per trial, one per second. 20 s are short for a trial; longer trials cost the driver less."""
POLL_INTERVAL = 0.1
"""Seconds between polls while no event is due; Tune polls ten times a second."""
EVERY = 5
"""Reports between two evaluations."""
BUCKET = 100
"""Finished trials per point of the curves."""
_TRAINING = ("loss", "grad_norm", "learning_rate", "rewards/margins", "rewards/accuracies", "margins/logp")
_EVALUATION = ("eval_loss", "eval_rewards/margins", "eval_margins/logp", "eval_lengths/chosen", "eval_logps/chosen")


def spec_of(trials: int, slots: int, sampler: str = "random") -> SweepSpec:
    """Return a sweep whose pruner evaluates every trial."""
    return load_spec_text(
        f"""
name: driver
base:
  model: {{generated: {{}}}}
  data: {{train: {{generated: instructions}}}}
  loss: {{kind: simpo, beta: 2.0, gamma: 1.0}}
  training: {{max_steps: {REPORTS}}}
search:
  loss.beta: {{uniform: [1.0, 10.0]}}
  loss.gamma: {{uniform: [0.2, 1.6]}}
  training.learning_rate: {{log_uniform: [1.0e-7, 1.0e-5]}}
sampler: {{kind: {sampler}, seed: 1}}
pruner: {{kind: percentile, percentile: 75.0, n_warmup_steps: 0.7}}
maximize: {OBJECTIVE}
require: off
budget: {{trials: {trials}, concurrency: {slots}}}
""",
        Path("/"),
    )


@dataclass(slots=True)
class Bucket:
    """Measurements while a range of trials had finished, in seconds."""

    reports: list[float] = field(default_factory=list[float])
    latencies: list[float] = field(default_factory=list[float])
    starts: list[float] = field(default_factory=list[float])
    ends: list[float] = field(default_factory=list[float])
    cpu: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in ("report", "start", "end")})
    """CPU time of the driver's own thread, for each event."""
    began: float = 0.0
    ended: float = 0.0
    process: float = 0.0
    thread: float = 0.0
    memory: float = 0.0
    pending: int = 0
    load: float = 0.0

    def row(self, finished: int) -> dict[str, float]:
        """Return a row for the table and the figure."""
        return {
            "finished": finished,
            "report_ms": 1e3 * float(np.median(self.reports)),
            "start_ms": 1e3 * float(np.median(self.starts)) if self.starts else math.nan,
            "end_ms": 1e3 * float(np.median(self.ends)) if self.ends else math.nan,
            **{f"{kind}_cpu_ms": 1e3 * float(np.mean(took)) for kind, took in self.cpu.items() if took},
            "latency_p50_ms": 1e3 * float(np.percentile(self.latencies, 50)),
            "latency_p99_ms": 1e3 * float(np.percentile(self.latencies, 99)),
            "reports_per_second": len(self.latencies) / (self.ended - self.began),
            "cores": self.process / (self.ended - self.began),
            "delivery_cores": (self.process - self.thread) / (self.ended - self.began),
            "memory_mb": self.memory,
            "pending": self.pending,
            "load": self.load,
        }


@dataclass(order=True, slots=True)
class _Event:
    due: float
    slot: int
    job: AttemptTask = field(compare=False)
    step: int = field(compare=False)


class ScriptedTune:
    """Scripted replacement of Ray: passes reports to the trial controller and asks it for the next attempt."""

    def __init__(self, controller: TrialController, slots: int, *, paced: bool = True) -> None:
        """`paced` False: handle every event at once, in the order of due times."""
        self._controller, self._slots, self._paced = controller, slots, paced
        self._free = list(range(slots))[::-1]
        self._queue: list[_Event] = []
        self._zero = time.perf_counter()
        self._reached = 0.0
        self.finished = 0
        self.buckets: dict[int, Bucket] = {}

    def run(self, watch: Callable[[Bucket], None]) -> None:
        """Run until no events are left; `watch` is called at the start of each bucket."""
        self._fill()
        self._zero = time.perf_counter()
        process, thread = time.process_time(), time.thread_time()
        while self._queue:
            bucket = self.buckets.get(self.finished // BUCKET)
            if bucket is None:
                bucket = self.buckets[self.finished // BUCKET] = Bucket(began=self._now)
                watch(bucket)
            self._handle(heapq.heappop(self._queue), bucket)
            bucket.process, process = bucket.process + time.process_time() - process, time.process_time()
            bucket.thread, thread = bucket.thread + time.thread_time() - thread, time.thread_time()
            bucket.ended = self._now

    @property
    def _now(self) -> float:
        return time.perf_counter() - self._zero if self._paced else self._reached

    def _wait_until(self, due: float) -> None:
        self._reached = max(self._reached, due)
        while (remaining := due - self._now) > 0:
            time.sleep(min(remaining, POLL_INTERVAL))
            with self._controller as controller:
                controller.poll()

    def _handle(self, event: _Event, bucket: Bucket) -> None:
        report = _report(event.job, event.step)
        self._wait_until(event.due)
        began, cpu = time.perf_counter(), time.thread_time()
        with self._controller as controller:
            controller.poll()
            continues = controller.on_report(event.job.id, report)
        took, cpu = time.perf_counter() - began, time.thread_time() - cpu
        bucket.latencies.append(self._now - event.due)
        bucket.cpu["report" if continues else "end"].append(cpu)
        if continues:
            bucket.reports.append(took)
            heapq.heappush(self._queue, _Event(event.due + 1.0, event.slot, event.job, event.step + 1))
            return
        bucket.ends.append(took)
        self.finished += 1
        self._free.append(event.slot)
        self._fill(bucket)

    def _fill(self, bucket: Bucket | None = None) -> None:
        while self._free:
            began, cpu = time.perf_counter(), time.thread_time()
            with self._controller as controller:
                job = controller.next_attempt(self._slots)
            if job is None:
                return
            slot = self._free.pop()
            first = REPORTS * slot / self._slots  # staggered, so that trials do not end at the same time
            if bucket is not None:
                bucket.starts.append(time.perf_counter() - began)
                bucket.cpu["start"].append(time.thread_time() - cpu)
                first = self._now
            heapq.heappush(self._queue, _Event(first + 1.0, slot, job, 0))


def _report(job: AttemptTask, step: int) -> AttemptReport:
    number = int(job.run_name)
    metrics = {name: 1.0 / (1 + step + path) for path, name in enumerate(_TRAINING)}
    if step % EVERY == 0 or step == REPORTS:
        metrics |= {name: 0.1 * path for path, name in enumerate(_EVALUATION)}
        metrics[OBJECTIVE] = 0.5 + (0.2 + 0.1 * math.sin(number)) * step / REPORTS
    end = AttemptResult(AttemptStatus.FINISHED, "", updates=step) if step == REPORTS else None
    return AttemptReport((StepMetrics(step, metrics),), end, pid=1000 + number % 64, counters={"imports": 1})


def measure(root: Path, trials: int, slots: int, sampler: str = "random") -> dict[str, Any]:
    """Drive one sweep and return the measurements."""
    spec = spec_of(trials, slots, sampler)
    folder = SweepFolder(root, spec.name)
    create_sweep_folder(folder, dump_spec(spec))
    log = io.StringIO()
    view = PlainLogView(SweepProgress(spec, trials), Console(file=log, width=160))
    with (
        Study.create(folder, spec, slots=slots, train_pairs=10_000) as study,
        SignalHandler(lambda: "") as signals,
        contextlib.ExitStack() as stack,
    ):
        sink = open_sink(study, root, DashboardReporter())
        study.start_driving(0.0)
        sink.start_run(SWEEP_RUN, name=spec.name, params={}, tags={}, at=time.time())
        after = stack.enter_context(AfterTrial(study, sink, DashboardReporter()))
        controller = TrialController(
            study, sink, view, signals, finalize_config=lambda config, _: config, on_trial_end=after
        )
        tune = ScriptedTune(controller, slots)

        def watch(bucket: Bucket) -> None:
            """Record and print the state at the start of a bucket."""
            bucket.memory = resident()
            bucket.pending = sink.pending
            bucket.load = os.getloadavg()[0]
            print(f"{tune.finished} ended, {bucket.pending} messages behind, load {bucket.load:.1f}", flush=True)

        began = time.perf_counter()
        tune.run(watch)
        took = time.perf_counter() - began
        pending = sink.pending
        began = time.perf_counter()
        undelivered = sink.close(600.0)
        catching_up = time.perf_counter() - began
        states = [record.state.value for record in study.trials()]
    rows = [bucket.row(number * BUCKET) for number, bucket in sorted(tune.buckets.items()) if bucket.reports]
    if len(states) != trials or undelivered:
        raise SystemExit(f"{len(states)} of {trials} trials, {undelivered} messages not delivered")
    return {
        "trials": trials,
        "slots": slots,
        "sampler": sampler,
        "reports_per_trial": REPORTS,
        "seconds": took,
        "pruned": states.count("PRUNED"),
        "pending_at_end": pending,
        "catching_up": catching_up,
        "rows": rows,
    }


def resident() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prefsweep-driver-") as path:
        found = measure(Path(path), options.trials, options.slots, options.sampler)
    for row in found["rows"]:
        print("  ".join(f"{name}={value:.1f}" for name, value in row.items()), flush=True)
    print(f"{found['seconds']:.0f} s, {found['pruned']} pruned, {found['pending_at_end']} messages behind")
    if options.write:
        results.write("driver", found)


if __name__ == "__main__":
    main()
