"""`MirrorUploader`: uploads one attempt's checkpoints and model to the mirror in a thread during training.

One upload runs at a time; the newest checkpoint is uploaded next. Files are pinned by hard links, so that the trainer
can remove its own. The trial's two newest checkpoints stay in the mirror. Only the end of an attempt waits for its last
upload. Failed uploads are retried, counted and reported.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue

from orchestrator.call_retries import retrying
from orchestrator.execution.messages import AttemptResult, AttemptStatus, AttemptTask
from orchestrator.execution.workers.mirror_download import (
    FORK_ATTEMPT,
    attempt_folders,
    checkpoint_mirror_path,
    download_attempts,
)
from orchestrator.folders import FAILURE_FILE
from orchestrator.mirror import CHECKPOINTS, MODEL, RESULT, Mirror, MirrorRefused, UploadCancelled
from orchestrator.redaction import redact
from orchestrator.study.trial_records import FailureKind
from trainer.storage import checkpoint_manifest

CHECKPOINTS_KEPT = 2
"""Checkpoints of a trial in the mirror: the newest, and one in case that is damaged."""
RETRY_WAITS = (1.0, 5.0, 20.0)
"""Seconds before the second, third and fourth try at the start and end of an attempt."""
_MAX_WAIT = 60.0
"""Seconds. Maximum between tries in the background."""
_POLL_SECONDS = 0.5
UPLOADING = "copying"
"""Folder in the attempt's folder with hard links to the files that are being uploaded."""
_FILES = ("ending.json", "samples.jsonl", "eval_pairs.safetensors", "trial.yaml", FAILURE_FILE)


class MirrorUploader:
    """Uploader of the attempt `task`. `counters` and `take_notices` are sent with its reports."""

    def __init__(self, task: AttemptTask, waits: Sequence[float] = RETRY_WAITS) -> None:
        assert task.mirror is not None
        self._mirror, self._task, self._waits = Mirror(task.mirror), task, tuple(waits)
        self._counters: Counter[str] = Counter(mirror_copies=0, mirror_failures=0)
        self._notices: SimpleQueue[str] = SimpleQueue()
        self._mirrored: list[tuple[int, int]] = []
        self._attempt_ended, self._is_cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    @property
    def counters(self) -> Mapping[str, int]:
        """Numbers of uploads and of failed tries."""
        return dict(self._counters)

    def take_notices(self) -> tuple[str, ...]:
        """Return messages about failures and recoveries since the last call."""
        return tuple(self._notices.get() for _ in range(self._notices.qsize()))

    def download_attempts(self) -> tuple[Path, ...]:
        """Download earlier attempts that this machine lacks; return their folders."""
        # Only MirrorRefused is retried: an OSError of the local disk must reach the trial.
        self._retry("earlier attempts were not downloaded from the mirror", self._download_attempts, (MirrorRefused,))
        own = range(1, self._task.attempt)
        return tuple(folder for k, folder in attempt_folders(self._task).items() if k in own and folder.is_dir())

    def start(self) -> None:
        """Start uploading checkpoints as they are written."""
        self._thread.start()

    def finish(self, result: AttemptResult) -> None:
        """Upload the last checkpoint of a trial that will continue, or files and model of a finished one.

        The files of a failed trial are uploaded by the driver, which decides whether to retry it.
        """
        will_continue = (
            result.status in (AttemptStatus.RELEASED, AttemptStatus.NO_DISK)
            or result.failure is FailureKind.OUT_OF_MEMORY
        )
        if not will_continue:
            self._is_cancelled.set()
        self._stop()
        if will_continue:
            self._retry("the last checkpoint was not copied to the mirror", self._upload_newest)
        elif result.status is AttemptStatus.FAILED:
            return
        elif self._retry("the trial's result was not copied to the mirror", self._upload_result):
            self._retry("checkpoints of an ended trial are still in the mirror", self._clear)

    def cancel(self, *, finish_current: bool) -> None:
        """Start no more uploads; returns at once. `is_wanted`: let the current upload finish, for a trial that
        continues.

        Files in the mirror are kept, as only the driver knows whether the trial has ended.
        """
        if not finish_current and not self._attempt_ended.is_set():
            self._is_cancelled.set()
        self._attempt_ended.set()

    # --- thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failed = 0
        while not self._attempt_ended.wait(min(_MAX_WAIT, 2.0 ** min(failed, 10)) if failed else _POLL_SECONDS):
            try:
                self._upload_newest()
            except UploadCancelled:
                continue
            except Exception as error:  # noqa: BLE001 - reported, and tried again
                failed += 1
                self._failed(error, "" if failed > 1 else "a checkpoint was not copied to the mirror; retrying")
            else:
                if failed:
                    self._notices.put(f"copies to the mirror work again, after {failed} failed in a row")
                failed = 0

    def _stop(self) -> None:
        self._attempt_ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _retry(
        self, otherwise: str, do: Callable[[], None], failures: tuple[type[Exception], ...] = (MirrorRefused, OSError)
    ) -> bool:
        """Run `do` with retries; report `otherwise` and return False after the last failure."""
        try:
            retrying(self._waits, failures, on_retry=lambda error: self._failed(error, ""))(do)
        except failures as error:
            self._failed(error, f"{otherwise}, after {len(self._waits) + 1} tries")
            return False
        return True

    def _failed(self, reason: BaseException, notice: str) -> None:
        self._counters["mirror_failures"] += 1
        if notice:
            self._notices.put(redact(f"{notice} ({reason if isinstance(reason, MirrorRefused) else repr(reason)})"))

    # --- transfers -------------------------------------------------------------------------------------------------

    def _download_attempts(self) -> None:
        self._mirrored = download_attempts(self._mirror, self._task, self._on_damaged)

    def _on_damaged(self, reason: str) -> None:
        self._counters["mirror_failures"] += 1
        self._notices.put(redact(f"a copy in the mirror is damaged and was skipped ({reason})"))

    def _upload_newest(self) -> None:
        """Upload the newest valid checkpoint if it is newer than the mirror's, and remove old ones there."""
        sent = max(self._mirrored, default=(-1, 0))[0]
        newest, attempt, source = _newest(self._task.folder), self._task.attempt, self._task.folder
        if newest is None and self._task.fork_folder is not None:  # a clone's start checkpoint
            newest, attempt, source = _newest(self._task.fork_folder), FORK_ATTEMPT, self._task.fork_folder
        if newest is None or checkpoint_manifest.checkpoint_step(newest) <= sent:
            return
        temporary = self._task.folder / UPLOADING
        try:
            step, _ = checkpoint_manifest.pin_checkpoint([source], temporary)
            if step is None or step <= sent:
                return
            samples = source / "samples.jsonl"
            if samples.is_file():
                _hard_link(samples, temporary / samples.name)
            mirror_path = checkpoint_mirror_path(step, attempt)
            self._mirror.put(mirror_path, _files_below(temporary), lambda: self._is_wanted(step))
            if self._is_cancelled.is_set():  # cancelled while the manifest was written
                self._mirror.remove(mirror_path)
                raise UploadCancelled
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._counters["mirror_copies"] += 1
        self._mirrored = sorted([*self._mirrored, (step, attempt)])
        while len(self._mirrored) > CHECKPOINTS_KEPT:
            self._mirror.remove(checkpoint_mirror_path(*self._mirrored[0]))
            self._mirrored.pop(0)

    def _is_wanted(self, step: int) -> bool:
        """Return False where the trial has ended, or this attempt has ended with a newer checkpoint."""
        if self._is_cancelled.is_set():
            return False
        newest = _newest(self._task.folder)
        return not (
            self._attempt_ended.is_set() and newest is not None and checkpoint_manifest.checkpoint_step(newest) > step
        )

    def _upload_result(self) -> None:
        """Upload the model, then the result, which is incomplete without it; existing ones are kept."""
        existing = self._mirror.complete_paths(str(self._task.attempt))
        for part, files in ((MODEL, model_files(self._task.folder)), (RESULT, result_files(self._task.folder))):
            mirror_path = f"{self._task.attempt}/{part}"
            if files and mirror_path not in existing:
                self._mirror.put(mirror_path, files)
                self._counters["mirror_copies"] += 1

    def _clear(self) -> None:
        for attempt in range(FORK_ATTEMPT, self._task.attempt + 1):
            self._mirror.remove(f"{attempt}/{CHECKPOINTS}")
        self._mirrored = []


def result_files(folder: Path) -> dict[str, Path]:
    """Return the existing result files of an attempt by name."""
    return {name: folder / name for name in _FILES if (folder / name).is_file()}


def model_files(folder: Path) -> dict[str, Path]:
    """Return the files of an attempt's final model by path relative to the attempt's folder."""
    return {f"{MODEL}/{name}": file for name, file in _files_below(folder / MODEL).items()}


def _files_below(folder: Path) -> dict[str, Path]:
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


def _newest(folder: Path) -> Path | None:
    """Return a run folder's newest checkpoint, valid or not."""
    return next(iter(checkpoint_manifest.list_checkpoints([folder])), None)


def _hard_link(file: Path, to: Path) -> None:
    """Link the file, whose content is never changed in place."""
    try:
        os.link(file, to)
    except OSError:  # a file system without links
        shutil.copy2(file, to)
