"""The state of a run on disk: safetensors and JSON only, each file's digest in a manifest that is written last.

`folder/checkpoints/step-00000120/`: weights.safetensors (what is trained), optimiser.safetensors, state.json (step,
metric history, open logging window), manifest.json. The order of the pairs, the schedule and the random numbers are
functions of the seed and the step (trainer/schedule.py, trainer/loop.py), so the step is their whole state.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.failpoint import failpoint
from trainer.objectives.pair_metrics import Totals
from trainer.report import Point
from trainer.storage.durable import sha256_of, sync, write_folder

log = logging.getLogger(__name__)

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")
_FILES = ("weights.safetensors", "optimiser.safetensors", "state.json")


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


class _DamagedError(Exception):
    """The checkpoint is not what its manifest says."""


def save(folder: Path, state: State) -> Path:
    """Write the state under `folder/checkpoints` and return its place. OSError where the disk refuses; then nothing is
    changed."""
    target = folder / "checkpoints" / f"step-{state.step:08d}"

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
        for name in _FILES:
            sync(aside / name)
        digests = {name: sha256_of([aside / name]) for name in _FILES}
        failpoint("checkpoint.manifest")
        manifest = {"format": _FORMAT, "step": state.step, "sha256": digests}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    write_folder(target, fill)
    return target


def newest(folders: Iterable[Path]) -> State | None:
    """The good checkpoint with the most updates in these run folders; of equals, the one in the last folder.

    A damaged one is renamed to `*.damaged` with a warning, and the next is tried.
    """
    for place in _places(folders):
        try:
            return _load(place)
        except (_DamagedError, OSError, SafetensorError, ValueError, KeyError, TypeError) as why:
            aside = _free_name(place.with_name(f"{place.name}.damaged"))
            place.rename(aside)
            log.warning("checkpoint %s is damaged (%s); set aside as %s", place, why, aside.name)
    return None


def discard(folders: Iterable[Path], before: int | None = None) -> None:
    """Remove the checkpoints of these run folders, all of them or those of fewer updates than `before`."""
    for place in _places(folders):
        if before is None or _step(place) < before:
            shutil.rmtree(place)
            failpoint("checkpoint.discarded")


def _places(folders: Iterable[Path]) -> list[Path]:
    found = [
        (int(match[1]), order, place)
        for order, folder in enumerate(folders)
        for place in (folder / "checkpoints").glob("step-*")
        if place.is_dir() and not place.is_symlink() and (match := _NAME.fullmatch(place.name))
    ]
    return [place for *_, place in sorted(found, key=lambda f: f[:2], reverse=True)]


def _load(place: Path) -> State:
    manifest = _object(place / "manifest.json")
    if manifest.get("format") != _FORMAT:
        raise _DamagedError(f"format {manifest.get('format')!r}, {_FORMAT} expected")
    digests = cast("dict[str, str]", manifest["sha256"])
    for name in _FILES:
        if sha256_of([place / name]) != digests[name]:
            raise _DamagedError(f"{name} differs from its digest")
    said = _object(place / "state.json")
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


def _object(path: Path) -> dict[str, Any]:
    found: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise _DamagedError(f"{path.name} holds no object")
    return cast("dict[str, Any]", found)


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}


def _step(place: Path) -> int:
    return int(place.name.removeprefix("step-"))


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
