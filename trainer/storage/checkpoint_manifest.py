"""Checkpoints as files: where they are, whether they are whole, and a second name for one. Needs no torch.

`folder/checkpoints/step-00000120/` holds FILES and `manifest.json` with the digest of each (checkpoint.py writes them).
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
FILES = ("weights.safetensors", "optimiser.safetensors", "state.json")
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


class DamagedError(Exception):
    """The checkpoint is not what its manifest says."""


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of that update lies in a run's folder."""
    return folder / "checkpoints" / f"step-{step:08d}"


def places(folders: Iterable[Path]) -> list[Path]:
    """Every checkpoint of these run folders, the one with the most updates first; of equals, the last folder's."""
    found = [
        (int(match[1]), order, place)
        for order, folder in enumerate(folders)
        for place in (folder / "checkpoints").glob("step-*")
        if place.is_dir() and not place.is_symlink() and (match := _NAME.fullmatch(place.name))
    ]
    return [place for *_, place in sorted(found, key=lambda f: f[:2], reverse=True)]


def step_of(place: Path) -> int:
    """The update after which it was written."""
    return int(place.name.removeprefix("step-"))


def check(place: Path) -> None:
    """DamagedError where a file differs from its digest; OSError or ValueError where there is nothing to compare."""
    manifest = read_object(place / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise DamagedError(f"format {manifest.get('format')!r}, {FORMAT} expected")
    digests = cast("dict[str, str]", manifest["sha256"])
    for name in FILES:
        if sha256_of([place / name]) != digests[name]:
            raise DamagedError(f"{name} differs from its digest")


def pin(folders: Sequence[Path], to: Path) -> tuple[int | None, list[str]]:
    """Give the newest good checkpoint of these run folders a second place, in the run folder `to`.

    It takes no room while the first one is there and stays when that is removed. Returns its update (None: there is
    none) and, in words, what was damaged and passed over.
    """
    passed: dict[str, str] = {}
    while True:
        place = next((p for p in places(folders) if str(p) not in passed), None)
        if place is None:
            return None, list(passed.values())
        step = step_of(place)
        held = place_of(to, step)
        try:
            write_folder(held, lambda aside, place=place: _link(place, aside))
        except FileNotFoundError:
            if place.exists():
                passed[str(place)] = f"the checkpoint of update {step} lacks a file"
            continue  # its run has written a newer one meanwhile and removed this
        failpoint("checkpoint.pinned")
        try:
            check(held)
        except (DamagedError, OSError, ValueError, KeyError, TypeError) as why:
            shutil.rmtree(held)
            passed[str(place)] = f"the checkpoint of update {step} is damaged ({why})"
            continue
        return step, list(passed.values())


def _link(place: Path, aside: Path) -> None:
    for name in (*FILES, MANIFEST):
        try:
            os.link(place / name, aside / name)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copy2(place / name, aside / name)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; DamagedError where the file holds something else."""
    found: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise DamagedError(f"{path.name} holds no object")
    return cast("dict[str, Any]", found)
