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

from orchestrator.driver.checkpoint_retention import CheckpointRetention, remove_unused_forks
from orchestrator.execution.controller import TrialController
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.folders import SweepFolder, create_sweep_folder, sweep_lock
from orchestrator.interfaces import SWEEP
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_sink import MlflowSink
from orchestrator.tracking.outbox import Outbox
from tests.support.fake_session import METRIC, SilentView, make_spec
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, RunStatus, StepMetrics
from trainer.storage import checkpoints
from trainer.storage.atomic_files import write_folder, write_text
from trainer.storage.checkpoints import StoredRunResult, load_run_result, save_run_result

STEPS = 6


class WritingSession:
    """Trains nothing and writes everything: real checkpoints, endings, samples and models."""

    counters: ClassVar[dict[str, int]] = {}

    def interrupt(self) -> None:
        raise AssertionError("nobody interrupts here")

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        folders = [*earlier, folder]
        logged = load_run_result(folders)
        if logged is not None:
            yield from logged.history
            return logged.result
        state = checkpoints.load_newest(folders) or (None if fork is None else checkpoints.load_newest([fork]))
        assert fork is None or state is not None, "a fork begins from no start model"
        history = [] if state is None else list(state.history)
        w = torch.zeros(4) if state is None else state.weights["w"]
        yield from list(history)
        for step in range(len(history), STEPS + 1):
            w = w + (1 + config.training.seed) * config.training.learning_rate
            weights, moved = {"w": w}, float(w[0])
            metrics = {"loss": 1.0 / (1 + step), METRIC: 0.5 + 0.01 * config.training.seed + 0.001 * step + moved}
            history.append(StepMetrics(step, metrics))
            if step % 2 == 1:
                checkpoints.save_checkpoint(folder, checkpoints.TrainState("c", step, weights, {}, history))
                checkpoints.remove_checkpoints(folders, before=step)
            yield history[-1]
        write_text(folder / "samples.jsonl", f'{{"seed": {config.training.seed}}}\n')
        write_folder(folder / "model", lambda to: checkpoints.save_file(weights, to / "model.safetensors"))
        result = RunResult(RunStatus.FINISHED, "", STEPS, folder / "model")
        save_run_result(folder, StoredRunResult("c", result, history))
        checkpoints.remove_checkpoints(folders)
        return result


def drive(root: Path, spec: SweepSpec | None = None) -> None:
    """Begin the sweep or go on with it, as far as it goes."""
    folder = SweepFolder(root, "s")
    if not folder.spec.exists():
        create_sweep_folder(folder, dump_spec(spec or make_spec(3)))
    with sweep_lock(folder):
        study = Study.open(folder) if Study.exists(folder) else Study.create(folder, spec or make_spec(3))
        with study:
            _run(root, study)


def _run(root: Path, study: Study) -> None:
    uri = f"sqlite:///{root / 'mlflow.db'}"
    receiver = MlflowSink(root, uri=uri, experiment="e", sweep_id=study.id, sweep="s")
    sink = Outbox(study.folder.outbox, receiver)
    study.start_driving()
    sink.start_run(SWEEP, name="s", params={}, tags={"state": "RUNNING"}, at=1.0)

    def closed(_: Any) -> None:
        CheckpointRetention(study.folder, study.spec, study.trials())
        remove_unused_forks(study.folder, study)

    controller = TrialController(
        study, sink, SilentView(), SignalHandler(lambda: ""), finish_config=lambda config: config, on_trial_end=closed
    )
    closed(None)
    while not controller.is_idle:
        task = controller.next_attempt(1)
        if task is None:
            continue
        attempt = AttemptRunner(task, WritingSession, lock_timeout=0.5)
        while controller.on_report(task.id, attempt.next_report()):
            pass
        attempt.close()
    sink.end_run(SWEEP, status="FINISHED", tags={"state": "FINISHED"}, at=2.0)
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
