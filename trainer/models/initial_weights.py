"""`InitialWeights`: the weights that every trial starts from, memory-mapped from the model's files.

All workers of a machine then share one copy, in the page cache. Tensors that no file stores in the same form (other
names, tied or fused weights, buffers) are kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from trainer.distributed.fsdp import copy_into
from trainer.results import ModelError


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return parameters and buffers by name, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


class InitialWeights:
    """The initial weights of a model. Create it after loading and before training."""

    def __init__(self, model: nn.Module, files: Sequence[Path]) -> None:
        """`files`: the safetensors files of the model. Every weight is compared once with its content."""
        self._stamps = {file: _file_stamp(file) for file in files}
        self._mapped: dict[str, torch.Tensor] = {}
        self._copied: dict[str, torch.Tensor] = {}
        found = _map_files(files)
        for name, tensor in named_tensors(model):
            stored = found.get(name)
            same_shape = stored is not None and stored.shape == tensor.shape
            if stored is not None and same_shape and torch.equal(stored.to(tensor.dtype), tensor.cpu()):
                self._mapped[name] = stored
            else:
                self._copied[name] = tensor.detach().to("cpu", copy=True)

    def restore(self, model: nn.Module) -> None:
        """Copy the initial weights into the model, of which this process may hold shards, bit for bit.

        Raises ModelError if a file was changed meanwhile.
        """
        for file, stamp in self._stamps.items():
            if _file_stamp(file) not in (stamp, None):
                raise ModelError(f"{file} was changed; all trials of a sweep must start from the same initial model")
        with torch.no_grad():
            for name, tensor in named_tensors(model):
                initial = self._mapped[name] if name in self._mapped else self._copied[name]
                if isinstance(tensor, nn.Parameter):
                    copy_into(tensor, initial)
                else:
                    tensor.copy_(initial)


def _map_files(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:  # pyright: ignore[reportUnknownVariableType]
            for name in opened.keys():  # noqa: SIM118  not a dict
                found[name] = opened.get_tensor(name)
    return found


def _file_stamp(file: Path) -> tuple[int, int, int] | None:
    """Return values that change with the file; None if it was deleted, which a mapping survives."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
