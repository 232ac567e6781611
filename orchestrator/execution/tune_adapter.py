"""`run_trials`: runs the trial controller on Ray Tune, by a search algorithm, a scheduler and a trial class.

The adapters have no state: every start creates a new Tuner, and all state is in the study.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ray.tune import PlacementGroupFactory, Trainable
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import SearchAlgorithm

from orchestrator.execution.controller import TrialController
from orchestrator.execution.local_cluster import check_ray_health
from orchestrator.execution.messages import REPORT_KEY, AttemptReport, AttemptTask
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.execution.user_requests import wait_while_paused
from orchestrator.execution.workers.attempt_runner import SessionFactory, open_session
from orchestrator.execution.workers.session_factory import session_factory
from orchestrator.execution.workers.trial_worker import DedicatedWorkerPool, PrestartedWorkers
from orchestrator.interfaces import ProgressView, TrackingSink
from orchestrator.redaction import redact
from orchestrator.study.study import Study
from orchestrator.study.trial_records import STOPPING, TrialRecord
from trainer.config.trial import TrialConfig

_ANSI_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class TuneTrial(Trial):
    """A Tune trial that Tune never retries and whose errors are not pickled; the controller handles lost workers."""

    death_cause = "the worker process ended"

    def should_recover(self) -> bool:
        """Return False: retries are decided by the controller."""
        return False

    def handle_error(self, exc: Exception | None = None) -> None:
        """Keep one line of the error for `on_trial_complete`."""
        if exc is not None:
            self.death_cause = _one_line(exc)


class WorkerPool(Protocol):
    """The worker processes of trials: the trainable that Tune runs, its configuration, what an attempt's end does."""

    @property
    def trainable(self) -> type[Trainable]:
        """The trainable class of the workers."""
        ...

    def config(self, task: AttemptTask) -> dict[str, Any]:
        """Return the trainable's configuration for this attempt."""
        ...

    def actor_class(self, original: Any) -> Any:
        """Return the remote class whose actors Tune starts; `original` is Tune's own."""
        ...

    def on_attempt_end(self, task_id: str, *, lost: bool) -> None:
        """Handle the end of an attempt; `lost`: its worker died."""
        ...

    def retire(self, task_id: str) -> bool:
        """Assign no more trials to the process of this attempt; return whether it is Tune's own worker."""
        ...

    def shut_down(self) -> None:
        """End all processes after the last trial."""
        ...


class ActorClasses:
    """Tune's remote classes of trainables, as the worker pool wants them."""

    def __init__(self, original: Any, workers: WorkerPool) -> None:
        self._original, self._workers = original, workers

    def get(self, trainable: type[Trainable]) -> Any:
        """Return the remote class of this trainable."""
        return self._workers.actor_class(self._original.get(trainable))


class ControllerSearch(SearchAlgorithm):
    """Search algorithm: returns the controller's attempts as Tune trials with stable ids."""

    def __init__(self, controller: TrialController, slots: Slots, workers: WorkerPool) -> None:
        self._controller, self._slots, self._workers = controller, slots, workers
        self._experiment: Experiment | None = None
        self._trials: dict[str, TuneTrial] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def add_configurations(self, experiments: Experiment | list[Experiment] | dict[str, dict[str, Any]]) -> None:
        """Store the experiment; Tune passes a list of one."""
        assert isinstance(experiments, list)
        self._experiment = experiments[0]

    def next_trial(self) -> Trial | None:
        """Return the next attempt; None where none can start now."""
        experiment = self._experiment
        assert experiment is not None
        with self._controller as controller:
            controller.poll()
            task = controller.next_attempt(controller.trials_at_a_time(self._slots))
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
        """Handle a worker that died; regular ends arrive as reports."""
        trial = self._trials.pop(trial_id, None)
        if trial is None or not error:
            self._workers.on_attempt_end(trial_id, lost=False)
            return
        with self._controller as controller:
            check_ray_health()
            self._workers.on_attempt_end(trial_id, lost=True)
            controller.on_worker_lost(trial_id, trial.death_cause)

    def is_finished(self) -> bool:
        """Return whether no attempt runs and none will start."""
        return self._controller.is_done


class ControllerScheduler(FIFOScheduler):
    """Scheduler: passes results to the trial controller and returns its decisions."""

    def __init__(self, controller: TrialController, slots: Slots, workers: WorkerPool) -> None:
        super().__init__()
        self._controller, self._slots, self._workers = controller, slots, workers
        self._prepared = False

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Keep as many warm workers as there are slots; Tune's own cache drops one when two trials end together.

        The first actors are the prestarted ones.
        """
        if not self._prepared:
            tune_wrapper: Any = tune_controller  # Tune passes its controller in a wrapper
            tune = tune_wrapper._tune_controller
            tune._actor_cache.increase_max(trial.placement_group_factory, by=self._slots.max_count)
            tune._class_cache = ActorClasses(tune._class_cache, self._workers)
            self._prepared = True

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Pass the report to the controller; return CONTINUE or STOP."""
        report: AttemptReport = result[REPORT_KEY]
        with self._controller as controller:
            continues = controller.on_report(trial.trial_id, report)
            if report.retire and self._workers.retire(trial.trial_id):
                # Tune reuses only actors that it knows as started, and ends the others.
                tune_wrapper: Any = tune_controller
                tune = tune_wrapper._tune_controller
                tune._started_actors.discard(tune._trial_to_actor[trial])
        return TrialScheduler.CONTINUE if continues else TrialScheduler.STOP

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """Poll the trial controller; Tune calls this at least ten times a second."""
        tune_wrapper: Any = tune_controller
        trials: list[Trial] = tune_wrapper.get_trials()
        with self._controller as controller:
            check_ray_health()
            for trial in trials:
                if trial.status == Trial.RUNNING:  # pending ones wait for their slot or placement group
                    controller.mark_started(trial.trial_id)
            controller.poll()
        # Tune iterates over all its trials at every step; finished ones are removed, which keeps steps fast.
        trials[:] = [trial for trial in trials if not trial.is_finished()]
        return super().choose_trial_to_run(tune_controller)


def _name(trial: Trial) -> str:
    return trial.trial_id


def _one_line(error: Exception) -> str:
    """Return one line of Ray's long message without secrets: the exception, or how the process ended."""
    lines = [line.strip() for line in _ANSI_COLORS.sub("", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    exit_details = [line for line in lines if "Worker exit detail" in line or "exit code" in line]
    return redact(f"{type(error).__name__}: {(exit_details or lines[-1:])[0]}")


def run_trials(
    study: Study,
    sink: TrackingSink,
    view: ProgressView,
    signals: SignalHandler,
    slots: Slots,
    *,
    finalize_config: Callable[[TrialConfig, Mapping[str, Any]], TrialConfig] = lambda config, _: config,
    on_trial_end: Callable[[TrialRecord], None] = lambda _: None,
    on_trial_start: Callable[[int], None] = lambda _: None,
    longest_row: int = 1,
    open_session: SessionFactory = open_session,
    prestarted: PrestartedWorkers | None = None,
) -> StopReason:
    """Run the study's remaining trials on the connected Ray cluster; return why the run ended.

    While the sweep is paused, the worker processes are ended and their GPU memory is free.

    Args:
        study: the study.
        sink: tracking.
        view: progress view.
        signals: handler of stop signals.
        slots: concurrent trials and their resources.
        finalize_config: fills in a trial's configuration at run time, given its own settings: the SFT stage's model,
            what was chosen for this machine.
        on_trial_end: called after each ended trial.
        on_trial_start: called with the number of each trial that has been given a slot.
        longest_row: tokens of the data's longest row.
        open_session: opens a worker's training session.
        prestarted: worker processes that already run, opened by the same function.
    """
    while True:
        controller = TrialController(
            study,
            sink,
            view,
            signals,
            finalize_config=finalize_config,
            on_trial_end=on_trial_end,
            on_trial_start=on_trial_start,
            longest_row=longest_row,
        )
        stop = _run_tune(controller, study, slots, open_session, prestarted)
        if stop.kind is not StopKind.PAUSED:
            return stop
        stop_while_paused = wait_while_paused(study, view, signals, stop.text)
        if stop_while_paused is not None:
            if stop_while_paused.kind is not StopKind.INTERRUPTED:  # after a signal the sweep stays paused
                study.add_event(STOPPING, str(stop_while_paused))
            return stop_while_paused


def _run_tune(
    controller: TrialController,
    study: Study,
    slots: Slots,
    open_session: SessionFactory,
    prestarted: PrestartedWorkers | None,
) -> StopReason:
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, TuneError, Tuner

    from orchestrator.execution.workers.shared_worker import SharedWorkerPool

    study.check_concurrency(slots.count)
    arguments = (study.folder.cache, session_factory(open_session, slots))
    workers = (
        SharedWorkerPool(slots, *arguments)
        if slots.trials_per_process > 1
        else DedicatedWorkerPool(*arguments, prestarted)
    )
    storage, name = (study.folder.path / "ray").resolve(), f"tune-{time.time_ns()}"
    tuner = Tuner(
        workers.trainable,
        tune_config=TuneConfig(
            search_alg=ControllerSearch(controller, slots, workers),
            scheduler=ControllerScheduler(controller, slots, workers),
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
    except TuneError as error:
        if controller.error is not None:
            raise controller.error from error
        raise
    finally:
        workers.shut_down()
        shutil.rmtree(storage / name, ignore_errors=True)  # Tune's state: pickles, which are never loaded
    if controller.error is not None:
        raise controller.error
    return controller.result()
