"""A process that trials share, here without Ray: whose turn it is, and what one's end leaves to the others."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.messages import AttemptReport, AttemptResult, AttemptStatus, AttemptTask, WorkerLost
from orchestrator.execution.workers import shared_worker as worker_module
from orchestrator.execution.workers.shared_worker import SharedWorker
from orchestrator.study.trial_records import FailureKind
from tests.support.small_trials import without_speed
from tests.support.specs import real_spec
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, StepMetrics
from trainer.training_session import TrainingSession

CONFIG = real_spec(steps=4).base
LORA = CONFIG.model_validate(CONFIG.model_dump() | {"lora": {"r": 4, "dropout": 0.1}})


class Greedy(TrainingSession):
    """The trainer's; out of memory after update 2 of every trial in a folder named `large/1`."""

    made: list[TrainingSession]

    def __init__(self, cache: Path, beside: Greedy | None = None) -> None:
        super().__init__(cache, sibling=beside)
        if beside is None:
            self.made = []
        else:
            beside.made.append(self)

    def sibling(self) -> TrainingSession:
        return Greedy(self._cache, self)

    def train(
        self, config: TrialConfig, folder: Path, earlier_attempts: Sequence[Path] = (), fork_folder: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        course = super().train(config, folder, earlier_attempts, fork_folder)
        while True:
            try:
                step_metrics = next(course)
            except StopIteration as end:
                return end.value
            if step_metrics.step == 2 and (folder.parent.name, folder.name) == ("large", "1"):
                raise MemoryError
            yield step_metrics


def task(root: Path, run: str, attempt: int = 1, rate: float = 1e-3) -> AttemptTask:
    training = LORA.training.model_copy(update={"learning_rate": rate})
    config = LORA.model_copy(update={"training": training}).model_dump_json()
    earlier = tuple(root / run / str(k) for k in range(1, attempt))
    return AttemptTask(run, attempt, config, root / run / str(attempt), earlier)


def take(host: SharedWorker, *jobs: AttemptTask) -> dict[str, tuple[list[StepMetrics], AttemptResult]]:
    """Pull each in turn until all have ended."""
    metrics: dict[str, list[StepMetrics]] = {one.run_name: [] for one in jobs}
    out: dict[str, tuple[list[StepMetrics], AttemptResult]] = {}
    while len(out) < len(jobs):
        for one in jobs:
            if one.run_name not in out:
                report = host.next_report(one.id)
                metrics[one.run_name] += report.metrics
                if report.result is not None:
                    out[one.run_name] = metrics[one.run_name], report.result
                    host.close(one.id)
    return out


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SharedWorker:
    monkeypatch.setattr("orchestrator.execution.workers.attempt_runner.REPORT_SECONDS", 0.0)  # a point each turn
    return SharedWorker(tmp_path / "cache", Greedy)


def test_one_out_of_memory_gives_back_its_own_and_leaves_the_base(
    host: SharedWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(worker_module, "free_memory", lambda: emptied.append(True))
    small, large = task(tmp_path, "small"), task(tmp_path, "large")
    for one in (small, large):
        host.start(one)
    ended = take(host, small, large)
    assert ended["small"][1].status is AttemptStatus.FINISHED
    assert (ended["large"][1].status, ended["large"][1].failure) == (AttemptStatus.FAILED, FailureKind.OUT_OF_MEMORY)
    assert emptied == [True]
    again, next_one = task(tmp_path, "large", 2), task(tmp_path, "small-again")
    for one in (again, next_one):
        host.start(one)
    second = take(host, again, next_one)
    assert {end.status for _, end in second.values()} == {AttemptStatus.FINISHED}
    assert without_speed(second["small-again"][0]) == without_speed(ended["small"][0])
    first_session: Any = host._first_session
    assert first_session.counters["model_loaded"] == first_session.counters["data_loaded"] == 1
    assert len(first_session.made) == 3, "one was free again, one was dropped"


def test_an_older_attempt_ends_where_the_next_begins(host: SharedWorker, tmp_path: Path) -> None:
    first = task(tmp_path, "a")
    host.start(first)
    host.next_report(first.id)
    second = task(tmp_path, "a", 2)
    host.start(second)
    assert take(host, second)["a"][1].status is AttemptStatus.FINISHED
    with pytest.raises(WorkerLost, match="was restarted"):
        host.next_report(first.id)


def test_one_whose_relay_is_gone_is_let_go_of_at_its_next_turn(host: SharedWorker, tmp_path: Path) -> None:
    left, stays = task(tmp_path, "left"), task(tmp_path, "stays", rate=2e-3)
    for one in (left, stays):
        host.start(one)
    for one in (left, stays, left, stays):
        host.next_report(one.id)
    host.interrupt_orphan(left.id)
    report: AttemptReport = host.next_report(left.id)
    assert report.result.status is AttemptStatus.RELEASED
    host.close(left.id)
    host.close(left.id)
    again = task(tmp_path, "left", 2)
    host.start(again)
    assert {end.status for _, end in take(host, again, stays).values()} == {AttemptStatus.FINISHED}
    first_session: Any = host._first_session
    assert len(first_session.made) == 3, "an interruption meant for one trial reaches no other"
    host.interrupt_orphan("unknown")
