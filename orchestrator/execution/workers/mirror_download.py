"""What earlier attempts at a trial left in the mirror and this machine does not have, brought here before it trains."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from orchestrator.execution.messages import Job
from orchestrator.mirror import CHECKPOINTS, END, MODEL, Mirror, MirrorDamaged
from trainer.storage import checkpoint_manifest
from trainer.storage.checkpoint_manifest import DamagedError

log = logging.getLogger(__name__)

_CHECKPOINT = re.compile(rf"(\d+)/{CHECKPOINTS}/step-(\d{{8}})")
_LAST = (CHECKPOINTS, "ending.json")
"""What gives the rest its meaning comes last."""


FORK = 0
"""Another trial's checkpoint that this one goes on from is in the mirror as if it were of an attempt before all."""


def attempts_of(job: Job) -> dict[int, Path]:
    """The folder of each attempt up to this one, and of the checkpoint that a clone begins from."""
    fork = {} if job.fork is None else {FORK: job.fork}
    return fork | {k: job.folder.parent / str(k) for k in range(1, job.attempt)} | {job.attempt: job.folder}


def fetch(mirror: Mirror, job: Job, damaged: Callable[[str], None]) -> list[tuple[int, int]]:
    """Bring endings, and the newest whole checkpoint that is newer than any here.

    `damaged` is told of each copy that is not what was sent, and an older one is taken. Gives the checkpoints that are
    in the mirror and not found damaged, by update and attempt.
    """
    folders = attempts_of(job)
    whole = mirror.whole()
    ended = False
    for attempt, folder in folders.items():
        if f"{attempt}/{END}" in whole and not (folder / "ending.json").is_file():
            ended |= _bring_end(mirror, attempt, folder, damaged)
    there = sorted((int(m[2]), int(m[1])) for name in whole if (m := _CHECKPOINT.fullmatch(name)))
    if not ended:
        here = _newest_here(folders.values())
        for step, attempt in there[::-1]:
            if step <= here or attempt not in folders:
                continue
            if _bring(mirror, checkpoint_place(step, attempt), folders[attempt], damaged):
                log.info("checkpoint of update %d fetched from %s", step, mirror.url)
                break
            there.remove((step, attempt))
    return there


def checkpoint_place(step: int, attempt: int) -> str:
    """Where a checkpoint is in its trial's mirror."""
    return f"{attempt}/{CHECKPOINTS}/step-{step:08d}"


def bring_end(mirror: Mirror, attempt: int, folder: Path, *, model: bool) -> bool:
    """The files that an attempt left, and its model where asked for; False where nothing is, or not whole."""
    told: list[str] = []
    if not _bring(mirror, f"{attempt}/{END}", folder, told.append):
        return False
    return not model or _bring(mirror, f"{attempt}/{MODEL}", folder, told.append)


def _bring_end(mirror: Mirror, attempt: int, folder: Path, damaged: Callable[[str], None]) -> bool:
    """An attempt that ended unheard: whoever is next tells its story. The model first, without which it has none."""
    _bring(mirror, f"{attempt}/{MODEL}", folder, damaged)
    return _bring(mirror, f"{attempt}/{END}", folder, damaged) and (folder / "ending.json").is_file()


def _bring(mirror: Mirror, place: str, folder: Path, damaged: Callable[[str], None]) -> bool:
    aside = folder / ".fetched"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not mirror.get(place, aside):
            return False
        for part in sorted(aside.iterdir(), key=lambda part: part.name in _LAST):
            _install(part, folder)
    except MirrorDamaged as why:
        damaged(str(why))
        return False
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True


def _install(part: Path, folder: Path) -> None:
    """A checkpoint or a model in place of one that is here and no good; of files, those that are missing."""
    if part.is_file():
        if not (folder / part.name).exists():
            part.rename(folder / part.name)
        return
    pieces = part.iterdir() if part.name == CHECKPOINTS else iter([part])
    for piece in pieces:
        to = folder / piece.relative_to(part.parent)
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.exists():
            shutil.rmtree(to)
        piece.rename(to)


def _newest_here(folders: Iterable[Path]) -> int:
    """The update of the newest good checkpoint in these folders; -1 without one."""
    for place in checkpoint_manifest.places(folders):
        try:
            checkpoint_manifest.check(place)
        except (DamagedError, OSError, ValueError, KeyError, TypeError):
            continue  # whoever loads it sets it aside and says so
        return checkpoint_manifest.step_of(place)
    return -1
