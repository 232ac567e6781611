"""A worker's copies: sent beside the training, fetched where a disk lacks them, never half and never damaged."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import far_help
import pytest
from far_help import STEPS, FarWorkshop, job, pull_all, write_checkpoint
from s3_server import Server

from orchestrator import mirror as mirror_store
from orchestrator.execution.messages import End, EndKind
from orchestrator.execution.workers import mirror_upload
from orchestrator.execution.workers.attempt_runner import Attempt
from orchestrator.execution.workers.mirror_upload import Copies
from orchestrator.mirror import Mirror, MirrorRefused
from orchestrator.study.trial_records import FailureKind
from trainer.storage.atomic_files import VARIABLE
from trainer.storage.checkpoint_manifest import check, places, step_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_upload, "_LOOK_SECONDS", 0.01)


@pytest.fixture
def file(tmp_path: Path) -> Mirror:
    return Mirror(f"file://{tmp_path}/far/trials/0003")


def _wait(until: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not until():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def _slow(mirror: Mirror) -> Callable[[int], None]:
    """Each update waits for its copy, so that a test knows what is there."""
    return lambda step: _wait(lambda: any(name.endswith(f"step-{step:08d}") for name in mirror.whole()))


def _stopped_after(mirror: Mirror, disk: Path, step: int, attempt: int = 1) -> FarWorkshop:
    """An attempt that is asked to stop after this update, and ends."""
    asked = job(disk, mirror.url, attempt)

    def each(now: int) -> None:
        _slow(mirror)(now)
        if now == step:
            asked.ask_to_stop()
            _wait(lambda: workshop._asked)

    workshop = FarWorkshop(each=each)
    assert pull_all(Attempt(asked, lambda: workshop))[-1].end.kind is EndKind.RELEASED  # type: ignore[union-attr]
    return workshop


def test_a_trial_goes_on_on_an_empty_disk(mirror: Mirror, tmp_path: Path) -> None:
    _stopped_after(mirror, tmp_path / "one", 4)
    assert mirror.whole() == ["1/checkpoints/step-00000003", "1/checkpoints/step-00000004"]

    there = job(tmp_path / "two", mirror.url, attempt=2)
    workshop = FarWorkshop()
    heard = pull_all(Attempt(there, lambda: workshop))
    assert workshop.began == 4, "where the other disk had left it"
    assert heard[-1].end is not None
    assert heard[-1].end.kind is EndKind.FINISHED
    assert heard[-1].counters["mirror_failures"] == 0
    assert (there.folder.parent / "1" / "samples.jsonl").read_text() == '{"step": 4}\n'
    assert mirror.whole() == ["2/end", "2/model"], "and no checkpoint of an ended trial"
    assert mirror.files() == [
        *(f"2/end/{name}" for name in ("ending.json", "samples.jsonl", "whole.json")),
        "2/model/model/model.safetensors",
        "2/model/whole.json",
    ]
    assert not (there.folder / "copying").exists()


def test_an_ending_that_nobody_heard_is_told_on_another_disk(file: Mirror, tmp_path: Path) -> None:
    pull_all(Attempt(job(tmp_path / "one", file.url), FarWorkshop))
    again = Copies(job(tmp_path / "two", file.url, attempt=2))
    (earlier,) = again.fetch()
    assert (earlier / "ending.json").is_file()
    assert (earlier / "model" / "model.safetensors").read_text() == "weights"
    assert not again.said()


def test_a_stage_has_one_attempt_and_goes_on_in_its_own_place(
    file: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stopped_after(file, tmp_path / "one", 4)
    workshop = FarWorkshop()
    pull_all(Attempt(job(tmp_path / "two", file.url), lambda: workshop))
    assert workshop.began == 4
    assert file.whole() == ["1/end", "1/model"]
    monkeypatch.setattr(Mirror, "put", lambda *_: pytest.fail("it is there already"))
    again = Copies(job(tmp_path / "three", file.url))
    assert again.fetch() == ()
    folder = job(tmp_path / "three", file.url).folder
    assert (folder / "ending.json").is_file()
    assert (folder / "model" / "model.safetensors").read_text() == "weights"
    again.begin()
    again.finish(End(EndKind.FINISHED, ""))
    assert not again.said()


def test_a_clone_that_has_no_checkpoint_of_its_own_finds_what_it_begins_from(file: Mirror, tmp_path: Path) -> None:
    disks = [dataclasses.replace(job(tmp_path / disk, file.url), fork=tmp_path / disk / "fork") for disk in "ab"]
    here, there = disks
    assert here.fork is not None
    assert there.fork is not None
    write_checkpoint(here.fork, 7)
    (here.fork / "samples.jsonl").write_text("answers until 7\n")
    here.folder.mkdir(parents=True)
    at_work = Copies(here)
    assert at_work.fetch() == ()
    at_work.begin()
    _wait(lambda: file.whole() == ["0/checkpoints/step-00000007"])
    at_work.leave(wanted=True)  # its machine is gone

    again = Copies(dataclasses.replace(there, attempt=2, folder=there.folder.parent / "2"))
    assert again.fetch() == ()
    check(places([there.fork])[0])
    assert (there.fork / "samples.jsonl").read_text() == "answers until 7\n"
    (there.folder.parent / "2").mkdir(parents=True)
    for step in (8, 9):
        write_checkpoint(there.folder.parent / "2", step)
        again._send_newest()
    assert file.whole() == ["2/checkpoints/step-00000008", "2/checkpoints/step-00000009"]
    assert not again.said()


def test_what_is_here_is_not_fetched_again(file: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stopped_after(file, tmp_path / "one", 3)
    monkeypatch.setattr(Mirror, "get", lambda *_: pytest.fail("nothing was to be fetched"))
    assert Copies(job(tmp_path / "one", file.url, attempt=2)).fetch() == (job(tmp_path / "one", file.url).folder,)


def test_a_damaged_one_here_is_replaced_by_the_good_one_there(file: Mirror, tmp_path: Path) -> None:
    _stopped_after(file, tmp_path / "one", 3)
    (place,) = places([job(tmp_path / "one", file.url).folder])
    (place / "weights.safetensors").write_text("other bytes")
    Copies(job(tmp_path / "one", file.url, attempt=2)).fetch()
    check(place)


def test_a_corrupted_copy_is_refused_and_the_older_one_taken(mirror: Mirror, tmp_path: Path) -> None:
    _stopped_after(mirror, tmp_path / "one", 4)
    name = "1/checkpoints/step-00000004/checkpoints/step-00000004/weights.safetensors"
    assert mirror.read(name) == b"weights.safetensors of 4"
    mirror.write(name, b"weights.safetensors of 5")
    again = Copies(job(tmp_path / "two", mirror.url, attempt=2))
    (earlier,) = again.fetch()
    assert [step_of(place) for place in places([earlier])] == [3]
    check(places([earlier])[0])
    (said,) = again.said()
    assert "a copy in the mirror is damaged and was passed over" in said
    assert "weights.safetensors differs from its digest" in said
    assert again.counters["mirror_failures"] == 1
    own = job(tmp_path / "two", mirror.url, attempt=2).folder
    own.mkdir(parents=True)
    write_checkpoint(own, 5)
    again._send_newest()
    assert "1/checkpoints/step-00000003" in mirror.whole(), "the damaged one is not counted among the two"


@pytest.mark.parametrize(
    ("end", "left"),
    [
        (End(EndKind.FAILED, "CUDA out of memory", failure=FailureKind.OUT_OF_MEMORY), ["1/checkpoints/step-00000001"]),
        (End(EndKind.FAILED, "ValueError", failure=FailureKind.BUG), []),
        (End(EndKind.NO_DISK, "full"), ["1/checkpoints/step-00000001"]),
        (End(EndKind.DIVERGED, "loss is nan"), ["1/end"]),
    ],
)
def test_what_an_end_leaves(end: End, left: list[str], file: Mirror, tmp_path: Path) -> None:
    """Out of memory is no end of the trial: it goes on with a smaller micro-batch, maybe elsewhere."""
    folder = job(tmp_path / "one", file.url).folder
    folder.mkdir(parents=True)
    write_checkpoint(folder, 1)
    (folder / "ending.json").write_text("{}")
    Copies(job(tmp_path / "one", file.url)).finish(end)
    assert file.whole() == left


def test_training_does_not_wait_for_copies(file: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, put, sent = threading.Event(), Mirror.put, []

    def waiting(self: Mirror, place: str, *more: object) -> None:
        if not place.endswith(("end", "model")):
            sent.append(place)
            held.wait(30)
        put(self, place, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Mirror, "put", waiting)

    def each(step: int) -> None:
        if step == 1:
            _wait(lambda: sent)  # on its way, and it stays on its way
        if step == STEPS:
            held.set()
            _wait(lambda: len(sent) == 2)

    workshop = FarWorkshop(each=each)
    heard = pull_all(Attempt(job(tmp_path / "one", file.url), lambda: workshop))
    assert sent == ["1/checkpoints/step-00000001", f"1/checkpoints/step-{STEPS:08d}"], (
        "the newest took the others' place"
    )
    assert [point.step for report in heard for point in report.points] == list(range(1, STEPS + 1))
    assert file.whole() == ["1/end", "1/model"]


def test_a_copy_that_fails_is_tried_again_counted_and_told(
    file: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failures = Mirror.put, iter([MirrorRefused("the bucket says AKIA-not-a-secret"), OSError(5, "Input/output")])

    def failing(self: Mirror, *arguments: object) -> None:
        for failure in failures:
            raise failure
        put(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setenv("SOME_TOKEN", "AKIA-not-a-secret")
    monkeypatch.setattr(Mirror, "put", failing)
    monkeypatch.setattr(mirror_upload, "_LONGEST_WAIT", 0.01)
    workshop = FarWorkshop(each=lambda step: _wait(file.whole) if step == STEPS else None)
    heard = pull_all(Attempt(job(tmp_path / "one", file.url), lambda: workshop))
    assert heard[-1].end is not None
    assert heard[-1].end.kind is EndKind.FINISHED
    assert heard[-1].counters["mirror_failures"] == 2
    said = [words for report in heard for words in report.said]
    assert said == [
        "a checkpoint was not copied to the mirror; tried again (the bucket says ***)",
        "copies to the mirror work again, after 2 failed in a row",
    ]


def test_a_mirror_that_never_answers_fails_no_trial(
    file: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MirrorRefused("503")

    for name in ("put", "whole"):
        monkeypatch.setattr(Mirror, name, refuse)
    monkeypatch.setattr(mirror_upload, "_LONGEST_WAIT", 0.01)
    attempt = Attempt(job(tmp_path / "one", file.url), FarWorkshop)
    attempt._copies = Copies(job(tmp_path / "one", file.url), waits=(0.0, 0.0))
    heard = pull_all(attempt)
    assert heard[-1].end is not None
    assert heard[-1].end.kind is EndKind.FINISHED
    said = [words for report in heard for words in report.said]
    assert said[0] == "what earlier attempts left was not fetched from the mirror, after 3 tries (503)"
    assert said[-1] == "what the trial left was not copied to the mirror, after 3 tries (503)"
    assert (tmp_path / "one" / "trials" / "0003" / "1" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("point", ["mirror.file:1", "mirror.file:7", "mirror.list:2", "mirror.whole:2"])
def test_a_worker_killed_inside_a_copy(point: str, s3: Server, tmp_path: Path) -> None:
    """Four files a copy: whichever it was killed in, the newest whole one is what another disk goes on from."""
    mirror = Mirror(f"{s3.url}/{tmp_path.name}/trials/0003")
    command = [sys.executable, far_help.__file__, str(tmp_path / "one"), mirror.url]
    killed = subprocess.run(command, env=os.environ | {VARIABLE: point}, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    whole = [int(name[-8:]) for name in mirror.whole()]
    workshop = FarWorkshop()
    heard = pull_all(Attempt(job(tmp_path / "two", mirror.url, attempt=2), lambda: workshop))
    assert workshop.began == max(whole, default=0)
    assert bool(whole) == (point in ("mirror.file:7", "mirror.list:2", "mirror.whole:2"))
    assert heard[-1].end is not None
    assert heard[-1].end.kind is EndKind.FINISHED
    assert mirror.whole() == ["2/end", "2/model"]
    assert not [name for name in mirror.files() if "checkpoints" in name], "nor what was half there"


def test_an_older_attempt_that_still_works_takes_nothing_from_the_newer(file: Mirror, tmp_path: Path) -> None:
    old, new = Copies(job(tmp_path / "one", file.url)), Copies(job(tmp_path / "two", file.url, attempt=2))
    folders = [job(tmp_path / "one", file.url).folder, job(tmp_path / "two", file.url, attempt=2).folder]
    for folder in folders:
        folder.mkdir(parents=True)
    old.begin()
    write_checkpoint(folders[0], 1)
    _wait(file.whole)
    new.fetch()
    new.begin()
    for step in (2, 3, 4):
        for folder in folders:
            write_checkpoint(folder, step)
        _wait(lambda step=step: all(f"{k}/checkpoints/step-{step:08d}" in file.whole() for k in (1, 2)))
    old.leave(wanted=True)
    new.finish(End(EndKind.RELEASED, ""))
    third = Copies(job(tmp_path / "three", file.url, attempt=3))
    assert [step_of(place) for place in places(third.fetch())] == [4]
    assert not third.said()


def test_a_trial_that_the_driver_ended_sends_nothing_more(file: Mirror, tmp_path: Path) -> None:
    at_work = Copies(job(tmp_path / "one", file.url))
    folder = job(tmp_path / "one", file.url).folder
    folder.mkdir(parents=True)
    at_work.begin()
    at_work.leave(wanted=False)
    at_work._thread.join(10)
    write_checkpoint(folder, 1)
    assert not at_work._thread.is_alive()
    with pytest.raises(mirror_store.Abandoned):
        at_work._send_newest()
    assert file.whole() == []


def test_a_server_that_fails_and_falls_silent(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.core.S3FileSystem, "retries", 1)
    short = {"connect_timeout": 1, "read_timeout": 1, "retries": {"max_attempts": 0}}
    monkeypatch.setitem(mirror_store._OPTIONS, "s3", {"config_kwargs": short})
    monkeypatch.setattr(mirror_upload, "_LONGEST_WAIT", 0.01)
    mirror = Mirror(f"{s3.url}/{tmp_path.name}/trials/0003")
    told: list[str] = []

    def each(step: int) -> None:
        if step == 2:
            s3.failing = True
            _wait(lambda: attempt._copies.counters["mirror_failures"] >= 1)  # type: ignore[union-attr]
            s3.failing = False
        if step == 4:
            before = attempt._copies.counters["mirror_failures"]  # type: ignore[union-attr]
            s3.silent = 3.0
            _wait(lambda: attempt._copies.counters["mirror_failures"] > before)  # type: ignore[union-attr]
            s3.silent = 0.0
        _slow(mirror)(step)

    workshop = FarWorkshop(each=each)
    attempt = Attempt(job(tmp_path / "one", mirror.url), lambda: workshop)
    heard = pull_all(attempt)
    told = [words for report in heard for words in report.said]
    assert heard[-1].end is not None
    assert heard[-1].end.kind is EndKind.FINISHED
    assert mirror.whole() == ["1/end", "1/model"]
    assert sum("tried again" in words for words in told) == 2
    assert sum("work again" in words for words in told) == 2
