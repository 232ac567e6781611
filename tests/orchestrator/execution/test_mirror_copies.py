"""A worker's copies: sent beside the training, fetched where a disk lacks them, never half and never damaged."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import mirror as mirror_store
from orchestrator.execution.messages import AttemptReport, AttemptResult, AttemptStatus
from orchestrator.execution.workers import mirror_upload
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.execution.workers.mirror_upload import MirrorUploader
from orchestrator.mirror import Mirror, MirrorRefused
from orchestrator.study.trial_records import FailureKind
from tests.support.fake_session import CheckpointingSession
from tests.support.mirrored_trial import copied, pull_all, task, write_checkpoint
from tests.support.processes import LIMIT_SECONDS, wait_until
from tests.support.s3_server import Server
from trainer.storage.checkpoint_manifest import checkpoint_step, list_checkpoints, verify_checkpoint
from trainer.storage.failpoints import FAILPOINT_VARIABLE

STEPS = CheckpointingSession.STEPS


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_upload, "_POLL_SECONDS", 0.01)


@pytest.fixture
def file(tmp_path: Path) -> Mirror:
    return Mirror(f"file://{tmp_path}/far/trials/0003")


def _attempt(
    disk: Path, mirror: Mirror, attempt: int = 1, each: Callable[[int], None] = lambda _: None
) -> tuple[CheckpointingSession, list[AttemptReport]]:
    """An attempt that saves a checkpoint at every update, to its end."""
    session = CheckpointingSession(save_steps=1, each=each)
    received = pull_all(AttemptRunner(task(disk, mirror.url, attempt), lambda: session))
    assert received[-1].result.status is AttemptStatus.FINISHED
    return session, received


def _stopped_after(mirror: Mirror, disk: Path, step: int, attempt: int = 1) -> CheckpointingSession:
    """An attempt that is asked to stop after this update, and ends."""
    requested = task(disk, mirror.url, attempt)

    def each(now: int) -> None:
        copied(mirror)(now)
        if now == step:
            requested.request_release()
            wait_until(lambda: session.requested)

    session = CheckpointingSession(save_steps=1, each=each)
    assert pull_all(AttemptRunner(requested, lambda: session))[-1].result.status is AttemptStatus.RELEASED  # type: ignore[union-attr]
    return session


def test_a_trial_goes_on_on_an_empty_disk(mirror: Mirror, tmp_path: Path) -> None:
    _stopped_after(mirror, tmp_path / "one", 4)
    assert mirror.complete_paths() == ["1/checkpoints/step-00000003", "1/checkpoints/step-00000004"]
    there = task(tmp_path / "two", mirror.url, attempt=2)
    session, received = _attempt(tmp_path / "two", mirror, attempt=2)
    assert session.began == 4, "where the other disk had left it"
    assert received[-1].counters["mirror_failures"] == 0
    assert (there.folder.parent / "1" / "samples.jsonl").read_text() == '{"seed": 42, "step": 4}\n'
    assert mirror.complete_paths() == ["2/end", "2/model"], "and no checkpoint of an ended trial"
    assert mirror.files() == [
        *(f"2/end/{name}" for name in ("ending.json", "samples.jsonl", "whole.json")),
        "2/model/model/model.safetensors",
        "2/model/whole.json",
    ]
    assert not (there.folder / "copying").exists()


def test_an_ending_that_nobody_heard_is_told_on_another_disk(file: Mirror, tmp_path: Path) -> None:
    _attempt(tmp_path / "one", file)
    again = MirrorUploader(task(tmp_path / "two", file.url, attempt=2))
    (earlier,) = again.download_attempts()
    assert (earlier / "ending.json").is_file()
    assert (earlier / "model" / "model.safetensors").is_file()
    assert not again.take_notices()


def test_a_stage_has_one_attempt_and_goes_on_in_its_own_place(
    file: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stopped_after(file, tmp_path / "one", 4)
    assert _attempt(tmp_path / "two", file)[0].began == 4
    assert file.complete_paths() == ["1/end", "1/model"]
    monkeypatch.setattr(Mirror, "put", lambda *_: pytest.fail("it is there already"))
    again = MirrorUploader(task(tmp_path / "three", file.url))
    assert again.download_attempts() == ()
    folder = task(tmp_path / "three", file.url).folder
    assert (folder / "ending.json").is_file()
    assert (folder / "model" / "model.safetensors").is_file()
    again.start()
    again.finish(AttemptResult(AttemptStatus.FINISHED, ""))
    assert not again.take_notices()


def test_a_clone_that_has_no_checkpoint_of_its_own_finds_what_it_begins_from(file: Mirror, tmp_path: Path) -> None:
    disks = [
        dataclasses.replace(task(tmp_path / disk, file.url), fork_folder=tmp_path / disk / "fork") for disk in "ab"
    ]
    here, there = disks
    write_checkpoint(here.fork_folder, 7)
    (here.fork_folder / "samples.jsonl").write_text("answers until 7\n")
    here.folder.mkdir(parents=True)
    at_work = MirrorUploader(here)
    assert at_work.download_attempts() == ()
    at_work.start()
    wait_until(lambda: file.complete_paths() == ["0/checkpoints/step-00000007"])
    at_work.cancel(finish_current=True)  # its machine is gone
    again = MirrorUploader(dataclasses.replace(there, attempt=2, folder=there.folder.parent / "2"))
    assert again.download_attempts() == ()
    verify_checkpoint(list_checkpoints([there.fork_folder])[0])
    assert (there.fork_folder / "samples.jsonl").read_text() == "answers until 7\n"
    (there.folder.parent / "2").mkdir(parents=True)
    for step in (8, 9):
        write_checkpoint(there.folder.parent / "2", step)
        again._upload_newest()
    assert file.complete_paths() == ["2/checkpoints/step-00000008", "2/checkpoints/step-00000009"]
    assert not again.take_notices()


def test_what_is_here_is_not_fetched_again(file: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stopped_after(file, tmp_path / "one", 3)
    monkeypatch.setattr(Mirror, "get", lambda *_: pytest.fail("nothing was to be fetched"))
    assert MirrorUploader(task(tmp_path / "one", file.url, attempt=2)).download_attempts() == (
        task(tmp_path / "one", file.url).folder,
    )


def test_a_damaged_one_here_is_replaced_by_the_good_one_there(file: Mirror, tmp_path: Path) -> None:
    _stopped_after(file, tmp_path / "one", 3)
    (path,) = list_checkpoints([task(tmp_path / "one", file.url).folder])
    (path / "weights.safetensors").write_text("other bytes")
    MirrorUploader(task(tmp_path / "one", file.url, attempt=2)).download_attempts()
    verify_checkpoint(path)


def test_a_corrupted_copy_is_refused_and_the_older_one_taken(mirror: Mirror, tmp_path: Path) -> None:
    _stopped_after(mirror, tmp_path / "one", 4)
    name = "1/checkpoints/step-00000004/checkpoints/step-00000004/weights.safetensors"
    mirror.write(name, b"weights.safetensors of 5")
    again = MirrorUploader(task(tmp_path / "two", mirror.url, attempt=2))
    (earlier,) = again.download_attempts()
    assert [checkpoint_step(path) for path in list_checkpoints([earlier])] == [3]
    verify_checkpoint(list_checkpoints([earlier])[0])
    (messages,) = again.take_notices()
    assert "a copy in the mirror is damaged and was skipped" in messages
    assert "weights.safetensors: differs from its digest" in messages
    assert again.counters["mirror_failures"] == 1
    own = task(tmp_path / "two", mirror.url, attempt=2).folder
    own.mkdir(parents=True)
    write_checkpoint(own, 5)
    again._upload_newest()
    assert "1/checkpoints/step-00000003" in mirror.complete_paths(), "the damaged one is not counted among the two"


@pytest.mark.parametrize(
    ("end", "left"),
    [
        (
            AttemptResult(AttemptStatus.FAILED, "CUDA out of memory", failure=FailureKind.OUT_OF_MEMORY),
            ["1/checkpoints/step-00000001"],
        ),
        (AttemptResult(AttemptStatus.FAILED, "ValueError", failure=FailureKind.BUG), []),
        (AttemptResult(AttemptStatus.NO_DISK, "full"), ["1/checkpoints/step-00000001"]),
        (AttemptResult(AttemptStatus.DIVERGED, "loss is nan"), ["1/end"]),
    ],
)
def test_what_an_end_leaves(end: AttemptResult, left: list[str], file: Mirror, tmp_path: Path) -> None:
    """Out of memory is no end of the trial: it goes on with a smaller micro-batch, maybe elsewhere."""
    folder = task(tmp_path / "one", file.url).folder
    folder.mkdir(parents=True)
    write_checkpoint(folder, 1)
    (folder / "ending.json").write_text("{}")
    MirrorUploader(task(tmp_path / "one", file.url)).finish(end)
    assert file.complete_paths() == left


def test_training_does_not_wait_for_copies(file: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_trial, put, sent = threading.Event(), Mirror.put, []

    def waiting(self: Mirror, path: str, *more: object) -> None:
        if not path.endswith(("end", "model")):
            sent.append(path)
            held_trial.wait(LIMIT_SECONDS)
        put(self, path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Mirror, "put", waiting)

    def each(step: int) -> None:
        if step == 1:
            wait_until(lambda: sent)  # on its way, and it stays on its way
        if step == STEPS:
            held_trial.set()
            wait_until(lambda: len(sent) == 2)

    _, received = _attempt(tmp_path / "one", file, each=each)
    assert sent == ["1/checkpoints/step-00000001", f"1/checkpoints/step-{STEPS:08d}"], (
        "the newest took the others' place"
    )
    assert [step_metrics.step for report in received for step_metrics in report.metrics] == list(range(STEPS + 1))
    assert file.complete_paths() == ["1/end", "1/model"]


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
    monkeypatch.setattr(mirror_upload, "_MAX_WAIT", 0.01)
    _, received = _attempt(
        tmp_path / "one", file, each=lambda s: wait_until(file.complete_paths) if s == STEPS else None
    )
    assert received[-1].counters["mirror_failures"] == 2
    messages = [words for report in received for words in report.notices]
    assert messages == [
        "a checkpoint was not copied to the mirror; retrying (the bucket says ***)",
        "copies to the mirror work again, after 2 failed in a row",
    ]


def test_a_mirror_that_never_answers_fails_no_trial(
    file: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MirrorRefused("503")

    for name in ("put", "complete_paths"):
        monkeypatch.setattr(Mirror, name, refuse)
    monkeypatch.setattr(mirror_upload, "_MAX_WAIT", 0.01)
    attempt = AttemptRunner(task(tmp_path / "one", file.url), lambda: CheckpointingSession(save_steps=1))
    attempt._uploader = MirrorUploader(task(tmp_path / "one", file.url), waits=(0.0, 0.0))
    received = pull_all(attempt)
    assert received[-1].result.status is AttemptStatus.FINISHED
    messages = [words for report in received for words in report.notices]
    assert messages[0] == "earlier attempts were not downloaded from the mirror, after 3 tries (503)"
    assert messages[-1] == "the trial's result was not copied to the mirror, after 3 tries (503)"
    assert (tmp_path / "one" / "trials" / "0003" / "1" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("point", ["mirror.file:1", "mirror.file:7", "mirror.list:2", "mirror.whole:2"])
def test_a_worker_killed_inside_a_copy(point: str, s3: Server, tmp_path: Path) -> None:
    """Four files a copy: whichever it was killed in, the newest whole one is what another disk goes on from."""
    mirror = Mirror(f"{s3.url}/{tmp_path.name}/trials/0003")
    command = [sys.executable, "-m", "tests.support.mirrored_trial", str(tmp_path / "one"), mirror.url]
    killed = subprocess.run(command, env=os.environ | {FAILPOINT_VARIABLE: point}, check=False, timeout=LIMIT_SECONDS)
    assert killed.returncode == -signal.SIGKILL
    complete = [int(name[-8:]) for name in mirror.complete_paths()]
    assert _attempt(tmp_path / "two", mirror, attempt=2)[0].began == max(complete, default=0)
    assert bool(complete) == (point in ("mirror.file:7", "mirror.list:2", "mirror.whole:2"))
    assert mirror.complete_paths() == ["2/end", "2/model"]
    assert not [name for name in mirror.files() if "checkpoints" in name], "nor what was half there"


def test_an_older_attempt_that_still_works_takes_nothing_from_the_newer(file: Mirror, tmp_path: Path) -> None:
    tasks = [task(tmp_path / "one", file.url), task(tmp_path / "two", file.url, attempt=2)]
    (old, new), folders = map(MirrorUploader, tasks), [each.folder for each in tasks]
    for folder in folders:
        folder.mkdir(parents=True)
    old.start()
    write_checkpoint(folders[0], 1)
    wait_until(file.complete_paths)
    new.download_attempts()
    new.start()
    for step in (2, 3, 4):
        for folder in folders:
            write_checkpoint(folder, step)
        wait_until(lambda step=step: all(f"{k}/checkpoints/step-{step:08d}" in file.complete_paths() for k in (1, 2)))
    old.cancel(finish_current=True)
    new.finish(AttemptResult(AttemptStatus.RELEASED, ""))
    third = MirrorUploader(task(tmp_path / "three", file.url, attempt=3))
    assert [checkpoint_step(path) for path in list_checkpoints(third.download_attempts())] == [4]
    assert not third.take_notices()


def test_a_trial_that_the_driver_ended_sends_nothing_more(file: Mirror, tmp_path: Path) -> None:
    at_work = MirrorUploader(task(tmp_path / "one", file.url))
    folder = task(tmp_path / "one", file.url).folder
    folder.mkdir(parents=True)
    at_work.start()
    at_work.cancel(finish_current=False)
    at_work._thread.join(LIMIT_SECONDS)
    write_checkpoint(folder, 1)
    assert not at_work._thread.is_alive()
    with pytest.raises(mirror_store.UploadCancelled):
        at_work._upload_newest()
    assert file.complete_paths() == []


def test_a_server_that_fails_and_falls_silent(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.core.S3FileSystem, "retries", 1)
    short = {"connect_timeout": 2, "read_timeout": 2, "retries": {"max_attempts": 0}}
    monkeypatch.setitem(mirror_store._OPTIONS, "s3", {"config_kwargs": short})
    monkeypatch.setattr(mirror_upload, "_MAX_WAIT", 0.01)
    mirror = Mirror(f"{s3.url}/{tmp_path.name}/trials/0003")

    def each(step: int) -> None:
        if step == 2:
            s3.failing = True
            wait_until(lambda: attempt._uploader.counters["mirror_failures"] >= 1)  # type: ignore[union-attr]
            s3.failing = False
        if step == 4:
            before = attempt._uploader.counters["mirror_failures"]  # type: ignore[union-attr]
            s3.speaks.clear()
            wait_until(lambda: attempt._uploader.counters["mirror_failures"] > before)  # type: ignore[union-attr]
            s3.speaks.set()
        copied(mirror)(step)

    session = CheckpointingSession(save_steps=1, each=each)
    attempt = AttemptRunner(task(tmp_path / "one", mirror.url), lambda: session)
    received = pull_all(attempt)
    logged = [words for report in received for words in report.notices]
    assert received[-1].result.status is AttemptStatus.FINISHED
    assert mirror.complete_paths() == ["1/end", "1/model"]
    failed, mended = (sum(words in line for line in logged) for words in ("; retrying", "work again"))
    assert failed == mended >= 2, "each series once; a busy machine may be silent for as long by itself"
