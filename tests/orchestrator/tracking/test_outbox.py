import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageRefused
from orchestrator.interfaces import MessageRejected, TrackingUnavailable
from orchestrator.tracking import outbox as outbox_module
from orchestrator.tracking.deferred_messages import outbox_state
from orchestrator.tracking.message_journal import Journal, LogArtifact, LogMetrics, SetTags, decode
from orchestrator.tracking.outbox import Outbox, OutboxLocked
from tests.support.processes import LIMIT_SECONDS, wait_until
from tests.support.real_trials import is_alive
from trainer.results import StepMetrics


class Recorder:
    """Takes everything, after doing what the test wants before each message."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before
        self.calls: list[tuple[str, str, Any]] = []

    def _take(self, what: str, run: str, value: Any) -> None:
        self.before()
        self.calls.append((what, run, value))

    def start_run(self, run: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str], at: float) -> None:
        self._take("start", run, (name, dict(params), dict(tags), at))

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        self._take("points", run, (list(metrics), at))

    def log_final_metrics(self, run: str, values: Mapping[str, float], *, step: int, at: float) -> None:
        self._take("values", run, (dict(values), step, at))

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        self._take("tag", run, dict(tags))

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        self._take("artifact", run, (path, folder))

    def end_run(self, run: str, *, status: str, tags: Mapping[str, str], at: float) -> None:
        self._take("end", run, (status, dict(tags), at))

    @property
    def steps(self) -> list[int]:
        return [p.step for what, _, value in self.calls if what == "points" for p in value[0]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(outbox_module, "MAX_WAIT", 0.05)


def step_metrics_at(step: int, value: float = 1.0) -> StepMetrics:
    return StepMetrics(step, {"loss": value})


def test_all_messages_arrive_in_order_and_as_they_were_told(tmp_path: Path) -> None:
    seen = Recorder()
    box = Outbox(tmp_path / "o", seen)
    box.start_run("0", name="n", params={"a": [1, None], "b": 6e-7}, tags={"t": "ü"}, at=1.5)
    box.log_metrics("0", [StepMetrics(1, {"loss": math.inf, "rewards/margins": 0.1})], at=2.5)
    box.set_tags("0", {"x": "y"})
    box.log_artifact("0", tmp_path / "f", "g")
    box.end_run("0", status="FINISHED", tags={}, at=3.5)
    assert box.close(LIMIT_SECONDS) == 0
    assert seen.calls == [
        ("start", "0", ("n", {"a": [1, None], "b": 6e-7}, {"t": "ü"}, 1.5)),
        ("points", "0", ([StepMetrics(1, {"loss": math.inf, "rewards/margins": 0.1})], 2.5)),
        ("tag", "0", {"x": "y"}),
        ("artifact", "0", (tmp_path / "f", "g")),
        ("end", "0", ("FINISHED", {}, 3.5)),
    ]


def test_what_is_no_number_arrives_as_nan(tmp_path: Path) -> None:
    seen = Recorder()
    box = Outbox(tmp_path / "o", seen)
    box.log_metrics("0", [StepMetrics(1, {"loss": None, "text": "abc", "nan": math.nan})], at=1.0)  # type: ignore[dict-item]
    assert box.close(LIMIT_SECONDS) == 0
    assert all(math.isnan(v) for v in seen.calls[0][2][0][0].metrics.values())


def test_steps_told_before_are_skipped_also_by_a_later_process(tmp_path: Path) -> None:
    seen = Recorder()
    box = Outbox(tmp_path / "o", seen)
    box.log_metrics("0", [step_metrics_at(0), step_metrics_at(1)], at=1.0)
    box.log_metrics("0", [step_metrics_at(1, 9.0), step_metrics_at(2), step_metrics_at(2, 9.0)], at=2.0)
    box.log_metrics("1", [step_metrics_at(0)], at=2.0)
    box.close(LIMIT_SECONDS)
    box = Outbox(tmp_path / "o", seen)
    box.log_metrics("0", [step_metrics_at(0), step_metrics_at(1), step_metrics_at(2), step_metrics_at(3)], at=3.0)
    box.log_metrics("0", [step_metrics_at(3)], at=4.0)
    assert box.close(LIMIT_SECONDS) == 0
    assert [v[0] for _, _, v in seen.calls] == [
        [step_metrics_at(0), step_metrics_at(1)],
        [step_metrics_at(2)],
        [step_metrics_at(0)],
        [step_metrics_at(3)],
    ]


def test_a_receiver_that_fails_costs_time_and_nothing_else(tmp_path: Path) -> None:
    chance = random.Random(1)

    def fail_often() -> None:
        if chance.random() < 0.6:
            raise TrackingUnavailable("server is down")

    seen = Recorder(fail_often)
    box = Outbox(tmp_path / "o", seen)
    for step in range(40):
        box.log_metrics("0", [step_metrics_at(step)], at=float(step))
    assert box.close(LIMIT_SECONDS) == 0
    assert seen.steps == list(range(40))
    assert box.delivery_error == ""


def test_a_receiver_that_hangs_never_holds_the_caller(tmp_path: Path) -> None:
    go = threading.Event()
    box = Outbox(tmp_path / "o", Recorder(lambda: go.wait(LIMIT_SECONDS) and None))
    for step in range(100):
        box.log_metrics("0", [step_metrics_at(step)], at=float(step))
    assert box.close(0.3) == 100, "neither telling nor closing waited for the receiver"
    later = Recorder()
    assert Outbox(tmp_path / "o", later).close(LIMIT_SECONDS) == 0
    assert later.steps == list(range(100))
    go.set()  # the old thread wakes up and must not move the new position
    box._thread.join()  # pyright: ignore[reportPrivateUsage]
    assert json.loads((tmp_path / "o" / "delivered.json").read_text())["seq"] == 100


@pytest.mark.parametrize("ends", [False, True])
def test_delivery_that_is_patient_waits_for_the_first_metrics_or_the_end(tmp_path: Path, ends: bool) -> None:
    seen = Recorder()
    box = Outbox(tmp_path / "o", seen, patience=1e6)
    box.start_run("0", name="first", params={}, tags={}, at=1.0)
    wait_until(lambda: box._changed._waiters)  # pyright: ignore
    assert seen.calls == []
    if not ends:
        box.log_metrics("0", [step_metrics_at(1)], at=2.0)
        wait_until(lambda: not box.pending)
    assert box.close(LIMIT_SECONDS) == 0
    assert [what for what, _, _ in seen.calls] == (["start"] if ends else ["start", "points"])


def test_an_unreachable_receiver_is_named_and_all_is_kept(tmp_path: Path) -> None:
    def down() -> None:
        raise TrackingUnavailable("connection refused")

    box = Outbox(tmp_path / "o", Recorder(down))
    box.log_metrics("0", [step_metrics_at(1)], at=1.0)
    wait_until(lambda: box.delivery_error)
    assert (box.delivery_error, box.pending) == ("connection refused", 1)
    assert box.close(0.1) == 1
    assert Outbox(tmp_path / "o", Recorder()).close(LIMIT_SECONDS) == 0


def test_a_receiver_that_dies_midway_gets_that_message_again(tmp_path: Path) -> None:
    taken: list[int] = []

    class DiesAfterTaking(Recorder):
        def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
            super().log_metrics(run, metrics, at=at)
            taken.append(metrics[0].step)
            if len(taken) == 3:
                raise TrackingUnavailable("the answer was lost on the way")

    box = Outbox(tmp_path / "o", DiesAfterTaking())
    for step in range(5):
        box.log_metrics("0", [step_metrics_at(step)], at=1.0)
    assert box.close(LIMIT_SECONDS) == 0
    assert taken == [0, 1, 2, 2, 3, 4]


class BatchRecorder(Recorder):
    """Takes several messages of a run in one call."""

    def log_metric_history(self, run: str, history: Sequence[tuple[Sequence[StepMetrics], float]]) -> None:
        self._take("course", run, [([p.step for p in metrics], at) for metrics, at in history])


def outbox_filled_offline(folder: Path, tell: Callable[[Outbox], None]) -> None:
    """What the driver told while nobody could be reached."""

    def unreachable() -> None:
        raise TrackingUnavailable("down")

    box = Outbox(folder, Recorder(unreachable))
    tell(box)
    assert box.close(0.0) == box.pending > 0


def send_messages(box: Outbox) -> None:
    for run in ("0", "1"):
        box.start_run(run, name=run, params={}, tags={}, at=1.0)
    for step in range(3):
        for run in ("0", "1"):
            box.log_metrics(run, [step_metrics_at(step)], at=2.0 + step)
    box.set_tags("0", {"a": "b"})
    for step in range(3, 5):
        for run in ("0", "1"):
            box.log_metrics(run, [step_metrics_at(step)], at=2.0 + step)


def test_points_of_a_run_that_wait_go_in_one_call_each_with_its_time(tmp_path: Path) -> None:
    outbox_filled_offline(tmp_path / "o", send_messages)
    seen = BatchRecorder()
    assert Outbox(tmp_path / "o", seen).close(LIMIT_SECONDS) == 0
    assert [(what, run) for what, run, _ in seen.calls] == [
        ("start", "0"),
        ("start", "1"),
        ("course", "0"),
        ("course", "1"),
        ("tag", "0"),
        ("course", "0"),
    ]
    assert [value for what, run, value in seen.calls if (what, run) == ("course", "1")] == [
        [([step], 2.0 + step) for step in range(5)]
    ]
    complete = Recorder()  # one that takes them one by one only
    outbox_filled_offline(tmp_path / "p", send_messages)
    assert Outbox(tmp_path / "p", complete).close(LIMIT_SECONDS) == 0
    assert [what for what, *_ in complete.calls].count("points") == 10


def test_calls_grow_with_runs_and_not_with_reports(tmp_path: Path) -> None:
    def many(box: Outbox) -> None:
        for step in range(200):
            for run in range(4):
                box.log_metrics(str(run), [step_metrics_at(step)], at=1.0)

    outbox_filled_offline(tmp_path / "o", many)
    seen = BatchRecorder()
    assert Outbox(tmp_path / "o", seen).close(LIMIT_SECONDS) == 0
    assert (len(seen.calls), sum(len(value) for _, _, value in seen.calls)) == (4, 800)


def test_refused_together_only_the_guilty_one_is_defer(tmp_path: Path) -> None:
    class Picky(BatchRecorder):
        def log_metric_history(self, run: str, history: Sequence[tuple[Sequence[StepMetrics], float]]) -> None:
            raise MessageRejected("one of these")

        def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
            if metrics[0].step == 1:
                raise MessageRejected("this one")
            super().log_metrics(run, metrics, at=at)

    outbox_filled_offline(
        tmp_path / "o",
        lambda box: [box.log_metrics("0", [step_metrics_at(step)], at=1.0) for step in range(3)] and None,
    )
    seen = Picky()
    assert Outbox(tmp_path / "o", seen).close(LIMIT_SECONDS) == 0
    assert seen.steps == [0, 2]
    temporary = (tmp_path / "o" / "refused.jsonl").read_bytes().splitlines()
    assert [decode(line) for line in temporary] == [(2, LogMetrics("0", [step_metrics_at(1)], 1.0))]


def test_closed_between_two_groups_the_later_opening_goes_on_there(tmp_path: Path) -> None:
    """Run 1's points had gone with earlier ones of its own; they are told again, and the receiver knows them."""
    outbox_filled_offline(tmp_path / "o", send_messages)

    class DownAfter(BatchRecorder):
        def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
            raise TrackingUnavailable("down")

    box = Outbox(tmp_path / "o", DownAfter())
    wait_until(lambda: box.delivery_error)
    assert box.close(0.0) == 5
    later = BatchRecorder()
    assert Outbox(tmp_path / "o", later).close(LIMIT_SECONDS) == 0
    assert [(what, run) for what, run, _ in later.calls] == [("tag", "0"), ("course", "0"), ("course", "1")]


def test_what_is_refused_for_ever_is_defer_and_the_rest_arrives(tmp_path: Path) -> None:
    class Picky(Recorder):
        def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
            raise MessageRejected("no such run")

    seen = Picky()
    box = Outbox(tmp_path / "o", seen)
    box.set_tags("9", {"a": "b"})
    box.log_metrics("0", [step_metrics_at(1)], at=1.0)
    assert box.close(LIMIT_SECONDS) == 0
    assert seen.steps == [1]
    temporary = (tmp_path / "o" / "refused.jsonl").read_bytes().splitlines()
    assert [decode(line) for line in temporary] == [(1, SetTags("9", {"a": "b"}))]


class PartlyBroken(Recorder):
    """Attaches no file and takes no tags named `long` while `broken`; takes writes unless `down`."""

    def __init__(self, *, down: bool = False) -> None:
        super().__init__()
        self.broken, self.down = True, down

    def probe(self) -> None:
        if self.down:
            raise TrackingUnavailable("down")

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        if self.broken and "long" in tags:
            raise TrackingUnavailable("500 internal error")
        super().set_tags(run, tags)

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        if self.broken:
            raise TrackingUnavailable("permission denied: /old/artifacts")
        super().log_artifact(run, path, folder)


def test_one_message_that_cannot_be_delivered_blocks_no_other_and_is_counted(tmp_path: Path) -> None:
    seen, folder = PartlyBroken(), tmp_path / "s" / "outbox"
    box = Outbox(folder, seen)
    box.log_artifact("0", tmp_path / "s" / "report.html")
    box.set_tags("0", {"long": "x"})
    box.log_metrics("0", [step_metrics_at(1)], at=1.0)
    box.end_run("0", status="FINISHED", tags={}, at=2.0)
    wait_until(lambda: box.pending == 0)
    assert [what for what, *_ in seen.calls] == ["points", "end"]
    assert box.close(LIMIT_SECONDS) == 1, "the file waits for the next opening"
    assert box.refused == "1 (500 internal error)"
    state = outbox_state(folder)
    assert state is not None
    assert (state.pending, state.deferred, state.refused) == (0, 1, 1)
    assert decode((folder / "refused.jsonl").read_bytes().splitlines()[0]) == (2, SetTags("0", {"long": "x"}))
    mended = PartlyBroken()
    mended.broken = False
    assert Outbox(folder, mended).close(LIMIT_SECONDS) == 0
    assert mended.calls == [("artifact", "0", (tmp_path / "s" / "report.html", ""))]
    state = outbox_state(folder)
    assert state is not None
    assert (state.deferred, state.refused) == (0, 1)


def test_while_nothing_can_be_written_every_message_waits(tmp_path: Path) -> None:
    down = PartlyBroken(down=True)
    box = Outbox(tmp_path / "o", down)
    box.log_artifact("0", tmp_path / "f")
    for step in range(3):
        box.set_tags("0", {"long": str(step)})
    wait_until(lambda: box.delivery_error)
    assert box.close(0.3) == 4
    assert not (tmp_path / "o" / "refused.jsonl").exists()
    down.broken = False
    assert Outbox(tmp_path / "o", down).close(LIMIT_SECONDS) == 0
    assert [what for what, *_ in down.calls] == ["artifact", "tag", "tag", "tag"]


@pytest.mark.parametrize("is_copied", [False, True])
def test_files_of_a_moved_sweep_are_attached_from_where_they_are_now(tmp_path: Path, is_copied: bool) -> None:
    old, new = tmp_path / "old" / "s", tmp_path / "new" / "s"
    (old / "trials").mkdir(parents=True)
    (old / "trials" / "a.txt").write_text("a")
    outbox_filled_offline(old / "outbox", lambda box: box.log_artifact("0", old / "trials" / "a.txt"))
    journal = Journal(old / "outbox" / "messages.jsonl")
    list(journal.scan())
    journal.append(LogArtifact("0", old / "trials" / "a.txt", "as an earlier version"))
    journal.close()
    new.parent.mkdir()
    if is_copied:
        shutil.copytree(old, new)
    else:
        old.rename(new)
    seen = Recorder()
    assert Outbox(new / "outbox", seen).close(LIMIT_SECONDS) == 0
    assert [value[0] for _, _, value in seen.calls] == [new / "trials" / "a.txt"] * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_ours_is_loud_and_loses_nothing(tmp_path: Path) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    box = Outbox(tmp_path / "o", Recorder(bug))
    box.log_metrics("0", [step_metrics_at(1)], at=1.0)
    assert box.close(LIMIT_SECONDS) == 1
    assert "internal error" in box.delivery_error
    box.close(0.0)
    later = Recorder()
    assert Outbox(tmp_path / "o", later).close(LIMIT_SECONDS) == 0
    assert later.steps == [1]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o", Recorder())
    with pytest.raises(OutboxLocked):
        Outbox(tmp_path / "o", Recorder())
    box.close(1.0)
    Outbox(tmp_path / "o", Recorder()).close(1.0)


def test_closed_is_closed(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o", Recorder())
    assert box.close(1.0) == 0
    assert box.close(1.0) == 0
    with pytest.raises(RuntimeError, match="closed"):
        box.set_tags("0", {})


def write(folder: Path, count: int) -> bytes:
    box = Outbox(folder, Recorder())
    for step in range(count):
        box.log_metrics("0", [step_metrics_at(step)], at=1.0)
    box.close(LIMIT_SECONDS)
    (folder / "delivered.json").unlink()
    return (folder / "messages.jsonl").read_bytes()


# --- the disk --------------------------------------------------------------------------------------------------------
def test_a_lost_note_of_the_position_delivers_everything_again(tmp_path: Path) -> None:
    write(tmp_path / "o", 3)
    for note in ("", "{}", '{"seq": 1', "[]"):
        (tmp_path / "o" / "delivered.json").write_text(note)
        seen = Recorder()
        assert Outbox(tmp_path / "o", seen).close(LIMIT_SECONDS) == 0
        assert seen.steps == [0, 1, 2]


@pytest.mark.parametrize("old_note", [False, True])
@pytest.mark.parametrize("first", [1, 4, 9])
def test_a_journal_that_was_moved_away_takes_no_new_message_with_it(tmp_path: Path, first: int, old_note: bool) -> None:
    """As the advice for a damaged one says. The next journal may be shorter or longer than the one moved away."""
    folder = tmp_path / "o"
    write(folder, 4)
    seen = Recorder()
    assert Outbox(folder, seen).close(LIMIT_SECONDS) == 0
    assert seen.steps == [0, 1, 2, 3]
    if old_note:
        note = json.loads((folder / "delivered.json").read_text())
        (folder / "delivered.json").write_text(json.dumps({name: note[name] for name in ("seq", "offset")}))
    (folder / "messages.jsonl").rename(folder / "messages.damaged")
    box = Outbox(folder, Recorder(_down))
    for step in range(10, 10 + first):
        box.log_metrics("0", [step_metrics_at(step, value=0.125)], at=2.0)
    assert box.close(0.05) == first
    seen = Recorder()
    assert Outbox(folder, seen).close(LIMIT_SECONDS) == 0
    assert seen.steps == list(range(10, 10 + first))
    assert Outbox(folder, seen).close(LIMIT_SECONDS) == 0
    assert len(seen.steps) == first, "delivered once: the position is of this journal now"


def test_an_older_versions_position_still_counts(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    write(folder, 3)
    Outbox(folder, Recorder()).close(LIMIT_SECONDS)
    note = json.loads((folder / "delivered.json").read_text())
    assert note.pop("journal")
    (folder / "delivered.json").write_text(json.dumps(note))
    seen = Recorder()
    assert Outbox(folder, seen).close(LIMIT_SECONDS) == 0
    assert seen.steps == []


def _down() -> None:
    raise TrackingUnavailable("down")


def test_a_full_disk_refuses_and_leaves_whole_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorder()
    box = Outbox(tmp_path / "o", seen)
    box.log_metrics("0", [step_metrics_at(0)], at=1.0)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", _half_then_full(real))
    with pytest.raises(StorageRefused, match="No space left"):
        box.log_metrics("0", [step_metrics_at(1)], at=1.0)
    monkeypatch.setattr(os, "pwrite", real)
    box.log_metrics("0", [step_metrics_at(1)], at=1.0)
    assert box.close(LIMIT_SECONDS) == 0
    assert seen.steps == [0, 1]


def test_secrets_of_the_environment_never_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_12345")
    box = Outbox(tmp_path / "o", seen := Recorder())
    params = {"data": [{"url": "https://me:pass@host/x", "auth": "Bearer hf_canary_12345"}]}
    box.start_run("0", name="n", params=params, tags={"t": "hf_canary_12345"}, at=1.0)
    box.set_tags("0", {"t": "hf_canary_12345"})
    box.end_run("0", status="FAILED", tags={"reason": "401 with hf_canary_12345"}, at=1.0)
    box.close(LIMIT_SECONDS)
    on_disk = (tmp_path / "o" / "messages.jsonl").read_text()
    assert "canary" not in on_disk
    assert "me:pass" not in on_disk
    assert seen.calls[0][2][1] == {"data": [{"url": "https://***@host/x", "auth": "Bearer ***"}]}


class FileReceiver(Recorder):
    """Counts by (run, step, time), as MLflow does: told twice it is there once. After `most` calls it hangs."""

    def __init__(self, path: Path, most: int | None = None) -> None:
        super().__init__()
        self.path, self.left = path, most

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        if self.left == 0:
            threading.Event().wait(LIMIT_SECONDS)
        self.left = None if self.left is None else self.left - 1
        with self.path.open("a") as stream:
            stream.write("".join(f"{run} {p.step} {at}\n" for p in metrics))


def test_delivered_once_wherever_the_writer_is_killed(tmp_path: Path) -> None:
    folder, target = tmp_path / "o", tmp_path / "delivered"
    chance, kills = random.Random(2), 0

    def delivered() -> int:
        return target.read_text().count("\n") if target.exists() else 0

    for _ in range(15):
        enough, child = delivered() + chance.randrange(40), os.fork()
        if child == 0:  # it gets no further than 40 lines, however late it is killed
            box = Outbox(folder, FileReceiver(target, most=40))
            for step in range(300):  # re-emitted from the start each time, as after a lost checkpoint
                box.log_metrics("0", [step_metrics_at(step)], at=time.time())
            os._exit(0 if box.close(LIMIT_SECONDS) == 0 else 1)
        wait_until(lambda enough=enough, child=child: delivered() >= enough or not is_alive(child))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    box = Outbox(folder, FileReceiver(target))
    for step in range(300):
        box.log_metrics("0", [step_metrics_at(step)], at=time.time())
    assert box.close(LIMIT_SECONDS) == 0
    assert kills > 3
    lines = target.read_text().splitlines()
    assert sorted({int(line.split()[1]) for line in lines}) == list(range(300))
    assert len(set(lines)) == 300, "a step was delivered with two times: it would be there twice"
    journal = Journal(folder / "messages.jsonl")
    history = [p.step for _, m in journal.scan() if isinstance(m, LogMetrics) for p in m.metrics]
    journal.close()
    assert history == list(range(300))


def _half_then_full(real: Callable[[int, bytes, int], int]) -> Callable[[int, bytes, int], int]:
    def write(file: int, data: bytes, offset: int) -> int:
        if len(data) > 10:
            return real(file, data[: len(data) // 2], offset)
        raise OSError(28, "No space left on device")

    return write
