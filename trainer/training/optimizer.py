"""Fused AdamW over named parameters, with its state as plain tensors by parameter name.

Sharded parameters as the optimiser takes them: AdamW works weight by weight, so each process steps its own rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from trainer.config.trial import TrainingConfig
from trainer.distributed.fsdp import as_slice, slice_of
from trainer.training.stochastic_rounding import RoundingAdamW
from trainer.weight_decay import decay_groups


class Slices:
    """`parameters`: ordinary parameters by name, each over the memory of this process's slice; whole ones as they are.

    `rank` is this process's number among those that share the weights, None where they are whole.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._cut = {name: p for name, p in trained.items() if isinstance(p, DTensor)}
        self.parameters = {
            name: nn.Parameter(_local(p.detach())) if isinstance(p, DTensor) else p for name, p in trained.items()
        }
        first = next(iter(self._cut.values()), None)
        self.rank = None if first is None else first.device_mesh.get_local_rank()

    def collect(self) -> None:
        """Before a step: where the slices and their gradients are now."""
        for name, sharded in self._cut.items():
            mine = self.parameters[name]
            mine.data = _local(sharded.detach())
            mine.grad = None if sharded.grad is None else _local(sharded.grad)

    def drop_gradients(self) -> None:
        """After a step."""
        for sharded in self._cut.values():
            sharded.grad = None

    def total_norm(self) -> Tensor:
        """The norm of all gradients together, of all processes' slices."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.rank is None:
            return norm
        square = norm.double() ** 2
        distributed.all_reduce(square)
        return square.sqrt().to(norm.dtype)

    def to_whole(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moments named `<moment>.<parameter>` as slices of whole tensors."""
        return {name: self._to_whole(name, moment) for name, moment in moments.items()}

    def of_whole(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of whole moments, this process's rows."""
        return {name: self._of_whole(name, moment) for name, moment in moments.items()}

    def _to_whole(self, name: str, moment: Tensor) -> Tensor:
        like = self._like(name, moment)
        return moment if like is None else as_slice(moment, like)

    def _of_whole(self, name: str, moment: Tensor) -> Tensor:
        like = self._like(name, moment)
        return moment if like is None else slice_of(moment, like)

    def _like(self, name: str, moment: Tensor) -> DTensor | None:
        """The parameter that a moment is cut like; the counter of steps is whole everywhere."""
        return self._cut.get(name.partition(".")[2]) if moment.dim() > 0 else None


def _local(sharded: Tensor) -> Tensor:
    assert isinstance(sharded, DTensor)
    return sharded.to_local()


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Optimiser:
    """AdamW over the trained parameters of one model; gradients are taken from the parameters.

    The moments have the parameters' dtype, except with stochastic rounding of bfloat16 weights (rounding.py). Weight
    decay spares norms and biases, as transformers' Trainer does. Of sharded parameters each process steps its slices.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter], training: TrainingConfig) -> None:
        self._slices = Slices(trained)
        self._trained = self._slices.parameters
        self._rate = training.learning_rate
        self._limit = training.max_grad_norm
        groups = decay_groups(model, self._trained, training.weight_decay)
        betas, eps = (training.adam_beta1, training.adam_beta2), training.adam_epsilon
        self._adam: torch.optim.AdamW | RoundingAdamW
        # Some models keep a few weights in float32 whatever was asked for.
        if training.stochastic_rounding and any(p.dtype is torch.bfloat16 for p in trained.values()):
            seed = (training.seed,) if self._slices.rank is None else (training.seed, self._slices.rank)
            self._adam = RoundingAdamW(groups, lr=self._rate, betas=betas, eps=eps, seed=seed)
        else:
            self._adam = torch.optim.AdamW(groups, lr=self._rate, betas=betas, eps=eps, fused=True)

    def clip(self) -> float:
        """The norm of all gradients together; gradients beyond max_grad_norm are scaled down to it, 0: never."""
        self._slices.collect()
        norm = self._slices.total_norm()
        if self._limit > 0 and bool(torch.isfinite(norm)):
            nn.utils.clip_grads_with_norm_(list(self._trained.values()), self._limit, norm)
        return float(norm)

    def step(self, factor: float) -> float:
        """One update at factor times the learning rate; gradients are dropped. Returns the rate used."""
        rate = self._rate * factor
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._slices.drop_gradients()
        return rate

    def state(self) -> dict[str, torch.Tensor]:
        """The moments as tensors named `exp_avg.<parameter>`; the live ones, not copies."""
        return self._slices.to_whole(moments(self._adam, self._trained))

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned. KeyError where a moment of a parameter is missing."""
        load_moments(self._adam, self._trained, self._slices.of_whole(state))


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
            adam.state[parameter] = {moment: _beside(state[f"{moment}.{name}"], parameter) for moment in _MOMENTS}


def _beside(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    # Into memory of its own: what comes from a file is mapped and not aligned.
    return tensor.to(parameter.device, copy=True)
