"""Attempts of one trial, each on a disk of its own, with one mirror."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from orchestrator.execution.messages import AttemptReport, AttemptTask
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.mirror import Mirror
from tests.support.fake_session import CheckpointingSession
from tests.support.processes import wait_until
from tests.support.specs import BASE
from trainer.config.trial import TrialConfig
from trainer.storage.atomic_files import sha256_of, write_folder
from trainer.storage.checkpoint_manifest import CHECKPOINT_FILES, FORMAT, MANIFEST, checkpoint_path


def write_checkpoint(folder: Path, step: int) -> None:
    def fill(temporary: Path) -> None:
        for name in CHECKPOINT_FILES:
            (temporary / name).write_text(f"{name} of {step}")
        digests = {name: sha256_of([temporary / name]) for name in CHECKPOINT_FILES}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "sha256": digests}))

    write_folder(checkpoint_path(folder, step), fill)


def copied(mirror: Mirror) -> Callable[[int], object]:
    """Each update waits for its copy, so that a test knows what is there."""
    return lambda step: wait_until(lambda: any(name.endswith(f"step-{step:08d}") for name in mirror.complete_paths()))


def task(disk: Path, url: str, attempt: int = 1) -> AttemptTask:
    config = TrialConfig.model_validate(BASE).model_dump_json()
    return AttemptTask("3", attempt, config, disk / "trials" / "0003" / str(attempt), mirror=url)


def pull_all(attempt: AttemptRunner) -> list[AttemptReport]:
    """The reports of an attempt up to its last."""
    received = [attempt.next_report()]
    while received[-1].result is None:
        received.append(attempt.next_report())
    return received


if __name__ == "__main__":  # a worker that a test kills inside a copy
    session = CheckpointingSession(save_steps=1, each=copied(Mirror(sys.argv[2])))
    pull_all(AttemptRunner(task(Path(sys.argv[1]), sys.argv[2]), lambda: session))
