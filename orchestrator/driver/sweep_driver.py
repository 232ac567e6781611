"""One driver's life: stages, trials, and the words at the end. Inside the sweep's lock and a `cluster`.

What follows a trial's end: the disk is tidied, and now and then the sweep describes itself.
"""

from __future__ import annotations

import time

from orchestrator.driver.checkpoint_retention import Retention, tidy_forks
from orchestrator.driver.data_stage import adapter_notices, check_data, steps_by_params
from orchestrator.driver.mirror_maintenance import Upkeep, keeping, take_place
from orchestrator.driver.parent_run import open_sink, tell_end, tell_standing, tell_sweep, write_last_report
from orchestrator.driver.sft_stage import Ready, train_start_model
from orchestrator.execution.local_cluster import Slots
from orchestrator.execution.stop_reasons import Interrupt, Interrupted, Stop, StopKind
from orchestrator.execution.tune_adapter import run_trials
from orchestrator.execution.user_requests import Wishes, held_over
from orchestrator.execution.workers.attempt_runner import OpenWorkshop
from orchestrator.execution.workers.data_process import Preparing
from orchestrator.execution.workers.stage_worker import StageWorker
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import Sink, SweepReporter, View
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.sampling.warm_start import warm_start
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord
from trainer.data.data_report import DataReport

_DESCRIBED_EVERY = 10.0
"""Seconds: a sweep of many short trials need not describe itself after each."""
_SHARE = 0.01
"""Of the driver's time: describing two thousand trials takes longer, so it is done less often."""


class Afterwards:
    """Called after each ended trial."""

    def __init__(self, study: Study, sink: Sink, reporter: SweepReporter, mirror: Upkeep | None = None) -> None:
        self._study, self._sink, self._reporter = study, sink, reporter
        removed = None if mirror is None else mirror.removed
        self._retention = Retention(study.folder, study.spec, study.trials(), removed)
        tidy_forks(study.folder, study)
        self._due = 0.0

    def __call__(self, record: TrialRecord) -> None:
        """This trial has ended."""
        self._retention.closed(record)
        tidy_forks(self._study.folder, self._study)
        began = time.monotonic()
        if began >= self._due:
            tell_standing(self._study, self._sink, self._reporter)
            took = time.monotonic() - began
            self._due = began + max(_DESCRIBED_EVERY, took / _SHARE)


_DELIVERY_SECONDS = 30.0
_STATUS = {
    StopKind.FINISHED: "FINISHED",
    StopKind.OUT_OF_BUDGET: "FINISHED",
    StopKind.TARGET: "FINISHED",
    StopKind.SAME_BUG: "FAILED",
}


def drive(
    folder: SweepFolder,
    spec: SweepSpec,
    slots: Slots,
    view: View,
    interrupt: Interrupt,
    opened: OpenWorkshop,
    data: Preparing,
    reporter: SweepReporter,
) -> Stop:
    """Do what is left of the sweep; says why it ended."""
    with StageWorker(slots, folder.cache, interrupt, view.tick, opened) as worker:
        if spec.sft is not None:
            worker.start()
        report = check_data(spec, folder, view, data)
        with _study(folder, spec, slots, report, view) as study:
            held = held_over(study)
            study.begin(slots.gpus)  # before anything is told: SweepHeld where another driver lives
            sink = open_sink(study, folder.root, reporter)
            ended: Stop | None = None  # stays None when an error passes through
            wishes = Wishes(study)
            try:
                for sentence in held:
                    view.say(sentence)
                take_place(study)
                tell_sweep(study, sink, reporter, report.fingerprint, adapter_notices(spec, data))
                start_model = train_start_model(study, data, report, sink, view, worker, wishes)
                worker.end()
                data.end()
                ready = Ready(report, start_model)
                with keeping(study, view) as mirror:
                    ended = _trials(study, sink, view, interrupt, slots, ready, opened, mirror, reporter)
            except Interrupted:
                ended = wishes.stop or Stop(StopKind.INTERRUPTED)
            finally:
                _end_tracking(study, sink, view, reporter, ended)
    assert ended is not None
    return ended


def _study(folder: SweepFolder, spec: SweepSpec, slots: Slots, report: DataReport, view: View) -> Study:
    """The sweep's study, made where there is none yet."""
    if Study.exists(folder):
        return Study.open(folder)
    warm = warm_start(spec, folder.root)
    for sentence in warm.said:
        view.say(sentence)
    return Study.create(folder, spec, slots=slots.count, train_pairs=report.train_rows, earlier=warm.trials)


def _trials(
    study: Study,
    sink: Sink,
    view: View,
    interrupt: Interrupt,
    slots: Slots,
    ready: Ready,
    opened: OpenWorkshop,
    mirror: Upkeep | None,
    reporter: SweepReporter,
) -> Stop:
    spec = study.spec
    view.expect(steps_by_params(spec, ready.data))
    each = f", {slots.sharing} trials in each" if slots.sharing > 1 else ""
    view.stage(f"starting {slots.hosts} worker{'s' if slots.hosts > 1 else ''}{each}")
    for record in study.trials():
        view.trial_changed(record)
        view.points(record.number, study.points(record.number))

    return run_trials(
        study,
        sink,
        view,
        interrupt,
        slots,
        place=ready.place,
        on_closed=Afterwards(study, sink, reporter, mirror),
        longest=ready.data.lengths["row"]["p100"],
        opened=opened,
    )


def _end_tracking(study: Study, sink: Sink, view: View, reporter: SweepReporter, ended: Stop | None) -> None:
    """Tell how it ended and deliver what is left; of an error, crash.py tells. Nothing of either where another driver
    has taken over.
    """
    if study.fenced:
        sink.close(0.0)
        return
    if ended is not None:
        write_last_report(study, sink, view, reporter, ended)
        tell_end(study, sink, ended.kind.name, _STATUS.get(ended.kind, "KILLED"), ended.text)
    left = sink.close(_DELIVERY_SECONDS)
    if left:
        view.say(f"tracking: {left} messages wait in {study.folder.outbox}; the next resume delivers them")
