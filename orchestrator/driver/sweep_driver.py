"""`drive`: runs data stage, SFT stage and trials, inside the sweep's lock and a Ray cluster.

After each trial retention runs, and from time to time the parent run's description is updated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from orchestrator.driver.checkpoint_retention import CheckpointRetention, remove_unused_forks
from orchestrator.driver.data_stage import adapter_notices, check_data, updates_by_params
from orchestrator.driver.finalists_stage import confirm_finalists
from orchestrator.driver.mirror_maintenance import MirrorMaintenance, claim_mirror, maintain_mirror
from orchestrator.driver.parent_run import (
    FINAL_STOPS,
    DraftReport,
    RunningDescription,
    apply_changed_requirements,
    end_parent_run,
    open_sink,
    start_parent_run,
    write_final_report,
)
from orchestrator.driver.sft_stage import TrialInputs, run_sft_stage
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted, StopKind, StopReason
from orchestrator.execution.tune_adapter import run_trials
from orchestrator.execution.user_requests import StopConditions, end_unfinished_trials, paused_notices
from orchestrator.execution.workers.attempt_runner import SessionFactory
from orchestrator.execution.workers.data_process import DataProcess
from orchestrator.execution.workers.stage_worker import StageWorker
from orchestrator.execution.workers.trial_worker import PrestartedWorkers
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP_RUN, ProgressView, SweepReporter, TrackingSink
from orchestrator.spec.estimates.gpu_layouts import Arrangement
from orchestrator.spec.estimates.sweep_plan import total_trials
from orchestrator.spec.sweep_spec import GPUS_PER_TRIAL, SweepSpec
from orchestrator.study.sampling.warm_start import warm_start
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord
from orchestrator.tracking.deferred_messages import REFUSED
from orchestrator.tracking.outbox import Outbox
from trainer.data.data_report import DataReport


class AfterTrial:
    """Callback after each ended trial: retention, unused forks, description of the parent run."""

    def __init__(
        self, study: Study, sink: TrackingSink, reporter: SweepReporter, mirror: MirrorMaintenance | None = None
    ) -> None:
        self._study = study
        self._description = RunningDescription(study, sink, reporter)
        removed = None if mirror is None else mirror.on_removed
        self._retention = CheckpointRetention(study.folder, study.spec, study.trials(), removed)
        remove_unused_forks(study.folder, study)

    def __call__(self, record: TrialRecord) -> None:
        """Handle the end of this trial."""
        self._retention.on_trial_end(record)
        remove_unused_forks(self._study.folder, self._study)
        self._description.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._description.__exit__()


_DELIVERY_SECONDS = 30.0
_LOADING_SECONDS = 20.0
"""Seconds for which MLflow is not loaded before the first metrics, since workers need the CPUs to load."""
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
    view: ProgressView,
    signals: SignalHandler,
    open_session: SessionFactory,
    data: DataProcess,
    reporter: SweepReporter,
    arrangement: Arrangement | None = None,
) -> StopReason:
    """Run the remaining stages and trials of the sweep; return why it ended.

    Raises:
        SweepHeld: another driver runs the sweep.
        DataError, StageFailed, StorageRefused, MirrorError: see the stages.
    """
    with (
        StageWorker(slots, folder.cache, signals, view.refresh, open_session) as worker,
        PrestartedWorkers(slots, folder.cache, open_session) as prestarted,
    ):
        if spec.sft is not None:
            worker.start()
        to_come = _trials_to_come(folder, spec)
        prestarted.start(slots.count if to_come is None else to_come)
        report = check_data(spec, folder, view, data)
        with _open_or_create_study(folder, spec, slots, report, view) as study:
            notices = [*paused_notices(study), *note_arrangement(study, arrangement)]
            slots = slots_within_terms(study, slots)
            study.start_driving(slots.gpus)  # before tracking starts: raises SweepHeld where another driver is alive
            sink = open_sink(study, folder.root, reporter, patience=_LOADING_SECONDS)
            stop_reason: StopReason | None = None  # None after an error
            draft = DraftReport(folder, study.spec, reporter)
            stop_conditions = StopConditions(study, view)
            try:
                for notice in notices:
                    view.log(notice)
                claim_mirror(study)
                start_parent_run(study, sink, reporter, report.fingerprint, adapter_notices(spec, data))
                for notice in apply_changed_requirements(study, sink):
                    view.log(notice)
                if arrangement is not None and slots.gpus:
                    sink.set_tags(SWEEP_RUN, arrangement_tags(arrangement, slots))
                initial_model = run_sft_stage(study, data, report, sink, view, worker, stop_conditions, arrangement)
                worker.shut_down()
                data.shut_down()
                trial_inputs = TrialInputs(report, initial_model, arrangement, study.spec.auto)
                with (
                    maintain_mirror(study, view) as mirror,
                    AfterTrial(study, sink, reporter, mirror) as on_trial_end,
                ):
                    stop_reason = _run_trials(
                        study, sink, view, signals, slots, trial_inputs, open_session, prestarted, on_trial_end, draft
                    )
                if stop_reason.kind in FINAL_STOPS:
                    confirm_finalists(study, sink, reporter, view.log)
            except StageInterrupted:
                stop_reason = stop_conditions.stop_reason or StopReason(StopKind.INTERRUPTED)
            except Exception:
                if study.fenced:
                    study.check_fence()  # raises SweepHeld: this error is not part of the new driver's history
                raise
            finally:
                draft.wait(study)
                _end_tracking(study, sink, view, reporter, stop_reason)
    assert stop_reason is not None
    return stop_reason


def _trials_to_come(folder: SweepFolder, spec: SweepSpec) -> int | None:
    """Return how many trials are left to train, None where only time limits them."""
    total = total_trials(spec)
    if total is None or not Study.exists(folder):
        return total
    with Study.open(folder, read_only=True) as study:
        return total - sum(record.state.is_final for record in study.trials())


ARRANGED = "arrangement"
"""Kind of the event that records what was chosen for the settings left to `auto`."""


def note_arrangement(study: Study, arrangement: Arrangement | None) -> list[str]:
    """Record a new or changed arrangement in the history; return the notice of it. Nothing where it is as before.

    A sweep that has only run on CPUs has no such record.
    """
    earlier = [event.text for event in study.events() if event.kind == ARRANGED]
    if arrangement is None or not (arrangement.gpus_per_trial or earlier):
        return []
    text = str(arrangement)
    if earlier and earlier[-1] == text:
        return []
    study.add_event(ARRANGED, text)
    return [f"arrangement{' chosen anew for this machine' if earlier else ''}: {text}"]


def arrangement_tags(arrangement: Arrangement, slots: Slots) -> dict[str, str]:
    """Return the tags of the parent run in tracking."""
    chosen = {
        "gpus_per_trial": f"{slots.gpus:g}",
        "trials_at_a_time": str(slots.count),
        "trials_per_process": str(slots.trials_per_process),
        "distributed": arrangement.trials.distributed,
        "gradient_checkpointing": str(arrangement.trials.gradient_checkpointing),
        "tokens_per_micro_batch": str(arrangement.trials.tokens_per_micro_batch),
        "reasons": "\n".join(arrangement.reasons),
    }
    return {f"arrangement.{name}": value for name, value in chosen.items()}


def slots_within_terms(study: Study, slots: Slots) -> Slots:
    """Return no more slots than the sweep's visibility rule allows, where the machine's number was chosen by `auto`."""
    most = study.terms.most_at_a_time(study.spec) if GPUS_PER_TRIAL in study.spec.auto else None
    return slots if most is None else replace(slots, count=min(slots.count, most), fitting=min(slots.max_count, most))


def _open_or_create_study(
    folder: SweepFolder, spec: SweepSpec, slots: Slots, report: DataReport, view: ProgressView
) -> Study:
    """Open the sweep's study, or create it."""
    if Study.exists(folder):
        return Study.open(folder)
    warm_started = warm_start(spec, folder.root)
    for notice in warm_started.notices:
        view.log(notice)
    return Study.create(
        folder, spec, slots=slots.count, train_pairs=report.train_rows, warm_start_trials=warm_started.trials
    )


def _run_trials(
    study: Study,
    sink: TrackingSink,
    view: ProgressView,
    signals: SignalHandler,
    slots: Slots,
    trial_inputs: TrialInputs,
    open_session: SessionFactory,
    prestarted: PrestartedWorkers,
    on_trial_end: AfterTrial,
    draft: DraftReport,
) -> StopReason:
    spec = study.spec
    view.set_total_updates(updates_by_params(spec, trial_inputs.data))
    sharing = f", {slots.trials_per_process} trials in each" if slots.trials_per_process > 1 else ""
    view.set_activity(f"starting {slots.shared_processes} worker{'s' if slots.shared_processes > 1 else ''}{sharing}")
    view.change_spec(spec, total_trials(spec))
    for record in study.trials():
        view.update_trial(record)
        view.add_metrics(record.number, study.metric_history(record.number))

    last_trial = (total_trials(spec) or 0) - 1

    def on_trial_start(number: int) -> None:
        """Write a first report while the last trials train."""
        if number >= last_trial >= slots.count:
            draft.start()

    ended = run_trials(
        study,
        sink,
        view,
        signals,
        slots,
        finalize_config=trial_inputs.apply,
        on_trial_end=on_trial_end,
        on_trial_start=on_trial_start,
        longest_row=trial_inputs.data.lengths["row"]["p100"],
        open_session=open_session,
        prestarted=prestarted,
    )
    if study.draw_error is not None and ended.kind is StopKind.FINISHED:
        raise study.draw_error
    return ended


def _end_tracking(
    study: Study, sink: Outbox, view: ProgressView, reporter: SweepReporter, stop_reason: StopReason | None
) -> None:
    """End the parent run and deliver queued messages; nothing where another driver has taken over.

    After an error crash_report.py ends the run.
    """
    if study.fenced:
        sink.close(0.0)
        return
    if stop_reason is not None:
        if stop_reason.kind is StopKind.ABANDONED:
            end_unfinished_trials(study, sink, stop_reason.text)
            CheckpointRetention(study.folder, study.spec, study.trials())
        write_final_report(study, sink, view, reporter, stop_reason)
        end_parent_run(study, sink, stop_reason.kind.name, _STATUS.get(stop_reason.kind, "KILLED"), stop_reason.text)
    left = sink.close(_DELIVERY_SECONDS)
    if left:
        view.log(f"tracking: {left} messages are queued in {study.folder.outbox} for the next resume")
    if sink.refused:
        view.log(f"tracking: messages refused by MLflow, in {study.folder.outbox / REFUSED}: {sink.refused}")
