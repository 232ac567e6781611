"""One model sharded over the processes of a trial by DeepSpeed's ZeRO stage 3, which owns backward pass and step.

Each process holds a range of the elements of every flattened weight, with its float32 copy, gradient and moments.
DeepSpeed's hooks gather a module's weights while it computes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from trainer.config.trial import DEEPSPEED_INSTALL, TrainingConfig
from trainer.memory_limits import DEEPSPEED_BUCKET, DEEPSPEED_STEP
from trainer.weight_decay import parameter_groups

_MOMENTS = ("exp_avg", "exp_avg_sq")


class CannotDivide(ValueError):
    """DeepSpeed is missing, or will not take this model."""


class Zero3:
    """The model of one trial, divided. All processes call every method."""

    def __init__(self, model: PreTrainedModel, training: TrainingConfig) -> None:
        """What is to be trained is decided before, and the weights are still on the CPU."""
        self._deepspeed = deepspeed = _deepspeed()
        config = _config(training)
        deepspeed.zero.Init(module=model, config_dict_or_path=config)  # weight by weight: never all on the device
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._rate = training.learning_rate
        self._adam = torch.optim.AdamW(
            parameter_groups(model, self._trained, training.weight_decay),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            fused=True,
        )
        self.engine: Any = deepspeed.initialize(model=model, optimizer=self._adam, config=config)[0]
        """Called in place of the model for a pass that has a backward."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of all processes to the slices. DeepSpeed averages them; here they are summed."""
        self.engine.backward(loss * distributed.get_world_size(), scale_wrt_gas=False)

    def clip_gradients(self) -> float:
        """The norm of all gradients together; `step` scales them down to max_grad_norm."""
        # One after the other: DeepSpeed gives each as a copy in float32.
        norms = [
            torch.linalg.vector_norm(cast(Tensor, self._deepspeed.utils.safe_get_local_grad(parameter)))
            for parameter in self._trained.values()
        ]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        square = norm.double() ** 2
        distributed.all_reduce(square)
        return float(square.sqrt())

    def step(self, factor: float) -> float:
        """One update at factor times the learning rate; gradients are dropped. Returns the rate used."""
        rate = self._rate * factor
        for group in self._adam.param_groups:
            group["lr"] = rate
        self.engine.step()
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed did not take a step although the gradients are finite")
        return rate

    def state_dict(self) -> dict[str, Tensor | Piece]:
        """The moments by name, as this process's pieces; the live ones, not copies."""
        if not self._adam.state:
            return {}
        steps: Tensor = next(iter(self._adam.state.values()))["step"]
        found: dict[str, Tensor | Piece] = {}
        for name, parameter in self._trained.items():
            found[f"step.{name}"] = steps.clone()  # a file of tensors wants memory for each
            for moment in _MOMENTS:
                mine = cast(Tensor, self._deepspeed.utils.safe_get_local_optimizer_state(parameter, moment))
                found[f"{moment}.{name}"] = Piece(mine, shape_of(parameter))
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned, as whole tensors. KeyError where a moment of a parameter is missing."""
        if not state:
            return
        for flat in cast("list[Tensor]", self.engine.optimizer.fp32_partitioned_groups_flat):
            zeros = {moment: torch.zeros_like(flat, requires_grad=False) for moment in _MOMENTS}
            step = state[f"step.{next(iter(self._trained))}"].to(flat.device, copy=True)
            self._adam.state[flat] = {"step": step, **zeros}
        for name, parameter in self._trained.items():
            for moment in _MOMENTS:
                mine = _piece(state[f"{moment}.{name}"], parameter).to(torch.float32)
                self._deepspeed.utils.safe_set_local_optimizer_state(parameter, mine, moment)

    def end(self) -> None:
        """Take DeepSpeed's hooks off; nothing of it refers to the model any more."""
        divided = self.engine.optimizer
        self.engine.destroy()
        # DeepSpeed (0.19.8) keeps engines that nobody else knows any more; their memory is given back all the same.
        vars(divided).clear()
        self._adam.state.clear()
        for parameter in cast("PreTrainedModel", self.engine.module).parameters():
            cast(Any, parameter).ds_tensor.data = torch.empty(0)
        # It keeps each model that was ever divided.
        self._deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK.clear()


@dataclass(frozen=True, slots=True)
class Piece:
    """This process's range of a flattened tensor, filled up so that all processes have as many elements."""

    mine: Tensor
    shape: torch.Size
    """Of the whole tensor."""

    def whole(self) -> Tensor:
        """The tensor, put together. All processes call it."""
        parts = [torch.empty_like(self.mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, self.mine.contiguous())
        return torch.cat(parts)[: self.shape.numel()].view(self.shape)


def keep_off_stdout() -> None:
    """Before transformers saves a model: accelerate then loads DeepSpeed, where it is installed, and without a GPU that
    would say so on stdout."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def is_divided(tensor: Tensor) -> bool:
    """Whether this parameter is one of which DeepSpeed keeps a slice here."""
    return hasattr(tensor, "ds_id")


def inside(model: nn.Module) -> nn.Module:
    """The model in DeepSpeed's engine; any other as it is."""
    return cast(Any, model).module if type(model).__name__ == "DeepSpeedEngine" else model


def shape_of(parameter: Tensor) -> torch.Size:
    """Of the whole parameter."""
    return cast(torch.Size, cast(Any, parameter).ds_shape)


def held(parameters: list[Tensor]) -> AbstractContextManager[object]:
    """While this lasts these parameters are whole here. All processes enter it; what is not divided stays as it is."""
    divided = [p for p in parameters if is_divided(p)]
    if not divided:
        return nullcontext()
    return cast("AbstractContextManager[object]", _deepspeed().zero.GatheredParameters(divided))


def put(target: nn.Parameter, whole: Tensor) -> None:
    """Take over this process's piece of a whole weight."""
    mine, slice_here = _piece(whole, target), cast(Tensor, cast(Any, target).ds_tensor)
    slice_here.data.copy_(mine)
    _deepspeed().utils.safe_set_local_fp32_param(target, mine.to(slice_here.device, torch.float32))


def _piece(whole: Tensor, like: nn.Parameter) -> Tensor:
    width = cast(Tensor, cast(Any, like).ds_tensor).numel()
    begin = distributed.get_rank() * width
    mine = whole.reshape(-1)[begin : begin + width]
    return nn.functional.pad(mine, (0, width - mine.numel()))


def _config(training: TrainingConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # what DeepSpeed counts by; it sees no data
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # an update has as many passes as its tokens want
        "gradient_clipping": training.max_grad_norm,
        "steps_per_print": 1 << 60,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": DEEPSPEED_BUCKET,
            "stage3_prefetch_bucket_size": DEEPSPEED_BUCKET,
            "sub_group_size": DEEPSPEED_STEP,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "memory_efficient_linear": False,  # it would replace torch's linear layer in this process for ever
        },
    }


@cache
def _deepspeed() -> Any:
    if find_spec("deepspeed") is None:
        raise CannotDivide(f"needs deepspeed, which is not installed: {DEEPSPEED_INSTALL}")
    keep_off_stdout()
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
    deepspeed: Any = import_module("deepspeed")
    if not torch.cuda.is_available():
        # Else a C++ compiler works for minutes on an op that gloo does without.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
