"""Downloads results and checkpoints of earlier attempts that this machine lacks, before training."""

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
"""Files that mark a result as complete; installed last."""


FORK_ATTEMPT = 0
"""Attempt number under which the mirror has the other trial's checkpoint from which a clone starts."""


def attempt_folders(task: AttemptTask) -> dict[int, Path]:
    """Return the folders by attempt number up to this one, with that of a clone's start checkpoint."""
    of_fork = {} if task.fork_folder is None else {FORK_ATTEMPT: task.fork_folder}
    return (
        of_fork
        | {k: task.folder.parent / str(k) for k in range(task.first_attempt, task.attempt)}
        | {task.attempt: task.folder}
    )


def download_attempts(mirror: Mirror, task: AttemptTask, on_damaged: Callable[[str], None]) -> list[tuple[int, int]]:
    """Download results of earlier attempts and the newest undamaged checkpoint newer than the local ones.

    Args:
        mirror: the trial's folder in the mirror.
        task: the attempt that is about to train.
        on_damaged: called with a message for each damaged copy, after which an older one is tried.

    Returns:
        (update, attempt) of the checkpoints in the mirror that were not found damaged, sorted.
    """
    folders = attempt_folders(task)
    complete = mirror.complete_paths()
    ended = False
    for attempt, folder in folders.items():
        if f"{attempt}/{RESULT}" in complete and not (folder / "ending.json").is_file():
            ended |= _download_result(mirror, attempt, folder, on_damaged)
    available = sorted((int(m[2]), int(m[1])) for name in complete if (m := _CHECKPOINT.fullmatch(name)))
    if not ended:
        local_step = _newest_local_step(folders.values())
        for step, attempt in available[::-1]:
            if step <= local_step or attempt not in folders:
                continue
            if _download(mirror, checkpoint_mirror_path(step, attempt), folders[attempt], on_damaged):
                log.info("checkpoint of update %d downloaded from %s", step, mirror.url)
                break
            available.remove((step, attempt))
    return available


def checkpoint_mirror_path(step: int, attempt: int) -> str:
    """Return the path of a checkpoint in its trial's mirror folder."""
    return f"{attempt}/{CHECKPOINTS}/step-{step:08d}"


def download_result(mirror: Mirror, attempt: int, folder: Path, *, model: bool) -> bool:
    """Download an attempt's result files, with `model` also its weights; False where missing or incomplete."""
    problems: list[str] = []
    if not _download(mirror, f"{attempt}/{RESULT}", folder, problems.append):
        return False
    return not model or _download(mirror, f"{attempt}/{MODEL}", folder, problems.append)


def _download_result(mirror: Mirror, attempt: int, folder: Path, on_damaged: Callable[[str], None]) -> bool:
    """Download the result of an attempt that the driver did not receive, which this attempt will replay.

    The model comes first, as a result without model is incomplete.
    """
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
    """Install a download: replace checkpoints and models, which are missing or damaged here; add missing files."""
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
    """Return the update of the newest valid checkpoint in these folders; -1 without one."""
    for mirror_path in checkpoint_manifest.list_checkpoints(folders):
        try:
            checkpoint_manifest.verify_checkpoint(mirror_path)
        except (DamagedCheckpoint, OSError, ValueError, KeyError, TypeError):
            continue  # reported and skipped when it is loaded
        return checkpoint_manifest.checkpoint_step(mirror_path)
    return -1
