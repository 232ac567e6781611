"""`MirrorUploader`: uploads one attempt's checkpoints and model to the mirror beside training, which never waits.

One upload runs at a time. A checkpoint written meanwhile waits, and a newer one replaces it; the files are pinned by
hard links, so the trainer may remove its own. The trial's two newest stay in the mirror. Only the end of an attempt
waits for its last upload. Failed uploads are retried, counted and reported.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue

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
"""Checkpoints of a trial that stay in the mirror: the newest, and one more should that be damaged."""
RETRY_WAITS = (1.0, 5.0, 20.0)
"""Seconds before the second, third and fourth try of what somebody waits for."""
_MAX_WAIT = 60.0
"""Seconds between tries of what nobody waits for."""
_POLL_SECONDS = 0.5
UPLOADING = "copying"
"""In the attempt's folder: second names of what is on its way."""
_FILES = ("ending.json", "samples.jsonl", "eval_pairs.safetensors", "trial.yaml", FAILURE_FILE)


class MirrorUploader:
    """Of the attempt that `job` names. `counters` and `take_notices` are for its reports."""

    def __init__(self, task: AttemptTask, waits: Sequence[float] = RETRY_WAITS) -> None:
        assert task.mirror is not None
        self._mirror, self._task, self._waits = Mirror(task.mirror), task, tuple(waits)
        self._counters: Counter[str] = Counter(mirror_copies=0, mirror_failures=0)
        self._notices: SimpleQueue[str] = SimpleQueue()
        self._mirrored: list[tuple[int, int]] = []
        self._result, self._is_cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    @property
    def counters(self) -> Mapping[str, int]:
        """Copies made and tries that failed."""
        return dict(self._counters)

    def take_notices(self) -> tuple[str, ...]:
        """What went wrong, and right again, since the last call."""
        return tuple(self._notices.get() for _ in range(self._notices.qsize()))

    def download_attempts(self) -> tuple[Path, ...]:
        """Bring what earlier attempts sent and this machine does not have; the folders to go on from."""
        # A disk of our own that is full is not the mirror's fault: OSError goes on to the trial.
        self._retry(
            "what earlier attempts left was not fetched from the mirror", self._download_attempts, (MirrorRefused,)
        )
        own = range(1, self._task.attempt)
        return tuple(folder for k, folder in attempt_folders(self._task).items() if k in own and folder.is_dir())

    def start(self) -> None:
        """Send checkpoints as they are written."""
        self._thread.start()

    def finish(self, result: AttemptResult) -> None:
        """This attempt has ended: send its checkpoint where the trial goes on, its files and model where it is done.

        Of a trial that failed the driver sends the files, once it has decided that this is the trial's end.
        """
        goes_on = (
            result.status in (AttemptStatus.RELEASED, AttemptStatus.NO_DISK)
            or result.failure is FailureKind.OUT_OF_MEMORY
        )
        if not goes_on:
            self._is_cancelled.set()
        self._stop()
        if goes_on:
            self._retry("the last checkpoint was not copied to the mirror", self._upload_newest)
        elif result.status is AttemptStatus.FAILED:
            return
        elif self._retry("what the trial left was not copied to the mirror", self._upload_result):
            self._retry("checkpoints of an ended trial are still in the mirror", self._clear)

    def cancel(self, *, is_wanted: bool) -> None:
        """No more copies, and where the trial is over a copy on its way is not `is_wanted`. Returns at once.

        What is in the mirror stays there: only the driver knows whether the trial has really ended.
        """
        if not is_wanted and not self._result.is_set():
            self._is_cancelled.set()
        self._result.set()

    # --- beside the training ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        failed = 0
        while not self._result.wait(min(_MAX_WAIT, 2.0 ** min(failed, 10)) if failed else _POLL_SECONDS):
            try:
                self._upload_newest()
            except UploadCancelled:
                continue
            except Exception as error:  # noqa: BLE001  the thread's boundary: told, and tried again
                failed += 1
                self._failed(error, "" if failed > 1 else "a checkpoint was not copied to the mirror; tried again")
            else:
                if failed:
                    self._notices.put(f"copies to the mirror work again, after {failed} failed in a row")
                failed = 0

    def _stop(self) -> None:
        self._result.set()
        if self._thread.is_alive():
            self._thread.join()

    def _retry(
        self, otherwise: str, do: Callable[[], None], failures: tuple[type[Exception], ...] = (MirrorRefused, OSError)
    ) -> bool:
        """Try, and try again for as long as somebody may wait; False, and told, where it was given up."""
        for wait in (*self._waits, None):
            try:
                do()
            except failures as error:
                self._failed(error, "" if wait is not None else f"{otherwise}, after {len(self._waits) + 1} tries")
                if wait is None:
                    return False
                time.sleep(wait)
            else:
                return True
        raise AssertionError("the last try has no wait")

    def _failed(self, reason: Exception, notice: str) -> None:
        self._counters["mirror_failures"] += 1
        if notice:
            self._notices.put(redact(f"{notice} ({reason if isinstance(reason, MirrorRefused) else repr(reason)})"))

    # --- what is copied --------------------------------------------------------------------------------------------

    def _download_attempts(self) -> None:
        self._mirrored = download_attempts(self._mirror, self._task, self._on_damaged)

    def _on_damaged(self, reason: str) -> None:
        self._counters["mirror_failures"] += 1
        self._notices.put(redact(f"a copy in the mirror is damaged and was passed over ({reason})"))

    def _upload_newest(self) -> None:
        """The newest good checkpoint of this attempt, where it is newer than what the mirror has; older ones go."""
        sent = max(self._mirrored, default=(-1, 0))[0]
        newest, attempt, source = _newest(self._task.folder), self._task.attempt, self._task.folder
        if newest is None and self._task.fork is not None:  # of a clone, what it begins from
            newest, attempt, source = _newest(self._task.fork), FORK_ATTEMPT, self._task.fork
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
            if self._is_cancelled.is_set():  # while its list was written
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
        """Not where the trial ended, nor where this attempt ends with a newer one."""
        if self._is_cancelled.is_set():
            return False
        newest = _newest(self._task.folder)
        return not (self._result.is_set() and newest is not None and checkpoint_manifest.checkpoint_step(newest) > step)

    def _upload_result(self) -> None:
        """The model first: an ending without one is none. What is there from an ending told once more stays."""
        there = self._mirror.complete_paths(str(self._task.attempt))
        for part, files in ((MODEL, model_files(self._task.folder)), (RESULT, result_files(self._task.folder))):
            mirror_path = f"{self._task.attempt}/{part}"
            if files and mirror_path not in there:
                self._mirror.put(mirror_path, files)
                self._counters["mirror_copies"] += 1

    def _clear(self) -> None:
        for attempt in range(FORK_ATTEMPT, self._task.attempt + 1):
            self._mirror.remove(f"{attempt}/{CHECKPOINTS}")
        self._mirrored = []


def result_files(folder: Path) -> dict[str, Path]:
    """The small files that an attempt has left in its folder."""
    return {name: folder / name for name in _FILES if (folder / name).is_file()}


def model_files(folder: Path) -> dict[str, Path]:
    """The final weights in an attempt's folder, with all that belongs to them."""
    return {f"{MODEL}/{name}": file for name, file in _files_below(folder / MODEL).items()}


def _files_below(folder: Path) -> dict[str, Path]:
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


def _newest(folder: Path) -> Path | None:
    """A run folder's newest checkpoint, good or not."""
    return next(iter(checkpoint_manifest.list_checkpoints([folder])), None)


def _hard_link(file: Path, to: Path) -> None:
    """Its content as it is now: the file is replaced, never changed."""
    try:
        os.link(file, to)
    except OSError:  # a file system without links
        shutil.copy2(file, to)
