"""Start and end of an attempt: its folder, its trial file, its run in tracking, its outcome in the study.

Tracking is written before the study commits, so that a kill between the two loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.execution import trial_retries
from orchestrator.execution.messages import AttemptTask
from orchestrator.folders import FAILURE_FILE
from orchestrator.interfaces import ProgressView, TrackingSink
from orchestrator.mirror import trial_mirror
from orchestrator.spec.search.trial_params import SEED
from orchestrator.spec.sweep_spec import AUTO_TRAINING
from orchestrator.study.repeats import group_by_configuration
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialRecord, TrialState
from orchestrator.tracking.run_metadata import FIRST_ATTEMPT, end_tags, start_tags
from trainer.config.trial import TrialConfig
from trainer.storage.failpoints import failpoint

_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's dumper if available: the same text, ten times faster."""


@dataclass(slots=True)
class ActiveAttempt:
    """A trial that runs on a worker.

    `oom_kills_at_start`: how many processes the kernel had killed for memory when the worker was last known to be
    alive. `logged_tags`: the worker's tags so far.
    """

    trial: Trial
    task: AttemptTask
    oom_kills_at_start: int
    logged_tags: dict[str, str] = field(default_factory=dict[str, str])

    def new_tags(self, pid: int, counters: Mapping[str, int]) -> dict[str, str]:
        """Return new or changed tags: the worker's process id, and what it has loaded."""
        tags = {"worker.pid": str(pid)} | {f"worker.{name}": str(count) for name, count in counters.items()}
        changed = {name: value for name, value in tags.items() if self.logged_tags.get(name) != value}
        self.logged_tags |= changed
        return changed


class AttemptLauncher:
    """Starts attempts of trials that the study issued. `finalize_config` fills in what is known at run time only."""

    def __init__(
        self,
        study: Study,
        sink: TrackingSink,
        view: ProgressView,
        finalize_config: Callable[[TrialConfig, Mapping[str, Any]], TrialConfig],
    ) -> None:
        self._study, self._sink, self._view, self._finalize_config = study, sink, view, finalize_config

    def start_attempt(self, trial: Trial) -> ActiveAttempt:
        """Write the attempt's folder, start its run in tracking and return its task for a worker."""
        sweep_folder = self._study.folder
        run_name, folder = str(trial.number), sweep_folder.attempt(trial.number, trial.attempt)
        configured = self._finalize_config(trial.config, trial.params)
        config = trial_retries.with_micro_batch_limit(configured, trial.micro_batch_limit)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trial.yaml").write_text(
            yaml.dump(config.model_dump(mode="json"), Dumper=_DUMPER, sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        all_earlier = [sweep_folder.attempt(trial.number, k) for k in range(trial.first_attempt, trial.attempt)]
        fork_folder = None if trial.fork is None else sweep_folder.forks / trial.fork.folder_name
        existing = tuple(p for p in all_earlier if p.is_dir())
        spec = self._study.spec
        mirror = None if spec.mirror is None else trial_mirror(spec.mirror, spec.name, trial.number).url
        task = AttemptTask(
            run_name,
            trial.attempt,
            config.model_dump_json(),
            folder,
            existing,
            fork_folder,
            mirror,
            trial.first_attempt,
        )
        record = self._study.trial(trial.number)
        assert record is not None
        tags = {
            "state": TrialState.RUNNING.value,
            "reason": "",
            "attempt": str(trial.attempt),
            **start_tags(trial.number),
        }
        tags |= {"origin": record.origin} if record.origin else {}
        tags |= {"clone.of": str(record.parent)} if record.parent is not None else {}
        tags |= self._repeat_tags(record)
        tags |= {} if record.finalist_of is None else {"stage": "finalists", "finalist.of": str(record.finalist_of)}
        tags |= {"clone.from_update": str(record.fork.step)} if record.fork is not None else {}
        tags |= {FIRST_ATTEMPT: str(trial.first_attempt)} if trial.first_attempt > 1 else {}
        tags |= {f"failed.attempt_{failed.attempt}": failed.reason for failed in record.failed_attempts}
        for path in AUTO_TRAINING:  # tags, as params of an attempt on another machine cannot change
            name = path.partition(".")[2]
            if (value := getattr(configured.training, name)) != getattr(trial.config.training, name):
                tags[f"arrangement.{name}"] = str(value)
        if config is not configured:  # the logged params stay as configured
            tags["memory.tokens_per_micro_batch"] = str(config.training.tokens_per_micro_batch)
        self._sink.start_run(
            run_name, name=f"trial {trial.number}", params=configured.flat_params(), tags=tags, at=time.time()
        )
        self._view.update_trial(record)
        return ActiveAttempt(trial, task, trial_retries.kernel_oom_kills())

    def _repeat_tags(self, record: TrialRecord) -> dict[str, str]:
        """Return the tags `group` (number of the configuration's first trial) and `repeat` (from 0), if seeds vary."""
        spec = self._study.spec
        if spec.repeats == 1 and SEED not in record.params:
            return {}
        groups = group_by_configuration(self._study.trials(), spec.search)
        numbers = next(found for g in groups if record.number in (found := [member.number for member in g]))
        if record.finalist_of is None and len(numbers) == 1 and spec.repeats == 1 and spec.search.choices(SEED) is None:
            return {}
        return {"group": str(numbers[0]), "repeat": str(numbers.index(record.number))}


_STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAILED: "FAILED"}
_ARTIFACT_FILES = ("trial.yaml", "samples.jsonl", FAILURE_FILE)
"""Files of an attempt that are logged as artifacts."""


def finish_attempt(study: Study, sink: TrackingSink, active: ActiveAttempt, outcome: Outcome) -> TrialRecord:
    """End the trial in tracking and in the study; return its final record."""
    run = str(active.trial.number)
    tags = end_tags(active.trial.number, outcome)
    if outcome.state is TrialState.COMPLETE and (broken := study.breaks(active.trial.number)):
        tags["breaks"] = "; ".join(broken)
    for name in _ARTIFACT_FILES:
        # The files may be in the folder of an earlier attempt that finished the trial.
        paths = [folder / name for folder in (active.task.folder, *reversed(active.task.earlier_attempts))]
        if (found := next((path for path in paths if path.is_file()), None)) is not None:
            sink.log_artifact(run, found)
    sink.end_run(run, status=_STATUS[outcome.state], tags=tags, at=time.time())
    failpoint("trial.told")
    worker_tags = " ".join(f"{name}={value}" for name, value in sorted(active.logged_tags.items()))
    record = study.tell(active.trial, outcome, worker_tags or "no worker")
    failpoint("trial.closed")
    # The study may change the outcome, e.g. to FAILED if the objective was never reported.
    if record.state is not outcome.state:
        actual = Outcome(record.state, record.reason, record.failure, diverged=record.diverged)
        tags = end_tags(record.number, actual)
        sink.end_run(run, status=_STATUS[record.state], tags=tags, at=time.time())
    return record


def release_attempt(study: Study, sink: TrackingSink, active: ActiveAttempt) -> None:
    """Release a trial without outcome, to be issued again later."""
    tags = {"state": "INTERRUPTED", "reason": "the sweep stopped before this trial's end; resume continues it"}
    sink.end_run(str(active.trial.number), status="KILLED", tags=tags, at=time.time())
    study.release(active.trial)
