"""Drivers without Ray: the real controller and study, attempts in this process; a whole one with outbox and MLflow.

A start costs milliseconds instead of seconds, so that it can be killed at hundreds of instants.
"""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Imported here, so that no child has to do it again: they take two seconds each.
import mlflow  # noqa: F401  # pyright: ignore[reportUnusedImport]
import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]

from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.checkpoint_retention import CheckpointRetention, remove_unused_forks
from orchestrator.driver.finalists_stage import confirm_finalists
from orchestrator.execution.controller import TrialController
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.execution.workers.attempt_runner import AttemptRunner, Session
from orchestrator.folders import SweepFolder, create_sweep_folder, sweep_lock
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_receiver import MlflowReceiver
from orchestrator.tracking.outbox import Outbox
from tests.support.fake_session import CheckpointingSession
from tests.support.processes import LIMIT_SECONDS
from tests.support.recorders import SilentView
from tests.support.specs import make_spec
from trainer.config.trial import TrialConfig
from trainer.storage.failpoints import FAILPOINT_VARIABLE

KILLED = -signal.SIGKILL
STEPS = CheckpointingSession.STEPS


def make_controller(study: Study, sink: Any, view: Any = None, signals: Any = None, **more: Any) -> TrialController:
    """A controller that neither adds to trials nor does anything at their end, where nothing else is said."""
    given: dict[str, Any] = {"finalize_config": _unchanged, "on_trial_end": _nothing, **more}
    return TrialController(study, sink, view or SilentView(), signals or SignalHandler(lambda: ""), **given)


def _nothing(_: object) -> None: ...
def _unchanged(config: TrialConfig, _: Mapping[str, Any]) -> TrialConfig:
    return config


def run_here(
    controller: TrialController, open_session: Callable[[], Session], *, polls: bool = False, **more: Any
) -> TrialController:
    """Every trial in turn, in this process; between two of them a look at signals and requests, if it `polls`."""
    while not controller.is_done:
        task = controller.next_attempt(1)
        if task is not None:
            attempt = AttemptRunner(task, open_session, **more)
            while controller.on_report(task.id, attempt.next_report()):
                pass
            attempt.close()
        if polls:
            controller.poll()
    return controller


def drive(root: Path, spec: SweepSpec | None = None) -> None:
    """Begin the sweep or go on with it, as far as it goes, with MLflow's store below `root`."""
    folder = SweepFolder(root, "s")
    if not folder.spec.exists():
        create_sweep_folder(folder, dump_spec(spec or make_spec(3)))
    with (
        sweep_lock(folder),
        Study.open(folder) if Study.exists(folder) else Study.create(folder, spec or make_spec(3)) as study,
    ):
        uri = f"sqlite:///{root / 'mlflow.db'}"
        sink = Outbox(folder.outbox, MlflowReceiver(root, uri=uri, experiment="e", sweep_id=study.id, sweep="s"))
        study.start_driving()
        sink.start_run(SWEEP_RUN, name="s", params={}, tags={"state": "RUNNING"}, at=1.0)

        def closed(_: Any) -> None:
            CheckpointRetention(study.folder, study.spec, study.trials())
            remove_unused_forks(study.folder, study)

        controller = make_controller(study, sink, on_trial_end=closed)
        closed(None)
        run_here(controller, CheckpointingSession, lock_timeout=0.5)
        confirm_finalists(study, sink, DashboardReporter(), lambda _: None)
        sink.end_run(SWEEP_RUN, status="FINISHED", tags={"state": "FINISHED"}, at=2.0)
        assert sink.close(LIMIT_SECONDS) == 0


def forked_together(count: int, work: Callable[[int], object]) -> list[int]:
    """`work(n)` in so many children at once, which share what is loaded; their exit codes."""
    children: list[int] = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(number)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def forked(work: Callable[[], object]) -> int:
    """Run it in a child that shares what is loaded; its exit code, negative where a signal ended it."""
    return forked_together(1, lambda _: work())[0]


def killed_at(work: Callable[[], object], failpoint: str) -> int:
    """Do it in a child that dies at this point; KILLED, or 0 where it never comes there."""

    def deadly() -> None:
        os.environ[FAILPOINT_VARIABLE] = failpoint
        work()

    return forked(deadly)
