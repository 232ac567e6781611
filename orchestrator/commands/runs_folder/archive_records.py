"""What the runs folder keeps about sweeps that were archived from it: `.archived/NAME.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.folders import ARCHIVED_SWEEPS
from trainer.storage.atomic_files import write_json


@dataclass(frozen=True, slots=True)
class ArchivedSweep:
    """Where an archived sweep is; `bytes`: of its files; `spec`: its file, for caches that it would need again.

    `began` and `archived` are seconds since 1970.
    """

    name: str
    url: str
    id: str
    began: float
    archived: float
    bytes: int
    spec: str


def archived_sweeps(root: Path) -> list[ArchivedSweep]:
    """Return the sweeps that were archived from this runs folder, by name."""
    files = sorted((root / ARCHIVED_SWEEPS).glob("*.json"))
    return [ArchivedSweep(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def find_record(root: Path, name: str) -> ArchivedSweep | None:
    """Return where the sweep of this name was archived to; None if it was not, or came back."""
    return next((each for each in archived_sweeps(root) if each.name == name), None)


def write_record(root: Path, record: ArchivedSweep) -> None:
    """Store where a sweep is, in place of an earlier record of its name."""
    write_json(root / ARCHIVED_SWEEPS / f"{record.name}.json", asdict(record))


def remove_record(root: Path, name: str) -> None:
    """Remove the record of a sweep that came back."""
    folder = root / ARCHIVED_SWEEPS
    (folder / f"{name}.json").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
