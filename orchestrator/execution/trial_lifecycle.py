"""An issued trial on its way into a worker's hands: its folder, its file, its run in tracking.

A trial that ended or came back: tracking is told before the study commits, so a kill in between loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.execution import retry_policy
from orchestrator.execution.messages import Job
from orchestrator.folders import FAILURE_FILE
from orchestrator.interfaces import Sink, View
from orchestrator.mirror import of_trial
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialRecord, TrialState
from orchestrator.tracking.run_metadata import begun_tags, ended_tags
from trainer.config.trial import TrialConfig
from trainer.storage.atomic_files import failpoint

_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""Of libyaml where it is there: the same text, ten times sooner."""


@dataclass(slots=True)
class Live:
    """A trial that a worker has. `kills`: the kernel's for memory when its worker was last known to live; `told`: the
    worker's tags so far."""

    trial: Trial
    job: Job
    kills: int
    told: dict[str, str] = field(default_factory=dict[str, str])

    def news(self, pid: int, counters: Mapping[str, int]) -> dict[str, str]:
        """Tags not yet told: by which worker the trial runs, and what that worker had loaded by then."""
        tags = {"worker.pid": str(pid)} | {f"worker.{name}": str(count) for name, count in counters.items()}
        fresh = {name: value for name, value in tags.items() if self.told.get(name) != value}
        self.told |= fresh
        return fresh


class Beginning:
    """Makes a worker's job of a trial that the study issued. `place` finishes its configuration."""

    def __init__(self, study: Study, sink: Sink, view: View, place: Callable[[TrialConfig], TrialConfig]) -> None:
        self._study, self._sink, self._view, self._place = study, sink, view, place

    def begin(self, trial: Trial) -> Live:
        """Everything is on the disk and told when this returns."""
        where = self._study.folder
        run, folder = str(trial.number), where.attempt(trial.number, trial.attempt)
        configured = self._place(trial.config)
        config = retry_policy.fitted(configured, trial.micro_batch)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trial.yaml").write_text(
            yaml.dump(config.model_dump(mode="json"), Dumper=_DUMPER, sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        earlier = [where.attempt(trial.number, k) for k in range(1, trial.attempt)]
        fork = None if trial.fork is None else where.forks / trial.fork.place
        there = tuple(p for p in earlier if p.is_dir())
        spec = self._study.spec
        mirror = None if spec.mirror is None else of_trial(spec.mirror, spec.name, trial.number).url
        job = Job(run, trial.attempt, config.model_dump_json(), folder, there, fork, mirror)
        record = self._study.trial(trial.number)
        assert record is not None
        tags = {"state": TrialState.RUNNING.value, "attempt": str(trial.attempt), **begun_tags(trial.number)}
        tags |= {"origin": record.origin} if record.origin else {}
        tags |= {"clone.of": str(record.parent)} if record.parent is not None else {}
        tags |= {"clone.from_update": str(record.fork.step)} if record.fork is not None else {}
        if config is not configured:  # the params stay what was asked for
            tags["memory.tokens_per_micro_batch"] = str(config.training.tokens_per_micro_batch)
        self._sink.start(run, name=f"trial {trial.number}", params=configured.leaves(), tags=tags, at=time.time())
        self._view.trial_changed(record)
        return Live(trial, job, retry_policy.kernel_kills())


_STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAILED: "FAILED"}
_KEPT = ("trial.yaml", "samples.jsonl", FAILURE_FILE)
"""Files of an attempt that tracking shows."""


def close(study: Study, sink: Sink, live: Live, outcome: Outcome) -> TrialRecord:
    """End the trial for good, in tracking and in the study; the record says how it ended."""
    run = str(live.trial.number)
    tags = ended_tags(live.trial.number, outcome)
    for name in _KEPT:
        # A trial whose ending an earlier attempt wrote has its files there.
        places = [folder / name for folder in (live.job.folder, *reversed(live.job.earlier))]
        if (found := next((place for place in places if place.is_file()), None)) is not None:
            sink.artifact(run, found)
    sink.end(run, status=_STATUS[outcome.state], tags=tags, at=time.time())
    failpoint("trial.told")
    counted = " ".join(f"{name}={value}" for name, value in sorted(live.told.items()))
    record = study.close(live.trial, outcome, counted or "no worker")
    failpoint("trial.closed")
    if record.state is not outcome.state:  # the study knows better, e.g. a goal never reported
        known = Outcome(record.state, record.reason, record.failure, diverged=record.diverged)
        tags = ended_tags(record.number, known)
        sink.end(run, status=_STATUS[record.state], tags=tags, at=time.time())
    return record


def release(study: Study, sink: Sink, live: Live) -> None:
    """Its worker let go of it and it has no outcome: a later claim issues it again."""
    sink.end(str(live.trial.number), status="KILLED", tags={"state": "INTERRUPTED"}, at=time.time())
    study.release(live.trial)
