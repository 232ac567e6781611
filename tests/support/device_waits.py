"""One trial's engine, ready for its first update, and where its code would wait for a GPU."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import trainer
from trainer.config.trial import TrialConfig
from trainer.data.pair_dataset import PairDataset
from trainer.distributed.processes import CancelToken, ProcessGroup
from trainer.evaluation.evaluator import Evaluator
from trainer.models.policy_model import PolicyModel
from trainer.objectives.losses import required_stats
from trainer.resource_cache import ResourceCache, make_evaluator
from trainer.training.engine import TrainingInputs
from trainer.training.packed_engine import PackedEngine

_OURS = str(Path(trainer.__file__).parent)


def packed_engine(config: TrialConfig, cache: Path) -> tuple[PackedEngine, PolicyModel]:
    """The engine of a trial before its first update, on this machine's GPU if it has one."""
    group = ProcessGroup()
    token = CancelToken(group, lambda: False)
    resources = ResourceCache(cache, group, trust_remote_code=False)
    prepared, tokenizer = resources.load_data(config.data, config.model)
    policy = resources.load_model(config.model)
    start = make_evaluator(config, policy, prepared, tokenizer, group, token)
    reference = start.logps(prepared.train) if required_stats(config.loss).reference else None
    policy.prepare_for_trial(config.lora, config.training)
    model = make_evaluator(config, policy, prepared, tokenizer, group, token).pair_model
    return PackedEngine(config, TrainingInputs(policy, model, prepared.train, reference, group, token)), policy


def evaluator_of(config: TrialConfig, cache: Path) -> tuple[Evaluator, PairDataset]:
    """The evaluator of a trial's initial model, and the training pairs."""
    group = ProcessGroup()
    resources = ResourceCache(cache, group, trust_remote_code=False)
    prepared, tokenizer = resources.load_data(config.data, config.model)
    policy, token = resources.load_model(config.model), CancelToken(group, lambda: False)
    return make_evaluator(config, policy, prepared, tokenizer, group, token), prepared.train


_READS = frozenset({"tolist", "numpy", "cpu"})
"""Methods that read a tensor without an operation of torch."""
_WAITING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"})
"""Operations of torch whose result the host has to know: float(), bool(), shapes that depend on values."""


class DeviceWaits:
    """Counts, by function of the trainer, what would make the host wait if the tensors were on a GPU.

    Copies from the host count too, unless `to_device` makes them.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._modes = (_Methods(self._add), _Operations(self._add))

    def __enter__(self) -> DeviceWaits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def _add(self, frame: FrameType | None) -> None:
        while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
            frame = frame.f_back
        if frame is not None:
            self.places[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1


def _caller() -> FrameType | None:
    """The frame that called the function that calls this one."""
    frame = inspect.currentframe()
    return None if frame is None or frame.f_back is None else frame.f_back.f_back


class _Methods(TorchFunctionMode):
    def __init__(self, add: Callable[[FrameType | None], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, frame = getattr(func, "__name__", ""), _caller()
        ours = frame is not None and frame.f_code.co_filename.startswith(_OURS) and frame.f_code.co_name != "to_device"
        moved = name in {"to", "tensor", "as_tensor"} and any(
            isinstance(each, torch.device) or each == "cpu" for each in (*args[1:], *kwargs.values())
        )
        if name in _READS or (ours and moved):
            self._add(frame)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, add: Callable[[FrameType | None], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in {"index", "index_put", "index_put_"} and any(
            isinstance(each, torch.Tensor) and each.dtype is torch.bool for each in args[1]
        )
        if name in _WAITING or masked:
            self._add(_caller())
        return func(*args, **(kwargs or {}))
