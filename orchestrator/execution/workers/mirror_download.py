"""Downloads from the mirror what earlier attempts left and this machine lacks, before the trial trains."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from orchestrator.execution.messages import AttemptTask
from orchestrator.mirror import CHECKPOINTS, MODEL, RESULT, Mirror, MirrorDamaged
from trainer.storage import checkpoint_manifest
from trainer.storage.checkpoint_manifest import DamagedCheckpoint

log = logging.getLogger(__name__)

_CHECKPOINT = re.compile(rf"(\d+)/{CHECKPOINTS}/step-(\d{{8}})")
_RESULT_MARKERS = (CHECKPOINTS, "ending.json")
"""What gives the rest its meaning comes last."""


FORK_ATTEMPT = 0
"""Another trial's checkpoint that this one goes on from is in the mirror as if it were of an attempt before all."""


def attempt_folders(task: AttemptTask) -> dict[int, Path]:
    """The folder of each attempt up to this one, and of the checkpoint that a clone begins from."""
    fork = {} if task.fork is None else {FORK_ATTEMPT: task.fork}
    return fork | {k: task.folder.parent / str(k) for k in range(1, task.attempt)} | {task.attempt: task.folder}


def download_attempts(mirror: Mirror, task: AttemptTask, on_damaged: Callable[[str], None]) -> list[tuple[int, int]]:
    """Bring endings, and the newest whole checkpoint that is newer than any here.

    `on_damaged` is called for each copy that differs from what was sent; an older one is then taken. Returns the
    checkpoints that are in the mirror and not found damaged, by update and attempt.
    """
    folders = attempt_folders(task)
    complete = mirror.complete_paths()
    ended = False
    for attempt, folder in folders.items():
        if f"{attempt}/{RESULT}" in complete and not (folder / "ending.json").is_file():
            ended |= _download_result(mirror, attempt, folder, on_damaged)
    there = sorted((int(m[2]), int(m[1])) for name in complete if (m := _CHECKPOINT.fullmatch(name)))
    if not ended:
        here = _newest_local_step(folders.values())
        for step, attempt in there[::-1]:
            if step <= here or attempt not in folders:
                continue
            if _download(mirror, checkpoint_mirror_path(step, attempt), folders[attempt], on_damaged):
                log.info("checkpoint of update %d fetched from %s", step, mirror.url)
                break
            there.remove((step, attempt))
    return there


def checkpoint_mirror_path(step: int, attempt: int) -> str:
    """Where a checkpoint is in its trial's mirror."""
    return f"{attempt}/{CHECKPOINTS}/step-{step:08d}"


def download_result(mirror: Mirror, attempt: int, folder: Path, *, model: bool) -> bool:
    """The files that an attempt left, and its model where asked for; False where nothing is, or not whole."""
    problems: list[str] = []
    if not _download(mirror, f"{attempt}/{RESULT}", folder, problems.append):
        return False
    return not model or _download(mirror, f"{attempt}/{MODEL}", folder, problems.append)


def _download_result(mirror: Mirror, attempt: int, folder: Path, on_damaged: Callable[[str], None]) -> bool:
    """An attempt that ended unheard: whoever is next tells its story. The model first, without which it has none."""
    _download(mirror, f"{attempt}/{MODEL}", folder, on_damaged)
    return _download(mirror, f"{attempt}/{RESULT}", folder, on_damaged) and (folder / "ending.json").is_file()


def _download(mirror: Mirror, mirror_path: str, folder: Path, on_damaged: Callable[[str], None]) -> bool:
    temporary = folder / ".fetched"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not mirror.get(mirror_path, temporary):
            return False
        for part in sorted(temporary.iterdir(), key=lambda part: part.name in _RESULT_MARKERS):
            _install(part, folder)
    except MirrorDamaged as error:
        on_damaged(str(error))
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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


def _newest_local_step(folders: Iterable[Path]) -> int:
    """The update of the newest good checkpoint in these folders; -1 without one."""
    for mirror_path in checkpoint_manifest.list_checkpoints(folders):
        try:
            checkpoint_manifest.verify_checkpoint(mirror_path)
        except (DamagedCheckpoint, OSError, ValueError, KeyError, TypeError):
            continue  # whoever loads it sets it aside and says so
        return checkpoint_manifest.checkpoint_step(mirror_path)
    return -1
