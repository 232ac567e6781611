"""Fused AdamW over named parameters, with its state as plain tensors by parameter name.

`ShardedParameters` presents sharded parameters to the optimizer: AdamW is elementwise, so each process steps its own
rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_pt_utils import get_parameter_names

from trainer.config.trial import TrainingConfig
from trainer.distributed.fsdp import as_shard, shard_of
from trainer.training.stochastic_rounding import RoundingAdamW


class ShardedParameters:
    """Local view of sharded parameters: `parameters` are ordinary parameters by name that share memory with this
    process's shards. Parameters that are not sharded are passed through.

    `rank` is the number of this process among those that share the weights; None if they are not sharded.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._sharded = {name: parameter for name, parameter in trained.items() if isinstance(parameter, DTensor)}
        self.parameters = {
            name: nn.Parameter(_local(parameter.detach())) if isinstance(parameter, DTensor) else parameter
            for name, parameter in trained.items()
        }
        first = next(iter(self._sharded.values()), None)
        self.rank = None if first is None else first.device_mesh.get_local_rank()

    def collect(self) -> None:
        """Update the local views of shards and gradients; call before a step."""
        for name, sharded in self._sharded.items():
            local = self.parameters[name]
            local.data = _local(sharded.detach())
            local.grad = None if sharded.grad is None else _local(sharded.grad)

    def drop_gradients(self) -> None:
        """Free the gradients of the shards; call after a step."""
        for sharded in self._sharded.values():
            sharded.grad = None

    def total_norm(self) -> Tensor:
        """Return the norm of all gradients together, over the shards of all processes."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.rank is None:
            return norm
        square = norm.double() ** 2
        distributed.all_reduce(square)
        return square.sqrt().to(norm.dtype)

    def to_sharded_tensors(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return moments named `<moment>.<parameter>` as shards of full tensors."""
        return {name: self._to_sharded_tensor(name, moment) for name, moment in moments.items()}

    def local_shards(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this process's rows of full moments."""
        return {name: self._local_shard(name, moment) for name, moment in moments.items()}

    def _to_sharded_tensor(self, name: str, moment: Tensor) -> Tensor:
        like = self._like(name, moment)
        return moment if like is None else as_shard(moment, like)

    def _local_shard(self, name: str, moment: Tensor) -> Tensor:
        like = self._like(name, moment)
        return moment if like is None else shard_of(moment, like)

    def _like(self, name: str, moment: Tensor) -> DTensor | None:
        """Return the parameter that a moment is sharded like; the step counter is replicated."""
        return self._sharded.get(name.partition(".")[2]) if moment.dim() > 0 else None


def _local(sharded: Tensor) -> Tensor:
    assert isinstance(sharded, DTensor)
    return sharded.to_local()


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""As transformers' Trainer.get_decay_parameter_names (5.23)."""


def parameter_groups(
    model: nn.Module, trained: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the trained parameters of `model` by name as an optimizer's groups: those that decay, then the others.

    Weights decay, norms and biases do not, as in transformers' Trainer.
    """
    decaying = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trained.items() if n in decaying], "weight_decay": weight_decay},
        {"params": [p for n, p in trained.items() if n not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Optimizer:
    """AdamW over the trainable parameters of one model; gradients are taken from the parameters.

    The moments have the parameters' dtype, except with stochastic rounding of bfloat16 weights
    (stochastic_rounding.py). Norms and biases do not decay, as in transformers' Trainer. Each process steps its own
    shards of sharded parameters.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter], training: TrainingConfig) -> None:
        self._shards = ShardedParameters(trained)
        self._trained = self._shards.parameters
        self._learning_rate = training.learning_rate
        self._max_grad_norm = training.max_grad_norm
        groups = parameter_groups(model, self._trained, training.weight_decay)
        betas, eps = (training.adam_beta1, training.adam_beta2), training.adam_epsilon
        self._adam: torch.optim.AdamW | RoundingAdamW
        # Some models keep a few weights in float32 regardless of the configured dtype.
        if training.stochastic_rounding and any(p.dtype is torch.bfloat16 for p in trained.values()):
            seed = (training.seed,) if self._shards.rank is None else (training.seed, self._shards.rank)
            self._adam = RoundingAdamW(groups, lr=self._learning_rate, betas=betas, eps=eps, seed=seed)
        else:
            self._adam = torch.optim.AdamW(groups, lr=self._learning_rate, betas=betas, eps=eps, fused=True)

    def clip_gradients(self) -> Tensor:
        """Clip gradients to max_grad_norm (0: never). Return the norm [] of all gradients before clipping.

        A norm that is not finite leaves gradients that are not: then take no step.
        """
        self._shards.collect()
        norm = self._shards.total_norm()
        if self._max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(list(self._trained.values()), self._max_grad_norm, norm)
        return norm

    def step(self, factor: float) -> float:
        """Take one step at `factor` times the learning rate and free the gradients. Return the learning rate used."""
        rate = self._learning_rate * factor
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._shards.drop_gradients()
        return rate

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the moments as tensors named `exp_avg.<parameter>`; references, not copies."""
        return self._shards.to_sharded_tensors(moments(self._adam, self._trained))

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `state_dict` returned. Raises KeyError if a moment of a parameter is missing."""
        load_moments(self._adam, self._trained, self._shards.local_shards(state))


def moments(adam: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return AdamW's moments of these parameters as tensors named `exp_avg.<parameter>`; references, not copies."""
    return {
        f"{moment}.{name}": adam.state[parameter][moment]
        for name, parameter in trained.items()
        if parameter in adam.state
        for moment in _MOMENTS
    }


def load_moments(
    adam: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], state: Mapping[str, torch.Tensor]
) -> None:
    """Load what `moments` returned. Raises KeyError if a moment of a parameter is missing."""
    for name, parameter in trained.items():
        if f"step.{name}" in state:
            adam.state[parameter] = {moment: _to_device_of(state[f"{moment}.{name}"], parameter) for moment in _MOMENTS}


def _to_device_of(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    # A copy, because tensors from a file are memory-mapped and not aligned.
    return tensor.to(parameter.device, copy=True)
