"""A trial that writes checkpoints and trains nothing, attempt by attempt, each on a disk of its own."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from orchestrator.execution.messages import Job, Report
from orchestrator.execution.workers.attempt_runner import Attempt
from trainer.config.trial import TrialConfig
from trainer.results import Ending, EndKind, Point
from trainer.storage.atomic_files import sha256_of, write_folder, write_json
from trainer.storage.checkpoint_manifest import FILES, FORMAT, MANIFEST, place_of, places, step_of

BASE = {
    "model": {"generated": {}},
    "data": {"train": [{"generated": "instructions"}]},
    "loss": {"kind": "simpo", "beta": 2.0, "gamma": 1.0},
}
STEPS = 6


def write_checkpoint(folder: Path, step: int) -> None:
    def fill(aside: Path) -> None:
        for name in FILES:
            (aside / name).write_text(f"{name} of {step}")
        digests = {name: sha256_of([aside / name]) for name in FILES}
        (aside / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "sha256": digests}))

    write_folder(place_of(folder, step), fill)


class FarWorkshop:
    """A checkpoint after every update, the older ones removed, as the trainer does it."""

    def __init__(self, steps: int = STEPS, each: Callable[[int], None] = lambda step: time.sleep(0.02)) -> None:
        self.counters = {"trials": 0}
        self.began: int | None = None
        self._steps, self._each, self._asked = steps, each, False

    def interrupt(self) -> None:
        self._asked = True

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[Point, None, Ending]:
        self.counters["trials"] += 1
        found = places([*earlier, folder])
        self.began = step_of(found[0]) if found else 0
        for step in range(self.began + 1, self._steps + 1):
            if self._asked:
                return Ending(EndKind.STOPPED, "interrupted", step - 1)
            (folder / "samples.jsonl").write_text(json.dumps({"step": step}) + "\n")
            write_checkpoint(folder, step)
            for place in places([*earlier, folder])[1:]:
                shutil.rmtree(place)
            self._each(step)
            yield Point(step, {"eval_loss": 1.0 / step})
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "model.safetensors").write_text("weights")
        write_json(folder / "ending.json", {"kind": "finished"})
        for place in places([*earlier, folder]):
            shutil.rmtree(place)
        return Ending(EndKind.FINISHED, "done", self._steps, folder / "model")


def job(disk: Path, url: str, attempt: int = 1) -> Job:
    config = TrialConfig.model_validate(BASE).model_dump_json()
    return Job("3", attempt, config, disk / "trials" / "0003" / str(attempt), mirror=url)


def pull_all(attempt: Attempt) -> list[Report]:
    heard = [attempt.pull()]
    while heard[-1].end is None:
        heard.append(attempt.pull())
    return heard


if __name__ == "__main__":  # a worker that a test kills
    program = FarWorkshop(each=lambda step: time.sleep(1.0))
    pull_all(Attempt(job(Path(sys.argv[1]), sys.argv[2]), lambda: program))
