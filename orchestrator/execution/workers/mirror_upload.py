"""One attempt's copies in the sweep's mirror, made beside the training, which never waits for them.

One copy is in flight at a time. A checkpoint that is written meanwhile waits, and a newer one takes its place; the
files are held by a second name, so the trainer may remove its own. The trial's two newest stay in the mirror. Only
the end of an attempt waits for its last copy. What fails is tried again, counted and told.
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

from orchestrator.execution.messages import End, EndKind, Job
from orchestrator.execution.workers.mirror_download import FORK, attempts_of, checkpoint_place, fetch
from orchestrator.folders import FAILURE_FILE
from orchestrator.mirror import CHECKPOINTS, END, MODEL, Abandoned, Mirror, MirrorRefused
from orchestrator.redaction import redact
from orchestrator.study.trial_records import FailureKind
from trainer.storage import checkpoint_manifest

KEPT = 2
"""Checkpoints of a trial that stay in the mirror: the newest, and one more should that be damaged."""
WAITS = (1.0, 5.0, 20.0)
"""Seconds before the second, third and fourth try of what somebody waits for."""
_LONGEST_WAIT = 60.0
"""Seconds between tries of what nobody waits for."""
_LOOK_SECONDS = 0.5
COPYING = "copying"
"""In the attempt's folder: second names of what is on its way."""
_FILES = ("ending.json", "samples.jsonl", "eval_pairs.safetensors", "trial.yaml", FAILURE_FILE)


class Copies:
    """Of the attempt that `job` names. `counters` and `said` are for its reports."""

    def __init__(self, job: Job, waits: Sequence[float] = WAITS) -> None:
        assert job.mirror is not None
        self._mirror, self._job, self._waits = Mirror(job.mirror), job, tuple(waits)
        self._counted: Counter[str] = Counter(mirror_copies=0, mirror_failures=0)
        self._said: SimpleQueue[str] = SimpleQueue()
        self._there: list[tuple[int, int]] = []
        self._over, self._unwanted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    @property
    def counters(self) -> Mapping[str, int]:
        """Copies made and tries that failed."""
        return dict(self._counted)

    def said(self) -> tuple[str, ...]:
        """What went wrong, and right again, since the last call."""
        return tuple(self._said.get() for _ in range(self._said.qsize()))

    def fetch(self) -> tuple[Path, ...]:
        """Bring what earlier attempts sent and this machine does not have; the folders to go on from."""
        # A disk of our own that is full is not the mirror's fault: OSError goes on to the trial.
        self._patiently("what earlier attempts left was not fetched from the mirror", self._fetch, (MirrorRefused,))
        own = range(1, self._job.attempt)
        return tuple(folder for k, folder in attempts_of(self._job).items() if k in own and folder.is_dir())

    def begin(self) -> None:
        """Send checkpoints as they are written."""
        self._thread.start()

    def finish(self, end: End) -> None:
        """This attempt has ended: send its checkpoint where the trial goes on, its files and model where it is done.

        Of a trial that failed the driver sends the files, once it has decided that this is the trial's end.
        """
        goes_on = end.kind in (EndKind.RELEASED, EndKind.NO_DISK) or end.failure is FailureKind.OUT_OF_MEMORY
        if not goes_on:
            self._unwanted.set()
        self._stop()
        if goes_on:
            self._patiently("the last checkpoint was not copied to the mirror", self._send_newest)
        elif end.kind is EndKind.FAILED:
            return
        elif self._patiently("what the trial left was not copied to the mirror", self._send_end):
            self._patiently("checkpoints of an ended trial are still in the mirror", self._clear)

    def leave(self, *, wanted: bool) -> None:
        """No more copies, and where the trial is over a copy on its way is not `wanted`. Returns at once.

        What is in the mirror stays there: only the driver knows whether the trial has really ended.
        """
        if not wanted and not self._over.is_set():
            self._unwanted.set()
        self._over.set()

    # --- beside the training ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        failed = 0
        while not self._over.wait(min(_LONGEST_WAIT, 2.0 ** min(failed, 10)) if failed else _LOOK_SECONDS):
            try:
                self._send_newest()
            except Abandoned:
                continue
            except Exception as why:  # noqa: BLE001  the thread's boundary: told, and tried again
                failed += 1
                self._failed(why, "" if failed > 1 else "a checkpoint was not copied to the mirror; tried again")
            else:
                if failed:
                    self._said.put(f"copies to the mirror work again, after {failed} failed in a row")
                failed = 0

    def _stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _patiently(
        self, otherwise: str, do: Callable[[], None], failures: tuple[type[Exception], ...] = (MirrorRefused, OSError)
    ) -> bool:
        """Try, and try again for as long as somebody may wait; False, and told, where it was given up."""
        for wait in (*self._waits, None):
            try:
                do()
            except failures as why:
                self._failed(why, "" if wait is not None else f"{otherwise}, after {len(self._waits) + 1} tries")
                if wait is None:
                    return False
                time.sleep(wait)
            else:
                return True
        raise AssertionError("the last try has no wait")

    def _failed(self, why: Exception, told: str) -> None:
        self._counted["mirror_failures"] += 1
        if told:
            self._said.put(redact(f"{told} ({why if isinstance(why, MirrorRefused) else repr(why)})"))

    # --- what is copied --------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        self._there = fetch(self._mirror, self._job, self._damaged)

    def _damaged(self, why: str) -> None:
        self._counted["mirror_failures"] += 1
        self._said.put(redact(f"a copy in the mirror is damaged and was passed over ({why})"))

    def _send_newest(self) -> None:
        """The newest good checkpoint of this attempt, where it is newer than what the mirror has; older ones go."""
        sent = max(self._there, default=(-1, 0))[0]
        newest, attempt, source = _newest(self._job.folder), self._job.attempt, self._job.folder
        if newest is None and self._job.fork is not None:  # of a clone, what it begins from
            newest, attempt, source = _newest(self._job.fork), FORK, self._job.fork
        if newest is None or checkpoint_manifest.step_of(newest) <= sent:
            return
        aside = self._job.folder / COPYING
        try:
            step, _ = checkpoint_manifest.pin([source], aside)
            if step is None or step <= sent:
                return
            samples = source / "samples.jsonl"
            if samples.is_file():
                _second_name(samples, aside / samples.name)
            place = checkpoint_place(step, attempt)
            self._mirror.put(place, _below(aside), lambda: self._wants(step))
            if self._unwanted.is_set():  # while its list was written
                self._mirror.remove(place)
                raise Abandoned
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._counted["mirror_copies"] += 1
        self._there = sorted([*self._there, (step, attempt)])
        while len(self._there) > KEPT:
            self._mirror.remove(checkpoint_place(*self._there[0]))
            self._there.pop(0)

    def _wants(self, step: int) -> bool:
        """Not where the trial ended, nor where this attempt ends with a newer one."""
        if self._unwanted.is_set():
            return False
        newest = _newest(self._job.folder)
        return not (self._over.is_set() and newest is not None and checkpoint_manifest.step_of(newest) > step)

    def _send_end(self) -> None:
        """The model first: an ending without one is none. What is there from an ending told once more stays."""
        there = self._mirror.whole(str(self._job.attempt))
        for part, files in ((MODEL, model_files(self._job.folder)), (END, end_files(self._job.folder))):
            place = f"{self._job.attempt}/{part}"
            if files and place not in there:
                self._mirror.put(place, files)
                self._counted["mirror_copies"] += 1

    def _clear(self) -> None:
        for attempt in range(FORK, self._job.attempt + 1):
            self._mirror.remove(f"{attempt}/{CHECKPOINTS}")
        self._there = []


def end_files(folder: Path) -> dict[str, Path]:
    """The small files that an attempt has left in its folder."""
    return {name: folder / name for name in _FILES if (folder / name).is_file()}


def model_files(folder: Path) -> dict[str, Path]:
    """The final weights in an attempt's folder, with all that belongs to them."""
    return {f"{MODEL}/{name}": file for name, file in _below(folder / MODEL).items()}


def _below(folder: Path) -> dict[str, Path]:
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


def _newest(folder: Path) -> Path | None:
    """A run folder's newest checkpoint, good or not."""
    return next(iter(checkpoint_manifest.places([folder])), None)


def _second_name(file: Path, to: Path) -> None:
    """Its content as it is now: the file is replaced, never changed."""
    try:
        os.link(file, to)
    except OSError:  # a file system without links
        shutil.copy2(file, to)
