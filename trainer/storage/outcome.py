"""How a run ended, on disk: who starts it again is told its story once more instead of training anew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.report import Ending, EndKind, Point
from trainer.storage.checkpoint import points
from trainer.storage.durable import write_json

_NAME = "ending.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished or diverged run: `config` is the digest of its configuration, `history` all its points."""

    config: str
    ending: Ending
    history: Sequence[Point]


def save_outcome(folder: Path, outcome: Outcome) -> None:
    """Write `folder/ending.json`, whole or not at all."""
    ending = outcome.ending
    write_json(
        folder / _NAME,
        {
            "config": outcome.config,
            "kind": ending.kind.value,
            "reason": ending.reason,
            "steps": ending.steps,
            "history": [asdict(p) for p in outcome.history],
        },
    )


def find_outcome(folders: Iterable[Path]) -> Outcome | None:
    """The ending in the last of these folders that has one; of a finished run only where its model is still there."""
    for folder in reversed(list(folders)):
        path = folder / _NAME
        if not path.exists():
            continue
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = EndKind(said["kind"])
        model = folder / "model"
        if kind is EndKind.FINISHED and not model.is_dir():
            continue
        ending = Ending(kind, str(said["reason"]), int(said["steps"]), model if kind is EndKind.FINISHED else None)
        return Outcome(str(said["config"]), ending, points(said["history"]))
    return None
