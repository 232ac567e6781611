"""A trial that ended or came back: tracking is told before the study commits, so a kill in between loses nothing."""

from __future__ import annotations

import time

from orchestrator.engine.failures import FAILURE_FILE
from orchestrator.engine.live import Live
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import Outcome, TrialState
from orchestrator.study.study import Study
from orchestrator.tracking.names import ended_tags
from orchestrator.tracking.sink import Sink
from trainer.failpoint import failpoint

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
