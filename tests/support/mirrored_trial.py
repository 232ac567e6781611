"""A trial that writes checkpoints and trains nothing, attempt by attempt, each on a disk of its own."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from orchestrator.execution.messages import AttemptReport, AttemptTask
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, RunStatus, StepMetrics
from trainer.storage.atomic_files import sha256_of, write_folder, write_json
from trainer.storage.checkpoint_manifest import (
    CHECKPOINT_FILES,
    FORMAT,
    MANIFEST,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
)

BASE = {
    "model": {"generated": {}},
    "data": {"train": [{"generated": "instructions"}]},
    "loss": {"kind": "simpo", "beta": 2.0, "gamma": 1.0},
}
STEPS = 6


def write_checkpoint(folder: Path, step: int) -> None:
    def fill(temporary: Path) -> None:
        for name in CHECKPOINT_FILES:
            (temporary / name).write_text(f"{name} of {step}")
        digests = {name: sha256_of([temporary / name]) for name in CHECKPOINT_FILES}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "sha256": digests}))

    write_folder(checkpoint_path(folder, step), fill)


class FarSession:
    """A checkpoint after every update, the older ones removed, as the trainer does it."""

    def __init__(self, steps: int = STEPS, each: Callable[[int], None] = lambda step: time.sleep(0.02)) -> None:
        self.counters = {"trials": 0}
        self.began: int | None = None
        self._steps, self._each, self._requested = steps, each, False

    def interrupt(self) -> None:
        self._requested = True

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        self.counters["trials"] += 1
        found = list_checkpoints([*earlier, folder])
        self.began = checkpoint_step(found[0]) if found else 0
        for step in range(self.began + 1, self._steps + 1):
            if self._requested:
                return RunResult(RunStatus.STOPPED, "interrupted", step - 1)
            (folder / "samples.jsonl").write_text(json.dumps({"step": step}) + "\n")
            write_checkpoint(folder, step)
            for path in list_checkpoints([*earlier, folder])[1:]:
                shutil.rmtree(path)
            self._each(step)
            yield StepMetrics(step, {"eval_loss": 1.0 / step})
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "model.safetensors").write_text("weights")
        write_json(folder / "ending.json", {"kind": "finished"})
        for path in list_checkpoints([*earlier, folder]):
            shutil.rmtree(path)
        return RunResult(RunStatus.FINISHED, "done", self._steps, folder / "model")


def task(disk: Path, url: str, attempt: int = 1) -> AttemptTask:
    config = TrialConfig.model_validate(BASE).model_dump_json()
    return AttemptTask("3", attempt, config, disk / "trials" / "0003" / str(attempt), mirror=url)


def pull_all(attempt: AttemptRunner) -> list[AttemptReport]:
    received = [attempt.next_report()]
    while received[-1].result is None:
        received.append(attempt.next_report())
    return received


if __name__ == "__main__":  # a worker that a test kills
    program = FarSession(each=lambda step: time.sleep(1.0))
    pull_all(AttemptRunner(task(Path(sys.argv[1]), sys.argv[2]), lambda: program))
