"""A process that trials share, here without Ray: whose turn it is, and what one's end leaves to the others."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from several import spec, told

from orchestrator.execution.messages import End, EndKind, Job, Report, WorkerLost
from orchestrator.execution.workers import shared_worker as host_module
from orchestrator.execution.workers.shared_worker import Host
from orchestrator.study.trial_records import FailureKind
from trainer.config.trial import TrialConfig
from trainer.results import Ending, Point
from trainer.training_session import Workshop

CONFIG = spec("ddp", steps=4).base
LORA = CONFIG.model_validate(CONFIG.model_dump() | {"lora": {"r": 4, "dropout": 0.1}})


class Greedy(Workshop):
    """The trainer's; out of memory after update 2 of every trial in a folder named `large/1`."""

    made: list[Workshop]

    def __init__(self, cache: Path, beside: Greedy | None = None) -> None:
        super().__init__(cache, beside=beside)
        if beside is None:
            self.made = []
        else:
            beside.made.append(self)

    def beside(self) -> Workshop:
        return Greedy(self._cache, self)

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[Point, None, Ending]:
        course = super().train(config, folder, earlier, fork)
        while True:
            try:
                point = next(course)
            except StopIteration as end:
                return end.value
            if point.step == 2 and (folder.parent.name, folder.name) == ("large", "1"):
                raise MemoryError
            yield point


def job(root: Path, run: str, attempt: int = 1, rate: float = 1e-3) -> Job:
    training = LORA.training.model_copy(update={"learning_rate": rate})
    config = LORA.model_copy(update={"training": training}).model_dump_json()
    earlier = tuple(root / run / str(k) for k in range(1, attempt))
    return Job(run, attempt, config, root / run / str(attempt), earlier)


def take(host: Host, *jobs: Job) -> dict[str, tuple[list[Point], End]]:
    """Pull each in turn until all have ended."""
    points: dict[str, list[Point]] = {one.run: [] for one in jobs}
    out: dict[str, tuple[list[Point], End]] = {}
    while len(out) < len(jobs):
        for one in jobs:
            if one.run not in out:
                report = host.pull(one.id)
                points[one.run] += report.points
                if report.end is not None:
                    out[one.run] = points[one.run], report.end
                    host.close(one.id)
    return out


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr("orchestrator.execution.workers.attempt_runner.GROUP_SECONDS", 0.0)  # a point each turn
    return Host(tmp_path / "cache", Greedy)


def test_one_out_of_memory_gives_back_its_own_and_leaves_the_base(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(host_module, "empty", lambda: emptied.append(True))
    small, large = job(tmp_path, "small"), job(tmp_path, "large")
    for one in (small, large):
        host.begin(one)
    ended = take(host, small, large)
    assert ended["small"][1].kind is EndKind.FINISHED
    assert (ended["large"][1].kind, ended["large"][1].failure) == (EndKind.FAILED, FailureKind.OUT_OF_MEMORY)
    assert emptied == [True]
    again, next_one = job(tmp_path, "large", 2), job(tmp_path, "small-again")
    for one in (again, next_one):
        host.begin(one)
    second = take(host, again, next_one)
    assert {end.kind for _, end in second.values()} == {EndKind.FINISHED}
    assert told(second["small-again"][0]) == told(ended["small"][0])
    hall: Any = host._hall
    assert hall.counters["model_loaded"] == hall.counters["data_loaded"] == 1
    assert len(hall.made) == 3, "one was free again, one was dropped"


def test_an_older_attempt_ends_where_the_next_begins(host: Host, tmp_path: Path) -> None:
    first = job(tmp_path, "a")
    host.begin(first)
    host.pull(first.id)
    second = job(tmp_path, "a", 2)
    host.begin(second)
    assert take(host, second)["a"][1].kind is EndKind.FINISHED
    with pytest.raises(WorkerLost, match="started anew"):
        host.pull(first.id)


def test_one_whose_relay_is_gone_is_let_go_of_at_its_next_turn(host: Host, tmp_path: Path) -> None:
    left, stays = job(tmp_path, "left"), job(tmp_path, "stays", rate=2e-3)
    for one in (left, stays):
        host.begin(one)
    for one in (left, stays, left, stays):
        host.pull(one.id)
    host.give_up(left.id)
    report: Report = host.pull(left.id)
    assert report.end is not None
    assert report.end.kind is EndKind.RELEASED
    host.close(left.id)
    host.close(left.id)
    again = job(tmp_path, "left", 2)
    host.begin(again)
    assert {end.kind for _, end in take(host, again, stays).values()} == {EndKind.FINISHED}
    hall: Any = host._hall
    assert len(hall.made) == 3, "an interruption meant for one trial reaches no other"
    host.give_up("unknown")
