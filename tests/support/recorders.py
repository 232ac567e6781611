"""A tracking receiver and a view that remember what they were told."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.study.trial_records import TrialRecord
from trainer.results import StepMetrics


class ListSink:
    """Remembers every call; as JSON lines too, where a path is given."""

    def __init__(self, log: Path | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._log = log

    def _add(self, *call: Any) -> None:
        self.calls.append(call)
        if self._log is not None:
            with self._log.open("a") as log:
                log.write(json.dumps(call) + "\n")

    def start_run(self, run: str, *, name: str, params: Any, tags: Any, at: float) -> None:
        self._add("start", run, dict(params), dict(tags))

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        self._add("points", run, [p.step for p in metrics])

    def log_final_metrics(self, run: str, values: Mapping[str, float], *, step: int, at: float) -> None:
        self._add("values", run, dict(values), step)

    def set_tags(self, run: str, tags: Any) -> None:
        self._add("tag", run, dict(tags))

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        self._add("artifact", run, str(path))

    def end_run(self, run: str, *, status: str, tags: Any, at: float) -> None:
        self._add("end", run, status, dict(tags))

    def close(self, timeout: float) -> int:
        return 0

    def of(self, kind: str, run: str | None = None) -> list[tuple[Any, ...]]:
        """The calls of one kind, of one run where that is given."""
        return [call for call in self.calls if call[0] == kind and run in (None, call[1])]

    def tags(self, run: str) -> dict[str, str]:
        out: dict[str, str] = {}
        for call in self.calls:
            if call[0] in ("start", "tag", "end") and call[1] == run:
                out |= call[-1]
        return out


class SilentView:
    """Shows nothing; keeps lines, records and how often metrics came."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.records: list[TrialRecord] = []
        self.points_seen = 0

    def set_activity(self, text: str) -> None:
        self.said.append(text)

    def set_stage_progress(self, done: int, total: int) -> None:
        self.stage_progress = (done, total)

    def log(self, text: str) -> None:
        self.said.append(text)

    def set_total_updates(self, updates_of: Any) -> None: ...
    def change_spec(self, spec: Any, total: int | None) -> None: ...
    def update_trial(self, record: TrialRecord) -> None:
        self.records.append(record)

    def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None:
        self.points_seen += 1

    def refresh(self) -> None: ...
    def close(self) -> None: ...
