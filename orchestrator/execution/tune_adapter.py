"""Ray Tune's search, scheduler and trial as thin, stateless adapters: every decision is the conductor's.

A fresh Tuner at every start, over a study that knows everything.
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

from orchestrator.execution.controller import Conductor
from orchestrator.execution.local_cluster import Slots, check_ray
from orchestrator.execution.messages import REPORT, Job, Report
from orchestrator.execution.stop_reasons import Interrupt, Stop, StopKind
from orchestrator.execution.user_requests import wait
from orchestrator.execution.workers.attempt_runner import OpenWorkshop, open_workshop
from orchestrator.execution.workers.session_factory import for_slots
from orchestrator.interfaces import Sink, View
from orchestrator.redaction import redact
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord
from trainer.config.trial import TrialConfig

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class TuneTrial(Trial):
    """A trial that Tune never retries and whose errors leave no pickles: a lost worker is the search's business."""

    cause = "the worker process ended"

    def should_recover(self) -> bool:
        """Never by Tune."""
        return False

    def handle_error(self, exc: Exception | None = None) -> None:
        """Keep the cause for the search."""
        if exc is not None:
            self.cause = _short(exc)


class Workers(Protocol):
    """What Tune runs for a trial, and with which configuration."""

    @property
    def trainable(self) -> type[Trainable]:
        """Tune's class of workers."""
        ...

    def config(self, job: Job) -> dict[str, Any]:
        """Its configuration for this attempt."""
        ...

    def left(self, job_id: str, *, lost: bool) -> None:
        """The attempt is over, or its worker was `lost`."""
        ...

    def retire(self, job_id: str) -> bool:
        """The process that ran this attempt gets no other trial; whether Tune's own worker is that process."""
        ...

    def end(self) -> None:
        """No trial runs any more."""
        ...


class Search(SearchAlgorithm):
    """Hands out attempts that the conductor issued, as Tune trials with stable ids."""

    def __init__(self, conductor: Conductor, slots: Slots, workers: Workers) -> None:
        self._conductor, self._slots, self._workers = conductor, slots, workers
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
        with self._conductor as conductor:
            conductor.tick()
            job = conductor.next(self._slots.count)
        if job is None:
            return None
        trial = TuneTrial(
            str(experiment.run_identifier),
            trial_id=job.id,
            config=self._workers.config(job),
            storage=experiment.storage,
            placement_group_factory=PlacementGroupFactory(self._slots.bundles, strategy=self._slots.strategy),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        )
        self._trials[job.id] = trial
        return trial

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: ARG002
        """Ends arrive as reports; what is left here is a worker that died."""
        trial = self._trials.pop(trial_id, None)
        if trial is None or not error:
            self._workers.left(trial_id, lost=False)
            return
        with self._conductor as conductor:
            check_ray()
            self._workers.left(trial_id, lost=True)
            conductor.lost(trial_id, trial.cause)

    def is_finished(self) -> bool:
        """Nothing runs and nothing will."""
        return self._conductor.idle


class Scheduler(FIFOScheduler):
    """Passes results to the conductor and its verdicts back."""

    def __init__(self, conductor: Conductor, slots: Slots, workers: Workers) -> None:
        super().__init__()
        self._conductor, self._slots, self._workers = conductor, slots, workers
        self._kept = False

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Keep as many warm workers as there are slots: Tune's cache alone drops one when two trials end at once."""
        if not self._kept:
            wrapped: Any = tune_controller  # Tune passes its controller in a wrapper
            wrapped._tune_controller._actor_cache.increase_max(trial.placement_group_factory, by=self._slots.count)
            self._kept = True

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Observe, then go on or stop."""
        report: Report = result[REPORT]
        with self._conductor as conductor:
            goes_on = conductor.heard(trial.trial_id, report)
            if report.retire and self._workers.retire(trial.trial_id):
                # Tune keeps for the next trial only actors that it knows to have started; the others it ends.
                wrapped: Any = tune_controller
                controller = wrapped._tune_controller
                controller._started_actors.discard(controller._trial_to_actor[trial])
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """Called ten times a second at least: the conductor's clock."""
        wrapped: Any = tune_controller
        trials: list[Trial] = wrapped.get_trials()
        with self._conductor as conductor:
            check_ray()
            for trial in trials:
                if trial.status == Trial.RUNNING:  # pending ones wait for their slot or placement group
                    conductor.began(trial.trial_id)
            conductor.tick()
        # Tune goes through all it ever had at every step; of those that ended nobody asks any more.
        trials[:] = [trial for trial in trials if not trial.is_finished()]
        return super().choose_trial_to_run(tune_controller)


def _name(trial: Trial) -> str:
    return trial.trial_id


def _short(error: Exception) -> str:
    """One line, without secrets, of what Ray says at length: the exception itself, or how the process ended."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    telling = [line for line in lines if "Worker exit detail" in line or "exit code" in line]
    return redact(f"{type(error).__name__}: {(telling or lines[-1:])[0]}")


def run_trials(
    study: Study,
    sink: Sink,
    view: View,
    interrupt: Interrupt,
    slots: Slots,
    *,
    place: Callable[[TrialConfig], TrialConfig] = lambda config: config,
    on_closed: Callable[[TrialRecord], None] = lambda _: None,
    longest: int = 1,
    opened: OpenWorkshop = open_workshop,
) -> Stop:
    """Run what the study still wants, inside a `cluster`; says why it ended.

    `place` finishes a trial's configuration (an SFT stage's model), `on_closed` is called after each ended trial,
    `longest` are the tokens of the data's longest row. While the sweep is paused its worker processes are gone, and
    with them what they held on the GPUs.
    """
    while True:
        conductor = Conductor(study, sink, view, interrupt, place=place, on_closed=on_closed, longest=longest)
        stop = _fit(conductor, study, slots, opened)
        if stop.kind is not StopKind.PAUSED:
            return stop
        ended = wait(study, view, interrupt, stop.text)
        if ended is not None:
            return ended


def _fit(conductor: Conductor, study: Study, slots: Slots, opened: OpenWorkshop) -> Stop:
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, TuneError, Tuner

    from orchestrator.execution.workers.shared_worker import Hosts
    from orchestrator.execution.workers.trial_worker import OneEach

    study.admit(slots.count)
    given = (study.folder.cache, for_slots(opened, slots))
    workers = Hosts(slots, *given) if slots.sharing > 1 else OneEach(*given)
    storage, name = (study.folder.path / "ray").resolve(), f"tune-{time.time_ns()}"
    tuner = Tuner(
        workers.trainable,
        tune_config=TuneConfig(
            search_alg=Search(conductor, slots, workers),
            scheduler=Scheduler(conductor, slots, workers),
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
        if conductor.error is not None:
            raise conductor.error from wrapped
        raise
    finally:
        workers.end()
        shutil.rmtree(storage / name, ignore_errors=True)  # Tune's own state: pickles that nobody may read again
    if conductor.error is not None:
        raise conductor.error
    return conductor.result()
