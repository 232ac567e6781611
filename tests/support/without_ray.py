"""Sweeps through the command in this process, without Ray and the data's own process, whose starts cost seconds."""

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver import run_sweep, sweep_driver
from orchestrator.execution.messages import AttemptReport, AttemptResult, AttemptTask
from orchestrator.execution.stop_reasons import StopReason
from orchestrator.execution.workers import data_preparation, data_process
from orchestrator.execution.workers.attempt_runner import SessionFactory
from orchestrator.execution.workers.stage_worker import StageActor
from orchestrator.study.study import Study
from tests.support.local_driver import make_controller, run_here
from trainer.config.trial import TrialConfig


class DataHere(data_process.DataProcess):
    """Answers as the data's process does, at once."""

    def __init__(
        self, cache: Path, first: TrialConfig, *_: object, trust_remote_code: bool = False, **__: object
    ) -> None:
        self._cache, self._trusts = cache, trust_remote_code
        self._requested, self._answers = [], {}

    def shut_down(self) -> None: ...

    def _send(self, request: str) -> None:
        self._answers[request] = json.dumps(data_preparation.prepare_data(self._cache, request, self._trusts))


class _StageHere:
    """The worker of the SFT stage."""

    def __init__(self, _: object, cache: Path, __: object, ___: object, open_session: SessionFactory) -> None:
        self._actor = StageActor(cache, open_session)

    def __enter__(self) -> "_StageHere":
        return self

    def __exit__(self, *_: object) -> None: ...
    def start(self) -> None: ...
    def shut_down(self) -> None: ...
    def key(self, config: TrialConfig, fingerprint: str) -> str:
        return self._actor.key(config.model_dump_json(), fingerprint)

    def train(
        self, task: AttemptTask, on_report: Callable[[AttemptReport], None], _: Callable[[], bool]
    ) -> AttemptResult:
        self._actor.start(task)
        while True:
            report = self._actor.next_report()
            on_report(report)
            if report.result is not None:
                return report.result


def _run_trials(
    study: Study, sink: Any, view: Any, signals: Any, _: object, *, open_session: SessionFactory, **more: Any
) -> StopReason:
    """One trial after the other."""
    session = open_session(study.folder.cache)
    del more["prestarted"]
    return run_here(make_controller(study, sink, view, signals, **more), lambda: session, polls=True).result()


def _no_cluster(*_: object) -> nullcontext[None]:
    return nullcontext()


@contextmanager
def without_ray(**replaced: Any) -> Generator[None]:
    """In the context a sweep prepares its data and runs its stage and its trials here; `replaced`: `run_trials`."""
    given: Mapping[str, Any] = {"StageWorker": _StageHere, "run_trials": _run_trials, **replaced}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_sweep, "local_cluster", _no_cluster)
        patch.setattr(data_process, "DataProcess", DataHere)
        for name, value in given.items():
            patch.setattr(sweep_driver, name, value)
        yield
