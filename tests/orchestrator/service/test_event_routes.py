"""Streams of a service in a process of its own: nothing is lost, nothing doubled, nobody waits for a slow reader."""

import asyncio
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.errors import StorageRefused
from orchestrator.folders import SweepFolder, sweep_lock
from orchestrator.service.event_sources import SweepSource
from orchestrator.service.sweep_watchers import EventLog, Message, Watchers
from orchestrator.study.database import study_database
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE, evaluated
from tests.support.processes import environment, wait_until
from tests.support.service_caller import Caller, begin
from tests.support.service_process import RunningService
from trainer.results import StepMetrics


@pytest.fixture
def folder(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    """Of the sweep `a`, which has no trial yet."""
    for name, value in environment(fast_tmp_path).items():
        monkeypatch.setenv(name, value)
    return begin("a", trials=0)


@pytest.fixture
def service(folder: SweepFolder) -> Iterator[RunningService]:
    service = RunningService(folder.root)
    yield service
    service.end()


@contextmanager
def driver(folder: SweepFolder) -> Generator[Study]:
    with sweep_lock(folder), Study.open(folder) as study:
        yield study


def begun(study: Study) -> Trial:
    trial = study.ask()
    assert isinstance(trial, Trial)
    return trial


def steps(data: Any) -> list[tuple[int, int]]:
    return [(point["trial"], point["step"]) for point in data["points"]]


def test_a_stream_begins_with_the_state_and_brings_every_change(service: RunningService, folder: SweepFolder) -> None:
    with service.events("/sweeps/a/events") as events:
        before, first = events.until("reload")
        assert before == []
        assert (first["state"], first["steps"], first["queue"]) == ("interrupted", {}, None)
        with driver(folder) as study:
            events.until("state", lambda data: data["state"] == "running")
            trial = begun(study)
            events.until("trials", lambda data: data["trials"][0]["state"] == "RUNNING")
            for step in (1, 2):
                study.report(trial, [evaluated(step, 0.5, some_metric=float("nan"))])
                _, data = events.until("metrics")
                assert steps(data) == [(0, step)]
                assert data["points"][0]["metrics"]["some_metric"] is None, "JSON has no NaN"
            study.tell(trial, COMPLETE)
            _, data = events.until("history", lambda data: data["events"][-1]["kind"] == "complete")
            _, data = events.until("state", lambda data: data["best"] == 0)
        events.until("state", lambda data: data["state"] == "interrupted")
    wait_until(lambda: "prefsweep_event_streams 0" in service.text("/metrics"))


def test_a_reader_that_comes_back_gets_what_it_has_missed_once(service: RunningService, folder: SweepFolder) -> None:
    with driver(folder) as study:
        trial = begun(study)
        with service.events("/sweeps/a/events") as events:
            events.until("reload")
            study.report(trial, [evaluated(1, 0.5)])
            events.until("metrics")
            last_id = events.last_id
        with service.events("/sweeps/a/events") as other:
            other.until("reload")
            study.report(trial, [evaluated(2, 0.6)])
            other.until("metrics")
        with service.events("/sweeps/a/events", last_id) as events:
            before, data = events.until("metrics")
            assert (before, steps(data)) == ([], [(0, 2)])
        for stranger in ("", "another-7", f"{last_id}9", "x"):
            with service.events("/sweeps/a/events", stranger) as events:
                before, first = events.until("reload")
                assert (before, first["steps"]) == ([], {"0": 2})


def test_a_reader_that_does_not_read_delays_nobody_and_is_told_to_reload(
    service: RunningService, folder: SweepFolder
) -> None:
    names = [f"a_metric_with_a_rather_long_name_{number}" for number in range(100)]
    slow, *others = [service.silent_reader("/sweeps/a/events") for _ in range(10)]
    memory = psutil.Process(service.process.pid).memory_info
    with driver(folder) as study, service.events("/sweeps/a/events") as events:
        events.until("reload")
        trial, seen, before = begun(study), list[tuple[int, int]](), memory().rss
        while len(seen) < 100 * 30:  # 15 MB, more than what is kept and what the system buffers
            fresh = range(len(seen) + 1, len(seen) + 101)
            study.report(trial, [StepMetrics(step, dict.fromkeys(names, float(step))) for step in fresh])
            while len(seen) < fresh.stop - 1:
                seen += steps(events.until("metrics")[1])
        assert seen == [(0, step) for step in range(1, 3001)]
        assert memory().rss - before < 60e6, "all readers share the 2 MB that are kept"
        received, reloads = 0, 0
        while reloads < 2:
            part = slow.recv(1 << 16)
            assert part
            received += len(part)
            reloads += part.count(b"event: reload")
    for client in (slow, *others):
        client.close()
    assert received < 15e6


def test_what_many_trials_report_is_read_at_once(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller(folder.root)
    opened = list[Path]()
    with driver(folder) as study:
        trials = [begun(study) for _ in range(3)]
        source = SweepSource(caller.service.context, "a")
        source.read()
        for trial in trials:
            study.report(trial, [evaluated(1, 0.5), evaluated(2, 0.6)])
        connect = study_database._connect_to_read
        monkeypatch.setattr(study_database, "_connect_to_read", lambda path: opened.append(path) or connect(path))
        found = [steps(data) for kind, data in source.read() if kind == "metrics"]
        assert found == [[(trial, step) for trial in range(3) for step in (1, 2)]]
        assert len(opened) == 1, "events and metrics of all trials"
        source.close()
    caller.service.close()


def test_a_log_is_followed_to_its_end(service: RunningService, folder: SweepFolder) -> None:
    folder.log.parent.mkdir()
    folder.log.write_text("one\n", encoding="utf-8")
    with driver(folder) as study:
        with service.events("/sweeps/a/log/events") as events:
            _, first = events.until("reload")
            assert first["lines"][-1] == "one"
            with folder.log.open("a", encoding="utf-8") as log:
                log.write("two\n")
            assert events.until("lines")[1] == {"lines": ["two"]}
        trial = begun(study)
        with service.events("/sweeps/a/log/events?trial=0") as events:
            events.until("reload")
            study.report(trial, [evaluated(1, 0.5)])
            events.until("lines", lambda data: "update 1: " in data["lines"][-1])
            study.tell(trial, COMPLETE)
            before, _ = events.until("end")
            assert before[-1] == "lines", "the last event comes first"


def test_all_sweeps_are_watched_in_one_stream_and_a_deleted_one_is_gone(
    service: RunningService, folder: SweepFolder
) -> None:
    with service.events("/events") as every, service.events("/sweeps/a/events") as one:
        every.until("reload")
        one.until("reload")
        begin("b", trials=0)
        _, data = every.until("sweeps")
        assert ([entry["name"] for entry in data["changed"]], data["gone"]) == (["b"], [])
        service.text("/api/v1/sweeps/a?keep_mlflow=true", "DELETE")
        assert every.until("sweeps")[1]["gone"] == ["a"]
        one.until("gone")
        assert list(one) == [], "the stream has ended"


def test_messages_are_kept_up_to_a_size_for_all_readers_together() -> None:
    log = EventLog(most_bytes=1000)
    for number in range(100):
        log.publish([("metrics", number)], {"last": number})
    assert sum(map(len, log.after(99)[1])) < sum(len(message) for _, message in log._messages) <= 1000
    position, (message,) = log.after(3)
    assert position == 100
    assert b'event: reload\ndata: {"last":99}' in message
    token = log._token
    assert (log.position(f"{token}-100"), log.position(f"{token}-3"), log.position("100")) == (100, None, None)


class Refusing:
    """A source whose second reading is refused."""

    def __init__(self) -> None:
        self.reads = 0

    def read(self) -> Sequence[Message]:
        self.reads += 1
        if self.reads == 2:
            raise StorageRefused("the study refused: database is locked")
        return [("state", self.reads)] if self.reads > 3 else ()

    def snapshot(self) -> Any:
        return {"reads": self.reads}

    def close(self) -> None: ...


async def first_messages(watchers: Watchers, count: int, valid: bool = True) -> list[str]:
    found: list[str] = []
    stream = watchers.stream(watchers.watch("a", Refusing), "", lambda: valid, quiet=0.01 if not valid else 60.0)
    async for message in stream:
        if message.startswith(b"id"):
            found.append(message.decode().splitlines()[1].partition(": ")[2])
        if len(found) == count:
            break
    await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def test_a_database_that_refuses_is_said_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.service.sweep_watchers.POLL_SECONDS", 0.01)
    watchers = Watchers()
    found = asyncio.run(first_messages(watchers, 4))
    assert found[:2] in (["reload", "problem"], ["reload", "reload"])  # watched before or after the refusal
    assert found[-1] == "state"
    assert "reload" in found[1:3], "what the refused reading had is read again"
    watchers.close()
    assert watchers.readers == 0


def test_a_stream_ends_with_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.service.sweep_watchers.POLL_SECONDS", 1000.0)
    watchers = Watchers()
    assert asyncio.run(first_messages(watchers, 5, valid=False)) == ["reload"]
    watchers.close()
