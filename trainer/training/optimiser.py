"""Fused AdamW over named parameters, with its state as plain tensors by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from trainer.config import TrainingConfig
from trainer.decay import decay_groups
from trainer.training.rounding import RoundingAdamW
from trainer.training.slices import Slices

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
