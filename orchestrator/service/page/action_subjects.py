"""`Subject`: the sweep or trial that an action of a page is about, and what actions do to it and cost, as sentences."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from dashboards.analysis.run_costs import costs
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.formatting import format_duration, format_hours
from orchestrator.errors import JUDGING
from orchestrator.folders import SweepFolder, disk_usage, lock_holder
from orchestrator.service.judge_processes import FAILED, RUNNING, Judging, judging
from orchestrator.service.service_context import ServiceContext
from orchestrator.service.sweep_queue import QueuedSweep, QueueState
from orchestrator.spec.estimates.disk_space import format_bytes
from orchestrator.study.trial_records import TrialState


@dataclass(frozen=True, slots=True)
class Subject:
    """What an action is about: a sweep, or one of its trials, as it is now."""

    context: ServiceContext
    name: str
    state: str
    """The sweep's, as `status` has it, or the queue's for one that has not begun."""
    queued: QueuedSweep | None
    frame: SweepFrame | None
    trial: TrialFrame | None = None
    will_be_paused: bool = False
    """Whether it is paused, or will be once the driver has done what was requested last."""

    @property
    def is_driven(self) -> bool:
        """Whether a driver runs it."""
        return self.state in ("running", "paused", "preparing", "starting")

    @property
    def is_waiting(self) -> bool:
        """Whether it waits in the queue."""
        return self.queued is not None and self.queued.state is QueueState.WAITING

    @property
    def is_judged(self) -> bool:
        """Whether its answers are being judged, by a judge of the service or of a command."""
        if (found := self.judging) is not None and found.state == RUNNING:
            return True
        return (lock_holder(SweepFolder(self.context.root, self.name)) or "").endswith(JUDGING)

    @property
    def judging(self) -> Judging | None:
        """The judge that the service started, where it runs or has failed."""
        return judging(SweepFolder(self.context.root, self.name))

    @property
    def judge_failure(self) -> str:
        """The last words of a judge that failed, until another one begins or succeeds; "" for none."""
        found = self.judging
        return "" if found is None or found.state != FAILED else found.why or "it wrote nothing"

    @property
    def url(self) -> str:
        """URL of the page of the sweep or trial."""
        of_trial = "" if self.trial is None else f"/trials/{self.trial.number}"
        return f"/sweeps/{quote(self.name)}{of_trial}"

    @property
    def unit(self) -> str:
        """In what the sweep's time is counted."""
        return "GPU-hours" if self.frame is not None and self.frame.gpus else "slot-hours"

    def trials_in(self, state: TrialState) -> list[TrialFrame]:
        """Return the trials in this state, each seed by itself."""
        return [] if self.frame is None else [t for t in self.frame.all_trials if t.record.state is state]

    def cost_of_one(self) -> str:
        """Return what another trial costs, from those that were trained to the end."""
        complete = self.trials_in(TrialState.COMPLETE)
        if not complete:
            return "No trial has completed, so that the cost of one is not measured yet; the plan estimates it."
        mean = costs(complete).seconds / len(complete)
        return f"A trial of this sweep took {self.time_text(mean)} on average ({len(complete)} complete)."

    def time_text(self, seconds: float) -> str:
        """Return a time on a slot; short ones not as hours."""
        return format_duration(seconds) if seconds < 360 else f"{format_hours(seconds)} {self.unit}"

    def running_text(self, what: str) -> str:
        """Return how many trials run, and what becomes of them."""
        count = len(self.trials_in(TrialState.RUNNING))
        if not count:
            return "No trial runs at the moment."
        return f"{count} running trial{'' if count == 1 else 's'} {what}"

    def stop_costs(self) -> list[str]:
        """Return what a stop does and costs."""
        if self.is_judged:
            return ["Its judge ends. What is judged stays, and Judge continues it."]
        if self.frame is None:
            return ["No trial has begun: its driver ends, and resume prepares the sweep again."]
        return [
            self.running_text("write a checkpoint, then the driver ends and its GPUs are free for other sweeps."),
            "Resume continues from the checkpoints: the cost is the time to load models and data again.",
        ]

    def left(self) -> str:
        """Return what is left of the planned trials."""
        if self.frame is None or self.frame.planned is None:
            return "It continues until its budget is used up."
        done = sum(trial.record.state.is_final for trial in self.frame.all_trials)
        return f"{done} of {self.frame.planned} planned trials are done; the others are trained."

    def judge_costs(self) -> list[str]:
        """Return what judging does and costs."""
        assert self.frame is not None
        judge = self.frame.spec.judge
        what = "Answers of the best trials and of the initial model are generated and compared; the sweep has ended."
        if judge is not None and judge.endpoint is not None:
            return [what, f"Each comparison is a request to {judge.endpoint.model}, which may cost money."]
        return [what, "The judge runs on this machine and takes time on its GPUs or CPUs."]

    def archive_costs(self) -> list[str]:
        """Return what moving it to a URL does and costs."""
        size = format_bytes(disk_usage(SweepFolder(self.context.root, self.name).path))
        return [
            f"{size} are copied to the URL, compared, and removed here; its runs in MLflow stay.",
            "Bring back copies it here again.",
        ]

    def of_trial(self) -> str:
        """Return how far the trial is and what it cost."""
        trial = self.trial
        assert trial is not None
        planned = f" of {trial.planned_updates}" if trial.planned_updates else ""
        spent = self.time_text(costs([trial]).seconds)
        return f"Trial {trial.label} is at update {trial.curves.last_update}{planned} after {spent}."
