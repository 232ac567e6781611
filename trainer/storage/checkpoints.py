"""The state of a run on disk: safetensors and JSON only, each file's digest in a manifest that is written last.

`folder/checkpoints/step-00000120/`: weights.safetensors (what is trained), optimiser.safetensors, state.json (step,
metric history, open logging window), manifest.json. The order of the pairs, the schedule and the random numbers are
functions of the seed and the step (trainer/schedule.py, trainer/loop.py), so the step is their whole state.

How a run ended, on disk: who starts it again is told its story once more instead of training anew.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.objectives.pair_logps import Totals
from trainer.results import Ending, EndKind, Point
from trainer.storage.atomic_files import failpoint, sha256_of, sync, write_folder, write_json
from trainer.storage.checkpoint_manifest import (
    FILES,
    FORMAT,
    MANIFEST,
    DamagedError,
    check,
    place_of,
    places,
    read_object,
    step_of,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class State:
    """What a run needs to go on as if it had never stopped.

    `config` is the digest of the configuration it belongs to; `window` the sums of the open logging window.
    """

    config: str
    step: int
    weights: Mapping[str, torch.Tensor]
    optimiser: Mapping[str, torch.Tensor]
    history: Sequence[Point]
    window: Totals = field(default_factory=Totals)


def save(folder: Path, state: State) -> Path:
    """Write the state under `folder/checkpoints` and return its place. OSError where the disk refuses; then nothing is
    changed."""
    target = place_of(folder, state.step)

    def fill(aside: Path) -> None:
        save_file(_plain(state.weights), aside / "weights.safetensors")
        failpoint("checkpoint.weights")
        save_file(_plain(state.optimiser), aside / "optimiser.safetensors")
        said = {
            "config": state.config,
            "step": state.step,
            "window": dict(state.window),
            "history": [asdict(p) for p in state.history],
        }
        (aside / "state.json").write_text(json.dumps(said, allow_nan=False), encoding="utf-8")
        for name in FILES:
            sync(aside / name)
        digests = {name: sha256_of([aside / name]) for name in FILES}
        failpoint("checkpoint.manifest")
        manifest = {"format": FORMAT, "step": state.step, "sha256": digests}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    write_folder(target, fill)
    return target


def newest(folders: Iterable[Path]) -> State | None:
    """The good checkpoint with the most updates in these run folders; of equals, the one in the last folder.

    A damaged one is renamed to `*.damaged` with a warning, and the next is tried.
    """
    for place in places(folders):
        try:
            return _load(place)
        except (DamagedError, OSError, SafetensorError, ValueError, KeyError, TypeError) as why:
            aside = _free_name(place.with_name(f"{place.name}.damaged"))
            place.rename(aside)
            log.warning("checkpoint %s is damaged (%s); set aside as %s", place, why, aside.name)
    return None


def discard(folders: Iterable[Path], before: int | None = None) -> None:
    """Remove the checkpoints of these run folders, all of them or those of fewer updates than `before`."""
    for place in places(folders):
        if before is None or step_of(place) < before:
            shutil.rmtree(place)
            failpoint("checkpoint.discarded")


def _load(place: Path) -> State:
    check(place)
    said = read_object(place / "state.json")
    return State(
        config=str(said["config"]),
        step=int(said["step"]),
        weights=load_file(place / "weights.safetensors"),
        optimiser=load_file(place / "optimiser.safetensors"),
        history=points(said["history"]),
        window={str(k): (float(n), float(w)) for k, (n, w) in said["window"].items()},
    )


def points(said: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Points from their JSON form."""
    return [
        Point(int(p["step"]), {str(k): float(v) for k, v in p["metrics"].items()}, str(p.get("pairs", "")))
        for p in said
    ]


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


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
