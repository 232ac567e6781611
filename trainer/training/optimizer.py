"""Fused AdamW over named parameters, with its state as plain tensors by parameter name.

`ShardedParameters` presents sharded parameters to the optimizer: AdamW works weight by weight, so each process steps
its own rows.
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
    """`parameters`: ordinary parameters by name, each over the memory of this process's slice; whole ones as they are.

    `rank` is this process's number among those that share the weights, None where they are whole.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._sharded = {name: p for name, p in trained.items() if isinstance(p, DTensor)}
        self.parameters = {
            name: nn.Parameter(_local(p.detach())) if isinstance(p, DTensor) else p for name, p in trained.items()
        }
        first = next(iter(self._sharded.values()), None)
        self.rank = None if first is None else first.device_mesh.get_local_rank()

    def collect(self) -> None:
        """Before a step: where the slices and their gradients are now."""
        for name, sharded in self._sharded.items():
            mine = self.parameters[name]
            mine.data = _local(sharded.detach())
            mine.grad = None if sharded.grad is None else _local(sharded.grad)

    def drop_gradients(self) -> None:
        """After a step."""
        for sharded in self._sharded.values():
            sharded.grad = None

    def total_norm(self) -> Tensor:
        """The norm of all gradients together, of all processes' slices."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.rank is None:
            return norm
        square = norm.double() ** 2
        distributed.all_reduce(square)
        return square.sqrt().to(norm.dtype)

    def to_sharded_tensors(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moments named `<moment>.<parameter>` as slices of whole tensors."""
        return {name: self._to_sharded_tensor(name, moment) for name, moment in moments.items()}

    def local_shards(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of whole moments, this process's rows."""
        return {name: self._local_shard(name, moment) for name, moment in moments.items()}

    def _to_sharded_tensor(self, name: str, moment: Tensor) -> Tensor:
        like = self._like(name, moment)
        return moment if like is None else as_shard(moment, like)

    def _local_shard(self, name: str, moment: Tensor) -> Tensor:
        like = self._like(name, moment)
        return moment if like is None else shard_of(moment, like)

    def _like(self, name: str, moment: Tensor) -> DTensor | None:
        """The parameter that a moment is cut like; the counter of steps is whole everywhere."""
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
    """The trained parameters of `model` by name as an optimizer's groups: those that decay, then the others.

    Weights decay, norms and biases do not, as in transformers' Trainer.
    """
    decaying = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trained.items() if n in decaying], "weight_decay": weight_decay},
        {"params": [p for n, p in trained.items() if n not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Optimizer:
    """AdamW over the trained parameters of one model; gradients are taken from the parameters.

    The moments have the parameters' dtype, except with stochastic rounding of bfloat16 weights
    (stochastic_rounding.py). Norms and biases do not decay, as in transformers' Trainer. Of sharded parameters each
    process steps its shards.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter], training: TrainingConfig) -> None:
        self._shards = ShardedParameters(trained)
        self._trained = self._shards.parameters
        self._learning_rate = training.learning_rate
        self._max_grad_norm = training.max_grad_norm
        groups = parameter_groups(model, self._trained, training.weight_decay)
        betas, eps = (training.adam_beta1, training.adam_beta2), training.adam_epsilon
        self._adam: torch.optim.AdamW | RoundingAdamW
        # Some models keep a few weights in float32 whatever was asked for.
        if training.stochastic_rounding and any(p.dtype is torch.bfloat16 for p in trained.values()):
            seed = (training.seed,) if self._shards.rank is None else (training.seed, self._shards.rank)
            self._adam = RoundingAdamW(groups, lr=self._learning_rate, betas=betas, eps=eps, seed=seed)
        else:
            self._adam = torch.optim.AdamW(groups, lr=self._learning_rate, betas=betas, eps=eps, fused=True)

    def clip_gradients(self) -> float:
        """The norm of all gradients together; gradients beyond max_grad_norm are scaled down to it, 0: never."""
        self._shards.collect()
        norm = self._shards.total_norm()
        if self._max_grad_norm > 0 and bool(torch.isfinite(norm)):
            nn.utils.clip_grads_with_norm_(list(self._trained.values()), self._max_grad_norm, norm)
        return float(norm)

    def step(self, factor: float) -> float:
        """One update at factor times the learning rate; gradients are dropped. Returns the rate used."""
        rate = self._learning_rate * factor
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._shards.drop_gradients()
        return rate

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moments as tensors named `exp_avg.<parameter>`; the live ones, not copies."""
        return self._shards.to_sharded_tensors(moments(self._adam, self._trained))

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned. KeyError where a moment of a parameter is missing."""
        load_moments(self._adam, self._trained, self._shards.local_shards(state))


def moments(adam: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The moments of an AdamW over these parameters as tensors named `exp_avg.<parameter>`; the live ones."""
    return {
        f"{moment}.{name}": adam.state[parameter][moment]
        for name, parameter in trained.items()
        if parameter in adam.state
        for moment in _MOMENTS
    }


def load_moments(
    adam: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], state: Mapping[str, torch.Tensor]
) -> None:
    """Take over what `moments` returned. KeyError where a moment of a parameter is missing."""
    for name, parameter in trained.items():
        if f"step.{name}" in state:
            adam.state[parameter] = {moment: _to_device_of(state[f"{moment}.{name}"], parameter) for moment in _MOMENTS}


def _to_device_of(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    # Into memory of its own: what comes from a file is mapped and not aligned.
    return tensor.to(parameter.device, copy=True)
