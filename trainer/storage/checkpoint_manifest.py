"""Checkpoints as files: where they are, whether they are complete, and hard links that pin them. No torch.

`folder/checkpoints/step-00000120/` holds CHECKPOINT_FILES and `manifest.json` with the digest of each (checkpoints.py
writes them).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from trainer.storage.atomic_files import failpoint, sha256_of, write_folder

FORMAT = 1
CHECKPOINT_FILES = ("weights.safetensors", "optimiser.safetensors", "state.json")
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


class DamagedCheckpoint(Exception):
    """The checkpoint is not what its manifest says."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of that update lies in a run's folder."""
    return folder / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(folders: Iterable[Path]) -> list[Path]:
    """Every checkpoint of these run folders, the one with the most updates first; of equals, the last folder's."""
    found = [
        (int(match[1]), order, path)
        for order, folder in enumerate(folders)
        for path in (folder / "checkpoints").glob("step-*")
        if path.is_dir() and not path.is_symlink() and (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found, key=lambda f: f[:2], reverse=True)]


def checkpoint_step(path: Path) -> int:
    """The update after which it was written."""
    return int(path.name.removeprefix("step-"))


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with its digest.

    Raises DamagedCheckpoint where one differs, OSError or ValueError where there is nothing to compare.
    """
    manifest = read_json_object(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"format {manifest.get('format')!r}, {FORMAT} expected")
    digests = cast("dict[str, str]", manifest["sha256"])
    for name in CHECKPOINT_FILES:
        if sha256_of([path / name]) != digests[name]:
            raise DamagedCheckpoint(f"{name} differs from its digest")


def pin_checkpoint(folders: Sequence[Path], target: Path) -> tuple[int | None, list[str]]:
    """Give the newest good checkpoint of these run folders a second place, in the run folder `target`.

    It takes no room while the first one is there and stays when that is removed. Returns its update (None: there is
    none) and, in words, what was damaged and passed over.
    """
    passed: dict[str, str] = {}
    while True:
        path = next((p for p in list_checkpoints(folders) if str(p) not in passed), None)
        if path is None:
            return None, list(passed.values())
        step = checkpoint_step(path)
        pinned = checkpoint_path(target, step)
        try:
            write_folder(pinned, lambda temporary, path=path: _hard_link(path, temporary))
        except FileNotFoundError:
            if path.exists():
                passed[str(path)] = f"the checkpoint of update {step} lacks a file"
            continue  # its run has written a newer one meanwhile and removed this
        failpoint("checkpoint.pinned")
        try:
            verify_checkpoint(pinned)
        except (DamagedCheckpoint, OSError, ValueError, KeyError, TypeError) as error:
            shutil.rmtree(pinned)
            passed[str(path)] = f"the checkpoint of update {step} is damaged ({error})"
            continue
        return step, list(passed.values())


def _hard_link(path: Path, temporary: Path) -> None:
    for name in (*CHECKPOINT_FILES, MANIFEST):
        try:
            os.link(path / name, temporary / name)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copy2(path / name, temporary / name)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object; DamagedCheckpoint where the file holds something else."""
    found: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path.name} holds no object")
    return cast("dict[str, Any]", found)
