"""Ray Tune's search algorithm, scheduler and trial as thin, stateless adapters of the trial controller; `run_trials`.

Every start makes a new Tuner; all state is in the study.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from typing import Any, Protocol

from ray.tune import PlacementGroupFactory, Trainable
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import SearchAlgorithm

from orchestrator.execution.controller import TrialController
from orchestrator.execution.local_cluster import check_ray_health
from orchestrator.execution.messages import REPORT, AttemptReport, AttemptTask
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.execution.user_requests import wait_while_paused
from orchestrator.execution.workers.attempt_runner import SessionFactory, open_session
from orchestrator.execution.workers.session_factory import session_factory
from orchestrator.interfaces import ProgressView, TrackingSink
from orchestrator.redaction import redact
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord
from trainer.config.trial import TrialConfig

_ANSI_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class TuneTrial(Trial):
    """A trial that Tune never retries and whose errors leave no pickles: a lost worker is the search's business."""

    cause = "the worker process ended"

    def should_recover(self) -> bool:
        """Never by Tune."""
        return False

    def handle_error(self, exc: Exception | None = None) -> None:
        """Keep the cause for the search."""
        if exc is not None:
            self.cause = _one_line(exc)


class Workers(Protocol):
    """What Tune runs for a trial, and with which configuration."""

    @property
    def trainable(self) -> type[Trainable]:
        """Tune's class of workers."""
        ...

    def config(self, task: AttemptTask) -> dict[str, Any]:
        """Its configuration for this attempt."""
        ...

    def on_attempt_end(self, task_id: str, *, lost: bool) -> None:
        """The attempt is over, or its worker was `lost`."""
        ...

    def retire(self, task_id: str) -> bool:
        """The process that ran this attempt gets no other trial; whether Tune's own worker is that process."""
        ...

    def shut_down(self) -> None:
        """No trial runs any more."""
        ...


class Search(SearchAlgorithm):
    """Hands out attempts that the trial controller issued, as Tune trials with stable ids."""

    def __init__(self, controller: TrialController, slots: Slots, workers: Workers) -> None:
        self._controller, self._slots, self._workers = controller, slots, workers
        self._experiment: Experiment | None = None
        self._trials: dict[str, TuneTrial] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def add_configurations(self, experiments: Experiment | list[Experiment] | dict[str, dict[str, Any]]) -> None:
        """Where trials belong. Tune passes a list of one."""
        assert isinstance(experiments, list)
        self._experiment = experiments[0]

    def next_trial(self) -> Trial | None:
        """The next attempt, or None for now."""
        experiment = self._experiment
        assert experiment is not None
        with self._controller as controller:
            controller.poll()
            task = controller.next_attempt(self._slots.count)
        if task is None:
            return None
        trial = TuneTrial(
            str(experiment.run_identifier),
            trial_id=task.id,
            config=self._workers.config(task),
            storage=experiment.storage,
            placement_group_factory=PlacementGroupFactory(self._slots.bundles, strategy=self._slots.strategy),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        )
        self._trials[task.id] = trial
        return trial

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: ARG002
        """Ends arrive as reports; what is left here is a worker that died."""
        trial = self._trials.pop(trial_id, None)
        if trial is None or not error:
            self._workers.on_attempt_end(trial_id, lost=False)
            return
        with self._controller as controller:
            check_ray_health()
            self._workers.on_attempt_end(trial_id, lost=True)
            controller.on_worker_lost(trial_id, trial.cause)

    def is_finished(self) -> bool:
        """Nothing runs and nothing will."""
        return self._controller.is_idle


class Scheduler(FIFOScheduler):
    """Passes results to the trial controller and its decisions back."""

    def __init__(self, controller: TrialController, slots: Slots, workers: Workers) -> None:
        super().__init__()
        self._controller, self._slots, self._workers = controller, slots, workers
        self._remaining = False

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Keep as many warm workers as there are slots: Tune's cache alone drops one when two trials end at once."""
        if not self._remaining:
            wrapped: Any = tune_controller  # Tune passes its controller in a wrapper
            wrapped._tune_controller._actor_cache.increase_max(trial.placement_group_factory, by=self._slots.count)
            self._remaining = True

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Observe, then go on or stop."""
        report: AttemptReport = result[REPORT]
        with self._controller as conductor:
            goes_on = conductor.on_report(trial.trial_id, report)
            if report.retire and self._workers.retire(trial.trial_id):
                # Tune keeps for the next trial only actors that it knows to have started; the others it ends.
                wrapped: Any = tune_controller
                controller = wrapped._tune_controller
                controller._started_actors.discard(controller._trial_to_actor[trial])
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """Called ten times a second at least: the trial controller's clock."""
        wrapped: Any = tune_controller
        trials: list[Trial] = wrapped.get_trials()
        with self._controller as controller:
            check_ray_health()
            for trial in trials:
                if trial.status == Trial.RUNNING:  # pending ones wait for their slot or placement group
                    controller.began(trial.trial_id)
            controller.poll()
        # Tune goes through all it ever had at every step; of those that ended nobody asks any more.
        trials[:] = [trial for trial in trials if not trial.is_finished()]
        return super().choose_trial_to_run(tune_controller)


def _name(trial: Trial) -> str:
    return trial.trial_id


def _one_line(error: Exception) -> str:
    """One line, without secrets, of what Ray says at length: the exception itself, or how the process ended."""
    lines = [line.strip() for line in _ANSI_COLORS.sub("", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    telling = [line for line in lines if "Worker exit detail" in line or "exit code" in line]
    return redact(f"{type(error).__name__}: {(telling or lines[-1:])[0]}")


def run_trials(
    study: Study,
    sink: TrackingSink,
    view: ProgressView,
    signals: SignalHandler,
    slots: Slots,
    *,
    finish_config: Callable[[TrialConfig], TrialConfig] = lambda config: config,
    on_trial_end: Callable[[TrialRecord], None] = lambda _: None,
    longest_row: int = 1,
    open_session: SessionFactory = open_session,
) -> StopReason:
    """Run the study's remaining trials, inside a `cluster`; return why the run ended.

    `finish_config` completes a trial's configuration (an SFT stage's model), `on_trial_end` is called after each ended
    trial, `longest_row` is the number of tokens of the data's longest row. While the sweep is paused its worker
    processes are gone, and with them what they held on the GPUs.
    """
    while True:
        controller = TrialController(
            study, sink, view, signals, finish_config=finish_config, on_trial_end=on_trial_end, longest_row=longest_row
        )
        stop = _run_tune(controller, study, slots, open_session)
        if stop.kind is not StopKind.PAUSED:
            return stop
        ended = wait_while_paused(study, view, signals, stop.text)
        if ended is not None:
            return ended


def _run_tune(controller: TrialController, study: Study, slots: Slots, open_session: SessionFactory) -> StopReason:
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, TuneError, Tuner

    from orchestrator.execution.workers.shared_worker import SharedWorkers
    from orchestrator.execution.workers.trial_worker import DedicatedWorkers

    study.check_concurrency(slots.count)
    given = (study.folder.cache, session_factory(open_session, slots))
    workers = SharedWorkers(slots, *given) if slots.trials_per_process > 1 else DedicatedWorkers(*given)
    storage, name = (study.folder.path / "ray").resolve(), f"tune-{time.time_ns()}"
    tuner = Tuner(
        workers.trainable,
        tune_config=TuneConfig(
            search_alg=Search(controller, slots, workers),
            scheduler=Scheduler(controller, slots, workers),
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except TuneError as wrapped:
        if controller.error is not None:
            raise controller.error from wrapped
        raise
    finally:
        workers.shut_down()
        shutil.rmtree(storage / name, ignore_errors=True)  # Tune's own state: pickles that nobody may read again
    if controller.error is not None:
        raise controller.error
    return controller.result()
