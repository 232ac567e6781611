"""Prepared data on disk, by content: written aside, named last, verified before use, made once by many processes."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from trainer.storage.durable import sha256_of, write_folder
from trainer.storage.lock import held

MANIFEST = "manifest.json"


class DamagedCache(UserWarning):
    """A cached folder does not match its manifest and was made again."""


def obtain(folder: Path, fill: Callable[[Path], None]) -> bool:
    """Have `folder` filled and whole. True: it was filled now; False: it was there.

    One process fills it, the others wait for that one. A folder that does not match its manifest is made again, with
    a warning. OSError where the disk refuses; what `fill` raises passes through and leaves nothing behind.
    """
    if _is_whole(folder):
        return False
    with held(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            if _is_whole(folder):
                return False
            warnings.warn(f"{folder} is damaged and is made again", DamagedCache, stacklevel=2)
            shutil.rmtree(folder)
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left)  # of a process that died while it wrote: we hold the lock, nobody writes now
        write_folder(folder, lambda aside: _fill(aside, fill))
    return True


def _fill(aside: Path, fill: Callable[[Path], None]) -> None:
    fill(aside)
    files = {file.name: sha256_of([file]) for file in sorted(aside.iterdir())}
    (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there with the same bytes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = dict(manifest["files"])
        return bool(files) and all(sha256_of([folder / name]) == digest for name, digest in files.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False
