"""An issued trial on its way into a worker's hands: its folder, its file, its run in tracking."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.engine import memory
from orchestrator.engine.messages import Job
from orchestrator.engine.view import View
from orchestrator.mirror.places import of_trial
from orchestrator.study.records import Trial
from orchestrator.study.state import TrialState
from orchestrator.study.study import Study
from orchestrator.tracking.names import begun_tags
from orchestrator.tracking.sink import Sink
from trainer.config import TrialConfig

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
        config = memory.fitted(configured, trial.micro_batch)
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
        return Live(trial, job, memory.kernel_kills())
