"""A whole driver without Ray: the real conductor, study, outbox and MLflow store, attempts in the same process.

A start costs milliseconds instead of seconds, so that it can be killed at hundreds of instants.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import mlflow  # noqa: F401  the children need not import it again
import torch
from scripted import METRIC, SilentView, make_spec

from orchestrator.driver.checkpoint_retention import Retention, tidy_forks
from orchestrator.execution.controller import Conductor
from orchestrator.execution.stop_reasons import Interrupt
from orchestrator.execution.workers.attempt_runner import Attempt
from orchestrator.folders import SweepFolder, hold, make
from orchestrator.interfaces import SWEEP
from orchestrator.spec.loading.serialization import dump
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_sink import MlflowReceiver
from orchestrator.tracking.outbox import Outbox
from trainer.config.trial import TrialConfig
from trainer.results import Ending, EndKind, Point
from trainer.storage import checkpoints
from trainer.storage.atomic_files import write_folder, write_text
from trainer.storage.checkpoints import Outcome, find_outcome, save_outcome

STEPS = 6


class WritingWorkshop:
    """Trains nothing and writes everything: real checkpoints, endings, samples and models."""

    counters: ClassVar[dict[str, int]] = {}

    def interrupt(self) -> None:
        raise AssertionError("nobody interrupts here")

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[Point, None, Ending]:
        folders = [*earlier, folder]
        told = find_outcome(folders)
        if told is not None:
            yield from told.history
            return told.ending
        state = checkpoints.newest(folders) or (None if fork is None else checkpoints.newest([fork]))
        assert fork is None or state is not None, "a fork begins from no start model"
        history = [] if state is None else list(state.history)
        w = torch.zeros(4) if state is None else state.weights["w"]
        yield from list(history)
        for step in range(len(history), STEPS + 1):
            w = w + (1 + config.training.seed) * config.training.learning_rate
            weights, moved = {"w": w}, float(w[0])
            metrics = {"loss": 1.0 / (1 + step), METRIC: 0.5 + 0.01 * config.training.seed + 0.001 * step + moved}
            history.append(Point(step, metrics))
            if step % 2 == 1:
                checkpoints.save(folder, checkpoints.State("c", step, weights, {}, history))
                checkpoints.discard(folders, before=step)
            yield history[-1]
        write_text(folder / "samples.jsonl", f'{{"seed": {config.training.seed}}}\n')
        write_folder(folder / "model", lambda to: checkpoints.save_file(weights, to / "model.safetensors"))
        ending = Ending(EndKind.FINISHED, "", STEPS, folder / "model")
        save_outcome(folder, Outcome("c", ending, history))
        checkpoints.discard(folders)
        return ending


def drive(root: Path, spec: SweepSpec | None = None) -> None:
    """Begin the sweep or go on with it, as far as it goes."""
    folder = SweepFolder(root, "s")
    if not folder.spec.exists():
        make(folder, dump(spec or make_spec(3)))
    with hold(folder):
        study = Study.open(folder) if Study.exists(folder) else Study.create(folder, spec or make_spec(3))
        with study:
            _run(root, study)


def _run(root: Path, study: Study) -> None:
    uri = f"sqlite:///{root / 'mlflow.db'}"
    receiver = MlflowReceiver(root, uri=uri, experiment="e", sweep_id=study.id, sweep="s")
    sink = Outbox(study.folder.outbox, receiver)
    study.begin()
    sink.start(SWEEP, name="s", params={}, tags={"state": "RUNNING"}, at=1.0)

    def closed(_: Any) -> None:
        Retention(study.folder, study.spec, study.trials())
        tidy_forks(study.folder, study)

    conductor = Conductor(
        study, sink, SilentView(), Interrupt(lambda: ""), place=lambda config: config, on_closed=closed
    )
    closed(None)
    while not conductor.idle:
        job = conductor.next(1)
        if job is None:
            continue
        attempt = Attempt(job, WritingWorkshop, patience=0.5)
        while conductor.heard(job.id, attempt.pull()):
            pass
        attempt.close()
    sink.end(SWEEP, status="FINISHED", tags={"state": "FINISHED"}, at=2.0)
    assert sink.close(60.0) == 0


def forked(work: Callable[[], None]) -> int:
    """Run it in a child that shares what is loaded; its exit code, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


KILLED = -signal.SIGKILL
