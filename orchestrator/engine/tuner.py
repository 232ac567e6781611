"""A fresh Tuner at every start, over a study that knows everything."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from orchestrator.engine.attempt import OpenWorkshop, open_workshop
from orchestrator.engine.cluster import Slots
from orchestrator.engine.conductor import Conductor
from orchestrator.engine.opening import for_slots
from orchestrator.engine.pausing import wait
from orchestrator.engine.stopping import Interrupt, Stop, StopKind
from orchestrator.engine.view import View
from orchestrator.study.records import TrialRecord
from orchestrator.study.study import Study
from orchestrator.tracking.sink import Sink
from trainer.config import TrialConfig


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

    from orchestrator.engine.bridge import Scheduler, Search
    from orchestrator.engine.hosts import Hosts
    from orchestrator.engine.worker import OneEach

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
