"""The sweep's mirror as its driver keeps it: what a new disk lacks is brought, what retention removes here goes there.

Checkpoints and final models are sent by the workers that made them (engine/copies.py).
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from orchestrator.driver.checkpoint_retention import best_of, model_of
from orchestrator.errors import StorageRefused, SweepHeld
from orchestrator.execution.messages import MIRROR
from orchestrator.execution.workers.mirror_download import FORK, bring_end
from orchestrator.execution.workers.mirror_upload import WAITS, end_files, model_files
from orchestrator.folders import DATA_FILE, SweepFolder
from orchestrator.interfaces import View
from orchestrator.mirror import CHECKPOINTS, END, MODEL, SPEC, STUDY, TRIALS, Mirror, MirrorError, of_sweep
from orchestrator.redaction import redact
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState

_AT_ONCE = 8
"""Trials whose files are fetched side by side."""
_LAST_SECONDS = 600.0
"""For what is left to do when all trials have ended."""
_HURRY_SECONDS = 20.0
"""For the same when the sweep goes on later, perhaps because the machine is wanted back."""
_PLACE = re.compile(rf"{TRIALS}/(\d+)/(\d+)/({CHECKPOINTS}|{MODEL}|{END})(?:/|$)")


def take_place(study: Study) -> None:
    """Have the sweep's own files in its mirror, so that a new disk can go on. MirrorError where another's are there."""
    if study.spec.mirror is None:
        return
    sweep, folder = of_sweep(study.spec.mirror, study.spec.name), study.folder
    there = sweep.read(STUDY)
    if there is not None and there.decode() != study.id:
        raise MirrorError(
            f"mirror: another sweep named {study.spec.name!r} has its copies in {sweep.url}; remove them, or give "
            "another --name or mirror"
        )
    sweep.write(STUDY, study.id.encode())
    for name, file in ((DATA_FILE, folder.path / DATA_FILE), (SPEC, folder.spec)):
        sweep.write(name, file.read_bytes())


@contextmanager
def keeping(study: Study, view: View) -> Generator[Upkeep | None]:
    """The mirror looked after while trials run; None where the sweep has none."""
    if study.spec.mirror is None:
        yield None
        return
    upkeep = Upkeep(study, view)
    upkeep.restore()
    try:
        yield upkeep
    finally:
        upkeep.end()


class Upkeep:
    """What is asked is done by a thread, in order; what failed is told at the next call."""

    def __init__(self, study: Study, view: View, waits: Sequence[float] = WAITS) -> None:
        assert study.spec.mirror is not None
        self._study, self._view, self._waits = study, view, tuple(waits)
        self._mirror = of_sweep(study.spec.mirror, study.spec.name)
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._troubles: SimpleQueue[str] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def restore(self) -> None:
        """What ended trials left and this disk lacks, for the report and for who is best; then both sides agree."""
        spec, folder, trials = self._study.spec, self._study.folder, self._study.trials()
        best = {record.number for record in best_of(spec, trials)}
        whole = self._mirror.whole(TRIALS)
        missing = [record for record in trials if record.state.finished and _lacks(folder, record, best)]
        if missing:
            self._view.stage(f"fetching what {len(missing)} trials left from {self._mirror.url}")
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                found = list(pool.map(functools.partial(_bring, self._mirror, folder, whole, best), missing))
            self._view.say(f"mirror: what {sum(found)} of {len(missing)} ended trials left was fetched")
        self._agree(trials, spec, folder)

    def removed(self, record: TrialRecord, model: bool) -> None:
        """This ended trial's checkpoints went, and its final weights where `model` says so."""
        places = [f"{TRIALS}/{record.number:04d}/{attempt}" for attempt in range(FORK, record.attempts + 1)]
        self._queue.put(lambda: self._remove(places, model))
        if record.state is not TrialState.COMPLETE:
            folder = self._study.folder
            self._queue.put(lambda: self._send_end(folder, record))
        self._tell()

    def end(self) -> None:
        """Do what is left, for a while; both sides agree then. The next driver does the rest: all of it, where it has
        taken over already."""
        if self._is_fenced():
            self._queue.put(None)
            return
        trials = self._study.trials()
        self._agree(trials, self._study.spec, self._study.folder)
        self._queue.put(None)
        self._view.stage("tidying up the mirror")
        over = all(record.state.finished for record in trials)
        self._thread.join(_LAST_SECONDS if over else _HURRY_SECONDS)
        if self._thread.is_alive():
            self._closing.set()
            self._troubles.put("not everything was done before the sweep's end; the next resume does it")
        self._tell()

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            if self._is_fenced():
                return  # the copies are the newer driver's to look after
            for wait in (*self._waits, None):
                try:
                    task()
                except Exception as why:  # noqa: BLE001  the thread's boundary: told, and the next task is done
                    if wait is None or self._closing.wait(wait):
                        self._troubles.put(redact(f"given up after {len(self._waits) + 1} tries: {why}"))
                        break
                else:
                    break

    def _is_fenced(self) -> bool:
        try:
            self._study.check_fence()
        except SweepHeld:
            return True
        except StorageRefused:
            return self._study.fenced  # the driver's own writes will say so
        return False

    def _tell(self) -> None:
        for _ in range(self._troubles.qsize()):
            said = self._troubles.get()
            self._study.note(MIRROR, said)
            self._view.say(f"mirror: {said}")

    def _agree(self, trials: Sequence[TrialRecord], spec: SweepSpec, folder: SweepFolder) -> None:
        ended = {record.number: record for record in trials if record.state.finished}
        best = {record.number for record in best_of(spec, trials)}
        self._queue.put(lambda: self._reconcile(ended, best, folder))

    def _reconcile(self, ended: dict[int, TrialRecord], best: set[int], folder: SweepFolder) -> None:
        """Remove what no ended trial keeps, also what is only half there; send what was not."""
        there: set[str] = set()
        for file in self._mirror.files(TRIALS):
            if (match := _PLACE.match(file)) is not None and int(match[1]) in ended:
                there.add(match[0].rstrip("/"))
        for place in sorted(there):
            match = _PLACE.match(place)
            assert match is not None
            if match[3] == CHECKPOINTS or (match[3] == MODEL and int(match[1]) not in best):
                self._mirror.remove(place)
        whole = set(self._mirror.whole(TRIALS))
        for number, record in ended.items():
            model = model_of(folder, record) if number in best else None
            if model is not None and f"{TRIALS}/{number:04d}/{model.parent.name}/{MODEL}" not in whole:
                self._mirror.put(f"{TRIALS}/{number:04d}/{model.parent.name}/{MODEL}", model_files(model.parent))
            if not any(f"{TRIALS}/{number:04d}/{k}/{END}" in whole for k in range(1, record.attempts + 1)):
                self._send_end(folder, record)

    def _remove(self, places: Sequence[str], model: bool) -> None:
        for place in places:
            self._mirror.remove(f"{place}/{CHECKPOINTS}")
            if model:
                self._mirror.remove(f"{place}/{MODEL}")

    def _send_end(self, folder: SweepFolder, record: TrialRecord) -> None:
        files = end_files(folder.attempt(record.number, record.attempts))
        if files:
            self._mirror.put(f"{TRIALS}/{record.number:04d}/{record.attempts}/{END}", files)


def _lacks(folder: SweepFolder, record: TrialRecord, best: set[int]) -> bool:
    if record.number in best and model_of(folder, record) is None:
        return True
    return not any(end_files(folder.attempt(record.number, k)) for k in range(1, record.attempts + 1))


def _bring(mirror: Mirror, folder: SweepFolder, whole: Sequence[str], best: set[int], record: TrialRecord) -> bool:
    """From the newest attempt that left something; whether there was one."""
    trial = f"{TRIALS}/{record.number:04d}"
    for attempt in range(record.attempts, 0, -1):
        if f"{trial}/{attempt}/{END}" in whole:
            wants = record.number in best and f"{trial}/{attempt}/{MODEL}" in whole
            to: Path = folder.attempt(record.number, attempt)
            return bring_end(mirror.under(trial), attempt, to, model=wants)
    return False
