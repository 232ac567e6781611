"""`TrainState`, saved and loaded as a checkpoint; and the stored result of a finished run.

`folder/checkpoints/step-00000120/`: weights.safetensors (trainable weights), optimiser.safetensors, state.json (step,
metric history, open logging window), manifest.json, written last, with the digest of each file. Data order, schedule
and random numbers are functions of the seed and the step (trainer/training/schedule.py), so no state of them is saved.
Restarting a finished run replays its metrics and returns its result without training.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.objectives.pair_logps import MetricSums
from trainer.results import RunResult, RunStatus, StepMetrics
from trainer.storage.atomic_files import fsync, sha256_of, write_folder, write_json
from trainer.storage.checkpoint_manifest import (
    CHECKPOINT_FILES,
    FORMAT,
    MANIFEST,
    DamagedCheckpoint,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    read_json_object,
    verify_checkpoint,
)
from trainer.storage.failpoints import failpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainState:
    """The state from which a run continues as if it had not been interrupted.

    `result_digest` is the digest of its configuration; `window` the metric sums of the open logging window.
    """

    result_digest: str
    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    history: Sequence[StepMetrics]
    window: MetricSums = field(default_factory=MetricSums)
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Fingerprints of the initial model (`model`) and of the data (`data`); empty in those of earlier versions."""


def save_checkpoint(folder: Path, state: TrainState) -> Path:
    """Write the state under `folder/checkpoints` and return its path. Raises OSError; then nothing has changed."""
    target = checkpoint_path(folder, state.step)

    def write(temporary: Path) -> None:
        """Write weights, optimizer state, state.json and last the manifest with their digests."""
        save_file(_to_cpu(state.weights), temporary / "weights.safetensors")
        failpoint("checkpoint.weights")
        save_file(_to_cpu(state.optimizer), temporary / "optimiser.safetensors")
        content = {
            "config": state.result_digest,
            "step": state.step,
            "window": dict(state.window),
            "history": history_as_json(state.history),
            "inputs": dict(state.inputs),
        }
        (temporary / "state.json").write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        for name in CHECKPOINT_FILES:
            fsync(temporary / name)
        digests = {name: sha256_of([temporary / name]) for name in CHECKPOINT_FILES}
        failpoint("checkpoint.manifest")
        manifest = {"format": FORMAT, "step": state.step, "sha256": digests}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    write_folder(target, write)
    return target


def load_newest(folders: Iterable[Path]) -> TrainState | None:
    """Return the valid checkpoint with the most updates in these run folders; among equals, the last folder's.

    A damaged one is renamed to `*.damaged` with a warning, and the next is tried.
    """
    for path in list_checkpoints(folders):
        try:
            return _load(path)
        except (DamagedCheckpoint, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            renamed = _free_name(path.with_name(f"{path.name}.damaged"))
            path.rename(renamed)
            log.warning("checkpoint %s is damaged (%s); renamed to %s", path, error, renamed.name)
    return None


def remove_checkpoints(folders: Iterable[Path], before: int | None = None) -> None:
    """Remove the checkpoints of these run folders: all, or those of fewer updates than `before`."""
    for path in list_checkpoints(folders):
        if before is None or checkpoint_step(path) < before:
            shutil.rmtree(path)
            failpoint("checkpoint.discarded")


def _load(path: Path) -> TrainState:
    verify_checkpoint(path)
    content = read_json_object(path / "state.json")
    return TrainState(
        result_digest=str(content["config"]),
        step=int(content["step"]),
        weights=load_file(path / "weights.safetensors"),
        optimizer=load_file(path / "optimiser.safetensors"),
        history=parse_history(content["history"]),
        window={str(k): (float(n), float(w)) for k, (n, w) in content["window"].items()},
        inputs=dict(content.get("inputs", {})),
    )


def history_as_json(history: Iterable[StepMetrics]) -> list[dict[str, Any]]:
    """Return metrics in the JSON form of checkpoints and run results; `pairs` are the pair margins."""
    return [{"step": one.step, "metrics": dict(one.metrics), "pairs": one.pair_margins} for one in history]


def parse_history(content: Sequence[Mapping[str, Any]]) -> list[StepMetrics]:
    """Return metrics from the JSON form of `history_as_json`."""
    return [
        StepMetrics(
            int(fields["step"]), {str(k): float(v) for k, v in fields["metrics"].items()}, str(fields.get("pairs", ""))
        )
        for fields in content
    ]


def _to_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


_RESULT_FILE = "ending.json"


@dataclass(frozen=True, slots=True)
class StoredRunResult:
    """Result of a finished or diverged run, with the digest of its configuration and all its metrics."""

    result_digest: str
    result: RunResult
    history: Sequence[StepMetrics]
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    """As of `TrainState`."""


def save_run_result(folder: Path, stored: StoredRunResult) -> None:
    """Write `folder/ending.json` atomically."""
    result = stored.result
    write_json(
        folder / _RESULT_FILE,
        {
            "config": stored.result_digest,
            "kind": result.status.value,
            "reason": result.reason,
            "steps": result.updates,
            "history": history_as_json(stored.history),
            "inputs": dict(stored.inputs),
        },
    )


def load_run_result(folders: Iterable[Path]) -> StoredRunResult | None:
    """Return the result in the last of these folders that has one; a finished run needs its model folder too."""
    for folder in reversed(list(folders)):
        path = folder / _RESULT_FILE
        if not path.exists():
            continue
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = RunStatus(content["kind"])
        model = folder / "model"
        if kind is RunStatus.FINISHED and not model.is_dir():
            continue
        result = RunResult(
            kind, str(content["reason"]), int(content["steps"]), model if kind is RunStatus.FINISHED else None
        )
        inputs = dict(content.get("inputs", {}))
        return StoredRunResult(str(content["config"]), result, parse_history(content["history"]), inputs)
    return None
