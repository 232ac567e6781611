"""`InitialWeights`: the weights every trial starts from, mapped from the model's files instead of copied.

All workers of a machine then share one copy, in the system's page cache. What no file holds in the same form (another
name, a tied or fused weight, a buffer) is kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from trainer.results import ModelError


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


class InitialWeights:
    """Taken from a model that has just been loaded and not yet been trained."""

    def __init__(self, model: nn.Module, files: Sequence[Path]) -> None:
        """files: the safetensors files the model was loaded from. Every weight is compared once with what is there."""
        self._stamps = {file: _file_stamp(file) for file in files}
        self._mapped: dict[str, torch.Tensor] = {}
        self._copied: dict[str, torch.Tensor] = {}
        found = _map_files(files)
        for name, tensor in named_tensors(model):
            there = found.get(name)
            if there is not None and there.shape == tensor.shape and torch.equal(there.to(tensor.dtype), tensor.cpu()):
                self._mapped[name] = there
            else:
                self._copied[name] = tensor.detach().to("cpu", copy=True)

    def restore(self, model: nn.Module) -> None:
        """Make the model's weights the start's to the bit. ModelError where a file was changed meanwhile."""
        for file, stamp in self._stamps.items():
            if _file_stamp(file) not in (stamp, None):
                raise ModelError(f"{file} was changed while trials start from it; a sweep has one start model")
        with torch.no_grad():
            for name, tensor in named_tensors(model):
                tensor.copy_(self._mapped[name] if name in self._mapped else self._copied[name])


def _map_files(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:  # pyright: ignore[reportUnknownVariableType]
            for name in opened.keys():  # noqa: SIM118  not a dict
                found[name] = opened.get_tensor(name)
    return found


def _file_stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None when it is gone, which a mapping survives."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
