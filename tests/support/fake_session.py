"""A training session that trains nothing: what each trial does stands in script.json beside the runs folder."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.execution.slots import Slots
from orchestrator.folders import SweepFolder
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import Budget, GridSampler, Objective, SweepSpec
from orchestrator.study.trial_records import TrialRecord
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, RunStatus, StepMetrics

METRIC = "eval_accuracies/logp"
SLOTS = Slots(count=2, gpus=0.0, threads=1)
BASE = {
    "model": {"generated": {}},
    "data": {"train": [{"generated": "instructions"}]},
    "loss": {"kind": "simpo", "beta": 2.0, "gamma": 1.0},
}


def make_spec(trials: int = 6, **more: Any) -> SweepSpec:
    given: dict[str, Any] = {
        "name": "s",
        "base": BASE,
        "search": SearchSpace.model_validate({"dimensions": {"training.seed": {"choice": list(range(trials))}}}),
        "sampler": GridSampler(),
        "goal": Objective(metric=METRIC, direction="maximize"),
        "budget": Budget(),
    }
    return SweepSpec.model_validate(given | more)


def write_script(root: Path, **script: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "script.json").write_text(json.dumps(script))


class ScriptedSession:
    """Behaviors by trial number: ok, slow, bug, memory, nan, die (once), deadly (always), nogoal, device (a GPU fails,
    once), neighbour (repeats its first point until a GPU has failed). `gpu` in the script: as if the process used one.
    `warnings`: by trial, what the trainer warns of."""

    def __init__(self, cache: Path) -> None:
        self._cache, self._root = cache, cache.parent
        self.counters = {"imports": 1, "trials": 0}
        self._requested = False

    def interrupt(self) -> None:
        self._requested = True

    def sibling(self) -> ScriptedSession:
        other = ScriptedSession(self._cache)
        other.counters = self.counters
        return other

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        script = json.loads((self._root / "script.json").read_text())
        number = int(folder.parent.name)
        what = script.get("trials", {}).get(str(number), "ok")
        steps, pause = script.get("steps", 4), script.get("pause", 0.0)
        self.counters["trials"] += 1
        if script.get("gpu"):
            import torch

            torch.cuda.is_initialized = lambda: True
        for message in script.get("warnings", {}).get(str(number), ()):
            logging.getLogger("trainer.scripted").warning("%s", message)
        failed = self._root / "device-failed"
        while what == "neighbour" and not failed.exists():
            yield StepMetrics(0, {"loss": 1.0, METRIC: 0.5})
        done = 0
        for path in (*earlier, folder):
            if (path / "checkpoint.json").is_file():
                done = max(done, json.loads((path / "checkpoint.json").read_text()))
        for step in range(steps + 1):
            if step > done:
                if self._requested:
                    self._requested = False
                    _save(folder, done)
                    return RunResult(RunStatus.STOPPED, "interrupted", done)
                time.sleep(8 * pause if what == "slow" else pause)
                done = step
                if step % 2 == 0:
                    _save(folder, step)
                with (self._root / "trained.log").open("a") as log:
                    log.write(f"{number} {step}\n")
            loss = float("nan") if what == "nan" and step == 2 else 1.0 / (1 + step)
            metrics = {"loss": loss, "grad_norm": 1.0}
            if step % 2 == 0 and what != "nogoal":
                metrics[METRIC] = 0.5 + 0.01 * config.training.seed + 0.001 * step
            yield StepMetrics(step, metrics)
            if step == 3 and (what == "deadly" or (what == "die" and not earlier)):
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 1 and what == "bug":
                raise ValueError(f"scripted bug in trial {number}")
            if step == 1 and what == "memory":
                raise MemoryError
            if step == 3 and what == "device" and not earlier:
                failed.touch()
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_...")
        return RunResult(RunStatus.FINISHED, "", steps)


def _save(folder: Path, step: int) -> None:
    temporary = folder / "checkpoint.tmp"
    temporary.write_text(json.dumps(step))
    temporary.replace(folder / "checkpoint.json")


class ListSink:
    """Remembers every call; as JSON lines too, where a path is given."""

    def __init__(self, log: Path | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._log = log

    def _add(self, *call: Any) -> None:
        self.calls.append(call)
        if self._log is not None:
            with self._log.open("a") as log:
                log.write(json.dumps(call) + "\n")

    def start_run(self, run: str, *, name: str, params: Any, tags: Any, at: float) -> None:
        self._add("start", run, dict(params), dict(tags))

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        self._add("points", run, [p.step for p in metrics])

    def log_final_metrics(self, run: str, values: Any, *, step: int, at: float) -> None:
        self._add("values", run, dict(values), step)

    def set_tags(self, run: str, tags: Any) -> None:
        self._add("tag", run, dict(tags))

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        self._add("artifact", run, str(path))

    def end_run(self, run: str, *, status: str, tags: Any, at: float) -> None:
        self._add("end", run, status, dict(tags))

    def close(self, timeout: float) -> int:
        return 0

    def tags(self, run: str) -> dict[str, str]:
        out: dict[str, str] = {}
        for call in self.calls:
            if call[0] in ("start", "tag", "end") and call[1] == run:
                out |= call[-1]
        return out


class SilentView:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.records: list[TrialRecord] = []

    def set_stage(self, text: str) -> None:
        self.said.append(text)

    def log(self, text: str) -> None:
        self.said.append(text)

    def set_total_updates(self, updates_of: Any) -> None: ...

    def update_trial(self, record: TrialRecord) -> None:
        self.records.append(record)

    def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None: ...

    def refresh(self) -> None: ...

    def close(self) -> None: ...


def sweep_folder(root: Path) -> SweepFolder:
    return SweepFolder(root, "s")
