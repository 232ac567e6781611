"""Checkpoints as files: paths, integrity, and hard links that pin them. No torch here.

`folder/checkpoints/step-00000120/` has CHECKPOINT_FILES and `manifest.json` with the digest of each (written by
checkpoints.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from trainer.storage.atomic_files import sha256_of, write_folder
from trainer.storage.failpoints import failpoint

FORMAT = 1
CHECKPOINT_FILES = ("weights.safetensors", "optimiser.safetensors", "state.json")
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


class DamagedCheckpoint(Exception):
    """The checkpoint does not match its manifest."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of an update in a run folder."""
    return folder / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(folders: Iterable[Path]) -> list[Path]:
    """Return every checkpoint of these run folders, most updates first; among equals, the last folder's first."""
    found = [
        (int(match[1]), order, path)
        for order, folder in enumerate(folders)
        for path in (folder / "checkpoints").glob("step-*")
        if path.is_dir() and not path.is_symlink() and (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found, key=lambda f: f[:2], reverse=True)]


def checkpoint_step(path: Path) -> int:
    """Return the number of updates of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with its digest.

    Raises DamagedCheckpoint if one differs, OSError or ValueError if a file is missing or unreadable.
    """
    manifest = read_json_object(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"format {manifest.get('format')!r}, {FORMAT} expected")
    digests = cast("dict[str, str]", manifest["sha256"])
    for name in CHECKPOINT_FILES:
        if sha256_of([path / name]) != digests[name]:
            raise DamagedCheckpoint(f"{name} differs from its digest")


def pin_checkpoint(folders: Sequence[Path], target: Path) -> tuple[int | None, list[str]]:
    """Hard-link the newest valid checkpoint of these run folders into the run folder `target`.

    The link needs no disk space and outlives the original. Returns its update (None if there is no checkpoint), and
    messages about damaged ones that were skipped.
    """
    skipped: dict[str, str] = {}
    while True:
        path = next((p for p in list_checkpoints(folders) if str(p) not in skipped), None)
        if path is None:
            return None, list(skipped.values())
        step = checkpoint_step(path)
        pinned = checkpoint_path(target, step)
        try:
            write_folder(pinned, lambda temporary, path=path: _hard_link(path, temporary))
        except FileNotFoundError:
            if path.exists():
                skipped[str(path)] = f"the checkpoint of update {step} lacks a file"
            continue  # its run has replaced it by a newer one meanwhile
        failpoint("checkpoint.pinned")
        try:
            verify_checkpoint(pinned)
        except (DamagedCheckpoint, OSError, ValueError, KeyError, TypeError) as error:
            shutil.rmtree(pinned)
            skipped[str(path)] = f"the checkpoint of update {step} is damaged ({error})"
            continue
        return step, list(skipped.values())


def _hard_link(path: Path, temporary: Path) -> None:
    for name in (*CHECKPOINT_FILES, MANIFEST):
        try:
            os.link(path / name, temporary / name)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copy2(path / name, temporary / name)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises DamagedCheckpoint if it is not an object."""
    found: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path.name} is not a JSON object")
    return cast("dict[str, Any]", found)
