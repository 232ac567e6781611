"""The queue: its order, repeated requests, and kills inside a transaction."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.commands.runs_folder.queue_records import BY_SERVICE
from orchestrator.errors import NameTaken, PasswordInUrl, StorageRefused
from orchestrator.service import queue_tables
from orchestrator.service.sweep_queue import KeyUsed, NotQueued, QueueRefused, QueueState, SweepQueue
from tests.support.local_driver import KILLED, forked_together, killed_at


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, fast_tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{fast_tmp_path}/service/queue.db"
    return request.getfixturevalue("new_postgresql")()


def names(queue: SweepQueue, *states: QueueState) -> list[str]:
    return [sweep.name for sweep in queue.sweeps(states or (QueueState.WAITING,))]


def test_the_overview_is_that_of_the_sweeps_whoever_changes_them(url: str, tmp_path: Path) -> None:
    queue, other = SweepQueue(url), SweepQueue(url)

    def submit(name: str) -> object:
        return other.submit(name, "spec", tmp_path / name, owner="ann")

    changes: list[Callable[[], object]] = [
        lambda: submit("a"),
        lambda: submit("b"),
        lambda: other.set_priority("b", 3),
        lambda: other.begin_launch("b", "boot"),
        lambda: other.record_death("b", 1, "killed", most=3),
        lambda: other.begin_launch("b", "boot"),
        lambda: other.end("b", QueueState.FINISHED, ""),
        lambda: other.withdraw("a", "by ann"),
        lambda: other.resume("a"),
        lambda: (other.forget("b"), submit("c")),  # as many sweeps as before, and the action's number is used again
        lambda: other.adopt("d", owner="ann", gpus=1),
        lambda: submit("a") if other.withdraw("a", "by ann") else None,
    ]
    for change in changes:
        before = queue.overview()
        change()
        found = queue.overview()
        assert found != before
        assert found == {sweep.name: replace(sweep, spec="") for sweep in other.sweeps()}
        assert queue.overview() is found, "nothing has changed"
    queue.close()
    other.close()


def test_sweeps_start_by_priority_and_submission_through_every_state(url: str, tmp_path: Path) -> None:
    queue = SweepQueue(url)
    for name, priority in (("a", 0), ("b", 0), ("urgent", 5), ("c", -1)):
        queue.submit(name, "spec", tmp_path / name, owner="ann", priority=priority)
    assert names(queue) == ["urgent", "a", "b", "c"]
    queue.set_priority("c", 9)
    assert queue.begin_launch("c", "boot").launch == 1
    with pytest.raises(QueueRefused, match="c is driven: only waiting sweeps are withdrawn"):
        queue.withdraw("c", "by ann")
    assert queue.record_death("c", 1, "killed", most=1).deaths == 1
    assert queue.record_death("c", 1, "killed", most=1).deaths == 1, "a death is counted once"
    queue.set_priority("c", -9)
    assert names(queue) == ["c", "urgent", "a", "b"], "what ran is resumed first"
    assert queue.begin_launch("c", "boot").launch == 2
    assert queue.record_death("c", 2, "the machine was started again", most=None).deaths == 1
    queue.set_priority("c", 9)
    assert queue.begin_launch("c", "boot").launch == 3
    stopped = queue.record_death("c", 3, "killed", most=1)
    assert (stopped.state, stopped.why) == (QueueState.STOPPED, "2 drivers ended unexpectedly, the last: killed")
    assert queue.resume("c").deaths == 0
    assert names(queue) == ["c", "urgent", "a", "b"]
    queue.withdraw("a", "by ann")
    assert queue.resume("a").state is QueueState.WAITING
    assert names(queue) == ["c", "urgent", "b", "a"], "it waits again behind those of its priority"
    assert [action.action for action in queue.actions("c") if action.person == BY_SERVICE] == [
        "started", "resumed: killed", "started driver 2", "resumed: the machine was started again", "started driver 3",
        "stopped: 2 drivers ended unexpectedly, the last: killed",
    ]  # fmt: skip
    queue.submit("d", "spec", tmp_path / "d", owner="ann")
    queue.adopt("e", owner="ann", gpus=0)
    assert names(queue) == ["c", "urgent", "b", "a", "d", "e"], "and before those that come later"
    queue.close()
    again = SweepQueue(url)
    assert names(again) == ["c", "urgent", "b", "a", "d", "e"], "it survives its process"
    with pytest.raises(NotQueued, match="did you mean 'urgent'"):
        again.find("urgnt")
    again.close()


def test_a_repeated_request_adds_nothing(url: str, tmp_path: Path) -> None:
    queue = SweepQueue(url)
    first, is_new = queue.submit("a", "spec", tmp_path / "a", owner="ann", key="k", digest="1")
    assert is_new
    (tmp_path / "a").mkdir()  # meanwhile it runs
    assert queue.submit("a", "spec", tmp_path / "a", owner="ann", key="k", digest="1") == (first, False)
    with pytest.raises(KeyUsed):
        queue.submit("b", "other", tmp_path / "b", owner="ann", key="k", digest="2")
    assert queue.submit("b", "spec", tmp_path / "b", owner="bob", key="k", digest="1")[1], "keys are a person's own"
    for name in ("a", "b"):
        with pytest.raises(NameTaken):
            queue.submit(name, "spec", tmp_path / name, owner="ann", key="new", digest="3")
    queue.begin_launch("b", "boot")
    queue.end("b", QueueState.FAILED, "bad data")
    assert queue.submit("b", "spec 2", tmp_path / "b", owner="ann")[0].spec == "spec 2", "nothing holds its name"
    queue.close()


def test_of_several_processes_one_submits_and_one_starts(url: str, tmp_path: Path) -> None:
    SweepQueue(url).close()

    def work(process: int) -> None:
        queue = SweepQueue(url)
        for name in "abcde":
            queue.submit(name, "spec", tmp_path / name, owner="ann", key=name, digest="1")
            queue.submit(f"{name}{process}", "spec", tmp_path / name, owner="ann")
        for name in "abcde":
            with suppress(QueueRefused):
                queue.begin_launch(name, f"by {process}")
        assert queue.begin_request("ann", f"k{process}", "1", "a") is None

    assert forked_together(4, work) == [0] * 4
    queue = SweepQueue(url)
    found = queue.sweeps()
    assert len(found) == len({sweep.seq for sweep in found}) == 5 + 4 * 5
    assert [sweep.launch for sweep in found if sweep.name in "abcde"] == [1] * 5
    assert [action.action for action in queue.actions("a")] == ["submitted with priority 0", "started"], "each once"
    queue.close()


def test_a_change_waits_a_bounded_time_for_another_and_reading_waits_for_none(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_tables, "BUSY_SECONDS", 1)
    queue, other = SweepQueue(url), queue_tables.QueueDatabase(url)
    queue.submit("a", "spec", tmp_path / "a", owner="ann")
    with other.change():
        assert queue.find("a").state is QueueState.WAITING
        with pytest.raises(StorageRefused, match="lock"):
            queue.withdraw("a", "by ann")
        assert names(queue) == ["a"]
    assert queue.withdraw("a", "by ann").state is QueueState.WITHDRAWN
    queue.close()
    other.close()


def test_any_text_of_people_and_logs_is_stored(url: str, tmp_path: Path) -> None:
    queue = SweepQueue(url)
    queue.submit("a", "spec", tmp_path / "a", owner="ann")
    queue.withdraw("a", "nul \0, half \ud800, snow \N{SNOWMAN}")
    assert queue.find("a").why == "nul \N{REPLACEMENT CHARACTER}, half ?, snow \N{SNOWMAN}"
    queue.close()


def test_a_kill_before_the_commit_leaves_neither_sweep_nor_key(url: str, fast_tmp_path: Path) -> None:
    def submit() -> None:
        SweepQueue(url).submit("a", "spec", fast_tmp_path / "a", owner="ann", key="k", digest="1")

    assert killed_at(submit, "queue.submit") == KILLED
    queue = SweepQueue(url)
    assert names(queue, *QueueState) == []
    assert queue.submit("a", "spec", fast_tmp_path / "a", owner="ann", key="k", digest="1")[1]
    queue.close()


def test_a_database_that_cannot_be_used_is_refused_with_a_sentence(fast_tmp_path: Path) -> None:
    for url in ("postgresql+psycopg://ann:secret@host/db", "postgresql+psycopg://ann@host/db?password=secret"):
        with pytest.raises(PasswordInUrl) as refused:
            SweepQueue(url)
        assert "secret" not in str(refused.value)
    for url, problem in (("nonsense", "cannot be opened"), ("mysql+pymysql://host/db", "cannot be in mysql")):
        with pytest.raises(StorageRefused, match=problem):
            SweepQueue(url)
    (fast_tmp_path / "queue.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageRefused, match="not a database"):
        SweepQueue(f"sqlite:///{fast_tmp_path}/queue.db")
