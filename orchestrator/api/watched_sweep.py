"""What a live table reads of a sweep that another process runs: from its study, or the same as JSON of a service."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from pydantic import TypeAdapter

from orchestrator.commands.detached_driver import waiting_for
from orchestrator.commands.status import sweep_state
from orchestrator.driver.crash_report import last_crash
from orchestrator.driver.data_stage import updates_if_known
from orchestrator.folders import SweepFolder, lock_holder
from orchestrator.interfaces import UpdatesOf
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord
from trainer.results import StepMetrics

_RECORDS: TypeAdapter[TrialRecord] = TypeAdapter(TrialRecord)


@dataclass(frozen=True, slots=True)
class Progress:
    """A sweep at one instant.

    Attributes:
        state: as of `status --json`; a service's queue adds waiting, withdrawn, stopped and failed.
        why: why it is in this state, or for what its driver waits.
        is_driven: whether a driver runs it, or will.
        spec: its spec; None before its study exists.
        seconds: working time of its drivers.
        at_work: trials on which workers work.
        records: its trials.
        updates_of: updates of a trial by its params; None before the data is known.
    """

    state: str
    why: str
    is_driven: bool
    spec: SweepSpec | None = None
    seconds: float = 0.0
    at_work: frozenset[int] = frozenset()
    records: Sequence[TrialRecord] = ()
    updates_of: UpdatesOf | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the progress as JSON values, with the planned updates of each trial."""
        of = self.updates_of
        return {
            "state": self.state,
            "why": self.why,
            "is_driven": self.is_driven,
            "spec": None if self.spec is None else self.spec.model_dump_json(),
            "seconds": self.seconds,
            "at_work": sorted(self.at_work),
            "trials": [_RECORDS.dump_python(record, mode="json") for record in self.records],
            "updates": None if of is None else {str(record.number): of(record.params) for record in self.records},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Build the progress from its JSON values, in which null is a metric that is not a number."""
        records = [_RECORDS.validate_python(_with_numbers(trial)) for trial in found["trials"]]
        return cls(
            found["state"],
            found["why"],
            found["is_driven"],
            None if found["spec"] is None else SweepSpec.from_stored(found["spec"]),
            found["seconds"],
            frozenset(found["at_work"]),
            records,
            _updates_of(found["updates"], records),
        )


class WatchedSweep(Protocol):
    """A sweep that a live table shows."""

    def read(self) -> Progress:
        """Return the sweep as it is now."""
        ...

    def metrics(self, trial: int, since: int) -> list[StepMetrics]:
        """Return a trial's metrics after an update."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class WatchedStudy:
    """A sweep of this machine."""

    def __init__(self, folder: SweepFolder) -> None:
        """`folder`: of a sweep that exists."""
        self._folder = folder
        self._study: Study | None = None
        self._spec: SweepSpec | None = None
        self._versions = 0
        self._updates_of: UpdatesOf | None = None

    def read(self) -> Progress:
        """Return the sweep as it is now."""
        has_driver = lock_holder(self._folder) is not None
        if self._study is None:
            if not StudyReader.exists(self._folder):
                why = waiting_for(self._folder) if has_driver else last_crash(self._folder)
                return Progress("preparing" if has_driver else "interrupted", why, has_driver)
            self._study = Study.open(self._folder, read_only=True)
        study = self._study
        if len(history := study.spec_history()) != self._versions:
            self._versions, self._spec = len(history), SweepSpec.from_stored(history[-1].text)
            self._updates_of = None
        if self._updates_of is None and self._spec is not None:
            self._updates_of = updates_if_known(self._folder, self._spec)
        state = sweep_state(study)
        return Progress(
            state,
            study.pause_reason() if state == "paused" else study.stop_reason(),
            has_driver,
            self._spec,
            study.usage().hours * 3600,
            frozenset(study.trials_at_work()) if has_driver else frozenset(),
            study.trials(),
            self._updates_of,
        )

    def metrics(self, trial: int, since: int) -> list[StepMetrics]:
        """Return a trial's metrics after an update."""
        assert self._study is not None, "a sweep without a study has no trials"
        return [point for point in self._study.metric_history(trial) if point.step > since]

    def close(self) -> None:
        """Close the study."""
        if self._study is not None:
            self._study.dispose()
            self._study = None


def progress_of(folder: SweepFolder) -> Progress:
    """Return a sweep of this machine as it is now, once."""
    watched = WatchedStudy(folder)
    try:
        return watched.read()
    finally:
        watched.close()


def points_from_json(points: Sequence[Mapping[str, Any]]) -> list[StepMetrics]:
    """Return a service's points of a trial, in which null is not a number."""
    return [StepMetrics(point["step"], _numbers(point["metrics"])) for point in points]


def _updates_of(updates: Mapping[str, int] | None, records: Sequence[TrialRecord]) -> UpdatesOf | None:
    """Return the function from a trial's params to its updates; None before they are known."""
    if updates is None:
        return None
    by_params = {_key(record.params): updates[str(record.number)] for record in records}
    most = max(by_params.values(), default=0)
    return lambda params: by_params.get(_key(params), most)


def _with_numbers(trial: Mapping[str, Any]) -> dict[str, Any]:
    return {**trial, "metrics": _numbers(trial["metrics"])}


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _key(params: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    return frozenset((path, repr(value)) for path, value in params.items())
